// SPDX-License-Identifier: MIT
// Attention from packed rows, for few tokens: each row is read once for all query heads of its KV head.
//
// A workgroup has a KV head, up to 4 or 8 columns (query heads times tokens) and a range of the cache, a split. It
// takes 32 rows at a time: they are copied to shared memory, logits are computed, weights, and the weighted sum of the
// values. Queries are rotated first, and values are summed in the rotated domain: tbq-attention-merge.comp rotates a
// sum back, after it has put the splits together.
//
// Columns are in groups of four, the components of a vec4. Everything is exchanged through shared memory, so the size
// of a subgroup does not matter. There is a table of levels in shared memory, whose entries are in different banks.
//
// With exact rows (tbq_ggml_flash_attn_ext_exact), a split also takes every so many tiles of the slots. A slot is read
// under the mask of its cell, and a packed row whose cell has a slot is hidden.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_control_flow_attributes : require

#include "tbq-block.glsl"

layout(constant_id = 0) const int  BITS_K   = 4;
layout(constant_id = 1) const int  BITS_V   = 4;
layout(constant_id = 2) const uint BLOCKS_K = 2;
layout(constant_id = 3) const uint BLOCKS_V = 2;
layout(constant_id = 4) const uint COLUMNS4 = 1; // columns / 4
layout(constant_id = 5) const bool EXACT    = false;

const uint THREADS = 128;
const uint ROWS    = 32; // of a tile
const uint PARTS   = THREADS / ROWS;
layout(local_size_x = 128) in;

layout(binding = 0) readonly buffer Queries {
    float queries[];
};
layout(binding = 1) readonly buffer Keys {
    uint16_t keys[];
};
layout(binding = 2) readonly buffer Values {
    uint16_t values[];
};
layout(binding = 3) readonly buffer Mask {
    uint16_t masks[];
};
layout(binding = 4) writeonly buffer Partial {
    float partial[];
};
layout(binding = 5) readonly buffer ExactKeys {
    uint16_t exact_keys[];
};
layout(binding = 6) readonly buffer ExactValues {
    uint16_t exact_values[];
};
layout(binding = 7) readonly buffer Cells {
    int cells[];
};
layout(binding = 8) readonly buffer Mean {
    float means[];
};

// at_x: where a tensor begins, two of them in a word
layout(push_constant) uniform Arguments {
    uint  q_s1, q_s2, q_s3; // floats
    uint  k_s1, k_s2, k_s3, v_s1, v_s2, v_s3; // units of 16 bits
    uint  mask_s1, mask_s3, mask_ne3;
    uint  exact_k_s1, exact_k_s3, exact_v_s1, exact_v_s3; // units of 16 bits; heads follow each other
    uint  cells_s1, n_exact;
    uint  at_q_mask, at_k_v, at_exact, at_cells_mean;
    uint  n_kv, rows_per_split;
    uint  n_q, heads, n_seq_kv; // heads: of the queries, and of the cache << 16
    float scale, max_bias, softcap;
    uint  flags;
};

const uint HAS_MASK = 1;
const uint HAS_MEAN = 2; // of centered keys, where more than a softmax sees the logits

// Words of a block in shared memory: those of its indices.
const uint WORDS_K  = EXACT ? 16 : 2 * BITS_K;
const uint WORDS_V  = EXACT ? 16 : 2 * BITS_V;
const uint STRIDE_K = BLOCKS_K * WORDS_K + 1; // odd, so that rows are in different banks
const uint STRIDE_V = BLOCKS_V * WORDS_V + 1;

shared float levels_k[16], levels_v[16];
shared vec4  query[BLOCKS_K * 64 * COLUMNS4];
shared uint  k_words[ROWS * STRIDE_K];
shared uint  v_words[ROWS * STRIDE_V];
shared float k_scale[ROWS * BLOCKS_K];
shared float v_scale[ROWS * BLOCKS_V];
shared vec4  sums[THREADS * COLUMNS4]; // of logits by parts, and of values by groups of rows
shared vec4  logit[ROWS * COLUMNS4];
shared vec4  weight[ROWS * COLUMNS4];
shared vec4  rescale[COLUMNS4];
shared vec4  slope[COLUMNS4], bias[COLUMNS4];

