// SPDX-License-Identifier: MIT
// Arithmetic with the CPU's result to the last bit.
//
// Vulkan wants sums and products rounded correctly.  A compiler may still contract them, unless they are `precise`:
// each function here is one operation.  Division and square root may be wrong in the last bits, so their results are
// only a first guess: the nearest float is found with integers.

#ifndef TBQ_GUESS // tests/vulkan/exact_math.cpp makes guesses worse
#define TBQ_GUESS(x) (x)
#endif

float tbq_mul(float a, float b) {
    precise const float r = a * b;
    return r;
}

float tbq_add(float a, float b) {
    precise const float r = a + b;
    return r;
}

float tbq_sub(float a, float b) {
    precise const float r = a - b;
    return r;
}

// --- 64-bit integers, as (low, high): not every device has them ----------------------------------------------------

uvec2 tbq_mul64(uint a, uint b) {
    uint high, low;
    umulExtended(a, b, high, low);
    return uvec2(low, high);
}

// The low 64 bits.
uvec2 tbq_mul64(uvec2 a, uint b) {
    const uvec2 low = tbq_mul64(a.x, b);
    return uvec2(low.x, low.y + a.y * b);
}

bool tbq_less64(uvec2 a, uvec2 b) {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

// --- division and square root, of normal floats above 0 with normal results ------------------------------------------

const uint TBQ_ONE = 1u << 23; // the implicit bit of a mantissa

uint tbq_mantissa(uint bits) {
    return (bits & TBQ_ONE - 1) | TBQ_ONE;
}

// Remainders are computed modulo 2^32, which is right as long as a guess is off by less than 63 units of its last bit.
// Vulkan allows a quotient to be off by three, and a root by less than ten.

// The nearest: q with 2 |n - q m| < m, where n is the mantissa of a, shifted so that q has 24 bits, and m that of b.
// The quotient of two floats is never halfway between two others.
float tbq_div(float a, float b) {
    const uint ia = floatBitsToUint(a), ib = floatBitsToUint(b);
    const uint n = tbq_mantissa(ia), m = tbq_mantissa(ib);
    const uint shift = n >= m ? 23 : 24;
    uint       q     = uint(TBQ_GUESS(float(n) / float(m)) * float(1u << shift) + 0.5);
    int        rest  = int((n << shift) - q * m);
    for (; 2 * rest + int(m) < 0; rest += int(m)) {
        q--;
    }
    for (; 2 * rest - int(m) > 0; rest -= int(m)) {
        q++;
    }
    const uint exponent = (ia >> 23) - (ib >> 23) + (n >= m ? 127 : 126);
    return uintBitsToFloat((exponent << 23) + (q - TBQ_ONE)); // q may be 2^24: then the exponent is one more
}

// The nearest: s with -s < x - s^2 <= s, where x is the mantissa, shifted so that s has 24 bits.
float tbq_sqrt(float f) {
    const uint bits = floatBitsToUint(f);
    if (bits < TBQ_ONE) {
        return 0.0; // only where 1/2 is added to it
    }
    const int  e    = int(bits >> 23) - 127;
    const bool odd  = (e & 1) != 0;
    const uint n    = tbq_mantissa(bits);
    uint       s    = uint(TBQ_GUESS(sqrt(float(n))) * (odd ? 4096.0 : 2896.3093757400984) + 0.5);
    int        rest = int((n << (odd ? 24 : 23)) - s * s);
    while (rest <= -int(s)) {
        s--;
        rest += int(2 * s + 1);
    }
    while (rest > int(s)) {
        rest -= int(2 * s + 1);
        s++;
    }
    return uintBitsToFloat((uint((e >> 1) + 127) << 23) + (s - TBQ_ONE));
}
