# SPDX-License-Identifier: MIT
"""Adds the tbq types to the package gguf, when this module is imported; `import tbq` imports it.

gguf has no interface for adding a type, so this module extends its enums and tables in place:

- GGMLQuantizationType.TBQ4_0 and the others, and GGML_QUANT_SIZES;
- LlamaFileType.MOSTLY_TBQ4_0 and the others, with the numbers of the types, as in the patched llama-quantize;
- the table in which gguf.quantize and gguf.dequantize look up types.

tests/test_gguf.py tests it with each release of gguf that pyproject.toml allows.
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
    """Adds what gguf does not have yet.  A second call changes nothing.

    Raises TBQError if gguf uses the number or the name of a tbq type for something else.
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
    """Returns the member of an IntEnum with this name and value; adds it the way EnumMeta does if it is missing."""
    known = kind.__members__.get(name), kind._value2member_map_.get(value)
    if known[0] is not None and known[0] is known[1]:
        return known[0]
    if known != (None, None):
        raise TBQError(f"gguf has another {kind.__name__} of the name {name} or the number {value}")
    member = int.__new__(kind, value)
    member._name_, member._value_, member.__objclass__ = name, value, kind
    member._sort_order_ = len(kind._member_names_)
    enum.EnumMeta.__setattr__(kind, name, member)  # first: EnumMeta refuses to set a member that is in the map
    kind._member_names_.append(name)
    kind._member_map_[name] = kind._value2member_map_[value] = member
    return member


def _add_coder(info: TypeInfo, member: Any) -> None:
    base: Any = quants.BF16.__mro__[1]

    def quantize_blocks(cls: Any, array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        return blocks.quantize(array, info.name)

    def dequantize_blocks(cls: Any, array: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return blocks.dequantize(array, info.name, (len(array), BLOCK))

    # Rows without values: for every type with blocks, gguf would divide by 0.

    def quantize(cls: Any, array: Any) -> Any:
        return np.empty(array.shape, np.uint8) if _has_no_columns(array) else base.quantize.__func__(cls, array)

    def dequantize(cls: Any, array: Any) -> Any:
        return np.empty(array.shape, np.float32) if _has_no_columns(array) else base.dequantize.__func__(cls, array)

    functions = (quantize_blocks, dequantize_blocks, quantize, dequantize)
    body = {"__module__": __name__, **{function.__name__: classmethod(function) for function in functions}}
    new_class(
        info.name.upper(), (base,), {"qtype": member}, lambda space: space.update(body)
    )  # gguf registers the class


def _has_no_columns(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.shape[-1:] == (0,)


register()
