// SPDX-License-Identifier: MIT
// Values to blocks, as the CPU encodes keys and values (tbq_quantize_kv): the same bytes.
//
// The steps and the order of every sum are those of cpu/rows/rows.inc, which has the reasons.  A half-warp takes a
// block.  Lane l has values l, l + 16, l + 32, l + 48, so butterflies of distance 1, 2, 4, 8 are shuffles, those of
// distance 16 and 32 stay in the lane, and each lane has one of the 16 partial sums of squares.  The intrinsics keep
// the compiler from contracting or approximating anything, whatever flags it is called with.
#pragma once

#include "tbq-block.cuh"
#include "tbq-instructions.cuh"

// --- tables ----------------------------------------------------------------------------------------------------

// int, because a comparison can read an int directly from constant memory.
#define TBQ_ENCODER_TABLES(B)                                                                                        \
    static __constant__ int    tbq_thresholds_##B[TBQ##B##_N_SCALES][TBQ##B##_N_THRESHOLDS] = TBQ##B##_THRESHOLDS;   \
    static __constant__ int8_t tbq_gaps_##B[3][16] = { TBQ##B##_GAPS_UP, TBQ##B##_GAPS_DOWN, TBQ##B##_LEVELS };      \
    template <> struct tbq_encoder_tables<B> {                                                                       \
        static constexpr int                     N_SCALES = TBQ##B##_N_SCALES, N_THRESHOLDS = TBQ##B##_N_THRESHOLDS; \
        static __device__ __forceinline__ int    threshold(int s, int t) { return tbq_thresholds_##B[s][t]; }        \
        static __device__ __forceinline__ float  gap(int which, int i) { return tbq_gaps_##B[which][i]; }            \
        static constexpr __host__ __device__ int half_level(int m) {                                                 \
            constexpr int8_t all[N_THRESHOLDS + 1] = TBQ##B##_HALF_LEVELS;                                           \
            return all[m];                                                                                           \
        }                                                                                                            \
    };
template <int BITS> struct tbq_encoder_tables;
TBQ_ENCODER_TABLES(2)
TBQ_ENCODER_TABLES(3)
TBQ_ENCODER_TABLES(4)
#undef TBQ_ENCODER_TABLES

// The level of the positive half that q falls on.
template <int BITS, int I = 0> static __device__ __forceinline__ int tbq_half_level_of(int q, int s) {
    using tables = tbq_encoder_tables<BITS>;
    if constexpr (I == tables::N_THRESHOLDS) {
        return tables::half_level(0);
    } else {
        constexpr int gap = tables::half_level(I + 1) - tables::half_level(I);
        return tbq_half_level_of<BITS, I + 1>(q, s) + (q > tables::threshold(s, I) ? gap : 0);
    }
}

// --- across a half-warp ----------------------------------------------------------------------------------------

// The bits of the largest |x|.
static __device__ __forceinline__ uint32_t tbq_abs_max_16(const float (&x)[4]) {
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        largest = max(largest, __float_as_uint(x[j]) & 0x7FFFFFFFu);
    }
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
        largest = max(largest, __shfl_xor_sync(TBQ_WARP_ALL, largest, h));
    }
    return largest;
}

static __device__ __forceinline__ int tbq_sum_16(int x) {
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
        x += __shfl_xor_sync(TBQ_WARP_ALL, x, h);
    }
    return x;
}

// The largest gain of the lanes of one parity, the first of equals.
static __device__ __forceinline__ void tbq_first_largest(float & gain, int & at) {
#pragma unroll
    for (int h = 2; h < 16; h *= 2) {
        const float g = __shfl_xor_sync(TBQ_WARP_ALL, gain, h);
        const int   a = __shfl_xor_sync(TBQ_WARP_ALL, at, h);
        if (g > gain || (g == gain && a < at)) {
            gain = g;
            at   = a;
        }
    }
}

// Turns the sums of each lane for 2 H scales into the sums over the lanes for one scale.  Lanes with bit H keep the
// upper half of their sums, the others the lower half.
template <int H, int N> static __device__ __forceinline__ void tbq_share_out(int (&qk)[N], int (&kk)[N], int l) {
    const bool upper = l & H;
#pragma unroll
    for (int s = 0; s < H; s++) {
        const int a = upper ? qk[s] : qk[s + H], b = upper ? kk[s] : kk[s + H];
        qk[s] = (upper ? qk[s + H] : qk[s]) + __shfl_xor_sync(TBQ_WARP_ALL, a, H);
        kk[s] = (upper ? kk[s + H] : kk[s]) + __shfl_xor_sync(TBQ_WARP_ALL, b, H);
    }
    if constexpr (H > 1) {
        tbq_share_out<H / 2>(qk, kk, l);
    }
}

// --- a block ---------------------------------------------------------------------------------------------------

// d, from the sums of q k and k k.  With qk > 0 it is unbiased, <y, d k> = <y, y>; qk is 0 where weights were not
// measured.  Otherwise it preserves the norm, d . |k| = |y|.  At most the largest half.
static __device__ __forceinline__ float tbq_final_scale(float rms, int qk, int kk, bool huge) {
    const float unit = __fmul_rn(rms, 0.125f);
    float       d;
    if (qk > 0 && !huge) {
        d = __fmul_rn(unit, __fdiv_rn(64.0f * TBQ_Q_ONE, (float) qk));
    } else {
        d = __fmul_rn(__fdiv_rn(__fmul_rn(unit, 8.0f), __fsqrt_rn((float) kk)), huge ? TBQ_HUGE_UNSCALE : 1.0f);
    }
    return d < TBQ_F16_MAX ? d : TBQ_F16_MAX;
}

