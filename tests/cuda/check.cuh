// SPDX-License-Identifier: MIT
// For the programs in this folder: an error of CUDA ends them with status 2.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                                         \
    do {                                                                                    \
        const cudaError_t e = (call);                                                       \
        if (e != cudaSuccess) {                                                             \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e)); \
            std::exit(2);                                                                   \
        }                                                                                   \
    } while (0)
