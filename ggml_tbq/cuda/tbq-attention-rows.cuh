// SPDX-License-Identifier: MIT
// Attention in decode over whole rows of the cache: tbq-attention.cuh's problem where rows of all KV heads can be
// copied at once.
//
// tbq-attention.cuh reads a head's slice of a row by itself: 68 bytes at any multiple of 4, so three sectors of 32, and
// the L2 cache's requests are its limit.  Here a CTA has a range of tokens for all KV heads.  Rows come by bulk copies
// (cp.async.bulk), which one thread starts, into a ring of stages; every sector is read once, in order, and copying
// costs the other warps nothing.  Each of them has one KV head and 16 tokens of a stage.
//
// THE TILES, for lane 4 g + t of a warp
//
//     S^T = K . Q^T   m16n8k32, s8 . s8:  A = keys (rows g, g + 8), B = queries (column g)
//     O^T = V^T . P^T m16n8k16, bf16:     A = values (rows = channels), B = weights (columns = queries)
//
// Keys are operand A, so half of A is not padding, and a lane has the logits of two tokens: two scales of keys, two of
// values and two masks where queries as A need four.  `movmatrix` turns the weights into operand B.
//
// UNPACKING.  A table of 16 levels is two of 8, and a look-up in the wrong one gives a constant: 0 for entries that are
// not negative, -1 for those that are.  For keys both look-ups are operands, and the tensor core adds them: the upper
// table has levels + 1.  Nothing is biased.  The integer sum starts at the bits of a float of about 1.5 . 2^23, so it
// is a float, and one fma takes that away and multiplies by the query's scale; what it loses is less than one unit of
// the sum.
//
// BANKS.  Rows of 8 KV heads of 128 are 8 banks apart modulo 32: four neighbors are in different banks, eight are not.
// Space after every four would avoid it, but then a stage takes a copy for each four, and that cost more
// (docs/design/cuda.md).  A load of values takes four rows only, and which row of a tile a token is does not matter as
// long as keys, weights and values agree: so tokens are permuted, and these four are neighbors.  Loads of keys take
// eight rows and have two-way conflicts.  Other rows are an odd number of units of 16 bytes: no conflicts.
//
// LAUNCHES.  The launcher takes programmatic ones where the backend allows them (ggml_cuda_kernel_launch).
//
// EXACT ROWS (tbq-attention.cuh) are few, so every CTA takes a share of their slices before its own, while its first
// stages are on their way.  They come from global memory, through the L2 cache, to which they are copied when the
// kernel begins.  The list's map is a part of each stage, so the loop hides a row for a load and an instruction.
// Without a list the same code reads a map of zeros: a template argument would have doubled the kernels and saved 9 of
// 370 instructions.
//
// MEANS of keys: as in tbq-attention.cuh, but a column's d is added when its result is written.
//
// It needs 227 KiB of shared memory, so sm_90 or sm_100, and is slower for few tokens (tbq_attention_rows_faster).
#pragma once

#include "tbq-attention.cuh"

#include <type_traits>

#define TBQ_ROWS_MAX_STAGES 12

// With 16 columns there are half as many warps, each of which has twice as many registers.
constexpr __host__ __device__ int tbq_rows_warps(int d, int nc) {
    return d == 256 ? 12 : nc == 8 ? 16 : 8;
}

constexpr __host__ __device__ int tbq_rows_threads(int d, int nc) {
    return 32 * tbq_rows_warps(d, nc);
}

// H KV heads of D channels in a row.
template <int D, int H, int BITS> struct tbq_rows_side {
    static constexpr int BYTES = tbq_attention_block(BITS);
    static constexpr int HEAD  = D / 64 * BYTES;
    static constexpr int ROW   = H * HEAD;
    static_assert(ROW % 16 == 0, "bulk copies");
};

template <int D, int H, int BITS_K, int BITS_V, int NC> struct tbq_rows_shape {
    using side_k                = tbq_rows_side<D, H, BITS_K>;
    using side_v                = tbq_rows_side<D, H, BITS_V>;
    static constexpr int WARPS  = tbq_rows_warps(D, NC);
    static constexpr int TOKENS = TBQ_ATTENTION_SLICE * WARPS / H; // of a stage
    static constexpr int AT_V   = TOKENS * side_k::ROW;
    static constexpr int AT_M   = AT_V + TOKENS * side_v::ROW; // masks
    static constexpr int AT_L   = AT_M + NC * TOKENS * 2;      // words of the list's map
    static constexpr int STAGE  = AT_L + 16;
    static constexpr int Q8     = H * NC * D;
    static constexpr int FIT    = (228800 - Q8) / STAGE; // 227 KiB less what is static
    static constexpr int STAGES = FIT < TBQ_ROWS_MAX_STAGES ? FIT : TBQ_ROWS_MAX_STAGES;
    static constexpr int LAG    = STAGES > 4 ? 2 : 1; // a stage is filled again when it was used that many stages ago
    static constexpr int SMEM   = STAGES * STAGE + Q8;
    static_assert(STAGE % 16 == 0 && WARPS % H == 0 && TOKENS <= 4 * 32, "layout");
    static_assert(WARPS * (NC + 1) * tbq_attention_row(D) * 4 <= SMEM - Q8, "the results take the place of the ring");
};

// Whether the kernel below can do it.  bits_k, bits_v: 2, 3, 4
static inline bool tbq_attention_rows_can(const tbq_attention_args & a, int d, int bits_k, int bits_v) {
    auto side = [&](const char * p, long long nb1, long long nb2, long long nb3, int bits) {
        const int head = d / 64 * tbq_attention_block(bits);
        return bits < 8 && (size_t) p % 16 == 0 && nb2 == head && nb1 == (long long) head * a.n_head_kv &&
               nb3 % 16 == 0;
    };
    const bool shape = d == 128  ? a.n_head_kv == 4 || a.n_head_kv == 8
                       : d == 64 ? a.n_head_kv == 8
                                 : a.n_head_kv == 2 && a.n_q * (a.n_head / a.n_head_kv) <= 8;
    return shape && side(a.k, a.k_nb1, a.k_nb2, a.k_nb3, bits_k) && side(a.v, a.v_nb1, a.v_nb2, a.v_nb3, bits_v) &&
           (!a.mask || (((size_t) a.mask | a.mask_nb1 | a.mask_nb3) % 16 == 0 && a.n_kv % 8 == 0));
}

