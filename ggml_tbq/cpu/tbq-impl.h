// SPDX-License-Identifier: MIT What the implementations share: constants in memory, conversion of halves, access to
// blocks, the list of implementations.
#pragma once

#include "tbq-kernels.h"
#include "tbq-tables.h"

#include <string.h>

#ifdef __FAST_MATH__
#error "tbq kernels promise the same bits everywhere: compile them without -ffast-math"
#endif

// {f(0), ..., f(63)}
#define TBQ_LIST_16(f, i)                                                                                      \
    f(i), f(i + 1), f(i + 2), f(i + 3), f(i + 4), f(i + 5), f(i + 6), f(i + 7), f(i + 8), f(i + 9), f(i + 10), \
        f(i + 11), f(i + 12), f(i + 13), f(i + 14), f(i + 15)
#define TBQ_LIST_64(f) { TBQ_LIST_16(f, 0), TBQ_LIST_16(f, 16), TBQ_LIST_16(f, 32), TBQ_LIST_16(f, 48) }

// The sign bit of float number i where channel i is negated.
#define TBQ_SIGN_MASK(i) ((uint32_t) (TBQ_SIGN_BITS >> (i) & 1) << 31)

// The kernels of each instruction set; a build has those of its architecture.
extern const tbq_kernels tbq_kernels_ref;
extern const tbq_kernels tbq_kernels_avx2;
extern const tbq_kernels tbq_kernels_avx512;
extern const tbq_kernels tbq_kernels_avx512vnni;
extern const tbq_kernels tbq_kernels_neon;
extern const tbq_kernels tbq_kernels_neon_dotprod;

extern const struct tbq_attention_kernels tbq_attention_ref;
extern const struct tbq_attention_kernels tbq_attention_avx2;
extern const struct tbq_attention_kernels tbq_attention_avx512;
extern const struct tbq_attention_kernels tbq_attention_avx512vnni;
extern const struct tbq_attention_kernels tbq_attention_neon;
extern const struct tbq_attention_kernels tbq_attention_neon_dotprod;

extern const struct tbq_search_kernels tbq_search_ref;
extern const struct tbq_search_kernels tbq_search_avx2;
extern const struct tbq_search_kernels tbq_search_avx512;
extern const struct tbq_search_kernels tbq_search_avx512vnni;
extern const struct tbq_search_kernels tbq_search_neon;
extern const struct tbq_search_kernels tbq_search_neon_dotprod;

#ifdef _MSC_VER
#include <intrin.h>
#define TBQ_COUNT_TRAILING_ZEROS(x) ((int) _tzcnt_u64(x))
#else
#define TBQ_COUNT_TRAILING_ZEROS(x) __builtin_ctzll(x)
#endif

static inline uint32_t tbq_float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float tbq_bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Exact.  A half's exponent and mantissa shifted into a float's fields are the value times 2^-112.
static inline float tbq_half_to_float(uint16_t h) {
    const uint32_t magnitude = (uint32_t) (h & 0x7FFF) << 13;
    const uint32_t sign      = (uint32_t) (h & 0x8000) << 16;
    if ((h & 0x7C00) == 0x7C00) {
        return tbq_bits_float(sign | 0x7F800000 | magnitude);
    }
    return tbq_bits_float(sign | tbq_float_bits(tbq_bits_float(magnitude) * 0x1p112f));
}

// To nearest, ties to even; overflows to Inf.
static inline uint16_t tbq_float_to_half(float f) {
    const uint32_t bits = tbq_float_bits(f);
    const uint16_t sign = (uint16_t) (bits >> 16 & 0x8000);
    const uint32_t mag  = bits & 0x7FFFFFFF;
    if (mag > 0x7F800000) {
        return sign | TBQ_F16_NAN;
    }
    if (mag >= 0x477FF000) { // 65520, halfway between the largest half and 2^16
        return sign | 0x7C00;
    }
    if (mag < 0x38800000) { // below 2^-14: adding 0.5 leaves the subnormal half, rounded, in the low bits
        return sign | (uint16_t) (tbq_float_bits(tbq_bits_float(mag) + 0.5f) - 0x3F000000);
    }
    return sign | (uint16_t) ((mag - 0x38000000 + 0xFFF + (mag >> 13 & 1)) >> 13);
}

// Functions with a parameter `bits` are written once, for all types.  They are inlined into a caller for each type,
// where bits is a constant, so the compiler decides every test of it.
#if defined(__GNUC__)
#define TBQ_INLINE static inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define TBQ_INLINE static __forceinline
#else
#define TBQ_INLINE static inline
#endif

static const int8_t tbq_codebook_2[4]  = TBQ2_LEVELS;
static const int8_t tbq_codebook_3[8]  = TBQ3_LEVELS;
static const int8_t tbq_codebook_4[16] = TBQ4_LEVELS;

