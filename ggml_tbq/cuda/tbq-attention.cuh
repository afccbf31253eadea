// SPDX-License-Identifier: MIT
// Attention of a few query rows to packed keys and values: GGML_OP_FLASH_ATTN_EXT in decode.
//
// WHY IT IS FAST
//
// A cache of a quarter of the bytes is read in a quarter of the time only if unpacking keeps up.  llama.cpp's vector
// kernel unpacks a key once per query head, with loads of two bytes: 35 instructions per value for four heads.  Here
//
//   - all query heads of a KV head, and several tokens, are the columns of one tensor-core tile, so a key is unpacked
//     once. The columns are padded to 8 or 16, because unpacking is the limit and not the tensor core;
//   - an unpacked word is an operand of the tensor core: one or two `prmt` turn four indices into four bytes, in an
//     order that costs nothing, because the order of a contraction is free and queries are permuted once instead;
//   - keys are multiplied by queries as integers, so keys need no conversion.  Queries have 8 bits and one scale for
//     64, as on the CPU (docs/measurements/attention.md has the divergences);
//   - values become bfloat16 in pairs of tokens, with one `lop3` or `prmt` and one `fma` for two.  Weights times scales
//     are rounded to bfloat16, in whose range every such product is;
//   - each warp runs independently: slices of 16 tokens through a ring of its own in shared memory (cp.async), its own
//     running maximum and sums, no barrier until the end of its split of the cache.
//
// THE TILES, for lane 4 g + t of a warp and a slice of 16 tokens
//
//     S = Q . K^T     m16n8k32, s8 . u8:  A = queries (rows g, g + 8), B = keys (column g), twice for 16 tokens
//     O^T = V^T . P^T m16n8k16, bf16:     A = values (rows = channels), B = weights (columns = queries)
//
// The result of the first product holds tokens 2t, 2t + 1 of query g.  The second product needs just these as B, so
// weights stay in their registers.  Of a block of 64 channels, lane (g, t) takes nibble words t and t + 4 of a key
// (tbq-block.cuh), and word g of the values of tokens 2t, 2t + 1, 2t + 8, 2t + 9: channels 4g + i and 4g + 32 + i, i <
// 4, of the output.
//
// Everything is computed in the rotated domain: queries are rotated when they are loaded, and the output is rotated
// back when it is written.  The order of all sums depends on the shape of the problem and the number of
// multiprocessors.
//
// K OR V MAY BE q8_0 OR f16 (8 and 16 bits below; a model with large key biases needs that), in the same frame.  q8_0
// keys are bytes already, with a scale for 32 channels, and queries are rounded likewise.  q8_0 values become bfloat16,
// in tiles of 32 channels because of their scales.  f16 is loaded with `ldmatrix`, and queries or weights are f16 for
// it.  Neither is rotated here.
//
// EXACT ROWS are some rows of the cache a second time, as tbq8_0: those of the list `cells`.  They are more slices of
// the same splits, and a warp takes its share of them first, while its packed slices are on their way.  Their products
// are the ones above, with s8 . s8 for the first.  An exact row stands for the packed row of its cell, which is hidden
// by a bit of a map.  A side that is not tbq has no exact rows: there the row of the cell is read.  Where no other CTA
// hides the way to memory, at an empty cache above all, rows are copied to shared memory when the kernel begins.  Else
// they come from global memory: most slices of a long list are hidden from all columns, and skipped.
//
// CENTERED KEYS (tbq keys only) lack their mean c, and each logit of a query lacks d = scale q.c.  A warp computes d
// where it has the query before its rotation.  A soft-cap gets d added.  Without one only a sink can tell, and d moves
// the maximum to which the weights are relative, when a split ends: so splits, the merge and the sink see whole keys.
// Values that are keys get c back with the output.  Without a soft-cap the loop over the cache knows nothing of this.
#pragma once

#include "tbq-block.cuh"

#include <float.h>

// Shapes in ggml's order.  Strides are bytes.
struct tbq_attention_args {
    const char *  q;     // f32 [D, n_q, n_head, n_seq]
    const char *  k;     // [D, n_kv, n_head_kv, n_seq_kv] of the type that BITS_K names
    const char *  v;     // [D, n_kv, n_head_kv, n_seq_kv], BITS_V
    const char *  mask;  // f16 [n_kv, >= n_q, 1, n_seq_mask], or null
    const float * sinks; // f32 [n_head], or null
    const float * mean;  // f32 [D, n_head_kv]: what tbq keys lack, or null
    float *       dst;   // f32 [D, n_head, n_q, n_seq], contiguous

    // Exact rows: tbq8_0 [D, n_exact, n_head_kv, n_seq_kv], null for a side that is not tbq.  For each of the n_seq_kv:
    // n_exact cells, the row of k and v for which exact row j stands, or -1 (not used); then the map, a word for 32
    // rows, bit c % 32 of word c / 32: row c is in the list.  cells is null where there are none.
    const char * exact_k;
    const char * exact_v;
    const int *  cells;

    float * partial; // tbq_attention_partial_bytes() of them, unless n_split == 1

    float scale, max_bias, logit_softcap;

    bool      mean_of_values; // values are keys, so they lack the mean, too
    int       n_q, n_head, n_seq;
    int       n_kv, n_head_kv, n_seq_kv, n_seq_mask;
    long long q_nb1, q_nb2, q_nb3;
    long long k_nb1, k_nb2, k_nb3;
    long long v_nb1, v_nb2, v_nb3;
    long long mask_nb1, mask_nb3;
    int       n_exact;
    long long exact_k_nb1, exact_k_nb2, exact_k_nb3;
    long long exact_v_nb1, exact_v_nb2, exact_v_nb3;

    // set by tbq_attention_partition
    int      gqa;              // query heads of a KV head
    unsigned gqa_magic;        // x / gqa = x . gqa_magic >> 32 for x < 2^32 / gqa; 0 if gqa == 1
    int      n_groups;         // tiles of columns
    int      kv_per_seq;       // sequences of queries that share one of keys
    int      n_split;          // of the cache (split-KV)
    int      slices_per_split; // of 16 tokens
    int      exact_per_split;  // slices of 16 exact rows
    int      exact_staged;     // of a warp's slices of exact rows in shared memory; set by tbq_attention_stage_exact
};

#define TBQ_ATTENTION_WARPS   8
#define TBQ_ATTENTION_SLICE   16
#define TBQ_ATTENTION_THREADS (32 * TBQ_ATTENTION_WARPS)

// Bytes of 64 values of a K or V tensor by bits: 2, 3, 4: tbq; 8: two blocks of q8_0, each a half and 32 bytes; 16:
// f16.
constexpr __host__ __device__ int tbq_attention_block(int bits) {
    return bits == 16 ? 128 : bits == 8 ? 68 : tbq_block_bytes(bits);
}

// What the start of a head's slice of a row is a multiple of, up to 16: its own size.
constexpr __host__ __device__ int tbq_attention_align(int d, int bits) {
    const int bytes = d / 64 * tbq_attention_block(bits);
    return (bytes & -bytes) < 16 ? bytes & -bytes : 16;
}

// A row of the cache in shared memory: the 16-byte units that a head's slice of a row can touch.  An odd number of
// units keeps every read of the kernel free of bank conflicts: rows are 4, 12, 20 or 28 banks apart, modulo 32.
constexpr __host__ __device__ int tbq_attention_units(int d, int bits) {
    return (d / 64 * tbq_attention_block(bits) + 16 - tbq_attention_align(d, bits) + 15) / 16;
}

constexpr __host__ __device__ int tbq_attention_pitch(int d, int bits) {
    return (tbq_attention_units(d, bits) | 1) * 16;
}

// Slices of a ring.  Those with f16 keys or values are large: two leave room for a second CTA.
constexpr __host__ __device__ int tbq_attention_stages(int bits_k, int bits_v) {
    return bits_k == 16 || bits_v == 16 ? 2 : 3;
}

// Bytes of a query in shared memory, 8 bits each or f16 (rows on different banks).
constexpr __host__ __device__ int tbq_attention_query(int d, int bits_k) {
    return bits_k == 16 ? 2 * d + 16 : d;
}

// Floats between the columns of a result in shared memory: those of a warp's lanes fall on different banks.
constexpr __host__ __device__ int tbq_attention_row(int d) {
    return d + 4;
}

// The rings, and later the results of four warps in the same place.  One word more, because a word that may cross a
// boundary is read as two.
constexpr __host__ __device__ int tbq_attention_smem(int d, int bits_k, int bits_v, int nc) {
    const int rings   = TBQ_ATTENTION_WARPS * tbq_attention_stages(bits_k, bits_v) * TBQ_ATTENTION_SLICE *
                            (tbq_attention_pitch(d, bits_k) + tbq_attention_pitch(d, bits_v)) +
                        16;
    const int results = TBQ_ATTENTION_WARPS / 2 * nc * tbq_attention_row(d) * 4;
    return rings > results ? rings : results;
}