// Whether the kernel below is the faster one: the tokens of all sequences from which it lost at most 1 % on an H200, with
// exact rows (docs/measurements/cuda.md).  What was not timed has the number of a shape that is harder for it.
static inline bool tbq_attention_rows_faster(const tbq_attention_args & a, int d, int bits_k, int bits_v) {
    // Fewer bits take as long to unpack for fewer bytes, but two take less than three.
    int tokens = bits_k == 4 ? 8192 : bits_k == 2 && bits_v == 2 ? 16384 : 65536;
    if (a.n_head_kv * d < 1024) { // rows of half as many bytes
        tokens = bits_k == 4 ? 16384 : d == 128 ? 32768 : 65536;
    }
    if (tbq_attention_columns(a.n_q * (a.n_head / a.n_head_kv)) == 16) { // half as many warps
        tokens = bits_k == 4 ? 65536 : 131072;
    }
    // many short sequences were slower, too
    return a.n_kv >= 8192 && (long long) a.n_kv * a.n_seq >= tokens;
}

// How the cache is split: one CTA a multiprocessor, and what a CTA's start costs is about four slices of 16 tokens.  A
// split begins with a word of the list's map, which is two slices.
static inline void tbq_attention_rows_partition(tbq_attention_args & a, int n_sm) {
    tbq_attention_group(a);
    const int n_tiles  = a.n_groups * a.n_seq;
    const int n_slices = (a.n_kv + TBQ_ATTENTION_SLICE - 1) / TBQ_ATTENTION_SLICE;
    long long best     = 0;
    for (int n = 1; n == 1 || (n <= n_slices && n <= n_sm); n++) {
        const long long cost = ((long long) n_tiles * n + n_sm - 1) / n_sm * ((n_slices + n - 1) / n + 4);
        if (n == 1 || cost < best) {
            best               = cost;
            a.slices_per_split = (n_slices + n - 1) / n;
        }
    }
    a.slices_per_split += a.slices_per_split % 2;
    a.n_split = (n_slices + a.slices_per_split - 1) / a.slices_per_split;
}

#ifdef __CUDACC__

// Where a CTA has 227 KiB of shared memory.  Not compiled for others: the host does not choose the kernel there.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define TBQ_ROWS_ARCH
#endif

// --- the tables -----------------------------------------------------------------------------------------------------

// Word i of the table for keys: signed levels, and of the upper half of 16 levels + 1.
template <int BITS> constexpr __host__ __device__ uint32_t tbq_rows_level_word(int i) {
    constexpr int8_t levels[3][16] = { TBQ2_LEVELS, TBQ3_LEVELS, TBQ4_LEVELS };
    uint32_t         word          = 0;
    for (int n = 0; n < 4; n++) {
        word |= (uint32_t) (uint8_t) (levels[BITS - 2][4 * i + n] + (BITS == 4 && i >= 2)) << 8 * n;
    }
    return word;
}

// Constants that the compiler must not know (tbq-block.cuh).
#define TBQ_ROWS_N_HIDDEN 10
template <int BITS_K, int BITS_V> static __device__ __forceinline__ uint32_t tbq_rows_hidden(int i) {
    switch (i) {
        case 0: return 0x43004300u;
        case 1: return 1;
        case 2: return tbq_rows_level_word<BITS_K>(0);
        case 3: return tbq_rows_level_word<BITS_K>(BITS_K > 2 ? 1 : 0);
        case 4: return tbq_rows_level_word<BITS_K>(BITS_K > 3 ? 2 : 0);
        case 5: return tbq_rows_level_word<BITS_K>(BITS_K > 3 ? 3 : 0);
        case 6: return tbq_level_word<BITS_V>(0);
        case 7: return tbq_level_word<BITS_V>(BITS_V > 2 ? 1 : 0);
        case 8: return tbq_level_word<BITS_V>(BITS_V > 3 ? 2 : 0);
        default: return tbq_level_word<BITS_V>(BITS_V > 3 ? 3 : 0);
    }
}

// The two halves of a nibble word, each in the low half of a register.  row: of this head, in shared memory; a multiple
// of 4 bytes.
template <int D, int BITS, int B>
static __device__ __forceinline__ void tbq_rows_nibbles(const char * row, int w, uint32_t & lo, uint32_t & hi) {
    constexpr int BYTES = tbq_attention_block(BITS);
    constexpr int QS    = B * BYTES + TBQ_QS_OFFSET;
    if constexpr (BITS == 4) {
        if constexpr (D == 64 || QS % 4 != 0) { // two loads, as for a word across two; but these need no shift
            lo = *(const uint16_t *) (row + QS + 4 * w);
            hi = *(const uint16_t *) (row + QS + 4 * w + 2);
        } else {
            lo = *(const uint32_t *) (row + QS + 4 * w);
            hi = tbq_high(lo);
        }
    }
}

// f of each block of 64 channels, whose number is a constant.
template <int NB, typename function> static __device__ __forceinline__ void tbq_rows_blocks(function f) {
    f(std::integral_constant<int, 0>());
    if constexpr (NB > 1) {
        f(std::integral_constant<int, 1>());
    }
    if constexpr (NB > 2) {
        f(std::integral_constant<int, 2>());
        f(std::integral_constant<int, 3>());
    }
}

// --- the kernel -----------------------------------------------------------------------------------------------------