const float NONE = -1e30; // below every logit

uint thread, head_kv, gqa, seq, seq_kv, first_column, n_columns;

// --- rows to shared memory ----------------------------------------------------------------------------------------

#define TBQ_STAGE(name, source, BLOCKS, STRIDE, words_of, scale_of)                                                  \
    void name(const int bits, uint base, uint stride, uint first, uint n) {                                          \
        const uint words = bits == 8 ? 16 : 2 * bits, units = tbq_block_units(bits);                                 \
        const uint qs = bits == 8 ? TBQ8_QS_UNIT : TBQ_QS_UNIT;                                                      \
        for (uint i = thread; i < ROWS * BLOCKS * words; i += THREADS) {                                             \
            const uint row = i / (BLOCKS * words), at = i % (BLOCKS * words);                                        \
            if (row < n) {                                                                                           \
                const uint unit = base + (first + row) * stride + at / words * units + qs + at % words * 2;          \
                words_of[row * STRIDE + at] = uint(source[unit]) | uint(source[unit + 1]) << 16;                     \
            }                                                                                                        \
        }                                                                                                            \
        for (uint i = thread; i < ROWS * BLOCKS; i += THREADS) {                                                     \
            const uint row = i / BLOCKS, unit = base + (first + row) * stride + i % BLOCKS * units;                  \
            float d = 0.0;                                                                                           \
            if (row < n) {                                                                                           \
                d = bits == 8 ? uintBitsToFloat(uint(source[unit]) | uint(source[unit + 1]) << 16)                   \
                              : tbq_half_to_float(uint(source[unit]));                                               \
            }                                                                                                        \
            scale_of[i] = d;                                                                                         \
        }                                                                                                            \
    }

TBQ_STAGE(stage_keys, keys, BLOCKS_K, STRIDE_K, k_words, k_scale)
TBQ_STAGE(stage_values, values, BLOCKS_V, STRIDE_V, v_words, v_scale)
TBQ_STAGE(stage_exact_keys, exact_keys, BLOCKS_K, STRIDE_K, k_words, k_scale)
TBQ_STAGE(stage_exact_values, exact_values, BLOCKS_V, STRIDE_V, v_words, v_scale)

// Values 4 w .. 4 w + 3 of a block whose words begin at `at`, and those 32 further on, without the scale.
#define TBQ_UNPACK(name, words_of, levels)                                                                           \
    void name(const int bits, uint at, uint w, out vec4 lo, out vec4 hi) {                                           \
        if (bits == 8) {                                                                                             \
            const int a = int(words_of[at + w]), b = int(words_of[at + w + 8]);                                      \
            [[unroll]] for (int i = 0; i < 4; i++) {                                                                 \
                lo[i] = float(bitfieldExtract(a, 8 * i, 8));                                                         \
                hi[i] = float(bitfieldExtract(b, 8 * i, 8));                                                         \
            }                                                                                                        \
            return;                                                                                                  \
        }                                                                                                            \
        const uint nibbles = tbq_nibbles(bits, words_of[at + (bits == 4 ? w : w & 3)],                               \
                                         bits == 3 ? words_of[at + 4 + (w & 1)] : 0, w);                             \
        [[unroll]] for (int i = 0; i < 4; i++) {                                                                     \
            lo[i] = levels[nibbles >> 8 * i & 15];                                                                   \
            hi[i] = levels[nibbles >> 8 * i + 4 & 15];                                                               \
        }                                                                                                            \
    }

TBQ_UNPACK(unpack_keys, k_words, levels_k)
TBQ_UNPACK(unpack_values, v_words, levels_v)

// --- queries ------------------------------------------------------------------------------------------------------

uint token_of(uint column) {
    return (first_column + column) / gqa;
}

uint head_of(uint column) {
    return head_kv * gqa + (first_column + column) % gqa;
}

float slope_of(uint head) {
    if (max_bias == 0.0) {
        return 1.0;
    }
    const uint n = 1u << findMSB(heads & 0xFFFF);
    return head < n ? exp2(-max_bias / float(n) * float(head + 1)) :
                      exp2(-max_bias / float(2 * n) * float(2 * (head - n) + 1));
}

