# SPDX-License-Identifier: MIT
"""Which kernels a device has, and what they do."""

from typing import Protocol, cast

import torch

from tbq.errors import TBQError


class Backend(Protocol):
    """The kernels of a device: the modules _cpu and _cuda.

    Shapes: keys and values (batch, KV heads, tokens, head size); packed, uint8, (batch, tokens, KV heads, bytes of a row);
    queries (batch, heads, tokens, head size).  bits: 2 to 4; 0 for states that are not packed.  half: rotary pairs of neighbors
    that lie this far apart, 0 where each lies next to its own.
    """

    #: Blocks of 64 values of a head up to which attention() takes it.
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
    ) -> None:
        """Packs keys and values, those with bits, into what is given for them."""

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
        """Keys and values as floats; None for a side without bits.  The sizes are of heads."""

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
    ) -> torch.Tensor:
        """Attention straight from packed states: (batch, tokens, heads, head size)."""


def backend_for(device: torch.device) -> Backend:
    """The kernels of a device; TBQError for one that has none."""
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
