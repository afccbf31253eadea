// SPDX-License-Identifier: MIT
// Exact rows, as a mechanism of the KV cache: docs/design/exact.md.

#include "llama-kv-exact.h"

#include "llama-center-impl.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-dsv4.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include "tbq-ggml.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <typeinfo>

// --- memory ---------------------------------------------------------------------------------------------------------

// Tokens of a stream that a graph stores beside the window.  So a draft of that many tokens and its verification do not
// push rows out that come back when the draft is rejected.
static constexpr uint32_t N_SPARE = 16;

bool llama_kv_exact::applies(const llama_kv_cache & kv) {
    for (const auto & layer : kv.layers) {
        for (const ggml_tensor * t : { layer.k, kv.v_trans ? nullptr : layer.v }) {
            if (t && t->ne[0] > 0 && ggml_is_tbq(t->type)) {
                return true;
            }
        }
    }
    return false;
}

void llama_kv_exact::init(const llama_kv_cache & kv, uint32_t n_recent, uint32_t n_first) {
    *this = {};
    if (kv.other || !applies(kv) || (n_recent == 0 && n_first == 0)) {
        return;
    }

    llama_kv_exact res;
    res.kv       = &kv;
    res.n_recent = n_recent;
    res.n_first  = n_first;
    res.n_seq    = kv.n_stream == 1 ? kv.n_seq_max : 1;
    res.n_spare  = N_SPARE + res.n_seq;
    res.n_slots  = (uint32_t) std::min((uint64_t) res.n_seq * ((uint64_t) n_recent + n_first) + res.n_spare,
                                       (uint64_t) kv.get_size());
    res.slots.assign(kv.n_stream, std::vector<slot>(res.n_slots));
    res.slot_of.assign(kv.n_stream, std::vector<int32_t>(kv.get_size(), -1));

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;
    // named like the cache's own: with a split of tensors over devices the name decides who holds which heads
    const auto new_tensor = [&](const ggml_tensor * t, std::vector<ggml_tensor *> & streams) -> ggml_tensor * {
        if (!t || t->ne[0] == 0 || !ggml_is_tbq(t->type)) {
            return nullptr;
        }
        ggml_context_ptr & ctx = ctxs[ggml_backend_buffer_get_type(t->buffer)];
        if (!ctx) {
            ctx.reset(ggml_init({ 2 * (1 + kv.n_stream) * kv.layers.size() * ggml_tensor_overhead(), nullptr, true }));
        }
        // the last row is for those rows of a state that have no room
        ggml_tensor * e = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_TBQ8_0, t->ne[0], res.n_slots * kv.n_stream + 1);
        ggml_set_name(e, t->name);
        for (uint32_t s = 0; s < kv.n_stream; ++s) {
            streams.push_back(
                ggml_view_2d(ctx.get(), e, e->ne[0], res.n_slots, e->nb[1], (size_t) s * res.n_slots * e->nb[1]));
        }
        return e;
    };
    for (const auto & l : kv.layers) {
        layer & e = res.layers.emplace_back();
        e.k       = new_tensor(l.k, e.k_stream);
        e.v       = new_tensor(kv.v_trans ? nullptr : l.v, e.v_stream);
    }
    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr buf{ kv.hparams.no_alloc ? ggml_backend_buft_alloc_buffer(buft, 0)
                                                         : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("failed to allocate the exact rows");
        }
        if (kv.hparams.no_alloc) {
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get();
            }
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        res.bufs.emplace_back(std::move(ctx), std::move(buf));
    }
    *this = std::move(res);
}

size_t llama_kv_exact::size() const {
    size_t res = 0;
    for (const layer & l : layers) {
        res += (l.k ? ggml_nbytes(l.k) : 0) + (l.v ? ggml_nbytes(l.v) : 0);
    }
    return res;
}

size_t llama_kv_exact::n_layer() const {
    return std::count_if(layers.begin(), layers.end(), [](const layer & l) { return l.k || l.v; });
}

void llama_kv_exact::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [ctx, buf] : bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());
        sizes[buft] += kv->hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft)
                                            : ggml_backend_buffer_get_size(buf.get());
    }
}

// --- the list -------------------------------------------------------------------------------------------------------

