# SPDX-License-Identifier: MIT
"""Reads what is in a GGUF file, and measures how far its weights are from an original: `tbq inspect`."""

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tbq import blocks
from tbq._arguments import cores
from tbq._types import BLOCK, TypeInfo, types
from tbq.errors import TBQError
from tbq.gguf_files.codecs import decoder
from tbq.gguf_files.reader import GGUFModel, Tensor, open_gguf, read_pieces

#: Values at a time: a multiple of every type's block, and few enough that all intermediate results fit the CPU's cache.
CHUNK = 1 << 17

#: Bins for the picture: errors from -1 to 1, relative to the root mean square of the weights around them.
ERROR_BINS = 200
#: Bins of log10 of scales: f16 reaches from 6e-8 to 65504.
SCALE_BINS = np.linspace(-7.5, 5, 251)


@dataclass
class Blocks:
    """Statistics of the blocks of a tbq tensor, or of all tensors of a type."""

    scales: tuple[float, float, float] = (math.nan,) * 3  #: smallest, median, largest; for a single tensor only
    zero: int = 0  #: blocks with scale 0
    corrupt: int = 0  #: blocks whose scale is NaN or infinite
    #: how often each level of the codebook is used
    use: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SCALE_BINS) - 1, np.int64))

    @property
    def entropy(self) -> float:
        """Bits of information in an index; log2 of the number of levels if all levels are used equally often."""
        share = self.use[self.use > 0] / max(1, self.use.sum())
        return float(-(share * np.log2(share)).sum())


@dataclass
class Entry:
    """A tensor of the file."""

    tensor: Tensor
    blocks: Blocks | None = None  #: of tbq tensors
    #: norm of the difference from the original, divided by the norm of the original; None without values
    error: float | None = None
    cosine: float | None = None  #: of the angle between the tensor and the original


@dataclass
class Inspection:
    model: GGUFModel
    entries: list[Entry]
    totals: dict[str, Blocks]  #: by tbq type
    errors: dict[str, npt.NDArray[np.int64]]  #: by type: counts in ERROR_BINS
    missing: list[str]  #: names of tensors that the original does not have


def inspect(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    header_only: bool = False,
    threads: int | None = None,
    progress: bool = False,
) -> Inspection:
    """Reads a GGUF file (all files of a split): its tensors, and the scales and codebook use of tbq tensors.

    against: the file that this one was converted from.  If it is given, each tensor has an `error` and a `cosine`.
    header_only: read no weights.  threads: all cores if None.  progress: show a bar.
    Raises TBQError for a bad file, or for two files that have no tensor in common.
    """
    model = open_gguf(path)
    report = Inspection(model, [Entry(tensor) for tensor in model.tensors], {}, {}, [])
    pairs: list[tuple[Entry, Tensor | None]] = [(entry, None) for entry in report.entries]
    if against is not None:
        originals = {tensor.name: tensor for tensor in open_gguf(against).tensors}
        pairs = [(entry, originals.get(entry.tensor.name)) for entry in report.entries]
        _check_pairs(pairs, path, against)
        report.missing = [entry.tensor.name for entry, original in pairs if original is None]
    if not header_only:
        threads = cores() if threads is None else threads
        if not isinstance(threads, int) or threads < 1:
            raise TBQError(f"threads is {threads!r}; it must be an integer, at least 1")
        with ThreadPoolExecutor(threads) as pool, _progress_bar(pairs, progress) as advance:
            for entry, original in pairs:
                _read_tensor(report, entry, original, pool, 2 * threads, advance)
    return report


