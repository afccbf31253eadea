// SPDX-License-Identifier: MIT
// Attention, the scalar reference.
#include "attention.h"

#include <math.h>

#define TBQ_ATTENTION tbq_attention_ref

typedef struct {
    float f[16];
} lanes;

#define FOR_LANES for (int l = 0; l < 16; l++)

static inline lanes lanes_load(const float * p) {
    lanes r;
    memcpy(r.f, p, sizeof(r.f));
    return r;
}

static inline void lanes_store(float * p, lanes a) {
    memcpy(p, a.f, sizeof(a.f));
}

static inline lanes lanes_set(float x) {
    lanes r;
    FOR_LANES r.f[l] = x;
    return r;
}

#define DEFINE(name, expression)                         \
    static inline lanes lanes_##name(lanes a, lanes b) { \
        lanes r;                                         \
        FOR_LANES r.f[l] = expression;                   \
        return r;                                        \
    }
DEFINE(add, a.f[l] + b.f[l])
DEFINE(sub, a.f[l] - b.f[l])
DEFINE(mul, a.f[l] * b.f[l])
DEFINE(div, a.f[l] / b.f[l])
DEFINE(max, a.f[l] > b.f[l] ? a.f[l] : b.f[l])
#undef DEFINE

static inline lanes lanes_abs(lanes a) {
    FOR_LANES a.f[l] = fabsf(a.f[l]);
    return a;
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c) {
    FOR_LANES c.f[l] = fmaf(a.f[l], b.f[l], c.f[l]);
    return c;
}

static inline lanes lanes_halves(const uint16_t * h) {
    lanes r;
    FOR_LANES r.f[l] = tbq_half_to_float(h[l]);
    return r;
}

static inline lanes lanes_bytes(const int8_t * b) {
    lanes r;
    FOR_LANES r.f[l] = b[l];
    return r;
}

static inline lanes lanes_power(lanes n) {
    FOR_LANES n.f[l] = tbq_bits_float((uint32_t) ((int) n.f[l] + 127) << 23);
    return n;
}

static inline lanes lanes_pick(lanes x, lanes limit, lanes a, lanes b) {
    FOR_LANES b.f[l] = x.f[l] > limit.f[l] ? a.f[l] : b.f[l];
    return b;
}

static inline unsigned lanes_unbounded(lanes x) {
    unsigned r = 0;
    FOR_LANES r |= (unsigned) !(x.f[l] < INFINITY) << l;
    return r;
}

static inline float lanes_sum(lanes x) {
    for (int h = 8; h > 0; h /= 2) {
        for (int l = 0; l < h; l++) {
            x.f[l] += x.f[l + h];
        }
    }
    return x.f[0];
}

static inline float lanes_reduce_max(lanes x) {
    float largest     = x.f[0];
    FOR_LANES largest = x.f[l] > largest ? x.f[l] : largest;
    return largest;
}

// A panel holds the levels of 64 rows one after another.
static void unpack(int bits, const uint8_t * block, size_t stride, int n, uint8_t * panel) {
    for (int r = 0; r < n; r++) {
        for (int e = 0; e < TBQ_BLOCK; e++) {
            const uint8_t * b = block + (size_t) r * stride;
            panel[r * TBQ_BLOCK + e] =
                bits == 8 ? tbq_exact_qs(b)[e] : (uint8_t) tbq_codebook(bits)[tbq_index_of(bits, b, e)];
        }
    }
    memset(panel + n * TBQ_BLOCK, 0, (size_t) (TBQ_TILE - n) * TBQ_BLOCK);
}

static void unpack_keys(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * qh, uint8_t * panel) {
    (void) qh;
    unpack(bits, block, stride, n, panel);
}

static void unpack_values(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * qh, uint8_t * panel) {
    (void) qh;
    unpack(bits, block, stride, n, panel);
}

static void keys_n(int bits, int n, const uint8_t * panel, const float * scales, const query_block * q,
                   int64_t q_stride, int add, float * logits) {
    (void) bits;
    const int8_t * k = (const int8_t *) panel;
    for (int i = 0; i < n; i++, q += q_stride, logits += TBQ_TILE) {
        for (int r = 0; r < TBQ_TILE; r++) {
            int32_t sum = 0;
            for (int e = 0; e < TBQ_BLOCK; e++) {
                sum += k[r * TBQ_BLOCK + e] * q->qs[e];
            }
            logits[r] = fmaf(scales[r] * (float) sum, q->d, add ? logits[r] : 0.0f);
        }
    }
}

static void round_weights(const lanes x[4], int16_t * rounded, int32_t * sum) {
    *sum = 0;
    for (int r = 0; r < TBQ_TILE; r++) {
        rounded[r] = (int16_t) lrintf(x[r / 16].f[r % 16]);
        *sum += rounded[r];
    }
}

#define VALUES_AT_ONCE 4

static void values_n(int bits, int n, const uint8_t * panel, const int16_t * weights, const int32_t * weight_sums,
                     const float * rescale, const float * factor, float * sum, int64_t sum_stride) {
    const int8_t * v = (const int8_t *) panel;
    (void) bits, (void) weight_sums;
    for (int i = 0; i < n; i++, weights += TBQ_TILE, sum += sum_stride) {
        for (int c = 0; c < TBQ_BLOCK; c++) {
            int32_t product = 0;
            for (int r = 0; r < TBQ_TILE; r++) {
                product += weights[r] * v[r * TBQ_BLOCK + c];
            }
            sum[c] = fmaf((float) product, factor[i], rescale[i] * sum[c]);
        }
    }
}

#include "tile.inc"
