// SPDX-License-Identifier: MIT
// Attention on problems of random shape.  Every implementation is compared with the scalar reference, bit for bit; the
// reference with plain arithmetic in double precision on the dequantized cache; several threads with one.
//
//     attention [problems] [seed] [threads]
//
// Every buffer is its own allocation of exactly the size that the problem needs, so that AddressSanitizer sees a read
// past its end.  Prints the implementations that ran; exits 1 on a difference.
#include "random.h"
#include "tbq-attention.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 16 };

static int64_t below(int64_t n) {
    return random_bits() % n;
}

#define PICK(list) ((list)[below(sizeof(list) / sizeof((list)[0]))])

// --- halves and rows, without the library's code -----------------------------------------------------------------

static float from_half(uint16_t h) {
    const int   e = h >> 10 & 31, m = h & 1023;
    const float x = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf((float) (1024 + m), e - 25) : ldexpf((float) m, -24);
    return h & 0x8000 ? -x : x;
}

static uint16_t to_half(float x) { // up to 60000, or -Inf; what would be subnormal becomes 0
    if (fabsf(x) < 0x1p-14f || x == -INFINITY) {
        return x == -INFINITY ? 0xFC00 : 0;
    }
    int         e;
    const float m = frexpf(fabsf(x), &e); // [0.5, 1)
    const int   q = (int) lrintf(m * 2048);
    return (uint16_t) ((x < 0 ? 0x8000 : 0) | (((e + 14) << 10) + (q - 1024)));
}

// TBQ_ATTENTION_OTHER is the upper halves of floats here.
static void upper_halves_to_float(const void * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint8_t * b = (const uint8_t *) src + 2 * i;
        const uint32_t  u = (uint32_t) b[0] << 16 | (uint32_t) b[1] << 24;
        memcpy(dst + i, &u, sizeof(u));
    }
}

static int is_half(int type) {
    return type == TBQ_ATTENTION_F16 || type == TBQ_ATTENTION_OTHER;
}

static size_t bytes_of(int type, int64_t n) {
    return is_half(type) ? (size_t) n * 2 : type == TBQ_ATTENTION_Q8_0 ? (size_t) n / 32 * 34 : tbq_row_bytes(type, n);
}

static void encode(int type, const float * x, uint8_t * dst, int64_t n) {
    if (is_half(type)) {
        for (int64_t i = 0; i < n; i++) {
            const uint16_t h = to_half(x[i]);
            memcpy(dst + 2 * i, type == TBQ_ATTENTION_F16 ? (const char *) &h : (const char *) (x + i) + 2, 2);
        }
    } else if (type == TBQ_ATTENTION_Q8_0) {
        for (int64_t i = 0; i < n; i += 32, dst += 34) {
            float top = 0;
            for (int j = 0; j < 32; j++) {
                top = fmaxf(top, fabsf(x[i + j]));
            }
            const uint16_t d = to_half(top / 127);
            memcpy(dst, &d, 2);
            for (int j = 0; j < 32; j++) {
                ((int8_t *) dst)[2 + j] =
                    (int8_t) (top > 0 ? lrintf(fminf(fmaxf(x[i + j] / from_half(d), -127), 127)) : 0);
            }
        }
    } else if (type == TBQ_TYPE_TBQ8_0) {
        tbq_quantize(type, x, dst, n);
    } else {
        tbq_quantize_kv(type, x, dst, n);
    }
}

static void decode(int type, const uint8_t * src, float * x, int64_t n) {
    if (type == TBQ_ATTENTION_F16) {
        for (int64_t i = 0; i < n; i++) {
            x[i] = from_half((uint16_t) (src[2 * i] | src[2 * i + 1] << 8));
        }
    } else if (type == TBQ_ATTENTION_Q8_0) {
        for (int64_t i = 0; i < n; i++) {
            const uint8_t * b = src + i / 32 * 34;
            x[i]              = from_half((uint16_t) (b[0] | b[1] << 8)) * (float) ((const int8_t *) b)[2 + i % 32];
        }
    } else if (type == TBQ_ATTENTION_OTHER) {
        upper_halves_to_float(src, x, n);
    } else if (type == TBQ_TYPE_TBQ8_0) {
        tbq_list_kernels(&(int){ 0 })[0]->dequantize_exact(src, x, n);
    } else {
        tbq_list_kernels(&(int){ 0 })[0]->dequantize[type - TBQ_TYPE_TBQ2_0](src, x, n);
    }
}

// --- problems ---------------------------------------------------------------------------------------------------

