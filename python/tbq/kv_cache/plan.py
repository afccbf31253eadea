# SPDX-License-Identifier: MIT
"""Plans a KV cache before a model is loaded: the bytes that it takes, and which types to use.  This is tbq.plan()."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tbq._exact_rows import BLOCK_BYTES, FIRST, RECENT, check_exact_rows, slots
from tbq._key_biases import LARGE_BIAS
from tbq._types import BLOCK, block_size, types
from tbq._units import parse_size
from tbq.errors import TBQError, printable
from tbq.gguf_files.reader import Tensor, open_gguf
from tbq.kv_cache.devices import LAYER, Device, Split, distribute, rpc_devices
from tbq.kv_cache.key_biases import key_biases, model_centering
from tbq.kv_cache.layers import GLOBAL, NONE, WINDOW, CacheShape, Layer, read_shape
from tbq.kv_cache.settings import Settings, apply_options, calibration_context
from tbq.kv_cache.whole_keys import whole_keys_reason
from tbq.programs.options import option_values

#: The pairs in the table of `tbq plan`, unless the user names others.
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

#: An f16 cache that is smaller than this part of the weights that a token reads is recommended as it is.  A smaller
#: cache would make little difference then.
SMALL_CACHE = 1 / 16

#: Cache types of llama.cpp that are not tbq types: kv_cache_types in common/arg.cpp.
_OTHER_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

#: Types of keys that large biases do not degrade much.
_EXACT_KEYS = ("f32", "f16", "bf16", "q8_0")

#: llama.cpp pads a context to a multiple of this many cells.
CELLS = 256
_MAX_CONTEXT = 2**31 - CELLS


@dataclass(frozen=True)
class Pair:
    """The figures of a pair of cache types at the context of the plan."""

    k: str
    v: str
    k_bytes: int
    v_bytes: int
    by_kind: Mapping[str, tuple[int, int]]  #: bytes of keys and of values, for layers of kind "global" and "window"
    longest: int | None  #: tokens of the longest context that fits in the memory; None without memory or limit
    fits: bool | None  #: whether the plan's context fits in its memory; None without memory
    exact_bytes: int = 0  #: bytes of the exact rows, beside those of keys and values
    by_device: tuple[int, ...] = ()  #: bytes of all three on each device of the plan

    @property
    def bytes(self) -> int:
        return self.k_bytes + self.v_bytes + self.exact_bytes


@dataclass(frozen=True)
class Plan:
    """What plan() returns: the bytes of a model's cache, for each pair of types, and a recommendation."""

    model: str
    name: str | None
    architecture: str
    context: int  #: tokens, of all sequences together
    #: tokens that the model was trained for, or that YaRN extends it to; llama-server gives a sequence no more
    context_train: int
    parallel: int  #: sequences
    unified: bool  #: one cache for all sequences
    ubatch: int  #: tokens of a physical batch
    swa_full: bool  #: whether sliding windows keep the whole context
    memory: int | None  #: bytes for the cache, the recurrent states and, unless cache_only, the weights
    cache_only: bool
    weights_bytes: int
    state_bytes: int  #: recurrent states of all sequences
    layers: tuple[Layer, ...]
    window: int  #: tokens of a sliding window; 0 without sliding windows
    pairs: tuple[Pair, ...]
    refused: Mapping[str, str]  #: why llama.cpp would refuse a pair, by pair ("tbq4_0/tbq4_0")
    recommended: tuple[str, str]  #: types of keys and values
    reason: str
    fits: bool | None  #: whether the recommended pair fits in the memory at this context
    sinks: bool  #: whether the model has attention sinks
    large_key_biases: Mapping[int, float]  #: the ratios of key_biases() from LARGE_BIAS on, by layer
    #: whether the recommended types need centered keys; `tbq serve`, tbq.llama and llama.cpp's programs center them
    center: bool
    warnings: tuple[str, ...]
    exact: bool  #: False if a warning says that llama.cpp may allocate a different amount
    recent: int = 0  #: exact rows: the newest ones of a sequence that a tbq cache keeps in 8 bits as well,
    first: int = 0  #: and the first ones
    split_mode: str = ""  #: how the devices share the model: "layer", "tensor", or "" without devices
    devices: tuple[Device, ...] = ()  #: what each of several devices holds; the cache is in Pair.by_device

    def fits_on(self, i: int, pair: Pair | None) -> bool | None:
        """Whether what a device holds fits in its memory, with a pair if there is a cache; None if that is unknown."""
        device = self.devices[i]
        used = device.weights_bytes + device.state_bytes + (pair.by_device[i] if pair else 0)
        return None if device.memory is None else used <= device.memory

    @property
    def cached(self) -> bool:
        """Whether the model keeps keys and values.

        Embedding models (bert) and recurrent ones (mamba) have no cache.
        """
        return any(layer.kind != NONE for layer in self.layers)

    def bytes_at(self, k: str, v: str, context: int) -> int:
        """Bytes of the cache with a pair of types, even one that llama.cpp refuses, at a context in tokens."""
        cache = _Cache(
            self.layers,
            self.window,
            self.parallel,
            self.unified,
            self.ubatch,
            self.swa_full,
            self.recent,
            self.first,
        )
        return cache.total(k, v, context)

    def pair(self, k: str, v: str) -> Pair:
        """The figures of a pair; TBQError if it is not in `pairs`."""
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


