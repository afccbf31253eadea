# SPDX-License-Identifier: MIT
"""What the theorems say of a number of bits, and what the quantizers come to exactly.

All are of a unit vector x, and for inner products of a unit vector y, as means over random seeds; they scale with |x|^2, |y|^2.
"""

import math
from collections.abc import Iterable
from typing import SupportsFloat, SupportsIndex

import numpy as np

from tbq.errors import TBQError
from tbq.turboquant._checks import integer
from tbq.turboquant.codebooks import NODES, WEIGHTS, angle_codebook, angle_nodes, sphere_codebook
from tbq.turboquant.polar import widths

__all__ = [
    "inner_product_distortion",
    "inner_product_lower_bound",
    "inner_product_upper_bound",
    "mse_distortion",
    "mse_lower_bound",
    "mse_upper_bound",
    "polar_distortion",
    "qjl_rows",
]


def mse_upper_bound(bits: SupportsFloat) -> float:
    """TurboQuant, Theorem 1: E |x - x'|^2 <= sqrt(3) pi / 2 * 4^-bits for MSEQuantizer with "haar" and every x.

    The constant is that of a Gaussian's best scalar quantizer with many levels (Panter and Dite 1951).
    bits: 0 or more, a fraction too.  Raises TBQError for others.
    """
    return math.sqrt(3) * math.pi / 2 * math.pow(4, -_real(bits, "bits"))


def mse_distortion(bits: SupportsIndex, dim: SupportsIndex) -> float:
    """E |x - x'|^2 of MSEQuantizer with "haar", the same for every x.

    For many dimensions 0.363, 0.117, 0.0345, 0.0095 with 1 to 4 bits.  bits: 0 to 8.  dim: 1 or more.  Raises TBQError for others.
    """
    return integer(dim, "dim", 1) * sphere_codebook(bits, dim).distortion


def mse_lower_bound(bits: SupportsFloat, dim: SupportsIndex | None = None) -> float:
    """The least E |x - x'|^2 of any quantizer, randomized or not, for its worst x.

    dim None: 4^-bits, as Theorem 3 of TurboQuant has it, which holds in the limit of many dimensions; in few, quantizers
    are better (a circle, 2 bits a coordinate: 16 points on it come to 0.0129).
    dim: for vectors of dim values, 1 or more, exactly so: with 2**(bits * dim) cells of the sphere, none can have a mean
    longer than that of a cap with the mean share of the area.
    bits: 0 or more, a fraction too.  Raises TBQError for others.
    """
    b = _real(bits, "bits")
    return math.pow(4, -b) if dim is None else _cap_bound(b, integer(dim, "dim", 1))


def inner_product_upper_bound(bits: SupportsFloat, dim: SupportsIndex) -> float:
    """TurboQuant, Theorem 2: E (<y, x> - <y, x'>)^2 <= sqrt(3) pi^2 / dim * 4^-bits for InnerProductQuantizer and every x and y.

    bits: 0 or more, a fraction too.  dim: 1 or more.  Raises TBQError for others.
    """
    return math.sqrt(3) * math.pi**2 / integer(dim, "dim", 1) * math.pow(4, -_real(bits, "bits"))


def inner_product_distortion(bits: SupportsIndex, dim: SupportsIndex) -> float:
    """pi / (2 dim) * mse_distortion(bits - 1, dim), which E (<y, x> - <y, x'>)^2 of InnerProductQuantizer with "haar" cannot
    exceed, and falls short of by E <y, residual>^2 / dim only.

    Times dim, for many dimensions 1.571, 0.571, 0.185, 0.0543 with 1 to 4 bits.  (The paper prints 0.56, 0.18 and 0.047.)
    bits: 1 to 8.  dim: 1 or more.  Raises TBQError for others.
    """
    return math.pi / 2 / integer(dim, "dim", 1) * mse_distortion(integer(bits, "bits", 1, 8) - 1, dim)


