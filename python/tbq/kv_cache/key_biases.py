# SPDX-License-Identifier: MIT
"""How large the biases of a model's keys are.  This decides whether 4-bit keys are good enough."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tbq.kv_cache.layers import NONE, Layer

if TYPE_CHECKING:
    from tbq.gguf_files.reader import Tensor

#: Architectures with key biases whose RoPE has the NEOX layout: a pair is the channels c and c + n/2.
NEOX = ("qwen", "qwen2", "qwen2moe", "phi2", "stablelm", "starcoder2", "gptneox", "codeshell", "dream")


def key_biases(
    tensors: Mapping[str, "Tensor"], layers: Sequence[Layer], centering: "Centering | None" = None
) -> dict[int, float]:
    """How large the biases of the keys are, by layer, computed from the tensors.

    A key is W x + b.  x is the normalized input: its root mean square is 1, and it is multiplied by the norm's
    weights g.  The ratio of a head is |b| / sqrt(sum of (W g)^2), and that of a layer is the largest of its KV heads.
    About 8 rows of W are read for each head.  What a ratio means for the quality: docs/measurements/quality.md.

    centering: what centering leaves of the biases; without it the ratios are those of keys that are not centered.
    Layers without a bias are left out.  The ratio is NaN if the type of W cannot be decoded or its shape is unknown.
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
        # the rows of a fused weight are queries, keys, values
        first = weight.shape[0] - rows - layer.kv_heads * layer.value_size if fused else 0
        known = len(weight.shape) == 2 and bias.shape == weight.shape[:1] and 0 <= first <= weight.shape[0] - rows
        norm = tensors.get(f"blk.{layer.index}.attn_norm.weight")
        found[layer.index] = _largest_ratio(bias, weight, norm, first, layer, centering) if known else math.nan
    return found


#: Maps the squares of biases, of shape (heads, head size), to what centering leaves of them.
Centering = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def model_centering(fields: Mapping[str, Any], architecture: str, context: int) -> Centering:
    """What centering leaves of the key biases of a model.

    RoPE turns a pair of channels by an angle theta for each position.  So the mean of a constant over n positions is
    |sin(n theta / 2) / (n sin(theta / 2))| times the constant, and centering removes this mean.
    Scaling of RoPE is left out.  It makes the channels turn more slowly, so that centering removes more.

    A file does not say whether RoPE is NEOX or interleaved.  For an architecture that is not in NEOX the result is
    that of the layout with the larger rest.
    """

    def number(key: str, default: float) -> float:
        value = fields.get(f"{architecture}.rope.{key}", default)
        return float(value) if isinstance(value, (int, float)) and value > 0 else default

    base = number("freq_base", 10000.0)

    def centered(squares: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        size = squares.shape[1]
        rotary = min(size, int(number("dimension_count", size))) // 2 * 2
        half_theta = base ** (-2.0 * np.arange(rotary // 2) / max(1, rotary)) / 2
        kept = 1 - np.square(np.sin(context * half_theta) / (context * np.sin(half_theta)))
        neox, interleaved = np.tile(kept, 2), np.repeat(kept, 2)
        rests = [
            squares * np.concatenate([layout, np.zeros(size - rotary)])
            for layout in ((neox,) if architecture in NEOX else (neox, interleaved))
        ]
        found: npt.NDArray[np.float32] = max(rests, key=lambda rest: float(rest.sum())).astype(np.float32)
        return found

    return centered


def _largest_ratio(
    bias: "Tensor", weight: "Tensor", norm: "Tensor | None", first: int, layer: Layer, centering: "Centering | None"
) -> float:
    """The largest ratio of a layer's KV heads.  first: the row of the weight with which the keys begin."""
    size, heads = layer.key_size, layer.kv_heads
    step = max(n for n in range(1, max(1, size // 8) + 1) if size % n == 0)  # the same number of rows for each head
    end = first + heads * size
    b, w, gain = _read_rows(bias), _read_rows(weight, first, end, step), None if norm is None else _read_rows(norm)
    if b is None or w is None or (gain is not None and gain.shape[-1] != w.shape[-1]):
        return math.nan
    energy = step * np.square(w if gain is None else w * gain).reshape(heads, -1).sum(1)
    squares = np.square(b.reshape(-1)[first:end]).reshape(heads, size)
    ratio = np.sqrt((centering(squares) if centering else squares).sum(1) / np.maximum(energy, 1e-30))
    return float(np.nan_to_num(ratio.max(), nan=math.nan, posinf=1e30))


def _read_rows(
    tensor: "Tensor", start: int = 0, stop: int | None = None, step: int = 1
) -> npt.NDArray[np.float32] | None:
    """Some rows of a tensor with one or two axes, as float32; None if gguf cannot decode its type.

    Other rows are not read.
    """
    import gguf

    if tensor.n_bytes == 0:  # an empty tensor cannot be mapped
        return np.zeros(tensor.shape, np.float32)
    mapped = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.n_bytes,))
    rows = np.ascontiguousarray(mapped.reshape(math.prod(tensor.shape[:-1]), -1)[start:stop:step])
    decode: Callable[..., npt.NDArray[np.float32]] = gguf.dequantize
    try:
        return decode(rows, tensor.type).reshape(-1, tensor.shape[-1]).astype(np.float32)
    except (NotImplementedError, KeyError):
        return None
