// SPDX-License-Identifier: MIT
// The arithmetic of the shaders that must give the CPU's result to the last bit, compiled as C++: quotients and square
// roots from guesses that are wrong, and halves.
//
//     exact_math [numbers]
//
// Prints "N differences", and fails if there is one.
#include "tbq-impl.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

// --- as much of GLSL as these files use ------------------------------------------------------------------------------

#define precise
using uint = unsigned;

struct uvec2 {
    uint x, y;

    uvec2(uint a, uint b) : x(a), y(b) {}
};

static uint floatBitsToUint(float f) {
    return tbq_float_bits(f);
}

static float uintBitsToFloat(uint u) {
    return tbq_bits_float(u);
}

static void umulExtended(uint a, uint b, uint & high, uint & low) {
    const uint64_t product = (uint64_t) a * b;
    high                   = (uint) (product >> 32);
    low                    = (uint) product;
}

// the relative error of a first guess
static float guess_error = 0;

#define TBQ_GUESS(x) ((float) (x) * (1 + guess_error))

namespace glsl { // the same names as in tbq-impl.h
using std::sqrt;
#undef TBQ_SIGN_BITS
#undef TBQ_HUGE_SCALE
#undef TBQ_HUGE_UNSCALE
#include "tbq-block.glsl"
#include "tbq-exact-math.glsl"
} // namespace glsl

// --- the check -------------------------------------------------------------------------------------------------------

static std::mt19937 rng(1);

// A normal float above 0 with an exponent up to 60 from 0; often with a mantissa at an end.
static float any_float() {
    uint mantissa = rng() >> 9;
    switch (rng() % 8) {
        case 0: mantissa = rng() % 4; break;
        case 1: mantissa = 0x7FFFFF - rng() % 4; break;
        case 2: mantissa &= ~0xFFFu; break;
        default: break;
    }
    return tbq_bits_float((127 - 60 + rng() % 121) << 23 | mantissa);
}

int main(int argc, char ** argv) {
    const long n           = argc > 1 ? atol(argv[1]) : 1000000;
    long       differences = 0;
    for (float error : { 0.0f, 3e-7f, -3e-7f, 2e-6f, -2e-6f }) {
        guess_error = error;
        for (long i = 0; i < n; i++) {
            const float a = any_float(), b = any_float();
            differences += glsl::tbq_div(a, b) != a / b;
            differences += glsl::tbq_sqrt(a) != std::sqrt(a);
        }
    }
    for (uint h = 0; h < 0x10000; h++) {
        differences += tbq_float_bits(glsl::tbq_half_to_float(h)) != tbq_float_bits(tbq_half_to_float((uint16_t) h));
    }
    for (long i = 0; i < n; i++) { // floats of any bits, and those near halves
        float f = tbq_bits_float((uint) rng());
        if (i % 2) {
            f = tbq_bits_float(tbq_float_bits(tbq_half_to_float((uint16_t) rng())) + rng() % 5 - 2 +
                               (rng() % 3 - 1) * 0x1000);
        }
        differences += glsl::tbq_float_to_half(f) != tbq_float_to_half(f);
    }
    printf("%ld differences\n", differences);
    return differences != 0;
}