void llama_kv_exact::drop(uint32_t strm, uint32_t i) {
    slot & s = slots[strm][i];
    if (s.cell >= 0) {
        slot_of[strm][s.cell] = -1;
        s                     = {};
    }
}

void llama_kv_exact::clear() {
    for (uint32_t s = 0; s < slots.size(); ++s) {
        std::fill(slots[s].begin(), slots[s].end(), slot{});
        std::fill(slot_of[s].begin(), slot_of[s].end(), -1);
    }
}

void llama_kv_exact::forget(const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs) {
    for (size_t s = 0; *this && s < strm.size(); ++s) {
        for (const uint32_t cell : idxs[s]) {
            if (slot_of[strm[s]][cell] >= 0) {
                drop(strm[s], slot_of[strm[s]][cell]);
            }
        }
    }
}

void llama_kv_exact::copy_stream(uint32_t src, uint32_t dst) {
    if (*this) {
        slots[dst]   = slots[src];
        slot_of[dst] = slot_of[src];
    }
}

void llama_kv_exact::copy_stream_rows(uint32_t src, uint32_t dst) const {
    for (const layer & l : layers) {
        if (l.k) {
            ggml_backend_tensor_copy(l.k_stream[src], l.k_stream[dst]);
        }
        if (l.v) {
            ggml_backend_tensor_copy(l.v_stream[src], l.v_stream[dst]);
        }
    }
}

void llama_kv_exact::begin(uint32_t s0, const std::vector<llama_seq_id> & strm,
                           const std::vector<std::vector<uint32_t>> & idxs, uint32_t n_kv) {
    if (*this) {
        cur = { s0, n_kv, strm, idxs };
    }
}

// The position of each sequence's first query from now on: the smallest of the tokens in the cells idxs, or the one
// that follows the sequence.
std::vector<llama_pos> llama_kv_exact::next_queries(uint32_t strm, const std::vector<uint32_t> & idxs) const {
    const auto &           cells = kv->v_cells[strm];
    std::vector<llama_pos> res(kv->n_seq_max);
    for (uint32_t s = 0; s < kv->n_seq_max; ++s) {
        res[s] = cells.seq_pos_max(s) + 1;
    }
    for (const uint32_t cell : idxs) {
        for (uint32_t s = 0; s < kv->n_seq_max; ++s) {
            if (cells.seq_has(cell, s)) {
                res[s] = std::min(res[s], cells.pos_get(cell));
            }
        }
    }
    return res;
}

// The first sequence of a cell that fits, or -1.
template <typename F> static llama_seq_id find_seq(const llama_kv_cells & cells, uint32_t cell, uint32_t n_seq,
                                                   F fits) {
    if (cells.seq_count(cell) == 1) {
        const llama_seq_id s = cells.seq_get(cell);
        return fits(s) ? s : -1;
    }
    for (uint32_t s = 0; s < n_seq; ++s) {
        if (cells.seq_has(cell, s) && fits(s)) {
            return s;
        }
    }
    return -1;
}

// Whether one of the queries to come has the row of a cell in its window.
bool llama_kv_exact::is_recent(uint32_t strm, uint32_t cell, const std::vector<llama_pos> & queries) const {
    const auto &  cells = kv->v_cells[strm];
    const int64_t pos   = cells.pos_get(cell);
    return find_seq(cells, cell, kv->n_seq_max,
                    [&](llama_seq_id s) { return pos > (int64_t) queries[s] - n_recent; }) >= 0;
}

// A row that may have a slot.
struct exact_candidate {
    int       need; // 2: a first row, 1: in the window, 0: neither
    llama_pos pos;
    int32_t   token; // among those of the graph, or -1: the row that a slot holds
    uint32_t  slot;
    uint32_t  cell;
};

// The order in which rows get slots: first rows from the start of a sequence, others from its end.
static bool is_before(const exact_candidate & a, const exact_candidate & b) {
    if (a.need != b.need) {
        return a.need > b.need;
    }
    const exact_candidate & newer = a.need == 2 ? b : a;
    const exact_candidate & older = a.need == 2 ? a : b;
    return newer.pos != older.pos       ? newer.pos > older.pos
           : newer.token != older.token ? newer.token > older.token
                                        : newer.cell > older.cell;
}

