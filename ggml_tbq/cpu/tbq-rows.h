// SPDX-License-Identifier: MIT
// Rows, block by block, from the pieces that each instruction set defines; included once, at the end of each
// implementation file.  Here are the steps that every implementation must take in the same way.
//
// The file that includes this defines TBQ_KERNELS (the symbol), TBQ_KERNELS_NAME, TBQ_ATTENTION and
// TBQ_SCAN_KERNELS (the symbols of its attention and search kernels), and, on one block:
//
//   int supported(void)                                   does this machine run it?
//   float half_to_float(uint16_t h)
//   uint32_t abs_max(const float * x)                     the largest of bits(|x[i]|); NaN > Inf > the rest
//   void forward(const float * x, float post, float * y)  y = post . H . diag(s) . x
//   void inverse(const float * y, float post, float * x)  x = diag(s) . (post . H . y); x may be y, as above
//       both by butterflies (a + b, a - b) at distances 1, 2, 4, 8, 16, 32, in this order
//   float sum_squares(const float * z)                    16 partial sums, i % 16, each in order of i; then those
//                                                         8, 4, 2 and 1 apart are added
//   coords, coords to_fixed(const float * z, float inverse_rms)
//                                                         q = (int16_t) (int) (|z| . inverse_rms + 0.5) and z < 0
//   void score(int bits, coords c, const int16_t * thresholds, int32_t * qk, int32_t * kk)
//                                                         sums of q k and k k, k the level of the positive half
//                                                         that q falls on (above a threshold: the next)
//   void assign(int bits, coords c, const int16_t * thresholds, uint8_t * index)
//                                                         the number of that level, or of its negative where z < 0
//   void values(int bits, const uint8_t * index, float * k)
//                                                         the levels of 64 indices
//   void transform(float * v)                             v = H . v
//   int32_t descend(int bits, const float * m, const float * g, float d, uint8_t * index)
//                                                         see shape(); returns the sum of k k
//   void act_round(const float * y, float inverse_d, int8_t * qs, int32_t * bias)
//                                                         qs = sign(y) . (int) (|y| . inverse_d + 0.5)
//   void levels(int bits, const void * block, float * k)  k[idx] as floats
//   dot_sums, dot_zero(), dot_total(dot_sums)             eight partial sums; those 4, 2 and 1 apart are added
//   dot_sums dot(int bits, const void * block, const block_tbq8_act * a, float f, dot_sums sums)
//                                                         sums[l] + f . (float) partial sum l of block_tbq8_act
//   void mad(int bits, const void * block, float f, float * acc)
//                                                         acc += f . k[idx]: a multiplication and an addition

// Thresholds on abs_max: floats that are not negative order as their bits.
#define ABS_BITS_INF   0x7F800000u
#define ABS_BITS_2P50  0x58800000u
#define ABS_BITS_2M30  0x30800000u
#define ABS_BITS_2M100 0x0D800000u

TBQ_INLINE void write_indices(int bits, const uint8_t * index, void * block) {
    uint8_t * qs = (uint8_t *) tbq_qs(block);
    if (bits == 4) {
        for (int i = 0; i < 32; i++) {
            qs[i] = (uint8_t) (index[i] | index[i + 32] << 4);
        }
        return;
    }
    for (int i = 0; i < 16; i++) {
        qs[i] = (uint8_t) ((index[i] & 3) | (index[i + 16] & 3) << 2 | (index[i + 32] & 3) << 4 | (index[i + 48] & 3) << 6);
    }
    if (bits == 3) {
        uint8_t * qh = (uint8_t *) tbq_qh(block);
        for (int i = 0; i < 8; i++) {
            int byte = 0;
            for (int j = 0; j < 4; j++) {
                byte |= (index[16 * j + i] >> 2 | index[16 * j + 8 + i] >> 2 << 2) << ((j & 1) | (j >> 1) << 2);
            }
            qh[i] = (uint8_t) byte;
        }
    }
}

// The scale of the grid whose index vector has the largest cosine to q, which is qk / sqrt(kk) up to a constant.
// Compared without division: qk < 8.2e6 and kk < 2.5e5, so the products fit 64 bits.
TBQ_INLINE int search_scale(int bits, coords c, int32_t * best_qk, int32_t * best_kk) {
    uint64_t best = 0, qk_best = 0, kk_best = 1;
    for (int s = 0; s < tbq_n_scales(bits); s++) {
        int32_t qk_s, kk_s;
        score(bits, c, tbq_thresholds(bits, s), &qk_s, &kk_s);
        const uint64_t qk = (uint32_t) qk_s, kk = (uint32_t) kk_s;
        // masks, because a branch would be mispredicted every other time
        const uint64_t better = 0 - (uint64_t) (qk * qk * kk_best > qk_best * qk_best * kk);
        best ^= (best ^ (uint64_t) s) & better;
        qk_best ^= (qk_best ^ qk) & better;
        kk_best ^= (kk_best ^ kk) & better;
    }
    *best_qk = (int32_t) qk_best;
    *best_kk = (int32_t) kk_best;
    return (int) best;
}

