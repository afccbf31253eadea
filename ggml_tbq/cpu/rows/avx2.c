// SPDX-License-Identifier: MIT
// Rows with AVX2, F16C and FMA.
#include "../tbq-impl.h"
#include "../tbq-x86.h"

#define TBQ_KERNELS      tbq_kernels_avx2
#define TBQ_ATTENTION    tbq_attention_avx2
#define TBQ_SEARCH       tbq_search_avx2
#define TBQ_KERNELS_NAME "avx2"

static int supported(void) {
#ifdef _MSC_VER
    return IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE);
#else
    return __builtin_cpu_supports("avx2") && cpu_has_f16c() && __builtin_cpu_supports("fma");
#endif
}

static const __m256i * sign_vectors(void) {
    return (const __m256i *) sign_mask;
}

// Butterflies within one vector: partner lanes swapped, and the lanes that take a - b negated first.
static inline __m256 in_vector(__m256 v) {
    const __m256 odd   = _mm256_castsi256_ps(_mm256_set1_epi64x((int64_t) 0x8000000000000000ull));
    const __m256 pairs = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 upper = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    v                  = _mm256_add_ps(_mm256_permute_ps(v, 0xB1), _mm256_xor_ps(v, odd));
    v                  = _mm256_add_ps(_mm256_permute_ps(v, 0x4E), _mm256_xor_ps(v, pairs));
    return _mm256_add_ps(_mm256_permute2f128_ps(v, v, 1), _mm256_xor_ps(v, upper));
}

// H times the 64 floats of v[0..7].
static inline void hadamard(__m256 v[8]) {
    for (int r = 0; r < 8; r++) {
        v[r] = in_vector(v[r]);
    }
    for (int h = 1; h < 8; h *= 2) {
        for (int r = 0; r < 8; r++) {
            if (!(r & h)) {
                const __m256 a = v[r], b = v[r + h];
                v[r]     = _mm256_add_ps(a, b);
                v[r + h] = _mm256_sub_ps(a, b);
            }
        }
    }
}

static inline void forward(const float * x, float post, float * y) {
    const __m256 p = _mm256_set1_ps(post);
    __m256       v[8];
    for (int r = 0; r < 8; r++) {
        const __m256i sign = _mm256_loadu_si256(sign_vectors() + r);
        v[r]               = _mm256_xor_ps(_mm256_loadu_ps(x + 8 * r), _mm256_castsi256_ps(sign));
    }
    hadamard(v);
    for (int r = 0; r < 8; r++) {
        _mm256_storeu_ps(y + 8 * r, _mm256_mul_ps(p, v[r]));
    }
}

static inline void inverse(const float * y, float post, float * x) {
    const __m256 p = _mm256_set1_ps(post);
    __m256       v[8];
    for (int r = 0; r < 8; r++) {
        v[r] = _mm256_loadu_ps(y + 8 * r);
    }
    hadamard(v);
    for (int r = 0; r < 8; r++) {
        const __m256i sign = _mm256_loadu_si256(sign_vectors() + r);
        _mm256_storeu_ps(x + 8 * r, _mm256_xor_ps(_mm256_mul_ps(p, v[r]), _mm256_castsi256_ps(sign)));
    }
}

static inline uint32_t abs_max(const float * x) {
    const __m256i mask    = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i       largest = _mm256_setzero_si256();
    for (int i = 0; i < TBQ_BLOCK; i += 8) {
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_loadu_si256((const __m256i *) (x + i)), mask));
    }
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    t         = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4E));
    t         = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0xB1));
    return (uint32_t) _mm_cvtsi128_si32(t);
}

static inline float sum_squares(const float * z) {
    __m256 p[2];
    for (int l = 0; l < 2; l++) {
        const __m256 first = _mm256_loadu_ps(z + 8 * l);
        p[l]               = _mm256_mul_ps(first, first);
        for (int i = 16; i < TBQ_BLOCK; i += 16) {
            const __m256 v = _mm256_loadu_ps(z + 8 * l + i);
            p[l]           = _mm256_add_ps(p[l], _mm256_mul_ps(v, v));
        }
    }
    return sum8(_mm256_add_ps(p[0], p[1]));
}

