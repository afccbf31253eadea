// SPDX-License-Identifier: MIT
// One item of attention, tile by tile, from the pieces that each instruction set defines; included once, at the end
// of each tbq-attention-<isa>.c.
//
// What is where, and why:
//
//   - Unpacked keys have rows along vector lanes, four values of a row in each 32-bit lane.  A product with four
//     values of a query, broadcast, then adds to one logit per lane: no sum across lanes, and the scale d of each
//     row's block is a lane too.
//   - Unpacked values have channels along lanes, with two or four adjacent rows interleaved, as the multiply-add
//     instruction wants them.  Weights are broadcast.
//   - Everything is unpacked a block of 64 channels at a time, into TBQ_PANEL bytes that stay in the first-level
//     cache, and used for every query row of the tile at once: one code path for decode and prefill.
//   - Weights are relative to the maximum of their tile, not of all rows so far: otherwise 15 bits would round the
//     long flat tail away whenever one row (the first, often) holds most of the weight.
//   - The order of every sum of floats is fixed: lane l of 16 sums up elements l, l + 16, ... in order, then lanes
//     8, 4, 2 and 1 apart are added; tiles and chunks in order.  All else is integers.
//
// The file that includes this defines TBQ_ATTENTION (the symbol) and
//
//   lanes                                     16 floats, with lanes_load, lanes_store, lanes_set (all the same),
//                                             lanes_add, lanes_sub, lanes_mul, lanes_div, lanes_max (anything if one is
//                                             NaN), lanes_abs, lanes_fma(a, b, c) = a b + c, rounded once
//   lanes lanes_halves(const uint16_t * h)    16 IEEE halves
//   lanes lanes_bytes(const int8_t * b)       16 integers
//   lanes lanes_power(lanes n)                2^n for integers -126 .. 127
//   lanes lanes_pick(lanes x, lanes limit, lanes a, lanes b)
//                                             a where x > limit (false for NaN), else b
//   unsigned lanes_unbounded(lanes x)         not 0 if a lane is NaN or +Inf
//   float lanes_sum(lanes x), lanes_top(lanes x)
//
//   void unpack_keys(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * third, uint8_t * panel)
//       the blocks of n rows; of rows n .. 63 anything
//   void unpack_values(...)                   the same for values; of rows n .. 63 anything too
//   void keys_n(int n, const uint8_t * panel, const float * scales, const query_block * q, int64_t q_stride, int add,
//               float * logits)
//       for n queries, a constant up to KEYS_AT_ONCE: logits[i][r] = (add ? logits[i][r] : 0) +
//       q_i.d . (scales[r] . (float) sum), rounded at each step but the last product and sum, which are one fma
//   void round_weights(const lanes x[4], int16_t * rounded, int32_t * sum)
//       x to nearest integers, 64 of them, in whatever form values_n wants, and their sum if it wants that
//   void values_n(int n, const uint8_t * panel, const int16_t * weights, const int32_t * weight_sums,
//                 const float * decay, const float * factor, float * sum, int64_t sum_stride)
//       for n queries, a constant up to VALUES_AT_ONCE (2 or 4; as many as the registers hold): sum[i][c] =
//       fma((float) sum of w v, factor[i], decay[i] . sum[i][c])
#include <math.h>

typedef struct {
    const tbq_attention_plan * p;
    const tbq_kernels *        k;
    attention_scratch          s;
    int64_t                    stream, chunk;
    int64_t                    head;      // first KV head,
    int64_t                    n_heads;   // and how many
    int64_t                    first;     // query row of a KV head: token . group + head in group
    int64_t                    n_rows;
    int64_t                    group;     // query heads of one KV head
} attention_item;

