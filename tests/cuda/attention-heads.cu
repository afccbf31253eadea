// SPDX-License-Identifier: MIT
// Attention in decode for head sizes 192/128, 512 and 576/512 (tbq-attention-heads.cuh): random problems compared with
// double precision, and its speed.
//   attention-heads check|exact|center [problems] [seed]   exit status 1 if one is wrong; with exact rows; with centered
//                                                          keys, half of them with exact rows
//   attention-heads early check|exact|center ...           the same by programmatic launches
//   attention-heads bench [quick]                          microseconds of a decode step by shape, with every number of
//                                                          columns of a CTA that there is
//   attention-heads time DK BITS_K BITS_V N_HEAD_KV GQA N_KV [N_Q N_EXACT COLUMNS]   one shape
// nvcc alone builds it:
//   nvcc -std=c++17 -O3 -use_fast_math -arch=native --split-compile=0 -I ggml_tbq/include -I ggml_tbq/cuda
//       tests/cuda/attention-heads.cu libtbq.a
// Status 3: not a GPU for these kernels.
#include "tbq-attention-heads.cuh"

#include "attention-problem.cuh"

static cudaStream_t stream;
static bool         early; // programmatic launches, as where the backend allows them

static int attribute(cudaDeviceAttr which) {
    int n = 0;
    CHECK(cudaDeviceGetAttribute(&n, which, 0));
    return n;
}

static void start(void (*kernel)(tbq_heads_args), dim3 grid, int smem, const tbq_heads_args & a) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(TBQ_HEADS_THREADS), config.dynamicSmemBytes = smem;
    config.stream = stream;
    cudaLaunchAttribute programmatic{};
    programmatic.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
    programmatic.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &programmatic, config.numAttrs = early ? 1 : 0;
    CHECK(cudaLaunchKernelEx(&config, kernel, a));
}

// Memory of calls that are on their way: the kernels of one stream follow each other.
static char * scratch(int which, size_t bytes) {
    static char * memory[2];
    static size_t size[2];
    if (size[which] < bytes) {
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaFree(memory[which]));
        CHECK(cudaMalloc(&memory[which], bytes));
        size[which] = bytes;
    }
    return memory[which];
}

static int value_size(int dk) {
    return dk == 192 ? 128 : 512;
}

// columns: of a CTA, 0: the launcher's choice.  False: that many do not fit.  n_split: what was chosen.
static bool launch(int dk, tbq_heads_args a, int columns, int & n_split) {
    const int dv = value_size(dk), most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int nc = columns ? columns : tbq_heads_columns(a, dk, dv, most);
    bool      ok = false;
    tbq_heads_dispatch(dk, dv, nc, [&](auto dk_, auto dv_, auto nc_) {
        constexpr int DK = dk_, DV = dv_, NC = nc_;
        using shape         = tbq_heads_shape<DK, DV, NC>;
        auto * const kernel = tbq_attention_heads<DK, DV, NC>;
        const int    smem   = shape::smem(a.bits_k, a.bits_v, tbq_heads_mask_rows(a, NC));
        int          n_cta  = 0;
        if (smem + TBQ_HEADS_STATIC_SMEM > most) {
            return;
        }
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_cta, kernel, TBQ_HEADS_THREADS, smem));
        if (n_cta == 0) {
            std::fprintf(stderr, "%d/%d, %d columns: no CTA fits\n", DK, DV, NC);
            std::exit(2);
        }
        tbq_heads_partition<DK, DV, NC>(a, n_cta * attribute(cudaDevAttrMultiProcessorCount));
        n_split              = a.n_split;
        a.partial            = (float *) scratch(0, tbq_heads_partial_bytes(a, DV));
        const unsigned cells = a.n_groups * a.n_head_kv;
        if constexpr (shape::PREPARED) {
            a.prepared = scratch(1, tbq_heads_prepared_bytes<DK, DV, NC>(a));
            start(tbq_heads_prepare<DK, DV, NC>,
                  dim3((NC * shape::NB + TBQ_HEADS_WARPS - 1) / TBQ_HEADS_WARPS, cells, a.n_seq), 0, a);
        }
        start(kernel, dim3(a.n_split, cells, a.n_seq), smem, a);
        start(tbq_heads_combine<DK, DV>, dim3(a.n_seq * a.n_q * a.n_head, DV / 64), 0, a);
        ok = true;
    });
    return ok;
}

