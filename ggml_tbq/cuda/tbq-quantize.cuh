// SPDX-License-Identifier: MIT
// Values to blocks, as the CPU encodes keys and values (tbq_quantize_kv): the same bytes.
//
// The steps and the order of every sum are those of cpu/rows/rows.inc, where the reasons stand.  A half-warp takes a
// block; lane l has values l, l + 16, l + 32, l + 48, so that butterflies of distance 1, 2, 4, 8 are shuffles, those of
// 16 and 32 stay in the lane, and the 16 partial sums of squares are the lanes' own.  Nothing may be contracted or
// approximated, whatever flags the file is compiled with: hence the intrinsics.
#pragma once

#include "tbq-block.cuh"

// --- tables -----------------------------------------------------------------------------------------------------

// int, because that is what a comparison reads straight from constant memory.
#define TBQ_ENCODER_TABLES(B)                                                                                    \
    static __constant__ int tbq_thresholds_##B[TBQ##B##_N_SCALES][TBQ##B##_N_THRESHOLDS] = TBQ##B##_THRESHOLDS;  \
    static __constant__ int8_t tbq_gaps_##B[3][16] = { TBQ##B##_GAPS_UP, TBQ##B##_GAPS_DOWN, TBQ##B##_LEVELS };  \
    template <> struct tbq_encoder_tables<B> {                                                                   \
        static constexpr int N_SCALES = TBQ##B##_N_SCALES, N_THRESHOLDS = TBQ##B##_N_THRESHOLDS;                 \
        static __device__ __forceinline__ int threshold(int s, int t) {                                          \
            return tbq_thresholds_##B[s][t];                                                                     \
        }                                                                                                        \
        static __device__ __forceinline__ float gap(int which, int i) {                                          \
            return tbq_gaps_##B[which][i];                                                                       \
        }                                                                                                        \
        static constexpr __host__ __device__ int half_level(int m) {                                             \
            constexpr int8_t all[N_THRESHOLDS + 1] = TBQ##B##_HALF_LEVELS;                                       \
            return all[m];                                                                                       \
        }                                                                                                        \
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

// --- across a half-warp -----------------------------------------------------------------------------------------

static __device__ __forceinline__ void tbq_butterflies_16(float (&v)[4], int l) {
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float other = __shfl_xor_sync(TBQ_WARP_ALL, v[j], h);
            v[j] = l & h ? __fsub_rn(other, v[j]) : __fadd_rn(v[j], other);
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

// Each lane's sums for 2 H scales to the sums over the lanes for one: lanes with bit H keep the upper half of what they
// have, the others the lower.
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

// --- a block ----------------------------------------------------------------------------------------------------

// The norm preserved: d . |k| = |y|.  Saturates at the largest half.
static __device__ __forceinline__ float tbq_norm_scale(float rms, int kk, bool huge) {
    const float norm = __fdiv_rn(__fmul_rn(__fmul_rn(rms, 0.125f), 8.0f), __fsqrt_rn((float) kk));
    const float d    = __fmul_rn(norm, huge ? 0x1p100f : 1.0f);
    return d < 65504.0f ? d : 65504.0f;
}

// By 16 lanes, whose values are l + 16 j.
template <int BITS>
static __device__ __forceinline__ void tbq_write_block(const int (&index)[4], unsigned short d, char * block, bool write, int l) {
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

// Is (qk, kk) of scale s better than the other?  qk / sqrt(kk) compared exactly; of equals the smaller scale.
static __device__ __forceinline__ bool tbq_scale_better(int qk, int kk, int s, int o_qk, int o_kk, int o) {
    const uint64_t mine   = (uint64_t) qk * (uint64_t) qk * (uint64_t) o_kk;
    const uint64_t theirs = (uint64_t) o_qk * (uint64_t) o_qk * (uint64_t) kk;
    return mine > theirs || (mine == theirs && s < o);
}

// What both kernels know of a block before they search.
struct tbq_measure {
    bool  bad, zero, huge; // NaN or Inf; too small for any d; above 2^50, where squares would overflow
    float rms, inverse;    // of the rotated values, and TBQ_Q_ONE over it
};

// x: value l + 16 j in x[j]; z: rotated, not divided by 8.  top: the largest of the bits of |x| of the block.
static __device__ __forceinline__ tbq_measure tbq_rotate_and_measure(const float (&x)[4], float (&z)[4], uint32_t top, int l) {
    tbq_measure m;
    m.bad  = top >= 0x7F800000u;
    m.zero = top < 0x30800000u; // 2^-30
    m.huge = top > 0x58800000u && !m.bad;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        z[j] = tbq_flip(m.huge ? __fmul_rn(x[j], 0x1p-100f) : x[j], l + 16 * j);
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

// What a block needs of shared memory.
struct tbq_encoder_scratch {
    float m[64];
    float pad[16]; // the other half of the warp falls on the other banks
};

// From a level to the one above and the one below, and the level.  In shared memory, because lanes ask for different
// ones; filled by the first 16 threads, before a barrier.
struct tbq_encoder_gaps {
    float up[16], down[16], level[16];
};

template <int BITS> static __device__ __forceinline__ void tbq_encoder_fill_gaps(tbq_encoder_gaps * gaps) {
    using tables = tbq_encoder_tables<BITS>;
    const int i = threadIdx.x;
    if (i < 16) {
        gaps->up[i]    = tables::gap(0, i);
        gaps->down[i]  = tables::gap(1, i);
        gaps->level[i] = tables::gap(2, i);
    }
}

// x: value l + 16 j in x[j].  All lanes of the warp come here; `write` says whether this half's block exists.
template <int BITS>
static __device__ __forceinline__ void tbq_quantize_block(const float (&x)[4], const float * weight, char * block, bool write, int l,
                                                          tbq_encoder_scratch * scratch, const tbq_encoder_gaps * gaps) {
    using tables = tbq_encoder_tables<BITS>;
    constexpr int HALF = 1 << (BITS - 1);

    uint32_t top = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        top = max(top, __float_as_uint(x[j]) & 0x7FFFFFFFu);
    }
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
        top = max(top, __shfl_xor_sync(TBQ_WARP_ALL, top, h));
    }
    float             z[4];
    const tbq_measure what = tbq_rotate_and_measure(x, z, top, l);
    const bool        bad = what.bad, zero = what.zero, huge = what.huge;
    const float       rms = what.rms, inverse = what.inverse;

    int q[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        q[j] = tbq_to_fixed(z[j], inverse, zero || bad);
    }

    // The scale with the largest cosine.  Every lane sums its four values for every scale; then lanes exchange halves
    // of what they have until each has the sums of one scale, and the best is the maximum over the lanes.
    constexpr int N = 16;
    int qk[N], kk[N];
#pragma unroll
    for (int s = 0; s < N; s++) {
        qk[s] = kk[s] = 0;
        if (s < tables::N_SCALES) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int k = tbq_half_level_of<BITS>(q[j], s);
                qk[s] += q[j] * k;
                kk[s] += k * k;
            }
        }
    }
    tbq_share_out<8>(qk, kk, l);
    int best_qk = qk[0], best_kk = kk[0], best = l; // of scale l; none has sums of 0 but those that do not exist
    best_kk = best_kk == 0 ? 1 : best_kk;
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
        const int o_qk = __shfl_xor_sync(TBQ_WARP_ALL, best_qk, h);
        const int o_kk = __shfl_xor_sync(TBQ_WARP_ALL, best_kk, h);
        const int o    = __shfl_xor_sync(TBQ_WARP_ALL, best, h);
        if (tbq_scale_better(o_qk, o_kk, o, best_qk, best_kk, best)) {
            best_qk = o_qk;
            best_kk = o_kk;
            best    = o;
        }
    }

    int   index[4];
    float k[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int m = 0;
#pragma unroll
        for (int i = 0; i < tables::N_THRESHOLDS; i++) {
            m += q[j] > tables::threshold(best, i);
        }
        index[j] = z[j] < 0.0f ? HALF - 1 - m : HALF + m;
        k[j]     = gaps->level[index[j]];
    }

    // noise shaping
    {
        const float mean_square = __fmul_rn(__fmul_rn(rms, rms), 1.0f / 64);
        const float scale       = __fdiv_rn(0.5f, mean_square);
        const float d           = __fdiv_rn((float) best_qk, (float) best_kk);
        float       w[4], m[4], g[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float square = __fmul_rn(x[j], x[j]);
            const float pair   = __fadd_rn(square, __shfl_xor_sync(TBQ_WARP_ALL, square, 1));
            w[j] = weight ? weight[j] : __fadd_rn(__fsqrt_rn(__fmul_rn(pair, scale)), TBQ_SHAPE_FLOOR);
            m[j] = w[j];
            g[j] = __fsub_rn(__fmul_rn(z[j], inverse), __fmul_rn(d, k[j]));
        }
        tbq_butterflies_16(m, l);
        tbq_butterflies_16(g, l);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            m[j] = __fmul_rn(m[j], 1.0f / 64);
            g[j] = __fmul_rn(g[j], w[j]);
            scratch->m[l + 16 * j] = m[j];
        }
        tbq_butterflies_16(g, l);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            g[j] = __fmul_rn(g[j], 1.0f / 64);
        }
        __syncwarp();
        const float m0 = scratch->m[0];
        // even and odd lanes hold the even and the odd coordinates, which do not interact: both move at once
        for (int step = 0; step < TBQ_SHAPE_STEPS; step++) {
            float gain = 0.0f;
            int   at   = 64;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float gap   = __fmul_rn(d, (g[j] > 0.0f ? gaps->up : gaps->down)[index[j]]);
                const float size  = fabsf(g[j]);
                const float value = __fmul_rn(gap, __fsub_rn(__fadd_rn(size, size), __fmul_rn(gap, m0)));
                if (value > gain) {
                    gain = value;
                    at   = l + 16 * j;
                }
            }
            tbq_first_largest(gain, at);
            const bool moves = gain > 0.0f && !huge && !zero && !bad;
            if (!__any_sync(TBQ_WARP_ALL, moves)) {
                break;
            }
            // the lane that holds it says how far
            float s = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (moves && at == l + 16 * j) {
                    const bool up = g[j] > 0.0f;
                    s = __fmul_rn(d, up ? gaps->up[index[j]] : -gaps->down[index[j]]);
                    index[j] += up ? 1 : -1;
                }
            }
            s = __shfl_sync(TBQ_WARP_ALL, s, (threadIdx.x & 16) | (at & 15));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float change = __fmul_rn(s, scratch->m[((l + 16 * j) ^ at) & 63]);
                g[j] = moves ? __fsub_rn(g[j], change) : g[j];
            }
        }
        __syncwarp(); // before the next block overwrites m
        int total = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int level = (int) gaps->level[index[j]];
            total += level * level;
        }