typedef struct {
    tbq_attention a;
    void *        buffers[16];
    int           n_buffers;
    int32_t *     slots;   // [streams][n_kv]: the entry of the list that stands for a row, or -1; NULL without a list
    const float * exact_k; // what the cache was made from: [streams][n_head_kv][n_kv][size]
    const float * exact_v;
} problem;

static void * allocate(problem * p, size_t bytes) {
    return p->buffers[p->n_buffers++] = malloc(bytes);
}

// A cache [streams][rows][heads] or [streams][heads][rows], rows of it with NaN scales if no query sees them.
static const float * make_side(problem * p, tbq_attention_tensor * s, int type, int64_t size, int64_t n_streams,
                               const uint8_t * unseen) {
    const tbq_attention * a   = &p->a;
    const size_t          one = bytes_of(type, size) + (below(4) ? 0 : is_half(type) ? 2 : 34) * below(3);
    s->type                   = type;
    s->to_float               = type == TBQ_ATTENTION_OTHER ? upper_halves_to_float : NULL;
    s->n_streams              = n_streams;
    if (below(2)) {
        s->head_stride = one;
        s->row_stride  = one * a->n_head_kv;
    } else {
        s->row_stride  = one;
        s->head_stride = one * a->n_kv;
    }
    s->stream_stride   = one * a->n_kv * a->n_head_kv;
    const size_t total = s->stream_stride * (n_streams - 1) + s->head_stride * (a->n_head_kv - 1) +
                         s->row_stride * (a->n_kv - 1) + bytes_of(type, size);
    uint8_t *    data  = allocate(p, total);
    float *      exact = allocate(p, n_streams * a->n_head_kv * a->n_kv * size * sizeof(float));
    float *      x     = exact;
    s->data            = data;
    for (int64_t stream = 0; stream < n_streams; stream++) {
        for (int64_t h = 0; h < a->n_head_kv; h++) {
            for (int64_t r = 0; r < a->n_kv; r++, x += size) {
                for (int64_t i = 0; i < size; i++) {
                    x[i] = gaussian() * (r == 0 ? 3.0f : 1.0f);
                }
                uint8_t * dst = data + stream * s->stream_stride + h * s->head_stride + r * s->row_stride;
                encode(type, x, dst, size);
                if (unseen && unseen[r]) {
                    memcpy(dst, "\xff\x7f", 2);
                }
            }
        }
    }
    return exact;
}

static const uint8_t * side_row(const tbq_attention_tensor * s, int64_t stream, int64_t head, int64_t r) {
    return (const uint8_t *) s->data + stream * s->stream_stride + head * s->head_stride + r * s->row_stride;
}

// n different rows of the cache in any order, -1 after them and, for some kinds, in between.
static void make_list(const tbq_attention * a, int kind, int32_t * cells) {
    int32_t * order = malloc(a->n_kv * sizeof(*order));
    for (int64_t c = 0; c < a->n_kv; c++) {
        const int64_t at = kind == 2 ? c : below(c + 1); // the newest in order, or anything
        order[c]         = order[at];
        order[at]        = (int32_t) c;
    }
    int64_t taken = 0;
    for (int64_t j = 0; j < a->n_exact; j++) {
        const int use = kind == 0 ? 0 : kind == 3 ? below(3) == 0 : kind == 4 ? j / TBQ_BLOCK % 2 == 1 : 1;
        cells[j]      = use && taken < a->n_kv ? order[a->n_kv - ++taken] : -1;
    }
    free(order);
}

// The rows of the list in tbq8_0.  Those of unused entries are NaNs.
static void make_exact_side(problem * p, tbq_attention_tensor * s, const tbq_attention_tensor * cached,
                            const float * exact, int64_t size) {
    const tbq_attention * a   = &p->a;
    const size_t          one = bytes_of(TBQ_TYPE_TBQ8_0, size) + 68 * (below(4) == 0);
    s->n_streams              = a->n_streams;
    s->head_stride            = below(2) ? one : one * a->n_exact;
    s->row_stride             = s->head_stride == one ? one * a->n_head_kv : one;
    s->stream_stride          = one * (a->n_exact + below(3)) * a->n_head_kv;
    const size_t total        = s->stream_stride * (a->n_streams - 1) + s->head_stride * (a->n_head_kv - 1) +
                                s->row_stride * (a->n_exact - 1) + bytes_of(TBQ_TYPE_TBQ8_0, size);
    s->data                   = memset(allocate(p, total), 0xFF, total);
    for (int64_t stream = 0; stream < a->n_streams; stream++) {
        const int64_t from = stream / (a->n_streams / cached->n_streams);
        for (int64_t h = 0; h < a->n_head_kv; h++) {
            for (int64_t r = 0; r < a->n_kv; r++) {
                const int32_t slot = p->slots[stream * a->n_kv + r];
                if (slot >= 0) {
                    encode(TBQ_TYPE_TBQ8_0, exact + ((from * a->n_head_kv + h) * a->n_kv + r) * size,
                           (uint8_t *) side_row(s, stream, h, slot), size);
                }
            }
        }
    }
}

