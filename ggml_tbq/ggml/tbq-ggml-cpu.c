// SPDX-License-Identifier: MIT
#include "tbq-ggml-cpu.h"

#include "ggml-cpu-impl.h"
#include "tbq-attention.h"
#include "tbq-ggml.h"

#include <string.h>

static void f32_to_float(const void * src, float * dst, int64_t n) {
    memcpy(dst, src, (size_t) n * sizeof(float));
}

static bool is_kernel_type(enum ggml_type type) {
    return ggml_is_tbq(type) || type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0;
}

// Zeros without a tensor.
static tbq_attention_tensor side_of(const struct ggml_tensor * t) {
    if (!t) {
        const tbq_attention_tensor none = { 0 };
        return none;
    }
    const tbq_attention_tensor side = {
        .type          = is_kernel_type(t->type) ? (int) t->type : TBQ_ATTENTION_OTHER,
        .data          = t->data,
        .row_stride    = t->nb[1],
        .head_stride   = t->nb[2],
        .stream_stride = t->nb[3],
        .n_streams     = t->ne[3],
        .to_float      = t->type == GGML_TYPE_F32 ? f32_to_float : ggml_get_type_traits(t->type)->to_float,
    };
    return side;
}

// False for what the kernels do not take.
static bool make_plan(const struct ggml_tensor * dst, tbq_attention_plan * plan) {
    const struct ggml_tensor * q     = dst->src[0];
    const struct ggml_tensor * k     = dst->src[1];
    const struct ggml_tensor * v     = dst->src[2];
    const struct ggml_tensor * mask  = dst->src[3];
    const struct ggml_tensor * sinks = dst->src[4];
    const struct ggml_tensor * cells = dst->src[7];
    const struct ggml_tensor * mean  = dst->src[8];
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || k->ne[2] != v->ne[2] ||
        k->nb[0] != ggml_type_size(k->type) || v->nb[0] != ggml_type_size(v->type) || !ggml_is_contiguous(dst) ||
        (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(ggml_fp16_t)))) {
        return false;
    }
    tbq_attention a = {
        .n_streams       = q->ne[3],
        .n_tokens        = q->ne[1],
        .n_kv            = k->ne[1],
        .n_head          = q->ne[2],
        .n_head_kv       = k->ne[2],
        .k_size          = k->ne[0],
        .v_size          = v->ne[0],
        .q               = (const float *) q->data,
        .q_token_stride  = q->nb[1],
        .q_head_stride   = q->nb[2],
        .q_stream_stride = q->nb[3],
        .k               = side_of(k),
        .v               = side_of(v),
        .sinks           = sinks ? (const float *) sinks->data : NULL,
        .mean            = mean ? (const float *) mean->data : NULL,
        .mean_of_values  = tbq_ggml_flash_attn_ext_center_values(dst),
        .out             = (float *) dst->data,
    };
    if (mask) {
        a.mask               = (const uint16_t *) mask->data;
        a.mask_token_stride  = mask->nb[1];
        a.mask_head_stride   = mask->nb[2];
        a.mask_stream_stride = mask->nb[3];
        a.mask_n_heads       = mask->ne[2];
        a.mask_n_streams     = mask->ne[3];
    }
    if (cells) {
        // an array of cells and one of words for each stream
        a.n_exact             = cells->ne[0] - (k->ne[1] + 31) / 32;
        a.exact_k             = side_of(dst->src[5]);
        a.exact_v             = side_of(dst->src[6]);
        a.cells               = (const int32_t *) cells->data;
        a.packed_hidden       = (const uint32_t *) cells->data + a.n_exact;
        a.exact_stream_stride = cells->nb[1];
    }
    memcpy(&a.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&a.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&a.logit_softcap, (const float *) dst->op_params + 2, sizeof(float));
    return tbq_attention_make_plan(&a, plan) == TBQ_OK;
}

size_t tbq_ggml_flash_attn_ext_work_size(const struct ggml_tensor * dst, int n_threads) {
    tbq_attention_plan plan;
    return make_plan(dst, &plan) ? tbq_attention_work_bytes(&plan, n_threads) : 0;
}