// The static shared memory of the kernel, at most.
constexpr __host__ __device__ int tbq_attention_static_smem(int d, int bits_k, int nc) {
    return nc * tbq_attention_query(d, bits_k) + nc * (d / 64) * 12 + nc * TBQ_ATTENTION_WARPS * 3 * 4 + 256;
}

// A slice of exact rows in shared memory, also with an odd number of 16-byte units for a row.  0 for a side that is not
// tbq.
constexpr __host__ __device__ int tbq_attention_exact_pitch(int d, int bits) {
    return bits < 8 ? ((d / 64 * (int) sizeof(block_tbq8_0) + 15) / 16 | 1) * 16 : 0;
}

constexpr __host__ __device__ int tbq_attention_exact_stage(int d, int bits_k, int bits_v) {
    return TBQ_ATTENTION_SLICE * (tbq_attention_exact_pitch(d, bits_k) + tbq_attention_exact_pitch(d, bits_v));
}

// Columns of one tile of the tensor core: query heads of one KV head times tokens.
static inline int tbq_attention_columns(int n_columns) {
    return n_columns <= 8 ? 8 : 16;
}

// How the queries are grouped: by KV head, in tiles of columns.
static inline void tbq_attention_group(tbq_attention_args & a) {
    a.gqa               = a.n_head / a.n_head_kv;
    a.gqa_magic         = a.gqa == 1 ? 0 : (unsigned) ((1ull << 32) / a.gqa + 1);
    const int n_columns = a.n_q * a.gqa;
    const int nc        = tbq_attention_columns(n_columns);
    a.n_groups          = (n_columns + nc - 1) / nc;
    a.kv_per_seq        = a.n_seq / a.n_seq_kv;
}

// How the cache is split: into enough splits that every multiprocessor holds as many CTAs as fit, and each warp has at
// least two slices.  A few exact rows are not a reason for another split: an empty cache would need the second kernel,
// which merges.  n_resident: CTAs that run at the same time.
static inline void tbq_attention_partition(tbq_attention_args & a, int n_resident) {
    tbq_attention_group(a);
    const int n_tiles  = a.n_groups * a.n_head_kv * a.n_seq;
    const int n_slices = (a.n_kv + TBQ_ATTENTION_SLICE - 1) / TBQ_ATTENTION_SLICE;
    const int n_exact  = a.cells ? (a.n_exact + TBQ_ATTENTION_SLICE - 1) / TBQ_ATTENTION_SLICE : 0;
    const int n_most   = n_slices > n_exact ? n_slices : n_exact;
    const int useful   = (n_most + 2 * TBQ_ATTENTION_WARPS - 1) / (2 * TBQ_ATTENTION_WARPS);
    int       n_split  = n_resident / n_tiles;
    n_split            = n_split < useful ? n_split : useful;
    n_split            = n_split > 1 ? n_split : 1;
    a.slices_per_split = (n_slices + n_split - 1) / n_split;
    a.n_split          = (n_slices + a.slices_per_split - 1) / a.slices_per_split;
    a.exact_per_split  = (n_exact + a.n_split - 1) / a.n_split;
}

// Sets how many of a warp's slices of exact rows the kernel copies to shared memory when it begins, and returns the
// bytes of shared memory that this adds.  None where there are more CTAs than multiprocessors: they hide each other's
// loads, and need the memory.  n_free: bytes that a CTA may still have.
static inline int tbq_attention_stage_exact(tbq_attention_args & a, int d, int bits_k, int bits_v, int n_sm,
                                            int n_free) {
    const int n_ctas   = a.n_split * a.n_groups * a.n_head_kv * a.n_seq;
    const int bytes    = TBQ_ATTENTION_WARPS * tbq_attention_exact_stage(d, bits_k, bits_v);
    const int n_slices = (a.exact_per_split + TBQ_ATTENTION_WARPS - 1) / TBQ_ATTENTION_WARPS;
    const int fit      = n_free > 0 ? n_free / bytes : 0;
    const int piece    = d / 64 * 4; // copied at once: as much as every row is aligned to
    bool      aligned  = true;
    for (long long at : { (long long) (size_t) a.exact_k, a.exact_k_nb1, a.exact_k_nb2, a.exact_k_nb3,
                          (long long) (size_t) a.exact_v, a.exact_v_nb1, a.exact_v_nb2, a.exact_v_nb3 }) {
        aligned = aligned && at % piece == 0;
    }
    a.exact_staged = n_ctas > n_sm || !aligned ? 0 : n_slices < fit ? n_slices : fit;
    return a.exact_staged * bytes;
}

// For every row of the output and every split: D sums, then the maximum and the sum of weights.
static inline size_t tbq_attention_partial_bytes(const tbq_attention_args & a, int d) {
    return a.n_split == 1 ? 0 : (size_t) a.n_seq * a.n_q * a.n_head * a.n_split * (d + 2) * sizeof(float);
}

#ifdef __CUDACC__

#define TBQ_LOG2E 1.4426950408889634f

// --- numbers ---------------------------------------------------------------------------------------------------------

static __device__ __forceinline__ uint32_t tbq_pack_f16(float lo, float hi) {
    const half2 x = __floats2half2_rn(lo, hi);
    return *(const uint32_t *) &x;
}

// Byte i of two words, signed.
static __device__ __forceinline__ uint32_t tbq_bf16_pair(uint32_t lo, uint32_t hi, int i) {
    return tbq_bf16_bytes(tbq_prmt(lo, hi, 0x4400 + 0x1111 * i));
}

// Nibble words w and w + 8 of 64 bytes, in the order of a packed key's levels: channels i and i + 32 beside each other.
static __device__ __forceinline__ void tbq_exact_levels(uint32_t w0, uint32_t w8, uint32_t & lo, uint32_t & hi) {
    lo = tbq_prmt(w0, w8, 0x5140);
    hi = tbq_prmt(w0, w8, 0x7362);
}

// A word at an even address.
static __device__ __forceinline__ uint32_t tbq_load_word(const char * p) {
    const uint16_t * halves = (const uint16_t *) p;
    return halves[0] | (uint32_t) halves[1] << 16;
}

static __device__ __forceinline__ float tbq_tanh(float x) {
    // 1 - 2 / (e^2x + 1): right at both ends too
    return 1.0f - 2.0f / (tbq_exp2(2.0f * TBQ_LOG2E * x) + 1.0f);
}

static __device__ __forceinline__ float tbq_alibi_slope(float max_bias, int head, int n_head) {
    if (max_bias == 0.0f) {
        return 1.0f;
    }
    const int   n_log2 = 1 << (31 - __clz(n_head));
    const float m0     = exp2f(-max_bias / n_log2);
    const float m1     = exp2f(-max_bias / 2.0f / n_log2);
    return head < n_log2 ? powf(m0, head + 1) : powf(m1, 2 * (head - n_log2) + 1);
}

// --- queries ---------------------------------------------------------------------------------------------------------

// A query in 8 bits, blocks of which have a scale.  From the bits of the block's largest value, without its sign: so
// floats order, and a NaN or Inf is above all and does not vanish in the rounding.
static __device__ __forceinline__ uint32_t tbq_query_bits(float x) {
    return __float_as_uint(x) & 0x7FFFFFFFu;
}

static __device__ __forceinline__ float tbq_query_inverse(uint32_t bits) {
    return bits > 0 && bits < 0x7F800000u ? 127.0f / __uint_as_float(bits) : 0.0f;
}

static __device__ __forceinline__ float tbq_query_scale(uint32_t bits, float factor) {
    return bits >= 0x7F800000u ? __int_as_float(0x7FC00000) : __uint_as_float(bits) / 127.0f * factor;
}

// q.c of a block, in every lane, before its rotation.
static __device__ __forceinline__ float tbq_query_center(float lo, float hi, const float * mean, int lane) {
    float center = lo * mean[lane] + hi * mean[lane + 32];
#pragma unroll
    for (int x = 16; x > 0; x /= 2) {
        center += __shfl_xor_sync(TBQ_WARP_ALL, center, x);
    }
    return center;
}

// --- the cache in shared memory ----------------------------------------------------------------------------------

