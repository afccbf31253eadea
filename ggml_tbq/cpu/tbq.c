// SPDX-License-Identifier: MIT
// The public functions: checks, type information, and the choice of an implementation.
#include "tbq-impl.h"

#define TEXT_OF(x) #x
#define TEXT(x)    TEXT_OF(x)

static const tbq_type_info type_infos[] = {
    { TBQ_TYPE_TBQ2_0, "tbq2_0", 2, TBQ_BLOCK, sizeof(block_tbq2_0), tbq_codebook_2 },
    { TBQ_TYPE_TBQ3_0, "tbq3_0", 3, TBQ_BLOCK, sizeof(block_tbq3_0), tbq_codebook_3 },
    { TBQ_TYPE_TBQ4_0, "tbq4_0", 4, TBQ_BLOCK, sizeof(block_tbq4_0), tbq_codebook_4 },
    { TBQ_TYPE_TBQ8_0, "tbq8_0", 8, TBQ_BLOCK, sizeof(block_tbq8_0), NULL },
    { TBQ_TYPE_TBQ8_ACT, "tbq8_act", 8, TBQ_BLOCK, sizeof(block_tbq8_act), NULL },
};
enum { N_TYPES = sizeof(type_infos) / sizeof(type_infos[0]) };

// Slowest first: the last one supported is the best.
static const tbq_kernels * const kernels_list[] = {
    &tbq_kernels_ref,
#if defined(TBQ_HAVE_X86)
    &tbq_kernels_avx2,
    &tbq_kernels_avx512,
    &tbq_kernels_avx512vnni,
#elif defined(TBQ_HAVE_NEON)
    &tbq_kernels_neon,
    &tbq_kernels_neon_dotprod,
#endif
};
enum { N_KERNELS = sizeof(kernels_list) / sizeof(kernels_list[0]) };

const char * tbq_status_text(tbq_status status) {
    switch (status) {
        case TBQ_OK: return "success";
        case TBQ_ERROR_TYPE: return "not a tbq type that this function takes";
        case TBQ_ERROR_LENGTH: return "the number of values is negative or not a multiple of 64";
        case TBQ_ERROR_NULL: return "a pointer is null";
    }
    return "unknown status";
}

const char * tbq_version(void) {
    return TEXT(TBQ_VERSION_MAJOR) "." TEXT(TBQ_VERSION_MINOR) "." TEXT(TBQ_VERSION_PATCH);
}

const tbq_type_info * tbq_get_type_info(tbq_type type) {
    for (int i = 0; i < N_TYPES; i++) {
        if (type_infos[i].type == type) {
            return &type_infos[i];
        }
    }
    return NULL;
}

const tbq_type_info * tbq_find_type(const char * name) {
    for (int i = 0; name && i < N_TYPES; i++) {
        if (strcmp(type_infos[i].name, name) == 0) {
            return &type_infos[i];
        }
    }
    return NULL;
}

uint64_t tbq_sign_bits(void) {
    return TBQ_SIGN_BITS;
}

size_t tbq_row_bytes(tbq_type type, int64_t n) {
    const tbq_type_info * info = tbq_get_type_info(type);
    return info && n >= 0 && n % TBQ_BLOCK == 0 ? (size_t) (n / TBQ_BLOCK) * info->block_bytes : 0;
}

const tbq_kernels * const * tbq_list_kernels(int * count) {
    *count = N_KERNELS;
    return kernels_list;
}

// This only tests what the C runtime found out about the CPU at start-up, so nothing is remembered here.
const tbq_kernels * tbq_best_kernels(void) {
    int i = N_KERNELS - 1;
    while (!kernels_list[i]->supported()) {
        i--;
    }
    return kernels_list[i];
}

// The checks of tbq.h's conventions.
static tbq_status check(int64_t n, const void * a, const void * b) {
    if (n < 0 || n % TBQ_BLOCK != 0) {
        return TBQ_ERROR_LENGTH;
    }
    return n > 0 && (!a || !b) ? TBQ_ERROR_NULL : TBQ_OK;
}

static tbq_status check_row(tbq_type type, int64_t n, const void * a, const void * b) {
    const tbq_type_info * info = tbq_get_type_info(type);
    return info && info->levels ? check(n, a, b) : TBQ_ERROR_TYPE;
}

