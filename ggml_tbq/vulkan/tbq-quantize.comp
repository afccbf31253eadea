// SPDX-License-Identifier: MIT
// Values to blocks, as the CPU encodes keys and values (tbq_quantize_kv): the same bytes.  SET_ROWS, CPY, CONCAT.
//
// The steps and the order of every sum are those of cpu/rows/rows.inc, which has the reasons.  A workgroup of 64 takes
// a block, each invocation one value.  They exchange values through shared memory only, so the size of a subgroup does
// not matter.  A token has a few dozen blocks, so what counts is the time of one: barriers, and what waits for what.
// There are no atomics.  BITS = 8 writes tbq8_0 alone; with the others, `exact` may get that form of the row besides.
// ROPE: the values are keys that get their rotary embedding first.
//
// A device may take subnormal floats for zeros.  Then a block with such values may differ from the CPU's in the sign
// of a rotated value that is below 2^-126: one index is the other one next to 0.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_control_flow_attributes : require

#include "tbq-block.glsl"
#include "tbq-exact-math.glsl"
#include "tbq-rows.glsl"

layout(constant_id = 0) const int  BITS      = 4;
layout(constant_id = 1) const bool FROM_HALF = false;
layout(constant_id = 2) const int  ROPE      = 0; // 1: pairs (2 i, 2 i + 1), 2: pairs (i, i + n_dims / 2)

layout(local_size_x = 64) in;

layout(binding = 0) readonly buffer SourceFloats {
    float src_f32[];
};
layout(binding = 0) readonly buffer SourceHalves {
    uint16_t src_f16[];
};
layout(binding = 1) writeonly buffer Blocks {
    uint16_t dst[];
};
layout(binding = 2) readonly buffer Ids {
    int ids[];
};
layout(binding = 3) readonly buffer Mean {
    float means[];
};
layout(binding = 4) readonly buffer Weights {
    float weights[];
};
layout(binding = 5) writeonly buffer Exact {
    uint exact[];
};
layout(binding = 6) readonly buffer Slots {
    int slots[];
};
layout(binding = 7) readonly buffer Positions {
    int positions[];
};
layout(binding = 8) readonly buffer Factors {
    float factors[];
};

layout(push_constant) uniform Arguments {
    uvec4 ne;   // the shape of the source, ne.x in blocks
    uvec3 from; // its strides, in elements
    uint  src_at;
    uvec3 to; // strides of the result, in units of 16 bits
    uint  dst_at;
    uvec3 ids_s; // strides of the row numbers, in units of 32 bits
    uint  flags;
    uvec2 ids_ne;   // their ne[1] and ne[2]
    uint  exact_s1; // in units of 32 bits
    uint  slots_at;
    uint  at_ids_mean_weight_exact; // a byte for each, in units of 32 bits
    uint  at_pos_factors;           // a byte for each
    // the embedding: n_dims | head_size << 16, elements between heads, and the parameters of GGML_OP_ROPE
    uint  rope_dims, rope_s_head;
    float theta_scale, freq_scale, ext_factor, attn_factor, corr_low, corr_high;
};

const uint HAS_IDS     = 1; // SET_ROWS: row i1 of (i2, i3) becomes row ids[i1, i2 % ids_ne.x, i3 % ids_ne.y]
const uint HAS_MEAN    = 2; // of a row, subtracted first
const uint HAS_WEIGHTS = 4; // of the error in each channel, equal in pairs of neighbors; otherwise guessed
const uint HAS_EXACT   = 8; // row number i, over all dimensions, becomes row slots[i] of exact too, unless that is -1
const uint HAS_FACTORS = 16; // divisors of the angles

uint at_byte(uint places, uint i) {
    return bitfieldExtract(places, int(8 * i), 8);
}

// --- tables -----------------------------------------------------------------------------------------------------

const int n_scales     = BITS == 2 ? TBQ2_N_SCALES : BITS == 3 ? TBQ3_N_SCALES : TBQ4_N_SCALES;
const int n_thresholds = BITS == 2 ? TBQ2_N_THRESHOLDS : BITS == 3 ? TBQ3_N_THRESHOLDS : TBQ4_N_THRESHOLDS;
const int half_levels  = n_thresholds + 1;

