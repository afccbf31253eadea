// SPDX-License-Identifier: MIT
// Attention from rows as they are stored, for few tokens: each row is read once for all query heads of its KV head.
//
// A workgroup has a KV head, up to 4 or 8 columns (query heads times tokens) and a range of the cache, a split. It
// takes 32 or 64 rows at a time, a tile: they are copied to shared memory, logits are computed, weights, and the
// weighted sum of the values. While a tile is computed, the next one is on its way to registers. A tile that no column
// sees is not read. Queries are rotated first, and values are summed in the rotated domain. Where there is one split,
// its workgroup rotates the sum back and writes the result; otherwise tbq-attention-merge.comp joins the splits.
//
// Columns are in groups of four, the components of a vec4. Everything is exchanged through shared memory, so the size
// of a subgroup does not matter. There is a table of levels in shared memory, whose entries are in different banks.
//
// K or V may be q8_0 or f16, whose rows are not rotated; one of them is of a tbq type.
//
// With exact rows (tbq_ggml_flash_attn_ext_exact), a split also takes every so many tiles of the slots. A slot is read
// under the mask of its cell, and a row whose cell has a slot is hidden. A side that is no tbq type has no slots: its
// row is that of the cell.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_control_flow_attributes : require

#include "tbq-block.glsl"

// 2, 3, 4: bits of a tbq type; TBQ8 is of exact rows only
const int TBQ8 = 8;
const int Q8_0 = 9;
const int F16  = 16;

layout(constant_id = 0) const int  TYPE_K    = 4;
layout(constant_id = 1) const int  TYPE_V    = 4;
layout(constant_id = 2) const uint BLOCKS_K  = 2; // of 64 values
layout(constant_id = 3) const uint BLOCKS_V  = 2;
layout(constant_id = 4) const uint COLUMNS4  = 1; // columns / 4
layout(constant_id = 5) const bool EXACT     = false;
layout(constant_id = 6) const uint ROWS      = 32; // of a tile
layout(constant_id = 7) const bool ALIGNED_K = false; // rows begin at a multiple of four bytes
layout(constant_id = 8) const bool ALIGNED_V = false;

const uint THREADS = 128;
const uint PARTS   = 4; // of a row, for logits: an invocation has every fourth word
layout(local_size_x = 128) in;

layout(binding = 0) readonly buffer Queries {
    float queries[];
};
layout(binding = 1) readonly buffer Keys {
    uint16_t keys[];
};
layout(binding = 1) readonly buffer KeyWords {
    uint keys32[];
};
layout(binding = 2) readonly buffer Values {
    uint16_t values[];
};
layout(binding = 2) readonly buffer ValueWords {
    uint values32[];
};
layout(binding = 3) readonly buffer Mask {
    uint16_t masks[];
};
layout(binding = 4) writeonly buffer Partial {
    float partial[];
};
layout(binding = 5) readonly buffer ExactKeys {
    uint exact_keys32[];
};
layout(binding = 6) readonly buffer ExactValues {
    uint exact_values32[];
};
layout(binding = 7) readonly buffer Cells {
    int cells[];
};
layout(binding = 8) readonly buffer Mean {
    float means[];
};
layout(binding = 9) writeonly buffer Result {
    float results[];
};
layout(binding = 10) readonly buffer Sinks {
    float sinks[];
};

// at_x: where a tensor begins, two of them in a word
layout(push_constant) uniform Arguments {
    uint  q_s1, q_s2, q_s3; // floats
    uint  k_s1, k_s2, k_s3, v_s1, v_s2, v_s3; // units of 16 bits
    uint  mask_s1, mask_s3, mask_ne3;
    uint  exact_k_s1, exact_k_s3, exact_v_s1, exact_v_s3; // units of 32 bits; heads follow each other
    uint  cells_s1, n_exact;
    uint  at_q_mask, at_k_v, at_exact, at_cells_mean, at_result_sinks;
    uint  n_kv, rows_per_split;
    uint  n_q, heads, n_seq_kv; // heads: of the queries, and of the cache << 16
    float scale, max_bias, softcap;
    uint  flags;
};

const uint HAS_MASK         = 1;
const uint LOGITS_LACK_MEAN = 2; // of centered keys, where more than a softmax sees the logits
const uint HAS_SINKS        = 4;
const uint VALUES_LACK_MEAN = 8; // of the keys

