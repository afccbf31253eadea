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

// For GGML_TYPE_TBQ2_0, TBQ3_0, TBQ4_0 and TBQ8_0, in the shapes of ggml_to_float_t, ggml_from_float_t, ggml_vec_dot_t.
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
TBQ_GGML_DECLARE(tbq8_0)
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

// Exact rows: some rows of a layer's cache, in tbq8_0 beside the packed ones.  A slot is a row of `exact`, a cell a row
// of the cache.

// The SET_ROWS also writes row i to the slot of exact that element first + i of slots names, unless that is -1.  The mean
// (src[3]) is subtracted in both; the weights (src[4]) concern the packed row.
//     src[5]        exact  tbq8_0 [n_embd, n_slots]
//     src[6]        slots  I32, contiguous, at least first + n_tokens elements
//     op_params[0]  first
// So the slots can lie behind the cells of FLASH_ATTN_EXT, in one input: a GPU waits for each input.
TBQ_API void tbq_ggml_set_rows_exact(struct ggml_tensor * set_rows, struct ggml_tensor * exact,
                                     struct ggml_tensor * slots, int32_t first);

// The attention reads slot j in place of cell cells[j], under the mask of the cell.  The cells of a stream are
// different, in any order; -1: the slot is not used.
//     src[5]  k      tbq8_0 [head_size_k, n_exact, n_head_kv, n_stream], or NULL where K is not a tbq type
//     src[6]  v      the same for V
//     src[7]  cells  I32 [n_exact + n_words, n_stream or more]: after the cells of a stream n_words = ceil(n_kv / 32)
//                    words with a bit for each row of the cache, bit c % 32 of word c / 32, which is set where a slot has
//                    row c.  An input of the graph: a kernel may read it before the one in front of it has ended.
TBQ_API void tbq_ggml_flash_attn_ext_exact(struct ggml_tensor * fa, struct ggml_tensor * k, struct ggml_tensor * v,
                                           struct ggml_tensor * cells);

// The stored keys are the keys minus their mean.  Given where softmax alone does not make that good: with sinks, with a
// soft-cap, or if the values are the first channels of the keys (`values`: the mean is added to the output).  K is a tbq
// type.  The result is that of whole keys (tbq-attention.h).  Query and mean are in the domain in which SET_ROWS gets
// the keys.
//     src[8]  mean  F32 [head_size_k, n_head_kv], contiguous, or NULL: then nothing changes
TBQ_API void tbq_ggml_flash_attn_ext_center(struct ggml_tensor * fa, struct ggml_tensor * mean, bool values);

// Whether values lack the mean in src[8], too.
TBQ_API bool tbq_ggml_flash_attn_ext_center_values(const struct ggml_tensor * fa);

// Whether exact rows and the mean of a FLASH_ATTN_EXT are as the functions above make them, or absent.  For a backend's
// supports_op: a node whose list would be left out has to be refused.
TBQ_API bool tbq_ggml_flash_attn_ext_valid(const struct ggml_tensor * fa);

// The slots of exact, tbq8_0 [n_embd, n_slots, n_stream], and after them rows - mean, F32 [n_embd, n_rows, n_stream],
// as tbq8_0: [n_embd, n_slots + n_rows, n_stream].  mean: F32 [n_embd] or NULL.  For batches with more rows than there
// are slots to spare.  A GGML_OP_CONCAT of dimension 1; the mean is src[2].
TBQ_API struct ggml_tensor * tbq_ggml_concat_exact(struct ggml_context * ctx, struct ggml_tensor * exact,
                                                   struct ggml_tensor * rows, struct ggml_tensor * mean);

// Whether the device supports the operations of a cache layer of these types: write rows, and attend for one token and
// for a prompt.  flash: with FLASH_ATTN_EXT, also of centered keys; otherwise by products, for which values are not quantized.  v_in_k: the
// values are the first channels of the keys (MLA).  An operation without support would run on the CPU, without a
// message, or abort.  True if neither type is tbq: upstream decides about its own types.
TBQ_API bool tbq_ggml_device_attends(ggml_backend_dev_t dev, enum ggml_type type_k, enum ggml_type type_v, bool flash,
                                     bool v_in_k, int64_t head_size_k, int64_t head_size_v, int64_t n_head,
                                     int64_t n_head_kv);

#ifdef __cplusplus
}
#endif
