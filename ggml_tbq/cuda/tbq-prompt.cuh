// SPDX-License-Identifier: MIT
// Attention of many query rows to packed keys and values: GGML_OP_FLASH_ATTN_EXT of prompts, on sm_90a.
//
// A row of queries is a query head times a token, 64 for each of two warpgroups that multiply (wgmma).  One more
// warpgroup copies packed rows (cp.async) and unpacks each once for all rows of the CTA, to tiles in shared memory:
// halves that are the product of a level and the scale of the block, rounded once.  Everything is computed in the
// rotated domain: queries are rotated when they are loaded, the output when it is written.  The types of K and V are
// looked up once for a tile, so one kernel serves all pairs of a head size.
//
// THE ORDER OF CHANNELS.  The eight values of nibble word w of a block (tbq-block.cuh) become 16 neighboring bytes of a
// tile: channel c < 32 of the block is half 2 c, and channel c + 32 half 2 c + 1.  For keys the order of a contraction
// is free, so queries are stored in the same order.  For values this is the order of the sums' columns.
//
// THE MASK is read once before, by a kernel that notes of every tile of 64 rows and the tokens of a tile whether it is
// hidden, mixed or visible without a bias.  A tile hidden from the whole CTA is skipped; only mixed ones read the mask.
//
// THE MAXIMUM of a row follows only when it is off by 2^6 (weights are at most 2^12, and halves).
//
// EXACT ROWS (tbq-attention.cuh) are written over the packed rows of their cells when a tile has been unpacked.  A
// kernel turns the list around first: the slot of each cell that is in it.
//
// CENTERED KEYS, sinks, the soft-cap and ALiBi are as in tbq-attention.cuh; so is what merges the splits of a cache, where
// there are fewer rows than multiprocessors.
//
// The only kernels of this project that are not compiled for every architecture: elsewhere they are empty, and
// tbq_prompt_compiled() (tbq-prompt.cu) says so.
#pragma once

#include "tbq-prompt-launch.cuh"
#include "tbq-wgmma.cuh"

#define TBQ_PROMPT_BIAS 6.0f  // the stored maximum is this much below the true one, in powers of two
#define TBQ_PROMPT_LAG  12.0f // and follows when a logit is this much above it

// What is launched: warpgroups that unpack, registers of a thread that multiplies and of one that unpacks.
#define TBQ_PROMPT_LAUNCH 1, 216, 72

enum { TBQ_PROMPT_HIDDEN, TBQ_PROMPT_MIXED, TBQ_PROMPT_VISIBLE };

// --- before the kernel -----------------------------------------------------------------------------------------------

// A warp for each tile.  grid: (tiles / 4, row tiles, sequences of the mask), 128 threads
template <int D> __global__ void __launch_bounds__(128) tbq_prompt_map(const __grid_constant__ tbq_prompt_args a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int EACH = tbq_prompt_keys(D) / 32;
    const int     lane = threadIdx.x % 32;
    const int     tile = blockIdx.x * 4 + threadIdx.x / 32;
    const int     key  = (tile * 32 + lane) * EACH;
    const int     row  = blockIdx.y * TBQ_PROMPT_ROWS;
    if (tile >= a.n_tiles) {
        return;
    }
    const int last    = min((row + TBQ_PROMPT_ROWS - 1) / a.gqa, a.n_q - 1);
    bool      visible = false, biased = false;
    for (int token = row / a.gqa; token <= last; token++) {
        const half * from = (const half *) (a.mask + token * a.mask_nb1 + blockIdx.z * a.mask_nb3);
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const float x = key + e < a.n_kv ? __half2float(from[key + e]) : -INFINITY;
            visible |= x != -INFINITY;
            biased |= x != 0.0f;
        }
    }
    visible = __any_sync(TBQ_WARP_ALL, visible);
    biased  = __any_sync(TBQ_WARP_ALL, biased);
    if (lane == 0) {
        a.map[((long long) blockIdx.z * a.n_row_tiles + blockIdx.y) * a.n_tiles + tile] = !visible ? TBQ_PROMPT_HIDDEN
                                                                                          : biased ? TBQ_PROMPT_MIXED
                                                                                                   : TBQ_PROMPT_VISIBLE;
    }
#endif
}