// A list, and packed rows of it with NaN scales where no other stream reads them.
static void make_exact(problem * p, int64_t n_exact) {
    tbq_attention * a       = &p->a;
    const int64_t   n_words = (a->n_kv + 31) / 32;
    a->n_exact              = n_exact;
    a->exact_stream_stride  = (n_exact + n_words) * 4;
    int32_t * cells         = allocate(p, a->n_streams * a->exact_stream_stride);
    p->slots                = allocate(p, a->n_streams * a->n_kv * sizeof(int32_t));
    memset(p->slots, 0xFF, a->n_streams * a->n_kv * sizeof(int32_t));
    memset(cells, 0, a->n_streams * a->exact_stream_stride);
    a->cells         = cells;
    a->packed_hidden = (const uint32_t *) (cells + n_exact);
    for (int64_t s = 0; s < a->n_streams; s++, cells += n_exact + n_words) {
        make_list(a, (int) below(5), cells);
        for (int64_t j = 0; j < n_exact; j++) {
            if (cells[j] >= 0) {
                p->slots[s * a->n_kv + cells[j]] = (int32_t) j;
                cells[n_exact + cells[j] / 32] |= (int32_t) (1u << cells[j] % 32);
            }
        }
    }
    const int same = a->v.data == a->k.data;
    for (int i = 0; i < 2; i++) {
        tbq_attention_tensor * side = i ? &a->v : &a->k;
        if (side->type < 100 || (i && same)) {
            continue;
        }
        make_exact_side(p, i ? &a->exact_v : &a->exact_k, side, i ? p->exact_v : p->exact_k, i ? a->v_size : a->k_size);
        for (int64_t r = 0; side->n_streams == a->n_streams && r < a->n_streams * a->n_kv * a->n_head_kv; r++) {
            const int64_t c = r % a->n_kv, s = r / a->n_kv % a->n_streams;
            if (p->slots[s * a->n_kv + c] >= 0 && below(2)) {
                memcpy((uint8_t *) side_row(side, s, r / a->n_kv / a->n_streams, c), "\xff\x7f", 2);
            }
        }
    }
    if (same) {
        a->exact_v = a->exact_k;
    }
}

static int64_t divisor(int64_t n) {
    int64_t d;
    do {
        d = 1 + below(n);
    } while (n % d);
    return d;
}

// Row i of the mask, of all its tokens, heads and streams.
static const uint16_t * mask_row(const tbq_attention * a, int64_t i) {
    const int64_t t = i % a->n_tokens, h = i / a->n_tokens % a->mask_n_heads, s = i / a->n_tokens / a->mask_n_heads;
    return (const uint16_t *) ((const char *) a->mask + s * a->mask_stream_stride + h * a->mask_head_stride +
                               t * a->mask_token_stride);
}

// What the mask says to a query row.
static float mask_of(const tbq_attention * a, int64_t s, int64_t t, int64_t h, int64_t r) {
    return a->mask ? from_half(mask_row(
                         a, (s % a->mask_n_streams * a->mask_n_heads + h % a->mask_n_heads) * a->n_tokens + t)[r])
                   : 0.0f;
}

static void make_mask(problem * p) {
    static const int64_t pads[] = { 0, 0, 1, 7, 64 };
    tbq_attention *      a      = &p->a;
    a->mask_n_heads             = below(4) ? 1 : divisor(a->n_head);
    a->mask_n_streams           = divisor(a->n_streams);
    a->mask_token_stride        = (size_t) (a->n_kv + PICK(pads)) * 2;
    a->mask_head_stride         = a->mask_token_stride * (a->n_tokens + below(3));
    a->mask_stream_stride       = a->mask_head_stride * a->mask_n_heads;
    uint16_t * m =
        allocate(p, a->mask_stream_stride * (a->mask_n_streams - 1) + a->mask_head_stride * (a->mask_n_heads - 1) +
                        a->mask_token_stride * (a->n_tokens - 1) + a->n_kv * 2);
    const int kind = (int) below(6);
    a->mask        = m;
    for (int64_t i = 0; i < a->mask_n_streams * a->mask_n_heads * a->n_tokens; i++) {
        const int64_t token = i % a->n_tokens;
        uint16_t *    row   = (uint16_t *) mask_row(a, i);
        for (int64_t r = 0; r < a->n_kv; r++) {
            int hide;
            switch (kind) {
                case 0: hide = 0; break;
                case 1: hide = r > a->n_kv - a->n_tokens + token; break;                    // causal
                case 2: hide = r > a->n_kv - a->n_tokens + token || r + 100 < token; break; // and a window
                case 3: hide = below(3) == 0; break;
                case 4: hide = r % a->n_tokens != token; break;        // a sequence for each token
                default: hide = r < a->n_kv - 1 || (token & 1); break; // one row, or none
            }
            row[r] = to_half(hide ? -INFINITY : kind == 3 || a->max_bias > 0 ? -(float) below(64) / 8 : 0.0f);
        }
    }
}