// The K or the V tensor of the cache, as one lane sees it.
template <int D, int BITS> struct tbq_cache_reader {
    static constexpr int NB    = D / 64;
    static constexpr int BYTES = tbq_attention_block(BITS);
    static constexpr int ALIGN = tbq_attention_align(D, BITS);
    static constexpr int UNITS = tbq_attention_units(D, BITS);
    static constexpr int PITCH = tbq_attention_pitch(D, BITS);
    static constexpr int TRIPS = (TBQ_ATTENTION_SLICE * UNITS + 31) / 32;

    int          offset; // of a row within its first unit of 16 bytes (or of 4, where rows are apart by less)
    int          odd;    // what changes in it for odd tokens: bit 1, where rows are 4 k + 2 bytes apart
    uint32_t     units;  // bit i: this lane copies unit number lane + 32 i of a slice
    uint32_t     to;     // where its first unit goes within a stage
    const char * from;   // where it comes from, for the next slice
    long long    step;   // bytes from one slice of this warp to the next
    int          nb1;    // bytes from one token to the next
    bool         wide;   // every row starts at the same place of a unit

    // The units of a slice are in a line, row after row, and neighboring lanes copy neighboring units, so the units of
    // a row in one cache line are one request.  (With two lanes for each row, the number of requests was the limit.)
    __device__ __forceinline__ tbq_cache_reader(const char * row0, long long stride, int first_slice, int lane) {
        const char * slice = row0 + (long long) first_slice * TBQ_ATTENTION_SLICE * stride;
        wide               = stride % 16 == 0;
        nb1                = (int) stride;
        offset             = (int) ((size_t) row0 & (wide ? 15 : 3));
        odd                = ALIGN == 2 && !wide ? nb1 & 2 : 0;
        step               = stride * (TBQ_ATTENTION_SLICE * TBQ_ATTENTION_WARPS);
        units              = 0;
        if (wide) {
            for (int i = 0; i < TRIPS; i++) {
                const int unit = lane + 32 * i;
                units |= (uint32_t) (unit < TBQ_ATTENTION_SLICE * UNITS && unit % UNITS * 16 < offset + NB * BYTES)
                         << i;
            }
            to   = lane / UNITS * PITCH + lane % UNITS * 16;
            from = slice - offset + lane / UNITS * stride + lane % UNITS * 16;
        } else {
            to   = lane / 2 * PITCH;
            from = slice + lane / 2 * stride;
            from -= (size_t) from & 3;
        }
    }

    // Starts copying the next slice, of which n tokens exist.
    __device__ __forceinline__ void fetch(uint32_t stage, int n, int lane) {
        static_assert(UNITS % 2 == 1 || 32 % UNITS == 0, "a lane's units are the same distance apart in shared memory");
        if (wide) {
            uint32_t on = units;
            if (n < TBQ_ATTENTION_SLICE) {
                for (int i = 0; i < TRIPS; i++) {
                    on &= ~((uint32_t) ((lane + 32 * i) / UNITS >= n) << i);
                }
            }
            const char * p = from;
#pragma unroll
            for (int i = 0; i < TRIPS; i++) {
                tbq_cp_async_16_if(on & 1u << i, stage + to + i * (UNITS % 2 ? 512 : 32 / UNITS * PITCH), p);
                // 32 units on: 32 / UNITS rows and the rest, or a row more and a row's units less
                const bool wraps = 32 % UNITS != 0 && (lane + 32 * i) % UNITS >= UNITS - 32 % UNITS;
                p += 32 / UNITS * nb1 + 32 % UNITS * 16 + (wraps ? nb1 - 16 * UNITS : 0);
            }
        } else if (lane / 2 < n) {
            // any layout: rare, and correct
#pragma unroll 1
            for (int at = lane % 2 * 4; at < NB * BYTES + (ALIGN == 2 ? 2 : 0); at += 8) {
                tbq_cp_async<4>(stage + to + at, from + at);
            }
        }
        from += step;
    }

    // The 4 bytes at `at` of block b.  Blocks are 4 k + 2 bytes long, so those of every other one lie across two words.
    static __device__ __forceinline__ uint32_t word(const char * row, int b, int at) {
        const int byte = b * BYTES + at;
        if constexpr (ALIGN == 2) {
            const uint32_t   start = (uint32_t) (size_t) row + byte;
            const uint32_t * w     = (const uint32_t *) (row + byte - (start & 3));
            return __funnelshift_r(w[0], w[1], start * 8);
        } else if (byte & 3) {
            const uint32_t * w = (const uint32_t *) (row + byte - 2);
            return __funnelshift_r(w[0], w[1], 16);
        } else {
            return *(const uint32_t *) (row + byte);
        }
    }

    // Where in a block's qs and qh the lane with nibble word w reads.
    static __device__ __forceinline__ int qs_at(int w) { return 4 * (BITS == 2 || BITS == 3 ? w % 4 : w); }

    static __device__ __forceinline__ int qh_at(int w) { return 4 * (w % 2); }

    // h: which half of the 64 channels; only those of q8_0 differ
    static __device__ __forceinline__ float scale(const char * row, int b, int h = 0) {
        return __half2float(*(const __half *) (row + b * BYTES + h * (BYTES / 2)));
    }
};

// --- the kernel ----------------------------------------------------------------------------------------------------

// Ends an output row, a block for each warp: sink, division, rotation back, the mean of values (or null), store.  m, l:
// its maximum and the sum of its weights.
template <bool ROTATED>
static __device__ __forceinline__ void tbq_attention_store(float * dst, const float * sums, float m, float l,
                                                           const float * sink, const float * mean, int b, int lane) {
    const float keys = l;
    if (sink) {
        const float s      = *sink * TBQ_LOG2E;
        const float larger = fmaxf(m, s);
        const float f      = tbq_exp2(m - larger);
        l                  = l * f + tbq_exp2(s - larger);
        m                  = f;
    } else {
        m = 1.0f;
    }
    const float inverse = l == 0.0f ? 0.0f : m / l;
    float       lo      = sums[64 * b + lane] * inverse;
    float       hi      = sums[64 * b + lane + 32] * inverse;
    if constexpr (ROTATED) {
        tbq_unrotate_warp(lo, hi, lane);
    }
    if (mean) {
        lo += keys * inverse * mean[64 * b + lane];
        hi += keys * inverse * mean[64 * b + lane + 32];
    }
    dst[64 * b + lane]      = lo;
    dst[64 * b + lane + 32] = hi;
}

