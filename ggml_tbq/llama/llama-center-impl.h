// SPDX-License-Identifier: MIT
// Shared by the three parts of centered keys: the file (llama-center-file.cpp), the cache (llama-center.cpp) and the
// measuring (llama-center-stats.cpp).
#pragma once

#include "llama.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

class llama_kv_cache;
struct llama_file;
struct llama_model_loader;

// What ties a center to a model: the names, types, shapes and the first and last bytes of all tensors of the model's
// files. A model keeps where they are; they are read when a center is set or saved.
struct llama_center_source {
    struct tensor {
        std::string text; // name, type and shape
        size_t      i_file;
        size_t      offset;
        size_t      size;
        std::string sample; // where there is no path to read again: read with the model
    };
    std::vector<tensor>      tensors; // sorted by name
    std::vector<std::string> paths;   // of the files

    // SHA-256 in hex.  Throws if a file cannot be read again.
    std::string fingerprint() const;
};

// The contents of a center's file.
struct llama_center {
    std::string path;        // for messages
    std::string fingerprint; // of the model
    std::string arch;
    uint32_t    n_ctx    = 0;
    uint64_t    n_tokens = 0;
    struct layer {
        int64_t            n_embd_head; // head size
        int64_t            n_head_kv;
        std::vector<float> mean;   // [n_head_kv][n_embd_head]
        std::vector<float> energy; // mean square of the queries that read these keys, the same shape
        std::vector<float> rope;
        std::string        rope_factors;
        float              share; // the share of the keys' energy that is in their mean
    };
    std::map<int32_t, layer> layers;

    // of everything above except the path: corruption shows, and two centers with one hash are the same
    std::string hash() const;

    // both throw
    void                save(const char * path) const;
    static llama_center load(const char * path);
};

// RoPE as the context applies it to a layer: the keys' means depend on it.
std::vector<float> llama_center_rope(const llama_context & ctx, int32_t il);
std::string        llama_center_rope_factors(const llama_context & ctx, int32_t il);

// What the attention of a layer has that sees more of a key than what is left when a constant is subtracted from all of
// them, or NULL.  It is exact with the mean as one more operand of attention, which keys of a tbq type have.
const char * llama_center_needs_mean(const llama_model & model, int32_t il);

// Why keys of this type are not centered in a layer, or NULL.
const char * llama_center_why_not(const llama_model & model, int32_t il, ggml_type type_k);

// The model of a context with the adapters and the control vector that are in force: keys depend on all of them.
// Throws if the model's file cannot be read again.
std::string llama_center_identity(const llama_context & ctx);

// Throws if the memory of a context holds keys.
void llama_center_check_empty(const llama_context & ctx);

// The caches of a context that hold keys of heads.  Throws if it has none.
std::vector<llama_kv_cache *> llama_center_caches(const llama_context & ctx);
