# SPDX-License-Identifier: MIT
"""TurboQuant: the MSE quantizer, QJL, and the inner-product quantizer, which combines both."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import (
    Bytes,
    Floats,
    as_vectors,
    check_integer,
    check_lengths,
    check_seed,
    slices,
    split_lengths,
)
from tbq.turboquant.codebooks import sphere_codebook
from tbq.turboquant.packing import pack_unchecked, packed_bytes, unpack
from tbq.turboquant.rotations import Rotation, find_rotation, gaussian_matrix

__all__ = ["InnerProductCode", "InnerProductQuantizer", "MSECode", "MSEQuantizer", "QJL", "QJLCode"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Code:
    packed: Bytes
    norms: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the vectors, without their last axis."""
        return self.norms.shape

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.norms.nbytes


class MSECode(_Code):
    """The code of vectors (..., dim).

    packed: indices, uint8 (..., packed_bytes(dim, bits)).  norms: (...), in the dtype of the vectors.
    """


class QJLCode(_Code):
    """The code of vectors (..., dim).

    packed: signs, uint8 (..., packed_bytes(rows, 1)).  norms: (...), in the dtype of the vectors.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class InnerProductCode:
    """The code of vectors (..., dim).

    mse: the first stage, None if bits is 1.  residual: the signs and the norms of its residuals.
    """

    mse: MSECode | None
    residual: QJLCode

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the vectors, without their last axis."""
        return self.residual.shape

    @property
    def nbytes(self) -> int:
        return self.residual.nbytes + (self.mse.nbytes if self.mse else 0)


class MSEQuantizer:
    """TurboQuant's Algorithm 1: rotates, then quantizes each coordinate with the sphere's Lloyd-Max codebook.

    Theorem 1: for every x, E |x - dequantize(quantize(x))|^2 <= sqrt(3) pi / 2 * 4^-bits * |x|^2, a mean over seeds.
    The exact value is mse_distortion(bits, dim) * |x|^2.
    dim: 1 or more.  bits: 1 to 8.  seed: 0 to 2**64 - 1.
    rotation: "haar", for which the theorem is proven; "hadamard", which keeps no matrix; or a Rotation.
    Raises TBQError for other values.
    """

    def __init__(
        self, dim: SupportsIndex, bits: SupportsIndex, *, seed: SupportsIndex = 0, rotation: Rotation | str = "haar"
    ) -> None:
        self.dim, self.bits, self.seed = (
            check_integer(dim, "dim", 1),
            check_integer(bits, "bits", 1, 8),
            check_seed(seed),
        )
        self.rotation = find_rotation(rotation, self.dim, self.seed)
        self.codebook = sphere_codebook(self.bits, self.dim)

    @property
    def gain(self) -> float:
        """E <x, dequantize(quantize(x))> / |x|^2 with "haar".  It is below 1, because decoded vectors are too short."""
        return 1 - self.dim * self.codebook.distortion

    def quantize(self, x: npt.ArrayLike) -> MSECode:
        """x: float32 or float64 of shape (..., dim), vectors of any length.

        Raises TBQError for another dtype or last axis, an empty axis, NaN and infinity.
        """
        width = packed_bytes(self.dim, self.bits)
        return MSECode(*_quantize(x, self.dim, width, lambda part: self._encode(self.rotation.forward(part))))

    def dequantize(self, code: MSECode, *, unbiased: bool = False) -> Floats:
        """Decodes the vectors of a code, (..., dim), in the dtype that was quantized.

        unbiased: divide by gain.  With "haar", the mean over seeds is then x itself, and the squared error is larger by
        the same factor.  EDEN has such a scale (Vargaftik et al. 2022).  TurboQuant's paper spends a bit on it instead,
        in InnerProductQuantizer.
        Raises TBQError for a code that this quantizer cannot have made.
        """
        norms = self._scaled(code, unbiased)
        return _dequantize(code, norms, self.dim, lambda part, dtype: self.rotation.backward(self._levels(part, dtype)))

    def inner_products(self, queries: npt.ArrayLike, code: MSECode, *, unbiased: bool = False) -> Floats:
        """Returns <query, vector> for each query and each vector of a code.  Only queries are rotated.

        queries: float32 or float64 of shape (..., dim).  unbiased: as in dequantize.
        Returns an array of shape (queries' leading axes, code's axes), in the wider of the two dtypes.
        Raises TBQError for queries as quantize does for x, for a code as dequantize does.
        """
        norms = self._scaled(code, unbiased)
        array = as_vectors(queries, self.dim, "queries")
        rotated = self.rotation.forward(array.reshape(-1, self.dim))
        return _products(rotated, code, norms, self._levels).reshape((*array.shape[:-1], *code.shape))

    def _encode(self, rotated: Floats) -> Bytes:
        return pack_unchecked(self.codebook.nearest(rotated), self.bits)

    def _levels(self, packed: Bytes, dtype: np.dtype[Any]) -> Floats:
        found: Floats = self.codebook.levels.astype(dtype)[unpack(packed, self.bits, self.dim)]
        return found

    def _scaled(self, code: MSECode, unbiased: bool) -> Floats:
        norms = _check_code(code, MSECode, packed_bytes(self.dim, self.bits))
        return norms / norms.dtype.type(self.gain) if unbiased else norms


