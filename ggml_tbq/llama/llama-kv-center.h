// SPDX-License-Identifier: MIT
// What a KV cache holds for centered keys: the means that it subtracts, and what its states say about them.
// Included by the patched llama-kv-cache.h; the code is in llama-center.cpp.
#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cells;
class llm_graph_result;
struct llama_hparams;

// Whether the graph rotates the keys of a tbq cache across the whole head, as it does for other quantized types, while
// they are not centered: where a head has many blocks, and RoPE pairs channels of different ones.
bool llama_kv_center_rotates(const llama_hparams & hparams);

// By how much a K-shift turns each row that it reads.
struct llama_kv_shift {
    ggml_tensor * by;   // I32, of every row or of those below
    ggml_tensor * rows; // I32, the rows that move; null: it writes every row again

    llama_kv_shift(ggml_tensor * by = nullptr, ggml_tensor * rows = nullptr) : by(by), rows(rows) {}

    operator ggml_tensor *() const { return by; }
};

// Of one layer.  A layer without means returns every tensor as it is.
struct llama_kv_center_layer {
    ggml_tensor * mean        = nullptr; // f32 [n_embd_k_gqa]
    ggml_tensor * weight      = nullptr; // the same, of the channels; for tbq types
    ggml_tensor * heads       = nullptr; // the means as [n_embd_head, n_head_kv], where attention needs them
    int64_t       n_embd_head = 0;
    int64_t       n_embd_nope = 0; // channels of a head before those that RoPE turns

    explicit operator bool() const { return mean; }

    // k: whole rows of the cache, or heads of them, or the channels of each head that RoPE turns
    ggml_tensor * add(ggml_context * ctx, ggml_tensor * k) const;
    ggml_tensor * subtract(ggml_context * ctx, ggml_tensor * k) const;

    // k_cur minus the means into the cache
    ggml_tensor * set_rows(ggml_context * ctx, ggml_tensor * k, ggml_tensor * k_cur, ggml_tensor * k_idxs) const;

    // A K-shift of the heads k, a view of a cache.  A row of a tbq type that moves is read, turned, and written as a new
    // key is, with the means and the weights; a row that stays is left alone.  Keys of other types are all written again,
    // as upstream does.
    static llama_kv_shift shift(llm_graph_result * res, const std::vector<llama_kv_cells> & v_cells,
                                const ggml_tensor * k, ggml_tensor * by);
    ggml_tensor *         load(ggml_context * ctx, ggml_tensor * k, const llama_kv_shift & shift) const; // f32
    ggml_tensor * store(ggml_context * ctx, ggml_tensor * k, ggml_tensor * moved, const llama_kv_shift & shift) const;

    // Where the result of attention depends on the means (sinks, soft-caps, values that are channels of the keys):
    // FLASH_ATTN_EXT gets them, and without flash attention the logits get back what the means took from them.
    void          attend(ggml_tensor * fa, bool values) const;
    ggml_tensor * logits(ggml_context * ctx, ggml_tensor * kq, ggml_tensor * q) const;
};

// Of a cache.
struct llama_kv_center {
    // in place of a hash: keys that are not centered, and rotated by the graph
    static const std::string ROTATED;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs; // of the layers' means
    std::string                                                       hash; // of their file; empty without means

    void state_write(llama_io_write_i & io) const;
    void state_read(llama_io_read_i & io, uint32_t & n_stream) const;
};
