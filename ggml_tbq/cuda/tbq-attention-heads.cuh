// SPDX-License-Identifier: MIT
// Attention in decode for large or unequal heads: keys of 192 and values of 128 channels, 512 and 512, 576 and 512 (latent
// attention).  The problem is that of tbq-attention.cuh, both sides of a tbq type.
//
// There a warp has all channels of its tokens; sums of 512 channels are too many registers for that.  Here the warps of
// a CTA divide the same tile of tokens in two ways.  For the scores each warp has its own tokens, and all channels of
// their keys.  For the sums each has its own block of 64 channels, and the tokens of the whole tile (of values with 128
// channels, four groups of warps have a quarter of the tokens each).  Weights go from one to the other through shared
// memory, two tiles of them in turn, so a tile costs one barrier.
//
// A key and a value are unpacked once for all columns of a CTA (query heads of a KV head, times tokens), of which there
// are 8 to 64.  Nothing unpacked is stored: an unpacked word is an operand of the tensor core, as there.
//
// THE TILES, for lane 4 g + t of a warp
//
//     S = Q . K^T     m16n8k32, s8 . u8:  A = 16 queries (from shared memory), B = 8 keys
//     O^T = V^T . P^T m16n8k16, f16:      A = values (rows = channels), B = weights
//
// with words and channels as in tbq-attention.cuh.  A value is level times scale in f16, rounded once, because with 64
// columns there are more weights than values in a lane.  So weights are halves too, relative to a maximum that is 2^6
// below the true one (as in tbq-prompt.cuh).
//
// LATENT ATTENTION.  The values are the first 512 channels of the keys, in the same rows, which are copied once.
//
// ROWS may begin at any even address: the latent vectors of one KV head are 306, 234 or 162 bytes apart.  A row is
// copied with the units of 16 bytes that it touches, and its start within the first is that of the row eight further.
//
// THE MAXIMUM.  Weights are computed with the maximum of the tiles before.  Where a logit is more than 2^12 above that,
// all warps notice behind the barrier, agree on a new maximum and compute the weights again: the first tile always,
// others rarely.
//
// THE TYPES of K and V are looked up for each tile, so one kernel serves all pairs: seven kernels, not hundreds.
//
// EXACT ROWS (tbq-attention.cuh) are tiles of 16 rows through the same buffers, before the packed ones, dealt in turn to
// the splits.  They are two more types, with keys for s8 . s8.  CENTERED KEYS, sinks, the soft-cap and ALiBi are as in
// tbq-attention.cuh.
//
// QUERIES of up to 16 columns are rotated by the kernel itself.  Of more, a small kernel does it before, once for all
// splits: 64 queries of 576 channels in every CTA would take longer than its share of the cache.
//
// Every split writes its sums, and tbq_heads_combine merges, also where there is one split.
#pragma once

#include "tbq-attention.cuh"

#include <type_traits>

#define TBQ_HEADS_WARPS   8
#define TBQ_HEADS_THREADS (32 * TBQ_HEADS_WARPS)
#define TBQ_HEADS_EXACT   16 // exact rows of a tile
#define TBQ_HEADS_BIAS    6.0f
#define TBQ_HEADS_LAG     12.0f

// How the packed rows of one side are copied: rows of so many units of 16 bytes, and where a thread goes on.
struct tbq_heads_rows {
    int      bytes, units, pitch;
    int      step_rows, step_units; // the next unit of a thread
    unsigned magic;                 // x / units = x . magic >> 16 for a thread x
};

struct tbq_heads_args : tbq_attention_args {
    int bits_k, bits_v; // 2, 3 or 4

    // set by tbq_heads_partition; slices_per_split counts tiles here
    int n_mask_rows;      // of a CTA's columns, at most
    int k_bytes, v_bytes; // of a buffer
    int mask_at;          // the mask in a buffer of keys

    tbq_heads_rows rows_k, rows_v;

    char * prepared; // queries, tbq_heads_prepared_bytes() of them; null if the kernel prepares its own
};

// --- sizes -----------------------------------------------------------------------------------------------------------

// DK: channels of a key, DV: of a value, NC: columns of a CTA.
template <int DK, int DV, int NC> struct tbq_heads_shape {
    static constexpr int NB     = DK / 64;
    static constexpr int NBV    = DV / 64;
    static constexpr int NT     = DK == 192 || NC == 64 ? 2 : 1; // groups of 8 tokens of a warp
    static constexpr int TOKENS = 8 * NT;                        // of a warp
    static constexpr int TILE   = TBQ_HEADS_WARPS * TOKENS;
    static constexpr int NM     = (NC + 15) / 16; // groups of 16 columns
    static constexpr int NN     = NC == 8 ? 1 : 2;
    static constexpr int GROUPS = TBQ_HEADS_WARPS / NBV; // of warps that have the same values

    static constexpr int  STEP      = NC > 16 ? 1 : NB % 3 == 0 ? 3 : 2; // blocks of keys between two jumps
    static constexpr bool LATENT    = DK == 576;                         // values are in the rows of keys
    static constexpr int  K_BUFFERS = LATENT ? 3 : 2;
    static constexpr int  V_BUFFERS = LATENT ? 0 : 2;

    // Queries: operands A, then a start value and a scale for each column and block, then q.c of each.
    static constexpr int Q_OPERANDS = NM * NB * 2 * 512;
    static constexpr int Q_SCALES   = NM * NB * 128;
    static constexpr int Q_BYTES    = Q_OPERANDS + Q_SCALES + NC * NB * 4;

    static constexpr bool PREPARED = NC > 16;

    static constexpr int P_PITCH = 2 * TILE + 16; // of a column's weights, and of a row of the mask
    static constexpr int P_BYTES = NC * P_PITCH;

    static_assert(TBQ_HEADS_WARPS % NBV == 0 && Q_BYTES % 16 == 0 && NC * NB % 4 == 0, "layout");

    static constexpr __host__ __device__ int buffer(int d, int bits) {
        const int packed = TILE * tbq_attention_pitch(d, bits);
        const int exact  = TBQ_HEADS_EXACT * (d / 64) * (int) sizeof(block_tbq8_0);
        return packed > exact ? packed : (exact + 15) / 16 * 16;
    }

    static constexpr __host__ __device__ int k_buffer(int bits, int n_mask_rows) {
        return buffer(DK, bits) + n_mask_rows * P_PITCH;
    }

    // Queries, two tiles of weights, the buffers; a word more, because one across a boundary is read as two.  In the end
    // sums take their place.
    static constexpr __host__ __device__ int smem(int bits_k, int bits_v, int n_mask_rows) {
        const int buffers =
            Q_BYTES + 2 * P_BYTES + K_BUFFERS * k_buffer(bits_k, n_mask_rows) + V_BUFFERS * buffer(DV, bits_v) + 16;
        const int sums = (GROUPS - 1) * NBV * NC * 64 * 4;
        return buffers > sums ? buffers : sums;
    }
};

#define TBQ_HEADS_STATIC_SMEM 6144 // at most