// Rows that no query of any stream and head sees.
static uint8_t * find_unseen(const tbq_attention * a) {
    uint8_t * unseen = malloc(a->n_kv);
    memset(unseen, a->mask != NULL, a->n_kv);
    for (int64_t i = 0; a->mask && i < a->mask_n_streams * a->mask_n_heads * a->n_tokens; i++) {
        for (int64_t r = 0; r < a->n_kv; r++) {
            unseen[r] &= mask_row(a, i)[r] == 0xFC00;
        }
    }
    return unseen;
}

// plain: tbq4_0 on both sides, 63 rows or more, logits of variance 1, no exact rows.
static problem make_problem(int plain) {
    static const int     types[]    = { TBQ_ATTENTION_TBQ2_0, TBQ_ATTENTION_TBQ3_0, TBQ_ATTENTION_TBQ4_0,
                                        TBQ_ATTENTION_F16,    TBQ_ATTENTION_Q8_0,   TBQ_ATTENTION_OTHER };
    static const int64_t sizes[][2] = { { 64, 64 },   { 128, 128 }, { 192, 128 }, { 256, 256 },
                                        { 512, 512 }, { 576, 512 }, { 64, 128 } };
    static const int64_t groups[]   = { 1, 2, 3, 4, 7, 8, 16 };
    static const int64_t tokens[]   = { 1, 1, 1, 2, 3, 4, 5, 8, 16, 33, 75 };
    static const int64_t lengths[]  = { 1, 2, 63, 64, 65, 113, 128, 256, 257, 500, 700, 1030 };
    problem              p          = { 0 };
    tbq_attention *      a          = &p.a;
    do {
        a->k.type = plain ? TBQ_ATTENTION_TBQ4_0 : PICK(types);
        a->v.type = plain ? TBQ_ATTENTION_TBQ4_0 : PICK(types);
    } while (a->k.type < 100 && a->v.type < 100);
    const int64_t * size = PICK(sizes);
    a->k_size            = size[0];
    a->v_size            = size[1];
    a->n_streams         = 1 + (below(4) == 0) + (below(8) == 0) * 2;
    do {
        a->n_tokens  = PICK(tokens);
        a->n_kv      = PICK(lengths);
        a->n_head_kv = 1 + below(5);
        a->n_head    = a->n_head_kv * PICK(groups);
    } while (a->n_streams * a->n_tokens * a->n_head * a->n_kv * a->k_size > 4000000 ||
             (plain && a->n_kv < 63)); // scalar code must do it, too
    a->scale         = 1.0f / sqrtf((float) a->k_size);
    a->max_bias      = below(4) ? 0.0f : 8.0f;
    a->logit_softcap = below(4) ? 0.0f : 10.0f;
    if (!plain && below(3) == 0) {
        a->scale *= 8; // peaked
    }
    if (below(5)) {
        make_mask(&p);
    }
    uint8_t *     unseen    = find_unseen(a);
    const int     poison    = below(2) == 0;
    const int64_t k_streams = a->n_streams % 2 || below(2) ? a->n_streams : a->n_streams / 2;
    p.exact_k               = make_side(&p, &a->k, a->k.type, a->k_size, k_streams, poison ? unseen : NULL);
    if (a->k.type == a->v.type && a->v_size <= a->k_size && below(4) == 0) {
        a->v      = a->k; // MLA
        p.exact_v = p.exact_k;
    } else {
        p.exact_v =
            make_side(&p, &a->v, a->v.type, a->v_size, below(2) ? a->n_streams : k_streams, poison ? unseen : NULL);
    }
    free(unseen);
    static const int64_t lists[] = { 0, 0, 0, 0, 1, 63, 64, 65, 149, 149, 661 };
    const int64_t        n_exact = plain ? 0 : PICK(lists);
    if (n_exact > 0 && n_exact <= 4 * a->n_kv) {
        make_exact(&p, n_exact);
    }
    a->q_token_stride = a->k_size * sizeof(float);
    a->q_head_stride  = a->q_token_stride * a->n_tokens;
    if (below(2)) {
        a->q_head_stride  = a->k_size * sizeof(float);
        a->q_token_stride = a->q_head_stride * a->n_head;
    }
    a->q_stream_stride = a->k_size * sizeof(float) * a->n_head * a->n_tokens;
    float * q          = allocate(&p, a->n_streams * a->q_stream_stride);
    for (size_t i = 0; i < a->n_streams * a->q_stream_stride / sizeof(float); i++) {
        q[i] = gaussian();
    }
    a->q = q;
    if (below(3) == 0) {
        float * sinks = allocate(&p, a->n_head * sizeof(float));
        for (int64_t h = 0; h < a->n_head; h++) {
            sinks[h] = gaussian() * 3;
        }
        a->sinks = sinks;
    }
    if (a->k.type > 100 && below(2)) {
        float * mean = allocate(&p, a->n_head_kv * a->k_size * sizeof(float));
        for (int64_t i = 0; i < a->n_head_kv * a->k_size; i++) {
            mean[i] = gaussian();
        }
        a->mean           = mean;
        a->mean_of_values = a->v.data == a->k.data;
    }
    return p;
}

