// SPDX-License-Identifier: MIT
// tbq: the block formats tbq2_0, tbq3_0 and tbq4_0 (2.25, 3.25 and 4.25 bits per value).
//
// FORMAT (version 1)
//
// A row is a whole number of blocks of 64 values.  Each block is quantized independently:
//
//     y = H64 . diag(s) . x / 8        the rotation; H64 is the Sylvester Hadamard matrix
//     idx[i] = a level for y[i]         ascending index into the type's integer codebook k
//     x^ = d . diag(s) . H64^T . k[idx] / 8
//
// s is a fixed vector of 64 signs.  k is the Lloyd-Max quantizer of a Gaussian, scaled to integers.  Both are in the
// generated tbq-tables.h; tools/tables.py derives them.  d, the scale, is an IEEE half, little endian.
// d = 0 decodes to zeros, d = NaN to NaNs.
//
// TurboQuant (Zandieh et al., arXiv 2504.19874) is the source of the rotation-and-codebook idea.  The rotation
// is part of the type: decoding returns values in the original domain.
//
// Bit order.  "e" is the position of a value in its block, from 0.
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
// Why this order: on AVX2, AVX-512 and NEON a 16- or 32-byte load, shifts by constants and one table lookup unpack it
// in element order.  On CUDA, which reads 32-bit words, the nibbles of tbq4_0 are `prmt` selectors without any change.
// For tbq3_0 the low pairs of word w with parity p of j are (qs32[w] >> 2p) & 0x33333333, and their high bits ((qh32[w
// & 1] >> (2 (w >> 1) + p)) & 0x11111111) << 2: one constant shift each.
//
// EXACTNESS
//
// Every CPU implementation returns the same bytes from quantization, and the same floats from dequantization, rotation
// and dot products: each order of summation is fixed, and everything else is integer arithmetic.  This holds in the
// default rounding mode (to nearest).
//
// CONVENTIONS
//
// n counts values.  It is a multiple of TBQ_BLOCK, and may be 0; otherwise the result is TBQ_ERROR_LENGTH and nothing
// is written.  Blocks may start at any address; arrays of float and half are aligned as C requires.  Buffers do not
// overlap unless a function says that they may.  All functions are reentrant, allocate nothing and keep no state.
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

#define TBQ_VERSION_MAJOR  0
#define TBQ_VERSION_MINOR  1
#define TBQ_VERSION_PATCH  0
#define TBQ_FORMAT_VERSION 1

#define TBQ_BLOCK 64

typedef struct {
    uint16_t d;      // scale, IEEE half
    uint8_t  qs[32]; // 4-bit indices
} block_tbq4_0;
TBQ_STATIC_ASSERT(sizeof(block_tbq4_0) == 34, "tbq4_0 block size");

typedef struct {
    uint16_t d;      // scale, IEEE half
    uint8_t  qs[16]; // low two bits of each index
    uint8_t  qh[8];  // high bit plane
} block_tbq3_0;
TBQ_STATIC_ASSERT(sizeof(block_tbq3_0) == 26, "tbq3_0 block size");

typedef struct {
    uint16_t d;      // scale, IEEE half
    uint8_t  qs[16]; // 2-bit indices
} block_tbq2_0;
TBQ_STATIC_ASSERT(sizeof(block_tbq2_0) == 18, "tbq2_0 block size");

// The other operand of a dot product, such as an activation: d . qs approximates y, the rotated values.  Never in
// files.
//
// x86 multiplies unsigned by signed bytes, so its kernels add 64 to the codebook entries.  bias[] subtracts what this
// adds to a dot product.  It is the start value of the eight partial sums that every implementation forms; partial sum
// l has the products of values 4l..4l+3 and 32+4l..32+4l+3.
typedef struct {
    float   d;
    int32_t bias[8]; // -64 times the sum of qs over the values of partial sum l
    int8_t  qs[64];  // -127..127
} block_tbq8_act;
TBQ_STATIC_ASSERT(sizeof(block_tbq8_act) == 100, "tbq8_act block size");

// Exact rows: the newest and the first rows of a KV cache, in 8 bits beside the packed ones (docs/design/attention.md).
// d . qs approximates y, the rotated values, as in block_tbq8_act.  Only in caches: never in files.
typedef struct {
    float  d;      // max |y| / 127; NaN where a value is NaN or Inf
    int8_t qs[64]; // -127..127
} block_tbq8_0;
TBQ_STATIC_ASSERT(sizeof(block_tbq8_0) == 68, "tbq8_0 block size");

// The values are the GGML type ids.  They are far above llama.cpp's own, so that no other type can be mistaken for
// these.
typedef enum {
    TBQ_TYPE_TBQ2_0   = 642,
    TBQ_TYPE_TBQ3_0   = 643,
    TBQ_TYPE_TBQ4_0   = 644,
    TBQ_TYPE_TBQ8_0   = 645,
    TBQ_TYPE_TBQ8_ACT = 648,
} tbq_type;

