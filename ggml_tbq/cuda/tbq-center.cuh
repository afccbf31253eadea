// SPDX-License-Identifier: MIT Mean-centered keys of llama.cpp's own quantized types: SUB and SET_ROWS in one launch.
// In decode, a launch of its own for SUB took 2.5 % of the time of a 7B model with an empty cache.
#pragma once

#include "ggml-cuda/cpy-utils.cuh"

// Rows of keys, their mean, and where they go.
struct tbq_center_args {
    const float * src;
    const float * mean; // ne0 blocks of values
    char *        dst;
    const void *  ids; // row i becomes row ids[i]
    int           ids_64;
    long long     ids_s0; // elements
    long long     ne0;    // blocks of a row
    long long     n;      // blocks of all rows
    long long     s1;     // elements between rows of the source
    long long     nb1;    // bytes between rows of the destination
};

#define TBQ_CENTER_THREADS 64

// A thread takes a block, as in the backend's own SET_ROWS, whose function `quantize` is.
// src, mean and s1 floats: multiples of 16 bytes.
template <typename block_t, int QK, void (*quantize)(const float *, block_t *)>
static __global__ void __launch_bounds__(TBQ_CENTER_THREADS) tbq_center_rows(const tbq_center_args a) {
    const long long i     = (long long) blockIdx.x * TBQ_CENTER_THREADS + threadIdx.x;
    const long long block = i % a.ne0, row = i / a.ne0;
    const bool      here = i < a.n;

    float4 x[QK / 4]; // the mean first: it does not depend on the previous grid (see tbq_center)
#pragma unroll
    for (int j = 0; j < QK / 4; j++) {
        x[j] = here ? ((const float4 *) (a.mean + block * QK))[j] : float4();
    }
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    if (!here) {
        return;
    }
    const float * src = a.src + row * a.s1 + block * QK;
    float         v[QK];
#pragma unroll
    for (int j = 0; j < QK / 4; j++) {
        const float4 k = ((const float4 *) src)[j];
        v[4 * j + 0]   = __fsub_rn(k.x, x[j].x);
        v[4 * j + 1]   = __fsub_rn(k.y, x[j].y);
        v[4 * j + 2]   = __fsub_rn(k.z, x[j].z);
        v[4 * j + 3]   = __fsub_rn(k.w, x[j].w);
    }
    const long long to = a.ids_64 ? ((const long long *) a.ids)[row * a.ids_s0] : ((const int *) a.ids)[row * a.ids_s0];
    quantize(v, (block_t *) (a.dst + to * a.nb1) + block);
}
