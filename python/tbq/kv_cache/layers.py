# SPDX-License-Identifier: MIT
"""What each layer of a model keeps in memory for a token, from the metadata of its GGUF file.

llama.cpp decides part of this in code, by architecture.  The tables here follow the pinned revision:
src/llama-hparams.cpp, load_arch_hparams() of src/models/ARCHITECTURE.cpp, and llama_model::create_memory() of
src/llama-model.cpp.  tests/test_plan.py compares them with what llama.cpp allocates, for every architecture that
llama.cpp's tests can make a model of.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tbq.errors import TBQError

GLOBAL, WINDOW, NONE = "global", "window", "none"


@dataclass(frozen=True)
class Layer:
    """What a layer keeps.  Sizes are numbers of values.  Each row is quantized separately."""

    index: int
    kind: str  #: "global": keys and values of the whole context; "window": of a sliding window; "none": no cache
    kv_heads: int = 0
    key_size: int = 0  #: size of a key head; with latent attention (MLA) of the whole row, values included
    value_size: int = 0  #: size of a value head; 0 if the values are part of the keys
    indexer_key_size: int = 0  #: size of the key that a sparse-attention indexer keeps in addition
    indexer_value_size: int = 0
    state_bytes: int = 0  #: recurrent state (float32) of a sequence of any length


class _Window(NamedTuple):
    """Which layers of an architecture have a sliding window, where the file does not list them."""

    period: int  #: every period-th layer is global; 0 if the file must list them
    dense_first: bool = False  #: the first layer of a period is the global one, not the last
    default: int = 0  #: tokens of a window, if the file does not say
    fixed: int = 0  #: tokens of a window, whatever the file says


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WINDOWS: Mapping[str, _Window] = {
    "afmoe": _Window(4),
    "cohere2": _Window(4),
    "cohere2moe": _Window(4, dense_first=True),
    "dots3note": _Window(0),
    "exaone-moe": _Window(4, default=128),
    "exaone4": _Window(4, default=4096),  # the model of 64 layers only
    "gemma2": _Window(2, default=4096),
    "gemma3": _Window(6),
    "gemma3n": _Window(5),
    "gemma4": _Window(0),
    "gpt-oss": _Window(2),
    "granite_swa": _Window(0),
    "laguna": _Window(4, dense_first=True),
    "lfm2": _Window(0),  # every layer that is not recurrent
    "llama4": _Window(4, default=8192, fixed=8192),  # chunks, which take as much memory as windows
    "maple": _Window(0),
    "mellum": _Window(4),
    "mimo2": _Window(0),
    "muse-glimmer": _Window(4),
    "olmo2": _Window(4),
    "plamo3": _Window(8),
    "smallthinker": _Window(4, dense_first=True, fixed=4096),
    "spark2_5": _Window(0),
    "step35": _Window(0),
}
#: Files of these architectures may name a window, but llama.cpp caches the whole context in every layer.
_WINDOW_IGNORED = _names("llama mistral3 phi3 phimoe qwen2 qwen2moe qwen3 qwen3moe starcoder2")

#: The graphs of these architectures store rows without exact ones.
_NO_EXACT_ROWS = _names("deepseek4 dflash glm5-next qwen4exp")

_RECURRENT = _names("arwkv7 mamba mamba2 rwkv6 rwkv6qwen2 rwkv7")
#: In these architectures a layer without KV heads is recurrent.
_RECURRENT_WITHOUT_HEADS = _names(
    "bailingmoe3 glm5-next granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe nemotron_h nemotron_h_moe plamo2"
)
#: In these architectures every n-th layer has attention, unless the file lists the layers.
_ATTENTION_INTERVAL: Mapping[str, int] = {"minimax-01": 8, "qwen35": 4, "qwen35moe": 4, "qwen3next": 4, "qwen4exp": 4}
#: In these architectures layers that predict further tokens have a cache too, although nothing reads it.
_CACHE_OF_PREDICTORS = _RECURRENT_WITHOUT_HEADS - {"glm5-next"} | {"falcon-h1", "hy_v4", "minimax-m3"}

_MLA = _names("bailingmoe3 deepseek2 deepseek32 dots3note glm-dsa glm5-next hy_v4 kimi-k3 kimi-linear mistral4")
_INDEXED = _names("deepseek32 dots3note glm-dsa glm5-next hy_v4 minimax-m3 qwen4exp")

_NO_CACHE = _names(
    "bert dream eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llada llada-moe modern-bert neo-bert nomic-bert "
    "nomic-bert-moe rnd1 t5encoder wavtokenizer-dec"
)
_NOT_PLANNED: Mapping[str, str] = {
    "clip": "is not a language model",
    "deepseek4": "keeps a compressed cache whose size this command does not know",
    "dflash": "is a draft model, which uses the cache of its target",
    "eagle3": "is a draft model, which uses the cache of its target",
    "gemma4-assistant": "is a draft model, which uses the cache of its target",
}

#: llama-hparams.h, LLAMA_MAX_LAYERS
_MAX_LAYERS = 512


@dataclass(frozen=True)
class CacheShape:
    """A model's layers, and everything else that decides the memory of its cache."""

    architecture: str
    layers: tuple[Layer, ...]
    #: head sizes, also of layers without a cache: llama.cpp requires that a type's block divides each of them
    key_sizes: tuple[int, ...]
    value_sizes: tuple[int, ...]
    window: int  #: tokens that a layer of kind "window" can see; 0 without such layers
    context_train: int  #: tokens that the model was trained for
    mla: bool  #: values are part of the keys, so both have the same type
    flash_attention: bool  #: False if llama.cpp has none for this architecture; values cannot be quantized then
    doubts: tuple[str, ...]  #: why llama.cpp's layers may differ from these

    @property
    def cached(self) -> bool:
        """Whether any layer keeps keys and values."""
        return any(layer.kind != NONE for layer in self.layers)

    @property
    def exact_rows(self) -> bool:
        """Whether llama.cpp keeps exact rows for the architecture: exact_caches() of llama-kv-exact.cpp."""
        indexed = any(layer.indexer_key_size for layer in self.layers)
        return self.flash_attention and not indexed and self.architecture not in _NO_EXACT_ROWS


