// SPDX-License-Identifier: MIT What tbq_ggml_device_attends says of a device that lacks an operation.  The device is a
// fake: its answer is the test's.
#include "ggml-backend-impl.h"
#include "ggml.h"
#include "tbq-ggml.h"

#include <cstdio>
#include <initializer_list>

static ggml_op     lacks = GGML_OP_NONE;
static int         asked = 0;
static ggml_tensor last_k;
static int64_t     most_rows = 0;

static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    asked++;
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        last_k    = *op->src[1];
        most_rows = op->src[0]->ne[1];
    }
    return op->op != lacks;
}

#define CHECK(x)                                        \
    do {                                                \
        if (!(x)) {                                     \
            std::printf("line %d: %s\n", __LINE__, #x); \
            return 1;                                   \
        }                                               \
    } while (0)

int main() {
    ggml_backend_device dev = {};
    dev.iface.supports_op   = supports_op;
    const auto ask = [&](ggml_type k, ggml_type v, bool v_in_k = false, int64_t head_k = 128, int64_t head_v = 128,
                         bool flash = true) {
        return tbq_ggml_device_attends(&dev, k, v, flash, v_in_k, head_k, head_v, 32, v_in_k ? 1 : 8);
    };
    CHECK(ask(GGML_TYPE_TBQ4_0, GGML_TYPE_TBQ3_0) && asked == 4 && most_rows == 512);
    CHECK(last_k.ne[0] == 128 && last_k.ne[2] == 8 && last_k.nb[1] == 8 * 68 &&
          last_k.nb[2] == 68);                                      // as the cache lays it out
    CHECK(ask(GGML_TYPE_TBQ4_0, GGML_TYPE_TBQ4_0, true, 576, 512)); // MLA
    CHECK(ask(GGML_TYPE_TBQ4_0, GGML_TYPE_TBQ4_0, true, 128, 512)); // an indexer's keys
    lacks = GGML_OP_MUL_MAT;
    CHECK(ask(GGML_TYPE_TBQ4_0, GGML_TYPE_F16) && !ask(GGML_TYPE_TBQ4_0, GGML_TYPE_F16, false, 128, 128, false));
    for (ggml_op op : { GGML_OP_FLASH_ATTN_EXT, GGML_OP_SET_ROWS }) {
        lacks = op;
        CHECK(!ask(GGML_TYPE_TBQ4_0, GGML_TYPE_TBQ3_0));
        CHECK(!ask(GGML_TYPE_TBQ2_0, GGML_TYPE_F16));
        CHECK(!ask(GGML_TYPE_Q8_0, GGML_TYPE_TBQ4_0));
        asked = 0;
        CHECK(ask(GGML_TYPE_Q4_0, GGML_TYPE_F16) && asked == 0); // not ours to say
    }
    return 0;
}