// f(std::integral_constant<int, DK>, .. DV, .. NC) of the kernels that there are.  False: none for these sizes.
template <typename function> static inline bool tbq_heads_dispatch(int dk, int dv, int nc, function f) {
#define TBQ_HEADS_CASE(DK, DV, NC)                                                                                  \
    if (dk == DK && dv == DV && nc == NC) {                                                                         \
        f(std::integral_constant<int, DK>(), std::integral_constant<int, DV>(), std::integral_constant<int, NC>()); \
        return true;                                                                                                \
    }
    TBQ_HEADS_CASE(192, 128, 8)
    TBQ_HEADS_CASE(192, 128, 16)
    TBQ_HEADS_CASE(512, 512, 8)
    TBQ_HEADS_CASE(512, 512, 16)
    TBQ_HEADS_CASE(576, 512, 16)
    TBQ_HEADS_CASE(576, 512, 32)
    TBQ_HEADS_CASE(576, 512, 64)
#undef TBQ_HEADS_CASE
    return false;
}

// Rows of the mask that nc columns from a multiple of nc on can touch.
static inline int tbq_heads_mask_rows(const tbq_attention_args & a, int nc) {
    const int gqa  = a.n_head / a.n_head_kv;
    const int most = (nc + gqa - 2) / gqa + 1;
    return !a.mask || a.n_q == 1 ? 1 : most < a.n_q ? most : a.n_q;
}

// Columns of a CTA: as few as take all of them, or the most that fit into n_smem bytes of shared memory.  0: none.  With
// latent attention 32 were faster for short contexts on an H200 (docs/measurements/cuda.md).
static inline int tbq_heads_columns(const tbq_heads_args & a, int dk, int dv, int n_smem) {
    const int       n_columns = a.n_q * (a.n_head / a.n_head_kv);
    const long long n_tokens  = dk == 576 ? (long long) a.n_kv * a.n_seq : 1 << 30;
    const int       wanted    = n_tokens < 16384 ? 32 : n_tokens < 65536 && n_columns < 32 ? 32 : n_columns;
    int             best      = 0;
    for (int nc : { 8, 16, 32, 64 }) {
        int bytes = n_smem + 1;
        tbq_heads_dispatch(dk, dv, nc, [&](auto k, auto v, auto n) {
            bytes =
                tbq_heads_shape<k, v, n>::smem(a.bits_k, a.bits_v, tbq_heads_mask_rows(a, nc)) + TBQ_HEADS_STATIC_SMEM;
        });
        if (bytes <= n_smem && (best == 0 || best < wanted)) {
            best = nc;
        }
    }
    return best;
}

static inline tbq_heads_args tbq_heads_args_of(const tbq_attention_args & base, int bits_k, int bits_v) {
    tbq_heads_args a                     = {};
    static_cast<tbq_attention_args &>(a) = base;
    a.bits_k                             = bits_k;
    a.bits_v                             = bits_v;
    return a;
}

static inline tbq_heads_rows tbq_heads_rows_of(int d, int bits) {
    const int units = tbq_attention_units(d, bits), threads = TBQ_HEADS_THREADS;
    return { d / 64 * tbq_block_bytes(bits), units, tbq_attention_pitch(d, bits), threads / units, threads % units,
             (unsigned) (65536 / units + 1) };
}

// How columns are grouped and the cache is split, in tiles.  n_resident: CTAs that run at the same time.
template <int DK, int DV, int NC> static inline void tbq_heads_partition(tbq_heads_args & a, int n_resident) {
    using shape             = tbq_heads_shape<DK, DV, NC>;
    constexpr int tile      = shape::TILE;
    const int     n_columns = a.n_q * (a.n_head / a.n_head_kv);
    a.gqa                   = a.n_head / a.n_head_kv;
    a.gqa_magic             = a.gqa == 1 ? 0 : (unsigned) ((1ull << 32) / a.gqa + 1);
    a.n_groups              = (n_columns + NC - 1) / NC;
    a.kv_per_seq            = a.n_seq / a.n_seq_kv;
    a.n_mask_rows           = tbq_heads_mask_rows(a, NC);
    a.mask_at               = shape::buffer(DK, a.bits_k);
    a.k_bytes               = shape::k_buffer(a.bits_k, a.n_mask_rows);
    a.v_bytes               = shape::buffer(DV, a.bits_v);
    a.rows_k                = tbq_heads_rows_of(DK, a.bits_k);
    a.rows_v                = tbq_heads_rows_of(DV, a.bits_v);
    // The time of a call in tiles: rounds of CTAs, each of which takes about 3 beside its tiles; a merge writes and
    // reads the sums, 6 MB in the time of a tile.
    const int       n_tiles = (a.n_kv + tile - 1) / tile;
    const long long n_cells = (long long) a.n_groups * a.n_head_kv * a.n_seq;
    double          best    = 0;
    for (int n = 1; n == 1 || (n <= n_tiles && n <= n_resident); n++) {
        const int    each   = (n_tiles + n - 1) / n;
        const double rounds = (double) ((n_cells * n + n_resident - 1) / n_resident);
        const double merge  = (double) a.n_seq * a.n_q * a.n_head * n * (DV + 2) * 8 / 6e6;
        const double time   = rounds * (each + 3) + merge;
        if (n == 1 || time < best) {
            best               = time;
            a.slices_per_split = each;
        }
    }
    a.n_split = (n_tiles + a.slices_per_split - 1) / a.slices_per_split;
}

// For every row of the output and every split: the sums, then the maximum and the sum of weights.
static inline size_t tbq_heads_partial_bytes(const tbq_heads_args & a, int dv) {
    return (size_t) a.n_seq * a.n_q * a.n_head * a.n_split * (dv + 2) * sizeof(float);
}

// 0: the kernel prepares its own queries.
template <int DK, int DV, int NC> static inline size_t tbq_heads_prepared_bytes(const tbq_heads_args & a) {
    using shape = tbq_heads_shape<DK, DV, NC>;
    return shape::PREPARED ? (size_t) a.n_groups * a.n_head_kv * a.n_seq * shape::Q_BYTES : 0;
}

#ifdef __CUDACC__

#define TBQ_HEADS_FLOAT_ZERO 0x4B400000 // 1.5 . 2^23: an integer in its mantissa reads as a float

// --- numbers ---------------------------------------------------------------------------------------------------------

// Bytes level + 64 under the exponent of 1024, times scales: halves, rounded once.
static __device__ __forceinline__ uint32_t tbq_heads_values(uint32_t biased, uint32_t d) {
    const half2 level = __hsub2(*(const half2 *) &biased, __float2half2_rn(1024.0f + 64.0f));
    const half2 value = __hmul2(level, *(const half2 *) &d);
    return *(const uint32_t *) &value;
}

// x, of which the compiler knows nothing.  What is the same for all tiles but only for some types would otherwise be
// computed before the first one, for all of them, and kept in registers.
static __device__ __forceinline__ int tbq_heads_again(int x) {
    tbq_keep(x);
    return x;
}

// A word at an even address of shared memory.
static __device__ __forceinline__ uint32_t tbq_heads_word(const char * aligned, uint32_t shift) {
    const uint32_t * w = (const uint32_t *) aligned;
    return __funnelshift_r(w[0], w[1], shift);
}

// --- queries ---------------------------------------------------------------------------------------------------------