class QJL:
    """The signs of random projections, one bit each (QJL, arXiv 2406.03482).

    The mean over seeds of <y, dequantize(quantize(x))> is <y, x>; the variance is (pi/2 |x|^2 |y|^2 - <x, y>^2) / rows.
    dim: values of a vector, 1 or more.  rows: number of projections, dim if None; rows * dim must be at most 2**26.
    seed: 0 to 2**64 - 1.
    Raises TBQError for other values.
    """

    def __init__(self, dim: SupportsIndex, rows: SupportsIndex | None = None, *, seed: SupportsIndex = 0) -> None:
        self.dim, self.seed = check_integer(dim, "dim", 1), check_seed(seed)
        self.rows = self.dim if rows is None else check_integer(rows, "rows", 1)
        self.matrix = gaussian_matrix(self.rows, self.dim, self.seed, "projection")

    def quantize(self, x: npt.ArrayLike) -> QJLCode:
        """x: float32 or float64 of shape (..., dim), vectors of any length.

        Raises TBQError for another dtype or last axis, an empty axis, NaN and infinity.
        """
        return QJLCode(*_quantize(x, self.dim, packed_bytes(self.rows, 1), self._encode))

    def dequantize(self, code: QJLCode) -> Floats:
        """Returns sqrt(pi/2) / rows * |x| * S^T sign(S x) for each x of a code, (..., dim), in the dtype of x.

        It is meant for inner products.  As an approximation of x it is poor.
        Raises TBQError for a code that this quantizer cannot have made.
        """
        return _dequantize(code, self._check(code), self.dim, self._decode)

    def inner_products(self, queries: npt.ArrayLike, code: QJLCode) -> Floats:
        """Estimates <query, vector> for each query and each vector of a code.

        queries: float32 or float64 of shape (..., dim).
        Returns an array of shape (queries' leading axes, code's axes), in the wider of the two dtypes.
        Raises TBQError for queries as quantize does for x, for a code as dequantize does.
        """
        norms = self._check(code)
        array = as_vectors(queries, self.dim, "queries")
        return self._products(array.reshape(-1, self.dim), code, norms).reshape((*array.shape[:-1], *code.shape))

    def _encode(self, rows: Floats) -> Bytes:
        projected = rows @ self.matrix.T.astype(rows.dtype, copy=False)
        return np.packbits(projected >= 0, axis=-1, bitorder="little")

    def _signs(self, packed: Bytes, dtype: np.dtype[Any]) -> Floats:
        scale = np.array(math.sqrt(math.pi / 2) / self.rows, dtype)
        found: Floats = np.where(np.unpackbits(packed, axis=-1, count=self.rows, bitorder="little"), scale, -scale)
        return found

    def _decode(self, packed: Bytes, dtype: np.dtype[Any]) -> Floats:
        found: Floats = self._signs(packed, dtype) @ self.matrix.astype(dtype, copy=False)
        return found

    def _products(self, queries: Floats, code: QJLCode, norms: Floats) -> Floats:
        return _products(queries @ self.matrix.T.astype(queries.dtype, copy=False), code, norms, self._signs)

    def _check(self, code: QJLCode) -> Floats:
        return _check_code(code, QJLCode, packed_bytes(self.rows, 1))


