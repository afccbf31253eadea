// SPDX-License-Identifier: MIT
// tbq: the block formats tbq2_0, tbq3_0 and tbq4_0 (2.25, 3.25 and 4.25 bits per value).
//
// FORMAT (version 1)
//
// A row is a whole number of blocks of 64 values.  Every block is quantized by itself:
//
//     y = H64 . diag(s) . x / 8        the rotation; H64 is the Sylvester Hadamard matrix
//     idx[i] = a level for y[i]         ascending index into the type's integer codebook k
//     x^ = d . diag(s) . H64^T . k[idx] / 8
//
// s is a fixed vector of 64 signs and k the Lloyd-Max quantizer of a Gaussian in integers; both are in the
// generated tbq-tables.h, whose generator states their derivation.  d is an IEEE half, little endian.
// d = 0 decodes to zeros, d = NaN to NaNs.
//
// TurboQuant (Zandieh et al., arXiv 2504.19874) is the source of the rotation-and-codebook idea.  The rotation
// is part of the type: decoding returns values in the original domain.
//
// Bit order.  "e" is the position of a value within its block, counted from 0.
//
//   tbq4_0, 34 bytes     | d | qs[0] ... qs[31] |
//
//       qs[i]       bit  7 6 5 4   3 2 1 0
//                        idx e=i+32  idx e=i                     (i < 32)
//
//   tbq2_0, 18 bytes     | d | qs[0] ... qs[15] |
//
//       qs[i]       bit  7 6     5 4     3 2     1 0
//                        e=i+48  e=i+32  e=i+16  e=i             (i < 16)
//
//   tbq3_0, 26 bytes     | d | qs[0] ... qs[15] | qh[0] ... qh[7] |
//
//       qs as in tbq2_0 with the low two bits of each index; the high bit of value e = 16 j + i is
//
//       qh[i & 7]   bit  7     6     5     4     3     2     1     0
//                   j =  3     2     3     2     1     0     1     0
//                   i >= 8 for bits 2, 3, 6, 7: bit = (j & 1) | (i >> 3) << 1 | (j >> 1) << 2
//
// Why this order: a 16- or 32-byte load, shifts by constants and one table lookup unpack it in element order on
// AVX2, AVX-512 and NEON.  In 32-bit words (CUDA) the nibbles of tbq4_0 are `prmt` selectors as they are, and
// for tbq3_0 the low pairs of word w with parity p of j, (qs32[w] >> 2p) & 0x33333333, meet their high bits in
// ((qh32[w & 1] >> (2 (w >> 1) + p)) & 0x11111111) << 2: one constant shift each.
//
// EXACTNESS
//
// Every CPU implementation returns the same bytes from quantization and the same floats from dequantization,
// rotation and dot products: each order of summation is fixed, and everything else is integer arithmetic.
// This needs the default rounding mode (to nearest).
//
// CONVENTIONS
//
// n counts values and is a multiple of TBQ_BLOCK, or TBQ_ERROR_LENGTH is returned and nothing is written; n = 0
// is fine.  Blocks may lie at any address; arrays of float and half are aligned as C requires.  Buffers do not
// overlap unless a function says so.  All functions are reentrant, allocate nothing and keep no state.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define TBQ_STATIC_ASSERT static_assert
#else
#define TBQ_STATIC_ASSERT _Static_assert
#endif

#if defined(_WIN32) && defined(TBQ_SHARED)
#ifdef TBQ_BUILD
#define TBQ_API __declspec(dllexport)
#else
#define TBQ_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define TBQ_API __attribute__((visibility("default")))
#else
#define TBQ_API
#endif

#define TBQ_VERSION_MAJOR 0
#define TBQ_VERSION_MINOR 1
#define TBQ_VERSION_PATCH 0
#define TBQ_FORMAT_VERSION 1

#define TBQ_BLOCK 64

typedef struct {
    uint16_t d;       // scale, IEEE half
    uint8_t  qs[32];  // 4-bit indices
} block_tbq4_0;
TBQ_STATIC_ASSERT(sizeof(block_tbq4_0) == 34, "tbq4_0 block size");

typedef struct {
    uint16_t d;       // scale, IEEE half
    uint8_t  qs[16];  // low two bits of each index
    uint8_t  qh[8];   // high bit plane
} block_tbq3_0;
TBQ_STATIC_ASSERT(sizeof(block_tbq3_0) == 26, "tbq3_0 block size");

typedef struct {
    uint16_t d;       // scale, IEEE half
    uint8_t  qs[16];  // 2-bit indices
} block_tbq2_0;
TBQ_STATIC_ASSERT(sizeof(block_tbq2_0) == 18, "tbq2_0 block size");