#pragma unroll
        for (int h = 1; h < 16; h *= 2) {
            total += __shfl_xor_sync(TBQ_WARP_ALL, total, h);
        }
        best_kk = huge ? best_kk : total;
    }

    float d = tbq_norm_scale(rms, best_kk, huge);
    if (zero || bad) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            index[j] = 0;
        }
        d = 0.0f;
    }

    tbq_write_block<BITS>(index, bad ? 0x7E00 : __half_as_ushort(__float2half_rn(d)), block, write, l);
}

// Rows of values to rows of blocks.  With ids (SET_ROWS), row i1 of (i2, i3) becomes row
// ids[i1, i2 % ids_ne1, i3 % ids_ne2].
struct tbq_encode_args {
    const void * src;
    char *       dst;
    tbq_rows     from; // the shape and the strides of the source, in elements
    tbq_rows     to;   // the same shape, and the strides of the result in bytes
    const void * ids;
    int          ids_64;
    long long    ids_ne1, ids_ne2, ids_s0, ids_s1, ids_s2; // elements
    const float * mean;   // of each row of keys, subtracted first; null: zeros
    const float * weight; // of the error in each channel, equal in pairs of neighbours; null: guessed from the block
};

// Rotary embedding on the way (GGML_OP_ROPE, modes NORMAL and NEOX), of keys that are encoded right after it.
// Angles are computed as the backend computes those of the queries, with the same approximations: only equal errors
// cancel between the two.
struct tbq_rope_args {
    int           head_size;
    int           n_dims;  // rotated channels of a head; the others pass
    bool          neox;    // pairs (i, i + n_dims / 2) instead of (2 i, 2 i + 1)
    const int *   pos;     // of each token
    const float * factors; // n_dims / 2 divisors of the angles, or null
    float         theta_scale, freq_scale, ext_factor, attn_factor, corr_low, corr_high;
    long long     s_head;  // elements between heads of the source
};

