// SPDX-License-Identifier: MIT
// Puts the splits of tbq-attention.comp together, and rotates the result back. A workgroup has 64 channels of a column,
// four invocations for each: they share the splits, of which there are at most 256.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require

#include "tbq-tables.glsl"

layout(constant_id = 0) const bool ROTATED = true; // the values are

layout(local_size_x = 256) in;

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

const float NONE = -1e30;

shared vec4 maxima[64];      // of each split, then of 16 splits
shared vec2 factors[256];    // of each split, and the same times its sum of weights
shared vec2 shares[256];     // the sums of values and of weights of an invocation
shared vec4 exchanged[2][16];

float eight(uint stage, uint from, uint which) {
    float a[8];
    [[unroll]] for (int i = 0; i < 8; i++) {
        a[i] = exchanged[stage][2 * from + i / 4][i & 3];
    }
    [[unroll]] for (int h = 1; h < 8; h *= 2) {
        [[unroll]] for (int i = 0; i < 8; i += 2 * h) {
            a[i] = (which & h) != 0 ? a[i] - a[i + h] : a[i] + a[i + h];
        }
    }
    return a[0];
}

void main() {
    const uint thread = gl_LocalInvocationID.x, lane = thread & 63, share = thread >> 6;
    const uint number = gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x;
    const uint column = number / blocks, block = number % blocks, head = column % n_head;
    if (column >= n_columns) {
        return; // all of the workgroup
    }
    const uint first = column * n_splits, sums_at = n_columns * n_splits * blocks * 64;
    vec2       own = vec2(NONE, 0.0);
    if (thread < n_splits) {
        own = vec2(partial[sums_at + (first + thread) * 2], partial[sums_at + (first + thread) * 2 + 1]);
    }
    maxima[thread / 4][thread & 3] = own.x;
    barrier();
    float most = NONE;
    for (uint i = 0; i < (n_splits + 3) / 4; i++) {
        const vec4 m = maxima[i];
        most         = max(most, max(max(m.x, m.y), max(m.z, m.w)));
    }
    const float sink = (flags & HAS_SINKS) != 0 ? sinks[sinks_at + head] : NONE;
    most             = max(most, sink);
    const float own_factor = exp(own.x - most);
    factors[thread]        = vec2(own_factor, own_factor * own.y);
    barrier();
    vec2 s = vec2(0.0);
    for (uint split = share; split < n_splits; split += 4) {
        const vec2 f = factors[split];
        s += vec2(f.x * partial[((first + split) * blocks + block) * 64 + lane], f.y);
    }
    shares[thread] = s;
    barrier();
    if (thread < 64) {
        s += shares[thread + 64] + shares[thread + 128] + shares[thread + 192];
        exchanged[0][lane >> 2][lane & 3] = s.x;
    }
    barrier();
    if (ROTATED) {
        if (thread < 64) {
            const uint place = (lane & 7) * 8 + (lane >> 3);
            exchanged[1][place >> 2][place & 3] = eight(0, lane >> 3, lane & 7);
        }
        barrier();
    }
    if (thread >= 64) {
        return;
    }
    const float sum     = s.y + ((flags & HAS_SINKS) != 0 ? exp(sink - most) : 0.0);
    const float inverse = sum > 0.0 ? 1.0 / sum : 0.0;
    float       x       = inverse * s.x;
    if (ROTATED) {
        const uint signs = lane < 32 ? TBQ_SIGN_BITS.x : TBQ_SIGN_BITS.y;
        x                = 0.125 * inverse * eight(1, lane & 7, lane >> 3);
        x                = (signs >> (lane & 31) & 1) != 0 ? -x : x;
    }
    if ((flags & HAS_MEAN) != 0) {
        x += s.y * inverse * means[mean_at + head / gqa * mean_s + block * 64 + lane];
    }
    result[result_at + (column * blocks + block) * 64 + lane] = x;
}