static void free_problem(problem * p) {
    for (int i = 0; i < p->n_buffers; i++) {
        free(p->buffers[i]);
    }
}

// --- the ways to compute it ------------------------------------------------------------------------------------

// The query that the kernel works with: rounded to 8 bits in the rotated domain if keys are tbq.
static void round_query(const tbq_attention * a, const float * q, float * dst) {
    memcpy(dst, q, a->k_size * sizeof(float));
    for (int64_t i = 0; a->k.type > 100 && i < a->k_size; i += TBQ_BLOCK) {
        block_tbq8_act b;
        tbq_quantize(TBQ_TYPE_TBQ8_ACT, q + i, &b, TBQ_BLOCK);
        for (int j = 0; j < TBQ_BLOCK; j++) {
            dst[i + j] = b.d * b.qs[j];
        }
        tbq_unrotate(dst + i, dst + i, TBQ_BLOCK);
    }
}

typedef enum {
    ROUNDED_QUERIES, // on the dequantized cache, with the queries that the kernel works with
    CACHE,           // on the dequantized cache
    EXACT,           // on what the cache was made from
} oracle_kind;

// A row of K or V in floats.
static const float * row_of(const problem * p, int is_v, oracle_kind kind, int64_t stream, int64_t head, int64_t r,
                            float * buffer) {
    const tbq_attention *        a    = &p->a;
    const tbq_attention_tensor * s    = is_v ? &a->v : &a->k;
    const int64_t                size = is_v && a->v.data != a->k.data ? a->v_size : a->k_size;
    const int32_t                slot = p->slots && s->type > 100 ? p->slots[stream * a->n_kv + r] : -1;
    if (slot >= 0 && kind != EXACT) {
        decode(TBQ_TYPE_TBQ8_0, side_row(is_v ? &a->exact_v : &a->exact_k, stream, head, slot), buffer,
               is_v ? a->v_size : a->k_size);
        return buffer;
    }
    stream /= a->n_streams / s->n_streams;
    if (kind == EXACT) {
        return (is_v ? p->exact_v : p->exact_k) + ((stream * a->n_head_kv + head) * a->n_kv + r) * size;
    }
    decode(s->type, side_row(s, stream, head, r), buffer, is_v ? a->v_size : a->k_size);
    return buffer;
}

