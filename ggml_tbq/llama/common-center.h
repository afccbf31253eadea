// SPDX-License-Identifier: MIT
// --cache-center in the programs of llama.cpp; included by the patched common.cpp.
#pragma once

#include "common.h"

// The context with the means that the parameters name, or NULL, with the context freed, if they do not fit it (see the
// log).
static inline llama_context * common_set_center(llama_context * ctx, common_params & params) {
    if (!ctx || params.cache_center.empty()) {
        return ctx;
    }
    if (!params.cache_center_data) {
        // once: when a server wakes up the file may have changed, or be gone
        params.cache_center_data.reset(llama_center_load(params.cache_center.c_str()), llama_center_free);
    }
    if (!params.cache_center_data || llama_set_center(ctx, params.cache_center_data.get()) != 0) {
        llama_free(ctx);
        return nullptr;
    }
    return ctx;
}
