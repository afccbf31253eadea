// SPDX-License-Identifier: MIT
// The Vulkan encoder and decoder beside the CPU's: the same bytes, and the same floats.
//
//     blocks [device number] [blocks of each kind]
//
// Prints a line for each comparison, then "N differences", and fails if there is one.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "tbq-ggml.h"
#include "tbq-tables.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

static long n_differences = 0;

// The bytes of a tensor that a graph makes of others, which it creates and fills.
struct graph_builder {
    ggml_context *                                              ctx;
    std::vector<std::pair<ggml_tensor *, std::vector<uint8_t>>> contents;

    template <typename T> ggml_tensor * tensor(ggml_type type, std::vector<int64_t> ne, const std::vector<T> & values) {
        ggml_tensor *        t = ggml_new_tensor(ctx, type, (int) ne.size(), ne.data());
        std::vector<uint8_t> bytes(ggml_nbytes(t));
        if (values.size() * sizeof(T) != bytes.size()) {
            fprintf(stderr, "error: %zu bytes for a tensor of %zu\n", values.size() * sizeof(T), bytes.size());
            exit(2);
        }
        memcpy(bytes.data(), values.data(), bytes.size());
        contents.emplace_back(t, bytes);
        return t;
    }
};

using build_function =
    std::function<std::vector<ggml_tensor *>(graph_builder &)>; // the tensors to read, the result first

static std::vector<uint8_t> compute(ggml_backend_t backend, const build_function & build) {
    ggml_context *             ctx  = ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
    graph_builder              b    = { ctx, {} };
    std::vector<ggml_tensor *> read = build(b);
    ggml_cgraph *              graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, read[0]);
    if (!ggml_backend_supports_op(backend, read[0])) {
        fprintf(stderr, "error: %s does not support %s\n", ggml_backend_name(backend), ggml_op_name(read[0]->op));
        exit(2);
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    for (auto & [t, bytes] : b.contents) {
        ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
    }
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        fprintf(stderr, "error: %s failed\n", ggml_backend_name(backend));
        exit(2);
    }
    std::vector<uint8_t> result;
    for (ggml_tensor * t : read) {
        const size_t at = result.size();
        result.resize(at + ggml_nbytes(t));
        ggml_backend_tensor_get(t, result.data() + at, 0, ggml_nbytes(t));
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return result;
}

// --- values ---------------------------------------------------------------------------------------------------------

static std::mt19937 rng(1);

static float uniform() {
    return std::uniform_real_distribution<float>(-1, 1)(rng);
}

static float normal() {
    return std::normal_distribution<float>()(rng);
}

struct kind {
    const char *                       name;
    std::function<void(float * block)> fill;
};

static void fill(float * x, const std::function<float(int)> & f) {
    for (int i = 0; i < 64; i++) {
        x[i] = f(i);
    }
}

static const kind kinds[] = {
    { "gaussian", [](float * x) { fill(x, [](int) { return normal(); }); } },
    { "of any size",
      [](float * x) {
          const float s = std::exp2(std::floor(90 * uniform()));
          fill(x, [=](int) { return s * normal(); });
      } },
    { "with outliers", [](float * x) { fill(x, [](int i) { return normal() * (i % 17 == 3 ? 40 : 1); }); } },
    { "mostly zeros",
      [](float * x) {
          const int at = rng() % 64;
          fill(x, [=](int i) { return i == at || rng() % 9 == 0 ? normal() : 0.0f; });
      } },
    { "constant",
      [](float * x) {
          const float c = normal();
          fill(x, [=](int) { return c; });
      } },
    { "small integers", [](float * x) { fill(x, [](int) { return (float) (int) (rng() % 5) - 2; }); } },
    { "zeros of both signs", [](float * x) { fill(x, [](int) { return rng() % 2 ? 0.0f : -0.0f; }); } },
    { "near the smallest", [](float * x) { fill(x, [](int) { return std::exp2(-30 + uniform()) * uniform(); }); } },
    { "near the largest half",
      [](float * x) {
          const float s = 3e5f * (1 + uniform());
          fill(x, [=](int) { return s * normal(); });
      } },
    { "huge",
      [](float * x) {
          const float s = std::exp2(50 + 70 * std::fabs(uniform()));
          fill(x, [=](int) { return s * uniform(); });
      } },
    { "the largest floats", [](float * x) { fill(x, [](int) { return 3.4e38f * uniform(); }); } },
    { "one NaN or Inf",
      [](float * x) {
          fill(x, [](int) { return normal(); });
          x[rng() % 64] = rng() % 2 ? NAN : rng() % 2 ? INFINITY : -INFINITY;
      } },
    { "subnormal beside normal values",
      [](float * x) { fill(x, [](int i) { return i % 3 ? normal() : std::ldexp(uniform(), -130); }); } },
};

