// SPDX-License-Identifier: MIT
// Blocks to values in the original domain.
#pragma once

#include "tbq-block.cuh"

// Four lanes take a block, 16 values each.  From nibble words t and t + 4, lane t has values 4t + i + 16 m, i, m < 4,
// so only the butterflies of distance 4 and 8 cross lanes.  All sums but the last are of at most 32 levels.  These are
// integers below 2048, which halves hold exactly, so the order is free.  The one rounding is that of d . sum, as on the
// CPU. dst(e, values of channels e .. e + 3) is called for e = 4t, 4t + 16, 4t + 32, 4t + 48.
template <int BITS, typename store_t>
static __device__ __forceinline__ void tbq_dequantize_block(const char * block, int t, store_t dst) {
    const uint16_t * halves = (const uint16_t *) block; // blocks are at even addresses
    auto             word   = [&](int at) { return halves[at / 2] | (uint32_t) halves[at / 2 + 1] << 16; };

    const uint32_t qs = word(TBQ_QS_OFFSET + 4 * t);
    const uint32_t q4 = BITS == 4 ? word(TBQ_QS_OFFSET + 16 + 4 * t) : qs;
    const uint32_t qh = BITS == 3 ? word(TBQ_QH_OFFSET + t % 2 * 4) : 0;

    half2 v[2][4]; // [m][i]: values 4t + i + 16 m and the same + 32
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const uint2 bytes = tbq_lookup<BITS>(tbq_nibbles<BITS>(m == 0 ? qs : q4, qh, t + 4 * m));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // a byte under the exponent of 1024 is the half 1024 + byte
            const uint32_t x = tbq_prmt(i < 2 ? bytes.x : bytes.y, 0x64646464u, i % 2 == 0 ? 0x4140 : 0x4342);
            v[m][i]          = __hsub2(*(const half2 *) &x, __float2half2_rn(1024.0f + 64.0f));
        }
    }
    auto butterfly = [](half2 & a, half2 & b) {
        const half2 sum = __hadd2(a, b);
        b               = __hsub2(a, b);
        a               = sum;
    };
#pragma unroll
    for (int m = 0; m < 2; m++) {
        butterfly(v[m][0], v[m][1]);
        butterfly(v[m][2], v[m][3]);
        butterfly(v[m][0], v[m][2]);
        butterfly(v[m][1], v[m][3]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        butterfly(v[0][i], v[1][i]);
    }
#pragma unroll
    for (int h = 1; h < 4; h *= 2) {
        const half2 sign = __float2half2_rn(t & h ? -1.0f : 1.0f);
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                v[m][i] = __hfma2(v[m][i], sign, __shfl_xor_sync(TBQ_WARP_ALL, v[m][i], h));
            }
        }
    }

    // d = 0 decodes to +0, whatever the signs of the products
    const float d = __half2float(*(const half *) block) * 0.125f;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        float lo[4], hi[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 x = __half22float2(v[m][i]);
            lo[i]          = d == 0.0f ? 0.0f : tbq_flip(d * (x.x + x.y), 4 * t + i + 16 * m);
            hi[i]          = d == 0.0f ? 0.0f : tbq_flip(d * (x.x - x.y), 4 * t + i + 16 * m + 32);
        }
        dst(4 * t + 16 * m, make_float4(lo[0], lo[1], lo[2], lo[3]));
        dst(4 * t + 16 * m + 32, make_float4(hi[0], hi[1], hi[2], hi[3]));
    }
}

// Stores four neighboring values, at a multiple of four elements.
static __device__ __forceinline__ void tbq_store4(float * p, float4 x) {
    *(float4 *) p = x;
}

static __device__ __forceinline__ void tbq_store4(half * p, float4 x) {
    const half2 lo = __floats2half2_rn(x.x, x.y), hi = __floats2half2_rn(x.z, x.w);
    *(uint2 *) p = make_uint2(*(const uint32_t *) &lo, *(const uint32_t *) &hi);
}

static __device__ __forceinline__ void tbq_store4(nv_bfloat16 * p, float4 x) {
    const nv_bfloat162 lo = __floats2bfloat162_rn(x.x, x.y), hi = __floats2bfloat162_rn(x.z, x.w);
    *(uint2 *) p = make_uint2(*(const uint32_t *) &lo, *(const uint32_t *) &hi);
}

