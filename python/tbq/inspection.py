# SPDX-License-Identifier: MIT
"""Says what is in a GGUF file, and what its weights lost: `tbq inspect`."""
import argparse
import contextlib
import io
import json
import math
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tbq import _coders, blocks
from tbq._run import cores
from tbq._types import BLOCK, TypeInfo, types
from tbq.errors import TBQError, printable
from tbq.gguf_files import Model, Tensor, open_gguf, pieces

CHUNK = 1 << 17  # values at a time: a multiple of every type's block, and what is made of them fits the cache

#: Bins of errors from -1 to 1, relative to the root mean square of the weights around them, for the picture.
ERROR_BINS = 200
#: Bins of log10 of scales: half precision has 6e-8 to 65504.
SCALE_BINS = np.linspace(-7.5, 5, 251)


@dataclass
class Blocks:
    """What the blocks of a tbq tensor, or of all tensors of a type, have."""

    scales: tuple[float, float, float] = (math.nan,) * 3  #: smallest, median, largest; of a tensor only
    zero: int = 0  #: blocks with scale 0
    damaged: int = 0  #: blocks whose scale is NaN or infinite
    use: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  #: how often each level of the codebook is used
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SCALE_BINS) - 1, np.int64))

    @property
    def entropy(self) -> float:
        """Bits that an index carries; log2 of the number of levels if all are used alike."""
        share = self.use[self.use > 0] / max(1, self.use.sum())
        return float(-(share * np.log2(share)).sum())


@dataclass
class Entry:
    """A tensor of the file."""

    tensor: Tensor
    blocks: Blocks | None = None  #: of tbq tensors
    error: float | None = None  #: norm of the difference to the original over the norm of the original; None without values
    cosine: float | None = None  #: of the angle to the original


@dataclass
class Report:
    model: Model
    entries: list[Entry]
    totals: dict[str, Blocks]  #: by tbq type
    errors: dict[str, npt.NDArray[np.int64]]  #: by type: counts in ERROR_BINS
    missing: list[str]  #: tensors that the original does not have


def inspect(path: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, *, header_only: bool = False,
            threads: int | None = None, progress: bool = False) -> Report:
    """Reads a GGUF file (all files of a split): tensors; of tbq tensors the scales and the use of the codebook.

    against: the file that it was converted from; gives `error` and `cosine` of each tensor.
    header_only: no weights are read.  threads: all cores if None.  progress: show a bar.
    Raises TBQError for a bad file, or two that have no tensor in common.
    """
    model = open_gguf(path)
    report = Report(model, [Entry(tensor) for tensor in model.tensors], {}, {}, [])
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
        with ThreadPoolExecutor(threads) as pool, _bar(pairs, progress) as advance:
            for entry, original in pairs:
                _read(report, entry, original, pool, 2 * threads, advance)
    return report


