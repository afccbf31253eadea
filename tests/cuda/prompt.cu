// SPDX-License-Identifier: MIT
// Attention of prompts on sm_90a: random problems compared with double precision, and its speed.
//   prompt check [problems] [seed] [variant]   exit status 1 if one is wrong; every third with exact rows, or centered
//   prompt time N_Q N_KV [D BITS_K BITS_V N_HEAD_KV GQA N_EXACT VARIANT]
// nvcc -arch=sm_90a.  Status 3: not this GPU.
#include "tbq-prompt.cuh"

#include "attention-problem.cuh"

static int n_sm() {
    int n = 0;
    CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
    return n;
}

struct variant {
    const char * name;
    cudaError_t (*run[3])(const tbq_prompt_args &, cudaStream_t); // head sizes 64, 128, 256; null: not compiled
};

#ifdef ALL_VARIANTS
// The kernel of decode, to see from how many columns on this one is faster.  tbq4_0 only, without exact rows.
static cudaError_t run_decode(const tbq_prompt_args & prompt, cudaStream_t stream) {
    static device_array<char> memory(1 << 29);
    auto * const              kernel = tbq_attention<128, 4, 4, 16, false>;
    const int                 smem   = tbq_attention_smem(128, 4, 4, 16);
    int                       n_cta  = 0;
    tbq_attention_args        a      = prompt;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_cta, kernel, TBQ_ATTENTION_THREADS, smem));
    tbq_attention_partition(a, n_cta * n_sm());
    if (tbq_attention_partial_bytes(a, 128) > memory.n) {
        return cudaErrorMemoryAllocation;
    }
    a.partial = (float *) memory.p;
    const dim3 grid(a.n_split, (a.n_q * a.gqa + 15) / 16 * a.n_head_kv, a.n_seq);
    kernel<<<grid, TBQ_ATTENTION_THREADS, smem, stream>>>(a);
    if (a.n_split > 1) {
        tbq_attention_combine<128, 4, true><<<a.n_seq * a.n_q * a.n_head, dim3(128, 4), 0, stream>>>(a);
    }
    return cudaGetLastError();
}
#endif

static const variant VARIANTS[] = {
    { "kept",
      { tbq_prompt_run<64, TBQ_PROMPT_LAUNCH>, tbq_prompt_run<128, TBQ_PROMPT_LAUNCH>,
        tbq_prompt_run<256, TBQ_PROMPT_LAUNCH> } },
#ifdef ALL_VARIANTS
    { "two",
      { tbq_prompt_run<64, 2, 192, 64>, tbq_prompt_run<128, 2, 192, 64>, tbq_prompt_run<256, TBQ_PROMPT_LAUNCH> } },
    { "two56",
      { tbq_prompt_run<64, TBQ_PROMPT_LAUNCH>, tbq_prompt_run<128, 2, 200, 56>,
        tbq_prompt_run<256, TBQ_PROMPT_LAUNCH> } },
    { "decode", { nullptr, run_decode, nullptr } },
#endif
};

static const variant & find(const char * name) {
    for (const variant & v : VARIANTS) {
        if (!std::strcmp(v.name, name)) {
            return v;
        }
    }
    std::fprintf(stderr, "no variant %s\n", name);
    std::exit(2);
}

static tbq_prompt_args prompt_args(const tbq_attention_args & base, int bits_k, int bits_v) {
    tbq_prompt_args a{};
    static_cast<tbq_attention_args &>(a) = base;
    a.bits_k                             = bits_k;
    a.bits_v                             = bits_v;
    return a;
}

static int check_all(int n, int seed, const variant & v) {
    std::mt19937 rng(seed);
    int          bad = 0, index = 0;
    double       most   = 0;
    const auto   launch = [&](int d, int k, int bits_v, const tbq_attention_args & base, float *) {
        tbq_prompt_args a = prompt_args(base, k, bits_v);
        tbq_prompt_partition(a, d, n_sm());
        if (index % 4 == 3) { // splits, some of them without a tile
            a.n_split = 2 + index % 3;
        }
        device_array<char> memory(tbq_prompt_place(a, d, nullptr));
        CHECK(cudaMemset(memory.p, 0xFF, memory.n));
        tbq_prompt_place(a, d, memory.p);
        CHECK(v.run[d / 128](a, 0));
        CHECK(cudaDeviceSynchronize());
    };
    for (int i = 0; i < n; i++) {
        index                = i;
        const int    sizes[] = { 1, 149, 661 };
        const double e       = check(launch, i, rng, i % 3 == 1 || i % 6 == 2 ? sizes[i / 3 % 3] : 0, i % 3 == 2, true);
        bad += e == 1;
        most = e < 1 ? std::max(most, e) : most;
    }
    std::printf("%s: %d problems, %d wrong; relative squared error at most %.3g\n", v.name, n, bad, most);
    return bad != 0;
}

__global__ void causal_mask(half * mask, int n_q, int n_kv) {
    for (int j = threadIdx.x; j < n_kv; j += blockDim.x) {
        mask[(size_t) blockIdx.x * n_kv + j] = __float2half(j > n_kv - n_q + (int) blockIdx.x ? -INFINITY : 0.0f);
    }
}

