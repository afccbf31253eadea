// SPDX-License-Identifier: MIT
// Values to blocks, as the CPU encodes keys and values (tbq_quantize_kv): the same bytes.  SET_ROWS, CPY, CONCAT.
//
// The steps and the order of every sum are those of cpu/rows/rows.inc, which has the reasons.  A workgroup of 64 takes
// a block, each invocation one value.  They exchange values through shared memory only, so the size of a subgroup does
// not matter.  BITS = 8 writes tbq8_0 alone; with the others, `exact` may get that form of the row besides.
//
// A device may take subnormal floats for zeros.  Then a block with such values may differ from the CPU's in the sign
// of a rotated value that is below 2^-126: one index is the other one next to 0.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_16bit_storage : require

#include "tbq-block.glsl"
#include "tbq-exact-math.glsl"
#include "tbq-rows.glsl"

layout(constant_id = 0) const int  BITS      = 4;
layout(constant_id = 1) const bool FROM_HALF = false;

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

layout(push_constant) uniform Arguments {
    uvec4 ne;   // the shape of the source, ne.x in blocks
    uvec3 from; // its strides, in elements
    uint  src_at;
    uvec3 to; // strides of the result, in units of 16 bits
    uint  dst_at;
    uvec3 ids_s; // strides of the row numbers, in units of 32 bits
    uint  ids_at;
    uvec2 ids_ne; // their ne[1] and ne[2]
    uint  mean_at, weight_at;
    uint  exact_at, exact_s1; // in units of 32 bits
    uint  slots_at;
    uint  flags;
};

const uint HAS_IDS     = 1; // SET_ROWS: row i1 of (i2, i3) becomes row ids[i1, i2 % ids_ne.x, i3 % ids_ne.y]
const uint HAS_MEAN    = 2; // of a row, subtracted first
const uint HAS_WEIGHTS = 4; // of the error in each channel, equal in pairs of neighbors; otherwise guessed
const uint HAS_EXACT   = 8; // row number i, over all dimensions, becomes row slots[i] of exact too, unless that is -1

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

shared int   thresholds[12][8];
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

shared vec2 exchanged[2][64];

// Three stages of butterflies: of the eight values that differ in bit numbers first .. first + 2 of the lane.
vec2 butterflies_of_8(vec2 v, uint lane, uint first, uint buffer_number) {
    exchanged[buffer_number][lane] = v;
    barrier();
    const uint which = lane >> first & 7, base = lane & ~(7u << first);
    vec2       a[8];
    for (uint i = 0; i < 8; i++) {
        a[i] = exchanged[buffer_number][base + (i << first)];
    }
    for (uint h = 0; h < 3; h++) {
        for (uint i = 0; i < 4 >> h; i++) {
            precise const vec2 sum = a[2 * i] + a[2 * i + 1], difference = a[2 * i] - a[2 * i + 1];
            a[i]                   = (which >> h & 1) == 0 ? sum : difference;
        }
    }
    return a[0];
}

// v = H . v, of two vectors at once.  In the order that the format fixes: distances 1, 2, 4, 8, 16, 32.
vec2 butterflies(vec2 v, uint lane) {
    v = butterflies_of_8(v, lane, 0, 0);
    return butterflies_of_8(v, lane, 3, 1);
}

shared uint  largest_of[2];
shared float values[64];      // x
shared float partial_sums[16];
shared int   fixed_point[64]; // |z| in the units of the search
shared int   qk_of[64], kk_of[64];
shared float m_all[64];       // row 0 of the error's matrix
shared uint  best_gain[TBQ_DESCENT_STEPS][2], best_at[TBQ_DESCENT_STEPS][2];
shared float moves[2][64];
shared int   totals[2];
shared uint  indices[64];

void clear_totals(uint lane) {
    if (lane < 2) {
        largest_of[lane] = 0;
        totals[lane]     = 0;
        for (uint step = 0; step < TBQ_DESCENT_STEPS; step++) {
            best_gain[step][lane] = 0;
            best_at[step][lane]   = 64;
        }
    }
}

float sum_squares(float z, uint lane) {
    values[lane] = z; // x is not needed any more in this order: see main()
    barrier();
    if (lane < 16) {
        float sum = tbq_mul(values[lane], values[lane]);
        for (uint i = lane + 16; i < 64; i += 16) {
            sum = tbq_add(sum, tbq_mul(values[i], values[i]));
        }
        partial_sums[lane] = sum;
    }
    barrier();
    float p[16];
    for (uint i = 0; i < 16; i++) {
        p[i] = partial_sums[i];
    }
    for (uint h = 8; h > 0; h /= 2) {
        for (uint i = 0; i < h; i++) {
            p[i] = tbq_add(p[i], p[i + h]);
        }
    }
    return p[0];
}

// --- the search -------------------------------------------------------------------------------------------------

int magnitude_of(int q, uint scale) {
    int m = 0;
    for (int t = 0; t < n_thresholds; t++) {
        m += q > thresholds[scale][t] ? 1 : 0;
    }
    return m;
}