// grid: (slots / 256, sequences of the cache), 256 threads
static __global__ void __launch_bounds__(256) tbq_prompt_slots(const __grid_constant__ tbq_prompt_args a) {
    const int j    = blockIdx.x * 256 + threadIdx.x;
    const int cell = j < a.n_exact ? a.cells[(long long) blockIdx.y * (a.n_exact + (a.n_kv + 31) / 32) + j] : -1;
    if (cell >= 0 && cell < a.n_kv) {
        a.slots[(long long) blockIdx.y * a.n_kv + cell] = j;
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// --- shared memory ---------------------------------------------------------------------------------------------------

// Barriers, 8 bytes each, two of a kind.
enum { TBQ_FULL_K = 0, TBQ_FULL_V = 16, TBQ_EMPTY_K = 32, TBQ_EMPTY_V = 48 };

// Words: the tables of levels, 4 for each type; the exponent of 1024 four times; 0; the number of tiles of this CTA.
enum { TBQ_PROMPT_EXPONENT = 12, TBQ_PROMPT_ZERO, TBQ_PROMPT_N_TILES, TBQ_PROMPT_N_WORDS };

// A CTA: what it does, and its shared memory.
template <int D> struct tbq_prompt_cta {
    static constexpr int KEYS    = tbq_prompt_keys(D);
    static constexpr int TILE    = tbq_prompt_tile_bytes(D); // the two tiles of keys, then those of values
    static constexpr int QUERIES = tbq_prompt_queries(D);
    static constexpr int PIECE   = tbq_prompt_piece(D);
    static constexpr int PITCH   = tbq_prompt_pitch(D);
    static constexpr int AHEAD   = tbq_prompt_ahead(D);
    static constexpr int PACKED  = 128 * PITCH; // of keys or values; first those of keys

    char *     queries;
    char *     tiles;
    char *     packed;
    uint32_t   barriers;
    uint32_t * words;
    uint16_t *
        list; // of the tiles that some row sees.  Bits 14, 15: the warpgroup needs the mask, or the end of the cache

    int head_kv, seq, seq_kv, row0, split;

    __device__ __forceinline__ tbq_prompt_cta(const tbq_prompt_args & a, char * dynamic) {
        queries     = dynamic + (-tbq_smem(dynamic) & 1023); // the compiler still knows that it is shared memory
        tiles       = queries + TBQ_PROMPT_GROUPS * QUERIES;
        packed      = tiles + 4 * TILE;
        char * rest = packed + 2 * AHEAD * PACKED;
        barriers    = tbq_smem(rest);
        words       = (uint32_t *) (rest + 64);
        list        = (uint16_t *) (rest + 128);
        // neighbors share a part of the cache; those with the most tiles first
        const int i = blockIdx.x / a.n_head_kv;
        head_kv     = blockIdx.x % a.n_head_kv;
        split       = i % a.n_split;
        row0 = ((int) gridDim.x / (a.n_head_kv * a.n_split) - 1 - i / a.n_split) * TBQ_PROMPT_GROUPS * TBQ_PROMPT_ROWS;
        seq  = blockIdx.y;
        seq_kv = seq / a.kv_per_seq;
    }

    // Makes the list; all threads.  Afterwards, n tiles from `first` are those of this split.
    __device__ __forceinline__ int make_list(const tbq_prompt_args & a, int & first) const {
        const uint8_t * map =
            a.map ? a.map + ((long long) (seq % a.n_seq_mask) * a.n_row_tiles + row0 / TBQ_PROMPT_ROWS) * a.n_tiles
                  : nullptr;
        for (int t = threadIdx.x; t < a.n_tiles; t += blockDim.x) {
            const bool end  = t == a.n_tiles - 1 && a.n_kv % KEYS;
            bool       seen = false;
            uint32_t   code = 0;
#pragma unroll
            for (int i = 0; i < TBQ_PROMPT_GROUPS; i++) {
                int one = end ? TBQ_PROMPT_MIXED : TBQ_PROMPT_VISIBLE;
                if (row0 / TBQ_PROMPT_ROWS + i >= a.n_row_tiles) {
                    one = TBQ_PROMPT_HIDDEN;
                } else if (map) {
                    one = map[(long long) i * a.n_tiles + t];
                }
                seen |= one != TBQ_PROMPT_HIDDEN;
                code |= (uint32_t) (one != TBQ_PROMPT_VISIBLE) << (14 + i);
            }
            list[t] = (uint16_t) (seen ? code | 1 : 0);
        }
        __syncthreads();
        if (threadIdx.x < 32) { // in its own place: no entry moves up
            int n = 0;
            for (int t = threadIdx.x; t - threadIdx.x < a.n_tiles; t += 32) {
                const uint32_t code = t < a.n_tiles ? list[t] : 0;
                const uint32_t seen = __ballot_sync(TBQ_WARP_ALL, code != 0);
                if (code) {
                    list[n + __popc(seen & ((1u << threadIdx.x) - 1))] = (uint16_t) ((code & 0xC000) | t);
                }
                n += __popc(seen);
                __syncwarp();
            }
            if (threadIdx.x == 0) {
                words[TBQ_PROMPT_N_TILES] = n;
            }
        }
        __syncthreads();
        const int n    = words[TBQ_PROMPT_N_TILES];
        const int each = (n + a.n_split - 1) / a.n_split;
        first          = min(split * each, n);
        return min(each, n - first);
    }

    __device__ __forceinline__ int tile_of(int i) const { return list[i] & 0x3FFF; }
};

// --- unpacking -------------------------------------------------------------------------------------------------------

// 16 bytes, of which the first n come from there and the others are 0.
static __device__ __forceinline__ void tbq_prompt_copy_16(uint32_t smem, const void * global, int n) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(n) : "memory");
}

static __device__ __forceinline__ void tbq_prompt_copy_4(uint32_t smem, const void * global, int n) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(global), "r"(n) : "memory");
}