// --- rows in shared memory ----------------------------------------------------------------------------------------

// Units of 16 bits in 64 values.
uint units_of(const int type) {
    return type == F16 ? 64 : type >= TBQ8 ? 34 : 1 + 4 * type;
}

const bool TBQ_K   = TYPE_K < TBQ8;
const bool TBQ_V   = TYPE_V < TBQ8;
const uint UNITS_K = BLOCKS_K * (TYPE_K == F16 ? 64 : TYPE_K >= TBQ8 ? 34 : 1 + 4 * TYPE_K); // of a row
const uint UNITS_V = BLOCKS_V * (TYPE_V == F16 ? 64 : TYPE_V >= TBQ8 ? 34 : 1 + 4 * TYPE_V);
const uint WORDS_K = (UNITS_K + 1) / 2;
const uint WORDS_V = (UNITS_V + 1) / 2;
// odd, so that rows are in different banks
const uint STRIDE_K = (EXACT && TBQ_K ? 17 * BLOCKS_K : WORDS_K) | 1;
const uint STRIDE_V = (EXACT && TBQ_V ? 17 * BLOCKS_V : WORDS_V) | 1;

const uint COLUMNS    = 4 * COLUMNS4;
const uint BLOCKS_MAX = BLOCKS_K > BLOCKS_V ? BLOCKS_K : BLOCKS_V;
const uint LOGITS     = ROWS * COLUMNS / THREADS; // of an invocation: of one column, and of every so many rows
const uint LOGIT_STEP = THREADS / COLUMNS;
const uint LOGIT_SIDE = ROWS / 4 + 1; // vec4 for a column, odd
const uint TILES      = 256;          // whose visibility is known beforehand

shared float levels_k[16], levels_v[16];
shared vec4  query[BLOCKS_MAX * 64 * COLUMNS4]; // at the end, the sums of values
shared uint  k_words[ROWS * STRIDE_K];
shared uint  v_words[ROWS * STRIDE_V];
shared float v_scale[ROWS * BLOCKS_V];
shared vec4  sums[PARTS * ROWS * COLUMNS4]; // of logits by parts, and of values by groups of rows
shared vec4  logit[COLUMNS * LOGIT_SIDE];   // by columns
shared vec4  weight[ROWS * COLUMNS4];
shared vec4  rescale[COLUMNS4], bias[COLUMNS4];
shared vec4  of_rows[COLUMNS4]; // the sum of weights, without that of a sink
shared int   cell_of[ROWS];
shared uint  visible[TILES], exact_visible;

const float NONE = -1e30; // below every logit

uint thread, head_kv, gqa, seq, seq_kv, first_column, n_columns;
uint own_column, own_row; // of the softmax

// Word `at` of a row that begins at a unit.
uint key_word(uint unit, uint at) {
    if (ALIGNED_K) {
        return keys32[unit / 2 + at];
    }
    const uint low = uint(keys[unit + 2 * at]);
    return 2 * at + 1 < UNITS_K ? low | uint(keys[unit + 2 * at + 1]) << 16 : low;
}

uint value_word(uint unit, uint at) {
    if (ALIGNED_V) {
        return values32[unit / 2 + at];
    }
    const uint low = uint(values[unit + 2 * at]);
    return 2 * at + 1 < UNITS_V ? low | uint(values[unit + 2 * at + 1]) << 16 : low;
}

// What an invocation reads of a tile.
const bool AHEAD     = ROWS * (WORDS_K + WORDS_V) <= 24 * THREADS; // as registers allow
const uint FETCHED_K = AHEAD ? (ROWS * WORDS_K + THREADS - 1) / THREADS : 1;
const uint FETCHED_V = AHEAD ? (ROWS * WORDS_V + THREADS - 1) / THREADS : 1;

uint  next_k[FETCHED_K], next_v[FETCHED_V];
float next_mask[LOGITS];

uint key_unit(uint row) {
    return (at_k_v & 0xFFFF) + head_kv * k_s2 + seq_kv * k_s3 + row * k_s1;
}

uint value_unit(uint row) {
    return (at_k_v >> 16) + head_kv * v_s2 + seq_kv * v_s3 + row * v_s1;
}

