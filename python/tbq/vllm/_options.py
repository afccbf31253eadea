# SPDX-License-Identifier: MIT
"""--additional-config '{"tbq": {...}}', and what a layer takes of the center file."""

import functools
import importlib
import pathlib
from typing import Any, NamedTuple

import torch

from tbq.errors import TBQError
from tbq.hf._buffers import channel_order
from tbq.hf._cache import _has_neox_pairs, _rotary_half
from tbq.hf._center import KeyCenter, weights_of

_PAIRS = ("auto", "neox", "interleaved")


class Options(NamedTuple):
    """What the "tbq" of --additional-config says."""

    center: str | None = None  #: a file of `tbq calibrate` or KeyCenter.save(); None: keys are not centered
    pairs: str = "auto"  #: as of tbq.hf.TBQCache


def read_options(additional_config: Any) -> Options:
    """Raises TBQError for what is not known, and for a center file that is none."""
    given = additional_config.get("tbq", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(given, dict) or (unknown := set(given) - set(Options._fields)):
        what = f"has {', '.join(sorted(unknown))}" if isinstance(given, dict) else f"is {given!r}"
        raise TBQError(f'"tbq" of --additional-config {what}; it takes {" and ".join(Options._fields)}')
    options = Options(**given)
    if options.pairs not in _PAIRS:
        raise TBQError(f'"pairs" of --additional-config is {options.pairs!r}; it must be one of {", ".join(_PAIRS)}')
    if options.center is not None:
        if not isinstance(options.center, str):
            raise TBQError(f'"center" of --additional-config is {options.center!r}; it must be the name of a file')
        load_center(options.center)
    return options


@functools.lru_cache(maxsize=2)
def load_center(path: str) -> KeyCenter:
    """Reads a center file.  Raises TBQError."""
    try:
        return KeyCenter.load(pathlib.Path(path))
    except OSError as error:
        raise TBQError(f'"center" of --additional-config: {error}') from None


def half_of(pairs: str, config: Any, head_size: int) -> int:
    """Returns how far the two channels of a rotary pair are apart, 0 if they are neighbors.

    config: of the text model, as transformers has it.
    """
    if pairs == "interleaved":
        return 0
    if pairs == "auto":
        try:
            importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        except ImportError:  # a model that transformers does not have: most turn c and c + n/2
            pass
        else:
            if not _has_neox_pairs(config):
                return 0
    half = _rotary_half(config, head_size)
    return half if 2 * half <= head_size else 0


class LayerCenter(NamedTuple):
    """A layer's mean keys on this rank, float32 (KV heads, head size)."""

    mean: torch.Tensor  #: in the order of storage
    weight: torch.Tensor | None  #: what error costs, in the same order
    whole: torch.Tensor  #: the mean in the channels' order


def center_of_layer(
    center: KeyCenter, layer: int, heads: int, size: int, rank: int, ranks: int, half: int, device: torch.device
) -> LayerCenter | None:
    """Returns what belongs to the KV heads of this rank; None for a layer that was not measured.

    Raises TBQError where the file is of another model.
    """
    mean, energy = center.means.get(layer), center.energies.get(layer)
    if mean is None:
        return None
    total = mean.shape[0]
    if mean.shape[1] != size or heads * ranks < total or (heads * ranks > total and heads != 1):
        raise TBQError(
            f"the center file has {total} KV heads of {mean.shape[1]} in layer {layer}, and the model"
            f" {heads * ranks} of {size}: it is of another model"
        )
    first = rank * heads if heads * ranks == total else rank * total // ranks  # more ranks than heads: they share them
    order = channel_order(size, half)
    mean = mean[first : first + heads].float().contiguous()
    weight = None if energy is None else weights_of(energy[first : first + heads].float()[:, order])
    return LayerCenter(
        mean[:, order].contiguous().to(device), None if weight is None else weight.to(device), mean.to(device)
    )