def _check_pairs(pairs: Sequence[tuple[Entry, Tensor | None]], path: object, against: object) -> None:
    for entry, original in pairs:
        if original is not None and original.shape != entry.tensor.shape:
            raise TBQError(f"{path} was not made from {against}: {entry.tensor.name} is {list(entry.tensor.shape)} and {list(original.shape)}")
    if all(original is None for _, original in pairs):
        raise TBQError(f"{path} and {against} have no tensor in common")


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What a piece of a tensor adds."""

    scales: npt.NDArray[np.float16] | None = None
    use: npt.NDArray[np.int64] | None = None
    products: npt.NDArray[np.float64] | None = None  #: of (new, new), (old, old), (new, old), (difference, difference)
    errors: npt.NDArray[np.int64] | None = None


def _read(report: Report, entry: Entry, original: Tensor | None, pool: ThreadPoolExecutor, window: int,
          advance: Callable[[int], None]) -> None:
    info = types.get(entry.tensor.type.name.lower())
    try:
        decoders = original and (_coders.decoder(entry.tensor.type), _coders.decoder(original.type))
    except TBQError:  # integers, for example
        decoders = None
    if entry.tensor.n_values == 0 or info is None and not decoders:
        return
    sums = list(_mapped(pool, window, advance, lambda new, old: _sums(info, decoders, new, old), pieces(entry.tensor, CHUNK),
                        pieces(original, CHUNK) if original and decoders else None))
    if info is not None:
        entry.blocks = _blocks([s.scales for s in sums if s.scales is not None], [s.use for s in sums if s.use is not None])
        _add(report.totals.setdefault(info.name, Blocks(use=np.zeros(len(info.levels), np.int64))), entry.blocks)
    if decoders:
        new, old, both, difference = np.sum([s.products for s in sums if s.products is not None], axis=0)
        with np.errstate(all="ignore"):
            entry.error = float(np.sqrt(difference / old)) if difference else 0.0
            entry.cosine = float(both / np.sqrt(new * old)) if difference else 1.0
        counts = report.errors.setdefault(entry.tensor.type.name.lower(), np.zeros(ERROR_BINS, np.int64))
        counts += np.sum([s.errors for s in sums if s.errors is not None], axis=0)


def _mapped(pool: ThreadPoolExecutor, window: int, advance: Callable[[int], None], function: Callable[[Any, Any], _Sums],
            new: Iterable[npt.NDArray[np.uint8]], old: Iterable[npt.NDArray[np.uint8]] | None) -> Iterator[_Sums]:
    """function of each pair, in order, with few pieces in memory."""
    waiting: deque[Any] = deque()
    for pair in zip(new, old) if old is not None else ((piece, None) for piece in new):
        waiting.append(pool.submit(function, *pair))
        advance(len(pair[0]))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _sums(info: TypeInfo | None, decoders: Any, new: npt.NDArray[np.uint8], old: npt.NDArray[np.uint8] | None) -> _Sums:
    sums = _Sums()
    if info is not None:
        sums.scales, sums.use = scales_and_use(new, info)
    if decoders and old is not None:
        with np.errstate(all="ignore"):
            x, y = (decode(data).astype(np.float64) for decode, data in zip(decoders, (new, old)))
            difference = x - y
            # not x @ y: BLAS would start threads of its own in each of ours
            sums.products = np.array([np.einsum("i,i->", a, b) for a, b in ((x, x), (y, y), (x, y), (difference, difference))])
            rms = np.sqrt(sums.products[1] / len(y)) or 1.0
            place = np.nan_to_num((difference / rms + 1) * (ERROR_BINS / 2)).clip(0, ERROR_BINS - 1).astype(np.int64)
            sums.errors = np.bincount(place, minlength=ERROR_BINS)
    return sums


def scales_and_use(data: npt.NDArray[np.uint8], info: TypeInfo) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]:
    """The scales of blocks, and how often each level of the codebook is used.

    The library decodes the blocks with a scale of 1 and rotates what it gets: that is the codebook's integers again.
    """
    packed = data.reshape(-1, info.block_bytes).copy()
    scales = packed[:, :2].copy().view("<f2").reshape(-1)  # a block begins with its scale (tbq.h)
    packed[:, :2] = np.array([1], "<f2").view(np.uint8)
    values = blocks.dequantize(packed, info.name, len(packed) * BLOCK)
    rotated = blocks.rotate(values)
    lowest = info.levels[0]
    counts = np.bincount(np.rint(rotated).astype(np.int64) - lowest, minlength=info.levels[-1] - lowest + 1)
    return scales, counts[np.array(info.levels) - lowest]


def _blocks(scales: list[npt.NDArray[np.float16]], use: list[npt.NDArray[np.int64]]) -> Blocks:
    d = np.concatenate(scales).astype(np.float32)
    good = d[np.isfinite(d)]
    result = Blocks(zero=int((good == 0).sum()), damaged=len(d) - len(good), use=np.sum(use, axis=0))
    if len(good):
        result.scales = float(good.min()), float(np.median(good)), float(good.max())
    result.histogram = np.histogram(np.log10(good[good > 0]), SCALE_BINS)[0].astype(np.int64)
    return result


def _add(total: Blocks, part: Blocks) -> None:
    total.zero += part.zero
    total.damaged += part.damaged
    total.use = total.use + part.use
    total.histogram = total.histogram + part.histogram


@contextlib.contextmanager
def _bar(pairs: Sequence[tuple[Entry, Tensor | None]], show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda size: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    total = sum(entry.tensor.n_bytes for entry, original in pairs if original or entry.tensor.type.name.lower() in types)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=0.5, disable=None) as bar:
        yield lambda size: bar.update(size) and None


# --- showing ------------------------------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    model, entries = report.model, report.entries
    lines = [_title(model)]
    by_type: dict[str, list[Tensor]] = {}
    for entry in entries:
        by_type.setdefault(entry.tensor.type.name.lower(), []).append(entry.tensor)
    lines += ["", f"{'type':8} {'tensors':>8} {'values':>15} {'MB':>10} {'bits':>6}"]
    for name, tensors in [*by_type.items(), ("all", list(model.tensors))]:
        values, size = sum(t.n_values for t in tensors), sum(t.n_bytes for t in tensors)
        lines.append(f"{name:8} {len(tensors):8} {values:15} {size / 1e6:10.1f} {8 * size / max(1, values):6.2f}")
    for name, total in report.totals.items():
        share = 100 * total.use / max(1, total.use.sum())
        lines += ["", f"{name}: an index carries {total.entropy:.3f} of {types[name].bits} bits; {total.zero} blocks are zero"
                  + (f", {total.damaged} ARE DAMAGED (scale NaN or infinite)" if total.damaged else ""),
                  "level " + "".join(f"{level:6}" for level in types[name].levels), "  %   " + "".join(f"{s:6.2f}" for s in share)]
    return "\n".join([*lines, "", *_tensor_lines(report)])


def _title(model: Model) -> str:
    metadata = model.metadata
    parts = [name for key in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.NAME) if (name := printable(metadata.get(key)))]
    file_type = metadata.get(gguf.Keys.General.FILE_TYPE)
    if isinstance(file_type, int) and file_type in gguf.LlamaFileType._value2member_map_:
        parts.append(gguf.LlamaFileType(file_type).name)
    files = f"{model.files[0]}" + (f" and {len(model.files) - 1} more" if model.files[1:] else "")
    return ", ".join([files, *(" ".join(part.split()) for part in parts)])


def _tensor_lines(report: Report) -> list[str]:
    compared, packed = any(e.error is not None for e in report.entries), bool(report.totals)
    width = max((len(e.tensor.name) for e in report.entries), default=6)
    shapes = [" x ".join(map(str, e.tensor.shape)) for e in report.entries]
    across = max(map(len, shapes), default=5)
    lines = [f"{'tensor':{width}}  {'shape':{across}}  {'type':8} {'bits':>6}" + (f" {'scales: smallest, median, largest':>35} {'index':>6}" if packed else "")
             + (f" {'error':>8} {'cosine':>8}" if compared else "")]
    for entry, shape in zip(report.entries, shapes):
        line = f"{entry.tensor.name:{width}}  {shape:{across}}  {entry.tensor.type.name.lower():8} {entry.tensor.bits_per_value:6.2f}"
        if packed:
            b = entry.blocks
            line += f" {b.scales[0]:11.3g} {b.scales[1]:11.3g} {b.scales[2]:11.3g} {b.entropy:6.3f}" if b else " " * 43
        if compared and entry.error is not None and entry.cosine is not None:
            line += f" {entry.error:8.5f} {entry.cosine:8.6f}"
        elif compared:  # without values, or not in the original
            line += f" {'-':>8} {'-':>8}"
        lines.append(line.rstrip())
    if report.missing:
        lines += ["", f"not in the original: {', '.join(report.missing[:8])}" + (f" and {len(report.missing) - 8} more" if report.missing[8:] else "")]
    return lines


def as_json(report: Report) -> str:
    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None  # JSON has no NaN

    def packed(b: Blocks) -> dict[str, Any]:
        return {"scales": [number(s) for s in b.scales], "zero": b.zero, "damaged": b.damaged, "entropy": b.entropy, "use": b.use.tolist()}

    tensors = [{"name": e.tensor.name, "type": e.tensor.type.name.lower(), "shape": list(e.tensor.shape), "bytes": e.tensor.n_bytes,
                "bits_per_value": e.tensor.bits_per_value, **({"blocks": packed(e.blocks)} if e.blocks else {}),
                **({"error": number(e.error), "cosine": number(e.cosine)} if e.error is not None else {})} for e in report.entries]
    return json.dumps({"files": [str(path) for path in report.model.files], "tensors": tensors,
                       "levels": {name: types[name].levels for name in report.totals}, "not_in_original": report.missing}, indent=2)


def picture(report: Report, format: str) -> bytes:
    """With an original: the distribution of errors and each tensor's error; otherwise scales and the use of the codebook."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if report.errors:
        _draw_errors(report, left, right)
    else:
        _draw_blocks(report, left, right)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=150)
    return file.getvalue()