// Block b of column c of a CTA, by a warp: rotated, rounded to 8 bits, put where operand A takes it.  lo, hi: channels
// lane and lane + 32; mean: of this block, or null.
template <int DK, int DV, int NC>
static __device__ __forceinline__ void tbq_heads_query(char * q, int c, int b, float lo, float hi, const float * mean,
                                                       float factor, int lane) {
    using shape        = tbq_heads_shape<DK, DV, NC>;
    const float center = mean ? tbq_query_center(lo, hi, mean, lane) : 0.0f;
    tbq_rotate_warp(lo, hi, lane);
    const uint32_t bits    = __reduce_max_sync(TBQ_WARP_ALL, max(tbq_query_bits(lo), tbq_query_bits(hi)));
    const float    inverse = tbq_query_inverse(bits);
    const int      qlo = __float2int_rn(lo * inverse), qhi = __float2int_rn(hi * inverse);
    const int      sum = __reduce_add_sync(TBQ_WARP_ALL, qlo + qhi);
    // nibble word w: channels 4w .. 4w + 3 and those 32 further; row g or g + 8 of 16
    const int m = c / 16, g = c % 8, high = c / 8 % 2, w = lane / 4, h = lane / 2 % 2;
    char *    to = q + ((m * shape::NB + b) * 2 + w / 4) * 512 + (4 * g + w % 4) * 16 + (2 * h + high) * 4;
    *(char2 *) (to + lane % 2 * 2) = make_char2((signed char) qlo, (signed char) qhi);
    if (lane == 0) {
        char * const s     = q + shape::Q_OPERANDS + ((m * shape::NB + b) * 8 + g) * 16 + high * 4;
        *(int *) s         = TBQ_HEADS_FLOAT_ZERO - 64 * sum; // what the bias of the keys' bytes adds
        *(float *) (s + 8) = tbq_query_scale(bits, factor);
        ((float *) (q + shape::Q_OPERANDS + shape::Q_SCALES))[c * shape::NB + b] = center * factor;
    }
}

// The same of a column that is not there.
template <int DK, int DV, int NC>
static __device__ __forceinline__ void tbq_heads_no_query(char * q, int c, int b, int lane) {
    using shape = tbq_heads_shape<DK, DV, NC>;
    const int m = c / 16, g = c % 8, high = c / 8 % 2, w = lane / 4, h = lane / 2 % 2;
    char *    to = q + ((m * shape::NB + b) * 2 + w / 4) * 512 + (4 * g + w % 4) * 16 + (2 * h + high) * 4;
    *(uint16_t *) (to + lane % 2 * 2) = 0;
    if (lane == 0) {
        char * const s     = q + shape::Q_OPERANDS + ((m * shape::NB + b) * 8 + g) * 16 + high * 4;
        *(int *) s         = TBQ_HEADS_FLOAT_ZERO;
        *(float *) (s + 8) = 0.0f;
        ((float *) (q + shape::Q_OPERANDS + shape::Q_SCALES))[c * shape::NB + b] = 0.0f;
    }
}

// --- a CTA -----------------------------------------------------------------------------------------------------------

// Where a CTA's rows come from.  In shared memory, because copies alone need this, and registers are few.
struct tbq_heads_sources {
    const char * k; // of this head
    const char * v;
    const char * exact_k;
    const char * exact_v;
    const char * mask; // of the first row of queries; null: none
    const int *  cells;
    int          n_mask_rows;
};

