# SPDX-License-Identifier: MIT
"""Lloyd-Max codebooks: of the standard Gaussian, of a coordinate of a random point on the sphere, of PolarQuant's angles.

The levels of an optimal quantizer are the means of their cells, the borders of the cells the midpoints between levels
(Lloyd 1982, Max 1960).  Lloyd's iteration crawls where levels are many, so it only starts Newton's method, which ends at
the rounding of float64.  Integrals are by Gauss-Legendre within each cell, which keeps the relative precision of tails.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import Bytes, Floats, floats, integer

__all__ = ["Codebook", "angle_codebook", "angle_density", "gaussian_codebook", "sphere_codebook", "sphere_density"]

Vector = npt.NDArray[np.float64]

#: Of Gauss and Legendre, on -1..1.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(96)
_CUT = 12.0  #: standard deviations: exp(-72) of the mass is beyond, far below float64's rounding


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """A scalar quantizer.

    levels: float64 (2**bits,), ascending.  thresholds: float64 (2**bits - 1,), the midpoints.  distortion: E (X - Q(X))^2.
    entropy: of the index, in bits: what an entropy coder would come to.
    """

    levels: Vector
    thresholds: Vector
    distortion: float
    entropy: float

    def encode(self, values: npt.ArrayLike) -> Bytes:
        """Index of the nearest level to each value, the lower one at a tie: uint8, the same shape.

        values: float32 or float64, of one axis or more, none empty, finite.  Raises TBQError for others.
        """
        return self.nearest(floats(values, "values"))

    def nearest(self, values: Floats) -> Bytes:
        """encode, of values that were checked."""
        return np.searchsorted(self.thresholds.astype(values.dtype), values).astype(np.uint8)

    def decode(self, indices: npt.ArrayLike) -> Vector:
        """Level of each index, the same shape; TBQError for what is no integer of 0 to 2**bits - 1."""
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
    """The optimal quantizer of N(0, 1) with 2**bits levels, bits 0 to 8; TBQError for other bits."""
    return _gaussian(integer(bits, "bits", 0, 8))


def sphere_codebook(bits: SupportsIndex, dim: SupportsIndex) -> Codebook:
    """The optimal quantizer of one coordinate of a uniformly random unit vector with dim values; see sphere_density.

    bits: 0 to 8.  dim: 1 or more.  dim * distortion is the mean squared error of a unit vector.  Raises TBQError for others.
    """
    return _sphere(integer(bits, "bits", 0, 8), integer(dim, "dim", 1))


def angle_codebook(bits: SupportsIndex, level: SupportsIndex) -> Codebook:
    """The optimal quantizer of an angle of the polar transform; see angle_density.

    bits: 0 to 8.  level: 1 for angles between values, 2 between radii of pairs, and so on, up to 30.
    On level 1, where the density is that of a circle, the levels are evenly spaced.  Raises TBQError for others.
    """
    return _angle(integer(bits, "bits", 0, 8), integer(level, "level", 1, 30))


def sphere_density(x: npt.ArrayLike, dim: SupportsIndex) -> Vector:
    """Density at x of one coordinate of a uniformly random unit vector with dim values (TurboQuant, Lemma 1).

    Gamma(d/2) / (sqrt(pi) Gamma((d-1)/2)) (1 - x^2)^((d-3)/2) within -1..1, a Beta density on a longer interval; 0 outside.
    x: real, any shape.  dim: 2 or more.  Returns float64 of the shape of x.  Raises TBQError for another dim.
    """
    d = integer(dim, "dim", 2)
    at = np.asarray(x, np.float64)
    constant = math.lgamma(d / 2) - math.lgamma((d - 1) / 2) - math.log(math.pi) / 2
    inside = np.abs(at) < 1
    rest = np.where(inside, 1 - at * at, 1)
    return np.where(inside, np.exp(constant + (d - 3) / 2 * np.log(rest)), 0)


def angle_density(angle: npt.ArrayLike, level: SupportsIndex) -> Vector:
    """Density of an angle of the polar transform of a random direction or of a Gaussian vector (PolarQuant).

    Level 1: 1 / (2 pi) on 0..2 pi.  Level l >= 2: proportional to sin(2 psi)^(2^(l-1) - 1) on 0..pi/2.  0 outside.
    angle: radians, any shape.  level: 1 to 30.  Returns float64 of the shape of angle.  Raises TBQError for another level.
    """
    l = integer(level, "level", 1, 30)
    at = np.asarray(angle, np.float64)
    if l == 1:
        return np.where((at >= 0) & (at <= 2 * math.pi), 1 / (2 * math.pi), 0)
    half = 2.0 ** (l - 2)  # half the values below one radius
    constant = math.lgamma(2 * half) - 2 * math.lgamma(half) - (2 * half - 2) * math.log(2)
    inside = (at > 0) & (at < math.pi / 2)
    sine = np.where(inside, np.sin(2 * at), 1)
    return np.where(inside, np.exp(constant + (2 * half - 1) * np.log(sine)), 0)


# --- the solver -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Source:
    """A symmetric density, in a parameter u in which it is smooth up to both ends."""

    end: float  #: u lies within -end..end
    log_weight: Callable[[Vector], Vector]  #: of u, up to a constant
    value: Callable[[Vector], Vector]  #: x of u, odd and ascending
    parameter: Callable[[Vector], Vector]  #: u of x
    slope: Callable[[Vector], Vector]  #: dx/du

    def cells(self, thresholds: Vector) -> tuple[Vector, Vector, Vector]:
        """(weights, u, x) of the nodes of each cell, (cells, nodes); the weights of all sum to 1."""
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
    """(end, logarithm) of the weight cos(u)^power within -pi/2..pi/2, cut where it vanishes in float64."""
    if power == 0:
        return math.pi / 2, np.zeros_like
    # arccos(exp(-e)) = arcsin(sqrt(1 - exp(-2 e))), without the cancellation at small e
    end = math.asin(math.sqrt(-math.expm1(-_CUT * _CUT / power)))
    return end, lambda u: power / 2 * np.log1p(-(np.sin(u) ** 2))  # log(cos(u)) would lose the digits of a small u


@functools.cache
def _gaussian(bits: int) -> Codebook:
    return _solve(_Source(_CUT, lambda u: -u * u / 2, _identity, _identity, _ones), bits)


@functools.lru_cache(maxsize=256)
def _sphere(bits: int, dim: int) -> Codebook:
    if dim == 1:  # the sphere is -1 and 1
        levels = np.linspace(-1, 1, 2**bits) if bits else np.zeros(1)
        return _frozen(levels, 0.0 if bits else 1.0, 1.0 if bits else 0.0)
    end, log_weight = _cosine_power(dim - 2)  # x = sin(u)
    return _solve(_Source(end, log_weight, np.sin, np.arcsin, np.cos), bits)


@functools.lru_cache(maxsize=256)
def _angle(bits: int, level: int) -> Codebook:
    if level == 1:
        step = 2 * math.pi / 2**bits
        return _frozen((np.arange(2**bits) + 0.5) * step, step * step / 12, float(bits))
    found = _solve(_angle_source(level), bits)
    return _frozen(found.levels + math.pi / 4, found.distortion, found.entropy)


def _angle_source(level: int) -> _Source:
    """Of the angle less pi/4, level 2 or more."""
    end, log_weight = _cosine_power(2.0 ** (level - 1) - 1)  # of u = 2 psi - pi/2
    return _Source(end, log_weight, lambda u: u / 2, lambda x: 2 * x, lambda u: np.full_like(u, 0.5))


def angle_nodes(bits: int, level: int) -> tuple[Vector, Vector]:
    """(weights, angles) for integrals over the density of an angle, a row for each cell of its codebook; the weights sum to 1."""
    codebook = angle_codebook(bits, level)
    if level == 1:
        half = math.pi / 2**bits
        return np.tile(WEIGHTS / 2 / 2**bits, (2**bits, 1)), codebook.levels[:, None] + half * NODES
    weights, _, x = _angle_source(level).cells(codebook.thresholds - math.pi / 4)
    return weights, x + math.pi / 4


def _frozen(levels: Vector, distortion: float, entropy: float) -> Codebook:
    thresholds = (levels[1:] + levels[:-1]) / 2
    for array in (levels, thresholds):
        array.setflags(write=False)
    return Codebook(levels, thresholds, distortion, entropy)


def _solve(source: _Source, bits: int) -> Codebook:
    """Lloyd-Max for a symmetric density, to the rounding of float64."""
    levels = _companded(source, 2**bits)
    for _ in range(30):
        weights, _, x = source.cells(_midpoints(levels))
        levels = _odd((weights * x).sum(1) / weights.sum(1))
    previous, largest = math.inf, float(source.value(np.array(source.end)))
    for _ in range(60):
        step = _newton_step(source, levels)
        size = float(np.abs(step).max())
        if previous <= size < 1e-12 * largest or size == 0:
            break  # steps no longer shrink: rounding is all that is left
        new = _odd(levels - step)
        if np.any(np.diff(new) <= 0) or new[-1] > largest:  # too far: a step of Lloyd's instead
            weights, _, x = source.cells(_midpoints(levels))
            new, size = _odd((weights * x).sum(1) / weights.sum(1)), math.inf
        levels, previous = new, size
    else:
        raise TBQError(f"the codebook of {bits} bits did not converge")
    weights, _, x = source.cells(_midpoints(levels))
    chances = weights.sum(1)
    return _frozen(
        levels, float((weights * (x - levels[:, None]) ** 2).sum()), float(-(chances * np.log2(chances)).sum())
    )


def _newton_step(source: _Source, levels: Vector) -> Vector:
    """Of the equations level * probability = first moment, which are half the gradient of the distortion."""
    thresholds = _midpoints(levels)
    weights, _, x = source.cells(thresholds)
    # The residual directly, not as a difference of two sums: what is left at the solution would be their rounding.
    residual = (weights * (levels[:, None] - x)).sum(1)
    # A threshold moves by half of what either level does; by its move, the cells exchange density * (half a gap).
    coupling = source.density(thresholds) * np.diff(levels) / 4
    diagonal = weights.sum(1) - np.append(coupling, 0) - np.insert(coupling, 0, 0)
    return _tridiagonal(diagonal.tolist(), (-coupling).tolist(), residual.tolist())


def _tridiagonal(diagonal: list[float], beside: list[float], right: list[float]) -> Vector:
    """Solves a symmetric system by elimination, without a matrix."""
    for i, side in enumerate(beside):
        factor = side / diagonal[i]
        diagonal[i + 1] -= factor * side
        right[i + 1] -= factor * right[i]
    right[-1] /= diagonal[-1]
    for i in range(len(beside) - 1, -1, -1):
        right[i] = (right[i] - beside[i] * right[i + 1]) / diagonal[i]
    return np.array(right)


def _companded(source: _Source, count: int) -> Vector:
    """A start: quantiles of the density to the power 1/3, which is how dense many levels lie (Panter and Dite 1951)."""
    u = np.linspace(-source.end, source.end, 20001)[1:-1]
    x = source.value(u)
    root = np.exp(source.log_weight(u) / 3) * source.slope(u) ** (2 / 3)
    total = np.cumsum(root)
    found: Vector = np.interp((np.arange(count) + 0.5) / count * total[-1], total, x)
    return _odd(found)


def _midpoints(levels: Vector) -> Vector:
    return (levels[1:] + levels[:-1]) / 2


def _odd(levels: Vector) -> Vector:
    """Exactly symmetric about 0, as the density is."""
    return (levels - levels[::-1]) / 2