// 16 lanes write a block; lane l has values l + 16 j.
template <int BITS>
static __device__ __forceinline__ void tbq_write_block(const int (&index)[4], unsigned short d, char * block,
                                                       bool write, int l) {
    int high = 0;
    if constexpr (BITS == 3) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            high |= (index[j] >> 2) << ((j & 1) | (l >> 3) << 1 | (j >> 1) << 2);
        }
        high |= __shfl_xor_sync(TBQ_WARP_ALL, high, 8); // bits of the other half of qh's byte
    }
    if (!write) {
        return;
    }
    uint8_t * qs = (uint8_t *) block + TBQ_QS_OFFSET;
    if constexpr (BITS == 4) {
        qs[l]      = (uint8_t) (index[0] | index[2] << 4);
        qs[l + 16] = (uint8_t) (index[1] | index[3] << 4);
    } else {
        qs[l] = (uint8_t) ((index[0] & 3) | (index[1] & 3) << 2 | (index[2] & 3) << 4 | (index[3] & 3) << 6);
        if (BITS == 3 && l < 8) {
            ((uint8_t *) block + TBQ_QH_OFFSET)[l] = (uint8_t) high;
        }
    }
    if (l == 0) {
        *(unsigned short *) block = d;
    }
}

// The exact row of a block (quantize_exact of cpu/rows/rows.inc).  x[j]: value l + 16 j.  z: the same rotated, not
// divided by 8; huge: z was scaled down, so it is computed again.  All lanes of the warp call this; 16 write a block.
static __device__ __forceinline__ void tbq_write_exact_16(const float (&x)[4], const float (&z)[4], bool huge,
                                                          char * block, bool write, int l) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        y[j] = z[j];
    }
    if (__any_sync(TBQ_WARP_ALL, huge)) {
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = tbq_flip(x[j], l + 16 * j);
        }
        tbq_butterflies_16(v, l);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            y[j] = huge ? v[j] : y[j];
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        y[j] = __fmul_rn(0.125f, y[j]);
    }
    const uint32_t largest = tbq_abs_max_16(y);
    const bool     bad = largest >= TBQ_BITS_INF, none = bad || largest < TBQ_BITS_SMALLEST_ACT;
    const float    most    = __uint_as_float(largest);
    const float    inverse = __fdiv_rn(127.0f, none ? 1.0f : most);
    if (!write) {
        return;
    }
    int8_t * const qs = (int8_t *) block + TBQ8_QS_OFFSET;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int q    = __float2int_rz(__fadd_rn(__fmul_rn(fabsf(y[j]), inverse), 0.5f));
        qs[l + 16 * j] = (int8_t) (none ? 0 : y[j] < 0.0f ? -q : q);
    }
    if (l == 0) {
        *(float *) block = bad ? __int_as_float(0x7FC00000) : none ? 0.0f : __fdiv_rn(most, 127.0f);
    }
}

// A scale of the search: its number, and the sums of q k and k k over the block, k the level of the positive half that
// q falls on.
struct tbq_scale {
    int qk, kk, number;

    // The larger qk / sqrt(kk), compared exactly; of equals the smaller number.
    __device__ __forceinline__ bool better(const tbq_scale & than) const {
        const uint64_t mine   = (uint64_t) qk * (uint64_t) qk * (uint64_t) than.kk;
        const uint64_t theirs = (uint64_t) than.qk * (uint64_t) than.qk * (uint64_t) kk;
        return mine > theirs || (mine == theirs && number < than.number);
    }

    // What moves of noise shaping are judged by: least squares, or with measured weights the unbiased scale.
    __device__ __forceinline__ float shaping(bool measured) const {
        return measured ? __fdiv_rn(64.0f * TBQ_Q_ONE * TBQ_Q_ONE, (float) qk) : __fdiv_rn((float) qk, (float) kk);
    }
};

// The best of what each of LANES neighboring lanes has.
template <int LANES> static __device__ __forceinline__ tbq_scale tbq_best_scale(tbq_scale best) {
#pragma unroll
    for (int h = 1; h < LANES; h *= 2) {
        const tbq_scale other = { __shfl_xor_sync(TBQ_WARP_ALL, best.qk, h), __shfl_xor_sync(TBQ_WARP_ALL, best.kk, h),
                                  __shfl_xor_sync(TBQ_WARP_ALL, best.number, h) };
        if (other.better(best)) {
            best = other;
        }
    }
    return best;
}

// The index of the level of a rotated value z, whose size in fixed point is q, with a scale of the search.
template <int BITS> static __device__ __forceinline__ int tbq_level_index(int q, float z, const tbq_scale & best) {
    using tables       = tbq_encoder_tables<BITS>;
    constexpr int HALF = 1 << (BITS - 1);
    int           m    = 0;
#pragma unroll
    for (int t = 0; t < tables::N_THRESHOLDS; t++) {
        m += q > tables::threshold(best.number, t);
    }
    return z < 0.0f ? HALF - 1 - m : HALF + m;
}

// What both encoders know of a block before the search.
struct tbq_measure {
    bool  bad, zero, huge; // NaN or Inf; too small for any d; so large that squares would overflow
    float rms, inverse;    // of the rotated values, and TBQ_Q_ONE over it
};

// x[j]: value l + 16 j.  z: the rotated values, not divided by 8.  largest: the bits of the largest |x| of the block.
static __device__ __forceinline__ tbq_measure tbq_rotate_and_measure(const float (&x)[4], float (&z)[4],
                                                                     uint32_t largest, int l) {
    tbq_measure m;
    m.bad  = largest >= TBQ_BITS_INF;
    m.zero = largest < TBQ_BITS_SMALLEST;
    m.huge = largest > TBQ_BITS_HUGE && !m.bad;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        z[j] = tbq_flip(m.huge ? __fmul_rn(x[j], TBQ_HUGE_SCALE) : x[j], l + 16 * j);
    }
    tbq_butterflies_16(z, l);
    float sum = __fmul_rn(z[0], z[0]);
#pragma unroll
    for (int j = 1; j < 4; j++) {
        sum = __fadd_rn(sum, __fmul_rn(z[j], z[j]));
    }