// What a CTA computes, and where things are.
template <int DK, int DV, int NC> struct tbq_heads_cta {
    using shape                 = tbq_heads_shape<DK, DV, NC>;
    static constexpr int NB     = shape::NB;
    static constexpr int NBV    = shape::NBV;
    static constexpr int NT     = shape::NT;
    static constexpr int TOKENS = shape::TOKENS;
    static constexpr int TILE   = shape::TILE;
    static constexpr int NM     = shape::NM;
    static constexpr int NN     = shape::NN;
    static constexpr int NG     = NC / 8;

    const tbq_heads_args &    a;
    const tbq_heads_sources & from;

    int lane, warp, g, t;
    int head_kv, seq, seq_kv, first_col, n_cols, first_row;
    int first_tile, n_exact_tiles, n; // tiles: exact ones, then packed ones from first_tile on

    char * queries;
    char * weights; // two tiles
    char * k_buffers;
    char * v_buffers;

    __device__ __forceinline__ tbq_heads_cta(const tbq_heads_args & args, const tbq_heads_sources & sources,
                                             char * smem)
        : a(args), from(sources) {
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
        g    = lane / 4;
        t    = lane % 4;

        head_kv   = a.n_groups == 1 ? blockIdx.y : blockIdx.y / a.n_groups;
        first_col = (blockIdx.y - head_kv * a.n_groups) * NC;
        seq       = blockIdx.z;
        seq_kv    = seq == 0 ? 0 : seq / a.kv_per_seq;
        n_cols    = min(NC, a.n_q * a.gqa - first_col);
        first_row = token_of(first_col);

        const int n_tiles = (a.n_kv + TILE - 1) / TILE;
        const int n_exact = a.cells ? (a.n_exact + TBQ_HEADS_EXACT - 1) / TBQ_HEADS_EXACT : 0;
        first_tile        = blockIdx.x * a.slices_per_split;
        n_exact_tiles     = (int) blockIdx.x < n_exact ? (n_exact - 1 - (int) blockIdx.x) / a.n_split + 1 : 0;
        n                 = n_exact_tiles + min(a.slices_per_split, n_tiles - first_tile);

        queries   = smem;
        weights   = queries + shape::Q_BYTES;
        k_buffers = weights + 2 * shape::P_BYTES;
        v_buffers = k_buffers + shape::K_BUFFERS * a.k_bytes;
    }

    // By one thread.
    __device__ __forceinline__ void find_sources(tbq_heads_sources & to) const {
        to.k           = a.k + head_kv * a.k_nb2 + seq_kv * a.k_nb3;
        to.v           = a.v + head_kv * a.v_nb2 + seq_kv * a.v_nb3;
        to.exact_k     = a.exact_k + head_kv * a.exact_k_nb2 + seq_kv * a.exact_k_nb3;
        to.exact_v     = a.exact_v + head_kv * a.exact_v_nb2 + seq_kv * a.exact_v_nb3;
        to.mask        = a.mask ? a.mask + first_row * a.mask_nb1 + seq % a.n_seq_mask * a.mask_nb3 : nullptr;
        to.cells       = a.cells ? a.cells + (long long) seq_kv * (a.n_exact + (a.n_kv + 31) / 32) : nullptr;
        to.n_mask_rows = a.mask ? token_of(first_col + n_cols - 1) - first_row + 1 : 1;
    }

    // A division takes as long as a trip to the L2 cache.
    __device__ __forceinline__ int token_of(int col) const {
        return a.gqa_magic ? (int) __umulhi(col, a.gqa_magic) : col;
    }

    __device__ __forceinline__ int head_of(int col) const { return head_kv * a.gqa + col - token_of(col) * a.gqa; }

    __device__ __forceinline__ bool is_exact(int i) const { return i < n_exact_tiles; }

    // The first row of tile i: of the exact rows, or of the cache.
    __device__ __forceinline__ int first_of(int i) const {
        return is_exact(i) ? ((int) blockIdx.x + i * a.n_split) * TBQ_HEADS_EXACT
                           : (first_tile + i - n_exact_tiles) * TILE;
    }

    __device__ __forceinline__ char * k_buffer(int i) const { return k_buffers + i % shape::K_BUFFERS * a.k_bytes; }

    __device__ __forceinline__ char * v_buffer(int i) const { return v_buffers + i % 2 * a.v_bytes; }

    // --- copies: by all threads, in groups of cp.async

    // n rows of a packed tile; first: the first one
    __device__ __forceinline__ void copy_packed(const tbq_heads_rows & of, char * to, const char * first, long long nb1,
                                                int n) const {
        const int thread = threadIdx.x, start = (int) ((size_t) first & 15), stride = (int) nb1;
        int       row = thread * of.magic >> 16, unit = thread - row * of.units;
#pragma unroll 1
        while (row < n) {
            const int at = start + row * stride, offset = at & 15; // `first` less `start` is a multiple of 16
            tbq_cp_async_16_if(unit * 16 < offset + of.bytes, tbq_smem(to) + row * of.pitch + unit * 16,
                               first - start + (at - offset) + unit * 16);
            unit += of.step_units;
            row += of.step_rows + (unit >= of.units);
            unit -= unit >= of.units ? of.units : 0;
        }
    }

    template <int D>
    __device__ __forceinline__ void copy_exact(char * to, const char * from, long long nb1, int rows) const {
        constexpr int PIECES = D / 64 * (int) sizeof(block_tbq8_0) / 4;
        const int     n_here = min(rows, TBQ_HEADS_EXACT) * PIECES;
#pragma unroll 1
        for (int i = threadIdx.x; i < n_here; i += TBQ_HEADS_THREADS) {
            const int row = i / PIECES, piece = i % PIECES;
            tbq_cp_async<4>(tbq_smem(to) + i * 4, from + row * nb1 + piece * 4);
        }
    }

    // The mask of tile i for the rows of queries that this CTA has.
    __device__ __forceinline__ void copy_mask(int i) const {
        char * const to    = k_buffer(i) + a.mask_at;
        const int    first = first_of(i), n_rows = from.n_mask_rows;
        const char * mask = from.mask;
        if (is_exact(i)) {
#pragma unroll 1
            for (int x = threadIdx.x; x < n_rows * TBQ_HEADS_EXACT; x += TBQ_HEADS_THREADS) {
                const int row = x / TBQ_HEADS_EXACT, j = x % TBQ_HEADS_EXACT;
                const int cell = first + j < a.n_exact ? from.cells[first + j] : -1;
                *(uint16_t *) (to + row * shape::P_PITCH + 2 * j) =
                    cell < 0 ? 0xFC00
                    : mask   ? *(const uint16_t *) (mask + row * a.mask_nb1 + 2 * cell)
                             : 0; // -inf
            }
        } else if (!mask) {
        } else if (((size_t) mask | a.mask_nb1 | a.mask_nb3) % 16 == 0 && a.n_kv - first >= TILE) {
#pragma unroll 1
            for (int x = threadIdx.x; x < n_rows * (TILE / 8); x += TBQ_HEADS_THREADS) {
                const int row = x / (TILE / 8), j = x % (TILE / 8);
                tbq_cp_async_16_if(1, tbq_smem(to) + row * shape::P_PITCH + j * 16,
                                   mask + row * a.mask_nb1 + 2 * first + j * 16);
            }
        } else {
#pragma unroll 1
            for (int x = threadIdx.x; x < n_rows * TILE; x += TBQ_HEADS_THREADS) {
                const int row = x / TILE, j = x % TILE;
                *(uint16_t *) (to + row * shape::P_PITCH + 2 * j) =
                    first + j < a.n_kv ? *(const uint16_t *) (mask + row * a.mask_nb1 + 2 * (first + j)) : 0xFC00;
            }
        }
    }

    __device__ __forceinline__ void copy_keys(int i) const {
        if (i >= n) {
            return;
        }
        const int first = first_of(i);
        if (is_exact(i)) {
            copy_exact<DK>(k_buffer(i), from.exact_k + first * a.exact_k_nb1, a.exact_k_nb1, a.n_exact - first);
        } else {
            copy_packed(a.rows_k, k_buffer(i), from.k + first * a.k_nb1, a.k_nb1, min(a.n_kv - first, TILE));
        }
        copy_mask(i);
    }

    __device__ __forceinline__ void copy_values(int i) const {
        if (shape::LATENT || i < 0 || i >= n) {
            return;
        }
        const int first = first_of(i);
        if (is_exact(i)) {
            copy_exact<DV>(v_buffer(i), from.exact_v + first * a.exact_v_nb1, a.exact_v_nb1, a.n_exact - first);
        } else {
            copy_packed(a.rows_v, v_buffer(i), from.v + first * a.v_nb1, a.v_nb1, min(a.n_kv - first, TILE));
        }
    }

    // Which of this warp's tokens of tile i are in the list: bit j: token j.
    __device__ __forceinline__ uint32_t listed_of(int i) const {
        if (!a.cells || is_exact(i) || i >= n) {
            return 0;
        }
        const int token = first_of(i) + warp * TOKENS;
        return token < a.n_kv ? (uint32_t) from.cells[a.n_exact + token / 32] >> token % 32 & ((1u << TOKENS) - 1) : 0;
    }

    // --- queries

    __device__ __forceinline__ const float * query(int col, int b) const {
        return (const float *) (a.q + token_of(col) * a.q_nb1 + head_of(col) * a.q_nb2 + seq * a.q_nb3) + 64 * b;
    }

    __device__ __forceinline__ float factor() const {
        return a.logit_softcap == 0.0f ? a.scale * TBQ_LOG2E : a.scale / a.logit_softcap;
    }

    __device__ __forceinline__ void prepare() const {
        float lo = 0.0f, hi = 0.0f;
        if (warp < n_cols * NB) {
            lo = query(first_col + warp / NB, warp % NB)[lane];
            hi = query(first_col + warp / NB, warp % NB)[lane + 32];
        }
#pragma unroll 1
        for (int i = warp; i < NC * NB; i += TBQ_HEADS_WARPS) {
            const int   c = i / NB, b = i % NB, next = i + TBQ_HEADS_WARPS;
            const float x = lo, y = hi;
            if (next < n_cols * NB) {
                lo = query(first_col + next / NB, next % NB)[lane];
                hi = query(first_col + next / NB, next % NB)[lane + 32];
            }
            if (c < n_cols) {
                tbq_heads_query<DK, DV, NC>(queries, c, b, x, y, a.mean ? a.mean + head_kv * DK + 64 * b : nullptr,
                                            factor(), lane);
            } else {
                tbq_heads_no_query<DK, DV, NC>(queries, c, b, lane);
            }
        }
    }

    // --- scores

    // The logits of this warp's tokens of a packed tile, or of an exact one (BITS 8), without masks.  y[m][n][2 r + j]:
    // column 16 m + 8 r + g, token 8 n + 2 t + j
    template <int BITS>
    __device__ __forceinline__ void scores(float (&y)[NM][NT][4], const char * rows, const uint32_t * hidden) const {
        constexpr int PITCH = BITS == 8 ? NB * (int) sizeof(block_tbq8_0) : tbq_attention_pitch(DK, BITS);
        const int     lane = tbq_heads_again(this->lane), g = lane / 4, t = lane % 4;
        const char *  key[NT];      // of token g
        const char *  scale[NT][2]; // of tokens 2t, 2t + 1
        const int     start = (int) (size_t) from.k, stride = (int) a.k_nb1;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            auto row = [&](int i) {
                return rows + (warp * TOKENS + 8 * n + i) * PITCH + (BITS == 8 ? 0 : (start + i * stride) & 15);
            };
            key[n]      = row(g);
            scale[n][0] = row(2 * t);
            scale[n][1] = row(2 * t + 1);
#pragma unroll
            for (int m = 0; m < NM; m++) {
                y[m][n][0] = y[m][n][1] = y[m][n][2] = y[m][n][3] = 0.0f;
            }
        }
        const tbq_lookup_table<BITS> levels(hidden);
        const uint4 *                operands = (const uint4 *) queries + lane;
        const int4 *                 scales   = (const int4 *) (queries + shape::Q_OPERANDS) + g;
        // An even number at a time, where blocks of 4 k + 2 bytes make rows of 4 k.
        constexpr int BYTES = BITS == 8 ? (int) sizeof(block_tbq8_0) : tbq_block_bytes(BITS);
        constexpr int STEP  = shape::STEP;
#pragma unroll 1
        for (int first = 0; first < NB; first += STEP) {
#pragma unroll
            for (int b = 0; b < STEP; b++) {
                block<BITS>(y, key, scale, operands, scales, levels, b, t);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                key[n] += STEP * BYTES;
                scale[n][0] += STEP * BYTES;
                scale[n][1] += STEP * BYTES;
            }
            operands += STEP * 64;
            scales += STEP * 8;
        }
    }

    // Adds the products of block b, from where the arguments are on.
    template <int BITS>
    __device__ __forceinline__ void
    block(float (&y)[NM][NT][4], const char * const (&key)[NT], const char * const (&scale)[NT][2],
          const uint4 * operands, const int4 * scales, const tbq_lookup_table<BITS> & levels, int b, int t) const {
        using reader = tbq_cache_reader<DK, BITS == 8 ? 4 : BITS>;
        {
            uint32_t k[NT][2][2];
            float    d[NT][2];
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if constexpr (BITS == 8) {
                    const uint32_t * qs =
                        (const uint32_t *) (key[n] + b * (int) sizeof(block_tbq8_0) + TBQ8_QS_OFFSET) + t;
                    tbq_exact_levels(qs[0], qs[8], k[n][0][0], k[n][0][1]);
                    tbq_exact_levels(qs[4], qs[12], k[n][1][0], k[n][1][1]);
                    d[n][0] = *(const float *) (scale[n][0] + b * (int) sizeof(block_tbq8_0));
                    d[n][1] = *(const float *) (scale[n][1] + b * (int) sizeof(block_tbq8_0));
                } else {
                    const uint32_t qs = reader::word(key[n] + reader::qs_at(t), b, TBQ_QS_OFFSET);
                    const uint32_t q4 = BITS == 4 ? reader::word(key[n] + reader::qs_at(t), b, TBQ_QS_OFFSET + 16) : qs;
                    const uint32_t qh = BITS == 3 ? reader::word(key[n] + reader::qh_at(t), b, TBQ_QH_OFFSET) : 0;
                    const uint2    w0 = levels(tbq_nibbles<BITS>(qs, qh, t));
                    const uint2    w1 = levels(tbq_nibbles<BITS>(q4, qh, t + 4));
                    k[n][0][0] = w0.x, k[n][0][1] = w0.y, k[n][1][0] = w1.x, k[n][1][1] = w1.y;
                    d[n][0] = reader::scale(scale[n][0], b);
                    d[n][1] = reader::scale(scale[n][1], b);
                }
            }
#pragma unroll
            for (int m = 0; m < NM; m++) {
                const uint4    q0    = operands[(m * NB + b) * 64];
                const uint4    q1    = operands[(m * NB + b) * 64 + 32];
                const int4     s     = scales[(m * NB + b) * 8]; // start values and scales of columns g, g + 8
                const uint32_t a0[4] = { q0.x, q0.y, q0.z, q0.w }, a1[4] = { q1.x, q1.y, q1.z, q1.w };
                const float    dq[2] = { __int_as_float(s.z), __int_as_float(s.w) };
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    int c[4];
                    if constexpr (BITS == 8) {
                        tbq_mma_s8_s8(c, a0, k[n][0][0], k[n][0][1], TBQ_HEADS_FLOAT_ZERO);
                        tbq_mma_s8_s8_add(c, a1, k[n][1][0], k[n][1][1]);
                    } else {
                        const int from[4] = { s.x, s.x, s.y, s.y };
                        tbq_mma_s8_u8(c, a0, k[n][0][0], k[n][0][1], from);
                        const int to[4] = { c[0], c[1], c[2], c[3] };
                        tbq_mma_s8_u8(c, a1, k[n][1][0], k[n][1][1], to);
                    }
#pragma unroll
                    for (int e = 0; e < 2 * NN; e++) {
                        y[m][n][e] += (__int_as_float(c[e]) - 12582912.0f) * (d[n][e % 2] * dq[e / 2]);
                    }
                }
            }
        }
    }

    // --- sums

    // Adds the products of weights and values of a tile.  rows: of the values in shared memory.  seen: of the tile's
    // tokens, see the kernel.
    template <int BITS>
    __device__ __forceinline__ void values(float (&acc)[NG][4][4], const char * rows, const char * p,
                                           const uint32_t * seen_of, const uint32_t * hidden, int n_steps) const {
        constexpr int D     = shape::LATENT ? DK : DV;
        constexpr int EXACT = (int) sizeof(block_tbq8_0);
        constexpr int PITCH = BITS == 8 ? D / 64 * EXACT : tbq_attention_pitch(D, BITS);
        constexpr int BLOCK = BITS == 8 ? EXACT : tbq_block_bytes(BITS);
        const int     lane = tbq_heads_again(this->lane), g = lane / 4, t = lane % 4;
        const int     block  = warp % NBV;
        const int     start  = (int) (size_t) (shape::LATENT ? from.k : from.v);
        const int     stride = (int) (shape::LATENT ? a.k_nb1 : a.v_nb1);

        const tbq_lookup_table<BITS> levels(hidden);
        const uint32_t               exponents = hidden[TBQ_N_HIDDEN];
        // of tokens 2t, 2t + 1: the block; its word of this lane, from a multiple of 4 bytes on, and how far that is
        const char * row_of[2];
        const char * qs[2];
        const char * qh[2];
        uint32_t     qs_shift[2], qh_shift[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int row = 2 * t + j;
            row_of[j]     = rows + row * PITCH + (BITS == 8 ? 0 : (start + row * stride) & 15) + block * BLOCK;
            qs[j]         = row_of[j] + TBQ_QS_OFFSET + 4 * (BITS == 4 ? g : g % 4);
            qh[j]         = row_of[j] + TBQ_QH_OFFSET + 4 * (g % 2);
            qs_shift[j]   = (uint32_t) (size_t) qs[j] % 4 * 8;
            qh_shift[j]   = (uint32_t) (size_t) qh[j] % 4 * 8;
            qs[j] -= qs_shift[j] / 8;
            qh[j] -= qh_shift[j] / 8;
        }
#pragma unroll 1
        for (int step = warp / NBV; step < n_steps; step += shape::GROUPS) {
            // bits 0..7: tokens 0, 2, .. of these 16 that some column sees, bits 16..23: tokens 1, 3, ..
            const uint32_t seen = NT == 2 ? seen_of[step] : seen_of[2 * step] | seen_of[2 * step + 1] << 4;
            if (seen == 0) {
                continue;
            }
            uint32_t va[4][4]; // tile i: channels 4g + i (registers 0, 2) and 4g + 32 + i (1, 3)
            if constexpr (BITS == 8) {
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    uint32_t word[2][2];
                    float    d[2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const char * const row = row_of[j] + (16 * step + 8 * pair) * PITCH;
                        word[0][j]             = *(const uint32_t *) (row + TBQ8_QS_OFFSET + 4 * g);
                        word[1][j]             = *(const uint32_t *) (row + TBQ8_QS_OFFSET + 32 + 4 * g);
                        d[j]                   = seen >> (t + 4 * pair + 16 * j) & 1 ? *(const float *) row : 0.0f;
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            va[i][2 * pair + h] = tbq_pack_f16(d[0] * (float) (int8_t) (word[h][0] >> 8 * i),
                                                               d[1] * (float) (int8_t) (word[h][1] >> 8 * i));
                        }
                    }
                }
            } else {
                uint32_t word[4], d[2];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int      at = (16 * step + j / 2 * 8) * PITCH;
                    const uint32_t x  = *(const uint16_t *) (row_of[j % 2] + at);
                    d[j / 2]          = j % 2 == 0 ? x : d[j / 2] | x << 16;
                    const uint32_t h  = BITS == 3 ? tbq_heads_word(qh[j % 2] + at, qh_shift[j % 2]) : 0;
                    word[j]           = tbq_nibbles<BITS>(tbq_heads_word(qs[j % 2] + at, qs_shift[j % 2]), h, g);
                }
                // A hidden row may be anything, and its values Inf or NaN.  From 512 on they can be: rare, so one test.
                const uint32_t large = ((d[0] & d[0] << 1) | (d[1] & d[1] << 1)) & 0x40004000u;
                if (__any_sync(TBQ_WARP_ALL, large != 0)) {
#pragma unroll
                    for (int pair = 0; pair < 2; pair++) {
                        d[pair] = (seen >> (t + 4 * pair) & 1 ? d[pair] & 0xFFFF : 0) |
                                  (seen >> (t + 4 * pair + 16) & 1 ? d[pair] & 0xFFFF0000u : 0);
                    }
                }
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        // as in tbq-attention.cuh: a channel of both tokens, and the channel 32 further, beside each other
                        const uint32_t x  = tbq_prmt(word[2 * pair], word[2 * pair + 1], h == 0 ? 0x5140 : 0x7362);
                        const uint2    lv = levels(x);
                        va[2 * h + 0][2 * pair + 0] = tbq_heads_values((lv.x & 0x00FF00FFu) | exponents, d[pair]);
                        va[2 * h + 0][2 * pair + 1] = tbq_heads_values(tbq_prmt(lv.x, exponents, 0x5351), d[pair]);
                        va[2 * h + 1][2 * pair + 0] = tbq_heads_values((lv.y & 0x00FF00FFu) | exponents, d[pair]);
                        va[2 * h + 1][2 * pair + 1] = tbq_heads_values(tbq_prmt(lv.y, exponents, 0x5351), d[pair]);
                    }
                }
            }
            const char * const column = p + step * 32;
            if constexpr (NG == 1) {
                const uint32_t b0 = *(const uint32_t *) (column + g * shape::P_PITCH + 4 * t);
                const uint32_t b1 = *(const uint32_t *) (column + g * shape::P_PITCH + 4 * t + 16);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    tbq_mma_f16(acc[0][i], va[i], b0, b1);
                }
            } else {
#pragma unroll
                for (int n = 0; n < NG; n += 2) {
                    uint32_t b[4]; // two operands of 8 columns
                    tbq_ldmatrix(b, column + (8 * n + lane % 8 + lane / 16 * 8) * shape::P_PITCH + lane / 8 % 2 * 16);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        tbq_mma_f16(acc[n][i], va[i], b[0], b[1]);
                        tbq_mma_f16(acc[n + 1][i], va[i], b[2], b[3]);
                    }
                }
            }
        }
    }
};