// e^x for -87 <= x <= 88; 0 below; anything for NaN.  x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 g(r), g the cubic with the
// smallest relative error of e^r (1.05e-7; weighted least squares, reweighted to equal ripple, on 4001 Chebyshev
// points).  ln 2 in two parts (fma keeps n LN2_HI exact enough).
static inline lanes lanes_exp(lanes x) {
    const lanes round = lanes_set(0x1.8p23f); // x + round is an integer in the low bits of the fraction
    const lanes low   = lanes_set(-87.0f);
    const lanes y     = lanes_max(x, low);
    const lanes n     = lanes_sub(lanes_fma(y, lanes_set(0x1.715476p+0f), round), round);
    lanes       r     = lanes_fma(n, lanes_set(-0x1.62e43p-1f), y);
    r = lanes_fma(n, lanes_set(0x1.05c61p-29f), r);
    lanes g = lanes_fma(lanes_set(0x1.10627ap-7f), r, lanes_set(0x1.572a08p-5f));
    g = lanes_fma(g, r, lanes_set(0x1.5557aep-3f));
    g = lanes_fma(g, r, lanes_set(0x1.fffdfcp-2f));
    const lanes e = lanes_fma(lanes_mul(r, r), g, lanes_add(r, lanes_set(1.0f)));
    return lanes_pick(low, x, lanes_set(0.0f), lanes_mul(e, lanes_power(n)));
}

static inline float exp_1(float x) {
    float v[16];
    lanes_store(v, lanes_exp(lanes_set(x)));
    return v[0];
}

// c tanh(x / c) = c (1 - 2 / (e^(2 x / c) + 1)); off by c 1e-7 where x is small, which a logit does not feel.
// x - x keeps NaN, and makes it of Inf.
static inline lanes soft_cap(lanes x, float c) {
    const lanes top = lanes_set(30.0f); // tanh(15) is 1 in a float
    lanes       y   = lanes_mul(x, lanes_set(2.0f / c));
    y = lanes_pick(y, top, top, y);
    const lanes one = lanes_set(1.0f);
    const lanes t   = lanes_sub(one, lanes_div(lanes_set(2.0f), lanes_add(lanes_exp(y), one)));
    return lanes_fma(lanes_set(c), t, lanes_sub(x, x));
}

// --- queries ----------------------------------------------------------------------------------------------------

static inline int64_t token_of(const attention_item * it, int64_t row) {
    return (it->first + row) / it->group;
}

static inline int64_t head_of(const attention_item * it, int64_t kv_head, int64_t row) {
    return kv_head * it->group + (it->first + row) % it->group;
}

// Slopes of attention with linear biases (Press, Smith, Lewis 2022), as ggml numbers heads.
static inline float slope_of(const tbq_attention * a, int64_t head) {
    if (!(a->max_bias > 0.0f)) {
        return 1.0f;
    }
    int64_t power = 1;
    while (2 * power <= a->n_head) {
        power *= 2;
    }
    return head < power ? powf(powf(2.0f, -a->max_bias / (float) power), (float) (head + 1))
                        : powf(powf(2.0f, -a->max_bias / 2.0f / (float) power), (float) (2 * (head - power) + 1));
}

static inline void prepare_query(const attention_item * it, const float * q, int64_t row) {
    const tbq_attention * a = &it->p->a;
    if (!is_tbq(a->k.type)) {
        float * dst = it->s.queries_f32 + row * a->k_size;
        for (int64_t i = 0; i < a->k_size; i += 16) {
            lanes_store(dst + i, lanes_mul(lanes_load(q + i), lanes_set(a->scale)));
        }
        return;
    }
    query_block * dst = it->s.queries + row * (a->k_size / TBQ_BLOCK);
    for (int64_t i = 0; i < a->k_size; i += TBQ_BLOCK, dst++) {
        block_tbq8_act b;
        it->k->quantize_act(q + i, &b, TBQ_BLOCK);
        dst->d    = b.d * a->scale;
        dst->bias = 0;
        for (int l = 0; l < 8; l++) {
            dst->bias += b.bias[l];
        }
        memcpy(dst->qs, b.qs, sizeof(dst->qs));
    }
}

static void prepare_queries(const attention_item * it) {
    const tbq_attention * a = &it->p->a;
    for (int64_t h = 0; h < it->n_heads; h++) {
        for (int64_t r = 0; r < it->n_rows; r++) {
            const int64_t head = head_of(it, it->head + h, r);
            const char *  q    = (const char *) a->q + it->stream * a->q_stream_stride + head * a->q_head_stride +
                             token_of(it, r) * a->q_token_stride;
            const int64_t row = h * it->p->tile_rows + r;
            prepare_query(it, (const float *) q, row);
            it->s.slope[row] = slope_of(a, head);
        }
    }
}