typedef struct {
    struct ggml_threadpool * pool;
    int                      first; // or -1
} item_source;

// Each thread's first item is its own number, the rest come from the counter that all share.
static int64_t next_item(void * context) {
    item_source * source = (item_source *) context;
    const int     first  = source->first;
    source->first        = -1;
    return first >= 0 ? first : ggml_threadpool_chunk_add(source->pool, 1);
}

bool tbq_ggml_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    tbq_attention_plan plan;
    if (params->use_ref || !make_plan(dst, &plan)) {
        return false;
    }
    GGML_ASSERT(params->wsize >= tbq_attention_work_bytes(&plan, params->nth));
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const tbq_kernels * kernels = tbq_best_kernels();
    item_source         source  = { params->threadpool, params->ith };
    tbq_attention_run(&plan, kernels, params->ith, params->wdata, next_item, &source);
    if (plan.n_chunks > 1) {
        ggml_barrier(params->threadpool);
        tbq_attention_merge(&plan, kernels, plan.n_rows * params->ith / params->nth,
                            plan.n_rows * (params->ith + 1) / params->nth, params->wdata);
    }
    return true;
}

int64_t tbq_ggml_exact_slot(const struct ggml_tensor * fa, int64_t stream, int64_t cell) {
    const struct ggml_tensor * cells = fa->src[7];
    if (!cells) {
        return -1;
    }
    const int32_t * list = (const int32_t *) ((const char *) cells->data + stream * cells->nb[1]);
    int64_t         slot = cells->ne[0] - (fa->src[1]->ne[1] + 31) / 32;
    if (!((uint32_t) list[slot + cell / 32] >> cell % 32 & 1)) {
        return -1;
    }
    while (--slot >= 0 && list[slot] != cell) {
    }
    return slot;
}

static const char * exact_row(const struct ggml_tensor * exact, int64_t slot, int64_t head, int64_t stream) {
    return exact && slot >= 0
               ? (const char *) exact->data + slot * exact->nb[1] + head * exact->nb[2] + stream * exact->nb[3]
               : NULL;
}

bool tbq_ggml_exact_dot(const struct ggml_tensor * fa, int64_t slot, int64_t head, int64_t stream, const void * q,
                        float * s) {
    const char * row = exact_row(fa->src[5], slot, head, stream);
    if (row) {
        *s = tbq_best_kernels()->dot_exact(row, q, fa->src[5]->ne[0]);
    }
    return row != NULL;
}

bool tbq_ggml_exact_mad(const struct ggml_tensor * fa, int64_t slot, int64_t head, int64_t stream, float p,
                        float * acc) {
    const char * row = exact_row(fa->src[6], slot, head, stream);
    if (row) {
        tbq_best_kernels()->mad_rotated_exact(row, p, acc, fa->src[6]->ne[0]);
    }
    return row != NULL;
}

tbq_ggml_center tbq_ggml_center_of(const struct ggml_tensor * fa, const float * q, int64_t head) {
    tbq_ggml_center            center = { 0.0f, 0.0f, NULL };
    const struct ggml_tensor * mean   = fa->src[8];
    if (!mean) {
        return center;
    }
    const int64_t size = fa->src[1]->ne[0];
    const float * c    = (const float *) mean->data + head / (fa->src[0]->ne[2] / fa->src[1]->ne[2]) * size;
    const float * op   = (const float *) fa->op_params;
    double        sum  = 0.0;
    for (int64_t i = 0; i < size; i++) {
        sum += (double) q[i] * (double) c[i];
    }
    const float d = op[0] * (float) sum;
    if (op[2] != 0.0f) {
        center.capped = d / op[2];
    } else {
        center.sink = d;
    }
    center.values = tbq_ggml_flash_attn_ext_center_values(fa) ? c : NULL;
    return center;
}

// Some blocks of one row.  A token has one row, so it is blocks that the threads share.
typedef struct {
    int64_t row, first, count; // blocks first .. first + count - 1
} row_part;

