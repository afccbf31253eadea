// SPDX-License-Identifier: MIT
// Runs a CTA of up to 512 threads of CUDA code on a CPU, so that tests without a GPU run the code that a GPU runs.
//
// A thread is a fiber (ucontext).  The fibers run in turn, and change where threads wait for each other: in
// __syncthreads and in the functions that exchange values within a warp.  All lanes of a warp must come to the same
// one, else the program ends, as it does if all wait.  Arithmetic is IEEE, and numbers below 2^-126 are kept; llama.cpp
// compiles for CUDA with these flushed to zero.  Instructions that are PTX on a GPU (tbq-instructions.cuh) are
// functions here, products of the tensor core too.  A bulk copy first fills its place with NaN, and is done when
// somebody waits for its barrier.
//
// Addresses in shared memory have 32 bits, so a program that has them is linked with -no-pie.
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
#include <random>
#include <type_traits>
#include <vector>

#undef __align__
#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ const
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __shared__    static
#define asm(...)      abort()
#define __CUDA_ARCH__ 900

namespace on_cpu {
constexpr int THREADS = 512, WARPS = THREADS / 32, STACK = 1 << 16;

constexpr int VALUES = 8; // that a lane gives to the others

struct warp {
    uint32_t value[32][VALUES];
    int      operation[32];
    int      waiting;
    long     turn;
};

struct index {
    unsigned x, y, z;
};

inline warp                  warps[WARPS];
inline int                   threads = 128, current, waiting;
inline long                  turn;
inline index                 cta, grid;
inline bool                  ended[THREADS];
inline ucontext_t            fibers[THREADS], scheduler;
inline std::function<void()> kernel;

[[noreturn]] inline void fail(const char * what) {
    std::printf("CTA %u %u %u, thread %d: %s\n", cta.x, cta.y, cta.z, current, what);
    std::abort();
}

// The next fiber that has not ended, or the end of the CTA.
inline void next() {
    const int from = current;
    for (int i = 1; i <= threads; i++) {
        const int to = (from + i) % threads;
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

// Every lane's values.  operation: all lanes must name the same.
template <int N> void exchange(int operation, const uint32_t (&values)[N], uint32_t (&all)[32][N]) {
    warp & w = warps[current / 32];
    std::memcpy(w.value[current % 32], values, sizeof(values));
    w.operation[current % 32] = operation;
    wait_for(w.waiting, w.turn, 32);
    for (int other : w.operation) {
        if (other != operation) {
            fail("lanes of a warp are in different functions");
        }
    }
    for (int i = 0; i < 32; i++) {
        std::memcpy(all[i], w.value[i], sizeof(all[i]));
    }
    wait_for(w.waiting, w.turn, 32);
}

inline void exchange(int operation, uint32_t value, uint32_t (&all)[32]) {
    uint32_t values[32][1];
    exchange<1>(operation, { value }, values);
    std::memcpy(all, values, sizeof(all));
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

// A CTA of a grid.  work: calls the kernel.
inline void run(index which, index of, int n_threads, std::function<void()> work) {
    static std::vector<char> stacks((size_t) THREADS * STACK);
    kernel  = std::move(work);
    cta     = which;
    grid    = of;
    threads = n_threads;
    for (int i = 0; i < threads; i++) {
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

// CTA number x of 128 threads.
inline void run(unsigned x, std::function<void()> work) {
    run({ x, 0, 0 }, { x + 1, 1, 1 }, 128, std::move(work));
}
} // namespace on_cpu

#define threadIdx (on_cpu::index{ (unsigned) on_cpu::current, 0, 0 })
#define blockIdx  (on_cpu::cta)
#define blockDim  (on_cpu::index{ (unsigned) on_cpu::threads, 1, 1 })
#define gridDim   (on_cpu::grid)

using std::max;
using std::min;

inline void __syncthreads() {
    on_cpu::wait_for(on_cpu::waiting, on_cpu::turn, on_cpu::threads);
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

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return (uint32_t) (((uint64_t) high << 32 | low) >> (shift & 31));
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return (uint32_t) ((uint64_t) a * b >> 32);
}

inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz((unsigned) x);
}

inline int __float2int_rn(float x) {
    return __float2int_rz(std::nearbyint(x));
}

// --- in the place of tbq-instructions.cuh ---------------------------------------------------------------------------

#define TBQ_INSTRUCTIONS
#define TBQ_WARP_ALL 0xFFFFFFFFu

namespace on_cpu {
alignas(128) inline char shared[228 * 1024];

struct barrier {
    uint8_t count, pending, phase, unused;
    int32_t bytes;
};

static_assert(sizeof(barrier) == 8, "as on a GPU");

struct copy {
    uint32_t     to, barrier;
    const void * from;
    int          bytes;
};

inline std::vector<copy> copies; // that are on their way

inline char * at(uint32_t address) {
    return (char *) (size_t) address;
}

inline barrier & barrier_at(uint32_t address) {
    return *(barrier *) at(address);
}

inline void end_phase(barrier & b) {
    if (b.pending == 0 && b.bytes == 0) {
        b.pending = b.count;
        b.phase ^= 1;
    }
}

inline float bf16(uint32_t pair, int i) {
    return bits_as<float>((i == 0 ? pair << 16 : pair & 0xFFFF0000u));
}
} // namespace on_cpu

#define TBQ_DYNAMIC_SHARED(name, alignment) char * const name = on_cpu::shared

inline uint32_t tbq_prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes  = (uint64_t) b << 32 | a;
    uint32_t       result = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t s = selector >> 4 * i & 15, byte = bytes >> 8 * (s & 7) & 0xFF;
        result |= (s & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << 8 * i;
    }
    return result;
}

inline uint32_t tbq_high(uint32_t x) {
    return x >> 16;
}

inline uint32_t tbq_either(uint32_t x, uint32_t y, uint32_t one) {
    return x * one + y;
}

inline void tbq_keep(int &) {}

inline float tbq_exp2(float x) {
    return std::exp2(x);
}

inline uint32_t tbq_pack_bf16(float lo, float hi) {
    auto rounded = [](float x) -> uint32_t {
        const uint32_t bits = bits_as<uint32_t>(x);
        return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    };
    return rounded(lo) | rounded(hi) << 16;
}

inline uint32_t tbq_bf16_levels(uint32_t x) {
    return tbq_pack_bf16(on_cpu::bf16(x, 0) - 192.0f, on_cpu::bf16(x, 1) - 192.0f);
}

inline uint32_t tbq_bf16_bytes(uint32_t x) {
    return tbq_pack_bf16((float) (int8_t) x, (float) (int8_t) (x >> 16));
}

// m16n8k32.  A, row r: lane 4 (r % 8) + k % 16 / 4, register r / 8 + 2 (k / 16).
//            B, column c: lane 4 c + k % 16 / 4, register k / 16.
template <typename b_t>
void mma_bytes(int operation, int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
    uint32_t all[32][6];
    on_cpu::exchange<6>(operation, { a[0], a[1], a[2], a[3], b0, b1 }, all);
    const int g = on_cpu::current % 32 / 4, t = on_cpu::current % 4;
    for (int i = 0; i < 4; i++) {
        int sum = c[i];
        for (int k = 0; k < 32; k++) {
            const uint32_t x = all[4 * g + k % 16 / 4][i / 2 + 2 * (k / 16)];
            const uint32_t y = all[4 * (2 * t + i % 2) + k % 16 / 4][4 + k / 16];
            sum += (int8_t) (x >> 8 * (k % 4)) * (b_t) (y >> 8 * (k % 4));
        }
        d[i] = sum;
    }
}

inline void tbq_mma_s8_u8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
    mma_bytes<uint8_t>(6, d, a, b0, b1, c);
}

inline void tbq_mma_s8_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int c) {
    mma_bytes<int8_t>(7, d, a, b0, b1, { c, c, c, c });
}

inline void tbq_mma_s8_s8_add(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bytes<int8_t>(8, d, a, b0, b1, { d[0], d[1], d[2], d[3] });
}

// m16n8k16: the same with pairs of halves, of which value(pair, i) is one
template <typename function> void mma_halves(int operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, function value) {
    uint32_t all[32][6];
    on_cpu::exchange<6>(operation, { a[0], a[1], a[2], a[3], b0, b1 }, all);
    const int g = on_cpu::current % 32 / 4, t = on_cpu::current % 4;
    for (int i = 0; i < 4; i++) {
        double sum = d[i];
        for (int k = 0; k < 16; k++) {
            sum += (double) value(all[4 * g + k % 8 / 2][i / 2 + 2 * (k / 8)], k % 2) *
                   value(all[4 * (2 * t + i % 2) + k % 8 / 2][4 + k / 8], k % 2);
        }
        d[i] = (float) sum;
    }
}

inline void tbq_mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_halves(9, d, a, b0, b1, on_cpu::bf16);
}

