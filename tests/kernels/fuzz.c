// SPDX-License-Identifier: MIT
// Compares every implementation with the scalar reference, on blocks of many kinds: same bytes, same floats.
//
//     fuzz [blocks of each kind and type] [seed]
//
// Prints the implementations that ran and those that this machine does not support; exits 1 on a difference.
#include "random.h"
#include "tbq-kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROW_BLOCKS = 16, ROW = ROW_BLOCKS * TBQ_BLOCK };

static float any_bits(void) {
    const uint32_t u = random_bits();
    float          f;
    memcpy(&f, &u, 4);
    return f;
}

static float finite_bits(void) {
    float f;
    do {
        f = any_bits();
    } while (!isfinite(f));
    return f;
}

typedef enum {
    GAUSSIAN,
    HEAVY_TAILED,
    CONSTANT,
    ONE_HOT,
    SPARSE,
    STEPS,
    TINY,
    DENORMAL,
    LARGE,
    HUGE,
    ZERO,
    WITH_NAN,
    WITH_INF,
    FINITE_BITS,
    ANY_BITS,
    N_KINDS
} kind_t;

static const char * const kind_names[N_KINDS] = {
    "gaussian",         "heavy-tailed", "constant", "one-hot", "sparse",   "steps",    "tiny",
    "denormal",         "large",        "huge",     "zero",    "with NaN", "with Inf", "finite bit patterns",
    "any bit patterns",
};

static float value_of(kind_t kind) {
    switch (kind) {
        case GAUSSIAN: return gaussian();
        case HEAVY_TAILED: return gaussian() / (fabsf(gaussian()) + 1e-6f);
        case SPARSE: return random_bits() % 16 ? 0.0f : gaussian();
        case STEPS: return (float) ((int) (random_bits() % 5) - 2); // sums cancel to exact zeros
        case TINY: return gaussian() * 0x1p-28f;                    // around the smallest d
        case DENORMAL: return gaussian() * 1e-40f;
        case LARGE: return gaussian() * 1e5f; // around the largest d
        case HUGE: return gaussian() * 5e37f;
        case ZERO: return random_bits() % 2 ? 0.0f : -0.0f;
        case FINITE_BITS: return finite_bits();
        case ANY_BITS: return any_bits();
        default: return gaussian();
    }
}

static void fill_block(kind_t kind, float * x) {
    for (int i = 0; i < TBQ_BLOCK; i++) {
        x[i] = value_of(kind);
    }
    const uint32_t at = random_bits() % TBQ_BLOCK;
    if (kind == CONSTANT || kind == ONE_HOT) {
        for (int i = 1; i < TBQ_BLOCK; i++) {
            x[i] = kind == CONSTANT ? x[0] : 0.0f;
        }
        const float first = x[0];
        x[0]              = kind == CONSTANT ? first : 0.0f;
        x[at]             = first;
    } else if (kind == WITH_NAN) {
        x[at] = random_bits() % 2 ? NAN : -NAN;
    } else if (kind == WITH_INF) {
        x[at] = random_bits() % 2 ? INFINITY : -INFINITY;
    }
}

// Equal bits, except that any NaN equals any other.
static int same_floats(const float * a, const float * b, int n) {
    for (int i = 0; i < n; i++) {
        if (memcmp(a + i, b + i, 4) != 0 && !(isnan(a[i]) && isnan(b[i]))) {
            return 0;
        }
    }
    return 1;
}

static int failures;

static void expect(int ok, const char * what, const tbq_kernels * k, int bits, kind_t kind) {
    if (!ok && ++failures <= 20) {
        printf("FAILED: %s of %s differs from ref, %d bits, %s\n", what, k->name, bits, kind_names[kind]);
    }
}