#pragma unroll
    for (int h = 8; h > 0; h /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(TBQ_WARP_ALL, sum, h));
    }
    m.rms     = __fsqrt_rn(__fmul_rn(sum, 1.0f / 64));
    m.inverse = __fdiv_rn((float) TBQ_Q_ONE, m.rms);
    return m;
}

// A rotated value's size in the fixed-point units of the search.
static __device__ __forceinline__ int tbq_to_fixed(float z, float inverse, bool none) {
    return none ? 0 : (int) (int16_t) __float2int_rz(__fadd_rn(__fmul_rn(fabsf(z), inverse), 0.5f));
}

// Shared memory for a block.
struct tbq_encoder_scratch {
    float m[64];
    float pad[16]; // so that the other half of the warp uses other banks
};

// The gap from a level to the one above and to the one below, and the level.  In shared memory, because lanes read
// different ones.  The first 16 threads fill it in, before a barrier.
struct tbq_encoder_gaps {
    float up[16], down[16], level[16];
};

template <int BITS> static __device__ __forceinline__ void tbq_encoder_fill_gaps(tbq_encoder_gaps * gaps) {
    using tables = tbq_encoder_tables<BITS>;
    const int i  = threadIdx.x;
    if (i < 16) {
        gaps->up[i]    = tables::gap(0, i);
        gaps->down[i]  = tables::gap(1, i);
        gaps->level[i] = tables::gap(2, i);
    }
}

// The weights of noise shaping where none were measured.
static __device__ __forceinline__ void tbq_guess_weights(const float (&x)[4], float rms, float (&w)[4]) {
    const float mean_square = __fmul_rn(__fmul_rn(rms, rms), 1.0f / 64);
    const float scale       = __fdiv_rn(0.5f, mean_square);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float square = __fmul_rn(x[j], x[j]);
        const float pair   = __fadd_rn(square, __shfl_xor_sync(TBQ_WARP_ALL, square, 1));
        w[j]               = __fadd_rn(__fsqrt_rn(__fmul_rn(pair, scale)), TBQ_SHAPING_FLOOR);
    }
}

// What the move of a coordinate by a gap gains, against its slope g.
static __device__ __forceinline__ float tbq_gain(float gap, float g, float m0) {
    const float size = fabsf(g);
    return __fmul_rn(gap, __fsub_rn(__fadd_rn(size, size), __fmul_rn(gap, m0)));
}

// --- a block by a half-warp ------------------------------------------------------------------------------------------

// The scale with the largest cosine.  Every lane sums its four values for every scale; then lanes exchange halves of
// what they have until each has the sums of one scale, and the best is the maximum over the lanes.
template <int BITS> static __device__ __forceinline__ tbq_scale tbq_search_scale(const int (&q)[4], int l) {
    constexpr int N = 16;
    int           qk[N], kk[N];
#pragma unroll
    for (int s = 0; s < N; s++) {
        qk[s] = kk[s] = 0;
        if (s < tbq_encoder_tables<BITS>::N_SCALES) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int k = tbq_half_level_of<BITS>(q[j], s);
                qk[s] += q[j] * k;
                kk[s] += k * k;
            }
        }
    }
    tbq_share_out<8>(qk, kk, l);
    return tbq_best_scale<16>({ qk[0], kk[0] == 0 ? 1 : kk[0], l }); // only a scale that does not exist has sums of 0
}

// The slopes g of the error, and row 0 of its matrix into scratch->m (cpu/rows/rows.inc has the formulas).
static __device__ __forceinline__ void tbq_shaping_slopes(const float (&w)[4], float (&g)[4],
                                                          tbq_encoder_scratch * scratch, int l) {
    float m[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        m[j] = w[j];
    }
    tbq_butterflies_16(m, l);
    tbq_butterflies_16(g, l);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        g[j]                   = __fmul_rn(g[j], w[j]);
        scratch->m[l + 16 * j] = __fmul_rn(m[j], 1.0f / 64);
    }
    tbq_butterflies_16(g, l);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        g[j] = __fmul_rn(g[j], 1.0f / 64);
    }
    __syncwarp();
}

// Coordinate descent.  Even and odd lanes hold the even and the odd coordinates, which do not interact: both move at
// once.
static __device__ __forceinline__ void tbq_coordinate_descent_16(float (&g)[4], int (&index)[4], float d, bool shaped,
                                                                 const tbq_encoder_scratch * scratch,
                                                                 const tbq_encoder_gaps * gaps, int l) {
    const float m0 = scratch->m[0];
    for (int step = 0; step < TBQ_DESCENT_STEPS; step++) {
        float gain = 0.0f;
        int   at   = 64;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float gap   = __fmul_rn(d, (g[j] > 0.0f ? gaps->up : gaps->down)[index[j]]);
            const float value = tbq_gain(gap, g[j], m0);
            if (value > gain) {
                gain = value;
                at   = l + 16 * j;
            }
        }
        tbq_first_largest(gain, at);
        const bool moves = gain > 0.0f && shaped;
        if (!__any_sync(TBQ_WARP_ALL, moves)) {
            break;
        }
        // the lane that holds it says how far
        float s = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (moves && at == l + 16 * j) {
                const bool up = g[j] > 0.0f;
                s             = __fmul_rn(d, up ? gaps->up[index[j]] : -gaps->down[index[j]]);
                index[j] += up ? 1 : -1;
            }
        }
        s = __shfl_sync(TBQ_WARP_ALL, s, (threadIdx.x & 16) | (at & 15));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float change = __fmul_rn(s, scratch->m[((l + 16 * j) ^ at) & 63]);
            g[j]               = moves ? __fsub_rn(g[j], change) : g[j];
        }
    }
    __syncwarp(); // before the next block overwrites m
}