// --- the tile's mask --------------------------------------------------------------------------------------------

enum { HIDDEN, PLAIN, MASKED }; // nothing seen; all seen and nothing to add; see the mask

static inline uint8_t mask_row(const uint16_t * src, int n, float * dst) {
    float mask[TBQ_TILE]; // a tail without a mask is a mask
    if (src && n == TBQ_TILE) {
        for (int i = 0; i < TBQ_TILE; i += 16) {
            lanes_store(dst + i, lanes_halves(src + i));
        }
    } else {
        for (int i = 0; i < TBQ_TILE; i++) {
            mask[i] = i >= n ? -INFINITY : src ? tbq_half_to_float(src[i]) : 0.0f;
        }
        memcpy(dst, mask, sizeof(mask));
    }
    lanes top = lanes_load(dst), size = lanes_abs(top);
    for (int i = 16; i < TBQ_TILE; i += 16) {
        const lanes x = lanes_load(dst + i);
        top  = lanes_max(top, x);
        size = lanes_max(size, lanes_abs(x));
    }
    return lanes_top(top) == -INFINITY ? HIDDEN : lanes_top(size) == 0.0f ? PLAIN : MASKED;
}

// Fills in mask and mask_kind for the query rows of a KV head.  Narrows [*from, *to) to those that see anything.
static void tile_mask(const attention_item * it, int64_t kv_head, int64_t at, int n, int * from, int * to) {
    const tbq_attention * a    = &it->p->a;
    int                   seen = 0;
    *from = *to = 0;
    for (int r = 0; r < it->n_rows; r++) {
        const int64_t head  = head_of(it, kv_head, r);
        const int64_t token = token_of(it, r);
        float *       dst   = it->s.mask + r * TBQ_TILE;
        if (r > 0 && token == token_of(it, r - 1) && (!a->mask || a->mask_n_heads == 1)) {
            it->s.mask_kind[r] = it->s.mask_kind[r - 1];
            if (it->s.mask_kind[r] == MASKED) {
                memcpy(dst, dst - TBQ_TILE, TBQ_TILE * sizeof(float));
            }
        } else if (!a->mask) {
            it->s.mask_kind[r] = n == TBQ_TILE ? PLAIN : mask_row(NULL, n, dst);
        } else {
            const char * src = (const char *) a->mask + (it->stream % a->mask_n_streams) * a->mask_stream_stride +
                               (head % a->mask_n_heads) * a->mask_head_stride + token * a->mask_token_stride;
            it->s.mask_kind[r] = mask_row((const uint16_t *) src + at, n, dst);
        }
        if (it->s.mask_kind[r] != HIDDEN) {
            *from = seen ? *from : r;
            *to   = r + 1;
            seen  = 1;
        }
    }
}

// --- logits -----------------------------------------------------------------------------------------------------

// Rows of one KV head from cached row `at` on.
static inline const uint8_t * side_rows(const attention_item * it, const tbq_attention_side * side, int64_t kv_head, int64_t at) {
    const int64_t stream = it->stream / (it->p->a.n_streams / side->n_streams);
    return (const uint8_t *) side->data + stream * side->stream_stride + kv_head * side->head_stride + at * side->row_stride;
}

// The scales of a block in n rows as floats, and, at 3 bits, the third bits in one place for vectors to load.
// The same place in the next tile is asked for ahead: hardware does not see this stride as a stream.
TBQ_INLINE void load_scales(int bits, const uint8_t * block, size_t stride, int n, float * scales, uint64_t * third) {
    uint16_t d[TBQ_TILE];
    for (int r = 0; r < n; r++, block += stride) {
        d[r] = tbq_load_d(block);
        if (bits == 3) {
            memcpy(third + r, tbq_qh(block), sizeof(*third));
        }
        TBQ_PREFETCH(block + TBQ_TILE * stride);
    }
    for (int r = n; r < TBQ_TILE; r++) {
        d[r]     = 0;
        third[r] = 0;
    }
    for (int r = 0; r < TBQ_TILE; r += 16) {
        lanes_store(scales + r, lanes_halves(d + r));
    }
}