// Rows of blocks to rows of values.  With ids (GET_ROWS), row i1 of (i2, i3) is row ids[i1, i2, i3] of the source.
struct tbq_decode_args {
    const char *  src;
    void *        dst;
    tbq_rows      from; // the shape of the result, and the strides of the source in bytes
    tbq_rows      to;   // the same shape, and the strides of the result in elements
    const int *   ids;
    long long     ids_s0, ids_s1, ids_s2; // elements
    const float * mean;                   // added to the values of all rows of (i2, i3), or null (centered keys)
    long long     mean_s2;                // elements from one i2 to the next

    __device__ __forceinline__ const float * mean_at(const tbq_index4 & at) const {
        return mean ? mean + at.i2 * mean_s2 + at.i0 * 64 : nullptr;
    }
};

// grid: enough threads for 4 x the number of blocks; a multiple of 32 of them
template <int BITS, typename dst_t> __global__ void __launch_bounds__(256)
    tbq_dequantize_rows(const tbq_decode_args a) {
    const long long  index = ((long long) blockIdx.x * blockDim.x + threadIdx.x) / 4;
    const long long  n     = a.from.n_blocks();
    const tbq_index4 at    = a.from.index4(index < n ? index : n - 1); // all lanes take part in the shuffles
    const int        t     = threadIdx.x % 4;
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    const long long     row  = a.ids ? a.ids[at.i1 * a.ids_s0 + at.i2 * a.ids_s1 + at.i3 * a.ids_s2] : at.i1;
    const char * const  src  = a.src + at.i0 * tbq_block_bytes(BITS) + a.from.offset(row, at.i2, at.i3);
    dst_t * const       dst  = (dst_t *) a.dst + at.i0 * 64 + a.to.offset(at.i1, at.i2, at.i3);
    const float * const mean = a.mean_at(at);
    tbq_dequantize_block<BITS>(src, t, [&](int e, float4 x) {
        if (mean) {
            x.x += mean[e], x.y += mean[e + 1], x.z += mean[e + 2], x.w += mean[e + 3];
        }
        if (index < n) {
            tbq_store4(dst + e, x);
        }
    });
}

// --- exact rows ------------------------------------------------------------------------------------------------------

static __device__ __forceinline__ void tbq_store1(float * p, float x) {
    *p = x;
}

static __device__ __forceinline__ void tbq_store1(half * p, float x) {
    *p = __float2half_rn(x);
}

static __device__ __forceinline__ void tbq_store1(nv_bfloat16 * p, float x) {
    *p = __float2bfloat16_rn(x);
}

// Rows of tbq8_0 to rows of values, a half-warp for each block.  With cells, row i1 of (i2, i3) becomes row cells[i1 +
// i3 cells_s1] of the result, unless that is -1: exact rows over the decoded rows of a cache.
//
// The sums are of 64 signed bytes, which floats hold exactly, so the one rounding is that of d . sum, as on the CPU.
// grid: at least a half-warp for each block
template <typename dst_t> __global__ void __launch_bounds__(256)
    tbq_dequantize_exact_rows(const tbq_decode_args a, const int * cells, long long cells_s1) {
    const int        l     = threadIdx.x % 16;
    const long long  index = ((long long) blockIdx.x * blockDim.x + threadIdx.x) / 16;
    const long long  n     = a.from.n_blocks();
    const tbq_index4 at    = a.from.index4(index < n ? index : n - 1); // all lanes take part in the shuffles
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    const long long      row = a.ids ? a.ids[at.i1 * a.ids_s0 + at.i2 * a.ids_s1 + at.i3 * a.ids_s2] : at.i1;
    const long long      to  = cells ? cells[at.i1 + at.i3 * cells_s1] : at.i1;
    const char * const   src = a.src + at.i0 * sizeof(block_tbq8_0) + a.from.offset(row, at.i2, at.i3);
    const int8_t * const qs  = (const int8_t *) src + TBQ8_QS_OFFSET;
    const float          d   = *(const float *) src;
    float                v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        v[j] = qs[l + 16 * j];
    }
    tbq_butterflies_16(v, l);
    if (index < n && to >= 0) {
        dst_t * const       dst  = (dst_t *) a.dst + at.i0 * 64 + a.to.offset(to, at.i2, at.i3);
        const float * const mean = a.mean_at(at);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            // d = 0 decodes to +0, whatever the signs of the products
            const float x = d == 0.0f ? 0.0f : tbq_flip(d * 0.125f * v[j], l + 16 * j);
            tbq_store1(dst + l + 16 * j, mean ? x + mean[l + 16 * j] : x);
        }
    }
}