// grid: (splits, tiles of columns times KV heads, sequences).  EXACT: there is a list of exact rows.
template <int D, int BITS_K, int BITS_V, int NC, bool EXACT>
__global__ void __launch_bounds__(TBQ_ATTENTION_THREADS, D * NC <= 1024 ? 2 : 1)
    tbq_attention(const tbq_attention_args a) {
#if __CUDA_ARCH__ >= 800
    using reader_k       = tbq_cache_reader<D, BITS_K>;
    using reader_v       = tbq_cache_reader<D, BITS_V>;
    constexpr int NB     = D / 64; // blocks of a row
    constexpr int NG     = NC / 8; // groups of 8 columns
    constexpr int WARPS  = TBQ_ATTENTION_WARPS;
    constexpr int SLICE  = TBQ_ATTENTION_SLICE;
    constexpr int STAGES = tbq_attention_stages(BITS_K, BITS_V);
    constexpr int STAGE  = SLICE * (reader_k::PITCH + reader_v::PITCH);

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int g    = lane / 4;
    const int t    = lane % 4;

    const int gqa       = a.gqa;
    const int n_columns = a.n_q * gqa;
    const int head_kv   = a.n_groups == 1 ? blockIdx.y : blockIdx.y / a.n_groups;
    const int first_col = (blockIdx.y - head_kv * a.n_groups) * NC;
    const int seq       = blockIdx.z;
    // column -> token; a division takes as long as a trip to the L2 cache
    auto token_of = [&](int col) -> int { return a.gqa_magic ? __umulhi(col, a.gqa_magic) : col; };
    auto head_of  = [&](int col) -> int { return head_kv * gqa + col - token_of(col) * gqa; };

    TBQ_DYNAMIC_SHARED(smem, 16);
    constexpr int QROW = tbq_attention_query(D, BITS_K);
    constexpr int NS   = BITS_K == 8 ? 2 : 1;     // scales of a query for 64 channels
    __shared__ __align__(16) int8_t q8[NC][QROW]; // in the order in which operand A takes them
    __shared__ float                q_scale[NC][NB * NS];
    __shared__ int                  q_sum[NC][NB];
    __shared__ float                q_center[NC][NB]; // q.c by blocks, then all of it in the first; in units of logits
    __shared__ uint32_t             hidden[TBQ_N_HIDDEN];
    __shared__ float                max_of[WARPS][NC];
    __shared__ float                sum_of[WARPS][NC];
    __shared__ float                factor_of[WARPS][NC];

    // A ring of this warp alone.
    char * const   ring      = smem + warp * STAGES * STAGE;
    const uint32_t ring_addr = tbq_smem(ring);

    const int n_slices = (a.n_kv + SLICE - 1) / SLICE;
    const int first    = blockIdx.x * a.slices_per_split + warp;
    const int end      = min((int) (blockIdx.x + 1) * a.slices_per_split, n_slices);

    const int seq_kv = seq == 0 ? 0 : seq / a.kv_per_seq;
    reader_k  keys(a.k + head_kv * a.k_nb2 + seq_kv * a.k_nb3, a.k_nb1, first, lane);
    reader_v  values(a.v + head_kv * a.v_nb2 + seq_kv * a.v_nb3, a.v_nb1, first, lane);

    // Exact rows: slices of this warp, counted from the last warp, because the first have a slice more of the rest.
    const int exact_first = EXACT ? blockIdx.x * a.exact_per_split + WARPS - 1 - warp : 0;
    const int exact_end = EXACT ? min((int) (blockIdx.x + 1) * a.exact_per_split, (a.n_exact + SLICE - 1) / SLICE) : 0;
    const int * const  cells = EXACT ? a.cells + (long long) seq_kv * (a.n_exact + (a.n_kv + 31) / 32) : nullptr;
    const char * const exact_k =
        EXACT && BITS_K < 8 ? a.exact_k + head_kv * a.exact_k_nb2 + seq_kv * a.exact_k_nb3 : nullptr;
    const char * const exact_v =
        EXACT && BITS_V < 8 ? a.exact_v + head_kv * a.exact_v_nb2 + seq_kv * a.exact_v_nb3 : nullptr;
    constexpr int EXACT_PITCH_K = tbq_attention_exact_pitch(D, BITS_K),
                  EXACT_PITCH_V = tbq_attention_exact_pitch(D, BITS_V);
    constexpr int EXACT_STAGE   = tbq_attention_exact_stage(D, BITS_K, BITS_V);
    char * const  exact_rows = smem + tbq_attention_smem(D, BITS_K, BITS_V, NC) + warp * a.exact_staged * EXACT_STAGE;

    // Cells of two slices of this warp: lane 16 i + j has that of row j of slice i.
    auto cells_of = [&](int slice) -> int {
        const int here = slice + lane / SLICE * WARPS;
        const int slot = here * SLICE + lane % SLICE;
        return here < exact_end && slot < a.n_exact ? cells[slot] : -1;
    };
    // The map of the next 31 packed slices of this warp, lane i that of slice i: a bit for each of its tokens.
    auto map_of = [&](int slice) -> uint32_t {
        const int here = slice + lane * WARPS;
        return here < end ? ((const uint32_t *) cells + a.n_exact)[here / 2] >> here % 2 * 16 & 0xFFFF : 0;
    };
    int      cells_now = -1, cells_next = -1;
    uint32_t map_word = 0;
    if constexpr (EXACT) {
        cells_now  = cells_of(exact_first);
        cells_next = cells_of(exact_first + 2 * WARPS);
        map_word   = map_of(first);
    }

    // The list is an input of the graph, and what else was read so far too; the rest may be of the kernel before this.
    // The next grid may start: either it waits for this one before it reads, or it works beside it (tbq_encode_part).
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
#endif

    // The block of a query that this warp prepares first is on its way before everything else.
    const int n_cols  = min(NC, n_columns - first_col); // the others stay zero
    auto      block_q = [&](int i) -> const float * {
        const int col = first_col + i / NB;
        return (const float *) (a.q + token_of(col) * a.q_nb1 + head_of(col) * a.q_nb2 + seq * a.q_nb3) + 64 * (i % NB);
    };
    float q_lo = 0.0f, q_hi = 0.0f;
    if (warp < n_cols * NB) {
        q_lo = block_q(warp)[lane];
        q_hi = block_q(warp)[lane + 32];
    }

    // This code runs once, and what it costs is to fetch it: loops stay loops where they can.
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) {
        const int slice = first + i * WARPS;
        if (slice < end) {
            keys.fetch(ring_addr + i * STAGE, a.n_kv - slice * SLICE, lane);
            values.fetch(ring_addr + i * STAGE + SLICE * reader_k::PITCH, a.n_kv - slice * SLICE, lane);
        }
        tbq_cp_async_commit();
    }
    if (threadIdx.x < TBQ_N_HIDDEN) {
        hidden[threadIdx.x] = tbq_hidden_constant(threadIdx.x);
    }

    if constexpr (EXACT) {
        // 17 pieces of a row, as large as every row is aligned to, by lanes beside each other: with a row for each pair of
        // lanes an instruction would touch 16 lines, which takes half a microsecond longer
        constexpr int PIECES = sizeof(block_tbq8_0) / 4, PIECE = 4 * NB;
#pragma unroll 1
        for (int i = 0; i < a.exact_staged; i++) {
            const int      slice = exact_first + i * WARPS;
            const int      rows  = slice < exact_end ? min(a.n_exact - slice * SLICE, SLICE) : 0;
            const uint32_t to    = tbq_smem(exact_rows + i * EXACT_STAGE);
            int            row = lane / PIECES, piece = lane % PIECES;
#pragma unroll 1
            while (row < rows) {
                const int slot = slice * SLICE + row;
                if constexpr (BITS_K < 8) {
                    tbq_cp_async<PIECE>(to + row * EXACT_PITCH_K + piece * PIECE,
                                        exact_k + slot * a.exact_k_nb1 + piece * PIECE);
                }
                if constexpr (BITS_V < 8) {
                    tbq_cp_async<PIECE>(to + SLICE * EXACT_PITCH_K + row * EXACT_PITCH_V + piece * PIECE,
                                        exact_v + slot * a.exact_v_nb1 + piece * PIECE);
                }
                piece += 32 - PIECES;
                row += piece < PIECES ? 1 : 2;
                piece -= piece < PIECES ? 0 : PIECES;
            }
        }
        tbq_cp_async_commit();
    }

    // The mask of a slice of exact rows, 2t, 2t + 1, 2t + 8, 2t + 9, loaded a slice ahead; as halves, because a warp waits
    // where it converts them.  i: which of cells_now
    uint16_t exact_mask[NG][4];
    auto     load_exact_mask = [&](int i) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int cell = __shfl_sync(TBQ_WARP_ALL, cells_now, 16 * i + 2 * t + j % 2 + j / 2 * 8);
#pragma unroll
            for (int n = 0; n < NG; n++) {
                const int        col = min(first_col + g + 8 * n, n_columns - 1);
                const uint16_t * row =
                    (const uint16_t *) (a.mask + token_of(col) * a.mask_nb1 + seq % a.n_seq_mask * a.mask_nb3);
                exact_mask[n][j] = cell < 0 ? 0xFC00 : a.mask ? row[cell] : 0; // -inf
            }
        }
    };
    if constexpr (EXACT) {
        load_exact_mask(0);
    }

    // Queries: rotated, scaled, rounded to 8 bits.  While the first slices are on their way.
    const float q_factor = a.logit_softcap == 0.0f ? a.scale * TBQ_LOG2E : a.scale / a.logit_softcap;
    for (int i = threadIdx.x + n_cols * QROW / 4; i < NC * QROW / 4; i += TBQ_ATTENTION_THREADS) {
        ((int *) q8)[i] = 0;
    }
    for (int c = n_cols + warp; c < NC; c += WARPS) {
        if (lane < NB * NS) {
            q_scale[c][lane] = 0.0f;
        }
        if (lane < NB) {
            q_sum[c][lane] = 0;
        }
        if (BITS_K < 8 && lane < NB) {
            q_center[c][lane] = 0.0f;
        }
    }