def _check_pairs(pairs: Sequence[tuple[Entry, Tensor | None]], path: object, against: object) -> None:
    for entry, original in pairs:
        if original is not None and original.shape != entry.tensor.shape:
            raise TBQError(
                f"{path} was not made from {against}: {entry.tensor.name} is {list(entry.tensor.shape)} "
                f"and {list(original.shape)}"
            )
    if all(original is None for _, original in pairs):
        raise TBQError(f"{path} and {against} have no tensor in common")


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What a piece of a tensor adds to the statistics."""

    scales: npt.NDArray[np.float16] | None = None
    use: npt.NDArray[np.int64] | None = None
    products: npt.NDArray[np.float64] | None = None  #: of (new, new), (old, old), (new, old), (difference, difference)
    errors: npt.NDArray[np.int64] | None = None


def _read_tensor(
    report: Inspection,
    entry: Entry,
    original: Tensor | None,
    pool: ThreadPoolExecutor,
    window: int,
    advance: Callable[[int], None],
) -> None:
    info = types.get(entry.tensor.type.name.lower())
    try:
        decoders = original and (decoder(entry.tensor.type), decoder(original.type))
    except TBQError:  # integers, for example
        decoders = None
    if entry.tensor.n_values == 0 or info is None and not decoders:
        return
    sums = list(
        _map_pieces(
            pool,
            window,
            advance,
            lambda new, old: _sum_piece(info, decoders, new, old),
            read_pieces(entry.tensor, CHUNK),
            read_pieces(original, CHUNK) if original and decoders else None,
        )
    )
    if info is not None:
        entry.blocks = _block_statistics(
            [s.scales for s in sums if s.scales is not None], [s.use for s in sums if s.use is not None]
        )
        _add_to_total(
            report.totals.setdefault(info.name, Blocks(use=np.zeros(len(info.levels), np.int64))), entry.blocks
        )
    if decoders:
        new, old, both, difference = np.sum([s.products for s in sums if s.products is not None], axis=0)
        with np.errstate(all="ignore"):
            entry.error = float(np.sqrt(difference / old)) if difference else 0.0
            entry.cosine = float(both / np.sqrt(new * old)) if difference else 1.0
        counts = report.errors.setdefault(entry.tensor.type.name.lower(), np.zeros(ERROR_BINS, np.int64))
        counts += np.sum([s.errors for s in sums if s.errors is not None], axis=0)


def _map_pieces(
    pool: ThreadPoolExecutor,
    window: int,
    advance: Callable[[int], None],
    function: Callable[[Any, Any], _Sums],
    new: Iterable[npt.NDArray[np.uint8]],
    old: Iterable[npt.NDArray[np.uint8]] | None,
) -> Iterator[_Sums]:
    """Yields function(piece, original piece) for all pieces, in order.  Few pieces are in memory at a time."""
    waiting: deque[Any] = deque()
    for pair in zip(new, old) if old is not None else ((piece, None) for piece in new):
        waiting.append(pool.submit(function, *pair))
        advance(len(pair[0]))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _sum_piece(
    info: TypeInfo | None, decoders: Any, new: npt.NDArray[np.uint8], old: npt.NDArray[np.uint8] | None
) -> _Sums:
    sums = _Sums()
    if info is not None:
        sums.scales, sums.use = scales_and_use(new, info)
    if decoders and old is not None:
        with np.errstate(all="ignore"):
            x, y = (decode(data).astype(np.float64) for decode, data in zip(decoders, (new, old)))
            difference = x - y
            # not x @ y: in each of these threads, BLAS would start threads of its own
            sums.products = np.array(
                [np.einsum("i,i->", a, b) for a, b in ((x, x), (y, y), (x, y), (difference, difference))]
            )
            rms = np.sqrt(sums.products[1] / len(y)) or 1.0
            place = np.nan_to_num((difference / rms + 1) * (ERROR_BINS / 2)).clip(0, ERROR_BINS - 1).astype(np.int64)
            sums.errors = np.bincount(place, minlength=ERROR_BINS)
    return sums


def scales_and_use(
    data: npt.NDArray[np.uint8], info: TypeInfo
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]:
    """Returns the scales of blocks, and how often each level of the codebook is used.

    The library decodes the blocks with a scale of 1.  Rotating the result gives the integers of the codebook again.
    """
    packed = data.reshape(-1, info.block_bytes).copy()
    scales = packed[:, :2].copy().view("<f2").reshape(-1)  # a block begins with its scale (tbq.h)
    packed[:, :2] = np.array([1], "<f2").view(np.uint8)
    values = blocks.dequantize(packed, info.name, len(packed) * BLOCK)
    rotated = blocks.rotate(values)
    lowest = info.levels[0]
    counts = np.bincount(np.rint(rotated).astype(np.int64) - lowest, minlength=info.levels[-1] - lowest + 1)
    return scales, counts[np.array(info.levels) - lowest]


def _block_statistics(scales: list[npt.NDArray[np.float16]], use: list[npt.NDArray[np.int64]]) -> Blocks:
    d = np.concatenate(scales).astype(np.float32)
    good = d[np.isfinite(d)]
    result = Blocks(zero=int((good == 0).sum()), corrupt=len(d) - len(good), use=np.sum(use, axis=0))
    if len(good):
        result.scales = float(good.min()), float(np.median(good)), float(good.max())
    result.histogram = np.histogram(np.log10(good[good > 0]), SCALE_BINS)[0].astype(np.int64)
    return result


def _add_to_total(total: Blocks, part: Blocks) -> None:
    total.zero += part.zero
    total.corrupt += part.corrupt
    total.use = total.use + part.use
    total.histogram = total.histogram + part.histogram


@contextlib.contextmanager
def _progress_bar(pairs: Sequence[tuple[Entry, Tensor | None]], show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda size: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    total = sum(
        entry.tensor.n_bytes for entry, original in pairs if original or entry.tensor.type.name.lower() in types
    )
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=0.5, disable=None) as bar:
        yield lambda size: bar.update(size) and None
