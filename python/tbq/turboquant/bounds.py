# SPDX-License-Identifier: MIT
"""The bounds of the theorems for a number of bits, and the exact errors of the quantizers.

All errors are means over random seeds, for a unit vector x and, with inner products, a unit vector y.  They scale with
|x|^2 and |y|^2.
"""

import math
from collections.abc import Iterable
from typing import SupportsFloat, SupportsIndex

import numpy as np

from tbq.errors import TBQError
from tbq.turboquant._checks import check_integer
from tbq.turboquant.codebooks import NODES, WEIGHTS, angle_codebook, angle_nodes, sphere_codebook
from tbq.turboquant.polar import check_level_bits

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

    The constant is that of the best scalar quantizer of a Gaussian with many levels (Panter and Dite 1951).
    bits: a number of at least 0.  Raises TBQError for other values.
    """
    return math.sqrt(3) * math.pi / 2 * math.pow(4, -_check_real(bits, "bits"))


def mse_distortion(bits: SupportsIndex, dim: SupportsIndex) -> float:
    """E |x - x'|^2 of MSEQuantizer with "haar", the same for every x.

    In many dimensions it is 0.363, 0.117, 0.0345 and 0.0095 with 1 to 4 bits.
    bits: 0 to 8.  dim: 1 or more.  Raises TBQError for other values.
    """
    return check_integer(dim, "dim", 1) * sphere_codebook(bits, dim).distortion


def mse_lower_bound(bits: SupportsFloat, dim: SupportsIndex | None = None) -> float:
    """The smallest E |x - x'|^2 that any quantizer, randomized or not, can have for its worst x.

    dim None: 4^-bits, the bound of TurboQuant's Theorem 3.  It holds in the limit of many dimensions.  In few
    dimensions, quantizers are better: with 2 bits a coordinate on a circle, 16 points on it have an error of 0.0129.
    dim: the exact bound for vectors of dim values, 1 or more.  The sphere is divided into 2**(bits * dim) cells; the
    mean of a cell is never longer than that of a cap with the same area.
    bits: a number of at least 0.  Raises TBQError for other values.
    """
    b = _check_real(bits, "bits")
    return math.pow(4, -b) if dim is None else _cap_bound(b, check_integer(dim, "dim", 1))


def inner_product_upper_bound(bits: SupportsFloat, dim: SupportsIndex) -> float:
    """TurboQuant, Theorem 2: E (<y, x> - <y, x'>)^2 <= sqrt(3) pi^2 / dim * 4^-bits, for every x and y.

    It is about InnerProductQuantizer.
    bits: a number of at least 0.  dim: 1 or more.  Raises TBQError for other values.
    """
    return math.sqrt(3) * math.pi**2 / check_integer(dim, "dim", 1) * math.pow(4, -_check_real(bits, "bits"))


def inner_product_distortion(bits: SupportsIndex, dim: SupportsIndex) -> float:
    """The largest E (<y, x> - <y, x'>)^2 of InnerProductQuantizer with "haar", for any x and y.

    It is pi / (2 dim) * mse_distortion(bits - 1, dim).  The exact error is smaller by E <y, residual>^2 / dim.
    Multiplied by dim, in many dimensions, it is 1.571, 0.571, 0.185 and 0.0543 with 1 to 4 bits.  (The paper prints
    0.56, 0.18 and 0.047.)
    bits: 1 to 8.  dim: 1 or more.  Raises TBQError for other values.
    """
    return math.pi / 2 / check_integer(dim, "dim", 1) * mse_distortion(check_integer(bits, "bits", 1, 8) - 1, dim)


def inner_product_lower_bound(bits: SupportsFloat, dim: SupportsIndex) -> float:
    """TurboQuant, Theorem 3: for any quantizer there are x and y with E (<y, x> - <y, x'>)^2 >= 4^-bits / dim.

    As for mse_lower_bound, that holds in the limit of many dimensions.
    bits: a number of at least 0.  dim: 1 or more.  Raises TBQError for other values.
    """
    return mse_lower_bound(bits) / check_integer(dim, "dim", 1)


def polar_distortion(bits: Iterable[SupportsIndex]) -> float:
    """E |x - x'|^2 / E |x|^2 of PolarQuantizer for a Gaussian x.  bits: as in PolarQuantizer.

    Angles are independent and radii exact, so it is 2 - 2 P, where P is the product of E cos(angle - quantized angle)
    over all levels.
    Raises TBQError for bits that PolarQuantizer would refuse.
    """
    product = 1.0
    for level, b in enumerate(check_level_bits(bits), 1):
        weights, angles = angle_nodes(b, level)
        product *= float((weights * np.cos(angles - angle_codebook(b, level).levels[:, None])).sum())
    return 2 - 2 * product


def qjl_rows(epsilon: SupportsFloat, delta: SupportsFloat) -> int:
    """The rows that QJL needs: its error of <y, x> exceeds epsilon |x| |y| with a probability of at most delta.

    The number is pi / epsilon^2 * log(2 / delta).  The estimate of one row is sub-Gaussian with variance pi/2 for any
    angle between x and y, and exactly Gaussian at a right angle.  (The QJL paper's Lemma 3.5 has 4/3 (1 + epsilon)
    instead of pi, which is wrong at a right angle.)
    epsilon: above 0.  delta: above 0, below 1.  Raises TBQError for other values.
    """
    e, d = _check_real(epsilon, "epsilon"), _check_real(delta, "delta")
    if e == 0 or not 0 < d < 1:
        raise TBQError(f"epsilon is {e:g} and delta {d:g}; epsilon must be above 0, delta between 0 and 1")
    return math.ceil(math.pi / e**2 * math.log(2 / d))


def _cap_bound(bits: float, dim: int) -> float:
    """Returns 1 - |m|^2, where m is the mean of a cap with 2^-(bits dim) of the sphere's area, at most half of it."""
    if bits * dim < 1:
        return 1.0  # one cell
    if dim == 1:
        return 0.0  # -1 and 1 have a cell each
    constant = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2) - math.log(math.pi) / 2
    # a search for the logarithm of the angle between axis and rim
    low, high = -690.0, math.log(math.pi / 2)
    for _ in range(100):
        middle = (low + high) / 2
        rim, total, _ = _cap(math.exp(middle), dim)
        if constant + rim + math.log(total) < -bits * dim * math.log(2):
            low = middle
        else:
            high = middle
    _, total, beyond = _cap(math.exp(high), dim)
    short = beyond / total  # 1 - |mean|; computed as a difference, it would have no exact digits
    return short * (2 - short)


def _cap(angle: float, dim: int) -> tuple[float, float, float]:
    """Returns (p log(sin(angle)), sum of w, sum of w (1 - cos v)), where v goes from 0 to angle.

    w = (sin(v) / sin(angle))^p, p = dim - 2.
    """
    power = dim - 2
    # below this v, w is less than exp(-72), which adds nothing
    start = math.asin(math.sin(angle) * math.exp(-72 / power)) if power else 0.0
    half = (angle - start) / 2
    v = start + half * (1 + NODES)
    w = half * WEIGHTS * (np.sin(v) / math.sin(angle)) ** power
    return power * math.log(math.sin(angle)), float(w.sum()), float((w * 2 * np.sin(v / 2) ** 2).sum())


def _check_real(value: SupportsFloat, name: str) -> float:
    try:
        x = float(value)
    except (TypeError, ValueError):
        raise TBQError(f"{name} is {value!r}; it must be a number of at least 0") from None
    if not 0 <= x < math.inf:
        raise TBQError(f"{name} is {x:g}; it must be a number of at least 0")
    return x
