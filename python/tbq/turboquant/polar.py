# SPDX-License-Identifier: MIT
"""PolarQuant (arXiv 2502.02617): polar coordinates of pairs of values, of pairs of radii, and so on, quantized."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import (
    Bytes,
    Floats,
    as_floats,
    as_vectors,
    check_integer,
    check_lengths,
    check_seed,
    slices,
)
from tbq.turboquant.codebooks import angle_codebook
from tbq.turboquant.packing import pack_unchecked, packed_bytes, unpack
from tbq.turboquant.rotations import Rotation, find_rotation

__all__ = ["PolarCode", "PolarQuantizer", "from_polar", "to_polar"]


def to_polar(x: npt.ArrayLike, levels: SupportsIndex) -> tuple[Floats, tuple[Floats, ...]]:
    """Computes the recursive polar transform.

    Level 1 turns each pair of neighboring values into a radius and an angle from 0 to 2 pi.  Level 2 turns each pair of
    radii into a radius and an angle from 0 to pi/2.  Further levels are like level 2.
    x: float32 or float64 of shape (..., n); n must be a multiple of 2**levels.  levels: 1 to 30.
    Returns (radii (..., n / 2**levels), angles), angles[l - 1] of shape (..., n / 2**l), in radians.
    All have the dtype of x.
    Raises TBQError for another dtype, n or levels, an empty axis, NaN, infinity, and radii too large for the dtype.
    """
    depth = check_integer(levels, "levels", 1, 30)
    radii = as_floats(x, "x")
    if radii.shape[-1] % 2**depth:
        raise TBQError(f"x has shape {radii.shape}; its last axis must be a multiple of {2**depth} for {depth} levels")
    with np.errstate(over="ignore"):
        result, angles = _to_polar(radii, depth)
    if not np.isfinite(result).all():
        raise TBQError(f"x has a radius beyond the largest {radii.dtype}")
    return result, angles


def from_polar(radii: npt.ArrayLike, angles: Iterable[npt.ArrayLike]) -> Floats:
    """Inverts to_polar, up to rounding.

    radii: float32 or float64 of shape (..., m).  angles: from level 1 on, as to_polar returns them; at least one level.
    Returns an array of shape (..., m * 2**levels) in the dtype of radii.
    Raises TBQError for other shapes or dtypes, an empty axis, NaN and infinity.
    """
    result = as_floats(radii, "radii")
    steps = [as_floats(angle, f"angles[{i}]") for i, angle in enumerate(angles)]
    if not steps:
        raise TBQError("angles is empty; to_polar returns those of at least one level")
    for i, angle in reversed(list(enumerate(steps))):
        expected = (*result.shape[:-1], result.shape[-1] * 2 ** (len(steps) - 1 - i))
        if angle.shape != expected or angle.dtype != result.dtype:
            raise TBQError(
                f"angles[{i}] is {angle.dtype} {angle.shape}; with these radii it must be {result.dtype} {expected}"
            )
    return _from_polar(result, steps)


@dataclasses.dataclass(frozen=True, eq=False)
class PolarCode:
    """The code of vectors (..., dim).

    angles: packed, uint8, for each level.  radii: (..., dim / 2**levels) in the dtype of the vectors.
    """

    angles: tuple[Bytes, ...]
    radii: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the vectors, without their last axis."""
        return self.radii.shape[:-1]

    @property
    def nbytes(self) -> int:
        return self.radii.nbytes + sum(angle.nbytes for angle in self.angles)


