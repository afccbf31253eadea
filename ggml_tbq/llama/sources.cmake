# SPDX-License-Identifier: MIT
# Centered keys and exact rows, compiled into llama's library; the patched src/CMakeLists.txt includes this.
set(TBQ_LLAMA_SOURCES
    "${CMAKE_CURRENT_LIST_DIR}/llama-center.cpp"
    "${CMAKE_CURRENT_LIST_DIR}/llama-center-file.cpp"
    "${CMAKE_CURRENT_LIST_DIR}/llama-center-stats.cpp"
    "${CMAKE_CURRENT_LIST_DIR}/llama-kv-exact.cpp")
set_source_files_properties(${TBQ_LLAMA_SOURCES} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
target_sources(llama PRIVATE ${TBQ_LLAMA_SOURCES})
target_include_directories(llama PUBLIC "$<BUILD_INTERFACE:${CMAKE_CURRENT_LIST_DIR}>")
target_link_libraries(llama PRIVATE vendor::hash)
