# SPDX-License-Identifier: MIT
"""What llama.cpp's options change of what a model's file says: entries of its metadata, RoPE, and with it the context.

As the pinned revision does it: llama_model_base::load_hparams(), llama_context() and llama_init_from_model().
"""

import contextlib
import csv
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from tbq.programs.options import ROPE, select, values

_MAX_CONTEXT = 2**31 - 1

#: Of --override-kv.
_KINDS: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": {"true": True, "false": False}.__getitem__,
}

#: Contexts of up to so many tokens share one center, so that a saved slot fits them all; then those of up to 4 times as many, and so on.
_RANGE, _STEP = 8192, 4


def measured_over(context: int, reach: int) -> int:
    """Tokens of context that the center of a cache is measured over: the longest that shares it (docs/center.md).

    context: of a sequence.  reach: of RoPE, 0 if unknown.
    """
    longest = _RANGE
    while longest < context:
        longest *= _STEP
    return min(longest, reach or longest)


@dataclass(frozen=True)
class Settings:
    """A model's metadata and RoPE under options."""

    fields: Mapping[str, Any]  #: the metadata, with what --override-kv replaces
    trained: int  #: tokens that llama-server gives a sequence at most: what the model was trained for, or YaRN extends it to; 0 if unknown
    reach: int  #: tokens that RoPE is set up for, linear scaling counted too; what has no such limit (llama-cpp-python) can use them
    flash_attention: bool  #: False after -fa off


def under(fields: Mapping[str, Any], options: Sequence[str] = ()) -> Settings:
    """A model's Settings.  fields: the metadata of its file.  options: llama.cpp's; those that do not matter here are passed over."""
    found = {option.names[0]: words[1] if len(words) > 1 else "" for option, words in select(options, ROPE)}
    changes = dict(_overrides(fields, values(options, "--override-kv")))
    arch = changes.get("general.architecture", fields.get("general.architecture"))
    if base := _float(found.get("--rope-freq-base")):
        changes[f"{arch}.rope.freq_base"] = base
    fields = (
        ChainMap(changes, cast(dict[str, Any], fields)) if changes else fields
    )  # a file's are decoded when asked for
    with np.errstate(all="ignore"):
        trained, reach = _contexts(fields, arch, found, options)
    flash = values(options, "-fa")[-1:]
    return Settings(fields, trained, reach, flash not in (["off"], ["disabled"], ["false"], ["0"]))


def _overrides(fields: Mapping[str, Any], values: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Entries of --override-kv's KEY=TYPE:VALUE,...; like llama.cpp, without those whose type is not the entry's own."""
    for item in next(csv.reader([",".join(values)]), []):
        key, _, typed = item.partition("=")
        kind, _, text = typed.partition(":")
        value: Any = None
        with contextlib.suppress(ValueError, KeyError):  # llama.cpp will say what is wrong
            value = _KINDS[kind](text)
        if value is not None and type(fields.get(key, value)) is type(value):
            yield key, value


def _float(text: str | None) -> float:
    """0, which is none to llama.cpp, for what is no number."""
    with contextlib.suppress(ValueError, TypeError):
        value = float(text or 0)
        return value if np.isfinite(value) and value > 0 else 0.0
    return 0.0


def _contexts(
    fields: Mapping[str, Any], arch: Any, found: Mapping[str, str], options: Sequence[str]
) -> tuple[int, int]:
    """Settings.trained and .reach, in float32 as llama.cpp computes them."""

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
    for option, words in select(options, ROPE):
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
