// SPDX-License-Identifier: MIT
// Weights in tbq times one to eight columns of activations: MUL_MAT and MUL_MAT_ID in decode.
//
// The rotation cancels in a dot product, so activations are rotated once and weights stay rotated.  Activations have 8
// bits and a scale for 64 (TBQ8_ACT of the CPU), levels are bytes, and dp4a multiplies them.
#pragma once

#include "tbq-block.cuh"

// 64 activations.  qs has the order of the nibble words: word w of a block is multiplied by qs[8 w] .. qs[8 w + 7].
struct tbq_activations {
    float  d;
    int8_t qs[64];
};

struct tbq_activations_args {
    const float *     src; // rows of 64 rows.ne[0] values
    tbq_activations * dst;
    tbq_rows          rows; // strides of the source in elements
};

// A warp to a block.  grid: enough warps for all
static __global__ void __launch_bounds__(128) tbq_rotate_activations(const tbq_activations_args a) {
    const int       lane = threadIdx.x % 32;
    const long long i    = ((long long) blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (i >= a.rows.n_blocks()) {
        return;
    }
    const tbq_index4 from = a.rows.index4(i);
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    const float * x  = a.src + from.i0 * 64 + a.rows.offset(from.i1, from.i2, from.i3);
    float         lo = x[lane], hi = x[lane + 32];
    tbq_rotate_warp(lo, hi, lane);
    float largest = fmaxf(fabsf(lo), fabsf(hi));
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(TBQ_WARP_ALL, largest, h));
    }
    // a NaN or Inf must not be lost in the rounding
    const bool  bad     = __any_sync(TBQ_WARP_ALL, !(fabsf(lo) <= 3.4e38f) || !(fabsf(hi) <= 3.4e38f));
    const float inverse = largest > 0.0f && !bad ? 127.0f / largest : 0.0f;
    // value e < 32 is byte 2 (e % 4) of word e / 4, but bytes 0..3 are those of channels 0, 32, 1, 33; and so on
    const int at        = lane / 4 * 8 + lane % 4 * 2;
    a.dst[i].qs[at]     = (int8_t) __float2int_rn(lo * inverse);
    a.dst[i].qs[at + 1] = (int8_t) __float2int_rn(hi * inverse);
    if (lane == 0) {
        a.dst[i].d = bad ? __int_as_float(0x7FC00000) : largest / 127.0f;
    }
}

static __device__ __forceinline__ int tbq_dp4a(int a, int b, int c) {
#if __CUDA_ARCH__ >= 610
    return __dp4a(a, b, c);
#else
    for (int i = 0; i < 32; i += 8) {
        c += (int) (int8_t) (a >> i) * (int) (int8_t) (b >> i);
    }
    return c;
#endif
}

struct tbq_matvec_args {
    const char *            w;   // [ne00, ne01, ne02, ne03] in tbq
    const tbq_activations * x;   // columns, [n_blocks, ne11, ne12, ne13], contiguous
    float *                 dst; // [ne01, ..]
    const int *             ids; // null, or for MUL_MAT_ID: expert of (slot, token)
    int                     n_blocks, n_rows, n_cols;
    long long               nb1, nb2, nb3;          // of w, bytes
    int                     ne02, ne03, ne12, ne13; // broadcast; with ids: ne12 = tokens
    int                     x_slots;                // with ids: columns of x that a token has, 1 or one for each slot
    long long               x_s1, x_s2, x_s3;       // of x, blocks
    long long               dst_s1, dst_s2, dst_s3; // elements
    long long               ids_s0, ids_s1;         // elements
};

#define TBQ_MATVEC_WARPS 4

// A warp to a row of w and COLS columns.  Eight lanes to a block, a nibble word each.
// grid: (rows / warps, ne12 or slots, ne13 or tokens)
template <int BITS, int COLS> __global__ void __launch_bounds__(32 * TBQ_MATVEC_WARPS)
    tbq_matvec(const tbq_matvec_args a) {
    const int lane = threadIdx.x % 32;
    const int row  = blockIdx.x * TBQ_MATVEC_WARPS + threadIdx.x / 32;
    if (row >= a.n_rows) {
        return;
    }
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    const char *            w = a.w + row * a.nb1;
    const tbq_activations * x = a.x;
    float * dst = a.dst + row + blockIdx.y * (a.ids ? a.dst_s1 : a.dst_s2) + blockIdx.z * (a.ids ? a.dst_s2 : a.dst_s3);
    if (a.ids) {
        w += a.ids[blockIdx.y * a.ids_s0 + blockIdx.z * a.ids_s1] * a.nb2;
        x += blockIdx.y % a.x_slots * a.x_s1 + blockIdx.z * a.x_s2;
    } else {
        w += blockIdx.y / (a.ne12 / a.ne02) * a.nb2 + blockIdx.z / (a.ne13 / a.ne03) * a.nb3;
        x += blockIdx.y * a.x_s2 + blockIdx.z * a.x_s3;
    }

    const int word = lane % 8;
    float     sum[COLS];
#pragma unroll
    for (int c = 0; c < COLS; c++) {
        sum[c] = 0.0f;
    }
    for (int b = lane / 8; b < a.n_blocks; b += 4) {
        const uint16_t * halves = (const uint16_t *) (w + (long long) b * tbq_block_bytes(BITS)); // at an even address
        const int        at     = (TBQ_QS_OFFSET + 4 * (BITS == 4 ? word : word % 4)) / 2;
        const int        at_h   = (TBQ_QH_OFFSET + 4 * (word % 2)) / 2;
        const uint32_t   qs     = halves[at] | (uint32_t) halves[at + 1] << 16;
        const uint32_t   qh     = BITS == 3 ? halves[at_h] | (uint32_t) halves[at_h + 1] << 16 : 0;
        const float      d      = __half2float(*(const half *) halves);
        const uint2      levels = tbq_lookup<BITS>(tbq_nibbles<BITS>(qs, qh, word));
#pragma unroll
        for (int c = 0; c < COLS; c++) {
            const tbq_activations * xb = x + c * a.x_s1 + b;
            const int *             q  = (const int *) (xb->qs + 8 * word);
            // levels are biased by 64, so 64 times the sum of q is subtracted
            int dot = tbq_dp4a((int) levels.x, q[0], tbq_dp4a((int) levels.y, q[1], 0));
            dot     = tbq_dp4a((int) 0xC0C0C0C0, q[0], tbq_dp4a((int) 0xC0C0C0C0, q[1], dot));
            sum[c] += (float) dot * (d * xb->d);
        }
    }
#pragma unroll
    for (int c = 0; c < COLS; c++) {
#pragma unroll
        for (int h = 16; h > 0; h /= 2) {
            sum[c] += __shfl_xor_sync(TBQ_WARP_ALL, sum[c], h);
        }
        if (lane == c) {
            dst[c * a.dst_s1] = sum[c];
        }
    }
}