static int check_all(const char * what, int n, int seed) {
    const bool   exact = !std::strcmp(what, "exact"), center = !std::strcmp(what, "center");
    std::mt19937 rng(seed);
    int          bad  = 0;
    double       most = 0;
    for (int i = 0; i < n; i++) {
        const int    sizes[] = { 149, 17, 1, 661 };
        const int    forced  = i % 5 == 4 ? 16 : 0; // also what a GPU with less shared memory takes
        const double e       = check(
            [&](int dk, int k, int v, const tbq_attention_args & a, float *) {
                int n_split = 0;
                if (!launch(dk, tbq_heads_args_of(a, k, v), forced, n_split)) {
                    std::exit(3);
                }
                CHECK(cudaDeviceSynchronize());
            },
            i, rng, exact || (center && i % 2) ? sizes[i / 3 % 4] : 0, center, false, false, true);
        bad += e == 1;
        most = e < 1 ? std::max(most, e) : most;
    }
    std::printf("%d problems, %d wrong; relative squared error at most %.3g\n", n, bad, most);
    return bad != 0;
}

struct shape_of_call {
    int dk, k, v, n_head_kv, gqa, n_kv, n_q = 1, n_exact = 0;
};

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

// Microseconds of a call in a graph of many layers, whose caches the L2 cache does not hold; the median of the rounds.
// n_exact: exact rows, the first four and the newest; 0: no list.  0: that many columns do not fit.
static double time_one(const shape_of_call & s, int columns, int & n_split) {
    const int          dv = value_size(s.dk), latent = s.dk == 576;
    tbq_attention_args a{};
    a.n_head_kv = s.n_head_kv, a.n_head = s.n_head_kv * s.gqa, a.n_q = s.n_q, a.n_kv = s.n_kv;
    a.n_seq = a.n_seq_kv = a.n_seq_mask = 1;
    a.scale                             = 1.0f / std::sqrt((float) s.dk);
    a.q_nb2 = 4 * s.dk, a.q_nb1 = a.q_nb2 * a.n_head, a.q_nb3 = a.q_nb1 * a.n_q;
    a.k_nb2 = s.dk / 64 * tbq_attention_block(s.k), a.k_nb1 = a.k_nb2 * s.n_head_kv, a.k_nb3 = a.k_nb1 * a.n_kv;
    a.v_nb2 = dv / 64 * tbq_attention_block(s.v), a.v_nb1 = a.v_nb2 * s.n_head_kv, a.v_nb3 = a.v_nb1 * a.n_kv;
    if (latent) {
        a.v_nb1 = a.k_nb1, a.v_nb2 = a.k_nb2, a.v_nb3 = a.k_nb3;
    }
    a.mask_nb1 = 2 * a.n_kv, a.mask_nb3 = a.mask_nb1 * a.n_q;
    std::mt19937            rng(1);
    const int               n_random = std::min(s.n_kv, 2048); // tokens, again and again
    const std::vector<char> rows_k   = random_rows(s.k, (size_t) n_random * s.n_head_kv * s.dk / 64, rng),
                            rows_v   = random_rows(s.v, latent ? 1 : (size_t) n_random * s.n_head_kv * dv / 64, rng);
    const size_t            n_chunks = (size_t) s.n_kv / n_random;
    const size_t            bytes_k = rows_k.size() * n_chunks, bytes_v = latent ? 0 : rows_v.size() * n_chunks;
    const int               layers = std::max<int>(3, std::min<size_t>(64, (200u << 20) / (bytes_k + bytes_v)));
    device_array<char>      k_dev(bytes_k * layers + 16), v_dev(bytes_v * layers + 16);
    for (size_t i = 0; i < layers * n_chunks; i++) {
        CHECK(cudaMemcpy(k_dev.p + i * rows_k.size(), rows_k.data(), rows_k.size(), cudaMemcpyHostToDevice));
        if (!latent) {
            CHECK(cudaMemcpy(v_dev.p + i * rows_v.size(), rows_v.data(), rows_v.size(), cudaMemcpyHostToDevice));
        }
    }
    std::normal_distribution<float> normal;
    std::vector<float>              q((size_t) s.dk * a.n_head * a.n_q);
    for (float & x : q) {
        x = normal(rng);
    }
    const int        n_exact = std::min(s.n_exact, s.n_kv);
    std::vector<int> cells(n_exact + (a.n_kv + 31) / 32);
    for (int j = 0; j < n_exact; j++) {
        cells[j] = j < 4 ? j : s.n_kv - 1 - (j - 4);
        cells[n_exact + cells[j] / 32] |= (int) (1u << cells[j] % 32);
    }
    const std::vector<char> rows_e = random_exact_rows((size_t) std::max(n_exact, 1) * s.n_head_kv * s.dk / 64, rng);
    device_array<char>      exact_dev(rows_e);
    device_array<int>       cells_dev(cells);
    device_array<float>     q_dev(q), dst((size_t) dv * a.n_head * a.n_q);
    device_array<__half>    mask_dev(std::vector<__half>((size_t) a.n_kv * a.n_q, __float2half(0.0f)));
    a.q = (const char *) q_dev.p, a.dst = dst.p, a.mask = (const char *) mask_dev.p;
    if (n_exact) {
        a.cells = cells_dev.p, a.n_exact = n_exact, a.exact_k = a.exact_v = exact_dev.p;
        a.exact_k_nb2 = s.dk / 64 * sizeof(block_tbq8_0),
        a.exact_v_nb2 = latent ? a.exact_k_nb2 : dv / 64 * sizeof(block_tbq8_0);
        a.exact_k_nb1 = a.exact_k_nb2 * s.n_head_kv, a.exact_v_nb1 = a.exact_v_nb2 * s.n_head_kv;
    }
    auto layer = [&](int i) {
        a.k = k_dev.p + i * bytes_k;
        a.v = latent ? a.k : v_dev.p + i * bytes_v;
        return launch(s.dk, tbq_heads_args_of(a, s.k, s.v), columns, n_split);
    };
    if (!layer(0)) { // and now there is memory
        return 0;
    }
    CHECK(cudaDeviceSynchronize());
    return time_of_a_layer(stream, layers, 15, layer);
}