inline void tbq_mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static const std::vector<float> values = [] {
        std::vector<float> list(1 << 16);
        for (int i = 0; i < 1 << 16; i++) {
            list[i] = __half2float(bits_as<__half>((uint16_t) i));
        }
        return list;
    }();
    mma_halves(13, d, a, b0, b1, [](uint32_t pair, int i) { return values[pair >> 16 * i & 0xFFFF]; });
}

inline void tbq_ldmatrix(uint32_t (&r)[4], const void * row) {
    uint32_t low[32], high[32];
    on_cpu::exchange(11, (uint32_t) (size_t) row, low);
    on_cpu::exchange(12, (uint32_t) ((size_t) row >> 32), high);
    const int g = on_cpu::current % 32 / 4, t = on_cpu::current % 4;
    for (int i = 0; i < 4; i++) {
        const size_t at = (size_t) high[8 * i + g] << 32 | low[8 * i + g];
        if (at % 16) {
            on_cpu::fail("ldmatrix of a row at other than 16 bytes");
        }
        std::memcpy(&r[i], (const char *) at + 4 * t, 4);
    }
}

inline void tbq_ldmatrix_transposed(uint32_t (&)[4], const void *) {
    on_cpu::fail("no ldmatrix");
}

inline uint32_t tbq_transpose(uint32_t x) {
    uint32_t all[32];
    on_cpu::exchange(10, x, all);
    const int g = on_cpu::current % 32 / 4, t = on_cpu::current % 4;
    auto      of = [&](int row, int column) { return all[4 * row + column / 2] >> 16 * (column % 2) & 0xFFFF; };
    return of(2 * t, g) | of(2 * t + 1, g) << 16;
}

