# SPDX-License-Identifier: MIT
"""The quantized types and their properties."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tbq._ffi import ffi, lib
from tbq.errors import TBQError

#: Values per block; the last axis of an array is a multiple of it.
BLOCK = lib.TBQ_BLOCK


@dataclass(frozen=True)
class TypeInfo:
    """What the library knows about a type."""

    name: str  #: "tbq4_0"
    id: int  #: GGML type number
    bits: int  #: bits of an index
    bits_per_value: float  #: storage, the scale included
    block_bytes: int  #: bytes of a block of 64 values
    levels: tuple[int, ...]  #: the integer codebook, ascending


def _load(name: str) -> TypeInfo:
    info = lib.tbq_find_type(name.encode())
    return TypeInfo(
        name=ffi.string(info.name).decode(),
        id=int(info.type),
        bits=info.bits,
        bits_per_value=8 * info.block_bytes / info.block,
        block_bytes=info.block_bytes,
        levels=tuple(info.levels[0 : 2**info.bits]),
    )


#: Every type that stores values, by name.
types: Mapping[str, TypeInfo] = MappingProxyType({name: _load(name) for name in ("tbq2_0", "tbq3_0", "tbq4_0")})


def block_size(name: str) -> tuple[int, int]:
    """Values and bytes of a block of a GGML type, a tbq type or one of gguf's; KeyError for an unknown name."""
    if name in types:
        return BLOCK, types[name].block_bytes
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]


def find(name: str) -> TypeInfo:
    """The TypeInfo of a tbq type; TBQError for another name."""
    info = types.get(name) if isinstance(name, str) else None
    if info is None:
        raise TBQError(f"type {name!r} is not one of {', '.join(types)}")
    return info
