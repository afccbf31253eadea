// SPDX-License-Identifier: MIT
// Instructions that CUDA C++ has no functions for.  Nothing else of the kernels is PTX, but for those of sm_90a
// (tbq-wgmma.cuh): so a CPU can run the kernels lane by lane, with functions of its own in the place of these
// (tests/cuda).
#ifndef TBQ_INSTRUCTIONS
#define TBQ_INSTRUCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define TBQ_WARP_ALL 0xFFFFFFFFu

// The shared memory whose size the launch gives.
#define TBQ_DYNAMIC_SHARED(name, alignment) \
    extern __shared__ __align__(alignment)  \
    char              name[]

// --- bytes, and numbers ---------------------------------------------------------------------------------------------

// The instruction itself: __byte_perm masks the selector first, with a second one.
static __device__ __forceinline__ uint32_t tbq_prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}

// x >> 16, in the pipe of products: look-ups are at the limit of the other one.
static __device__ __forceinline__ uint32_t tbq_high(uint32_t x) {
    uint32_t r;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(0x0100), "r"(0));
    return r;
}

// Two look-ups of which one is 0.
static __device__ __forceinline__ uint32_t tbq_either(uint32_t x, uint32_t y, uint32_t one) {
    uint32_t r;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(one), "r"(y));
    return r;
}

// The compiler would compute x again for every use.
static __device__ __forceinline__ void tbq_keep(int & x) {
    asm volatile("" : "+r"(x));
}

static __device__ __forceinline__ float tbq_exp2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Bytes level + 64 under the exponent of 128 are bfloat16 192 + level; both are exact.
static __device__ __forceinline__ uint32_t tbq_bf16_levels(uint32_t biased) {
    uint32_t r;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(biased), "r"(0x3F803F80u), "r"(0xC340C340u)); // 1, -192
#else
    r = biased;
#endif
    return r;
}

// Signed bytes in the low halves of both words: the lower 7 bits under the exponent of 128, less 128 or 256 as the top
// bit says.
static __device__ __forceinline__ uint32_t tbq_bf16_bytes(uint32_t x) {
    uint32_t r;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(r)
        : "r"((x & 0x007F007Fu) | 0x43004300u), "r"(0x3F803F80u), "r"((x & 0x00800080u) | 0xC300C300u));
#else
    r = x;
#endif
    return r;
}

static __device__ __forceinline__ uint32_t tbq_pack_bf16(float lo, float hi) {
    uint32_t r;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    r = __float_as_uint(lo) ^ __float_as_uint(hi);
#endif
    return r;
}

// --- the tensor core ------------------------------------------------------------------------------------------------

static __device__ __forceinline__ void tbq_mma_s8_u8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                     const int (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#endif
}

static __device__ __forceinline__ void tbq_mma_s8_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                     int c) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
#endif
}

// d += a . b
static __device__ __forceinline__ void tbq_mma_s8_s8_add(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

static __device__ __forceinline__ void tbq_mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four tiles of 8 x 8 halves; lanes 8 i .. 8 i + 7 give the addresses of the rows of tile i.
static __device__ __forceinline__ void tbq_ldmatrix(uint32_t (&r)[4], const void * row) {
#if __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t) __cvta_generic_to_shared(row))
                 : "memory");
#endif
}

static __device__ __forceinline__ void tbq_ldmatrix_transposed(uint32_t (&r)[4], const void * row) {
#if __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t) __cvta_generic_to_shared(row))
                 : "memory");
#endif
}

static __device__ __forceinline__ void tbq_mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The 8 x 8 tile of halves of which a lane has two of row g, transposed.
static __device__ __forceinline__ uint32_t tbq_transpose(uint32_t x) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// --- copies to shared memory ----------------------------------------------------------------------------------------

// Without a branch: every lane of the warp comes here with its own answer.
static __device__ __forceinline__ void tbq_cp_async_16_if(uint32_t on, uint32_t smem, const void * global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16;}" ::"r"(on),
                 "r"(smem), "l"(global));
#else
    (void) on, (void) smem, (void) global;
#endif
}

// N: 4, 8 or 16
template <int N> static __device__ __forceinline__ void tbq_cp_async(uint32_t smem, const void * global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(smem), "l"(global), "n"(N));
#else
    (void) smem, (void) global;
#endif
}

static __device__ __forceinline__ void tbq_cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

template <int N> static __device__ __forceinline__ void tbq_cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N));
#endif
}

// By one thread.  Addresses and bytes: multiples of 16.
static __device__ __forceinline__ void tbq_bulk_copy(uint32_t to, const void * from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

static __device__ __forceinline__ void tbq_bulk_prefetch(const void * from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// --- barriers in shared memory --------------------------------------------------------------------------------------

static __device__ __forceinline__ uint32_t tbq_smem(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void tbq_mbarrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After the last of them, by the same thread.
static __device__ __forceinline__ void tbq_mbarrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void tbq_mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase last until so many bytes have been copied.
static __device__ __forceinline__ void tbq_mbarrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives when the copies by tbq_cp_async that this thread has started are done.
static __device__ __forceinline__ void tbq_mbarrier_arrive_copied(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

static __device__ __forceinline__ bool tbq_mbarrier_try(uint32_t barrier, int parity) {
    uint32_t done;
    asm volatile("{.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

// Without a limit: a trap in this loop cost all that setmaxnreg gives (ptxas of CUDA 13.0 kept the registers of the
// launch, spilled and serialized the products).
static __device__ __forceinline__ void tbq_mbarrier_wait(uint32_t barrier, int parity) {
    while (!tbq_mbarrier_try(barrier, parity)) {
    }
}

#endif
