// SPDX-License-Identifier: MIT
// Attention of prompts: its arguments, how a call is divided, and its launch.  tbq-prompt.cu, which has the kernels, is
// compiled for sm_90a beside what the rest is compiled for, and knows CUDA only.
#pragma once

#include "tbq-attention.cuh"

#define TBQ_PROMPT_ROWS   64 // of a warpgroup
#define TBQ_PROMPT_GROUPS 2  // warpgroups that multiply

struct tbq_prompt_args : tbq_attention_args {
    int bits_k, bits_v; // 2, 3 or 4

    // set by tbq_prompt_partition
    int n_row_tiles; // tiles of 64 rows of a KV head
    int n_tiles;     // tiles of the cache

    // Memory of this call; set by tbq_prompt_place.
    uint8_t * map;   // of the mask: [n_seq_mask, n_row_tiles, n_tiles], or null
    int *     slots; // [n_seq_kv, n_kv]: the slot of a cell that is in the list, or null
};

// --- sizes -----------------------------------------------------------------------------------------------------------

// Tokens of a tile.
constexpr __host__ __device__ int tbq_prompt_keys(int d) {
    return d == 256 ? 64 : 128;
}

// A thread that unpacks takes one or two blocks of a row, a piece.  In shared memory pieces are an odd number of 16-byte
// units apart, so that eight lanes that read a unit each of eight pieces meet no bank twice.
constexpr __host__ __device__ int tbq_prompt_piece(int d) {
    return d == 64 ? 1 : 2;
}

constexpr __host__ __device__ int tbq_prompt_pitch(int d) {
    return d == 64 ? 48 : 80;
}

// Of keys or values: how many packed tiles are on their way or being unpacked.
constexpr __host__ __device__ int tbq_prompt_ahead(int d) {
    return d == 256 ? 1 : 2;
}

// The queries of a warpgroup, and later its results, 16 rows x 64 floats of each warp at a time.
constexpr __host__ __device__ int tbq_prompt_queries(int d) {
    return TBQ_PROMPT_ROWS * (d == 64 ? 256 : 2 * d);
}

constexpr __host__ __device__ int tbq_prompt_tile_bytes(int d) {
    return tbq_prompt_keys(d) * 2 * d;
}

// To begin at a multiple of 1024; queries; two tiles of keys and two of values; packed rows; barriers and constants; the
// list of tiles.
constexpr __host__ __device__ int tbq_prompt_smem(int d, int n_tiles) {
    return 1024 + TBQ_PROMPT_GROUPS * tbq_prompt_queries(d) + 4 * tbq_prompt_tile_bytes(d) +
           2 * tbq_prompt_ahead(d) * 128 * tbq_prompt_pitch(d) + 128 + (n_tiles + 7) / 8 * 16;
}

// What the list of tiles has room for: 14 bits, and 227 KiB in all.
constexpr __host__ __device__ int tbq_prompt_max_kv(int d) {
    const int fit = (232448 - tbq_prompt_smem(d, 0)) / 16 * 8;
    return (fit < 16384 ? fit : 16384) * tbq_prompt_keys(d);
}

// What a grid has room for, and the distance of rows up to which 32-bit arithmetic reaches over a tile.
#define TBQ_PROMPT_MAX_ROWS   (65535 * TBQ_PROMPT_ROWS)
#define TBQ_PROMPT_MAX_STRIDE (1 << 24)

// How rows and the cache are divided.  n_sm: multiprocessors; each has room for one CTA.
static inline void tbq_prompt_partition(tbq_prompt_args & a, int d, int n_sm) {
    a.gqa         = a.n_head / a.n_head_kv;
    a.kv_per_seq  = a.n_seq / a.n_seq_kv;
    a.n_row_tiles = (int) (((long long) a.n_q * a.gqa + TBQ_PROMPT_ROWS - 1) / TBQ_PROMPT_ROWS);
    a.n_tiles     = (a.n_kv + tbq_prompt_keys(d) - 1) / tbq_prompt_keys(d);
    // The time of a call in tiles: rounds of CTAs, each of which takes 3 beside its tiles; a merge writes and reads the
    // sums, 6 MB in the time of a tile.
    const long long n = (long long) (a.n_row_tiles + TBQ_PROMPT_GROUPS - 1) / TBQ_PROMPT_GROUPS * a.n_head_kv * a.n_seq;
    double          best = 0;
    a.n_split            = 1;
    for (int s = 1; s <= 32 && (s == 1 || (a.n_tiles / s >= 8 && n * s <= 4LL * n_sm)); s++) {
        const double rounds = (double) ((n * s + n_sm - 1) / n_sm);
        const double merge  = s == 1 ? 0 : 4 + n * s * (TBQ_PROMPT_GROUPS * TBQ_PROMPT_ROWS) * (d + 2) * 8.0 / 6e6;
        const double time   = rounds * ((double) a.n_tiles / s + 3) + merge;
        if (s == 1 || time < best) {
            best      = time;
            a.n_split = s;
        }
    }
}

// The bytes that a call needs, and where they are.  With memory == nullptr only the former.
static inline size_t tbq_prompt_place(tbq_prompt_args & a, int d, char * memory) {
    size_t size  = 0;
    auto   place = [&](size_t bytes) {
        char * const p = memory && bytes ? memory + size : nullptr;
        size += (bytes + 255) / 256 * 256;
        return p;
    };
    a.map     = (uint8_t *) place(a.mask ? (size_t) a.n_seq_mask * a.n_row_tiles * a.n_tiles : 0);
    a.slots   = (int *) place(a.cells ? (size_t) a.n_seq_kv * a.n_kv * sizeof(int) : 0);
    a.partial = (float *) place(tbq_attention_partial_bytes(a, d));
    return size;
}

// Whether the kernels run on the current device: compute capability 9.0, and compiled for sm_90a.
bool tbq_prompt_compiled();

// Computes a call that was divided and has its memory.  D: 64, 128 or 256.
cudaError_t tbq_prompt_launch(const tbq_prompt_args & a, int d, cudaStream_t stream);
