# SPDX-License-Identifier: MIT
"""`tbq inspect`."""

import argparse
import io
import json
import math
import pathlib
from typing import Any

import gguf
import numpy as np

from tbq._types import types
from tbq.errors import TBQError, printable
from tbq.gguf_files.inspect import ERROR_BINS, SCALE_BINS, Blocks, Inspection, inspect
from tbq.gguf_files.reader import GGUFModel, Tensor


def as_text(report: Inspection) -> str:
    """The report as the text that `tbq inspect` prints."""
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
        lines += [
            "",
            f"{name}: an index carries {total.entropy:.3f} of {types[name].bits} bits; {total.zero} blocks are zero"
            + (f", {total.corrupt} ARE CORRUPT (scale NaN or infinite)" if total.corrupt else ""),
            "level " + "".join(f"{level:6}" for level in types[name].levels),
            "  %   " + "".join(f"{s:6.2f}" for s in share),
        ]
    return "\n".join([*lines, "", *_tensor_lines(report)])


def _title(model: GGUFModel) -> str:
    metadata = model.metadata
    parts = [
        name
        for key in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.NAME)
        if (name := printable(metadata.get(key)))
    ]
    file_type = metadata.get(gguf.Keys.General.FILE_TYPE)
    if isinstance(file_type, int) and file_type in gguf.LlamaFileType._value2member_map_:
        parts.append(gguf.LlamaFileType(file_type).name)
    files = f"{model.files[0]}" + (f" and {len(model.files) - 1} more" if model.files[1:] else "")
    return ", ".join([files, *(" ".join(part.split()) for part in parts)])


def _tensor_lines(report: Inspection) -> list[str]:
    compared, packed = any(e.error is not None for e in report.entries), bool(report.totals)
    width = max((len(e.tensor.name) for e in report.entries), default=6)
    shapes = [" x ".join(map(str, e.tensor.shape)) for e in report.entries]
    across = max(map(len, shapes), default=5)
    lines = [
        f"{'tensor':{width}}  {'shape':{across}}  {'type':8} {'bits':>6}"
        + (f" {'scales: smallest, median, largest':>35} {'index':>6}" if packed else "")
        + (f" {'error':>8} {'cosine':>8}" if compared else "")
    ]
    for entry, shape in zip(report.entries, shapes):
        tensor = entry.tensor
        line = f"{tensor.name:{width}}  {shape:{across}}  {tensor.type.name.lower():8} {tensor.bits_per_value:6.2f}"
        if packed:
            b = entry.blocks
            line += f" {b.scales[0]:11.3g} {b.scales[1]:11.3g} {b.scales[2]:11.3g} {b.entropy:6.3f}" if b else " " * 43
        if compared and entry.error is not None and entry.cosine is not None:
            line += f" {entry.error:8.5f} {entry.cosine:8.6f}"
        elif compared:  # the tensor has no values, or is not in the original
            line += f" {'-':>8} {'-':>8}"
        lines.append(line.rstrip())
    if report.missing:
        lines += [
            "",
            f"not in the original: {', '.join(report.missing[:8])}"
            + (f" and {len(report.missing) - 8} more" if report.missing[8:] else ""),
        ]
    return lines


def as_json(report: Inspection) -> str:
    """The report as a JSON object; null for a number that is NaN or infinite."""

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None  # JSON has no NaN

    def packed(b: Blocks) -> dict[str, Any]:
        return {
            "scales": [number(s) for s in b.scales],
            "zero": b.zero,
            "damaged": b.corrupt,  # the name of the key in files that exist
            "entropy": b.entropy,
            "use": b.use.tolist(),
        }

    tensors = [
        {
            "name": e.tensor.name,
            "type": e.tensor.type.name.lower(),
            "shape": list(e.tensor.shape),
            "bytes": e.tensor.n_bytes,
            "bits_per_value": e.tensor.bits_per_value,
            **({"blocks": packed(e.blocks)} if e.blocks else {}),
            **({"error": number(e.error), "cosine": number(e.cosine)} if e.error is not None else {}),
        }
        for e in report.entries
    ]
    return json.dumps(
        {
            "files": [str(path) for path in report.model.files],
            "tensors": tensors,
            "levels": {name: types[name].levels for name in report.totals},
            "not_in_original": report.missing,
        },
        indent=2,
    )


def picture(report: Inspection, format: str) -> bytes:
    """A picture of a file.

    With an original: the distribution of errors, and each tensor's error.  Without: scales, and the use of the
    codebook.
    """
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


def _draw_errors(report: Inspection, left: Any, right: Any) -> None:
    for name, counts in report.errors.items():
        if any(e.error for e in report.entries if e.tensor.type.name.lower() == name):
            left.stairs(
                counts / max(1, counts.sum()) * (ERROR_BINS / 2), np.linspace(-1, 1, ERROR_BINS + 1), label=name
            )
    left.set(
        title="errors of weights",
        xlabel="error, in root mean squares of the weights around it (1: or more)",
        ylabel="density",
        yscale="log",
    )
    for name in report.errors:
        points = [(i, e.error) for i, e in enumerate(report.entries) if e.error and e.tensor.type.name.lower() == name]
        if points:
            right.plot(*zip(*points), ".", label=name)
    right.set(
        ylim=(0, None),
        title="error of each tensor",
        xlabel="tensor, in the order of the file",
        ylabel="norm of the error / norm of the original",
    )


def _draw_blocks(report: Inspection, left: Any, right: Any) -> None:
    for name, total in report.totals.items():
        used = np.flatnonzero(total.histogram)
        if len(used):
            left.stairs(total.histogram[used[0] : used[-1] + 1], 10 ** SCALE_BINS[used[0] : used[-1] + 2], label=name)
        right.plot(types[name].levels, 100 * total.use / max(1, total.use.sum()), "o-", label=name)
    left.set(title="scales", xlabel="scale of a block", ylabel="blocks", xscale="log")
    right.set(title="use of the codebook", xlabel="level", ylabel="% of values")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """show what a GGUF file has: tensors, scales, use of the codebook, errors"""
    parser.epilog = """examples:
  tbq inspect model-tbq4.gguf
  tbq inspect model-tbq4.gguf --against model-f16.gguf --plot errors.png"""
    parser.add_argument("file", metavar="FILE", help="the model; any file of a split model")
    parser.add_argument(
        "--against",
        metavar="ORIGINAL",
        help="the file that FILE was made from: show the error and cosine of each tensor",
    )
    parser.add_argument("--header", action="store_true", help="show only the header, without reading weights")
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="PICTURE", help="also draw the distributions, for example errors.png"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")

    def run(args: argparse.Namespace) -> int:
        from tbq._files import replace
        from tbq._plots import picture_format

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