// --- the kernels -----------------------------------------------------------------------------------------------------

// grid: (CTAs for the pairs of a column and a block, tiles of columns times KV heads, sequences)
template <int DK, int DV, int NC>
__global__ void __launch_bounds__(TBQ_HEADS_THREADS) tbq_heads_prepare(const tbq_heads_args a) {
#if __CUDA_ARCH__ >= 800
    using shape = tbq_heads_shape<DK, DV, NC>;
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
#endif
    __shared__ tbq_heads_sources    sources; // not read
    const tbq_heads_cta<DK, DV, NC> cta(a, sources, nullptr);
    const int                       i = blockIdx.x * TBQ_HEADS_WARPS + cta.warp, c = i / shape::NB, b = i % shape::NB;
    char * const to = a.prepared + ((long long) blockIdx.z * gridDim.y + blockIdx.y) * (long long) shape::Q_BYTES;
    if (c >= NC) {
        return;
    }
    if (c < cta.n_cols) {
        const float * const q = cta.query(cta.first_col + c, b);
        tbq_heads_query<DK, DV, NC>(to, c, b, q[cta.lane], q[cta.lane + 32],
                                    a.mean ? a.mean + cta.head_kv * DK + 64 * b : nullptr, cta.factor(), cta.lane);
    } else {
        tbq_heads_no_query<DK, DV, NC>(to, c, b, cta.lane);
    }
#endif
}