static void print_times(const shape_of_call & s, std::initializer_list<int> columns) {
    const int    dv = value_size(s.dk);
    const double bytes =
        ((double) tbq_attention_block(s.k) * s.dk + (s.dk == 576 ? 0 : (double) tbq_attention_block(s.v) * dv)) / 64 *
        s.n_head_kv * s.n_kv;
    std::printf("%d/%d, %d/%d bits, %3d x %3d heads, %6d tokens, %d rows, %3d exact:", s.dk, dv, s.k, s.v, s.n_head_kv,
                s.gqa, s.n_kv, s.n_q, s.n_exact);
    for (int nc : columns) {
        int          n_split = 0;
        const double us      = time_one(s, nc, n_split);
        if (us > 0) {
            std::printf(" | %s%d: %8.2f us, %4.0f GB/s, %d splits", nc ? "columns " : "chosen ", nc, us,
                        bytes / us / 1000, n_split);
        }
    }
    std::printf("\n");
    std::fflush(stdout);
}

static void bench(bool quick) {
    std::printf("copy: %.0f GB/s read and written; GB/s below: of packed rows, each once\n", copy_speed());
    for (int launches = 0; launches < 2; launches++) {
        early = launches == 1;
        std::printf("%s launches\n", early ? "programmatic" : "plain");
        for (int n_kv : { 4096, 32768, 131072 }) {
            for (int bits : { 4, 3, 2 }) {
                if ((quick || early) && bits != 4) {
                    continue;
                }
                print_times({ 576, bits, bits, 1, 16, n_kv }, { 16, 32, 64 });
                print_times({ 576, bits, bits, 1, 128, n_kv }, { 16, 32, 64 });
                print_times({ 512, bits, bits, 2, 8, n_kv }, { 8, 16 });
                print_times({ 512, bits, bits, 8, 4, n_kv }, { 8, 16 });
                print_times({ 192, bits, bits, 8, 8, n_kv }, { 8, 16 });
                print_times({ 192, bits, bits, 16, 1, n_kv }, { 8 });
                if (n_kv <= 32768) {
                    print_times({ 192, bits, bits, 128, 1, n_kv }, { 8 });
                }
            }
            if (quick) {
                continue;
            }
            for (int n_exact : { 0, 149 }) { // with a list
                print_times({ 576, 4, 4, 1, 16, n_kv, 1, n_exact }, { 0 });
                print_times({ 512, 4, 3, 8, 4, n_kv, 1, n_exact }, { 0 });
                print_times({ 192, 4, 3, 8, 8, n_kv, 1, n_exact }, { 0 });
            }
            print_times({ 576, 4, 4, 1, 20, n_kv }, { 32, 64 });
            print_times({ 576, 4, 4, 1, 128, n_kv, 4 }, { 64 }); // drafts
            print_times({ 512, 4, 4, 8, 4, n_kv, 4 }, { 16 });
        }
    }
    std::printf("done\n");
}

int main(int argc, char ** argv) {
    if (argc > 1 && !std::strcmp(argv[1], "early")) {
        early = true;
        argv++, argc--;
    }
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major < 8) {
        std::fprintf(stderr, "these kernels need compute capability 8.0\n");
        return 3;
    }
    if (early && major < 9) {
        std::fprintf(stderr, "programmatic launches need compute capability 9.0\n");
        return 3;
    }
    auto argument = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
    if (argc > 1 && !std::strcmp(argv[1], "bench")) {
        bench(argc > 2);
        return 0;
    }
    if (argc > 7 && !std::strcmp(argv[1], "time")) {
        print_times({ argument(2, 0), argument(3, 0), argument(4, 0), argument(5, 0), argument(6, 0), argument(7, 0),
                      argument(8, 1), argument(9, 0) },
                    { argument(10, 0) });
        return 0;
    }
    return check_all(argc > 1 ? argv[1] : "check", argument(2, 270), argument(3, 1));
}