// Channel c of the head that starts at x.
static __device__ __forceinline__ float tbq_rope(const tbq_rope_args & r, const float * x, int c, int pos) {
    if (c >= r.n_dims) {
        return x[c];
    }
    const int  half   = r.n_dims / 2;
    const bool second = r.neox ? c >= half : c & 1;
    const int  pair   = r.neox ? c - (second ? half : 0) : c / 2;
    const float x0 = x[r.neox ? pair : 2 * pair];
    const float x1 = x[r.neox ? pair + half : 2 * pair + 1];

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

// Lane l's part of the mean and the weights of block i0 of a row.  They have been out of the L2 cache since the last token,
// so they are fetched before the wait for the grid in front: after it they cost 1.5 % of a 7B model's decode.
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

// grid: enough half-warps for the number of blocks
template <int BITS, typename src_t> __global__ void __launch_bounds__(TBQ_ENCODE_THREADS) tbq_quantize_rows(const tbq_encode_args a) {
    __shared__ tbq_encoder_scratch scratch[TBQ_ENCODE_THREADS / 16];
    __shared__ tbq_encoder_gaps    gaps;
    tbq_encoder_fill_gaps<BITS>(&gaps);

    const int       l     = threadIdx.x % 16;
    const long long index = ((long long) blockIdx.x * blockDim.x + threadIdx.x) / 16;
    const long long n     = a.from.n_blocks();
    const tbq_index4 at   = a.from.index4(index < n ? index : n - 1);
    const tbq_center center(a, at.i0, l);
    __syncthreads();

#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // what follows waits for the end of this grid before it reads
#endif
    long long row = at.i1;
    if (a.ids) {
        const long long id = at.i1 * a.ids_s0 + at.i2 % a.ids_ne1 * a.ids_s1 + at.i3 % a.ids_ne2 * a.ids_s2;
        row = a.ids_64 ? ((const long long *) a.ids)[id] : ((const int *) a.ids)[id];
    }
    const src_t * src = (const src_t *) a.src + at.i0 * 64 + a.from.offset(at.i1, at.i2, at.i3);
    char *        dst = a.dst + at.i0 * tbq_block_bytes(BITS) + a.to.offset(row, at.i2, at.i3);
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        x[j] = __fsub_rn(tbq_load(src + l + 16 * j), center.mean[j]);
    }
    tbq_quantize_block<BITS>(x, a.weight ? center.weight : nullptr, dst, index < n, l, &scratch[threadIdx.x / 16], &gaps);
}