// The scale whose index vector has the largest cosine to q: the largest qk / sqrt(kk), compared exactly, the first of
// equal ones.  Invocation s + 16 i sums a quarter of the block for scale s.
uint search_scale(uint lane, out int best_qk, out int best_kk) {
    const uint s  = lane & 15;
    int        qk = 0, kk = 0;
    if (s < n_scales) {
        int limits[7];
        for (int t = 0; t < n_thresholds; t++) {
            limits[t] = thresholds[s][t];
        }
        for (uint i = 0; i < 16; i++) {
            const int q = fixed_point[(lane & 48) + i];
            int       m = half_levels;
            for (int t = 0; t < n_thresholds; t++) {
                m += q > limits[t] ? 1 : 0;
            }
            const int k = levels[m];
            qk += q * k;
            kk += k * k;
        }
    }
    qk_of[lane] = qk;
    kk_of[lane] = kk;
    barrier();
    uint best  = 0;
    best_qk    = 0;
    best_kk    = 1;
    uvec2 best_square = uvec2(0);
    for (uint i = 0; i < n_scales; i++) {
        const int   a = qk_of[i] + qk_of[i + 16] + qk_of[i + 32] + qk_of[i + 48];
        const int   b = kk_of[i] + kk_of[i + 16] + kk_of[i + 32] + kk_of[i + 48];
        const uvec2 square = tbq_mul64(uint(a), uint(a));
        if (tbq_less64(tbq_mul64(best_square, uint(b)), tbq_mul64(square, uint(best_kk)))) {
            best        = i;
            best_qk     = a;
            best_kk     = b;
            best_square = square;
        }
    }
    return best;
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

// A block of tbq8_0 (quantize_exact of rows.inc).  y: rotated, and bad: a value is NaN or Inf.  to_exact: into
// `exact`, at a word, otherwise into dst, at a unit.
void write_exact(float y, bool bad, uint lane, bool to_exact, uint place) {
    atomicMax(largest_of[1], floatBitsToUint(y) & 0x7FFFFFFFu);
    barrier();
    const uint  largest = largest_of[1];
    const bool  nothing = largest < TBQ_BITS_SMALLEST_ACT;
    bad                 = bad || largest >= TBQ_BITS_INF;
    const float most    = bad || nothing ? 127.0 : uintBitsToFloat(largest);
    const int   q       = int(tbq_add(tbq_mul(abs(y), tbq_div(127.0, most)), 0.5));
    indices[lane]       = bad || nothing ? 0 : uint(y < 0.0 ? -q : q) & 255;
    barrier();
    if (lane <= 16) {
        uint word = bad ? 0x7FC00000u : nothing ? 0u : floatBitsToUint(tbq_div(most, 127.0));
        if (lane > 0) {
            const uint i = 4 * (lane - 1);
            word         = indices[i] | indices[i + 1] << 8 | indices[i + 2] << 16 | indices[i + 3] << 24;
        }
        if (to_exact) {
            exact[place + lane] = word;
        } else {
            dst[place + 2 * lane]     = uint16_t(word & 0xFFFFu);
            dst[place + 2 * lane + 1] = uint16_t(word >> 16);
        }
    }
    barrier(); // before indices get another meaning
}

void main() {
    const uint       lane   = gl_LocalInvocationID.x;
    const uint       number = tbq_workgroup();
    if (number >= ne.x * ne.y * ne.z * ne.w) {
        return; // all of the workgroup
    }
    const tbq_index4 at  = tbq_index_of(number, ne);
    const uint       src_place = src_at + at.i0 * 64 + lane + tbq_offset(from, at.i1, at.i2, at.i3);
    const uint       channel   = at.i0 * 64 + lane;
    uint             row       = at.i1;
    if ((flags & HAS_IDS) != 0) { // the low word of an int64
        row = uint(ids[ids_at + tbq_offset(ids_s, at.i1, at.i2 % ids_ne.x, at.i3 % ids_ne.y)]);
    }
    const uint to_unit = dst_at + at.i0 * tbq_block_units(BITS) + tbq_offset(to, row, at.i2, at.i3);

    float x = FROM_HALF ? tbq_half_to_float(uint(src_f16[src_place])) : src_f32[src_place];
    if ((flags & HAS_MEAN) != 0) {
        x = tbq_sub(x, means[mean_at + channel]);
    }
    if (BITS < 8) {
        fill_tables(lane);
    }
    clear_totals(lane);
    values[lane] = x;
    barrier();
    atomicMax(largest_of[0], floatBitsToUint(x) & 0x7FFFFFFFu);
    const float neighbor = values[lane ^ 1];
    barrier();
    const uint largest = largest_of[0];
    const bool bad     = largest >= TBQ_BITS_INF;

    const float rotated = butterflies(vec2(tbq_flip(x, lane), 0.0), lane).x;
    if (BITS == 8) {
        write_exact(tbq_mul(0.125, rotated), bad, lane, false, to_unit);
        return;
    }
    if ((flags & HAS_EXACT) != 0) {
        const int slot = slots[slots_at + number / ne.x];
        if (slot >= 0) { // the same for all of the workgroup
            write_exact(tbq_mul(0.125, rotated), bad, lane, true, exact_at + slot * exact_s1 + at.i0 * 17);
        }
    }
    if (bad || largest < TBQ_BITS_SMALLEST) { // too small for any d, or NaN or Inf
        if (lane < tbq_block_units(BITS)) {
            dst[to_unit + lane] = uint16_t(lane == 0 && bad ? TBQ_F16_NAN : 0);
        }
        return;
    }
    // so large that d saturates whatever the values are; their squares must not overflow
    const bool huge = largest > TBQ_BITS_HUGE;
    float      z    = rotated;
    if (huge) {
        z = butterflies(vec2(tbq_flip(tbq_mul(x, TBQ_HUGE_SCALE), lane), 0.0), lane).x;
    }
    const float rms     = tbq_sqrt(tbq_mul(sum_squares(z, lane), 1.0 / 64));
    const float inverse = tbq_div(float(TBQ_Q_ONE), rms);
    // the reference has 16 bits here, which values cannot exceed
    const int  q        = int(tbq_add(tbq_mul(abs(z), inverse), 0.5));
    const bool negative = z < 0.0;
    fixed_point[lane]   = q;
    barrier();
    int        qk, kk;
    const uint scale = search_scale(lane, qk, kk);
    const int  m     = magnitude_of(q, scale);
    int        index = negative ? half_levels - 1 - m : half_levels + m;
    const bool measured = (flags & HAS_WEIGHTS) != 0;
    if (!huge) { // noise shaping
        // close to the scale that the block will have, so that a move is judged by what it does
        const float d = measured ? tbq_div(float(64 * TBQ_Q_ONE) * float(TBQ_Q_ONE), float(qk)) :
                                   tbq_div(float(qk), float(kk));
        float       w;
        if (measured) {
            w = weights[weight_at + channel];
        } else {
            const float mean_square = tbq_mul(tbq_mul(rms, rms), 1.0 / 64);
            const float pair        = tbq_add(tbq_mul(x, x), tbq_mul(neighbor, neighbor));
            w                       = tbq_add(tbq_sqrt(tbq_mul(pair, tbq_div(0.5, mean_square))), TBQ_SHAPING_FLOOR);
        }
        const float e = tbq_sub(tbq_mul(z, inverse), tbq_mul(d, float(levels[index])));
        // H w / 64 and H e
        vec2 mg     = butterflies(vec2(w, e), lane);
        m_all[lane] = tbq_mul(mg.x, 1.0 / 64);
        float g     = tbq_mul(butterflies(vec2(tbq_mul(mg.y, w), 0.0), lane).x, 1.0 / 64);

        // Even and odd coordinates do not interact: in each step both make their best move.
        const float m0     = m_all[0];
        const uint  parity = lane & 1;
        for (uint step = 0; step < TBQ_DESCENT_STEPS; step++) {
            const bool  up   = g > 0.0;
            const float gap  = tbq_mul(d, up ? gaps_up[index] : gaps_down[index]);
            const float size = abs(g);
            const float gain = tbq_mul(gap, tbq_sub(tbq_add(size, size), tbq_mul(gap, m0)));
            // not negative, so that the bits order like the values
            const uint ordered    = gain > 0.0 ? floatBitsToUint(gain) : 0;
            moves[step & 1][lane] = up ? gap : -gap;
            atomicMax(best_gain[step][parity], ordered);
            barrier();
            if (ordered != 0 && ordered == best_gain[step][parity]) {
                atomicMin(best_at[step][parity], lane);
            }
            barrier();
            const uint mover = best_at[step][parity];
            if (mover < 64) {
                g = tbq_sub(g, tbq_mul(moves[step & 1][mover], m_all[lane ^ mover]));
                index += lane != mover ? 0 : up ? 1 : -1;
            }
        }
    }
    const int k = levels[index];
    atomicAdd(totals[0], (negative ? -q : q) * k);
    atomicAdd(totals[1], k * k);
    indices[lane] = uint(index);
    barrier();
    if (lane == 0) {
        const float unit = tbq_mul(rms, 0.125);
        float       d;
        if (measured && !huge && totals[0] > 0) { // unbiased: <y, d k> = <y, y>
            d = tbq_mul(unit, tbq_div(float(64 * TBQ_Q_ONE), float(totals[0])));
        } else { // d . |k| = |y|
            d = tbq_div(tbq_mul(unit, 8.0), tbq_sqrt(float(totals[1])));
            d = huge ? tbq_mul(d, TBQ_HUGE_UNSCALE) : d;
        }
        dst[to_unit] = uint16_t(tbq_float_to_half(d < TBQ_F16_MAX ? d : TBQ_F16_MAX));
    }
    const uint units = tbq_block_units(BITS) - 1;
    if (lane < units) {
        dst[to_unit + TBQ_QS_UNIT + lane] = uint16_t(packed_unit(lane));
    }
}