// Plain: d by least squares, <y, k> / <k, k>, the least error.  For keys and values: d that preserves the norm,
// d . |k| = |y| = 8 rms, which costs a little error and less divergence (docs/encoder.md).
TBQ_INLINE float least_squares_scale(float rms, int32_t qk, int32_t kk) {
    return rms * ((float) qk / ((float) kk * (float) TBQ_Q_ONE));
}

TBQ_INLINE float norm_scale(float rms, int32_t kk) {
    return rms * 8.0f / sqrtf((float) kk);
}

// Noise shaping: the nearest levels make the error small, but spread it evenly over the channels.  What a model does
// with a key or a value, though, goes mostly through the channels that are large: error there costs more.  So a few
// levels are moved to a neighbour to make the sum of w e^2 over the channels small, e the error of x and
//
//     w[c] = sqrt((x[c]^2 + x[c ^ 1]^2) / 2 / mean square) + 1/2.
//
// Two neighbours share their weight because a rotary embedding moves energy between them: what a query finds in one
// channel, the key may hold in the other.
//
// With e = y - d k in the rotated domain the sum is e . M e, M[i][j] = m[i ^ j], m = H w / 64: Walsh functions
// multiply to Walsh functions, and the signs cancel.  g = M e is its slope.  Moving k[j] by a gap changes the sum by
// -2 (d gap) |g[j]| + (d gap)^2 m[0] in the direction of g[j], and g[i] by -(d gap) m[i ^ j].  Since w has equal
// neighbours, m is exactly 0 at odd places: even and odd coordinates do not interact, and descend() makes the best
// move of each in every step, the first of equals, as long as one gains.
//
// docs/encoder.md: 29 to 37 % less KL divergence on one model, 0 to 3 % on another.  For keys and values only: in
// weights, size says nothing of importance, and perplexity rises.
//
// weight: w as it was measured on the queries (docs/center.md), with equal neighbours too, or NULL: the above.
// Returns the sum of k k.
TBQ_INLINE int32_t shape(int bits, const float * x, const float * weight, const float * z, float inverse_rms, float mean_square,
                         float d, uint8_t * index) {
    float       w[TBQ_BLOCK], m[TBQ_BLOCK], g[TBQ_BLOCK], k[TBQ_BLOCK];
    const float scale = 0.5f / mean_square;
    if (weight) {
        memcpy(w, weight, sizeof(w));
    } else {
        for (int i = 0; i < TBQ_BLOCK; i += 2) {
            w[i] = w[i + 1] = sqrtf((x[i] * x[i] + x[i + 1] * x[i + 1]) * scale) + TBQ_SHAPE_FLOOR;
        }
    }
    memcpy(m, w, sizeof(m));
    transform(m);
    values(bits, index, k);
    for (int i = 0; i < TBQ_BLOCK; i++) {
        m[i] *= 1.0f / TBQ_BLOCK;
        g[i] = z[i] * inverse_rms - d * k[i];
    }
    transform(g);
    for (int i = 0; i < TBQ_BLOCK; i++) {
        g[i] *= w[i];
    }
    transform(g);
    for (int i = 0; i < TBQ_BLOCK; i++) {
        g[i] *= 1.0f / TBQ_BLOCK;
    }
    return descend(bits, m, g, d, index);
}

TBQ_INLINE void quantize_block(int bits, int kv, const float * x, const float * weight, void * block) {
    float   z[TBQ_BLOCK];
    uint8_t index[TBQ_BLOCK];
    int32_t qk, kk;

    const uint32_t top = abs_max(x);
    if (top < ABS_BITS_2M30 || top >= ABS_BITS_INF) {
        // below 2^-30 the best d is less than half of the smallest half
        memset(block, 0, tbq_block_bytes(bits));
        tbq_store_d(block, top < ABS_BITS_INF ? 0 : TBQ_F16_NAN);
        return;
    }
    // above 2^50 d saturates whatever the values are, but their squares must not overflow
    const int huge = top > ABS_BITS_2P50;
    if (huge) {
        for (int i = 0; i < TBQ_BLOCK; i++) {
            z[i] = x[i] * 0x1p-100f;
        }
    }
    forward(huge ? z : x, 1.0f, z);
    const float  rms     = sqrtf(sum_squares(z) / TBQ_BLOCK);
    const float  inverse = TBQ_Q_ONE / rms;
    const coords c       = to_fixed(z, inverse);
    const int    best    = search_scale(bits, c, &qk, &kk);
    assign(bits, c, tbq_thresholds(bits, best), index);
    if (kv && !huge) {
        kk = shape(bits, x, weight, z, inverse, rms * rms * (1.0f / TBQ_BLOCK), (float) qk / (float) kk, index);
    }
    write_indices(bits, index, block);

    const float unit = rms * 0.125f;
    const float d    = (kv ? norm_scale(unit, kk) : least_squares_scale(unit, qk, kk)) * (huge ? 0x1p100f : 1.0f);
    tbq_store_d(block, tbq_float_to_half(d < TBQ_F16_MAX ? d : TBQ_F16_MAX));
}

