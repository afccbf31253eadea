// SPDX-License-Identifier: MIT
// Attention over packed keys and values, on the CPU.
//
//     out[s][t][h] = sum_i w_i v_i / sum_i w_i,   w_i = exp(logit_i),
//     logit_i = cap(scale q.k_i) + slope_h mask_i          cap(x) = c tanh(x / c), or x without a soft-cap c
//
// for each query row: token t and query head h of stream s.  Query head h reads KV head h / (n_head / n_head_kv).  With
// sinks, exp(sink_h) is added to the denominator.
//
// K and V are tbq2_0, tbq3_0 or tbq4_0 in any combination, or one of them has another type.
//
// Centered keys: the cache may hold k_i - c in place of k_i, with one mean c for all rows of a KV head.  Softmax ignores
// what that takes from every logit, d = scale q.c.  Where that does not end it, the mean is passed, and the result is
// that of whole keys: a sink becomes sink_h - d, a soft-cap cap(scale q.(k_i - c) + d), and values that are the first
// channels of the keys get c back, times the weight that is not the sink's.
//
// Exact rows: a list says which cached rows are also kept in 8 bits, and where.  These are read from there, and the
// packed row has no effect.
//
// A row whose mask is -Inf has no effect, whatever it holds, NaN included.  A row whose softmax weight underflows to 0
// in its tile of 64 cached rows affects only how the other weights are rounded.  A query row that sees no key gets
// zeros.  A query row becomes NaN if it sees a NaN in a key, a product q.k of +Inf (with a soft-cap: any Inf), or a
// sink that is NaN.  A scale of NaN or Inf in tbq values makes the 64 channels of its block NaN.  All else follows IEEE
// arithmetic.
//
// The computation, per tile of 64 cached rows (cpu/attention/tile.inc has the reasons):
//   - Exact rows are tiles of their own, 64 entries of the list each, after the tiles of the cache.
//   - Queries are rotated once and rounded to 8 bits in blocks of 64, as TBQ_TYPE_TBQ8_ACT.  K is unpacked to bytes
//     once for all query rows that share it.  Products are exact integers.  Keys of other types are multiplied by f32
//     queries.
//   - The softmax is in f32, relative to the maximum of the tile.
//   - Weights times the scales of V are rounded to 15 bits and a sign, relative to their largest possible value in the
//     tile, or to their largest where the mask hides a row.  Products with unpacked V are exact integers again.  The
//     sum stays rotated, and is rotated back once per query row.  Values of other types are multiplied by f32 weights.
// docs/measurements/attention.md has the error that this adds to f32 arithmetic on the dequantized cache.
//
// EXACTNESS
//
// The result has the same bits from every implementation, for every number of threads and order of work items (default
// rounding mode; the bits of a NaN may differ).
//
// USE
//
// The caller owns the threads.  With a plan p and work of tbq_attention_work_bytes(p, n_threads) bytes:
//
//     each thread:  tbq_attention_run(p, k, thread, work, next, context)
//     barrier, unless p->n_chunks == 1
//     each thread:  for its share of the rows:  tbq_attention_merge(p, k, first, last, work)    unless n_chunks == 1
#pragma once

#include "tbq-kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Types of K and V.  The ids of f16 and q8_0 are ggml's.
typedef enum {
    TBQ_ATTENTION_TBQ2_0 = TBQ_TYPE_TBQ2_0,
    TBQ_ATTENTION_TBQ3_0 = TBQ_TYPE_TBQ3_0,
    TBQ_ATTENTION_TBQ4_0 = TBQ_TYPE_TBQ4_0,
    TBQ_ATTENTION_F16    = 1,
    TBQ_ATTENTION_Q8_0   = 8,
    TBQ_ATTENTION_OTHER  = -1, // any type that `to_float` decodes
} tbq_attention_type;

// K or V.  Strides are in bytes, from one cached row, KV head and stream to the next.
typedef struct {
    int          type; // tbq_attention_type
    const void * data;
    size_t       row_stride, head_stride, stream_stride;
    int64_t      n_streams; // divides tbq_attention.n_streams; each of these is read by that many consecutive streams
    void (*to_float)(const void * src, float * dst, int64_t n); // of TBQ_ATTENTION_OTHER
} tbq_attention_tensor;

