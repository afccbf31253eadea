// SPDX-License-Identifier: MIT
// The tbq kernels in the shapes that ggml's tables and attention want; compiled into ggml-base.
// Included by the patched ggml sources, after ggml.h.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"
#include "tbq.h"

#ifdef __cplusplus
extern "C" {
#endif

// For GGML_TYPE_TBQ2_0, TBQ3_0 and TBQ4_0, in the shapes of ggml_to_float_t, ggml_from_float_t, ggml_vec_dot_t.
//
// quantize_row_*_ref, which SET_ROWS and CPY call too, encodes for attention (tbq_quantize_kv).  ggml keeps a slow
// reference next to a fast encoder of each type; here every implementation writes the reference's bytes, so one
// function serves as from_float_ref and as from_float.  ggml_quantize_chunk, which llama-quantize calls, encodes for
// the least error (tbq_quantize).
#define TBQ_GGML_DECLARE(name)                                                                           \
    TBQ_API void dequantize_row_##name(const void * x, float * y, int64_t k);                            \
    TBQ_API void quantize_row_##name##_ref(const float * x, void * y, int64_t k);                        \
    TBQ_API void ggml_vec_dot_##name##_tbq8_act(int n, float * s, size_t bs, const void * vx, size_t bx, \
                                                const void * vy, size_t by, int nrc);
TBQ_GGML_DECLARE(tbq2_0)
TBQ_GGML_DECLARE(tbq3_0)
TBQ_GGML_DECLARE(tbq4_0)
#undef TBQ_GGML_DECLARE

// For GGML_TYPE_TBQ8_ACT, which has no way back to float, like q8_K.
TBQ_API void quantize_row_tbq8_act(const float * x, void * y, int64_t k);

// A case of ggml_quantize_chunk: rows of floats to rows of blocks.  Returns the bytes written.
TBQ_API size_t quantize_tbq(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row);

// The type of that name, for programs that keep a list of their own; GGML_TYPE_COUNT if it is not one of the three.
TBQ_API enum ggml_type tbq_ggml_type_from_name(const char * name);

// The values of flash attention are summed in the rotated domain: acc += p . v for a row v of n values, once for
// every key, and tbq_unrotate on the sum, once for every query.  NULL for types that are not tbq.
typedef void (*tbq_ggml_mad_t)(const void * v, float p, float * acc, int64_t n);
TBQ_API tbq_ggml_mad_t tbq_ggml_mad(enum ggml_type type);

// Whether the device supports the operations of a cache layer of these types: write rows, and attend for one token and
// for a prompt.  flash: with FLASH_ATTN_EXT; otherwise by products, for which values are not quantized.  v_in_k: the
// values are the first channels of the keys (MLA).  An operation without support would run on the CPU, without a
// message, or abort.  True if neither type is tbq: upstream decides about its own types.
TBQ_API bool tbq_ggml_device_attends(ggml_backend_dev_t dev, enum ggml_type type_k, enum ggml_type type_v, bool flash,
                                     bool v_in_k, int64_t head_size_k, int64_t head_size_v, int64_t n_head,
                                     int64_t n_head_kv);

#ifdef __cplusplus
}
#endif
