// SPDX-License-Identifier: MIT
// ggml's operations on the tbq types (CPU backend) against the library and against the same operation in f32.
//
// Quantization, copies and look-ups must give the library's bytes and floats exactly.  What takes a dot product
// is compared with the same operation on the dequantized tensor in f32.  There the activations' (or Q's) 8 bits
// are the only approximation: an error of at most max|y| / 254 in each of 64 rotated coordinates, where max|y| is
// about 2.8 rms for a Gaussian, so an NMSE of (2.8 / 127)^2 / 12 = 4e-5 in the operand and, products of
// independent vectors adding up alike, in the result.  The bound is five times that.
#include "ggml.h"
#include "ggml-cpu.h"
#include "tbq-ggml.h"
#include "tbq.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

static constexpr double MAX_NMSE = 2e-4;

static int failures = 0;
static int checks   = 0;

static void expect(bool ok, const std::string & what) {
    checks++;
    if (!ok) {
        failures++;
        printf("FAILED: %s\n", what.c_str());
    }
}

static std::mt19937 rng(7);

static std::vector<float> gaussian(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float>              v(n);
    for (auto & x : v) {
        x = normal(rng);
    }
    return v;
}

static tbq_type tbq(ggml_type t) {
    return (tbq_type) t;
}

// As the cache holds it.
static std::vector<uint8_t> packed(ggml_type t, const std::vector<float> & x) {
    std::vector<uint8_t> out(tbq_row_bytes(tbq(t), (int64_t) x.size()));
    tbq_quantize_kv(tbq(t), x.data(), out.data(), (int64_t) x.size());
    return out;
}

// A graph in a context of its own.
struct graph {
    ggml_context * ctx = ggml_init({ 256u << 20, nullptr, false });

    ~graph() { ggml_free(ctx); }

    ggml_tensor * tensor(ggml_type t, std::vector<int64_t> ne, const void * data = nullptr) {
        ggml_tensor * r = ggml_new_tensor(ctx, t, (int) ne.size(), ne.data());
        if (data) {
            memcpy(r->data, data, ggml_nbytes(r));
        } else {
            memset(r->data, 0, ggml_nbytes(r));
        }
        return r;
    }

    // x in any type that ggml can quantize to
    ggml_tensor * quantized(ggml_type t, std::vector<int64_t> ne, const std::vector<float> & x) {
        ggml_tensor * r = tensor(t, ne);
        if (t == GGML_TYPE_F32) {
            memcpy(r->data, x.data(), ggml_nbytes(r));
        } else {
            ggml_get_type_traits_cpu(t)->from_float(x.data(), r->data, (int64_t) x.size());
        }
        return r;
    }

    ggml_tensor * as_f32(const ggml_tensor * q) {
        ggml_tensor * r = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, q->ne);
        if (q->type == GGML_TYPE_F32) {
            memcpy(r->data, q->data, ggml_nbytes(r));
        } else {
            ggml_get_type_traits(q->type)->to_float(q->data, (float *) r->data, ggml_nelements(q));
        }
        return r;
    }

    ggml_tensor * run(ggml_tensor * out, int threads = 2, bool use_ref = false) {
        ggml_cgraph * g = ggml_new_graph(ctx);
        ggml_build_forward_expand(g, out);
        ggml_cplan           plan = ggml_graph_plan(g, threads, nullptr);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        plan.use_ref   = use_ref;
        expect(ggml_graph_compute(g, &plan) == GGML_STATUS_SUCCESS, "a graph is computed");
        return out;
    }
};

static double nmse(const ggml_tensor * a, const ggml_tensor * b) {
    const float * x = (const float *) a->data;
    const float * y = (const float *) b->data;
    double        e = 0, s = 0;
    for (int64_t i = 0; i < ggml_nelements(a); i++) {
        e += (x[i] - y[i]) * (double) (x[i] - y[i]);
        s += y[i] * (double) y[i];
    }
    return e / s;
}

static void expect_close(const ggml_tensor * a, const ggml_tensor * b, const std::string & what) {
    const double e = nmse(a, b);
    expect(e < MAX_NMSE, what + ": NMSE " + std::to_string(e)); // NaN fails
}