typedef struct {
    int64_t n_streams; // independent problems, each with n_tokens query rows for each head
    int64_t n_tokens;
    int64_t n_kv;   // cached rows
    int64_t n_head; // a multiple of
    int64_t n_head_kv;
    int64_t k_size; // head sizes: multiples of 64
    int64_t v_size;

    const float * q; // k_size floats for each query row; strides in bytes
    size_t        q_token_stride, q_head_stride, q_stream_stride;

    tbq_attention_tensor k, v;

    const uint16_t * mask; // IEEE halves that are added to the logits, n_kv for each token, or NULL; strides in bytes
    size_t           mask_token_stride, mask_head_stride, mask_stream_stride;
    int64_t          mask_n_heads, mask_n_streams; // head h uses mask h % mask_n_heads; streams likewise

    const float * sinks;                          // n_head logits, or NULL
    float         scale, max_bias, logit_softcap; // max_bias > 0: ALiBi slopes; logit_softcap 0: none

    const float * mean;           // c, k_size floats for each KV head, or NULL
    int           mean_of_values; // whether rows of V lack its first v_size channels, too

    // Exact rows: n_exact entries of a list, or 0.  Entry j of a stream stands for cached row cells[j], or for none if
    // that is -1; no row occurs twice.  Its key is row j of exact_k, its value row j of exact_v, in tbq8_0; a side that
    // is not tbq has none, and is read at row cells[j].  Bit c % 32 of packed_hidden[c / 32] is set where the list has
    // row c.  Both arrays have one part for each stream, exact_stream_stride bytes apart.
    int64_t              n_exact;
    tbq_attention_tensor exact_k, exact_v; // the type is not read
    const int32_t *      cells;
    const uint32_t *     packed_hidden; // ceil(n_kv / 32) words
    size_t               exact_stream_stride;

    float * out; // [n_streams][n_tokens][n_head][v_size], contiguous
} tbq_attention;

// How a problem is partitioned: a function of its shape alone, so that the results do not depend on the number of
// threads.  A work item is a chunk of the cache for a tile of the query rows of one KV head, or of several KV heads
// that are adjacent in a cached row.  More than one chunk is split-KV: each chunk gives partial results, which are
// merged.  With several chunks, exact rows are chunks of their own.
typedef struct {
    tbq_attention a;
    int64_t       n_items;
    int64_t       n_chunks;       // of the cache, and of the exact rows
    int64_t       n_exact_chunks; // the last ones; 0: chunk 0 is the only one, and has all rows
    int64_t       chunk_rows;     // cached or exact rows in a chunk, a multiple of 64
    int64_t       heads_per_item; // KV heads
    int64_t       n_head_groups;
    int64_t       tile_rows; // query rows of one KV head in an item; row = token . (n_head / n_head_kv) + head
    int64_t       n_row_tiles;
    int64_t       n_rows; // of out
    size_t        thread_bytes, partial_bytes;
} tbq_attention_plan;

// Fills in the plan.  TBQ_OK, or why these kernels do not take the problem: TBQ_ERROR_TYPE (neither K nor V is tbq, or
// one has a type that is not listed above) or TBQ_ERROR_LENGTH (a count below 1, head sizes that are not multiples of
// 64, heads or streams that do not divide, n_exact below 0, a mean of values that are longer than keys).  Reads types,
// sizes and counts only, and of mask and mean whether they are NULL: other pointers and strides may be set later, in
// plan->a.
TBQ_API tbq_status tbq_attention_make_plan(const tbq_attention * a, tbq_attention_plan * plan);

// The bytes of work: scratch for each thread and, with several chunks, partial results.
TBQ_API size_t tbq_attention_work_bytes(const tbq_attention_plan * plan, int n_threads);

// Computes the work items that next(context) returns, until that is plan->n_items or more.  thread: 0 .. n_threads - 1.
// work is the same memory for all threads.
TBQ_API void tbq_attention_run(const tbq_attention_plan * plan, const tbq_kernels * k, int thread, void * work,
                               int64_t (*next)(void * context), void * context);

// The same without a counter that the threads share: items thread, thread + n_threads, ...
TBQ_API void tbq_attention_run_share(const tbq_attention_plan * plan, const tbq_kernels * k, int thread, int n_threads,
                                     void * work);

// Computes rows first .. last - 1 of the plan->n_rows rows of out from the partial results, which it overwrites.
TBQ_API void tbq_attention_merge(const tbq_attention_plan * plan, const tbq_kernels * k, int64_t first, int64_t last,
                                 void * work);

#ifdef __cplusplus
}
#endif