const int thresholds_2[TBQ2_N_SCALES][TBQ2_N_THRESHOLDS] = TBQ2_THRESHOLDS;
const int thresholds_3[TBQ3_N_SCALES][TBQ3_N_THRESHOLDS] = TBQ3_THRESHOLDS;
const int thresholds_4[TBQ4_N_SCALES][TBQ4_N_THRESHOLDS] = TBQ4_THRESHOLDS;
const int gaps_up_2[4]    = TBQ2_GAPS_UP;
const int gaps_up_3[8]    = TBQ3_GAPS_UP;
const int gaps_up_4[16]   = TBQ4_GAPS_UP;
const int gaps_down_2[4]  = TBQ2_GAPS_DOWN;
const int gaps_down_3[8]  = TBQ3_GAPS_DOWN;
const int gaps_down_4[16] = TBQ4_GAPS_DOWN;

shared int   thresholds[16][8];
shared float gaps_up[16], gaps_down[16];
shared int   levels[16];

void fill_tables(uint lane) {
    for (uint i = lane; i < n_scales * n_thresholds; i += 64) {
        const uint s = i / n_thresholds, t = i % n_thresholds;
        thresholds[s][t] = BITS == 2 ? thresholds_2[s % TBQ2_N_SCALES][t % TBQ2_N_THRESHOLDS] :
                           BITS == 3 ? thresholds_3[s % TBQ3_N_SCALES][t % TBQ3_N_THRESHOLDS] :
                                       thresholds_4[s][t];
    }
    if (lane < 2 * half_levels) {
        levels[lane]    = tbq_level(BITS, lane);
        gaps_up[lane]   = float(BITS == 2 ? gaps_up_2[lane & 3] : BITS == 3 ? gaps_up_3[lane & 7] : gaps_up_4[lane]);
        gaps_down[lane] =
            float(BITS == 2 ? gaps_down_2[lane & 3] : BITS == 3 ? gaps_down_3[lane & 7] : gaps_down_4[lane]);
    }
}

// --- across the workgroup ---------------------------------------------------------------------------------------

// Butterflies are taken three stages at a time: v = H v in the order that the format fixes, distances 1, 2, 4 among
// eight neighbors, then 8, 16, 32 among lanes low + 8 i.  Two vectors of 64 for each half; eight values that are read
// together are two vec4.
shared vec4 neighbors[2][16], strided[2][16];

void put_neighbors(uint vector, uint lane, float v) {
    neighbors[vector][lane >> 2][lane & 3] = v;
}

void put_strided(uint vector, uint lane, float v) {
    const uint place = (lane & 7) * 8 + (lane >> 3);
    strided[vector][place >> 2][place & 3] = v;
}

#define TBQ_EIGHT(a, array, from)                                                                                    \
    float a[8];                                                                                                      \
    {                                                                                                                \
        const vec4 first_ = array[2 * (from)], second_ = array[2 * (from) + 1];                                      \
        [[unroll]] for (int i = 0; i < 4; i++) {                                                                     \
            a[i]     = first_[i];                                                                                    \
            a[i + 4] = second_[i];                                                                                   \
        }                                                                                                            \
    }

float sum_or_difference(float a, float b, bool difference) {
    return tbq_add(a, difference ? -b : b);
}

// Value number `which` of the butterflies of eight.
float one_of_8(float a[8], uint which) {
    const bool  d1 = (which & 1) != 0, d2 = (which & 2) != 0, d4 = (which & 4) != 0;
    const float b0 = sum_or_difference(a[0], a[1], d1), b1 = sum_or_difference(a[2], a[3], d1);
    const float b2 = sum_or_difference(a[4], a[5], d1), b3 = sum_or_difference(a[6], a[7], d1);
    return sum_or_difference(sum_or_difference(b0, b1, d2), sum_or_difference(b2, b3, d2), d4);
}

