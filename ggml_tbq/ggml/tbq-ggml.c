// SPDX-License-Identifier: MIT
#include "tbq-ggml.h"
#include "tbq-kernels.h"

#include <limits.h>
#include <string.h>

TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ2_0 == (int) TBQ_TYPE_TBQ2_0, "type id");
TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ3_0 == (int) TBQ_TYPE_TBQ3_0, "type id");
TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ4_0 == (int) TBQ_TYPE_TBQ4_0, "type id");
TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ8_0 == (int) TBQ_TYPE_TBQ8_0, "type id");
TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ8_ACT == (int) TBQ_TYPE_TBQ8_ACT, "type id");

#define DEFINE(name, i)                                                                                           \
    void dequantize_row_##name(const void * x, float * y, int64_t k) {                                            \
        tbq_best_kernels()->dequantize[i](x, y, k);                                                               \
    }                                                                                                             \
    void quantize_row_##name##_ref(const float * x, void * y, int64_t k) {                                        \
        tbq_best_kernels()->quantize_kv[i](x, NULL, NULL, y, k);                                                  \
    }                                                                                                             \
    void ggml_vec_dot_##name##_tbq8_act(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, \
                                        size_t by, int nrc) {                                                     \
        (void) bs, (void) bx, (void) by, (void) nrc; /* one row at a time: .nrows = 1 */                          \
        *s = tbq_best_kernels()->dot[i](vx, vy, n);                                                               \
    }
DEFINE(tbq2_0, 0)
DEFINE(tbq3_0, 1)
DEFINE(tbq4_0, 2)
#undef DEFINE

void dequantize_row_tbq8_0(const void * x, float * y, int64_t k) {
    tbq_best_kernels()->dequantize_exact(x, y, k);
}

void quantize_row_tbq8_0_ref(const float * x, void * y, int64_t k) {
    tbq_best_kernels()->quantize_exact(x, NULL, y, k);
}

void ggml_vec_dot_tbq8_0_tbq8_act(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                                  int nrc) {
    (void) bs, (void) bx, (void) by, (void) nrc; /* one row at a time: .nrows = 1 */
    *s = tbq_best_kernels()->dot_exact(vx, vy, n);
}

void quantize_row_tbq8_act(const float * x, void * y, int64_t k) {
    tbq_best_kernels()->quantize_act(x, y, k);
}

bool ggml_is_tbq(enum ggml_type type) {
    return type >= GGML_TYPE_TBQ2_0 && type <= GGML_TYPE_TBQ4_0;
}

size_t quantize_tbq(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row) {
    tbq_best_kernels()->quantize[type - GGML_TYPE_TBQ2_0](src, dst, nrows * n_per_row);
    return (size_t) nrows * tbq_row_bytes((tbq_type) type, n_per_row);
}

enum ggml_type tbq_ggml_type_from_name(const char * name) {
    for (int type = GGML_TYPE_TBQ2_0; type <= GGML_TYPE_TBQ4_0; type++) {
        if (strcmp(name, ggml_type_name((enum ggml_type) type)) == 0) {
            return (enum ggml_type) type;
        }
    }
    return GGML_TYPE_COUNT;
}

tbq_ggml_mad_t tbq_ggml_mad(enum ggml_type type) {
    return ggml_is_tbq(type) ? tbq_best_kernels()->mad_rotated[type - GGML_TYPE_TBQ2_0] : NULL;
}

void tbq_ggml_set_rows_exact(struct ggml_tensor * set_rows, struct ggml_tensor * exact, struct ggml_tensor * slots,
                             int32_t first) {
    GGML_ASSERT(set_rows->op == GGML_OP_SET_ROWS && ggml_is_tbq(set_rows->type));
    GGML_ASSERT(exact->type == GGML_TYPE_TBQ8_0 && exact->ne[0] == set_rows->src[0]->ne[0]);
    GGML_ASSERT(ggml_is_contiguous_rows(exact) && exact->ne[2] * exact->ne[3] == 1);
    GGML_ASSERT(slots->type == GGML_TYPE_I32 && ggml_is_contiguous(slots) && first >= 0 &&
                first + set_rows->src[0]->ne[1] <= ggml_nelements(slots));
    set_rows->src[5]       = exact;
    set_rows->src[6]       = slots;
    set_rows->op_params[0] = first;
}

