// SPDX-License-Identifier: MIT
// Puts the splits of tbq-attention.comp together, and rotates the result back. A workgroup has 64 channels of a column.
#version 450
#extension GL_GOOGLE_include_directive : require

#include "tbq-tables.glsl"

layout(local_size_x = 64) in;

layout(binding = 0) readonly buffer Partial {
    float partial[];
};
layout(binding = 1) writeonly buffer Result {
    float result[];
};
layout(binding = 2) readonly buffer Sinks {
    float sinks[];
};
layout(binding = 3) readonly buffer Mean {
    float means[];
};

layout(push_constant) uniform Arguments {
    uint n_columns, n_splits, blocks;
    uint n_head, gqa;
    uint result_at, sinks_at, mean_at, mean_s;
    uint flags;
};

const uint HAS_SINKS = 1;
const uint HAS_MEAN  = 2; // values lack the mean of the keys, too

shared float exchanged[64];

void main() {
    const uint lane = gl_LocalInvocationID.x;
    const uint number = gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x;
    const uint column = number / blocks, block = number % blocks, head = column % n_head;
    if (column >= n_columns) {
        return; // all of the workgroup
    }
    const uint first = column * n_splits, sums_at = n_columns * n_splits * blocks * 64;
    float      largest = -1e30;
    for (uint split = 0; split < n_splits; split++) {
        largest = max(largest, partial[sums_at + (first + split) * 2]);
    }
    if ((flags & HAS_SINKS) != 0) {
        largest = max(largest, sinks[sinks_at + head]);
    }
    float sum = 0.0, value = 0.0;
    for (uint split = 0; split < n_splits; split++) {
        const uint  at     = sums_at + (first + split) * 2;
        const float factor = exp(partial[at] - largest);
        sum += factor * partial[at + 1];
        value += factor * partial[((first + split) * blocks + block) * 64 + lane];
    }
    const float of_rows = sum;
    if ((flags & HAS_SINKS) != 0) {
        sum += exp(sinks[sinks_at + head] - largest);
    }
    const float inverse = sum > 0.0 ? 1.0 / sum : 0.0;

    float x = 0.125 * inverse * value;
    for (uint h = 1; h < 64; h *= 2) {
        exchanged[lane] = x;
        barrier();
        const float other = exchanged[lane ^ h];
        barrier();
        x = (lane & h) != 0 ? other - x : x + other;
    }
    const uint signs = lane < 32 ? TBQ_SIGN_BITS.x : TBQ_SIGN_BITS.y;
    x                = (signs >> (lane & 31) & 1) != 0 ? -x : x;
    if ((flags & HAS_MEAN) != 0) {
        x += of_rows * inverse * means[mean_at + head / gqa * mean_s + block * 64 + lane];
    }
    result[result_at + (column * blocks + block) * 64 + lane] = x;
}