TBQ_INLINE void quantize_row(int bits, int kv, const float * src, const float * mean, const float * weight, void * dst, int64_t n) {
    uint8_t * block = (uint8_t *) dst;
    for (int64_t i = 0; i < n; i += TBQ_BLOCK, block += tbq_block_bytes(bits)) {
        float         centered[TBQ_BLOCK];
        const float * x = src + i;
        if (mean) {
            for (int j = 0; j < TBQ_BLOCK; j++) {
                centered[j] = x[j] - mean[i + j];
            }
            x = centered;
        }
        quantize_block(bits, kv, x, weight ? weight + i : NULL, block);
    }
}

TBQ_INLINE void dequantize_row(int bits, const void * src, float * dst, int64_t n) {
    const uint8_t * block = (const uint8_t *) src;
    for (int64_t i = 0; i < n; i += TBQ_BLOCK, block += tbq_block_bytes(bits)) {
        float       k[TBQ_BLOCK];
        const float d = half_to_float(tbq_load_d(block));
        if (d == 0) {
            memset(dst + i, 0, sizeof(k)); // 0 . k would leave some -0
            continue;
        }
        levels(bits, block, k);
        inverse(k, d * 0.125f, dst + i); // the sums of integers are exact: one rounding, in the product with d
    }
}

TBQ_INLINE float dot_row(int bits, const void * row, const void * act, int64_t n) {
    const uint8_t *        x    = (const uint8_t *) row;
    const block_tbq8_act * y    = (const block_tbq8_act *) act;
    dot_sums               sums = dot_zero();
    for (int64_t i = 0; i < n; i += TBQ_BLOCK, x += tbq_block_bytes(bits), y++) {
        float d;
        memcpy(&d, &y->d, sizeof(d));
        sums = dot(bits, x, y, half_to_float(tbq_load_d(x)) * d, sums);
    }
    return dot_total(sums);
}

TBQ_INLINE void mad_row(int bits, const void * src, float scale, float * acc, int64_t n) {
    const uint8_t * block = (const uint8_t *) src;
    for (int64_t i = 0; i < n; i += TBQ_BLOCK, block += tbq_block_bytes(bits)) {
        mad(bits, block, scale * half_to_float(tbq_load_d(block)), acc + i);
    }
}

static void quantize_act(const float * src, void * dst, int64_t n) {
    uint8_t * block = (uint8_t *) dst;
    for (int64_t i = 0; i < n; i += TBQ_BLOCK, block += sizeof(block_tbq8_act)) {
        block_tbq8_act b;
        float          y[TBQ_BLOCK];
        forward(src + i, 0.125f, y);
        const uint32_t top = abs_max(y);
        if (top < ABS_BITS_2M100 || top >= ABS_BITS_INF) { // 127 / 2^-100 is still finite
            memset(&b, 0, sizeof(b));
            b.d = top < ABS_BITS_INF ? 0.0f : tbq_bits_float(0x7FC00000);
        } else {
            b.d = tbq_bits_float(top) / 127.0f;
            act_round(y, 127.0f / tbq_bits_float(top), b.qs, b.bias);
        }
        memcpy(block, &b, sizeof(b));
    }
}

static void rotate(const float * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += TBQ_BLOCK) {
        forward(src + i, 0.125f, dst + i);
    }
}

static void unrotate(const float * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += TBQ_BLOCK) {
        inverse(src + i, 0.125f, dst + i);
    }
}

#define DEFINE_ROWS(B)                                                                \
    static void quantize_##B(const float * src, void * dst, int64_t n) {              \
        quantize_row(B, 0, src, NULL, NULL, dst, n);                                  \
    }                                                                                 \
    static void quantize_kv_##B(const float * src, const float * mean,                \
                                const float * weight, void * dst, int64_t n) {        \
        quantize_row(B, 1, src, mean, weight, dst, n);                                \
    }                                                                                 \
    static void dequantize_##B(const void * src, float * dst, int64_t n) {            \
        dequantize_row(B, src, dst, n);                                               \
    }                                                                                 \
    static float dot_##B(const void * row, const void * act, int64_t n) {             \
        return dot_row(B, row, act, n);                                               \
    }                                                                                 \
    static void mad_##B(const void * src, float scale, float * acc, int64_t n) {      \
        mad_row(B, src, scale, acc, n);                                               \
    }

DEFINE_ROWS(2)
DEFINE_ROWS(3)
DEFINE_ROWS(4)

const tbq_kernels TBQ_KERNELS = {
    .name         = TBQ_KERNELS_NAME,
    .supported    = supported,
    .quantize     = { quantize_2, quantize_3, quantize_4 },
    .quantize_kv  = { quantize_kv_2, quantize_kv_3, quantize_kv_4 },
    .dequantize   = { dequantize_2, dequantize_3, dequantize_4 },
    .quantize_act = quantize_act,
    .dot          = { dot_2, dot_3, dot_4 },
    .mad_rotated  = { mad_2, mad_3, mad_4 },
    .rotate       = rotate,
    .unrotate     = unrotate,
    .attention    = &TBQ_ATTENTION,
    .scan         = &TBQ_SCAN_KERNELS,
};
