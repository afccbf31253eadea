// SPDX-License-Identifier: MIT
// The CUDA encoders, run on a CPU (on_cpu.h), against the scalar reference: the same bytes.  What blocks.cu compares on a
// GPU, for few blocks, where there is none.
//   encoder_on_cpu [blocks]   exit status 1 at a difference
#include "on_cpu.h"

#include "tbq-quantize.cuh"

extern "C" {
#include "tbq-kernels.h"
}

#include <limits>
#include <random>

static const tbq_kernels * const REFERENCE = [] {
    int count;
    return tbq_list_kernels(&count)[0];
}();

// Normal values, and blocks of every kind that the encoder treats by itself.
static std::vector<float> values(size_t n_blocks, std::mt19937 & rng) {
    std::normal_distribution<float> normal;
    std::vector<float>              x(n_blocks * TBQ_BLOCK);
    for (size_t b = 0; b < n_blocks; b++) {
        float *     v     = &x[b * TBQ_BLOCK];
        const int   kind  = rng() % 14;
        const float scale = std::ldexp(1.0f, (int) (rng() % 20) - 10);
        const float other = kind == 0 ? std::ldexp(1.0f, (int) (rng() % 210) - 90) : // up to huge ones
                                kind == 1 ? std::ldexp(1.0f, -(int) (rng() % 40))
                                          : // near the smallest d
                                kind == 2 ? 3e4f / scale
                                          : // near the largest d
                                kind == 3 ? 1e37f
                            : kind == 4   ? 0.0f
                                          : 1.0f;
        for (int i = 0; i < TBQ_BLOCK; i++) {
            v[i] = normal(rng) * scale * other;
            v[i] = kind == 5 ? std::round(v[i] / scale) : kind == 6 ? scale : kind == 7 && rng() % 8 ? 0.0f : v[i];
        }
        if (kind == 8) {
            v[rng() % TBQ_BLOCK] *= 50;
        }
        if (kind == 9) {
            v[rng() % TBQ_BLOCK] =
                rng() % 2 ? std::numeric_limits<float>::quiet_NaN() : -std::numeric_limits<float>::infinity();
        }
    }
    return x;
}

enum weights { NONE, ORDINARY, EXTREME };

// Weights of pairs of channels.
static std::vector<float> weights_of(size_t n, weights kind, std::mt19937 & rng) {
    std::vector<float> w(n);
    for (size_t i = 0; i < n; i += 2) {
        w[i] = w[i + 1] = kind == EXTREME ? (rng() % 16 == 0 ? 1000.0f : 1e-3f) : 0.1f + (rng() % 1000) * 0.01f;
    }
    return w;
}

static long count_different(const std::vector<char> & a, const std::vector<char> & b, size_t bytes) {
    long different = 0;
    for (size_t i = 0; i < a.size(); i += bytes) {
        different += std::memcmp(&a[i], &b[i], bytes) != 0;
    }
    return different;
}

// n blocks by half a warp each, and by four warps each.  exact: with exact rows.
template <int BITS, typename T> static long test_rows(size_t n, weights kind, bool centered, bool exact, int seed) {
    std::mt19937       rng(seed);
    std::vector<float> x = values(n, rng), w = weights_of(x.size(), kind, rng), mean(x.size());
    std::vector<T>     source(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        source[i] = (T) x[i];
        x[i]      = (float) source[i];
        mean[i]   = i / TBQ_BLOCK % 2 ? x[i] / 2 : 0.0f;
    }
    const float * const weight = kind == NONE ? nullptr : w.data();
    const float * const minus  = centered ? mean.data() : nullptr;
    const size_t        bytes  = tbq_block_bytes(BITS);
    std::vector<char>   wanted(n * bytes), wanted_exact(n * sizeof(block_tbq8_0));
    REFERENCE->quantize_kv[BITS - 2](x.data(), minus, weight, wanted.data(), x.size());
    REFERENCE->quantize_exact(x.data(), minus, wanted_exact.data(), x.size());

    long different = 0;
    for (bool many : { true, false }) {
        std::vector<char> found(wanted.size(), -1), found_exact(wanted_exact.size(), -1);
        const int         slot = 0;
        tbq_encode_args   a{};
        a.src    = (decltype(a.src)) source.data();
        a.dst    = found.data();
        a.from   = { { (long long) n, 1, 1, 1 }, {} };
        a.to     = a.from;
        a.mean   = minus;
        a.weight = weight;
        if (exact) {
            a.exact = found_exact.data();
            a.slots = &slot;
        }
        for (unsigned cta = 0; cta < (many ? (n + 7) / 8 : n); cta++) {
            on_cpu::run(cta, [&] { many ? tbq_quantize_rows<BITS, T>(a) : tbq_quantize_decode_size<BITS, T>(a); });
        }
        const long packed = count_different(wanted, found, bytes);
        const long whole  = exact ? count_different(wanted_exact, found_exact, sizeof(block_tbq8_0)) : 0;
        std::printf("tbq%d_0 from %s, %s, weights %d, mean %d: %ld of %zu differ, %ld exact\n", BITS,
                    sizeof(T) == 4 ? "f32" : "f16", many ? "half a warp" : "four warps", kind, centered, packed, n,
                    whole);
        different += packed + whole;
    }
    return different;
}