static void type_table() {
    for (int i = 43; i < GGML_TYPE_COUNT; i++) {
        const ggml_type t   = (ggml_type) i;
        const bool      gap = !tbq_get_type_info(tbq(t));
        expect(ggml_type_name(t) != nullptr, "a name for type " + std::to_string(i));
        expect((ggml_blck_size(t) == 0) == gap && (ggml_type_size(t) == 0) == gap,
               "sizes of type " + std::to_string(i));
        if (!gap) {
            const tbq_type_info * info = tbq_get_type_info(tbq(t));
            expect(std::string(info->name) == ggml_type_name(t) && info->block == ggml_blck_size(t) &&
                       info->block_bytes == ggml_type_size(t) && ggml_is_quantized(t),
                   std::string("traits of ") + info->name);
        }
    }
}

static void copies(ggml_type t, const std::string & name) {
    const int64_t n = 192, rows = 6;
    const auto    x = gaussian(n * rows);
    const auto    q = packed(t, x);
    graph         g;

    std::vector<uint8_t> chunk(q.size()), plain(q.size());
    tbq_quantize(tbq(t), x.data(), plain.data(), n * rows);
    expect(ggml_quantize_chunk(t, x.data(), chunk.data(), 0, rows, n, nullptr) == q.size() && chunk == plain,
           "quantize_chunk to " + name);
    memset(chunk.data() + tbq_row_bytes(tbq(t), 2 * n), 0, chunk.size() - tbq_row_bytes(tbq(t), 2 * n));
    ggml_quantize_chunk(t, x.data(), chunk.data(), 2 * n, rows - 2, n, nullptr);
    expect(chunk == plain, "quantize_chunk from a later row to " + name);
    expect(ggml_validate_row_data(t, q.data(), q.size()), "valid data in " + name);
    memset(chunk.data() + ggml_type_size(t), 0x7E, 2);
    expect(!ggml_validate_row_data(t, chunk.data(), q.size()), "a NaN in d in " + name);

    ggml_tensor * f = g.tensor(GGML_TYPE_F32, { n, rows }, x.data());
    ggml_tensor * b = g.run(ggml_cpy(g.ctx, f, g.tensor(t, { n, rows })));
    expect(memcmp(b->data, q.data(), q.size()) == 0, "CPY f32 to " + name);

    std::vector<float> back(x.size());
    tbq_dequantize(tbq(t), q.data(), back.data(), (int64_t) back.size());
    ggml_tensor * u = g.run(ggml_cpy(g.ctx, b, g.tensor(GGML_TYPE_F32, { n, rows })));
    expect(memcmp(u->data, back.data(), ggml_nbytes(u)) == 0, "CPY " + name + " to f32");
    ggml_tensor * d = g.run(ggml_dup(g.ctx, b));
    expect(d->type == t && memcmp(d->data, q.data(), q.size()) == 0, "DUP of " + name);
    // a strided view: the middle block of every row
    ggml_tensor * middle = ggml_view_2d(g.ctx, b, 64, rows, b->nb[1], ggml_type_size(t));
    ggml_tensor * m      = g.run(ggml_cpy(g.ctx, middle, g.tensor(GGML_TYPE_F32, { 64, rows })));
    bool          same   = true;
    for (int64_t r = 0; r < rows; r++) {
        same &= memcmp((float *) m->data + 64 * r, back.data() + n * r + 64, 64 * sizeof(float)) == 0;
    }
    expect(same, "CPY of a view of " + name + " to f32");

    // f16 source: the same as its values in f32
    std::vector<ggml_fp16_t> half(x.size());
    std::vector<float>       rounded(x.size());
    ggml_fp32_to_fp16_row(x.data(), half.data(), (int64_t) x.size());
    ggml_fp16_to_fp32_row(half.data(), rounded.data(), (int64_t) x.size());
    ggml_tensor * h =
        g.run(ggml_cpy(g.ctx, g.tensor(GGML_TYPE_F16, { n, rows }, half.data()), g.tensor(t, { n, rows })));
    const auto qh = packed(t, rounded);
    expect(memcmp(h->data, qh.data(), qh.size()) == 0, "CPY f16 to " + name);

    const int32_t order[4] = { 5, 0, 3, 3 };
    ggml_tensor * got      = g.run(ggml_get_rows(g.ctx, b, g.tensor(GGML_TYPE_I32, { 4 }, order)));
    same                   = true;
    for (int r = 0; r < 4; r++) {
        same &= memcmp((float *) got->data + n * r, back.data() + n * order[r], n * sizeof(float)) == 0;
    }
    expect(same, "GET_ROWS of " + name);

    const int64_t to[6] = { 4, 2, 0, 1, 5, 3 };
    for (ggml_type index_type : { GGML_TYPE_I64, GGML_TYPE_I32 }) {
        ggml_tensor * index = g.tensor(index_type, { rows });
        for (int r = 0; r < rows; r++) {
            index_type == GGML_TYPE_I64 ? (void) (((int64_t *) index->data)[r] = to[r])
                                        : (void) (((int32_t *) index->data)[r] = (int32_t) to[r]);
        }
        ggml_tensor * s   = g.run(ggml_set_rows(g.ctx, g.tensor(t, { n, rows }), f, index));
        const size_t  row = tbq_row_bytes(tbq(t), n);
        same              = true;
        for (int r = 0; r < rows; r++) {
            same &= memcmp((uint8_t *) s->data + row * to[r], q.data() + row * r, row) == 0;
        }
        expect(same, std::string("SET_ROWS with ") + ggml_type_name(index_type) + " of " + name);
    }
    ggml_tensor * sum = g.run(ggml_add(g.ctx, b, f));
    expect(sum->type == t, "ADD to " + name);
}

