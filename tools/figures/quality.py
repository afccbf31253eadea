#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws the picture of the README: python tools/figures/quality.py [docs/pictures/quality.png].

The points are read from the first table of docs/measurements/quality.md, so the figures are not repeated here.
"""

import pathlib
import re
import sys
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "measurements" / "quality.md"
OURS, OTHERS = "#c0392b", "#5d6d7e"

#: The points by label: the type pair, and the label's offset to the right of and above the upper point.
LABELS = {
    "q8_0": ("q8_0 / q8_0", (-9, 9)),
    "q4_1": ("q4_1 / q4_1", (9, -3)),
    "q4_0": ("q4_0 / q4_0", (-14, 9)),
    "iq4_nl": ("iq4_nl / iq4_nl", (9, -24)),
    "tbq4_0": ("tbq4_0 / tbq4_0", (-52, -14)),
    "tbq4_0 keys,\ntbq3_0 values": ("tbq4_0 / tbq3_0", (-84, -12)),
    "tbq3_0": ("tbq3_0 / tbq3_0", (-46, -3)),
    "tbq2_0": ("tbq2_0 / tbq2_0", (10, 4)),
}

#: Two types have 4.5 bits.  This one is drawn further to the right, so that both can be seen.
ASIDE = {"iq4_nl": 0.11}


@dataclass(frozen=True)
class Point:
    bits: float
    plain: float  # KL divergence
    centered: float | None


def read_points(text: str) -> dict[str, Point]:
    """Reads the rows of the first table with a column of bits, by type pair."""
    points = {}
    table = text[text.index("| K / V | bits per value |") :].split("\n\n", 1)[0]
    for line in table.splitlines()[2:]:
        pair, bits, plain, centered = (cell.strip() for cell in line.split("|")[1:5])
        points[pair] = Point(float(bits), read_mean(plain) or 0.0, read_mean(centered))
    return points


def read_mean(cell: str) -> float | None:
    """Returns the mean in a cell such as "**0.0197** ± 0.0006"."""
    found = re.match(r"\**([\d.]+)", cell)
    return float(found[1]) if found else None


def draw(axes: Axes, label: str, point: Point, offset: tuple[int, int]) -> None:
    color, marker = (OURS, "o") if label.startswith("tbq") else (OTHERS, "s")
    bits = point.bits + ASIDE.get(label, 0)
    style = {"marker": marker, "color": color, "markersize": 7, "linestyle": "none"}
    axes.plot([bits], [point.plain], markerfacecolor="white", **style)  # type: ignore[arg-type]
    if point.centered is not None:
        axes.plot([bits] * 2, [point.plain, point.centered], color=color, linewidth=1, zorder=0)
        axes.plot([bits], [point.centered], **style)  # type: ignore[arg-type]
    axes.annotate(label, (bits, point.plain), offset, textcoords="offset points", color=color, fontsize=10)


def main() -> None:
    points = read_points(PAGE.read_text(encoding="utf-8"))
    figure = Figure(figsize=(7, 4.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, (pair, offset) in LABELS.items():
        draw(axes, label, points[pair], offset)
    example = points["tbq2_0 / tbq2_0"]
    for y, what, dy in (
        (example.plain, "hollow: keys not centered", -8),
        (example.centered, "filled: keys centered", -3),
    ):
        axes.annotate(what, (example.bits, y or 0.0), (10, dy), textcoords="offset points", fontsize=9, color="black")
    axes.set(yscale="log", xlim=(1.8, 9), ylim=(0.0025, 1.4), xlabel="bits per value of the KV cache")
    axes.set_ylabel("KL divergence from an f16 cache, nats")
    axes.set_title("SmolLM2-135M on a CPU: lower left is better", fontsize=11)
    axes.set_yticks([0.003, 0.01, 0.03, 0.1, 0.3, 1], ["0.003", "0.01", "0.03", "0.1", "0.3", "1"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures" / "quality.png"
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
