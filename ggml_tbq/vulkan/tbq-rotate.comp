// SPDX-License-Identifier: MIT
// Rotates rows of activations, for tbq-matvec.comp. A workgroup takes a block of 64 values.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require

#include "tbq-block.glsl"
#include "tbq-rows.glsl"

layout(local_size_x = 64) in;

layout(binding = 0) readonly buffer Source {
    float src[];
};
layout(binding = 1) writeonly buffer Rotated {
    float rotated[]; // contiguous
};

layout(push_constant) uniform Arguments {
    uvec4 ne;   // the shape, ne.x in blocks
    uvec3 from; // strides of the source, in elements
    uint  src_at;
};

shared float exchanged[64];

void main() {
    const uint lane = gl_LocalInvocationID.x, number = tbq_workgroup();
    if (number >= ne.x * ne.y * ne.z * ne.w) {
        return; // all of the workgroup
    }
    const tbq_index4 at    = tbq_index_of(number, ne);
    const uint       place = src_at + at.i0 * 64 + lane + tbq_offset(from, at.i1, at.i2, at.i3);
    float            x     = tbq_flip(0.125 * src[place], lane);
    [[unroll]] for (uint h = 1; h < 64; h *= 4) { // two distances at a time
        exchanged[lane] = x;
        barrier();
        const float a = exchanged[lane ^ h], b = exchanged[lane ^ 2 * h], c = exchanged[lane ^ 3 * h];
        barrier();
        const float low  = (lane & h) != 0 ? a - x : x + a;
        const float high = (lane & h) != 0 ? c - b : b + c;
        x                = (lane & 2 * h) != 0 ? high - low : low + high;
    }
    rotated[number * 64 + lane] = x;
}