// x[j]: value l + 16 j.  weight: their weights in noise shaping, or null.  All lanes of the warp call this; write:
// whether the block of this half-warp exists.  exact: the block of its exact row, or null; keep: whether there are any.
template <int BITS>
static __device__ __forceinline__ void
tbq_quantize_block_16(const float (&x)[4], const float * weight, char * block, bool write, char * exact, bool keep,
                      int l, tbq_encoder_scratch * scratch, const tbq_encoder_gaps * gaps) {
    float             z[4];
    const tbq_measure b = tbq_rotate_and_measure(x, z, tbq_abs_max_16(x), l);
    if (keep) {
        tbq_write_exact_16(x, z, b.huge, exact, write && exact, l);
    }
    int q[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        q[j] = tbq_to_fixed(z[j], b.inverse, b.zero || b.bad);
    }
    const tbq_scale best = tbq_search_scale<BITS>(q, l);
    const float     d    = best.shaping(weight);
    int             index[4];
    float           g[4], w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        index[j] = tbq_level_index<BITS>(q[j], z[j], best);
        g[j]     = __fsub_rn(__fmul_rn(z[j], b.inverse), __fmul_rn(d, gaps->level[index[j]]));
        q[j]     = z[j] < 0.0f ? -q[j] : q[j];
    }
    tbq_guess_weights(x, b.rms, w);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        w[j] = weight ? weight[j] : w[j];
    }
    tbq_shaping_slopes(w, g, scratch, l);
    tbq_coordinate_descent_16(g, index, d, !b.huge && !b.zero && !b.bad, scratch, gaps, l);
    int qk = 0, kk = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int k = (int) gaps->level[index[j]];
        qk += q[j] * k;
        kk += k * k;
    }
    qk = weight ? tbq_sum_16(qk) : 0;
    kk = tbq_sum_16(kk);

    if (b.zero || b.bad) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            index[j] = 0;
        }
    }
    const float scale = b.zero || b.bad ? 0.0f : tbq_final_scale(b.rms, qk, b.huge ? best.kk : kk, b.huge);
    tbq_write_block<BITS>(index, b.bad ? TBQ_F16_NAN : __half_as_ushort(__float2half_rn(scale)), block, write, l);
}

// --- rows ------------------------------------------------------------------------------------------------------------

// Rows of values to rows of blocks.  With ids (SET_ROWS), row i1 of (i2, i3) becomes row
// ids[i1, i2 % ids_ne1, i3 % ids_ne2].
struct tbq_encode_args {
    const void *  src;
    char *        dst;
    tbq_rows      from; // the shape and the strides of the source, in elements
    tbq_rows      to;   // the same shape, and the strides of the result in bytes
    const void *  ids;
    int           ids_64;
    long long     ids_ne1, ids_ne2, ids_s0, ids_s1, ids_s2; // elements
    const float * mean;                                     // of a row of keys, subtracted first; null: zeros
    const float * weight; // of the error in each channel, equal in pairs of neighbors; null: guessed from the block

    // Exact rows, tbq8_0: row number i of the source, counted over all dimensions, becomes row slots[i] too, unless
    // that is -1.  slots is null where there are none.
    char *      exact;
    long long   exact_nb1;
    const int * slots;

    // The block of row number i, or null.
    __device__ __forceinline__ char * exact_block(long long i, long long i0) const {
        const int slot = slots ? slots[i] : -1;
        return slot < 0 ? nullptr : exact + slot * exact_nb1 + i0 * (long long) sizeof(block_tbq8_0);
    }
};

// The rotary embedding (GGML_OP_ROPE, modes NORMAL and NEOX) of keys that are encoded right after it.  Angles are
// computed as the backend computes those of the queries, with the same approximations, because only equal errors
// cancel.
struct tbq_rope_args {
    int           head_size;
    int           n_dims;  // rotated channels of a head; the others are copied
    bool          neox;    // NEOX pairs (i, i + n_dims / 2); else interleaved pairs (2 i, 2 i + 1)
    const int *   pos;     // of each token
    const float * factors; // n_dims / 2 divisors of the angles, or null
    float         theta_scale, freq_scale, ext_factor, attn_factor, corr_low, corr_high;
    long long     s_head; // elements between heads of the source
};

// Channel c of the head that starts at x.
static __device__ __forceinline__ float tbq_rope(const tbq_rope_args & r, const float * x, int c, int pos) {
    if (c >= r.n_dims) {
        return x[c];
    }
    const int   half   = r.n_dims / 2;
    const bool  second = r.neox ? c >= half : c & 1;
    const int   pair   = r.neox ? c - (second ? half : 0) : c / 2;
    const float x0     = x[r.neox ? pair : 2 * pair];
    const float x1     = x[r.neox ? pair + half : 2 * pair + 1];

    float extrapolated = pos * powf(r.theta_scale, (float) pair);
    if (r.factors) {
        extrapolated /= r.factors[pair];
    }
    float theta     = r.freq_scale * extrapolated;
    float magnitude = r.attn_factor;
    if (r.ext_factor != 0.0f) { // YaRN (arXiv 2309.00071): fast channels keep their angle, slow ones are interpolated
        const float ramp = fminf(1.0f, fmaxf(0.0f, (pair - r.corr_low) / fmaxf(0.001f, r.corr_high - r.corr_low)));
        const float mix  = (1.0f - ramp) * r.ext_factor;
        theta            = theta * (1.0f - mix) + extrapolated * mix;
        magnitude *= 1.0f + 0.1f * logf(1.0f / r.freq_scale);
    }
    const float cosine = cosf(theta) * magnitude, sine = sinf(theta) * magnitude;
    return second ? x0 * sine + x1 * cosine : x0 * cosine - x1 * sine;
}

static __device__ __forceinline__ float tbq_load(const float * p) {
    return *p;
}

static __device__ __forceinline__ float tbq_load(const half * p) {
    return __half2float(*p);
}

// The mean and the weights of lane l in block i0 of a row.  They have left the L2 cache since the last token, so they
// are loaded before the wait for the previous grid.  Loaded after it, they took 1.5 % of the time of a 7B model's
// decode.
struct tbq_center {
    float mean[4], weight[4];

