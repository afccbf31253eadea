# SPDX-License-Identifier: MIT
"""Random rotations: from the uniform distribution, and a fast one."""

import abc
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import Floats, integer, slices, stream, vectors
from tbq.turboquant._checks import seed as check_seed

__all__ = ["HaarRotation", "HadamardRotation", "Rotation"]

#: Values of a dense matrix: 512 MiB of float64.
DENSE_LIMIT = 1 << 26
_CACHED = 1 << 15  # values, of the 2^16 to 2^18 that fit a second-level cache


class Rotation(abc.ABC):
    """An orthogonal transform of vectors of dim values."""

    dim: int  #: values of a vector

    def rotate(self, x: npt.ArrayLike) -> Floats:
        """x rotated: lengths and angles are kept.

        x: float32 or float64 of shape (..., dim).  Returns an array of the same shape and dtype.
        Raises TBQError for another dtype or last axis, an empty axis, NaN and infinity.
        """
        return self._each(self.forward, x)

    def unrotate(self, y: npt.ArrayLike) -> Floats:
        """The inverse of rotate, up to rounding; the same shapes, dtypes and errors."""
        return self._each(self.backward, y)

    def _each(self, function: Callable[[Floats], Floats], values: npt.ArrayLike) -> Floats:
        array = vectors(values, self.dim)
        rows = array.reshape(-1, self.dim)
        result = np.empty_like(rows)
        for part in slices(len(rows), self.dim):
            with np.errstate(over="ignore", invalid="ignore"):
                result[part] = function(rows[part])
        if not np.isfinite(result).all():
            raise TBQError(f"x has values too large to be rotated in {array.dtype}")
        return result.reshape(array.shape)

    @abc.abstractmethod
    def forward(self, rows: Floats) -> Floats:
        """rotate, of rows (n, dim) that were checked."""

    @abc.abstractmethod
    def backward(self, rows: Floats) -> Floats:
        """unrotate, of rows (n, dim) that were checked."""


class HaarRotation(Rotation):
    """Uniformly random among the orthogonal transforms: for any x, rotate(x) is uniform on the sphere of its length.

    Q of the QR decomposition of a matrix of Gaussians, its columns' signs set so that R's diagonal is positive; without
    that it would not be uniform (Mezzadri 2007).  Takes dim^2 multiplications a vector and 8 dim^2 bytes.
    dim: 1 to 8192.  seed: 0 to 2**64 - 1; a matrix is the same on every platform up to the rounding of QR.
    Raises TBQError for others.
    """

    def __init__(self, dim: SupportsIndex, seed: SupportsIndex = 0) -> None:
        self.dim, self.seed = integer(dim, "dim", 1), check_seed(seed)
        self.matrix = _orthogonal(gaussians(self.dim, self.dim, self.seed, "rotation"))

    def forward(self, rows: Floats) -> Floats:
        rotated: Floats = rows @ self.matrix.T.astype(rows.dtype, copy=False)
        return rotated

    def backward(self, rows: Floats) -> Floats:
        rotated: Floats = rows @ self.matrix.astype(rows.dtype, copy=False)
        return rotated


class HadamardRotation(Rotation):
    """Random signs and Hadamard transforms, in rounds: dim log2(dim) additions a vector and round, no matrix.

    A round transforms the first 2^k values under random signs, 2^k the largest power of 2 within dim, and if some are left,
    the last 2^k likewise.  No padding: dim values in, dim values out, for any dim.
    It is not uniform.  After one round, errors of sparse vectors are up to 2.6 times what theory says; after three (the
    default), up to 1.16 times with dim 64 and 1.02 times with 256 or more (docs/turboquant.md).  Below 64, take HaarRotation.
    In NumPy it is faster than HaarRotation from about 1000 values on.
    dim: 1 or more.  seed: 0 to 2**64 - 1; results are the same bits on every platform.  rounds: 1 to 8.
    Raises TBQError for others.
    """

    def __init__(self, dim: SupportsIndex, seed: SupportsIndex = 0, rounds: SupportsIndex = 3) -> None:
        self.dim, self.seed = integer(dim, "dim", 1), check_seed(seed)
        self.rounds = integer(rounds, "rounds", 1, 8)
        self.width = 1 << (self.dim.bit_length() - 1)
        starts = [0] if self.width == self.dim else [0, self.dim - self.width]
        random = stream(self.seed, "signs")
        # each step: which 2^k coordinates, and their signs
        self._steps = [
            (slice(start, start + self.width), random.randint(0, 2, (self.width, 1)) * 2 - 1)
            for _ in range(self.rounds)
            for start in starts
        ]
        self._scale = self.width**-0.5  # makes a transform orthogonal; before it, so that no sum overflows

    def forward(self, rows: Floats) -> Floats:
        return self._columns(rows, self._forward)

    def backward(self, rows: Floats) -> Floats:
        return self._columns(rows, self._backward)

    def _columns(self, rows: Floats, function: Callable[[Floats], None]) -> Floats:
        """Vectors as columns, so that additions run along memory whatever their stride in a vector, and few enough for a cache."""
        result = np.empty_like(rows)
        step = max(1, _CACHED // self.dim)
        for i in range(0, len(rows), step):
            columns = rows[i : i + step].T.copy()
            function(columns)
            result[i : i + step] = columns.T
        return result

    def _forward(self, columns: Floats) -> None:
        for part, signs in self._steps:
            columns[part] *= (signs * self._scale).astype(columns.dtype)
            _hadamard(columns[part])

    def _backward(self, columns: Floats) -> None:
        for part, signs in reversed(self._steps):
            columns[part] *= columns.dtype.type(self._scale)
            _hadamard(columns[part])
            columns[part] *= signs.astype(columns.dtype)


def gaussians(rows: int, columns: int, seed: int, purpose: str) -> npt.NDArray[np.float64]:
    """A matrix of independent N(0, 1)."""
    if rows * columns > DENSE_LIMIT:
        raise TBQError(
            f"a {purpose} of {rows} x {columns} has more than the {DENSE_LIMIT} values of a dense matrix"
            + ("; rotation='hadamard' needs none" if purpose == "rotation" else "")
        )
    return stream(seed, purpose).standard_normal((rows, columns))


def find(rotation: "Rotation | str", dim: int, seed: int) -> Rotation:
    """A rotation by its name, or the one given."""
    if isinstance(rotation, Rotation):
        if rotation.dim != dim:
            raise TBQError(f"rotation has dim {rotation.dim}; the quantizer has {dim}")
        return rotation
    if rotation == "haar":
        return HaarRotation(dim, seed)
    if rotation == "hadamard":
        return HadamardRotation(dim, seed)
    raise TBQError(f"rotation is {rotation!r}; it must be 'haar', 'hadamard' or a Rotation")


def _orthogonal(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    q, r = np.linalg.qr(matrix)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def _hadamard(columns: Floats) -> None:
    """The Sylvester-Hadamard transform, in place, of each column; their length is a power of 2."""
    step = 1
    while step < len(columns):
        pairs = columns.reshape(-1, 2, step, columns.shape[1])
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = difference
        step *= 2
