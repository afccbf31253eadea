// SPDX-License-Identifier: MIT
// Attention alone, without llama.cpp: every implementation that this machine supports, and each type.
//
//     tbq-bench-attention [cached rows] [threads] [query rows] [KV heads] [query heads per KV head] [head size]
//     [rounds] [exact rows]
//
// Prints milliseconds for the calls of 8 layers, the bytes of K and V that these read per second, and the speed of a
// plain read of the same bytes by the same threads.  Each layer has a KV cache of its own, so that no CPU cache holds
// them all.  All candidates take turns within each round, and the fastest round of each counts.
#include "tbq-attention.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

static const int n_layers = 8;

static double seconds(const std::function<void()> & f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Threads that wait for work by spinning, as ggml's do.
struct team {
    explicit team(int n) : n(n) {
        for (int i = 1; i < n; i++) {
            threads.emplace_back([this, i] {
                for (int round = 1;; round++) {
                    while (started.load(std::memory_order_acquire) < round) {
                    }
                    if (!work) {
                        return;
                    }
                    work(i);
                    ended.fetch_add(1, std::memory_order_release);
                }
            });
        }
    }
    ~team() {
        work = nullptr;
        started.fetch_add(1, std::memory_order_release);
        for (auto & t : threads) {
            t.join();
        }
    }
    void run(std::function<void(int)> f) {
        work = std::move(f);
        ended.store(0);
        started.fetch_add(1, std::memory_order_release);
        work(0);
        while (ended.load(std::memory_order_acquire) < n - 1) {
        }
    }
    void barrier() {
        const int arrival = arrived.fetch_add(1, std::memory_order_acq_rel) + 1;
        const int until   = (arrival + n - 1) / n * n;
        while (arrived.load(std::memory_order_acquire) < until) {
        }
    }
    int                      n;
    std::vector<std::thread> threads;
    std::function<void(int)> work;
    std::atomic<int>         started{ 0 }, ended{ 0 }, arrived{ 0 };
};

struct layer {
    std::vector<uint8_t> k, v;
    std::vector<uint8_t> exact_k, exact_v;
};

struct counter {
    std::atomic<int64_t> next{ 0 };
};

static int64_t take(void * context) {
    return static_cast<counter *>(context)->next.fetch_add(1);
}

static uint64_t read_all(const std::vector<uint8_t> & bytes, int part, int parts) {
    const size_t words  = bytes.size() / 8;
    uint64_t     sum[8] = {};
    for (size_t i = words * part / parts; i + 8 <= words * (part + 1) / parts; i += 8) {
        uint64_t w[8];
        memcpy(w, bytes.data() + i * 8, sizeof(w));
        for (int j = 0; j < 8; j++) {
            sum[j] += w[j];
        }
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

int main(int argc, char ** argv) {
    const auto    number    = [&](int i, int fallback) { return argc > i ? atoi(argv[i]) : fallback; };
    const int64_t n_kv      = number(1, 8192);
    const int     n_threads = number(2, 2);
    const int64_t n_tokens  = number(3, 1);
    const int64_t n_head_kv = number(4, 4);
    const int64_t group     = number(5, 4);
    const int64_t size      = number(6, 128);
    const int     rounds    = number(7, 20);
    const int64_t n_exact   = number(8, 0);

    team                            workers(n_threads);
    std::mt19937                    random(1);
    std::normal_distribution<float> normal;
    std::vector<float>              q(n_tokens * n_head_kv * group * size), row(size), out(q.size());
    for (auto & x : q) {
        x = normal(random);
    }
    printf("%d cached rows, %d of them exact, %d query rows for each of %d x %d heads of %d, %d threads, %d layers\n",
           (int) n_kv, (int) n_exact, (int) n_tokens, (int) n_head_kv, (int) group, (int) size, n_threads, n_layers);
    // the list: the newest rows
    std::vector<int32_t> cells(n_exact + (n_kv + 31) / 32);
    for (int64_t j = 0; j < n_exact && j < n_kv; j++) {
        cells[j] = (int32_t) (n_kv - 1 - j);
        cells[n_exact + cells[j] / 32] |= (int32_t) (1u << cells[j] % 32);
    }
    const size_t         exact_bytes = tbq_row_bytes(TBQ_TYPE_TBQ8_0, size);
    std::vector<uint8_t> exact(exact_bytes * n_exact * n_head_kv);
    for (size_t i = 0; i < exact.size(); i += exact_bytes) {
        for (auto & x : row) {
            x = normal(random);
        }
        tbq_quantize(TBQ_TYPE_TBQ8_0, row.data(), exact.data() + i, size);
    }
    printf("%-24s %10s %10s %12s\n", "", "ms", "GB/s", "read, GB/s");

    int                         count;
    const tbq_kernels * const * list = tbq_list_kernels(&count);
    for (int type = TBQ_TYPE_TBQ2_0; type <= TBQ_TYPE_TBQ4_0; type++) {
        const size_t         bytes = tbq_row_bytes((tbq_type) type, size);
        std::vector<layer>   layers(n_layers);
        std::vector<uint8_t> some(bytes * 1024);
        for (int r = 0; r < 1024; r++) {
            for (auto & x : row) {
                x = normal(random);
            }
            tbq_quantize_kv((tbq_type) type, row.data(), some.data() + r * bytes, size);
        }
        for (auto & l : layers) {
            l.k.resize(n_kv * n_head_kv * bytes);
            l.v.resize(l.k.size());
            l.exact_k = l.exact_v = exact;
            for (int64_t r = 0; r < n_kv * n_head_kv; r++) {
                memcpy(l.k.data() + r * bytes, some.data() + random() % 1024 * bytes, bytes);
                memcpy(l.v.data() + r * bytes, some.data() + random() % 1024 * bytes, bytes);
            }
        }
        tbq_attention a = {};
        a.n_streams = a.k.n_streams = a.v.n_streams = 1;
        a.n_tokens                                  = n_tokens;
        a.n_kv                                      = n_kv;
        a.n_head                                    = n_head_kv * group;
        a.n_head_kv                                 = n_head_kv;
        a.k_size = a.v_size = size;
        a.q                 = q.data();
        a.q_head_stride     = size * sizeof(float);
        a.q_token_stride    = a.q_head_stride * a.n_head;
        a.k.type = a.v.type = type;
        a.k.row_stride = a.v.row_stride = bytes * n_head_kv;
        a.k.head_stride = a.v.head_stride = bytes;
        a.n_exact                         = n_exact;
        a.exact_k.row_stride = a.exact_v.row_stride = exact_bytes * n_head_kv;
        a.exact_k.head_stride = a.exact_v.head_stride = exact_bytes;
        a.exact_k.n_streams = a.exact_v.n_streams = 1;
        a.cells                                   = cells.data();
        a.packed_hidden                           = (const uint32_t *) cells.data() + n_exact;
        a.scale                                   = 1.0f / std::sqrt((float) size);
        a.out                                     = out.data();

        tbq_attention_plan plan;
        const tbq_status   status = tbq_attention_make_plan(&a, &plan);
        if (status != TBQ_OK) {
            fprintf(stderr, "error: heads of %d: %s\n", (int) size, tbq_status_text(status));
            return 1;
        }
        std::vector<uint8_t> work(tbq_attention_work_bytes(&plan, n_threads));

        std::vector<double>   best(count, 1e30);
        double                best_read = 1e30;
        std::atomic<uint64_t> sink{ 0 };
        for (int round = 0; round < rounds; round++) {
            for (int i = 0; i < count; i++) {
                if (!list[i]->supported() || (i == 0 && round > 0)) { // the reference once: it is slow
                    continue;
                }
                best[i] =
                    std::min(best[i], seconds([&] {
                                 for (auto & l : layers) {
                                     counter items;
                                     plan.a.k.data       = l.k.data();
                                     plan.a.v.data       = l.v.data();
                                     plan.a.exact_k.data = l.exact_k.data();
                                     plan.a.exact_v.data = l.exact_v.data();
                                     workers.run([&](int thread) {
                                         tbq_attention_run(&plan, list[i], thread, work.data(), take, &items);
                                         if (plan.n_chunks > 1) {
                                             workers.barrier();
                                             tbq_attention_merge(&plan, list[i], plan.n_rows * thread / n_threads,
                                                                 plan.n_rows * (thread + 1) / n_threads, work.data());
                                         }
                                     });
                                 }
                             }));
            }
            best_read = std::min(best_read, seconds([&] {
                                     workers.run([&](int thread) {
                                         for (auto & l : layers) {
                                             sink +=
                                                 read_all(l.k, thread, n_threads) + read_all(l.v, thread, n_threads);
                                         }
                                     });
                                 }));
        }
        const double total = 2.0 * n_layers * layers[0].k.size();
        for (int i = 0; i < count; i++) {
            if (list[i]->supported()) {
                char name[64];
                snprintf(name, sizeof(name), "%s, %s", tbq_get_type_info((tbq_type) type)->name, list[i]->name);
                printf("%-24s %10.3f %10.2f %12.2f\n", name, best[i] * 1e3, total / best[i] / 1e9,
                       total / best_read / 1e9);
            }
        }
    }
}
