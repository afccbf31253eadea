#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Measures the distortions of TurboQuant and draws them with the bounds: python tools/figures/turboquant.py FOLDER.

The pictures are like those in the paper's section of experiments.  docs/measurements/turboquant.md shows them.
"""

import argparse
import io
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tbq import turboquant as tq
from tbq._files import replace
from tbq.cli._argument import at_least_one
from tbq.errors import TBQError, one_line
from tbq.programs.signals import interruptible
from tbq.turboquant._checks import random_stream
from tbq.turboquant.rotations import DENSE_LIMIT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

BITS = range(1, 9)
SEEDS = 8
VECTORS, QUERIES = 256, 64
COSINES = np.linspace(-1, 1, 9)
ROTATION_DIMS, ROTATION_BITS, ROTATION_SEEDS = (64, 256, 1024), (1, 2, 4), 200


@dataclass(frozen=True)
class Measured:
    """A mean over seeds and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Measured":
        return cls(float(np.mean(samples)), float(np.std(samples, ddof=1) / math.sqrt(len(samples))))


@dataclass(frozen=True)
class Distortions:
    """Errors for one kind of input, by number of bits."""

    mse: list[Measured]  #: E |x - x'|^2 of MSEQuantizer
    product: list[Measured]  #: dim * E (<y, x> - <y, x'>)^2 of InnerProductQuantizer
    rescaled: list[Measured]  #: the same error of MSEQuantizer, unbiased


def random_unit_vectors(count: int, dim: int, purpose: str) -> Array:
    return to_unit_vectors(random_stream(0, purpose).standard_normal((count, dim)))