#pragma unroll 1
    for (int i = warp; i < n_cols * NB; i += WARPS) {
        const int c  = i / NB;
        const int b  = i % NB;
        float     lo = q_lo, hi = q_hi;
        if (i + WARPS < n_cols * NB) {
            q_lo = block_q(i + WARPS)[lane];
            q_hi = block_q(i + WARPS)[lane + 32];
        }
        if constexpr (BITS_K == 16) {
            *(__half *) &q8[c][2 * (64 * b + lane)]      = __float2half(lo * q_factor);
            *(__half *) &q8[c][2 * (64 * b + lane + 32)] = __float2half(hi * q_factor);
            continue;
        }
        float center = 0.0f;
        if constexpr (BITS_K < 8) {
            if (a.mean) {
                center = tbq_query_center(lo, hi, a.mean + head_kv * D + 64 * b, lane);
            }
            tbq_rotate_warp(lo, hi, lane);
        }
        uint32_t bits_lo = tbq_query_bits(lo), bits_hi = tbq_query_bits(hi);
        if constexpr (NS == 1) {
            bits_lo = bits_hi = __reduce_max_sync(TBQ_WARP_ALL, max(bits_lo, bits_hi));
        } else {
            bits_lo = __reduce_max_sync(TBQ_WARP_ALL, bits_lo);
            bits_hi = __reduce_max_sync(TBQ_WARP_ALL, bits_hi);
        }
        const float inverse_lo = tbq_query_inverse(bits_lo);
        const int   qlo        = __float2int_rn(lo * inverse_lo);
        const int   qhi        = __float2int_rn(hi * (NS == 1 ? inverse_lo : tbq_query_inverse(bits_hi)));
        if constexpr (BITS_K == 8) {
            q8[c][64 * b + lane]      = (int8_t) qlo;
            q8[c][64 * b + lane + 32] = (int8_t) qhi;
            if (lane < 2) {
                q_scale[c][2 * b + lane] = tbq_query_scale(lane == 0 ? bits_lo : bits_hi, q_factor);
            }
        } else {
            // word 2 w + h: channels 4w + 2h, 4w + 2h + 32, 4w + 2h + 1, 4w + 2h + 33
            *(char2 *) &q8[c][64 * b + 2 * lane] = make_char2((signed char) qlo, (signed char) qhi);
            const int sum                        = __reduce_add_sync(TBQ_WARP_ALL, qlo + qhi);
            if (lane == 0) {
                q_scale[c][b]  = tbq_query_scale(bits_lo, q_factor);
                q_sum[c][b]    = sum;
                q_center[c][b] = center * q_factor;
            }
        }
    }

    __syncthreads();
    if (NB > 1 && BITS_K < 8 && a.mean) {
        if (threadIdx.x < NC) {
            for (int b = 1; b < NB; b++) {
                q_center[threadIdx.x][0] += q_center[threadIdx.x][b];
            }
        }
        __syncthreads();
    }

    const tbq_lookup_table<BITS_K> k_levels(hidden);
    const tbq_lookup_table<BITS_V> v_levels(hidden);
    const uint32_t                 exponents = hidden[0];

    // Operand A of the first product, and what the bias of the keys' bytes adds to it: an integer sum minus that, put
    // into the mantissa of 1.5 . 2^23, reads as a float.
    constexpr int FLOAT_ZERO = 0x4B400000;
    uint32_t      qa[NB][2][4];
    float         dq[NB * NS][NG];
    int           start[NB][NG];
#pragma unroll
    for (int b = 0; BITS_K <= 8 && b < NB; b++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                // rows g and g + 8; with 8 columns the second is a copy, whose results nobody reads
                const int at   = BITS_K == 8 ? 32 * half + 4 * t + r / 2 * 16 : 8 * (t + 4 * half) + r / 2 * 4;
                qa[b][half][r] = *(const uint32_t *) &q8[g + (NG == 2 ? r % 2 * 8 : 0)][64 * b + at];
            }
        }
#pragma unroll
        for (int n = 0; n < NG; n++) {
#pragma unroll
            for (int h = 0; h < NS; h++) {
                dq[b * NS + h][n] = q_scale[g + 8 * n][b * NS + h];
            }
            start[b][n] = FLOAT_ZERO - 64 * q_sum[g + 8 * n][b];
        }
    }

    const half * mask[NG];
    float        slope[NG];
#pragma unroll
    for (int n = 0; n < NG; n++) {
        const int col = min(first_col + g + 8 * n, n_columns - 1);
        mask[n] =
            a.mask ? (const half *) (a.mask + token_of(col) * a.mask_nb1 + seq % a.n_seq_mask * a.mask_nb3) : nullptr;
        slope[n] = tbq_alibi_slope(a.max_bias, head_of(col), a.n_head) * TBQ_LOG2E;
    }

    float acc[NG][NB][4][4];
    float m[NG], l[NG];
