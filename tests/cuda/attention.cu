// SPDX-License-Identifier: MIT
// The attention kernel alone: random problems compared with double precision, and its speed.
//   attention check [problems] [seed]     exit status 1 if one is wrong
//   attention exact [problems] [seed]     the same with exact rows
//   attention center [problems] [seed]    the same with centered keys, half of them with exact rows
//   attention rows check ...              with the kernel for whole rows (tbq-attention-rows.cuh), where it can; also
//                                         exact and center
//   attention rows early check ...        the same by programmatic launches
//   attention bench                       the shapes in docs/measurements/cuda.md
//   attention time exact                  a decode step with and without exact rows
//   attention time center                 a decode step with and without a mean
//   attention time rows                   that kernel's table in docs/measurements/cuda.md
//   attention [rows] profile K V N_HEAD_KV GQA N_KV N_SEQ   one shape of 128 channels, for ncu
#include "attention-kernels.cuh"
#include "attention-problem.cuh"

static cudaStream_t stream; // the default one, except where it is timed

static bool rows_kernel;   // where it can: `attention rows ...`
static int  n_rows_kernel; // its launches
static bool rows_early;    // by programmatic launches

static void launch_any(int d, int k, int v, const tbq_attention_args & a, float * partial) {
    if (rows_kernel && launch_rows(d, k, v, a, partial, stream, rows_early)) {
        n_rows_kernel++;
        return;
    }
    (d == 64 ? launch_64 : d == 128 ? launch_128 : launch_256)(k, v, a, partial, stream);
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

struct shape {
    int  k, v, n_head_kv, gqa, n_kv, n_seq = 1, n_q = 1, d = 128;
    bool unified = false; // all sequences in one cache of n_seq . n_kv tokens, as query rows of which each sees its own
};

// Microseconds of n_q rows of each of n_seq sequences of n_kv tokens; in a graph, with caches that the L2 cache does
// not hold.  n_exact: exact rows of each sequence, the first four and the newest; 0: no list.  Median of the rounds.
static double time_shape(const shape & s, int n_exact) {
    const int          d = s.d, k = s.k, v = s.v, n_stream = s.unified ? 1 : s.n_seq;
    tbq_attention_args a{};
    a.n_head_kv = s.n_head_kv, a.n_head = s.n_head_kv * s.gqa;
    a.n_q = s.unified ? s.n_q * s.n_seq : s.n_q, a.n_kv = s.unified ? s.n_kv * s.n_seq : s.n_kv;
    a.n_seq = a.n_seq_kv = a.n_seq_mask = n_stream;
    a.scale                             = 1.0f / std::sqrt((float) d);
    a.q_nb2 = 4 * d, a.q_nb1 = a.q_nb2 * a.n_head, a.q_nb3 = a.q_nb1 * a.n_q;
    a.k_nb2 = d / 64 * tbq_attention_block(k), a.k_nb1 = a.k_nb2 * s.n_head_kv, a.k_nb3 = a.k_nb1 * a.n_kv;
    a.v_nb2 = d / 64 * tbq_attention_block(v), a.v_nb1 = a.v_nb2 * s.n_head_kv, a.v_nb3 = a.v_nb1 * a.n_kv;
    a.mask_nb1 = 2 * a.n_kv, a.mask_nb3 = a.mask_nb1 * a.n_q;
    std::mt19937            rng(1);
    const int               n_random = std::min(s.n_kv, 2048); // tokens, again and again
    const std::vector<char> rows_k   = random_rows(k, (size_t) n_random * s.n_head_kv * d / 64, rng),
                            rows_v   = random_rows(v, (size_t) n_random * s.n_head_kv * d / 64, rng);
    const size_t            n_chunks = (size_t) s.n_kv / n_random * s.n_seq;
    const size_t            bytes_k = rows_k.size() * n_chunks, bytes_v = rows_v.size() * n_chunks;
    const int               layers = std::max<int>(3, std::min<size_t>(256, (200u << 20) / (bytes_k + bytes_v)));
    device_array<char>      k_dev(bytes_k * layers), v_dev(bytes_v * layers);
    for (size_t i = 0; i < layers * n_chunks; i++) {
        if (i == 0) {
            CHECK(cudaMemcpy(k_dev.p, rows_k.data(), rows_k.size(), cudaMemcpyHostToDevice));
            CHECK(cudaMemcpy(v_dev.p, rows_v.data(), rows_v.size(), cudaMemcpyHostToDevice));
            continue;
        }
        CHECK(cudaMemcpyAsync(k_dev.p + i * rows_k.size(), k_dev.p, rows_k.size(), cudaMemcpyDeviceToDevice));
        CHECK(cudaMemcpyAsync(v_dev.p + i * rows_v.size(), v_dev.p, rows_v.size(), cudaMemcpyDeviceToDevice));
    }
    std::normal_distribution<float> normal;
    std::vector<float>              q((size_t) d * a.n_head * a.n_q * a.n_seq);
    for (float & x : q) {
        x = normal(rng);
    }
    std::vector<__half> mask((size_t) a.n_kv * a.n_q * a.n_seq, __float2half(s.unified ? -INFINITY : 0.0f));
    for (int i = 0; s.unified && i < a.n_q; i++) {
        const size_t own = (size_t) i * a.n_kv + (size_t) (i / s.n_q) * s.n_kv;
        std::fill(mask.begin() + own, mask.begin() + own + s.n_kv, __float2half(0.0f));
    }
    // A list and a map for each stream.
    a.n_exact               = n_exact * s.n_seq / n_stream;
    const int        length = a.n_exact + (a.n_kv + 31) / 32;
    std::vector<int> cells((size_t) length * n_stream);
    for (int i = 0; i < n_exact * s.n_seq; i++) {
        const int seq = i / n_exact, j = i % n_exact;
        int *     list          = &cells[(size_t) (s.unified ? 0 : seq) * length];
        const int cell          = (s.unified ? seq * s.n_kv : 0) + (j < 4 ? j : s.n_kv - 1 - (j - 4));
        list[s.unified ? i : j] = cell;
        list[a.n_exact + cell / 32] |= (int) (1u << cell % 32);
    }
    const size_t            row_exact = (size_t) s.n_head_kv * d / 64 * sizeof(block_tbq8_0);
    const size_t            n_rows    = (size_t) a.n_exact * n_stream;
    const std::vector<char> rows_e    = random_exact_rows(n_rows * s.n_head_kv * d / 64, rng);
    device_array<char>      ek_dev(rows_e.size() * layers), ev_dev(rows_e.size() * layers);
    for (int i = 0; n_exact && i < layers; i++) {
        CHECK(cudaMemcpyAsync(ek_dev.p + i * rows_e.size(), rows_e.data(), rows_e.size(), cudaMemcpyHostToDevice));
        CHECK(cudaMemcpyAsync(ev_dev.p + i * rows_e.size(), rows_e.data(), rows_e.size(), cudaMemcpyHostToDevice));
    }
    a.exact_k_nb2 = a.exact_v_nb2 = row_exact / s.n_head_kv;
    a.exact_k_nb1 = a.exact_v_nb1 = row_exact;
    a.exact_k_nb3 = a.exact_v_nb3 = row_exact * a.n_exact;

    device_array<float>  q_dev(q), dst(q.size()), partial((size_t) a.n_seq * a.n_q * a.n_head * 300 * (d + 2));
    device_array<__half> mask_dev(mask);
    device_array<int>    cells_dev(cells);
    a.q = (const char *) q_dev.p, a.dst = dst.p, a.mask = (const char *) mask_dev.p;
    a.cells = n_exact ? cells_dev.p : nullptr;
    CHECK(cudaDeviceSynchronize());
    return time_of_a_layer(stream, layers, 21, [&](int i) {
        a.k       = k_dev.p + i * bytes_k;
        a.v       = v_dev.p + i * bytes_v;
        a.exact_k = ek_dev.p + i * rows_e.size();
        a.exact_v = ev_dev.p + i * rows_e.size();
        launch_any(d, k, v, a, partial.p);
    });
}

// GB/s, read and written, of a copy of a GiB.
static double copy_speed() {
    const size_t       bytes = 1ull << 30;
    device_array<char> x(bytes), y(bytes);
    cudaEvent_t        from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    float best = 1e9f, ms;
    for (int i = 0; i < 8; i++) {
        CHECK(cudaEventRecord(from));
        CHECK(cudaMemcpyAsync(y.p, x.p, bytes, cudaMemcpyDeviceToDevice));
        CHECK(cudaEventRecord(to));
        CHECK(cudaEventSynchronize(to));
        CHECK(cudaEventElapsedTime(&ms, from, to));
        best = std::min(best, ms);
    }
    return 2 * bytes / (best * 1e6);
}

// Both kernels in turn, without a list and with one.
static void time_rows() {
    std::printf("copy: %.0f GB/s read and written\n", copy_speed());
    static const shape shapes[] = {
        { 4, 4, 8, 4, 131072 },
        { 4, 4, 8, 4, 32768 },
        { 4, 4, 8, 4, 16384 },
        { 4, 4, 8, 4, 8192 },
        { 4, 4, 8, 4, 4096 },
        { 4, 4, 8, 4, 256 },
        { 4, 3, 8, 4, 131072 },
        { 4, 3, 8, 4, 32768 },
        { 4, 3, 8, 4, 16384 },
        { 3, 3, 8, 4, 131072 },
        { 3, 3, 8, 4, 65536 },
        { 3, 3, 8, 4, 32768 },
        { 3, 3, 8, 4, 16384 },
        { 3, 2, 8, 4, 131072 },
        { 3, 2, 8, 4, 32768 },
        { 2, 2, 8, 4, 131072 },
        { 2, 2, 8, 4, 32768 },
        { 2, 2, 8, 4, 16384 },
        { 4, 4, 4, 8, 131072 },
        { 4, 4, 4, 8, 32768 },
        { 4, 4, 4, 8, 16384 },
        { 4, 4, 4, 8, 8192 },
        { 3, 3, 4, 8, 131072 },
        { 3, 3, 4, 8, 32768 },
        { 4, 4, 8, 8, 131072, 1, 1, 64 },
        { 4, 4, 8, 8, 32768, 1, 1, 64 },
        { 4, 4, 8, 8, 16384, 1, 1, 64 },
        { 4, 4, 2, 8, 131072, 1, 1, 256 },
        { 4, 4, 2, 8, 32768, 1, 1, 256 },
        { 4, 4, 2, 8, 16384, 1, 1, 256 },
        { 4, 4, 8, 4, 4096, 2 },
        { 4, 4, 8, 4, 4096, 8 },
        { 4, 4, 8, 4, 8192, 8 },
        { 4, 4, 8, 4, 8192, 32 },
        { 4, 4, 8, 4, 8192, 64 },
        { 4, 4, 8, 4, 32768, 8 },
        { 3, 3, 8, 4, 8192, 8 },
        { 3, 3, 8, 4, 8192, 32 },
        { 4, 4, 8, 4, 8192, 8, 1, 128, true },
        { 4, 4, 8, 4, 32768, 8, 1, 128, true },
        { 4, 4, 8, 4, 131072, 1, 2 },
        { 4, 4, 8, 4, 131072, 1, 4 },
        { 3, 3, 8, 4, 131072, 1, 4 },
    };
    std::printf(
        "keys / values, KV heads x query heads each, head size: microseconds of the old kernel and of whole rows "
        "(times as fast)\n");
    for (const auto & s : shapes) {
        const double bytes =
            (double) (tbq_attention_block(s.k) + tbq_attention_block(s.v)) * s.d / 64 * s.n_head_kv * s.n_kv * s.n_seq;
        std::printf("%d/%d %dx%d, %3d, %6d tokens x %2d%s, %d rows:", s.k, s.v, s.n_head_kv, s.gqa, s.d, s.n_kv,
                    s.n_seq, s.unified ? " in one cache" : "", s.n_q);
        for (int n_exact : { 0, 149 }) {
            double us[3];
            n_rows_kernel = 0;
            for (int kind = 0; kind < 3; kind++) {
                rows_kernel = kind > 0, rows_early = kind == 2;
                us[kind] = time_shape(s, n_exact);
            }
            std::printf(" | %s %8.2f", n_exact ? "149 exact" : "no list", us[0]);
            if (n_rows_kernel) { // or the other one ran instead
                std::printf(" %8.2f (%.2f, %4.0f GB/s), early %8.2f", us[1], us[0] / us[1], bytes / us[1] / 1000,
                            us[2]);
            }
        }
        std::printf("\n");
        std::fflush(stdout);
    }
    std::printf("done\n");
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
    while (argc > 1 && (!std::strcmp(argv[1], "rows") || !std::strcmp(argv[1], "early"))) {
        (argv[1][0] == 'r' ? rows_kernel : rows_early) = true;
        argv++, argc--;
    }
    if (argc == 8 && !std::strcmp(argv[1], "profile")) {
        int x[6];
        for (int i = 0; i < 6; i++) {
            x[i] = std::atoi(argv[2 + i]);
        }
        std::printf("%.2f us\n", time_shape({ x[0], x[1], x[2], x[3], x[4], x[5] }, 0));
        return 0;
    }
    if (argc > 2 && !std::strcmp(argv[1], "time") && !std::strcmp(argv[2], "rows")) {
        time_rows();
        return 0;
    }
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
    const int    every  = rows_kernel ? 5 * N_ROWS_PAIRS : 3 * N_ALL; // problems with one length of the list
    std::mt19937 rng(argc > 3 ? std::atoi(argv[3]) : 1);
    int          bad  = 0;
    double       most = 0;
    for (int i = 0; i < n; i++) {
        const int    sizes[] = { 1, 17, 149, 661 };
        const double e = center
                             ? check(launch_any, i / 2, rng, i % 2 ? 149 : 0, true, false, rows_kernel)
                             : check(launch_any, i, rng, exact ? sizes[i / every % 4] : 0, false, false, rows_kernel);
        bad += e == 1;
        most = e < 1 ? std::max(most, e) : most;
    }
    std::printf("%d problems, %d wrong; relative squared error at most %.3g", n, bad, most);
    if (rows_kernel) {
        std::printf("; %d launches of the kernel for whole rows", n_rows_kernel);
    }
    std::printf("\n");
    return bad != 0;
}