def to_unit_vectors(rows: Array) -> Array:
    found: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def embeddings(model: pathlib.Path) -> Array:
    """Reads token embeddings of a GGUF file, spread over its vocabulary, as unit vectors: (VECTORS, dim)."""
    from tbq.gguf_files.codecs import decoder
    from tbq.gguf_files.reader import open_gguf, read_pieces

    found = [
        tensor for tensor in open_gguf(model).tensors if tensor.name == "token_embd.weight" and len(tensor.shape) == 2
    ]
    if not found:
        raise TBQError(f"{model} has no tensor token_embd.weight with two axes")
    rows, dim = found[0].shape
    decode, step, kept = decoder(found[0].type), max(1, rows // VECTORS), []
    for data in read_pieces(found[0], step * dim):
        usable = [
            row for row in decode(data).reshape(-1, dim).astype(np.float64) if np.isfinite(row).all() and np.any(row)
        ]
        kept += usable[:1]
    if len(kept) < VECTORS:
        raise TBQError(f"{model} has {len(kept)} token embeddings that could be used; {VECTORS} are needed")
    return to_unit_vectors(np.stack(kept[:VECTORS]))


def measure(x: Array, advance: Callable[[], object]) -> Distortions:
    """Measures the errors for unit vectors x, (n, dim).

    Queries are random vectors and vectors of x, so that some inner products are large.
    """
    dim = x.shape[1]
    queries = np.concatenate([random_unit_vectors(QUERIES, dim, "queries"), x[:QUERIES]])
    exact = queries @ x.T
    mse: list[list[float]] = [[] for _ in BITS]
    product: list[list[float]] = [[] for _ in BITS]
    rescaled: list[list[float]] = [[] for _ in BITS]
    for seed in range(SEEDS):
        rotation = tq.HaarRotation(dim, seed)
        for i, bits in enumerate(BITS):
            first = tq.MSEQuantizer(dim, bits, seed=seed, rotation=rotation)
            second = tq.InnerProductQuantizer(dim, bits, seed=seed, rotation=rotation)
            code = first.quantize(x)
            mse[i].append(float(np.mean(np.sum((x - first.dequantize(code)) ** 2, axis=1))))
            rescaled[i].append(float(dim * np.mean((first.inner_products(queries, code, unbiased=True) - exact) ** 2)))
            product[i].append(float(dim * np.mean((second.inner_products(queries, second.quantize(x)) - exact) ** 2)))
            advance()
    return Distortions(*([Measured.of(samples) for samples in each] for each in (mse, product, rescaled)))


def measure_bias(dim: int, bits: int, advance: Callable[[], object]) -> dict[str, tuple[Array, Array]]:
    """Measures <y, x'> - <y, x> at each of COSINES: (mean, standard deviation), by name of the quantizer."""
    x = random_unit_vectors(VECTORS, dim, "vectors")
    across = random_unit_vectors(VECTORS, dim, "directions")
    across = to_unit_vectors(across - np.sum(across * x, axis=1, keepdims=True) * x)
    queries = COSINES[:, None, None] * x + np.sqrt(1 - COSINES**2)[:, None, None] * across
    errors: dict[str, list[Array]] = {}
    for seed in range(SEEDS):
        rotation = tq.HaarRotation(dim, seed)
        first = tq.MSEQuantizer(dim, bits, seed=seed, rotation=rotation)
        second = tq.InnerProductQuantizer(dim, bits, seed=seed, rotation=rotation)
        code = first.quantize(x)
        for name, decoded in (
            ("MSEQuantizer", first.dequantize(code)),
            ("MSEQuantizer, unbiased", first.dequantize(code, unbiased=True)),
            ("InnerProductQuantizer", second.dequantize(second.quantize(x))),
        ):
            errors.setdefault(name, []).append(np.sum(queries * (decoded - x), axis=-1))
        advance()
    return {
        name: (np.concatenate(found, axis=1).mean(1), np.concatenate(found, axis=1).std(1))
        for name, found in errors.items()
    }


def sparse_vectors(dim: int) -> Array:
    """Makes unit vectors with 1, 2, 4 ... equal values, at the start or evenly spaced.

    Hadamard transforms have the largest errors with these.
    """
    rows = []
    for count in (1 << k for k in range(dim.bit_length())):
        for at in (np.arange(count), np.arange(count) * dim // count):
            row = np.zeros(dim)
            row[at] = count**-0.5
            rows.append(row)
    return np.stack(rows)


def measure_rotations(advance: Callable[[], object]) -> dict[str, list[float]]:
    """Measures E |x - x'|^2, relative to its value with "haar", for the worst of sparse_vectors().

    By rounds: a figure for each of ROTATION_DIMS and ROTATION_BITS.
    """
    found: dict[str, list[float]] = {}
    for rounds in (1, 2, 3, 4):
        for dim in ROTATION_DIMS:
            x, errors = sparse_vectors(dim), np.zeros((len(ROTATION_BITS), 2 * dim.bit_length()))
            for seed in range(ROTATION_SEEDS):
                rotation = tq.HadamardRotation(dim, seed, rounds)
                for i, bits in enumerate(ROTATION_BITS):
                    quantizer = tq.MSEQuantizer(dim, bits, rotation=rotation)
                    errors[i] += ((quantizer.dequantize(quantizer.quantize(x)) - x) ** 2).sum(1) / ROTATION_SEEDS
            found.setdefault(f"{rounds}", []).extend(
                float(e.max() / tq.mse_distortion(b, dim)) for e, b in zip(errors, ROTATION_BITS)
            )
            advance()
    return found


# --- tables and pictures ----------------------------------------------------------------------------------------------


def table(measured: dict[str, Distortions], dim: int) -> str:
    """Makes two tables in Markdown, with a row for each number of bits: bounds, expected and measured errors."""
    kinds = list(measured)
    squared = [f"| bits | lower bound | upper bound | expected | {' | '.join(kinds)} |"]
    product = [
        f"| bits | lower bound | upper bound | expected, at most | {' | '.join(kinds)} "
        f"| MSEQuantizer, unbiased: {kinds[0]} |"
    ]
    for i, bits in enumerate(BITS):
        theory = (tq.mse_lower_bound(bits, dim), tq.mse_upper_bound(bits), tq.mse_distortion(bits, dim))
        squared.append(_row(bits, theory, [measured[kind].mse[i] for kind in kinds]))
        bounds = (tq.inner_product_lower_bound, tq.inner_product_upper_bound, tq.inner_product_distortion)
        samples = [measured[kind].product[i] for kind in kinds]
        product.append(_row(bits, [dim * f(bits, dim) for f in bounds], [*samples, measured[kinds[0]].rescaled[i]]))
    for lines in (squared, product):
        lines.insert(1, "|---" * (lines[0].count("|") - 1) + "|")
    return "\n".join(
        [
            f"squared error of a unit vector, dim {dim}",
            "",
            *squared,
            "",
            f"squared error of an inner product of unit vectors, times dim {dim}",
            "",
            *product,
        ]
    )


def rotation_table(found: dict[str, list[float]]) -> str:
    """Makes a table in Markdown, with a row for each number of rounds."""
    lines = [
        "| rounds | "
        + " | ".join(f"dim {dim}, {bits} bit{'s' * (bits > 1)}" for dim in ROTATION_DIMS for bits in ROTATION_BITS)
        + " |"
    ]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    lines += [
        f"| {rounds} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |" for rounds, ratios in found.items()
    ]
    return "\n".join(
        ["HadamardRotation: squared error of the worst sparse vector, relative to what is expected", "", *lines]
    )


def _row(bits: int, theory: Sequence[float], measured: Sequence[Measured]) -> str:
    cells = [f"{bits}", *(f"{value:.3g}" for value in theory), *map(_text, measured)]
    return f"| {' | '.join(cells)} |"


def _text(measured: Measured) -> str:
    digits = max(0, -math.floor(math.log10(measured.error))) if measured.error > 0 else 6
    return f"{measured.mean:.{digits}f} ± {measured.error:.{digits}f}"


def draw_distortions(measured: dict[str, Distortions], dim: int) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.linspace(BITS[0], BITS[-1], 50)
    _draw_bounds(left, steps, [tq.mse_upper_bound(b) for b in steps], [tq.mse_lower_bound(b, dim) for b in steps])
    left.plot(BITS, [tq.mse_distortion(b, dim) for b in BITS], color="tab:blue", label="expected, MSEQuantizer")
    _draw_bounds(
        right,
        steps,
        [dim * tq.inner_product_upper_bound(b, dim) for b in steps],
        [dim * tq.inner_product_lower_bound(b, dim) for b in steps],
    )
    expected = [dim * tq.inner_product_distortion(b, dim) for b in BITS]
    right.plot(BITS, expected, color="tab:blue", label="expected, InnerProductQuantizer")
    for (kind, found), marker, color in zip(measured.items(), "osx", ("tab:orange", "tab:purple", "black")):
        for axes, values in ((left, found.mse), (right, found.product)):
            style: dict[str, Any] = dict(fmt=marker, color=color, fillstyle="none", capsize=3)
            style["markersize"] = 5 + 3 * (marker == "s")
            axes.errorbar(BITS, [m.mean for m in values], [2 * m.error for m in values], **style, label=kind)
    rescaled = [m.mean for m in next(iter(measured.values())).rescaled]
    right.plot(BITS, rescaled, ":", color="tab:green", label="MSEQuantizer, unbiased")
    left.set(title="squared error of a unit vector", ylabel="E |x - x'|²")
    right.set(title="squared error of an inner product, times dim", ylabel="dim · E (⟨y, x⟩ - ⟨y, x'⟩)²")
    for axes in (left, right):
        axes.set(yscale="log", xlabel="bits per value", xticks=list(BITS))
        axes.grid(which="major", alpha=0.25)
        axes.legend()
    figure.suptitle(f"TurboQuant, dim {dim}")
    return figure


def _draw_bounds(axes: Any, steps: Array, upper: list[float], lower: list[float]) -> None:
    axes.plot(steps, upper, "--", color="tab:red", label="upper bound")
    axes.plot(steps, lower, "-.", color="tab:gray", label="lower bound of any quantizer")


def draw_bias(errors: dict[str, tuple[Array, Array]], dim: int, bits: int) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (name, (mean, deviation)) in zip(figure.subplots(1, len(errors), sharey=True), errors.items()):
        style: dict[str, Any] = dict(color="tab:blue", alpha=0.25, linewidth=0)
        axes.fill_between(COSINES, mean - deviation, mean + deviation, **style, label="± one standard deviation")
        axes.plot(COSINES, mean, color="tab:blue", marker="o", markersize=4, label="mean")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=name, xlabel="⟨y, x⟩")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("⟨y, x'⟩ - ⟨y, x⟩")
    figure.axes[0].legend()
    figure.suptitle(f"error of inner products of unit vectors, {bits} bits, dim {dim}")
    return figure


# --- the command ------------------------------------------------------------------------------------------------------


def run(folder: pathlib.Path, dim: int, model: pathlib.Path | None) -> None:
    try:
        import matplotlib  # noqa: F401  fails before the slow work
    except ImportError:
        raise TBQError("the figures need matplotlib: pip install 'ggml-tbq[plot]'") from None
    from tqdm import tqdm  # type: ignore[import-untyped]

    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TBQError(f"FOLDER {str(folder)!r} is not a folder that can be written to")
    inputs: dict[str, Array] = {}
    if model:
        inputs["token embeddings"] = embeddings(model)
        dim = inputs["token embeddings"].shape[1]
    if dim > math.isqrt(DENSE_LIMIT):
        raise TBQError(
            f"vectors have {dim} values; the figures need dense rotations, which take at most {math.isqrt(DENSE_LIMIT)}"
        )
    single = np.zeros((VECTORS, dim))
    single[np.arange(VECTORS), np.arange(VECTORS) % dim] = 1
    inputs = {"random": random_unit_vectors(VECTORS, dim, "vectors"), "one coordinate": single, **inputs}
    with tqdm(total=SEEDS * (len(inputs) * len(BITS) + 1) + 4 * len(ROTATION_DIMS), unit="step") as bar:
        measured = {name: measure(x, bar.update) for name, x in inputs.items()}
        errors = measure_bias(dim, 2, bar.update)
        rotations = measure_rotations(bar.update)
    figures = {
        "turboquant-distortion.png": draw_distortions(measured, dim),
        "turboquant-bias.png": draw_bias(errors, dim, 2),
    }
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        replace(folder / name, file.getvalue())
    print(table(measured, dim), rotation_table(rotations), sep="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="turboquant.py",
        description="measures distortions and draws them with the bounds",
        epilog="example: python tools/figures/turboquant.py docs/pictures --model model.gguf",
    )
    parser.add_argument(
        "folder", type=pathlib.Path, metavar="FOLDER", help="where turboquant-distortion.png and turboquant-bias.png go"
    )
    parser.add_argument(
        "--dim",
        type=at_least_one,
        default=1536,
        metavar="N",
        help="values of a vector (%(default)s; with --model, the size of the model's embeddings)",
    )
    parser.add_argument("--model", type=pathlib.Path, metavar="GGUF", help="also measure on its token embeddings")
    args = parser.parse_args()
    try:
        with interruptible():
            run(args.folder, args.dim, args.model)
    except (TBQError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


if __name__ == "__main__":
    main()
