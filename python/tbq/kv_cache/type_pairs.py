# SPDX-License-Identifier: MIT
"""Pairs of cache types, and the bytes that a token takes in a cache."""

import dataclasses
from collections.abc import Sequence

from tbq._types import block_size, types
from tbq.errors import TBQError
from tbq.programs import output
from tbq.programs.paths import program
from tbq.programs.process import run

#: The number of values in a token's K and in its V tensor, layer by layer.
Cache = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class TypePair:
    """The types of keys and values: TypePair("tbq4_0", "tbq3_0")."""

    k: str
    v: str
    centered: bool = False  #: keys are stored minus their means
    exact: bool = False  #: the newest and the first rows are kept in 8 bits as well

    def __str__(self) -> str:
        types = self.k if self.k == self.v else f"{self.k}/{self.v}"
        return types + " centered" * self.centered + " exact" * self.exact

    @property
    def may_be_centered(self) -> bool:
        """Whether centering changes anything.  Keys of 16 bits and more are exact enough without it."""
        return self.k not in ("f32", "f16", "bf16")

    @property
    def has_tbq(self) -> bool:
        """Whether the type of K or of V is a tbq type."""
        return self.k in types or self.v in types

    @property
    def bits(self) -> tuple[float, float]:
        """Bits per value of K and of V, scales included."""
        (k_values, k_bytes), (v_values, v_bytes) = block_size(self.k), block_size(self.v)
        return 8 * k_bytes / k_values, 8 * v_bytes / v_values

    def bytes(self, cache: Cache) -> int:
        """Bytes of one token in all layers."""
        (k_values, k_bytes), (v_values, v_bytes) = block_size(self.k), block_size(self.v)
        return sum(k // k_values * k_bytes + v // v_values * v_bytes for k, v in cache)


def cache_types() -> list[str]:
    """The cache types that this llama.cpp takes, in the order of its help."""
    done = run("llama-perplexity", ["--help"])
    if not (found := output.cache_types(done.stdout)):
        raise TBQError(f"{program('llama-perplexity')} --help names no cache types; is it the patched one?")
    return found


def split_pair(text: str) -> tuple[str, str]:
    """("tbq4_0", "tbq3_0") for "tbq4_0/tbq3_0"; a single name is for K and V."""
    k, slash, v = text.partition("/")
    return k, v if slash else k


def parse_pairs(text: str) -> list[TypePair]:
    """The pairs of a list such as "f16,tbq4_0/tbq3_0": K/V, or one name for both.  TBQError for an unknown type."""
    names, pairs = cache_types(), []
    for part in filter(None, text.split(",")):
        pair = TypePair(*split_pair(part))
        for name in (pair.k, pair.v):
            if name not in names:
                raise TBQError(
                    f"cache type {name!r} is not one of {', '.join(names)}; a pair is K/V, as in tbq4_0/tbq3_0"
                )
        pairs.append(pair)
    if not pairs:
        raise TBQError("no cache types; f16,tbq4_0 would compare two")
    return list(dict.fromkeys(pairs))