// The tokens of an image share a position, so that a sequence can want any number of rows.  This leaves each sequence
// its share, n_left rows of a need.  Those that it wants beyond wait behind the rows of the other sequences, which may be
// at lower positions.  other(row): what a row needs otherwise.
template <typename F, typename G>
static void limit(const llama_kv_cells & cells, std::vector<exact_candidate> & rows, int need,
                  std::vector<uint32_t> n_left, F wants, G other) {
    std::sort(rows.begin(), rows.end(), is_before);
    for (exact_candidate & row : rows) {
        if (row.need != need) {
            continue;
        }
        const llama_seq_id s = find_seq(cells, row.cell, (uint32_t) n_left.size(),
                                        [&](llama_seq_id id) { return n_left[id] > 0 && wants(row, id); });
        if (s >= 0) {
            --n_left[s];
        } else {
            row.need = other(row);
        }
    }
}

// Gives slots to the tokens in the cells idxs: to all of them, or to those that later graphs want.  Rows that nobody
// wants stay until their slot is needed, because a removed draft can make them wanted again.  Returns the slot of each
// token, or -1.
std::vector<int32_t> llama_kv_exact::assign(uint32_t strm, const std::vector<uint32_t> & idxs, bool all) {
    const auto &                 cells   = kv->v_cells[strm];
    const std::vector<llama_pos> queries = next_queries(strm, all ? idxs : std::vector<uint32_t>{});

    std::vector<exact_candidate> rows;
    uint64_t                     n_wanted = 0;

    const auto add = [&](uint32_t cell, bool first, int32_t token, uint32_t slot) {
        const int need = first ? 2 : is_recent(strm, cell, queries) ? 1 : 0;
        if (all || token < 0 || need > 0) {
            rows.push_back({ need, cells.pos_get(cell), token, slot, cell });
            n_wanted += need > 0;
        }
    };
    for (uint32_t i = 0; i < n_slots; ++i) {
        const slot & s = slots[strm][i];
        if (s.cell >= 0 && cells.is_empty(s.cell)) {
            drop(strm, i);
        }
        if (s.cell >= 0) {
            add(s.cell, s.first, -1, i);
        }
    }
    for (uint32_t i = 0; i < idxs.size(); ++i) {
        add(idxs[i], cells.pos_get(idxs[i]) < (int64_t) n_first, (int32_t) i, 0);
    }
    if (n_wanted > n_slots) {
        std::vector<uint32_t> n_window(kv->n_seq_max, n_recent);
        for (size_t i = 0; all && i < idxs.size(); ++i) { // the window of the first query, and what follows that query
            ++n_window[find_seq(cells, idxs[i], kv->n_seq_max, [](llama_seq_id) { return true; })];
        }
        limit(
            cells, rows, 2, std::vector<uint32_t>(kv->n_seq_max, n_first),
            [](const exact_candidate &, llama_seq_id) { return true; },
            [&](const exact_candidate & row) { return is_recent(strm, row.cell, queries) ? 1 : 0; });
        limit(
            cells, rows, 1, n_window,
            [&](const exact_candidate & row, llama_seq_id s) { return row.pos > (int64_t) queries[s] - n_recent; },
            [](const exact_candidate &) { return 0; });
    }
    if (rows.size() > n_slots) {
        std::nth_element(rows.begin(), rows.begin() + n_slots, rows.end(), is_before);
        for (size_t i = n_slots; i < rows.size(); ++i) {
            if (rows[i].token < 0) {
                drop(strm, rows[i].slot);
            }
        }
        rows.resize(n_slots);
    }
    std::vector<int> needs(idxs.size(), -1); // of the tokens that get a slot
    for (const exact_candidate & row : rows) {
        if (row.token >= 0) {
            needs[row.token] = row.need;
        }
    }
    std::vector<int32_t> res(idxs.size(), -1);
    uint32_t             next = 0;
    for (size_t i = 0; i < idxs.size(); ++i) {
        if (needs[i] < 0) {
            continue;
        }
        while (slots[strm][next].cell >= 0) {
            ++next;
        }
        slots[strm][next]      = { (int32_t) idxs[i], needs[i] == 2 };
        slot_of[strm][idxs[i]] = (int32_t) next;
        res[i]                 = (int32_t) next;
    }
    return res;
}

// --- in the graph ---------------------------------------------------------------------------------------------------