#pragma unroll
    for (int n = 0; n < NG; n++) {
        m[n] = -1e30f; // finite, so that a slice without a visible token takes exp2(-inf) = 0
        l[n] = 0.0f;
#pragma unroll
        for (int i = 0; i < NB * 16; i++) {
            acc[n][i / 16][i / 4 % 4][i % 4] = 0.0f;
        }
    }

    // Logits of a slice to weights, relative to the maximum of the row, which may grow: then sums shrink.
    auto softmax = [&](float (&s)[NG][4], const float (&bias)[NG][4], float (&p)[NG][4]) {
        if (a.logit_softcap != 0.0f) {
#pragma unroll
            for (int i = 0; i < 4 * NG; i++) {
                const float center = BITS_K < 8 ? q_center[g + 8 * (i / 4)][0] : 0.0f;
                s[i / 4][i % 4]    = tbq_tanh(s[i / 4][i % 4] + center) * (a.logit_softcap * TBQ_LOG2E);
            }
        }

        bool grown = false;
#pragma unroll
        for (int n = 0; n < NG; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                // selected, not added: a hidden key may be anything, NaN too
                s[n][j] = bias[n][j] == -INFINITY ? -INFINITY : s[n][j] + bias[n][j] * slope[n];
                grown |= s[n][j] > m[n] + 8.0f;
            }
        }
        // The maximum follows only when it is out by 2^8: weights are floats, with room for more than that.
        if (__any_sync(TBQ_WARP_ALL, grown)) {
#pragma unroll
            for (int n = 0; n < NG; n++) {
                float row_max = fmaxf(fmaxf(s[n][0], s[n][1]), fmaxf(s[n][2], s[n][3]));
                row_max       = fmaxf(row_max, __shfl_xor_sync(TBQ_WARP_ALL, row_max, 1));
                row_max       = fmaxf(row_max, __shfl_xor_sync(TBQ_WARP_ALL, row_max, 2));
                row_max       = fmaxf(row_max, m[n]);
                const float f = tbq_exp2(m[n] - row_max);
                m[n]          = row_max;
                l[n] *= f;
                // columns 2t, 2t + 1 of the sums belong to queries that other lanes hold
                const float f0 = __shfl_sync(TBQ_WARP_ALL, f, 8 * t);
                const float f1 = __shfl_sync(TBQ_WARP_ALL, f, 8 * t + 4);
#pragma unroll
                for (int i = 0; i < NB * 4; i++) {
                    acc[n][i / 4][i % 4][0] *= f0;
                    acc[n][i / 4][i % 4][1] *= f1;
                    acc[n][i / 4][i % 4][2] *= f0;
                    acc[n][i / 4][i % 4][3] *= f1;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < NG; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                p[n][j] = tbq_exp2(s[n][j] - m[n]);
                l[n] += p[n][j];
            }
        }
    };

    // Weights of the four tokens times one of their scales.
    auto weigh = [&](const float (&p)[NG][4], const float (&d)[4], bool any_nan, uint32_t (&pb)[NG][2]) {
#pragma unroll
        for (int n = 0; n < NG; n++) {
            float w[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                w[j] = p[n][j] * d[j];
            }
            if (any_nan) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    w[j] = p[n][j] == 0.0f ? 0.0f : w[j];
                }
            }
            pb[n][0] = tbq_pack_bf16(w[0], w[1]);
            pb[n][1] = tbq_pack_bf16(w[2], w[3]);
        }
    };

    if constexpr (EXACT) {
        if (a.exact_staged) {
            tbq_cp_async_wait<0>();
            __syncwarp();
        }
#pragma unroll 1
        for (int slice = exact_first, i_slice = 0; slice < exact_end; slice += WARPS, i_slice++) {
            // Where row i of the slice is; those past the last one are hidden.
            const bool         staged = i_slice < a.exact_staged;
            const char * const k_rows =
                staged ? exact_rows + i_slice * EXACT_STAGE : exact_k + slice * SLICE * a.exact_k_nb1;
            const char * const v_rows  = staged ? exact_rows + i_slice * EXACT_STAGE + SLICE * EXACT_PITCH_K
                                                : exact_v + slice * SLICE * a.exact_v_nb1;
            const int          k_pitch = staged ? EXACT_PITCH_K : (int) a.exact_k_nb1;
            const int          v_pitch = staged ? EXACT_PITCH_V : (int) a.exact_v_nb1;
            const int          last    = a.n_exact - 1 - slice * SLICE;
            auto               cell_of = [&](int i) -> int { return cells[slice * SLICE + min(i, last)]; };
            auto               key_of  = [&](int i) -> const char * {
                return BITS_K < 8 ? k_rows + min(i, last) * k_pitch
                                  : a.k + head_kv * a.k_nb2 + seq_kv * a.k_nb3 + max(cell_of(i), 0) * a.k_nb1;
            };
            auto value_of = [&](int i) -> const char * {
                return BITS_V < 8 ? v_rows + min(i, last) * v_pitch
                                  : a.v + head_kv * a.v_nb2 + seq_kv * a.v_nb3 + max(cell_of(i), 0) * a.v_nb1;
            };

            float bias[NG][4];
            bool  seen = false;
#pragma unroll
            for (int j = 0; j < 4 * NG; j++) {
                bias[j / 4][j % 4] = __half2float(__ushort_as_half(exact_mask[j / 4][j % 4]));
                seen |= bias[j / 4][j % 4] != -INFINITY;
            }
            if (i_slice % 2 == 1) {
                cells_now  = cells_next;
                cells_next = cells_of(slice + 3 * WARPS);
            }
            load_exact_mask(i_slice % 2 ^ 1);
            if (!__any_sync(TBQ_WARP_ALL, seen)) {
                continue;
            }

            float s[NG][4];
#pragma unroll 1
            for (int half = 0; half < 2; half++) {
                const char * const key  = key_of(g + 8 * half);
                const char * const d[2] = { key_of(2 * t + 8 * half), key_of(2 * t + 1 + 8 * half) };
                if constexpr (BITS_K == 16) {
                    float sum[4] = {};
#pragma unroll
                    for (int i = 0; i < D / 32; i++) {
                        uint32_t q_lo[4], q_hi[4], k[4];
                        tbq_ldmatrix(q_lo, &q8[lane % 8][64 * i + lane / 8 * 16]);
                        if constexpr (NG == 2) {
                            tbq_ldmatrix(q_hi, &q8[lane % 8 + 8][64 * i + lane / 8 * 16]);
                        } else {
                            q_hi[0] = q_lo[0], q_hi[1] = q_lo[1], q_hi[2] = q_lo[2], q_hi[3] = q_lo[3];
                        }
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            k[r] = *(const uint32_t *) (key + 64 * i + 16 * r + 4 * t);
                        }
                        tbq_mma_f16(sum, { q_lo[0], q_hi[0], q_lo[1], q_hi[1] }, k[0], k[1]);
                        tbq_mma_f16(sum, { q_lo[2], q_hi[2], q_lo[3], q_hi[3] }, k[2], k[3]);
                    }
#pragma unroll
                    for (int i = 0; i < 2 * NG; i++) {
                        (half == 0 ? s[i / 2][i % 2] : s[i / 2][2 + i % 2]) = sum[i];
                    }
                } else {
                    float y[NG][2];
#pragma unroll
                    for (int b = 0; b < NB; b++) {
                        int c[2][4];
                        if constexpr (BITS_K == 8) {
#pragma unroll
                            for (int h = 0; h < 2; h++) {
                                const char * const qs = key + 68 * b + 34 * h + 2 + 4 * t;
                                tbq_mma_s8_s8(c[h], qa[b][h], tbq_load_word(qs), tbq_load_word(qs + 16), FLOAT_ZERO);
                            }
                        } else {
                            const uint32_t * const qs =
                                (const uint32_t *) (key + sizeof(block_tbq8_0) * b + TBQ8_QS_OFFSET) + t;
                            const uint32_t w[4] = { qs[0], qs[8], qs[4], qs[12] };
                            uint32_t       lo, hi;
                            tbq_exact_levels(w[0], w[1], lo, hi);
                            tbq_mma_s8_s8(c[0], qa[b][0], lo, hi, FLOAT_ZERO);
                            tbq_exact_levels(w[2], w[3], lo, hi);
                            tbq_mma_s8_s8_add(c[0], qa[b][1], lo, hi);
                        }
#pragma unroll
                        for (int h = 0; h < NS; h++) {
#pragma unroll
                            for (int j = 0; j < 2; j++) {
                                const float d_k = BITS_K == 8 ? __half2float(*(const __half *) (d[j] + 68 * b + 34 * h))
                                                              : *(const float *) (d[j] + sizeof(block_tbq8_0) * b);
#pragma unroll
                                for (int n = 0; n < NG; n++) {
                                    const float x = __int_as_float(c[h][2 * n + j]) - 12582912.0f;
                                    const float f = d_k * dq[b * NS + h][n];
                                    y[n][j]       = b == 0 && h == 0 ? x * f : y[n][j] + x * f;
                                }
                            }
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 2 * NG; i++) {
                        s[i / 2][i % 2]     = half == 0 ? y[i / 2][i % 2] : s[i / 2][i % 2];
                        s[i / 2][2 + i % 2] = y[i / 2][i % 2]; // of the second half in the end
                    }
                }
            }
            float p[NG][4];
            softmax(s, bias, p);

            uint32_t           pb[NG][2];
            const char * const value[4] = { value_of(2 * t), value_of(2 * t + 1), value_of(2 * t + 8),
                                            value_of(2 * t + 9) };
            if constexpr (BITS_V == 16) {
#pragma unroll
                for (int n = 0; n < NG; n++) {
                    pb[n][0] = tbq_pack_f16(p[n][0], p[n][1]);
                    pb[n][1] = tbq_pack_f16(p[n][2], p[n][3]);
                }
#pragma unroll
                for (int i = 0; i < D / 16; i++) {
                    uint32_t va[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        uint32_t x[2];
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const int token = r / 2 * 2 + j;
                            x[j]            = bias[0][token] != -INFINITY || cell_of(2 * t + j + r / 2 * 8) >= 0
                                                  ? *(const uint16_t *) (value[token] + 2 * (16 * i + r % 2 * 8 + g))
                                                  : 0;
                        }
                        va[r] = x[0] | x[1] << 16;
                    }
#pragma unroll
                    for (int n = 0; n < NG; n++) {
                        tbq_mma_f16(acc[n][i / 4][i % 4], va, pb[n][0], pb[n][1]);
                    }
                }
            } else {
                constexpr int NV = BITS_V == 8 ? 2 : 1;
                float         d_v[NB * NV][4];
                float         d_sum = 0.0f;
#pragma unroll
                for (int b = 0; b < NB * NV; b++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        d_v[b][j] = BITS_V == 8 ? __half2float(*(const __half *) (value[j] + 34 * b))
                                                : *(const float *) (value[j] + sizeof(block_tbq8_0) * b);
                        d_sum += d_v[b][j];
                    }
                }
                const bool any_nan = __any_sync(TBQ_WARP_ALL, !(fabsf(d_sum) <= FLT_MAX));
#pragma unroll
                for (int b = 0; b < NB; b++) {
                    uint32_t word[2][4]; // q8_0: channels 32 h + 4g ...; tbq8_0: the same
#pragma unroll
                    for (int h = 0; h < 2; h++) {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            word[h][j] = BITS_V == 8 ? tbq_load_word(value[j] + 68 * b + 34 * h + 2 + 4 * g)
                                                     : *(const uint32_t *) (value[j] + sizeof(block_tbq8_0) * b +
                                                                            TBQ8_QS_OFFSET + 32 * h + 4 * g);
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        // Tile i of q8_0: channels 32 (i / 2) + 4g + 2 (i % 2) and the next, which have one scale.  Of
                        // tbq8_0, like the packed types: 4g + i and 4g + 32 + i.
                        if (i == 0 || (BITS_V == 8 && i == 2)) {
                            weigh(p, d_v[b * NV + i / 2 * (NV - 1)], any_nan, pb);
                        }
                        uint32_t va[4];
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            const int h    = BITS_V == 8 ? i / 2 : r % 2;
                            const int byte = BITS_V == 8 ? i % 2 * 2 + r % 2 : i;
                            va[r]          = tbq_bf16_pair(word[h][r / 2 * 2], word[h][r / 2 * 2 + 1], byte);
                        }
#pragma unroll
                        for (int n = 0; n < NG; n++) {
                            tbq_mma_bf16(acc[n][b][i], va, pb[n][0], pb[n][1]);
                        }
                    }
                }
            }
        }
    }

    // What this lane reads of a stage, in bytes from its start.  Keys: the words of token g (and g + 8, a constant
    // further), and the scales of tokens 2t, 2t + 1.  Values: words and scales of tokens 2t, 2t + 1.
    const int k_row  = g * reader_k::PITCH + (keys.offset ^ (g & 1 ? keys.odd : 0));
    const int k_qs   = k_row + reader_k::qs_at(t);
    const int k_qh   = k_row + reader_k::qh_at(t);
    const int k_d[2] = { 2 * t * reader_k::PITCH + keys.offset,
                         (2 * t + 1) * reader_k::PITCH + (keys.offset ^ keys.odd) };
    const int v_base = SLICE * reader_k::PITCH;
    const int v_d[2] = { v_base + 2 * t * reader_v::PITCH + values.offset,
                         v_base + (2 * t + 1) * reader_v::PITCH + (values.offset ^ values.odd) };
    const int v_qs   = reader_v::qs_at(g);
    const int v_qh   = reader_v::qh_at(g);

    // A pair of the mask's halves is one load where it can be.
    const bool pairs   = ((size_t) a.mask | a.mask_nb1 | a.mask_nb3) % 4 == 0;
    auto       mask_of = [&](int n, int token) -> uint32_t {
        constexpr uint32_t hide = 0xFC00; // -inf, for tokens past the last
        if (token + 1 < a.n_kv) {
            if (!mask[n]) {
                return 0;
            }
            const uint16_t * p = (const uint16_t *) mask[n] + token;
            return pairs ? *(const uint32_t *) p : p[0] | (uint32_t) p[1] << 16;
        }
        const uint32_t last = token >= a.n_kv ? hide : mask[n] ? ((const uint16_t *) mask[n])[token] : 0;
        return last | hide << 16;
    };
    uint32_t mask_ahead[NG][2];
