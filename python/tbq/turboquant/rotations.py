"""Random rotations: from the uniform distribution, and a fast one."""
import abc
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import Floats, integer, seed as check_seed, slices, stream, vectors

__all__ = ["HaarRotation", "HadamardRotation", "Rotation"]

#: Values of a dense matrix: 512 MiB of float64.
DENSE_LIMIT = 1 << 26


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
        return rows @ self.matrix.T.astype(rows.dtype, copy=False)

    def backward(self, rows: Floats) -> Floats:
        return rows @ self.matrix.astype(rows.dtype, copy=False)


class HadamardRotation(Rotation):
    """Random signs and Hadamard transforms, in rounds: dim log2(dim) additions a vector, no matrix.

    A round negates random coordinates and transforms the first 2^k of them, 2^k the largest power of 2 within dim; if
    some are left, it does the same to the last 2^k.  No padding: dim values in, dim values out, for any dim.
    It comes close to uniform, not to it: with one round, vectors of few values are quantized much worse than the theorems
    say; with three (the default) no input is known to be, for dim of 64 or more (docs/turboquant.md).
    dim: 1 or more.  seed: 0 to 2**64 - 1; results are the same bits on every platform.  rounds: 1 to 8.
    Raises TBQError for others.
    """

    def __init__(self, dim: SupportsIndex, seed: SupportsIndex = 0, rounds: SupportsIndex = 3) -> None:
        self.dim, self.seed = integer(dim, "dim", 1), check_seed(seed)
        self.rounds = integer(rounds, "rounds", 1, 8)
        self.width = 1 << (self.dim.bit_length() - 1)
        starts = [0] if self.width == self.dim else [0, self.dim - self.width]
        random = stream(self.seed, "signs")
        # each step: where its 2^k coordinates begin, and their signs
        self._steps = [(start, random.randint(0, 2, self.width) * 2 - 1) for _ in range(self.rounds) for start in starts]

    def forward(self, rows: Floats) -> Floats:
        result = rows.copy()
        for start, signs in self._steps:
            part = result[:, start:start + self.width]
            part[...] = _hadamard(part * signs.astype(rows.dtype))
        return result

    def backward(self, rows: Floats) -> Floats:
        result = rows.copy()
        for start, signs in reversed(self._steps):
            part = result[:, start:start + self.width]
            part[...] = _hadamard(part) * signs.astype(rows.dtype)
        return result


def gaussians(rows: int, columns: int, seed: int, purpose: str) -> npt.NDArray[np.float64]:
    """A matrix of independent N(0, 1)."""
    if rows * columns > DENSE_LIMIT:
        raise TBQError(f"a {purpose} of {rows} x {columns} has more than the {DENSE_LIMIT} values of a dense matrix"
                       + ("; rotation='hadamard' needs none" if purpose == "rotation" else ""))
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


def _hadamard(rows: Floats) -> Floats:
    """The orthogonal Sylvester-Hadamard transform of each row, whose length is a power of 2."""
    width = rows.shape[1]
    step = 1
    while step < width:
        pairs = rows.reshape(len(rows), -1, 2, step)
        rows = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(len(rows), width)
        step *= 2
    return rows * rows.dtype.type(width**-0.5)