static bool is_exact_side(const struct ggml_tensor * exact, const struct ggml_tensor * side, int64_t n_exact) {
    return !exact || (ggml_is_tbq(side->type) && exact->type == GGML_TYPE_TBQ8_0 && exact->ne[0] == side->ne[0] &&
                      exact->ne[1] == n_exact && exact->ne[2] == side->ne[2] && exact->ne[3] == side->ne[3]);
}

void tbq_ggml_flash_attn_ext_exact(struct ggml_tensor * fa, struct ggml_tensor * k, struct ggml_tensor * v,
                                   struct ggml_tensor * cells) {
    GGML_ASSERT(fa->op == GGML_OP_FLASH_ATTN_EXT && (k || v));
    const int64_t n_exact = (k ? k : v)->ne[1];
    const int64_t n_words = (fa->src[1]->ne[1] + 31) / 32;
    GGML_ASSERT((k != NULL) == ggml_is_tbq(fa->src[1]->type) && is_exact_side(k, fa->src[1], n_exact));
    GGML_ASSERT((v != NULL) == ggml_is_tbq(fa->src[2]->type) && is_exact_side(v, fa->src[2], n_exact));
    GGML_ASSERT(cells->type == GGML_TYPE_I32 && ggml_is_contiguous(cells) && cells->ne[0] == n_exact + n_words &&
                cells->ne[1] >= fa->src[0]->ne[3]);
    fa->src[5] = k;
    fa->src[6] = v;
    fa->src[7] = cells;
}

enum { CENTER_VALUES = 5 }; // of op_params; upstream's are 0 to 4

void tbq_ggml_flash_attn_ext_center(struct ggml_tensor * fa, struct ggml_tensor * mean, bool values) {
    GGML_ASSERT(fa->op == GGML_OP_FLASH_ATTN_EXT);
    const struct ggml_tensor * k = fa->src[1];
    GGML_ASSERT(!mean || (ggml_is_tbq(k->type) && mean->type == GGML_TYPE_F32 && ggml_is_contiguous(mean) &&
                          mean->ne[0] == k->ne[0] && ggml_nelements(mean) == k->ne[0] * k->ne[2]));
    GGML_ASSERT(!mean || !values || fa->src[2]->ne[0] <= k->ne[0]);
    fa->src[8]                   = mean;
    fa->op_params[CENTER_VALUES] = mean && values;
}

bool tbq_ggml_flash_attn_ext_center_values(const struct ggml_tensor * fa) {
    return fa->src[8] && fa->op_params[CENTER_VALUES];
}

bool tbq_ggml_flash_attn_ext_valid(const struct ggml_tensor * fa) {
    const struct ggml_tensor * k     = fa->src[1];
    const struct ggml_tensor * mean  = fa->src[8];
    const struct ggml_tensor * cells = fa->src[7];
    if (mean && !(ggml_is_tbq(k->type) && mean->type == GGML_TYPE_F32 && ggml_is_contiguous(mean) &&
                  mean->ne[0] == k->ne[0] && ggml_nelements(mean) == k->ne[0] * k->ne[2] &&
                  (!tbq_ggml_flash_attn_ext_center_values(fa) || fa->src[2]->type == k->type))) {
        return false;
    }
    if (!cells) {
        return !fa->src[5] && !fa->src[6];
    }
    const int64_t n_exact = cells->ne[0] - (k->ne[1] + 31) / 32;
    for (int side = 1; side <= 2; side++) {
        const struct ggml_tensor * t = fa->src[side];
        const struct ggml_tensor * e = fa->src[side + 4];
        if (ggml_is_tbq(t->type) != (e != NULL) ||
            (e && (e->type != GGML_TYPE_TBQ8_0 || e->ne[0] != t->ne[0] || e->ne[1] != n_exact || e->ne[2] != t->ne[2] ||
                   e->ne[3] != t->ne[3]))) {
            return false;
        }
    }
    return n_exact > 0 && n_exact < INT_MAX && cells->type == GGML_TYPE_I32 && ggml_is_contiguous(cells) &&
           cells->ne[1] >= k->ne[3] && cells->ne[2] * cells->ne[3] == 1;
}