    __device__ __forceinline__ tbq_center(const tbq_encode_args & a, long long i0, int l) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            mean[j]   = a.mean ? a.mean[i0 * 64 + l + 16 * j] : 0.0f;
            weight[j] = a.weight ? a.weight[i0 * 64 + l + 16 * j] : 0.0f;
        }
    }
};

#define TBQ_ENCODE_THREADS 128

// grid: at least a half-warp for each block
template <int BITS, typename src_t> __global__ void __launch_bounds__(TBQ_ENCODE_THREADS)
    tbq_quantize_rows(const tbq_encode_args a) {
    __shared__ tbq_encoder_scratch scratch[TBQ_ENCODE_THREADS / 16];
    __shared__ tbq_encoder_gaps    gaps;
    tbq_encoder_fill_gaps<BITS>(&gaps);

    const int        l     = threadIdx.x % 16;
    const long long  index = ((long long) blockIdx.x * blockDim.x + threadIdx.x) / 16;
    const long long  n     = a.from.n_blocks();
    const tbq_index4 at    = a.from.index4(index < n ? index : n - 1);
    const tbq_center center(a, at.i0, l);
    __syncthreads();

#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    long long row = at.i1;
    if (a.ids) {
        const long long id = at.i1 * a.ids_s0 + at.i2 % a.ids_ne1 * a.ids_s1 + at.i3 % a.ids_ne2 * a.ids_s2;
        row                = a.ids_64 ? ((const long long *) a.ids)[id] : ((const int *) a.ids)[id];
    }
    const src_t * src = (const src_t *) a.src + at.i0 * 64 + a.from.offset(at.i1, at.i2, at.i3);
    char *        dst = a.dst + at.i0 * tbq_block_bytes(BITS) + a.to.offset(row, at.i2, at.i3);
    float         x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        x[j] = __fsub_rn(tbq_load(src + l + 16 * j), center.mean[j]);
    }
    tbq_quantize_block_16<BITS>(x, a.weight ? center.weight : nullptr, dst, index < n,
                                a.exact_block((index < n ? index : n - 1) / a.from.ne[0], at.i0), a.slots != nullptr, l,
                                &scratch[threadIdx.x / 16], &gaps);
}

// --- exact rows alone ------------------------------------------------------------------------------------------------

// n_before rows of blocks, which are copied, and after them rows of values, in each of ne[2] x ne[3] parts.
struct tbq_exact_args {
    const char *  before;
    const float * src;
    char *        dst;
    long long     n_before;
    long long     before_nb1, before_nb2, before_nb3; // bytes
    tbq_rows      from;                               // the shape of the result, strides of src in elements
    tbq_rows      to;                                 // the same shape, strides of the result in bytes
    const float * mean;                               // of a row of values, subtracted first; null: zeros
};

// grid: at least a half-warp for each block
static __global__ void __launch_bounds__(TBQ_ENCODE_THREADS) tbq_quantize_exact_rows(const tbq_exact_args a) {
    const int        l     = threadIdx.x % 16;
    const long long  index = ((long long) blockIdx.x * blockDim.x + threadIdx.x) / 16;
    const long long  n     = a.from.n_blocks();
    const tbq_index4 at    = a.from.index4(index < n ? index : n - 1);
    const bool       copy  = at.i1 < a.n_before;
    float            mean[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        mean[j] = a.mean ? a.mean[at.i0 * 64 + l + 16 * j] : 0.0f;
    }
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    char * const dst = a.dst + at.i0 * sizeof(block_tbq8_0) + a.to.offset(at.i1, at.i2, at.i3);
    float        x[4], z[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float * src = a.src + at.i0 * 64 + a.from.offset(copy ? 0 : at.i1 - a.n_before, at.i2, at.i3);
        x[j]              = copy ? 0.0f : __fsub_rn(src[l + 16 * j], mean[j]);
        z[j]              = tbq_flip(x[j], l + 16 * j);
    }
    tbq_butterflies_16(z, l);
    tbq_write_exact_16(x, z, false, dst, index < n && !copy, l);
    if (copy && index < n) {
        const uint32_t * before = (const uint32_t *) (a.before + at.i0 * sizeof(block_tbq8_0) + at.i1 * a.before_nb1 +
                                                      at.i2 * a.before_nb2 + at.i3 * a.before_nb3);
        for (int i = l; i < (int) sizeof(block_tbq8_0) / 4; i += 16) {
            ((uint32_t *) dst)[i] = before[i];
        }
    }
}

// --- decode size -----------------------------------------------------------------------------------------------------
//
// In decode there are one or two blocks for each KV head, and the latency of one block counts.  Four warps take a
// block.  Eight half-warps rotate it, all of them the whole block, and try two scales each; one warp also prepares the
// weights of noise shaping.  Then one warp runs the coordinate descent on the even coordinates, a lane to each, and
// another on the odd ones.

#define TBQ_DECODE_SIZE_THREADS 128

// The place of a block, and what its dimensions 2 and 3 add to the place of its row's number among the ids.
struct tbq_small_place {
    unsigned  i0, i1, i2, i3;
    long long id;
};

// index4 in 32 bits, which the number of blocks allows, and without the divisions that a single token does not need:
// they are a tenth of the time of this kernel.
static __device__ __forceinline__ tbq_small_place tbq_place_of(const tbq_encode_args & a, unsigned i) {
    const unsigned  ne0 = (unsigned) a.from.ne[0], ne1 = (unsigned) a.from.ne[1], ne2 = (unsigned) a.from.ne[2];
    tbq_small_place at = { i % ne0, i / ne0, 0, 0, 0 };
    if (a.from.ne[2] * a.from.ne[3] > 1) {
        const unsigned rest = at.i1 / ne1;
        at.i1 %= ne1;
        at.i2 = rest % ne2;
        at.i3 = rest / ne2;
        if (a.ids) {
            at.id = at.i2 % (unsigned) a.ids_ne1 * a.ids_s1 + at.i3 % (unsigned) a.ids_ne2 * a.ids_s2;
        }
    }
    return at;
}

