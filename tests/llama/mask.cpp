// SPDX-License-Identifier: MIT
// llama_kv_mask_single_tokens() beside a loop that asks every cell: random caches, then the time of large ones.
#include "llama-kv-mask.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>

static std::mt19937 rng(1);

static int below(int n) {
    return (int) (rng() % n);
}

struct problem {
    llama_kv_cells              cells;
    std::vector<llama_seq_id>   seqs; // of the tokens
    std::vector<llama_seq_id *> seq_ids;
    std::vector<llama_pos>      pos;
    llama_ubatch                ubatch = {};
    int64_t                     first  = 0;

    void token(llama_seq_id seq, llama_pos p) {
        seqs.push_back(seq);
        pos.push_back(p);
    }

    void finish() {
        for (llama_seq_id & seq : seqs) {
            seq_ids.push_back(&seq);
        }
        ubatch.n_tokens = (uint32_t) seqs.size();
        ubatch.seq_id   = seq_ids.data();
        ubatch.pos      = pos.data();
    }

    int64_t n_tokens() const { return (int64_t) seqs.size() - first; }

    bool fill(int64_t n_kv, uint16_t * mask) const {
        return llama_kv_mask_single_tokens<uint16_t>(cells, ubatch, first, n_tokens(), n_kv, 1, 2, mask);
    }

    void fill_each(int64_t n_kv, uint16_t * mask) const {
        for (int64_t i = 0; i < n_tokens(); i++) {
            for (int64_t j = 0; j < n_kv; j++) {
                const bool visible =
                    !cells.is_empty(j) && cells.seq_has(j, seqs[first + i]) && cells.pos_get(j) <= pos[first + i];
                mask[i * n_kv + j] = visible ? 1 : 2;
            }
        }
    }
};

// Cells that are empty, or have one sequence or several, in order or not.
static bool random_problem() {
    problem   p;
    const int n_kv = 1 + below(300), n_seq = 1 + below(below(2) ? 4 : LLAMA_MAX_SEQ), run = 1 + below(40);
    const int shared = below(3), empty = below(3);
    p.cells.resize(n_kv + below(20));
    for (int j = 0, seq = 0; j < (int) p.cells.size(); j++) {
        seq = j % run ? seq : below(n_seq);
        if (empty && !below(4)) {
            continue;
        }
        p.cells.pos_set(j, below(200));
        p.cells.seq_add(j, seq);
        for (int other = below(n_seq); shared == 2 && !below(2) && !p.cells.seq_has(j, other); other = below(n_seq)) {
            p.cells.seq_add(j, other);
        }
    }
    std::vector<llama_seq_id> seqs(n_seq);
    for (int s = 0; s < n_seq; s++) {
        seqs[s] = s;
    }
    std::shuffle(seqs.begin(), seqs.end(), rng);
    p.first = below(3);
    for (int i = 0; i < p.first; i++) {
        p.token(below(n_seq), below(200));
    }
    for (int i = 0, n = 1 + below(std::min(n_seq, 40)); i < n; i++) {
        p.token(seqs[i], below(220));
    }
    const bool twice = !below(8);
    if (twice) {
        p.token(seqs[0], below(220));
    }
    p.finish();
    std::vector<uint16_t> mask(n_kv * p.n_tokens()), expected(mask.size());
    if (!p.fill(n_kv, mask.data())) {
        return twice;
    }
    p.fill_each(n_kv, expected.data());
    return !twice && mask == expected;
}

// Microseconds of both for n_seq sequences of n cells; in_turn: neighbors belong to different ones.
static void measure(int n_seq, int n, bool in_turn) {
    problem p;
    p.cells.resize(n_seq * n);
    for (int j = 0; j < n_seq * n; j++) {
        p.cells.pos_set(j, in_turn ? j / n_seq : j % n);
        p.cells.seq_add(j, in_turn ? j % n_seq : j / n);
    }
    for (int s = 0; s < n_seq; s++) {
        p.token(s, n);
    }
    p.finish();
    double                best[2] = { INFINITY, INFINITY };
    std::vector<uint16_t> mask((size_t) n_seq * n_seq * n);
    for (int i = 0; i < 10; i++) {
        for (int fast = 0; fast < 2; fast++) {
            const auto start = std::chrono::steady_clock::now();
            if (fast) {
                p.fill(n_seq * n, mask.data());
            } else {
                p.fill_each(n_seq * n, mask.data());
            }
            const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
            best[fast]                               = std::min(best[fast], time.count());
        }
    }
    printf("%d sequences of %d%s: %.0f us, each cell of each token %.0f us\n", n_seq, n, in_turn ? " in turn" : "",
           1e6 * best[1], 1e6 * best[0]);
}

int main() {
    const int n     = 20000;
    int       wrong = 0;
    for (int i = 0; i < n; i++) {
        wrong += !random_problem();
    }
    printf("%d problems, %d wrong\n", n, wrong);
    measure(1, 131072, false);
    measure(4, 32768, false);
    measure(8, 8192, false);
    measure(32, 8192, false);
    measure(32, 400, true);
    return wrong != 0;
}