class InnerProductQuantizer:
    """TurboQuant's Algorithm 2: MSEQuantizer with bits - 1, and QJL with one bit for its residual.

    Theorem 2: for every x and y, the mean over seeds of <y, dequantize(quantize(x))> is <y, x>, and the mean squared
    error is at most sqrt(3) pi^2 / dim * 4^-bits * |x|^2 |y|^2; see inner_product_distortion.  The mean is <y, x> with
    every rotation, because the projections do not depend on it.
    dim: 1 to 8192.  bits: 1 to 8; with 1 bit, it is QJL.  seed, rotation: as in MSEQuantizer.
    Raises TBQError for other values.
    """

    def __init__(
        self, dim: SupportsIndex, bits: SupportsIndex, *, seed: SupportsIndex = 0, rotation: Rotation | str = "haar"
    ) -> None:
        self.dim, self.bits, self.seed = (
            check_integer(dim, "dim", 1),
            check_integer(bits, "bits", 1, 8),
            check_seed(seed),
        )
        self.qjl = QJL(self.dim, seed=self.seed)
        self.rotation = find_rotation(rotation, self.dim, self.seed)
        self.mse = (
            MSEQuantizer(self.dim, self.bits - 1, seed=self.seed, rotation=self.rotation) if self.bits > 1 else None
        )

    def quantize(self, x: npt.ArrayLike) -> InnerProductCode:
        """x: float32 or float64 of shape (..., dim), vectors of any length.

        Raises TBQError for another dtype or last axis, an empty axis, NaN and infinity.
        """
        array = as_vectors(x, self.dim)
        rows, shape = array.reshape(-1, self.dim), array.shape[:-1]
        indices = np.empty((len(rows), packed_bytes(self.dim, self.bits - 1) if self.mse else 0), np.uint8)
        signs = np.empty((len(rows), packed_bytes(self.dim, 1)), np.uint8)
        norms, left = np.empty(len(rows), array.dtype), np.empty(len(rows), array.dtype)
        for part in slices(len(rows), self.dim):
            norms[part], directions = split_lengths(rows[part])
            # The residual stays rotated: S times a rotation has the distribution of S,
            # and is independent of the rotation.
            residual = self.rotation.forward(directions)
            if self.mse:
                indices[part] = self.mse._encode(residual)
                residual = residual - self.mse._levels(indices[part], array.dtype)
            signs[part] = self.qjl._encode(residual)
            left[part] = norms[part] * np.sqrt(np.einsum("ij,ij->i", residual, residual))
        mse = MSECode(indices.reshape(*shape, -1), norms.reshape(shape)) if self.mse else None
        return InnerProductCode(mse, QJLCode(signs.reshape(*shape, -1), left.reshape(shape)))

    def dequantize(self, code: InnerProductCode) -> Floats:
        """Decodes the vectors of a code, (..., dim), in the dtype that was quantized.

        They are meant for inner products; their squared error is not the smallest.

        Raises TBQError for a code that this quantizer cannot have made.
        """
        _, left = self._check(code)
        result = _dequantize(
            code.residual, left, self.dim, lambda part, dtype: self.rotation.backward(self.qjl._decode(part, dtype))
        )
        if self.mse and code.mse:
            result += self.mse.dequantize(code.mse)
        return result

    def inner_products(self, queries: npt.ArrayLike, code: InnerProductCode) -> Floats:
        """Estimates <query, vector> for each query and each vector of a code.  Only queries are rotated.

        queries: float32 or float64 of shape (..., dim).
        Returns an array of shape (queries' leading axes, code's axes), in the wider of the two dtypes.
        Raises TBQError for queries as quantize does for x, for a code as dequantize does.
        """
        norms, left = self._check(code)
        array = as_vectors(queries, self.dim, "queries")
        rotated = self.rotation.forward(array.reshape(-1, self.dim))
        result = self.qjl._products(rotated, code.residual, left)
        if self.mse and code.mse:
            result += _products(rotated, code.mse, norms, self.mse._levels)
        return result.reshape((*array.shape[:-1], *code.shape))

    def _check(self, code: InnerProductCode) -> tuple[Floats, Floats]:
        """Returns (norms, norms of the residuals)."""
        if not isinstance(code, InnerProductCode):
            raise TBQError(f"code is a {type(code).__name__}; it must be an InnerProductCode")
        left = self.qjl._check(code.residual)
        if (self.mse is None) != (code.mse is None):
            raise TBQError(
                f"code has {'two stages' if code.mse else 'one stage'}; "
                f"with {self.bits} bits it must have {'two' if self.mse else 'one'}"
            )
        if not self.mse or not code.mse:
            return left, left
        norms = self.mse._scaled(code.mse, False)
        if norms.shape != left.shape or norms.dtype != left.dtype:
            raise TBQError(f"code has norms of {norms.dtype} {norms.shape} and residuals of {left.dtype} {left.shape}")
        return norms, left