// Copies 32 pieces of neighboring rows, the first at from; as many whole pieces at a time as there are lanes for.  Rows
// from `left` on become 0.  All begin at the same place of a unit.
template <int D, int BITS>
static __device__ __forceinline__ void tbq_prompt_copy(uint32_t to, const char * from, int nb1, int left, int lane) {
    constexpr int BYTES = tbq_prompt_piece(D) * tbq_block_bytes(BITS);
    constexpr int UNITS = (BYTES + (D == 64 ? 14 : 12) + 15) / 16, ROWS = 32 / UNITS, PITCH = tbq_prompt_pitch(D);
    const int     at = lane / UNITS, c = lane % UNITS, offset = (int) ((size_t) from & 15);
    left = at < ROWS && c * 16 < offset + BYTES ? left - at : 0; // a unit without a byte of the piece is not read
    from += at * nb1 + c * 16 - offset;
    to += at * PITCH + c * 16;
#pragma unroll
    for (int i = 0; i < 32; i += ROWS) {
        if (at < (i + ROWS <= 32 ? ROWS : 32 - i)) {
            tbq_prompt_copy_16(to + i * PITCH, from, i < left ? 16 : 0);
        }
        from += ROWS * nb1;
        asm volatile("" : "+l"(from)); // else every multiple of nb1 gets a register
    }
}

// The same for any distance of rows: rare, and slower.
static __device__ __forceinline__ void tbq_prompt_copy_words(uint32_t to, const char * from, int bytes, bool here) {
    const int offset = (int) ((size_t) from & 2);
#pragma unroll 1
    for (int i = 0; i < bytes + offset; i += 4) {
        tbq_prompt_copy_4(to + i, from - offset + i, here ? 4 : 0);
    }
}

// One piece, from word O of it at `from`, to row `row` of the tile.  odd: a single block begins in the middle of that word.
template <int D, int BITS, int O>
static __device__ __forceinline__ void tbq_prompt_unpack(const char * from, char * tile, int row, bool odd,
                                                         const uint32_t (&table)[4], uint32_t exponent) {
    constexpr int PIECE = tbq_prompt_piece(D), BLOCK = tbq_block_bytes(BITS), KEYS = tbq_prompt_keys(D);
    constexpr int UNITS = (PIECE * BLOCK + (D == 64 ? 14 : 12) + 15) / 16;
    static_assert(BLOCK % 4 == 2, "the second block's indices are whole words, the first one's are not");
    uint32_t w[4 * UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
        *(uint4 *) &w[4 * i] = ((const uint4 *) from)[i];
    }
    char * const to = tile + row * 128;
#pragma unroll
    for (int b = 0; b < PIECE; b++) {
        constexpr int  second = (BLOCK - 2) / 4; // the word with the second block's scale
        const int      first  = O + b * second;
        const bool     high   = b == 1 || (PIECE == 1 && odd); // the scale is the upper half of its word
        const uint32_t d2     = tbq_prmt(w[first], w[first], high ? 0x3232 : 0x1010);
        const half2    d      = *(const half2 *) &d2;
        auto           word   = [&](int i) { // of the block, behind its scale
            return b == 1 ? w[first + 1 + i]
                          : __funnelshift_rc(w[first + i], w[first + i + 1], PIECE == 1 && odd ? 32 : 16);
        };
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t x, y;
            if constexpr (BITS == 4) {
                // a look-up takes the lower four nibbles of a word, whatever is above
                const bool     halves = b == 0 && PIECE == 2;
                const uint32_t lo     = halves ? w[first + i] >> 16 : word(i);
                const uint32_t hi     = halves ? w[first + i + 1] : lo >> 16;
                x = tbq_prmt(table[0], table[1], lo) | tbq_prmt(table[2], table[3], lo ^ 0x88888888u);
                y = tbq_prmt(table[0], table[1], hi) | tbq_prmt(table[2], table[3], hi ^ 0x88888888u);
            } else {
                const uint32_t n = tbq_nibbles<BITS>(word(i & 3), BITS == 3 ? word(4 + (i & 1)) : 0, i);
                x                = tbq_prmt(table[0], table[1], n);
                y                = tbq_prmt(table[0], table[1], n >> 16);
            }
            uint32_t r[4] = { tbq_prmt(x, exponent, 0x4140), tbq_prmt(x, exponent, 0x4342),
                              tbq_prmt(y, exponent, 0x4140), tbq_prmt(y, exponent, 0x4342) };
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const half2 level = __hsub2(*(const half2 *) &r[e], __float2half2_rn(1024.0f + 64.0f));
                const half2 value = __hmul2(level, d);
                r[e]              = *(const uint32_t *) &value;
            }
            *(uint4 *) (to + b * (KEYS * 128) + ((i ^ (row & 7)) << 4)) = make_uint4(r[0], r[1], r[2], r[3]);
        }
    }
}

// What differs between keys and values.
struct tbq_prompt_side {
    const char * rows;
    int          nb1, bits;
    const char * exact;
    long long    exact_nb1;
};

