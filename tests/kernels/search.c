// SPDX-License-Identifier: MIT The search on problems of random shape.  Every implementation is compared with the
// scalar reference, bit for bit, and the reference with plain arithmetic on the dequantized rows; vectors that are
// stored and read again must not change.
//
//     search [problems] [seed]
//
// Every buffer is its own allocation of exactly the size that the problem needs, so that AddressSanitizer sees a read
// past its end.  Prints the implementations that ran; exits 1 on a difference.
#include "random.h"
#include "tbq-kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int                type;
    int64_t            blocks, n, first, last, n_queries, k;
    tbq_search_rows    rows;
    float *            x;       // what the vectors were
    float *            queries; // and the queries
    uint8_t *          packed;
    tbq_search_query * prepared;
} problem;

typedef struct {
    float *   scores;
    int64_t * positions;
} result;

static int64_t below(int64_t n) {
    return random_bits() % n;
}

static void * allocate(size_t bytes) {
    void * p = malloc(bytes ? bytes : 1);
    if (!p) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    return p;
}

static float * gaussians(int64_t n) {
    float * x = allocate((size_t) n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        x[i] = gaussian();
    }
    return x;
}

// The next random problem.  Some have equal vectors, for ties; some have scales that are NaN, whose vectors must never
// be found.
static problem make(void) {
    problem p            = { .type = TBQ_TYPE_TBQ2_0 + (int) below(3), .blocks = 1 + below(below(4) ? 3 : 24) };
    p.n                  = below(6) ? below(200) : below(3000);
    p.first              = below(2) ? 0 : below(p.n + 1) / 16 * 16;
    p.last               = below(2) ? p.n : p.first + below(p.n - p.first + 1);
    p.n_queries          = below(20);
    p.k                  = 1 + below(below(3) ? 10 : p.n + 2);
    const int64_t width  = p.blocks * TBQ_BLOCK;
    const int64_t groups = (p.n + 15) / 16;
    p.x                  = gaussians(p.n * width);
    p.queries            = gaussians(p.n_queries * width);
    p.packed             = allocate(tbq_row_bytes(p.type, p.n * width));
    p.prepared           = allocate((size_t) (p.n_queries * p.blocks) * sizeof(*p.prepared));
    for (int64_t v = 1; v < p.n; v++) {
        if (below(5) == 0) {
            memcpy(p.x + v * width, p.x + below(v) * width, (size_t) width * sizeof(float));
        }
    }
    tbq_quantize(p.type, p.x, p.packed, p.n * width);
    if (p.n && below(4) == 0) {
        const uint16_t nan = 0x7E00;
        memcpy(p.packed + below(p.n * p.blocks) * (int64_t) tbq_row_bytes(p.type, TBQ_BLOCK), &nan, 2);
    }
    tbq_search_prepare(p.queries, p.prepared, p.n_queries * width);
    uint16_t * d     = allocate((size_t) (groups * p.blocks) * 16 * sizeof(*d));
    uint32_t * codes = allocate((size_t) (groups * p.blocks * tbq_search_words(p.type)) * 16 * sizeof(*codes));
    memset(d, 0x11,
           (size_t) (groups * p.blocks) * 16 *
               sizeof(*d)); // what is in the lanes after the last vector must not matter
    memset(codes, 0x5A, (size_t) (groups * p.blocks * tbq_search_words(p.type)) * 16 * sizeof(*codes));
    const int64_t cut = p.n ? below(p.n + 1) : 0;
    tbq_search_put(p.type, p.blocks, p.packed, 0, cut, d, codes);
    tbq_search_put(p.type, p.blocks, p.packed + tbq_row_bytes(p.type, cut * width), cut, p.n - cut, d, codes);
    float * mul = NULL;
    float * add = NULL;
    if (below(2)) {
        mul = gaussians(groups * 16);
    }
    if (below(2)) {
        add = gaussians(groups * 16);
    }
    p.rows = (tbq_search_rows){ p.type, p.blocks, p.n, d, codes, mul, add };
    return p;
}

static void release(problem * p) {
    free(p->x);
    free(p->queries);
    free(p->packed);
    free(p->prepared);
    free((void *) p->rows.d);
    free((void *) p->rows.codes);
    free((void *) p->rows.mul);
    free((void *) p->rows.add);
}

static result empty(const problem * p) {
    const size_t count = (size_t) (p->n_queries * p->k);
    return (result){ allocate(count * sizeof(float)), allocate(count * sizeof(int64_t)) };
}

static void search(const tbq_kernels * k, const problem * p, result r) {
    k->search->top_k[p->type - TBQ_TYPE_TBQ2_0](&p->rows, p->first, p->last, p->prepared, p->n_queries, p->k, r.scores,
                                                r.positions);
}

