// SPDX-License-Identifier: MIT
// The kernel for whole rows (tbq-attention-rows.cuh), run on a CPU (on_cpu.h): random problems compared with double
// precision, as attention.cu does on a GPU.
//   attention_on_cpu check|exact|center [problems] [seed]     exit status 1 if one is wrong
#include "attention_on_cpu.h"
#include "tbq-attention-rows.cuh"

static int n_sm;

template <int D, int K, int V, int NC, int H, bool ONE> static void launch_shape(tbq_attention_args a,
                                                                                 float *            partial) {
    static_assert(tbq_rows_shape<D, H, K, V, NC>::SMEM <= (int) sizeof(on_cpu::shared), "memory");
    tbq_attention_rows_partition(a, n_sm);
    a.partial = partial;
    run_grid({ (unsigned) a.n_split, (unsigned) a.n_groups, (unsigned) a.n_seq }, tbq_rows_threads(D, NC),
             [&] { tbq_attention_rows<D, K, V, NC, H, ONE>(a); });
    if (a.n_split > 1) {
        run_grid({ (unsigned) (a.n_seq * a.n_q * a.n_head), 1, 1 }, TBQ_ROWS_COMBINE,
                 [&] { tbq_attention_rows_combine<D>(a); });
    }
}

template <int D, int K, int V, int H> static void launch_heads(const tbq_attention_args & a, float * partial) {
    if constexpr (D < 256) {
        if (tbq_attention_columns(a.n_q * (a.n_head / a.n_head_kv)) == 16) {
            return launch_shape<D, K, V, 16, H, false>(a, partial);
        }
    }
    (a.n_q == 1 ? launch_shape<D, K, V, 8, H, true> : launch_shape<D, K, V, 8, H, false>) (a, partial);
}

template <int K, int V> static void launch_pair(int d, const tbq_attention_args & a, float * partial) {
    switch (d) {
        case 64: return launch_heads<64, K, V, 8>(a, partial);
        case 128: return (a.n_head_kv == 8 ? launch_heads<128, K, V, 8> : launch_heads<128, K, V, 4>) (a, partial);
        default: return launch_heads<256, K, V, 2>(a, partial);
    }
}

static bool launch(int d, int k, int v, const tbq_attention_args & a, float * partial) {
    if (!tbq_attention_rows_can(a, d, k, v)) {
        return false;
    }
    switch (100 * k + v) {
        case 404: launch_pair<4, 4>(d, a, partial); return true;
        case 303: launch_pair<3, 3>(d, a, partial); return true;
        case 202: launch_pair<2, 2>(d, a, partial); return true;
        case 403: launch_pair<4, 3>(d, a, partial); return true;
        case 302: launch_pair<3, 2>(d, a, partial); return true;
        default: return false;
    }
}

int main(int argc, char ** argv) {
    const bool   exact  = argc > 1 && !std::strcmp(argv[1], "exact");
    const bool   center = argc > 1 && !std::strcmp(argv[1], "center");
    const int    n      = argc > 2 ? std::atoi(argv[2]) : 25;
    std::mt19937 rng(argc > 3 ? std::atoi(argv[3]) : 1);
    int          bad = 0, n_run = 0;
    double       most = 0;
    for (int i = 0; i < n; i++) {
        const int sizes[] = { 149, 17, 1, 661 };
        n_sm              = 1 + rng() % 12;
        try {
            const double e = check(
                [](int d, int k, int v, const tbq_attention_args & a, float * partial) {
                    if (!launch(d, k, v, a, partial)) {
                        throw 0; // not for this kernel
                    }
                },
                i, rng, exact || (center && i % 2) ? sizes[i / 5 % 4] : 0, center, false, true);
            n_run++;
            bad += e == 1;
            most = e < 1 ? std::max(most, e) : most;
        } catch (int) {
        }
    }
    std::printf("%d problems, %d wrong; relative squared error at most %.3g\n", n_run, bad, most);
    return bad != 0;
}
