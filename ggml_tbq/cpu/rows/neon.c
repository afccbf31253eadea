// SPDX-License-Identifier: MIT
// Rows with NEON (AArch64).  neon-dotprod.c compiles this file again with the dot product instructions.
#include "../tbq-impl.h"
#include "../tbq-dot4.h"

#include <arm_neon.h>
#include <math.h>

#ifdef __ARM_FEATURE_DOTPROD
#define TBQ_KERNELS      tbq_kernels_neon_dotprod
#define TBQ_ATTENTION    tbq_attention_neon_dotprod
#define TBQ_SEARCH       tbq_search_neon_dotprod
#define TBQ_KERNELS_NAME "neon-dotprod"
#else
#define TBQ_KERNELS      tbq_kernels_neon
#define TBQ_ATTENTION    tbq_attention_neon
#define TBQ_SEARCH       tbq_search_neon
#define TBQ_KERNELS_NAME "neon"
#endif

#if defined(__ARM_FEATURE_DOTPROD) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__ARM_FEATURE_DOTPROD) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

static int supported(void) {
#if !defined(__ARM_FEATURE_DOTPROD)
    return 1; // part of every AArch64
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int    has  = 0;
    size_t size = sizeof(has);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has;
#else
    return 0;
#endif
}

static const uint32_t sign_mask[TBQ_BLOCK] = TBQ_LIST_64(TBQ_SIGN_MASK);

enum { N_F32 = TBQ_BLOCK / 4 }; // vectors of floats in a block

typedef struct {
    uint8x16_t v[4];
} bytes64;

typedef struct {
    int8x16_t v[4];
} levels64;

static inline float half_to_float(uint16_t h) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

static inline float32x4_t flip(float32x4_t v, uint32x4_t mask) {
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(v), mask));
}

// Butterflies within one vector: partner lanes swapped, and the lanes that take a - b negated first.
static inline float32x4_t in_vector(float32x4_t v) {
    const uint32x4_t odd   = vreinterpretq_u32_u64(vdupq_n_u64(0x8000000000000000ull));
    const uint32x4_t upper = vcombine_u32(vdup_n_u32(0), vdup_n_u32(0x80000000u));
    v                      = vaddq_f32(vrev64q_f32(v), flip(v, odd));
    return vaddq_f32(vextq_f32(v, v, 2), flip(v, upper));
}

// H times the 64 floats of v[0..15].
static inline void hadamard(float32x4_t v[N_F32]) {
    for (int r = 0; r < N_F32; r++) {
        v[r] = in_vector(v[r]);
    }
    for (int h = 1; h < N_F32; h *= 2) {
        for (int r = 0; r < N_F32; r++) {
            if (!(r & h)) {
                const float32x4_t a = v[r], b = v[r + h];
                v[r]     = vaddq_f32(a, b);
                v[r + h] = vsubq_f32(a, b);
            }
        }
    }
}

static inline void forward(const float * x, float post, float * y) {
    float32x4_t v[N_F32];
    for (int r = 0; r < N_F32; r++) {
        v[r] = flip(vld1q_f32(x + 4 * r), vld1q_u32(sign_mask + 4 * r));
    }
    hadamard(v);
    for (int r = 0; r < N_F32; r++) {
        vst1q_f32(y + 4 * r, vmulq_n_f32(v[r], post));
    }
}

static inline void inverse(const float * y, float post, float * x) {
    float32x4_t v[N_F32];
    for (int r = 0; r < N_F32; r++) {
        v[r] = vld1q_f32(y + 4 * r);
    }
    hadamard(v);
    for (int r = 0; r < N_F32; r++) {
        vst1q_f32(x + 4 * r, flip(vmulq_n_f32(v[r], post), vld1q_u32(sign_mask + 4 * r)));
    }
}

static inline uint32_t abs_max(const float * x) {
    uint32x4_t largest = vdupq_n_u32(0);
    for (int i = 0; i < TBQ_BLOCK; i += 4) {
        largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7FFFFFFF)));
    }
    return vmaxvq_u32(largest);
}

// ((v0 + v2) + (v1 + v3)), the last three levels of every sum in rows.inc
static inline float sum4(float32x4_t v) {
    const float32x2_t s = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}

static inline float sum_squares(const float * z) {
    float32x4_t p[4];
    for (int l = 0; l < 4; l++) {
        const float32x4_t first = vld1q_f32(z + 4 * l);
        p[l]                    = vmulq_f32(first, first);
        for (int i = 16; i < TBQ_BLOCK; i += 16) {
            const float32x4_t v = vld1q_f32(z + 4 * l + i);
            p[l]                = vaddq_f32(p[l], vmulq_f32(v, v));
        }
    }
    return sum4(vaddq_f32(vaddq_f32(p[0], p[2]), vaddq_f32(p[1], p[3])));
}

