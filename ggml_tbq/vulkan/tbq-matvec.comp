// SPDX-License-Identifier: MIT
// Weights in tbq times one to eight columns of activations: MUL_MAT and MUL_MAT_ID in decode.
//
// The rotation cancels in a dot product, so activations are rotated once (tbq-rotate.comp) and weights stay rotated. A
// workgroup of 64 has four rows of weights. An invocation has word i % 8 of every eighth block, which is eight weights,
// and reads their activations once for the four rows.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_control_flow_attributes : require

#include "tbq-block.glsl"

layout(constant_id = 0) const int  BITS    = 4;
layout(constant_id = 1) const uint COLUMNS = 1;

const uint ROWS = 4;
layout(local_size_x = 64) in;

layout(binding = 0) readonly buffer Weights {
    uint16_t weights[];
};
layout(binding = 1) readonly buffer Activations {
    vec4 activations[]; // rotated rows, contiguous
};
layout(binding = 2) writeonly buffer Result {
    float result[];
};
layout(binding = 3) readonly buffer Ids {
    int ids[];
};
layout(binding = 4) readonly buffer Sum0 {
    float sum_0[];
};
layout(binding = 5) readonly buffer Sum1 {
    float sum_1[];
};

// Matrix i2, i3 of the activations and of the result has COLUMNS rows and is multiplied by matrix i2 / ratio_2,
// i3 / ratio_3 of the weights.
layout(push_constant) uniform Arguments {
    uint  n_rows, blocks;   // of a matrix of weights; of a row
    uint  w_s1, w_s2, w_s3; // strides of the weights, in units of 16 bits
    uint  w_at;
    uint  ne2; // of the activations; with ids: of the result
    uint  ratio_2, ratio_3;
    uint  ids_s1, ids_at;
    uint  act_ne1; // with ids: the activations' ne[1]
    uint  result_at, sum_0_at, sum_1_at;
    uint  flags;
};

const uint HAS_IDS   = 1; // matrix ids[i2, i3] of the weights
const uint HAS_SUM_0 = 2; // what is added to the result
const uint HAS_SUM_1 = 4;

shared float levels[16];
shared float partial[ROWS * COLUMNS][65];

uint word(uint unit) {
    return uint(weights[unit]) | uint(weights[unit + 1]) << 16;
}

void main() {
    const uint thread = gl_LocalInvocationID.x;
    const uint first = (gl_WorkGroupID.z * gl_NumWorkGroups.x + gl_WorkGroupID.x) * ROWS, matrix = gl_WorkGroupID.y;
    if (first >= n_rows) {
        return; // all of the workgroup
    }
    const uint i2 = matrix % ne2, i3 = matrix / ne2;
    uint       from = w_at, act_row = matrix * COLUMNS;
    if ((flags & HAS_IDS) != 0) {
        from += uint(ids[ids_at + i3 * ids_s1 + i2]) * w_s2;
        act_row = i3 * act_ne1 + i2 % act_ne1;
    } else {
        from += i2 / ratio_2 * w_s2 + i3 / ratio_3 * w_s3;
    }
    if (thread < 16) {
        levels[thread] = float(tbq_level(BITS, thread));
    }
    barrier();
    float s[ROWS * COLUMNS];
    [[unroll]] for (uint i = 0; i < ROWS * COLUMNS; i++) {
        s[i] = 0.0;
    }
    const uint w = thread & 7;
    for (uint block = thread >> 3; block < blocks; block += 8) {
        vec4 act_lo[COLUMNS], act_hi[COLUMNS];
        [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
            const uint at = ((act_row + c) * blocks + block) * 16 + w;
            act_lo[c]     = activations[at];
            act_hi[c]     = activations[at + 8];
        }
        [[unroll]] for (uint r = 0; r < ROWS; r++) {
            const uint unit    = from + min(first + r, n_rows - 1) * w_s1 + block * tbq_block_units(BITS);
            const uint nibbles = tbq_nibbles(BITS, word(unit + TBQ_QS_UNIT + 2 * (BITS == 4 ? w : w & 3)),
                                             BITS == 3 ? word(unit + TBQ_QH_UNIT + 2 * (w & 1)) : 0, w);
            const float d      = tbq_half_to_float(uint(weights[unit]));
            vec4        lo, hi;
            [[unroll]] for (int i = 0; i < 4; i++) {
                lo[i] = levels[nibbles >> 8 * i & 15];
                hi[i] = levels[nibbles >> 8 * i + 4 & 15];
            }
            [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                s[r * COLUMNS + c] += d * (dot(lo, act_lo[c]) + dot(hi, act_hi[c]));
            }
        }
    }
    [[unroll]] for (uint i = 0; i < ROWS * COLUMNS; i++) {
        partial[i][thread] = s[i];
    }
    barrier();
    if (thread < ROWS * COLUMNS) {
        const uint row = first + thread / COLUMNS, column = thread % COLUMNS;
        if (row < n_rows) {
            float total = 0.0;
            for (uint i = 0; i < 64; i++) {
                total += partial[thread][i];
            }
            const uint at = (matrix * COLUMNS + column) * n_rows + row;
            if ((flags & HAS_SUM_0) != 0) {
                total += sum_0[sum_0_at + at];
            }
            if ((flags & HAS_SUM_1) != 0) {
                total += sum_1[sum_1_at + at];
            }
            result[result_at + at] = total;
        }
    }
}
