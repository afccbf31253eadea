# SPDX-License-Identifier: MIT
"""The cache types of a model: those that the user names, or those of the plan."""

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


def opened(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The model with its header read, once for all who ask for it; the path itself where that fails: choose() says why, or llama.cpp."""
    try:
        return open_gguf(model)
    except (TBQError, OSError):
        return model


def choose(model: str | os.PathLike[str], kv: str, **shape: Any) -> tuple[str, str, Plan | None]:
    """Types of keys and values for a model, and the plan with their sizes (None where there can be none).

    kv: "auto", a type, or "K/V"; for a model without a cache it is f16, llama.cpp's default, whatever was asked for.
    shape: context, parallel, unified, ubatch, swa_full, center, options of tbq.plan.
    Raises TBQError for a model that is no file, a pair that llama.cpp refuses, and an "auto" that cannot be planned.
    """
    if not isinstance(model, (str, os.PathLike)) or not isinstance(kv, str):
        raise TBQError(f"model {model!r} and kv {kv!r} must be the path of a GGUF file, and auto, a cache type or K/V")
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
        except (
            TBQError
        ):  # it is not the types; llama.cpp may know more models than the plan does, or say better what is wrong
            return k, v, None
        raise
    if not planned.cached:
        return *planned.recommended, planned
    if why := planned.refused.get(f"{k}/{v}"):
        raise TBQError(f"cache {k}/{v} is refused: {why}")
    return k, v, planned


def context_of_a_sequence(
    model: str | os.PathLike[str], planned: Plan | None, shape: Mapping[str, Any], per_slot: int | None
) -> int:
    """Tokens: the positions that keys can have; n_ctx_slot() of server-context.cpp."""
    trained = planned.context_train if planned else 0
    if not planned:
        with contextlib.suppress(TBQError):  # llama-server will say what is wrong with the file
            trained = read_model(model, shape["options"]).context
    context = shape.get("context") or (planned.context if planned else trained) or 8192
    each = int(context) // (1 if shape.get("unified", True) else shape.get("parallel", 1))
    return min(filter(None, (max(1, each), trained, per_slot)))