typedef enum {
    TBQ_OK           = 0,
    TBQ_ERROR_TYPE   = -1, // not a tbq type, or not one that this function takes
    TBQ_ERROR_LENGTH = -2, // n is negative or not a multiple of TBQ_BLOCK, or another count breaks the function's rule
    TBQ_ERROR_NULL   = -3, // a null pointer where n > 0
} tbq_status;

typedef struct {
    tbq_type       type;
    const char *   name;  // "tbq4_0"
    int32_t        bits;  // bits of an index; 8 for tbq8_0 and the activation type
    int32_t        block; // values per block: TBQ_BLOCK
    size_t         block_bytes;
    const int8_t * levels; // the 2^bits codebook entries, ascending; NULL where bits is 8
} tbq_type_info;

// English text, never NULL.
TBQ_API const char * tbq_status_text(tbq_status status);

// "MAJOR.MINOR.PATCH"
TBQ_API const char * tbq_version(void);

// NULL for an unknown type or name.  The result is static.
TBQ_API const tbq_type_info * tbq_get_type_info(tbq_type type);
TBQ_API const tbq_type_info * tbq_find_type(const char * name);

// The bit mask of s: bit i set means channel i is negated.
TBQ_API uint64_t tbq_sign_bits(void);

// The bytes of n values, or 0 if type or n is not valid.
TBQ_API size_t tbq_row_bytes(tbq_type type, int64_t n);

// Values to blocks, with the least squared error: for weights and vectors.
// src: n floats (or IEEE halves).  dst: tbq_row_bytes(type, n) bytes.  tbq_quantize takes TBQ_TYPE_TBQ8_0 and TBQ_TYPE_TBQ8_ACT,
// too; these are rounded to the nearest byte.
//
// The encoder tries a grid of scales around rms(y), keeps the index vector with the largest cosine to y, and sets d by
// least squares.  A block with a NaN or Inf gets d = NaN.  Zeros, and values too small for any d, give d = 0.  A d
// above the largest finite half becomes that.
TBQ_API tbq_status tbq_quantize(tbq_type type, const float * src, void * dst, int64_t n);
TBQ_API tbq_status tbq_quantize_f16(tbq_type type, const uint16_t * src, void * dst, int64_t n);

// The same for the keys and values of attention, which a model reads mostly through their large channels: the squared
// error is 6 to 9 % larger in sum, but smaller in those channels, and the norm is preserved.  The KV cache of the
// patched llama.cpp is written with this, weights with the above (docs/design/encoder.md).
TBQ_API tbq_status tbq_quantize_kv(tbq_type type, const float * src, void * dst, int64_t n);
TBQ_API tbq_status tbq_quantize_kv_f16(tbq_type type, const uint16_t * src, void * dst, int64_t n);

// The same for src - mean, with measured weights for the squared error in each channel; blocks decode to src - mean.
// mean: n floats, or NULL for zeros.  weight: n floats above 0 with weight[c] == weight[c ^ 1], of any scale within a
// block, or NULL: weights from src, as in tbq_quantize_kv.  Both belong to a layer of a model
// (docs/design/centering.md).  With weights, which are those of keys, the scale is unbiased, <y, d k> = <y, y>, instead
// of preserving the norm.
TBQ_API tbq_status tbq_quantize_kv_centered(tbq_type type, const float * src, const float * mean, const float * weight,
                                            void * dst, int64_t n);

// Blocks to values in the original domain.
// src: tbq_row_bytes(type, n) bytes.  dst: n floats (or halves, rounded to nearest even).  tbq_dequantize takes
// TBQ_TYPE_TBQ8_0, too.
TBQ_API tbq_status tbq_dequantize(tbq_type type, const void * src, float * dst, int64_t n);
TBQ_API tbq_status tbq_dequantize_f16(tbq_type type, const void * src, uint16_t * dst, int64_t n);

// *result = the dot product of row, n values in a tbq type, and act, n values in TBQ_TYPE_TBQ8_ACT.  The rotation
// cancels, so this approximates the dot product of the original vectors.
TBQ_API tbq_status tbq_dot(tbq_type type, const void * row, const void * act, int64_t n, float * result);

// The rotation y = H64 . diag(s) . x / 8 of each 64 values, and its inverse x = diag(s) . H64 . y / 8.
// dst may be src.
TBQ_API tbq_status tbq_rotate(const float * src, float * dst, int64_t n);
TBQ_API tbq_status tbq_unrotate(const float * src, float * dst, int64_t n);

#ifdef __cplusplus
}
#endif