def _draw_errors(report: Report, left: Any, right: Any) -> None:
    for name, counts in report.errors.items():
        if any(e.error for e in report.entries if e.tensor.type.name.lower() == name):
            left.stairs(counts / max(1, counts.sum()) * (ERROR_BINS / 2), np.linspace(-1, 1, ERROR_BINS + 1), label=name)
    left.set(title="errors of weights", xlabel="error, in root mean squares of the weights around it (1: or more)", ylabel="density", yscale="log")
    for name in report.errors:
        points = [(i, e.error) for i, e in enumerate(report.entries) if e.error and e.tensor.type.name.lower() == name]
        if points:
            right.plot(*zip(*points), ".", label=name)
    right.set(ylim=(0, None), title="error of each tensor", xlabel="tensor, in the order of the file", ylabel="norm of the error / norm of the original")


def _draw_blocks(report: Report, left: Any, right: Any) -> None:
    for name, total in report.totals.items():
        used = np.flatnonzero(total.histogram)
        if len(used):
            left.stairs(total.histogram[used[0]:used[-1] + 1], 10 ** SCALE_BINS[used[0]:used[-1] + 2], label=name)
        right.plot(types[name].levels, 100 * total.use / max(1, total.use.sum()), "o-", label=name)
    left.set(title="scales", xlabel="scale of a block", ylabel="blocks", xscale="log")
    right.set(title="use of the codebook", xlabel="level", ylabel="% of values")