// What the layers of a cache share in a graph.
//
// An ubatch of a few tokens is stored in slots first, and attention reads the slots.  A longer one would push the
// window of its own first queries out, and not find slots for all of its rows.  So attention reads another tensor then:
// the slots as they were, followed by the rows of the ubatch.
class llama_kv_exact::graph_input : public llm_graph_input_i {
public:
    // A graph that reserves memory for all streams stands for a long ubatch of one of them, too.
    graph_input(const llama_kv_cache_context * mctx, ggml_context * ctx, int64_t n_tokens)
        : kv(mctx->kv), s0(mctx->sinfos[mctx->i_cur].s0), n_stream((uint32_t) mctx->sinfos[mctx->i_cur].n_stream()),
          n_rows((uint32_t) (n_tokens / n_stream)),
          is_long(kv->exact.is_long(mctx->ubatches.empty() ? (uint32_t) n_tokens : n_rows)), layers(kv->layers.size()) {
        const int64_t n_list = n_exact() + n_words(mctx->n_kv);
        list = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_list, n_stream + (n_tokens + n_list - 1) / n_list);
        ggml_set_input(list);
    }

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);
        if (list->buffer) {
            kv->exact.set_input(list);
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        const auto & cur = kv->exact.cur;
        return n_rows * n_stream == params.ubatch.n_tokens && s0 == cur.s0 && n_stream == cur.strm.size() &&
               list->ne[0] == n_exact() + n_words(cur.n_kv);
    }

    static int64_t n_words(uint32_t n_kv) { return (n_kv + 31) / 32; }

    int64_t n_exact() const { return kv->exact.n_slots + (is_long ? n_rows : 0); } // of a stream

    llama_kv_cache * kv;

    const uint32_t s0;
    const uint32_t n_stream;
    const uint32_t n_rows; // tokens of a stream
    const bool     is_long;

    // I32 [n_exact + n_words, n_stream + some]: for each stream the list as FLASH_ATTN_EXT reads it, and behind all of
    // them for each token the slot where it is stored, or -1
    ggml_tensor * list;

    struct layer {
        bool          stored = false;
        ggml_tensor * k      = nullptr; // what attention reads: [n_embd_gqa, n_exact, n_stream]
        ggml_tensor * v      = nullptr;
    };
    std::vector<layer> layers;
};

void llama_kv_exact::set_input(ggml_tensor * t) {
    const size_t         n_rows  = cur.idxs.at(0).size();
    const int64_t        n_words = graph_input::n_words(cur.n_kv);
    const int64_t        n_exact = t->ne[0] - n_words;
    std::vector<int32_t> list(ggml_nelements(t));
    int32_t *            rows = list.data() + t->ne[0] * cur.strm.size();
    for (size_t s = 0; s < cur.strm.size(); ++s) {
        const uint32_t strm = cur.strm[s];
        const auto &   idxs = cur.idxs[s];
        GGML_ASSERT(idxs.size() == n_rows);
        int32_t *  cells = list.data() + s * t->ne[0];
        int32_t *  words = cells + n_exact;
        const auto add   = [&](int64_t i, int32_t cell) {
            cells[i] = cell;
            if (cell >= 0) {
                words[cell / 32] |= (int32_t) (1u << (cell % 32));
            }
        };
        const auto add_slots = [&]() {
            for (uint32_t i = 0; i < n_slots; ++i) {
                const int32_t cell = slots[strm][i].cell;
                add(i, cell >= 0 && cell < (int64_t) cur.n_kv && !kv->v_cells[strm].is_empty(cell) ? cell : -1);
            }
        };
        const bool before = is_long((uint32_t) n_rows);
        if (before) {
            add_slots();
            for (size_t i = 0; i < n_rows; ++i) {
                add(n_slots + i, (int32_t) idxs[i]);
            }
        }
        const std::vector<int32_t> to = assign(strm, idxs, !before);
        for (size_t i = 0; i < n_rows; ++i) {
            rows[s * n_rows + i] = to[i] < 0 ? -1 : (int32_t) (strm * n_slots) + to[i];
        }
        if (!before) {
            add_slots();
        }
    }
    ggml_backend_tensor_set(t, list.data(), 0, ggml_nbytes(t));
}