void all_of_8(inout float a[8]) {
    [[unroll]] for (int h = 1; h < 8; h *= 2) {
        [[unroll]] for (int i = 0; i < 8; i++) {
            if ((i & h) == 0) {
                const float x = a[i], y = a[i + h];
                a[i]     = tbq_add(x, y);
                a[i + h] = tbq_sub(x, y);
            }
        }
    }
}

shared uint  largest_x[8], largest_z[8];
shared float squares[8];
shared ivec2 parts[16][8]; // (qk, kk) of eight values with each scale
shared ivec2 sums[16];     // the same of the block
shared uint  exact_bytes[64];
shared float m_all[64];    // row 0 of the error's matrix
shared vec4  gains[2][2][8];
shared vec4  moves[2][64]; // the gap, and what it adds to kk and qk
shared ivec2 totals[2];
shared uint  indices[64];

uint abs_bits(float f) {
    return floatBitsToUint(f) & 0x7FFFFFFFu;
}

// What every invocation knows of the rotated block.
struct rotated_block {
    float z[8];             // values low + 8 i, not divided by 8
    float sum;              // of squares
    uint  largest, largest_x; // the bits of the largest |z| and |x|
};

rotated_block rotate(float x, uint lane) {
    const uint    low = lane & 7;
    rotated_block r;
    put_neighbors(0, lane, tbq_flip(x, lane));
    barrier();
    TBQ_EIGHT(a, neighbors[0], lane >> 3)
    put_strided(0, lane, one_of_8(a, low));
    if (low == 0) {
        uint most = 0;
        [[unroll]] for (int i = 0; i < 8; i++) {
            most = max(most, abs_bits(a[i]));
        }
        largest_x[lane >> 3] = most;
    }
    barrier();
    TBQ_EIGHT(z, strided[0], low)
    all_of_8(z);
    r.z = z;
    if (lane < 8) {
        // partial sums of 16: value low and low + 8 have four squares each, and the first step of their sum is here
        float even = tbq_mul(z[0], z[0]), odd = tbq_mul(z[1], z[1]);
        uint  most = max(abs_bits(z[0]), abs_bits(z[1]));
        [[unroll]] for (int i = 2; i < 8; i += 2) {
            even = tbq_add(even, tbq_mul(z[i], z[i]));
            odd  = tbq_add(odd, tbq_mul(z[i + 1], z[i + 1]));
            most = max(most, max(abs_bits(z[i]), abs_bits(z[i + 1])));
        }
        squares[lane]   = tbq_add(even, odd);
        largest_z[lane] = most;
    }
    barrier();
    r.largest = r.largest_x = 0;
    float p[8];
    [[unroll]] for (int i = 0; i < 8; i++) {
        p[i]        = squares[i];
        r.largest   = max(r.largest, largest_z[i]);
        r.largest_x = max(r.largest_x, largest_x[i]);
    }
    [[unroll]] for (int h = 4; h > 0; h /= 2) {
        [[unroll]] for (int i = 0; i < 4; i++) {
            if (i < h) {
                p[i] = tbq_add(p[i], p[i + h]);
            }
        }
    }
    r.sum = p[0];
    return r;
}

float own_value(rotated_block r, uint lane) {
    float z = r.z[0];
    [[unroll]] for (int i = 1; i < 8; i++) {
        z = (lane >> 3) == i ? r.z[i] : z;
    }
    return z;
}

// --- the search -------------------------------------------------------------------------------------------------

// the reference has 16 bits here, which values cannot exceed
int to_fixed(float z, float inverse) {
    return int(tbq_add(tbq_mul(abs(z), inverse), 0.5));
}

// Sums over eight values, of which an invocation has every eighth scale.
void sum_scales(int q[8], uint lane) {
    int gap[7]; // between the levels of the positive half
    [[unroll]] for (int t = 0; t < 7; t++) {
        gap[t] = t < n_thresholds ? levels[half_levels + t + 1] - levels[half_levels + t] : 0;
    }
    const int first = levels[half_levels];
    for (uint s = lane >> 3; s < n_scales; s += 8) {
        int limits[7];
        [[unroll]] for (int t = 0; t < 7; t++) {
            limits[t] = t < n_thresholds ? thresholds[s][t] : 0;
        }
        ivec2 sum = ivec2(0);
        [[unroll]] for (int i = 0; i < 8; i++) {
            int k = first;
            [[unroll]] for (int t = 0; t < 7; t++) {
                if (t < n_thresholds) {
                    k += q[i] > limits[t] ? gap[t] : 0;
                }
            }
            sum += k * ivec2(q[i], k);
        }
        parts[s][lane & 7] = sum;
    }
}