def inner_product_lower_bound(bits: SupportsFloat, dim: SupportsIndex) -> float:
    """TurboQuant, Theorem 3: any quantizer has x and y with E (<y, x> - <y, x'>)^2 >= 4^-bits / dim; in the limit of many
    dimensions, as for mse_lower_bound.

    bits: 0 or more, a fraction too.  dim: 1 or more.  Raises TBQError for others.
    """
    return mse_lower_bound(bits) / integer(dim, "dim", 1)


def polar_distortion(bits: Iterable[SupportsIndex]) -> float:
    """E |x - x'|^2 / E |x|^2 of PolarQuantizer for a Gaussian x, bits as there.

    Angles are independent, radii exact: 2 - 2 times the product of the levels' E cos(angle - its quantized value).
    Raises TBQError for bits that PolarQuantizer would refuse.
    """
    product = 1.0
    for level, b in enumerate(widths(bits), 1):
        weights, angles = angle_nodes(b, level)
        product *= float((weights * np.cos(angles - angle_codebook(b, level).levels[:, None])).sum())
    return 2 - 2 * product


def qjl_rows(epsilon: SupportsFloat, delta: SupportsFloat) -> int:
    """Rows with which QJL's estimate of <y, x> is off by more than epsilon |x| |y| with a probability of at most delta.

    pi / epsilon^2 * log(2 / delta): one row's estimate is sub-Gaussian with the variance pi/2, whatever the angle between
    x and y, and exactly Gaussian with it at a right angle.  (The QJL paper's Lemma 3.5 says 4/3 (1 + epsilon) instead of pi,
    which the right angle contradicts.)
    epsilon: above 0.  delta: above 0, below 1.  Raises TBQError for others.
    """
    e, d = _real(epsilon, "epsilon"), _real(delta, "delta")
    if e == 0 or not 0 < d < 1:
        raise TBQError(f"epsilon is {e:g} and delta {d:g}; epsilon must be above 0, delta between 0 and 1")
    return math.ceil(math.pi / e**2 * math.log(2 / d))


def _cap_bound(bits: float, dim: int) -> float:
    """1 - |mean of a cap of 2^-(bits dim) of the sphere|^2, at most half of it."""
    if bits * dim < 1:
        return 1.0  # one cell
    if dim == 1:
        return 0.0  # -1 and 1 have a cell each
    constant = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2) - math.log(math.pi) / 2
    low, high = -690.0, math.log(math.pi / 2)  # of the logarithm of the angle between axis and rim
    for _ in range(100):
        middle = (low + high) / 2
        rim, total, _ = _cap(math.exp(middle), dim)
        if constant + rim + math.log(total) < -bits * dim * math.log(2):
            low = middle
        else:
            high = middle
    _, total, beyond = _cap(math.exp(high), dim)
    short = beyond / total  # 1 - |mean|: as a difference it would lose its digits
    return short * (2 - short)


def _cap(angle: float, dim: int) -> tuple[float, float, float]:
    """(p log(sin(angle)), sum of w, sum of w (1 - cos v)) over the cap's v from 0 to angle, w = (sin(v) / sin(angle))^p, p = dim - 2."""
    power = dim - 2
    # where w is exp(-72), nothing is left
    start = math.asin(math.sin(angle) * math.exp(-72 / power)) if power else 0.0
    half = (angle - start) / 2
    v = start + half * (1 + NODES)
    w = half * WEIGHTS * (np.sin(v) / math.sin(angle)) ** power
    return power * math.log(math.sin(angle)), float(w.sum()), float((w * 2 * np.sin(v / 2) ** 2).sum())


def _real(value: SupportsFloat, name: str) -> float:
    try:
        x = float(value)
    except (TypeError, ValueError):
        raise TBQError(f"{name} is {value!r}; it must be a number of at least 0") from None
    if not 0 <= x < math.inf:
        raise TBQError(f"{name} is {x:g}; it must be a number of at least 0")
    return x
