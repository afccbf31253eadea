// SPDX-License-Identifier: MIT
// Random problems of attention, compared with double precision: for the kernels of decode (attention.cu) and of prompts
// (prompt.cu).
#pragma once

#include "tbq-attention.cuh"

#include "check.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

template <typename T> struct device_array {
    T *    p = nullptr;
    size_t n = 0;
    // to a multiple of 16 bytes, as ggml's buffers are
    explicit device_array(size_t count) : n(count) { CHECK(cudaMalloc(&p, (count * sizeof(T) + 31) / 16 * 16)); }
    device_array(const std::vector<T> & v) : device_array(v.size()) {
        CHECK(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    device_array(const device_array &) = delete;
    ~device_array() { cudaFree(p); }
};

// Every pair that has kernels, those that do something of their own first.
static const int PAIRS[][2] = { { 4, 4 }, { 3, 3 },  { 2, 2 },  { 4, 3 },  { 3, 2 },  { 2, 4 },  { 8, 4 },
                                { 3, 8 }, { 16, 3 }, { 4, 16 }, { 4, 2 },  { 2, 3 },  { 3, 4 },  { 8, 2 },
                                { 8, 3 }, { 2, 8 },  { 4, 8 },  { 16, 2 }, { 16, 4 }, { 2, 16 }, { 3, 16 } };
// Those of prompts, in an order of their own.
static const int PROMPT_PAIRS[][2] = { { 4, 4 }, { 3, 3 }, { 2, 2 }, { 4, 3 }, { 2, 4 },
                                       { 3, 2 }, { 4, 2 }, { 2, 3 }, { 3, 4 } };
static const int N_ALL             = sizeof(PAIRS) / sizeof(PAIRS[0]);
static const int N_PAIRS           = 10; // of these without exact rows
static const int N_ROWS_PAIRS      = 5;  // of these by the kernel for whole rows (attention-rows.cu)

// Random blocks: any bytes decode to something; only the scales must be reasonable.
static std::vector<char> random_rows(int bits, size_t n_blocks, std::mt19937 & rng) {
    const int         bytes = tbq_attention_block(bits);
    std::vector<char> rows(n_blocks * bytes);
    if (bits == 16) {
        std::normal_distribution<float> normal;
        for (size_t i = 0; i < rows.size() / 2; i++) {
            const __half h = __float2half(normal(rng));
            std::memcpy(&rows[2 * i], &h, 2);
        }
        return rows;
    }
    for (size_t i = 0; i + 4 <= rows.size(); i += 4) {
        const uint32_t r = rng();
        std::memcpy(&rows[i], &r, 4);
    }
    for (size_t i = rows.size() / 4 * 4; i < rows.size(); i++) {
        rows[i] = (char) rng();
    }
    for (size_t b = 0; b < n_blocks; b++) {
        for (int i = 0; i < (bits == 8 ? 2 : 1); i++) {
            const float  d = (0.5f + (rng() % 1000) / 1000.0f) / (bits == 8 ? 74.0f : 22.0f);
            const __half h = __float2half(d);
            std::memcpy(&rows[b * bytes + i * 34], &h, 2);
        }
    }
    return rows;
}

static std::vector<char> random_exact_rows(size_t n_blocks, std::mt19937 & rng) {
    std::vector<char> rows(n_blocks * sizeof(block_tbq8_0));
    for (size_t b = 0; b < n_blocks; b++) {
        block_tbq8_0 x;
        x.d = (0.5f + (rng() % 1000) / 1000.0f) / 74.0f;
        for (int8_t & q : x.qs) {
            q = (int8_t) ((int) (rng() % 255) - 127);
        }
        std::memcpy(&rows[b * sizeof(x)], &x, sizeof(x));
    }
    return rows;
}

static tbq_type type_of(int bits) {
    return (tbq_type) (TBQ_TYPE_TBQ2_0 + bits - 2);
}

static void decode(int bits, const char * row, float * to, int n) {
    if (bits < 8) {
        tbq_dequantize(type_of(bits), row, to, n);
        return;
    }
    for (int i = 0; i < n; i++) {
        __half h;
        std::memcpy(&h, bits == 16 ? row + 2 * i : row + i / 32 * 34, 2);
        to[i] = bits == 16 ? __half2float(h) : __half2float(h) * (signed char) row[i / 32 * 34 + 2 + i % 32];
    }
}

// The query as the kernel rounds it: 8 bits and one scale for 64 rotated values, for 32 values with q8_0 keys, or f16.
static void round_query(int bits_k, float * q, int d) {
    if (bits_k == 16) {
        for (int i = 0; i < d; i++) {
            q[i] = __half2float(__float2half(q[i]));
        }
        return;
    }
    const int n = bits_k == 8 ? 32 : 64;
    if (bits_k < 8) {
        tbq_rotate(q, q, d);
    }
    for (int e = 0; e < d; e += n) {
        float largest = 0;
        for (int c = e; c < e + n; c++) {
            largest = std::max(largest, std::fabs(q[c]));
        }
        for (int c = e; c < e + n; c++) {
            q[c] = largest > 0 ? std::nearbyint(q[c] * (127 / largest)) * (largest / 127) : 0;
        }
    }
    if (bits_k < 8) {
        tbq_unrotate(q, q, d);
    }
}

static double alibi(float max_bias, int head, int n_head) {
    if (max_bias == 0) {
        return 1;
    }
    const int n_log2 = 1 << (int) std::floor(std::log2(n_head));
    return head < n_log2 ? std::pow(std::pow(2.0, -max_bias / n_log2), head + 1)
                         : std::pow(std::pow(2.0, -max_bias / 2 / n_log2), 2 * (head - n_log2) + 1);
}

// The list of exact rows of a problem, in one of the ways that a cache can have made it, and its bitmap.
static std::vector<int> random_cells(int n_kv, int n_exact, std::mt19937 & rng) {
    std::vector<int> cells(n_exact + (n_kv + 31) / 32), rows(n_kv);
    for (int i = 0; i < n_kv; i++) {
        rows[i] = i;
    }
    const int kind = rng() % 6;
    if (kind >= 2) { // in any order, with holes; else the first rows, or the last ones
        std::shuffle(rows.begin(), rows.end(), rng);
    } else if (kind == 1) {
        std::rotate(rows.begin(), rows.begin() + std::max(0, n_kv - n_exact), rows.end());
    }
    int next = 0;
    for (int j = 0; j < n_exact; j++) {
        const bool hole = kind == 2 ? true : kind == 3 ? rng() % 2 : kind == 4 ? j / 40 % 2 == 0 : false;
        const int  cell = hole || next == n_kv ? -1 : rows[next++];
        cells[j]        = cell;
        if (cell >= 0) {
            cells[n_exact + cell / 32] |= (int) (1u << cell % 32);
        }
    }
    return cells;
}

// Channels of a key, and of a value, for tbq-attention-heads.cuh.
static const int HEADS[][2] = { { 576, 512 }, { 192, 128 }, { 512, 512 } };

// Channels of a key, the pair, the arguments, and memory for the results of 300 splits.
using launch_function = std::function<void(int, int, int, const tbq_attention_args &, float *)>;

// n_exact 0: none.  centered: tbq keys lack their mean, and there are sinks, a soft-cap or values that are keys.
// prompt: many rows, the nine pairs of tbq types, and queries that are not rounded to 8 bits.  whole_rows: mostly what
// the kernel for whole rows can do.  heads: the sizes above; values of 576/512 are the first channels of the keys.
static double check(const launch_function & launch, int index, std::mt19937 & rng, int n_exact = 0,
                    bool centered = false, bool prompt = false, bool whole_rows = false, bool heads = false) {
    const int         n_pairs = prompt || heads ? 9 : whole_rows ? N_ROWS_PAIRS : n_exact ? N_ALL : N_PAIRS;
    const int * const of      = heads ? HEADS[index % 3] : nullptr;
    const bool        latent  = heads && of[0] == 576;
    const int * const pair    = (prompt || heads ? PROMPT_PAIRS : PAIRS)[latent  ? index / 3 % 3
                                                                         : heads ? index / 3 % 9
                                                                                 : index % n_pairs];
    // whole rows: mostly of 128 channels, where there are more kernels
    const int          d       = heads        ? of[0]
                                 : whole_rows ? std::vector<int>{ 64, 256, 128, 128, 128 }[index / n_pairs % 5]
                                              : 64 << (index / n_pairs % 3);
    const int          d_v     = heads ? of[1] : d;
    const int          d_of[2] = { d, d_v };
    auto               pick    = [&](std::initializer_list<int> from) { return from.begin()[rng() % from.size()]; };
    tbq_attention_args a{};
    a.n_head_kv     = pick({ 1, 2, 3, 4, 5, 8 });
    int gqa         = pick({ 1, 1, 2, 3, 4, 6, 7, 8, 12, 16 });
    a.n_head        = a.n_head_kv * gqa;
    a.n_q           = pick({ 1, 1, 1, 2, 3, 4, 5, 8, 16 });
    a.n_seq         = pick({ 1, 1, 2, 3 });
    a.n_seq_kv      = pick({ 1, a.n_seq });
    a.n_seq_mask    = pick({ 1, a.n_seq });
    a.n_kv          = pick({ 1, 5, 16, 17, 113, 256, 512, 1023, 4096 });
    a.scale         = 1.0f / std::sqrt((float) d);
    a.max_bias      = pick({ 0, 0, 8 });
    a.logit_softcap = pick({ 0, 0, 10 });
    if (n_exact) { // decode, in the shapes of caches
        a.n_head_kv = pick({ 1, 2, 3 });
        gqa         = pick({ 1, 4, 8 });
        a.n_head    = a.n_head_kv * gqa;
        a.n_q       = pick({ 1, 1, 2, 5 });
        a.n_seq     = pick({ 1, 3 });
        a.n_seq_kv  = pick({ 1, a.n_seq });
        a.n_kv      = pick({ 256, 256, 500, 1024, 4096 });
        a.n_exact   = n_exact;
    }

    if (prompt) {
        a.n_head_kv = pick({ 1, 2, 3, 4, 8 });
        gqa         = pick({ 1, 2, 3, 4, 5, 8, 71 });
        a.n_head    = a.n_head_kv * gqa;
        a.n_q       = pick({ 1, 17, 33, 64, 130, 300 });
        a.n_kv      = pick({ 1, 17, 113, 256, 500, 512, 1023, 1100, 3000 });
        a.n_exact   = n_exact;
        // what the reference can compute in a second
        while ((double) a.n_q * a.n_head * a.n_seq * a.n_kv * d > 3e8) {
            (a.n_q > 33 ? a.n_q : a.n_kv > 600 ? a.n_kv : gqa) /= 2;
            a.n_head = a.n_head_kv * gqa;
            if (gqa == 1 && a.n_q <= 33 && a.n_kv <= 600) {
                break;
            }
        }
    }

    if (whole_rows) { // masks of a multiple of 8 tokens
        a.n_head_kv = d == 64 ? 8 : d == 256 ? 2 : pick({ 4, 8 });
        a.n_head    = a.n_head_kv * gqa;
        a.n_kv      = pick({ 8, 16, 24, 112, 256, 264, 520, 1016, 4096, 1, 5, 113, 1023, 8200 });
        while (a.n_kv > 24 && (double) a.n_kv * a.n_head * a.n_q * a.n_seq > 300000) {
            a.n_kv = a.n_kv / 2 / 8 * 8; // what the reference can do in time
        }
        if (a.n_kv % 8) { // without a mask
            a.max_bias = 0;
        }
    }

    if (heads) {
        a.n_head_kv = latent ? pick({ 1, 1, 2 }) : pick({ 1, 2, 3, 4, 8 });
        gqa         = latent ? pick({ 1, 16, 16, 20, 64, 128 }) : pick({ 1, 1, 2, 4, 5, 8, 16 });
        a.n_q       = pick({ 1, 1, 1, 2, 3, 5 });
        a.n_kv      = pick({ 1, 5, 17, 113, 256, 256, 300, 512, 1023, 1024, 2500 });
        // what the reference can compute in time
        while (a.n_kv > 113 && (double) a.n_q * a.n_head_kv * gqa * a.n_seq * a.n_kv * d > 1.5e7) {
            (gqa > 16 ? gqa : a.n_kv > 300 ? a.n_kv : a.n_seq > 1 ? a.n_seq : a.n_q > 1 ? a.n_q : a.n_kv) /= 2;
        }
        a.n_head     = a.n_head_kv * gqa;
        a.n_seq_kv   = pick({ 1, a.n_seq });
        a.n_seq_mask = pick({ 1, a.n_seq });
    }

    // The mean moves logits by about 5, and values that are keys are that mean and more.
    const bool v_is_k = latent || (centered && pair[0] == pair[1] && d == d_v && rng() % 2);
    // [D, n_kv, n_head_kv] in memory instead of [D, n_head_kv, n_kv]
    const bool                      heads_apart = rng() % (whole_rows ? 16 : 4) == 0;
    const int                       more        = pick({ 0, 0, 3 }); // rows that the view leaves out
    std::normal_distribution<float> normal;
    std::vector<float>              q((size_t) d * a.n_q * a.n_head * a.n_seq);
    for (float & x : q) {
        x = normal(rng) * 1.5f;
    }
    a.q_nb2 = d * 4;
    a.q_nb1 = a.n_head * a.q_nb2;
    a.q_nb3 = a.n_q * a.q_nb1;

    std::vector<float> mean(centered && pair[0] < 8 ? (size_t) a.n_head_kv * d : 0);
    for (float & x : mean) {
        x = normal(rng) * 3;
    }
    std::vector<char> rows[2];
    long long *       nb[2] = { &a.k_nb1, &a.v_nb1 };
    for (int side = 0; side < 2; side++) {
        const int       channels = v_is_k ? d : d_of[side];
        const long long row      = (long long) channels / 64 * tbq_attention_block(pair[side]);
        const size_t    blocks   = (size_t) (a.n_kv + more) * a.n_head_kv * a.n_seq_kv * channels / 64;

        rows[side]  = side && v_is_k ? rows[0] : random_rows(pair[side], blocks, rng);
        nb[side][0] = heads_apart ? row : row * a.n_head_kv;
        nb[side][1] = heads_apart ? row * (a.n_kv + more) : row;
        nb[side][2] = row * a.n_head_kv * (a.n_kv + more);
    }
    // Exact rows, heads in a row like the cache's, and a few slots that the view leaves out.
    std::vector<char> exact[2];
    std::vector<int>  cells;
    auto              exact_nb1 = [&](int side) {
        return (long long) a.n_head_kv * (v_is_k ? d : d_of[side]) / 64 * (long long) sizeof(block_tbq8_0);
    };
    auto exact_nb3 = [&](int side) { return exact_nb1(side) * (n_exact + more); };
    auto exact_row = [&](int side, int s, int h, int j) {
        return &exact[side][s * exact_nb3(side) + j * exact_nb1(side) + h * (exact_nb1(side) / a.n_head_kv)];
    };
    std::vector<int> slot_of((size_t) a.n_seq_kv * a.n_kv, -1); // of each row
    const uint32_t   nan_float = 0x7FC00000;
    const uint16_t   nan_half  = 0x7E00;
    if (n_exact) {
        for (int side = 0; side < 2; side++) {
            if (side && v_is_k) {
                exact[1] = exact[0];
            } else if (pair[side] < 8) {
                exact[side] =
                    random_exact_rows((size_t) a.n_seq_kv * (n_exact + more) * a.n_head_kv * d_of[side] / 64, rng);
            }
        }
        for (int s = 0; s < a.n_seq_kv; s++) {
            const std::vector<int> list = random_cells(a.n_kv, n_exact, rng);
            cells.insert(cells.end(), list.begin(), list.end());
            for (int j = 0; j < n_exact; j++) {
                if (list[j] >= 0) {
                    slot_of[(size_t) s * a.n_kv + list[j]] = j;
                }
                // what nobody reads may be anything: an unused slot, or the packed row of a used one
                for (int side = 0; side < 2; side++) {
                    for (int h = 0; h < a.n_head_kv && pair[side] < 8; h++) {
                        if (list[j] < 0) {
                            std::memcpy(exact_row(side, s, h, j), &nan_float, 4);
                        } else if (j % 3 == 0) {
                            std::memcpy(&rows[side][s * nb[side][2] + h * nb[side][1] + list[j] * nb[side][0]],
                                        &nan_half, 2);
                        }
                    }
                }
            }
        }
    }
    const bool          masked = a.max_bias != 0 || (rng() % 3 != 0 && !(whole_rows && a.n_kv % 8));
    std::vector<__half> mask((size_t) a.n_kv * a.n_q * a.n_seq_mask);
    const int           kind = prompt ? rng() % 4 : 0;
    for (size_t i = 0; i < mask.size(); i++) {
        const int token = i % a.n_kv, row = i / a.n_kv % a.n_q, past = a.n_kv - a.n_q + row;
        const int hide = i / a.n_kv % 3; // whole stretches, single tokens, nothing
        float     x    = -(float) (rng() % 5);
        if (kind == 1) { // causal
            x = token > past ? -INFINITY : 0;
        } else if (kind == 2) { // a window
            x = token > past || token + 200 < past ? -INFINITY : 0;
        } else if (kind == 3) { // whole tiles hidden, visible and mixed
            x = (token / 128 % 3 == 1 && row < a.n_q / 2) || (token / 128 % 3 == 0 && rng() % 9 == 0) ? -INFINITY : 0;
        } else if ((hide == 0 && token / 40 % 2 == 1) || (hide == 1 && rng() % 4 == 0)) {
            x = -INFINITY;
        }
        mask[i] = __float2half(x);
    }
    a.mask_nb1                    = 2 * a.n_kv;
    a.mask_nb3                    = a.mask_nb1 * a.n_q;
    const bool         with_sinks = rng() % 3 == 0 || (centered && a.logit_softcap == 0 && !v_is_k);
    std::vector<float> sinks(a.n_head);
    for (float & x : sinks) {
        x = normal(rng);
    }
    // A token that nobody sees may hold anything.
    if (masked && a.n_kv > 4 && rng() % 2) {
        const int hidden = rng() % a.n_kv;
        for (int s = 0; s < a.n_seq_mask; s++) {
            for (int i = 0; i < a.n_q; i++) {
                mask[((size_t) s * a.n_q + i) * a.n_kv + hidden] = __float2half(-INFINITY);
            }
        }
        for (int side = 0; side < (prompt || pair[1] == 16 ? 1 : 2); side++) { // but a value in f16, or for a prompt
            for (int s = 0; s < a.n_seq_kv; s++) {
                for (int h = 0; h < a.n_head_kv; h++) {
                    std::memcpy(&rows[side][s * nb[side][2] + h * nb[side][1] + hidden * nb[side][0]], &nan_half, 2);
                    const int slot = slot_of[(size_t) s * a.n_kv + hidden];
                    if (slot >= 0 && pair[side] < 8) {
                        std::memcpy(exact_row(side, s, h, slot), &nan_float, 4);
                    }
                }
            }
        }
    }

    device_array<float>  q_dev(q), sinks_dev(sinks), dst_dev(q.size() / d * d_v), mean_dev(mean);
    device_array<char>   k_dev(rows[0]), v_dev(rows[1]);
    device_array<__half> mask_dev(mask);
    device_array<float>  partial(prompt ? 1 : (size_t) a.n_seq * a.n_q * a.n_head * 300 * (d_v + 2));
    a.q = (const char *) q_dev.p, a.k = k_dev.p, a.v = latent ? k_dev.p : v_dev.p, a.dst = dst_dev.p;
    device_array<char> exact_k_dev(exact[0]), exact_v_dev(exact[1]);
    device_array<int>  cells_dev(cells);
    if (n_exact) {
        a.exact_k     = exact[0].empty() ? nullptr : exact_k_dev.p;
        a.exact_v     = exact[1].empty() ? nullptr : latent ? exact_k_dev.p : exact_v_dev.p;
        a.cells       = cells_dev.p;
        a.exact_k_nb1 = exact_nb1(0), a.exact_v_nb1 = exact_nb1(1);
        a.exact_k_nb2 = exact_nb1(0) / a.n_head_kv, a.exact_v_nb2 = exact_nb1(1) / a.n_head_kv;
        a.exact_k_nb3 = exact_nb3(0), a.exact_v_nb3 = exact_nb3(1);
    }
    a.mask  = masked ? (const char *) mask_dev.p : nullptr;
    a.sinks = with_sinks ? sinks_dev.p : nullptr;
    if (!mean.empty()) {
        a.mean           = mean_dev.p;
        a.mean_of_values = v_is_k;
    }
    CHECK(cudaMemset(dst_dev.p, 0xFF, dst_dev.n * 4));
    launch(d, pair[0], pair[1], a, partial.p);
    std::vector<float> dst(dst_dev.n), again(dst_dev.n);
    CHECK(cudaMemcpy(dst.data(), dst_dev.p, dst.size() * 4, cudaMemcpyDeviceToHost));
    launch(d, pair[0], pair[1], a, partial.p);
    CHECK(cudaMemcpy(again.data(), dst_dev.p, dst.size() * 4, cudaMemcpyDeviceToHost));
    const bool repeats = std::memcmp(dst.data(), again.data(), dst.size() * 4) == 0;

    double error = 0, norm = 0;
    for (int s = 0; s < a.n_seq; s++) {
        const int s_kv = s / (a.n_seq / a.n_seq_kv);
        for (int h = 0; h < a.n_head; h++) {
            std::vector<float> keys((size_t) a.n_kv * d), vals((size_t) a.n_kv * d_v);
            for (int j = 0; j < a.n_kv; j++) {
                const int slot = slot_of[(size_t) s_kv * a.n_kv + j];
                for (int side = 0; side < 2; side++) {
                    float * const to = &(side == 0 ? keys : vals)[(size_t) j * d_of[side]];
                    if (slot >= 0 && pair[side] < 8) {
                        tbq_dequantize(TBQ_TYPE_TBQ8_0, exact_row(side, s_kv, h / gqa, slot), to, d_of[side]);
                    } else {
                        decode(pair[side], &rows[side][s_kv * nb[side][2] + h / gqa * nb[side][1] + j * nb[side][0]],
                               to, d_of[side]);
                    }
                }
            }
            for (int i = 0; i < a.n_q; i++) {
                std::vector<float> qi(&q[(((size_t) s * a.n_q + i) * a.n_head + h) * d],
                                      &q[(((size_t) s * a.n_q + i) * a.n_head + h) * d] + d);
                double center = 0; // whole keys, but for the rounding: the mean's product has the exact query
                for (size_t e = 0; e < mean.size() && e < (size_t) d; e++) {
                    center += (double) qi[e] * mean[(size_t) h / gqa * d + e];
                }
                if (!prompt) {
                    round_query(pair[0], qi.data(), d);
                }
                std::vector<double> w(a.n_kv);
                double              top = with_sinks ? sinks[h] : -INFINITY;
                for (int j = 0; j < a.n_kv; j++) {
                    const float b =
                        masked ? __half2float(mask[((size_t) (s % a.n_seq_mask) * a.n_q + i) * a.n_kv + j]) : 0.0f;
                    double x = 0;
                    for (int e = 0; e < d; e++) {
                        x += (double) qi[e] * keys[(size_t) j * d + e];
                    }
                    x = (x + center) * a.scale;
                    if (a.logit_softcap != 0) {
                        x = a.logit_softcap * std::tanh(x / a.logit_softcap);
                    }
                    w[j] = b == -INFINITY ? -INFINITY : x + alibi(a.max_bias, h, a.n_head) * b;
                    top  = std::max(top, w[j]);
                }
                double              total = with_sinks ? std::exp(sinks[h] - top) : 0;
                std::vector<double> o(d_v);
                for (int j = 0; j < a.n_kv; j++) {
                    if (w[j] == -INFINITY) {
                        continue;
                    }
                    const double p = std::exp(w[j] - top);
                    total += p;
                    for (int e = 0; e < d_v; e++) {
                        o[e] +=
                            p * (vals[(size_t) j * d_v + e] + (a.mean_of_values ? mean[(size_t) h / gqa * d + e] : 0));
                    }
                }
                for (int e = 0; e < d_v; e++) {
                    const double want = total > 0 ? o[e] / total : 0;
                    const double got  = dst[(((size_t) s * a.n_q + i) * a.n_head + h) * d_v + e];
                    error += (want - got) * (want - got);
                    norm += want * want;
                }
            }
        }
    }
    const double nmse = norm > 0 ? error / norm : error;
    if (!(nmse < (prompt ? 1e-5 : 3e-5)) || !repeats) {
        std::printf(
            "problem %d: %d/%d bits D=%d/%d n_q=%d heads %d/%d n_kv=%d exact %d seq %d/%d mask %d kind %d bias %g cap %g sinks %d "
            "mean %d apart %d: relative squared error %.3g%s\n",
            index, pair[0], pair[1], d, d_v, a.n_q, a.n_head, a.n_head_kv, a.n_kv, n_exact, a.n_seq, a.n_seq_kv, masked,
            kind, a.max_bias, a.logit_softcap, with_sinks, mean.empty() ? 0 : 1 + a.mean_of_values, heads_apart, nmse,
            repeats ? "" : ", differs when repeated");
        return 1;
    }
    return nmse;
}
