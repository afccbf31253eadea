// SPDX-License-Identifier: MIT
// Compares encoder and decoder on the GPU with the scalar reference: the same bytes, the same values.
//   blocks [rows] [seed]   exit status 1 at a difference
#include "tbq-dequantize.cuh"
#include "tbq-kernels.h"
#include "tbq-quantize.cuh"

#include "check.cuh"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

// No value is below 2^-126.  llama.cpp compiles for CUDA with such numbers flushed to zero; where only they keep a
// rotated value from being 0, the level could be the one on the other side of 0.
static std::vector<float> values(size_t n_blocks, std::mt19937 & rng) {
    std::normal_distribution<float> normal;
    std::vector<float>              x(n_blocks * 64);
    for (size_t b = 0; b < n_blocks; b++) {
        float *     v     = &x[b * 64];
        const int   kind  = rng() % 12;
        const float scale = std::ldexp(1.0f, (int) (rng() % 20) - 10);
        for (int i = 0; i < 64; i++) {
            v[i] = normal(rng) * scale;
        }
        switch (kind) {
            case 0: v[rng() % 64] *= 50; break; // an outlier
            case 1:
                for (int i = 0; i < 64; i++) {
                    v[i] = std::round(v[i] / scale);
                }
                break; // ties
            case 2:
                for (int i = 0; i < 64; i++) {
                    v[i] = scale;
                }
                break;
            case 3:
                for (int i = 0; i < 64; i++) {
                    v[i] *= std::ldexp(1.0f, (int) (rng() % 210) - 90);
                }
                break;
            case 4:
                for (int i = 0; i < 64; i++) {
                    v[i] *= rng() % 2 ? 1e-24f : 1e-9f;
                }
                break;
            case 5: std::fill(v, v + 64, 0.0f); break;
            case 6:
                if (rng() % 4 == 0) {
                    v[rng() % 64] =
                        rng() % 2 ? std::numeric_limits<float>::quiet_NaN() : -std::numeric_limits<float>::infinity();
                }
                break;
            case 7:
                for (int i = 0; i < 64; i++) {
                    v[i] = rng() % 8 ? 0.0f : v[i];
                }
                break;
            default: break;
        }
    }
    return x;
}

// How many blocks on the device are not these.
static long differences(const std::vector<char> & want, const char * got_dev, size_t bytes) {
    std::vector<char> got(want.size());
    CHECK(cudaMemcpy(got.data(), got_dev, got.size(), cudaMemcpyDeviceToHost));
    long bad = 0;
    for (size_t at = 0; at < want.size(); at += bytes) {
        bad += std::memcmp(&want[at], &got[at], bytes) != 0;
    }
    return bad;
}