// grid: (splits, tiles of columns, sequences).  ONE: one query row, so that all columns have one mask.
template <int D, int BITS_K, int BITS_V, int NC, int H, bool ONE>
__global__ void __launch_bounds__(tbq_rows_threads(D, NC), 1) tbq_attention_rows(const tbq_attention_args a) {
#ifdef TBQ_ROWS_ARCH
    constexpr int NB     = D / 64;
    constexpr int NG     = NC / 8;
    using shape          = tbq_rows_shape<D, H, BITS_K, BITS_V, NC>;
    using side_k         = typename shape::side_k;
    using side_v         = typename shape::side_v;
    constexpr int WARPS  = shape::WARPS;
    constexpr int TOKENS = shape::TOKENS;
    constexpr int STAGES = shape::STAGES;
    constexpr int SLICE  = TBQ_ATTENTION_SLICE;
    constexpr int PARTS  = WARPS / H; // warps of a head
    constexpr int EXACT  = (int) sizeof(block_tbq8_0);
    // Values go into the tensor core as 192 + level, and 192 times the sum of weights, which has a tile of its own, is
    // taken away at the end.  It takes registers.
    constexpr bool BIASED = D < 256;

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int g    = lane / 4;
    const int t    = lane % 4;

    const int gqa       = a.gqa;
    const int n_columns = a.n_q * gqa;
    const int first_col = blockIdx.y * NC;
    const int seq       = blockIdx.z;
    const int n_cols    = min(NC, n_columns - first_col);
    auto      token_of  = [&](int col) -> int { return a.gqa_magic ? __umulhi(col, a.gqa_magic) : col; };
    auto      head_of   = [&](int head_kv, int col) -> int { return head_kv * gqa + col - token_of(col) * gqa; };

    TBQ_DYNAMIC_SHARED(shared, 128);
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    __shared__ float                 q_scale[H][NC][NB];
    __shared__ float                 q_center[H][NC][NB];          // as in tbq-attention.cuh
    __shared__ uint32_t              hidden[TBQ_ROWS_N_HIDDEN][4]; // a copy for each t, or they are uniform registers
    __shared__ float                 max_of[WARPS][NC];
    __shared__ float                 sum_of[WARPS][NC];
    char * const   q8    = shared + STAGES * shape::STAGE; // [H][NC][D], in the order in which operand B takes them
    const uint32_t full  = tbq_smem(barriers);
    const uint32_t empty = full + 8 * STAGES;

    const int first_token = blockIdx.x * a.slices_per_split * SLICE;
    const int end_token   = min((int) (blockIdx.x + 1) * a.slices_per_split * SLICE, a.n_kv);
    const int n_stages    = (end_token - first_token + TOKENS - 1) / TOKENS;
    const int first_row   = token_of(first_col); // of queries, and so of masks

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            tbq_mbarrier_init(full + 8 * i, a.cells ? 2 : 1);
            tbq_mbarrier_init(empty + 8 * i, WARPS);
        }
        tbq_mbarrier_init_done();
    }
    if (threadIdx.x < 4 * STAGES) { // without a list it stays so
        *(uint32_t *) (shared + threadIdx.x / 4 * shape::STAGE + shape::AT_L + threadIdx.x % 4 * 4) = 0;
    }
    if (threadIdx.x < 4 * TBQ_ROWS_N_HIDDEN) {
        hidden[threadIdx.x / 4][threadIdx.x % 4] = tbq_rows_hidden<BITS_K, BITS_V>(threadIdx.x / 4);
    }
    __syncthreads();

    // Exact rows: slices, in turn by split and then by the warps of a head in it, so that the rows of a sequence, which
    // are neighbors in the list, are spread.
    const int          head           = warp % H;
    const int          part           = warp / H; // which tokens of a stage
    const int          seq_kv         = seq == 0 ? 0 : seq / a.kv_per_seq;
    const int          n_exact_slices = a.cells ? (a.n_exact + SLICE - 1) / SLICE : 0;
    const int          exact_step     = gridDim.x * PARTS;
    const int          exact_first    = blockIdx.x + gridDim.x * part;
    const int * const  cells          = a.cells + (long long) seq_kv * (a.n_exact + (a.n_kv + 31) / 32);
    const char * const exact_k        = a.exact_k + seq_kv * a.exact_k_nb3;
    const char * const exact_v        = a.exact_v + seq_kv * a.exact_v_nb3;
    int                cell_ahead[2]; // of rows g + 8 i
    auto               load_cells = [&](int slice) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int slot = slice * SLICE + g + 8 * i;
            cell_ahead[i]  = slice < n_exact_slices && slot < a.n_exact ? cells[slot] : -1;
        }
    };
    load_cells(exact_first);

    // The list is an input of the graph; the rest may be of the kernel before this.
    cudaGridDependencySynchronize();
    // The next grid may start: either it waits for this one before it reads, or it works beside it (tbq_encode_part).
    cudaTriggerProgrammaticLaunchCompletion();

    // Rows of all heads of a slice, to the L2 cache.
    auto prefetch_exact = [&](int slice) {
        const int n = min(a.n_exact - slice * SLICE, SLICE);
        if (a.exact_k_nb1 == H * NB * EXACT && (size_t) exact_k % 16 == 0) {
            tbq_bulk_prefetch(exact_k + (long long) slice * SLICE * (H * NB * EXACT), n * (H * NB * EXACT));
        }
        if (a.exact_v_nb1 == H * NB * EXACT && (size_t) exact_v % 16 == 0) {
            tbq_bulk_prefetch(exact_v + (long long) slice * SLICE * (H * NB * EXACT), n * (H * NB * EXACT));
        }
    };
    if (lane == 0 && head == 0 && exact_first < n_exact_slices) {
        prefetch_exact(exact_first);
    }

    // Masks of the slice whose cells those are, as halves: of rows g + 8 tok, of columns 2t, 2t + 1.
    using masks = uint32_t[NG][2][2];
    masks exact_mask;
    auto  load_exact_masks = [&]() {
#pragma unroll
        for (int i = 0; i < 4 * NG; i++) {
            const int n = i / 4, j = i / 2 % 2, tok = i % 2;
            if (ONE && (n > 0 || j > 0)) {
                exact_mask[n][j][tok] = exact_mask[0][0][tok];
                continue;
            }
            const int        cell = cell_ahead[tok];
            const int        col  = ONE ? 0 : token_of(min(first_col + 8 * n + 2 * t + j, n_columns - 1));
            const uint16_t * row  = (const uint16_t *) (a.mask + col * a.mask_nb1 + seq % a.n_seq_mask * a.mask_nb3);
            exact_mask[n][j][tok] = cell < 0 ? 0xFC00 : a.mask ? row[cell] : 0; // -inf
        }
    };
    load_exact_masks();
    load_cells(exact_first + exact_step);

    // Starts the copies of stage i, to place `at` of the ring; by one thread.
    auto fill = [&](int i, int at) {
        const int      from    = first_token + i * TOKENS;
        const int      n       = min(TOKENS, end_token - from);
        const int      n_masks = a.mask ? token_of(first_col + n_cols - 1) - first_row + 1 : 0;
        const char *   k       = a.k + seq_kv * a.k_nb3 + (long long) from * side_k::ROW;
        const char *   v       = a.v + seq_kv * a.v_nb3 + (long long) from * side_v::ROW;
        const char *   mask    = a.mask + first_row * a.mask_nb1 + seq % a.n_seq_mask * a.mask_nb3 + 2 * from;
        const uint32_t stage   = tbq_smem(shared) + at * shape::STAGE;
        const uint32_t barrier = full + 8 * at;
        tbq_mbarrier_expect(barrier, n * (side_k::ROW + side_v::ROW + 2 * n_masks));
        tbq_bulk_copy(stage, k, n * side_k::ROW, barrier);
        tbq_bulk_copy(stage + shape::AT_V, v, n * side_v::ROW, barrier);
#pragma unroll 1
        for (int j = 0; j < n_masks; j++) {
            tbq_bulk_copy(stage + shape::AT_M + j * TOKENS * 2, mask + j * a.mask_nb1, 2 * n, barrier);
        }
        if (a.cells) {
            const int * const map = cells + a.n_exact + from / 32;
#pragma unroll 1
            for (int j = 0; 32 * j < n; j++) {
                tbq_cp_async<4>(stage + shape::AT_L + 4 * j, map + j);
            }
            tbq_mbarrier_arrive_copied(barrier);
        }
    };
    // Queries: rotated, scaled, rounded to 8 bits.  They are on their way before the first stages, and wait for
    // nothing.
    const float q_factor = a.logit_softcap == 0.0f ? a.scale * TBQ_LOG2E : a.scale / a.logit_softcap;
    auto        block_q  = [&](int i) -> const float * {
        const int col = first_col + i / (H * NB);
        return (const float *) (a.q + token_of(col) * a.q_nb1 + head_of(i / NB % H, col) * a.q_nb2 + seq * a.q_nb3) +
               64 * (i % NB);
    };
    float q_lo = 0.0f, q_hi = 0.0f;
    if (warp < n_cols * NB * H) {
        q_lo = block_q(warp)[lane];
        q_hi = block_q(warp)[lane + 32];
    }
    if (threadIdx.x == 0) { // in order, so that the stage that is awaited first comes first
#pragma unroll 1
        for (int i = 0; i < min(STAGES, n_stages); i++) {
            fill(i, i);
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = warp; i < NC * NB * H; i += WARPS) {
        const int c    = i / (H * NB);
        const int head = i / NB % H;
        const int b    = i % NB;
        char *    to   = q8 + (head * NC + c) * D + 64 * b + 2 * lane;
        if (c >= n_cols) {
            *(char2 *) to = make_char2(0, 0);
            if (lane == 0) {
                q_scale[head][c][b] = q_center[head][c][b] = 0.0f;
            }
            continue;
        }
        float lo = q_lo, hi = q_hi;
        if (i + WARPS < n_cols * NB * H) {
            q_lo = block_q(i + WARPS)[lane];
            q_hi = block_q(i + WARPS)[lane + 32];
        }
        const float center = a.mean ? tbq_query_center(lo, hi, a.mean + head * D + 64 * b, lane) * q_factor : 0.0f;
        tbq_rotate_warp(lo, hi, lane);
        const uint32_t bits    = __reduce_max_sync(TBQ_WARP_ALL, max(tbq_query_bits(lo), tbq_query_bits(hi)));
        const float    inverse = tbq_query_inverse(bits);
        const float    scale   = tbq_query_scale(bits, q_factor);
        *(char2 *) to =
            make_char2((signed char) __float2int_rn(lo * inverse), (signed char) __float2int_rn(hi * inverse));
        if (lane == 0) {
            q_scale[head][c][b]  = scale;
            q_center[head][c][b] = center;
        }
    }
    __syncthreads();

    // Where the sums of keys start: a float, and as two bfloat16 12582912 = 192 . 2^16 each, for the sums of weights.
    constexpr uint32_t FLOAT_ZERO = 0x4B404B40;
    uint32_t           qb[NG][NB][2][2];
    float              dq[NG][2][NB], zero[NG][2][NB];
    float              slope[NG][2];
    float              m[NG][2], l[NG][2], limit[NG][2];
    float              acc[NG][NB][4][4];
    float              biases[NG][NB][4];
    uint32_t           start[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int x = FLOAT_ZERO;
        tbq_keep(x);
        start[i] = x;
    }
#pragma unroll
    for (int n = 0; n < NG; n++) {
#pragma unroll
        for (int i = 0; i < NB * 4; i++) {
            const int b = i / 4, half = i / 2 % 2, r = i % 2;
            qb[n][b][half][r] =
                *(const uint32_t *) (q8 + (head * NC + 8 * n + g) * D + 64 * b + 8 * (t + 4 * half) + 4 * r);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int c = 8 * n + 2 * t + j;
#pragma unroll
            for (int b = 0; b < NB; b++) {
                dq[n][j][b]   = q_scale[head][c][b];
                zero[n][j][b] = -__uint_as_float(FLOAT_ZERO) * dq[n][j][b];
            }
            slope[n][j] =
                tbq_alibi_slope(a.max_bias, head_of(head, min(first_col + c, n_columns - 1)), a.n_head) * TBQ_LOG2E;
            m[n][j]     = -1e30f; // finite, so that a slice without a visible token takes exp2(-inf) = 0
            limit[n][j] = -1e30f;
            l[n][j]     = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < NB * 16; i++) {
            acc[n][i / 16][i / 4 % 4][i % 4] = 0.0f;
        }
    }

    // Integer sums of block b to logits; d: the key's scale
    auto add_logits = [&](float (&s)[NG][4], const int (&c)[NG][4], int b, int tok, float d) {
#pragma unroll
        for (int i = 0; i < 2 * NG; i++) {
            const int   n = i / 2, j = i % 2;
            const float x = fmaf(__int_as_float(c[n][2 * tok + j]), dq[n][j][b], zero[n][j][b]);
            float &     y = s[n][2 * tok + j];
            y             = b == 0 ? x * d : fmaf(x, d, y);
        }
    };

    // q.c of a column, in units of logits
    auto center_of = [&](int head_kv, int c) -> float {
        float sum = 0.0f;
#pragma unroll
        for (int b = 0; b < NB; b++) {
            sum += q_center[head_kv][c][b];
        }
        return sum;
    };

    // Logits of a slice (s[n][2 tok + j]: query 8 n + 2 t + j, row 8 tok + g of the tile) to weights.
    using logits   = float[NG][4];
    using scales   = float[NB][2];
    using operands = uint32_t[NB][NG][2];
    auto softmax   = [&](bool packed, logits & s, const masks & mask, bool masked) {
        if (a.logit_softcap != 0.0f) {
#pragma unroll
            for (int i = 0; i < 4 * NG; i++) {
                float & x = s[i / 4][i % 4];
                x         = tbq_tanh(x + center_of(head, 8 * (i / 4) + 2 * t + i % 2)) * (a.logit_softcap * TBQ_LOG2E);
            }
        }
        if (masked) {
#pragma unroll
            for (int i = 0; i < 4 * NG; i++) {
                const int      n = i / 4, j = i % 2, tok = i / 2 % 2;
                const uint32_t h = mask[n][j][tok];
                float &        x = s[n][i % 4];
                // selected, not added: a hidden key may be anything, NaN too
                x = h == 0xFC00 ? -INFINITY : fmaf(__half2float(__ushort_as_half((uint16_t) h)), slope[n][j], x);
            }
        }

        // The maximum follows only when it is out by 2^8.
        auto top_of = [&](int n, int j) -> float { return fmaxf(s[n][j], s[n][2 + j]); };
        bool grown  = false;
#pragma unroll
        for (int i = 0; i < 2 * NG; i++) {
            const float most = D < 256 && ONE ? limit[i / 2][i % 2] : m[i / 2][i % 2] + 8.0f; // a register less
            grown |= top_of(i / 2, i % 2) > most;
        }
        if (__any_sync(TBQ_WARP_ALL, grown)) {
#pragma unroll
            for (int i = 0; i < 2 * NG; i++) {
                const int n = i / 2, j = i % 2;
                float     top = top_of(n, j);
#pragma unroll
                for (int x = 4; x < 32; x *= 2) {
                    top = fmaxf(top, __shfl_xor_sync(TBQ_WARP_ALL, top, x));
                }
                top           = fmaxf(top, m[n][j]);
                const float f = tbq_exp2(m[n][j] - top);
                m[n][j]       = top;
                limit[n][j]   = top + 8.0f;
                l[n][j] *= f;
#pragma unroll
                for (int k = 0; k < NB * 4; k++) {
                    acc[n][k / 4][k % 4][j] *= f;
                    acc[n][k / 4][k % 4][2 + j] *= f;
                }
#pragma unroll
                for (int b = 0; BIASED && packed && b < NB; b++) {
                    biases[n][b][j] *= f;
                    biases[n][b][2 + j] *= f;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4 * NG; i++) {
            float & x = s[i / 4][i % 4];
            x         = tbq_exp2(x - m[i / 4][i % 2]);
            l[i / 4][i % 2] += x;
        }
    };

    // Weights times the scales of values; d_sum: the sum of these.
    auto weigh = [&](const logits & p, const scales & d_v, float d_sum, operands & pb) {
        // A hidden value may be NaN as well, and 0 . NaN is not 0.
        const bool any_nan = __any_sync(TBQ_WARP_ALL, !(fabsf(d_sum) <= FLT_MAX));
#pragma unroll
        for (int i = 0; i < 2 * NG * NB; i++) {
            const int b = i / (2 * NG), n = i / 2 % NG, tok = i % 2;
            pb[b][n][tok] = tbq_pack_bf16(p[n][2 * tok] * d_v[b][tok], p[n][2 * tok + 1] * d_v[b][tok]);
        }
        if (any_nan) {
#pragma unroll
            for (int i = 0; i < 2 * NG * NB; i++) {
                const int b = i / (2 * NG), n = i / 2 % NG, tok = i % 2;
                pb[b][n][tok] &=
                    (p[n][2 * tok] == 0.0f ? 0u : 0xFFFFu) | (p[n][2 * tok + 1] == 0.0f ? 0u : 0xFFFF0000u);
            }
        }
    };

    // Weights as operand B.
    auto transpose = [&](uint32_t (&pb)[NG][2]) {
#pragma unroll
        for (int i = 0; i < 2 * NG; i++) {
            pb[i / 2][i % 2] = tbq_transpose(pb[i / 2][i % 2]);
        }
    };

#pragma unroll 1
    for (int slice = exact_first; slice < n_exact_slices; slice += exact_step) {
        masks mask;
        bool  seen = false;
#pragma unroll
        for (int i = 0; i < 4 * NG; i++) {
            const uint32_t h              = exact_mask[i / 4][i / 2 % 2][i % 2];
            mask[i / 4][i / 2 % 2][i % 2] = h;
            seen |= h != 0xFC00;
        }
        load_exact_masks();
        load_cells(slice + 2 * exact_step);
        if (!__any_sync(TBQ_WARP_ALL, seen)) {
            continue; // hidden from all columns, as those of other sequences
        }
        if (lane == 0 && head == 0 && slice + exact_step < n_exact_slices) {
            prefetch_exact(slice + exact_step);
        }

        // rows past the last are hidden
        const int          last   = a.n_exact - 1 - slice * SLICE;
        const char * const keys   = exact_k + head * a.exact_k_nb2 + slice * SLICE * a.exact_k_nb1;
        const char * const values = exact_v + head * a.exact_v_nb2 + slice * SLICE * a.exact_v_nb1;
        auto key_of   = [&](int row, int b) { return keys + (min(row, last) * (int) a.exact_k_nb1 + EXACT * b); };
        auto value_of = [&](int row, int b) { return values + (min(row, last) * (int) a.exact_v_nb1 + EXACT * b); };

        logits s;
#pragma unroll
        for (int b = 0; b < NB; b++) {
            int c[NG][4];
#pragma unroll
            for (int x = 0; x < 4 * NG; x++) {
                c[x / 4][x % 4] = start[x % 4];
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t x[4];
#pragma unroll
                for (int tok = 0; tok < 2; tok++) {
                    const uint32_t * qs = (const uint32_t *) (key_of(g + 8 * tok, b) + TBQ8_QS_OFFSET) + t + 4 * half;
                    tbq_exact_levels(qs[0], qs[8], x[tok], x[2 + tok]);
                }
#pragma unroll
                for (int n = 0; n < NG; n++) {
                    tbq_mma_s8_s8_add(c[n], x, qb[n][b][half][0], qb[n][b][half][1]);
                }
            }
#pragma unroll
            for (int tok = 0; tok < 2; tok++) {
                add_logits(s, c, b, tok, *(const float *) key_of(g + 8 * tok, b));
            }
        }
        softmax(false, s, mask, true);

        scales d_v;
        float  d_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * NB; i++) {
            d_v[i / 2][i % 2] = *(const float *) value_of(g + i % 2 * 8, i / 2);
            d_sum += d_v[i / 2][i % 2];
        }
        operands pb;
        weigh(s, d_v, d_sum, pb);
#pragma unroll
        for (int b = 0; b < NB; b++) {
            transpose(pb[b]);
            uint32_t word[2][4]; // of rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const char * const qs = value_of(2 * t + i % 2 + i / 2 % 2 * 8, b) + TBQ8_QS_OFFSET;
                word[i / 4][i % 4]    = *(const uint32_t *) (qs + 32 * (i / 4) + 4 * g);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) { // tile i: channels 4g + i and 4g + 32 + i, as of packed values
                uint32_t va[4];
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    va[r] = tbq_bf16_pair(word[r % 2][r / 2 * 2], word[r % 2][r / 2 * 2 + 1], i);
                }
#pragma unroll
                for (int n = 0; n < NG; n++) {
                    tbq_mma_bf16(acc[n][b][i], va, pb[b][n][0], pb[b][n][1]);
                }
            }
        }
    }

    // What only packed rows need.
