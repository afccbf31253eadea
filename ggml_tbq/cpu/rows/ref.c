// SPDX-License-Identifier: MIT
// The scalar reference, in the order of the specification.  Every other implementation is compared with this one in the
// tests, and this one with tests/numpy_reference.py, which shares no code with it.
#include "../tbq-impl.h"

#include <math.h>

#define TBQ_KERNELS      tbq_kernels_ref
#define TBQ_ATTENTION    tbq_attention_ref
#define TBQ_SEARCH       tbq_search_ref
#define TBQ_KERNELS_NAME "ref"

static int supported(void) {
    return 1;
}

static inline float half_to_float(uint16_t h) {
    return tbq_half_to_float(h);
}

static uint32_t abs_max(const float * x) {
    uint32_t largest = 0;
    for (int i = 0; i < TBQ_BLOCK; i++) {
        const uint32_t bits = tbq_float_bits(x[i]) & 0x7FFFFFFF;
        largest             = bits > largest ? bits : largest;
    }
    return largest;
}

static void butterflies(float * v) {
    for (int h = 1; h < TBQ_BLOCK; h *= 2) {
        for (int i = 0; i < TBQ_BLOCK; i++) {
            if (!(i & h)) {
                const float a = v[i];
                const float b = v[i + h];
                v[i]          = a + b;
                v[i + h]      = a - b;
            }
        }
    }
}

static float with_sign(float v, int i) {
    return tbq_bits_float(tbq_float_bits(v) ^ TBQ_SIGN_MASK(i));
}

static void forward(const float * x, float post, float * y) {
    float v[TBQ_BLOCK];
    for (int i = 0; i < TBQ_BLOCK; i++) {
        v[i] = with_sign(x[i], i);
    }
    butterflies(v);
    for (int i = 0; i < TBQ_BLOCK; i++) {
        y[i] = post * v[i];
    }
}

static void inverse(const float * y, float post, float * x) {
    float v[TBQ_BLOCK];
    memcpy(v, y, sizeof(v));
    butterflies(v);
    for (int i = 0; i < TBQ_BLOCK; i++) {
        x[i] = with_sign(post * v[i], i);
    }
}

static float sum_squares(const float * z) {
    float p[16];
    for (int l = 0; l < 16; l++) {
        p[l] = z[l] * z[l];
        for (int i = l + 16; i < TBQ_BLOCK; i += 16) {
            p[l] += z[i] * z[i];
        }
    }
    for (int h = 8; h > 0; h /= 2) {
        for (int l = 0; l < h; l++) {
            p[l] += p[l + h];
        }
    }
    return p[0];
}

typedef struct {
    int16_t q[TBQ_BLOCK];
    int8_t  negative[TBQ_BLOCK];
} coords;

static coords to_fixed(const float * z, float inverse_rms) {
    coords c;
    for (int i = 0; i < TBQ_BLOCK; i++) {
        c.q[i]        = (int16_t) (int) (fabsf(z[i]) * inverse_rms + 0.5f);
        c.negative[i] = z[i] < 0;
    }
    return c;
}

static void values(int bits, const uint8_t * index, float * k) {
    for (int i = 0; i < TBQ_BLOCK; i++) {
        k[i] = tbq_codebook(bits)[index[i]];
    }
}

static int32_t product(int bits, coords c, const uint8_t * index) {
    int32_t sum = 0;
    for (int i = 0; i < TBQ_BLOCK; i++) {
        sum += (c.negative[i] ? -c.q[i] : c.q[i]) * tbq_codebook(bits)[index[i]];
    }
    return sum;
}

static void transform(float * v) {
    butterflies(v);
}

