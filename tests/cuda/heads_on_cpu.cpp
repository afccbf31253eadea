// SPDX-License-Identifier: MIT
// The kernel for large heads (tbq-attention-heads.cuh), run on a CPU (on_cpu.h): random problems compared with double
// precision, as attention-heads.cu does on a GPU.
//   heads_on_cpu check|exact|center [problems] [seed]     exit status 1 if one is wrong
#include "attention_on_cpu.h"
#include "tbq-attention-heads.cuh"

static int n_sm, n_smem; // multiprocessors, and bytes of shared memory that a CTA may have

static void launch(int d, int k, int v, const tbq_attention_args & base, float * partial) {
    tbq_heads_args a  = tbq_heads_args_of(base, k, v);
    const int      dv = d == 192 ? 128 : 512, nc = tbq_heads_columns(a, d, dv, n_smem);
    tbq_heads_dispatch(d, dv, nc, [&](auto dk_, auto dv_, auto nc_) {
        constexpr int DK = dk_, DV = dv_, NC = nc_;
        using shape = tbq_heads_shape<DK, DV, NC>;
        tbq_heads_partition<DK, DV, NC>(a, n_sm);
        std::vector<char> prepared(tbq_heads_prepared_bytes<DK, DV, NC>(a) + 16);
        a.partial            = partial;
        a.prepared           = prepared.data() + (-(size_t) prepared.data() & 15);
        const unsigned cells = a.n_groups * a.n_head_kv, n_seq = a.n_seq;
        if (shape::smem(k, v, a.n_mask_rows) > (int) sizeof(on_cpu::shared)) {
            on_cpu::fail("shared memory");
        }
        if (shape::PREPARED) {
            run_grid({ (NC * shape::NB + TBQ_HEADS_WARPS - 1) / TBQ_HEADS_WARPS, cells, n_seq }, TBQ_HEADS_THREADS,
                     [&] { tbq_heads_prepare<DK, DV, NC>(a); });
        }
        run_grid({ (unsigned) a.n_split, cells, n_seq }, TBQ_HEADS_THREADS,
                 [&] { tbq_attention_heads<DK, DV, NC>(a); });
        run_grid({ (unsigned) (a.n_seq * a.n_q * a.n_head), DV / 64, 1 }, TBQ_HEADS_THREADS,
                 [&] { tbq_heads_combine<DK, DV>(a); });
    });
}

int main(int argc, char ** argv) {
    const bool   exact  = argc > 1 && !std::strcmp(argv[1], "exact");
    const bool   center = argc > 1 && !std::strcmp(argv[1], "center");
    const int    n      = argc > 2 ? std::atoi(argv[2]) : 12;
    std::mt19937 rng(argc > 3 ? std::atoi(argv[3]) : 1);
    int          bad  = 0;
    double       most = 0;
    for (int i = 0; i < n; i++) {
        const int sizes[] = { 149, 17, 1, 661 };
        n_sm              = 1 + rng() % 12;
        n_smem            = rng() % 3 ? 227 * 1024 : 99 * 1024;
        const double e =
            check(launch, i, rng, exact || (center && i % 2) ? sizes[i / 3 % 4] : 0, center, false, false, true);
        bad += e == 1;
        most = e < 1 ? std::max(most, e) : most;
    }
    std::printf("%d problems, %d wrong; relative squared error at most %.3g\n", n, bad, most);
    return bad != 0;
}