template <typename T, typename F> static T * find_input(llm_graph_result * res, F fits) {
    for (const auto & input : res->inputs) {
        T * t = dynamic_cast<T *>(input.get());
        if (t && fits(t)) {
            return t;
        }
    }
    return nullptr;
}

llama_kv_exact_attn::llama_kv_exact_attn(llm_graph_result * res, const llama_kv_cache_context * mctx,
                                         ggml_tensor * k_cur, ggml_tensor * v_cur, int32_t il)
    : ctx(res->get_ctx()) {
    if (!mctx) {
        return;
    }
    llama_kv_cache * kv = mctx->kv;

    ikv    = kv->map_layer_ids.at(il);
    center = &kv->layers[ikv].center;
    values = !kv->layers[ikv].v;
    if (!kv->exact) {
        return;
    }
    inp = find_input<llama_kv_exact::graph_input>(res, [&](const auto * t) { return t->kv == kv; });
    if (!inp) {
        if (!k_cur) {
            return;
        }
        inp = static_cast<llama_kv_exact::graph_input *>(
            res->add_input(std::make_unique<llama_kv_exact::graph_input>(mctx, ctx, k_cur->ne[2])));
    }
    if (!k_cur || (!v_cur && kv->layers[ikv].v)) {
        return;
    }
    auto & layer  = inp->layers[ikv];
    layer.stored  = true;
    const auto of = [&](ggml_tensor * exact, ggml_tensor * cur, ggml_tensor * mean) -> ggml_tensor * {
        if (!exact) {
            return nullptr;
        }
        const int64_t n_slots = kv->exact.n_slots;
        ggml_tensor * t       = ggml_view_3d(ctx, exact, exact->ne[0], n_slots, inp->n_stream, exact->nb[1],
                                             exact->nb[1] * n_slots, exact->nb[1] * n_slots * inp->s0);
        if (inp->is_long) {
            t = tbq_ggml_concat_exact(ctx, t,
                                      ggml_view_3d(ctx, cur, exact->ne[0], inp->n_rows, inp->n_stream, cur->nb[2],
                                                   cur->nb[2] * inp->n_rows, 0),
                                      mean);
            ggml_build_forward_expand(res->get_gf(), t); // before the slots are written
        }
        return t;
    };
    layer.k = of(kv->exact.layers[ikv].k, k_cur, kv->layers[ikv].center.mean);
    layer.v = of(kv->exact.layers[ikv].v, v_cur, nullptr);
}

ggml_tensor * llama_kv_exact_attn::store(ggml_tensor * set_rows, ggml_tensor * exact) const {
    if (exact && inp->layers[ikv].stored) {
        GGML_ASSERT(set_rows->op == GGML_OP_SET_ROWS && set_rows->ne[0] == exact->ne[0]);
        tbq_ggml_set_rows_exact(set_rows, exact, inp->list, (int32_t) (inp->list->ne[0] * inp->n_stream));
    }
    return set_rows;
}

ggml_tensor * llama_kv_exact_attn::store_k(ggml_tensor * set_rows) const {
    return store(set_rows, inp ? inp->kv->exact.layers[ikv].k : nullptr);
}

ggml_tensor * llama_kv_exact_attn::store_v(ggml_tensor * set_rows) const {
    return store(set_rows, inp ? inp->kv->exact.layers[ikv].v : nullptr);
}

ggml_tensor * llama_kv_exact_attn::logits(ggml_tensor * kq, ggml_tensor * q) const {
    return center ? center->logits(ctx, kq, q) : kq;
}

void llama_kv_exact_attn::attend(ggml_tensor * fa) const {
    if (center) {
        center->attend(fa, values);
    }
    if (!inp || !inp->layers[ikv].stored) {
        return;
    }
    // rows to heads, in the order of fa->src[1]
    const auto heads = [&](ggml_tensor * t, const ggml_tensor * like) -> ggml_tensor * {
        const int64_t head_size = like->ne[0];
        const int64_t whole     = fa->src[1]->ne[0]; // MLA: values are the first channels of the keys
        t = ggml_view_4d(ctx, t, head_size, like->ne[2], t->ne[1], t->ne[2],
                         ggml_row_size(t->type, t == inp->layers[ikv].k ? whole : head_size), t->nb[1], t->nb[2], 0);
        return ggml_permute(ctx, t, 0, 2, 1, 3);
    };
    const auto &  layer = inp->layers[ikv];
    const bool    mla   = !inp->kv->layers[ikv].v;
    ggml_tensor * k     = layer.k ? heads(layer.k, fa->src[1]) : nullptr;
    ggml_tensor * v =
        mla ? (layer.k ? heads(layer.k, fa->src[2]) : nullptr) : (layer.v ? heads(layer.v, fa->src[2]) : nullptr);
    tbq_ggml_flash_attn_ext_exact(fa, k, v, inp->list);
}

