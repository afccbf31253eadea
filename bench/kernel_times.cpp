// SPDX-License-Identifier: MIT
// Which kernels a program of CUDA spends the end of its time in, CUDA graphs and overlap included:
//
//   g++ -O2 -shared -fPIC -I CUDA/include bench/kernel_times.cpp -L CUDA/lib64 -lcupti -o kernel_times.so
//   CUDA_INJECTION64_PATH=$PWD/kernel_times.so KERNEL_TIMES_MS=100 llama-bench ...
//
// When the program ends, a table of its last KERNEL_TIMES_MS milliseconds on the GPU goes to stderr.  For each kernel: how
// often it ran, its mean time, and `alone`, by how much it moved the end of all work so far.  The sum of `alone` and of the
// gaps between kernels is the whole time.
#include <cupti.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#if CUPTI_API_VERSION >= 130000
using activity_kernel = CUpti_ActivityKernel10;
#else
using activity_kernel = CUpti_ActivityKernel9;
#endif

namespace {
struct run {
    std::string name;
    uint64_t    start, end; // ns
};

struct total {
    long   n;
    double sum, alone; // ns
};

std::vector<run> runs;
std::mutex       mutex;

void CUPTIAPI give_buffer(uint8_t ** buffer, size_t * size, size_t * max_records) {
    *size        = 8 << 20;
    *buffer      = (uint8_t *) std::aligned_alloc(8, *size);
    *max_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t * buffer, size_t, size_t valid) {
    const std::lock_guard<std::mutex> lock(mutex);
    CUpti_Activity *                  record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const auto * k = (const activity_kernel *) record;
            runs.push_back({ k->name, k->start, k->end });
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const auto * k = (const CUpti_ActivityMemcpy6 *) record;
            runs.push_back({ "(copy)", k->start, k->end });
        }
    }
    std::free(buffer);
}

// tbq_quantize_pair<4, 4, true> of _Z17tbq_quantize_pairILi4ELi4ELb1EEv13tbq_pair_args, roughly
std::string readable(const std::string & mangled) {
    std::string name = mangled;
    if (name.rfind("_Z", 0) == 0) {
        size_t i = name.find_first_of("0123456789");
        while (i < name.size() && std::isdigit((unsigned char) name[i])) {
            i++;
        }
        name = name.substr(i);
    }
    return name.substr(0, 60);
}

void print() {
    cuptiActivityFlushAll(1);
    const std::lock_guard<std::mutex> lock(mutex);
    if (runs.empty()) {
        std::fprintf(stderr, "kernel_times: no kernel was seen\n");
        return;
    }
    std::sort(runs.begin(), runs.end(), [](const run & a, const run & b) { return a.start < b.start; });
    const char *   ms = std::getenv("KERNEL_TIMES_MS");
    const uint64_t last =
        std::max_element(runs.begin(), runs.end(), [](const run & a, const run & b) { return a.end < b.end; })->end;
    const uint64_t first = last - std::min(last, (uint64_t) (1e6 * (ms ? std::atof(ms) : 100)));

    std::map<std::string, total> totals;
    uint64_t                     done = 0, began = 0;
    double                       idle = 0;
    for (const run & r : runs) {
        if (r.start < first) {
            continue;
        }
        if (done == 0) {
            began = done = r.start;
        }
        idle += r.start > done ? r.start - done : 0;
        const uint64_t from = std::max(done, r.start);
        total &        t    = totals[readable(r.name)];
        t.n++;
        t.sum += r.end - r.start;
        t.alone += r.end > from ? r.end - from : 0;
        done = std::max(done, r.end);
    }
    std::vector<std::pair<std::string, total>> sorted(totals.begin(), totals.end());
    std::sort(sorted.begin(), sorted.end(),
              [](const auto & a, const auto & b) { return a.second.alone > b.second.alone; });
    const double all = done - began;
    std::fprintf(stderr, "kernel_times: %.3f ms, %.1f %% between kernels\n  %6s %9s %9s %6s\n", all * 1e-6,
                 100 * idle / all, "runs", "mean us", "alone us", "%");
    for (const auto & [name, t] : sorted) {
        std::fprintf(stderr, "  %6ld %9.2f %9.2f %6.2f  %s\n", t.n, t.sum / t.n * 1e-3, t.alone / t.n * 1e-3,
                     100 * t.alone / all, name.c_str());
    }
}
} // namespace

// CUDA calls this when it starts.
extern "C" int InitializeInjection() {
    cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    std::atexit(print);
    return 1;
}
