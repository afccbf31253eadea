# SPDX-License-Identifier: MIT
"""Pairs of cache types, and what one token takes in a model's cache."""

import dataclasses
from collections.abc import Sequence

from tbq._types import block_size, types
from tbq.errors import TBQError
from tbq.programs import output
from tbq.programs.paths import program
from tbq.programs.process import run

#: Values of a token's keys and of its values, layer by layer.
Cache = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class TypePair:
    """The types of keys and values: TypePair("tbq4_0", "tbq3_0")."""

    k: str
    v: str
    centered: bool = False  #: keys are stored less their means (tbq.center)

    def __str__(self) -> str:
        return (self.k if self.k == self.v else f"{self.k}/{self.v}") + (" centered" if self.centered else "")

    @property
    def may_be_centered(self) -> bool:
        """Whether centering changes anything: keys of 16 bits and more are exact without it."""
        return self.k not in ("f32", "f16", "bf16")

    @property
    def ours(self) -> bool:
        """Whether a side is a tbq type."""
        return self.k in types or self.v in types

    @property
    def bits(self) -> tuple[float, float]:
        """Bits of a value of the keys, and of the values; scales included."""
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
    """("tbq4_0", "tbq3_0") of "tbq4_0/tbq3_0"; one name is for both sides."""
    k, slash, v = text.partition("/")
    return k, v if slash else k


def parse_pairs(text: str) -> list[TypePair]:
    """The pairs of "f16,tbq4_0/tbq3_0": keys / values, one name for both; TBQError for an unknown type."""
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