void fetch_words(uint first, uint n) {
    [[unroll]] for (uint j = 0; j < FETCHED_K; j++) {
        const uint i = thread + j * THREADS, row = i / WORDS_K;
        next_k[j] = row < n ? key_word(key_unit(first + row), i % WORDS_K) : 0;
    }
    [[unroll]] for (uint j = 0; j < FETCHED_V; j++) {
        const uint i = thread + j * THREADS, row = i / WORDS_V;
        next_v[j] = row < n ? value_word(value_unit(first + row), i % WORDS_V) : 0;
    }
}

void store_words() {
    [[unroll]] for (uint j = 0; j < FETCHED_K; j++) {
        const uint i = thread + j * THREADS, row = i / WORDS_K;
        if (row < ROWS) {
            k_words[row * STRIDE_K + i % WORDS_K] = next_k[j];
        }
    }
    [[unroll]] for (uint j = 0; j < FETCHED_V; j++) {
        const uint i = thread + j * THREADS, row = i / WORDS_V;
        if (row < ROWS) {
            v_words[row * STRIDE_V + i % WORDS_V] = next_v[j];
        }
    }
}

// Row r of the tile is row first + r of the cache, or cell_of[r] where there are slots.
void copy_keys(uint first, uint n, bool by_cell) {
    for (uint i = thread; i < ROWS * WORDS_K; i += THREADS) {
        const uint row = i / WORDS_K;
        const int  from = by_cell ? cell_of[row] : int(first + row);
        k_words[row * STRIDE_K + i % WORDS_K] = row < n && from >= 0 ? key_word(key_unit(from), i % WORDS_K) : 0;
    }
}

void copy_values(uint first, uint n, bool by_cell) {
    for (uint i = thread; i < ROWS * WORDS_V; i += THREADS) {
        const uint row = i / WORDS_V;
        const int  from = by_cell ? cell_of[row] : int(first + row);
        v_words[row * STRIDE_V + i % WORDS_V] = row < n && from >= 0 ? value_word(value_unit(from), i % WORDS_V) : 0;
    }
}

void copy_exact(uint first, uint n) {
    if (TBQ_K) {
        const uint from = (at_exact & 0xFFFF) + head_kv * BLOCKS_K * 17 + seq_kv * exact_k_s3 + first * exact_k_s1;
        for (uint i = thread; i < ROWS * BLOCKS_K * 17; i += THREADS) {
            const uint row = i / (BLOCKS_K * 17), at = i % (BLOCKS_K * 17);
            k_words[row * STRIDE_K + at] = row < n ? exact_keys32[from + row * exact_k_s1 + at] : 0;
        }
    } else {
        copy_keys(0, n, true);
    }
    if (TBQ_V) {
        const uint from = (at_exact >> 16) + head_kv * BLOCKS_V * 17 + seq_kv * exact_v_s3 + first * exact_v_s1;
        for (uint i = thread; i < ROWS * BLOCKS_V * 17; i += THREADS) {
            const uint row = i / (BLOCKS_V * 17), at = i % (BLOCKS_V * 17);
            v_words[row * STRIDE_V + at] = row < n ? exact_values32[from + row * exact_v_s1 + at] : 0;
        }
    } else {
        copy_values(0, n, true);
    }
}