// The median time of a prompt whose tokens are the last of the cache.  Layers in turn, so that the L2 cache does not hold
// what a call reads.  n_exact: the newest rows, and 4 of the first.
static void time_one(int n_q, int n_kv, int d, int k, int v, int n_head_kv, int gqa, int n_exact,
                     const variant & variant) {
    tbq_attention_args base{};
    base.n_head_kv = n_head_kv, base.n_head = n_head_kv * gqa, base.n_q = n_q;
    base.n_seq = base.n_seq_kv = base.n_seq_mask = 1, base.n_kv = n_kv;
    base.scale = 1.0f / std::sqrt((float) d);
    base.q_nb2 = 4 * d, base.q_nb1 = base.q_nb2 * base.n_head, base.q_nb3 = base.q_nb1 * n_q;
    base.k_nb2 = d / 64 * tbq_attention_block(k), base.k_nb1 = base.k_nb2 * n_head_kv, base.k_nb3 = base.k_nb1 * n_kv;
    base.v_nb2 = d / 64 * tbq_attention_block(v), base.v_nb1 = base.v_nb2 * n_head_kv, base.v_nb3 = base.v_nb1 * n_kv;
    base.mask_nb1 = 2 * n_kv, base.mask_nb3 = base.mask_nb1 * n_q;
    std::mt19937            rng(1);
    const std::vector<char> rows_k = random_rows(k, (size_t) n_kv * n_head_kv * d / 64, rng),
                            rows_v = random_rows(v, (size_t) n_kv * n_head_kv * d / 64, rng);
    const size_t            nk = rows_k.size(), nv = rows_v.size();
    const int               layers = (int) std::max<size_t>(1, std::min<size_t>(48, (size_t) 120000000 / (nk + nv)));
    std::normal_distribution<float> normal;
    std::vector<float>              q((size_t) d * n_q * base.n_head), some(65536);
    for (float & x : some) {
        x = normal(rng);
    }
    for (size_t i = 0; i < q.size(); i++) {
        q[i] = some[(i + i / 65536 * 127) % 65536];
    }
    device_array<float> q_dev(q), dst(q.size());
    device_array<half>  mask((size_t) n_q * n_kv);
    device_array<char>  k_dev(nk * layers), v_dev(nv * layers);
    for (int i = 0; i < layers; i++) {
        CHECK(cudaMemcpy(k_dev.p + i * nk, rows_k.data(), nk, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(v_dev.p + i * nv, rows_v.data(), nv, cudaMemcpyHostToDevice));
    }
    causal_mask<<<n_q, 256>>>(mask.p, n_q, n_kv);
    n_exact = std::min(n_exact, n_kv);
    std::vector<int> cells(n_exact + (n_kv + 31) / 32, 0);
    for (int j = 0; j < n_exact; j++) {
        cells[j] = j < 4 ? j : n_kv - 1 - (j - 4);
        cells[n_exact + cells[j] / 32] |= (int) (1u << cells[j] % 32);
    }
    device_array<int>  cells_dev(cells);
    device_array<char> exact_dev(random_exact_rows((size_t) std::max(n_exact, 1) * n_head_kv * d / 64, rng));
    base.q = (const char *) q_dev.p, base.dst = dst.p, base.mask = (const char *) mask.p;
    if (n_exact) {
        base.cells = cells_dev.p, base.n_exact = n_exact, base.exact_k = base.exact_v = exact_dev.p;
        base.exact_k_nb2 = base.exact_v_nb2 = d / 64 * sizeof(block_tbq8_0);
        base.exact_k_nb1 = base.exact_v_nb1 = base.exact_k_nb2 * n_head_kv;
    }
    tbq_prompt_args a = prompt_args(base, k, v);
    tbq_prompt_partition(a, d, n_sm());
    device_array<char> memory(tbq_prompt_place(a, d, nullptr));
    tbq_prompt_place(a, d, memory.p);
    int  at  = 0;
    auto run = [&] {
        a.k = k_dev.p + at * nk;
        a.v = v_dev.p + at * nv;
        at  = (at + 1) % layers;
        CHECK(variant.run[d / 128](a, 0));
    };
    run();
    CHECK(cudaDeviceSynchronize());
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    std::vector<float> times;
    float              total = 0;
    for (int i = 0; i < 60 && (i < 5 || total < 200); i++) {
        CHECK(cudaEventRecord(from));
        run();
        CHECK(cudaEventRecord(to));
        CHECK(cudaEventSynchronize(to));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        times.push_back(ms);
        total += ms;
    }
    std::sort(times.begin(), times.end());
    const float  ms   = times[times.size() / 2];
    const double flop = 4.0 * n_q * n_kv * d * base.n_head;
    std::printf(
        "%-5s D %3d, %d/%d bits, %2d x %2d heads, %4d rows, %6d tokens, %4d exact, %2d splits: %8.3f ms (%.3f to "
        "%.3f), %6.1f TFLOP/s, %zu bytes\n",
        variant.name, d, k, v, n_head_kv, gqa, n_q, n_kv, n_exact, a.n_split, ms, times.front(), times.back(),
        flop / ms / 1e9, memory.n);
}

int main(int argc, char ** argv) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) != cudaSuccess || major != 9 ||
        minor != 0) {
        std::fprintf(stderr, "these kernels need compute capability 9.0\n");
        return 3;
    }
    auto argument = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
    auto name     = [&](int i) { return argc > i ? argv[i] : "kept"; };
    if (argc > 3 && !std::strcmp(argv[1], "time")) {
        time_one(argument(2, 0), argument(3, 0), argument(4, 128), argument(5, 4), argument(6, 4), argument(7, 8),
                 argument(8, 4), argument(9, 0), find(name(10)));
        return 0;
    }
    return check_all(argument(2, 270), argument(3, 1), find(name(4)));
}