#pragma unroll
    for (int n = 0; n < NG; n++) {
        mask_ahead[n][0] = mask_of(n, first * SLICE + 2 * t);
        mask_ahead[n][1] = mask_of(n, first * SLICE + 2 * t + 8);
    }

    // Bit i: slice i from here on has rows of the list.  After 31 of them a bit says to look again.
    auto     some_of = [&]() -> uint32_t { return __ballot_sync(TBQ_WARP_ALL, map_word != 0) | 0x80000000u; };
    uint32_t some    = EXACT ? some_of() : 0;

    int stage = 0;
    for (int slice = first; slice < end; slice += WARPS) {
        float bias[NG][4];
        bool  seen = false;
#pragma unroll
        for (int n = 0; n < NG; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float2 x     = __half22float2(*(const half2 *) &mask_ahead[n][j]);
                bias[n][2 * j + 0] = x.x;
                bias[n][2 * j + 1] = x.y;
                seen |= x.x != -INFINITY || x.y != -INFINITY;
                mask_ahead[n][j] = mask_of(n, (slice + WARPS) * SLICE + 2 * t + 8 * j);
            }
        }
        if constexpr (EXACT) {
            if (some & 1) {
                if (some == 1) {
                    map_word = map_of(slice);
                    some     = some_of();
                }
                // of tokens 2t, 2t + 1 bits 0 and 1, of 2t + 8, 2t + 9 bits 8 and 9
                const uint32_t exact = __shfl_sync(TBQ_WARP_ALL, map_word, __clz(some)) >> 2 * t;
                seen                 = false;
#pragma unroll
                for (int j = 0; j < 4 * NG; j++) {
                    float & x = bias[j / 4][j % 4];
                    x         = exact & 1u << (j % 2 + j % 4 / 2 * 8) ? -INFINITY : x;
                    seen |= x != -INFINITY;
                }
            }
            some >>= 1;
        }

        {
            const int ahead = slice + (STAGES - 1) * WARPS;
            const int into  = stage == 0 ? STAGES - 1 : stage - 1;
            if (ahead < end) {
                keys.fetch(ring_addr + into * STAGE, a.n_kv - ahead * SLICE, lane);
                values.fetch(ring_addr + into * STAGE + SLICE * reader_k::PITCH, a.n_kv - ahead * SLICE, lane);
            }
            tbq_cp_async_commit();
            tbq_cp_async_wait<STAGES - 1>();
            __syncwarp();
        }
        char * const rows = ring + stage * STAGE;
        stage             = stage == STAGES - 1 ? 0 : stage + 1;

        if (!__any_sync(TBQ_WARP_ALL, seen)) {
            continue; // hidden from every column: other sequences, or not written yet
        }

        // S[n][j]: query g + 8 n, token 2t + j % 2 + 8 (j / 2)
        float s[NG][4];
        if constexpr (BITS_K == 16) {
            // tile i of what a lane names: row lane % 8 of channels 32 c + 8 i
            const int at      = lane % 8 * reader_k::PITCH + lane / 8 * 16;
            float     c[2][4] = {};
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                uint32_t q_lo[4], q_hi[4];
                tbq_ldmatrix(q_lo, &q8[lane % 8][64 * i + lane / 8 * 16]);
                if constexpr (NG == 2) {
                    tbq_ldmatrix(q_hi, &q8[lane % 8 + 8][64 * i + lane / 8 * 16]);
                } else {
                    q_hi[0] = q_lo[0], q_hi[1] = q_lo[1], q_hi[2] = q_lo[2], q_hi[3] = q_lo[3];
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint32_t k[4];
                    tbq_ldmatrix(k, rows + at + half * 8 * reader_k::PITCH + 64 * i);
                    tbq_mma_f16(c[half], { q_lo[0], q_hi[0], q_lo[1], q_hi[1] }, k[0], k[1]);
                    tbq_mma_f16(c[half], { q_lo[2], q_hi[2], q_lo[3], q_hi[3] }, k[2], k[3]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4 * NG; i++) {
                s[i / 4][i % 4] = c[i % 4 / 2][2 * (i / 4) + i % 2];
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                constexpr int HALF = 8 * reader_k::PITCH;
#pragma unroll
                for (int b = 0; b < NB; b++) {
                    int c[NS][4];
                    if constexpr (BITS_K == 8) {
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const uint32_t w0 = reader_k::word(rows + k_qs + half * HALF, b, 34 * h + 2);
                            const uint32_t w1 = reader_k::word(rows + k_qs + half * HALF, b, 34 * h + 18);
                            tbq_mma_s8_s8(c[h], qa[b][h], w0, w1, FLOAT_ZERO);
                        }
                    } else {
                        const uint32_t qs = reader_k::word(rows + k_qs + half * HALF, b, TBQ_QS_OFFSET);
                        const uint32_t q4 =
                            BITS_K == 4 ? reader_k::word(rows + k_qs + half * HALF, b, TBQ_QS_OFFSET + 16) : qs;
                        const uint32_t qh =
                            BITS_K == 3 ? reader_k::word(rows + k_qh + half * HALF, b, TBQ_QH_OFFSET) : 0;
                        const uint2 w0 = k_levels(tbq_nibbles<BITS_K>(qs, qh, t));
                        const uint2 w1 = k_levels(tbq_nibbles<BITS_K>(q4, qh, t + 4));
                        tbq_mma_s8_u8(c[0], qa[b][0], w0.x, w0.y, { 0, 0, 0, 0 });
                        tbq_mma_s8_u8(c[0], qa[b][1], w1.x, w1.y, c[0]);
                    }
#pragma unroll
                    for (int h = 0; h < NS; h++) {
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const float d = reader_k::scale(rows + k_d[j] + half * HALF, b, h);
#pragma unroll
                            for (int n = 0; n < NG; n++) {
                                const float x =
                                    __int_as_float(c[h][2 * n + j] + (BITS_K == 8 ? 0 : start[b][n])) - 12582912.0f;
                                const float f = d * dq[b * NS + h][n];
                                float &     y = s[n][2 * half + j];
                                y             = b == 0 && h == 0 ? x * f : y + x * f;
                            }
                        }
                    }
                }
            }
        }

        constexpr int NV = BITS_V == 8 ? 2 : 1; // scales of a value for 64 channels
        float         d_v[NB * NV][4];
        float         d_sum = 0.0f;
