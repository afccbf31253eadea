// SPDX-License-Identifier: MIT
// The instructions of sm_90a that tbq-prompt.cuh uses: products of a warpgroup (wgmma), barriers in shared memory.
#pragma once

#include "tbq-instructions.cuh"

// A tile of halves in shared memory whose rows of 64 halves are 128 bytes apart.  The eight 16-byte chunks of a row are
// permuted: chunk c of row r is at c ^ (r % 8).  Tiles begin at a multiple of 1024 bytes.
static __device__ __forceinline__ uint32_t tbq_swizzle(int row, int chunk) {
    return (uint32_t) (row * 128 + ((chunk ^ (row & 7)) << 4));
}

// What a product must know about such a tile, but for its address: the distances in bytes that the two fields give, and
// how the chunks are permuted (1: as above).
static constexpr __host__ __device__ uint64_t tbq_tile_format(uint32_t leading, uint32_t stride, uint32_t swizzle = 1) {
    return (uint64_t) ((leading & 0x3FFFF) >> 4) << 16 | (uint64_t) ((stride & 0x3FFFF) >> 4) << 32 |
           (uint64_t) swizzle << 62;
}

static __device__ __forceinline__ uint64_t tbq_tile(uint64_t format, uint32_t address) {
    return format | (address & 0x3FFFF) >> 4;
}

// The place `bytes` behind it.
static __device__ __forceinline__ uint64_t tbq_tile_at(uint64_t tile, int bytes) {
    return (tile & 0xFFFFFFFF00000000ull) | ((uint32_t) tile + bytes / 16);
}

static __device__ __forceinline__ void tbq_wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void tbq_wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> static __device__ __forceinline__ void tbq_wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving accesses of these registers over this point.
template <int N> static __device__ __forceinline__ void tbq_pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

// The registers of a result, as operands of an instruction, and their names.
#define TBQ_F8(i)                                                                                               \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define TBQ_F32(i) TBQ_F8(i), TBQ_F8(i + 8), TBQ_F8(i + 16), TBQ_F8(i + 24)
#define TBQ_NAMES_32                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, " \
    "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TBQ_NAMES_64                                                                                  \
    TBQ_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TBQ_NAMES_128                                                                                     \
    TBQ_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "     \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
                 "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
                 "%125, %126, %127"

// d = a . b^T + (add ? d : 0), 64 x N x 16 halves: a and b are tiles whose rows lie along the sum.  d has N / 2 registers.
#define TBQ_WGMMA_SCORES(N, NAMES, A, B, ADD, ...)                                                                \
    static __device__ __forceinline__ void tbq_wgmma_scores(float (&d)[N / 2], uint64_t a, uint64_t b, int add) { \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" ADD ", 0;\n"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NAMES "}, %" A ", %" B            \
                     ", p, 1, 1, 0, 0;}"                                                                          \
                     : __VA_ARGS__                                                                                \
                     : "l"(a), "l"(b), "r"(add));                                                                 \
    }
TBQ_WGMMA_SCORES(64, TBQ_NAMES_32, "32", "33", "34", TBQ_F32(0))
TBQ_WGMMA_SCORES(128, TBQ_NAMES_64, "64", "65", "66", TBQ_F32(0), TBQ_F32(32))

// d += a . b: a in registers, and the rows of the tile b lie across the sum.
#define TBQ_WGMMA_VALUES(N, NAMES, A0, A1, A2, A3, B, ...)                                                           \
    static __device__ __forceinline__ void tbq_wgmma_values(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) { \
        asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;\n"                                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NAMES "}, {%" A0 ", %" A1 ", %" A2   \
                     ", %" A3 "}, %" B ", p, 1, 1, 1;}"                                                              \
                     : __VA_ARGS__                                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
    }
TBQ_WGMMA_VALUES(64, TBQ_NAMES_32, "32", "33", "34", "35", "36", TBQ_F32(0))
TBQ_WGMMA_VALUES(128, TBQ_NAMES_64, "64", "65", "66", "67", "68", TBQ_F32(0), TBQ_F32(32))
TBQ_WGMMA_VALUES(256, TBQ_NAMES_128, "128", "129", "130", "131", "132", TBQ_F32(0), TBQ_F32(32), TBQ_F32(64),
                 TBQ_F32(96))

// --- barriers -------------------------------------------------------------------------------------------------------

// Ordinary stores to shared memory before this are seen by products after the next barrier.
static __device__ __forceinline__ void tbq_fence_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ __forceinline__ void tbq_named_sync(int id, int n) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
}

template <int N> static __device__ __forceinline__ void tbq_more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> static __device__ __forceinline__ void tbq_fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