// The functions that read a row's words in shared memory, from word `row` on:
//   unit, word: 16 bits, or 32, that begin at a unit.
//   scale: of a block. q8_0 has two in 64 values, which unpack() has already applied.
//   unpack: values 4 w .. 4 w + 3 of a block, and those 32 further on.
#define TBQ_READERS(unit_name, word_name, scale_name, unpack_name, words_of, levels)                                 \
    uint unit_name(uint row, uint unit) {                                                                            \
        return words_of[row + unit / 2] >> 16 * (unit & 1) & 0xFFFF;                                                 \
    }                                                                                                                \
    uint word_name(uint row, uint unit) {                                                                            \
        const uint low = words_of[row + unit / 2], high = words_of[row + (unit + 1) / 2];                            \
        return (unit & 1) == 0 ? low : low >> 16 | high << 16;                                                       \
    }                                                                                                                \
    float scale_name(const int type, uint row, uint block) {                                                         \
        return type > TBQ8    ? 1.0 :                                                                                \
               type == TBQ8 ? uintBitsToFloat(words_of[row + block * 17]) :                                          \
                                tbq_half_to_float(unit_name(row, block * units_of(type)));                           \
    }                                                                                                                \
    void unpack_name(const int type, uint row, uint block, uint w, out vec4 lo, out vec4 hi) {                       \
        if (type == F16) {                                                                                           \
            const uint at = row + block * 32 + 2 * w;                                                                \
            lo = vec4(unpackHalf2x16(words_of[at]), unpackHalf2x16(words_of[at + 1]));                               \
            hi = vec4(unpackHalf2x16(words_of[at + 16]), unpackHalf2x16(words_of[at + 17]));                         \
        } else if (type >= TBQ8) {                                                                                   \
            int   a, b;                                                                                              \
            float da = 1.0, db = 1.0;                                                                                \
            if (type == TBQ8) {                                                                                      \
                a = int(words_of[row + block * 17 + 1 + w]);                                                         \
                b = int(words_of[row + block * 17 + 9 + w]);                                                         \
            } else {                                                                                                 \
                a  = int(word_name(row, block * 34 + 1 + 2 * w));                                                    \
                b  = int(word_name(row, block * 34 + 18 + 2 * w));                                                   \
                da = tbq_half_to_float(unit_name(row, block * 34));                                                  \
                db = tbq_half_to_float(unit_name(row, block * 34 + 17));                                             \
            }                                                                                                        \
            [[unroll]] for (int i = 0; i < 4; i++) {                                                                 \
                lo[i] = da * float(bitfieldExtract(a, 8 * i, 8));                                                    \
                hi[i] = db * float(bitfieldExtract(b, 8 * i, 8));                                                    \
            }                                                                                                        \
        } else {                                                                                                     \
            const uint first   = block * units_of(type);                                                             \
            const uint nibbles = tbq_nibbles(type, word_name(row, first + TBQ_QS_UNIT + 2 * (type == 4 ? w : w & 3)), \
                                             type == 3 ? word_name(row, first + TBQ_QH_UNIT + 2 * (w & 1)) : 0, w);  \
            [[unroll]] for (int i = 0; i < 4; i++) {                                                                 \
                lo[i] = levels[nibbles >> 8 * i & 15];                                                               \
                hi[i] = levels[nibbles >> 8 * i + 4 & 15];                                                           \
            }                                                                                                        \
        }                                                                                                            \
    }

TBQ_READERS(key_shared_unit, key_shared_word, key_scale, unpack_keys, k_words, levels_k)
TBQ_READERS(value_shared_unit, value_shared_word, value_scale, unpack_values, v_words, levels_v)

// --- columns ------------------------------------------------------------------------------------------------------

uint token_of(uint column) {
    return (first_column + column) / gqa;
}

uint head_of(uint column) {
    return head_kv * gqa + (first_column + column) % gqa;
}

// Where the result of a column is, in rows.
uint result_of(uint column) {
    return (seq * n_q + token_of(column)) * (heads & 0xFFFF) + head_of(column);
}

float slope_of(uint head) {
    if (max_bias == 0.0) {
        return 1.0;
    }
    const uint n = 1u << findMSB(heads & 0xFFFF);
    return head < n ? exp2(-max_bias / float(n) * float(head + 1)) :
                      exp2(-max_bias / float(2 * n) * float(2 * (head - n) + 1));
}

uint mask_place(uint token, uint cell) {
    return (at_q_mask >> 16) + seq % mask_ne3 * mask_s3 + token * mask_s1 + cell;
}

// Whether any column sees a cell.
bool is_seen(uint cell) {
    if ((flags & HAS_MASK) == 0) {
        return true;
    }
    bool seen = false;
    for (uint token = token_of(0); token <= token_of(n_columns - 1); token++) {
        seen = seen || uint(masks[mask_place(token, cell)]) != 0xFC00;
    }
    return seen;
}

bool has_slot(uint cell) {
    return EXACT &&
           (cells[(at_cells_mean & 0xFFFF) + seq_kv * cells_s1 + n_exact + cell / 32] >> (cell & 31) & 1) != 0;
}