class PolarQuantizer:
    """PolarQuant: rotates, then quantizes the angles of the polar transform, each level with its own optimal codebook.

    Instead of a norm it stores one radius for every 2**levels values, unquantized.  The mean of
    |x - dequantize(quantize(x))|^2 over seeds is polar_distortion(bits) * |x|^2.
    dim: a multiple of 2**levels.
    bits: the bits of an angle for each level, from level 1 on, 1 to 8.  The paper has (4, 2, 2, 2); with radii of 16
    bits that is 3.875 bits a value.
    seed, rotation: as in MSEQuantizer.
    Raises TBQError for other values.
    """

    def __init__(
        self,
        dim: SupportsIndex,
        bits: Iterable[SupportsIndex] = (4, 2, 2, 2),
        *,
        seed: SupportsIndex = 0,
        rotation: Rotation | str = "haar",
    ) -> None:
        self.dim, self.seed = check_integer(dim, "dim", 2), check_seed(seed)
        self.bits = check_level_bits(bits)
        if self.dim % 2 ** len(self.bits):
            raise TBQError(
                f"dim is {self.dim}; it must be a multiple of {2 ** len(self.bits)} for {len(self.bits)} levels of bits"
            )
        self.rotation = find_rotation(rotation, self.dim, self.seed)
        self.codebooks = tuple(angle_codebook(b, level) for level, b in enumerate(self.bits, 1))

    def quantize(self, x: npt.ArrayLike) -> PolarCode:
        """x: float32 or float64 of shape (..., dim), vectors of any length.

        Raises TBQError for another dtype or last axis, an empty axis, NaN, infinity, and radii too large for the dtype.
        """
        array = as_vectors(x, self.dim)
        rows, shape = array.reshape(-1, self.dim), array.shape[:-1]
        radii = np.empty((len(rows), self.dim >> len(self.bits)), array.dtype)
        packed = [np.empty((len(rows), width), np.uint8) for width in self._packed_widths()]
        for part in slices(len(rows), self.dim):
            with np.errstate(over="ignore", invalid="ignore"):
                radii[part], angles = _to_polar(self.rotation.forward(rows[part]), len(self.bits))
            for into, angle, codebook, bits in zip(packed, angles, self.codebooks, self.bits):
                into[part] = pack_unchecked(codebook.nearest(angle), bits)
        if not np.isfinite(radii).all():
            raise TBQError(f"x has a radius beyond the largest {array.dtype}")
        return PolarCode(tuple(each.reshape(*shape, -1) for each in packed), radii.reshape(*shape, -1))

    def dequantize(self, code: PolarCode) -> Floats:
        """The vectors of a code, (..., dim), in the dtype that was quantized.

        Raises TBQError for a code that this quantizer cannot have made.
        """
        radii = self._check(code)
        result = np.empty((math.prod(code.shape), self.dim), radii.dtype)
        for part, rotated in self._rotated(code):
            result[part] = self.rotation.backward(rotated)
        return result.reshape(*code.shape, self.dim)

    def inner_products(self, queries: npt.ArrayLike, code: PolarCode) -> Floats:
        """Returns <query, vector> for each query and each vector of a code.  Only queries are rotated.

        queries: float32 or float64 of shape (..., dim).
        Returns an array of shape (queries' leading axes, code's axes), in the wider of the two dtypes.
        Raises TBQError for queries as quantize does for x, for a code as dequantize does.
        """
        radii = self._check(code)
        array = as_vectors(queries, self.dim, "queries")
        rows = self.rotation.forward(array.reshape(-1, self.dim))
        result = np.empty((len(rows), math.prod(code.shape)), np.result_type(array, radii))
        for part, rotated in self._rotated(code):
            result[:, part] = rows @ rotated.T
        return result.reshape((*array.shape[:-1], *code.shape))

    def _rotated(self, code: PolarCode) -> Iterator[tuple[slice, Floats]]:
        """Yields slices of a code's vectors, with these vectors in the rotated domain: (n, dim)."""
        rows = code.radii.reshape(-1, code.radii.shape[-1])
        packed = [angle.reshape(len(rows), -1) for angle in code.angles]
        for part in slices(len(rows), self.dim):
            angles = [
                codebook.levels.astype(rows.dtype)[unpack(each[part], bits, self.dim >> level)]
                for level, (each, codebook, bits) in enumerate(zip(packed, self.codebooks, self.bits), 1)
            ]
            yield part, _from_polar(rows[part], angles)

    def _packed_widths(self) -> list[int]:
        return [packed_bytes(self.dim >> level, bits) for level, bits in enumerate(self.bits, 1)]

    def _check(self, code: PolarCode) -> Floats:
        if not isinstance(code, PolarCode):
            raise TBQError(f"code is a {type(code).__name__}; it must be a PolarCode")
        radii = check_lengths(code.radii, "code.radii")
        if not radii.ndim or radii.shape[-1] != self.dim >> len(self.bits):
            raise TBQError(f"code.radii has shape {radii.shape}; its last axis must be {self.dim >> len(self.bits)}")
        expected = [(*radii.shape[:-1], width) for width in self._packed_widths()]
        found = [
            angle.shape if isinstance(angle, np.ndarray) and angle.dtype == np.uint8 else None for angle in code.angles
        ]
        if found != expected:
            raise TBQError(f"code.angles has shapes {found}; they must be of uint8 and {expected}")
        return radii


def check_level_bits(bits: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Checks the bits of each level."""
    if not isinstance(bits, Iterable):
        raise TBQError(f"bits is {bits!r}; it must be a list with the bits of each level, such as (4, 2, 2, 2)")
    result = tuple(check_integer(b, f"bits[{i}]", 1, 8) for i, b in enumerate(bits))
    if not 1 <= len(result) <= 30:
        raise TBQError(f"bits has {len(result)} levels; it must have 1 to 30")
    return result


def _to_polar(radii: Floats, depth: int) -> tuple[Floats, tuple[Floats, ...]]:
    angles = []
    for level in range(depth):
        first, second = radii[..., 0::2], radii[..., 1::2]
        angle = np.arctan2(second, first)
        if level == 0:
            angle = np.where(angle < 0, angle + radii.dtype.type(2 * math.pi), angle)
        angles.append(angle)
        radii = np.hypot(first, second)
    return radii, tuple(angles)


def _from_polar(radii: Floats, angles: Iterable[Floats]) -> Floats:
    for angle in reversed(list(angles)):
        pairs = np.empty((*angle.shape, 2), radii.dtype)
        pairs[..., 0], pairs[..., 1] = radii * np.cos(angle), radii * np.sin(angle)
        radii = pairs.reshape(*angle.shape[:-1], -1)
    return radii
