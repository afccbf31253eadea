// SPDX-License-Identifier: MIT
// The causal mask of a decode step.  The patched llama-kv-cache.cpp includes this; the figures are in
// docs/design/cuda.md, "What the host does".
#pragma once

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <vector>

// Fills mask, n_tokens rows of n_kv, if each of the n_tokens tokens of ubatch from `first` on is the only one of its
// sequence; otherwise returns false, and nothing is written.  cells: those of all these tokens.  keep, drop: what a
// visible and a hidden cell gets.
template <typename T>
bool llama_kv_mask_single_tokens(const llama_kv_cells & cells, const llama_ubatch & ubatch, int64_t first,
                                 int64_t n_tokens, int64_t n_kv, T keep, T drop, T * mask) {
    std::bitset<LLAMA_MAX_SEQ> seqs;
    for (int64_t i = 0; i < n_tokens; ++i) {
        const llama_seq_id seq = ubatch.seq_id[first + i][0];
        if (seqs.test(seq)) {
            return false;
        }
        seqs.set(seq);
    }

    // If no cell lacks the sequence, positions say what is visible, and this becomes vector code.
    if (n_tokens == 1 && cells.seq_pos_get(ubatch.seq_id[first][0]).size() == cells.get_used()) {
        const llama_pos * pos  = cells.pos_data();
        const uint32_t    last = (uint32_t) ubatch.pos[first]; // an empty cell's -1 is above it
        for (int64_t j = 0; j < n_kv; ++j) {
            mask[j] = (uint32_t) pos[j] <= last ? keep : drop;
        }
        return true;
    }

    // Otherwise the cells are read once for all tokens.  A cell has 32 bytes of sequences, mostly those of its neighbor.
    std::fill(mask, mask + n_kv * n_tokens, drop);
    std::vector<int64_t> tokens; // with a sequence of the cell
    for (int64_t j = 0; j < n_kv; ++j) {
        if (j == 0 || cells.seq_get_all(j) != cells.seq_get_all(j - 1)) {
            tokens.clear();
            for (int64_t i = 0; i < n_tokens; ++i) {
                if (cells.seq_has(j, ubatch.seq_id[first + i][0])) {
                    tokens.push_back(i);
                }
            }
        }
        for (const int64_t i : tokens) {
            if (cells.pos_in(j, 0, ubatch.pos[first + i] + 1)) {
                mask[n_kv * i + j] = keep;
            }
        }
    }
    return true;
}
