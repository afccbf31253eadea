# SPDX-License-Identifier: MIT
# A toolchain file: clang and lld against the libraries in TBQ_SYSROOT (tools/sysroot.py), for the processor TBQ_ARCH.
# TBQ_CUDA_ROOTS: the CUDA toolkit and the folder of cuBLAS, for the CUDA backend.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES TBQ_SYSROOT TBQ_ARCH TBQ_CLANG TBQ_CUDA_ROOTS)
set(TBQ_TRIPLE "${TBQ_ARCH}-linux-gnu")
if(NOT TBQ_ARCH STREQUAL CMAKE_HOST_SYSTEM_PROCESSOR)
    set(CMAKE_SYSTEM_NAME Linux)
    set(CMAKE_SYSTEM_PROCESSOR "${TBQ_ARCH}")
endif()

set(CMAKE_SYSROOT "${TBQ_SYSROOT}")
set(CMAKE_LIBRARY_ARCHITECTURE "${TBQ_TRIPLE}")
foreach(language C CXX)
    set(CMAKE_${language}_COMPILER_TARGET "${TBQ_TRIPLE}")
endforeach()
set(CMAKE_C_COMPILER "${TBQ_CLANG}")
string(REGEX REPLACE "clang(-[0-9]+)?$" "clang++\\1" CMAKE_CXX_COMPILER "${TBQ_CLANG}")
foreach(kind EXE SHARED MODULE)
    set(CMAKE_${kind}_LINKER_FLAGS_INIT "-fuse-ld=lld")
endforeach()
string(REGEX REPLACE "clang(-[0-9]+)?$" "llvm-strip\\1" CMAKE_STRIP "${TBQ_CLANG}")

set(CMAKE_FIND_ROOT_PATH "${TBQ_SYSROOT}" ${TBQ_CUDA_ROOTS})
if(TBQ_CUDA_ROOTS)
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
    set(CMAKE_CUDA_FLAGS_INIT "-Xcompiler=--target=${TBQ_TRIPLE} -Xcompiler=--sysroot=${TBQ_SYSROOT}")
    set(CMAKE_PREFIX_PATH ${TBQ_CUDA_ROOTS})
    # CMake gives the sysroot to the link of C++, not to that of CUDA
    foreach(kind EXE SHARED MODULE)
        string(APPEND CMAKE_${kind}_LINKER_FLAGS_INIT " --target=${TBQ_TRIPLE} --sysroot=${TBQ_SYSROOT}")
    endforeach()
endif()
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
foreach(what LIBRARY INCLUDE PACKAGE)
    set(CMAKE_FIND_ROOT_PATH_MODE_${what} ONLY)
endforeach()
# Debian 11 has no OpenSSL 3 that a program could load.
set(OPENSSL_USE_STATIC_LIBS ON)
