# SPDX-License-Identifier: MIT
"""How llama.cpp distributes a model and its cache over several devices.

Layers: llama_model_base::load_tensors() gives each device a range of layers.  Tensors: each device has a part of
most tensors, llama_meta_device_get_split_state().  Both are in src/llama-model.cpp of the pinned revision.
tests/test_rpc.py compares the figures with what llama.cpp allocates.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from tbq._arguments import rpc_servers
from tbq.errors import TBQError
from tbq.gguf_files.reader import Tensor
from tbq.kv_cache.layers import CacheShape, Layer
from tbq.programs import output
from tbq.programs.process import run

LAYER, TENSOR = "layer", "tensor"

#: Tensors that llama.cpp keeps in the memory of the CPU: those of LLM_TENSOR_LAYER_INPUT in src/llama-arch.cpp.
_INPUTS = re.compile(r"(token_embd|token_types|position_embd|per_layer_token_embd|masked_embd_\w+)\.")
_BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.(.*)")

#: Architectures whose tensors llama.cpp does not split: llm_arch_supports_sm_tensor() in src/llama-arch.cpp.
_NOT_BY_TENSORS = {
    "bailingmoe3", "bitnet", "deepseek2", "deepseek32", "dots3note", "falcon-h1", "gemma3n", "glm-dsa", "glm5-next",
    "granitehybrid", "grok", "hy_v4", "jamba", "kimi-k3", "kimi-linear", "mamba", "mamba2", "minicpm3", "minimax-01",
    "minimax-m2", "minimax-m3", "mistral4", "mpt", "nemotron_h", "nemotron_h_moe", "olmo2", "olmoe", "plamo2",
    "qwen3tts", "qwen4exp", "t5",
}  # fmt: skip

#: Tensors that are split by rows (1) or within rows (0), and the tensor whose blocks decide how.
_SPLIT = (
    (re.compile(r"attn_(q|k|v|qkv)\.weight|attn_gate\.weight"), 1, ("attn_output.weight",)),
    (re.compile(r"attn_(q|k|v|qkv)\.bias|attn_sinks\.weight"), 0, ("attn_output.weight",)),
    (re.compile(r"attn_output\.weight"), 0, ("attn_output.weight",)),
    (re.compile(r"ffn_(up|gate|gate_up)(_exps)?\.weight"), 1, ("ffn_down.weight", "ffn_down_exps.weight")),
    (re.compile(r"ffn_(up|gate)(_exps)?\.bias"), 0, ("ffn_down.weight", "ffn_down_exps.weight")),
    (re.compile(r"ffn_down(_exps)?\.weight"), 0, ("ffn_down.weight", "ffn_down_exps.weight")),
)


@dataclass(frozen=True)
class Device:
    """What one of several devices holds of a model."""

    name: str
    memory: int | None  #: bytes, as the user or the device says; None if unknown
    layers: int  #: layers of the model; with a split of tensors all layers
    weights_bytes: int
    state_bytes: int  #: recurrent states of all sequences


@dataclass(frozen=True)
class Split:
    """How a model is distributed: for each device, its part of the keys and of the values of each layer."""

    mode: str  #: "layer" or "tensor"
    devices: tuple[Device, ...]
    #: by device and layer: numbers of values of a token's keys and values
    keys: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]


def _parts(values: int, granularity: int, shares: Sequence[float] | None, count: int, rotation: int) -> list[int]:
    """A dimension in as many parts as there are devices, in multiples of a granularity except for one."""
    found, low = [0] * count, 0
    scan = np.cumsum([np.float32(shares[(j + rotation) % count]) for j in range(count)]) if shares else None
    for j in range(count - 1):
        high = values * (j + 1) // count if scan is None else int(np.float32(values) * scan[j] / scan[-1])
        high -= high % granularity
        found[(j + rotation) % count] = high - low
        low = high
    found[(count - 1 + rotation) % count] = values - low
    return found


def _block(tensor: Tensor) -> int:
    return int(gguf.GGML_QUANT_SIZES[tensor.type][0])


def layer_devices(layers: int, shares: Sequence[float], gpu_layers: int | None) -> list[int | None]:
    """The device of each layer and, last, of the output; None for the CPU.

    shares: for each device a number, its free memory for example.  gpu_layers: -ngl; None for all layers.
    """
    points = np.cumsum(np.asarray(shares, np.float32), dtype=np.float32)
    points /= points[-1]
    active = layers + 1 if gpu_layers is None else min(gpu_layers, layers + 1)
    start = layers + 1 - active
    return [
        int(np.searchsorted(points, np.float32(i - start) / np.float32(active), "right")) if i >= start else None
        for i in range(layers + 1)
    ]


def _by_layers(
    names: Sequence[str], memory: Sequence[int | None], shares: Sequence[float], shape: CacheShape,
    tensors: Mapping[str, Tensor], parallel: int, gpu_layers: int | None,
) -> Split:  # fmt: skip
    where = layer_devices(len(shape.layers), shares, gpu_layers)
    weights = [0] * len(names)
    for tensor in tensors.values():
        holders: set[int | None]
        block = _BLOCK.match(tensor.name)
        if tensor.name.startswith("rope_"):  # once on each device with layers
            holders = set(where[:-1])
        elif block and int(block[1]) < len(shape.layers):
            holders = {where[int(block[1])]}
        elif tensor.name.startswith("token_embd_norm."):  # belongs to the first layer
            holders = {where[0]}
        elif _INPUTS.match(tensor.name):
            # an embedding that is the output matrix, too, is there twice
            tied = tensor.name == "token_embd.weight" and "output.weight" not in tensors
            holders = {where[-1]} if tied else set()
        else:
            holders = {where[-1]}
        for device in holders:
            if device is not None:
                weights[device] += tensor.n_bytes
    devices = tuple(
        Device(
            name,
            memory[i],
            sum(device == i for device in where[:-1]),
            weights[i],
            parallel * sum(layer.state_bytes for layer in shape.layers if where[layer.index] == i),
        )
        for i, name in enumerate(names)
    )

    def mine(i: int, size: Any) -> tuple[int, ...]:
        return tuple(size(layer) if where[layer.index] == i else 0 for layer in shape.layers)

    return Split(
        LAYER,
        devices,
        tuple(mine(i, lambda layer: layer.kv_heads * layer.key_size) for i in range(len(names))),
        tuple(mine(i, lambda layer: layer.kv_heads * layer.value_size) for i in range(len(names))),
    )


class _TensorSplit:
    """The split of tensors, for models whose layers all have attention with keys and values of heads."""

    def __init__(self, shape: CacheShape, tensors: Mapping[str, Tensor], count: int, shares: Sequence[float] | None):
        odd = next((layer for layer in shape.layers if not layer.kv_heads or layer.state_bytes), None)
        if shape.architecture in _NOT_BY_TENSORS:
            raise TBQError(
                f"llama.cpp has no split of tensors for architecture {shape.architecture!r}; --split-mode layer is"
            )
        if odd is not None or shape.mla or any(layer.indexer_key_size for layer in shape.layers):
            raise TBQError(
                f"a split of tensors is planned for models with heads of keys and values in every layer, and not for "
                f"architecture {shape.architecture!r}; --split-mode layer is"
            )
        self.tensors, self.count, self.shares = tensors, count, shares
        self.layers = shape.layers
        kinds: dict[str, int] = {}
        self.rotation = []
        for layer in shape.layers:  # layers with the same kind of cache before this one
            self.rotation.append(kinds.get(layer.kind, 0) % count)
            kinds[layer.kind] = kinds.get(layer.kind, 0) + 1

    def _granularity(self, layer: Layer) -> tuple[int, int, int]:
        """Of queries, keys and values, in values."""
        out = self.tensors[f"blk.{layer.index}.attn_output.weight"]
        heads = out.shape[-1] // layer.value_size
        group = heads // layer.kv_heads
        row, fast = group * layer.key_size, _block(out)
        while fast < 128 and fast * self.count < row:
            fast *= 2
        queries = math.lcm(row, fast)
        keys = queries // group
        return queries, keys, keys // layer.key_size * layer.value_size

    def cache(self, layer: Layer) -> tuple[list[int], list[int]]:
        """The parts of a token's keys and values."""
        _, keys, values = self._granularity(layer)
        rotation = self.rotation[layer.index]
        return (
            self._parts(layer.kv_heads * layer.key_size, keys, rotation),
            self._parts(layer.kv_heads * layer.value_size, values, rotation),
        )

    def _parts(self, values: int, granularity: int, rotation: int) -> list[int]:
        return _parts(values, granularity, self.shares, self.count, rotation)

    def weights(self, tensor: Tensor) -> list[int]:
        """Bytes of a tensor on each device."""
        if tensor.name == "output.weight":
            return self._cut(tensor, 1, self._parts(tensor.shape[-2], 1, len(self.layers) % self.count))
        block = _BLOCK.match(tensor.name)
        if block and int(block[1]) < len(self.layers):
            layer, name = self.layers[int(block[1])], block[2]
            for pattern, axis, models in _SPLIT:
                if pattern.fullmatch(name):
                    model = next((m for m in models if f"blk.{layer.index}.{m}" in self.tensors), None)
                    if model is None:
                        break
                    return self._cut(tensor, axis, self._segments(tensor, layer, name, axis, model))
        return [tensor.n_bytes] * self.count  # everything else is on every device

    def _segments(self, tensor: Tensor, layer: Layer, name: str, axis: int, model: str) -> list[int]:
        size = tensor.shape[-1 - axis]
        rotation = self.rotation[layer.index]
        if name.startswith("ffn"):
            unit = math.lcm(_block(self.tensors[f"blk.{layer.index}.{model}"]), 128)
            exact = re.fullmatch(r"ffn_(up|gate|gate_up|down)\.(weight|bias)|ffn_(up|gate|gate_up)_exps\.\w+", name)
            unit = unit if exact else 1
            down = self.tensors[f"blk.{layer.index}.{model}"].shape[-1]
            if size == 2 * down:  # up and gate in one tensor
                return [2 * part for part in self._parts(down, unit, rotation)]
            return self._parts(size, unit, rotation)
        queries, keys, values = self._granularity(layer)
        if name.startswith(("attn_k.", "attn_v.")):
            return self._parts(size, keys if name.startswith("attn_k.") else values, rotation)
        if name.startswith("attn_qkv"):
            n_keys, n_values = layer.kv_heads * layer.key_size, layer.kv_heads * layer.value_size
            parts = [
                self._parts(size - n_keys - n_values, queries, rotation),
                self._parts(n_keys, keys, rotation),
                self._parts(n_values, values, rotation),
            ]
            return [sum(part) for part in zip(*parts)]
        heads = queries // layer.key_size
        if name.startswith("attn_sinks") or (name.startswith("attn_gate") and size == heads * layer.kv_heads):
            return self._parts(size, heads, rotation)
        if name.startswith("attn_output"):
            return self._parts(size, heads * layer.value_size, rotation)
        return self._parts(size, queries, rotation)

    def _cut(self, tensor: Tensor, axis: int, parts: Sequence[int]) -> list[int]:
        size = tensor.shape[-1 - axis]
        return [tensor.n_bytes // size * part if tensor.n_bytes % size == 0 else tensor.n_bytes * part // size
                for part in parts]  # fmt: skip


