// SPDX-License-Identifier: MIT Dot product, dequantize and quantize on one core: the tbq types, with every
// implementation that this machine supports, compared with iq4_nl, q4_0 and q8_0.
//
//     tbq-bench-kernels [values per row] [rounds]
//
// All candidates take turns within each round, and the fastest round of each counts, so a busy machine slows all of
// them alike.  Rows are read in turn from a buffer that fits a second-level cache, as attention reads a short cache.
#include "ggml.h"
#include "ggml-cpu.h"
#include "tbq-kernels.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

struct candidate {
    std::string           name;
    std::function<void()> once; // handles all rows
    double                best = 1e30;
};

static double seconds(const std::function<void()> & f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static void run(const char * title, std::vector<candidate> & list, size_t values, int rounds) {
    for (int r = 0; r < rounds; r++) {
        for (auto & c : list) {
            c.best = std::min(c.best, seconds(c.once));
        }
    }
    printf("\n%-28s %10s %12s %14s\n", title, "ns/64", "values/ns", "x iq4_nl");
    for (auto & c : list) {
        printf("%-28s %10.2f %12.2f %14.2f\n", c.name.c_str(), c.best / values * 64e9, values / c.best * 1e-9,
               list[0].best / c.best);
    }
}

int main(int argc, char ** argv) {
    const int64_t n      = argc > 1 ? atoll(argv[1]) : 4096;
    const int     rounds = argc > 2 ? atoi(argv[2]) : 200;
    if (n <= 0 || n % 256 != 0 || rounds <= 0) {
        fprintf(stderr, "usage: %s [values per row, a multiple of 256] [rounds]\n", argv[0]);
        return 1;
    }
    const int rows = std::max<int>(1, (int) (65536 / n));
    ggml_cpu_init();

    std::vector<float>              x(n * rows), y(n * rows);
    std::mt19937                    rng(1);
    std::normal_distribution<float> normal;
    for (auto & v : x) {
        v = normal(rng);
    }

    int                         n_kernels;
    const tbq_kernels * const * kernels = tbq_list_kernels(&n_kernels);
    printf("row %lld, %d rows, %d rounds, tbq kernels chosen here: %s\n", (long long) n, rows, rounds,
           tbq_best_kernels()->name);

    const ggml_type                   types[] = { GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_0,   GGML_TYPE_Q8_0,
                                                  GGML_TYPE_TBQ4_0, GGML_TYPE_TBQ3_0, GGML_TYPE_TBQ2_0 };
    std::vector<std::vector<uint8_t>> blocks, acts;
    for (ggml_type t : types) {
        const auto * cpu = ggml_get_type_traits_cpu(t);
        blocks.emplace_back(ggml_row_size(t, n) * rows);
        acts.emplace_back(ggml_row_size(cpu->vec_dot_type, n));
        ggml_quantize_init(t);
        cpu->from_float(x.data(), blocks.back().data(), n * rows);
        ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float(x.data(), acts.back().data(), n);
    }

    volatile float         sink = 0;
    std::vector<candidate> dots, dequants, quants, mads;
    for (size_t i = 0; i < blocks.size(); i++) {
        const ggml_type t    = types[i];
        const size_t    step = ggml_row_size(t, n);
        uint8_t * const b    = blocks[i].data();
        uint8_t * const a    = acts[i].data();
        const auto *    cpu  = ggml_get_type_traits_cpu(t);
        dots.push_back({ ggml_type_name(t), [=, &sink] {
                            float s;
                            for (int r = 0; r < rows; r++) {
                                cpu->vec_dot((int) n, &s, 0, b + r * step, 0, a, 0, 1);
                                sink = s;
                            }
                        } });
        dequants.push_back({ ggml_type_name(t), [=, &y] {
                                for (int r = 0; r < rows; r++) {
                                    ggml_get_type_traits(t)->to_float(b + r * step, y.data() + r * n, n);
                                }
                            } });
        quants.push_back({ ggml_type_name(t), [=, &x] {
                              for (int r = 0; r < rows; r++) {
                                  cpu->from_float(x.data() + r * n, b + r * step, n);
                              }
                          } });
    }
    for (int k = 0; k < n_kernels; k++) {
        const tbq_kernels * const v = kernels[k];
        for (size_t i = 3; i < blocks.size() && v->supported(); i++) {
            const int         bits = types[i] - GGML_TYPE_TBQ2_0;
            const size_t      step = ggml_row_size(types[i], n);
            uint8_t * const   b    = blocks[i].data();
            uint8_t * const   a    = acts[i].data();
            const std::string name = std::string(ggml_type_name(types[i])) + " " + v->name;
            dots.push_back({ name, [=, &sink] {
                                for (int r = 0; r < rows; r++) {
                                    sink = v->dot[bits](b + r * step, a, n);
                                }
                            } });
            dequants.push_back({ name, [=, &y] {
                                    for (int r = 0; r < rows; r++) {
                                        v->dequantize[bits](b + r * step, y.data() + r * n, n);
                                    }
                                } });
            for (bool kv : { false, true }) {
                const auto quantize = [=](const float * from, uint8_t * to, int64_t size) {
                    kv ? v->quantize_kv[bits](from, nullptr, nullptr, to, size) : v->quantize[bits](from, to, size);
                };
                quants.push_back({ name + (kv ? " kv" : ""), [=, &x] {
                                      for (int r = 0; r < rows; r++) {
                                          quantize(x.data() + r * n, b + r * step, n);
                                      }
                                  } });
            }
        }
    }
    run("dot product", dots, x.size(), rounds);
    run("dequantize to f32", dequants, x.size(), rounds);
    run("quantize from f32", quants, x.size(), std::max(1, rounds / 10));
}