// --- few blocks: the shortest way -------------------------------------------------------------------------------------
//
// In decode there is a block or two for each of a few heads, and what counts is how long one takes.  Four warps to a
// block: eight half-warps rotate it, all the same, and try two scales each; one warp prepares the weights of noise
// shaping meanwhile; then a warp descends on the even coordinates, a lane to each, and another on the odd ones.

#define TBQ_ENCODE_FEW_THREADS 128

// Block i of a.  rope: null, or the embedding of float rows that a.src points at, head after head.
template <int BITS, typename src_t>
static __device__ __forceinline__ void tbq_quantize_one(const tbq_encode_args & a, unsigned i, const tbq_rope_args * rope = nullptr) {
#if __CUDA_ARCH__ >= 800
    using tables = tbq_encoder_tables<BITS>;
    constexpr int HALF = 1 << (BITS - 1);

    __shared__ tbq_encoder_gaps gaps;
    __shared__ float            z_all[64], w_all[64], m_all[64];
    __shared__ int              cand_qk[8], cand_kk[8], cand_s[8];
    __shared__ int              index_all[64], kk_of[2];

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int l    = threadIdx.x % 16;
    const int hw   = threadIdx.x / 16;

    // index4 in 32 bits, for there are few blocks, and without the divisions that a single token does not need: they are
    // a tenth of all the time here.
    const unsigned ne0 = (unsigned) a.from.ne[0], ne1 = (unsigned) a.from.ne[1], ne2 = (unsigned) a.from.ne[2];
    const unsigned i0  = i % ne0;
    unsigned       i1  = i / ne0, i2 = 0, i3 = 0;
    long long      at  = 0;
    if (a.from.ne[2] * a.from.ne[3] > 1) {
        const unsigned rest = i1 / ne1;
        i1 %= ne1;
        i2 = rest % ne2;
        i3 = rest / ne2;
        if (a.ids) {
            at = i2 % (unsigned) a.ids_ne1 * a.ids_s1 + i3 % (unsigned) a.ids_ne2 * a.ids_s2;
        }
    }
    tbq_encoder_fill_gaps<BITS>(&gaps);
    const tbq_center center(a, i0, l);

#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // what follows waits for the end of this grid before it reads
#endif
    long long row = i1;
    if (a.ids) {
        at += i1 * a.ids_s0;
        row = a.ids_64 ? ((const long long *) a.ids)[at] : ((const int *) a.ids)[at];
    }
    const src_t * src = (const src_t *) a.src + i0 * 64 + a.from.offset(i1, i2, i3);
    float    x[4];
    uint32_t top = 0;
    if (rope) {
        const unsigned head = i0 * 64 / rope->head_size;
        const float *  from = (const float *) a.src + head * rope->s_head + i1 * a.from.s[0];
        const int      pos  = rope->pos[i1];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = tbq_rope(*rope, from, i0 * 64 - head * rope->head_size + l + 16 * j, pos);
        }
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = tbq_load(src + l + 16 * j);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        x[j] = __fsub_rn(x[j], center.mean[j]);
        top  = max(top, __float_as_uint(x[j]) & 0x7FFFFFFFu);
    }
    top = __reduce_max_sync(TBQ_WARP_ALL, top); // both halves hold the same block
    float             z[4];
    const tbq_measure what = tbq_rotate_and_measure(x, z, top, l);
    const bool        bad = what.bad, zero = what.zero, huge = what.huge;
    const float       rms = what.rms, inverse = what.inverse;

    int best_qk = 0, best_kk = 1, best = hw;
