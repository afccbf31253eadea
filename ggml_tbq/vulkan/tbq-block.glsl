// SPDX-License-Identifier: MIT
// Blocks of the tbq types in GLSL (tbq.h has the format), and floats to the last bit.
//
// `bits` is the width of an index, and 8 for tbq8_0.  It is a specialization constant of the shader, so a driver
// decides every test of it.  tbq-tables.glsl is made from tbq-tables.h by the build.

#include "tbq-tables.glsl"

// --- layout -----------------------------------------------------------------------------------------------------

// Blocks are read and written in units of 16 bits, which divide their sizes.  d is the first, or a float in the first
// two for tbq8_0; qs follows, and at 3 bits qh.
uint tbq_block_units(const int bits) {
    return bits == 8 ? 34 : 1 + 4 * bits;
}

const uint TBQ_QS_UNIT  = 1;
const uint TBQ_QH_UNIT  = 9;
const uint TBQ8_QS_UNIT = 2;

// --- tables -----------------------------------------------------------------------------------------------------

const int tbq_levels_2[4]  = TBQ2_LEVELS;
const int tbq_levels_3[8]  = TBQ3_LEVELS;
const int tbq_levels_4[16] = TBQ4_LEVELS;

int tbq_level(const int bits, uint index) {
    return bits == 2 ? tbq_levels_2[index & 3] : bits == 3 ? tbq_levels_3[index & 7] : tbq_levels_4[index & 15];
}

// x with the sign of channel i of a block.
float tbq_flip(float x, uint i) {
    const uint signs = i < 32 ? TBQ_SIGN_BITS.x : TBQ_SIGN_BITS.y;
    return uintBitsToFloat(floatBitsToUint(x) ^ (signs >> (i & 31) & 1) << 31);
}

// --- unpacking --------------------------------------------------------------------------------------------------

// A block has eight nibble words, the same for every type: in word w, nibble 2 i is the index of value 4 w + i, and
// nibble 2 i + 1 that of value 4 w + i + 32 (i < 4).  For tbq4_0 these are the words of qs.  For the other types word
// w is made from word w & 3 of qs, shifted by two bits for w >= 4, and from the high bits in qh.
//
// qs: word w of qs for tbq4_0, else word w & 3; qh: word w & 1 of qh.
uint tbq_nibbles(const int bits, uint qs, uint qh, uint w) {
    if (bits == 4) {
        return qs;
    }
    const uint low = qs >> (w >> 2) * 2 & 0x33333333u;
    return bits == 2 ? low : low | (qh >> (w & 2) + (w >> 2) & 0x11111111u) << 2;
}

// --- halves -----------------------------------------------------------------------------------------------------

// A device may take subnormal floats and halves for zeros.  These two functions meet none.

float tbq_half_to_float(uint h) {
    const uint sign = (h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    if (magnitude < 0x400u) { // zero or subnormal: a multiple of 2^-24
        return uintBitsToFloat(sign | floatBitsToUint(float(magnitude) * (1.0 / 16777216.0)));
    }
    return uintBitsToFloat(sign | (magnitude << 13) + (magnitude < 0x7C00u ? 0x38000000u : 0x70000000u));
}

// To nearest, ties to even; overflows to Inf.
uint tbq_float_to_half(float f) {
    const uint bits = floatBitsToUint(f), sign = bits >> 16 & 0x8000u, mag = bits & 0x7FFFFFFFu;
    if (mag > 0x7F800000u) {
        return sign | TBQ_F16_NAN;
    }
    if (mag >= 0x477FF000u) { // 65520, halfway between the largest half and 2^16
        return sign | 0x7C00u;
    }
    if (mag < 0x33000000u) { // below half of the smallest half
        return sign;
    }
    if (mag < 0x38800000u) { // below 2^-14: adding 0.5 leaves the subnormal half, rounded, in the low bits
        precise const float sum = uintBitsToFloat(mag) + 0.5;
        return sign | floatBitsToUint(sum) - 0x3F000000u;
    }
    return sign | mag - 0x38000000u + 0xFFFu + (mag >> 13 & 1) >> 13;
}