static int same(const problem * p, result a, result b) {
    const size_t count = (size_t) (p->n_queries * p->k);
    return memcmp(a.scores, b.scores, count * sizeof(float)) == 0 &&
           memcmp(a.positions, b.positions, count * sizeof(int64_t)) == 0;
}

static int layout_returns(const problem * p) {
    int64_t * all  = allocate((size_t) p->n * sizeof(*all));
    uint8_t * back = allocate(tbq_row_bytes(p->type, p->n * p->blocks * TBQ_BLOCK));
    for (int64_t v = 0; v < p->n; v++) {
        all[v] = v;
    }
    tbq_search_get(p->type, p->blocks, p->rows.d, p->rows.codes, all, p->n, back);
    const int ok = memcmp(back, p->packed, tbq_row_bytes(p->type, p->n * p->blocks * TBQ_BLOCK)) == 0;
    free(all);
    free(back);
    return ok;
}

// The score of one query and vector, in double precision on what both decode to.
static double plain_score(const problem * p, int64_t query, int64_t v) {
    double sum = 0;
    for (int64_t b = 0; b < p->blocks; b++) {
        float                    x[TBQ_BLOCK], y[TBQ_BLOCK];
        const tbq_search_query * q  = p->prepared + query * p->blocks + b;
        const int64_t            at = (v * p->blocks + b) * TBQ_BLOCK;
        tbq_dequantize(p->type, p->packed + tbq_row_bytes(p->type, at), x, TBQ_BLOCK);
        tbq_rotate(x, y, TBQ_BLOCK);
        for (int e = 0; e < TBQ_BLOCK; e++) {
            sum += (double) y[e] * q->d * q->qs[e];
        }
    }
    return sum * (p->rows.mul ? p->rows.mul[v] : 1) + (p->rows.add ? p->rows.add[v] : 0);
}

// Every score found is the plain one up to rounding, scores descend, and no vector that was left out is better than the
// last.
static int plausible(const problem * p, result r) {
    for (int64_t i = 0; i < p->n_queries; i++) {
        const float *   scores = r.scores + i * p->k;
        const int64_t * at     = r.positions + i * p->k;
        int64_t         found  = 0;
        for (int64_t v = p->first; v < p->last; v++) {
            const double plain = plain_score(p, i, v);
            int64_t      j     = 0;
            while (j < p->k && at[j] != v) {
                j++;
            }
            const double bound = 1e-4 * (1 + 8.0 * (double) p->blocks);
            if (j < p->k ? !(fabs(scores[j] - plain) < bound) : plain > scores[p->k - 1] + bound) {
                printf("query %lld, vector %lld: %g at place %lld, plainly %g\n", (long long) i, (long long) v,
                       j < p->k ? scores[j] : NAN, (long long) j, plain);
                return 0;
            }
            found += j < p->k;
        }
        for (int64_t j = 0; j < p->k; j++) {
            found -= at[j] >= 0;
            if ((at[j] < 0 && scores[j] != -INFINITY) ||
                (j > 0 &&
                 (scores[j] > scores[j - 1] || (at[j] >= 0 && scores[j] == scores[j - 1] && at[j] < at[j - 1])))) {
                return 0;
            }
        }
        if (found) {
            return 0;
        }
    }
    return 1;
}

int main(int argc, char ** argv) {
    const int problems                      = argc > 1 ? atoi(argv[1]) : 200;
    state                                   = argc > 2 ? (uint64_t) atoll(argv[2]) : 1;
    int                         differences = 0, count;
    const tbq_kernels * const * list        = tbq_list_kernels(&count);
    for (int i = 0; i < problems; i++) {
        problem p         = make();
        result  reference = empty(&p);
        search(list[0], &p, reference);
        int wrong = !layout_returns(&p) + !plausible(&p, reference);
        for (int j = 1; j < count; j++) {
            if (list[j]->supported()) {
                result r = empty(&p);
                search(list[j], &p, r);
                if (!same(&p, reference, r)) {
                    printf("%s differs: problem %d, type %d, %lld blocks, %lld vectors\n", list[j]->name, i, p.type,
                           (long long) p.blocks, (long long) p.n);
                    wrong++;
                }
                free(r.scores);
                free(r.positions);
            }
        }
        differences += wrong;
        free(reference.scores);
        free(reference.positions);
        release(&p);
    }
    for (int j = 0; j < count; j++) {
        if (list[j]->supported()) {
            printf("compared with ref: %s\n", list[j]->name);
        }
    }
    printf("%d problems\n%d differences\n", problems, differences);
    return differences != 0;
}