static void products(ggml_type t, const std::string & name) {
    for (int64_t k : { 64, 320, 2048 }) {
        for (int64_t columns : { 1, 2, 7, 33 }) {
            graph         g;
            ggml_tensor * w = g.quantized(t, { k, 24 }, gaussian(k * 24));
            ggml_tensor * x = g.tensor(GGML_TYPE_F32, { k, columns }, gaussian(k * columns).data());
            expect_close(g.run(ggml_mul_mat(g.ctx, w, x)), g.run(ggml_mul_mat(g.ctx, g.as_f32(w), x)),
                         "MUL_MAT " + name + " k=" + std::to_string(k) + " n=" + std::to_string(columns));
        }
    }
    graph         g;
    const int64_t k = 256, rows = 32, experts = 4, used = 2, tokens = 5;
    ggml_tensor * w   = g.quantized(t, { k, rows, experts }, gaussian(k * rows * experts));
    ggml_tensor * x   = g.tensor(GGML_TYPE_F32, { k, used, tokens }, gaussian(k * used * tokens).data());
    ggml_tensor * ids = g.tensor(GGML_TYPE_I32, { used, tokens });
    for (int i = 0; i < used * tokens; i++) {
        ((int32_t *) ids->data)[i] = (i * 3 + i / 4) % experts;
    }
    expect_close(g.run(ggml_mul_mat_id(g.ctx, w, x, ids)), g.run(ggml_mul_mat_id(g.ctx, g.as_f32(w), x, ids)),
                 "MUL_MAT_ID " + name);
}

struct attention {
    int64_t dk, dv, heads_kv, group, n_kv, n_q;
    bool    sinks;
    float   max_bias, softcap;
};

static ggml_tensor * attend(graph & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask,
                            ggml_tensor * sinks, const attention & a, int threads = 2) {
    ggml_tensor * out = ggml_flash_attn_ext(g.ctx, q, k, v, mask, 1.0f / sqrtf((float) a.dk), a.max_bias, a.softcap);
    ggml_flash_attn_ext_add_sinks(out, sinks);
    return g.run(out, threads);
}