static __device__ __forceinline__ tbq_prompt_side tbq_prompt_side_of(const tbq_prompt_args & a, int side, int head_kv,
                                                                     int seq_kv) {
    tbq_prompt_side s;
    s.rows      = side ? a.v + head_kv * a.v_nb2 + seq_kv * a.v_nb3 : a.k + head_kv * a.k_nb2 + seq_kv * a.k_nb3;
    s.nb1       = (int) (side ? a.v_nb1 : a.k_nb1);
    s.bits      = side ? a.bits_v : a.bits_k;
    s.exact     = side ? a.exact_v + head_kv * a.exact_v_nb2 + seq_kv * a.exact_v_nb3
                       : a.exact_k + head_kv * a.exact_k_nb2 + seq_kv * a.exact_k_nb3;
    s.exact_nb1 = side ? a.exact_v_nb1 : a.exact_k_nb1;
    return s;
}

// Writes exact rows over rows of a tile.  listed: bit i: row i of these 32 is in the list; slot: that of row `lane`.
// from: blocks of slot 0; tile: row 0 of the 32, of the piece.
template <int D>
static __device__ __forceinline__ void tbq_prompt_exact(const char * from, long long nb1, uint32_t listed, int slot,
                                                        char * tile, int lane) {
    constexpr int KEYS = tbq_prompt_keys(D), EACH = 8; // rows whose loads are on their way at a time
    // lanes 16 b .. of block b; two of them write 16 bytes: channels c, c + 32, c + 1, c + 33
    const int b = lane / 16 % tbq_prompt_piece(D), i = lane / 2 % 8, c = 4 * i + lane % 2 * 2;
    from += b * sizeof(block_tbq8_0);
    tile += b * (KEYS * 128) + lane % 2 * 8;
    while (listed) {
        int      row[EACH];
        float    d[EACH];
        uint32_t lo[EACH], hi[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            row[e] = e == 0 || listed ? __ffs(listed) - 1 : row[e > 0 ? e - 1 : 0];
            listed &= listed - 1;
            const char * p = from + __shfl_sync(TBQ_WARP_ALL, slot, row[e]) * nb1;
            d[e]           = *(const float *) p;
            lo[e]          = *(const uint16_t *) (p + TBQ8_QS_OFFSET + c);
            hi[e]          = *(const uint16_t *) (p + TBQ8_QS_OFFSET + 32 + c);
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            auto pair = [&](int lo8, int hi8) {
                const half2 x = __floats2half2_rn(d[e] * (float) (int8_t) lo8, d[e] * (float) (int8_t) hi8);
                return *(const uint32_t *) &x;
            };
            *(uint2 *) (tile + row[e] * 128 + ((i ^ (row[e] & 7)) << 4)) =
                make_uint2(pair(lo[e] & 255, hi[e] & 255), pair(lo[e] >> 8, hi[e] >> 8));
        }
    }
}

