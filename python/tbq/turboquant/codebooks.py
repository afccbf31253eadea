# SPDX-License-Identifier: MIT
"""Lloyd-Max codebooks for the standard Gaussian, a coordinate of a random point on the sphere, and PolarQuant's angles.

In an optimal quantizer, the levels are the means of their cells, and the borders of the cells are the midpoints between
levels (Lloyd 1982, Max 1960).  Lloyd's iteration is slow with many levels.  So it only starts Newton's method, which
converges to the rounding of float64.  Integrals are computed with Gauss-Legendre nodes in each cell, which keeps the
relative precision in the tails.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import Bytes, Floats, as_floats, check_integer

__all__ = ["Codebook", "angle_codebook", "angle_density", "gaussian_codebook", "sphere_codebook", "sphere_density"]

Vector = npt.NDArray[np.float64]

#: Gauss-Legendre nodes and weights on -1..1.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(96)
_CUT = 12.0  #: standard deviations; the probability beyond is about exp(-72), far below float64's rounding


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """A scalar quantizer.

    levels: float64 (2**bits,), ascending.  thresholds: float64 (2**bits - 1,), the midpoints.
    distortion: E (X - Q(X))^2.  entropy: that of the index, in bits; an entropy coder would need so many.
    """

    levels: Vector
    thresholds: Vector
    distortion: float
    entropy: float

    def encode(self, values: npt.ArrayLike) -> Bytes:
        """Returns the index of the level nearest to each value, the lower one at a tie: uint8, the same shape.

        values: float32 or float64, finite, with at least one axis, none of them empty.
        Raises TBQError for other values.
        """
        return self.nearest(as_floats(values, "values"))

    def nearest(self, values: Floats) -> Bytes:
        """encode() without checks."""
        return np.searchsorted(self.thresholds.astype(values.dtype), values).astype(np.uint8)

    def decode(self, indices: npt.ArrayLike) -> Vector:
        """Returns the level of each index, the same shape.

        Raises TBQError for anything but integers from 0 to 2**bits - 1.
        """
        array = np.asarray(indices)
        if not np.issubdtype(array.dtype, np.integer):
            raise TBQError(f"indices have dtype {array.dtype}; they must be integers")
        if array.size and not (0 <= array.min() and array.max() < len(self.levels)):
            raise TBQError(
                f"indices reach from {array.min()} to {array.max()}; the codebook has 0 to {len(self.levels) - 1}"
            )
        found: Vector = self.levels[array]
        return found


def gaussian_codebook(bits: SupportsIndex) -> Codebook:
    """The optimal quantizer of N(0, 1) with 2**bits levels.  bits: 0 to 8.  Raises TBQError for other values."""
    return _gaussian(check_integer(bits, "bits", 0, 8))


def sphere_codebook(bits: SupportsIndex, dim: SupportsIndex) -> Codebook:
    """The optimal quantizer of one coordinate of a uniformly random unit vector with dim values; see sphere_density.

    dim * distortion is the mean squared error of a unit vector.
    bits: 0 to 8.  dim: 1 or more.  Raises TBQError for other values.
    """
    return _sphere(check_integer(bits, "bits", 0, 8), check_integer(dim, "dim", 1))


def angle_codebook(bits: SupportsIndex, level: SupportsIndex) -> Codebook:
    """The optimal quantizer of an angle of the polar transform; see angle_density.

    On level 1, the density is that of a circle, so the codebook's levels are evenly spaced.
    bits: 0 to 8.  level: 1 for angles between values, 2 between radii of pairs, and so on, up to 30.
    Raises TBQError for other values.
    """
    return _angle(check_integer(bits, "bits", 0, 8), check_integer(level, "level", 1, 30))


def sphere_density(x: npt.ArrayLike, dim: SupportsIndex) -> Vector:
    """Density at x of one coordinate of a uniformly random unit vector with dim values (TurboQuant, Lemma 1).

    It is Gamma(d/2) / (sqrt(pi) Gamma((d-1)/2)) (1 - x^2)^((d-3)/2) within -1..1, a scaled Beta density, and 0 outside.
    x: real, any shape.  dim: 2 or more.  Returns float64 of the shape of x.  Raises TBQError for another dim.
    """
    d = check_integer(dim, "dim", 2)
    at = np.asarray(x, np.float64)
    constant = math.lgamma(d / 2) - math.lgamma((d - 1) / 2) - math.log(math.pi) / 2
    inside = np.abs(at) < 1
    rest = np.where(inside, 1 - at * at, 1)
    return np.where(inside, np.exp(constant + (d - 3) / 2 * np.log(rest)), 0)


def angle_density(angle: npt.ArrayLike, level: SupportsIndex) -> Vector:
    """Density of an angle in the polar transform of a random direction, or of a Gaussian vector (PolarQuant).

    Level 1: 1 / (2 pi) on 0..2 pi.  Level l >= 2: proportional to sin(2 psi)^(2^(l-1) - 1) on 0..pi/2.  0 outside.
    angle: radians, any shape.  level: 1 to 30.  Returns float64 of the shape of angle.
    Raises TBQError for another level.
    """
    l = check_integer(level, "level", 1, 30)
    at = np.asarray(angle, np.float64)
    if l == 1:
        return np.where((at >= 0) & (at <= 2 * math.pi), 1 / (2 * math.pi), 0)
    half = 2.0 ** (l - 2)  # half of the values that make up one radius
    constant = math.lgamma(2 * half) - 2 * math.lgamma(half) - (2 * half - 2) * math.log(2)
    inside = (at > 0) & (at < math.pi / 2)
    sine = np.where(inside, np.sin(2 * at), 1)
    return np.where(inside, np.exp(constant + (2 * half - 1) * np.log(sine)), 0)


# --- the solver -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Density:
    """A symmetric density of x, as a function of a parameter u in which it is smooth up to both ends."""

    end: float  #: u is within -end..end
    log_weight: Callable[[Vector], Vector]  #: logarithm of the density of u, up to a constant
    value: Callable[[Vector], Vector]  #: x as a function of u, odd and ascending
    parameter: Callable[[Vector], Vector]  #: u as a function of x
    slope: Callable[[Vector], Vector]  #: dx/du

    def cells(self, thresholds: Vector) -> tuple[Vector, Vector, Vector]:
        """Returns (weights, u, x) of the nodes, each (cells, nodes).  All weights together sum to 1."""
        borders = np.concatenate([[-self.end], np.clip(self.parameter(thresholds), -self.end, self.end), [self.end]])
        half = np.diff(borders)[:, None] / 2
        u = (borders[1:] + borders[:-1])[:, None] / 2 + half * NODES
        weights = half * WEIGHTS * np.exp(self.log_weight(u))
        return weights / self.mass, u, self.value(u)

    @functools.cached_property
    def mass(self) -> float:
        pieces = np.linspace(-self.end, self.end, 9)
        half = np.diff(pieces)[:, None] / 2
        u = (pieces[1:] + pieces[:-1])[:, None] / 2 + half * NODES
        return float((half * WEIGHTS * np.exp(self.log_weight(u))).sum())

    def density(self, x: Vector) -> Vector:
        u = self.parameter(x)
        return np.exp(self.log_weight(u)) / self.slope(u) / self.mass


def _identity(u: Vector) -> Vector:
    return u


def _ones(u: Vector) -> Vector:
    return np.ones_like(u)


def _cosine_power(power: float) -> tuple[float, Callable[[Vector], Vector]]:
    """Returns (end, logarithm) of the weight cos(u)^power within -pi/2..pi/2, cut where float64 rounds it to 0."""
    if power == 0:
        return math.pi / 2, np.zeros_like
    # arccos(exp(-e)) = arcsin(sqrt(1 - exp(-2 e))), without the cancellation at small e
    end = math.asin(math.sqrt(-math.expm1(-_CUT * _CUT / power)))
    return end, lambda u: power / 2 * np.log1p(-(np.sin(u) ** 2))  # log(cos(u)) would be inexact for a small u


@functools.cache
def _gaussian(bits: int) -> Codebook:
    return _solve(_Density(_CUT, lambda u: -u * u / 2, _identity, _identity, _ones), bits)


@functools.lru_cache(maxsize=256)
def _sphere(bits: int, dim: int) -> Codebook:
    if dim == 1:  # the sphere is the two points -1 and 1
        levels = np.linspace(-1, 1, 2**bits) if bits else np.zeros(1)
        return _make_codebook(levels, 0.0 if bits else 1.0, 1.0 if bits else 0.0)
    end, log_weight = _cosine_power(dim - 2)  # x = sin(u)
    return _solve(_Density(end, log_weight, np.sin, np.arcsin, np.cos), bits)


@functools.lru_cache(maxsize=256)
def _angle(bits: int, level: int) -> Codebook:
    if level == 1:
        step = 2 * math.pi / 2**bits
        return _make_codebook((np.arange(2**bits) + 0.5) * step, step * step / 12, float(bits))
    found = _solve(_centered_angle_density(level), bits)
    return _make_codebook(found.levels + math.pi / 4, found.distortion, found.entropy)


def _centered_angle_density(level: int) -> _Density:
    """Returns the density of the angle minus pi/4.  level: 2 or more."""
    end, log_weight = _cosine_power(2.0 ** (level - 1) - 1)  # as a function of u = 2 psi - pi/2
    return _Density(end, log_weight, lambda u: u / 2, lambda x: 2 * x, lambda u: np.full_like(u, 0.5))


def angle_nodes(bits: int, level: int) -> tuple[Vector, Vector]:
    """Returns (weights, angles) for integrals over the density of an angle, with a row for each cell of its codebook.

    The weights sum to 1.
    """
    codebook = angle_codebook(bits, level)
    if level == 1:
        half = math.pi / 2**bits
        return np.tile(WEIGHTS / 2 / 2**bits, (2**bits, 1)), codebook.levels[:, None] + half * NODES
    weights, _, x = _centered_angle_density(level).cells(codebook.thresholds - math.pi / 4)
    return weights, x + math.pi / 4


def _make_codebook(levels: Vector, distortion: float, entropy: float) -> Codebook:
    thresholds = (levels[1:] + levels[:-1]) / 2
    for array in (levels, thresholds):
        array.setflags(write=False)
    return Codebook(levels, thresholds, distortion, entropy)


def _solve(source: _Density, bits: int) -> Codebook:
    """Returns the Lloyd-Max codebook of a symmetric density, exact up to the rounding of float64."""
    levels = _initial_levels(source, 2**bits)
    for _ in range(30):
        weights, _, x = source.cells(_midpoints(levels))
        levels = _symmetrize((weights * x).sum(1) / weights.sum(1))
    previous, largest = math.inf, float(source.value(np.array(source.end)))
    for _ in range(60):
        step = _newton_step(source, levels)
        size = float(np.abs(step).max())
        if previous <= size < 1e-12 * largest or size == 0:
            break  # steps no longer become smaller: only rounding remains
        new = _symmetrize(levels - step)
        if (
            np.any(np.diff(new) <= 0) or new[-1] > largest
        ):  # the step was too large: a step of Lloyd's iteration instead
            weights, _, x = source.cells(_midpoints(levels))
            new, size = _symmetrize((weights * x).sum(1) / weights.sum(1)), math.inf
        levels, previous = new, size
    else:
        raise TBQError(f"the codebook of {bits} bits did not converge")
    weights, _, x = source.cells(_midpoints(levels))
    chances = weights.sum(1)
    return _make_codebook(
        levels, float((weights * (x - levels[:, None]) ** 2).sum()), float(-(chances * np.log2(chances)).sum())
    )


def _newton_step(source: _Density, levels: Vector) -> Vector:
    """Returns Newton's step for the equations level * probability = first moment, half the distortion's gradient."""
    thresholds = _midpoints(levels)
    weights, _, x = source.cells(thresholds)
    # The residual is computed directly: at the solution, a difference of two sums would be only their rounding.
    residual = (weights * (levels[:, None] - x)).sum(1)
    # A threshold moves half as far as one of its levels.  Then the cells exchange density * (half a gap).
    coupling = source.density(thresholds) * np.diff(levels) / 4
    diagonal = weights.sum(1) - np.append(coupling, 0) - np.insert(coupling, 0, 0)
    return _solve_tridiagonal(diagonal.tolist(), (-coupling).tolist(), residual.tolist())


def _solve_tridiagonal(diagonal: list[float], off_diagonal: list[float], right: list[float]) -> Vector:
    """Solves a symmetric tridiagonal system by elimination."""
    for i, element in enumerate(off_diagonal):
        factor = element / diagonal[i]
        diagonal[i + 1] -= factor * element
        right[i + 1] -= factor * right[i]
    right[-1] /= diagonal[-1]
    for i in range(len(off_diagonal) - 1, -1, -1):
        right[i] = (right[i] - off_diagonal[i] * right[i + 1]) / diagonal[i]
    return np.array(right)


def _initial_levels(source: _Density, count: int) -> Vector:
    """Returns levels to start with: quantiles of the density to the power 1/3 (Panter and Dite 1951)."""
    u = np.linspace(-source.end, source.end, 20001)[1:-1]
    x = source.value(u)
    root = np.exp(source.log_weight(u) / 3) * source.slope(u) ** (2 / 3)
    total = np.cumsum(root)
    found: Vector = np.interp((np.arange(count) + 0.5) / count * total[-1], total, x)
    return _symmetrize(found)


def _midpoints(levels: Vector) -> Vector:
    return (levels[1:] + levels[:-1]) / 2


def _symmetrize(levels: Vector) -> Vector:
    """Makes levels exactly symmetric about 0, as the density is."""
    return (levels - levels[::-1]) / 2