static void attentions(ggml_type tk, ggml_type tv, const std::string & name) {
    const attention cases[] = {
        { 64, 64, 3, 3, 113, 1, false, 0, 0 },   { 128, 128, 2, 4, 256, 3, true, 0, 0 },
        { 256, 256, 1, 8, 65, 2, false, 8, 0 },  { 192, 128, 2, 1, 130, 1, false, 0, 10 },
        { 128, 128, 1, 2, 97, 70, true, 8, 30 }, { 576, 512, 1, 16, 64, 1, false, 0, 0 },
    };
    for (const auto & a : cases) {
        graph         g;
        const int64_t heads = a.heads_kv * a.group;
        ggml_tensor * q     = g.tensor(GGML_TYPE_F32, { a.dk, a.n_q, heads }, gaussian(a.dk * a.n_q * heads).data());
        ggml_tensor * k     = g.quantized(tk, { a.dk, a.n_kv, a.heads_kv }, gaussian(a.dk * a.n_kv * a.heads_kv));
        ggml_tensor * v     = g.quantized(tv, { a.dv, a.n_kv, a.heads_kv }, gaussian(a.dv * a.n_kv * a.heads_kv));
        ggml_tensor * sinks = a.sinks ? g.tensor(GGML_TYPE_F32, { heads }, gaussian(heads).data()) : nullptr;
        ggml_tensor * mask  = g.tensor(GGML_TYPE_F16, { a.n_kv, a.n_q });
        for (int64_t r = 0; r < a.n_q; r++) { // causal: the last keys are not visible to the first queries
            for (int64_t c = 0; c < a.n_kv; c++) {
                const float m = c > a.n_kv - a.n_q + r ? -INFINITY : a.max_bias > 0 ? -(float) (a.n_kv - c) / 64 : 0;
                ((ggml_fp16_t *) mask->data)[r * a.n_kv + c] = ggml_fp32_to_fp16(m);
            }
        }
        const std::string what = "FLASH_ATTN_EXT " + name + " " + std::to_string(a.dk) + "/" + std::to_string(a.dv);
        ggml_tensor *     out  = attend(g, q, k, v, mask, sinks, a);
        ggml_tensor *     want = attend(g, q, g.as_f32(k), g.as_f32(v), mask, sinks, a);
        expect_close(out, want, what);
        for (int threads : { 1, 5 }) {
            ggml_tensor * again = attend(g, q, k, v, mask, sinks, a, threads);
            expect(memcmp(again->data, out->data, ggml_nbytes(out)) == 0, what + ", another number of threads");
        }
    }
}