// Packing works within 128-bit lanes; these put the 64-bit and 32-bit parts back in order.
static inline __m256i pack_i32(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
}

static inline __m256i pack_i8(const __m256i v[4]) {
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

typedef struct {
    __m256i q[4];        // 16 values each
    __m256i negative[2]; // 32 bytes each, -1 where negative
} coords;

static inline coords to_fixed(const float * z, float inverse_rms) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 scale     = _mm256_set1_ps(inverse_rms);
    const __m256 half      = _mm256_set1_ps(0.5f);
    coords       c;
    for (int i = 0; i < 2; i++) {
        __m256i fixed[4], below[4];
        for (int r = 0; r < 4; r++) {
            const __m256 v = _mm256_loadu_ps(z + 32 * i + 8 * r);
            fixed[r] = _mm256_cvttps_epi32(_mm256_add_ps(_mm256_mul_ps(_mm256_and_ps(v, magnitude), scale), half));
            below[r] = _mm256_castps_si256(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ));
        }
        c.q[2 * i]     = pack_i32(fixed[0], fixed[1]);
        c.q[2 * i + 1] = pack_i32(fixed[2], fixed[3]);
        c.negative[i]  = pack_i8(below);
    }
    return c;
}

// The number of thresholds below each of 16 values, plus 0x8000.  As bytes, these are an index, and a byte with the top
// bit set, which vpshufb turns into 0: so one lookup also widens the level to 16 bits.
TBQ_INLINE __m256i count_below(int bits, __m256i q, const int16_t * thresholds) {
    __m256i count = _mm256_set1_epi16((int16_t) 0x8000);
    for (int t = 0; t < tbq_n_thresholds(bits); t++) {
        count = _mm256_sub_epi16(count, _mm256_cmpgt_epi16(q, _mm256_set1_epi16(thresholds[t])));
    }
    return count;
}

TBQ_INLINE void score(int bits, coords c, const int16_t * thresholds, int32_t * qk, int32_t * kk) {
    const __m256i table  = _mm256_broadcastsi128_si256(half_levels(bits));
    __m256i       sum_qk = _mm256_setzero_si256();
    __m256i       sum_kk = _mm256_setzero_si256();
    for (int r = 0; r < 4; r++) {
        const __m256i k = _mm256_shuffle_epi8(table, count_below(bits, c.q[r], thresholds));
        sum_qk          = _mm256_add_epi32(sum_qk, _mm256_madd_epi16(c.q[r], k));
        sum_kk          = _mm256_add_epi32(sum_kk, _mm256_madd_epi16(k, k));
    }
    sums8_i32(sum_qk, sum_kk, qk, kk);
}

TBQ_INLINE void assign(int bits, coords c, const int16_t * thresholds, uint8_t * index) {
    const __m256i low  = _mm256_set1_epi16(0xFF);
    const __m256i half = _mm256_set1_epi8((char) (1 << (bits - 1)));
    const __m256i all  = _mm256_set1_epi8((char) ((1 << bits) - 1));
    for (int r = 0; r < 2; r++) {
        const __m256i a = _mm256_and_si256(count_below(bits, c.q[2 * r], thresholds), low);
        const __m256i b = _mm256_and_si256(count_below(bits, c.q[2 * r + 1], thresholds), low);
        const __m256i m = _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8);
        // the codebook is odd: the index of -k is the complement of that of k
        const __m256i i = _mm256_xor_si256(_mm256_or_si256(m, half), _mm256_and_si256(c.negative[r], all));
        _mm256_storeu_si256((__m256i *) (index + 32 * r), i);
    }
}