// SIDES: bit 0: keys, bit 1: values.  Tiles first .. first + n - 1 of the list.
template <int D, int SIDES>
static __device__ __forceinline__ void tbq_prompt_producer(const tbq_prompt_args & a, const tbq_prompt_cta<D> & cta,
                                                           int first, int n) {
    using shape     = tbq_prompt_cta<D>;
    constexpr int N = SIDES == 3 ? 2 : 1;
    // A warp copies what it unpacks: 32 rows, of which head size 256 has two pieces.
    const int warp = __shfl_sync(TBQ_WARP_ALL, threadIdx.x % 128 / 32, 0), lane = threadIdx.x % 32;
    const int row0 = 32 * (warp % (shape::KEYS / 32)), piece = warp / (shape::KEYS / 32);
    // Every lane reads the same words, and the compiler must not know: it would keep some in uniform registers and copy
    // them before every use.
    const uint32_t * const own      = cta.words + (lane & cta.words[TBQ_PROMPT_ZERO]);
    const uint32_t         exponent = own[TBQ_PROMPT_EXPONENT];

    auto row_of = [&](const tbq_prompt_side & s) {
        return s.rows + row0 * s.nb1 + piece * (shape::PIECE * tbq_block_bytes(s.bits));
    };
    auto slot_at = [&](int side, int i) {
        return cta.packed + ((i % shape::AHEAD * 2 + side) * 128 + warp * 32) * shape::PITCH;
    };
    auto copy = [&](int side, int i) {
        if (i < n) {
            const tbq_prompt_side s    = tbq_prompt_side_of(a, side, cta.head_kv, cta.seq_kv);
            const int             tile = cta.tile_of(first + i);
            const char * const    from = row_of(s) + (long long) tile * shape::KEYS * s.nb1;
            const int             left = a.n_kv - tile * shape::KEYS - row0;
            const uint32_t        to   = tbq_smem(slot_at(side, i));
            if (s.nb1 % 16) {
                tbq_prompt_copy_words(to + lane * shape::PITCH, from + lane * s.nb1,
                                      shape::PIECE * tbq_block_bytes(s.bits), lane < left);
            } else if (s.bits == 4) {
                tbq_prompt_copy<D, 4>(to, from, s.nb1, left, lane);
            } else if (s.bits == 3) {
                tbq_prompt_copy<D, 3>(to, from, s.nb1, left, lane);
            } else {
                tbq_prompt_copy<D, 2>(to, from, s.nb1, left, lane);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    // Which of its rows are in the list: one ahead, because nothing else hides the load.
    const int * const cells =
        a.cells ? a.cells + (long long) cta.seq_kv * (a.n_exact + (a.n_kv + 31) / 32) + a.n_exact : nullptr;
    auto listed_of = [&](int i) -> uint32_t {
        if (!cells || i >= n) {
            return 0;
        }
        const int cell = cta.tile_of(first + i) * shape::KEYS + row0;
        return cell < a.n_kv ? cells[cell / 32] : 0;
    };
    uint32_t listed_next = listed_of(0);

#pragma unroll 1
    for (int i = 0; i < shape::AHEAD; i++) {
#pragma unroll 1
        for (int side = SIDES == 2; side < (SIDES == 1 ? 1 : 2); side++) {
            copy(side, i);
        }
    }
#pragma unroll 1
    for (int i = 0; i < n; i++) {
        const int      stage = i & 1, parity = i >> 1 & 1 ^ 1;
        const uint32_t listed = listed_next;
        listed_next           = listed_of(i + 1);
#pragma unroll 1
        for (int side = SIDES == 2; side < (SIDES == 1 ? 1 : 2); side++) {
            const tbq_prompt_side s = tbq_prompt_side_of(a, side, cta.head_kv, cta.seq_kv);
            asm volatile("cp.async.wait_group %0;" ::"n"(N * shape::AHEAD - 1) : "memory");
            __syncwarp();
            tbq_mbarrier_wait(cta.barriers + TBQ_EMPTY_K + 16 * side + 8 * stage, parity);

            char * const tile =
                cta.tiles + (2 * side + stage) * shape::TILE + piece * (2 * shape::KEYS * 128) + row0 * 128;
            if (~listed) {
                const bool         words = s.nb1 % 16;
                const char * const from  = row_of(s) + (words ? lane * s.nb1 : 0);
                const char * const at    = slot_at(side, i) + lane * shape::PITCH;
                const bool         odd   = (size_t) from & 2;
                const int          o     = words ? 0 : (int) ((size_t) from & 15) / 4;
                uint32_t           table[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    table[e] = own[4 * (s.bits - 2) + e];
                }
#define TBQ_PROMPT_CASE(BITS, O) \
    case 4 * BITS + O: tbq_prompt_unpack<D, BITS, O>(at, tile, lane, odd, table, exponent); break;
                switch (4 * s.bits + o) {
                    TBQ_PROMPT_CASE(2, 0)
                    TBQ_PROMPT_CASE(2, 1)
                    TBQ_PROMPT_CASE(2, 2)
                    TBQ_PROMPT_CASE(2, 3)
                    TBQ_PROMPT_CASE(3, 0)
                    TBQ_PROMPT_CASE(3, 1)
                    TBQ_PROMPT_CASE(3, 2)
                    TBQ_PROMPT_CASE(3, 3)
                    TBQ_PROMPT_CASE(4, 0)
                    TBQ_PROMPT_CASE(4, 1)
                    TBQ_PROMPT_CASE(4, 2)
                    TBQ_PROMPT_CASE(4, 3)
                }
#undef TBQ_PROMPT_CASE
            }
            if (listed) {
                const int cell = cta.tile_of(first + i) * shape::KEYS + row0 + lane;
                const int slot = listed >> lane & 1 ? a.slots[(long long) cta.seq_kv * a.n_kv + cell] : 0;
                __syncwarp();
                tbq_prompt_exact<D>(s.exact + piece * (2 * sizeof(block_tbq8_0)), s.exact_nb1, listed, slot, tile,
                                    lane);
            }
            tbq_fence_products();
            __syncwarp();
            if (lane == 0) {
                tbq_mbarrier_arrive(cta.barriers + TBQ_FULL_K + 16 * side + 8 * stage);
            }
            copy(side, i + shape::AHEAD);
        }
    }
}

// --- multiplying -----------------------------------------------------------------------------------------------------

// What a lane knows of its two rows, g and g + 8 of the 16 of its warp.
struct tbq_prompt_rows {
    float        max[2];    // less the bias
    float        sum[2];    // of this lane's columns
    float        fall[2];   // factor of the sums so far, where the maximum has moved
    float        center[2]; // what the logits lack: the query times the mean
    float        slope[2];  // of the mask, for logits in powers of two
    const char * mask[2];
};

static __device__ __forceinline__ uint32_t tbq_prompt_pack(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

// key: that of s[0].  END: the tile is not whole.  Selected, not added: a hidden key may be anything, NaN too.
template <bool END, int N>
static __device__ __forceinline__ void tbq_prompt_mask(float (&s)[N], const tbq_prompt_rows & x, int key, int n_kv) {
    constexpr int AT_ONCE = END ? 4 : 16; // loads, without a branch
#pragma unroll
    for (int j = 0; j < N; j += AT_ONCE) {
        half bias[AT_ONCE];
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            const int at = 2 * ((j + e) & ~3) + (e & 1);
            bias[e]      = ((const half *) x.mask[e >> 1 & 1])[END ? min(key + at, n_kv - 1) : key + at];
        }
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            const bool  here = !END || key + 2 * ((j + e) & ~3) + (e & 1) < n_kv;
            const float b    = __half2float(bias[e]);
            s[j + e]         = here && b != -INFINITY ? fmaf(b, x.slope[e >> 1 & 1], s[j + e]) : -INFINITY;
        }
        asm volatile("" ::: "memory"); // not all loads at once: their registers would spill
    }
}

// The same without a mask, behind the end of the cache.
template <int N> static __device__ __forceinline__ void tbq_prompt_end(float (&s)[N], int key, int n_kv) {
#pragma unroll
    for (int e = 0; e < N; e++) {
        s[e] = key + 2 * (e & ~3) + (e & 1) < n_kv ? s[e] : -INFINITY;
    }
}

// Logits to weights.  Returns whether sums so far must be multiplied by x.fall.
template <int N> static __device__ __forceinline__ bool tbq_prompt_softmax(float (&s)[N], tbq_prompt_rows & x) {
    float most[2] = { fmaxf(s[0], s[1]), fmaxf(s[2], s[3]) };
#pragma unroll
    for (int j = 4; j < N; j += 4) {
        most[0] = fmaxf(most[0], fmaxf(s[j], s[j + 1]));
        most[1] = fmaxf(most[1], fmaxf(s[j + 2], s[j + 3]));
    }
    const bool moved =
        __any_sync(TBQ_WARP_ALL, most[0] > x.max[0] + TBQ_PROMPT_LAG || most[1] > x.max[1] + TBQ_PROMPT_LAG);
    if (moved) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i]         = fmaxf(most[i], __shfl_xor_sync(TBQ_WARP_ALL, most[i], 1));
            most[i]         = fmaxf(most[i], __shfl_xor_sync(TBQ_WARP_ALL, most[i], 2));
            const float max = fmaxf(x.max[i], most[i] - TBQ_PROMPT_BIAS);
            x.fall[i]       = tbq_exp2(x.max[i] - max);
            x.max[i]        = max;
            x.sum[i] *= x.fall[i];
        }
    }
    float sum[2] = { 0.0f, 0.0f };
