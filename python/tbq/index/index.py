# SPDX-License-Identifier: MIT
"""A flat vector index: nearest neighbors by inner product, cosine or distance, over vectors of 2 to 4 bits a value.

    >>> import numpy as np
    >>> from tbq.index import Index
    >>> x = np.random.default_rng(0).standard_normal((1000, 100), dtype=np.float32)
    >>> index = Index(100, bits=4, metric="cosine")
    >>> index.add(x)[-1]
    999
    >>> scores, ids = index.search(x[:2], k=3)
    >>> ids.shape, ids[:, 0].tolist()
    ((2, 3), [0, 1])

There is no training.  A vector is scaled to a root mean square of 1 and cut into blocks of 64 values; zeros fill the
last block.  The blocks are quantized as tbq2_0, tbq3_0 or tbq4_0, and the vector's length is kept as a float.  Every
search is exhaustive: it reads all vectors.

CENTER

Vectors around a point far from 0 differ little compared with their lengths, so rounding would hide the differences.
Therefore a center c is subtracted first: x = c + r, and the residual r is quantized.  For cosine, x is a unit vector.
Scores remain those of x:

    l2           |q - x|^2 = |q - c|^2 - 2 <q - c, r> + |r|^2
    ip, cosine   <q, x> = <q, c> + <q - b e, r> + b <e, r>    with e = c / |c|, b = <q, e>

<e, r> is kept as a float for each vector, so the direction that queries and vectors have in common is not rounded.

The center is measured from the first 256 vectors (see _measure_center).  While there are fewer, it is measured from all
of them, again after each change; they are kept as float32 for that.  So the result depends neither on how the vectors
are divided into calls nor on saving and loading in between.  Why 256: a center of n vectors adds 1.2/n to the squared
error (it is the mean of the middle half of the values).  With 256 that is 0.5 %; the rounding of a query costs as much.

FILE (version 2; little-endian; sections begin at multiples of 64, with zeros between them)

    offset  type      content
         0  char[8]   TBQINDEX
         8  u32       version of this layout: 2
        12  u32       version of the block format (tbq.h): 1
        16  u32       bits: 2, 3 or 4
        20  u32       metric: 0 ip, 1 cosine, 2 l2
        24  u32       estimator: 0 mse, 1 unbiased
        28  u32       bytes of a value in originals: 0 (not kept), 2 or 4
        32  u64       dim
        40  u64       n, the number of vectors; groups = ceil(n / 16), blocks = ceil(dim / 64)
        48  u64       next: the id of the next vector, larger than every id in use
        56  u32       1 if there is a center
        60  u32       its source: 0 the caller (or there will never be one), 1 the first 256 vectors, 2 fewer so far
        64  u32[8]    CRC-32 of each section
        96  u32       CRC-32 of the bytes before it
       100  -         zeros up to 128

    section    type  shape                         content
    center     f32   dim, or none                  the center
    d          f16   groups, blocks, 16            scales of the blocks (tbq-search.h)
    codes      u32   groups, blocks, words, 16     the blocks without scales; words is 4, 6 or 8
    mul        f32   groups * 16                   the factor of a dot product: a vector's length, and more
    add        f32   groups * 16                   l2: -|r|^2 / 2; otherwise <e, r>, none without a center
    ids        i64   n                             at least 0, all different
    originals  f16   n, dim; f32, or none          the residuals r, for rescoring
    first      f32   n, dim, or none               the vectors while the center is measured; unit vectors for cosine

Version 1 is read too.  It has neither center nor first; its CRC-32s are at 56, and the header's at 80.
Lanes without a vector, in the last group, are zero.  The file ends with the last section.
"""

