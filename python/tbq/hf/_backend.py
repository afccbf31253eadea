# SPDX-License-Identifier: MIT
"""The interface of the kernels, and their choice by device."""

from typing import Protocol, cast

import torch

from tbq.errors import TBQError
from tbq.hf._buffers import ExactRows


class Backend(Protocol):
    """The kernels of a device: the modules _cpu and _cuda.

    Keys and values: (batch, KV heads, tokens, head size).  Packed: uint8, (batch, tokens, KV heads, bytes of a row),
    the last two axes contiguous.  Queries: (batch, heads, tokens, head size).
    bits: 2 to 4, 8 for exact rows; 0 for states that are not packed.
    half: with NEOX rotary pairs, the channels c and c + half of the first 2 half channels of a key are a pair, and are
    stored next to each other.  0: channels are stored in the model's order.
    """

    #: The largest head size that attention() takes, in blocks of 64 values.
    MOST_BLOCKS: int

    def encode(
        self,
        k: torch.Tensor,
        k_packed: torch.Tensor | None,
        k_bits: int,
        v: torch.Tensor,
        v_packed: torch.Tensor | None,
        v_bits: int,
        half: int = 0,
        mean: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Packs keys into k_packed and values into v_packed; those with 0 bits are left out.

        mean: is subtracted from the keys.  weight: what error costs in each channel of a key, equal for neighbors;
        exact rows ignore it.  Both float32 (KV heads, head size), in the order in which channels are stored.
        """

    def decode(
        self,
        k_packed: torch.Tensor | None,
        k_bits: int,
        k_size: int,
        v_packed: torch.Tensor | None,
        v_bits: int,
        v_size: int,
        dtype: torch.dtype,
        half: int = 0,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Decodes keys and values to dtype; None for those with 0 bits.  k_size, v_size: head sizes."""

    def attention(
        self,
        query: torch.Tensor,
        k_packed: torch.Tensor,
        k_bits: int,
        v_packed: torch.Tensor,
        v_bits: int,
        scale: float,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        half: int = 0,
        k_exact: ExactRows | None = None,
        v_exact: ExactRows | None = None,
        k_mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention that reads packed states, and exact rows instead of those for which there are any.

        k_exact, v_exact: both of the same rows, or None.

        mask: bool (True is visible) or numbers to add, (batch or 1, heads or 1, tokens or 1, at least the cached
        tokens).
        causal: the last query token sees all cached tokens, the one before it one less, and so on.
        sinks: a logit for each query head.
        k_mean: what was subtracted from the keys, float32 (KV heads, head size), in the order in which channels are
        stored.  The result is that of whole keys.  Only soft-caps and sinks need it.
        Returns (batch, tokens, heads, value size) in the query's dtype.
        """


def backend_for(device: torch.device) -> Backend:
    """Returns the kernels of a device.  Raises TBQError if there are none."""
    if device.type == "cpu":
        from tbq.hf import _cpu

        return cast(Backend, _cpu)
    if device.type != "cuda" or torch.version.hip:  # ROCm's devices are called cuda too
        raise TBQError(
            f"device {device} {'of ROCm ' if torch.version.hip else ''}has no tbq kernels; cpu and NVIDIA's cuda have"
        )
    try:
        from tbq.hf import _cuda
    except ImportError as error:
        raise TBQError(
            f"the kernels for {device} need Triton, which comes with torch on Linux: pip install triton ({error})"
        ) from None
    return cast(Backend, _cuda)