// A whole tile, nearly always, in code that knows its length: no row pointer is compared with the end.
#define FOR_LENGTH(n, call)       \
    if ((n) == TBQ_TILE) {        \
        enum { length = TBQ_TILE }; \
        call;                     \
    } else {                      \
        const int length = (n);   \
        call;                     \
    }

static void multiply_keys(const uint8_t * panel, const float * scales, const query_block * q, int64_t q_stride, int n_q,
                          int add, float * logits) {
    int i = 0;
    for (; i + 4 <= n_q; i += 4) {
        keys_n(4, panel, scales, q + i * q_stride, q_stride, add, logits + i * TBQ_TILE);
    }
    if (i + 2 <= n_q) {
        keys_n(2, panel, scales, q + i * q_stride, q_stride, add, logits + i * TBQ_TILE);
        i += 2;
    }
    if (i < n_q) {
        keys_n(1, panel, scales, q + i * q_stride, q_stride, add, logits + i * TBQ_TILE);
    }
}

TBQ_INLINE void tbq_logits(int bits, const attention_item * it, int h, const uint8_t * rows, int n, int from, int to) {
    const int64_t n_blocks = it->p->a.k_size / TBQ_BLOCK;
    const size_t  stride   = it->p->a.k.row_stride;
    for (int64_t b = 0; b < n_blocks; b++, rows += tbq_block_bytes(bits)) {
        load_scales(bits, rows, stride, n, it->s.scales, it->s.third);
        FOR_LENGTH(n, unpack_keys(bits, rows, stride, length, it->s.third, it->s.panel));
        multiply_keys(it->s.panel, it->s.scales, it->s.queries + (h * it->p->tile_rows + from) * n_blocks + b, n_blocks,
                      to - from, b > 0, it->s.logits + from * TBQ_TILE);
    }
}

// A row of f16 or q8_0 as floats.
static inline void row_to_floats(int type, const uint8_t * src, int64_t size, float * dst) {
    if (type == TBQ_ATTENTION_F16) {
        for (int64_t i = 0; i < size; i += 16) {
            uint16_t h[16];
            memcpy(h, src + 2 * i, sizeof(h));
            lanes_store(dst + i, lanes_halves(h));
        }
        return;
    }
    for (int64_t i = 0; i < size; i += 32, src += 34) { // ggml's block_q8_0: a half, then 32 bytes
        const lanes d = lanes_set(tbq_half_to_float(tbq_load_d(src)));
        int8_t      q[32];
        memcpy(q, src + 2, sizeof(q));
        lanes_store(dst + i, lanes_mul(d, lanes_bytes(q)));
        lanes_store(dst + i + 16, lanes_mul(d, lanes_bytes(q + 16)));
    }
}

static inline void rows_to_floats(const attention_item * it, const tbq_attention_side * side, const uint8_t * rows, int n,
                                  int64_t size) {
    for (int r = 0; r < n; r++) {
        row_to_floats(side->type, rows + (size_t) r * side->row_stride, size, (float *) it->s.panel + r * size);
    }
}

static void f32_logits(const attention_item * it, int h, int n, int from, int to) {
    const int64_t size = it->p->a.k_size;
    for (int i = from; i < to; i++) {
        const float * q = it->s.queries_f32 + (h * it->p->tile_rows + i) * size;
        float *       s = it->s.logits + i * TBQ_TILE;
        for (int r = 0; r < n; r++) {
            const float * key = (const float *) it->s.panel + r * size;
            lanes         sum = lanes_set(0.0f);
            for (int64_t c = 0; c < size; c += 16) {
                sum = lanes_fma(lanes_load(q + c), lanes_load(key + c), sum);
            }
            s[r] = lanes_sum(sum);
        }
        for (int r = n; r < TBQ_TILE; r++) {
            s[r] = 0.0f;
        }
    }
}

// --- softmax ----------------------------------------------------------------------------------------------------