static const int16_t tbq_thresholds_2[TBQ2_N_SCALES][TBQ2_N_THRESHOLDS] = TBQ2_THRESHOLDS;
static const int16_t tbq_thresholds_3[TBQ3_N_SCALES][TBQ3_N_THRESHOLDS] = TBQ3_THRESHOLDS;
static const int16_t tbq_thresholds_4[TBQ4_N_SCALES][TBQ4_N_THRESHOLDS] = TBQ4_THRESHOLDS;

TBQ_INLINE const int8_t * tbq_codebook(int bits) {
    return bits == 2 ? tbq_codebook_2 : bits == 3 ? tbq_codebook_3 : tbq_codebook_4;
}

// The codebook as 16-byte tables for vector lookups, padded with zeros: all levels, and those of the positive half.
typedef struct {
    int8_t all[16], half[16];
} tbq_lookup;

static const tbq_lookup tbq_lookup_2 = { TBQ2_LEVELS, TBQ2_HALF_LEVELS };
static const tbq_lookup tbq_lookup_3 = { TBQ3_LEVELS, TBQ3_HALF_LEVELS };
static const tbq_lookup tbq_lookup_4 = { TBQ4_LEVELS, TBQ4_HALF_LEVELS };

TBQ_INLINE const tbq_lookup * tbq_lookup_table(int bits) {
    return bits == 2 ? &tbq_lookup_2 : bits == 3 ? &tbq_lookup_3 : &tbq_lookup_4;
}

// The distance from a level to the one above and to the one below; 0 at the ends.  For vector lookups too.
typedef struct {
    int8_t up[16], down[16];
} tbq_gaps;

static const tbq_gaps tbq_gaps_2 = { TBQ2_GAPS_UP, TBQ2_GAPS_DOWN };
static const tbq_gaps tbq_gaps_3 = { TBQ3_GAPS_UP, TBQ3_GAPS_DOWN };
static const tbq_gaps tbq_gaps_4 = { TBQ4_GAPS_UP, TBQ4_GAPS_DOWN };

TBQ_INLINE const tbq_gaps * tbq_gap_table(int bits) {
    return bits == 2 ? &tbq_gaps_2 : bits == 3 ? &tbq_gaps_3 : &tbq_gaps_4;
}

TBQ_INLINE int tbq_n_scales(int bits) {
    return bits == 2 ? TBQ2_N_SCALES : bits == 3 ? TBQ3_N_SCALES : TBQ4_N_SCALES;
}

TBQ_INLINE int tbq_n_thresholds(int bits) {
    return (1 << (bits - 1)) - 1;
}

TBQ_INLINE const int16_t * tbq_thresholds(int bits, int scale) {
    return bits == 2 ? tbq_thresholds_2[scale] : bits == 3 ? tbq_thresholds_3[scale] : tbq_thresholds_4[scale];
}

// A block is d, qs and, at 3 bits, qh: see tbq.h.
TBQ_INLINE size_t tbq_block_bytes(int bits) {
    return bits == 2   ? sizeof(block_tbq2_0)
           : bits == 3 ? sizeof(block_tbq3_0)
           : bits == 4 ? sizeof(block_tbq4_0)
                       : sizeof(block_tbq8_0);
}

// The bytes of a tbq8_0 block.
TBQ_INLINE const uint8_t * tbq_exact_qs(const void * block) {
    return (const uint8_t *) block + offsetof(block_tbq8_0, qs);
}

// The 32-bit words of a block without d.
TBQ_INLINE int tbq_block_words(int bits) {
    return (int) (tbq_block_bytes(bits) - sizeof(uint16_t)) / 4;
}

// F(0) ... F(7), where a loop counter must be a constant even if the compiler does not unroll loops
#define TBQ_EACH_OF_8(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)

TBQ_INLINE const uint8_t * tbq_qs(const void * block) {
    return (const uint8_t *) block + offsetof(block_tbq3_0, qs);
}

TBQ_INLINE const uint8_t * tbq_qh(const void * block) {
    return (const uint8_t *) block + offsetof(block_tbq3_0, qh);
}

// The index of value e of a block; tbq.h draws the bit order.
TBQ_INLINE int tbq_index_of(int bits, const void * block, int e) {
    const uint8_t * qs = tbq_qs(block);
    if (bits == 4) {
        return qs[e % 32] >> e / 32 * 4 & 15;
    }
    const int i   = e % 16;
    const int j   = e / 16;
    const int low = qs[i] >> 2 * j & 3;
    if (bits == 2) {
        return low;
    }
    return low | (tbq_qh(block)[i & 7] >> ((j & 1) | (i >> 3) << 1 | (j >> 1) << 2) & 1) << 2;
}

TBQ_INLINE uint16_t tbq_load_d(const void * block) {
    uint16_t d;
    memcpy(&d, block, sizeof(d));
    return d;
}

TBQ_INLINE void tbq_store_d(void * block, uint16_t d) {
    memcpy(block, &d, sizeof(d));
}
