# SPDX-License-Identifier: MIT
"""Makes the package gguf know the types; done when this module, and so tbq, is imported.

gguf has no way to add a type, so this extends its enums and tables in place: GGMLQuantizationType.TBQ4_0 and its
neighbors, GGML_QUANT_SIZES, LlamaFileType.MOSTLY_TBQ4_0 (the numbers of the patched llama-quantize, which are those of
the types), and what gguf.quantize and gguf.dequantize look types up in.  tests/test_gguf.py runs it on each release of
gguf that pyproject.toml allows.
"""

import enum
from types import new_class
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import quants

from tbq import blocks
from tbq._types import BLOCK, TypeInfo, types
from tbq.errors import TBQError


def register() -> None:
    """Adds what gguf does not have yet; the second call changes nothing.

    Raises TBQError if gguf gives a number or a name of ours to something else.
    """
    for info in types.values():
        member = _add_member(gguf.GGMLQuantizationType, info.name.upper(), info.id)
        _add_member(gguf.LlamaFileType, f"MOSTLY_{info.name.upper()}", info.id)
        size = (BLOCK, info.block_bytes)
        if gguf.GGML_QUANT_SIZES.setdefault(member, size) != size:
            raise TBQError(f"gguf has another size for {info.name}: {gguf.GGML_QUANT_SIZES[member]}")
        if member not in quants._type_traits:
            _add_coder(info, member)


def _add_member(kind: Any, name: str, value: int) -> Any:
    """The member of an IntEnum with this name and value, added as EnumMeta would have."""
    known = kind.__members__.get(name), kind._value2member_map_.get(value)
    if known[0] is not None and known[0] is known[1]:
        return known[0]
    if known != (None, None):
        raise TBQError(f"gguf has another {kind.__name__} of the name {name} or the number {value}")
    member = int.__new__(kind, value)
    member._name_, member._value_, member.__objclass__ = name, value, kind
    member._sort_order_ = len(kind._member_names_)
    enum.EnumMeta.__setattr__(kind, name, member)  # before the map: a member in the map cannot be set
    kind._member_names_.append(name)
    kind._member_map_[name] = kind._value2member_map_[value] = member
    return member


def _add_coder(info: TypeInfo, member: Any) -> None:
    base: Any = quants.BF16.__mro__[1]

    def quantize_blocks(cls: Any, array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        return blocks.quantize(array, info.name)

    def dequantize_blocks(cls: Any, array: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return blocks.dequantize(array, info.name, (len(array), BLOCK))

    # rows without values: gguf would divide their number among 0, for every type of blocks

    def quantize(cls: Any, array: Any) -> Any:
        return np.empty(array.shape, np.uint8) if _no_columns(array) else base.quantize.__func__(cls, array)

    def dequantize(cls: Any, array: Any) -> Any:
        return np.empty(array.shape, np.float32) if _no_columns(array) else base.dequantize.__func__(cls, array)

    functions = (quantize_blocks, dequantize_blocks, quantize, dequantize)
    body = {"__module__": __name__, **{function.__name__: classmethod(function) for function in functions}}
    new_class(info.name.upper(), (base,), {"qtype": member}, lambda space: space.update(body))  # registers itself


def _no_columns(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.shape[-1:] == (0,)


register()