// Soft-cap and mask; the largest logit, or NaN if one is NaN or +Inf.
static inline float finish_logits(const attention_item * it, int row, int i) {
    const float cap = it->p->a.logit_softcap;
    float *     s   = it->s.logits + i * TBQ_TILE;
    lanes       top = lanes_set(-INFINITY);
    unsigned    bad = 0;
    if (it->s.mask_kind[i] == HIDDEN) {
        return -INFINITY;
    }
    for (int r = 0; r < TBQ_TILE; r += 16) {
        lanes x = lanes_load(s + r);
        if (cap != 0.0f) {
            x = soft_cap(x, cap);
        }
        if (it->s.mask_kind[i] == MASKED) {
            const lanes none = lanes_set(-INFINITY);
            const lanes mask = lanes_load(it->s.mask + i * TBQ_TILE + r);
            x = lanes_pick(mask, none, lanes_fma(lanes_set(it->s.slope[row]), mask, x), none);
        }
        bad |= lanes_unbounded(x);
        top = lanes_max(top, x);
        lanes_store(s + r, x);
    }
    return bad ? NAN : lanes_top(top);
}

// Logits become weights exp(logit - the tile's largest).  decay and gain bring them and what was before to the
// larger of the two maxima.
static void softmax(const attention_item * it, int h, int from, int to) {
    attention_scratch s   = it->s;
    const int64_t     row = h * it->p->tile_rows;
    for (int i = from; i < to; i++) {
        const float top  = finish_logits(it, (int) (row + i), i);
        const float old  = s.top[row + i];
        s.gain[i]  = top;
        s.decay[i] = top > -INFINITY && old > -INFINITY ? -fabsf(top - old) : -INFINITY;
    }
    for (int i = from; i < to; i += 16) { // decay has room for 15 more
        lanes_store(s.decay + i, lanes_exp(lanes_load(s.decay + i)));
    }
    for (int i = from; i < to; i++) {
        const float top  = s.gain[i];
        float *     w    = s.logits + i * TBQ_TILE;
        if (!(top > -INFINITY)) {
            s.total[row + i] += top < INFINITY ? 0.0f : NAN;
            s.decay[i] = 1.0f;
            s.gain[i]  = 0.0f;
            memset(w, 0, TBQ_TILE * sizeof(float));
            continue;
        }
        lanes sum = lanes_set(0.0f);
        for (int r = 0; r < TBQ_TILE; r += 16) {
            const lanes x = lanes_exp(lanes_sub(lanes_load(w + r), lanes_set(top)));
            lanes_store(w + r, x);
            sum = lanes_add(sum, x);
        }
        s.gain[i] = 1.0f;
        if (top > s.top[row + i]) {
            s.top[row + i] = top;
        } else {
            s.gain[i]  = s.decay[i];
            s.decay[i] = 1.0f;
        }
        s.total[row + i] = s.total[row + i] * s.decay[i] + lanes_sum(sum) * s.gain[i];
    }
}

// --- values -----------------------------------------------------------------------------------------------------

// Values that are NaN or Inf make the block's 64 channels NaN for the query rows that give them weight; the
// integers leave them out.
static void poison(const attention_item * it, int i, float * sum) {
    const float * w = it->s.logits + i * TBQ_TILE;
    for (int r = 0; r < TBQ_TILE; r++) {
        if (w[r] > 0.0f && !(fabsf(it->s.scales[r]) < INFINITY)) {
            for (int c = 0; c < TBQ_BLOCK; c++) {
                sum[c] = NAN;
            }
            return;
        }
    }
}

// The scales of a block's rows as factors for weights: up to the largest, weights times d become integers.
typedef struct {
    lanes d[4];
    lanes scaled[4]; // d . TBQ_WEIGHT_ONE / largest
    float unit;      // largest / TBQ_WEIGHT_ONE
} value_scales;

static inline float largest_of(const lanes x[4]) {
    return lanes_top(lanes_max(lanes_max(lanes_abs(x[0]), lanes_abs(x[1])), lanes_max(lanes_abs(x[2]), lanes_abs(x[3]))));
}

static inline float one_over(float largest) {
    return largest > 1e-30f ? TBQ_WEIGHT_ONE / largest : 0.0f; // what is smaller is nothing
}

