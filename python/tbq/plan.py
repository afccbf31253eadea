# SPDX-License-Identifier: MIT
"""What a KV cache will take, before a model is loaded: `tbq plan MODEL.gguf` and tbq.plan()."""
import argparse
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace as changed
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tbq._key_biases import LARGE_BIAS
from tbq._pictures import picture_format, replace
from tbq._layers import GLOBAL, NONE, WINDOW, Layer, Shape, read_shape
from tbq._settings import measured_over, under
from tbq._types import BLOCK, block, types
from tbq.errors import TBQError, printable

if TYPE_CHECKING:
    from tbq.gguf_files import Tensor

#: What the table shows unless told otherwise.
PAIRS = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("f16", "tbq4_0"), ("q8_0", "tbq4_0"), ("tbq4_0", "tbq4_0"),
         ("tbq4_0", "tbq3_0"), ("tbq3_0", "tbq3_0"), ("tbq3_0", "tbq2_0"), ("tbq2_0", "tbq2_0"))

#: Architectures with biases on the keys whose rotary pairs are half a head apart (LLAMA_ROPE_TYPE_NEOX).
HALF_APART = ("qwen", "qwen2", "qwen2moe", "phi2", "stablelm", "starcoder2", "gptneox", "codeshell", "dream")

#: An f16 cache smaller than this part of the weights that a token reads is left alone: a smaller one would hardly be felt.
SMALL_CACHE = 1 / 16

#: Cache types beside ours: kv_cache_types in common/arg.cpp.
_OTHER_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

#: llama.cpp pads a context to this many cells.
_CELLS = 256
_MAX_CONTEXT = 2**31 - _CELLS


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
    center: bool  #: the recommended types need centred keys: `tbq serve` and tbq.llama have them, llama-server with --cache-center
    warnings: tuple[str, ...]
    exact: bool  #: False if a warning says that llama.cpp may allocate something else

    @property
    def cached(self) -> bool:
        """Whether the model keeps keys and values: an embedding model (bert) and a recurrent one (mamba) have no cache."""
        return any(layer.kind != NONE for layer in self.layers)

    def bytes_at(self, k: str, v: str, context: int) -> int:
        """Bytes of keys and values of a pair of types, whether llama.cpp takes it or not, at a context of so many tokens."""
        return _Cache(self.layers, self.window, self.parallel, self.unified, self.ubatch, self.swa_full).total(k, v, context)

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
    return block(name)


def _row(name: str, values: int) -> int:
    block, size = _block(name)
    return values // block * size


