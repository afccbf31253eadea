# SPDX-License-Identifier: MIT
"""What a KV cache will take, before a model is loaded: `tbq plan MODEL.gguf` and tbq.plan()."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import numpy as np

from tbq._key_biases import LARGE_BIAS
from tbq._types import BLOCK, block_size, types
from tbq._units import parse_size
from tbq.errors import TBQError, printable
from tbq.gguf_files.reader import Tensor, open_gguf
from tbq.kv_cache.key_biases import key_biases, left_by_centering
from tbq.kv_cache.layers import GLOBAL, NONE, WINDOW, CacheShape, Layer, read_shape
from tbq.kv_cache.settings import measured_over, under

#: What the table shows unless told otherwise.
PAIRS = (
    ("f16", "f16"),
    ("q8_0", "q8_0"),
    ("q4_0", "q4_0"),
    ("f16", "tbq4_0"),
    ("q8_0", "tbq4_0"),
    ("tbq4_0", "tbq4_0"),
    ("tbq4_0", "tbq3_0"),
    ("tbq3_0", "tbq3_0"),
    ("tbq3_0", "tbq2_0"),
    ("tbq2_0", "tbq2_0"),
)

#: An f16 cache smaller than this part of the weights that a token reads is left alone: a smaller one would hardly be felt.
SMALL_CACHE = 1 / 16

#: Cache types beside ours: kv_cache_types in common/arg.cpp.
_OTHER_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

#: llama.cpp pads a context to this many cells.
CELLS = 256
_MAX_CONTEXT = 2**31 - CELLS


@dataclass(frozen=True)
class Pair:
    """One pair of cache types at the context of the plan."""

    k: str
    v: str
    k_bytes: int
    v_bytes: int
    by_kind: Mapping[str, tuple[int, int]]  #: bytes of keys and of values in layers of kind "global" and "window"
    longest: int | None  #: tokens of the longest context in the plan's memory; None without memory or without a limit
    fits: bool | None  #: whether the plan's context fits in its memory; None without memory

    @property
    def bytes(self) -> int:
        return self.k_bytes + self.v_bytes


@dataclass(frozen=True)
class Plan:
    """Bytes of the caches of a model; what plan() returns."""

    model: str
    name: str | None
    architecture: str
    context: int  #: tokens, of all sequences together
    context_train: int  #: tokens that the model was trained for, or that YaRN extends it to: a sequence of llama-server has no more
    parallel: int  #: sequences
    unified: bool  #: one cache for all sequences
    ubatch: int  #: tokens of a physical batch
    swa_full: bool  #: sliding windows keep the whole context
    memory: int | None  #: bytes for the cache, the state and, unless cache_only, the weights
    cache_only: bool
    weights_bytes: int
    state_bytes: int  #: recurrent states of all sequences
    layers: tuple[Layer, ...]
    window: int  #: tokens; 0 without sliding windows
    pairs: tuple[Pair, ...]
    refused: Mapping[str, str]  #: why llama.cpp would not start, by pair ("tbq4_0/tbq4_0")
    recommended: tuple[str, str]  #: types of keys and values
    reason: str
    fits: bool | None  #: whether the recommended pair fits in the memory at this context
    sinks: bool  #: the model has attention sinks
    large_key_biases: Mapping[int, float]  #: by layer: key_biases() of those from LARGE_BIAS on
    center: bool  #: the recommended types need centered keys: `tbq serve` and tbq.llama have them, llama-server with --cache-center
    warnings: tuple[str, ...]
    exact: bool  #: False if a warning says that llama.cpp may allocate something else

    @property
    def cached(self) -> bool:
        """Whether the model keeps keys and values: an embedding model (bert) and a recurrent one (mamba) have no cache."""
        return any(layer.kind != NONE for layer in self.layers)

    def bytes_at(self, k: str, v: str, context: int) -> int:
        """Bytes of keys and values of a pair of types, whether llama.cpp takes it or not, at a context of so many tokens."""
        return _Cache(self.layers, self.window, self.parallel, self.unified, self.ubatch, self.swa_full).total(
            k, v, context
        )

    def pair(self, k: str, v: str) -> Pair:
        """The figures of a pair; TBQError if it is not among `pairs`."""
        for pair in self.pairs:
            if (pair.k, pair.v) == (k, v):
                return pair
        there = ", ".join(f"{pair.k}/{pair.v}" for pair in self.pairs)
        raise TBQError(f"pair {k}/{v} is not in the plan; {self.refused.get(f'{k}/{v}') or f'there is {there}'}")


def _block(name: str) -> tuple[int, int]:
    """Values and bytes of a block of a cache type."""
    if name not in types and name not in _OTHER_TYPES:
        raise TBQError(f"cache type {name!r} is not one of {', '.join((*types, *_OTHER_TYPES))}")
    return block_size(name)


def _row(name: str, values: int) -> int:
    block, size = _block(name)
    return values // block * size


def padded(cells: int) -> int:
    return -(-cells // CELLS) * CELLS


@dataclass(frozen=True)
class _Cache:
    """What is the same for all types and contexts; see Plan."""

    layers: tuple[Layer, ...]
    window: int
    parallel: int
    unified: bool
    ubatch: int
    swa_full: bool

    @property
    def streams(self) -> int:
        return 1 if self.unified else self.parallel

    def cells(self, context: int) -> dict[str, int]:
        """Cells of a layer of each kind, of all streams: llama_context() and llama_kv_cache_iswa()."""
        each = padded(padded(context) // self.streams)
        seen = self.window * (self.parallel if self.unified else 1) + self.ubatch
        windowed = each if self.swa_full else padded(min(each, seen))
        return {GLOBAL: each * self.streams, WINDOW: windowed * self.streams}

    def sizes(self, k: str, v: str, context: int) -> dict[str, tuple[int, int]]:
        """Bytes of keys and of values by kind of layer."""
        found = {}
        for kind, cells in self.cells(context).items():
            layers = [layer for layer in self.layers if layer.kind == kind]
            if layers:
                keys = sum(_row(k, x.kv_heads * x.key_size) + _row(k, x.indexer_key_size) for x in layers)
                values = sum(_row(v, x.kv_heads * x.value_size) + _row(v, x.indexer_value_size) for x in layers)
                found[kind] = (cells * keys, cells * values)
        return found

    def total(self, k: str, v: str, context: int) -> int:
        return sum(map(sum, self.sizes(k, v, context).values()))

    def longest(self, k: str, v: str, budget: int) -> int | None:
        """The longest context whose cache fits in so many bytes; None if it does not grow with the context."""
        step = CELLS * self.streams
        low, high = 0, _MAX_CONTEXT // step
        if self.total(k, v, high * step) <= budget:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(k, v, middle * step) <= budget else (low, middle)
        return low * step


def _without_flash(shape: CacheShape) -> str:
    if shape.architecture == "grok":
        return "llama.cpp has none for architecture 'grok'"
    return "-fa off switches it off"


def _refusal(shape: CacheShape, k: str, v: str) -> str | None:
    """Why llama.cpp would not make this cache: llama_init_from_model()."""
    if shape.mla and k != v:
        return "with latent attention (MLA) the values are part of the keys, so both have one type"
    if not shape.flash_attention and _block(v)[0] > 1:
        return f"values of {v} need flash attention: {_without_flash(shape)}"
    keys = (*shape.key_sizes, *(layer.indexer_key_size for layer in shape.layers))
    values = (*shape.value_sizes, *(layer.indexer_value_size for layer in shape.layers))
    for side, name, sizes in (("key", k, keys), ("value", v, values)):
        unit = _block(name)[0]
        size = next((size for size in sizes if size % unit), 0)
        if size:
            others = "f16 or q8_0" if size % 32 == 0 else "f16"
            return f"{name} has blocks of {unit} values, which do not divide the {side} head size {size}; {others} would work"
    return None


# -- the recommendation --------------------------------------------------------------------------


def _ladder(shape: CacheShape, sinks: bool, biased: bool) -> list[tuple[str, str]]:
    """Pairs from the best to the smallest that is worth its loss, of those that the model can have."""
    values = ["tbq4_0", "tbq3_0", "tbq2_0"]
    if sinks or biased:
        wished = [("f16" if sinks else "q8_0", v) for v in values]
    else:
        wished = [("tbq4_0", "tbq4_0"), ("tbq4_0", "tbq3_0"), ("tbq3_0", "tbq3_0"), ("tbq3_0", "tbq2_0")]
    if shape.mla:
        wished = [(k, k) for k, _ in wished if k != "tbq2_0"]

    def usable(name: str, sizes: Sequence[int]) -> str:
        if all(size % _block(name)[0] == 0 for size in sizes):
            return name
        other = "q8_0" if name == "tbq4_0" else "q4_0"
        return other if all(size % 32 == 0 for size in sizes) else "f16"

    ladder = [
        (usable(k, shape.key_sizes), usable(v, shape.value_sizes) if shape.flash_attention else "f16")
        for k, v in wished
    ]
    if shape.mla:
        ladder = [(k, k) for k, _ in ladder]
    return [pair for pair in dict.fromkeys(ladder) if _refusal(shape, *pair) is None] or [("f16", "f16")]


_WORTH = {
    ("tbq4_0", "tbq4_0"): "keys and values of 4 bits are close to f16 at a little over a quarter of its memory",
    ("tbq4_0", "tbq3_0"): "keys keep 4 bits, values have 3: values bear it better than keys",
    ("tbq3_0", "tbq3_0"): "3 bits show in the quality, but nothing larger fits",
    ("tbq3_0", "tbq2_0"): "nothing larger fits; expect a clear loss",
}


def _because(pair: tuple[str, str], shape: CacheShape, sinks: bool, biased: bool) -> str:
    if sinks:
        return "the model has attention sinks, with which any quantized key loses much, so keys stay f16"
    if biased:
        return f"large biases on the keys would take up the few levels of a small type, so keys are {pair[0]}"
    if pair in _WORTH:
        return _WORTH[pair]
    if not shape.flash_attention:
        return f"quantized values need flash attention ({_without_flash(shape)}), so values stay f16"
    if any(size % BLOCK for size in (*shape.key_sizes, *shape.value_sizes)):
        return f"tbq types need head sizes that {BLOCK} divides"
    return "it is the smallest that llama.cpp takes for this model without a large loss"


def _weights_read(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], architecture: str) -> int:
    """Bytes of weights that a token reads, about: of the experts those that are used; not an embedding that is no output."""
    experts, used = fields.get(f"{architecture}.expert_count", 0), fields.get(f"{architecture}.expert_used_count", 0)
    used = max(used) if isinstance(used, list) and used else used
    share = used / experts if isinstance(used, int) and isinstance(experts, int) and 0 < used <= experts else 1.0
    read = [t for t in tensors.values() if t.name != "token_embd.weight" or "output.weight" not in tensors]
    return int(sum(t.n_bytes * (share if "_exps" in t.name else 1) for t in read))


def plan(
    model: str | os.PathLike[str],
    *,
    context: int | None = None,
    memory: int | str | None = None,
    cache_only: bool = False,
    pairs: Sequence[tuple[str, str]] | None = None,
    parallel: int = 4,
    unified: bool = True,
    ubatch: int = 512,
    swa_full: bool = False,
    center: bool = True,
    options: Sequence[str] = (),
) -> Plan:
    """What the caches of a model take, and which types to use.

    model: a GGUF file, any one of a split; its weights are not loaded.
    context: tokens of all sequences together, llama-server's -c.  Without it, the most that the model was trained for
    and that fits in the memory with the recommended types.
    memory: bytes, or a text such as "8G", for weights, cache and recurrent state; with cache_only, not for weights.
    llama.cpp's compute buffers come on top.
    pairs: (K, V) names of types to show; PAIRS if None.
    parallel: sequences (-np); llama-server makes 4, with one cache for all (unified), unless told otherwise.
    ubatch: tokens of a physical batch (-ub, -b if that is less).  swa_full: whole contexts for sliding windows too (--swa-full).
    center: whether keys can be centered where that is needed (docs/center.md); without, large biases ask for larger keys.
    options: llama.cpp's that change what the file says: --override-kv, -fa off, those of RoPE and YaRN; others are passed over.
    Flash attention is assumed to be on, as it is by default.
    Raises TBQError for a file that is corrupt or whose architecture has an unknown cache, and for arguments out of range;
    OSError for what cannot be opened.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TBQError(f"model is {model!r}; it must be the path of a GGUF file")
    for name, value in (("context", context), ("parallel", parallel), ("ubatch", ubatch)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_CONTEXT
        ):
            raise TBQError(f"{name} is {value!r}; it must be an integer from 1 to {_MAX_CONTEXT}")
    if parallel > 256:
        raise TBQError(f"parallel is {parallel}; llama.cpp takes at most 256 sequences")
    shown = list(PAIRS if pairs is None else pairs)
    for pair in shown:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TBQError(f'pair {pair!r} must be two names of types, ("tbq4_0", "tbq3_0") for example')
    budget = parse_size(memory) if memory is not None else None
    opened = open_gguf(model)
    settings = under(opened.metadata, options)
    fields, tensors = settings.fields, {tensor.name: tensor for tensor in opened.tensors}
    try:
        shape = read_shape(fields)
    except TBQError as error:
        raise TBQError(f"model {str(model)!r}: {error}") from None
    shape = changed(
        shape, context_train=settings.trained, flash_attention=shape.flash_attention and settings.flash_attention
    )
    of_a_sequence = max(1, (context or shape.context_train) // (1 if unified else parallel))
    with np.errstate(all="ignore"):  # corrupt weights may be infinite
        biases = key_biases(tensors, shape.layers)
        centered = key_biases(
            tensors,
            shape.layers,
            left_by_centering(fields, shape.architecture, measured_over(of_a_sequence, settings.reach)),
        )
    cache = _Cache(shape.layers, shape.window, parallel, unified, ubatch, swa_full)
    weights = sum(tensor.n_bytes for tensor in opened.tensors)
    state = sum(layer.state_bytes for layer in shape.layers) * parallel
    left = None if budget is None else budget - state - (0 if cache_only else weights)
    sinks = any(name.endswith("attn_sinks.weight") for name in tensors)
    large = {i: ratio for i, ratio in biases.items() if ratio >= LARGE_BIAS}
    biased = any((centered if center else biases)[i] >= LARGE_BIAS for i in large)
    read = _weights_read(tensors, fields, shape.architecture)
    chosen, context, reason = _choose(
        cache, _ladder(shape, sinks, biased), context or 0, shape.context_train, left, read
    )
    needed = bool(large) and not biased and not sinks and chosen[0] not in ("f32", "f16", "bf16", "q8_0")
    fits = None if left is None else cache.total(*chosen, context) <= left
    reason = reason or _because(chosen, shape, sinks, biased)
    if not shape.cached:
        reason = (
            f"a model of architecture {shape.architecture!r} keeps no keys and values, so there are no types to choose"
        )
    elif left is not None and not fits:
        reason = f"nothing fits {context} tokens in the memory; this comes nearest, with {cache.longest(*chosen, left)}"
    refused = {f"{k}/{v}": why for k, v in shown if (why := _refusal(shape, k, v))}
    usable = [pair for pair in dict.fromkeys([*shown, chosen]) if "/".join(pair) not in refused]
    return Plan(
        model=str(model),
        name=printable(fields.get("general.name")),
        architecture=shape.architecture,
        context=context,
        context_train=shape.context_train,
        parallel=parallel,
        unified=unified,
        ubatch=ubatch,
        swa_full=swa_full,
        memory=budget,
        cache_only=cache_only,
        weights_bytes=weights,
        state_bytes=state,
        layers=shape.layers,
        window=shape.window,
        pairs=tuple(_figures(cache, k, v, context, left) for k, v in usable),
        refused=refused,
        recommended=chosen,
        reason=reason,
        fits=fits,
        sinks=sinks,
        large_key_biases=large,
        center=needed,
        warnings=tuple(_warnings(shape, context, sinks, biases, large, needed)),
        exact=not shape.doubts,
    )


def _figures(cache: _Cache, k: str, v: str, context: int, left: int | None) -> Pair:
    found = cache.sizes(k, v, context)
    keys, values = sum(sizes[0] for sizes in found.values()), sum(sizes[1] for sizes in found.values())
    longest = None if left is None else cache.longest(k, v, left)
    return Pair(k, v, keys, values, found, longest, None if left is None else keys + values <= left)


def _choose(
    cache: _Cache, ladder: Sequence[tuple[str, str]], context: int, context_train: int, left: int | None, weights: int
) -> tuple[tuple[str, str], int, str]:
    """The recommended pair, the context it is for, and the reason if it is not that of the pair."""
    wanted, plain = context or max(1, context_train), ("f16", "f16")
    size = cache.total(*plain, wanted)
    if size == 0:
        return plain, wanted, "no layer has keys and values"
    if size <= weights * SMALL_CACHE and (left is None or size <= left):
        return (
            plain,
            wanted,
            (
                f"at {wanted} tokens an f16 cache is small beside the weights that each token reads; "
                "a smaller one would gain little"
            ),
        )
    fitting = [pair for pair in ladder if left is None or cache.total(*pair, wanted) <= left]
    if fitting and (context or fitting[0] in ladder[:2]):
        return fitting[0], wanted, ""
    if context:
        return ladder[-1], wanted, ""
    # nobody asked for the whole context, so it gives way before the quality does
    return ladder[0], cache.longest(*ladder[0], left or 0) or wanted, ""


def _warnings(
    shape: CacheShape, context: int, sinks: bool, biases: Mapping[int, float], large: Mapping[int, float], center: bool
) -> Iterator[str]:
    yield from (f"uncertain: {doubt}" for doubt in shape.doubts)
    if sinks:
        yield "attention sinks: any quantized K loses much, even q8_0; keep --cache-type-k f16"
    if large:
        worst = max(large, key=lambda i: large[i])
        what = f"large key biases in {len(large)} of {len(biases)} layers (layer {worst}: {large[worst]:.0f} times the rest of the key): "
        yield what + (
            "center the keys (tbq serve does; llama-server: tbq calibrate and --cache-center), or keep --cache-type-k q8_0"
            if center
            else "keys of 4 bits and fewer lose much; keep --cache-type-k q8_0"
        )
    if any(math.isnan(r) for r in biases.values()):
        yield (
            "whether the key biases are large is unknown, because their tensors cannot be read here; "
            "compare with q8_0 keys before using fewer bits"
        )
    for side, sizes in (("key", shape.key_sizes), ("value", shape.value_sizes)):
        odd = sorted({size for size in sizes if size % BLOCK})
        if odd:
            yield f"{side} head size {odd[0]}: {BLOCK} does not divide it, so llama.cpp refuses tbq types there"
    if context > shape.context_train > 0:
        yield f"a context of {context} tokens is longer than the {shape.context_train} that the model was trained for"
