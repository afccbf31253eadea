# SPDX-License-Identifier: MIT
"""Logits of a model with the pinned bindings, in a separate process: center_logits.py SPEC.json OUT.npy

SPEC has these keys. model. center: a file, or null. measure: a file to write the means to, or null. type_k, type_v.
recent: rows that are kept in 8 bits as well. tokens. split: decode so many tokens at a time. sequences, unified.
shift: drop the first tokens and move the others forward before the last batch. wander: instead of that, move the last
two tokens forth and back so often; OUT is then which bytes of the state have changed. context: fields of
llama_context_params. load: "relative" for a path whose folder is left afterwards, "stream" for a FILE that is closed.
gone: remove the model's file when it is loaded.

OUT: float32 of shape (tokens of the last batch, vocabulary).  The process ends with status 3 if llama.cpp refuses the
center.
"""

import ctypes
import json
import os
import pathlib
import sys

import numpy as np

import tbq.llama  # before the bindings, because it gives them the libraries of tbq

# isort: split
from llama_cpp import llama_cpp as api

spec = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
rng = np.random.default_rng(7)
lib = api._lib
lib.llama_set_cache_center.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
lib.llama_cache_center_stats_init.argtypes, lib.llama_cache_center_stats_init.restype = (
    [ctypes.c_void_p],
    ctypes.c_void_p,
)
lib.llama_cache_center_stats_add.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32]
lib.llama_cache_center_stats_save.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p]

api.llama_backend_init()
parameters = api.llama_model_default_params()
if spec.get("load") == "stream":
    libc = ctypes.CDLL(None)
    libc.fopen.restype, libc.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    stream = libc.fopen(spec["model"].encode(), b"rb")
    lib.llama_model_load_from_file_ptr.argtypes = [ctypes.c_void_p, type(parameters)]
    lib.llama_model_load_from_file_ptr.restype = ctypes.c_void_p
    model = lib.llama_model_load_from_file_ptr(stream, parameters)
    libc.fclose(stream)
elif spec.get("load") == "relative":
    os.chdir(os.path.dirname(spec["model"]))
    model = api.llama_model_load_from_file(os.path.basename(spec["model"]).encode(), parameters)
    os.chdir("/")
else:
    model = api.llama_model_load_from_file(spec["model"].encode(), parameters)
assert model, "the model does not load"
if spec.get("gone"):
    os.unlink(spec["model"])
n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
sequences = spec.get("sequences", 1)

counting = ctypes.c_void_p()
parameters = api.llama_context_default_params()
parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 512 * sequences, 512, 512
parameters.n_seq_max, parameters.kv_unified = sequences, spec.get("unified", True)
parameters.type_k, parameters.type_v = (
    tbq.llama.type_id(spec.get("type_k", "f32")),
    tbq.llama.type_id(spec.get("type_v", "f32")),
)
parameters.flash_attn_type = 1 if spec.get("flash", True) else 0
parameters.n_threads = parameters.n_threads_batch = 2
for name, value in spec.get("context", {}).items():
    setattr(parameters, name, value)
if spec.get("measure"):
    parameters.cb_eval = ctypes.cast(lib.llama_cache_center_stats_eval, type(parameters.cb_eval))
    parameters.cb_eval_user_data = ctypes.cast(ctypes.pointer(counting), ctypes.c_void_p)
context = api.llama_init_from_model(model, parameters)
assert context, "no context"
if spec.get("center") and lib.llama_set_cache_center(context, spec["center"].encode()):
    sys.exit(3)
lib.llama_set_cache_exact.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32]
assert lib.llama_set_cache_exact(context, spec.get("recent", 0), 0) == 0, "exact rows were refused"


def decode(tokens, start):
    """All sequences get different tokens at the same positions; the logits of every token."""
    batch = api.llama_batch_init(len(tokens) * sequences, 0, 1)
    batch.n_tokens = len(tokens) * sequences
    for s in range(sequences):
        for i, token in enumerate(tokens):
            j = s * len(tokens) + i
            batch.token[j], batch.pos[j], batch.n_seq_id[j], batch.seq_id[j][0], batch.logits[j] = (
                (token + s) % n_vocab,
                start + i,
                1,
                s,
                1,
            )
    assert api.llama_decode(context, batch) == 0, "decoding failed"
    rows = [
        np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,)).copy() for i in range(batch.n_tokens)
    ]
    api.llama_batch_free(batch)
    return np.stack(rows)


n = spec.get("tokens", 96)
tokens = [int(t) for t in rng.integers(0, min(n_vocab, 200), n + 8)]
if spec.get("measure"):
    counting.value = lib.llama_cache_center_stats_init(context)
    if not counting.value:
        sys.exit(4)
    decode(tokens, 0)
    assert lib.llama_cache_center_stats_add(counting, context, 0) == n + 8
    assert lib.llama_cache_center_stats_save(counting, context, 512, spec["measure"].encode()) == 0
    sys.exit(0)
step = spec.get("split", n)
first = np.concatenate([decode(tokens[i : min(n, i + step)], i) for i in range(0, n, step)])
memory = api.llama_get_memory(context)
start = n


def state():
    data = np.zeros(api.llama_state_seq_get_size(context, 0), np.uint8)
    assert api.llama_state_seq_get_data(context, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), len(data), 0)
    return data


before = state() if spec.get("wander") else None
for _ in range(spec.get("wander", 0)):
    for by, end in ((2, n + 2), (-2, n)):
        api.llama_memory_seq_add(memory, 0, end - 2 - by, -1, by)
        decode(tokens[:1], end)  # moves the keys
        api.llama_memory_seq_rm(memory, 0, end, -1)
if spec.get("wander"):
    np.save(sys.argv[2], np.flatnonzero(state() != before))
    sys.exit(0)
if spec.get("shift"):
    assert api.llama_memory_can_shift(memory), "this model cannot shift"
    for s in range(sequences):
        api.llama_memory_seq_rm(memory, s, 4, 4 + spec["shift"])
        api.llama_memory_seq_add(memory, s, 4 + spec["shift"], -1, -spec["shift"])
    start -= spec["shift"]
np.save(sys.argv[2], np.concatenate([first, decode(tokens[n:], start)]))