static void compare_row(const tbq_kernels * ref, const tbq_kernels * k, int bits, kind_t kind, int misalign) {
    static float          x[ROW], a[ROW], b[ROW], act_source[ROW];
    static uint8_t        block_a[ROW + 64], block_b[ROW + 64];
    static block_tbq8_act act_a[ROW_BLOCKS], act_b[ROW_BLOCKS];
    static block_tbq8_0   exact_a[ROW_BLOCKS], exact_b[ROW_BLOCKS];

    const int       t     = bits - 2;
    const size_t    bytes = tbq_row_bytes((tbq_type) (TBQ_TYPE_TBQ2_0 + t), ROW);
    uint8_t * const ra    = block_a + misalign;
    uint8_t * const rb    = block_b + misalign;
    for (int i = 0; i < ROW_BLOCKS; i++) {
        fill_block(kind, x + i * TBQ_BLOCK);
        fill_block(random_bits() % 8 ? GAUSSIAN : kind, act_source + i * TBQ_BLOCK);
    }
    ref->quantize[t](x, ra, ROW);
    k->quantize[t](x, rb, ROW);
    expect(memcmp(ra, rb, bytes) == 0, "quantize", k, bits, kind);

    // what a center knows of a row: means as large as the values, and weights that two neighbors share
    static float mean[ROW], weight[ROW];
    for (int i = 0; i < ROW; i += 2) {
        mean[i]     = x[random_bits() % ROW];
        mean[i + 1] = x[random_bits() % ROW];
        weight[i] = weight[i + 1] = 0.1f + (float) (random_bits() % 1000) * 0.01f;
    }
    ref->quantize_kv[t](x, mean, weight, ra, ROW);
    k->quantize_kv[t](x, mean, weight, rb, ROW);
    expect(memcmp(ra, rb, bytes) == 0, "quantize_kv with a center", k, bits, kind);

    ref->quantize_kv[t](x, NULL, NULL, ra, ROW);
    k->quantize_kv[t](x, NULL, NULL, rb, ROW);
    expect(memcmp(ra, rb, bytes) == 0, "quantize_kv", k, bits, kind);

    if (kind == ANY_BITS) { // blocks nobody quantized: the decoders must agree on these too
        for (size_t i = 0; i < bytes; i++) {
            ra[i] = (uint8_t) random_bits();
        }
    }
    ref->dequantize[t](ra, a, ROW);
    k->dequantize[t](ra, b, ROW);
    expect(same_floats(a, b, ROW), "dequantize", k, bits, kind);

    ref->quantize_act(act_source, act_a, ROW);
    k->quantize_act(act_source, act_b, ROW);
    for (int i = 0; i < ROW_BLOCKS; i++) {
        expect(same_floats(&act_a[i].d, &act_b[i].d, 1) && !memcmp(act_a[i].bias, act_b[i].bias, 96), "quantize_act", k,
               bits, kind);
    }
    const float da = ref->dot[t](ra, act_a, ROW);
    const float db = k->dot[t](ra, act_a, ROW);
    expect(same_floats(&da, &db, 1), "dot", k, bits, kind);

    memcpy(a, act_source, sizeof(a));
    memcpy(b, act_source, sizeof(b));
    ref->mad_rotated[t](ra, 0.37f, a, ROW);
    k->mad_rotated[t](ra, 0.37f, b, ROW);
    expect(same_floats(a, b, ROW), "mad_rotated", k, bits, kind);

    ref->quantize_exact(x, mean, exact_a, ROW);
    k->quantize_exact(x, mean, exact_b, ROW);
    for (int i = 0; i < ROW_BLOCKS; i++) {
        expect(same_floats(&exact_a[i].d, &exact_b[i].d, 1) && !memcmp(exact_a[i].qs, exact_b[i].qs, TBQ_BLOCK),
               "quantize_exact with a mean", k, 8, kind);
    }
    ref->quantize_exact(x, NULL, exact_a, ROW);
    k->quantize_exact(x, NULL, exact_b, ROW);
    ref->quantize_act(x, act_b, ROW);
    for (int i = 0; i < ROW_BLOCKS; i++) {
        expect(same_floats(&exact_a[i].d, &exact_b[i].d, 1) && !memcmp(exact_a[i].qs, exact_b[i].qs, TBQ_BLOCK) &&
                   !memcmp(exact_a[i].qs, act_b[i].qs, TBQ_BLOCK),
               "quantize_exact", k, 8, kind);
    }
    ref->dequantize_exact(exact_a, a, ROW);
    k->dequantize_exact(exact_a, b, ROW);
    expect(same_floats(a, b, ROW), "dequantize_exact", k, 8, kind);
    const float ea = ref->dot_exact(exact_a, act_a, ROW);
    const float eb = k->dot_exact(exact_a, act_a, ROW);
    expect(same_floats(&ea, &eb, 1), "dot_exact", k, 8, kind);
    memcpy(a, act_source, sizeof(a));
    memcpy(b, act_source, sizeof(b));
    ref->mad_rotated_exact(exact_a, 0.37f, a, ROW);
    k->mad_rotated_exact(exact_a, 0.37f, b, ROW);
    expect(same_floats(a, b, ROW), "mad_rotated_exact", k, 8, kind);

    ref->rotate(x, a, ROW);
    k->rotate(x, b, ROW);
    expect(same_floats(a, b, ROW), "rotate", k, bits, kind);
    ref->unrotate(x, a, ROW);
    memcpy(b, x, sizeof(b));
    k->unrotate(b, b, ROW); // in place
    expect(same_floats(a, b, ROW), "unrotate", k, bits, kind);
}

int main(int argc, char ** argv) {
    const long blocks = argc > 1 ? atol(argv[1]) : 20000;
    state             = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;

    int                         count;
    const tbq_kernels * const * list = tbq_list_kernels(&count);
    for (int v = 1; v < count; v++) {
        if (!list[v]->supported()) {
            printf("not supported here: %s\n", list[v]->name);
            continue;
        }
        long rows = 0;
        for (int kind = 0; kind < N_KINDS; kind++) {
            for (int bits = 2; bits <= 4; bits++) {
                for (long i = 0; i < blocks; i += ROW_BLOCKS, rows++) {
                    compare_row(list[0], list[v], bits, (kind_t) kind, (int) (rows % 7));
                }
            }
        }
        printf("compared with ref: %s, %ld blocks\n", list[v]->name, rows * ROW_BLOCKS);
    }
    printf("best here: %s\n", tbq_best_kernels()->name);
    printf("%d differences\n", failures);
    return failures != 0;
}