// Queries times the scale of logits, rotated. Columns that do not exist are zeros.
void load_queries() {
    const uint q_at = at_q_mask & 0xFFFF, mean_at = at_cells_mean >> 16;
    for (uint i = thread; i < BLOCKS_K * 64 * COLUMNS4; i += THREADS) {
        const uint d = i / COLUMNS4, group = i % COLUMNS4;
        [[unroll]] for (uint c = 0; c < 4; c++) {
            const uint column = 4 * group + c;
            float      x      = 0.0;
            if (column < n_columns) {
                x = scale * queries[q_at + d + token_of(column) * q_s1 + head_of(column) * q_s2 + seq * q_s3];
            }
            query[i][c] = x;
        }
    }
    barrier();
    if (thread < COLUMNS4) {
        vec4 dot_mean = vec4(0.0), s = vec4(0.0);
        if ((flags & HAS_MEAN) != 0) {
            for (uint d = 0; d < BLOCKS_K * 64; d++) {
                dot_mean += query[d * COLUMNS4 + thread] * means[mean_at + head_kv * BLOCKS_K * 64 + d];
            }
        }
        [[unroll]] for (uint c = 0; c < 4; c++) {
            s[c] = slope_of(head_of(4 * thread + c));
        }
        bias[thread]  = dot_mean;
        slope[thread] = s;
    }
    barrier();
    for (uint i = thread; i < BLOCKS_K * 64 * COLUMNS4; i += THREADS) {
        const uint e = i / COLUMNS4 % 64;
        query[i]     = tbq_flip(0.125, e) * query[i];
    }
    for (uint h = 1; h < 64; h *= 2) {
        barrier();
        for (uint i = thread; i < BLOCKS_K * 32 * COLUMNS4; i += THREADS) {
            const uint pair = i / COLUMNS4;
            const uint at = ((pair & ~(h - 1)) * 2 + (pair & h - 1)) * COLUMNS4 + i % COLUMNS4;
            const vec4 a = query[at], b = query[at + h * COLUMNS4];
            query[at]                = a + b;
            query[at + h * COLUMNS4] = a - b;
        }
    }
    barrier();
}

// --- a tile ---------------------------------------------------------------------------------------------------------

// The column's own part of the softmax, in the invocations with a row and a group of columns: the largest logit so far,
// and the sum of this row's weights.
vec4 largest, sum;
// In the invocations with a word of values and every so many rows: values 4 w + i and the same + 32 of each column.
vec4 accumulated[8 * COLUMNS4];

// Logits of 32 rows with all columns. An invocation has a row and every fourth word of it.
void multiply_keys(const int bits) {
    const uint row = thread % ROWS, part = thread / ROWS;
    const uint words = bits == 8 ? 16 : 2 * bits;
    vec4       s[COLUMNS4];
    [[unroll]] for (uint group = 0; group < COLUMNS4; group++) {
        s[group] = vec4(0.0);
    }
    for (uint block = 0; block < BLOCKS_K; block++) {
        const float d = k_scale[row * BLOCKS_K + block];
        for (uint w = part; w < 8; w += PARTS) {
            vec4 lo, hi;
            unpack_keys(bits, row * STRIDE_K + block * words, w, lo, hi);
            lo *= d;
            hi *= d;
            const uint at = (block * 64 + 4 * w) * COLUMNS4;
            [[unroll]] for (uint i = 0; i < 4; i++) {
                [[unroll]] for (uint group = 0; group < COLUMNS4; group++) {
                    s[group] += lo[i] * query[at + i * COLUMNS4 + group];
                    s[group] += hi[i] * query[at + (i + 32) * COLUMNS4 + group];
                }
            }
        }
    }
    [[unroll]] for (uint group = 0; group < COLUMNS4; group++) {
        sums[(part * ROWS + row) * COLUMNS4 + group] = s[group];
    }
}