#pragma unroll
    for (int i = 0; i < NG * NB * 4; i++) {
        biases[i / (NB * 4)][i / 4 % NB][i % 4] = 0.0f;
    }
    const uint32_t exponents = hidden[0][t], one = hidden[1][t];
    const uint32_t kt0 = hidden[2][t], kt1 = hidden[3][t], kt2 = hidden[4][t], kt3 = hidden[5][t];
    const uint32_t vt0 = hidden[6][t], vt1 = hidden[7][t], vt2 = hidden[8][t], vt3 = hidden[9][t];
    // Where rows of the cache are 8 banks apart modulo 32, tokens are permuted (BANKS above).  own: the token, of 8,
    // that is row g of a tile.
    constexpr bool SPREAD = side_v::ROW % 128 == 32;
    const int      own    = SPREAD ? g % 2 * 4 + g / 2 : g;
    int            k_at   = (part * SLICE + own) * side_k::ROW + head * side_k::HEAD; // of row g of A
    int            v_d    = shape::AT_V + (part * SLICE + own) * side_v::ROW + head * side_v::HEAD;
    int            v_at   = shape::AT_V + (part * SLICE + (SPREAD ? t : 2 * t)) * side_v::ROW + head * side_v::HEAD;
    // rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of a tile
    auto v_token = [](int j) constexpr -> int { return (j / 2 * 8 + j % 2 * (SPREAD ? 4 : 1)) * side_v::ROW; };
    int  mask_at[NG][2];