// What is added to the logit of a cell in this invocation's column. NONE: it does not see the cell.
float mask_of(int cell, float slope) {
    if (cell < 0 || own_column >= n_columns) {
        return NONE;
    }
    if ((flags & HAS_MASK) == 0) {
        return 0.0;
    }
    const uint m = uint(masks[mask_place(token_of(own_column), uint(cell))]);
    return m == 0xFC00 ? NONE : slope * tbq_half_to_float(m);
}

// v = H v of each block in `query`. It is behind a barrier, and ends with one.
void rotate(uint blocks) {
    [[unroll]] for (uint h = 1; h < 64; h *= 4) {
        for (uint i = thread; i < blocks * 16 * COLUMNS4; i += THREADS) {
            const uint quad = i / COLUMNS4, step = h * COLUMNS4;
            const uint at = ((quad & ~(h - 1)) * 4 + (quad & h - 1)) * COLUMNS4 + i % COLUMNS4;
            const vec4 a = query[at], b = query[at + step], c = query[at + 2 * step], d = query[at + 3 * step];
            query[at]            = a + b + (c + d);
            query[at + step]     = a - b + (c - d);
            query[at + 2 * step] = a + b - (c + d);
            query[at + 3 * step] = a - b - (c - d);
        }
        barrier();
    }
}

// Queries times the scale of logits, rotated like the keys. Columns that do not exist are zeros.
void load_queries() {
    const uint q_at = at_q_mask & 0xFFFF, mean_at = at_cells_mean >> 16;
    for (uint i = thread; i < BLOCKS_K * 64 * COLUMNS4; i += THREADS) {
        const uint  d = i / COLUMNS4, group = i % COLUMNS4;
        const float factor = TBQ_K && (flags & LOGITS_LACK_MEAN) == 0 ? tbq_flip(0.125 * scale, d & 63) : scale;
        [[unroll]] for (uint c = 0; c < 4; c++) {
            const uint column = 4 * group + c;
            float      x      = 0.0;
            if (column < n_columns) {
                x = factor * queries[q_at + d + token_of(column) * q_s1 + head_of(column) * q_s2 + seq * q_s3];
            }
            query[i][c] = x;
        }
    }
    barrier();
    if ((flags & LOGITS_LACK_MEAN) != 0) {
        if (thread < COLUMNS4) {
            vec4 dot_mean = vec4(0.0);
            for (uint d = 0; d < BLOCKS_K * 64; d++) {
                dot_mean += query[d * COLUMNS4 + thread] * means[mean_at + head_kv * BLOCKS_K * 64 + d];
            }
            bias[thread] = dot_mean;
        }
        barrier();
        for (uint i = thread; TBQ_K && i < BLOCKS_K * 64 * COLUMNS4; i += THREADS) {
            query[i] = tbq_flip(0.125, i / COLUMNS4 & 63) * query[i];
        }
        barrier();
    }
    if (TBQ_K) {
        rotate(BLOCKS_K);
    }
}

// --- a tile ---------------------------------------------------------------------------------------------------------

float largest, sum, slope; // of the invocation's column: the largest logit so far; of its rows: the weights
// In the invocations with a word of values and every so many rows: values 4 w + i and the same + 32 of each column.
vec4 accumulated[8 * COLUMNS4];

const uint ROWS_EACH = ROWS / 32; // of an invocation

