// SPDX-License-Identifier: MIT
// What plan.c and the implementations share: constants, the layout of the scratch memory, and of partial results.
#pragma once

#include "tbq-attention.h"
#include "../tbq-impl.h"

enum {
    TBQ_TILE     = 64,   // cached rows that are unpacked and multiplied at a time
    KEYS_AT_ONCE = 4,    // most queries of one product with keys
    TBQ_PANEL    = 4096, // bytes of a block of 64 values of such rows, unpacked
    TBQ_HEADER =
        16, // floats in front of the sum in a partial result: running maximum and sum, then padding for alignment
};

// The largest weight: 127 . 256 + 127, so that it splits into two signed bytes.
#define TBQ_WEIGHT_ONE 32639.0f

#ifdef __GNUC__
#define TBQ_PREFETCH(p) __builtin_prefetch(p)
#else
#define TBQ_PREFETCH(p) ((void) (p))
#endif

// One implementation's part of tbq_kernels.
struct tbq_attention_kernels {
    void (*run)(const tbq_attention_plan * plan, const tbq_kernels * k, int64_t item, void * scratch, float * partials,
                int64_t * prepared);
    void (*merge)(const tbq_attention_plan * plan, const tbq_kernels * k, int64_t first, int64_t last,
                  float * partials);
};

// 64 values of a query, rotated: value i is d . qs[i].  bias as in block_tbq8_act, summed up.
typedef struct {
    float   d; // with the scale of the logits
    int32_t bias;
    int8_t  qs[TBQ_BLOCK];
} query_block;

// A thread's scratch.  "rows" are query rows of an item: heads_per_item . tile_rows.
typedef struct {
    query_block * queries;     // rows x k_size / 64, for tbq keys
    float *       queries_f32; // rows x k_size, for others
    float *       sum;         // rows x v_size: sum of w v
    float *       running_max; // rows: the largest logit so far, -Inf at first
    float *       running_sum; // rows: sum of w = exp(logit - running_max); NaN if the row has seen one
    float *       slope;       // rows: ALiBi
    float *       center;      // rows: what a soft-cap needs back in the logits of centered keys
    // for the current tile and KV head
    float *    logits;       // tile_rows x 64, weights later
    float *    mask;         // tile_rows x 64
    uint8_t *  mask_kind;    // tile_rows
    float *    rescale;      // tile_rows: the factor of the running sums,
    float *    tile_rescale; // and of the weights of the tile, when the running maximum changes
    float *    factor;       // tile_rescale times the unit of the rounded weights
    int16_t *  weights;      // tile_rows x 64, rounded; or two planes of bytes
    int32_t *  weight_sums;  // tile_rows
    uint8_t *  panel;        // 64 rows unpacked: TBQ_PANEL bytes, or floats of whole rows
    float *    scales;       // 64
    uint64_t * qh;           // 64: the high bit planes of tbq3_0
} attention_scratch;

static inline int is_tbq(int type) {
    return type >= TBQ_TYPE_TBQ2_0 && type <= TBQ_TYPE_TBQ4_0;
}

// What hides the rows of a tile that the list of exact rows has.
static inline uint64_t rows_in(const uint32_t * words, int64_t at, int64_t n_kv) {
    const uint64_t low = words[at / 32];
    return at + 32 < n_kv ? low | (uint64_t) words[at / 32 + 1] << 32 : low;
}

// The block of row r, with rows `stride` bytes apart; that of the last of n rows where r >= n.
static inline const uint8_t * row_of(const uint8_t * block, size_t stride, int n, int r) {
    return block + (size_t) (r < n ? r : n - 1) * stride;
}

// Places the arrays in the memory at base, each at a multiple of 64 bytes.  Returns the bytes.
static inline size_t lay_out(const tbq_attention_plan * p, uint8_t * base, attention_scratch * s) {
    const size_t rows = (size_t) (p->heads_per_item * p->tile_rows);
    const size_t tile = (size_t) p->tile_rows * TBQ_TILE;
    const size_t k    = (size_t) p->a.k_size;
    const size_t v    = (size_t) p->a.v_size;
    size_t       at   = 0;
#define ARRAY(name, count)                      \
    s->name = (void *) ((uintptr_t) base + at); \
    at += ((count) * sizeof(*s->name) + 63) / 64 * 64
    ARRAY(queries, is_tbq(p->a.k.type) ? rows * (k / TBQ_BLOCK) : 0);
    ARRAY(queries_f32, is_tbq(p->a.k.type) ? 0 : rows * k);
    ARRAY(sum, rows * v);
    ARRAY(running_max, rows);
    ARRAY(running_sum, rows);
    ARRAY(slope, rows);
    ARRAY(center, rows);
    ARRAY(logits, tile);
    ARRAY(mask, tile);
    ARRAY(mask_kind, (size_t) p->tile_rows);
    ARRAY(rescale, (size_t) p->tile_rows + 16);
    ARRAY(tile_rescale, (size_t) p->tile_rows);
    ARRAY(factor, (size_t) p->tile_rows);
    ARRAY(weights, tile);
    ARRAY(weight_sums, (size_t) p->tile_rows);
    const size_t k_floats = is_tbq(p->a.k.type) ? 0 : k;
    const size_t v_floats = is_tbq(p->a.v.type) ? 0 : v;
    const size_t floats   = (k_floats > v_floats ? k_floats : v_floats) * TBQ_TILE * sizeof(float);
    ARRAY(panel, floats > TBQ_PANEL ? floats : TBQ_PANEL);
    ARRAY(scales, (size_t) TBQ_TILE);
    ARRAY(qh, (size_t) TBQ_TILE);
#undef ARRAY
    return at;
}

// Partial results: for each chunk and row of out the running maximum and sum, padding to TBQ_HEADER, and the sum of w
// v.
static inline float * partial_of(const tbq_attention_plan * p, float * partials, int64_t chunk, int64_t row) {
    return partials + (chunk * p->n_rows + row) * (TBQ_HEADER + p->a.v_size);
}
