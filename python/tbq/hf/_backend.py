# SPDX-License-Identifier: MIT
"""Which kernels a device has."""
from types import ModuleType

import torch

from tbq.errors import TBQError
from tbq.hf import _tables

#: By bits.
BLOCK_BYTES = {bits: 2 + 8 * bits for bits in _tables.LEVELS}


def of(device: torch.device) -> ModuleType:
    """The module _cpu or _cuda; TBQError for a device that has neither."""
    if device.type == "cpu":
        from tbq.hf import _cpu

        return _cpu
    if device.type != "cuda" or torch.version.hip:  # ROCm's devices are called cuda too
        raise TBQError(f"device {device} {'of ROCm ' if torch.version.hip else ''}has no tbq kernels; cpu and NVIDIA's cuda have")
    try:
        from tbq.hf import _cuda
    except ImportError as error:
        raise TBQError(f"the kernels for {device} need Triton, which comes with torch on Linux: pip install triton ({error})") from None
    return _cuda
