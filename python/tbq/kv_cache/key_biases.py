# SPDX-License-Identifier: MIT
"""How large the biases of a model's keys are, which decides whether 4-bit keys are good enough."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tbq.kv_cache.layers import NONE, Layer

if TYPE_CHECKING:
    from tbq.gguf_files.reader import Tensor

#: Architectures with biases on the keys whose rotary pairs are half a head apart (LLAMA_ROPE_TYPE_NEOX).
HALF_APART = ("qwen", "qwen2", "qwen2moe", "phi2", "stablelm", "starcoder2", "gptneox", "codeshell", "dream")


def key_biases(
    tensors: Mapping[str, "Tensor"], layers: Sequence[Layer], left: "Left | None" = None
) -> dict[int, float]:
    """How large the biases of the keys are, by layer, read from the tensors; with left, what centering leaves of them.

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


#: Of the squares of biases, (heads, head size), what remains after centering.
Left = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def left_by_centering(fields: Mapping[str, Any], architecture: str, context: int) -> Left:
    """A constant of a rotary pair turns with the position, by angles of theta: its mean over n positions is shorter by the
    factor |sin(n theta / 2) / (n sin(theta / 2))|, and the mean is what centering takes away.  Without scaling of RoPE, which
    slows the channels, so that more is taken.  Pairs are neighbors or half a head apart, which a file does not say: of an
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
        found: npt.NDArray[np.float32] = max(
            (squares * factor for factor in of_channel), key=lambda x: float(x.sum())
        ).astype(np.float32)
        return found

    return left


def _bias_of_heads(
    bias: "Tensor", weight: "Tensor", norm: "Tensor | None", first: int, layer: Layer, left: "Left | None"
) -> float:
    size, heads = layer.key_size, layer.kv_heads
    step = max(n for n in range(1, max(1, size // 8) + 1) if size % n == 0)  # so that each head has as many rows
    b, w, gain = _rows(bias), _rows(weight, first, first + heads * size, step), None if norm is None else _rows(norm)
    if b is None or w is None or (gain is not None and gain.shape[-1] != w.shape[-1]):
        return math.nan
    of_keys = b.reshape(-1)[first : first + heads * size]
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