// Double precision, and whole keys.  Only the mean's product has the query before it is rounded.
static void oracle(const problem * problem, oracle_kind kind, double * out) {
    const tbq_attention * a     = &problem->a;
    const int64_t         group = a->n_head / a->n_head_kv;
    float *               row   = malloc((a->k_size + a->v_size) * sizeof(float));
    float *               q     = malloc(a->k_size * sizeof(float));
    double *              w     = malloc(a->n_kv * sizeof(double));
    int64_t               power = 1;
    while (2 * power <= a->n_head) {
        power *= 2;
    }
    for (int64_t i = 0; i < a->n_streams * a->n_tokens * a->n_head; i++, out += a->v_size) {
        const int64_t h = i % a->n_head, t = i / a->n_head % a->n_tokens, s = i / a->n_head / a->n_tokens;
        const float * exact = (const float *) ((const char *) a->q + s * a->q_stream_stride + h * a->q_head_stride +
                                               t * a->q_token_stride);
        const double  slope = a->max_bias <= 0 ? 1
                              : h < power      ? pow(2, -a->max_bias / power * (h + 1))
                                               : pow(2, -a->max_bias / 2 / power * (2 * (h - power) + 1));
        const float * mean  = a->mean ? a->mean + h / group * a->k_size : NULL;
        double        top   = a->sinks ? a->sinks[h] : -INFINITY;
        double        total = 0;
        memcpy(q, exact, a->k_size * sizeof(float));
        if (kind == ROUNDED_QUERIES) {
            round_query(a, exact, q);
        }
        for (int64_t r = 0; r < a->n_kv; r++) {
            const double m = mask_of(a, s, t, h, r);
            w[r]           = -INFINITY;
            if (m > -INFINITY) {
                double        x = 0;
                const float * k = row_of(problem, 0, kind, s, h / group, r, row);
                for (int64_t c = 0; c < a->k_size; c++) {
                    x += (double) q[c] * k[c];
                }
                for (int64_t c = 0; a->mean && c < a->k_size; c++) {
                    x += (double) exact[c] * mean[c];
                }
                x *= a->scale;
                w[r] = (a->logit_softcap ? a->logit_softcap * tanh(x / a->logit_softcap) : x) + slope * m;
            }
            top = fmax(top, w[r]);
        }
        for (int64_t c = 0; c < a->v_size; c++) {
            out[c] = 0;
        }
        for (int64_t r = 0; r < a->n_kv; r++) {
            if (w[r] > -INFINITY) {
                const double p = exp(w[r] - top);
                total += p;
                const float * v = row_of(problem, 1, kind, s, h / group, r, row);
                for (int64_t c = 0; c < a->v_size; c++) {
                    out[c] += p * (v[c] + (a->mean_of_values ? mean[c] : 0));
                }
            }
        }
        total += a->sinks ? exp(a->sinks[h] - top) : 0;
        for (int64_t c = 0; c < a->v_size; c++) {
            out[c] = total > 0 ? out[c] / total : 0;
        }
    }
    free(row);
    free(q);
    free(w);
}

typedef struct { // not every system has pthread_barrier_t
    pthread_mutex_t lock;
    pthread_cond_t  all;
    int             missing;
} barrier;

static void wait_at(barrier * b) {
    pthread_mutex_lock(&b->lock);
    if (--b->missing == 0) {
        pthread_cond_broadcast(&b->all);
    }
    while (b->missing > 0) {
        pthread_cond_wait(&b->all, &b->lock);
    }
    pthread_mutex_unlock(&b->lock);
}

typedef struct {
    const tbq_attention_plan * plan;
    const tbq_kernels *        k;
    void *                     work;
    int                        n_threads, thread;
    int64_t *                  next; // shared
    int64_t                    stride;
    barrier *                  meet;
} worker;

// Items in another order than 0, 1, 2: number times stride, modulo their count, to which stride has no common divisor.
static int64_t take(void * context) {
    const worker * w      = context;
    const int64_t  number = __atomic_fetch_add(w->next, 1, __ATOMIC_RELAXED);
    return number >= w->plan->n_items ? w->plan->n_items : number * w->stride % w->plan->n_items;
}

static void * work_on(void * argument) {
    worker *                   w = argument;
    const tbq_attention_plan * p = w->plan;
    tbq_attention_run(p, w->k, w->thread, w->work, take, w);
    if (p->n_chunks > 1) {
        wait_at(w->meet);
        tbq_attention_merge(p, w->k, p->n_rows * w->thread / w->n_threads, p->n_rows * (w->thread + 1) / w->n_threads,
                            w->work);
    }
    return NULL;
}

static int64_t gcd(int64_t a, int64_t b) {
    return b ? gcd(b, a % b) : a;
}

static float * compute(const tbq_attention * a, const tbq_kernels * k, int n_threads) {
    const int64_t      n   = a->n_streams * a->n_tokens * a->n_head * a->v_size;
    tbq_attention      b   = *a;
    float *            out = malloc(n * sizeof(float));
    tbq_attention_plan plan;
    b.out = out;
    if (tbq_attention_make_plan(&b, &plan) != TBQ_OK) {
        printf("no plan\n");
        exit(1);
    }
    barrier   meet = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, n_threads };
    pthread_t threads[MAX_THREADS];
    worker    workers[MAX_THREADS];
    int64_t   next   = 0;
    int64_t   stride = 1 + below(plan.n_items);
    while (gcd(stride, plan.n_items) != 1) {
        stride++;
    }
    void * work = malloc(tbq_attention_work_bytes(&plan, n_threads));
    memset(work, 0xFF, tbq_attention_work_bytes(&plan, n_threads));
    for (int i = 0; i < n_threads; i++) {
        workers[i] = (worker){ &plan, k, work, n_threads, i, &next, stride, &meet };
        pthread_create(&threads[i], NULL, work_on, &workers[i]);
    }
    for (int i = 0; i < n_threads; i++) {
        pthread_join(threads[i], NULL);
    }
    free(work);
    return out;
}