// Values l + 16 j of a block, after their rotary embedding if there is one.
template <typename src_t>
static __device__ __forceinline__ void tbq_load_block(const tbq_encode_args & a, const tbq_small_place & at,
                                                      const tbq_rope_args * rope, int l, float (&x)[4]) {
    if (rope) {
        const unsigned head = at.i0 * 64 / rope->head_size;
        const float *  from = (const float *) a.src + head * rope->s_head + at.i1 * a.from.s[0];
        const int      pos  = rope->pos[at.i1];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = tbq_rope(*rope, from, at.i0 * 64 - head * rope->head_size + l + 16 * j, pos);
        }
    } else {
        const src_t * src = (const src_t *) a.src + at.i0 * 64 + a.from.offset(at.i1, at.i2, at.i3);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = tbq_load(src + l + 16 * j);
        }
    }
}

// The better of the two scales that half-warp number hw tries.
template <int BITS> static __device__ __forceinline__ tbq_scale tbq_try_two_scales(const float (&z)[4], float inverse,
                                                                                   bool none, int hw) {
    constexpr int N    = tbq_encoder_tables<BITS>::N_SCALES;
    tbq_scale     best = { 0, 1, hw };
#pragma unroll
    for (int r = 0; r < (N + 7) / 8; r++) {
        tbq_scale s = { 0, 0, hw + 8 * r };
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int q = tbq_to_fixed(z[j], inverse, none);
            const int k = tbq_half_level_of<BITS>(q, min(s.number, N - 1));
            s.qk += q * k;
            s.kk += k * k;
        }
        s.qk              = tbq_sum_16(s.qk);
        s.kk              = tbq_sum_16(s.kk);
        const bool better = s.number < N && s.better(best);
        best              = better ? s : best;
    }
    return best;
}

// The weights of noise shaping and row 0 of the error's matrix, for the other warps.
static __device__ __forceinline__ void tbq_prepare_shaping(const float (&x)[4], float rms, bool measured,
                                                           const tbq_center & center, int l, float (&w_all)[64],
                                                           float (&m_all)[64]) {
    float w[4];
    tbq_guess_weights(x, rms, w);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        w[j]              = measured ? center.weight[j] : w[j];
        w_all[l + 16 * j] = w[j];
    }
    tbq_butterflies_16(w, l);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        m_all[l + 16 * j] = __fmul_rn(w[j], 1.0f / 64);
    }
}

// A coordinate of the descent.
struct tbq_coordinate {
    float slope;
    int   index;
};

// Levels and slopes of values lane and lane + 32, and of these the lane's share: coordinate 2 lane + parity.
template <int BITS>
static __device__ __forceinline__ tbq_coordinate tbq_first_levels(const float (&z_all)[64], const float (&w_all)[64],
                                                                  const tbq_encoder_gaps & gaps, const tbq_scale & best,
                                                                  float d, float inverse, bool none, int lane,
                                                                  int parity) {
    float g[2];
    int   index[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float z = z_all[lane + 32 * r];
        index[r]      = tbq_level_index<BITS>(tbq_to_fixed(z, inverse, none), z, best);
        g[r]          = __fsub_rn(__fmul_rn(z, inverse), __fmul_rn(d, gaps.level[index[r]]));
    }
    tbq_butterflies(g[0], g[1], lane);
    g[0] = __fmul_rn(g[0], w_all[lane]);
    g[1] = __fmul_rn(g[1], w_all[lane + 32]);
    tbq_butterflies(g[0], g[1], lane);

    const int   from = (2 * lane + parity) % 32;
    const float g_lo = __shfl_sync(TBQ_WARP_ALL, g[0], from), g_hi = __shfl_sync(TBQ_WARP_ALL, g[1], from);
    const int   i_lo = __shfl_sync(TBQ_WARP_ALL, index[0], from), i_hi = __shfl_sync(TBQ_WARP_ALL, index[1], from);
    return { __fmul_rn(lane < 16 ? g_lo : g_hi, 1.0f / 64), lane < 16 ? i_lo : i_hi };
}

// Coordinate descent of a warp on the coordinates of one parity, a lane to each: its slope and index.  Returns the
// index that it ends at.
static __device__ __forceinline__ int tbq_coordinate_descent_32(const float (&m_all)[64], const tbq_encoder_gaps & gaps,
                                                                float slope, int index, float d, bool shaped,
                                                                int lane) {
#if __CUDA_ARCH__ >= 800 // __reduce_max_sync
    const float m0 = m_all[0];
    float       up = __fmul_rn(d, gaps.up[index]), down = __fmul_rn(d, gaps.down[index]);
    for (int step = 0; step < TBQ_DESCENT_STEPS && shaped; step++) {
        const float    value = tbq_gain(slope > 0.0f ? up : down, slope, m0);
        const uint32_t gain =
            value > 0.0f ? __float_as_uint(value) : 0u; // not negative, so that the bits order like the values
        const uint32_t most = __reduce_max_sync(TBQ_WARP_ALL, gain);
        if (most == 0) {
            break;
        }
        const int   at     = __ffs(__ballot_sync(TBQ_WARP_ALL, gain == most)) - 1;
        const float move   = __shfl_sync(TBQ_WARP_ALL, slope > 0.0f ? up : -down, at);
        const float change = __fmul_rn(move, m_all[(2 * lane) ^ (2 * at)]);
        if (lane == at) {
            index += slope > 0.0f ? 1 : -1;
            up   = __fmul_rn(d, gaps.up[index]);
            down = __fmul_rn(d, gaps.down[index]);
        }
        slope = __fsub_rn(slope, change);
    }
#endif
    return index;
}

// What goes from the grid of exact rows to that of packed rows.  Attention in between may overwrite the sources, and the
// numbers of rows, too.
struct tbq_stored_block {
    float     values[TBQ_BLOCK];
    long long row; // -1: the block was written whole
};