// The blocks of thread ith, row by row: call until i, which the caller sets to 0, reaches its end.
static bool next_part(const struct ggml_compute_params * params, int64_t n_rows, int64_t n_blocks, int64_t * i,
                      row_part * part) {
    const int64_t n     = n_rows * n_blocks;
    const int64_t begin = n * params->ith / params->nth;
    const int64_t left  = n * (params->ith + 1) / params->nth - begin - *i;
    part->row           = (begin + *i) / n_blocks;
    part->first         = (begin + *i) % n_blocks;
    part->count         = left < n_blocks - part->first ? left : n_blocks - part->first;
    *i += part->count;
    return left > 0;
}

static const float * floats_at(const struct ggml_tensor * t, int64_t row, int64_t stream, int64_t block) {
    return t ? (const float *) ((const char *) t->data + row * t->nb[1] + stream * t->nb[2]) + block * TBQ_BLOCK : NULL;
}

static char * blocks_at(const struct ggml_tensor * t, int64_t row, int64_t stream, int64_t block) {
    return (char *) t->data + row * t->nb[1] + stream * t->nb[2] + block * ggml_type_size(t->type);
}

bool tbq_ggml_set_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src    = dst->src[0];
    const struct ggml_tensor * ids    = dst->src[1];
    const struct ggml_tensor * mean   = dst->src[3];
    const struct ggml_tensor * weight = dst->src[4];
    const struct ggml_tensor * exact  = dst->src[5];
    const struct ggml_tensor * slots  = dst->src[6];
    if (!ggml_is_tbq(dst->type) || (!mean && !weight && !exact)) {
        return false;
    }
    GGML_ASSERT(src->type == GGML_TYPE_F32 && src->nb[0] == sizeof(float) &&
                (ids->type == GGML_TYPE_I64 || ids->type == GGML_TYPE_I32));
    GGML_ASSERT(src->ne[2] * src->ne[3] * ids->ne[1] * ids->ne[2] == 1 && dst->ne[2] * dst->ne[3] == 1);

    const tbq_kernels * kernels = tbq_best_kernels();
    row_part            p;
    for (int64_t i = 0; next_part(params, src->ne[1], src->ne[0] / TBQ_BLOCK, &i, &p);) {
        const char *  id = (const char *) ids->data + p.row * ids->nb[0];
        const int64_t to = ids->type == GGML_TYPE_I64 ? *(const int64_t *) id : *(const int32_t *) id;
        GGML_ASSERT(to >= 0 && to < dst->ne[1]);
        const float * x = floats_at(src, p.row, 0, p.first);
        const float * m = floats_at(mean, 0, 0, p.first);
        kernels->quantize_kv[dst->type - GGML_TYPE_TBQ2_0](x, m, floats_at(weight, 0, 0, p.first),
                                                           blocks_at(dst, to, 0, p.first), p.count * TBQ_BLOCK);
        const int32_t slot = exact ? ((const int32_t *) slots->data)[dst->op_params[0] + p.row] : -1;
        if (slot >= 0) {
            GGML_ASSERT(slot < exact->ne[1]);
            kernels->quantize_exact(x, m, blocks_at(exact, slot, 0, p.first), p.count * TBQ_BLOCK);
        }
    }
    return true;
}

bool tbq_ggml_concat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * exact = dst->src[0];
    const struct ggml_tensor * rows  = dst->src[1];
    if (dst->type != GGML_TYPE_TBQ8_0 || rows->type != GGML_TYPE_F32) {
        return false;
    }
    row_part p;
    for (int64_t i = 0; next_part(params, dst->ne[1] * dst->ne[2], dst->ne[0] / TBQ_BLOCK, &i, &p);) {
        const int64_t row = p.row % dst->ne[1], stream = p.row / dst->ne[1];
        char *        to = blocks_at(dst, row, stream, p.first);
        if (row < exact->ne[1]) {
            memcpy(to, blocks_at(exact, row, stream, p.first), p.count * sizeof(block_tbq8_0));
        } else {
            tbq_best_kernels()->quantize_exact(floats_at(rows, row - exact->ne[1], stream, p.first),
                                               floats_at(dst->src[2], 0, 0, p.first), to, p.count * TBQ_BLOCK);
        }
    }
    return true;
}
