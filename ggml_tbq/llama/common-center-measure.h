// SPDX-License-Identifier: MIT
// Measures the means of a model's keys: for llama-cache-center and for --cache-center auto.
//
// The mean of keys depends on their positions, because RoPE rotates a key by its position: channels that rotate fast
// average out, slow channels stay.  So the text is cut into chunks, at positions from the whole context.  A chunk sees
// only itself: on average its keys are those of a long context, at a fraction of the time.
#pragma once

#include "llama-center.h"

#include "common.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

struct common_center_deleter {
    void operator()(llama_center * center) { llama_center_free(center); }
};
using common_center_ptr = std::unique_ptr<llama_center, common_center_deleter>;

struct common_center_job {
    uint32_t    n_ctx;    // tokens of context that the chunks are spread over
    uint32_t    n_chunks; // at most: a short text has fewer.  0: the usual number
    std::string text;

    // Gets the context that measures, before it reads anything, to set what keys depend on: adapters, control vectors.
    std::function<void(llama_context * ctx)> on_context;

    // When a chunk is counted: how many are, of how many, and the tokens of context that they are spread over.
    std::function<void(const llama_cache_center_stats * stats, uint32_t n_done, uint32_t n_chunks, uint32_t n_ctx)>
        on_chunk;
};

// The adapters and the control vector that the parameters put in force at the start.  Throws std::runtime_error if one of
// them cannot be loaded.
void common_center_set_adapters(llama_context * ctx, const common_params & params);

// In a context of its own, of few cells; cparams are those of the context that the means are for.  Throws
// std::runtime_error with the reason if the keys cannot be measured.
common_center_ptr common_center_measure(llama_model * model, llama_context_params cparams,
                                        const common_center_job & job);