// Of the reference against double precision on the same rounded queries.  A weight is rounded to 1 / 32639 of the
// tile's largest, at worst (one large weight in a tile, the other 63 rows half a unit off and alike) 1e-3 of the sum.
// Random rows come to 1e-5, squared 1e-10; sums that cancel to a tenth, to 1e-8.
#define LARGEST_ERROR 1e-7

// --- comparisons -------------------------------------------------------------------------------------------------

static void describe(const tbq_attention * a) {
    printf(
        "  K %d V %d, sizes %d %d, streams %d (K %d, V %d), tokens %d, n_kv %d, heads %d / %d, mask %d (heads %d), sinks %d, bias %g, cap %g, exact rows %d, mean %d\n",
        a->k.type, a->v.type, (int) a->k_size, (int) a->v_size, (int) a->n_streams, (int) a->k.n_streams,
        (int) a->v.n_streams, (int) a->n_tokens, (int) a->n_kv, (int) a->n_head, (int) a->n_head_kv, a->mask != NULL,
        (int) a->mask_n_heads, a->sinks != NULL, a->max_bias, a->logit_softcap, (int) a->n_exact,
        a->mean ? 1 + a->mean_of_values : 0);
}

static int same(const char * name, const tbq_attention * a, const float * x, const float * y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (memcmp(x + i, y + i, sizeof(float)) && !(isnan(x[i]) && isnan(y[i]))) {
            printf("%s differs at %d of %d: %.9g, not %.9g\n", name, (int) i, (int) n, y[i], x[i]);
            describe(a);
            return 0;
        }
    }
    return 1;
}

// Of x against the oracle, squared, over squares.  What quantization does to the oracle goes to *quantization.
static double error_of(const problem * p, oracle_kind kind, const float * x, double * quantization) {
    const int64_t n    = p->a.n_streams * p->a.n_tokens * p->a.n_head * p->a.v_size;
    double *      want = malloc(2 * n * sizeof(double));
    double        e = 0, s = 0, q = 0;
    oracle(p, kind, want);
    if (quantization) {
        oracle(p, EXACT, want + n);
    }
    for (int64_t i = 0; i < n; i++) {
        e += (x[i] - want[i]) * (x[i] - want[i]);
        s += want[i] * want[i];
        q += quantization ? (want[i] - want[n + i]) * (want[i] - want[n + i]) : 0;
    }
    free(want);
    if (quantization) {
        *quantization = s > 0 ? q / s : 0;
    }
    return s > 0 ? e / s : e;
}