static inline int32x4_t rounded(float32x4_t v, float scale) {
    return vcvtq_s32_f32(vaddq_f32(vmulq_n_f32(vabsq_f32(v), scale), vdupq_n_f32(0.5f)));
}

typedef struct {
    int16x8_t q[8];
    uint8x8_t negative[8]; // -1 where negative
} coords;

static inline coords to_fixed(const float * z, float inverse_rms) {
    coords c;
    for (int r = 0; r < 8; r++) {
        const float32x4_t a = vld1q_f32(z + 8 * r), b = vld1q_f32(z + 8 * r + 4);
        c.q[r]        = vcombine_s16(vmovn_s32(rounded(a, inverse_rms)), vmovn_s32(rounded(b, inverse_rms)));
        c.negative[r] = vmovn_u16(vcombine_u16(vmovn_u32(vcltzq_f32(a)), vmovn_u32(vcltzq_f32(b))));
    }
    return c;
}

// The number of thresholds below each of 8 values, plus 0x8000.  As bytes, these are an index, and a byte that is
// outside of any table, which a lookup turns into 0: so one lookup also widens the level to 16 bits.
TBQ_INLINE uint16x8_t count_below(int bits, int16x8_t q, const int16_t * thresholds) {
    uint16x8_t count = vdupq_n_u16(0x8000);
    for (int t = 0; t < tbq_n_thresholds(bits); t++) {
        count = vsubq_u16(count, vcgtq_s16(q, vdupq_n_s16(thresholds[t])));
    }
    return count;
}

TBQ_INLINE void score(int bits, coords c, const int16_t * thresholds, int32_t * qk, int32_t * kk) {
    const int8x16_t table  = vld1q_s8(tbq_lookup_table(bits)->half);
    int32x4_t       sum_qk = vdupq_n_s32(0);
    int32x4_t       sum_kk = vdupq_n_s32(0);
    for (int r = 0; r < 8; r++) {
        const uint8x16_t index = vreinterpretq_u8_u16(count_below(bits, c.q[r], thresholds));
        const int16x8_t  k     = vreinterpretq_s16_s8(vqtbl1q_s8(table, index));
        sum_qk                 = vmlal_high_s16(vmlal_s16(sum_qk, vget_low_s16(c.q[r]), vget_low_s16(k)), c.q[r], k);
        sum_kk                 = vmlal_high_s16(vmlal_s16(sum_kk, vget_low_s16(k), vget_low_s16(k)), k, k);
    }
    *qk = vaddvq_s32(sum_qk);
    *kk = vaddvq_s32(sum_kk);
}

TBQ_INLINE void assign(int bits, coords c, const int16_t * thresholds, uint8_t * index) {
    const uint8x8_t half = vdup_n_u8((uint8_t) (1 << (bits - 1)));
    const uint8x8_t all  = vdup_n_u8((uint8_t) ((1 << bits) - 1));
    for (int r = 0; r < 8; r++) {
        const uint8x8_t m = vmovn_u16(count_below(bits, c.q[r], thresholds)); // drops the high byte
        // the codebook is odd: the index of -k is the complement of that of k
        vst1_u8(index + 8 * r, veor_u8(vorr_u8(m, half), vand_u8(c.negative[r], all)));
    }
}

TBQ_INLINE int32_t product(int bits, coords c, const uint8_t * index) {
    const int8x16_t table = vld1q_s8(tbq_lookup_table(bits)->all);
    int32x4_t       sum   = vdupq_n_s32(0);
    for (int r = 0; r < 8; r++) {
        const int8x8_t  sign = vreinterpret_s8_u8(c.negative[r]);
        const int8x8_t  k    = vqtbl1_s8(table, vld1_u8(index + 8 * r));
        const int16x8_t same = vmovl_s8(vsub_s8(veor_s8(k, sign), sign));
        sum                  = vmlal_s16(sum, vget_low_s16(c.q[r]), vget_low_s16(same));
        sum                  = vmlal_high_s16(sum, c.q[r], same);
    }
    return vaddvq_s32(sum);
}

static inline void transform(float * x) {
    float32x4_t v[N_F32];
    for (int r = 0; r < N_F32; r++) {
        v[r] = vld1q_f32(x + 4 * r);
    }
    hadamard(v);
    for (int r = 0; r < N_F32; r++) {
        vst1q_f32(x + 4 * r, v[r]);
    }
}

// Four bytes as floats.
static inline float32x4_t floats_of(int8x8_t bytes, int high) {
    const int16x8_t words = vmovl_s8(bytes);
    return vcvtq_f32_s32(high ? vmovl_high_s16(words) : vmovl_s16(vget_low_s16(words)));
}