tbq_status tbq_quantize(tbq_type type, const float * src, void * dst, int64_t n) {
    if (type == TBQ_TYPE_TBQ8_0 || type == TBQ_TYPE_TBQ8_ACT) {
        const tbq_status status = check(n, src, dst);
        if (status == TBQ_OK && type == TBQ_TYPE_TBQ8_0) {
            tbq_best_kernels()->quantize_exact(src, NULL, dst, n);
        } else if (status == TBQ_OK) {
            tbq_best_kernels()->quantize_act(src, dst, n);
        }
        return status;
    }
    const tbq_status status = check_row(type, n, src, dst);
    if (status == TBQ_OK) {
        tbq_best_kernels()->quantize[type - TBQ_TYPE_TBQ2_0](src, dst, n);
    }
    return status;
}

tbq_status tbq_dequantize(tbq_type type, const void * src, float * dst, int64_t n) {
    if (type == TBQ_TYPE_TBQ8_0) {
        const tbq_status status = check(n, src, dst);
        if (status == TBQ_OK) {
            tbq_best_kernels()->dequantize_exact(src, dst, n);
        }
        return status;
    }
    const tbq_status status = check_row(type, n, src, dst);
    if (status == TBQ_OK) {
        tbq_best_kernels()->dequantize[type - TBQ_TYPE_TBQ2_0](src, dst, n);
    }
    return status;
}

tbq_status tbq_quantize_kv(tbq_type type, const float * src, void * dst, int64_t n) {
    return tbq_quantize_kv_centered(type, src, NULL, NULL, dst, n);
}

tbq_status tbq_quantize_kv_centered(tbq_type type, const float * src, const float * mean, const float * weight,
                                    void * dst, int64_t n) {
    const tbq_status status = check_row(type, n, src, dst);
    if (status == TBQ_OK) {
        tbq_best_kernels()->quantize_kv[type - TBQ_TYPE_TBQ2_0](src, mean, weight, dst, n);
    }
    return status;
}

// The f16 forms convert to floats in chunks of this many values.
enum { CHUNK = 16 * TBQ_BLOCK };

typedef tbq_status (*quantize_function)(tbq_type type, const float * src, void * dst, int64_t n);

static tbq_status quantize_halves(quantize_function quantize, tbq_type type, const uint16_t * src, void * dst,
                                  int64_t n) {
    const tbq_status status = check_row(type, n, src, dst);
    for (int64_t i = 0; status == TBQ_OK && i < n; i += CHUNK) {
        float         values[CHUNK];
        const int64_t m = n - i < CHUNK ? n - i : CHUNK;
        for (int64_t j = 0; j < m; j++) {
            values[j] = tbq_half_to_float(src[i + j]);
        }
        quantize(type, values, (uint8_t *) dst + tbq_row_bytes(type, i), m);
    }
    return status;
}

tbq_status tbq_quantize_f16(tbq_type type, const uint16_t * src, void * dst, int64_t n) {
    return quantize_halves(tbq_quantize, type, src, dst, n);
}

tbq_status tbq_quantize_kv_f16(tbq_type type, const uint16_t * src, void * dst, int64_t n) {
    return quantize_halves(tbq_quantize_kv, type, src, dst, n);
}

tbq_status tbq_dequantize_f16(tbq_type type, const void * src, uint16_t * dst, int64_t n) {
    const tbq_status status = check_row(type, n, src, dst);
    for (int64_t i = 0; status == TBQ_OK && i < n; i += CHUNK) {
        float         values[CHUNK];
        const int64_t m = n - i < CHUNK ? n - i : CHUNK;
        tbq_dequantize(type, (const uint8_t *) src + tbq_row_bytes(type, i), values, m);
        for (int64_t j = 0; j < m; j++) {
            dst[i + j] = tbq_float_to_half(values[j]);
        }
    }
    return status;
}

tbq_status tbq_dot(tbq_type type, const void * row, const void * act, int64_t n, float * result) {
    const tbq_status status = result ? check_row(type, n, row, act) : TBQ_ERROR_NULL;
    if (status == TBQ_OK) {
        *result = tbq_best_kernels()->dot[type - TBQ_TYPE_TBQ2_0](row, act, n);
    }
    return status;
}

tbq_status tbq_rotate(const float * src, float * dst, int64_t n) {
    const tbq_status status = check(n, src, dst);
    if (status == TBQ_OK) {
        tbq_best_kernels()->rotate(src, dst, n);
    }
    return status;
}

tbq_status tbq_unrotate(const float * src, float * dst, int64_t n) {
    const tbq_status status = check(n, src, dst);
    if (status == TBQ_OK) {
        tbq_best_kernels()->unrotate(src, dst, n);
    }
    return status;
}