#pragma unroll
    for (int r = 0; r < (tables::N_SCALES + 7) / 8; r++) {
        const int s  = hw + 8 * r;
        int       qk = 0, kk = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int q = tbq_to_fixed(z[j], inverse, zero || bad);
            const int k = tbq_half_level_of<BITS>(q, min(s, tables::N_SCALES - 1));
            qk += q * k;
            kk += k * k;
        }
#pragma unroll
        for (int h = 1; h < 16; h *= 2) {
            qk += __shfl_xor_sync(TBQ_WARP_ALL, qk, h);
            kk += __shfl_xor_sync(TBQ_WARP_ALL, kk, h);
        }
        if (s < tables::N_SCALES && tbq_scale_better(qk, kk, s, best_qk, best_kk, best)) {
            best_qk = qk;
            best_kk = kk;
            best    = s;
        }
    }
    if (l == 0) {
        cand_qk[hw] = best_qk;
        cand_kk[hw] = best_kk;
        cand_s[hw]  = best;
    }
    if (warp == 0) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            z_all[l + 16 * j] = z[j]; // both halves write the same
        }
    } else if (warp == 3) {
        const float mean_square = __fmul_rn(__fmul_rn(rms, rms), 1.0f / 64);
        const float scale       = __fdiv_rn(0.5f, mean_square);
        float       m[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float square = __fmul_rn(x[j], x[j]);
            const float pair   = __fadd_rn(square, __shfl_xor_sync(TBQ_WARP_ALL, square, 1));
            m[j] = a.weight ? center.weight[j] : __fadd_rn(__fsqrt_rn(__fmul_rn(pair, scale)), TBQ_SHAPE_FLOOR);
            w_all[l + 16 * j] = m[j];
        }
        tbq_butterflies_16(m, l);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            m_all[l + 16 * j] = __fmul_rn(m[j], 1.0f / 64);
        }
    }
    __syncthreads();

    if (warp < 2) {
        best_qk = cand_qk[lane % 8];
        best_kk = cand_kk[lane % 8];
        best    = cand_s[lane % 8];
#pragma unroll
        for (int h = 1; h < 8; h *= 2) {
            const int o_qk = __shfl_xor_sync(TBQ_WARP_ALL, best_qk, h);
            const int o_kk = __shfl_xor_sync(TBQ_WARP_ALL, best_kk, h);
            const int o    = __shfl_xor_sync(TBQ_WARP_ALL, best, h);
            if (tbq_scale_better(o_qk, o_kk, o, best_qk, best_kk, best)) {
                best_qk = o_qk;
                best_kk = o_kk;
                best    = o;
            }
        }
        // values lane and lane + 32, in both warps
        const float d = __fdiv_rn((float) best_qk, (float) best_kk);
        float       g[2];
        int         index[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float y = z_all[lane + 32 * r];
            const int   q = tbq_to_fixed(y, inverse, zero || bad);
            int         m = 0;
#pragma unroll
            for (int t = 0; t < tables::N_THRESHOLDS; t++) {
                m += q > tables::threshold(best, t);
            }
            index[r] = y < 0.0f ? HALF - 1 - m : HALF + m;
            g[r]     = __fsub_rn(__fmul_rn(y, inverse), __fmul_rn(d, gaps.level[index[r]]));
        }
        tbq_butterflies(g[0], g[1], lane);
        g[0] = __fmul_rn(g[0], w_all[lane]);
        g[1] = __fmul_rn(g[1], w_all[lane + 32]);
        tbq_butterflies(g[0], g[1], lane);

        // value 2 lane + warp
        const int   from    = (2 * lane + warp) % 32;
        const float g_lo    = __shfl_sync(TBQ_WARP_ALL, g[0], from), g_hi = __shfl_sync(TBQ_WARP_ALL, g[1], from);
        const int   i_lo    = __shfl_sync(TBQ_WARP_ALL, index[0], from), i_hi = __shfl_sync(TBQ_WARP_ALL, index[1], from);
        float       slope   = __fmul_rn(lane < 16 ? g_lo : g_hi, 1.0f / 64);
        int         my      = lane < 16 ? i_lo : i_hi;
        const float m0      = m_all[0];
        const bool  shapes  = !huge && !zero && !bad;
        float       up      = __fmul_rn(d, gaps.up[my]), down = __fmul_rn(d, gaps.down[my]);
        for (int step = 0; step < TBQ_SHAPE_STEPS && shapes; step++) {
            const float gap   = slope > 0.0f ? up : down;
            const float size  = fabsf(slope);
            const float value = __fmul_rn(gap, __fsub_rn(__fadd_rn(size, size), __fmul_rn(gap, m0)));
            // not negative, so that the bits order like the values
            const uint32_t gain = value > 0.0f ? __float_as_uint(value) : 0u;
            const uint32_t most = __reduce_max_sync(TBQ_WARP_ALL, gain);
            if (most == 0) {
                break;
            }
            const int   at     = __ffs(__ballot_sync(TBQ_WARP_ALL, gain == most)) - 1;
            const float s      = __shfl_sync(TBQ_WARP_ALL, slope > 0.0f ? up : -down, at);
            const float change = __fmul_rn(s, m_all[(2 * lane) ^ (2 * at)]);
            if (lane == at) {
                my += slope > 0.0f ? 1 : -1;
                up   = __fmul_rn(d, gaps.up[my]);
                down = __fmul_rn(d, gaps.down[my]);
            }
            slope = __fsub_rn(slope, change);
        }
        index_all[2 * lane + warp] = zero || bad ? 0 : my;
        const int level = (int) gaps.level[my];
        const int total = __reduce_add_sync(TBQ_WARP_ALL, level * level);
        if (lane == 0) {
            kk_of[warp] = total;
        }
    }
    __syncthreads();
    if (warp == 0) {
        const int kk = huge ? best_kk : kk_of[0] + kk_of[1];
        const float d = zero || bad ? 0.0f : tbq_norm_scale(rms, kk, huge);
        int index[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            index[j] = index_all[l + 16 * j];
        }
        tbq_write_block<BITS>(index, bad ? 0x7E00 : __half_as_ushort(__float2half_rn(d)),
                              a.dst + i0 * tbq_block_bytes(BITS) + a.to.offset(row, i2, i3), lane < 16, l);
    }
#else
    __trap(); // the host takes tbq_quantize_rows here
#endif
}

template <int BITS, typename src_t> __global__ void __launch_bounds__(TBQ_ENCODE_FEW_THREADS) tbq_quantize_few(const tbq_encode_args a) {
    tbq_quantize_one<BITS, src_t>(a, blockIdx.x);
}

// A token's keys and values in one launch: the first n_a CTAs do a, the others b.  ROPE: the keys are as they were before
// their rotary embedding.
template <int BITS_A, int BITS_B, bool ROPE>
__global__ void __launch_bounds__(TBQ_ENCODE_FEW_THREADS)
    tbq_quantize_pair(const tbq_encode_args a, const tbq_rope_args rope, const tbq_encode_args b, int n_a) {
    if (blockIdx.x < n_a) {
        tbq_quantize_one<BITS_A, float>(a, blockIdx.x, ROPE ? &rope : nullptr);
    } else {
        tbq_quantize_one<BITS_B, float>(b, blockIdx.x - n_a);
    }
}