// The other operand of a dot product: rotated, d . qs ~ y.  Never stored in files.
//
// x86 multiplies unsigned by signed bytes, so kernels there use codebook entries biased by 64.  bias[] takes the
// surplus off again: it is the start value of the eight partial sums that every implementation forms, of which
// number l collects the products of values 4l..4l+3 and 32+4l..32+4l+3.
typedef struct {
    float   d;
    int32_t bias[8];  // -64 times the sum of qs over the values of partial sum l
    int8_t  qs[64];   // -127..127
} block_tbq8_act;
TBQ_STATIC_ASSERT(sizeof(block_tbq8_act) == 100, "tbq8_act block size");

// The values are the GGML type ids, far above upstream's, so that no file of ours is taken for another type.
typedef enum {
    TBQ_TYPE_TBQ2_0   = 642,
    TBQ_TYPE_TBQ3_0   = 643,
    TBQ_TYPE_TBQ4_0   = 644,
    TBQ_TYPE_TBQ8_ACT = 648,
} tbq_type;

typedef enum {
    TBQ_OK           = 0,
    TBQ_ERROR_TYPE   = -1,  // not a tbq type, or not one that this function takes
    TBQ_ERROR_LENGTH = -2,  // n is negative or not a multiple of TBQ_BLOCK
    TBQ_ERROR_NULL   = -3,  // a null pointer where n > 0
} tbq_status;

typedef struct {
    tbq_type     type;
    const char * name;         // "tbq4_0"
    int32_t      bits;         // bits of an index; 8 for the activation type
    int32_t      block;        // values per block: TBQ_BLOCK
    size_t       block_bytes;
    const int8_t * levels;     // the 2^bits codebook entries, ascending; NULL for the activation type
} tbq_type_info;

// English text, never NULL.
TBQ_API const char * tbq_status_text(tbq_status status);

// "MAJOR.MINOR.PATCH"
TBQ_API const char * tbq_version(void);

// NULL for a type (or name) that is not one of ours.  The result is static.
TBQ_API const tbq_type_info * tbq_get_type_info(tbq_type type);
TBQ_API const tbq_type_info * tbq_find_type(const char * name);

// The bit mask of s: bit i set means channel i is negated.
TBQ_API uint64_t tbq_sign_bits(void);

// Bytes of n values, or 0 if type or n are not valid.
TBQ_API size_t tbq_row_bytes(tbq_type type, int64_t n);

// src: n values.  dst: tbq_row_bytes(type, n) bytes.
//
// Encoder: the search runs over a grid of scales around rms(y); of the index vectors so found the one with the
// largest cosine to y is kept, and d is the least-squares scale: the smallest error.  A block with a NaN or Inf
// gets d = NaN; values too small for d, or zero, give d = 0; a d above the largest finite half saturates.
// tbq_quantize takes the activation type too.
TBQ_API tbq_status tbq_quantize(tbq_type type, const float * src, void * dst, int64_t n);
TBQ_API tbq_status tbq_quantize_f16(tbq_type type, const uint16_t * src, void * dst, int64_t n);

// The same blocks for keys and values of attention, which a model reads mostly through their large channels: the
// error is larger in sum (6 to 9 %), smaller there, and the norm is preserved.  The KV cache of the patched
// llama.cpp is written with this (docs/encoder.md has the figures), weights with the above.
TBQ_API tbq_status tbq_quantize_kv(tbq_type type, const float * src, void * dst, int64_t n);
TBQ_API tbq_status tbq_quantize_kv_f16(tbq_type type, const uint16_t * src, void * dst, int64_t n);

// The same of src - mean, with the channels' shares in what error costs given instead of guessed from src.
// mean: n values, or NULL for zeros.  weight: n values above 0, weight[c] == weight[c ^ 1], of any scale within a block; or
// NULL.  Both are of a model and a layer: docs/center.md.  Blocks decode to src - mean.
TBQ_API tbq_status tbq_quantize_kv_centered(tbq_type type, const float * src, const float * mean, const float * weight, void * dst, int64_t n);

// src: tbq_row_bytes(type, n) bytes.  dst: n values in the original domain.  The f16 form rounds to nearest even.
TBQ_API tbq_status tbq_dequantize(tbq_type type, const void * src, float * dst, int64_t n);
TBQ_API tbq_status tbq_dequantize_f16(tbq_type type, const void * src, uint16_t * dst, int64_t n);

// *result = dot product of row, n values in a tbq type, and act, n values in TBQ_TYPE_TBQ8_ACT.  The rotation
// cancels, so this approximates the dot product of the original vectors.
TBQ_API tbq_status tbq_dot(tbq_type type, const void * row, const void * act, int64_t n, float * result);

// The rotation y = H64 . diag(s) . x / 8 of each 64 values, and its inverse x = diag(s) . H64 . y / 8.
// dst may be src.
TBQ_API tbq_status tbq_rotate(const float * src, float * dst, int64_t n);
TBQ_API tbq_status tbq_unrotate(const float * src, float * dst, int64_t n);

#ifdef __cplusplus
}
#endif