struct scale_sums {
    uvec2 square; // of qk
    int   qk, kk;
    uint  number;
};

// The scale whose index vector has the largest cosine to q: the largest qk / sqrt(kk), compared exactly, the first of
// equal ones.  A barrier is behind the sums of parts.
scale_sums search_scale(uint lane) {
    if (lane < n_scales) {
        ivec2 sum = ivec2(0);
        [[unroll]] for (int i = 0; i < 8; i++) {
            sum += parts[lane][i];
        }
        sums[lane] = sum;
    }
    barrier();
    scale_sums s[TBQ4_N_SCALES]; // the most
    [[unroll]] for (int i = 0; i < TBQ4_N_SCALES; i++) {
        const ivec2 sum = i < n_scales ? sums[i] : ivec2(0, 1);
        s[i]            = scale_sums(tbq_mul64(uint(sum.x), uint(sum.x)), sum.x, sum.y, i);
    }
    [[unroll]] for (int h = 1; h < 16; h *= 2) {
        [[unroll]] for (int i = 0; i + h < TBQ4_N_SCALES; i += 2 * h) {
            if (i + h < n_scales) {
                if (tbq_less64(tbq_mul64(s[i].square, uint(s[i + h].kk)), tbq_mul64(s[i + h].square, uint(s[i].kk)))) {
                    s[i] = s[i + h];
                }
            }
        }
    }
    return s[0];
}

// --- noise shaping ------------------------------------------------------------------------------------------------

// A coordinate of the descent, and what all moves of its parity add to the sums.
struct coordinate {
    int   index;
    ivec2 added; // to kk and qk
};

// Even and odd coordinates do not interact: in each step both make their best move.  Every invocation finds it for
// itself, so that there is one barrier in a step.  g: the slope; signed_q: the coordinate's own value.
coordinate descend(float g, int index, float d, int signed_q, uint lane) {
    const float m0     = m_all[0];
    const uint  parity = lane & 1, place = lane >> 1;
    coordinate  c      = coordinate(index, ivec2(0));
    for (uint step = 0; step < TBQ_DESCENT_STEPS; step++) {
        const uint  turn   = step & 1;
        const bool  up     = g > 0.0;
        const float by     = up ? gaps_up[c.index] : -gaps_down[c.index];
        const float level  = float(levels[c.index]);
        const float gap    = tbq_mul(d, abs(by));
        const float size   = abs(g);
        const float gain   = tbq_mul(gap, tbq_sub(tbq_add(size, size), tbq_mul(gap, m0)));
        // integers below 2^24, so exact
        moves[turn][lane] = vec4(up ? gap : -gap, by * (2.0 * level + by), float(signed_q) * by, 0.0);
        gains[turn][parity][place >> 2][place & 3] = gain > 0.0 ? gain : 0.0;
        barrier();
        vec4 v[8];
        vec4 most4 = vec4(0.0);
        [[unroll]] for (int i = 0; i < 8; i++) {
            v[i]  = gains[turn][parity][i];
            most4 = max(most4, v[i]);
        }
        const float most = max(max(most4.x, most4.y), max(most4.z, most4.w));
        if (most > 0.0) {
            uint equal = 0;
            [[unroll]] for (int i = 0; i < 8; i++) {
                [[unroll]] for (int j = 0; j < 4; j++) {
                    equal |= v[i][j] == most ? 1u << (4 * i + j) : 0;
                }
            }
            const uint mover = 2 * findLSB(equal) + parity;
            const vec4 move  = moves[turn][mover];
            g                = tbq_sub(g, tbq_mul(move.x, m_all[lane ^ mover]));
            c.index += lane != mover ? 0 : up ? 1 : -1;
            c.added += ivec2(move.yz);
        }
    }
    return c;
}

