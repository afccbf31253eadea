// SPDX-License-Identifier: MIT
// Centered keys: the cache holds each key minus the mean of its layer, head and channel (docs/design/centering.md).
//
// llama_set_cache_center() in llama.h names the file with the means.  This header is for whoever measures them:
//
//     llama_cache_center_stats * stats = NULL;                                 // params.cb_eval_user_data = &stats
//     stats = llama_cache_center_stats_init(ctx);                              // of a context without a center
//     // for each chunk of text: clear the memory, llama_decode() it at its positions, then
//     llama_cache_center_stats_add(stats, ctx, pos);
//     llama_cache_center_stats_save(stats, ctx, n_ctx, "model.center.gguf");
//     llama_cache_center_stats_free(stats);
//
// The keys are read back from the cache, so what is measured is what a cache holds, whatever the architecture does to
// a key first.  Functions that fail say why through llama.cpp's log.
#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

struct llama_cache_center_stats;

// NULL if the model has no layer whose keys may be centered.
LLAMA_API struct llama_cache_center_stats * llama_cache_center_stats_init(const struct llama_context * ctx);
LLAMA_API void                              llama_cache_center_stats_free(struct llama_cache_center_stats * stats);

// For llama_context_params.cb_eval, with the address of a stats pointer (NULL until there is one) as user data: counts
// the queries that each layer's keys are read with.
LLAMA_API bool llama_cache_center_stats_eval(struct ggml_tensor * t, bool ask, void * user_data);

// Count the keys of sequence 0 whose position is at least `pos`.  Returns how many, negative on failure.
LLAMA_API int32_t llama_cache_center_stats_add(struct llama_cache_center_stats * stats, struct llama_context * ctx,
                                               llama_pos pos);

// The share of the keys' energy that the mean holds, |E k|^2 / E |k|^2 in 0..1; -1 for a layer that is not centered.
LLAMA_API float llama_cache_center_stats_share(const struct llama_cache_center_stats * stats, int32_t il);

// How many cells a context needs so that its keys are those of a context of n_ctx tokens: few, unless the model changes
// its RoPE with the context.
LLAMA_API uint32_t llama_cache_center_n_cells(const struct llama_model * model, uint32_t n_ctx, uint32_t n_chunk);

// Write the means, for contexts of n_ctx tokens.  0, or negative on failure.
LLAMA_API int32_t llama_cache_center_stats_save(const struct llama_cache_center_stats * stats,
                                                const struct llama_context * ctx, uint32_t n_ctx, const char * path);
// The same in two steps.  NULL on failure; llama_center_free() ends what is returned.
LLAMA_API struct llama_center * llama_cache_center_stats_get(const struct llama_cache_center_stats * stats,
                                                             const struct llama_context * ctx, uint32_t n_ctx);
LLAMA_API int32_t               llama_center_save(const struct llama_center * center, const char * path);

// For a program that keeps centers: how many tokens of context the means for a context are measured over.  Contexts of
// similar lengths share a center (docs/design/centering.md).
LLAMA_API uint32_t llama_cache_center_n_ctx(const struct llama_context * ctx);

// What a center depends on, the model with its adapters, this number and RoPE, as 32 hexadecimal digits in buf: a name
// for its file.
// own_rope: whether RoPE is as the model's file says; the name is then that of Python's center_of_model().
// Negative if the keys of this context cannot be centered; buf then has the reason.
LLAMA_API int32_t llama_cache_center_key(const struct llama_context * ctx, bool own_rope, char * buf, size_t n);

#ifdef __cplusplus
}
#endif