inline void tbq_cp_async_16_if(uint32_t on, uint32_t smem, const void * global) {
    if (on) {
        std::memcpy(on_cpu::at(smem), global, 16);
    }
}

template <int N> void tbq_cp_async(uint32_t smem, const void * global) {
    std::memcpy(on_cpu::at(smem), global, N);
}

inline void tbq_cp_async_commit() {}

template <int N> void tbq_cp_async_wait() {}

inline void tbq_bulk_copy(uint32_t to, const void * from, int bytes, uint32_t barrier) {
    if ((to | (size_t) from | bytes) % 16) {
        on_cpu::fail("a bulk copy of other than 16 bytes");
    }
    std::memset(on_cpu::at(to), 0xFF, bytes);
    on_cpu::copies.push_back({ to, barrier, from, bytes });
}

inline void tbq_bulk_prefetch(const void * from, int bytes) {
    if (((size_t) from | bytes) % 16) {
        on_cpu::fail("a bulk copy of other than 16 bytes");
    }
}

inline uint32_t tbq_smem(const void * p) {
    if ((size_t) p >> 32) {
        on_cpu::fail("shared memory above 4 GiB; link with -no-pie");
    }
    return (uint32_t) (size_t) p;
}

inline void tbq_mbarrier_init(uint32_t barrier, int count) {
    on_cpu::barrier_at(barrier) = { (uint8_t) count, (uint8_t) count, 0, 0, 0 };
}

inline void tbq_mbarrier_init_done() {}

inline void tbq_mbarrier_expect(uint32_t barrier, int bytes) {
    on_cpu::barrier & b = on_cpu::barrier_at(barrier);
    b.pending--;
    b.bytes += bytes;
    on_cpu::end_phase(b);
}

inline void tbq_mbarrier_arrive(uint32_t barrier) {
    tbq_mbarrier_expect(barrier, 0);
}

inline void tbq_mbarrier_arrive_copied(uint32_t barrier) {
    tbq_mbarrier_expect(barrier, 0);
}

inline bool tbq_mbarrier_try(uint32_t barrier, int parity) {
    for (size_t i = 0; i < on_cpu::copies.size(); i++) {
        const on_cpu::copy c = on_cpu::copies[i];
        if (c.barrier == barrier) {
            std::memcpy(on_cpu::at(c.to), c.from, c.bytes);
            on_cpu::copies.erase(on_cpu::copies.begin() + i--);
            on_cpu::barrier_at(barrier).bytes -= c.bytes;
            on_cpu::end_phase(on_cpu::barrier_at(barrier));
        }
    }
    return on_cpu::barrier_at(barrier).phase != parity;
}

inline void tbq_mbarrier_wait(uint32_t barrier, int parity) {
    for (long i = 0; !tbq_mbarrier_try(barrier, parity); i++) {
        if (i > 1000000) {
            on_cpu::fail("waits for a barrier");
        }
        on_cpu::next();
    }
}
