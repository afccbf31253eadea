// SPDX-License-Identifier: MIT
// For the programs that run attention kernels on a CPU: the kernels' environment, random problems, and grids.
#pragma once

#include "on_cpu.h"

#define __CUDACC__ // kernels, not only what the host knows of them
#include "attention-problem.cuh"

// What of CUDA's library attention-problem.cuh takes.
extern "C" {
cudaError_t cudaMalloc(void ** p, size_t bytes) {
    *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    return cudaSuccess;
}

cudaError_t cudaFree(void * p) {
    std::free(p);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void * to, const void * from, size_t bytes, cudaMemcpyKind) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void * to, int value, size_t bytes) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}

const char * cudaGetErrorString(cudaError_t) {
    return "";
}
}

static void run_grid(on_cpu::index grid, int threads, const std::function<void()> & kernel) {
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                std::memset(on_cpu::shared, 0xFF, sizeof(on_cpu::shared));
                on_cpu::run({ x, y, z }, grid, threads, kernel);
            }
        }
    }
}