// *bad is set if a scale is NaN or Inf; it counts as 0 here.
static inline value_scales prepare_scales(const float * scales, unsigned * bad) {
    value_scales v;
    *bad = 0;
    for (int r = 0; r < 4; r++) {
        const lanes finite = lanes_set(0x1p17f); // more than any half
        const lanes d      = lanes_load(scales + 16 * r);
        *bad |= lanes_unbounded(lanes_abs(d));
        v.d[r] = lanes_pick(finite, lanes_abs(d), d, lanes_set(0.0f));
    }
    const float largest = largest_of(v.d);
    for (int r = 0; r < 4; r++) {
        v.scaled[r] = lanes_mul(v.d[r], lanes_set(one_over(largest)));
    }
    v.unit = largest * (1.0f / TBQ_WEIGHT_ONE);
    return v;
}

// Weights times scales, rounded.  A query row that sees the whole tile, as nearly all do, takes the largest scale for
// the largest product, since no weight is above 1.  One that does not looks at its own products: a hidden row, whose
// weight is 0, must have no say.
static inline void scale_weights(const attention_scratch * s, const value_scales * v, int i) {
    const float * w    = s->logits + i * TBQ_TILE;
    const lanes * d    = s->mask_kind[i] == PLAIN ? v->scaled : v->d;
    float         unit = v->unit;
    lanes         x[4];
    for (int r = 0; r < 4; r++) {
        x[r] = lanes_mul(lanes_load(w + 16 * r), d[r]);
    }
    if (s->mask_kind[i] != PLAIN) {
        const float largest = largest_of(x);
        unit = largest * (1.0f / TBQ_WEIGHT_ONE);
        for (int r = 0; r < 4; r++) {
            x[r] = lanes_mul(x[r], lanes_set(one_over(largest)));
        }
    }
    s->factor[i] = s->gain[i] * unit;
    round_weights(x, s->weights + i * TBQ_TILE, s->weight_sums + i);
}

static void multiply_values(const attention_scratch * s, int from, int to, float * sum, int64_t stride) {
    int i = from;
#define VALUES(n) \
    values_n(n, s->panel, s->weights + i * TBQ_TILE, s->weight_sums + i, s->decay + i, s->factor + i, sum + (i - from) * stride, stride)
#if VALUES_AT_ONCE > 2
    for (; i + 4 <= to; i += 4) {
        VALUES(4);
    }
#endif
    for (; i + 2 <= to; i += 2) {
        VALUES(2);
    }
    if (i < to) {
        VALUES(1);
    }
#undef VALUES
}

TBQ_INLINE void tbq_values(int bits, const attention_item * it, int h, const uint8_t * rows, int n, int from, int to) {
    const attention_scratch * s      = &it->s;
    const int64_t             size   = it->p->a.v_size;
    const size_t              stride = it->p->a.v.row_stride;
    for (int64_t b = 0; b < size / TBQ_BLOCK; b++, rows += tbq_block_bytes(bits)) {
        float * sum = s->sum + (h * it->p->tile_rows + from) * size + b * TBQ_BLOCK;
        load_scales(bits, rows, stride, n, s->scales, s->third);
        FOR_LENGTH(n, unpack_values(bits, rows, stride, length, s->third, s->panel));
        unsigned           bad;
        const value_scales scaled = prepare_scales(s->scales, &bad);
        for (int i = from; i < to; i++) {
            scale_weights(s, &scaled, i);
        }
        multiply_values(s, from, to, sum, size);
        for (int i = from; bad && i < to; i++) {
            poison(it, i, sum + (i - from) * size);
        }
    }
}