TBQ_INLINE int32_t product(int bits, coords c, const uint8_t * index) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all));
    __m256i       sum   = _mm256_setzero_si256();
    for (int i = 0; i < 2; i++) {
        const __m256i k    = _mm256_shuffle_epi8(table, _mm256_loadu_si256((const __m256i *) (index + 32 * i)));
        const __m256i same = _mm256_sub_epi8(_mm256_xor_si256(k, c.negative[i]), c.negative[i]);
        const __m256i low  = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(same));
        const __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(same, 1));
        sum                = _mm256_add_epi32(sum, _mm256_madd_epi16(c.q[2 * i], low));
        sum                = _mm256_add_epi32(sum, _mm256_madd_epi16(c.q[2 * i + 1], high));
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half         = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

static inline void transform(float * x) {
    __m256 v[8];
    for (int r = 0; r < 8; r++) {
        v[r] = _mm256_loadu_ps(x + 8 * r);
    }
    hadamard(v);
    for (int r = 0; r < 8; r++) {
        _mm256_storeu_ps(x + 8 * r, v[r]);
    }
}

// table[index], eight at a time, as floats.
static inline __m256 look_up(__m128i table, const uint8_t * index) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(table, _mm_loadl_epi64((const __m128i *) index))));
}

TBQ_INLINE void values(int bits, const uint8_t * index, float * k) {
    const __m128i table = _mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all);
    for (int i = 0; i < TBQ_BLOCK; i += 8) {
        _mm256_storeu_ps(k + i, look_up(table, index + i));
    }
}

// Every lane of the result is the largest of the lanes of v whose number has the same parity.
static inline __m256 max_by_parity(__m256 v) {
    v = _mm256_max_ps(v, _mm256_permute2f128_ps(v, v, 1));
    return _mm256_max_ps(v, _mm256_permute_ps(v, 0x4E));
}

TBQ_INLINE int32_t coordinate_descent(int bits, const float * m, const float * slope, float d, uint8_t * index) {
    const uint64_t even  = 0x5555555555555555;
    const __m128i  ups   = _mm_loadu_si128((const __m128i *) tbq_gap_table(bits)->up);
    const __m128i  downs = _mm_loadu_si128((const __m128i *) tbq_gap_table(bits)->down);
    const __m256   m0    = _mm256_set1_ps(m[0]);
    const __m256   dd    = _mm256_set1_ps(d);
    const __m256   sign  = _mm256_set1_ps(-0.0f);
    const __m256   zero  = _mm256_setzero_ps();
    const __m256i  lane  = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256         g[8], gain[8];
    float          up[TBQ_BLOCK], down[TBQ_BLOCK]; // d times the gaps
    for (int r = 0; r < 8; r++) {
        g[r] = _mm256_loadu_ps(slope + 8 * r);
        _mm256_storeu_ps(up + 8 * r, _mm256_mul_ps(dd, look_up(ups, index + 8 * r)));
        _mm256_storeu_ps(down + 8 * r, _mm256_mul_ps(dd, look_up(downs, index + 8 * r)));
    }
    for (int step = 0; step < TBQ_DESCENT_STEPS; step++) {
        uint64_t upwards = 0, best = 0;
        __m256   best_gain = zero;
        for (int r = 0; r < 8; r++) {
            const __m256 above = _mm256_cmp_ps(g[r], zero, _CMP_GT_OQ);
            const __m256 gap   = _mm256_blendv_ps(_mm256_loadu_ps(down + 8 * r), _mm256_loadu_ps(up + 8 * r), above);
            const __m256 size  = _mm256_andnot_ps(sign, g[r]);
            gain[r]            = _mm256_mul_ps(gap, _mm256_sub_ps(_mm256_add_ps(size, size), _mm256_mul_ps(gap, m0)));
            best_gain          = _mm256_max_ps(best_gain, gain[r]);
            upwards |= (uint64_t) (uint32_t) _mm256_movemask_ps(above) << 8 * r;
        }
        best_gain          = max_by_parity(best_gain);
        const __m256 gains = _mm256_cmp_ps(best_gain, zero, _CMP_GT_OQ);
        if (!_mm256_movemask_ps(gains)) {
            break;
        }
        for (int r = 0; r < 8; r++) {
            const __m256 equal = _mm256_and_ps(gains, _mm256_cmp_ps(gain[r], best_gain, _CMP_EQ_OQ));
            best |= (uint64_t) (uint32_t) _mm256_movemask_ps(equal) << 8 * r;
        }
        for (int parity = 0; parity < 2; parity++) {
            const uint64_t half = best & even << parity;
            if (!half) {
                continue;
            }
            const int     at   = TBQ_COUNT_TRAILING_ZEROS(half);
            const int     rise = (int) (upwards >> at & 1);
            const __m256  s    = _mm256_set1_ps(rise ? up[at] : -down[at]);
            const __m256i swap = _mm256_xor_si256(lane, _mm256_set1_epi32(at & 7));
            for (int r = 0; r < 8; r++) {
                const __m256 column = _mm256_permutevar8x32_ps(_mm256_loadu_ps(m + (8 * r ^ (at & 56))), swap);
                g[r]                = _mm256_sub_ps(g[r], _mm256_mul_ps(s, column));
            }
            index[at] = (uint8_t) (index[at] + (rise ? 1 : -1));
            up[at]    = d * (float) tbq_gap_table(bits)->up[index[at]];
            down[at]  = d * (float) tbq_gap_table(bits)->down[index[at]];
        }
    }
    __m256        kk    = zero;
    const __m128i table = _mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all);
    for (int i = 0; i < TBQ_BLOCK; i += 8) {
        const __m256 k = look_up(table, index + i);
        kk             = _mm256_add_ps(kk, _mm256_mul_ps(k, k)); // integers below 2^24: exact
    }
    return (int32_t) sum8(kk);
}

