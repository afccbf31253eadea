// SPDX-License-Identifier: MIT
// The attention kernel alone: random problems compared with double precision, and its speed.
//   attention check [problems] [seed]     exit status 1 if one is wrong
//   attention exact [problems] [seed]     the same with exact rows
//   attention center [problems] [seed]    the same with centered keys, half of them with exact rows
//   attention bench                       the shapes in docs/measurements/cuda.md
//   attention time exact                  a decode step with and without exact rows
//   attention time center                 a decode step with and without a mean
#include "attention-kernels.cuh"

#include "check.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
static const int N_ALL      = sizeof(PAIRS) / sizeof(PAIRS[0]);
static const int N_PAIRS    = 10; // of these without exact rows

static cudaStream_t stream; // the default one, except where it is timed

static void launch_any(int d, int k, int v, const tbq_attention_args & a, float * partial) {
    (d == 64 ? launch_64 : d == 128 ? launch_128 : launch_256)(k, v, a, partial, stream);
}

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

// n_exact 0: none.  centered: tbq keys lack their mean, and there are sinks, a soft-cap or values that are keys.
static double check(int index, std::mt19937 & rng, int n_exact = 0, bool centered = false) {
    const int          n_pairs = n_exact ? N_ALL : N_PAIRS;
    const int * const  pair    = PAIRS[index % n_pairs];
    const int          d       = 64 << (index / n_pairs % 3);
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

    // The mean moves logits by about 5, and values that are keys are that mean and more.
    const bool v_is_k      = centered && pair[0] == pair[1] && rng() % 2;
    const bool heads_apart = rng() % 4 == 0;    // [D, n_kv, n_head_kv] in memory instead of [D, n_head_kv, n_kv]
    const int  more        = pick({ 0, 0, 3 }); // rows that the view leaves out
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
        const long long row = (long long) d / 64 * tbq_attention_block(pair[side]);
        rows[side]  = side && v_is_k
                          ? rows[0]
                          : random_rows(pair[side], (size_t) (a.n_kv + more) * a.n_head_kv * a.n_seq_kv * d / 64, rng);
        nb[side][0] = heads_apart ? row : row * a.n_head_kv;
        nb[side][1] = heads_apart ? row * (a.n_kv + more) : row;
        nb[side][2] = row * a.n_head_kv * (a.n_kv + more);
    }
    // Exact rows, heads in a row like the cache's, and a few slots that the view leaves out.
    std::vector<char> exact[2];
    std::vector<int>  cells;
    const long long   exact_nb1 = (long long) a.n_head_kv * d / 64 * sizeof(block_tbq8_0);
    const long long   exact_nb3 = exact_nb1 * (n_exact + more);
    auto              exact_row = [&](int side, int s, int h, int j) {
        return &exact[side][s * exact_nb3 + j * exact_nb1 + h * (exact_nb1 / a.n_head_kv)];
    };
    std::vector<int> slot_of((size_t) a.n_seq_kv * a.n_kv, -1); // of each row
    const uint32_t   nan_float = 0x7FC00000;
    const uint16_t   nan_half  = 0x7E00;
    if (n_exact) {
        for (int side = 0; side < 2; side++) {
            if (side && v_is_k) {
                exact[1] = exact[0];
            } else if (pair[side] < 8) {
                exact[side] = random_exact_rows((size_t) a.n_seq_kv * (n_exact + more) * a.n_head_kv * d / 64, rng);
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
    const bool          masked = a.max_bias != 0 || rng() % 3 != 0;
    std::vector<__half> mask((size_t) a.n_kv * a.n_q * a.n_seq_mask);
    for (size_t i = 0; i < mask.size(); i++) {
        const int token = i % a.n_kv;
        const int hide  = i / a.n_kv % 3; // whole stretches, single tokens, nothing
        mask[i]         = __float2half(
            (hide == 0 && token / 40 % 2 == 1) || (hide == 1 && rng() % 4 == 0) ? -INFINITY : -(float) (rng() % 5));
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
        for (int side = 0; side < (pair[1] == 16 ? 1 : 2); side++) { // but a value in f16
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

    device_array<float>  q_dev(q), sinks_dev(sinks), dst_dev(q.size()), mean_dev(mean);
    device_array<char>   k_dev(rows[0]), v_dev(rows[1]);
    device_array<__half> mask_dev(mask);
    device_array<float>  partial((size_t) a.n_seq * a.n_q * a.n_head * 300 * (d + 2));
    a.q = (const char *) q_dev.p, a.k = k_dev.p, a.v = v_dev.p, a.dst = dst_dev.p;
    device_array<char> exact_k_dev(exact[0]), exact_v_dev(exact[1]);
    device_array<int>  cells_dev(cells);
    if (n_exact) {
        a.exact_k     = exact[0].empty() ? nullptr : exact_k_dev.p;
        a.exact_v     = exact[1].empty() ? nullptr : exact_v_dev.p;
        a.cells       = cells_dev.p;
        a.exact_k_nb1 = a.exact_v_nb1 = exact_nb1;
        a.exact_k_nb2 = a.exact_v_nb2 = exact_nb1 / a.n_head_kv;
        a.exact_k_nb3 = a.exact_v_nb3 = exact_nb3;
    }
    a.mask  = masked ? (const char *) mask_dev.p : nullptr;
    a.sinks = with_sinks ? sinks_dev.p : nullptr;
    if (!mean.empty()) {
        a.mean           = mean_dev.p;
        a.mean_of_values = v_is_k;
    }
    CHECK(cudaMemset(dst_dev.p, 0xFF, dst_dev.n * 4));
    launch_any(d, pair[0], pair[1], a, partial.p);
    std::vector<float> dst(q.size()), again(q.size());
    CHECK(cudaMemcpy(dst.data(), dst_dev.p, dst.size() * 4, cudaMemcpyDeviceToHost));
    launch_any(d, pair[0], pair[1], a, partial.p);
    CHECK(cudaMemcpy(again.data(), dst_dev.p, dst.size() * 4, cudaMemcpyDeviceToHost));
    const bool repeats = std::memcmp(dst.data(), again.data(), dst.size() * 4) == 0;

    double             error = 0, norm = 0;
    std::vector<float> k_row(d), v_row(d);
    for (int s = 0; s < a.n_seq; s++) {
        const int s_kv = s / (a.n_seq / a.n_seq_kv);
        for (int h = 0; h < a.n_head; h++) {
            std::vector<float> keys((size_t) a.n_kv * d), vals((size_t) a.n_kv * d);
            for (int j = 0; j < a.n_kv; j++) {
                const int slot = slot_of[(size_t) s_kv * a.n_kv + j];
                for (int side = 0; side < 2; side++) {
                    float * const to = &(side == 0 ? keys : vals)[(size_t) j * d];
                    if (slot >= 0 && pair[side] < 8) {
                        tbq_dequantize(TBQ_TYPE_TBQ8_0, exact_row(side, s_kv, h / gqa, slot), to, d);
                    } else {
                        decode(pair[side], &rows[side][s_kv * nb[side][2] + h / gqa * nb[side][1] + j * nb[side][0]],
                               to, d);
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
                round_query(pair[0], qi.data(), d);
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
                std::vector<double> o(d);
                for (int j = 0; j < a.n_kv; j++) {
                    if (w[j] == -INFINITY) {
                        continue;
                    }
                    const double p = std::exp(w[j] - top);
                    total += p;
                    for (int e = 0; e < d; e++) {
                        o[e] +=
                            p * (vals[(size_t) j * d + e] + (a.mean_of_values ? mean[(size_t) h / gqa * d + e] : 0));
                    }
                }
                for (int e = 0; e < d; e++) {
                    const double want = total > 0 ? o[e] / total : 0;
                    const double got  = dst[(((size_t) s * a.n_q + i) * a.n_head + h) * d + e];
                    error += (want - got) * (want - got);
                    norm += want * want;
                }
            }
        }
    }
    const double nmse = norm > 0 ? error / norm : error;
    if (!(nmse < 3e-5) || !repeats) {
        std::printf(
            "problem %d: %d/%d bits D=%d n_q=%d heads %d/%d n_kv=%d exact %d seq %d/%d mask %d bias %g cap %g sinks %d "
            "mean %d apart %d: relative squared error %.3g%s\n",
            index, pair[0], pair[1], d, a.n_q, a.n_head, a.n_head_kv, a.n_kv, n_exact, a.n_seq, a.n_seq_kv, masked,
            a.max_bias, a.logit_softcap, with_sinks, mean.empty() ? 0 : 1 + a.mean_of_values, heads_apart, nmse,
            repeats ? "" : ", differs when repeated");
        return 1;
    }
    return nmse;
}

static void bench(int d, int k, int v, int n_head_kv, int gqa, int n_kv, int n_q) {
    tbq_attention_args a{};
    a.n_head_kv = n_head_kv, a.n_head = n_head_kv * gqa, a.n_q = n_q, a.n_seq = a.n_seq_kv = a.n_seq_mask = 1,
    a.n_kv  = n_kv;
    a.scale = 1.0f / std::sqrt((float) d);
    a.q_nb2 = 4 * d, a.q_nb1 = a.q_nb2 * a.n_head, a.q_nb3 = a.q_nb1 * n_q;
    a.k_nb2 = d / 64 * tbq_attention_block(k), a.k_nb1 = a.k_nb2 * n_head_kv, a.k_nb3 = a.k_nb1 * n_kv;
    a.v_nb2 = d / 64 * tbq_attention_block(v), a.v_nb1 = a.v_nb2 * n_head_kv, a.v_nb3 = a.v_nb1 * n_kv;
    a.mask_nb1 = 2 * n_kv, a.mask_nb3 = a.mask_nb1 * n_q;
    std::mt19937 rng(1);
    // several layers, so that the L2 cache does not hold what the next call reads
    const int           layers = 4;
    std::vector<char>   rows_k = random_rows(k, (size_t) n_kv * n_head_kv * d / 64, rng),
                        rows_v = random_rows(v, (size_t) n_kv * n_head_kv * d / 64, rng);
    std::vector<float>  q((size_t) d * n_q * a.n_head, 0.5f);
    std::vector<__half> mask((size_t) n_kv * n_q, __float2half(0.0f));
    device_array<char>  k_dev(rows_k.size() * layers), v_dev(rows_v.size() * layers);
    for (int i = 0; i < layers; i++) {
        CHECK(cudaMemcpy(k_dev.p + i * rows_k.size(), rows_k.data(), rows_k.size(), cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(v_dev.p + i * rows_v.size(), rows_v.data(), rows_v.size(), cudaMemcpyHostToDevice));
    }
    device_array<float>  q_dev(q), dst(q.size()), partial((size_t) n_q * a.n_head * 300 * (d + 2));
    device_array<__half> mask_dev(mask);
    a.q = (const char *) q_dev.p, a.dst = dst.p, a.mask = (const char *) mask_dev.p;
    auto round = [&]() {
        for (int i = 0; i < layers; i++) {
            a.k = k_dev.p + i * rows_k.size();
            a.v = v_dev.p + i * rows_v.size();
            launch_any(d, k, v, a, partial.p);
        }
    };
    round();
    CHECK(cudaDeviceSynchronize());
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    float best = 1e9f;
    for (int r = 0; r < 5; r++) {
        CHECK(cudaEventRecord(from));
        for (int i = 0; i < 5; i++) {
            round();
        }
        CHECK(cudaEventRecord(to));
        CHECK(cudaEventSynchronize(to));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        best = std::min(best, ms / (5 * layers));
    }
    std::printf("D %3d, %d/%d bits, %d x %2d heads, %6d tokens, %2d rows: %8.1f us, %6.0f GB/s packed\n", d, k, v,
                n_head_kv, gqa, n_kv, n_q, best * 1000, (rows_k.size() + rows_v.size()) / (best * 1e6));
}

// Microseconds of a decode step's attention in each layer of a model: 32 query and 8 KV heads of 128, rows that the L2
// cache does not hold, and a graph, because a CPU launches too slowly for an empty cache.  n_exact < 0: no list.
// n_used: rows that the mask shows, of n_kv; 0: all.
enum { WITH_SINKS = 1, WITH_CAP = 2, WITH_MEAN = 4, WITH_MEAN_OF_VALUES = 8 };

static double time_decode(int k, int v, int n_kv, int n_exact, int n_used = 0, int with = 0) {
    const int          d = 128, n_head_kv = 8;
    tbq_attention_args a{};
    a.n_head_kv = n_head_kv, a.n_head = 32, a.n_q = a.n_seq = a.n_seq_kv = a.n_seq_mask = 1, a.n_kv = n_kv;
    a.scale = 1.0f / std::sqrt((float) d);
    a.q_nb2 = 4 * d, a.q_nb1 = a.q_nb3 = a.q_nb2 * a.n_head;
    a.k_nb2 = d / 64 * tbq_attention_block(k), a.k_nb1 = a.k_nb2 * n_head_kv, a.k_nb3 = a.k_nb1 * n_kv;
    a.v_nb2 = d / 64 * tbq_attention_block(v), a.v_nb1 = a.v_nb2 * n_head_kv, a.v_nb3 = a.v_nb1 * n_kv;
    a.mask_nb1 = a.mask_nb3 = 2 * n_kv;
    std::mt19937            rng(1);
    const std::vector<char> rows_k = random_rows(k, (size_t) n_kv * n_head_kv * d / 64, rng),
                            rows_v = random_rows(v, (size_t) n_kv * n_head_kv * d / 64, rng);
    const size_t            n_rows = std::max(n_exact, 1);
    const std::vector<char> rows_e = random_exact_rows(n_rows * n_head_kv * d / 64, rng);
    const int layers = std::max<int>(4, std::min<size_t>(256, (200u << 20) / (rows_k.size() + rows_v.size())));
    // the first four rows and the newest
    std::vector<int> cells(n_rows + (n_kv + 31) / 32, 0);
    n_used = n_used ? n_used : n_kv;
    for (int j = 0; j < n_exact; j++) {
        if (j >= n_used) {
            cells[j] = -1;
            continue;
        }
        cells[j] = n_used <= n_exact ? j : j < 4 ? j : n_used - 1 - (j - 4);
        cells[n_rows + cells[j] / 32] |= (int) (1u << cells[j] % 32);
    }
    if (n_exact < 1) {
        cells[0] = -1;
    }
    device_array<char> k_dev(rows_k.size() * layers), v_dev(rows_v.size() * layers), ek_dev(rows_e.size() * layers),
        ev_dev(rows_e.size() * layers);
    for (int i = 0; i < layers; i++) {
        CHECK(cudaMemcpy(k_dev.p + i * rows_k.size(), rows_k.data(), rows_k.size(), cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(v_dev.p + i * rows_v.size(), rows_v.data(), rows_v.size(), cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(ek_dev.p + i * rows_e.size(), rows_e.data(), rows_e.size(), cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(ev_dev.p + i * rows_e.size(), rows_e.data(), rows_e.size(), cudaMemcpyHostToDevice));
    }
    const std::vector<float> q((size_t) d * a.n_head, 0.5f);
    std::vector<__half>      mask(n_kv, __float2half(-INFINITY));
    std::fill(mask.begin(), mask.begin() + n_used, __float2half(0.0f));
    device_array<float>  q_dev(q), dst(q.size()), partial((size_t) a.n_head * 300 * (d + 2));
    device_array<__half> mask_dev(mask);
    device_array<int>    cells_dev(cells);
    device_array<float>  sinks(std::vector<float>(a.n_head, 1.0f)), mean(std::vector<float>(n_head_kv * d, 1.0f));
    a.q = (const char *) q_dev.p, a.dst = dst.p, a.mask = (const char *) mask_dev.p;
    a.sinks          = with & WITH_SINKS ? sinks.p : nullptr;
    a.logit_softcap  = with & WITH_CAP ? 30.0f : 0.0f;
    a.mean           = with & WITH_MEAN ? mean.p : nullptr;
    a.mean_of_values = with & WITH_MEAN_OF_VALUES;
    if (n_exact >= 0) {
        a.cells       = cells_dev.p;
        a.n_exact     = (int) n_rows;
        a.exact_k_nb2 = a.exact_v_nb2 = d / 64 * sizeof(block_tbq8_0);
        a.exact_k_nb1 = a.exact_v_nb1 = a.exact_k_nb2 * n_head_kv;
    }
    cudaGraph_t     graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    for (int i = 0; i < layers; i++) {
        a.k       = k_dev.p + i * rows_k.size();
        a.v       = v_dev.p + i * rows_v.size();
        a.exact_k = ek_dev.p + i * rows_e.size();
        a.exact_v = ev_dev.p + i * rows_e.size();
        launch_any(d, k, v, a, partial.p);
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    float best = 1e9f;
    for (int r = 0; r < 12; r++) {
        CHECK(cudaEventRecord(from, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(to, stream));
        CHECK(cudaEventSynchronize(to));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        best = r < 2 ? best : std::min(best, ms); // the first ones warm up
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    stream = nullptr;
    return best * 1000 / layers;
}

static void time_exact() {
    for (const int * pair : { PAIRS[0], PAIRS[1], PAIRS[3], PAIRS[6] }) {
        for (int n_used : { 16, 64, 128 }) {
            const double none = time_decode(pair[0], pair[1], 256, -1, n_used);
            const double some = time_decode(pair[0], pair[1], 256, 149, n_used);
            std::printf("%d/%d bits, %3d tokens of 256: %7.2f us; with 149 exact rows %7.2f us, %.3f\n", pair[0],
                        pair[1], n_used, none, some, some / none);
        }
    }
    for (int n_kv : { 256, 4096, 32768, 131072 }) {
        for (const int * pair : { PAIRS[0], PAIRS[1], PAIRS[3], PAIRS[6] }) {
            const double none   = time_decode(pair[0], pair[1], n_kv, -1);
            const double no_row = time_decode(pair[0], pair[1], n_kv, 0);
            const double some   = time_decode(pair[0], pair[1], n_kv, 149);
            std::printf(
                "%d/%d bits, %6d tokens: %7.2f us; with an empty list %7.2f us, %.3f; with 149 exact rows %7.2f us, "
                "%.3f\n",
                pair[0], pair[1], n_kv, none, no_row, no_row / none, some, some / none);
        }
    }
}

static void time_center() {
    const std::pair<const char *, int> rules[] = { { "sinks", WITH_SINKS },
                                                   { "soft-cap", WITH_CAP },
                                                   { "values that are keys", WITH_MEAN_OF_VALUES } };
    for (int n_kv : { 256, 4096, 32768 }) {
        for (const int * pair : { PAIRS[0], PAIRS[1], PAIRS[2] }) {
            for (const auto & rule : rules) {
                const int    without = rule.second & ~WITH_MEAN_OF_VALUES;
                const double none    = time_decode(pair[0], pair[1], n_kv, -1, 0, without);
                const double some    = time_decode(pair[0], pair[1], n_kv, -1, 0, rule.second | WITH_MEAN);
                std::printf("%d/%d bits, %6d tokens, %s: %7.2f us; with a mean %7.2f us, %.3f\n", pair[0], pair[1],
                            n_kv, rule.first, none, some, some / none);
            }
        }
    }
}

int main(int argc, char ** argv) {
    if (argc > 2 && !std::strcmp(argv[1], "time") && !std::strcmp(argv[2], "center")) {
        time_center();
        return 0;
    }
    if (argc > 2 && !std::strcmp(argv[1], "time") && !std::strcmp(argv[2], "exact")) {
        time_exact();
        return 0;
    }
    if (argc == 9 && !std::strcmp(argv[1], "bench")) {
        int x[7];
        for (int i = 0; i < 7; i++) {
            x[i] = std::atoi(argv[2 + i]);
        }
        bench(x[0], x[1], x[2], x[3], x[4], x[5], x[6]);
        return 0;
    }
    if (argc > 1 && !std::strcmp(argv[1], "bench")) {
        size_t             bytes = 1ull << 30;
        device_array<char> x(bytes), y(bytes);
        cudaEvent_t        from, to;
        CHECK(cudaEventCreate(&from));
        CHECK(cudaEventCreate(&to));
        float ms = 0;
        for (int i = 0; i < 3; i++) {
            CHECK(cudaEventRecord(from));
            CHECK(cudaMemcpyAsync(y.p, x.p, bytes, cudaMemcpyDeviceToDevice));
            CHECK(cudaEventRecord(to));
            CHECK(cudaEventSynchronize(to));
            CHECK(cudaEventElapsedTime(&ms, from, to));
        }
        std::printf("copy: %.0f GB/s read and written\n", 2 * bytes / (ms * 1e6));
        for (int n_kv : { 256, 32768, 131072 }) {
            for (const int * pair : { PAIRS[0], PAIRS[1], PAIRS[2], PAIRS[3], PAIRS[6], PAIRS[8], PAIRS[9] }) {
                bench(128, pair[0], pair[1], 8, 4, n_kv, 1);
            }
            bench(128, 4, 4, 4, 8, n_kv, 1);
            bench(256, 4, 4, 2, 8, n_kv, 1);
            bench(64, 4, 4, 8, 8, n_kv, 1);
            bench(128, 4, 4, 8, 4, n_kv, 4);
        }
        return 0;
    }
    const bool   exact  = argc > 1 && !std::strcmp(argv[1], "exact");
    const bool   center = argc > 1 && !std::strcmp(argv[1], "center");
    const int    n      = argc > 2 ? std::atoi(argv[2]) : exact || center ? 4 * 3 * N_ALL : 180;
    std::mt19937 rng(argc > 3 ? std::atoi(argv[3]) : 1);
    int          bad  = 0;
    double       most = 0;
    for (int i = 0; i < n; i++) {
        const int    sizes[] = { 1, 17, 149, 661 };
        const double e =
            center ? check(i / 2, rng, i % 2 ? 149 : 0, true) : check(i, rng, exact ? sizes[i / (3 * N_ALL) % 4] : 0);
        bad += e == 1;
        most = e < 1 ? std::max(most, e) : most;
    }
    std::printf("%d problems, %d wrong; relative squared error at most %.3g\n", n, bad, most);
    return bad != 0;
}