// Keys with weights and values in one launch, or in two, of which the second has other sources; every third block has no slot
// for an exact row.  With ROPE at position 0, where every angle is 0.
template <int BITS_K, int BITS_V, bool ROPE> static long test_pair(int n, bool two, int seed) {
    std::mt19937             rng(seed);
    const std::vector<float> k = values(n, rng), v = values(n, rng), w = weights_of(TBQ_BLOCK, ORDINARY, rng);
    const std::vector<float> mean(TBQ_BLOCK);
    std::vector<char>        wanted_k(n * tbq_block_bytes(BITS_K)), wanted_v(n * tbq_block_bytes(BITS_V));
    std::vector<char>        found_k(wanted_k.size(), -1), found_v(wanted_v.size(), -1);
    for (int i = 0; i < n; i++) { // each block is a row
        REFERENCE->quantize_kv[BITS_K - 2](&k[i * TBQ_BLOCK], mean.data(), w.data(),
                                           &wanted_k[i * tbq_block_bytes(BITS_K)], TBQ_BLOCK);
    }
    REFERENCE->quantize_kv[BITS_V - 2](v.data(), nullptr, nullptr, wanted_v.data(), v.size());

    std::vector<char>  wanted_exact(2 * n * sizeof(block_tbq8_0), -1), found_exact(wanted_exact.size(), -1);
    std::vector<int>   slots(n);
    std::vector<float> source = k;
    std::vector<int>   ids(n);

    std::vector<tbq_stored_block> between(2 * n);
    for (int i = 0; i < n; i++) {
        ids[i]   = i;
        slots[i] = i % 3 == 2 ? -1 : n - 1 - i;
        if (slots[i] >= 0) {
            char * const to = &wanted_exact[slots[i] * sizeof(block_tbq8_0)];
            REFERENCE->quantize_exact(&k[i * TBQ_BLOCK], nullptr, to, TBQ_BLOCK);
            REFERENCE->quantize_exact(&v[i * TBQ_BLOCK], nullptr, to + n * sizeof(block_tbq8_0), TBQ_BLOCK);
        }
    }

    tbq_pair_args     p{};
    tbq_encode_args & a = p.a;
    a.src               = (decltype(a.src)) source.data();
    a.dst               = found_k.data();
    a.from              = { { 1, n, 1, 1 }, { TBQ_BLOCK } };
    a.to                = { { 1, n, 1, 1 }, { tbq_block_bytes(BITS_K) } };
    a.mean              = mean.data();
    a.weight            = w.data();
    a.exact             = found_exact.data();
    a.exact_nb1         = sizeof(block_tbq8_0);
    a.slots             = slots.data();
    a.ids               = ids.data();
    a.ids_ne1 = a.ids_ne2 = a.ids_s0 = 1;
    p.b                              = a;
    p.b.src                          = (decltype(a.src)) v.data();
    p.b.dst                          = found_v.data();
    p.b.to.s[0]                      = tbq_block_bytes(BITS_V);
    p.b.mean = p.b.weight = nullptr;
    p.b.exact += n * sizeof(block_tbq8_0);
    p.rope.head_size = p.rope.n_dims = p.rope.s_head = TBQ_BLOCK;
    p.rope.neox                                      = true;
    p.rope.theta_scale                               = 0.7f;
    p.rope.freq_scale = p.rope.attn_factor = 1.0f;
    const std::vector<int> positions(n);
    p.rope.pos = positions.data();
    p.n_a      = n;
    p.stored   = between.data();
    p.part     = two ? TBQ_ENCODE_EXACT : TBQ_ENCODE_WHOLE;
    for (int cta = 0; cta < 2 * n; cta++) {
        on_cpu::run(cta, [&] { tbq_quantize_pair<BITS_K, BITS_V, ROPE>(p); });
    }
    if (two) {
        p.part = TBQ_ENCODE_PACKED;
        std::fill(source.begin(), source.end(), 1.0f); // as attention may
        std::fill(ids.begin(), ids.end(), 1 << 30);
        for (int cta = 0; cta < 2 * n; cta++) {
            on_cpu::run(cta, [&] { tbq_quantize_pair<BITS_K, BITS_V, false>(p); });
        }
    }
    const long different = count_different(wanted_k, found_k, tbq_block_bytes(BITS_K)) +
                           count_different(wanted_v, found_v, tbq_block_bytes(BITS_V)) +
                           count_different(wanted_exact, found_exact, sizeof(block_tbq8_0));
    std::printf("tbq%d_0 keys and tbq%d_0 values, ROPE %d, in %d: %ld differ\n", BITS_K, BITS_V, ROPE, two ? 2 : 1,
                different);
    return different;
}

int main(int argc, char ** argv) {
    const int n         = argc > 1 ? std::atoi(argv[1]) : 100;
    long      different = 0;
    for (weights kind : { NONE, ORDINARY, EXTREME }) {
        different += test_rows<2, float>(n, kind, true, false, 1) + test_rows<3, float>(n, kind, true, false, 2) +
                     test_rows<4, float>(n, kind, true, false, 3) + test_rows<2, half>(n, kind, true, true, 4) +
                     test_rows<3, half>(n, kind, false, false, 5) + test_rows<4, half>(n, kind, true, true, 6);
    }
    for (bool two : { false, true }) {
        different +=
            test_pair<4, 3, false>(n, two, 7) + test_pair<2, 4, true>(n, two, 8) + test_pair<3, 2, true>(n, two, 9);
    }
    std::printf("%ld differences\n", different);
    return different != 0;
}