#pragma unroll
    for (int j = 0; j < N; j += 2) {
        const int i = j >> 1 & 1;
        s[j]        = tbq_exp2(s[j] - x.max[i]);
        s[j + 1]    = tbq_exp2(s[j + 1] - x.max[i]);
        sum[i] += s[j] + s[j + 1];
    }
    x.sum[0] += sum[0];
    x.sum[1] += sum[1];
    return moved;
}

template <int D>
static __device__ __forceinline__ void tbq_prompt_consumer(const tbq_prompt_args & a, const tbq_prompt_cta<D> & cta,
                                                           int group, int first, int n) {
    using shape      = tbq_prompt_cta<D>;
    constexpr int NB = D / 64, KEYS = shape::KEYS;
    const int     warp = __shfl_sync(TBQ_WARP_ALL, threadIdx.x % 128 / 32, 0), lane = threadIdx.x % 32;
    const int     g = lane / 4, t = lane % 4;
    const int     row0     = cta.row0 + group * TBQ_PROMPT_ROWS + 16 * warp; // of this warp
    const int     n_rows   = a.n_q * a.gqa;
    char * const  query    = cta.queries + group * shape::QUERIES;
    auto          token_of = [&](int row) { return row / a.gqa; };
    auto          head_of  = [&](int row) { return cta.head_kv * a.gqa + row % a.gqa; };

    tbq_prompt_rows x;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = min(row0 + g + 8 * i, n_rows - 1);
        x.max[i]      = -1e30f; // finite, so that a tile without a visible token gives exp2(-inf) = 0
        x.sum[i]      = 0.0f;
        x.fall[i]     = 1.0f;
        x.center[i]   = 0.0f;
        x.slope[i]    = tbq_alibi_slope(a.max_bias, head_of(row), a.n_head) * TBQ_LOG2E;
        x.mask[i]     = a.mask ? a.mask + token_of(row) * a.mask_nb1 + cta.seq % a.n_seq_mask * a.mask_nb3 : nullptr;
    }

    // Queries: rotated, times the scale, for powers of two or for the soft-cap.
    const float factor = a.logit_softcap == 0.0f ? a.scale * TBQ_LOG2E : a.scale / a.logit_softcap;