// --- K-shift --------------------------------------------------------------------------------------------------------

class llama_kv_exact::shift_input : public llm_graph_input_i {
public:
    shift_input(const llama_kv_exact & exact, ggml_tensor * k_shift) : exact(exact), k_shift(k_shift) {}

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);
        std::vector<int32_t> shifts;
        for (size_t s = 0; s < exact.slots.size(); ++s) {
            const auto & cells = exact.kv->v_cells[s];
            for (const auto & slot : exact.slots[s]) {
                shifts.push_back(slot.cell >= 0 && !cells.is_empty(slot.cell) ? cells.get_shift(slot.cell) : 0);
            }
        }
        ggml_backend_tensor_set(k_shift, shifts.data(), 0, ggml_nbytes(k_shift));
    }

    const llama_kv_exact & exact;
    ggml_tensor *          k_shift; // I32 [n_slots*n_stream]
};

ggml_tensor * llama_kv_exact::get_k_shift(ggml_context * ctx, const ggml_tensor * k, size_t ikv) const {
    if (!*this || !layers[ikv].k) {
        return nullptr;
    }
    // the same channels of the same heads
    ggml_tensor * exact = layers[ikv].k;
    const size_t  block = ggml_type_size(exact->type), packed = ggml_type_size(k->type);
    return ggml_view_3d(ctx, exact, k->ne[0], k->ne[1], n_slots * slots.size(), k->nb[1] / packed * block, exact->nb[1],
                        k->view_offs / packed * block);
}

ggml_tensor * llama_kv_exact::build_input_k_shift(llm_graph_result * res) const {
    auto * inp = find_input<shift_input>(res, [&](const auto * t) { return &t->exact == this; });
    if (!inp) {
        ggml_tensor * t = ggml_new_tensor_1d(res->get_ctx(), GGML_TYPE_I32, (int64_t) (n_slots * slots.size()));
        ggml_set_input(t);
        inp = static_cast<shift_input *>(res->add_input(std::make_unique<shift_input>(*this, t)));
    }
    return inp->k_shift;
}

// --- states ---------------------------------------------------------------------------------------------------------

// A state begins with the number of streams, or with the magic number of its center and what belongs to it.  That of a
// cache with exact rows has this, then their cells, and then the rest; their rows are behind everything else.  States
// without exact rows are as they were.
static constexpr uint32_t EXACT_MAGIC = 0x43415845; // "EXAC"

// The exact rows among the cells that llama_kv_cache::state_write saves, in their order.  Of one sequence only those
// that it wants, so that they find slots again beside the windows of all others.
std::vector<llama_kv_exact::saved> llama_kv_exact::saved_rows(uint32_t strm, llama_seq_id seq_id) const {
    const auto &                 cells   = kv->v_cells[strm];
    const std::vector<llama_pos> queries = next_queries(strm, {});
    std::vector<saved>           res;
    uint32_t                     nth = 0;
    for (uint32_t cell = 0; cell < cells.size(); ++cell) {
        if (cells.is_empty(cell) ||
            (seq_id != -1 &&
             (!cells.seq_has(cell, seq_id) ||
              llama_hparams::is_masked_swa(kv->n_swa, kv->swa_type, cells.pos_get(cell), cells.seq_pos_max(seq_id))))) {
            continue;
        }
        const int32_t i      = slot_of[strm][cell];
        const auto    wanted = [&](int64_t pos) { return pos < n_first || pos > (int64_t) queries[seq_id] - n_recent; };
        if (i >= 0 && (seq_id == -1 || wanted(cells.pos_get(cell)))) {
            res.push_back({ nth, (uint32_t) i });
        }
        ++nth;
    }
    return res;
}