// --- a block ----------------------------------------------------------------------------------------------------

// Unit j of the packed indices.
uint packed_unit(uint j) {
    if (BITS == 4) {
        const uint i = 2 * j;
        return indices[i] | indices[i + 32] << 4 | indices[i + 1] << 8 | indices[i + 33] << 12;
    }
    uint unit = 0;
    if (j < 8) {
        for (uint i = 0; i < 8; i++) { // two bytes of four indices
            unit |= (indices[2 * j + (i >> 2) + 16 * (i & 3)] & 3) << 2 * i;
        }
    } else {
        // two bytes of qh, whose bits tbq.h draws
        for (uint i = 0; i < 16; i++) {
            const uint bit = i & 7, column = (bit & 1) | bit >> 2 << 1;
            unit |= (indices[16 * column + 2 * (j - 8) + (i >> 3) + 8 * (bit >> 1 & 1)] >> 2) << i;
        }
    }
    return unit;
}

// A block of tbq8_0 (quantize_exact of rows.inc): what a barrier must be behind before write_exact().
void round_exact(float z, uint largest_z, bool bad, uint lane) {
    const float y       = tbq_mul(0.125, z);
    const uint  largest = floatBitsToUint(tbq_mul(0.125, uintBitsToFloat(largest_z)));
    const bool  none    = bad || largest < TBQ_BITS_SMALLEST_ACT || largest >= TBQ_BITS_INF;
    const int   q = int(tbq_add(tbq_mul(abs(y), tbq_div(127.0, none ? 127.0 : uintBitsToFloat(largest))), 0.5));
    exact_bytes[lane] = none ? 0 : uint(y < 0.0 ? -q : q) & 255;
}

// to_exact: into `exact`, at a word, otherwise into dst, at a unit.
void write_exact(uint largest_z, bool bad, uint lane, bool to_exact, uint place) {
    const uint largest = floatBitsToUint(tbq_mul(0.125, uintBitsToFloat(largest_z)));
    if (lane <= 16) {
        uint word;
        if (lane == 0) {
            const bool nothing = largest < TBQ_BITS_SMALLEST_ACT;
            bad                = bad || largest >= TBQ_BITS_INF;
            word               = bad     ? 0x7FC00000u :
                                 nothing ? 0u :
                                           floatBitsToUint(tbq_div(uintBitsToFloat(largest), 127.0));
        } else {
            const uint i = 4 * (lane - 1);
            word = exact_bytes[i] | exact_bytes[i + 1] << 8 | exact_bytes[i + 2] << 16 | exact_bytes[i + 3] << 24;
        }
        if (to_exact) {
            exact[place + lane] = word;
        } else {
            dst[place + 2 * lane]     = uint16_t(word & 0xFFFFu);
            dst[place + 2 * lane + 1] = uint16_t(word >> 16);
        }
    }
}

// --- values -------------------------------------------------------------------------------------------------------

// Channel c of the head that starts at `from`, after its embedding (GGML_OP_ROPE).  The angle is computed as the
// backend computes those of the queries, because only equal errors cancel.
float embedded(uint from_place, uint c, int position) {
    const uint n_dims = rope_dims & 0xFFFFu, half_dims = n_dims / 2;
    if (c >= n_dims) {
        return src_f32[from_place + c];
    }
    const bool  second = ROPE == 2 ? c >= half_dims : (c & 1) != 0;
    const uint  pair   = ROPE == 2 ? c - (second ? half_dims : 0) : c / 2;
    const float x0     = src_f32[from_place + (ROPE == 2 ? pair : 2 * pair)];
    const float x1     = src_f32[from_place + (ROPE == 2 ? pair + half_dims : 2 * pair + 1)];

    float extrapolated = position * pow(theta_scale, float(pair));
    if ((flags & HAS_FACTORS) != 0) {
        extrapolated /= factors[at_byte(at_pos_factors, 1) + pair];
    }
    float theta     = freq_scale * extrapolated;
    float magnitude = attn_factor;
    if (ext_factor != 0.0) { // YaRN (arXiv 2309.00071): fast channels keep their angle, slow ones are interpolated
        const float ramp  = clamp((float(pair) - corr_low) / max(0.001, corr_high - corr_low), 0.0, 1.0);
        const float share = (1.0 - ramp) * ext_factor;
        theta             = theta * (1.0 - share) + extrapolated * share;
        magnitude *= 1.0 + 0.1 * log(1.0 / freq_scale);
    }
    const float cosine = cos(theta) * magnitude, sine = sin(theta) * magnitude;
    return second ? x0 * sine + x1 * cosine : x0 * cosine - x1 * sine;
}

