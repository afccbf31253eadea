# SPDX-License-Identifier: MIT
"""Chooses the cache types of a model: those that the user names, or those that the plan recommends."""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tbq.errors import TBQError
from tbq.gguf_files.reader import open_gguf
from tbq.kv_cache.model import read_model
from tbq.kv_cache.plan import Plan, plan
from tbq.kv_cache.type_pairs import split_pair


def open_model(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The model with its header read, so that the header is read once.

    If it cannot be read, the path is returned as it is: choose() or llama.cpp will report why.
    """
    try:
        return open_gguf(model)
    except (TBQError, OSError):
        return model


def choose(model: str | os.PathLike[str], kv: str, **shape: Any) -> tuple[str, str, Plan | None]:
    """The types of keys and values for a model, and the plan with their sizes.

    The plan is None for a model that cannot be planned.  For a model without a cache the types are f16, whatever kv is.
    kv: "auto", a type, or "K/V".
    shape: context, parallel, unified, ubatch, swa_full, center and options of tbq.plan.
    Raises TBQError for a model that is not a file, a pair that llama.cpp refuses, and "auto" for a model that cannot be
    planned.
    """
    if not isinstance(model, (str, os.PathLike)) or not isinstance(kv, str):
        shown = str(model) if isinstance(model, os.PathLike) else model
        raise TBQError(f"model {shown!r} and kv {kv!r} must be the path of a GGUF file, and auto, a cache type or K/V")
    if not pathlib.Path(model).is_file():
        raise TBQError(f"model {str(model)!r} is not a file")
    if kv == "auto":
        planned = plan(model, **shape)
        return *planned.recommended, planned
    k, v = split_pair(kv)
    try:
        planned = plan(model, pairs=[("f16", "f16"), (k, v)], **shape)
    except TBQError:
        try:
            plan(model, **shape)
        except TBQError:  # the model cannot be planned; llama.cpp may still run it, or will report what is wrong
            return k, v, None
        raise  # the types were the reason
    if not planned.cached:
        return *planned.recommended, planned
    if why := planned.refused.get(f"{k}/{v}"):
        raise TBQError(f"cache {k}/{v} is refused: {why}")
    return k, v, planned


def context_of_a_sequence(
    model: str | os.PathLike[str], planned: Plan | None, shape: Mapping[str, Any], per_slot: int | None
) -> int:
    """Tokens of a sequence's context, as n_ctx_slot() of server-context.cpp computes them.

    shape: as for choose().  per_slot: the value of --kv-unified-per-slot, if it has one.
    """
    trained = planned.context_train if planned else 0
    if not planned:
        with contextlib.suppress(TBQError):  # llama-server will report what is wrong with the file
            trained = read_model(model, shape["options"]).context
    context = shape.get("context") or (planned.context if planned else trained) or 8192
    each = int(context) // (1 if shape.get("unified", True) else shape.get("parallel", 1))
    return min(filter(None, (max(1, each), trained, per_slot)))
