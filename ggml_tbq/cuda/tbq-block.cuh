// SPDX-License-Identifier: MIT
// Blocks of the tbq types on a GPU: levels, unpacking, the rotation.  Knows CUDA and the format (tbq.h), not ggml.
#pragma once

#include "tbq-instructions.cuh"
#include "tbq.h"
#include "tbq-tables.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// --- layout ---------------------------------------------------------------------------------------------------

constexpr __host__ __device__ int tbq_block_bytes(int bits) {
    return bits == 2 ? sizeof(block_tbq2_0) : bits == 3 ? sizeof(block_tbq3_0) : sizeof(block_tbq4_0);
}

// Every block is d, qs and, at 3 bits, qh.
#define TBQ_QS_OFFSET  2
#define TBQ_QH_OFFSET  18
#define TBQ8_QS_OFFSET 4 // of tbq8_0, whose d is a float
static_assert(TBQ8_QS_OFFSET == offsetof(block_tbq8_0, qs), "layout");
static_assert(TBQ_QS_OFFSET == offsetof(block_tbq3_0, qs) && TBQ_QH_OFFSET == offsetof(block_tbq3_0, qh), "layout");

// --- rows -----------------------------------------------------------------------------------------------------

// The place of a block in a tensor of four dimensions, in ggml's order: block i0 of row (i1, i2, i3).
struct tbq_index4 {
    long long i0, i1, i2, i3;
};

// The shape of such a tensor.  ne[0] counts blocks.  s[k - 1] is the distance between neighbors in dimension k, in
// bytes or in elements, as the user of the struct says.
struct tbq_rows {
    long long ne[4];
    long long s[3];

    __host__ __device__ __forceinline__ long long n_blocks() const { return ne[0] * ne[1] * ne[2] * ne[3]; }

    // Block number i, counted row after row.
    __device__ __forceinline__ tbq_index4 index4(long long i) const {
        const long long row = i / ne[0], rest = row / ne[1];
        return { i % ne[0], row % ne[1], rest % ne[2], rest / ne[2] };
    }

    // Of the row (i1, i2, i3), from the start of the tensor.
    __device__ __forceinline__ long long offset(long long i1, long long i2, long long i3) const {
        return i1 * s[0] + i2 * s[1] + i3 * s[2];
    }
};

// --- levels ---------------------------------------------------------------------------------------------------

// Byte n of a table is level n + 64.  With this bias every entry is below 128, so a `prmt` whose selector has its top
// bit set, which replicates the sign, gives 0.  One instruction looks four indices up, and gives 0 for indices in the
// other half of a table of 16.  Returns word i of the table.
template <int BITS> constexpr __host__ __device__ uint32_t tbq_level_word(int i) {
    constexpr int8_t levels[3][16] = { TBQ2_LEVELS, TBQ3_LEVELS, TBQ4_LEVELS };
    uint32_t         word          = 0;
    for (int n = 0; n < 4; n++) {
        word |= (uint32_t) (levels[BITS - 2][4 * i + n] + 64) << 8 * n;
    }
    return word;
}

// Eight indices, the nibbles of a word, to eight bytes level + 64: of nibbles 0..3, and of nibbles 4..7.
// t0, t2: words 0 and 2 of the table.
template <int BITS>
static __device__ __forceinline__ uint2 tbq_lookup(uint32_t nibbles, uint32_t t0 = tbq_level_word<BITS>(0),
                                                   uint32_t t2 = tbq_level_word<BITS>(BITS == 4 ? 2 : 0)) {
    constexpr uint32_t t1 = tbq_level_word<BITS>(BITS > 2);
    if constexpr (BITS == 4) {
        constexpr uint32_t t3    = tbq_level_word<BITS>(3);
        const uint32_t     other = nibbles ^ 0x88888888u;
        return make_uint2(tbq_prmt(t0, t1, nibbles) | tbq_prmt(t2, t3, other),
                          tbq_prmt(t0, t1, nibbles >> 16) | tbq_prmt(t2, t3, other >> 16));
    } else {
        return make_uint2(tbq_prmt(t0, t1, nibbles), tbq_prmt(t0, t1, nibbles >> 16));
    }
}

