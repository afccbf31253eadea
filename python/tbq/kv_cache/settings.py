# SPDX-License-Identifier: MIT
"""Applies llama.cpp's options to the metadata of a model: overridden entries, RoPE, and the context that follows.

This follows the pinned revision: llama_model_base::load_hparams(), llama_context() and llama_init_from_model().
"""

import contextlib
import csv
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from tbq.programs.options import ROPE, option_values, select_options

_MAX_CONTEXT = 2**31 - 1

#: The types of --override-kv.
_KINDS: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": {"true": True, "false": False}.__getitem__,
}

#: Contexts up to 8192 tokens share one center, then contexts up to 4 times as many, and so on.  So a slot that was
#: saved with one context fits a cache with another.
_FIRST_RANGE, _RANGE_FACTOR = 8192, 4


def calibration_context(context: int, rope_context: int) -> int:
    """Tokens of context that a center is measured over: the longest context that shares it (docs/design/centering.md).

    context: tokens of a sequence.  rope_context: tokens that RoPE is set up for, 0 if unknown.
    """
    longest = _FIRST_RANGE
    while longest < context:
        longest *= _RANGE_FACTOR
    return min(longest, rope_context or longest)


@dataclass(frozen=True)
class Settings:
    """A model's metadata and contexts, with llama.cpp's options applied."""

    fields: Mapping[str, Any]  #: the metadata, with the entries that --override-kv replaces
    #: the most tokens that llama-server gives a sequence: what the model was trained for, or what YaRN extends it to;
    #: 0 if unknown
    context_train: int
    #: tokens that RoPE is set up for, which linear scaling extends too; llama-cpp-python can use them all
    rope_context: int
    flash_attention: bool  #: False after -fa off


def apply_options(fields: Mapping[str, Any], options: Sequence[str] = ()) -> Settings:
    """The Settings of a model.

    fields: the metadata of its file.  options: llama.cpp's options; those that change nothing here are ignored.
    """
    found = {option.names[0]: words[1] if len(words) > 1 else "" for option, words in select_options(options, ROPE)}
    changes = dict(_overrides(fields, option_values(options, "--override-kv")))
    arch = changes.get("general.architecture", fields.get("general.architecture"))
    if base := _float(found.get("--rope-freq-base")):
        changes[f"{arch}.rope.freq_base"] = base
    if changes:  # a ChainMap, because entries of a file are decoded only when they are read
        fields = ChainMap(changes, cast(dict[str, Any], fields))
    with np.errstate(all="ignore"):
        context_train, rope_context = _contexts(fields, arch, found, options)
    flash = option_values(options, "-fa")[-1:]
    return Settings(fields, context_train, rope_context, flash not in (["off"], ["disabled"], ["false"], ["0"]))


def _overrides(fields: Mapping[str, Any], values: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The entries that --override-kv replaces, from its KEY=TYPE:VALUE,... texts.

    Like llama.cpp this leaves out values whose type is not that of the entry.
    """
    for item in next(csv.reader([",".join(values)]), []):
        key, _, typed = item.partition("=")
        kind, _, text = typed.partition(":")
        value: Any = None
        with contextlib.suppress(ValueError, KeyError):  # llama.cpp will report what is wrong
            value = _KINDS[kind](text)
        if value is not None and type(fields.get(key, value)) is type(value):
            yield key, value


def _float(text: str | None) -> float:
    """The number that a text holds; 0, which llama.cpp ignores, if it is not a positive number."""
    with contextlib.suppress(ValueError, TypeError):
        value = float(text or 0)
        return value if np.isfinite(value) and value > 0 else 0.0
    return 0.0


def _contexts(
    fields: Mapping[str, Any], arch: Any, found: Mapping[str, str], options: Sequence[str]
) -> tuple[int, int]:
    """Settings.context_train and Settings.rope_context, computed in float32 as llama.cpp computes them."""

    def integer(key: str) -> int:
        value = fields.get(f"{arch}.{key}", 0)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_CONTEXT else 0

    def number(key: str) -> float:
        value = fields.get(f"{arch}.{key}", 0.0)
        return float(value) if isinstance(value, (int, float)) and np.isfinite(value) and value > 0 else 0.0

    one, context = np.float32(1), integer("context_length")
    factor = number("rope.scaling.factor") or number("rope.scale_linear")
    own = one / np.float32(factor) if factor else one
    scale = own
    for option, words in select_options(options, ROPE):
        if option.names[0] in ("--rope-scale", "--rope-freq-scale"):  # the last one counts
            given = np.float32(_float(words[-1]))
            scale = (one / given if option.names[0] == "--rope-scale" else given) if given else own
    kind = found.get("--rope-scaling") or fields.get(f"{arch}.rope.scaling.type", "linear")
    if kind == "none" or scale == own or not context:
        return context, context
    if kind != "yarn":
        return context, max(context, _tokens(np.float32(context) * own / scale))
    original = int(_float(found.get("--yarn-orig-ctx"))) or integer("rope.scaling.original_context_length") or context
    extended = _tokens(np.float32(original) / scale)
    return extended, extended


def _tokens(value: Any) -> int:
    return int(min(float(value), _MAX_CONTEXT))