class _Fields:
    """Numbers from the metadata of an architecture, checked."""

    def __init__(self, fields: Mapping[str, Any], architecture: str) -> None:
        self.fields, self.architecture = fields, architecture

    def number(self, key: str, default: int | None = None) -> int:
        name = f"{self.architecture}.{key}"
        value = self.fields.get(name, default)
        if value is None:
            raise TBQError(f"the file has no {name}, which every model of architecture {self.architecture!r} needs")
        if not isinstance(value, int) or not 0 <= value < 2**31:
            raise TBQError(f"{name} is {str(value)[:40]!r}; it must be an integer from 0 to {2**31 - 1}")
        return int(value)

    def each(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """One number for each layer.  The file has a list, or one number for all layers."""
        name = f"{self.architecture}.{key}"
        value = self.fields.get(name)
        if not isinstance(value, list):
            return [self.number(key, default)] * layers
        if len(value) < layers or not all(isinstance(x, (int, bool)) and 0 <= x < 2**31 for x in value):
            raise TBQError(f"{name} has {len(value)} values; {layers} layers need one each, from 0 to {2**31 - 1}")
        return [int(x) for x in value[:layers]]


def read_shape(fields: Mapping[str, Any]) -> CacheShape:
    """The layers of a model.

    fields: metadata by key.
    Raises TBQError if the file is not a language model, if its cache is not known here, and for metadata that llama.cpp
    would refuse too.
    """
    arch = fields.get("general.architecture")
    if not isinstance(arch, str) or not arch.isprintable():
        raise TBQError("the file names no general.architecture; it is not a model")
    if arch in _NOT_PLANNED:
        raise TBQError(f"a model of architecture {arch!r} {_NOT_PLANNED[arch]}")
    f = _Fields(fields, arch)
    count = f.number("block_count")
    if not 1 <= count <= _MAX_LAYERS:
        raise TBQError(f"{arch}.block_count is {count}; llama.cpp takes 1 to {_MAX_LAYERS} layers")
    return _shape_without_cache(f, count) if arch in _NO_CACHE else _shape_with_cache(f, count)


def _shape_without_cache(f: _Fields, count: int) -> CacheShape:
    unread = "llama.cpp makes a cache for this architecture, but nothing reads it"
    key, value = (sizes[0] for sizes in _head_sizes(f, f.each("attention.head_count", count, 0)))
    return CacheShape(
        architecture=f.architecture,
        layers=tuple(Layer(i, NONE) for i in range(count)),
        key_sizes=(key,),
        value_sizes=(value,),
        window=0,
        context_train=f.number("context_length"),
        mla=False,
        flash_attention=True,
        doubts=(unread,) if f.architecture == "t5encoder" else (),
    )


def _shape_with_cache(f: _Fields, count: int) -> CacheShape:
    arch, doubts = f.architecture, list[str]()
    main = count - min(count, f.number("nextn_predict_layers", 0))
    heads = f.each("attention.head_count", count, 0)
    kv_heads = f.each("attention.head_count_kv", count) if f"{arch}.attention.head_count_kv" in f.fields else heads
    if f.number("attention.key_length_mla", 0) and arch not in _MLA:
        doubts.append(f"the file describes latent attention, but llama.cpp does not use it for architecture {arch!r}")
    mla = arch in _MLA and f.number("attention.key_length_mla", 0) > 0 and f.number("attention.value_length_mla", 0) > 0
    recurrent = _recurrent(f, count, main, kv_heads)
    windowed, window = _windows(f, count, main, recurrent, doubts)
    cached = _cached(f, count, main, recurrent, kv_heads)
    indexer = _indexer(f, count, main, cached, windowed)
    state = _state_bytes(f, heads)
    keys, values = _head_sizes(f, heads)
    layers = []
    for i in range(count):
        layer = Layer(i, NONE, state_bytes=state[i] if recurrent[i] else 0)
        if cached[i]:
            layer = replace(
                layer,
                kind=WINDOW if windowed[i] else GLOBAL,
                kv_heads=kv_heads[i],
                key_size=keys[windowed[i]],
                value_size=0 if mla else values[windowed[i]],
                indexer_key_size=indexer[i][0],
                indexer_value_size=indexer[i][1],
            )
        layers.append(layer)
    used = sorted(set(windowed[: main or count]))
    return CacheShape(
        architecture=arch,
        layers=_add_uncounted_layers(f, layers, keys[0], values[0]),
        key_sizes=tuple(keys[w] for w in used),
        value_sizes=tuple(values[w] for w in used),
        window=window,
        context_train=f.number("context_length"),
        mla=mla,
        flash_attention=arch != "grok",
        doubts=tuple(doubts),
    )


def _add_uncounted_layers(f: _Fields, layers: list[Layer], key_size: int, value_size: int) -> tuple[Layer, ...]:
    """The layers, with those that the block count of the file does not count."""
    count = len(layers)
    if f.architecture == "graniteswitch":  # its router counts as one more layer, with one head
        layers = [*layers, Layer(count, GLOBAL, 1, key_size, value_size)]
    if f.architecture == "nanbeige":  # runs through its layers several times, each time with another cache
        loops = f.number("num_loops", 1)
        if not 1 <= loops * count <= _MAX_LAYERS:
            raise TBQError(
                f"{f.architecture}.num_loops is {loops}; {count} layers can be used 1 to {_MAX_LAYERS // count} times"
            )
        layers = [replace(layer, index=i) for i, layer in enumerate(layers * loops)]
    return tuple(layers)


def _head_sizes(f: _Fields, heads: list[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of a key head and of a value head, each for global layers and for window layers."""
    # where the first layer has no attention, the file must name the sizes
    default = f.number("embedding_length") // heads[0] if heads[0] else 0
    named = heads[0] > 0 or f.architecture == "plamo2"
    key = f.number("attention.key_length", default) if named else 0
    value = f.number("attention.value_length", default) if named else 0
    if f.architecture in ("glm5-next", "kimi-k3"):
        value = f.number("attention.kv_lora_rank", value)
    return (key, f.number("attention.key_length_swa", key)), (value, f.number("attention.value_length_swa", value))


def _recurrent(f: _Fields, count: int, main: int, kv_heads: list[int]) -> list[bool]:
    arch = f.architecture
    if arch in _RECURRENT:
        return [True] * count
    if arch == "falcon-h1":  # each layer has attention and a recurrent state
        return [True] * count
    if arch.startswith("nemotron_h"):
        ff = f.each("feed_forward_length", count, 0)
        return [i < main and kv_heads[i] == 0 and ff[i] == 0 for i in range(count)]
    if arch in _RECURRENT_WITHOUT_HEADS:
        return [i < main and kv_heads[i] == 0 for i in range(count)]
    if arch in _ATTENTION_INTERVAL:
        if f"{arch}.attention.recurrent_layers" in f.fields:
            return [bool(x) for x in f.each("attention.recurrent_layers", count)]
        interval = max(1, f.number("full_attention_interval", _ATTENTION_INTERVAL[arch]))
        return [i < main and (i + 1) % interval != 0 for i in range(count)]
    return [False] * count


def _windows(f: _Fields, count: int, main: int, recurrent: list[bool], doubts: list[str]) -> tuple[list[bool], int]:
    """Which layers attend to a sliding window only, and the tokens of the window."""
    arch, none = f.architecture, [False] * count
    size = f.number("attention.sliding_window", 0)
    rule = _WINDOWS.get(arch)
    if rule is None:
        if size and arch not in _WINDOW_IGNORED:
            doubts.append(
                f"the file names a sliding window of {size} tokens, but whether llama.cpp uses it for architecture "
                f"{arch!r} is not known here; every layer is counted with the whole context"
            )
        return none, 0
    if f"{arch}.attention.sliding_window" not in f.fields:
        size = rule.default
    elif size and rule.fixed:
        size = rule.fixed
    if size == 0 or (arch == "exaone4" and main != 64):
        return none, 0
    if arch == "lfm2":
        return [i < main and not recurrent[i] for i in range(count)], size
    key = "attention.sliding_window_pattern"
    pattern = f.fields.get(f"{arch}.{key}")
    if isinstance(pattern, list):
        return ([bool(x) for x in pattern] + none)[:count], size
    if rule.period == 0:
        raise TBQError(
            f"{arch}.{key} is {str(pattern)[:40]!r}; a model of this architecture lists which layers have a window"
        )
    period = f.number(key, rule.period)
    if period == 0:
        return [i < main for i in range(count)], size
    return [i < main and (i % period != 0 if rule.dense_first else i % period < period - 1) for i in range(count)], size


def _cached(f: _Fields, count: int, main: int, recurrent: list[bool], kv_heads: list[int]) -> list[bool]:
    """Which layers have keys and values of their own."""
    arch = f.architecture
    if arch in _RECURRENT:
        return [False] * count
    last = count if main == 0 or arch in _CACHE_OF_PREDICTORS else main
    cached = [i < last and kv_heads[i] > 0 and (arch == "falcon-h1" or not recurrent[i]) for i in range(count)]
    if arch.startswith("nemotron_h"):
        ff = f.each("feed_forward_length", count, 0)
        cached = [has and ff[i] == 0 for i, has in enumerate(cached)]
    if arch == "gemma3n":
        # the other layers read the caches of layers 18 and 19
        cached = [has and i < 20 for i, has in enumerate(cached)]
    if arch == "gemma4":
        own = count - f.number("attention.shared_kv_layers", 0)
        cached = [has and i < own for i, has in enumerate(cached)]
    return cached


def _indexer(f: _Fields, count: int, main: int, cached: list[bool], windowed: list[bool]) -> list[tuple[int, int]]:
    """Sizes of the key and the value that the indexer of sparse attention keeps, for each layer."""
    arch = f.architecture
    size = f.number("attention.indexer.key_length", 0)
    if arch not in _INDEXED or (arch == "hy_v4" and f.number("attention.indexer.top_k", 0) == 0):
        return [(0, 0)] * count
    if arch == "minimax-m3":  # a normal cache, but nothing reads its values
        lead = f.number("leading_dense_block_count", 0)
        value = _head_sizes(f, f.each("attention.head_count", count, 0))[1][0]
        return [(size, value) if i >= lead else (0, 0) for i in range(count)]
    if arch == "glm5-next" and f.number("attention.indexer.kpool", 0):
        size *= 3  # key, gate and pooled values
    if arch in ("deepseek32", "qwen4exp"):
        full = [1] * count
    elif f"{arch}.attention.indexer.types" in f.fields:
        full = f.each("attention.indexer.types", min(count, max(main, 1))) + [0] * (count - main)
    elif arch == "glm-dsa" and f.number("context_length") >= 1048576:
        full = [int(i < 3 or (i - 2) % 4 == 0) for i in range(count)]
    else:
        full = [1] * count
    has = [cached[i] and full[i] and (i < main or arch == "hy_v4") and not windowed[i] for i in range(count)]
    return [(size, 0) if it else (0, 0) for it in has]


def _state_bytes(f: _Fields, heads: list[int]) -> list[int]:
    """Bytes of the recurrent state that a layer has for one sequence: llama_hparams::n_embd_r() and n_embd_s()."""
    arch, width = f.architecture, f.number("embedding_length")
    convolution = max(0, f.number("ssm.conv_kernel", 0) - 1)
    if "rwkv" in arch:
        size = f.number("wkv.head_size")
        values = f.number("token_shift_count", 2) * width + width * size
    elif arch in ("lfm2", "lfm2moe"):
        values = width * max(0, f.number("shortconv.l_cache") - 1)
    elif arch in ("bailingmoe3", "glm5-next", "kimi-k3", "kimi-linear"):
        size = f.number("kda.head_dim")
        values = (3 * (convolution if f.number("ssm.conv_kernel", 0) else 3) + size) * size * heads[0]
    elif arch == "minimax-01":
        values = _head_sizes(f, heads)[0][0] ** 2 * heads[0]
    else:
        inner, state = f.number("ssm.inner_size", 0), f.number("ssm.state_size", 0)
        groups = 0 if arch in ("jamba", "mamba") else f.number("ssm.group_count", 0)
        values = convolution * (inner + 2 * groups * state) + state * inner
    extra = [0] * len(heads)
    if arch == "qwen4exp":  # some layers keep a history of n-grams
        history = max(0, f.number("ple.conv_kernel", 0) - 1) * f.number("ple.ngram_size", 0)
        extended = f.fields.get(f"{arch}.ple.layers")
        for i in extended if isinstance(extended, list) else []:
            if isinstance(i, int) and 0 <= i < len(extra):
                extra[i] = history * f.number("hyper_connection.count", 0) * width
    return [4 * (values + more) for more in extra]  # float32