#pragma unroll
        for (int b = 0; BITS_V <= 8 && b < NB * NV; b++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                d_v[b][j] = reader_v::scale(rows + v_d[j % 2] + j / 2 * 8 * reader_v::PITCH, b / NV, b % NV);
                d_sum += d_v[b][j];
            }
        }
        float p[NG][4];
        softmax(s, bias, p);
        // A hidden value may be NaN as well, and 0 . NaN is not 0.  Rare, so it costs one test.
        const bool any_nan = __any_sync(TBQ_WARP_ALL, !(fabsf(d_sum) <= FLT_MAX));

        uint32_t pb[NG][2];
        if constexpr (BITS_V == 16) {
            // A tile is 16 channels in order.  (A hidden value must be finite here, as for llama.cpp's kernels.)
            const int n_here = a.n_kv - slice * SLICE;
            if (n_here < SLICE) { // what was never copied may be NaN
                for (int i = lane; i < (SLICE - n_here) * (reader_v::PITCH / 16); i += 32) {
                    ((uint4 *) (rows + v_base + n_here * reader_v::PITCH))[i] = make_uint4(0, 0, 0, 0);
                }
                __syncwarp();
            }
#pragma unroll
            for (int n = 0; n < NG; n++) {
                pb[n][0] = tbq_pack_f16(p[n][0], p[n][1]);
                pb[n][1] = tbq_pack_f16(p[n][2], p[n][3]);
            }
            const int at = v_base + (lane % 8 + lane / 16 * 8) * reader_v::PITCH + lane / 8 % 2 * 16;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                uint32_t va[4];
                tbq_ldmatrix_transposed(va, rows + at + 32 * i);
#pragma unroll
                for (int n = 0; n < NG; n++) {
                    tbq_mma_f16(acc[n][i / 4][i % 4], va, pb[n][0], pb[n][1]);
                }
            }
        } else if constexpr (BITS_V == 8) {
            // Tile 2 h + i: channels 32 h + 4g + 2 i and the next, of which all have one scale.
#pragma unroll
            for (int b = 0; b < NB * 2; b++) {
                weigh(p, d_v[b], any_nan, pb);
                uint32_t word[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    word[j] =
                        reader_v::word(rows + v_d[j % 2] + j / 2 * 8 * reader_v::PITCH + v_qs, b / 2, b % 2 * 34 + 2);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    uint32_t va[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        va[r] = tbq_bf16_pair(word[r / 2 * 2], word[r / 2 * 2 + 1], 2 * i + r % 2);
                    }
#pragma unroll
                    for (int n = 0; n < NG; n++) {
                        tbq_mma_bf16(acc[n][b / 2][b % 2 * 2 + i], va, pb[n][0], pb[n][1]);
                    }
                }
            }
        } else {
#pragma unroll
            for (int b = 0; b < NB; b++) {
                weigh(p, d_v[b], any_nan, pb);
                uint32_t word[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const char *   row = rows + v_d[j % 2] + j / 2 * 8 * reader_v::PITCH;
                    const uint32_t qh  = BITS_V == 3 ? reader_v::word(row + v_qh, b, TBQ_QH_OFFSET) : 0;
                    word[j]            = tbq_nibbles<BITS_V>(reader_v::word(row + v_qs, b, TBQ_QS_OFFSET), qh, g);
                }
                uint32_t va[4][4]; // tile i: channels 4g + i (registers 0, 2) and 4g + 32 + i (1, 3)
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    // byte i of both tokens next to each other: the four indices that a look-up takes are then channel
                    // 4g + i and 4g + 32 + i of one token and of the other
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const uint32_t x  = tbq_prmt(word[2 * pair], word[2 * pair + 1], h == 0 ? 0x5140 : 0x7362);
                        const uint2    lv = v_levels(x);
                        va[2 * h + 0][2 * pair + 0] = tbq_bf16_levels((lv.x & 0x00FF00FFu) | exponents);
                        va[2 * h + 0][2 * pair + 1] = tbq_bf16_levels(tbq_prmt(lv.x, exponents, 0x5351));
                        va[2 * h + 1][2 * pair + 0] = tbq_bf16_levels((lv.y & 0x00FF00FFu) | exponents);
                        va[2 * h + 1][2 * pair + 1] = tbq_bf16_levels(tbq_prmt(lv.y, exponents, 0x5351));
                    }
                }
#pragma unroll
                for (int n = 0; n < NG; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        tbq_mma_bf16(acc[n][b][i], va[i], pb[n][0], pb[n][1]);
                    }
                }
            }
        }
        __syncwarp(); // the next round overwrites the oldest stage
    }
    tbq_cp_async_wait<0>();

    // One result of eight warps.
#pragma unroll
    for (int n = 0; n < NG; n++) {
        l[n] += __shfl_xor_sync(TBQ_WARP_ALL, l[n], 1);
        l[n] += __shfl_xor_sync(TBQ_WARP_ALL, l[n], 2);
        if (t == 0) {
            max_of[warp][g + 8 * n] = m[n];
            sum_of[warp][g + 8 * n] = l[n];
        }
    }
    __syncthreads(); // the rings are free now
    if (threadIdx.x < NC) {
        const int c       = threadIdx.x;
        float     row_max = max_of[0][c];
        float     row_sum = 0.0f;
        for (int w = 1; w < WARPS; w++) {
            row_max = fmaxf(row_max, max_of[w][c]);
        }
        for (int w = 0; w < WARPS; w++) {
            const float f   = tbq_exp2(max_of[w][c] - row_max);
            factor_of[w][c] = f;
            row_sum += sum_of[w][c] * f;
        }
        max_of[0][c] = BITS_K < 8 && a.logit_softcap == 0.0f ? row_max + q_center[c][0] : row_max;
        sum_of[0][c] = row_sum;
    }
    __syncthreads();

    constexpr int ROW  = tbq_attention_row(D);
    float * const sums = (float *) smem + (warp % (WARPS / 2)) * NC * ROW;
#pragma unroll 1
    for (int round = 0; round < 2; round++) {
        if ((round == 0) == (warp >= WARPS / 2)) {
#pragma unroll
            for (int n = 0; n < NG; n++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int   c = 8 * n + 2 * t + j;
                    const float f = factor_of[warp][c];
#pragma unroll
                    for (int i = 0; BITS_V == 16 && i < NB * 8; i++) {
                        float * to = sums + c * ROW + 8 * i + g;
                        float   x  = acc[n][i / 8][i / 2 % 4][i % 2 * 2 + j] * f;
                        *to        = round == 1 ? x + *to : x;
                    }
#pragma unroll
                    for (int i = 0; BITS_V <= 8 && i < NB * 2; i++) {
                        float4 * to = (float4 *) (sums + c * ROW + i / 2 * 64 + i % 2 * 32 + 4 * g);
                        float    x[4];
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            // where channel 4g + r of these 32 is
                            x[r] = f * (BITS_V == 8 ? acc[n][i / 2][i % 2 * 2 + r / 2][r % 2 * 2 + j]
                                                    : acc[n][i / 2][r][i % 2 * 2 + j]);
                        }
                        if (round == 1) {
                            const float4 y = *to;
                            x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
                        }
                        *to = make_float4(x[0], x[1], x[2], x[3]);
                    }
                }
            }
        }
        __syncthreads();
    }

#pragma unroll 1
    for (int i = warp; i < n_cols * NB; i += WARPS) {
        const int     c       = i / NB;
        const int     b       = i % NB;
        const int     col     = first_col + c;
        const float   row_max = max_of[0][c];
        const float   row_sum = sum_of[0][c];
        float * const sum0    = (float *) smem + c * ROW;
#pragma unroll
        for (int x = 0; x < 2; x++) {
            float * p = sum0 + 64 * b + 32 * x + lane;
            *p        = (p[0] + p[NC * ROW]) + (p[2 * NC * ROW] + p[3 * NC * ROW]);
        }
        const int       head = head_of(col);
        const long long row  = ((long long) seq * a.n_q + token_of(col)) * a.n_head + head;
        if (a.n_split == 1) {
            tbq_attention_store<(BITS_V < 8)>(
                a.dst + row * D, sum0, row_max, row_sum, a.sinks ? a.sinks + head : nullptr,
                BITS_K == BITS_V && a.mean_of_values ? a.mean + head_kv * D : nullptr, b, lane);
        } else {
            float * to             = a.partial + (row * a.n_split + blockIdx.x) * (D + 2);
            to[64 * b + lane]      = sum0[64 * b + lane];
            to[64 * b + lane + 32] = sum0[64 * b + lane + 32];
            if (b == 0 && lane == 0) {
                to[D]     = row_max;
                to[D + 1] = row_sum;
            }
        }
    }
#else
    __trap(); // the host does not choose this kernel here
#endif
}

// Merges the splits of a row, rotates it back and stores it.  grid: (rows); block: (D, groups)
template <int D, int GROUPS, bool ROTATED> __global__ void __launch_bounds__(D * GROUPS)
    tbq_attention_combine(const tbq_attention_args a) {
    const int       d    = threadIdx.x;
    const int       grp  = threadIdx.y;
    const long long row  = blockIdx.x;
    const int       head = row % a.n_head;

    __shared__ float sums[GROUPS][D];
    __shared__ float row_sums[GROUPS];

#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    const float * splits = a.partial + row * a.n_split * (D + 2);

    float row_max = -1e30f;
    for (int i = 0; i < a.n_split; i++) {
        row_max = fmaxf(row_max, splits[(long long) i * (D + 2) + D]);
    }
    float sum = 0.0f, row_sum = 0.0f;
    for (int i = grp; i < a.n_split; i += GROUPS) {
        const float * p = splits + (long long) i * (D + 2);
        const float   f = tbq_exp2(p[D] - row_max);
        sum += p[d] * f;
        row_sum += p[D + 1] * f;
    }
    sums[grp][d] = sum;
    if (d == 0) {
        row_sums[grp] = row_sum;
    }
    __syncthreads();
    if (grp != 0) {
        return;
    }
    row_sum = row_sums[0];
    for (int i = 1; i < GROUPS; i++) {
        sum += sums[i][d];
        row_sum += row_sums[i];
    }
    sums[0][d] = sum;
    asm volatile("bar.sync 1, %0;" ::"n"(D) : "memory"); // the threads of group 0
    if (d / 32 < D / 64) {
        tbq_attention_store<ROTATED>(a.dst + row * D, sums[0], row_max, row_sum, a.sinks ? a.sinks + head : nullptr,
                                     a.mean_of_values ? a.mean + head / a.gqa * D : nullptr, d / 32, d % 32);
    }
}

#endif // __CUDACC__