// Weights of the rows in the tile, relative to the largest logit so far. An invocation has a row and four columns.
// cell: whose mask the row is under; below 0: the row is hidden.
void weigh(int cell) {
    const uint row = thread / COLUMNS4, group = thread % COLUMNS4;
    const bool mine = thread < ROWS * COLUMNS4;
    vec4       s    = vec4(NONE);
    if (mine) {
        if (cell >= 0) {
            s = bias[group];
            for (uint part = 0; part < PARTS; part++) {
                s += sums[(part * ROWS + row) * COLUMNS4 + group];
            }
            if (softcap != 0.0) {
                s = softcap * tanh(clamp(s, -15.0, 15.0)); // the scale has 1 / softcap in it
            }
            if ((flags & HAS_MASK) != 0) {
                const uint at = (at_q_mask >> 16) + seq % mask_ne3 * mask_s3 + uint(cell);
                [[unroll]] for (uint c = 0; c < 4; c++) {
                    const uint column = 4 * group + c;
                    if (column < n_columns) {
                        const uint m = uint(masks[at + token_of(column) * mask_s1]);
                        s[c]         = m == 0xFC00 ? NONE : s[c] + slope[group][c] * tbq_half_to_float(m);
                    }
                }
            }
        }
        logit[thread] = s;
    }
    barrier();
    if (mine) {
        vec4 most = largest;
        for (uint r = 0; r < ROWS; r++) {
            most = max(most, logit[r * COLUMNS4 + group]);
        }
        const vec4 factor = exp(largest - most);
        // a logit of NONE has no weight, even where all have it
        const vec4 p   = mix(exp(s - most), vec4(0.0), lessThanEqual(s, vec4(NONE)));
        largest        = most;
        sum            = sum * factor + p;
        weight[thread] = p;
        if (row == 0) {
            rescale[group] = factor;
        }
    }
}

// The number of words of values, and how many invocations share one: each of these has every so many rows.
const uint WORDS = BLOCKS_V * 8;
const uint SHARE = THREADS / WORDS;

void add_values(const int bits) {
    const uint word = thread % WORDS, first = thread / WORDS, block = word / 8;
    const uint words = bits == 8 ? 16 : 2 * bits;
    if (first >= SHARE) {
        return;
    }
    [[unroll]] for (uint i = 0; i < 8 * COLUMNS4; i++) {
        accumulated[i] *= rescale[i % COLUMNS4];
    }
    for (uint row = first; row < ROWS; row += SHARE) {
        vec4 lo, hi;
        unpack_values(bits, row * STRIDE_V + block * words, word % 8, lo, hi);
        const float d = v_scale[row * BLOCKS_V + block];
        [[unroll]] for (uint group = 0; group < COLUMNS4; group++) {
            const vec4 w = weight[row * COLUMNS4 + group];
            const vec4 p = mix(vec4(0.0), d * w, greaterThan(w, vec4(0.0))); // a hidden row may hold NaN
            [[unroll]] for (uint i = 0; i < 4; i++) {
                accumulated[i * COLUMNS4 + group] += lo[i] * p;
                accumulated[(i + 4) * COLUMNS4 + group] += hi[i] * p;
            }
        }
    }
}

// --- a split --------------------------------------------------------------------------------------------------------

// Row r of the tile, in the invocations that weigh it.
uint weighed_row() {
    return thread / COLUMNS4;
}

void packed_tile(uint first, uint n) {
    const uint cells_at = (at_cells_mean & 0xFFFF) + seq_kv * cells_s1;
    stage_keys(BITS_K, (at_k_v & 0xFFFF) + head_kv * k_s2 + seq_kv * k_s3, k_s1, first, n);
    stage_values(BITS_V, (at_k_v >> 16) + head_kv * v_s2 + seq_kv * v_s3, v_s1, first, n);
    barrier();
    multiply_keys(BITS_K);
    barrier();
    int cell = weighed_row() < n ? int(first + weighed_row()) : -1;
    if (EXACT && cell >= 0 && (cells[cells_at + n_exact + uint(cell) / 32] >> (cell & 31) & 1) != 0) {
        cell = -1;
    }
    weigh(cell);
    barrier();
    add_values(BITS_V);
    barrier();
}