template <int BITS, typename T> static long compare(size_t n_blocks, std::mt19937 & rng) {
    std::vector<float> x = values(n_blocks, rng);
    std::vector<T>     in(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        in[i] = (T) x[i];
        x[i]  = (float) in[i];
    }
    int                 count;
    const tbq_kernels * ref   = tbq_list_kernels(&count)[0];
    const size_t        bytes = tbq_block_bytes(BITS);
    std::vector<char>   want(n_blocks * bytes), got(n_blocks * bytes);

    T *     in_dev;
    char *  out_dev;
    float * back_dev;
    half *  back16_dev;
    CHECK(cudaMalloc(&in_dev, in.size() * sizeof(T)));
    CHECK(cudaMalloc(&out_dev, got.size()));
    CHECK(cudaMalloc(&back_dev, x.size() * 4));
    CHECK(cudaMalloc(&back16_dev, x.size() * 2));
    CHECK(cudaMemcpy(in_dev, in.data(), in.size() * sizeof(T), cudaMemcpyHostToDevice));
    // the mean of a row of keys and the weights of its channels (docs/design/centering.md), which two neighbors share
    std::vector<float> center(2 * x.size());
    for (size_t i = 0; i < x.size(); i += 2) {
        center[i]            = x[rng() % 64];
        center[i + 1]        = x[i];
        center[x.size() + i] = center[x.size() + i + 1] = 0.1f + (rng() % 1000) * 0.01f;
    }
    float * center_dev;
    CHECK(cudaMalloc(&center_dev, center.size() * 4));
    CHECK(cudaMemcpy(center_dev, center.data(), center.size() * 4, cudaMemcpyHostToDevice));
    tbq_encode_args e{};
    e.src = in_dev, e.dst = out_dev, e.from = e.to = { { (long long) n_blocks, 1, 1, 1 }, {} };
    // one row, which is kept exactly too
    std::vector<char> exact_want(n_blocks * sizeof(block_tbq8_0));
    const int         slot = 0;
    int *             slots_dev;
    char *            exact_dev;
    CHECK(cudaMalloc(&exact_dev, exact_want.size()));
    CHECK(cudaMalloc(&slots_dev, sizeof(slot)));
    CHECK(cudaMemcpy(slots_dev, &slot, sizeof(slot), cudaMemcpyHostToDevice));
    e.exact = exact_dev, e.slots = slots_dev;

    const int blocks_per_cta = TBQ_ENCODE_THREADS / 16;
    long      bad = 0, bad_exact = 0;
    for (bool centered : { true, false }) { // the second is what is decoded and timed below
        ref->quantize_kv[BITS - 2](x.data(), centered ? center.data() : nullptr,
                                   centered ? center.data() + x.size() : nullptr, want.data(), x.size());
        ref->quantize_exact(x.data(), centered ? center.data() : nullptr, exact_want.data(), x.size());
        e.mean   = centered ? center_dev : nullptr;
        e.weight = centered ? center_dev + x.size() : nullptr;
        for (bool decode_size : { false, true }) {
            CHECK(cudaMemset(out_dev, 0xFF, got.size()));
            CHECK(cudaMemset(exact_dev, 0xFF, exact_want.size()));
            if (decode_size) {
                tbq_quantize_decode_size<BITS, T><<<n_blocks, TBQ_DECODE_SIZE_THREADS>>>(e);
            } else {
                tbq_quantize_rows<BITS, T><<<(n_blocks + blocks_per_cta - 1) / blocks_per_cta, TBQ_ENCODE_THREADS>>>(e);
            }
            CHECK(cudaGetLastError());
            CHECK(cudaMemcpy(got.data(), out_dev, got.size(), cudaMemcpyDeviceToHost));
            for (size_t b = 0; b < n_blocks; b++) {
                bad += std::memcmp(&want[b * bytes], &got[b * bytes], bytes) != 0;
            }
            bad_exact += differences(exact_want, exact_dev, sizeof(block_tbq8_0));
        }
    }
    cudaFree(center_dev), cudaFree(slots_dev), cudaFree(exact_dev);
    e.exact = nullptr, e.slots = nullptr; // timed without

    CHECK(cudaMemcpy(out_dev, want.data(), want.size(), cudaMemcpyHostToDevice));
    tbq_decode_args d{};
    d.src = out_dev, d.dst = back_dev, d.from = d.to = e.from;
    tbq_dequantize_rows<BITS, float><<<(n_blocks * 4 + 255) / 256, 256>>>(d);
    d.dst = back16_dev;
    tbq_dequantize_rows<BITS, half><<<(n_blocks * 4 + 255) / 256, 256>>>(d);
    CHECK(cudaGetLastError());
    std::vector<float>    back(x.size()), back_want(x.size());
    std::vector<uint16_t> back16(x.size()), back16_want(x.size());
    CHECK(cudaMemcpy(back.data(), back_dev, x.size() * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(back16.data(), back16_dev, x.size() * 2, cudaMemcpyDeviceToHost));
    ref->dequantize[BITS - 2](want.data(), back_want.data(), x.size());
    tbq_dequantize_f16((tbq_type) (TBQ_TYPE_TBQ2_0 + BITS - 2), want.data(), back16_want.data(), x.size());
    long bad_values = 0, bad_halves = 0;
    for (size_t i = 0; i < x.size(); i++) {
        const bool both_nan = back[i] != back[i] && back_want[i] != back_want[i];
        bad_values += !both_nan && std::memcmp(&back[i], &back_want[i], 4) != 0;
        bad_halves += !both_nan && back16[i] != back16_want[i];
    }
    std::printf("tbq%d_0 from %s: %ld of %zu blocks differ, %ld exact ones, %ld values, %ld halves\n", BITS,
                sizeof(T) == 4 ? "f32" : "f16", bad, n_blocks, bad_exact, bad_values, bad_halves);

    float       ms = 0;
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    CHECK(cudaEventRecord(from));
    tbq_quantize_rows<BITS, T><<<(n_blocks + blocks_per_cta - 1) / blocks_per_cta, TBQ_ENCODE_THREADS>>>(e);
    CHECK(cudaEventRecord(to));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    const double encode = ms;
    e.from.ne[0]        = 16;
    for (int i = 0; i < 21; i++) { // a token's keys; the first call warms up
        if (i == 1) {
            CHECK(cudaEventRecord(from));
        }
        tbq_quantize_decode_size<BITS, T><<<16, TBQ_DECODE_SIZE_THREADS>>>(e);
    }
    CHECK(cudaEventRecord(to));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    const double token = ms / 20 * 1000;
    d.dst              = back16_dev;
    CHECK(cudaEventRecord(from));
    tbq_dequantize_rows<BITS, half><<<(n_blocks * 4 + 255) / 256, 256>>>(d);
    CHECK(cudaEventRecord(to));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    std::printf("    encode %.2f ns a block, 16 blocks %.1f us, decode to f16 %.3f ns a block (%.0f GB/s)\n",
                encode * 1e6 / n_blocks, token, ms * 1e6 / n_blocks, n_blocks * (bytes + 128) / (ms * 1e6));
    cudaFree(in_dev);
    cudaFree(out_dev);
    cudaFree(back_dev);
    cudaFree(back16_dev);
    return bad + bad_exact + bad_values + bad_halves;
}

// The keys of tokens, with or without their rotary embedding, and their values in one launch or in two; rows in any order.
template <int BITS_K, int BITS_V, bool ROPE> static long compare_pair(bool neox, bool two, std::mt19937 & rng) {
    const int                       tokens = 3, heads = 5, d = 128, width = heads * d, n_dims = 96, blocks = width / 64;
    const float                     base = 10000.0f;
    std::normal_distribution<float> normal;
    std::vector<float>              x(2 * tokens * width);
    for (float & v : x) {
        v = normal(rng);
    }
    const std::vector<int> pos = { 7, 1000, 0 }, ids = { 2, 0, 1 };
    const int              nb[2] = { blocks * tbq_block_bytes(BITS_K), blocks * tbq_block_bytes(BITS_V) };
    float *                x_dev;
    int *                  ids_dev;
    char *                 out_dev[2];
    CHECK(cudaMalloc(&x_dev, x.size() * 4));
    CHECK(cudaMalloc(&ids_dev, 6 * 4));
    CHECK(cudaMemcpy(x_dev, x.data(), x.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(ids_dev, ids.data(), 12, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(ids_dev + 3, pos.data(), 12, cudaMemcpyHostToDevice));
    // the second token is not kept exactly
    const std::vector<int> slots     = { 1, -1, 0 };
    const int              exact_nb1 = blocks * (int) sizeof(block_tbq8_0);
    int *                  slots_dev;
    CHECK(cudaMalloc(&slots_dev, 3 * 4));
    CHECK(cudaMemcpy(slots_dev, slots.data(), 12, cudaMemcpyHostToDevice));
    tbq_pair_args     pair    = {};
    tbq_encode_args * args[2] = { &pair.a, &pair.b };
    for (int i = 0; i < 2; i++) {
        CHECK(cudaMalloc(&args[i]->exact, 3 * exact_nb1));
        CHECK(cudaMemset(args[i]->exact, 0x55, 3 * exact_nb1));
        args[i]->exact_nb1 = exact_nb1, args[i]->slots = slots_dev;
        CHECK(cudaMalloc(&out_dev[i], tokens * nb[i]));
        args[i]->src = x_dev + i * tokens * width, args[i]->dst = out_dev[i];
        args[i]->from = { { blocks, tokens, 1, 1 }, { width } };
        args[i]->to   = { { blocks, tokens, 1, 1 }, { nb[i] } };
        args[i]->ids = ids_dev, args[i]->ids_ne1 = args[i]->ids_ne2 = args[i]->ids_s0 = 1;
    }
    tbq_rope_args & rope = pair.rope;
    rope.head_size = d, rope.n_dims = n_dims, rope.neox = neox, rope.pos = ids_dev + 3, rope.s_head = d;
    rope.theta_scale = std::pow(base, -2.0f / n_dims), rope.freq_scale = rope.attn_factor = 1.0f;
    pair.n_a  = tokens * blocks;
    pair.part = two ? TBQ_ENCODE_EXACT : TBQ_ENCODE_WHOLE;
    CHECK(cudaMalloc(&pair.stored, 2 * tokens * blocks * sizeof(tbq_stored_block)));
    tbq_quantize_pair<BITS_K, BITS_V, ROPE><<<2 * tokens * blocks, TBQ_DECODE_SIZE_THREADS>>>(pair);
    CHECK(cudaGetLastError());
    if (two) {
        pair.part = TBQ_ENCODE_PACKED;
        CHECK(cudaMemset(x_dev, 0xFF, x.size() * 4)); // attention may have overwritten it, and the numbers of rows
        CHECK(cudaMemset(ids_dev, 0x7F, 3 * 4));
        tbq_quantize_pair<BITS_K, BITS_V, false><<<2 * tokens * blocks, TBQ_DECODE_SIZE_THREADS>>>(pair);
        CHECK(cudaGetLastError());
    }

    std::vector<float> want = x;
    for (int i = 0; ROPE && i < tokens * heads; i++) {
        float *       to   = &want[i * d];
        const float * from = &x[i * d];
        for (int p = 0; p < n_dims / 2; p++) {
            const double angle = pos[i / heads] * std::pow((double) base, -2.0 * p / n_dims);
            const int    a = neox ? p : 2 * p, b = neox ? p + n_dims / 2 : 2 * p + 1;
            to[a] = (float) (from[a] * std::cos(angle) - from[b] * std::sin(angle));
            to[b] = (float) (from[a] * std::sin(angle) + from[b] * std::cos(angle));
        }
    }
    long bad = 0;
    for (int i = 0; i < 2; i++) {
        const tbq_type    type = (tbq_type) (TBQ_TYPE_TBQ2_0 + (i == 0 ? BITS_K : BITS_V) - 2);
        std::vector<char> got(tokens * nb[i]), row(nb[i]);
        CHECK(cudaMemcpy(got.data(), out_dev[i], got.size(), cudaMemcpyDeviceToHost));
        for (int t = 0; t < tokens; t++) {
            tbq_quantize_kv(type, &want[(i * tokens + t) * width], row.data(), width);
            std::vector<float> a(width), b(width);
            tbq_dequantize(type, row.data(), a.data(), width);
            tbq_dequantize(type, &got[ids[t] * nb[i]], b.data(), width);
            double error = 0, norm = 0;
            for (int c = 0; c < width; c++) {
                error += (a[c] - b[c]) * (double) (a[c] - b[c]);
                norm += a[c] * (double) a[c];
            }
            // values: the same bytes.  Keys: the angles of a GPU are good to 1e-4 at position 1000, and a few levels
            // flip.
            bad += ROPE && i == 0 ? !(error < 2e-3 * norm) : std::memcmp(row.data(), &got[ids[t] * nb[i]], nb[i]) != 0;
        }
        std::vector<char> exact(3 * exact_nb1, 0x55), exact_got(exact.size());
        CHECK(cudaMemcpy(exact_got.data(), args[i]->exact, exact_got.size(), cudaMemcpyDeviceToHost));
        for (int t = 0; t < tokens; t++) {
            if (slots[t] < 0) {
                continue;
            }
            char * const to = &exact[slots[t] * exact_nb1];
            tbq_quantize(TBQ_TYPE_TBQ8_0, &want[(i * tokens + t) * width], to, width);
            if (ROPE && i == 0) {
                std::vector<float> a(width), b(width);
                tbq_dequantize(TBQ_TYPE_TBQ8_0, to, a.data(), width);
                tbq_dequantize(TBQ_TYPE_TBQ8_0, &exact_got[slots[t] * exact_nb1], b.data(), width);
                double error = 0, norm = 0;
                for (int c = 0; c < width; c++) {
                    error += (a[c] - b[c]) * (double) (a[c] - b[c]);
                    norm += a[c] * (double) a[c];
                }
                bad += !(error < 1e-4 * norm);
                std::memcpy(to, &exact_got[slots[t] * exact_nb1], exact_nb1);
            }
        }
        bad += exact != exact_got;
        cudaFree(args[i]->exact);
        cudaFree(out_dev[i]);
    }
    std::printf("tbq%d_0 and tbq%d_0 in one launch%s: %ld rows differ\n", BITS_K, BITS_V,
                !ROPE  ? ""
                : neox ? ", ROPE neox"
                       : ", ROPE",
                bad);
    cudaFree(x_dev), cudaFree(ids_dev), cudaFree(slots_dev);
    return bad;
}

// Exact rows alone: some that are there and some that are made, a part after the other; back to values; and over the
// rows of a cache.
static long compare_exact(std::mt19937 & rng) {
    int                 n_kernels;
    const tbq_kernels * ref    = tbq_list_kernels(&n_kernels)[0];
    const int           blocks = 6, width = blocks * 64, n_before = 5, n_rows = 7, n_all = n_before + n_rows, parts = 3;
    const int           row = blocks * (int) sizeof(block_tbq8_0), gap = 2 * row, stride = width + 8;
    const std::vector<float> x = values((size_t) parts * n_rows * stride / 64 + 1, rng), mean = values(blocks, rng);
    std::vector<char>        before((size_t) parts * (n_before * row + gap)), want((size_t) parts * n_all * row);
    for (char & c : before) {
        c = (char) rng();
    }
    for (int p = 0; p < parts; p++) {
        char * const to = &want[(size_t) p * n_all * row];
        std::memcpy(to, &before[(size_t) p * (n_before * row + gap)], (size_t) n_before * row);
        for (int r = 0; r < n_rows; r++) {
            ref->quantize_exact(&x[(size_t) (p * n_rows + r) * stride], mean.data(), to + (n_before + r) * row, width);
        }
    }
    float *x_dev, *mean_dev, *back_dev;
    char * before_dev, *out_dev;
    half * cache_dev;
    int *  cells_dev;
    CHECK(cudaMalloc(&x_dev, x.size() * 4));
    CHECK(cudaMalloc(&mean_dev, mean.size() * 4));
    CHECK(cudaMalloc(&before_dev, before.size()));
    CHECK(cudaMalloc(&out_dev, want.size()));
    CHECK(cudaMemcpy(x_dev, x.data(), x.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(mean_dev, mean.data(), mean.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(before_dev, before.data(), before.size(), cudaMemcpyHostToDevice));
    tbq_exact_args a = {};
    a.before = before_dev, a.src = x_dev, a.dst = out_dev, a.n_before = n_before, a.mean = mean_dev;
    a.before_nb1 = row, a.before_nb2 = n_before * row + gap;
    a.from = { { blocks, n_all, parts, 1 }, { stride, n_rows * stride } };
    a.to   = { { blocks, n_all, parts, 1 }, { row, n_all * row } };
    tbq_quantize_exact_rows<<<(16 * blocks * n_all * parts + TBQ_ENCODE_THREADS - 1) / TBQ_ENCODE_THREADS,
                              TBQ_ENCODE_THREADS>>>(a);
    CHECK(cudaGetLastError());
    const long bad_rows = differences(want, out_dev, sizeof(block_tbq8_0));

    // only what was made: random bytes are no floats to compare
    const size_t       n = (size_t) n_rows * width;
    std::vector<float> value(n), back(n);
    ref->dequantize_exact(&want[n_before * row], value.data(), n);
    CHECK(cudaMalloc(&back_dev, n * 4));
    CHECK(cudaMemcpy(out_dev, want.data(), want.size(), cudaMemcpyHostToDevice));
    tbq_decode_args d{};
    d.src = out_dev + n_before * row, d.dst = back_dev;
    d.from = { { blocks, n_rows, 1, 1 }, { row } }, d.to = { { blocks, n_rows, 1, 1 }, { width } };
    const int n_cta = (16 * blocks * n_rows + 255) / 256;
    tbq_dequantize_exact_rows<float><<<n_cta, 256>>>(d, nullptr, 0);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(back.data(), back_dev, n * 4, cudaMemcpyDeviceToHost));

    // rows of an f16 cache: in another order, and one of them unused
    const std::vector<int> cells = { 11, 3, -1, 0, 7, 2, 5 };
    std::vector<uint16_t>  cache(12 * width, 0x1234), cache_got(cache.size());
    CHECK(cudaMalloc(&cells_dev, cells.size() * 4));
    CHECK(cudaMalloc(&cache_dev, cache.size() * 2));
    CHECK(cudaMemcpy(cells_dev, cells.data(), cells.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(cache_dev, cache.data(), cache.size() * 2, cudaMemcpyHostToDevice));
    d.dst = cache_dev;
    tbq_dequantize_exact_rows<half><<<n_cta, 256>>>(d, cells_dev, 0);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(cache_got.data(), cache_dev, cache.size() * 2, cudaMemcpyDeviceToHost));
    long bad_values = 0, bad_halves = 0;
    for (int r = 0; r < n_rows; r++) {
        for (int c = 0; c < width; c++) {
            const float v = value[r * width + c];
            bad_values += std::memcmp(&v, &back[r * width + c], 4) != 0 && v == v;
            if (cells[r] >= 0) {
                const __half h = __float2half(v);
                std::memcpy(&cache[cells[r] * width + c], &h, 2);
                if (v != v) {
                    cache[cells[r] * width + c] = cache_got[cells[r] * width + c];
                }
            }
        }
    }
    for (size_t i = 0; i < cache.size(); i++) {
        bad_halves += cache[i] != cache_got[i];
    }
    std::printf("tbq8_0: %ld blocks differ, %ld values, %ld halves\n", bad_rows, bad_values, bad_halves);
    cudaFree(x_dev), cudaFree(mean_dev), cudaFree(before_dev), cudaFree(out_dev), cudaFree(back_dev);
    cudaFree(cells_dev), cudaFree(cache_dev);
    return bad_rows + bad_values + bad_halves;
}

int main(int argc, char ** argv) {
    const size_t n = argc > 1 ? std::atol(argv[1]) : 200000;
    std::mt19937 rng(argc > 2 ? std::atoi(argv[2]) : 1);
    const long   bad = compare<2, float>(n, rng) + compare<3, float>(n, rng) + compare<4, float>(n, rng) +
                       compare<2, half>(n, rng) + compare<3, half>(n, rng) + compare<4, half>(n, rng) +
                       compare_pair<4, 3, false>(false, false, rng) + compare_pair<4, 2, true>(false, false, rng) +
                       compare_pair<3, 4, true>(true, false, rng) + compare_pair<2, 4, false>(false, true, rng) +
                       compare_pair<4, 4, true>(true, true, rng) + compare_pair<3, 2, true>(false, true, rng) +
                       compare_exact(rng);
    std::printf("%ld differences\n", bad);
    return bad != 0;
}