struct ggml_tensor * tbq_ggml_concat_exact(struct ggml_context * ctx, struct ggml_tensor * exact,
                                           struct ggml_tensor * rows, struct ggml_tensor * mean) {
    GGML_ASSERT(exact->type == GGML_TYPE_TBQ8_0 && rows->type == GGML_TYPE_F32 && rows->nb[0] == sizeof(float));
    GGML_ASSERT(exact->ne[0] == rows->ne[0] && exact->ne[2] == rows->ne[2] && exact->ne[3] * rows->ne[3] == 1);
    GGML_ASSERT(!mean || (mean->type == GGML_TYPE_F32 && ggml_is_vector(mean) && mean->ne[0] == rows->ne[0]));
    struct ggml_tensor * result =
        ggml_new_tensor_3d(ctx, GGML_TYPE_TBQ8_0, rows->ne[0], exact->ne[1] + rows->ne[1], rows->ne[2]);
    result->op           = GGML_OP_CONCAT;
    result->op_params[0] = 1; // the dimension, as ggml_concat() sets it
    result->src[0]       = exact;
    result->src[1]       = rows;
    result->src[2]       = mean;
    return result;
}

bool tbq_ggml_device_attends(ggml_backend_dev_t dev, enum ggml_type type_k, enum ggml_type type_v, bool flash,
                             bool v_in_k, int64_t head_size_k, int64_t head_size_v, int64_t n_head, int64_t n_head_kv) {
    if (!dev || n_head == 0 || n_head_kv == 0 || (!ggml_is_tbq(type_k) && !ggml_is_tbq(type_v))) {
        return true;
    }
    enum { N_KV = 1024, PROMPT = 512 };
    const struct ggml_init_params params = { 64 * ggml_tensor_overhead(), NULL, true };
    struct ggml_context *         ctx    = ggml_init(params);
    if (!ctx) {
        return true;
    }
    // as llama.cpp lays them out: all heads of a token in a row
    struct ggml_tensor * cache_k = ggml_new_tensor_2d(ctx, type_k, head_size_k * n_head_kv, N_KV);
    struct ggml_tensor * k       = ggml_view_4d(ctx, cache_k, head_size_k, N_KV, n_head_kv, 1, cache_k->nb[1],
                                                ggml_row_size(type_k, head_size_k), cache_k->nb[2], 0);
    struct ggml_tensor * ids     = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1);
    bool                 can     = ggml_backend_dev_supports_op(
        dev, ggml_set_rows(ctx, cache_k, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, cache_k->ne[0], 1), ids));

    struct ggml_tensor * v = NULL;
    if (v_in_k) {
        // an indexer's cache has keys only, of another size: nobody attends to it
        if (head_size_v > 0 && head_size_v <= head_size_k && head_size_v % ggml_blck_size(type_k) == 0) {
            v = ggml_view_4d(ctx, cache_k, head_size_v, N_KV, n_head_kv, 1, cache_k->nb[1],
                             ggml_row_size(type_k, head_size_k), cache_k->nb[2], 0);
        }
    } else {
        struct ggml_tensor * cache_v = ggml_new_tensor_2d(ctx, type_v, head_size_v * n_head_kv, N_KV);
        v                            = ggml_view_4d(ctx, cache_v, head_size_v, N_KV, n_head_kv, 1, cache_v->nb[1],
                                                    ggml_row_size(type_v, head_size_v), cache_v->nb[2], 0);
        can                          = can &&
                                       ggml_backend_dev_supports_op(
                                           dev, ggml_set_rows(ctx, cache_v, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, cache_v->ne[0], 1), ids));
    }
    for (int i = 0; i < 2 && v; i++) {
        const int64_t        n    = i == 0 ? 1 : PROMPT;
        struct ggml_tensor * q    = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, head_size_k, n, n_head, 1);
        struct ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, N_KV, n, 1, 1);
        struct ggml_tensor * op =
            flash ? ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f) : ggml_mul_mat(ctx, k, q);
        if (flash && ggml_is_tbq(type_k)) { // some layers may need it, where keys are centered
            tbq_ggml_flash_attn_ext_center(op, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, head_size_k, n_head_kv), v_in_k);
        }
        can = can && ggml_backend_dev_supports_op(dev, op);
    }
    ggml_free(ctx);
    return can;
}
