# SPDX-License-Identifier: MIT
"""Random rotations: uniform ones, and fast ones."""

import abc
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import Floats, as_vectors, check_integer, check_seed, random_stream, slices

__all__ = ["HaarRotation", "HadamardRotation", "Rotation"]

#: The most values of a dense matrix: 512 MiB of float64.
DENSE_LIMIT = 1 << 26
_CACHED = 1 << 15  # values at a time; 2^16 to 2^18 fit a second-level cache


class Rotation(abc.ABC):
    """An orthogonal transform of vectors of dim values."""

    dim: int  #: values of a vector

    def rotate(self, x: npt.ArrayLike) -> Floats:
        """Rotates x.  Lengths and angles stay the same.

        x: float32 or float64 of shape (..., dim).  Returns an array of the same shape and dtype.
        Raises TBQError for another dtype or last axis, an empty axis, NaN and infinity.
        """
        return self._apply(self.forward, x)

    def unrotate(self, y: npt.ArrayLike) -> Floats:
        """Inverts rotate, up to rounding.  Shapes, dtypes and errors are the same."""
        return self._apply(self.backward, y)

    def _apply(self, function: Callable[[Floats], Floats], values: npt.ArrayLike) -> Floats:
        array = as_vectors(values, self.dim)
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
        """rotate() of rows (n, dim), without checks."""

    @abc.abstractmethod
    def backward(self, rows: Floats) -> Floats:
        """unrotate() of rows (n, dim), without checks."""


class HaarRotation(Rotation):
    """A uniformly random orthogonal transform: for any x, rotate(x) is uniform on the sphere of its length.

    It is Q of the QR decomposition of a Gaussian matrix.  The signs of its columns are chosen so that R's diagonal is
    positive; otherwise Q would not be uniform (Mezzadri 2007).  It takes dim^2 multiplications a vector, and
    8 dim^2 bytes.
    dim: 1 to 8192.  seed: 0 to 2**64 - 1; a matrix is the same on every platform up to the rounding of QR.
    Raises TBQError for other values.
    """

    def __init__(self, dim: SupportsIndex, seed: SupportsIndex = 0) -> None:
        self.dim, self.seed = check_integer(dim, "dim", 1), check_seed(seed)
        self.matrix = _orthogonalize(gaussian_matrix(self.dim, self.dim, self.seed, "rotation"))

    def forward(self, rows: Floats) -> Floats:
        rotated: Floats = rows @ self.matrix.T.astype(rows.dtype, copy=False)
        return rotated

    def backward(self, rows: Floats) -> Floats:
        rotated: Floats = rows @ self.matrix.astype(rows.dtype, copy=False)
        return rotated


class HadamardRotation(Rotation):
    """Rounds of random signs and Hadamard transforms: dim log2(dim) additions a vector and round, and no matrix.

    2^k is the largest power of 2 up to dim.  A round gives the first 2^k values random signs and transforms them.  If
    dim is larger, it then does the same with the last 2^k values.  There is no padding, for any dim.
    The rotation is not uniform.  Compared with theory, errors of sparse vectors are up to 2.6 times as large after one
    round.  After three rounds (the default), they are up to 1.16 times as large with dim 64, and 1.02 times with 256 or
    more (docs/measurements/turboquant.md).  Below 64, use HaarRotation.
    In NumPy it is faster than HaarRotation from about 1000 values on.
    dim: 1 or more.  seed: 0 to 2**64 - 1; results are the same bits on every platform.  rounds: 1 to 8.
    Raises TBQError for other values.
    """

    def __init__(self, dim: SupportsIndex, seed: SupportsIndex = 0, rounds: SupportsIndex = 3) -> None:
        self.dim, self.seed = check_integer(dim, "dim", 1), check_seed(seed)
        self.rounds = check_integer(rounds, "rounds", 1, 8)
        self.width = 1 << (self.dim.bit_length() - 1)
        starts = [0] if self.width == self.dim else [0, self.dim - self.width]
        random = random_stream(self.seed, "signs")
        # for each step: its 2^k coordinates, and their signs
        self._steps = [
            (slice(start, start + self.width), random.randint(0, 2, (self.width, 1)) * 2 - 1)
            for _ in range(self.rounds)
            for start in starts
        ]
        self._scale = self.width**-0.5  # makes a transform orthogonal; applied first, so that no sum overflows

    def forward(self, rows: Floats) -> Floats:
        return self._as_columns(rows, self._forward)

    def backward(self, rows: Floats) -> Floats:
        return self._as_columns(rows, self._backward)

    def _as_columns(self, rows: Floats, function: Callable[[Floats], None]) -> Floats:
        """Applies a function to vectors as columns, so that additions run along memory; few at a time fit a cache."""
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
            _transform_columns(columns[part])

    def _backward(self, columns: Floats) -> None:
        for part, signs in reversed(self._steps):
            columns[part] *= columns.dtype.type(self._scale)
            _transform_columns(columns[part])
            columns[part] *= signs.astype(columns.dtype)


def gaussian_matrix(rows: int, columns: int, seed: int, purpose: str) -> npt.NDArray[np.float64]:
    """Returns a matrix of independent values from N(0, 1)."""
    if rows * columns > DENSE_LIMIT:
        raise TBQError(
            f"a {purpose} of {rows} x {columns} has more than the {DENSE_LIMIT} values of a dense matrix"
            + ("; rotation='hadamard' needs none" if purpose == "rotation" else "")
        )
    return random_stream(seed, purpose).standard_normal((rows, columns))


def find_rotation(rotation: "Rotation | str", dim: int, seed: int) -> Rotation:
    """Returns the rotation of this name; a Rotation itself is checked and returned."""
    if isinstance(rotation, Rotation):
        if rotation.dim != dim:
            raise TBQError(f"rotation has dim {rotation.dim}; the quantizer has {dim}")
        return rotation
    if rotation == "haar":
        return HaarRotation(dim, seed)
    if rotation == "hadamard":
        return HadamardRotation(dim, seed)
    raise TBQError(f"rotation is {rotation!r}; it must be 'haar', 'hadamard' or a Rotation")


def _orthogonalize(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    q, r = np.linalg.qr(matrix)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def _transform_columns(columns: Floats) -> None:
    """Applies the Sylvester-Hadamard transform to each column, in place.  Their length must be a power of 2."""
    step = 1
    while step < len(columns):
        pairs = columns.reshape(-1, 2, step, columns.shape[1])
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = difference
        step *= 2