static void f32_values(const attention_item * it, int h, int n, int from, int to) {
    const int64_t size = it->p->a.v_size;
    for (int i = from; i < to; i++) {
        const float * w     = it->s.logits + i * TBQ_TILE;
        float *       sum   = it->s.sum + (h * it->p->tile_rows + i) * size;
        const lanes   decay = lanes_set(it->s.decay[i]);
        const lanes   gain  = lanes_set(it->s.gain[i]);
        for (int64_t c = 0; c < size; c += 64) {
            lanes acc[4] = { lanes_set(0.0f), lanes_set(0.0f), lanes_set(0.0f), lanes_set(0.0f) };
            for (int r = 0; r < n; r++) {
                const float * v = (const float *) it->s.panel + r * size + c;
                if (w[r] == 0.0f) { // a hidden row may hold anything
                    continue;
                }
                for (int l = 0; l < 4; l++) {
                    acc[l] = lanes_fma(lanes_set(w[r]), lanes_load(v + 16 * l), acc[l]);
                }
            }
            for (int l = 0; l < 4; l++) {
                const lanes old = lanes_mul(decay, lanes_load(sum + c + 16 * l));
                lanes_store(sum + c + 16 * l, lanes_fma(acc[l], gain, old));
            }
        }
    }
}

// --- items ------------------------------------------------------------------------------------------------------

static void tile(const attention_item * it, int h, int64_t at, int n, int from, int to) {
    const tbq_attention * a    = &it->p->a;
    const uint8_t *       keys = side_rows(it, &a->k, it->head + h, at);
    switch (a->k.type) {
        case TBQ_ATTENTION_TBQ2_0: tbq_logits(2, it, h, keys, n, from, to); break;
        case TBQ_ATTENTION_TBQ3_0: tbq_logits(3, it, h, keys, n, from, to); break;
        case TBQ_ATTENTION_TBQ4_0: tbq_logits(4, it, h, keys, n, from, to); break;
        default:
            rows_to_floats(it, &a->k, keys, n, a->k_size);
            f32_logits(it, h, n, from, to);
    }
    softmax(it, h, from, to);
    const uint8_t * values = side_rows(it, &a->v, it->head + h, at);
    switch (a->v.type) {
        case TBQ_ATTENTION_TBQ2_0: tbq_values(2, it, h, values, n, from, to); break;
        case TBQ_ATTENTION_TBQ3_0: tbq_values(3, it, h, values, n, from, to); break;
        case TBQ_ATTENTION_TBQ4_0: tbq_values(4, it, h, values, n, from, to); break;
        default:
            rows_to_floats(it, &a->v, values, n, a->v_size);
            f32_values(it, h, n, from, to);
    }
}

static inline int64_t out_row(const attention_item * it, int64_t kv_head, int64_t row) {
    const tbq_attention * a = &it->p->a;
    return (it->stream * a->n_tokens + token_of(it, row)) * a->n_head + head_of(it, kv_head, row);
}

// The end of a query row: sinks, division, rotation back.
static void finish_row(const tbq_attention_plan * p, const tbq_kernels * k, int64_t row, float top, float total,
                       const float * sum) {
    const tbq_attention * a      = &p->a;
    float *               out    = a->out + row * a->v_size;
    float                 factor = 1.0f;
    if (a->sinks) {
        const float sink = a->sinks[row % a->n_head];
        if (sink != sink) {
            total = NAN;
        } else if (sink > top) {
            factor = exp_1(top - sink);
            total  = total * factor + 1.0f;
        } else if (top > -INFINITY) {
            total += exp_1(sink - top);
        }
    }
    const lanes scale = lanes_set(total == 0.0f ? 0.0f : factor / total);
    for (int64_t i = 0; i < a->v_size; i += 16) {
        lanes_store(out + i, lanes_mul(scale, lanes_load(sum + i)));
    }
    if (is_tbq(a->v.type)) {
        k->unrotate(out, out, a->v_size);
    }
}

static void finish_item(const attention_item * it, float * partials) {
    const int64_t size = it->p->a.v_size;
    for (int64_t h = 0; h < it->n_heads; h++) {
        for (int64_t r = 0; r < it->n_rows; r++) {
            const int64_t i   = h * it->p->tile_rows + r;
            const int64_t row = out_row(it, it->head + h, r);
            if (it->p->n_chunks == 1) {
                finish_row(it->p, it->k, row, it->s.top[i], it->s.total[i], it->s.sum + i * size);
            } else {
                float * dst = partial_of(it->p, partials, it->chunk, row);
                dst[0] = it->s.top[i];
                dst[1] = it->s.total[i];
                memcpy(dst + TBQ_HEADER, it->s.sum + i * size, (size_t) size * sizeof(float));
            }
        }
    }
}

