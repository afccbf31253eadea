#include "tbq-ggml.h"

TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ2_0 == (int) TBQ_TYPE_TBQ2_0, "type id");
TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ3_0 == (int) TBQ_TYPE_TBQ3_0, "type id");
TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ4_0 == (int) TBQ_TYPE_TBQ4_0, "type id");
TBQ_STATIC_ASSERT((int) GGML_TYPE_TBQ8_ACT == (int) TBQ_TYPE_TBQ8_ACT, "type id");

#define DEFINE(name, i)                                                                                         \
    void tbq_ggml_to_float_##name(const void * x, float * y, int64_t k) {                                       \
        tbq_best_kernels()->dequantize[i](x, y, k);                                                             \
    }                                                                                                           \
    void tbq_ggml_from_float_##name(const float * x, void * y, int64_t k) {                                     \
        tbq_best_kernels()->quantize_kv[i](x, y, k);                                                            \
    }                                                                                                           \
    void tbq_ggml_vec_dot_##name(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,      \
                                 size_t by, int nrc) {                                                          \
        (void) bs, (void) bx, (void) by, (void) nrc; /* one row at a time: .nrows = 1 */                        \
        *s = tbq_best_kernels()->dot[i](vx, vy, n);                                                             \
    }
DEFINE(tbq2_0, 0)
DEFINE(tbq3_0, 1)
DEFINE(tbq4_0, 2)

void tbq_ggml_from_float_tbq8_act(const float * x, void * y, int64_t k) {
    tbq_best_kernels()->quantize_act(x, y, k);
}

bool ggml_type_rotates(enum ggml_type type) {
    return type >= GGML_TYPE_TBQ2_0 && type <= GGML_TYPE_TBQ4_0;
}

size_t tbq_ggml_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row) {
    tbq_best_kernels()->quantize[type - GGML_TYPE_TBQ2_0](src, dst, nrows * n_per_row);
    return (size_t) nrows * tbq_row_bytes((tbq_type) type, n_per_row);
}

tbq_ggml_mad_t tbq_ggml_mad(enum ggml_type type) {
    return ggml_type_rotates(type) ? tbq_best_kernels()->mad_rotated[type - GGML_TYPE_TBQ2_0] : NULL;
}