// The row of the result that row (i1, i2, i3) of the source goes to.
static __device__ __forceinline__ long long tbq_row_of(const tbq_encode_args & a, const tbq_small_place & at) {
    if (!a.ids) {
        return at.i1;
    }
    const long long id = at.id + at.i1 * a.ids_s0;
    return a.ids_64 ? ((const long long *) a.ids)[id] : ((const int *) a.ids)[id];
}

// Block i of a.  rope: null, or the embedding of the float rows at a.src, whose heads are rope->s_head apart.  stored: null,
// or what tbq_store_exact_block left of the block, whose packed half this is.
template <int BITS, typename src_t>
static __device__ __forceinline__ void tbq_quantize_block_128(const tbq_encode_args & a, unsigned i,
                                                              const tbq_rope_args *    rope   = nullptr,
                                                              const tbq_stored_block * stored = nullptr) {
#if __CUDA_ARCH__ >= 800
    // Not one struct: that takes more registers (36 instead of 32 for tbq2_0 on sm_90).
    __shared__ tbq_encoder_gaps gaps;
    __shared__ float            z_all[64], w_all[64],
        m_all[64]; // rotated values; weights of noise shaping; row 0 of the error's matrix
    __shared__ int qk_of[8], kk_of[8], number_of[8]; // the scale of each half-warp
    __shared__ int index_all[64];                    // indices
    __shared__ int product_of[2], squares_of[2];     // sums of q k and k k over even and odd coordinates

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int l    = threadIdx.x % 16;
    const int hw   = threadIdx.x / 16;

    const tbq_small_place at         = tbq_place_of(a, i);
    const unsigned        row_number = i / (unsigned) a.from.ne[0];
    tbq_encoder_fill_gaps<BITS>(&gaps);
    const tbq_center center(a, at.i0, l);

#if __CUDA_ARCH__ >= 900
    // Attention starts this grid after it has waited for the grid of exact rows, so that one has ended.
    if (!stored) {
        cudaGridDependencySynchronize();
    }
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    const long long row   = stored ? stored->row : tbq_row_of(a, at);
    char * const    exact = stored ? nullptr : a.exact_block(row_number, at.i0);
    float           x[4], z[4];
    uint32_t        largest = 0;
    if (stored) {
        if (row < 0) {
            return;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = stored->values[l + 16 * j];
        }
    } else {
        tbq_load_block<src_t>(a, at, rope, l, x);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = __fsub_rn(x[j], center.mean[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        largest = max(largest, __float_as_uint(x[j]) & 0x7FFFFFFFu);
    }
    largest             = __reduce_max_sync(TBQ_WARP_ALL, largest); // both halves hold the same block
    const tbq_measure b = tbq_rotate_and_measure(x, z, largest, l);
    // b.zero || b.bad has no variable: with one, nvcc 13.0 does not unroll the descent.
    tbq_scale best = tbq_try_two_scales<BITS>(z, b.inverse, b.zero || b.bad, hw);
    if (l == 0) {
        qk_of[hw]     = best.qk;
        kk_of[hw]     = best.kk;
        number_of[hw] = best.number;
    }
    if (warp == 0) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            z_all[l + 16 * j] = z[j]; // both halves write the same
        }
    } else if (warp == 2 && a.slots && !stored) {
        // both halves of the warp hold the block
        tbq_write_exact_16(x, z, b.huge, exact, exact && lane < 16, l);
    } else if (warp == 3) {
        tbq_prepare_shaping(x, b.rms, a.weight, center, l, w_all, m_all);
    }
    __syncthreads();

    if (warp < 2) {
        best                   = tbq_best_scale<8>({ qk_of[lane % 8], kk_of[lane % 8], number_of[lane % 8] });
        const float          d = best.shaping(a.weight);
        const tbq_coordinate c =
            tbq_first_levels<BITS>(z_all, w_all, gaps, best, d, b.inverse, b.zero || b.bad, lane, warp);
        const int index =
            tbq_coordinate_descent_32(m_all, gaps, c.slope, c.index, d, !b.huge && !b.zero && !b.bad, lane);
        index_all[2 * lane + warp] = b.zero || b.bad ? 0 : index;
        const int   k              = (int) gaps.level[index];
        const float y              = z_all[2 * lane + warp];
        const int   q              = tbq_to_fixed(y, b.inverse, b.zero || b.bad);
        const int   qk             = a.weight ? __reduce_add_sync(TBQ_WARP_ALL, (y < 0.0f ? -q : q) * k) : 0;
        const int   kk             = __reduce_add_sync(TBQ_WARP_ALL, k * k);
        if (lane == 0) {
            product_of[warp] = qk;
            squares_of[warp] = kk;
        }
    }
    __syncthreads();
    if (warp == 0) {
        const int   kk = b.huge ? best.kk : squares_of[0] + squares_of[1];
        const int   qk = product_of[0] + product_of[1];
        const float d  = b.zero || b.bad ? 0.0f : tbq_final_scale(b.rms, qk, kk, b.huge);
        int         index[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            index[j] = index_all[l + 16 * j];
        }
        tbq_write_block<BITS>(index, b.bad ? TBQ_F16_NAN : __half_as_ushort(__float2half_rn(d)),
                              a.dst + at.i0 * tbq_block_bytes(BITS) + a.to.offset(row, at.i2, at.i3), lane < 16, l);
    }
#else
    __trap(); // the host takes tbq_quantize_rows here
#endif
}

template <int BITS, typename src_t> __global__ void __launch_bounds__(TBQ_DECODE_SIZE_THREADS)
    tbq_quantize_decode_size(const tbq_encode_args a) {
    tbq_quantize_block_128<BITS, src_t>(a, blockIdx.x);
}

// --- exact rows before attention, packed ones beside it ---------------------------------------------------------------
//
// Attention of a decode step reads the exact rows of the newest tokens, not their packed ones.  So only the former need to
// be there when it begins, and the search for the latter is not what a token waits for.