# --- rows, a bounded number at a time ---------------------------------------------------------------------------------


def _quantize(x: npt.ArrayLike, dim: int, width: int, encode: Callable[[Floats], Bytes]) -> tuple[Bytes, Floats]:
    """Returns (packed (..., width), norms (...)) of vectors.  encode: called with directions (n, dim)."""
    array = as_vectors(x, dim)
    rows = array.reshape(-1, dim)
    packed, norms = np.empty((len(rows), width), np.uint8), np.empty(len(rows), array.dtype)
    for part in slices(len(rows), max(dim, 8 * width)):
        norms[part], directions = split_lengths(rows[part])
        packed[part] = encode(directions)
    return packed.reshape(*array.shape[:-1], width), norms.reshape(array.shape[:-1])


def _dequantize(code: _Code, norms: Floats, dim: int, decode: Callable[[Bytes, np.dtype[Any]], Floats]) -> Floats:
    packed, scale = code.packed.reshape(norms.size, -1), norms.reshape(-1, 1)
    result = np.empty((norms.size, dim), norms.dtype)
    for part in slices(norms.size, max(dim, 8 * packed.shape[1])):
        result[part] = decode(packed[part], norms.dtype) * scale[part]
    return result.reshape(*norms.shape, dim)


def _products(queries: Floats, code: _Code, norms: Floats, decode: Callable[[Bytes, np.dtype[Any]], Floats]) -> Floats:
    """Returns products of shape (queries, vectors).  Queries are in the domain of the vectors that decode returns."""
    packed, scale = code.packed.reshape(norms.size, -1), norms.reshape(-1)
    result = np.empty((len(queries), norms.size), np.result_type(queries, norms))
    for part in slices(norms.size, 8 * packed.shape[1]):
        result[:, part] = queries @ decode(packed[part], norms.dtype).T * scale[part]
    return result


def _check_code(code: _Code, kind: type[_Code], width: int) -> Floats:
    """Returns the norms of a code.  Raises TBQError for anything that quantize cannot have returned."""
    if not isinstance(code, kind):
        raise TBQError(f"code is a {type(code).__name__}; it must be a {kind.__name__}")
    norms = check_lengths(code.norms, "code.norms")
    packed: object = code.packed
    if not isinstance(packed, np.ndarray) or packed.dtype != np.uint8 or packed.shape != (*norms.shape, width):
        found = f"{packed.dtype} {packed.shape}" if isinstance(packed, np.ndarray) else type(packed).__name__
        raise TBQError(f"code.packed is {found}; with norms {norms.shape} it must be uint8 {(*norms.shape, width)}")
    return norms