void llama_kv_exact::state_write_cells(llama_io_write_i & io, llama_seq_id seq_id) const {
    std::vector<std::vector<saved>> rows;
    bool                            any = false;
    for (uint32_t s = 0; s < slots.size(); ++s) {
        rows.push_back(saved_rows(s, seq_id));
        any = any || !rows.back().empty();
    }
    if (!any) {
        return;
    }
    const uint32_t n_stream = rows.size();
    io.write(&EXACT_MAGIC, sizeof(EXACT_MAGIC));
    io.write(&n_stream, sizeof(n_stream));
    for (const auto & stream : rows) {
        const uint32_t n = stream.size();
        io.write(&n, sizeof(n));
        for (const saved & row : stream) {
            io.write(&row.nth, sizeof(row.nth));
        }
    }
}

void llama_kv_exact::state_write_rows(llama_io_write_i & io, llama_seq_id seq_id) const {
    for (uint32_t s = 0; s < slots.size(); ++s) {
        for (const saved & row : saved_rows(s, seq_id)) {
            for (const layer & l : layers) {
                for (ggml_tensor * t : { l.k ? l.k_stream[s] : nullptr, l.v ? l.v_stream[s] : nullptr }) {
                    if (t) {
                        io.write_tensor(t, row.slot * t->nb[1], t->nb[1]);
                    }
                }
            }
        }
    }
}

llama_kv_exact::state llama_kv_exact::state_read_cells(llama_io_read_i & io, const llama_kv_cache & kv,
                                                       uint32_t & n_stream) const {
    state res;
    res.cells.resize(kv.n_stream);
    res.strm.resize(kv.n_stream);
    if (n_stream != EXACT_MAGIC) {
        return res;
    }
    io.read(&n_stream, sizeof(n_stream));
    if (n_stream != kv.n_stream) {
        return res; // the caller refuses it
    }
    for (uint32_t s = 0; s < n_stream; ++s) {
        uint32_t n;
        io.read(&n, sizeof(n));
        if (n > kv.get_size()) {
            throw std::runtime_error(
                format("the state has exact rows of %u cells, and the cache %u", n, kv.get_size()));
        }
        auto & nth = res.nth.emplace_back(n);
        for (uint32_t i = 0; i < n; ++i) {
            io.read(&nth[i], sizeof(nth[i]));
            if (i > 0 && nth[i] <= nth[i - 1]) {
                throw std::runtime_error("the cells of a state's exact rows are not in order");
            }
        }
    }
    io.read(&n_stream, sizeof(n_stream));
    return res;
}

void llama_kv_exact::state_read_rows(llama_io_read_i & io, const llama_kv_cache & kv, llama_state_seq_flags flags,
                                     const state & state) {
    std::vector<uint8_t> unused;
    for (size_t s = 0; s < state.nth.size(); ++s) {
        std::vector<uint32_t> idxs;
        for (const uint32_t nth : state.nth[s]) {
            if (nth >= state.cells[s].size()) {
                throw std::runtime_error(
                    format("the state has an exact row of cell %u, and %zu cells", nth, state.cells[s].size()));
            }
            idxs.push_back(state.cells[s][nth]);
        }
        const uint32_t             strm = state.strm[s];
        const std::vector<int32_t> to =
            *this && !idxs.empty() ? assign(strm, idxs, false) : std::vector<int32_t>(idxs.size(), -1);
        for (const int32_t slot : to) {
            for (size_t i = 0; i < kv.layers.size(); ++i) {
                for (const bool is_k : { true, false }) {
                    const ggml_tensor * packed = is_k ? kv.layers[i].k : kv.v_trans ? nullptr : kv.layers[i].v;
                    if (!packed || packed->ne[0] == 0 || !ggml_is_tbq(packed->type)) {
                        continue;
                    }
                    const size_t size = ggml_row_size(GGML_TYPE_TBQ8_0, packed->ne[0]);
                    if (*this) {
                        const size_t row = slot < 0 ? n_slots * slots.size() : (size_t) strm * n_slots + slot;
                        io.read_tensor(is_k ? layers[i].k : layers[i].v, row * size, size);
                    } else if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
                        throw std::runtime_error("a state with exact rows, and a context without");
                    } else {
                        unused.resize(size);
                        io.read(unused.data(), size);
                    }
                }
            }
        }
    }
}

// --- in the context -------------------------------------------------------------------------------------------------