// Logits of all rows with all columns. An invocation has every 32nd row, and every fourth word of it.
void multiply_keys(const int type) {
    const uint row = thread % 32, part = thread / 32;
    vec4       s[ROWS_EACH * COLUMNS4];
    [[unroll]] for (uint i = 0; i < ROWS_EACH * COLUMNS4; i++) {
        s[i] = vec4(0.0);
    }
    for (uint block = 0; block < BLOCKS_K; block++) {
        vec4 of_block[ROWS_EACH * COLUMNS4];
        [[unroll]] for (uint i = 0; i < ROWS_EACH * COLUMNS4; i++) {
            of_block[i] = vec4(0.0);
        }
        [[unroll]] for (uint half_block = 0; half_block < 2; half_block++) {
            const uint w = part + PARTS * half_block;
            vec4       lo[ROWS_EACH], hi[ROWS_EACH];
            [[unroll]] for (uint r = 0; r < ROWS_EACH; r++) {
                unpack_keys(type, (row + 32 * r) * STRIDE_K, block, w, lo[r], hi[r]);
            }
            const uint at = (block * 64 + 4 * w) * COLUMNS4;
            [[unroll]] for (uint i = 0; i < 4; i++) {
                [[unroll]] for (uint group = 0; group < COLUMNS4; group++) {
                    const vec4 q_lo = query[at + i * COLUMNS4 + group], q_hi = query[at + (i + 32) * COLUMNS4 + group];
                    [[unroll]] for (uint r = 0; r < ROWS_EACH; r++) {
                        of_block[r * COLUMNS4 + group] += lo[r][i] * q_lo;
                        of_block[r * COLUMNS4 + group] += hi[r][i] * q_hi;
                    }
                }
            }
        }
        [[unroll]] for (uint r = 0; r < ROWS_EACH; r++) {
            const float d = key_scale(type, (row + 32 * r) * STRIDE_K, block);
            [[unroll]] for (uint group = 0; group < COLUMNS4; group++) {
                s[r * COLUMNS4 + group] += d * of_block[r * COLUMNS4 + group];
            }
        }
    }
    [[unroll]] for (uint r = 0; r < ROWS_EACH; r++) {
        [[unroll]] for (uint group = 0; group < COLUMNS4; group++) {
            sums[(part * ROWS + row + 32 * r) * COLUMNS4 + group] = s[r * COLUMNS4 + group];
        }
    }
}

void fill_scales(const int type) {
    for (uint i = thread; i < ROWS * BLOCKS_V; i += THREADS) {
        v_scale[i] = value_scale(type, i / BLOCKS_V * STRIDE_V, i % BLOCKS_V);
    }
}

// Weights of the rows in the tile, relative to the largest logit so far. mask: of each row.
void weigh(float mask[LOGITS]) {
    const uint group = own_column / 4, c = own_column % 4;
    float      s[LOGITS];
    [[unroll]] for (uint j = 0; j < LOGITS; j++) {
        const uint row = own_row + j * LOGIT_STEP;
        s[j]           = (flags & LOGITS_LACK_MEAN) != 0 ? bias[group][c] : 0.0;
        [[unroll]] for (uint part = 0; part < PARTS; part++) {
            s[j] += sums[(part * ROWS + row) * COLUMNS4 + group][c];
        }
        if (softcap != 0.0) {
            s[j] = softcap * tanh(clamp(s[j], -15.0, 15.0)); // the scale has 1 / softcap in it
        }
        s[j] = mask[j] == NONE ? NONE : s[j] + mask[j];
        logit[own_column * LOGIT_SIDE + row / 4][row & 3] = s[j];
    }
    barrier();
    vec4 most4 = vec4(largest);
    [[unroll]] for (uint r = 0; r < ROWS / 4; r++) {
        most4 = max(most4, logit[own_column * LOGIT_SIDE + r]);
    }
    const float most   = max(max(most4.x, most4.y), max(most4.z, most4.w));
    const float factor = exp(largest - most);
    largest            = most;
    sum *= factor;
    [[unroll]] for (uint j = 0; j < LOGITS; j++) {
        // a logit of NONE has no weight, even where all have it
        const float p = s[j] <= NONE ? 0.0 : exp(s[j] - most);
        sum += p;
        weight[(own_row + j * LOGIT_STEP) * COLUMNS4 + group][c] = p;
    }
    if (own_row == 0) {
        rescale[group][c] = factor;
    }
}

// The number of words of values, and how many invocations share one: each of these has every so many rows.
const uint WORDS = BLOCKS_V * 8;
const uint SHARE = THREADS / WORDS;