// grid: (splits, tiles of columns times KV heads, sequences)
template <int DK, int DV, int NC>
__global__ void __launch_bounds__(TBQ_HEADS_THREADS, NC > 16 ? 1 : 2) tbq_attention_heads(const tbq_heads_args a) {
#if __CUDA_ARCH__ >= 800
    using cta_t          = tbq_heads_cta<DK, DV, NC>;
    using shape          = tbq_heads_shape<DK, DV, NC>;
    constexpr int NB     = shape::NB;
    constexpr int NT     = shape::NT;
    constexpr int TOKENS = shape::TOKENS;
    constexpr int NM     = shape::NM;
    constexpr int NN     = shape::NN;
    constexpr int NG     = NC / 8;

    TBQ_DYNAMIC_SHARED(smem, 16);
    __shared__ __align__(16) float4 info[NC]; // of a column: slope, q.c, its mask in bytes, the row of the output or -1
    __shared__ float                max_of[TBQ_HEADS_WARPS][NC];
    __shared__ float                sum_of[TBQ_HEADS_WARPS][NC];
    __shared__ float    top_of[2][NC]; // the maximum of a column, less the bias; the new one in the other place
    __shared__ uint32_t seen_of[2][TBQ_HEADS_WARPS]; // tokens that some column sees: even ones, odd ones << 16
    __shared__ uint32_t hidden[TBQ_N_HIDDEN + 1];
    __shared__ int      grown_at[2]; // a tile, counted from 1, whose logits are too large for the maximum

    __shared__ tbq_heads_sources sources;

    const cta_t cta(a, sources, smem);
    const int   lane = cta.lane, warp = cta.warp, g = cta.g, t = cta.t;
    if (threadIdx.x <= TBQ_N_HIDDEN) {
        hidden[threadIdx.x] = threadIdx.x < TBQ_N_HIDDEN ? tbq_hidden_constant(threadIdx.x) : 0x64006400u;
    }
    if (threadIdx.x < 2) {
        grown_at[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) {
        cta.find_sources(sources);
    }
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif

    if constexpr (shape::PREPARED) {
        const char * const from =
            a.prepared + ((long long) blockIdx.z * gridDim.y + blockIdx.y) * (long long) shape::Q_BYTES;
        for (int i = threadIdx.x * 16; i < shape::Q_BYTES; i += TBQ_HEADS_THREADS * 16) {
            tbq_cp_async_16_if(1, tbq_smem(cta.queries) + i, from + i);
        }
    }
    float    acc[NG][4][4];
    float    sum[NM][NN]; // of columns 16 m + 8 r + g: the weights of this lane
    int      which  = 0;  // of top_of
    uint32_t listed = 0;  // this warp's tokens of the next tile that are in the list
#pragma unroll
    for (int i = 0; i < NG * 16; i++) {
        acc[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < NM * NN; i++) {
        sum[i / NN][i % NN] = 0.0f;
    }

    // Two rounds that only copy; so the code of the copies is there once.
#pragma unroll 1
    for (int i = -2; i < cta.n; i++) {
        const bool         exact   = cta.is_exact(i);
        const char * const k_rows  = cta.k_buffer(i < 0 ? 0 : i);
        char * const       weights = cta.weights + i % 2 * shape::P_BYTES;
        if (i >= 0) {
            const bool         masked = a.mask || exact;
            const char * const mask   = k_rows + a.mask_at + 2 * warp * TOKENS;

            // Which of this warp's tokens are hidden from all columns: those past the end, those in the list, then by masks.
            const int      end  = exact ? min(TBQ_HEADS_EXACT, a.n_exact - cta.first_of(i)) : a.n_kv - cta.first_of(i);
            const int      left = end - warp * TOKENS;
            const uint32_t hide = (left >= TOKENS ? 0 : left <= 0 ? ~0u : ~0u << left) | listed;
            uint32_t       seen;
            {
                constexpr int PAIRS = TOKENS / 2;
                const int     pair  = lane % PAIRS;
                bool          even = false, odd = false;
                for (int row = lane / PAIRS; row < sources.n_mask_rows; row += 32 / PAIRS) {
                    const uint32_t x = masked ? *(const uint32_t *) (mask + row * shape::P_PITCH + 4 * pair) : 0;
                    even |= (x & 0xFFFF) != 0xFC00;
                    odd |= x >> 16 != 0xFC00;
                }
                uint32_t e = __ballot_sync(TBQ_WARP_ALL, even && !(hide >> 2 * pair & 1));
                uint32_t o = __ballot_sync(TBQ_WARP_ALL, odd && !(hide >> (2 * pair + 1) & 1));
#pragma unroll
                for (int x = 16; x >= PAIRS; x /= 2) {
                    e |= e >> x;
                    o |= o >> x;
                }
                seen = (e & ((1u << PAIRS) - 1)) | (o & ((1u << PAIRS) - 1)) << 16;
            }
            if (lane == 0) {
                seen_of[i % 2][warp] = seen;
            }

            float s[NM][NT][4];
            bool  grown = false;
            if (seen) {
                switch (exact ? 8 : a.bits_k) {
                    case 2: cta.template scores<2>(s, k_rows, hidden); break;
                    case 3: cta.template scores<3>(s, k_rows, hidden); break;
                    case 4: cta.template scores<4>(s, k_rows, hidden); break;
                    default: cta.template scores<8>(s, k_rows, hidden); break;
                }
#pragma unroll
                for (int m = 0; m < NM; m++) {
#pragma unroll
                    for (int r = 0; r < NN; r++) {
                        const float4 of  = info[16 * m + 8 * r + g];
                        const float  top = top_of[which][16 * m + 8 * r + g];
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            const uint32_t x =
                                masked ? *(const uint32_t *) (mask + (int) __float_as_uint(of.z) + 16 * n + 4 * t) : 0;
                            const float2 bias = __half22float2(*(const half2 *) &x);
#pragma unroll
                            for (int j = 0; j < 2; j++) {
                                float &     y = s[m][n][2 * r + j];
                                const float b = j == 0 ? bias.x : bias.y;
                                if (a.logit_softcap != 0.0f) {
                                    y = tbq_tanh(y + of.y) * (a.logit_softcap * TBQ_LOG2E);
                                }
                                // selected, not added: a hidden key may be anything, NaN too
                                y = hide >> (8 * n + 2 * t + j) & 1 || b == -INFINITY ? -INFINITY : y + b * of.x;
                                grown |= y > top + TBQ_HEADS_LAG;
                            }
                        }
                    }
                }
            } else {
#pragma unroll
                for (int e = 0; e < NM * NT * 4; e++) {
                    s[e / (NT * 4)][e / 4 % NT][e % 4] = -INFINITY;
                }
            }
            if (__any_sync(TBQ_WARP_ALL, grown) && lane == 0) {
                grown_at[i % 2] = i + 1;
            }

            float more[NM][NN];
            auto  weigh = [&] {
#pragma unroll
                for (int m = 0; m < NM; m++) {
#pragma unroll
                    for (int r = 0; r < NN; r++) {
                        const float top = top_of[which][16 * m + 8 * r + g];
                        more[m][r]      = 0.0f;
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            const float p0 = tbq_exp2(s[m][n][2 * r] - top);
                            const float p1 = tbq_exp2(s[m][n][2 * r + 1] - top);
                            more[m][r] += p0 + p1;
                            *(uint32_t *) (weights + (16 * m + 8 * r + g) * shape::P_PITCH +
                                           2 * (warp * TOKENS + 8 * n + 2 * t)) = tbq_pack_f16(p0, p1);
                        }
                    }
                }
            };
            weigh();

            // The values of this tile and the keys of the next one are there, the weights too, and nobody reads the keys of
            // this one or the values of the last.
            tbq_cp_async_wait<0>();
            __syncthreads();
            if (grown_at[i % 2] == i + 1) {
#pragma unroll
                for (int m = 0; m < NM; m++) {
#pragma unroll
                    for (int r = 0; r < NN; r++) {
                        float most = -INFINITY;
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            most = fmaxf(most, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                        }
                        most = fmaxf(most, __shfl_xor_sync(TBQ_WARP_ALL, most, 1));
                        most = fmaxf(most, __shfl_xor_sync(TBQ_WARP_ALL, most, 2));
                        if (t == 0) {
                            max_of[warp][16 * m + 8 * r + g] = most;
                        }
                    }
                }
                __syncthreads();
#pragma unroll
                for (int m = 0; m < NM; m++) {
#pragma unroll
                    for (int r = 0; r < NN; r++) {
                        float most = max_of[0][16 * m + 8 * r + g];
                        for (int w = 1; w < TBQ_HEADS_WARPS; w++) {
                            most = fmaxf(most, max_of[w][16 * m + 8 * r + g]);
                        }
                        const float top  = top_of[which][16 * m + 8 * r + g];
                        most             = fmaxf(top, most - TBQ_HEADS_BIAS);
                        const float fall = tbq_exp2(top - most);
                        if (warp == 0 && t == 0) {
                            top_of[which ^ 1][16 * m + 8 * r + g] = most;
                        }
                        sum[m][r] *= fall;
                        // columns 2t, 2t + 1 of the sums belong to queries that other lanes hold
                        const float f0 = __shfl_sync(TBQ_WARP_ALL, fall, 8 * t);
                        const float f1 = __shfl_sync(TBQ_WARP_ALL, fall, 8 * t + 4);
#pragma unroll
                        for (int e = 0; e < 16; e++) {
                            acc[2 * m + r][e / 4][e % 4] *= e % 2 ? f1 : f0;
                        }
                    }
                }
                which ^= 1;
                __syncthreads();
                weigh();
                __syncthreads();
            }
#pragma unroll
            for (int e = 0; e < NM * NN; e++) {
                sum[e / NN][e % NN] += more[e / NN][e % NN];
            }
        }
        cta.copy_keys(i + 2);
        cta.copy_values(i + 1);
        tbq_cp_async_commit();
        if (i < -1) {
            continue;
        }
        listed = cta.listed_of(i + 1);
        if (i == -1) {
            if constexpr (!shape::PREPARED) {
                cta.prepare();
            }
            tbq_cp_async_wait<1>(); // the first keys, and queries
            __syncthreads();
            if (threadIdx.x < NC) {
                top_of[0][threadIdx.x] = -1e30f; // finite, so that a tile without a visible token gives exp2(-inf) = 0

                const int     col = cta.first_col + min((int) threadIdx.x, cta.n_cols - 1);
                const float * of =
                    (const float *) (cta.queries + shape::Q_OPERANDS + shape::Q_SCALES) + threadIdx.x * NB;
                float center = 0.0f;
                for (int b = 0; b < NB; b++) {
                    center += of[b];
                }
                const float slope = tbq_alibi_slope(a.max_bias, cta.head_of(col), a.n_head) * TBQ_LOG2E;
                const int   mask  = a.mask ? (cta.token_of(col) - cta.first_row) * shape::P_PITCH : 0;
                const int   row   = (cta.seq * a.n_q + cta.token_of(col)) * a.n_head + cta.head_of(col);
                info[threadIdx.x] = make_float4(slope, center, __int_as_float(mask),
                                                __int_as_float((int) threadIdx.x < cta.n_cols ? row : -1));
            }
            __syncthreads();
            continue;
        }

        const char * const v_rows  = shape::LATENT ? k_rows : cta.v_buffer(i);
        const int          n_steps = exact ? TBQ_HEADS_EXACT / 16 : shape::TILE / 16;
        switch (exact ? 8 : shape::LATENT ? a.bits_k : a.bits_v) {
            case 2: cta.template values<2>(acc, v_rows, weights, seen_of[i % 2], hidden, n_steps); break;
            case 3: cta.template values<3>(acc, v_rows, weights, seen_of[i % 2], hidden, n_steps); break;
            case 4: cta.template values<4>(acc, v_rows, weights, seen_of[i % 2], hidden, n_steps); break;
            default: cta.template values<8>(acc, v_rows, weights, seen_of[i % 2], hidden, n_steps); break;
        }
    }
    tbq_cp_async_wait<0>();

    // One result of eight warps.
#pragma unroll
    for (int m = 0; m < NM; m++) {
#pragma unroll
        for (int r = 0; r < NN; r++) {
            float & l = sum[m][r];
            l += __shfl_xor_sync(TBQ_WARP_ALL, l, 1);
            l += __shfl_xor_sync(TBQ_WARP_ALL, l, 2);
            if (t == 0) {
                sum_of[warp][16 * m + 8 * r + g] = l;
            }
        }
    }
    __syncthreads(); // the buffers are free now
    if constexpr (shape::GROUPS > 1) {
        float * const to = (float *) smem + (warp - shape::NBV) * NG * 16 * 32 + lane;
        if (warp >= shape::NBV) {
#pragma unroll
            for (int e = 0; e < NG * 16; e++) {
                to[e * 32] = acc[e / 16][e / 4 % 4][e % 4];
            }
        }
        __syncthreads();
    }
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
    auto result_of = [&](int c) -> float * {
        const int row = (int) __float_as_uint(info[c].w);
        return row < 0 ? nullptr : a.partial + ((long long) row * a.n_split + blockIdx.x) * (DV + 2);
    };
    if (warp < shape::NBV) {
#pragma unroll
        for (int n = 0; n < NG; n++) {
            if constexpr (shape::GROUPS > 1) {
                for (int other = 0; other < shape::GROUPS - 1; other++) {
                    const float * from = (const float *) smem + ((other * shape::NBV + warp) * NG + n) * 16 * 32 + lane;
#pragma unroll
                    for (int e = 0; e < 16; e++) {
                        acc[n][e / 4][e % 4] += from[e * 32];
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (float * const result = result_of(8 * n + 2 * t + j)) {
                    float2 * const to = (float2 *) (result + 64 * warp + 4 * g);
#pragma unroll
                    for (int x = 0; x < 2; x++) {
                        to[16 * x]     = make_float2(acc[n][0][2 * x + j], acc[n][1][2 * x + j]);
                        to[16 * x + 1] = make_float2(acc[n][2][2 * x + j], acc[n][3][2 * x + j]);
                    }
                }
            }
        }
    }
    float * const to = threadIdx.x < NC ? result_of(threadIdx.x) : nullptr;
    if (to) {
        float l = 0.0f;
        for (int w = 0; w < TBQ_HEADS_WARPS; w++) {
            l += sum_of[w][threadIdx.x];
        }
        // splits, the merge and the sink see whole keys
        to[DV]     = top_of[which][threadIdx.x] + (a.logit_softcap == 0.0f ? info[threadIdx.x].y : 0.0f);
        to[DV + 1] = l;
    }
#else
    __trap(); // the host does not choose this kernel here
#endif
}

// Merges the splits of a row, rotates it back and stores it.  grid: (rows, blocks of 64 channels)
template <int DK, int DV>
__global__ void __launch_bounds__(TBQ_HEADS_THREADS) tbq_heads_combine(const tbq_heads_args a) {
    constexpr int    AT_ONCE = 12; // splits of a warp whose loads are on their way at a time
    const int        lane = threadIdx.x % 32, warp = threadIdx.x / 32, b = blockIdx.y;
    const long long  row = blockIdx.x;
    __shared__ float sums[TBQ_HEADS_WARPS][64], max_of[TBQ_HEADS_WARPS], sum_of[TBQ_HEADS_WARPS];
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    const float * const splits = a.partial + row * a.n_split * (DV + 2);
    float               top = -1e30f, l = 0.0f, lo = 0.0f, hi = 0.0f;
#pragma unroll 1
    for (int first = warp; first < a.n_split; first += AT_ONCE * TBQ_HEADS_WARPS) {
        float m[AT_ONCE], w[AT_ONCE], x[AT_ONCE], y[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int           i    = first + u * TBQ_HEADS_WARPS;
            const bool          some = i < a.n_split;
            const float * const from = splits + (long long) i * (DV + 2);
            m[u]                     = some ? from[DV] : -1e30f;
            w[u]                     = some ? from[DV + 1] : 0.0f;
            x[u]                     = some ? from[64 * b + lane] : 0.0f;
            y[u]                     = some ? from[64 * b + lane + 32] : 0.0f;
        }
        float most = top;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            most = fmaxf(most, m[u]);
        }
        const float fall = tbq_exp2(top - most);
        top              = most;
        l *= fall, lo *= fall, hi *= fall;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const float f = tbq_exp2(m[u] - top);
            l += w[u] * f, lo += x[u] * f, hi += y[u] * f;
        }
    }
    sums[warp][lane]      = lo;
    sums[warp][lane + 32] = hi;
    if (lane == 0) {
        max_of[warp] = top;
        sum_of[warp] = l;
    }
    __syncthreads();
    if (warp != 0) {
        return;
    }
    top = max_of[0];
    for (int w = 1; w < TBQ_HEADS_WARPS; w++) {
        top = fmaxf(top, max_of[w]);
    }
    l = lo = hi = 0.0f;
    for (int w = 0; w < TBQ_HEADS_WARPS; w++) {
        const float f = tbq_exp2(max_of[w] - top);
        l += sum_of[w] * f, lo += sums[w][lane] * f, hi += sums[w][lane + 32] * f;
    }
    sums[0][lane]      = lo; // only this lane reads it
    sums[0][lane + 32] = hi;
    const int head     = blockIdx.x % a.n_head;
    tbq_attention_store<true>(a.dst + row * DV + 64 * b, sums[0], top, l, a.sinks ? a.sinks + head : nullptr,
                              a.mean_of_values ? a.mean + head / a.gqa * DK + 64 * b : nullptr, 0, lane);
}

#endif // __CUDACC__