// Of the coordinates j = parity, parity + 2, ... makes the move that gains most, if one gains.
static void coordinate_descent_step(int bits, const float * m, float * g, float d, int parity, uint8_t * index) {
    const tbq_gaps * gaps = tbq_gap_table(bits);
    float            best = 0;
    int              at   = -1;
    for (int j = parity; j < TBQ_BLOCK; j += 2) {
        const float gap  = d * (float) (g[j] > 0 ? gaps->up : gaps->down)[index[j]];
        const float gain = gap * ((fabsf(g[j]) + fabsf(g[j])) - gap * m[0]);
        if (gain > best) {
            best = gain;
            at   = j;
        }
    }
    if (at < 0) {
        return;
    }
    const int   up = g[at] > 0;
    const float s  = d * (float) (up ? gaps->up[index[at]] : -gaps->down[index[at]]);
    for (int i = parity; i < TBQ_BLOCK; i += 2) {
        g[i] -= s * m[i ^ at];
    }
    index[at] = (uint8_t) (index[at] + (up ? 1 : -1));
}

static int32_t coordinate_descent(int bits, const float * m, const float * g, float d, uint8_t * index) {
    float   slope[TBQ_BLOCK];
    int32_t kk = 0;
    memcpy(slope, g, sizeof(slope));
    for (int step = 0; step < TBQ_DESCENT_STEPS; step++) {
        coordinate_descent_step(bits, m, slope, d, 0, index);
        coordinate_descent_step(bits, m, slope, d, 1, index);
    }
    for (int i = 0; i < TBQ_BLOCK; i++) {
        kk += tbq_codebook(bits)[index[i]] * tbq_codebook(bits)[index[i]];
    }
    return kk;
}

static void act_round(const float * y, float inverse_d, int8_t * qs, int32_t * bias) {
    int32_t b[8] = { 0 };
    for (int i = 0; i < TBQ_BLOCK; i++) {
        const int q = (int) (fabsf(y[i]) * inverse_d + 0.5f);
        qs[i]       = (int8_t) (y[i] < 0 ? -q : q);
        b[i / 4 % 8] -= 64 * qs[i];
    }
    memcpy(bias, b, sizeof(b));
}

static int level_of(int bits, const void * block, int e) {
    return tbq_codebook(bits)[tbq_index_of(bits, block, e)];
}

static int magnitude_of(int bits, int q, const int16_t * thresholds) {
    int m = 0;
    for (int t = 0; t < tbq_n_thresholds(bits); t++) {
        m += q > thresholds[t];
    }
    return m;
}

static void score(int bits, coords c, const int16_t * thresholds, int32_t * qk, int32_t * kk) {
    *qk = *kk = 0;
    for (int i = 0; i < TBQ_BLOCK; i++) {
        const int k = tbq_codebook(bits)[(1 << (bits - 1)) + magnitude_of(bits, c.q[i], thresholds)];
        *qk += c.q[i] * k;
        *kk += k * k;
    }
}

static void assign(int bits, coords c, const int16_t * thresholds, uint8_t * index) {
    const int half = 1 << (bits - 1);
    for (int i = 0; i < TBQ_BLOCK; i++) {
        const int m = magnitude_of(bits, c.q[i], thresholds);
        index[i]    = (uint8_t) (c.negative[i] ? half - 1 - m : half + m);
    }
}

static void levels(int bits, const void * block, float * k) {
    for (int i = 0; i < TBQ_BLOCK; i++) {
        k[i] = level_of(bits, block, i);
    }
}

typedef struct {
    float p[8];
} dot_sums;

static dot_sums dot_zero(void) {
    const dot_sums zero = { { 0 } };
    return zero;
}

static float dot_total(dot_sums sums) {
    for (int h = 4; h > 0; h /= 2) {
        for (int l = 0; l < h; l++) {
            sums.p[l] += sums.p[l + h];
        }
    }
    return sums.p[0];
}

static dot_sums dot(int bits, const void * block, const block_tbq8_act * a, float f, dot_sums sums) {
    for (int l = 0; l < 8; l++) {
        int32_t p = 0; // equals bias[l] + the sum of (k + 64) q
        for (int i = 4 * l; i < 4 * l + 4; i++) {
            p += level_of(bits, block, i) * a->qs[i] + level_of(bits, block, i + 32) * a->qs[i + 32];
        }
        sums.p[l] += f * (float) p;
    }
    return sums;
}

static void mad(int bits, const void * block, float f, float * acc) {
    for (int i = 0; i < TBQ_BLOCK; i++) {
        acc[i] += f * (float) level_of(bits, block, i);
    }
}

#include "rows.inc"
