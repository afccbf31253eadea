# SPDX-License-Identifier: MIT
# The pinned llama.cpp with patches/ applied, as a part of this build.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)

# Where the tree lies decides what is rebuilt: prepare changes the time of no file whose content stays.
set(TBQ_LLAMA_DIR "${CMAKE_CURRENT_BINARY_DIR}/llama.cpp-src")
set(TBQ_PREPARE "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/tools/patch_series.py" prepare "${TBQ_LLAMA_DIR}")
if(TBQ_LLAMA_CPP_SOURCE)
    list(APPEND TBQ_PREPARE --source "${TBQ_LLAMA_CPP_SOURCE}")
endif()
execute_process(COMMAND ${TBQ_PREPARE} RESULT_VARIABLE TBQ_PREPARE_RESULT ERROR_VARIABLE TBQ_PREPARE_ERROR
    ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT TBQ_PREPARE_RESULT EQUAL 0)
    # The blank in front keeps CMake from wrapping the line.
    message(FATAL_ERROR " tbq: ${TBQ_PREPARE_ERROR}")
endif()
# The bindings that fit this llama.cpp, for `pip install ggml-tbq[llama]`: tbq.llama loads them.
set(TBQ_BINDINGS "${CMAKE_CURRENT_BINARY_DIR}/bindings")
if(NOT TBQ_LLAMA_CPP_SOURCE)
    execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/tools/patch_series.py" bindings "${TBQ_BINDINGS}"
        RESULT_VARIABLE TBQ_BINDINGS_RESULT ERROR_VARIABLE TBQ_BINDINGS_ERROR ERROR_STRIP_TRAILING_WHITESPACE)
    if(NOT TBQ_BINDINGS_RESULT EQUAL 0)
        message(FATAL_ERROR " tbq: ${TBQ_BINDINGS_ERROR}")
    endif()
    install(DIRECTORY "${TBQ_BINDINGS}/" DESTINATION tbq/_vendor/llama_cpp COMPONENT tbq PATTERN ".*" EXCLUDE)
