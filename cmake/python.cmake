# SPDX-License-Identifier: MIT
# The extension module tbq._ffi: cffi in API mode, against the stable ABI, so one build serves every Python 3.10+.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.SABIModule)

set(TBQ_FFI_C "${CMAKE_CURRENT_BINARY_DIR}/_ffi.c")
add_custom_command(
    OUTPUT "${TBQ_FFI_C}"
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/tools/emit_ffi.py"
            "${CMAKE_CURRENT_SOURCE_DIR}/python/tbq/tbq.cdef" "${TBQ_FFI_C}"
    DEPENDS tools/emit_ffi.py python/tbq/tbq.cdef
    COMMENT "Generating _ffi.c"
    VERBATIM)

add_library(tbq-ffi MODULE "${TBQ_FFI_C}")
target_link_libraries(tbq-ffi PRIVATE tbq)
if(Python_Development.SABIModule_FOUND)
    target_include_directories(tbq-ffi PRIVATE ${Python_INCLUDE_DIRS})
elseif(WIN32)
    message(FATAL_ERROR "Python's headers and import library are missing; reinstall Python with its development files")
else()
    # Distributions put Python.h into a package of its own (python3-dev).  What cffi's code needs of it is small and
    # part of the stable ABI, so a machine without that package builds too.
    message(STATUS "tbq: Python.h is not installed, using the declarations in cmake/stable-abi")
    target_include_directories(tbq-ffi PRIVATE cmake/stable-abi)
endif()
set_target_properties(tbq-ffi PROPERTIES OUTPUT_NAME _ffi PREFIX "" C_VISIBILITY_PRESET hidden
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/python")
if(WIN32)
    set_target_properties(tbq-ffi PROPERTIES SUFFIX ".pyd")
    target_link_libraries(tbq-ffi PRIVATE ${Python_SABI_LIBRARIES})
else()
    set_target_properties(tbq-ffi PROPERTIES SUFFIX ".abi3.so")
endif()
if(APPLE)
    target_link_options(tbq-ffi PRIVATE -undefined dynamic_lookup)
elseif(UNIX)
    # Local names of libtbq stay local: two modules with tbq kernels in one process must not meet.
    target_link_options(tbq-ffi PRIVATE -Wl,--exclude-libs,ALL)
endif()

install(TARGETS tbq-ffi LIBRARY DESTINATION tbq COMPONENT tbq)
