# SPDX-License-Identifier: MIT
"""The cache that transformers' generate() takes."""

import functools
import math
import os
import sys
import warnings
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tbq._exact_rows import FIRST, RECENT, check_exact_rows
from tbq._key_biases import LARGE_BIAS
from tbq.errors import TBQError
from tbq.hf import _tables
from tbq.hf._cache_layers import TBQLayer, TBQSlidingLayer
from tbq.hf._center import KeyCenter, load_center

SLIDING = ("keep", "compress")
#: The layouts of rotary pairs, each with the name that it had before.
NEOX, INTERLEAVED = ("neox", "halves"), ("interleaved", "neighbours")  # codespell:ignore neighbours
PAIRS = ("auto", NEOX[0], INTERLEAVED[0])

#: constant_part() looks at groups of so many tokens, at most so many groups.
GROUP, _MOST_GROUPS = 16, 16


class TBQCache(DynamicCache):  # type: ignore[misc]
    """A cache of keys and values in tbq blocks, for any decoder of transformers whose head sizes are multiples of 64.

        cache = TBQCache(model.config, k_bits=4, v_bits=4)
        model.generate(**inputs, past_key_values=cache)

    config: the model's config, or the model; it says which kinds of layers there are.  None: every layer has full
    attention, and states are always decoded.
    k_bits, v_bits: bits of keys and values: 2, 3, 4, or None for the model's dtype.
    sliding: "keep" does not pack layers with a sliding window, because they do not grow; "compress" packs them too.
    Layers of other kinds (linear attention, latent indexers) are never packed.
    pairs: which channels of a key the rotary embedding turns into each other: "neox", c and c + n/2; "interleaved", 2i
    and 2i + 1; "auto", what the model's own code does.  NEOX pairs are stored next to each other.  That costs nothing
    and makes the divergence a quarter smaller.  The older names of these values are still accepted.
    recent, first: how many of the newest and of the first rows of each sequence are exact: they are kept in 8 bits as
    well, and attention reads them instead of the packed ones.  The rows of a call are exact for all its queries.  Both
    0: every row is read packed.  Rows are counted as they are cached, padding included.  Layers with a sliding window
    have no exact first rows.
    Each new token is encoded once, as in llama.cpp's cache.  The states of a layer are decoded when the model reads
    them, unless it was loaded with attn_implementation="tbq", which reads blocks.
    center: the mean of the model's keys is subtracted from them, and the encoder puts its error where queries read
    least (docs/design/centering.md).  True measures both by running the model once, which needs the model instead of
    its config; the result is kept in the user's folder for caches.  A KeyCenter or the path of one; False: not
    centered.  None: centered if the model is given and can be measured.
    Without a center, keys with large biases (Qwen2, Qwen2.5) degrade badly.  The first prompt of GROUP tokens or more
    is checked with the planner's rule (tbq._key_biases).  If its keys have such biases, a UserWarning says so once,
    after the last layer.
    Raises TBQError for other values, and for head sizes that are not multiples of 64.
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any = None,
        k_bits: int | None = 4,
        v_bits: int | None = 4,
        *,
        sliding: str = "keep",
        pairs: str = "auto",
        recent: int = RECENT,
        first: int = FIRST,
        center: bool | str | os.PathLike[str] | KeyCenter | None = None,
    ) -> None:
        for name, bits in (("k_bits", k_bits), ("v_bits", v_bits)):
            if bits is not None and (isinstance(bits, bool) or bits not in _tables.BLOCK_BYTES):
                raise TBQError(f"{name} is {bits!r}; it must be 2, 3, 4 or None")
        if sliding not in SLIDING:
            raise TBQError(f"sliding is {sliding!r}; it must be one of {', '.join(SLIDING)}")
        if pairs not in ("auto", *NEOX, *INTERLEAVED):
            raise TBQError(f"pairs is {pairs!r}; it must be one of {', '.join(PAIRS)}")
        check_exact_rows(recent, first)
        model = config if hasattr(config, "config") else None
        config = getattr(config, "config", config)
        if config is not None and not hasattr(config, "get_text_config"):
            raise TBQError(f"config is a {type(config).__name__}; it must be a model's config, or the model")
        self.k_bits, self.v_bits, self.recent, self.first = k_bits, v_bits, recent, first
        #: By layer: constant_part() of the first prompt's keys, on their device; None after they have been read.
        self._constant_parts: dict[int, torch.Tensor] | None = {} if k_bits else None
        self._name, self._last = "this model", -1
        if config is None and center:
            raise TBQError("center needs the model or its config: TBQCache(model, ...)")
        self.center = load_center(center, model) if k_bits else None
        super().__init__(config=config)
        if config is None:
            self.layer_class_to_replicate = functools.partial(TBQLayer, k_bits, v_bits, recent=recent, first=first)
            return
        decoder = config.get_text_config(decoder=True)
        # transformers 5 has sizes by layer
        configs = getattr(decoder, "per_layer_config", None) or [decoder] * len(self.layers)
        neox = pairs in NEOX or pairs == "auto" and _has_neox_pairs(decoder)
        self.layers = [
            self._replace_layer(i, layer, decoder, layer_config, sliding, neox)
            for i, (layer, layer_config) in enumerate(zip(self.layers, configs))
        ]
        self._name = getattr(config, "_name_or_path", "") or config.model_type
        self._last = max((i for i, layer in enumerate(self.layers) if isinstance(layer, TBQLayer)), default=-1)

    def _replace_layer(self, index: int, layer: Any, config: Any, layer_config: Any, sliding: str, neox: bool) -> Any:
        """Returns the packed layer for a layer of DynamicCache, or this layer if it is not packed."""
        window = type(layer) is DynamicSlidingWindowLayer and sliding == "compress"
        if type(layer) is not DynamicLayer and not window:
            return layer
        size = _head_size(layer_config)
        if (self.k_bits or self.v_bits) and size % 64:
            raise TBQError(
                f"head size {size} is not a multiple of 64: pass k_bits=None and v_bits=None, or use DynamicCache"
            )
        half = _rotary_half(layer_config, size) if neox else 0
        center = (self.center.means.get(index), self.center.energies.get(index)) if self.center else (None, None)
        if window:
            return TBQSlidingLayer(layer.sliding_window, self.k_bits, self.v_bits, config, half, self.recent, *center)
        return TBQLayer(self.k_bits, self.v_bits, config, half, self.recent, self.first, *center)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in DynamicCache."""
        states: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._constant_parts is not None and (self._constant_parts or key_states.shape[2] >= GROUP):
            self._check_key_biases(key_states, value_states, layer_idx)
        return states

    def _check_key_biases(self, k: torch.Tensor, v: torch.Tensor, index: int) -> None:
        """Measures the keys of each layer once.  Reads the figures after the last layer: one wait for the device."""
        parts, layer = self._constant_parts, self.layers[index]
        assert parts is not None
        again = index in parts
        packs = isinstance(layer, TBQLayer) and layer.bits[0] and layer.center.mean is None
        if not again and packs and k.shape[2] >= GROUP and k.numel():
            parts[index] = constant_part(k.detach(), v.detach())
        if not again and index != self._last:
            return
        self._constant_parts = None
        large = {i: ratio for i, part in parts.items() if math.isfinite(ratio := float(part)) and ratio >= LARGE_BIAS}
        if large:
            worst = max(large, key=lambda i: large[i])
            warnings.warn(
                f"{self._name} has large key biases in {len(large)} of {len(parts)} layers (layer {worst}: "
                f"{large[worst]:.0f} times the rest of the key): keys of {self.k_bits} bits degrade badly; "
                "TBQCache(model, ...) centers them, TBQCache(..., k_bits=None) keeps them in the model's dtype",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        return (
            f"TBQCache(k_bits={self.k_bits}, v_bits={self.v_bits}, layers={len(self.layers)}, "
            f"tokens={self.get_seq_length()}, nbytes={self.nbytes})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of keys and values, packed or not, of exact rows, and of room to grow.

        Packed rows have room for at most 64 tokens or 1.6 % more, exact rows for at most 128.
        """
        return sum(_layer_bytes(layer)[0] for layer in self.layers)

    @property
    def baseline_nbytes(self) -> int:
        """Bytes of the same tokens in a DynamicCache."""
        return sum(_layer_bytes(layer)[1] for layer in self.layers)

    def stats(self) -> dict[str, Any]:
        """Returns tokens, nbytes, baseline_nbytes, ratio (None while empty), packed_layers, and layers.

        layers has the kind, the bits and the bytes of each layer.
        """
        layers = []
        for layer in self.layers:
            nbytes, baseline = _layer_bytes(layer)
            k_bits, v_bits = layer.bits if isinstance(layer, TBQLayer) else (0, 0)
            layers.append(
                {
                    "kind": type(layer).__name__,
                    "k_bits": k_bits or None,
                    "v_bits": v_bits or None,
                    "nbytes": nbytes,
                    "exact_nbytes": layer.exact_nbytes() if isinstance(layer, TBQLayer) else 0,
                    "baseline_nbytes": baseline,
                }
            )
        return {
            "tokens": self.get_seq_length(),
            "nbytes": self.nbytes,
            "baseline_nbytes": self.baseline_nbytes,
            "ratio": self.baseline_nbytes / self.nbytes if self.nbytes else None,
            "packed_layers": sum(isinstance(layer, TBQLayer) for layer in self.layers),
            "layers": layers,
        }


def constant_part(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Measures the constant part of keys: what all keys of a head have in common, relative to what they differ by.

    For each head it is the length of the keys' mean over the root mean square length of the keys minus their mean.  The
    largest value of all heads counts.  kv_cache.key_biases computes it from weights, for slowly rotating channels.
    k, v: (batch, heads, tokens, size) with GROUP tokens or more.  Returns a float32 scalar on their device; infinity if
    it is unknown.
    Of several groups of GROUP tokens, the smallest value counts.  A bias is in every group.  Padding or a repeated word
    have similar keys too, but they are in some groups only.  Where the values are similar in every head, the tokens are
    equal, so such groups do not count.
    """
    of_keys, of_values = _mean_over_rest(k), _mean_over_rest(v)
    tokens_differ = of_values.amin(1, keepdim=True) < LARGE_BIAS
    return of_keys.where(tokens_differ, torch.inf).amin((0, 2)).amax()


def _mean_over_rest(states: torch.Tensor) -> torch.Tensor:
    """Returns (batch, heads, groups): the length of a group's mean over the root mean square length of the rest."""
    batch, heads, tokens, size = states.shape
    groups = min(tokens // GROUP, _MOST_GROUPS)
    grouped = states[:, :, : groups * GROUP].float().reshape(batch, heads, groups, GROUP, size)
    mean = grouped.mean(3, keepdim=True)
    rest = (grouped - mean).square().sum(4).mean(3)
    return (mean.square().sum((3, 4)) / rest.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()


def _layer_bytes(layer: Any) -> tuple[int, int]:
    """Returns the bytes of a layer's states, and of the same states in the model's dtype."""
    if isinstance(layer, TBQLayer):
        return layer.nbytes(), layer.baseline_nbytes()
    states = [tensor for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)) if tensor is not None]
    size = sum(tensor.numel() * tensor.element_size() for tensor in states)
    return size, size


def _head_size(config: Any) -> int:
    """Returns the head size if the config says it, and otherwise 0; the layers check the states that they get."""
    if hasattr(config, "kv_lora_rank"):  # keys and values have sizes of their own
        return 0
    size = getattr(config, "head_dim", None)
    if size is None and getattr(config, "num_attention_heads", None):
        size = config.hidden_size // config.num_attention_heads
    return size if isinstance(size, int) else 0


def _rotary_half(config: Any, size: int) -> int:
    """Returns half the number of rotary channels, which are the first channels of a head."""
    parameters = getattr(config, "rope_parameters", None) or {}
    share = getattr(config, "partial_rotary_factor", None) or parameters.get("partial_rotary_factor") or 1.0
    return int(size * share) // 2


def _has_neox_pairs(config: Any) -> bool:
    """Whether the model's own rotate_half turns c and c + n/2 into each other; other pairs are interleaved."""
    module = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    rotate = getattr(module, "rotate_half", None)
    return (
        rotate is not None
        and not getattr(config, "rope_interleave", False)
        and rotate(torch.tensor([0, 1, 2, 3])).tolist() == [-2, -3, 0, 1]
    )