// out = d . table[index]
static inline void look_up(const int8_t * table, const uint8_t * index, float d, float * out) {
    for (int i = 0; i < TBQ_BLOCK; i += 8) {
        const int8x8_t bytes = vqtbl1_s8(vld1q_s8(table), vld1_u8(index + i));
        vst1q_f32(out + i, vmulq_n_f32(floats_of(bytes, 0), d));
        vst1q_f32(out + i + 4, vmulq_n_f32(floats_of(bytes, 1), d));
    }
}

TBQ_INLINE void values(int bits, const uint8_t * index, float * k) {
    look_up(tbq_lookup_table(bits)->all, index, 1.0f, k);
}

// The first lane, in order of the block, whose gain is the largest of its parity, or -1 if that is not positive.
// gain[r] has lanes 4 r ... 4 r + 3; lanes 0 and 2 of a vector are even.
static inline int first_best(const float32x4_t gain[N_F32], float32x4_t best_gain, int parity) {
    const float best = parity ? vgetq_lane_f32(best_gain, 1) : vgetq_lane_f32(best_gain, 0);
    float       all[TBQ_BLOCK];
    for (int r = 0; r < N_F32; r++) {
        vst1q_f32(all + 4 * r, gain[r]);
    }
    for (int j = parity; best > 0 && j < TBQ_BLOCK; j += 2) {
        if (all[j] == best) {
            return j;
        }
    }
    return -1;
}

TBQ_INLINE int32_t coordinate_descent(int bits, const float * m, const float * slope, float d, uint8_t * index) {
    const tbq_gaps * gaps = tbq_gap_table(bits);
    float32x4_t      g[N_F32], gain[N_F32];
    float            up[TBQ_BLOCK], down[TBQ_BLOCK]; // d times the gaps
    look_up(gaps->up, index, d, up);
    look_up(gaps->down, index, d, down);
    for (int r = 0; r < N_F32; r++) {
        g[r] = vld1q_f32(slope + 4 * r);
    }
    for (int step = 0; step < TBQ_DESCENT_STEPS; step++) {
        float32x4_t best_gain = vdupq_n_f32(0);
        for (int r = 0; r < N_F32; r++) {
            const float32x4_t gap  = vbslq_f32(vcgtzq_f32(g[r]), vld1q_f32(up + 4 * r), vld1q_f32(down + 4 * r));
            const float32x4_t size = vabsq_f32(g[r]);
            gain[r]                = vmulq_f32(gap, vsubq_f32(vaddq_f32(size, size), vmulq_n_f32(gap, m[0])));
            best_gain              = vmaxq_f32(best_gain, gain[r]);
        }
        best_gain = vmaxq_f32(best_gain, vextq_f32(best_gain, best_gain, 2));
        int moved = 0;
        for (int parity = 0; parity < 2; parity++) {
            const int at = first_best(gain, best_gain, parity);
            if (at < 0) {
                continue;
            }
            float lanes[4];
            vst1q_f32(lanes, g[at / 4]);
            const int   above = lanes[at % 4] > 0;
            const float s     = above ? up[at] : -down[at];
            float       column[TBQ_BLOCK];
            for (int i = 0; i < TBQ_BLOCK; i++) {
                column[i] = m[i ^ at];
            }
            for (int r = 0; r < N_F32; r++) {
                g[r] = vsubq_f32(g[r], vmulq_n_f32(vld1q_f32(column + 4 * r), s));
            }
            index[at] = (uint8_t) (index[at] + (above ? 1 : -1));
            up[at]    = d * (float) gaps->up[index[at]];
            down[at]  = d * (float) gaps->down[index[at]];
            moved     = 1;
        }
        if (!moved) {
            break;
        }
    }
    int32_t kk = 0;
    for (int i = 0; i < TBQ_BLOCK; i++) {
        kk += tbq_codebook(bits)[index[i]] * tbq_codebook(bits)[index[i]];
    }
    return kk;
}

static inline void act_round(const float * y, float inverse_d, int8_t * qs, int32_t * bias) {
    for (int i = 0; i < TBQ_BLOCK; i += 8) {
        int16x8_t codes = vdupq_n_s16(0);
        for (int h = 0; h < 2; h++) {
            const float32x4_t v        = vld1q_f32(y + i + 4 * h);
            const int32x4_t   negative = vreinterpretq_s32_u32(vcltzq_f32(v));
            const int32x4_t   m        = rounded(v, inverse_d);
            const int16x4_t   code     = vmovn_s32(vsubq_s32(veorq_s32(m, negative), negative)); // -m where negative
            codes                      = h ? vcombine_s16(vget_low_s16(codes), code) : vcombine_s16(code, code);
        }
        vst1_s8(qs + i, vmovn_s16(codes));
    }
    const int8x16_t weight = vdupq_n_s8(-64);
    for (int l = 0; l < 2; l++) {
        const int32x4_t p = dot4(vdupq_n_s32(0), weight, vld1q_s8(qs + 16 * l));
        vst1q_s32(bias + 4 * l, dot4(p, weight, vld1q_s8(qs + 32 + 16 * l)));
    }
}

