# SPDX-License-Identifier: MIT
"""Logits of a model after a scenario, with the pinned bindings, as a process: exact_logits.py SPEC.json OUT.npy

SPEC has these keys. model. caches: a list of [type of K, type of V, recent, first]; the scenario runs with each of
them. recent, first: rows that are kept in 8 bits as well. sequences, unified. context: fields of llama_context_params.
steps: a list of

    ["decode", {sequence: [tokens, first position]}]    one batch
    ["image", sequence, tokens, position, width]        random embeddings that share a position, for a model with M-RoPE
    ["cp", from, to], ["rm", sequence, p0, p1], ["keep", sequence], ["shift", sequence, p0, p1, by], ["clear"]
    ["save", sequence], ["load", sequence]              the state of one sequence; -1: of the whole context
    ["save_on_device", sequence], ["load_on_device", sequence]
    ["exact", recent, first]                            again, in the middle; the status goes to stdout

OUT: float32 of shape (caches, tokens of the last batch, vocabulary).
"""

import ctypes
import json
import pathlib
import sys

import numpy as np

import tbq.llama  # before the bindings, because it gives them the libraries of tbq

# isort: split
from llama_cpp import llama_cpp as api

spec = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
lib = api._lib
lib.llama_set_cache_exact.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32]

api.llama_backend_init()
model = api.llama_model_load_from_file(spec["model"].encode(), api.llama_model_default_params())
assert model, "the model does not load"
n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
sequences = spec.get("sequences", 1)

ON_DEVICE = 2  # LLAMA_STATE_SEQ_FLAGS_ON_DEVICE


def make_context(k, v, recent, first):
    parameters = api.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 512 * sequences, 512, 512
    parameters.n_seq_max, parameters.kv_unified = sequences, spec.get("unified", True)
    parameters.type_k, parameters.type_v = tbq.llama.type_id(k), tbq.llama.type_id(v)
    parameters.flash_attn_type = 1
    parameters.n_threads = parameters.n_threads_batch = 2
    for name, value in spec.get("context", {}).items():
        setattr(parameters, name, value)
    context = api.llama_init_from_model(model, parameters)
    assert context, "no context"
    assert lib.llama_set_cache_exact(context, recent, first) == 0, "exact rows were refused"
    return context


def decode(context, parts):
    n = sum(len(tokens) for tokens, _ in parts.values())
    batch = api.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    i = 0
    for sequence, (tokens, start) in parts.items():
        for offset, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + offset, 1
            batch.seq_id[i][0], batch.logits[i] = int(sequence), 1
            i += 1
    assert api.llama_decode(context, batch) == 0, "decoding failed"
    rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,)).copy() for i in range(n)]
    api.llama_batch_free(batch)
    return np.stack(rows)


def decode_image(context, sequence, n, position, width):
    """Embeddings as a projector gives them: one position in time, and those of a grid."""
    n_embd = api.llama_model_n_embd(model)
    embeddings = np.random.default_rng(n).standard_normal((n, n_embd)).astype(np.float32)
    at = np.arange(n)
    # sections one after the other: time, y, x, unused
    positions = np.stack([at * 0 + position, position + at // width, position + at % width, at * 0]).astype(np.int32)
    batch = api.llama_batch_init(n, n_embd, 1)
    batch.n_tokens, kind, own = n, type(batch.pos), ctypes.cast(batch.pos, ctypes.c_void_p)
    ctypes.memmove(batch.embd, embeddings.ctypes.data, embeddings.nbytes)
    batch.pos = positions.ctypes.data_as(kind)
    for i in range(n):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, i == n - 1
    assert api.llama_decode(context, batch) == 0, "decoding an image failed"
    batch.pos = ctypes.cast(own, kind)  # llama_batch_init's own, which has no room for the sections
    api.llama_batch_free(batch)


def save(context, saved, sequence, flags=0):
    if sequence == -1:
        size = api.llama_state_get_size(context)
        data = (ctypes.c_uint8 * size)()
        assert api.llama_state_get_data(context, data, size) == size
    else:
        size = api.llama_state_seq_get_size_ext(context, sequence, flags)
        data = (ctypes.c_uint8 * size)()
        assert api.llama_state_seq_get_data_ext(context, data, size, sequence, flags) == size
    saved[flags] = data


def load(context, saved, sequence, flags=0):
    data = saved[flags]
    if sequence == -1:
        assert api.llama_state_set_data(context, data, len(data)) == len(data)
    else:
        assert api.llama_state_seq_set_data_ext(context, data, len(data), sequence, flags) == len(data)


def run(context):
    """The logits of the last batch of the scenario."""
    memory, saved, logits = api.llama_get_memory(context), {}, None
    for step, *arguments in spec["steps"]:
        if step == "decode":
            logits = decode(context, arguments[0])
        elif step == "image":
            decode_image(context, *arguments)
        elif step == "cp":
            api.llama_memory_seq_cp(memory, *arguments, -1, -1)
        elif step == "rm":
            assert api.llama_memory_seq_rm(memory, *arguments)
        elif step == "keep":
            api.llama_memory_seq_keep(memory, *arguments)
        elif step == "shift":
            assert api.llama_memory_can_shift(memory)
            api.llama_memory_seq_add(memory, *arguments)
        elif step == "clear":
            api.llama_memory_clear(memory, True)
        elif step == "exact":
            print(lib.llama_set_cache_exact(context, *arguments))
        elif step.startswith("save"):
            save(context, saved, *arguments, ON_DEVICE if step == "save_on_device" else 0)
        else:
            load(context, saved, *arguments, ON_DEVICE if step == "load_on_device" else 0)
    return logits


results = []
for cache in spec["caches"]:
    context = make_context(*cache)
    results.append(run(context))
    api.llama_free(context)
np.save(sys.argv[2], np.stack(results))