// tbq8_0: to and from float, and the operations that write it.
static void exact_copies() {
    const int64_t n = 192, rows = 6, slots = 9;
    const auto    x = gaussian(n * rows), mean = gaussian(n);
    auto          centered = x;
    for (size_t i = 0; i < x.size(); i++) {
        centered[i] -= mean[i % n];
    }
    const auto encode = [&](const std::vector<float> & v) {
        std::vector<uint8_t> q(tbq_row_bytes(TBQ_TYPE_TBQ8_0, (int64_t) v.size()));
        tbq_quantize(TBQ_TYPE_TBQ8_0, v.data(), q.data(), (int64_t) v.size());
        return q;
    };
    const auto         q   = encode(x);
    const size_t       row = q.size() / rows;
    std::vector<float> back(x.size());
    tbq_dequantize(TBQ_TYPE_TBQ8_0, q.data(), back.data(), n * rows);
    double e = 0, s = 0;
    for (size_t i = 0; i < x.size(); i++) {
        e += (x[i] - back[i]) * (double) (x[i] - back[i]);
        s += x[i] * (double) x[i];
    }
    expect(e / s < 1e-4, "error of tbq8_0: " + std::to_string(e / s)); // see MAX_NMSE

    graph         g;
    ggml_tensor * f = g.tensor(GGML_TYPE_F32, { n, rows }, x.data());
    ggml_tensor * b = g.run(ggml_cpy(g.ctx, f, g.tensor(GGML_TYPE_TBQ8_0, { n, rows })));
    expect(memcmp(b->data, q.data(), q.size()) == 0, "CPY f32 to tbq8_0");
    ggml_tensor * u = g.run(ggml_cast(g.ctx, b, GGML_TYPE_F32));
    expect(memcmp(u->data, back.data(), ggml_nbytes(u)) == 0, "cast of tbq8_0 to f32");
    const int32_t order[2] = { 5, 0 };
    ggml_tensor * got      = g.run(ggml_get_rows(g.ctx, b, g.tensor(GGML_TYPE_I32, { 2 }, order)));
    expect(memcmp(got->data, back.data() + 5 * n, n * sizeof(float)) == 0, "GET_ROWS of tbq8_0");
    expect(ggml_validate_row_data(GGML_TYPE_TBQ8_0, q.data(), q.size()), "valid data in tbq8_0");

    const auto    qc     = encode(centered);
    const auto    free   = std::vector<uint8_t>(row, 0xAB);
    const int64_t to[]   = { 4, 2, 0, 1, 5, 3 };
    const int32_t at[]   = { 8, -1, 0, -1, 3, 7 };
    const int32_t list[] = { 1, 2, 8, -1, 0, -1, 3, 7 }; // in which they are from the third on
    for (bool center : { false, true }) {
        for (int threads : { 1, 2, 5 }) {
            ggml_tensor * exact = g.tensor(GGML_TYPE_TBQ8_0, { n, slots });
            memset(exact->data, 0xAB, ggml_nbytes(exact));
            ggml_tensor * set =
                ggml_set_rows(g.ctx, g.tensor(GGML_TYPE_TBQ4_0, { n, rows }), f, g.tensor(GGML_TYPE_I64, { rows }, to));
            set->src[3] = center ? g.tensor(GGML_TYPE_F32, { n }, mean.data()) : nullptr;
            tbq_ggml_set_rows_exact(set, exact, g.tensor(GGML_TYPE_I32, { 4, 2 }, list), 2);
            g.run(set, threads);
            const auto & want        = center ? qc : q;
            const auto   packed_rows = packed(GGML_TYPE_TBQ4_0, center ? centered : x);
            bool         same        = true;
            for (int64_t slot = 0; slot < slots; slot++) {
                const uint8_t * r = free.data();
                for (int i = 0; i < rows; i++) {
                    r = at[i] == slot ? want.data() + row * i : r;
                }
                same &= memcmp((uint8_t *) exact->data + row * slot, r, row) == 0;
            }
            const size_t size = packed_rows.size() / rows;
            for (int i = 0; i < rows; i++) {
                same &= memcmp((uint8_t *) set->data + size * to[i], packed_rows.data() + size * i, size) == 0;
            }
            expect(same, "SET_ROWS with exact rows");

            ggml_tensor * all = ggml_view_3d(g.ctx, exact, n, 4, 2, exact->nb[1], 5 * exact->nb[1], 0);
            ggml_tensor * two = ggml_view_3d(g.ctx, f, n, 3, 2, f->nb[1], 3 * f->nb[1], 0);
            ggml_tensor * out = g.run(tbq_ggml_concat_exact(g.ctx, all, two, set->src[3]), threads);
            same              = true;
            for (int stream = 0; stream < 2; stream++) {
                const uint8_t * o = (const uint8_t *) out->data + 7 * row * stream;
                same &= memcmp(o, (uint8_t *) exact->data + 5 * row * stream, 4 * row) == 0;
                same &= memcmp(o + 4 * row, want.data() + 3 * row * stream, 3 * row) == 0;
            }
            expect(same, "CONCAT into tbq8_0");
        }
    }
}