def _row_bytes(name: str, values: int) -> int:
    """Bytes of a row of values in a cache type."""
    block, size = _block(name)
    return values // block * size


def pad_cells(cells: int) -> int:
    """The cells that llama.cpp makes for a context of so many."""
    return -(-cells // CELLS) * CELLS


@dataclass(frozen=True)
class _Cache:
    """The part of a plan that is the same for all types and contexts; see Plan."""

    layers: tuple[Layer, ...]
    window: int
    parallel: int
    unified: bool
    ubatch: int
    swa_full: bool
    recent: int
    first: int

    @property
    def streams(self) -> int:
        """The number of separate caches: one for all sequences, or one for each."""
        return 1 if self.unified else self.parallel

    def cells(self, context: int) -> dict[str, int]:
        """Cells that a layer has in all streams, by kind of layer: llama_context() and llama_kv_cache_iswa()."""
        each = pad_cells(pad_cells(context) // self.streams)
        seen = self.window * (self.parallel if self.unified else 1) + self.ubatch
        windowed = each if self.swa_full else pad_cells(min(each, seen))
        return {GLOBAL: each * self.streams, WINDOW: windowed * self.streams}

    def sizes(self, k: str, v: str, context: int) -> dict[str, tuple[int, int]]:
        """Bytes of keys and of values, by kind of layer."""
        found = {}
        for kind, cells in self.cells(context).items():
            layers = [layer for layer in self.layers if layer.kind == kind]
            if layers:
                keys = sum(_row_bytes(k, x.kv_heads * x.key_size) + _row_bytes(k, x.indexer_key_size) for x in layers)
                values = sum(
                    _row_bytes(v, x.kv_heads * x.value_size) + _row_bytes(v, x.indexer_value_size) for x in layers
                )
                found[kind] = (cells * keys, cells * values)
        return found

    def exact_bytes(self, k: str, v: str, context: int) -> int:
        """Bytes of the exact rows: llama_kv_exact::init()."""
        found = 0
        for kind in self.cells(context):
            rows = self.exact_rows(kind, context)
            for layer in self.layers:
                if layer.kind == kind:
                    sizes = ((k, layer.key_size), (v, layer.value_size))
                    values = sum(layer.kv_heads * size for name, size in sizes if name in types)
                    found += rows * values // BLOCK * BLOCK_BYTES
        return found

    def by_device(self, k: str, v: str, context: int, split: Split | None) -> tuple[int, ...]:
        """Bytes of keys, values and exact rows on each device."""
        found = []
        cells = self.cells(context)
        for keys, values in zip(split.keys, split.values) if split else ():
            size = 0
            for layer, n_keys, n_values in zip(self.layers, keys, values):
                if layer.kind == NONE or not (n_keys or n_values):
                    continue
                rows = cells[layer.kind]
                size += rows * (_row_bytes(k, n_keys) + _row_bytes(k, layer.indexer_key_size))
                size += rows * (_row_bytes(v, n_values) + _row_bytes(v, layer.indexer_value_size))
                exact = sum(n for name, n in ((k, n_keys), (v, n_values)) if name in types)
                size += self.exact_rows(layer.kind, context) * exact // BLOCK * BLOCK_BYTES
            found.append(size)
        return tuple(found)

    def exact_rows(self, kind: str, context: int) -> int:
        """Exact rows of a layer of a kind, in all streams."""
        sequences = self.parallel if self.unified else 1
        rows = slots(self.recent, self.first, sequences, self.cells(context)[kind] // self.streams) * self.streams
        return rows + (rows > 0)  # for rows of a state that no slot wants

    def total(self, k: str, v: str, context: int) -> int:
        """Bytes of keys, values and exact rows together."""
        return sum(map(sum, self.sizes(k, v, context).values())) + self.exact_bytes(k, v, context)

    def longest(self, k: str, v: str, budget: int) -> int | None:
        """The longest context whose cache fits in a number of bytes; None if every context fits."""
        step = CELLS * self.streams
        low, high = 0, _MAX_CONTEXT // step
        if self.total(k, v, high * step) <= budget:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(k, v, middle * step) <= budget else (low, middle)
        return low * step


def _why_no_flash(shape: CacheShape) -> str:
    if shape.architecture == "grok":
        return "llama.cpp has none for architecture 'grok'"
    return "-fa off switches it off"


def _refusal(shape: CacheShape, k: str, v: str) -> str | None:
    """Why llama.cpp would refuse this cache: llama_init_from_model().  None if it would not."""
    if shape.mla and k != v:
        return "with latent attention (MLA) the values are part of the keys, so both must have the same type"
    if not shape.flash_attention and _block(v)[0] > 1:
        return f"values of {v} need flash attention: {_why_no_flash(shape)}"
    keys = (*shape.key_sizes, *(layer.indexer_key_size for layer in shape.layers))
    values = (*shape.value_sizes, *(layer.indexer_value_size for layer in shape.layers))
    for tensor, name, sizes in (("key", k, keys), ("value", v, values)):
        unit = _block(name)[0]
        size = next((size for size in sizes if size % unit), 0)
        if size:
            others = "f16 or q8_0" if size % 32 == 0 else "f16"
            return (
                f"{name} has blocks of {unit} values, which do not divide the {tensor} head size {size}; "
                f"{others} would work"
            )
    return None


# -- the recommendation --------------------------------------------------------------------------


#: The pairs for models of a kind that nobody measured with real weights, from the safest; the last one only where
#: nothing larger fits.
_UNMEASURED = [("tbq4_0", "tbq4_0"), ("tbq4_0", "tbq3_0"), ("tbq3_0", "tbq3_0")]


def _candidates(shape: CacheShape, sinks: bool, biased: bool, unmeasured: bool) -> list[tuple[str, str]]:
    """The pairs to choose from: those that llama.cpp takes for the model, from the best to the smallest.

    sinks: whether keys stay whole beside attention sinks.  biased: whether the stored keys have a large bias.
    unmeasured: whether centered keys are exact, but nobody measured them with weights of this kind.
    """
    values = ["tbq4_0", "tbq3_0", "tbq2_0"]
    if sinks or biased:
        wished = [("f16" if sinks else "q8_0", v) for v in values]
    elif unmeasured:
        wished = _UNMEASURED
    else:
        wished = [("tbq4_0", "tbq4_0"), ("tbq4_0", "tbq3_0"), ("tbq3_0", "tbq3_0"), ("tbq3_0", "tbq2_0")]
    if shape.mla:
        wished = [(k, k) for k, _ in wished if k != "tbq2_0"]

    def usable(name: str, sizes: Sequence[int]) -> str:
        if all(size % _block(name)[0] == 0 for size in sizes):
            return name
        other = "q8_0" if name == "tbq4_0" else "q4_0"
        return other if all(size % 32 == 0 for size in sizes) else "f16"

    candidates = [
        (usable(k, shape.key_sizes), usable(v, shape.value_sizes) if shape.flash_attention else "f16")
        for k, v in wished
    ]
    if shape.mla:
        candidates = [(k, k) for k, _ in candidates]
    return [pair for pair in dict.fromkeys(candidates) if _refusal(shape, *pair) is None] or [("f16", "f16")]


#: Why a pair is recommended, where nothing about the model decides.
_REASONS = {
    ("tbq4_0", "tbq4_0"): "4-bit keys and values are close to f16, in a little over a quarter of its memory",
    ("tbq4_0", "tbq3_0"): "keys have 4 bits and values 3, because values tolerate fewer bits better than keys",
    ("tbq3_0", "tbq3_0"): "3 bits reduce the quality noticeably, but nothing larger fits",
    ("tbq3_0", "tbq2_0"): "nothing larger fits; expect a clear loss",
}


#: The same with exact rows (docs/measurements/exact.md).
_REASONS_EXACT = {
    **_REASONS,
    ("tbq4_0", "tbq3_0"): "keys have 4 bits and values 3, which with exact rows costs little more than 4 and 4",
    ("tbq3_0", "tbq3_0"): "with exact rows, 3 bits are closer to f16 than q4_0 is, and nothing larger fits",
}


def _reason_for(
    pair: tuple[str, str], shape: CacheShape, sinks: bool, biased: bool, whole: str | None, exact: bool
) -> str:
    if sinks:
        return "the model has attention sinks, with which quantized keys that are not centered degrade badly"
    if biased:
        return f"large key biases would use up the few levels of a small type, so keys are {pair[0]}"
    if whole and pair in _UNMEASURED[:-1]:
        return (
            f"centered keys are exact with {whole}, but were not measured on {shape.architecture} weights, "
            "so keys have 4 bits; tbq3_0 would be smaller"
        )
    if pair in _REASONS:
        return (_REASONS_EXACT if exact else _REASONS)[pair]
    if not shape.flash_attention:
        return f"quantized values need flash attention ({_why_no_flash(shape)}), so values stay f16"
    if any(size % BLOCK for size in (*shape.key_sizes, *shape.value_sizes)):
        return f"tbq types need head sizes that {BLOCK} divides"
    return "it is the smallest pair that llama.cpp takes for this model without a large loss"


def _weights_per_token(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], architecture: str) -> int:
    """About how many bytes of weights a token reads.

    Only the experts that a token uses count.  A token embedding that is not the output matrix too does not count.
    """
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
    recent: int = RECENT,
    first: int = FIRST,
    devices: str | Sequence[int | str] | None = None,
    rpc: str | Sequence[str] | None = None,
    split_mode: str = LAYER,
    tensor_split: Sequence[float] | None = None,
    options: Sequence[str] = (),
) -> Plan:
    """What the cache of a model takes, and which types to use.

    model: a GGUF file, any one of a split model.  No weights are loaded.
    context: tokens of all sequences together, llama-server's -c.  If None: what the model was trained for, or less if
    only that fits in the memory with the recommended types.
    memory: bytes, or a text such as "8G", for weights, cache and recurrent states.  llama.cpp needs compute buffers in
    addition.  cache_only: the memory is not for the weights.
    pairs: the pairs of types to show, as (K, V); PAIRS if None.
    parallel: sequences (-np).  unified: one cache for all sequences.  llama-server's defaults are 4 and True.
    ubatch: tokens of a physical batch, the smaller of -ub and -b.
    swa_full: sliding windows keep the whole context (--swa-full).
    center: whether keys can be centered.  Without centering, larger keys are recommended for large biases.
    recent, first: exact rows, --cache-recent and --cache-first: rows of each sequence that a tbq cache keeps in 8 bits
    as well, the newest and the first ones.
    devices: the free memory of each of several devices, "24G,24G" for example; or rpc: RPC servers, "HOST:PORT,...",
    which are asked for theirs.  The plan then has what each device holds.
    split_mode, tensor_split: llama.cpp's -sm, "layer" or "tensor", and -ts, a number for each device.
    options: llama.cpp's options that change what the file says: --override-kv, -fa off, RoPE and YaRN, and -ngl.
    Others are ignored.  Flash attention is assumed to be on, which is the default.
    Raises TBQError if the file is corrupt, if its architecture is unknown, and if an argument is out of range;
    OSError if the file cannot be opened.
    """
    _check_arguments(model, context, parallel, ubatch)
    check_exact_rows(recent, first)
    shown = _check_pairs(PAIRS if pairs is None else pairs)
    memory_bytes = parse_size(memory) if memory is not None else None
    opened = open_gguf(model)
    settings = apply_options(opened.metadata, options)
    fields, tensors = settings.fields, {tensor.name: tensor for tensor in opened.tensors}
    shape = _read_shape(model, settings)
    sequence = max(1, (context or shape.context_train) // (1 if unified else parallel))
    biases = _read_biases(tensors, shape, settings, sequence, center)
    if not shape.exact_rows:
        recent = first = 0
    cache = _Cache(shape.layers, shape.window, parallel, unified, ubatch, swa_full, recent, first)
    split = _read_split(devices, rpc, split_mode, tensor_split, options, shape, tensors, parallel)
    weights = sum(tensor.n_bytes for tensor in opened.tensors)
    state = sum(layer.state_bytes for layer in shape.layers) * parallel
    budget = None if memory_bytes is None else memory_bytes - state - (0 if cache_only else weights)
    sinks = any(name.endswith("attn_sinks.weight") for name in tensors)
    whole = whole_keys_reason(shape.architecture, opened.tensors, shape.mla) if center else None
    keep_keys = sinks and not (center and _takes_tbq_keys(shape))
    read = _weights_per_token(tensors, fields, shape.architecture)
    candidates = _candidates(shape, keep_keys, biases.remain, whole is not None)
    chosen, context, reason = _choose(cache, candidates, context or 0, shape.context_train, budget, read)
    needs_center = (bool(biases.large) and not biases.remain or sinks) and chosen[0] not in _EXACT_KEYS
    fits = None if budget is None else cache.total(*chosen, context) <= budget
    if not shape.cached:
        reason = (
            f"a model of architecture {shape.architecture!r} keeps no keys and values, so there are no types to choose"
        )
    elif budget is not None and not fits:
        longest = cache.longest(*chosen, budget)
        reason = f"no pair fits {context} tokens in the memory; this one comes nearest, with {longest} tokens"
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
        memory=memory_bytes,
        cache_only=cache_only,
        weights_bytes=weights,
        state_bytes=state,
        layers=shape.layers,
        window=shape.window,
        pairs=tuple(
            dataclasses.replace(
                _compute_pair(cache, k, v, context, budget), by_device=cache.by_device(k, v, context, split)
            )
            for k, v in usable
        ),
        refused=refused,
        recommended=chosen,
        reason=reason or _reason_for(chosen, shape, keep_keys, biases.remain, whole, bool(recent or first)),
        fits=fits,
        sinks=sinks,
        large_key_biases=biases.large,
        center=needs_center,
        warnings=(
            *_warnings(shape, context, sinks, whole, biases, needs_center),
            *_exact_warning(cache, chosen, context),
        ),
        exact=not shape.doubts,
        recent=recent,
        first=first,
        split_mode=split.mode if split else "",
        devices=split.devices if split else (),
    )


def _read_split(
    devices: str | Sequence[int | str] | None,
    rpc: str | Sequence[str] | None,
    mode: str,
    shares: Sequence[float] | None,
    options: Sequence[str],
    shape: CacheShape,
    tensors: Mapping[str, Tensor],
    parallel: int,
) -> Split | None:
    """How the devices share the model; None without devices."""
    if devices is None and rpc is None:
        if shares is not None or mode != LAYER:
            raise TBQError("a split mode or a tensor split needs the devices; name them with --devices or --rpc")
        return None
    if devices is not None and rpc is not None:
        raise TBQError("--devices and --rpc both name devices; give one of them")
    found: list[tuple[str, int]]
    if rpc is not None:
        found = rpc_devices(rpc, mode)
    else:
        sizes = devices.split(",") if isinstance(devices, str) else list(devices or ())
        found = [(f"device {i}", parse_size(size)) for i, size in enumerate(sizes)]
    if not found:
        raise TBQError("there is no device; --devices 24G,24G would name two")
    layers = option_values(options, "-ngl")
    gpu_layers = int(layers[-1]) if layers and layers[-1].isdigit() else None
    names, memory = [name for name, _ in found], [size for _, size in found]
    return distribute(names, memory, shape, tensors, parallel, mode, shares, gpu_layers)


def _check_arguments(model: object, context: object, parallel: int, ubatch: object) -> None:
    if not isinstance(model, (str, os.PathLike)):
        raise TBQError(f"model is {model!r}; it must be the path of a GGUF file")
    for name, value in (("context", context), ("parallel", parallel), ("ubatch", ubatch)):
        if value is None and name == "context":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_CONTEXT:
            raise TBQError(f"{name} is {value!r}; it must be an integer from 1 to {_MAX_CONTEXT}")
    if parallel > 256:
        raise TBQError(f"parallel is {parallel}; llama.cpp takes at most 256 sequences")


def _check_pairs(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    found = list(pairs)
    for pair in found:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TBQError(f'pair {pair!r} must be two names of types, ("tbq4_0", "tbq3_0") for example')
    return found


def _read_shape(model: str | os.PathLike[str], settings: Settings) -> CacheShape:
    """The layers of a model with llama.cpp's options applied; TBQError that names the model if they are unknown."""
    try:
        shape = read_shape(settings.fields)
    except TBQError as error:
        raise TBQError(f"model {str(model)!r}: {error}") from None
    flash_attention = shape.flash_attention and settings.flash_attention
    return dataclasses.replace(shape, context_train=settings.context_train, flash_attention=flash_attention)


class _Biases(NamedTuple):
    """The key biases of a model, by layer."""

    ratios: Mapping[int, float]  #: key_biases() without centering
    large: Mapping[int, float]  #: ratios from LARGE_BIAS on
    remain: bool  #: whether one is still large in the keys as they will be stored, centered or not


def _read_biases(
    tensors: Mapping[str, Tensor], shape: CacheShape, settings: Settings, sequence: int, center: bool
) -> _Biases:
    """sequence: tokens of a sequence's context.  center: whether keys can be centered."""
    with np.errstate(all="ignore"):  # corrupt weights may be infinite
        ratios = stored = key_biases(tensors, shape.layers)
        if center:
            context = calibration_context(sequence, settings.rope_context)
            stored = key_biases(tensors, shape.layers, model_centering(settings.fields, shape.architecture, context))
    large = {i: ratio for i, ratio in ratios.items() if ratio >= LARGE_BIAS}
    return _Biases(ratios, large, any(stored[i] >= LARGE_BIAS for i in large))


def _compute_pair(cache: _Cache, k: str, v: str, context: int, budget: int | None) -> Pair:
    """The figures of a pair.  budget: bytes for the cache, None without a limit."""
    found = cache.sizes(k, v, context)
    keys, values = sum(sizes[0] for sizes in found.values()), sum(sizes[1] for sizes in found.values())
    longest, exact = None if budget is None else cache.longest(k, v, budget), cache.exact_bytes(k, v, context)
    fits = None if budget is None else keys + values + exact <= budget
    return Pair(k, v, keys, values, found, longest, fits, exact)


def _choose(
    cache: _Cache,
    candidates: Sequence[tuple[str, str]],
    context: int,
    context_train: int,
    budget: int | None,
    weights: int,
) -> tuple[tuple[str, str], int, str]:
    """The recommended pair, its context, and a reason; the reason is empty if _reason_for() gives it.

    context: the context that the user asked for, or 0.  budget: bytes for the cache, None without a limit.
    weights: bytes of weights that a token reads.
    """
    wanted, plain = context or max(1, context_train), ("f16", "f16")
    size = cache.total(*plain, wanted)
    if size == 0:
        return plain, wanted, "no layer has keys and values"
    if size <= weights * SMALL_CACHE and (budget is None or size <= budget):
        small = f"at {wanted} tokens an f16 cache is small compared with the weights that each token reads"
        return plain, wanted, f"{small}; a smaller cache would gain little"
    fitting = [pair for pair in candidates if budget is None or cache.total(*pair, wanted) <= budget]
    if fitting and (context or fitting[0] in candidates[:2]):
        return fitting[0], wanted, ""
    if context:
        return candidates[-1], wanted, ""
    # the user did not ask for the whole context, so a shorter context is better than fewer bits
    return candidates[0], cache.longest(*candidates[0], budget or 0) or wanted, ""


def _exact_warning(cache: _Cache, pair: tuple[str, str], context: int) -> Iterator[str]:
    """A line if the exact rows of a pair take more than its packed rows."""
    exact = cache.exact_bytes(*pair, context)
    if exact > cache.total(*pair, context) - exact:
        yield (
            "in a context this short, exact rows take more than all packed ones; "
            "--cache-recent 32 keeps most of what they are worth, --cache-recent 0 --cache-first 0 is without"
        )


def _takes_tbq_keys(shape: CacheShape) -> bool:
    return all(size % BLOCK == 0 for size in shape.key_sizes)


def _warnings(
    shape: CacheShape, context: int, sinks: bool, whole: str | None, biases: _Biases, center: bool
) -> Iterator[str]:
    """whole: why keys can be centered in a tbq type only.  center: whether the recommended types need centering."""
    large = biases.large
    yield from (f"uncertain: {doubt}" for doubt in shape.doubts)
    if sinks and center:
        yield (
            "attention sinks: quantized keys that are not centered degrade badly, even q8_0; tbq types are centered "
            "(tbq serve and this llama-server do it)"
        )
    elif sinks:
        yield "attention sinks: quantized keys that are not centered degrade badly, even q8_0; keep --cache-type-k f16"
    if whole and _takes_tbq_keys(shape):
        yield (
            f"not measured on {shape.architecture} weights: keys with {whole} are exact when centered, but the loss of "
            "4 bits and fewer is not known; `tbq bench quality` measures it"
        )
    if large:
        worst = max(large, key=lambda i: large[i])
        remedy = "keys of 4 bits and fewer degrade badly; keep --cache-type-k q8_0"
        if center:
            remedy = "center the keys (tbq serve and this llama-server do), or keep --cache-type-k q8_0"
        yield (
            f"large key biases in {len(large)} of {len(biases.ratios)} layers "
            f"(layer {worst}: {large[worst]:.0f} times the rest of the key): {remedy}"
        )
    if any(math.isnan(ratio) for ratio in biases.ratios.values()):
        yield (
            "whether the key biases are large is unknown, because their tensors cannot be read here; "
            "compare with q8_0 keys before using fewer bits"
        )
    for tensor, sizes in (("key", shape.key_sizes), ("value", shape.value_sizes)):
        odd = sorted({size for size in sizes if size % BLOCK})
        if odd:
            yield f"{tensor} head size {odd[0]}: {BLOCK} does not divide it, so llama.cpp refuses tbq types there"
    if context > shape.context_train > 0:
        yield f"a context of {context} tokens is longer than the {shape.context_train} that the model was trained for"