// The caches whose rows the graphs of llama-graph.cpp store and read.  Graphs that do so themselves are not among them.
static std::vector<llama_kv_cache *> exact_caches(const llama_context & ctx) {
    llama_memory_i * memory = ctx.get_memory();
    if (!memory || ctx.get_model().arch == LLM_ARCH_DFLASH) {
        return {};
    }
    if (typeid(*memory) == typeid(llama_kv_cache)) {
        return { static_cast<llama_kv_cache *>(memory) };
    }
    if (typeid(*memory) == typeid(llama_kv_cache_iswa)) {
        auto * iswa = static_cast<llama_kv_cache_iswa *>(memory);
        return { iswa->get_base(), iswa->get_swa() };
    }
    if (typeid(*memory) == typeid(llama_memory_hybrid)) {
        return { static_cast<llama_memory_hybrid *>(memory)->get_mem_attn() };
    }
    if (typeid(*memory) == typeid(llama_memory_hybrid_iswa)) {
        auto * iswa = static_cast<llama_memory_hybrid_iswa *>(memory)->get_mem_attn();
        return { iswa->get_base(), iswa->get_swa() };
    }
    return {};
}

// The keys of a cache of another class, or NULL: what it lacks is said where these are of a tbq type.
static const llama_kv_cache * other_cache(llama_memory_i * memory) {
    if (auto * dsa = dynamic_cast<llama_kv_cache_dsa *>(memory)) {
        return dsa->get_mla();
    }
    if (auto * dsa = dynamic_cast<llama_kv_cache_dsa_iswa *>(memory)) {
        return dsa->get_dsa()->get_mla();
    }
    if (auto * dsv4 = dynamic_cast<llama_kv_cache_dsv4 *>(memory)) {
        return dsv4->get_raw()->get_base();
    }
    if (auto * msa = dynamic_cast<llama_kv_cache_msa *>(memory)) {
        return msa->get_base();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_idx *>(memory)) {
        return hybrid->get_mem_attn();
    }
    return dynamic_cast<llama_kv_cache *>(memory); // DFlash
}

void llama_context::set_exact(uint32_t n_recent, uint32_t n_first) {
    const std::vector<llama_kv_cache *> caches = exact_caches(*this);
    if (memory) {
        llama_center_check_empty(*this);
    }
    const bool wanted = n_recent > 0 || n_first > 0;
    if (!cparams.flash_attn) {
        n_recent = n_first = 0; // products of keys and queries without flash attention read the packed rows only
    }
    size_t n_layer = 0, size = 0;
    bool   tbq = false;
    try {
        for (llama_kv_cache * kv : caches) {
            const bool had = (bool) kv->exact;
            kv->exact.init(*kv, n_recent, n_first);
            sched_need_reserve = sched_need_reserve || had || kv->exact; // the graphs get or lose operations
            n_layer += kv->exact.n_layer();
            size += kv->exact.size();
            tbq = tbq || llama_kv_exact::applies(*kv);
        }
        if (n_layer > 0) {
            sched_reserve(); // now, because llama_decode() could not report that memory is short
        }
    } catch (...) { // no memory: not half of the caches
        for (llama_kv_cache * kv : caches) {
            kv->exact.init(*kv, 0, 0);
        }
        sched_need_reserve = true;
        throw;
    }
    const llama_kv_cache * other = caches.empty() ? other_cache(memory.get()) : nullptr;
    if (wanted && n_layer == 0 && (tbq || (other && llama_kv_exact::applies(*other)))) {
        LLAMA_LOG_INFO("%s: no exact rows: %s\n", "llama_set_cache_exact",
                       !cparams.flash_attn ? "flash attention is off"
                       : tbq               ? "the cache belongs to another context"
                                           : "graphs of this architecture read its cache in a way of their own");
    }
    if (n_layer > 0) {
        LLAMA_LOG_INFO(
            "%s: the newest %u and the first %u rows of a sequence are kept in 8 bits: %zu layers, %.2f MiB\n",
            "llama_set_cache_exact", n_recent, n_first, n_layer, size / 1024.0 / 1024.0);
    }
}

int32_t llama_set_cache_exact(llama_context * ctx, uint32_t n_recent, uint32_t n_first) {
    try {
        ctx->set_exact(n_recent, n_first);
        return 0;
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return -1;
    }
}