// The exact row of a block by a warp; lane l has values l and l + 32.  The same bytes as tbq_write_exact_16.
static __device__ __forceinline__ void tbq_write_exact_32(float lo, float hi, char * block, int lane) {
#if __CUDA_ARCH__ >= 800 // __reduce_max_sync
    tbq_rotate_warp(lo, hi, lane);
    const uint32_t largest =
        __reduce_max_sync(TBQ_WARP_ALL, max(__float_as_uint(lo) & 0x7FFFFFFFu, __float_as_uint(hi) & 0x7FFFFFFFu));
    const bool     bad = largest >= TBQ_BITS_INF, none = bad || largest < TBQ_BITS_SMALLEST_ACT;
    const float    most    = __uint_as_float(largest);
    const float    inverse = __fdiv_rn(127.0f, none ? 1.0f : most);
    int8_t * const qs      = (int8_t *) block + TBQ8_QS_OFFSET;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const float y     = j ? hi : lo;
        const int   q     = __float2int_rz(__fadd_rn(__fmul_rn(fabsf(y), inverse), 0.5f));
        qs[lane + 32 * j] = (int8_t) (none ? 0 : y < 0.0f ? -q : q);
    }
    if (lane == 0) {
        *(float *) block = bad ? __int_as_float(0x7FC00000) : none ? 0.0f : __fdiv_rn(most, 127.0f);
    }
#endif
}

// What attention reads next: multiples of 16 bytes.
struct tbq_ahead {
    const char * from;
    unsigned     bytes;
};

#define TBQ_N_AHEAD 6

// Block i of a: its exact row, and what the packed one is made from.  False if it has no slot, and so is to be written whole.  A
// thread has one value, because this is too short for code that is not in the instruction cache to be unrolled.
static __device__ __forceinline__ bool tbq_store_exact_block(const tbq_encode_args & a, unsigned i,
                                                             const tbq_rope_args * rope, tbq_stored_block & stored) {
    __shared__ float      x_all[TBQ_BLOCK];
    const int             l    = threadIdx.x;
    const tbq_small_place at   = tbq_place_of(a, i);
    const float           mean = a.mean && l < TBQ_BLOCK ? a.mean[at.i0 * TBQ_BLOCK + l] : 0.0f;
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // the next grid may start; it waits for this one before it reads
#endif
    char * const exact = a.exact_block(i / (unsigned) a.from.ne[0], at.i0);
    if (l < TBQ_BLOCK) {
        float x;
        if (rope) {
            const unsigned head = at.i0 * TBQ_BLOCK / rope->head_size;
            x                   = tbq_rope(*rope, (const float *) a.src + head * rope->s_head + at.i1 * a.from.s[0],
                                           at.i0 * TBQ_BLOCK - head * rope->head_size + l, rope->pos[at.i1]);
        } else {
            x = ((const float *) a.src)[at.i0 * TBQ_BLOCK + l + a.from.offset(at.i1, at.i2, at.i3)];
        }
        stored.values[l] = x_all[l] = __fsub_rn(x, mean);
    }
    if (l == TBQ_BLOCK) {
        stored.row = exact ? tbq_row_of(a, at) : -1;
    }
    if (!exact) {
        return false;
    }
    __syncthreads();
    if (l < 32) {
        tbq_write_exact_32(x_all[l], x_all[l + 32], exact, l);
    }
    return true;
}

// Which part of the work a launch does.
enum tbq_encode_part {
    TBQ_ENCODE_WHOLE,
    TBQ_ENCODE_EXACT,  // exact rows, and blocks whole that have none
    TBQ_ENCODE_PACKED, // the others' packed rows; starts before attention ends, and ends after it
};

struct tbq_pair_args {
    tbq_encode_args    a;
    tbq_encode_args    b;
    tbq_rope_args      rope; // of a
    int                n_a;
    tbq_encode_part    part;
    tbq_stored_block * stored; // of each block, for two parts
    tbq_ahead          ahead[TBQ_N_AHEAD];
};

// The keys and values of a few tokens: the first n_a CTAs encode a, the others b.  ROPE: the keys get their rotary embedding
// first.
template <int BITS_A, int BITS_B, bool ROPE>
__global__ void __launch_bounds__(TBQ_DECODE_SIZE_THREADS) tbq_quantize_pair(const __grid_constant__ tbq_pair_args p) {
#if __CUDA_ARCH__ >= 900
    // Weights of a layer push everything out of the L2 cache.  So this grid, while it waits, brings back what attention
    // begins with: each CTA its share.
    if (p.part != TBQ_ENCODE_PACKED && threadIdx.x < TBQ_N_AHEAD) {
        const tbq_ahead & next  = p.ahead[threadIdx.x];
        const unsigned    share = (next.bytes / 16 + gridDim.x - 1) / gridDim.x * 16, first = blockIdx.x * share;
        if (first < next.bytes) {
            tbq_bulk_prefetch(next.from + first, (int) min(share, next.bytes - first));
        }
    }
#endif
    tbq_stored_block * const    stored = p.stored + blockIdx.x;
    const bool                  keys   = blockIdx.x < p.n_a;
    const unsigned              i      = keys ? blockIdx.x : blockIdx.x - p.n_a;
    const tbq_rope_args * const rope   = ROPE ? &p.rope : nullptr;
    if (p.part == TBQ_ENCODE_EXACT &&
        (keys ? tbq_store_exact_block(p.a, i, rope, *stored) : tbq_store_exact_block(p.b, i, nullptr, *stored))) {
        return;
    }
    const tbq_stored_block * const packed = p.part == TBQ_ENCODE_PACKED ? stored : nullptr;
    if (keys) {
        tbq_quantize_block_128<BITS_A, float>(p.a, i, rope, packed);
    } else {
        tbq_quantize_block_128<BITS_B, float>(p.b, i, nullptr, packed);
    }
#if __CUDA_ARCH__ >= 900
    if (p.part == TBQ_ENCODE_PACKED) {
        cudaGridDependencySynchronize(); // what waits for this grid waits for attention, too
    }
#endif
}