void add_values(const int type) {
    const uint word = thread % WORDS, first = thread / WORDS, block = word / 8;
    if (first >= SHARE) {
        return;
    }
    [[unroll]] for (uint i = 0; i < 8 * COLUMNS4; i++) {
        accumulated[i] *= rescale[i % COLUMNS4];
    }
    for (uint row = first; row < ROWS; row += SHARE) {
        if (type > TBQ8) { // a row that nobody sees may hold NaN
            vec4 all = vec4(0.0);
            [[unroll]] for (uint group = 0; group < COLUMNS4; group++) {
                all += weight[row * COLUMNS4 + group];
            }
            if (all == vec4(0.0)) {
                continue;
            }
        }
        vec4 lo, hi;
        unpack_values(type, row * STRIDE_V, block, word % 8, lo, hi);
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

void exact_tile(uint first, uint n) {
    const uint cells_at = (at_cells_mean & 0xFFFF) + seq_kv * cells_s1;
    if (thread == 0) {
        exact_visible = 0;
    }
    barrier();
    if (thread < ROWS) {
        const int cell = thread < n ? cells[cells_at + first + thread] : -1;
        cell_of[thread] = cell;
        if (cell >= 0 && is_seen(uint(cell))) {
            exact_visible = 1;
        }
    }
    barrier();
    if (exact_visible == 0) {
        return; // all of the workgroup
    }
    float mask[LOGITS];
    [[unroll]] for (uint j = 0; j < LOGITS; j++) {
        mask[j] = mask_of(cell_of[own_row + j * LOGIT_STEP], slope);
    }
    copy_exact(first, n);
    barrier();
    multiply_keys(TBQ_K ? TBQ8 : TYPE_K);
    fill_scales(TBQ_V ? TBQ8 : TYPE_V);
    barrier();
    weigh(mask);
    barrier();
    add_values(TBQ_V ? TBQ8 : TYPE_V);
    barrier();
}

void fetch(uint first, uint end) {
    const uint n = min(ROWS, end - first);
    if (AHEAD) {
        fetch_words(first, n);
    }
    [[unroll]] for (uint j = 0; j < LOGITS; j++) {
        const uint row = own_row + j * LOGIT_STEP;
        next_mask[j]   = row < n && !has_slot(first + row) ? mask_of(int(first + row), slope) : NONE;
    }
}

// The first visible tile from number i of a range on.
uint next_tile(uint i, uint n_tiles) {
    while (i < min(n_tiles, TILES) && visible[i] == 0) {
        i++;
    }
    return i;
}

void packed_tiles(uint begin, uint end) {
    const uint n_tiles = begin < end ? (end - begin + ROWS - 1) / ROWS : 0;
    for (uint i = thread; i < min(n_tiles, TILES); i += THREADS) {
        visible[i] = (flags & HAS_MASK) != 0 || EXACT ? 0 : 1;
    }
    barrier();
    if ((flags & HAS_MASK) != 0 || EXACT) {
        for (uint i = thread; i < min(end - min(begin, end), TILES * ROWS); i += THREADS) {
            if (is_seen(begin + i) && !has_slot(begin + i)) {
                visible[i / ROWS] = 1;
            }
        }
        barrier();
    }
    uint tile = next_tile(0, n_tiles);
    if (tile < n_tiles) {
        fetch(begin + tile * ROWS, end);
    }
    while (tile < n_tiles) {
        const uint first = begin + tile * ROWS;
        float      mask[LOGITS];
        [[unroll]] for (uint j = 0; j < LOGITS; j++) {
            mask[j] = next_mask[j];
        }
        if (AHEAD) {
            store_words();
        } else {
            copy_keys(first, min(ROWS, end - first), false);
            copy_values(first, min(ROWS, end - first), false);
        }
        barrier();
        tile = next_tile(tile + 1, n_tiles);
        if (tile < n_tiles) {
            fetch(begin + tile * ROWS, end);
        }
        multiply_keys(TYPE_K);
        fill_scales(TYPE_V);
        barrier();
        weigh(mask);
        barrier();
        add_values(TYPE_V);
        barrier();
    }
}

// Sums over the invocations that share a word of values, to `query`.
void gather_values() {
    const uint each = ROWS * COLUMNS4 / 32; // as many at a time as there is memory for
    for (uint first = 0; first < 8 * COLUMNS4; first += each) { // not unrolled, because of its barriers
        [[unroll]] for (uint l = 0; l < 8 * COLUMNS4; l++) { // an index that is no constant would move all to memory
            if (l >= first && l < first + each) {
                sums[(l - first) * THREADS + thread] = accumulated[l];
            }
        }
        barrier();
        for (uint o = thread; o < WORDS * each; o += THREADS) {
            const uint at = o / WORDS, word = o % WORDS, i = (first + at) / COLUMNS4, group = (first + at) % COLUMNS4;
            vec4       total = vec4(0.0);
            for (uint j = 0; j < SHARE; j++) {
                total += sums[at * THREADS + word + j * WORDS];
            }
            query[(word / 8 * 64 + word % 8 * 4 + i % 4 + i / 4 * 32) * COLUMNS4 + group] = total;
        }
        barrier();
    }
}

void main() {
    const uint split = gl_WorkGroupID.x, n_splits = gl_NumWorkGroups.x;
    const uint n_head = heads & 0xFFFF, n_head_kv = heads >> 16;

    thread       = gl_LocalInvocationID.x;
    gqa          = n_head / n_head_kv;
    head_kv      = gl_WorkGroupID.y % n_head_kv;
    first_column = gl_WorkGroupID.y / n_head_kv * COLUMNS;
    n_columns    = min(gqa * n_q - first_column, COLUMNS);
    seq          = gl_WorkGroupID.z;
    seq_kv       = seq / (gl_NumWorkGroups.z / n_seq_kv);
    own_column   = thread % COLUMNS;
    own_row      = thread / COLUMNS;

    if (thread < 16) {
        levels_k[thread] = float(tbq_level(TBQ_K ? TYPE_K : 4, thread));
        levels_v[thread] = float(tbq_level(TBQ_V ? TYPE_V : 4, thread));
    }
    load_queries();
    largest = NONE;
    sum     = 0.0;
    slope   = slope_of(head_of(own_column));
    [[unroll]] for (uint i = 0; i < 8 * COLUMNS4; i++) {
        accumulated[i] = vec4(0.0);
    }
    if (EXACT) {
        for (uint first = split * ROWS; first < n_exact; first += n_splits * ROWS) {
            exact_tile(first, min(ROWS, n_exact - first));
        }
    }
    packed_tiles(split * rows_per_split, min(n_kv, (split + 1) * rows_per_split));

    logit[own_column * LOGIT_SIDE + own_row / 4][own_row & 3] = sum; // at most as many as rows
    gather_values();
    float total = 0.0;
    if (thread < COLUMNS) { // has the largest logit of its column
        for (uint i = 0; i < LOGIT_STEP; i++) {
            total += logit[own_column * LOGIT_SIDE + i / 4][i & 3];
        }
    }
    if (n_splits > 1) {
        // For each column of the result and split: the sums of values; after all of them the largest logit and the sum
        // of weights.
        const uint all_columns = gl_NumWorkGroups.z * n_q * n_head;
        if (thread < n_columns) {
            const uint at = all_columns * n_splits * BLOCKS_V * 64 + (result_of(thread) * n_splits + split) * 2;
            partial[at]     = largest;
            partial[at + 1] = total;
        }
        for (uint column = 0; column < n_columns; column++) {
            for (uint e = thread; e < BLOCKS_V * 64; e += THREADS) {
                partial[(result_of(column) * n_splits + split) * BLOCKS_V * 64 + e] =
                    query[e * COLUMNS4 + column / 4][column % 4];
            }
        }
        return;
    }
    if (thread < COLUMNS) {
        float all = total, keep = 1.0;
        if ((flags & HAS_SINKS) != 0 && thread < n_columns) {
            const float sink = sinks[(at_result_sinks >> 16) + head_of(thread)], most = max(largest, sink);
            keep = exp(largest - most);
            all  = total * keep + exp(sink - most);
        }
        const float inverse = all > 0.0 ? keep / all : 0.0;
        rescale[thread / 4][thread % 4] = inverse;
        of_rows[thread / 4][thread % 4] = inverse * total;
    }
    if (TBQ_V) {
        rotate(BLOCKS_V);
    } else {
        barrier();
    }
    for (uint column = 0; column < n_columns; column++) {
        for (uint e = thread; e < BLOCKS_V * 64; e += THREADS) {
            float x = rescale[column / 4][column % 4] * query[e * COLUMNS4 + column / 4][column % 4];
            if (TBQ_V) {
                x = tbq_flip(0.125 * x, e & 63);
            }
            if ((flags & VALUES_LACK_MEAN) != 0) {
                x += of_rows[column / 4][column % 4] * means[(at_cells_mean >> 16) + head_kv * BLOCKS_K * 64 + e];
            }
            results[(at_result_sinks & 0xFFFF) + result_of(column) * BLOCKS_V * 64 + e] = x;
        }
    }
}