struct data {
    int                n_blocks;
    std::vector<float> x;
};

static data of_kind(const kind & k, int n_blocks) {
    data d = { n_blocks, std::vector<float>(64 * n_blocks) };
    for (int i = 0; i < n_blocks; i++) {
        k.fill(d.x.data() + 64 * i);
    }
    return d;
}

static std::vector<float> means(int n) {
    std::vector<float> m(n);
    for (float & f : m) {
        f = 0.5f * normal();
    }
    return m;
}

static std::vector<float> weights(int n) {
    std::vector<float> w(n);
    for (int i = 0; i < n; i += 2) {
        w[i] = w[i + 1] = std::exp2(3 * uniform());
    }
    return w;
}

// --- comparisons ----------------------------------------------------------------------------------------------------

static ggml_backend_t cpu, device;

static void report(const std::string & name, long different, long of) {
    printf("%-70s %ld of %ld differ\n", name.c_str(), different, of);
    n_differences += different;
}

// In blocks of so many bytes.
static void compare_blocks(const std::string & name, size_t block_bytes, const build_function & build) {
    const std::vector<uint8_t> a = compute(cpu, build), b = compute(device, build);
    long                       different = 0;
    for (size_t i = 0; i < a.size(); i += block_bytes) {
        different += memcmp(a.data() + i, b.data() + i, std::min(block_bytes, a.size() - i)) != 0;
    }
    report(name, different, a.size() / block_bytes);
}

static void compare_floats(const std::string & name, const build_function & build) {
    const std::vector<uint8_t> a = compute(cpu, build), b = compute(device, build);
    long                       different = 0;
    for (size_t i = 0; i < a.size(); i += 4) {
        float x, y;
        memcpy(&x, a.data() + i, 4);
        memcpy(&y, b.data() + i, 4);
        different += !(std::isnan(x) && std::isnan(y)) && memcmp(&x, &y, 4) != 0;
    }
    report(name, different, a.size() / 4);
}

enum { ROW_BLOCKS = 4 }; // of a row

static void encoders(ggml_type type, int n_blocks) {
    const size_t bytes = ggml_type_size(type);
    for (const kind & k : kinds) {
        const data           d   = of_kind(k, n_blocks);
        const int64_t        ne0 = 64 * ROW_BLOCKS, rows = n_blocks / ROW_BLOCKS;
        const auto           mean = means(ne0), weight = weights(ne0);
        const std::string    name = std::string(ggml_type_name(type)) + ", " + k.name;
        std::vector<int64_t> ids(rows);
        std::vector<int32_t> slots(rows);
        for (int64_t i = 0; i < rows; i++) {
            ids[i]   = (i * 7 + 3) % (rows + 1); // one row stays empty
            slots[i] = i % 3 == 0 ? (int32_t) (i / 3) : -1;
        }
        if (rows % 7 == 6) { // 7 and rows + 1 have a common divisor
            for (int64_t i = 0; i < rows; i++) {
                ids[i] = rows - i;
            }
        }
        std::vector<ggml_fp16_t> halves(d.x.size());
        ggml_fp32_to_fp16_row(d.x.data(), halves.data(), halves.size());
        const std::vector<uint8_t> empty((rows + 1) * ROW_BLOCKS * bytes), no_slots((rows / 3 + 1) * ROW_BLOCKS * 68);

        for (int way = 0; way < 4; way++) {
            const char * ways[] = { "", ", from f16", ", centered and weighted", ", with exact rows" };
            compare_blocks(name + ways[way], bytes, [&](graph_builder & b) -> std::vector<ggml_tensor *> {
                ggml_tensor * cells = b.tensor(type, { ne0, rows + 1 }, empty);
                ggml_tensor * x     = way == 1 ? b.tensor(GGML_TYPE_F16, { ne0, rows }, halves)
                                               : b.tensor(GGML_TYPE_F32, { ne0, rows }, d.x);
                ggml_tensor * i     = b.tensor(GGML_TYPE_I64, { rows }, ids);
                ggml_tensor * r     = ggml_set_rows(b.ctx, cells, x, i);
                if (way == 2) {
                    r->src[3] = b.tensor(GGML_TYPE_F32, { ne0 }, mean);
                    r->src[4] = b.tensor(GGML_TYPE_F32, { ne0 }, weight);
                }
                if (way == 3) {
                    ggml_tensor * exact = b.tensor(GGML_TYPE_TBQ8_0, { ne0, rows / 3 + 1 }, no_slots);
                    r->src[3]           = b.tensor(GGML_TYPE_F32, { ne0 }, mean);
                    tbq_ggml_set_rows_exact(r, exact, b.tensor(GGML_TYPE_I32, { rows }, slots), 0);
                    return { r, exact };
                }
                return { r };
            });
        }
    }
}