// A `prmt` takes one of its three operands as an immediate, so of a larger table the other words must be in registers.
// A compiler that knows their values moves them there for every use, which was a third of all instructions.  Where this
// matters, the words are read from shared memory, where the compiler does not know them.
#define TBQ_N_HIDDEN 5
static __device__ __forceinline__ uint32_t tbq_hidden_constant(int i) {
    switch (i) {
        case 0: return 0x43004300u; // for values, see tbq-attention.cuh
        case 1: return tbq_level_word<4>(2);
        case 2: return tbq_level_word<2>(0);
        case 3: return tbq_level_word<3>(0);
        default: return tbq_level_word<4>(0);
    }
}

template <int BITS> struct tbq_lookup_table {
    uint32_t t0, t2;

    // hidden: the constants above, in shared memory
    __device__ __forceinline__ explicit tbq_lookup_table(const uint32_t * hidden)
        : t0(BITS <= 4 ? hidden[BITS] : 0), t2(BITS == 4 ? hidden[1] : 0) {}

    __device__ __forceinline__ uint2 operator()(uint32_t nibbles) const { return tbq_lookup<BITS>(nibbles, t0, t2); }
};

// --- unpacking ------------------------------------------------------------------------------------------------

// A block has eight "nibble words", the same for every type.  In word w, nibble 2 i is the index of value 4 w + i, and
// nibble 2 i + 1 that of value 4 w + i + 32 (i < 4).  For tbq4_0 these are the words of qs.  For the other types word w
// is made from bytes 4 (w & 3) .. of qs, shifted by two bits for w >= 4, and from the high bits in qh.
//
// `qs` is word w of qs for tbq4_0, else word w & 3; `qh` is word w & 1 of qh.
template <int BITS> static __device__ __forceinline__ uint32_t tbq_nibbles(uint32_t qs, uint32_t qh, int w) {
    if constexpr (BITS == 4) {
        return qs;
    } else if constexpr (BITS == 2) {
        return qs >> (w >> 2) * 2 & 0x33333333u;
    } else {
        // the high bits, at 2 ((w & 3) >> 1) + (w >> 2) of each nibble, rotate to bit 2; the rest is masked
        const int at = (w & 2) + (w >> 2);
        return (qs >> (w >> 2) * 2 & 0x33333333u) | (__funnelshift_l(qh, qh, 2 - at) & 0x44444444u);
    }
}

// --- the rotation, across a warp --------------------------------------------------------------------------------

// Lane l holds values l and l + 32 of a block.  In the order that the format fixes: distances 1, 2, 4, 8, 16, 32.
static __device__ __forceinline__ void tbq_butterflies(float & lo, float & hi, int lane) {
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        const float a = __shfl_xor_sync(TBQ_WARP_ALL, lo, h);
        const float b = __shfl_xor_sync(TBQ_WARP_ALL, hi, h);
        lo            = lane & h ? a - lo : a + lo;
        hi            = lane & h ? b - hi : b + hi;
    }
    const float sum = lo + hi;
    hi              = lo - hi;
    lo              = sum;
}

static __device__ __forceinline__ float tbq_flip(float x, int i) {
    return __uint_as_float(__float_as_uint(x) ^ (uint32_t) (TBQ_SIGN_BITS >> i & 1) << 31);
}

// y = H . diag(s) . x / 8
static __device__ __forceinline__ void tbq_rotate_warp(float & lo, float & hi, int lane) {
    lo = tbq_flip(lo, lane);
    hi = tbq_flip(hi, lane + 32);
    tbq_butterflies(lo, hi, lane);
    lo *= 0.125f;
    hi *= 0.125f;
}

// x = diag(s) . H . y / 8
static __device__ __forceinline__ void tbq_unrotate_warp(float & lo, float & hi, int lane) {
    tbq_butterflies(lo, hi, lane);
    lo = tbq_flip(0.125f * lo, lane);
    hi = tbq_flip(0.125f * hi, lane + 32);
}

// --- the rotation, across a half-warp ---------------------------------------------------------------------------

// v = H . v without the signs; lane l holds values l + 16 j.  In the same order, and no compiler contracts anything.
static __device__ __forceinline__ void tbq_butterflies_16(float (&v)[4], int l) {
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float other = __shfl_xor_sync(TBQ_WARP_ALL, v[j], h);
            v[j]              = l & h ? __fsub_rn(other, v[j]) : __fadd_rn(v[j], other);
        }
    }
#pragma unroll
    for (int h = 1; h < 4; h *= 2) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (!(j & h)) {
                const float a = v[j], b = v[j + h];
                v[j]     = __fadd_rn(a, b);
                v[j + h] = __fsub_rn(a, b);
            }
        }
    }
}
