// SPDX-License-Identifier: MIT
// --cache-recent and --cache-first in the programs of llama.cpp; included by the patched common.h.
#pragma once

#include "llama.h"

#include <cstdint>
#include <stdexcept>
#include <string>

// How many rows of each sequence a tbq cache keeps in 8 bits as well (llama_set_cache_exact).  The defaults were chosen
// by measurement: docs/measurements/exact.md.
struct common_cache_exact {
    uint32_t n_recent = 128;
    uint32_t n_first  = 4;
};

// Of a draft model: twice as many recent rows.  A draft predicts the next few tokens, mostly from the newest, and its
// cache is small.  Drafts of 2 bits are then accepted more often: docs/measurements/centering.md.
static inline common_cache_exact common_cache_exact_draft(common_cache_exact rows) {
    rows.n_recent *= 2;
    return rows;
}

// Throws for anything but a number of rows.
static inline uint32_t common_cache_rows(const std::string & value) {
    if (value.empty() || value.size() > 9 || value.find_first_not_of("0123456789") != std::string::npos) {
        throw std::invalid_argument("'" + value + "' is not a number of rows, 0 to 999999999");
    }
    return (uint32_t) std::stoul(value);
}

// The context with its exact rows, or NULL, with the context freed, if memory is short (see the log).
static inline llama_context * common_set_exact(llama_context * ctx, const common_cache_exact & rows) {
    if (ctx && llama_set_cache_exact(ctx, rows.n_recent, rows.n_first) != 0) {
        llama_free(ctx);
        return nullptr;
    }
    return ctx;
}