def _padded(cells: int) -> int:
    return -(-cells // _CELLS) * _CELLS


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
        each = _padded(_padded(context) // self.streams)
        seen = self.window * (self.parallel if self.unified else 1) + self.ubatch
        windowed = each if self.swa_full else _padded(min(each, seen))
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
        step = _CELLS * self.streams
        low, high = 0, _MAX_CONTEXT // step
        if self.total(k, v, high * step) <= budget:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(k, v, middle * step) <= budget else (low, middle)
        return low * step


def _without_flash(shape: Shape) -> str:
    if shape.architecture == "grok":
        return "llama.cpp has none for architecture 'grok'"
    return "-fa off switches it off"


def _refusal(shape: Shape, k: str, v: str) -> str | None:
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


# -- what quantized keys do not bear -------------------------------------------------------------


def key_biases(tensors: Mapping[str, "Tensor"], layers: Sequence[Layer], left: "_Left | None" = None) -> dict[int, float]:
    """How large the biases of the keys are, by layer, read from the tensors; with left, what centring leaves of them.

    A key is W x + b, with x the normalized input: root mean square 1, then times the norm's weights g.  The figure is
    |b| / sqrt(sum of (W g)^2), the largest of the layer's KV heads; of W, about 8 rows of each head are read.
    docs/plan.md has what it does to the quality.  Layers without a bias are left out; NaN where the type of W cannot be
    decoded or its shape is not understood.
    """
    found = {}
    for layer in layers:
        if layer.kind == NONE or layer.key_size == 0:
            continue
        name, rows = f"blk.{layer.index}.attn_k", layer.kv_heads * layer.key_size
        fused = f"{name}.bias" not in tensors
        if fused:
            name = f"blk.{layer.index}.attn_qkv"
        bias, weight = tensors.get(f"{name}.bias"), tensors.get(f"{name}.weight")
        if bias is None or weight is None:
            continue
        first = weight.shape[0] - rows - layer.kv_heads * layer.value_size if fused else 0  # queries, keys, values
        understood = len(weight.shape) == 2 and bias.shape == weight.shape[:1] and 0 <= first <= weight.shape[0] - rows
        norm = tensors.get(f"blk.{layer.index}.attn_norm.weight")
        found[layer.index] = _bias_of_heads(bias, weight, norm, first, layer, left) if understood else math.nan
    return found


#: Of the squares of biases, (heads, head size), what remains after centring.
_Left = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def _left_by_centring(fields: Mapping[str, Any], architecture: str, context: int) -> _Left:
    """A constant of a rotary pair turns with the position, by angles of theta: its mean over n positions is shorter by the
    factor |sin(n theta / 2) / (n sin(theta / 2))|, and the mean is what centring takes away.  Without scaling of RoPE, which
    slows the channels, so that more is taken.  Pairs are neighbours or half a head apart, which a file does not say: of an
    architecture that is not in HALF_APART the worse.
    """
    def number(key: str, default: float) -> float:
        value = fields.get(f"{architecture}.rope.{key}", default)
        return float(value) if isinstance(value, (int, float)) and value > 0 else default

    base = number("freq_base", 10000.0)

    def left(squares: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        size = squares.shape[1]
        turning = min(size, int(number("dimension_count", size))) // 2 * 2
        half = base ** (-2.0 * np.arange(turning // 2) / max(1, turning)) / 2
        lost = 1 - np.square(np.sin(context * half) / (context * np.sin(half)))
        layouts = (np.tile(lost, 2),) if architecture in HALF_APART else (np.tile(lost, 2), np.repeat(lost, 2))
        of_channel = [np.concatenate([pairs, np.zeros(size - turning)]) for pairs in layouts]
        found: npt.NDArray[np.float32] = max((squares * factor for factor in of_channel), key=lambda x: float(x.sum())).astype(np.float32)
        return found

    return left


def _bias_of_heads(bias: "Tensor", weight: "Tensor", norm: "Tensor | None", first: int, layer: Layer, left: "_Left | None") -> float:
    size, heads = layer.key_size, layer.kv_heads
    step = max(n for n in range(1, max(1, size // 8) + 1) if size % n == 0)  # so that each head has as many rows
    b, w, gain = _rows(bias), _rows(weight, first, first + heads * size, step), None if norm is None else _rows(norm)
    if b is None or w is None or (gain is not None and gain.shape[-1] != w.shape[-1]):
        return math.nan
    of_keys = b.reshape(-1)[first:first + heads * size]
    energy = step * np.square(w if gain is None else w * gain).reshape(heads, -1).sum(1)
    squares = np.square(of_keys).reshape(heads, size)
    ratio = np.sqrt((left(squares) if left else squares).sum(1) / np.maximum(energy, 1e-30))
    return float(np.nan_to_num(ratio.max(), nan=math.nan, posinf=1e30))


def _rows(tensor: "Tensor", start: int = 0, stop: int | None = None, step: int = 1) -> npt.NDArray[np.float32] | None:
    """Rows of a tensor of one or two axes as float32, the others not read; None for a type that gguf cannot decode."""
    import gguf

    if tensor.n_bytes == 0:  # nothing can be mapped
        return np.zeros(tensor.shape, np.float32)
    mapped = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.n_bytes,))
    rows = np.ascontiguousarray(mapped.reshape(math.prod(tensor.shape[:-1]), -1)[start:stop:step])
    decode: Callable[..., npt.NDArray[np.float32]] = gguf.dequantize
    try:
        return decode(rows, tensor.type).reshape(-1, tensor.shape[-1]).astype(np.float32)
    except (NotImplementedError, KeyError):
        return None


# -- the recommendation --------------------------------------------------------------------------


def _ladder(shape: Shape, sinks: bool, biased: bool) -> list[tuple[str, str]]:
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

    ladder = [(usable(k, shape.key_sizes), usable(v, shape.value_sizes) if shape.flash_attention else "f16") for k, v in wished]
    if shape.mla:
        ladder = [(k, k) for k, _ in ladder]
    return [pair for pair in dict.fromkeys(ladder) if _refusal(shape, *pair) is None] or [("f16", "f16")]


_WORTH = {
    ("tbq4_0", "tbq4_0"): "keys and values of 4 bits are close to f16 at a little over a quarter of its memory",
    ("tbq4_0", "tbq3_0"): "keys keep 4 bits, values have 3: values bear it better than keys",
    ("tbq3_0", "tbq3_0"): "3 bits show in the quality, but nothing larger fits",
    ("tbq3_0", "tbq2_0"): "nothing larger fits; expect a clear loss",
}


def _because(pair: tuple[str, str], shape: Shape, sinks: bool, biased: bool) -> str:
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


def _weights_read(tensors: Mapping[str, "Tensor"], fields: Mapping[str, Any], architecture: str) -> int:
    """Bytes of weights that a token reads, about: of the experts those that are used; not an embedding that is no output."""
    experts, used = fields.get(f"{architecture}.expert_count", 0), fields.get(f"{architecture}.expert_used_count", 0)
    used = max(used) if isinstance(used, list) and used else used
    share = used / experts if isinstance(used, int) and isinstance(experts, int) and 0 < used <= experts else 1.0
    read = [t for t in tensors.values() if t.name != "token_embd.weight" or "output.weight" not in tensors]
    return int(sum(t.n_bytes * (share if "_exps" in t.name else 1) for t in read))


def plan(model: str | os.PathLike[str], *, context: int | None = None, memory: int | str | None = None,
         cache_only: bool = False, pairs: Sequence[tuple[str, str]] | None = None, parallel: int = 4, unified: bool = True,
         ubatch: int = 512, swa_full: bool = False, center: bool = True, options: Sequence[str] = ()) -> Plan:
    """What the caches of a model take, and which types to use.

    model: a GGUF file, any one of a split; its weights are not loaded.
    context: tokens of all sequences together, llama-server's -c.  Without it, the most that the model was trained for
    and that fits in the memory with the recommended types.
    memory: bytes, or a text such as "8G", for weights, cache and recurrent state; with cache_only, not for weights.
    llama.cpp's compute buffers come on top.
    pairs: (K, V) names of types to show; PAIRS if None.
    parallel: sequences (-np); llama-server makes 4, with one cache for all (unified), unless told otherwise.
    ubatch: tokens of a physical batch (-ub, -b if that is less).  swa_full: whole contexts for sliding windows too (--swa-full).
    center: whether keys can be centred where that is needed (docs/center.md); without, large biases ask for larger keys.
    options: llama.cpp's that change what the file says: --override-kv, -fa off, those of RoPE and YaRN; others are passed over.
    Flash attention is assumed to be on, as it is by default.
    Raises TBQError for a file that is damaged or whose architecture has an unknown cache, and for arguments out of range;
    OSError for what cannot be opened.
    """
    from tbq.gguf_files import open_gguf

    if not isinstance(model, (str, os.PathLike)):
        raise TBQError(f"model is {model!r}; it must be the path of a GGUF file")
    for name, value in (("context", context), ("parallel", parallel), ("ubatch", ubatch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_CONTEXT):
            raise TBQError(f"{name} is {value!r}; it must be an integer from 1 to {_MAX_CONTEXT}")
    if parallel > 256:
        raise TBQError(f"parallel is {parallel}; llama.cpp takes at most 256 sequences")
    shown = list(PAIRS if pairs is None else pairs)
    for pair in shown:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TBQError(f"pair {pair!r} must be two names of types, (\"tbq4_0\", \"tbq3_0\") for example")
    budget = parse_size(memory) if memory is not None else None
    opened = open_gguf(model)
    settings = under(opened.metadata, options)
    fields, tensors = settings.fields, {tensor.name: tensor for tensor in opened.tensors}
    try:
        shape = read_shape(fields)
    except TBQError as error:
        raise TBQError(f"model {str(model)!r}: {error}") from None
    shape = changed(shape, context_train=settings.trained, flash_attention=shape.flash_attention and settings.flash_attention)
    of_a_sequence = max(1, (context or shape.context_train) // (1 if unified else parallel))
    with np.errstate(all="ignore"):  # damaged weights may be infinite
        biases = key_biases(tensors, shape.layers)
        centered = key_biases(tensors, shape.layers, _left_by_centring(fields, shape.architecture, measured_over(of_a_sequence, settings.reach)))
    cache = _Cache(shape.layers, shape.window, parallel, unified, ubatch, swa_full)
    weights = sum(tensor.n_bytes for tensor in opened.tensors)
    state = sum(layer.state_bytes for layer in shape.layers) * parallel
    left = None if budget is None else budget - state - (0 if cache_only else weights)
    sinks = any(name.endswith("attn_sinks.weight") for name in tensors)
    large = {i: ratio for i, ratio in biases.items() if ratio >= LARGE_BIAS}
    biased = any((centered if center else biases)[i] >= LARGE_BIAS for i in large)
    read = _weights_read(tensors, fields, shape.architecture)
    chosen, context, reason = _choose(cache, _ladder(shape, sinks, biased), context or 0, shape.context_train, left, read)
    needed = bool(large) and not biased and not sinks and chosen[0] not in ("f32", "f16", "bf16", "q8_0")
    fits = None if left is None else cache.total(*chosen, context) <= left
    reason = reason or _because(chosen, shape, sinks, biased)
    if not shape.cached:
        reason = f"a model of architecture {shape.architecture!r} keeps no keys and values, so there are no types to choose"
    elif left is not None and not fits:
        reason = f"nothing fits {context} tokens in the memory; this comes nearest, with {cache.longest(*chosen, left)}"
    refused = {f"{k}/{v}": why for k, v in shown if (why := _refusal(shape, k, v))}
    usable = [pair for pair in dict.fromkeys([*shown, chosen]) if "/".join(pair) not in refused]
    return Plan(
        model=str(model), name=printable(fields.get("general.name")), architecture=shape.architecture, context=context,
        context_train=shape.context_train, parallel=parallel, unified=unified, ubatch=ubatch, swa_full=swa_full, memory=budget,
        cache_only=cache_only, weights_bytes=weights, state_bytes=state, layers=shape.layers, window=shape.window,
        pairs=tuple(_figures(cache, k, v, context, left) for k, v in usable), refused=refused, recommended=chosen, reason=reason,
        fits=fits, sinks=sinks, large_key_biases=large, center=needed, warnings=tuple(_warnings(shape, context, sinks, biases, large, needed)),
        exact=not shape.doubts)


def _figures(cache: _Cache, k: str, v: str, context: int, left: int | None) -> Pair:
    found = cache.sizes(k, v, context)
    keys, values = sum(sizes[0] for sizes in found.values()), sum(sizes[1] for sizes in found.values())
    longest = None if left is None else cache.longest(k, v, left)
    return Pair(k, v, keys, values, found, longest, None if left is None else keys + values <= left)


def _choose(cache: _Cache, ladder: Sequence[tuple[str, str]], context: int, context_train: int, left: int | None,
            weights: int) -> tuple[tuple[str, str], int, str]:
    """The recommended pair, the context it is for, and the reason if it is not that of the pair."""
    wanted, plain = context or max(1, context_train), ("f16", "f16")
    size = cache.total(*plain, wanted)
    if size == 0:
        return plain, wanted, "no layer has keys and values"
    if size <= weights * SMALL_CACHE and (left is None or size <= left):
        return plain, wanted, (f"at {wanted} tokens an f16 cache is small beside the weights that each token reads; "
                               "a smaller one would gain little")
    fitting = [pair for pair in ladder if left is None or cache.total(*pair, wanted) <= left]
    if fitting and (context or fitting[0] in ladder[:2]):
        return fitting[0], wanted, ""
    if context:
        return ladder[-1], wanted, ""
    # nobody asked for the whole context, so it gives way before the quality does
    return ladder[0], cache.longest(*ladder[0], left or 0) or wanted, ""


def _warnings(shape: Shape, context: int, sinks: bool, biases: Mapping[int, float],
              large: Mapping[int, float], center: bool) -> Iterator[str]:
    yield from (f"uncertain: {doubt}" for doubt in shape.doubts)
    if sinks:
        yield "attention sinks: any quantized K loses much, even q8_0; keep --cache-type-k f16"
    if large:
        worst = max(large, key=lambda i: large[i])
        what = f"large key biases in {len(large)} of {len(biases)} layers (layer {worst}: {large[worst]:.0f} times the rest of the key): "
        yield what + ("centre the keys (tbq serve does; llama-server: tbq calibrate and --cache-center), or keep --cache-type-k q8_0" if center
                      else "keys of 4 bits and fewer lose much; keep --cache-type-k q8_0")
    if any(math.isnan(r) for r in biases.values()):
        yield ("whether the key biases are large is unknown, because their tensors cannot be read here; "
               "compare with q8_0 keys before using fewer bits")
    for side, sizes in (("key", shape.key_sizes), ("value", shape.value_sizes)):
        odd = sorted({size for size in sizes if size % BLOCK})
        if odd:
            yield f"{side} head size {odd[0]}: {BLOCK} does not divide it, so llama.cpp refuses tbq types there"
    if context > shape.context_train > 0:
        yield f"a context of {context} tokens is longer than the {shape.context_train} that the model was trained for"


# -- the command line ----------------------------------------------------------------------------


def parse_size(size: int | str) -> int:
    """Bytes of "8G", "512M", "6.5GiB" (powers of 1024), "24GB" (of 1000) or a number of bytes; TBQError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    else:
        pattern = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT])(iB|B)?|B)?\s*"
        match = re.fullmatch(pattern, size, re.IGNORECASE) if isinstance(size, str) else None
        if match is None:
            raise TBQError(f"size {size!r} is not understood; write 8G, 512M, 6.5GiB, 24GB or a number of bytes")
        number, prefix, suffix = match.groups()
        base = 1000 if (suffix or "").lower() == "b" else 1024
        try:
            found = int(float(number) * base ** (" KMGT".index(prefix.upper()) if prefix else 0))
        except OverflowError:
            raise TBQError(f"size {size!r} is larger than any memory") from None
    if not 0 < found < 2**63:
        raise TBQError(f"size {size!r} must be more than 0 bytes and less than 2^63")
    return found


def amount(size: float) -> str:
    """A size for people: "47.8 MiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}" if size < 100 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError


def _layer_lines(plan: Plan) -> Iterator[str]:
    groups: dict[tuple[Any, ...], int] = {}
    for layer in plan.layers:
        key = (layer.kind, layer.kv_heads, layer.key_size, layer.value_size, layer.indexer_key_size, layer.state_bytes)
        groups[key] = groups.get(key, 0) + 1
    for (kind, heads, key_size, value_size, indexer, state), count in groups.items():
        text = f"{count:4} x {kind}"
        if kind == WINDOW:
            text += f" of {plan.window} tokens"
        if kind != NONE:
            text += f": {_count(heads, 'KV head')}, keys of {key_size}, "
            text += f"values of {value_size}" if value_size else "values among the keys"
        if indexer:
            text += f", an indexer key of {indexer}"
        if state:
            text += f"{',' if kind != NONE else ':'} recurrent state of {amount(state)} a sequence"
        yield text


def report(plan: Plan) -> str:
    """The plan as the text that `tbq plan` prints."""
    lines = [f"{_title(plan)}: {plan.architecture}, {_count(len(plan.layers), 'layer')}, trained for {plan.context_train} "
             f"tokens, weights {amount(plan.weights_bytes)}", *_layer_lines(plan), ""]
    memory = ""
    if plan.memory is not None:
        memory = f", memory {amount(plan.memory)} for {'the cache' if plan.cache_only else 'weights and cache'}"
    lines.append(f"context {plan.context}, {_count(plan.parallel, 'sequence')}{memory}" + ("; bytes of keys (K) and values (V):" if plan.cached else ""))
    if plan.state_bytes:
        lines.append(f"recurrent states take {plan.state_bytes:,} bytes" + (" beside any cache" if plan.cached else ""))
    if not plan.cached:
        small = ["warning: the memory is too small for the weights and the state"] if plan.fits is False else []
        return "\n".join([*lines, f"no cache: {plan.reason}", *small, *(f"warning: {text}" for text in plan.warnings)])
    lines += [*_table(plan), ""]
    why: dict[str, list[str]] = {}
    for name, text in plan.refused.items():
        why.setdefault(text, []).append(name)
    lines += [f"refused: {', '.join(names)}: {text}" for text, names in why.items()]
    k, v = plan.recommended
    lines += [f"recommended: -c {plan.context} --cache-type-k {k} --cache-type-v {v}", f"  {plan.reason}"]
    if plan.memory is not None:
        lines.append("  not counted: llama.cpp's compute buffers (docs/plan.md), and whatever else the memory is for")
    lines += [f"warning: {text}" for text in plan.warnings]
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    return plan.name or pathlib.Path(plan.model).name


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _table(plan: Plan) -> Iterator[str]:
    kinds = [kind for kind in (GLOBAL, WINDOW) if any(kind in pair.by_kind for pair in plan.pairs)]
    head = ["", "K / V", *(f"{kind} {side}" for kind in kinds for side in "KV"), "total", "", "of f16"]
    if plan.memory is not None:
        head.append("longest context")
    full = next((pair.bytes for pair in plan.pairs if (pair.k, pair.v) == ("f16", "f16")), 0)
    rows = [head]
    for pair in plan.pairs:
        cells = [f"{n:,}" for kind in kinds for n in pair.by_kind[kind]]
        row = ["*" if (pair.k, pair.v) == plan.recommended else "", f"{pair.k} / {pair.v}", *cells, f"{pair.bytes:,}",
               amount(pair.bytes), f"{100 * pair.bytes / full:.1f} %" if full else ""]
        if plan.memory is not None:
            row.append("none fits" if pair.longest == 0 else "any" if pair.longest is None else str(pair.longest))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()


def as_json(plan: Plan) -> str:
    """The plan as a JSON object; sizes in bytes."""
    data = asdict(plan)
    data["pairs"] = [{**asdict(pair), "bytes": pair.bytes} for pair in plan.pairs]
    return json.dumps(data, indent=2)


def plot(plan: Plan, path: str | pathlib.Path) -> None:
    """Draws memory against context for the plan's pairs; weights and states are in it unless the plan is cache_only.

    path: the picture, .png or what else matplotlib writes.  Raises TBQError for another ending, without matplotlib and if
    it cannot be written.
    """
    target = pathlib.Path(path)
    format = picture_format(target)
    from matplotlib.figure import Figure

    base = 0 if plan.cache_only else plan.weights_bytes + plan.state_bytes
    recommended = plan.pair(*plan.recommended)
    end = max(plan.context, plan.context_train, min(recommended.longest or 0, 4 * plan.context_train), 2 * _CELLS)
    contexts = sorted({_padded(int(x)) for x in np.linspace(_CELLS, end, 65)})
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for pair in sorted(plan.pairs, key=lambda pair: -pair.bytes):
        sizes = [(base + plan.bytes_at(pair.k, pair.v, n)) / 2**30 for n in contexts]
        chosen = pair == recommended
        label = f"{pair.k} / {pair.v}{' (recommended)' if chosen else ''}"
        axes.plot(contexts, sizes, label=label, linewidth=3 if chosen else 1.2)
    if plan.memory is not None:
        axes.axhline(plan.memory / 2**30, color="black", linestyle="--", linewidth=1, label="memory")
    axes.axvline(plan.context_train, color="gray", linestyle=":", linewidth=1, label="trained for")
    axes.set(xlabel="context, tokens", ylabel=f"GiB of {'cache' if plan.cache_only else 'weights and cache'}",
             title=f"{_title(plan)}, {_count(plan.parallel, 'sequence')}", ylim=(0, None), xlim=(0, end))
    axes.legend(title="keys / values", fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=format)
    replace(target, drawn.getvalue())


def define(parser: argparse.ArgumentParser) -> None:
    """what the KV cache of a model will take, and which types to use"""
    parser.epilog = ("examples:\n  tbq plan model.gguf --context 32768\n  tbq plan model.gguf --memory 24G\n"
                     "  tbq plan model.gguf --memory 2GiB --cache-only --types q8_0,tbq4_0/tbq3_0 --json")
    parser.add_argument("model", metavar="MODEL.gguf", help="the model, or a file of a split one; no weights are loaded")
    parser.add_argument("--context", type=int, metavar="N", help="tokens, -c (what the model was trained for, if it fits)")
    parser.add_argument("--memory", metavar="SIZE", help="for weights, cache and recurrent state: 24G, 512M, 6.5GiB, 24GB")
    parser.add_argument("--cache-only", action="store_true", help="--memory is not for the weights")
    parser.add_argument("--types", metavar="K/V,...", help="pairs to show, tbq4_0/tbq3_0 for example; one name is for both")
    parser.add_argument("--parallel", type=int, default=4, metavar="N", help="sequences, -np (4, llama-server's own)")
    parser.add_argument("--no-kv-unified", action="store_true", help="a cache for each sequence, of its part of the context")
    parser.add_argument("--ubatch", type=int, default=512, metavar="N", help="tokens of a physical batch, -ub (512)")
    parser.add_argument("--swa-full", action="store_true", help="sliding windows keep the whole context (--swa-full)")
    parser.add_argument("--no-center", action="store_true", help="recommend for keys that are not centred (docs/center.md)")
    parser.add_argument("--json", action="store_true", help="print a JSON object, sizes in bytes")
    parser.add_argument("--plot", metavar="FILE.png", help="draw memory against context; needs ggml-tbq[plot]")
    parser.add_argument("options", nargs="*", metavar="-- OPTION ...",
                        help="llama.cpp's that change what the file says: -- --rope-scaling yarn --rope-scale 4")

    def run(args: argparse.Namespace) -> int:
        from tbq.caches import split_pair

        pairs = [split_pair(pair) for pair in args.types.split(",") if pair] if args.types is not None else None
        if pairs == []:
            raise TBQError("--types names no pair; tbq4_0/tbq3_0,q8_0 would show two")
        found = plan(args.model, context=args.context, memory=args.memory, cache_only=args.cache_only, pairs=pairs,
                     parallel=args.parallel, unified=not args.no_kv_unified, ubatch=args.ubatch, swa_full=args.swa_full,
                     center=not args.no_center, options=args.options)
        if args.plot is not None:
            plot(found, args.plot)
        print(as_json(found) if args.json else report(found))
        return 0

    parser.set_defaults(run=run)