// Attention with a list: by the kernels and in the generic path, against attention in f32 on the rows that it names.
static void exact_attention(ggml_type tk, ggml_type tv, const std::string & name) {
    const int64_t size = 128, heads_kv = 2, heads = 6, n_kv = 300, n_q = 3, n_exact = 149, n_words = (n_kv + 31) / 32;
    graph         g;
    const auto    kx = gaussian(size * n_kv * heads_kv), vx = gaussian(size * n_kv * heads_kv);
    ggml_tensor * q    = g.tensor(GGML_TYPE_F32, { size, n_q, heads }, gaussian(size * n_q * heads).data());
    ggml_tensor * k    = g.quantized(tk, { size, n_kv, heads_kv }, kx);
    ggml_tensor * v    = g.quantized(tv, { size, n_kv, heads_kv }, vx);
    ggml_tensor * mask = g.tensor(GGML_TYPE_F16, { n_kv, n_q });
    for (int64_t i = 0; i < n_kv * n_q; i++) {
        ((ggml_fp16_t *) mask->data)[i] = ggml_fp32_to_fp16(rng() % 4 ? 0 : -INFINITY);
    }
    ggml_tensor * cells = g.tensor(GGML_TYPE_I32, { n_exact + n_words, 1 });
    int32_t *     list  = (int32_t *) cells->data;
    for (int64_t j = 0; j < n_exact; j++) {
        list[j] = j % 4 == 3 ? -1 : (int32_t) (n_kv - 1 - 2 * j);
        if (list[j] >= 0) {
            list[n_exact + list[j] / 32] |= (int32_t) (1u << list[j] % 32);
        }
    }
    // the exact rows, what they decode to, and garbage in the packed ones
    const auto exact = [&](ggml_tensor * side, const std::vector<float> & x, ggml_tensor * f32) {
        if (!ggml_is_tbq(side->type)) {
            return (ggml_tensor *) nullptr;
        }
        ggml_tensor * rows = g.tensor(GGML_TYPE_TBQ8_0, { size, n_exact, heads_kv, 1 });
        memset(rows->data, 0xFF, ggml_nbytes(rows));
        for (int64_t h = 0; h < heads_kv; h++) {
            for (int64_t j = 0; j < n_exact; j++) {
                if (list[j] >= 0) {
                    const int64_t at = (h * n_kv + list[j]) * size;
                    char *        to = (char *) rows->data + h * rows->nb[2] + j * rows->nb[1];
                    tbq_quantize(TBQ_TYPE_TBQ8_0, x.data() + at, to, size);
                    tbq_dequantize(TBQ_TYPE_TBQ8_0, to, (float *) f32->data + at, size);
                    memset((char *) side->data + h * side->nb[2] + list[j] * side->nb[1], 0x7E, side->nb[1]);
                }
            }
        }
        return rows;
    };
    ggml_tensor *   kf = g.as_f32(k), *vf = g.as_f32(v);
    ggml_tensor *   ke = exact(k, kx, kf), *ve = exact(v, vx, vf);
    const attention a    = { size, size, heads_kv, heads / heads_kv, n_kv, n_q, false, 0, 0 };
    ggml_tensor *   want = attend(g, q, kf, vf, mask, nullptr, a);
    for (bool use_ref : { false, true }) {
        ggml_tensor * out = ggml_flash_attn_ext(g.ctx, q, k, v, mask, 1.0f / sqrtf((float) size), 0, 0);
        tbq_ggml_flash_attn_ext_exact(out, ke, ve, cells);
        expect_close(g.run(out, 2, use_ref), want, "exact rows " + name + (use_ref ? ", generic path" : ""));
    }
}

int main() {
    ggml_cpu_init();
    const ggml_type ours[] = { GGML_TYPE_TBQ2_0, GGML_TYPE_TBQ3_0, GGML_TYPE_TBQ4_0 };
    const ggml_type all[]  = { GGML_TYPE_TBQ2_0, GGML_TYPE_TBQ3_0, GGML_TYPE_TBQ4_0, GGML_TYPE_F16,
                               GGML_TYPE_BF16,   GGML_TYPE_Q8_0,   GGML_TYPE_Q4_0,   GGML_TYPE_F32 };
    type_table();
    exact_copies();
    for (ggml_type t : ours) {
        copies(t, ggml_type_name(t));
        products(t, ggml_type_name(t));
    }
    for (ggml_type tk : all) {
        for (ggml_type tv : all) {
            if (ggml_is_tbq(tk) || ggml_is_tbq(tv)) {
                attentions(tk, tv, std::string(ggml_type_name(tk)) + "/" + ggml_type_name(tv));
                exact_attention(tk, tv, std::string(ggml_type_name(tk)) + "/" + ggml_type_name(tv));
            }
        }
    }
    printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
