// SPDX-License-Identifier: MIT
// Exact rows: the newest and the first rows of each sequence, which a cache of a tbq type keeps in 8 bits as well.
// Included by the patched llama-kv-cache.h; the code is in llama-kv-exact.cpp, the reasons in docs/design/exact.md.
#pragma once

#include "llama-kv-center.h"

#include "ggml-cpp.h"
#include "llama.h"

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llama_kv_cache_context;
class llm_graph_result;

// The exact rows of a cache, and which cells they belong to.  A cell that the list names is read from its slot.  A cell
// that it does not name is read as it always was: whatever is in doubt is dropped from the list.
class llama_kv_exact {
public:
    // Whether K or V of a cache has a tbq type.
    static bool applies(const llama_kv_cache & kv);

    // Keeps the newest n_recent and the first n_first rows of each sequence; 0 and 0: none.  The cache has to be empty.
    // Throws if memory is short; the cache then has no exact rows.
    void init(const llama_kv_cache & kv, uint32_t n_recent, uint32_t n_first);

    explicit operator bool() const { return n_slots > 0; }

    size_t size() const; // bytes
    size_t n_layer() const;
    void   memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

    // The list follows the cells.
    void clear();
    void forget(const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs);
    void copy_stream(uint32_t src, uint32_t dst);            // the list
    void copy_stream_rows(uint32_t src, uint32_t dst) const; // the rows, when the cache's own are copied

    // Where the next graph writes its tokens, as in llama_kv_cache::slot_info, and how many cells it reads.
    void begin(uint32_t s0, const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs,
               uint32_t n_kv);

    // For the K-shift: the exact rows of the keys that it rotates (k: a view of cache layer ikv), or NULL, and the shift
    // of each, I32 [n_slots*n_stream].
    ggml_tensor * get_k_shift(ggml_context * ctx, const ggml_tensor * k, size_t ikv) const;
    ggml_tensor * build_input_k_shift(llm_graph_result * res) const;

    // In a state: which of its cells have exact rows, in front of it, and the rows, behind it.  Nothing where no cell
    // has one.
    struct state {
        std::vector<std::vector<uint32_t>> nth;   // [n_stream]: numbers of such cells among those of the state
        std::vector<std::vector<uint32_t>> cells; // [n_stream]: where the state's cells are now
        std::vector<uint32_t>              strm;  // [n_stream]
    };
    void  state_write_cells(llama_io_write_i & io, llama_seq_id seq_id) const;
    void  state_write_rows(llama_io_write_i & io, llama_seq_id seq_id) const;
    state state_read_cells(llama_io_read_i & io, const llama_kv_cache & kv, uint32_t & n_stream) const;
    void  state_read_rows(llama_io_read_i & io, const llama_kv_cache & kv, llama_state_seq_flags flags,
                          const state & state);

private:
    friend class llama_kv_exact_attn;
    class graph_input;
    class shift_input;

    // of a cache layer: tbq8_0 [n_embd_gqa, n_slots*n_stream], NULL where the cache's own tensor is of another type
    struct layer {
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;

        std::vector<ggml_tensor *> k_stream = {};
        std::vector<ggml_tensor *> v_stream = {};
    };

    struct slot {
        int32_t cell  = -1;
        bool    first = false; // one of the first rows of its sequence
    };

    struct saved {
        uint32_t nth; // among the cells of the state
        uint32_t slot;
    };

    const llama_kv_cache * kv = nullptr;

    uint32_t n_recent = 0;
    uint32_t n_first  = 0;
    uint32_t n_seq    = 0; // of a stream
    uint32_t n_spare  = 0; // tokens of a stream in one ubatch that need no row of the window
    uint32_t n_slots  = 0; // of a stream

    std::vector<layer>                                                layers;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;

    std::vector<std::vector<slot>>    slots;   // [n_stream][n_slots]
    std::vector<std::vector<int32_t>> slot_of; // [n_stream][kv_size], or -1

    struct {
        uint32_t                           s0   = 0;
        uint32_t                           n_kv = 0;
        std::vector<llama_seq_id>          strm;
        std::vector<std::vector<uint32_t>> idxs;
    } cur;

    bool is_long(uint32_t n_rows) const { return n_rows > n_spare; }

    void drop(uint32_t strm, uint32_t i);

    std::vector<llama_pos> next_queries(uint32_t strm, const std::vector<uint32_t> & idxs) const;
    bool                   is_recent(uint32_t strm, uint32_t cell, const std::vector<llama_pos> & queries) const;
    std::vector<int32_t>   assign(uint32_t strm, const std::vector<uint32_t> & idxs, bool all);

    std::vector<saved> saved_rows(uint32_t strm, llama_seq_id seq_id) const;

    void set_input(ggml_tensor * list);
};

// What the graph that is being built adds to the attention of a layer: exact rows, and the mean of centered keys where
// the result depends on it.  Without any, every function returns what it is given.
class llama_kv_exact_attn {
public:
    // Before the keys and values are stored.  k_cur, v_cur: [n_embd_head, n_head, n_tokens], or NULL if they are not
    // stored.
    llama_kv_exact_attn(llm_graph_result * res, const llama_kv_cache_context * mctx, ggml_tensor * k_cur,
                        ggml_tensor * v_cur, int32_t il);

    // SET_ROWS into the cache stores the exact rows, too
    ggml_tensor * store_k(ggml_tensor * set_rows) const;
    ggml_tensor * store_v(ggml_tensor * set_rows) const;

    // FLASH_ATTN_EXT reads them, and the mean
    void attend(ggml_tensor * flash_attn_ext) const;

    // without flash attention: kq with what the mean took from it.  q: [n_embd_head, n_tokens, n_head, n_stream]
    ggml_tensor * logits(ggml_tensor * kq, ggml_tensor * q) const;

private:
    ggml_tensor * store(ggml_tensor * set_rows, ggml_tensor * exact) const;

    ggml_context *                ctx;
    llama_kv_exact::graph_input * inp = nullptr;
    int32_t                       ikv = -1;

    const llama_kv_center_layer * center = nullptr;
    bool                          values = false; // they are the first channels of the keys
};