def _by_tensors(
    names: Sequence[str], memory: Sequence[int | None], shares: Sequence[float] | None, shape: CacheShape,
    tensors: Mapping[str, Tensor],
) -> Split:  # fmt: skip
    split = _TensorSplit(shape, tensors, len(names), shares)
    weights = [0] * len(names)
    for tensor in tensors.values():
        if _INPUTS.match(tensor.name) and not (tensor.name == "token_embd.weight" and "output.weight" not in tensors):
            continue
        for i, size in enumerate(split.weights(tensor)):
            weights[i] += size
    caches = [split.cache(layer) for layer in shape.layers]
    return Split(
        TENSOR,
        tuple(Device(name, memory[i], len(shape.layers), weights[i], 0) for i, name in enumerate(names)),
        tuple(tuple(keys[i] for keys, _ in caches) for i in range(len(names))),
        tuple(tuple(values[i] for _, values in caches) for i in range(len(names))),
    )


def distribute(
    names: Sequence[str], memory: Sequence[int | None], shape: CacheShape, tensors: Mapping[str, Tensor],
    parallel: int, mode: str, shares: Sequence[float] | None, gpu_layers: int | None,
) -> Split:  # fmt: skip
    """Distributes a model over devices.

    shares: -ts, a number for each device; None for llama.cpp's defaults, which are the free memory for layers, and
    equal parts for tensors.  gpu_layers: -ngl; None for all layers.
    Raises TBQError for a mode or a share that llama.cpp would not take, and a split of tensors that is not planned.
    """
    if mode not in (LAYER, TENSOR):
        raise TBQError(f"split mode {mode!r} is not one of {LAYER}, {TENSOR}")
    if shares is not None and (len(shares) != len(names) or min(shares) < 0 or not 0 < sum(shares) < math.inf):
        raise TBQError(f"tensor split {shares} has to be a number for each of {len(names)} devices, not all of them 0")
    if mode == TENSOR:
        if gpu_layers is not None and gpu_layers <= len(shape.layers):
            raise TBQError("a split of tensors is planned with all layers on the devices; leave -ngl out")
        return _by_tensors(names, memory, shares, shape, tensors)
    if shares is None:
        if any(size is None for size in memory):
            raise TBQError("llama.cpp splits layers by free memory; give each device a size, or a tensor split")
        shares = [float(size or 0) for size in memory]
    return _by_layers(names, memory, shares, shape, tensors, parallel, gpu_layers)


def rpc_devices(servers: str | Sequence[str], mode: str) -> list[tuple[str, int]]:
    """The names and bytes of free memory of the devices of RPC servers and of this machine.

    They are in the order in which llama.cpp uses them: for layers servers come first, for tensors devices are as
    ggml registers them.  Raises TBQError for a server that cannot be used.
    """
    done = run("llama-server", ["--rpc", ",".join(rpc_servers(servers)), "--list-devices"])
    if done.status:
        raise TBQError(done.error())
    found = output.devices(done.stdout)
    return found if mode == TENSOR else sorted(found, key=lambda device: not device[0].startswith("RPC"))  # stable