# --- the command --------------------------------------------------------------------------------------------------


def define(parser: argparse.ArgumentParser) -> None:
    """what is in a GGUF file: tensors, scales, use of the codebook, errors"""
    parser.epilog = """examples:
  tbq inspect model-tbq4.gguf
  tbq inspect model-tbq4.gguf --against model-f16.gguf --plot errors.png"""
    parser.add_argument("file", metavar="FILE", help="the model; of a split, any of its files")
    parser.add_argument("--against", metavar="ORIGINAL", help="the file that it was made from: error and cosine of each tensor")
    parser.add_argument("--header", action="store_true", help="only what the header says, without reading weights")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PICTURE", help="also draw the distributions, for example errors.png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")

    def run(args: argparse.Namespace) -> int:
        from tbq._pictures import picture_format, replace

        if args.header and (args.plot or args.against):
            raise TBQError("--header reads no weights, which --against and --plot need")
        format = picture_format(args.plot) if args.plot else ""
        report = inspect(args.file, args.against, header_only=args.header, progress=True)
        if args.plot and not report.totals and not report.errors:
            raise TBQError(f"{args.file} has no tbq tensors to draw; --against ORIGINAL draws errors")
        print(as_json(report) if args.json else as_text(report))
        if args.plot:
            replace(args.plot, picture(report, format))
        return 0

    parser.set_defaults(run=run)
