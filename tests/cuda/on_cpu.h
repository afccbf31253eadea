// SPDX-License-Identifier: MIT
// Runs a CTA of 128 threads of CUDA code on a CPU, so that tests without a GPU run the code that a GPU runs.
//
// A thread is a fiber (ucontext).  The fibers run in turn, and change where threads wait for each other: in __syncthreads
// and in the functions that exchange values within a warp.  All lanes of a warp must come to the same one, else the
// program ends, as it does if all wait.  Arithmetic is IEEE, and numbers below 2^-126 are kept; llama.cpp compiles for
// CUDA with these flushed to zero.  There are no bulk copies, no tensor cores and no PTX.
//
// Included before CUDA code, in one file of a program, which is C++ for the compiler: `nvcc -cudart none x.cpp`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#undef __align__
#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ const
#define __device__
#define __forceinline__ inline
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __shared__    static
#define asm(...)      abort()
#define __CUDA_ARCH__ 900

namespace on_cpu {
constexpr int THREADS = 128, WARPS = THREADS / 32, STACK = 1 << 17;

struct warp {
    uint32_t value[32];
    int      operation[32];
    int      waiting;
    long     turn;
};

struct index {
    unsigned x;
};

inline warp                  warps[WARPS];
inline int                   current, waiting;
inline long                  turn;
inline unsigned              cta;
inline bool                  ended[THREADS];
inline ucontext_t            fibers[THREADS], scheduler;
inline std::function<void()> kernel;

[[noreturn]] inline void fail(const char * what) {
    std::printf("CTA %u, thread %d: %s\n", cta, current, what);
    std::abort();
}

// The next fiber that has not ended, or the end of the CTA.
inline void next() {
    const int from = current;
    for (int i = 1; i <= THREADS; i++) {
        const int to = (from + i) % THREADS;
        if (!ended[to]) {
            if (to == from) {
                fail("the others have ended, and this one waits for them");
            }
            current = to;
            swapcontext(&fibers[from], &fibers[to]);
            return;
        }
    }
    swapcontext(&fibers[from], &scheduler);
}

inline void wait_for(int & arrived, long & turn, int count) {
    const long before = turn;
    if (++arrived == count) {
        arrived = 0;
        turn++;
    }
    while (turn == before) {
        next();
    }
}

// Every lane's value.  operation: all lanes must name the same.
inline void exchange(int operation, uint32_t value, uint32_t (&all)[32]) {
    warp & w                  = warps[current / 32];
    w.value[current % 32]     = value;
    w.operation[current % 32] = operation;
    wait_for(w.waiting, w.turn, 32);
    for (int other : w.operation) {
        if (other != operation) {
            fail("lanes of a warp are in different functions");
        }
    }
    std::memcpy(all, w.value, sizeof(all));
    wait_for(w.waiting, w.turn, 32);
}

template <typename T> T value_of(int operation, T x, int lane) {
    static_assert(sizeof(T) == 4, "a register");
    uint32_t all[32], bits;
    std::memcpy(&bits, &x, 4);
    exchange(operation, bits, all);
    std::memcpy(&x, &all[lane % 32], 4);
    return x;
}

inline void thread() {
    kernel();
    ended[current] = true;
    next();
}

// CTA number x of a grid.  work: calls the kernel.
inline void run(unsigned x, std::function<void()> work) {
    static std::vector<char> stacks((size_t) THREADS * STACK);
    kernel = std::move(work);
    cta    = x;
    for (int i = 0; i < THREADS; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp   = stacks.data() + (size_t) i * STACK;
        fibers[i].uc_stack.ss_size = STACK;
        fibers[i].uc_link          = nullptr;
        makecontext(&fibers[i], thread, 0);
        ended[i] = false;
    }
    current = 0;
    swapcontext(&scheduler, &fibers[0]);
}
} // namespace on_cpu

#define threadIdx (on_cpu::index{ (unsigned) on_cpu::current })
#define blockIdx  (on_cpu::index{ on_cpu::cta })
#define blockDim  (on_cpu::index{ (unsigned) on_cpu::THREADS })

using std::max;
using std::min;

inline void __syncthreads() {
    on_cpu::wait_for(on_cpu::waiting, on_cpu::turn, on_cpu::THREADS);
}

inline void __syncwarp() {
    uint32_t all[32];
    on_cpu::exchange(1, 0, all);
}

template <typename T> T __shfl_sync(unsigned, T x, int lane) {
    return on_cpu::value_of(2, x, lane);
}

template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) {
    return on_cpu::value_of(100 + mask, x, on_cpu::current ^ mask);
}

inline uint32_t __ballot_sync(unsigned, bool x) {
    uint32_t all[32], bits = 0;
    on_cpu::exchange(3, x, all);
    for (int i = 0; i < 32; i++) {
        bits |= all[i] << i;
    }
    return bits;
}

inline bool __any_sync(unsigned mask, bool x) {
    return __ballot_sync(mask, x) != 0;
}

inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
    uint32_t all[32];
    on_cpu::exchange(4, x, all);
    return *std::max_element(all, all + 32);
}

inline int __reduce_add_sync(unsigned, int x) {
    uint32_t all[32], sum = 0;
    on_cpu::exchange(5, (uint32_t) x, all);
    for (uint32_t y : all) {
        sum += y;
    }
    return (int) sum;
}

template <typename To, typename From> To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To y;
    std::memcpy(&y, &x, sizeof(y));
    return y;
}

inline uint32_t __float_as_uint(float x) {
    return bits_as<uint32_t>(x);
}

inline float __uint_as_float(uint32_t x) {
    return bits_as<float>(x);
}

inline float __int_as_float(int x) {
    return bits_as<float>(x);
}

// NaN becomes 0, and what is too large the nearest integer.
inline int __float2int_rz(float x) {
    return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : (int) x;
}

inline int __ffs(int x) {
    return __builtin_ffs(x);
}

inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return (uint32_t) (((uint64_t) high << 32 | low) << (shift & 31) >> 32);
}

// compiled without contraction, so each is rounded by itself
inline float __fadd_rn(float a, float b) {
    return a + b;
}

inline float __fsub_rn(float a, float b) {
    return a - b;
}

inline float __fmul_rn(float a, float b) {
    return a * b;
}

inline float __fdiv_rn(float a, float b) {
    return a / b;
}

inline float __fsqrt_rn(float a) {
    return std::sqrt(a);
}

inline void __trap() {
    on_cpu::fail("__trap");
}

// launches follow each other
inline void cudaGridDependencySynchronize() {}

inline void cudaTriggerProgrammaticLaunchCompletion() {}