static void exact_encoder(int n_blocks) {
    for (const kind & k : kinds) {
        const data    d   = of_kind(k, n_blocks);
        const int64_t ne0 = 64 * ROW_BLOCKS, rows = n_blocks / ROW_BLOCKS;
        const auto    mean = means(ne0);
        compare_blocks(std::string("tbq8_0, ") + k.name, 68, [&](graph_builder & b) -> std::vector<ggml_tensor *> {
            ggml_tensor * before =
                b.tensor(GGML_TYPE_TBQ8_0, { ne0, 3 }, std::vector<uint8_t>(3 * ROW_BLOCKS * 68, 17));
            return { tbq_ggml_concat_exact(b.ctx, before, b.tensor(GGML_TYPE_F32, { ne0, rows }, d.x),
                                           b.tensor(GGML_TYPE_F32, { ne0 }, mean)) };
        });
    }
}

// Blocks of any bytes, so that every d and every index is met.
static void decoder(ggml_type type, int n_blocks) {
    const int64_t        ne0 = 64 * ROW_BLOCKS, rows = n_blocks / ROW_BLOCKS;
    std::vector<uint8_t> bytes(n_blocks * ggml_type_size(type));
    for (uint8_t & x : bytes) {
        x = (uint8_t) rng();
    }
    if (type == GGML_TYPE_TBQ8_0) { // no scale below 2^-100 is written
        for (int i = 0; i < n_blocks; i++) {
            const float d = i % 5 ? std::exp2(20 * uniform()) : 0;
            memcpy(bytes.data() + i * ggml_type_size(type), &d, sizeof(d));
        }
    }
    std::vector<int32_t> ids(rows);
    for (int32_t & i : ids) {
        i = rng() % rows;
    }
    const std::string name = ggml_type_name(type);
    compare_floats(name + " to f32", [&](graph_builder & b) -> std::vector<ggml_tensor *> {
        return { ggml_cast(b.ctx, b.tensor(type, { ne0, rows }, bytes), GGML_TYPE_F32) };
    });
    compare_floats(name + ", rows by number", [&](graph_builder & b) -> std::vector<ggml_tensor *> {
        return { ggml_get_rows(b.ctx, b.tensor(type, { ne0, rows }, bytes), b.tensor(GGML_TYPE_I32, { rows }, ids)) };
    });
}

int main(int argc, char ** argv) {
    const int number   = argc > 1 ? atoi(argv[1]) : 0,
              n_blocks = argc > 2 ? atoi(argv[2]) / ROW_BLOCKS * ROW_BLOCKS : 400;
    ggml_backend_load_all();
    int n_devices = 0;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "Vulkan") == 0 && n_devices++ == number) {
            printf("%s\n", ggml_backend_dev_description(dev));
            device = ggml_backend_dev_init(dev, nullptr);
        }
    }
    cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (!device || !cpu) {
        printf("error: no Vulkan device number %d; GGML_VK_VISIBLE_DEVICES=0 also takes one that is a CPU\n", number);
        return 2;
    }
    for (ggml_type type : { GGML_TYPE_TBQ2_0, GGML_TYPE_TBQ3_0, GGML_TYPE_TBQ4_0 }) {
        encoders(type, n_blocks);
        decoder(type, n_blocks);
    }
    exact_encoder(n_blocks);
    decoder(GGML_TYPE_TBQ8_0, n_blocks);
    ggml_backend_free(device);
    ggml_backend_free(cpu);
    printf("%ld differences\n", n_differences);
    return n_differences != 0;
}