endif()
# A changed series is applied again by the next build, without a new configure by hand.
file(GLOB TBQ_PATCHES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/patches/*.patch")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${TBQ_PATCHES} patches/pin.json tools/patch_series.py)

file(READ patches/pin.json TBQ_PIN)
string(JSON TBQ_LLAMA_CPP_COMMIT GET "${TBQ_PIN}" commit)
string(JSON TBQ_PIN_REQUIREMENT GET "${TBQ_PIN}" requirement)

# --- options of llama.cpp; what the user gives with -D wins ---------------------------------------------------

set(GGML_TBQ_DIR "${CMAKE_CURRENT_SOURCE_DIR}/ggml_tbq")
set(BUILD_SHARED_LIBS ON CACHE BOOL "llama-cpp-python loads libllama")
set(LLAMA_BUILD_COMMIT "${TBQ_LLAMA_CPP_COMMIT}-tbq" CACHE STRING "" FORCE)
set(LLAMA_BUILD_NUMBER 0 CACHE STRING "")
foreach(option LLAMA_BUILD_COMMON LLAMA_BUILD_TOOLS LLAMA_BUILD_SERVER LLAMA_BUILD_TESTS)
    set(${option} ON CACHE BOOL "")
endforeach()
# TLS for llama-server and for downloads of models, where OpenSSL 3 and its headers are found.
set(LLAMA_OPENSSL ON CACHE BOOL "")
# Devices of other machines: the backend, and ggml-rpc-server.  TCP alone: RDMA would need a library at run time.
# FORCE, because build folders of releases without it have OFF in their cache.
set(TBQ_RPC ON CACHE BOOL "the RPC backend and ggml-rpc-server")
set(GGML_RPC ${TBQ_RPC} CACHE BOOL "" FORCE)
set(GGML_RPC_RDMA OFF CACHE BOOL "")
# The web UI is `make serve`'s business, because building it needs npm and its network.
foreach(option LLAMA_BUILD_EXAMPLES LLAMA_BUILD_APP LLAMA_CURL LLAMA_BUILD_UI LLAMA_USE_PREBUILT_UI
        LLAMA_TOOLS_INSTALL LLAMA_TESTS_INSTALL)
    set(${option} OFF CACHE BOOL "")
endforeach()
# Native by default: it is built where it runs, and the build is one CPU backend instead of one for each level.  The
# tbq kernels choose their instruction set at run time either way.
if(TBQ_PORTABLE)
    set(GGML_NATIVE OFF CACHE BOOL "" FORCE)
    set(GGML_BACKEND_DL ON CACHE BOOL "" FORCE)
    set(GGML_CPU_ALL_VARIANTS ON CACHE BOOL "" FORCE)
    # ggml's own threads, so that the wheel needs no OpenMP runtime
    set(GGML_OPENMP OFF CACHE BOOL "" FORCE)
else()
    set(GGML_NATIVE ON CACHE BOOL "")
endif()

if(TBQ_CUDA)
    # CMake would say the same in a page.
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
        message(FATAL_ERROR " tbq: error: no CUDA compiler found; install the CUDA toolkit and put nvcc into $PATH, or name it in $CUDACXX")
    endif()
    set(GGML_CUDA ON CACHE BOOL "" FORCE)
    if(TBQ_PORTABLE)
        # NCCL would be one more package; without it several GPUs copy peer to peer
        set(GGML_CUDA_NCCL OFF CACHE BOOL "" FORCE)
    endif()
    # ggml sets its own default before CMake would look at the environment
    if(DEFINED ENV{CUDAARCHS})
        set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}" CACHE STRING "")
    endif()
endif()

if(TBQ_VULKAN)
    find_package(Vulkan QUIET COMPONENTS glslc)
    find_package(SPIRV-Headers QUIET CONFIG)
    if(NOT Vulkan_FOUND OR NOT SPIRV-Headers_FOUND)
        message(FATAL_ERROR " tbq: error: glslc, the Vulkan headers or the SPIR-V headers are missing (Debian: apt install glslc libvulkan-dev spirv-headers)")
    endif()
    set(GGML_VULKAN ON CACHE BOOL "" FORCE)
endif()

if(APPLE)
    set(CMAKE_INSTALL_RPATH "@loader_path;@loader_path/../lib")
else()
    set(CMAKE_INSTALL_RPATH "$ORIGIN;$ORIGIN/../lib")
    # RPATH instead of RUNPATH: it is searched before $LD_LIBRARY_PATH, where another llama.cpp may lie.
    add_link_options("LINKER:--disable-new-dtags")
endif()

enable_testing()
add_subdirectory("${TBQ_LLAMA_DIR}" llama.cpp EXCLUDE_FROM_ALL)
# Only ggml's list of backends reads this definition, which upstream gives to everything that links ggml: without it those
# files compile as they do without RPC, so that a cache of objects keeps them.
get_target_property(TBQ_GGML_DEFINITIONS ggml INTERFACE_COMPILE_DEFINITIONS)
if(TBQ_GGML_DEFINITIONS)
    list(REMOVE_ITEM TBQ_GGML_DEFINITIONS GGML_USE_RPC)
    set_property(TARGET ggml PROPERTY INTERFACE_COMPILE_DEFINITIONS ${TBQ_GGML_DEFINITIONS})
endif()

# --- how long it takes to compile ------------------------------------------------------------------------------

# Options, JSON, templates and HTTP are half of the work for the compiler and none of the work for a token: -O1 takes two
# thirds of the time of -O3.  What runs for each token keeps -O3.
if(NOT MSVC)
    foreach(target llama-common server-context llama-server-impl cpp-httplib)
        if(TARGET ${target})
            target_compile_options(${target} PRIVATE "$<$<CONFIG:Release>:-O1>")
        endif()
    endforeach()
    file(GLOB TBQ_PER_TOKEN RELATIVE "${TBQ_LLAMA_DIR}/common"
        "${TBQ_LLAMA_DIR}/common/sampling.cpp" "${TBQ_LLAMA_DIR}/common/speculative.cpp" "${TBQ_LLAMA_DIR}/common/ngram-*.cpp"
        "${TBQ_LLAMA_DIR}/common/reasoning-budget.cpp" "${TBQ_LLAMA_DIR}/common/unicode.cpp" "${TBQ_LLAMA_DIR}/common/trie.cpp")
    set_source_files_properties(${TBQ_PER_TOKEN} DIRECTORY "${TBQ_LLAMA_DIR}/common"
        PROPERTIES COMPILE_OPTIONS "$<$<CONFIG:Release>:-O3>")
endif()
# The graphs of image and audio models are 40 small files with the same headers; src/ joins its models in this way too.
if(TARGET mtmd)
    set_property(TARGET mtmd PROPERTY UNITY_BUILD ON)
    set_property(TARGET mtmd PROPERTY UNITY_BUILD_BATCH_SIZE 12)
    file(GLOB TBQ_MTMD_OTHERS "${TBQ_LLAMA_DIR}/tools/mtmd/*.cpp")
    set_source_files_properties(${TBQ_MTMD_OTHERS} DIRECTORY "${TBQ_LLAMA_DIR}/tools/mtmd"
        PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endif()

# --- what is built, and what the wheel gets ---------------------------------------------------------------------

# The demo needs a server and what measures the means of keys; the other programs take a quarter of the time.
set(TBQ_PROGRAM_NAMES server cache-center)
if(TBQ_TOOLS)
    list(APPEND TBQ_PROGRAM_NAMES cli completion perplexity bench batched-bench quantize imatrix fit-params gguf-split
        tokenize tts mtmd-cli cvector-generator export-lora results)
endif()
set(TBQ_PROGRAMS)
foreach(program IN LISTS TBQ_PROGRAM_NAMES)
    if(TARGET llama-${program})
        list(APPEND TBQ_PROGRAMS llama-${program})
    endif()
endforeach()
if(TARGET ggml-rpc-server)
    list(APPEND TBQ_PROGRAMS ggml-rpc-server)
endif()

# The shared libraries that those programs need, found by walking what they link.
function(tbq_linked_libraries target result)
    set(found ${${result}})
    set(linked)
    foreach(property LINK_LIBRARIES INTERFACE_LINK_LIBRARIES)
        get_target_property(names ${target} ${property})
        if(names)
            list(APPEND linked ${names})
        endif()
    endforeach()
    foreach(name IN LISTS linked)
        if(NOT TARGET ${name})
            continue()
        endif()
        get_target_property(alias ${name} ALIASED_TARGET)
        if(alias)
            set(name ${alias})
        endif()
        get_target_property(imported ${name} IMPORTED)
        if(imported OR name IN_LIST found)
            continue()
        endif()
        list(APPEND found ${name})
        tbq_linked_libraries(${name} found)
    endforeach()
    set(${result} ${found} PARENT_SCOPE)
endfunction()

set(TBQ_LIBRARIES)
foreach(program IN LISTS TBQ_PROGRAMS)
    tbq_linked_libraries(${program} TBQ_LIBRARIES)
endforeach()
set(TBQ_SHARED)
foreach(library IN LISTS TBQ_LIBRARIES)
    get_target_property(type ${library} TYPE)
    if(type STREQUAL "SHARED_LIBRARY")
        list(APPEND TBQ_SHARED ${library})
        # Names of our own: a process that has loaded another llama.cpp keeps its libllama and libggml apart from ours.
        set_property(TARGET ${library} PROPERTY OUTPUT_NAME "tbq-${library}")
        # A wheel holds no symbolic links, so libllama.so.0 -> libllama.so.0.5.0 would be packed three times.
        set_property(TARGET ${library} PROPERTY VERSION)
        set_property(TARGET ${library} PROPERTY SOVERSION)
        # Headers are not packed.
        set_property(TARGET ${library} PROPERTY PUBLIC_HEADER)
        set_property(TARGET ${library} PROPERTY PRIVATE_HEADER)
    endif()
endforeach()
# llama-cpp-python looks for libllama, libggml and libmtmd: empty libraries of these names that need ours, whose symbols
# are then found through them.
foreach(library llama ggml mtmd)
    if(library IN_LIST TBQ_SHARED)
        add_library(tbq-alias-${library} SHARED cmake/alias.c)
        set_target_properties(tbq-alias-${library} PROPERTIES OUTPUT_NAME ${library} NO_SONAME ON
            LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/alias" RUNTIME_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/alias")
        target_link_libraries(tbq-alias-${library} PRIVATE ${library})
        if(NOT APPLE AND UNIX)
            target_link_options(tbq-alias-${library} PRIVATE "LINKER:--no-as-needed")
        endif()
        list(APPEND TBQ_SHARED tbq-alias-${library})
    endif()
endforeach()
# With TBQ_PORTABLE, and for CUDA's own wheel, backends are modules, which ggml looks for in the folder of its library.
set(TBQ_MODULES)
foreach(backend IN LISTS GGML_AVAILABLE_BACKENDS)
    if(GGML_BACKEND_DL AND TARGET ${backend})
        list(APPEND TBQ_MODULES ${backend})
        set_property(TARGET ${backend} PROPERTY VERSION)
        set_property(TARGET ${backend} PROPERTY SOVERSION)
    endif()
endforeach()

add_custom_target(tbq-llama ALL DEPENDS ${TBQ_PROGRAMS} ${TBQ_SHARED} ${TBQ_MODULES})

# Everything that llama.cpp's own ctest may run; `make test` builds it, an install does not.
get_property(TBQ_LLAMA_TESTS DIRECTORY "${TBQ_LLAMA_DIR}/tests" PROPERTY BUILDSYSTEM_TARGETS)
list(FILTER TBQ_LLAMA_TESTS INCLUDE REGEX "^test-")
if(TARGET test-rpc-multi-server) # in the folder of the server
    list(APPEND TBQ_LLAMA_TESTS test-rpc-multi-server)
endif()
add_custom_target(tbq-llama-tests DEPENDS ${TBQ_LLAMA_TESTS} ${TBQ_MODULES})

# `make bench`.
find_package(Threads REQUIRED)
add_executable(tbq-bench-attention EXCLUDE_FROM_ALL bench/attention.cpp)
target_link_libraries(tbq-bench-attention PRIVATE tbq Threads::Threads)
set_target_properties(tbq-bench-attention PROPERTIES CXX_STANDARD 17
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/bin")
# The benchmark compares with ggml's own types, so it links the CPU backend, which modules do not allow.
if(NOT GGML_BACKEND_DL)
    add_executable(tbq-bench-kernels EXCLUDE_FROM_ALL bench/kernels.cpp)
    target_link_libraries(tbq-bench-kernels PRIVATE ggml-cpu ggml-base)
    set_target_properties(tbq-bench-kernels PROPERTIES CXX_STANDARD 17
        RUNTIME_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/bin")
endif()

install(TARGETS ${TBQ_PROGRAMS} RUNTIME DESTINATION tbq/bin COMPONENT tbq)
install(TARGETS ${TBQ_SHARED}
    LIBRARY DESTINATION tbq/lib COMPONENT tbq
    RUNTIME DESTINATION tbq/lib COMPONENT tbq)
if(TBQ_MODULES)
    # CUDA's backend is a separate wheel (packaging/cuda). It takes CUDA's libraries from PyPI's packages in the same environment.
    if(ggml-cuda IN_LIST TBQ_MODULES)
        list(REMOVE_ITEM TBQ_MODULES ggml-cuda)
        find_package(CUDAToolkit REQUIRED) # what ggml found stays in its own folder
        set_property(TARGET ggml-cuda PROPERTY INSTALL_RPATH
            "$ORIGIN" "$ORIGIN/../../nvidia/cu${CUDAToolkit_VERSION_MAJOR}/lib")
        install(TARGETS ggml-cuda LIBRARY DESTINATION tbq/lib COMPONENT tbq-cuda)
    endif()
    install(TARGETS ${TBQ_MODULES} LIBRARY DESTINATION tbq/lib COMPONENT tbq)
endif()

# What `tbq paths` prints in addition to the folders, and whether llama-server speaks TLS.
set(TBQ_TLS no)
get_target_property(TBQ_HTTP_DEFINITIONS cpp-httplib COMPILE_DEFINITIONS)
if("CPPHTTPLIB_OPENSSL_SUPPORT" IN_LIST TBQ_HTTP_DEFINITIONS)
    set(TBQ_TLS yes)
endif()
file(CONFIGURE OUTPUT build.json CONTENT [=[{"llama_cpp_commit": "@TBQ_LLAMA_CPP_COMMIT@", "llama_cpp_python": "@TBQ_PIN_REQUIREMENT@", "tls": "@TBQ_TLS@"}
]=] @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/build.json" DESTINATION tbq COMPONENT tbq)