// 4 where the high bit is set, for elements 16 j + i: each is one bit of a qh byte (tbq.h has the order).
TBQ_INLINE uint8x16_t qh_bits(const void * block, int j) {
    const uint8x8_t  qh   = vld1_u8(tbq_qh(block));
    const int        bit  = (j & 1) | (j >> 1) << 2;
    const uint8x16_t mask = vcombine_u8(vdup_n_u8((uint8_t) (1 << bit)), vdup_n_u8((uint8_t) (4 << bit)));
    return vandq_u8(vtstq_u8(vcombine_u8(qh, qh), mask), vdupq_n_u8(4));
}

TBQ_INLINE bytes64 indices(int bits, const void * block) {
    bytes64 r;
    if (bits == 4) {
        for (int j = 0; j < 2; j++) {
            const uint8x16_t qs = vld1q_u8(tbq_qs(block) + 16 * j);
            r.v[j]              = vandq_u8(qs, vdupq_n_u8(15));
            r.v[j + 2]          = vshrq_n_u8(qs, 4);
        }
        return r;
    }
    const uint8x16_t pair = vdupq_n_u8(3);
    const uint8x16_t qs   = vld1q_u8(tbq_qs(block));
    r.v[0]                = vandq_u8(qs, pair);
    r.v[1]                = vandq_u8(vshrq_n_u8(qs, 2), pair);
    r.v[2]                = vandq_u8(vshrq_n_u8(qs, 4), pair);
    r.v[3]                = vshrq_n_u8(qs, 6);
    for (int j = 0; bits == 3 && j < 4; j++) {
        r.v[j] = vorrq_u8(r.v[j], qh_bits(block, j));
    }
    return r;
}

TBQ_INLINE levels64 level_bytes(int bits, const void * block) {
    const int8x16_t table = vld1q_s8(tbq_lookup_table(bits)->all);
    const bytes64   i     = indices(bits, block);
    levels64        r;
    for (int j = 0; j < 4; j++) {
        r.v[j] = vqtbl1q_s8(table, i.v[j]);
    }
    return r;
}

typedef struct {
    float32x4_t p[2];
} dot_sums;

static inline dot_sums dot_zero(void) {
    const dot_sums zero = { { vdupq_n_f32(0), vdupq_n_f32(0) } };
    return zero;
}

static inline float dot_total(dot_sums sums) {
    return sum4(vaddq_f32(sums.p[0], sums.p[1]));
}

TBQ_INLINE dot_sums dot(int bits, const void * block, const block_tbq8_act * a, float f, dot_sums sums) {
    const levels64 k = level_bytes(bits, block);
    for (int l = 0; l < 2; l++) { // signed products need no bias
        const int32x4_t p =
            dot4(dot4(vdupq_n_s32(0), k.v[l], vld1q_s8(a->qs + 16 * l)), k.v[l + 2], vld1q_s8(a->qs + 32 + 16 * l));
        sums.p[l] = vaddq_f32(sums.p[l], vmulq_n_f32(vcvtq_f32_s32(p), f));
    }
    return sums;
}

// Four levels of a block as floats, from number 4 r on.
TBQ_INLINE float32x4_t level_floats(const levels64 * k, int r) {
    const int8x16_t bytes = k->v[r / 4];
    const int16x8_t words = r & 2 ? vmovl_high_s8(bytes) : vmovl_s8(vget_low_s8(bytes));
    return vcvtq_f32_s32(r & 1 ? vmovl_high_s16(words) : vmovl_s16(vget_low_s16(words)));
}

TBQ_INLINE void levels(int bits, const void * block, float * k) {
    const levels64 bytes = level_bytes(bits, block);
    for (int r = 0; r < N_F32; r++) {
        vst1q_f32(k + 4 * r, level_floats(&bytes, r));
    }
}

TBQ_INLINE void mad(int bits, const void * block, float f, float * acc) {
    const levels64 bytes = level_bytes(bits, block);
    for (int r = 0; r < N_F32; r++) {
        const float32x4_t product = vmulq_n_f32(level_floats(&bytes, r), f);
        vst1q_f32(acc + 4 * r, vaddq_f32(vld1q_f32(acc + 4 * r), product));
    }
}

#include "rows.inc"