#pragma unroll
    for (int i = 0; i < 2 * NG; i++) {
        const int row = ONE ? 0 : token_of(min(first_col + i / 2 * 8 + 2 * t + i % 2, n_columns - 1)) - first_row;
        mask_at[i / 2][i % 2] = shape::AT_M + (row * TOKENS + part * SLICE + own) * 2;
        tbq_keep(mask_at[i / 2][i % 2]);
    }
    int listed_at = shape::AT_L + part * SLICE / 8;
    tbq_keep(listed_at);
    int k_words = k_at + (BITS_K == 4 ? 4 * t : 0); // words of a lane
    v_at += BITS_V == 4 ? 4 * g : 0;
    int end_of_loop = end_token, next_fill = warp + shape::LAG, all_stages = n_stages;
    tbq_keep(k_at), tbq_keep(v_d), tbq_keep(v_at), tbq_keep(k_words);
    tbq_keep(end_of_loop), tbq_keep(next_fill), tbq_keep(all_stages);

    // Masks of a stage, and whether there are any (masked).  False: every token is hidden from all columns.
    auto load_masks = [&](int stage, int token, masks & mask, bool & masked) -> bool {
        // Masks as halves: of rows g and g + 8 of the tile, of columns 2t, 2t + 1.
        uint32_t some = 0;
#pragma unroll
        for (int i = 0; i < 4 * NG; i++) {
            const int n = i / 4, j = i / 2 % 2, tok = i % 2;
            if (ONE && (n > 0 || j > 0)) {
                mask[n][j][tok] = mask[0][0][tok];
                continue;
            }
            mask[n][j][tok] = a.mask ? *(const uint16_t *) (shared + stage + mask_at[n][j] + 16 * tok) : 0;
            some |= mask[n][j][tok];
        }
        // The list has a row's bit: another row stands for it.
        const char * const map    = shared + stage + listed_at + (TOKENS < 32 ? token / 8 & 2 : 0);
        const uint32_t     listed = *(const uint16_t *) map;
        masked                    = __any_sync(TBQ_WARP_ALL, (some | listed) != 0) || token + SLICE > a.n_kv;
        if (masked) {
            bool seen = false;
#pragma unroll
            for (int i = 0; i < 4 * NG; i++) {
                const int  row = own + 8 * (i % 2);
                uint32_t & h   = mask[i / 4][i / 2 % 2][i % 2];
                h              = token + row >= a.n_kv || listed >> row & 1 ? 0xFC00 : h;
                seen |= h != 0xFC00;
            }
            return __any_sync(TBQ_WARP_ALL, seen);
        }
        return true;
    };

    // Of block b of 64 channels.
    auto logits_of = [&](auto index, int stage, logits & s) {
        constexpr int b = decltype(index)::value;
        int           c[NG][4];
#pragma unroll
        for (int i = 0; i < 4 * NG; i++) {
            c[i / 4][i % 4] = start[i % 4];
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t lo[2], hi[2];
#pragma unroll
            for (int tok = 0; tok < 2; tok++) {
                const int row = 8 * tok * side_k::ROW;
                if constexpr (BITS_K == 4) {
                    tbq_rows_nibbles<D, BITS_K, b>(shared + stage + k_words + row, 4 * half, lo[tok], hi[tok]);
                } else {
                    using reader           = tbq_cache_reader<D, BITS_K>;
                    const char * const key = shared + stage + k_at + row;
                    const uint32_t     qs  = reader::word(key + 4 * t, b, TBQ_QS_OFFSET);
                    const uint32_t     qh  = BITS_K == 3 ? reader::word(key + 4 * (t % 2), b, TBQ_QH_OFFSET) : 0;
                    lo[tok]                = tbq_nibbles<BITS_K>(qs, qh, t + 4 * half);
                    hi[tok]                = tbq_high(lo[tok]);
                }
            }
            const uint32_t x0[4] = { tbq_prmt(kt0, kt1, lo[0]), tbq_prmt(kt0, kt1, lo[1]), tbq_prmt(kt0, kt1, hi[0]),
                                     tbq_prmt(kt0, kt1, hi[1]) };
#pragma unroll
            for (int n = 0; n < NG; n++) {
                tbq_mma_s8_s8_add(c[n], x0, qb[n][b][half][0], qb[n][b][half][1]);
            }
            if constexpr (BITS_K == 4) {
                const uint32_t other[2] = { lo[0] ^ 0x88888888u, lo[1] ^ 0x88888888u };
                uint32_t       other_hi[2];
#pragma unroll
                for (int tok = 0; tok < 2; tok++) {
                    other_hi[tok] = D == 64 || b % 2 == 0 ? hi[tok] ^ 0x88888888u : tbq_high(other[tok]);
                }
                const uint32_t x1[4] = { tbq_prmt(kt2, kt3, other[0]), tbq_prmt(kt2, kt3, other[1]),
                                         tbq_prmt(kt2, kt3, other_hi[0]), tbq_prmt(kt2, kt3, other_hi[1]) };
#pragma unroll
                for (int n = 0; n < NG; n++) {
                    tbq_mma_s8_s8_add(c[n], x1, qb[n][b][half][0], qb[n][b][half][1]);
                }
            }
        }
#pragma unroll
        for (int tok = 0; tok < 2; tok++) {
            const char * const key = shared + stage + k_at + 8 * tok * side_k::ROW + b * side_k::BYTES;
            add_logits(s, c, b, tok, __half2float(*(const __half *) key));
        }
    };

    auto weights_of = [&](int stage, const logits & s, operands & pb) {
        scales d_v;
        float  d_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * NB; i++) {
            const int b = i / 2, tok = i % 2;
            d_v[b][tok] =
                __half2float(*(const __half *) (shared + stage + v_d + 8 * tok * side_v::ROW + b * side_v::BYTES));
            d_sum += d_v[b][tok];
        }
        weigh(s, d_v, d_sum, pb);
    };

    auto add_values = [&](auto index, int stage, operands & pb) {
        constexpr int b = decltype(index)::value;
        transpose(pb[b]);
        if constexpr (BIASED) {
#pragma unroll
            for (int n = 0; n < NG; n++) {
                tbq_mma_bf16(biases[n][b], start, pb[b][n][0], pb[b][n][1]);
            }
        }
        uint32_t va[4][4]; // tile i: channels 4g + i (registers 0, 2) and 4g + 32 + i (1, 3)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t           x[2]; // as in tbq-attention.cuh
            const char * const row[2] = { shared + stage + v_at + v_token(2 * pair),
                                          shared + stage + v_at + v_token(2 * pair + 1) };
            if constexpr (BITS_V == 4 && (D == 64 || b % 2 == 0)) {
                const char * const qs0 = row[0] + b * side_v::BYTES + TBQ_QS_OFFSET;
                const char * const qs1 = row[1] + b * side_v::BYTES + TBQ_QS_OFFSET;
                x[0]                   = tbq_prmt(*(const uint16_t *) qs0, *(const uint16_t *) qs1, 0x5140);
                x[1]                   = tbq_prmt(*(const uint16_t *) (qs0 + 2), *(const uint16_t *) (qs1 + 2), 0x5140);
            } else {
                using reader = tbq_cache_reader<D, BITS_V>;
                uint32_t word[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const uint32_t qh = BITS_V == 3 ? reader::word(row[j] + reader::qh_at(g), b, TBQ_QH_OFFSET) : 0;
                    word[j]           = tbq_nibbles<BITS_V>(
                        reader::word(row[j] + (BITS_V == 4 ? 0 : reader::qs_at(g)), b, TBQ_QS_OFFSET), qh, g);
                }
                x[0] = tbq_prmt(word[0], word[1], 0x5140);
                x[1] = tbq_prmt(word[0], word[1], 0x7362);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t lv[2] = { tbq_prmt(vt0, vt1, x[h]), tbq_prmt(vt0, vt1, tbq_high(x[h])) };
                if constexpr (BITS_V == 4) {
                    const uint32_t other = x[h] ^ 0x88888888u;
                    lv[0]                = tbq_either(lv[0], tbq_prmt(vt2, vt3, other), one);
                    lv[1]                = tbq_either(lv[1], tbq_prmt(vt2, vt3, tbq_high(other)), one);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t x0 = (lv[i] & 0x00FF00FFu) | exponents;
                    const uint32_t x1 = tbq_prmt(lv[i], exponents, 0x5351);

                    va[2 * h + i][2 * pair + 0] = BIASED ? x0 : tbq_bf16_levels(x0);
                    va[2 * h + i][2 * pair + 1] = BIASED ? x1 : tbq_bf16_levels(x1);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4 * NG; i++) {
            tbq_mma_bf16(acc[i / 4][b][i % 4], va[i % 4], pb[b][i / 4][0], pb[b][i / 4][1]);
        }
    };

    int      stage   = 0; // where it begins
    uint32_t barrier = full;
    uint32_t parity  = 0;
    int      token   = first_token + part * SLICE;
#pragma unroll 1
    for (int i_stage = 0, at = 0; i_stage < all_stages; i_stage++) {
        if (i_stage == next_fill) { // the warps in turn
            const int used = i_stage - shape::LAG;
            const int slot = at >= shape::LAG ? at - shape::LAG : at - shape::LAG + STAGES;
            next_fill += WARPS;
            if (lane == 0 && used + STAGES < n_stages) {
                tbq_mbarrier_wait(empty + 8 * slot, at >= shape::LAG ? parity : parity ^ 1);
                fill(used + STAGES, slot);
            }
            __syncwarp();
        }
        tbq_mbarrier_wait(barrier, parity);
        masks mask;
        bool  masked = false;
        if (token < end_of_loop && load_masks(stage, token, mask, masked)) {
            logits   s;
            operands pb;
            tbq_rows_blocks<NB>([&](auto b) { logits_of(b, stage, s); });
            softmax(true, s, mask, masked);
            weights_of(stage, s, pb);
            tbq_rows_blocks<NB>([&](auto b) { add_values(b, stage, pb); });
        }
        __syncwarp();
        if (lane == 0) {
            tbq_mbarrier_arrive(barrier + 8 * STAGES);
        }
        token += TOKENS;
        stage += shape::STAGE;
        barrier += 8;
        if (++at == STAGES) {
            at      = 0;
            stage   = 0;
            barrier = full;
            parity ^= 1;
        }
    }

    // One result of the warps of a head.
#pragma unroll
    for (int i = 0; i < 2 * NG; i++) {
        const int n = i / 2, j = i % 2;
#pragma unroll
        for (int x = 4; x < 32; x *= 2) {
            l[n][j] += __shfl_xor_sync(TBQ_WARP_ALL, l[n][j], x);
        }
        if (g == 0) {
            max_of[warp][8 * n + 2 * t + j] = m[n][j];
            sum_of[warp][8 * n + 2 * t + j] = l[n][j];
        }
    }
    __syncthreads(); // the ring is free now
    constexpr int ROW  = tbq_attention_row(D);
    float * const sums = (float *) shared + warp * NC * ROW;
#pragma unroll
    for (int n = 0; n < NG; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < NB * 2; i++) {
                const float (&x)[4][4] = acc[n][i / 2];
                const int   r          = i % 2 * 2 + j;
                const float bias       = BIASED ? biases[n][i / 2][j] * 0x1p-16f : 0.0f;
                *(float4 *) (sums + (8 * n + 2 * t + j) * ROW + i / 2 * 64 + i % 2 * 32 + 4 * g) =
                    make_float4(x[0][r] - bias, x[1][r] - bias, x[2][r] - bias, x[3][r] - bias);
            }
        }
    }
    __syncthreads();

    // Each row by a warp.  Lane x has what part x has to be multiplied with.
    float * const here = (float *) shared + (WARPS * NC + warp) * ROW;