import concurrent.futures
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq import blocks
from tbq._arguments import cores
from tbq._ffi import ffi, lib
from tbq._types import BLOCK, types
from tbq.errors import TBQError
from tbq.index import file
from tbq.index.checks import (
    LAST_ID,
    as_ids,
    as_numbers,
    check_choice,
    check_integer,
    check_unique,
    refuse_rows,
    unit_vectors,
)
from tbq.index.layout import (
    ESTIMATORS,
    FIRST,
    GIVEN,
    KEEPS,
    LANES,
    MEASURED,
    MEASURING,
    METRICS,
    MOST_DIMENSIONS,
    Estimator,
    Floats,
    Ids,
    Metric,
    Properties,
    aligned_zeros,
    as_bytes,
    lane_index,
)

_CHUNK = 1 << 20  # values that are encoded at a time

#: The share of a vector's energy that subtracting a measured center must remove.  Less is chance,
#: and not worth 4 bytes.
_LEAST_GAIN = 0.02
#: The share of a query's length that must lie along the center for that part to be computed separately.
_LEAST_ALONG = 1 / 64


class Index:
    """Vectors of one dimension, each with its own id, and the search for those nearest to a query.

    dim: values of a vector, at least 1.
    bits: 2, 3 or 4.  A vector takes bits + 0.25 bits a value, 4 bytes for its length (8 for l2, or with a center), and
    8 for its id.
    metric: "ip", the inner product; "cosine"; "l2", the squared Euclidean distance.
    estimator: "mse" estimates a product with the least squared error.  The estimates are too small, on average by the
    share of a vector's energy that quantization lost: 0.7 % at 4 bits, 3 % at 3, 11 % at 2.  "unbiased" divides each
    vector's estimate by the share that was kept (the estimator of RaBitQ, arXiv 2405.12497), which leaves more
    variance.
    keep: "float16" or "float32" keeps the vectors too, for `rescore`.
    center: dim numbers to subtract from vectors (from unit vectors with cosine) before they are quantized; zeros
    subtract nothing.  None measures the center of the first 256 vectors, which should be like the others.
    Several searches may run at the same time.  Nothing else may use the index while it is changed.
    Raises TBQError for other arguments.
    """

    def __init__(
        self,
        dim: SupportsIndex,
        bits: SupportsIndex = 4,
        metric: Metric = "ip",
        *,
        estimator: Estimator = "mse",
        keep: Literal["float16", "float32"] | None = None,
        center: npt.ArrayLike | None = None,
    ) -> None:
        self.dim = check_integer(dim, "dim", 1, MOST_DIMENSIONS)
        self.bits = check_integer(bits, "bits", 2, 4)
        self.metric: Metric = check_choice(metric, "metric", METRICS)
        self.estimator: Estimator = check_choice(estimator, "estimator", ESTIMATORS)
        self.keep = check_choice(keep, "keep", tuple(KEEPS))
        self._type = types[f"tbq{self.bits}_0"]
        self._blocks = -(-self.dim // BLOCK)
        self._n = 0
        self._next = 0
        given = None if center is None else self._check_center(center)
        self._source = MEASURING if given is None else GIVEN
        self._centered: bool
        self._owned: bool  # the arrays are not views of a file
        self._arrays: dict[str, npt.NDArray[Any]]
        self._allocate(given if given is not None and given.any() else None, 0)
        self._position_of: dict[int, int] | None = None  # by id; made when it is first needed

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return (
            f"Index({self.dim}, bits={self.bits}, metric={self.metric!r}, estimator={self.estimator!r}, "
            f"keep={self.keep!r}): {self._n} vectors, {self.nbytes} bytes"
        )

    def __contains__(self, id: object) -> bool:
        return isinstance(id, (int, np.integer)) and int(id) in self._position_map()

    @property
    def ids(self) -> Ids:
        """A copy of the ids, int64 of shape (len,).  Their order changes when vectors are removed."""
        return self._arrays["ids"][: self._n].copy()

    @property
    def center(self) -> Floats:
        """The vector that is subtracted before quantizing, float32 of shape (dim,); zeros without a center."""
        return self._arrays["center"].copy() if self._centered else np.zeros(self.dim, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors, their lengths, ids and originals: the size of a file without its header."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._properties.arrays(self._n).values())

    # --- changes --------------------------------------------------------------------------------------------------

    def add(
        self, vectors: npt.ArrayLike, *, threads: int | None = None, progress: Callable[[int], object] | None = None
    ) -> Ids:
        """Adds vectors under the next free ids, and returns the ids.

        vectors: numbers of shape (n, dim), or (dim,) for one; a memory-mapped array is read piece by piece.
        threads: all cores by default.  progress: called by the threads, with the number of vectors just encoded.
        Raises TBQError for another shape, a NaN, an infinity, or a length of 2^60 or more; with metric "cosine" for a
        zero vector; with keep "float16" for values beyond its range; and if no ids are left.  Then nothing is added.
        """
        x = self._as_rows(vectors, "vectors")
        if self._next + len(x) - 1 > LAST_ID:
            raise TBQError(
                f"{len(x)} vectors would get ids from {self._next}, but 2^63 - 2 is the last; add_with_ids takes others"
            )
        return self._add(x, np.arange(self._next, self._next + len(x), dtype=np.int64), threads, progress)

    def add_with_ids(
        self,
        vectors: npt.ArrayLike,
        ids: npt.ArrayLike,
        *,
        threads: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Adds vectors under the caller's ids: integers from 0 to 2^63 - 2, of shape (n,), all different.

        Otherwise as add.  Also raises TBQError for an id that the index already has, or that occurs twice.  Then
        nothing is added.
        """
        x = self._as_rows(vectors, "vectors")
        chosen = as_ids(ids)
        if len(chosen) != len(x):
            raise TBQError(f"there are {len(x)} vectors and {len(chosen)} ids")
        check_unique(chosen)
        if len(chosen) and chosen.min() < self._next:  # an id above all others cannot be taken
            lookup = self._position_map()
            taken = next((id for id in chosen.tolist() if id in lookup), None)
            if taken is not None:
                raise TBQError(f"id {taken} is already in the index")
        self._add(x, chosen, threads, progress)

    def _add(self, x: npt.NDArray[Any], ids: Ids, threads: int | None, progress: Callable[[int], object] | None) -> Ids:
        workers = _check_threads(threads)
        if not len(x):
            return ids
        before = self._arrays, self._owned, self._centered, self._source
        taken = 0
        try:
            if self._source == MEASURING:
                taken = self._measure_and_encode(x, self._n + len(x))
                if progress:
                    progress(taken)
            else:
                self._reserve(self._n + len(x))
            self._encode(x, taken, workers, progress)
        except BaseException:
            if before[3] == MEASURING:
                self._arrays, self._owned, self._centered, self._source = before
            else:
                self._clear(self._n, min(self._n + len(x), len(self._arrays["ids"])))
            raise
        self._arrays["ids"][self._n : self._n + len(x)] = ids
        if self._position_of is not None:
            self._position_of.update(zip(ids.tolist(), range(self._n, self._n + len(x))))
        self._next = max(self._next, int(ids.max()) + 1)
        self._n += len(x)  # until here, the arrays from n on do not count
        return ids

    def _encode(self, x: npt.NDArray[Any], first: int, workers: int, progress: Callable[[int], object] | None) -> None:
        """Encodes the vectors of x from number `first` on, to the positions after the present vectors."""
        step = max(1, min(_CHUNK // (self._blocks * BLOCK), -(-len(x) // workers)))

        def encode(start: int) -> None:
            some = x[start : start + step]
            self._encode_at(self._as_floats(some, start), start, self._n + start)
            if progress:
                progress(len(some))

        _map_threads(encode, range(first, len(x), step), workers)

    def _as_floats(self, values: npt.NDArray[Any], row: int) -> Floats:
        """Returns vectors as float32, unit vectors for cosine.  row: the first one's number, for messages."""
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(values, np.float32)
        return unit_vectors(x, "vectors", row, allow_zero=False)[0] if self.metric == "cosine" else x

    def _encode_at(self, x: Floats, row: int, position: int) -> None:
        """Encodes vectors, as _as_floats returns them, to the positions from `position` on."""
        m, width, arrays = len(x), self._blocks * BLOCK, self._arrays
        if self._centered:
            x = x - arrays["center"]
        is_unit = self.metric == "cosine" and not self._centered
        unit, length = (x, np.ones(m)) if is_unit else unit_vectors(x, "vectors", row, allow_zero=True)
        padded = np.zeros((m, width), np.float32)
        np.multiply(unit, math.sqrt(width), out=padded[:, : self.dim])
        packed = blocks.quantize(padded, self._type.name)
        factor = length / math.sqrt(width)
        if self.estimator == "unbiased":
            inner = np.einsum("ij,ij->i", padded, blocks.dequantize(packed, self._type.name, padded.shape))
            factor *= np.where(inner > 0, width / np.where(inner > 0, inner, 1), 1)
        status = lib.tbq_search_put(
            self._type.id,
            self._blocks,
            _pointer("char[]", packed),
            position,
            m,
            _pointer("uint16_t[]", arrays["d"]),
            _pointer("uint32_t[]", arrays["codes"]),
        )
        _check(status)
        arrays["mul"][position : position + m] = factor
        if self.metric == "l2":
            arrays["add"][position : position + m] = -0.5 * length**2
        elif self._centered:
            arrays["add"][position : position + m] = np.einsum(
                "ij,j->i", x, _unit_and_length(arrays["center"])[0].astype(np.float32)
            )
        if self.keep:
            kept = self._as_float16(x) if self.keep == "float16" else x
            why = (
                "is too far from the center for float16; keep 'float32' can hold it"
                if self._centered
                else "holds a value that float16 cannot; keep 'float32' can"
            )
            refuse_rows(np.logical_not(np.isfinite(kept).all(axis=1)), "vectors", row, why)
            arrays["originals"][position : position + m] = kept

    @staticmethod
    def _as_float16(x: Floats) -> npt.NDArray[np.float16]:
        with np.errstate(over="ignore"):
            return x.astype(np.float16)

    # --- the center -----------------------------------------------------------------------------------------------

    def _check_center(self, center: npt.ArrayLike) -> Floats:
        """Checks the caller's center and returns it as float32."""
        values = as_numbers(center, "center")
        if values.shape != (self.dim,):
            raise TBQError(f"center has shape {values.shape}; it must be ({self.dim},)")
        with np.errstate(over="ignore"):
            result = np.ascontiguousarray(values, np.float32)
        unit_vectors(result[None], "center", 0, allow_zero=True)
        return result

    def _allocate(self, center: Floats | None, room: int) -> None:
        """Makes new arrays with room for so many vectors, with or without a center."""
        self._centered = center is not None
        self._arrays = {
            name: aligned_zeros(shape, dtype) for name, (shape, dtype) in self._properties.arrays(room).items()
        }
        self._owned = True
        if center is not None:
            self._arrays["center"][:] = center

    def _measure_and_encode(self, x: npt.NDArray[Any], room: int) -> int:
        """Measures the center of the vectors that are kept for it and the first ones of x, and encodes them.

        Returns how many vectors of x it took.  The arrays are replaced by new ones, with room for so many vectors.
        """
        n = self._n
        new = self._as_floats(x[: FIRST - n], 0)
        unit_vectors(new, "vectors", 0, allow_zero=True)  # refuses vectors that cannot be averaged
        first = np.concatenate([self._arrays["first"][:n], new])
        ids = self._arrays["ids"][:n]
        center = _measure_center(first)
        if (
            self.keep == "float16"
            and not np.isfinite(self._as_float16(first if center is None else first - center)).all()
        ):
            center = self._arrays["center"] if self._centered else None  # the one that the present vectors fit
        if len(first) == FIRST:
            self._source = MEASURED
        self._allocate(center, room)
        self._arrays["ids"][:n] = ids
        if self._source == MEASURING:
            self._arrays["first"][: len(first)] = first
        self._encode_at(first, -n, 0)
        return len(new)

    def remove(self, ids: npt.ArrayLike) -> None:
        """Removes the vectors of ids, an integer or integers of shape (n,).

        The last vectors move to the positions that become free.  A center that was measured from 256 vectors stays
        until the index is empty.
        Raises TBQError for an id that is not in the index, or that occurs twice.  Then nothing is removed.
        """
        chosen = as_ids(ids)
        check_unique(chosen)
        positions = self._find_positions(chosen)
        self._reserve(self._n)
        left = self._n - len(positions)
        holes = np.sort(positions[positions < left])
        movers = np.setdiff1d(np.arange(left, self._n), positions, assume_unique=True)
        for name, array in self._vector_arrays():
            array[lane_index(name, holes)] = array[lane_index(name, movers)]
        self._clear(left, self._n)
        self._n = left
        if self._position_of is not None:
            for id in chosen.tolist():
                del self._position_of[id]
            self._position_of.update(zip(self._arrays["ids"][holes].tolist(), holes.tolist()))
        if not left and self._source != GIVEN:
            self._source = MEASURING
            self._allocate(None, 0)
        elif self._source == MEASURING:
            self._measure_and_encode(np.empty((0, self.dim), np.float32), left)

    # --- search ---------------------------------------------------------------------------------------------------

    def search(
        self, queries: npt.ArrayLike, k: SupportsIndex = 10, *, rescore: SupportsIndex = 1, threads: int | None = None
    ) -> tuple[Floats, Ids]:
        """Finds the k vectors nearest to each query: (scores, ids), the best first.

        queries: numbers of shape (n, dim), or (dim,) for one.  k: 1 to len.
        rescore: with r above 1, the r * k best are found, and the k best of these by exact products with the kept
        vectors.
        threads: all cores by default.
        Returns float32 and int64 of shape (n, k), or (k,) for one query.  Scores are estimates of inner products or
        cosines, descending, or of squared distances, ascending.  With rescore they are exact, up to the rounding of
        keep.  Results are the same on every machine and for any number of threads.
        Raises TBQError for another shape, a NaN, an infinity, a zero query with metric "cosine", an empty index,
        another k, and rescore without kept vectors.
        """
        q = self._as_rows(queries, "queries")
        if not self._n:
            raise TBQError("the index is empty")
        wanted = check_integer(k, "k", 1, self._n, note=f"; the index has {self._n} vectors")
        factor = check_integer(rescore, "rescore", 1, 1 << 31)
        if factor > 1 and not self.keep:
            raise TBQError("rescore needs the vectors themselves; make the index with keep='float16'")
        with np.errstate(over="ignore"):
            q = np.ascontiguousarray(q, np.float32)
        unit, length = unit_vectors(q, "queries", 0, allow_zero=self.metric != "cosine")
        if self.metric == "cosine":
            q, length = unit, np.ones(len(q))
        elif self.metric == "l2" and self._centered:
            q = q - self._arrays["center"]
            length = unit_vectors(q, "queries", 0, allow_zero=True)[1]
        n_found, workers = min(wanted * factor, self._n), _check_threads(threads)
        if self._centered and self.metric != "l2":
            e, size = _unit_and_length(self._arrays["center"])
            along = _row_products(q, e)
            scores, positions = self._search_along_center(q, along, length, e, n_found, workers)
            if factor > 1:
                scores, positions = self._rescore((q - along[:, None] * e).astype(np.float32), positions, wanted, along)
            scores = (scores + along[:, None] * size).astype(np.float32)
        else:
            scores, positions = self._search_blocks(q, n_found, workers, self._arrays["add"])
            if factor > 1:
                scores, positions = self._rescore(q, positions, wanted)
            elif self.metric == "l2":
                scores = np.maximum(length[:, None] ** 2 - 2.0 * scores, 0).astype(np.float32)
        ids = np.where(positions < 0, -1, self._arrays["ids"][positions])
        one = np.ndim(queries) == 1
        return (scores[0], ids[0]) if one else (scores, ids)

    def _search_along_center(
        self,
        q: Floats,
        along: npt.NDArray[np.float64],
        length: npt.NDArray[np.float64],
        e: npt.NDArray[np.float64],
        k: int,
        threads: int,
    ) -> tuple[Floats, Ids]:
        """Returns the products of queries with residuals, and positions.  b <e, r> is added exactly, without rounding.

        tbq_search adds <e, r> without a factor.  So queries are divided by |b| first, b = <q, e>, and the scores
        are multiplied by it afterwards.  Where b < 0, -<e, r> is added.
        along: b.  length: the lengths of the queries.
        """
        add = self._arrays["add"]
        sign = np.where(np.abs(along) > _LEAST_ALONG * length, np.sign(along), 0)
        scores, positions = np.empty((len(q), k), np.float32), np.empty((len(q), k), np.int64)
        for one_sign in set(sign.tolist()):
            rows = slice(None) if (sign == one_sign).all() else np.flatnonzero(sign == one_sign)
            if one_sign:
                b = along[rows, None]
                found, positions[rows] = self._search_blocks(
                    ((q[rows] - b * e) / abs(b)).astype(np.float32), k, threads, add if one_sign > 0 else -add
                )
                scores[rows] = found * abs(b)
            else:
                scores[rows], positions[rows] = self._search_blocks(q[rows], k, threads, None)
        return scores, positions

    def _search_blocks(self, q: Floats, k: int, threads: int, add: Floats | None) -> tuple[Floats, Ids]:
        """Returns scores as tbq-search.h defines them, and positions.  add: nothing is added if it is None or empty."""
        width = self._blocks * BLOCK
        padded = np.zeros((len(q), width), np.float32)
        padded[:, : self.dim] = q
        # a tbq_search_query: d, bias and 64 bytes
        prepared = np.empty((len(q), self._blocks * ffi.sizeof("tbq_search_query")), np.uint8)
        _check(
            lib.tbq_search_prepare(_pointer("float[]", padded), _pointer("tbq_search_query[]", prepared), padded.size)
        )
        rows = self._search_rows(add)

        def task(queries: slice, first: int, last: int) -> tuple[Floats, Ids]:
            part = prepared[queries]
            scores, positions = np.empty((len(part), k), np.float32), np.empty((len(part), k), np.int64)
            _check(
                lib.tbq_search(
                    rows[0],
                    first,
                    last,
                    _pointer("tbq_search_query[]", part),
                    len(part),
                    k,
                    _pointer("float[]", scores),
                    _pointer("int64_t[]", positions),
                )
            )
            return scores, positions

        if len(q) * self._n * width < 1 << 22:  # a thread takes longer to start
            threads = 1
        if threads == 1 or len(q) >= 8 * threads:  # each task some queries, and eight at once unpack codes once
            step = max(8, min(64, -(-len(q) // threads + 7) // 8 * 8)) if threads > 1 else max(len(q), 1)
            parts = _map_threads(lambda at: task(slice(at, at + step), 0, self._n), range(0, len(q), step), threads)
            if not parts:
                return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
            return np.concatenate([s for s, _ in parts]), np.concatenate([p for _, p in parts])
        step = -(-self._n // threads + LANES - 1) // LANES * LANES
        parts = _map_threads(
            lambda at: task(slice(None), at, min(at + step, self._n)), range(0, self._n, step), threads
        )
        return _top_k(np.concatenate([s for s, _ in parts], 1), np.concatenate([p for _, p in parts], 1), k)

    def _rescore(
        self, q: Floats, positions: Ids, k: int, along: npt.NDArray[np.float64] | None = None
    ) -> tuple[Floats, Ids]:
        """Returns the k best of the vectors at these positions, by <q, r> + along * add, or for l2 by -|q - r|^2.

        r is the kept residual.
        """
        kept = self._arrays["originals"]
        scores = np.empty(positions.shape, np.float32)
        step = max(1, _CHUNK // (positions.shape[1] * self.dim))
        for at in range(0, len(q), step):
            some = kept[positions[at : at + step]].astype(np.float32)  # queries, candidates, dim
            if self.metric == "l2":
                some -= q[at : at + step, None]
                scores[at : at + step] = -np.einsum("qcd,qcd->qc", some, some)
            else:
                scores[at : at + step] = (some @ q[at : at + step, :, None])[..., 0]
        if along is not None:
            scores = (scores + along[:, None] * self._arrays["add"][positions]).astype(np.float32)
        scores, positions = _top_k(np.where(positions < 0, -np.inf, scores), positions, k)
        return (-scores if self.metric == "l2" else scores), positions

    def reconstruct(self, ids: npt.ArrayLike) -> Floats:
        """Decodes the vectors of ids: float32 of shape (n, dim), or (dim,) for one id; unit vectors for cosine.

        Raises TBQError for an id that is not in the index.
        """
        positions = self._find_positions(as_ids(ids))
        packed = np.empty((len(positions), self._blocks * self._type.block_bytes), np.uint8)
        arrays = self._arrays
        status = lib.tbq_search_get(
            self._type.id,
            self._blocks,
            _pointer("uint16_t[]", arrays["d"]),
            _pointer("uint32_t[]", arrays["codes"]),
            _pointer("int64_t[]", positions),
            len(positions),
            _pointer("char[]", packed),
        )
        _check(status)
        values = blocks.dequantize(packed, self._type.name, (len(positions), self._blocks * BLOCK))[:, : self.dim]
        scaled: Floats = values * arrays["mul"][positions, None]
        if self._centered:
            scaled += arrays["center"]
        return scaled[0] if np.ndim(ids) == 0 else scaled

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file in one step: under another name in the same folder, flushed to the disk, and then renamed.

        An older file of this name stays until the new one is complete.  An index that was loaded from the older file
        keeps reading it.
        """
        file.save(path, self._properties, self._arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> "Index":
        """Loads an index.  The file is mapped: pages are read when they are needed, and copied before a change.

        verify: compare the checksums of the sections, which reads the file once.  The header, its numbers against the
        size of the file, and the center are always checked.
        The file must not be changed in place while the index is in use; save() replaces it instead.
        Raises TBQError for a file that is not an index, is truncated or corrupt; OSError for one that cannot be read.
        """
        properties, arrays = file.load(pathlib.Path(path), verify)
        p = properties
        index = cls(p.dim, p.bits, p.metric, estimator=p.estimator, keep=p.keep)  # type: ignore[arg-type]
        index._n, index._next, index._centered, index._source = p.n, p.next_id, p.centered, p.source
        index._arrays.update(arrays)
        index._owned = False
        return index

    # --- helpers --------------------------------------------------------------------------------------------------

    @property
    def _properties(self) -> Properties:
        return Properties(
            self.dim,
            self.bits,
            self.metric,
            self.estimator,
            self.keep,
            self._n,
            self._next,
            self._centered,
            self._source,
        )

    def _reserve(self, n: int) -> None:
        """Makes sure that the arrays are in memory, not in a file, and have room for n vectors."""
        room = len(self._arrays["ids"])
        if self._owned and n <= room:
            return
        larger = self._properties.arrays(max(n, room + room // 2) if n > room else room)
        arrays = {}
        for name, (shape, dtype) in larger.items():
            arrays[name] = aligned_zeros(shape, dtype)
            arrays[name][: len(self._arrays[name])] = self._arrays[name]
        self._arrays, self._owned = arrays, True

    def _vector_arrays(self) -> list[tuple[str, npt.NDArray[Any]]]:
        """Returns the arrays that have an element for each vector."""
        return [(name, array) for name, array in self._arrays.items() if array.size and name != "center"]

    def _clear(self, first: int, last: int) -> None:
        """Sets positions without a vector to zero: a file has no trace of vectors that were removed or refused."""
        for name, array in self._vector_arrays():
            array[lane_index(name, np.arange(first, last))] = 0

    def _search_rows(self, add: Floats | None) -> tuple[Any, list[Any]]:
        """Returns a tbq_search_rows, and the buffers that it points to."""
        names = {"d": "uint16_t[]", "codes": "uint32_t[]", "mul": "float[]"}
        pointers = {name: _pointer(ctype, self._arrays[name]) for name, ctype in names.items()}
        if add is not None and add.size:
            pointers["add"] = _pointer("float[]", add)
        rows = ffi.new(
            "tbq_search_rows *",
            {"type": self._type.id, "blocks": self._blocks, "n": self._n, "add": ffi.NULL, **pointers},
        )
        return rows, list(pointers.values())

    def _as_rows(self, values: npt.ArrayLike, what: str) -> npt.NDArray[Any]:
        """Returns a view of shape (n, dim), with the dtype unchanged."""
        array = as_numbers(values, what)
        if array.ndim not in (1, 2) or array.shape[-1] != self.dim:
            raise TBQError(f"{what} have shape {array.shape}; it must be (n, {self.dim}), or ({self.dim},) for one")
        return array.reshape(-1, self.dim)

    def _position_map(self) -> dict[int, int]:
        if self._position_of is None:
            self._position_of = dict(zip(self._arrays["ids"][: self._n].tolist(), range(self._n)))
        return self._position_of

    def _find_positions(self, ids: Ids) -> Ids:
        lookup = self._position_map()
        try:
            return np.fromiter((lookup[id] for id in ids.tolist()), np.int64, len(ids))
        except KeyError as missing:
            raise TBQError(f"id {missing.args[0]} is not in the index") from None


def _row_products(x: Floats, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the product of each row of x with y, or with the same row of y.

    NumPy's sum has the same order on every machine; einsum and @ do not.
    """
    result: npt.NDArray[np.float64] = (x * y).sum(axis=1)
    return result


def _unit_and_length(center: Floats) -> tuple[npt.NDArray[np.float64], float]:
    """Returns the unit vector in the direction of the center, and the center's length."""
    wide = center.astype(np.float64)
    size = math.sqrt(float((wide * wide).sum()))
    return wide / size, size


def _measure_center(first: Floats) -> Floats | None:
    """Returns the center of vectors, which does not depend on their order; None if a center would gain nothing.

    In each dimension it is the mean of the middle half of the values, so a few vectors far from the others do not move
    it.  A center gains something if subtracting it removes at least 2 % of the energy of three of four vectors.  By
    chance it removes about 1/n.
    """
    n = len(first)
    center: Floats = np.sort(first, axis=0)[n // 4 : n - n // 4].mean(axis=0, dtype=np.float64).astype(np.float32)
    left = first - center.astype(np.float64)
    energy, rest = _row_products(first, first.astype(np.float64)), (left * left).sum(axis=1)
    share = np.sort(np.divide(rest, energy, out=np.full(n, np.inf), where=energy > 0))
    return center if center.any() and share[min(3 * n // 4, n - 1)] <= 1 - _LEAST_GAIN else None


def _check_threads(threads: int | None) -> int:
    return cores() if threads is None else check_integer(threads, "threads", 1, 4096)


def _map_threads(function: Callable[[int], Any], arguments: Iterable[int], threads: int) -> list[Any]:
    """Returns [function(a) for a in arguments], computed by several threads."""
    todo = list(arguments)
    if threads == 1 or len(todo) < 2:
        return [function(a) for a in todo]
    with concurrent.futures.ThreadPoolExecutor(min(threads, len(todo))) as pool:
        futures = [pool.submit(function, a) for a in todo]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()  # after an error, the others need not start


def _top_k(scores: Floats, positions: Ids, k: int) -> tuple[Floats, Ids]:
    """Returns the k highest scores of each row; of equal scores, those at the lowest positions."""
    order = np.lexsort((positions, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)


def _pointer(ctype: str, array: npt.NDArray[Any]) -> Any:
    # from_buffer takes read-only memory if require_writable is not set; the library writes to results only
    return ffi.from_buffer(ctype, as_bytes(array))


def _check(status: int) -> None:
    if status != lib.TBQ_OK:
        raise TBQError(ffi.string(lib.tbq_status_text(status)).decode())