#pragma unroll 4
    for (int i = 0; i < 16; i++) {
        const int     row = min(row0 + i, n_rows - 1);
        const float * from =
            (const float *) (a.q + token_of(row) * a.q_nb1 + head_of(row) * a.q_nb2 + cta.seq * a.q_nb3);
        float center = 0.0f;
#pragma unroll
        for (int b = 0; b < NB; b++) {
            float lo = from[64 * b + lane] * factor, hi = from[64 * b + lane + 32] * factor;
            if (a.mean) {
                const float * mean = a.mean + cta.head_kv * D + 64 * b;
                center += lo * mean[lane] + hi * mean[lane + 32];
            }
            tbq_rotate_warp(lo, hi, lane);
            *(uint32_t *) (query + b * (TBQ_PROMPT_ROWS * 128) + tbq_swizzle(16 * warp + i, lane / 4) + t * 4) =
                tbq_prompt_pack(lo, hi);
        }
        if (a.mean) {
#pragma unroll
            for (int m = 16; m > 0; m /= 2) {
                center += __shfl_xor_sync(TBQ_WARP_ALL, center, m);
            }
            x.center[0] = i == g ? center : x.center[0];
            x.center[1] = i == g + 8 ? center : x.center[1];
        }
    }
    tbq_fence_products();
    tbq_named_sync(8 + group, 128);

    float    s[KEYS / 2], o[D / 2];
    uint32_t p[KEYS / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) {
        o[i] = 0.0f;
    }
    // The distances that the products need: of eight rows, and of 64 channels of values.
    const uint64_t q_tile = tbq_tile(tbq_tile_format(16, 1024), tbq_smem(query));
    const uint64_t k_tile = tbq_tile(tbq_tile_format(16, 1024), tbq_smem(cta.tiles));
    const uint64_t v_tile = tbq_tile(tbq_tile_format(KEYS * 128, 1024), tbq_smem(cta.tiles) + 2 * shape::TILE);
    auto           wait = [&](int which, int i) { tbq_mbarrier_wait(cta.barriers + which + 8 * (i & 1), i >> 1 & 1); };
    auto           release = [&](int which, int i) {
        if (lane == 0) {
            tbq_mbarrier_arrive(cta.barriers + which + 8 * (i & 1));
        }
    };

#pragma unroll 1
    for (int i = 0; i < n; i++) {
        // s = q . k^T
        wait(TBQ_FULL_K, i);
        tbq_pin(s);
        tbq_wgmma_fence();
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            tbq_wgmma_scores(s, tbq_tile_at(q_tile, c / 4 * (TBQ_PROMPT_ROWS * 128) + c % 4 * 32),
                             tbq_tile_at(k_tile, (i & 1) * shape::TILE + c / 4 * (KEYS * 128) + c % 4 * 32), c > 0);
        }
        tbq_wgmma_commit();
        tbq_wgmma_wait<0>();
        tbq_pin(s);
        release(TBQ_EMPTY_K, i);

        if (a.logit_softcap != 0.0f) {
#pragma unroll
            for (int e = 0; e < KEYS / 2; e++) {
                s[e] = tbq_tanh(s[e] + x.center[e >> 1 & 1]) * (a.logit_softcap * TBQ_LOG2E);
            }
        }
        const uint32_t entry = cta.list[first + i];
        if (entry >> (14 + group) & 1) {
            const int key = (entry & 0x3FFF) * KEYS + 2 * t;
            if (a.mask && key - 2 * t + KEYS <= a.n_kv) {
                tbq_prompt_mask<false>(s, x, key, a.n_kv);
            } else if (a.mask) {
                tbq_prompt_mask<true>(s, x, key, a.n_kv);
            } else {
                tbq_prompt_end(s, key, a.n_kv);
            }
        }
        if (tbq_prompt_softmax(s, x)) {
#pragma unroll
            for (int e = 0; e < D / 2; e++) {
                o[e] *= x.fall[e >> 1 & 1];
            }
        }
#pragma unroll
        for (int e = 0; e < KEYS / 4; e++) {
            p[e / 4][e % 4] = tbq_prompt_pack(s[2 * e], s[2 * e + 1]);
        }

        // o += p . v
        wait(TBQ_FULL_V, i);
        tbq_pin(o);
        tbq_wgmma_fence();
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++) {
            tbq_wgmma_values(o, p[c], tbq_tile_at(v_tile, (i & 1) * shape::TILE + c * 2048));
        }
        tbq_wgmma_commit();
        tbq_wgmma_wait<0>();
        tbq_pin(o);
        release(TBQ_EMPTY_V, i);
    }

    // What the sums are multiplied by, and then the mean of values: as tbq_attention_store.
    float inverse[2], share[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        x.sum[i] += __shfl_xor_sync(TBQ_WARP_ALL, x.sum[i], 1);
        x.sum[i] += __shfl_xor_sync(TBQ_WARP_ALL, x.sum[i], 2);
        x.max[i] += a.logit_softcap == 0.0f ? x.center[i] : 0.0f;
        float l = x.sum[i], f = 1.0f;
        if (a.sinks) {
            const float sink   = a.sinks[head_of(min(row0 + g + 8 * i, n_rows - 1))] * TBQ_LOG2E;
            const float larger = fmaxf(x.max[i], sink);
            f                  = tbq_exp2(x.max[i] - larger);
            l                  = l * f + tbq_exp2(sink - larger);
        }
        inverse[i] = a.n_split > 1 ? 1.0f : l == 0.0f ? 0.0f : f / l;
        share[i]   = x.sum[i] * inverse[i];
    }
    // rotated back over shared memory, 64 channels at a time, where the queries were
    tbq_named_sync(8 + group, 128);
    float * const out = (float *) query + 16 * warp * 64;
#pragma unroll
    for (int b = 0; b < NB; b++) {
        __syncwarp();
#pragma unroll
        for (int c = 0; c < 8; c++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int e = 4 * (8 * b + c) + 2 * i;
                *(float2 *) (out + (g + 8 * i) * 64 + (8 * (c ^ g) + 2 * t)) =
                    make_float2(o[e] * inverse[i], o[e + 1] * inverse[i]);
            }
        }
        __syncwarp();
        const float * mean = a.mean_of_values ? a.mean + cta.head_kv * D + 64 * b : nullptr;