// A NaN in one cached row reaches the query rows that see it, whole (a key) or in the channels that share its scale
// (a value), and nothing else.
static int check_nan(const tbq_kernels * k) {
    problem                p     = make_problem(0);
    tbq_attention *        a     = &p.a;
    const tbq_kernels *    ref   = tbq_list_kernels(&(int){ 0 })[0];
    const int64_t          group = a->n_head / a->n_head_kv;
    const int64_t          at = below(a->n_kv), head = below(a->n_head_kv);
    const int              in_values = below(2) && a->k.data != a->v.data && a->v.n_streams == a->k.n_streams;
    tbq_attention_tensor * side      = in_values ? &a->v : &a->k;
    const int64_t          reach     = !in_values                         ? a->v_size
                                       : is_half(side->type)              ? 1
                                       : side->type == TBQ_ATTENTION_Q8_0 ? 32
                                                                          : TBQ_BLOCK;
    const int              listed    = p.slots && side->type > 100;
    // in an exact row, if a stream has this one
    int64_t   stream           = below(a->n_streams);
    const int exact            = listed && p.slots[stream * a->n_kv + at] >= 0;
    const int group_of_streams = (int) (exact ? 1 : a->n_streams / side->n_streams);
    stream /= group_of_streams;
    uint8_t *    row = exact ? (uint8_t *) side_row(in_values ? &a->exact_v : &a->exact_k, stream, head,
                                                    p.slots[stream * a->n_kv + at])
                             : (uint8_t *) side_row(side, stream, head, at);
    const char * one = exact ? "\x00\x00\x80\x3f" : "\x00\x3c";
    const char * nan = exact ? "\x00\x00\xc0\x7f" : "\xff\x7f";
    int          ok  = 1;
    if (in_values) { // no weight is zero: logits that lie close together
        a->scale *= 0.1f;
        a->max_bias = 0;
    }
    // the row may have been poisoned already, because nobody sees it
    memcpy(row, one, exact ? 4 : 2);
    float * clean = compute(a, ref, 1);
    memcpy(row, nan, exact ? 4 : 2);
    float * x = compute(a, k, 2);
    for (int64_t i = 0; ok && i < a->n_streams * a->n_tokens * a->n_head * a->v_size; i++) {
        const int64_t c = i % a->v_size, h = i / a->v_size % a->n_head, t = i / a->v_size / a->n_head % a->n_tokens;
        const int64_t s = i / a->v_size / a->n_head / a->n_tokens;
        const int sees  = s / group_of_streams == stream && h / group == head && mask_of(a, s, t, h, at) > -INFINITY &&
                          (exact || !listed || p.slots[s * a->n_kv + at] < 0);
        if (sees && c < reach ? !isnan(x[i]) : memcmp(x + i, clean + i, sizeof(float)) != 0) {
            printf("%s, NaN in %s, row %d of head %d: %.9g, %.9g without, at %d\n", k->name,
                   in_values ? "values" : "keys", (int) at, (int) head, x[i], clean[i], (int) i);
            describe(a);
            ok = 0;
        }
    }
    free(clean);
    free(x);
    free_problem(&p);
    return ok;
}

int main(int argc, char ** argv) {
    const int problems  = argc > 1 ? atoi(argv[1]) : 100;
    const int n_threads = argc > 3 ? atoi(argv[3]) : 3;
    if (problems < 2 || n_threads < 1 || n_threads > MAX_THREADS) {
        fprintf(stderr, "error: at least two problems, and 1 to %d threads\n", MAX_THREADS);
        return 2;
    }
    const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;

    int                         count, failed = 0, chunked = 0, n_plain = 0, listed = 0, centered = 0;
    const tbq_kernels * const * list  = tbq_list_kernels(&count);
    double                      worst = 0, from_kernel = 0, from_quantization = 0;
    for (int i = 0; i < problems; i++) {
        // the same problems on every machine, whatever the implementations there draw in between
        state = (seed << 32) + (uint64_t) i;
        random_bits();
        const int          plain = i % 4 == 1;
        problem            p     = make_problem(plain);
        const int64_t      n     = p.a.n_streams * p.a.n_tokens * p.a.n_head * p.a.v_size;
        float *            x     = compute(&p.a, list[0], 1);
        tbq_attention_plan plan;
        tbq_attention_make_plan(&p.a, &plan);
        chunked += plan.n_chunks > 1;
        listed += p.slots != NULL;
        centered += p.a.mean && (p.a.mean_of_values || p.a.sinks || p.a.logit_softcap != 0.0f);

        const double e = error_of(&p, ROUNDED_QUERIES, x, NULL);
        worst          = fmax(worst, e);
        if (plain) { // the least error of quantization to compare with
            double quantization;
            from_kernel += error_of(&p, CACHE, x, &quantization);
            from_quantization += quantization;
            n_plain++;
        }
        if (!(e < LARGEST_ERROR)) {
            printf("ref is off by %g\n", e);
            describe(&p.a);
            failed++;
        }
        for (int j = 0; j < count; j++) {
            if (list[j]->supported()) {
                float * y = compute(&p.a, list[j], 1 + (int) below(n_threads));
                failed += !same(list[j]->name, &p.a, x, y, n);
                free(y);
                failed += i % 4 == 0 && !check_nan(list[j]);
            }
        }
        free(x);
        free_problem(&p);
    }
    for (int j = 0; j < count; j++) {
        printf("%s: %s\n", list[j]->supported() ? "compared with ref" : "not supported here", list[j]->name);
    }
    printf(
        "%d problems, %d of them in chunks, %d with exact rows, %d with a mean; relative squared error at most %.2g\n",
        problems, chunked, listed, centered, worst);
    printf(
        "tbq4_0 / tbq4_0, with queries rounded to 8 bits: the kernel adds %.2g of the squared error of quantization\n",
        from_kernel / from_quantization);
    if (n_plain >= 20) {                                    // with fewer it is a matter of luck
        failed += !(from_kernel < from_quantization / 100); // a tenth, as a root of squares
    }
    printf("%d differences\n", failed);
    return failed != 0;
}