void main() {
    const uint       lane   = gl_LocalInvocationID.x;
    const uint       number = tbq_workgroup();
    if (number >= ne.x * ne.y * ne.z * ne.w) {
        return; // all of the workgroup
    }
    const tbq_index4 at      = tbq_index_of(number, ne);
    const uint       channel = at.i0 * 64 + lane;
    const uint       places  = at_ids_mean_weight_exact;
    float            x;
    if (ROPE != 0) {
        const uint head_size = rope_dims >> 16, head = at.i0 * 64 / head_size;
        x = embedded(src_at + head * rope_s_head + at.i1 * from.x, channel - head * head_size,
                     positions[at_byte(at_pos_factors, 0) + at.i1]);
    } else {
        const uint place = src_at + channel + tbq_offset(from, at.i1, at.i2, at.i3);
        x                = FROM_HALF ? tbq_half_to_float(uint(src_f16[place])) : src_f32[place];
    }
    uint row = at.i1;
    if ((flags & HAS_IDS) != 0) { // the low word of an int64
        row = uint(ids[at_byte(places, 0) + tbq_offset(ids_s, at.i1, at.i2 % ids_ne.x, at.i3 % ids_ne.y)]);
    }
    const uint to_unit = dst_at + at.i0 * tbq_block_units(BITS) + tbq_offset(to, row, at.i2, at.i3);
    int        slot    = -1; // the same for all of the workgroup
    if (BITS < 8 && (flags & HAS_EXACT) != 0) {
        slot = slots[slots_at + number / ne.x];
    }
    const bool measured = (flags & HAS_WEIGHTS) != 0;
    float      w        = measured ? weights[at_byte(places, 2) + channel] : 0.0;
    if ((flags & HAS_MEAN) != 0) {
        x = tbq_sub(x, means[at_byte(places, 1) + channel]);
    }
    if (BITS < 8) {
        fill_tables(lane);
    }

    rotated_block r   = rotate(x, lane);
    const bool    bad = r.largest_x >= TBQ_BITS_INF;
    float         z   = own_value(r, lane);
    const float   neighbor = neighbors[0][lane >> 2][(lane & 3) ^ 1]; // but for its sign, which does not matter
    if (BITS == 8) {
        round_exact(z, r.largest, bad, lane);
        barrier();
        write_exact(r.largest, bad, lane, false, to_unit);
        return;
    }
    const uint largest_z_exact = r.largest;
    const bool none = bad || r.largest_x < TBQ_BITS_SMALLEST; // too small for any d, or NaN or Inf
    if (slot >= 0) {
        round_exact(z, r.largest, bad, lane); // written after the next barrier
    }
    // so large that d saturates whatever the values are; their squares must not overflow
    const bool huge = !none && r.largest_x > TBQ_BITS_HUGE;
    if (huge) {
        barrier(); // before the same memory is written
        r = rotate(tbq_mul(x, TBQ_HUGE_SCALE), lane);
        z = own_value(r, lane);
    }
    float rms = 1.0, inverse = 0.0;
    if (!none) {
        rms     = tbq_sqrt(tbq_mul(r.sum, 1.0 / 64));
        inverse = tbq_div(float(TBQ_Q_ONE), rms);
        int q[8];
        [[unroll]] for (int i = 0; i < 8; i++) {
            q[i] = to_fixed(r.z[i], inverse);
        }
        sum_scales(q, lane);
    }
    barrier();
    if (slot >= 0) {
        write_exact(largest_z_exact, bad, lane, true, at_byte(places, 3) + slot * exact_s1 + at.i0 * 17);
    }
    if (none) {
        if (lane < tbq_block_units(BITS)) {
            dst[to_unit + lane] = uint16_t(lane == 0 && bad ? TBQ_F16_NAN : 0);
        }
        return;
    }
    const scale_sums best = search_scale(lane);

    const int  q        = to_fixed(z, inverse);
    const bool negative = z < 0.0;
    int        m        = 0;
    [[unroll]] for (int t = 0; t < 7; t++) {
        m += t < n_thresholds && q > thresholds[best.number][min(t, n_thresholds - 1)] ? 1 : 0;
    }
    coordinate c = coordinate(negative ? half_levels - 1 - m : half_levels + m, ivec2(0));
    if (!huge) { // noise shaping
        // close to the scale that the block will have, so that a move is judged by what it does
        const float d = measured ? tbq_div(float(64 * TBQ_Q_ONE) * float(TBQ_Q_ONE), float(best.qk)) :
                                   tbq_div(float(best.qk), float(best.kk));
        if (!measured) {
            const float mean_square = tbq_mul(tbq_mul(rms, rms), 1.0 / 64);
            const float pair        = tbq_add(tbq_mul(x, x), tbq_mul(neighbor, neighbor));
            w                       = tbq_add(tbq_sqrt(tbq_mul(pair, tbq_div(0.5, mean_square))), TBQ_SHAPING_FLOOR);
        }
        const float e = tbq_sub(tbq_mul(z, inverse), tbq_mul(d, float(levels[c.index])));
        // H w / 64, H e, and of that H again
        put_neighbors(0, lane, w);
        put_neighbors(1, lane, e);
        barrier();
        {
            TBQ_EIGHT(a, neighbors[0], lane >> 3)
            TBQ_EIGHT(b, neighbors[1], lane >> 3)
            put_strided(0, lane, one_of_8(a, lane & 7));
            put_strided(1, lane, one_of_8(b, lane & 7));
        }
        barrier();
        {
            TBQ_EIGHT(a, strided[0], lane & 7)
            TBQ_EIGHT(b, strided[1], lane & 7)
            m_all[lane] = tbq_mul(one_of_8(a, lane >> 3), 1.0 / 64);
            put_neighbors(0, lane, tbq_mul(one_of_8(b, lane >> 3), w));
        }
        barrier();
        {
            TBQ_EIGHT(a, neighbors[0], lane >> 3)
            put_strided(0, lane, one_of_8(a, lane & 7));
        }
        barrier();
        TBQ_EIGHT(a, strided[0], lane & 7)
        c = descend(tbq_mul(one_of_8(a, lane >> 3), 1.0 / 64), c.index, d, negative ? -q : q, lane);
    }
    if (lane < 2) { // of its parity
        totals[lane] = c.added;
    }
    indices[lane] = uint(c.index);
    barrier();
    const uint units = tbq_block_units(BITS) - 1;
    if (lane < units) {
        dst[to_unit + TBQ_QS_UNIT + lane] = uint16_t(packed_unit(lane));
    } else if (lane == 63) {
        const int   kk = best.kk + totals[0].x + totals[1].x, qk = best.qk + totals[0].y + totals[1].y;
        const float unit = tbq_mul(rms, 0.125);
        float       d;
        if (measured && !huge && qk > 0) { // unbiased: <y, d k> = <y, y>
            d = tbq_mul(unit, tbq_div(float(64 * TBQ_Q_ONE), float(qk)));
        } else { // d . |k| = |y|
            d = tbq_div(tbq_mul(unit, 8.0), tbq_sqrt(float(kk)));
            d = huge ? tbq_mul(d, TBQ_HUGE_UNSCALE) : d;
        }
        dst[to_unit] = uint16_t(tbq_float_to_half(d < TBQ_F16_MAX ? d : TBQ_F16_MAX));
    }
}