#pragma unroll 2
        for (int i = 0; i < 16; i++) {
            const float2 y  = *(const float2 *) (out + i * 64 + (2 * lane ^ (i & 7) << 3));
            float        lo = y.x, hi = y.y;
            const float  of_mean = __shfl_sync(TBQ_WARP_ALL, i < 8 ? share[0] : share[1], i % 8 * 4);
            const float  max     = __shfl_sync(TBQ_WARP_ALL, i < 8 ? x.max[0] : x.max[1], i % 8 * 4);
            const int    row     = row0 + i;
            if (row >= n_rows) {
                break;
            }
            const long long to = ((long long) cta.seq * a.n_q + token_of(row)) * a.n_head + head_of(row);
            float *         dst;
            if (a.n_split > 1) {
                dst = a.partial + (to * a.n_split + cta.split) * (D + 2);
                if (b == 0 && lane == 0) {
                    dst[D]     = max;
                    dst[D + 1] = of_mean;
                }
            } else {
                dst = a.dst + to * D;
                tbq_unrotate_warp(lo, hi, lane);
                if (mean) {
                    lo += of_mean * mean[lane];
                    hi += of_mean * mean[lane + 32];
                }
            }
            dst[64 * b + lane]      = lo;
            dst[64 * b + lane + 32] = hi;
        }
    }
}

#endif // sm_90a

// PRODUCERS 2: a warpgroup each for keys and values.  MORE, FEWER: registers of a thread that multiplies and of one that
// unpacks.  grid: (n_head_kv x splits x row tiles / 2, sequences); (2 + PRODUCERS) x 128 threads
template <int D, int PRODUCERS, int MORE, int FEWER>
__global__ void __launch_bounds__((TBQ_PROMPT_GROUPS + PRODUCERS) * 128, 1)
    tbq_prompt(const __grid_constant__ tbq_prompt_args a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ char  dynamic[];
    const tbq_prompt_cta<D> cta(a, dynamic);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            for (int side = 0; side < 2; side++) {
                tbq_mbarrier_init(cta.barriers + TBQ_FULL_K + 16 * side + 8 * i, 4);
                tbq_mbarrier_init(cta.barriers + TBQ_EMPTY_K + 16 * side + 8 * i, 4 * TBQ_PROMPT_GROUPS);
            }
        }
        for (int i = 0; i < 4; i++) {
            cta.words[i]     = i < 1 ? tbq_level_word<2>(i) : 0;
            cta.words[4 + i] = i < 2 ? tbq_level_word<3>(i) : 0;
            cta.words[8 + i] = tbq_level_word<4>(i);
        }
        cta.words[TBQ_PROMPT_EXPONENT] = 0x64646464u;
        cta.words[TBQ_PROMPT_ZERO]     = 0;
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    int       first;
    const int n = cta.make_list(a, first);

    const int role = __shfl_sync(TBQ_WARP_ALL, threadIdx.x / 128, 0); // the compiler must know that warps do not part
    if (role >= TBQ_PROMPT_GROUPS) {
        tbq_fewer_registers<FEWER>();
        if constexpr (PRODUCERS == 1) {
            tbq_prompt_producer<D, 3>(a, cta, first, n);
        } else if (role == TBQ_PROMPT_GROUPS) {
            tbq_prompt_producer<D, 1>(a, cta, first, n);
        } else {
            tbq_prompt_producer<D, 2>(a, cta, first, n);
        }
    } else {
        tbq_more_registers<MORE>();
        tbq_prompt_consumer<D>(a, cta, role, first, n);
    }
#endif
}

// --- the launch ------------------------------------------------------------------------------------------------------

template <int D, int PRODUCERS, int MORE, int FEWER>
static cudaError_t tbq_prompt_run(const tbq_prompt_args & a, cudaStream_t stream) {
    if (a.map) {
        const dim3 grid((a.n_tiles + 3) / 4, a.n_row_tiles, a.n_seq_mask);
        tbq_prompt_map<D><<<grid, 128, 0, stream>>>(a);
    }
    if (a.slots) {
        tbq_prompt_slots<<<dim3((a.n_exact + 255) / 256, a.n_seq_kv), 256, 0, stream>>>(a);
    }
    auto * const      kernel = tbq_prompt<D, PRODUCERS, MORE, FEWER>;
    const int         smem   = tbq_prompt_smem(D, a.n_tiles);
    const cudaError_t error  = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (error != cudaSuccess) {
        return error;
    }
    const int n_ctas = (a.n_row_tiles + TBQ_PROMPT_GROUPS - 1) / TBQ_PROMPT_GROUPS * a.n_split * a.n_head_kv;
    kernel<<<dim3(n_ctas, a.n_seq), (TBQ_PROMPT_GROUPS + PRODUCERS) * 128, smem, stream>>>(a);
    if (a.n_split > 1) {
        constexpr int groups = 512 / D;
        tbq_attention_combine<D, groups, true><<<a.n_seq * a.n_q * a.n_head, dim3(D, groups), 0, stream>>>(a);
    }
    return cudaGetLastError();
}
