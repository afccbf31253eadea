# SPDX-License-Identifier: MIT
"""The names of --kv-cache-dtype, and the bytes of a slot.  Needs neither torch nor vLLM."""

import itertools
from typing import NamedTuple

from tbq.errors import TBQError

#: Head sizes that the kernels take.
HEAD_SIZES = (64, 128, 192, 256)


class Bits(NamedTuple):
    """Bits of the keys' type and of the values'."""

    k: int
    v: int

    def slot_bytes(self, head_size: int, head_size_v: int | None = None) -> int:
        """Bytes of a token in one KV head: the blocks of its key, then those of its value."""
        return head_size // 64 * (2 + 8 * self.k) + (head_size_v or head_size) // 64 * (2 + 8 * self.v)


def _name(k: int, v: int) -> str:
    return f"tbq{k}" if k == v else f"tbq{k}_tbq{v}"


#: By name, tbq4 or, with another type for values, tbq4_tbq3: the bits.
DTYPES = {_name(k, v): Bits(k, v) for k, v in itertools.product((4, 3, 2), repeat=2)}


def bits_of(name: str) -> Bits:
    """Raises TBQError for a name that is none of DTYPES."""
    if name not in DTYPES:
        raise TBQError(f"--kv-cache-dtype {name} is not one of tbq's: {', '.join(DTYPES)}")
    return DTYPES[name]