// Chunks vary fastest, so that a thread keeps the queries it has prepared; later tokens come first, because with a
// causal mask they take longest.
static attention_item find_item(const tbq_attention_plan * p, const tbq_kernels * k, int64_t item, void * scratch) {
    attention_item it;
    it.p     = p;
    it.k     = k;
    it.group = p->a.n_head / p->a.n_head_kv;
    lay_out(p, (uint8_t *) scratch, &it.s);
    it.chunk = item % p->n_chunks;
    item /= p->n_chunks;
    it.head = item % p->n_head_groups * p->heads_per_item;
    item /= p->n_head_groups;
    it.first  = (p->n_row_tiles - 1 - item % p->n_row_tiles) * p->tile_rows;
    it.stream = item / p->n_row_tiles;

    const int64_t heads_left = p->a.n_head_kv - it.head;
    const int64_t rows_left  = p->a.n_tokens * it.group - it.first;
    it.n_heads = heads_left < p->heads_per_item ? heads_left : p->heads_per_item;
    it.n_rows  = rows_left < p->tile_rows ? rows_left : p->tile_rows;
    return it;
}

static void run(const tbq_attention_plan * p, const tbq_kernels * k, int64_t item, void * scratch, float * partials,
                int64_t * prepared) {
    const attention_item it   = find_item(p, k, item, scratch);
    const size_t         rows = (size_t) (p->heads_per_item * p->tile_rows);
    if (*prepared != item / p->n_chunks) {
        *prepared = item / p->n_chunks;
        prepare_queries(&it);
    }
    memset(it.s.sum, 0, rows * (size_t) p->a.v_size * sizeof(float));
    for (size_t i = 0; i < rows; i++) {
        it.s.top[i]   = -INFINITY;
        it.s.total[i] = 0.0f;
    }
    const int64_t last = (it.chunk + 1) * p->chunk_rows < p->a.n_kv ? (it.chunk + 1) * p->chunk_rows : p->a.n_kv;
    for (int64_t at = it.chunk * p->chunk_rows; at < last; at += TBQ_TILE) {
        const int n    = last - at < TBQ_TILE ? (int) (last - at) : TBQ_TILE;
        int       from = 0, to = 0;
        for (int h = 0; h < it.n_heads; h++) {
            if (h == 0 || (p->a.mask && p->a.mask_n_heads > 1)) {
                tile_mask(&it, it.head + h, at, n, &from, &to);
            }
            if (from < to) {
                tile(&it, h, at, n, from, to);
            }
        }
    }
    finish_item(&it, partials);
}

// A row of out from the partial results of its chunks.
static void merge_row(const tbq_attention_plan * p, const tbq_kernels * k, int64_t row, float * partials) {
    const int64_t size  = p->a.v_size;
    float *       first = partial_of(p, partials, 0, row);
    float         top   = -INFINITY, total = 0.0f;
    for (int64_t c = 0; c < p->n_chunks; c++) {
        const float t = partial_of(p, partials, c, row)[0];
        top = t > top ? t : top;
    }
    for (int64_t c = 0; c < p->n_chunks; c++) {
        const float * chunk  = partial_of(p, partials, c, row);
        const float   factor = chunk[0] > -INFINITY ? exp_1(chunk[0] - top) : 0.0f;
        total = chunk[1] * factor + total;
        for (int64_t i = 0; i < size; i += 16) {
            const lanes sum = c > 0 ? lanes_load(first + TBQ_HEADER + i) : lanes_set(0.0f);
            lanes_store(first + TBQ_HEADER + i, lanes_fma(lanes_load(chunk + TBQ_HEADER + i), lanes_set(factor), sum));
        }
    }
    finish_row(p, k, row, top, total, first + TBQ_HEADER);
}

static void merge(const tbq_attention_plan * p, const tbq_kernels * k, int64_t first, int64_t last, float * partials) {
    for (int64_t row = first; row < last; row++) {
        merge_row(p, k, row, partials);
    }
}

const struct tbq_attention_kernels TBQ_ATTENTION = { .run = run, .merge = merge };