#pragma unroll 1
    for (int i = warp; i < n_cols * H; i += WARPS) {
        const int head_kv = i % H;
        const int c       = i / H;
        float     top = -1e30f, sum_here = 0.0f;
        if (lane < PARTS) {
            top      = max_of[lane * H + head_kv][c];
            sum_here = sum_of[lane * H + head_kv][c];
        }
        float row_max = top;
#pragma unroll
        for (int x = 1; x < 32; x *= 2) {
            row_max = fmaxf(row_max, __shfl_xor_sync(TBQ_WARP_ALL, row_max, x));
        }
        const float factor  = tbq_exp2(top - row_max);
        float       row_sum = sum_here * factor;
#pragma unroll
        for (int x = 1; x < 32; x *= 2) {
            row_sum += __shfl_xor_sync(TBQ_WARP_ALL, row_sum, x);
        }
        const int       col  = first_col + c;
        const int       head = head_of(head_kv, col);
        const long long row  = ((long long) seq * a.n_q + token_of(col)) * a.n_head + head;
        const long long at   = row * a.n_split + blockIdx.x;
        row_max += a.logit_softcap == 0.0f ? center_of(head_kv, c) : 0.0f;
        float4 sum[D / 128 + (D < 128)];
#pragma unroll
        for (float4 & y : sum) {
            y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll 4
        for (int x = 0; x < PARTS; x++) {
            const float f = __shfl_sync(TBQ_WARP_ALL, factor, x);
#pragma unroll
            for (int e = 0; e < D; e += 128) {
                if (D < 128 && lane >= D / 4) {
                    break;
                }
                const float * p = (const float *) shared + ((x * H + head_kv) * NC + c) * ROW + e + 4 * lane;
                const float4  y = *(const float4 *) p;
                float4 &      z = sum[e / 128];
                z               = make_float4(z.x + y.x * f, z.y + y.y * f, z.z + y.z * f, z.w + y.w * f);
            }
        }
#pragma unroll
        for (int e = 0; e < D; e += 128) {
            if (D < 128 && lane >= D / 4) {
                break;
            }
            // sums of all rows and splits, then maxima and sums of weights
            *(float4 *) ((a.n_split == 1 ? here : a.partial + at * D) + e + 4 * lane) = sum[e / 128];
        }
        if (a.n_split == 1) {
            __syncwarp();
#pragma unroll 1
            for (int b = 0; b < NB; b++) {
                tbq_attention_store<true>(a.dst + row * D, here, row_max, row_sum, a.sinks ? a.sinks + head : nullptr,
                                          a.mean_of_values ? a.mean + head_kv * D : nullptr, b, lane);
            }
            __syncwarp();
        } else if (lane == 0) {
            float2 * const ml = (float2 *) (a.partial + (long long) a.n_seq * a.n_q * a.n_head * a.n_split * D);
            ml[at]            = make_float2(row_max, row_sum);
        }
    }
#else
    __trap();
#endif
}