void exact_tile(uint first, uint n) {
    const uint cells_at = (at_cells_mean & 0xFFFF) + seq_kv * cells_s1;
    stage_exact_keys(8, (at_exact & 0xFFFF) + head_kv * BLOCKS_K * 34 + seq_kv * exact_k_s3, exact_k_s1, first, n);
    stage_exact_values(8, (at_exact >> 16) + head_kv * BLOCKS_V * 34 + seq_kv * exact_v_s3, exact_v_s1, first, n);
    barrier();
    multiply_keys(8);
    barrier();
    weigh(weighed_row() < n ? cells[cells_at + first + weighed_row()] : -1);
    barrier();
    add_values(8);
    barrier();
}

void main() {
    const uint split = gl_WorkGroupID.x, n_splits = gl_NumWorkGroups.x;
    const uint n_head = heads & 0xFFFF, n_head_kv = heads >> 16;

    thread       = gl_LocalInvocationID.x;
    gqa          = n_head / n_head_kv;
    head_kv      = gl_WorkGroupID.y % n_head_kv;
    first_column = gl_WorkGroupID.y / n_head_kv * 4 * COLUMNS4;
    n_columns    = min(gqa * n_q - first_column, 4 * COLUMNS4);
    seq          = gl_WorkGroupID.z;
    seq_kv       = seq / (gl_NumWorkGroups.z / n_seq_kv);

    if (thread < 16) {
        levels_k[thread] = float(tbq_level(BITS_K, thread));
        levels_v[thread] = float(tbq_level(BITS_V, thread));
    }
    load_queries();
    largest = vec4(NONE);
    sum     = vec4(0.0);
    [[unroll]] for (uint i = 0; i < 8 * COLUMNS4; i++) {
        accumulated[i] = vec4(0.0);
    }

    if (EXACT) {
        for (uint first = split * ROWS; first < n_exact; first += n_splits * ROWS) {
            exact_tile(first, min(ROWS, n_exact - first));
        }
    }
    const uint end = min(n_kv, (split + 1) * rows_per_split);
    for (uint first = split * rows_per_split; first < end; first += ROWS) {
        packed_tile(first, min(ROWS, end - first));
    }

    // For each column of the result and split: the sums of values; after all of them the largest logit and the sum of
    // weights.
    const uint all_columns = gl_NumWorkGroups.z * n_q * n_head;
    const uint word = thread % WORDS;
    for (uint k = 0; k < 8 * COLUMNS4; k++) { // not unrolled, because of its barriers
        const uint i = k / COLUMNS4, group = k % COLUMNS4;
        [[unroll]] for (uint l = 0; l < 8 * COLUMNS4; l++) { // an index that is no constant would move all to memory
            if (l == k) {
                sums[thread] = accumulated[l];
            }
        }
        barrier();
        if (thread < WORDS) {
            vec4 total = sums[thread];
            for (uint j = 1; j < SHARE; j++) {
                total += sums[thread + j * WORDS];
            }
            const uint e = word / 8 * 64 + word % 8 * 4 + i % 4 + i / 4 * 32;
            for (uint c = 0; c < 4; c++) {
                const uint column = 4 * group + c;
                if (column < n_columns) {
                    const uint result = (seq * n_q + token_of(column)) * n_head + head_of(column);
                    partial[(result * n_splits + split) * BLOCKS_V * 64 + e] = total[c];
                }
            }
        }
        barrier();
    }
    if (thread < ROWS * COLUMNS4) {
        logit[thread] = sum;
    }
    barrier();
    if (thread < COLUMNS4) { // has the largest logits of this group
        vec4 total = vec4(0.0);
        for (uint row = 0; row < ROWS; row++) {
            total += logit[row * COLUMNS4 + thread];
        }
        [[unroll]] for (uint c = 0; c < 4; c++) {
            const uint column = 4 * thread + c;
            if (column < n_columns) {
                const uint result = (seq * n_q + token_of(column)) * n_head + head_of(column);
                const uint at     = all_columns * n_splits * BLOCKS_V * 64 + (result * n_splits + split) * 2;
                partial[at]       = largest[c];
                partial[at + 1]   = total[c];
            }
        }
    }
}
