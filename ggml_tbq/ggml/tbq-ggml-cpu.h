// SPDX-License-Identifier: MIT
// Operations of the CPU backend with their own kernels for the tbq types; compiled into ggml-cpu, on whose threads
// they run.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// GGML_OP_FLASH_ATTN_EXT with tbq on one side at least (tbq-attention.h).  Called by every thread.  False, with
// nothing done, for what the kernels do not take and when the reference is asked for: the generic path follows.
bool tbq_ggml_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Exact rows in the generic path.  The slot that has a row of the cache, or -1; then the product of its key with a
// query in TBQ8_ACT, and p times its value added to acc, rotated.  False, with nothing done, if it has none.
int64_t tbq_ggml_exact_slot(const struct ggml_tensor * fa, int64_t stream, int64_t cell);
bool    tbq_ggml_exact_dot(const struct ggml_tensor * fa, int64_t slot, int64_t head, int64_t stream, const void * q,
                           float * s);
bool    tbq_ggml_exact_mad(const struct ggml_tensor * fa, int64_t slot, int64_t head, int64_t stream, float p,
                           float * acc);

// Centered keys in the generic path, for a query row and its head (tbq_ggml_flash_attn_ext_center).
typedef struct {
    float         capped; // to be added to a logit that is divided by the soft-cap
    float         sink;   // to be subtracted from the sink; 0 with a soft-cap
    const float * values; // to be added to each row of V, or NULL
} tbq_ggml_center;

tbq_ggml_center tbq_ggml_center_of(const struct ggml_tensor * fa, const float * q, int64_t head);

// The work buffer that it needs; 0 for what it does not take.
size_t tbq_ggml_flash_attn_ext_work_size(const struct ggml_tensor * dst, int n_threads);

// GGML_OP_SET_ROWS of centered keys: into a tbq type, with the mean of a row in src[3] and the weights of its channels
// in src[4] (tbq_quantize_kv_centered; f32, src[0]->ne[0] each; NULL where there is none), and of rows that are stored
// exactly, too (tbq_ggml_set_rows_exact).  Called by every thread.  False, with nothing done, without any of these.
bool tbq_ggml_set_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// The node of tbq_ggml_concat_exact.  Called by every thread.  False, with nothing done, for any other CONCAT.
bool tbq_ggml_concat(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