// Merges the splits of a row.  grid: (rows); block: 512
#define TBQ_ROWS_COMBINE 512
template <int D> __global__ void __launch_bounds__(TBQ_ROWS_COMBINE, 1)
    tbq_attention_rows_combine(const tbq_attention_args a) {
    constexpr int   LANES  = D / 4; // of a split
    constexpr int   GROUPS = TBQ_ROWS_COMBINE / LANES;
    const int       lane   = threadIdx.x % 32;
    const int       warp   = threadIdx.x / 32;
    const int       at     = threadIdx.x % LANES;
    const int       group  = threadIdx.x / LANES;
    const long long row    = blockIdx.x;
    __shared__ __align__(16) float sums[GROUPS][D];
    __shared__ float               sum_of[GROUPS], max_of[GROUPS];
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    const float4 * const splits = (const float4 *) a.partial + row * a.n_split * LANES;
    const float2 * const ml =
        (const float2 *) (a.partial + (long long) a.n_seq * a.n_q * a.n_head * a.n_split * D) + row * a.n_split;

    // As many splits at once as a multiprocessor has, so that there is one trip to memory.
    constexpr int AT_ONCE = 9 * (D > 128 ? 2 : 1);
    float         m = -1e30f, l = 0.0f;
    float4        sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int first = group; first < a.n_split; first += AT_ONCE * GROUPS) {
        float2 x[AT_ONCE];
        float4 y[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int  i    = first + u * GROUPS;
            const bool some = i < a.n_split;
            x[u]            = some ? ml[i] : make_float2(-1e30f, 0.0f);
            y[u]            = some ? splits[i * LANES + at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        float top = m;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            top = fmaxf(top, x[u].x);
        }
        const float f = tbq_exp2(m - top);
        m             = top;
        l *= f;
        sum = make_float4(sum.x * f, sum.y * f, sum.z * f, sum.w * f);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const float w = tbq_exp2(x[u].x - top);
            l += x[u].y * w;
            sum = make_float4(sum.x + y[u].x * w, sum.y + y[u].y * w, sum.z + y[u].z * w, sum.w + y[u].w * w);
        }
    }
    *(float4 *) &sums[group][4 * at] = sum;
    if (at == 0) {
        max_of[group] = m;
        sum_of[group] = l;
    }
    __syncthreads();
    if (warp >= D / 64) {
        return;
    }
    // block `warp` of the row, in the order of tbq_attention_store
    float row_max = -1e30f, row_sum = 0.0f, lo = 0.0f, hi = 0.0f;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        row_max = fmaxf(row_max, max_of[i]);
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const float w = tbq_exp2(max_of[i] - row_max);
        row_sum += sum_of[i] * w;
        lo += sums[i][64 * warp + lane] * w;
        hi += sums[i][64 * warp + lane + 32] * w;
    }
    sums[0][64 * warp + lane]      = lo; // only this lane reads it
    sums[0][64 * warp + lane + 32] = hi;
    const int head                 = blockIdx.x % a.n_head; // of 32 bits: no call
    tbq_attention_store<true>(a.dst + row * D, sums[0], row_max, row_sum, a.sinks ? a.sinks + head : nullptr,
                              a.mean_of_values ? a.mean + head / a.gqa * D : nullptr, warp, lane);
}

#endif // __CUDACC__
