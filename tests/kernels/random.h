// SPDX-License-Identifier: MIT
// Random numbers that are the same on every machine, from `state`, the seed.
#pragma once

#include <math.h>
#include <stdint.h>

static uint64_t state;

static uint32_t random_bits(void) { // splitmix64 (Steele, Lea, Flood 2014)
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z          = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z          = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return (uint32_t) ((z ^ (z >> 31)) >> 32);
}

static float uniform(void) { // (0, 1]
    return ((float) (random_bits() >> 8) + 1.0f) * 0x1p-24f;
}

static float gaussian(void) {
    return sqrtf(-2.0f * logf(uniform())) * cosf(6.2831853f * uniform());
}