static inline void act_round(const float * y, float inverse_d, int8_t * qs, int32_t * bias) {
    const __m256 sign  = _mm256_set1_ps(-0.0f);
    const __m256 scale = _mm256_set1_ps(inverse_d);
    const __m256 half  = _mm256_set1_ps(0.5f);
    for (int i = 0; i < TBQ_BLOCK; i += 32) {
        __m256i codes[4];
        for (int r = 0; r < 4; r++) {
            const __m256 v = _mm256_loadu_ps(y + i + 8 * r);
            const __m256 h = _mm256_or_ps(_mm256_and_ps(v, sign), half);
            codes[r]       = _mm256_cvttps_epi32(_mm256_add_ps(_mm256_mul_ps(v, scale), h));
        }
        _mm256_storeu_si256((__m256i *) (qs + i), pack_i8(codes));
    }
    act_bias(qs, bias);
}

// Eight levels of a block as floats, from number 8 r on.
TBQ_INLINE __m256 level_floats(const bytes64 * k, int r) {
    const __m256i half = r < 4 ? k->lo : k->hi;
    const __m128i lane = r & 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(r & 1 ? _mm_srli_si128(lane, 8) : lane));
}

TBQ_INLINE void levels(int bits, const void * block, float * k) {
    const bytes64 bytes = level_bytes(bits, block, 0);
    for (int r = 0; r < 8; r++) {
        _mm256_storeu_ps(k + 8 * r, level_floats(&bytes, r));
    }
}

TBQ_INLINE void mad(int bits, const void * block, float f, float * acc) {
    const bytes64 bytes = level_bytes(bits, block, 0);
    const __m256  scale = _mm256_set1_ps(f);
    for (int r = 0; r < 8; r++) {
        const __m256 product = _mm256_mul_ps(scale, level_floats(&bytes, r));
        _mm256_storeu_ps(acc + 8 * r, _mm256_add_ps(_mm256_loadu_ps(acc + 8 * r), product));
    }
}

#include "rows.inc"
