// SPDX-License-Identifier: MIT
// Attention: how a problem is partitioned into work items, and the calls of tbq-attention.h.
#include "attention.h"

enum {
    MAX_TILE_ROWS  = 64,  // query rows that share an unpacked tile: unpacking is then about 3 % of the work
    MAX_ITEM_ROWS  = 128, // of all KV heads of an item: their sums stay in the second-level cache
    MIN_CHUNK_ROWS = 256, // cached rows: with fewer, merging takes a noticeable share of the time
    ENOUGH_ITEMS   = 64,  // for any number of threads that decode runs on
};

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int is_plain(const tbq_attention_tensor * side) {
    return side->type == TBQ_ATTENTION_F16 || side->type == TBQ_ATTENTION_Q8_0 ||
           (side->type == TBQ_ATTENTION_OTHER && side->to_float);
}

static int divides(const tbq_attention_tensor * side, int64_t n_streams) {
    return side->n_streams >= 1 && n_streams % side->n_streams == 0;
}

static tbq_status check(const tbq_attention * a) {
    const int k = a->k.type, v = a->v.type;
    if ((!is_tbq(k) && !is_plain(&a->k)) || (!is_tbq(v) && !is_plain(&a->v)) || (!is_tbq(k) && !is_tbq(v))) {
        return TBQ_ERROR_TYPE;
    }
    if (a->n_streams < 1 || a->n_tokens < 1 || a->n_kv < 1 || a->n_head < 1 || a->n_head_kv < 1 ||
        a->n_head % a->n_head_kv || a->k_size < 1 || a->k_size % TBQ_BLOCK || a->v_size < 1 || a->v_size % TBQ_BLOCK ||
        !divides(&a->k, a->n_streams) || !divides(&a->v, a->n_streams) ||
        (a->mask && (a->mask_n_heads < 1 || a->mask_n_streams < 1)) ||
        (a->mean && a->mean_of_values && a->v_size > a->k_size) || a->n_exact < 0 ||
        (a->n_exact > 0 && is_tbq(k) && !divides(&a->exact_k, a->n_streams)) ||
        (a->n_exact > 0 && is_tbq(v) && !divides(&a->exact_v, a->n_streams))) {
        return TBQ_ERROR_LENGTH;
    }
    return TBQ_OK;
}

// A prompt has enough items without splitting the cache.  Decode has not, so its items are chunks of the cache
// (split-KV).  Such an item takes all KV heads, because their slices of a cached row share cache lines; heads become
// items of their own only where there are few chunks.
static void partition(tbq_attention_plan * p) {
    const tbq_attention * a    = &p->a;
    const int64_t         rows = a->n_tokens * (a->n_head / a->n_head_kv);

    p->n_rows      = a->n_streams * a->n_tokens * a->n_head;
    p->n_row_tiles = ceil_div(rows, MAX_TILE_ROWS);
    p->tile_rows   = ceil_div(rows, p->n_row_tiles);

    const int64_t groups = ceil_div(a->n_head_kv, max64(1, MAX_ITEM_ROWS / p->tile_rows));
    const int64_t tiles  = a->n_streams * p->n_row_tiles; // of query rows
    const int64_t chunks = min64(ceil_div(a->n_kv, MIN_CHUNK_ROWS), ceil_div(ENOUGH_ITEMS, tiles * groups));
    p->n_head_groups     = min64(a->n_head_kv, max64(groups, ceil_div(ENOUGH_ITEMS / 4, tiles * chunks)));
    p->heads_per_item    = ceil_div(a->n_head_kv, p->n_head_groups);
    p->n_head_groups     = ceil_div(a->n_head_kv, p->heads_per_item);
    p->chunk_rows        = ceil_div(ceil_div(a->n_kv, chunks), TBQ_TILE) * TBQ_TILE;
    p->n_chunks          = ceil_div(a->n_kv, p->chunk_rows);
    p->n_exact_chunks    = p->n_chunks > 1 ? ceil_div(a->n_exact, p->chunk_rows) : 0;
    p->n_chunks += p->n_exact_chunks;
    p->n_items = tiles * p->n_head_groups * p->n_chunks;
}

tbq_status tbq_attention_make_plan(const tbq_attention * a, tbq_attention_plan * plan) {
    const tbq_status status = check(a);
    if (status != TBQ_OK) {
        return status;
    }
    attention_scratch s;
    plan->a = *a;
    partition(plan);
    plan->thread_bytes  = lay_out(plan, NULL, &s);
    plan->partial_bytes = 0;
    if (plan->n_chunks > 1) {
        plan->partial_bytes = (size_t) (plan->n_chunks * plan->n_rows * (TBQ_HEADER + a->v_size)) * sizeof(float);
    }
    return TBQ_OK;
}

// work, aligned: partial results first, then the scratch of each thread.
static uint8_t * aligned(const void * work) {
    return (uint8_t *) (((uintptr_t) work + 63) & ~(uintptr_t) 63);
}

size_t tbq_attention_work_bytes(const tbq_attention_plan * plan, int n_threads) {
    return 64 + plan->partial_bytes + (size_t) n_threads * plan->thread_bytes;
}

void tbq_attention_run(const tbq_attention_plan * plan, const tbq_kernels * k, int thread, void * work,
                       int64_t (*next)(void * context), void * context) {
    uint8_t * base     = aligned(work);
    uint8_t * scratch  = base + plan->partial_bytes + (size_t) thread * plan->thread_bytes;
    int64_t   prepared = -1; // the item, without its chunk, whose queries are in the scratch
    for (int64_t item = next(context); item < plan->n_items; item = next(context)) {
        k->attention->run(plan, k, item, scratch, (float *) base, &prepared);
    }
}

typedef struct {
    int64_t item, step;
} share;

static int64_t next_of_share(void * context) {
    share *       s    = (share *) context;
    const int64_t item = s->item;
    s->item += s->step;
    return item;
}

void tbq_attention_run_share(const tbq_attention_plan * plan, const tbq_kernels * k, int thread, int n_threads,
                             void * work) {
    share s = { thread, n_threads };
    tbq_attention_run(plan, k, thread, work, next_of_share, &s);
}

void tbq_attention_merge(const tbq_attention_plan * plan, const tbq_kernels * k, int64_t first, int64_t last,
                         void * work) {
    k->attention->merge(plan, k, first, last, (float *) aligned(work));
}
