# SPDX-License-Identifier: MIT
"""Fractional bits per value: channels with outliers get more bits (TurboQuant, section on the KV cache)."""

import dataclasses
import math
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import Floats, as_floats, as_vectors, check_integer, check_seed, random_stream
from tbq.turboquant.quantizers import InnerProductCode, InnerProductQuantizer, MSECode, MSEQuantizer

__all__ = ["MixedCode", "MixedQuantizer", "outlier_channels"]


@dataclasses.dataclass(frozen=True, eq=False)
class MixedCode:
    """The codes of the two sets of channels."""

    outliers: MSECode | InnerProductCode
    rest: MSECode | InnerProductCode

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the vectors, without their last axis."""
        return self.rest.shape

    @property
    def nbytes(self) -> int:
        return self.outliers.nbytes + self.rest.nbytes


class MixedQuantizer:
    """Two independent quantizers, for the channels with outliers and for the rest, each with its rotation and norms.

    dim: 2 or more.
    bits: the mean over all channels, 1 to 8, for example 2.5 or 3.5.  The rest gets this number rounded down.  The
    outliers get so many bits that the mean is right; these must be a whole number.  For 2.5 bits, a quarter of the
    channels may have 4 bits and the others 2, or half of them 3.  (The paper's 32 channels of 128 with 3 bits, the
    others with 2, are 2.25.)
    outliers: the numbers of the channels, at least 1 and not all; outlier_channels finds them.
    inner_product: use InnerProductQuantizers, which are unbiased, instead of MSEQuantizers.
    seed, rotation: as in MSEQuantizer, but rotation must be "haar" or "hadamard".
    Raises TBQError for other values.
    """

    def __init__(
        self,
        dim: SupportsIndex,
        bits: SupportsFloat,
        outliers: npt.ArrayLike,
        *,
        inner_product: bool = False,
        seed: SupportsIndex = 0,
        rotation: str = "haar",
    ) -> None:
        self.dim, self.seed = check_integer(dim, "dim", 2), check_seed(seed)
        self.outliers = _check_channels(outliers, self.dim)
        self.rest = np.setdiff1d(np.arange(self.dim), self.outliers)
        self.low, self.high = _split_bits(bits, len(self.outliers), self.dim)
        if not isinstance(rotation, str):
            raise TBQError("rotation must be 'haar' or 'hadamard'; the two sets of channels need one each")
        kind: Any = InnerProductQuantizer if inner_product else MSEQuantizer
        seeds = [int(n) for n in random_stream(self.seed, "channels").randint(0, 2**63, 2, dtype=np.int64)]
        # typed Any: the quantizer that gets a code of the wrong kind raises the error
        self._quantizers: tuple[Any, Any] = (
            kind(len(self.outliers), self.high, seed=seeds[0], rotation=rotation),
            kind(len(self.rest), self.low, seed=seeds[1], rotation=rotation),
        )

    @property
    def bits(self) -> float:
        """Bits per value, without norms."""
        return (len(self.outliers) * self.high + len(self.rest) * self.low) / self.dim

    def quantize(self, x: npt.ArrayLike) -> MixedCode:
        """x: float32 or float64 of shape (..., dim), vectors of any length.

        Raises TBQError for another dtype or last axis, an empty axis, NaN and infinity.
        """
        array = as_vectors(x, self.dim)
        return MixedCode(
            self._quantizers[0].quantize(array[..., self.outliers]), self._quantizers[1].quantize(array[..., self.rest])
        )

    def dequantize(self, code: MixedCode) -> Floats:
        """The vectors of a code, (..., dim), in the dtype that was quantized.

        Raises TBQError for a code that this quantizer cannot have made.
        """
        _check_code(code)
        outliers, rest = self._quantizers[0].dequantize(code.outliers), self._quantizers[1].dequantize(code.rest)
        if outliers.shape[:-1] != rest.shape[:-1] or outliers.dtype != rest.dtype:
            raise TBQError(
                f"code has outliers of {outliers.dtype} {outliers.shape[:-1]} "
                f"and a rest of {rest.dtype} {rest.shape[:-1]}"
            )
        result = np.empty((*rest.shape[:-1], self.dim), rest.dtype)
        result[..., self.outliers], result[..., self.rest] = outliers, rest
        return result

    def inner_products(self, queries: npt.ArrayLike, code: MixedCode) -> Floats:
        """Returns <query, vector> for each query and each vector of a code.

        queries: float32 or float64 of shape (..., dim).
        Returns an array of shape (queries' leading axes, code's axes), in the wider of the two dtypes.
        Raises TBQError for queries as quantize does for x, for a code as dequantize does.
        """
        _check_code(code)
        array = as_vectors(queries, self.dim, "queries")
        outliers: Floats = self._quantizers[0].inner_products(array[..., self.outliers], code.outliers)
        rest: Floats = self._quantizers[1].inner_products(array[..., self.rest], code.rest)
        if outliers.shape != rest.shape:
            raise TBQError(f"code has outliers {code.outliers.shape} and a rest {code.rest.shape}")
        total: Floats = outliers + rest
        return total


def outlier_channels(sample: npt.ArrayLike, count: SupportsIndex) -> npt.NDArray[np.intp]:
    """Returns the channels with the most energy: the largest mean square over all vectors of a sample.

    sample: float32 or float64 of shape (..., dim), finite.  count: 1 to dim - 1.
    Returns `count` numbers of channels, ascending.  Raises TBQError for other values.
    """
    array = as_floats(sample, "sample")
    n = check_integer(count, "count", 1, max(array.shape[-1] - 1, 1))
    rows = array.reshape(-1, array.shape[-1]) / (float(np.abs(array).max()) or 1.0)  # so that no square overflows
    energy = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return np.sort(np.argsort(-energy, kind="stable")[:n])


def _check_channels(values: npt.ArrayLike, dim: int) -> npt.NDArray[np.intp]:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TBQError(
            f"outliers has shape {array.shape} and dtype {array.dtype}; it must be a list of channel numbers"
        )
    if not 0 < len(array) < dim:
        raise TBQError(f"outliers names {len(array)} of {dim} channels; it must name at least 1, but not all")
    if array.min() < 0 or array.max() >= dim:
        raise TBQError(f"outliers reach from {array.min()} to {array.max()}; channels are 0 to {dim - 1}")
    if len(np.unique(array)) < len(array):
        raise TBQError("outliers names a channel twice")
    return np.sort(array).astype(np.intp)


def _split_bits(bits: SupportsFloat, count: int, dim: int) -> tuple[int, int]:
    """Returns (bits of the rest, bits of the outliers)."""
    try:
        mean = float(bits)
    except (TypeError, ValueError):
        raise TBQError(f"bits is {bits!r}; it must be a number from 1 to 8") from None
    if not 1 <= mean <= 8:
        raise TBQError(f"bits is {mean:g}; it must be a number from 1 to 8")
    low = math.floor(mean)
    extra = (mean - low) * dim / count
    if extra != round(extra) or low + extra > 8:
        counts = {(mean - low) * dim / more for more in range(1, 9 - low)}
        fits = sorted(int(n) for n in counts if n == round(n) and 0 < n < dim)
        raise TBQError(
            f"bits is {mean:g} and outliers names {count} of {dim} channels, which would need {low + extra:g} bits; "
            + (f"name {' or '.join(map(str, fits))}" if fits else f"no number of channels gives {mean:g}")
        )
    return low, low + round(extra)


def _check_code(code: object) -> None:
    if not isinstance(code, MixedCode):
        raise TBQError(f"code is a {type(code).__name__}; it must be a MixedCode")
