// SPDX-License-Identifier: MIT
// Rows of blocks to rows of values in the original domain: CPY, GET_ROWS, and what other operations convert.
//
// Four invocations take a block, 16 values each.  From nibble words t and t + 4, invocation t has values 4 t + i + 16
// m and the same + 32, i, m < 4.  A pair is one integer, the first plus 2^16 times the second: sums and differences of
// such integers are those of both values, and all sums but the last are of at most 32 values, below 2^15.  So the
// butterflies are half of what they would be, and exact, whatever their order.  The one rounding is that of d . sum,
// as on the CPU.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_16bit_storage : require

#include "tbq-block.glsl"
#include "tbq-rows.glsl"

layout(constant_id = 0) const int  BITS    = 4;
layout(constant_id = 1) const bool TO_HALF = false;

layout(local_size_x = 64) in;

layout(binding = 0) readonly buffer Source {
    uint16_t src[];
};
layout(binding = 1) writeonly buffer Floats {
    vec4 dst_f32[];
};
layout(binding = 1) writeonly buffer Halves {
    uvec2 dst_f16[];
};
layout(binding = 2) readonly buffer Rows {
    int rows[];
};
layout(binding = 3) readonly buffer Mean {
    float means[];
};

layout(push_constant) uniform Arguments {
    uvec4 ne;   // the shape of the result, ne.x in blocks
    uvec3 from; // strides of the source, in units of 16 bits
    uint  src_at;
    uvec3 to; // strides of the result, in groups of four values
    uint  dst_at;
    uvec3 rows_s; // strides of the list of rows, in elements
    uint  rows_at;
    uint  mean_at, mean_s2;
    uint  flags;
};

const uint READS_LISTED  = 1; // GET_ROWS: row i1 is row rows[i1, i2, i3] of the source
const uint WRITES_LISTED = 2; // exact rows over those of a cache: row i1 becomes row rows[i1, i3], unless that is -1
const uint HAS_MEAN      = 4; // added to the values of all rows of (i2, i3): centered keys

shared int levels[16];
// what the four invocations of a block exchange, with one word of padding for each of them
shared int pairs[64][9];

uint word(uint unit) {
    return uint(src[unit]) | uint(src[unit + 1]) << 16;
}

int byte_of(uint w, uint i) {
    return bitfieldExtract(int(w), int(8 * i), 8);
}

void main() {
    const uint thread = gl_LocalInvocationID.x, t = thread & 3;
    if (thread < 16 && BITS <= 4) {
        levels[thread] = tbq_level(BITS, thread);
    }
    const uint       n     = ne.x * ne.y * ne.z * ne.w;
    const uint       block = tbq_workgroup() * 16 + thread / 4;
    const tbq_index4 at    = tbq_index_of(min(block, n - 1), ne);

    uint row = at.i1;
    int  to_row = int(at.i1);
    if ((flags & READS_LISTED) != 0) {
        row = uint(rows[rows_at + tbq_offset(rows_s, at.i1, at.i2, at.i3)]);
    }
    if ((flags & WRITES_LISTED) != 0) {
        to_row = rows[rows_at + tbq_offset(rows_s, at.i1, 0, at.i3)];
    }
    const uint from_unit = src_at + at.i0 * tbq_block_units(BITS) + tbq_offset(from, row, at.i2, at.i3);
    barrier();

    int v[2][4]; // [m][i]
    if (BITS == 8) {
        for (uint m = 0; m < 2; m++) {
            const uint lo = word(from_unit + TBQ8_QS_UNIT + 2 * (t + 4 * m));
            const uint hi = word(from_unit + TBQ8_QS_UNIT + 2 * (t + 4 * m + 8));
            for (uint i = 0; i < 4; i++) {
                v[m][i] = byte_of(lo, i) + byte_of(hi, i) * 65536;
            }
        }
    } else {
        const uint qs = word(from_unit + TBQ_QS_UNIT + 2 * t);
        const uint q4 = BITS == 4 ? word(from_unit + TBQ_QS_UNIT + 2 * (t + 4)) : qs;
        const uint qh = BITS == 3 ? word(from_unit + TBQ_QH_UNIT + 2 * (t & 1)) : 0;
        for (uint m = 0; m < 2; m++) {
            const uint nibbles = tbq_nibbles(BITS, m == 0 ? qs : q4, qh, t + 4 * m);
            for (uint i = 0; i < 4; i++) {
                v[m][i] = levels[nibbles >> 8 * i & 15] + levels[nibbles >> 8 * i + 4 & 15] * 65536;
            }
        }
    }
    // distances 1, 2 and 16 within the invocation
    for (uint m = 0; m < 2; m++) {
        const int a = v[m][0] + v[m][1], b = v[m][0] - v[m][1], c = v[m][2] + v[m][3], d = v[m][2] - v[m][3];
        v[m][0] = a + c;
        v[m][1] = b + d;
        v[m][2] = a - c;
        v[m][3] = b - d;
    }
    for (uint i = 0; i < 4; i++) {
        const int a = v[0][i], b = v[1][i];
        pairs[thread][i]     = a + b;
        pairs[thread][4 + i] = a - b;
    }
    barrier();
    // 4 and 8 across the four
    const uint first = thread & ~3u;
    for (uint m = 0; m < 2; m++) {
        for (uint i = 0; i < 4; i++) {
            const uint j = 4 * m + i;
            const int  p0 = pairs[first][j], p1 = pairs[first + 1][j];
            const int  p2 = pairs[first + 2][j], p3 = pairs[first + 3][j];
            const int  a = (t & 1) == 0 ? p0 + p1 : p0 - p1, b = (t & 1) == 0 ? p2 + p3 : p2 - p3;
            v[m][i] = (t & 2) == 0 ? a + b : a - b;
        }
    }

    const float d = 0.125 * (BITS == 8 ? uintBitsToFloat(word(from_unit)) : tbq_half_to_float(uint(src[from_unit])));
    for (uint m = 0; m < 2; m++) {
        vec4 x[2];
        for (uint i = 0; i < 4; i++) {
            const int  lo = bitfieldExtract(v[m][i], 0, 16), hi = v[m][i] - lo >> 16;
            const uint e = 4 * t + i + 16 * m;
            // d = 0 decodes to +0, whatever the signs of the products
            x[0][i] = d == 0.0 ? 0.0 : tbq_flip(d * float(lo + hi), e);
            x[1][i] = d == 0.0 ? 0.0 : tbq_flip(d * float(lo - hi), e + 32);
        }
        for (uint half_block = 0; half_block < 2; half_block++) {
            const uint group = t + 4 * m + 8 * half_block;
            vec4       y     = x[half_block];
            if ((flags & HAS_MEAN) != 0) {
                const uint mean = mean_at + at.i2 * mean_s2 + at.i0 * 64 + 4 * group;
                y += vec4(means[mean], means[mean + 1], means[mean + 2], means[mean + 3]);
            }
            if (block < n && to_row >= 0) {
                const uint place = dst_at + at.i0 * 16 + group + tbq_offset(to, uint(to_row), at.i2, at.i3);
                if (TO_HALF) {
                    dst_f16[place] = uvec2(packHalf2x16(y.xy), packHalf2x16(y.zw));
                } else {
                    dst_f32[place] = y;
                }
            }
        }
    }
}
