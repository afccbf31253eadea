#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Derives every constant of the tbq formats and writes include/tbq-tables.h, and python/tbq/hf/_tables.py for the
Triton kernels (standard library only).

    python3 tools/tables.py            rewrite both
    python3 tools/tables.py --check    exit 1 if a committed one differs

Codebook: the Lloyd-Max quantizer of N(0,1) with 2**bits levels (Max 1960; Lloyd 1982), solved to
convergence, then the multiple c*levels whose rounding to integers within -64..63 has the least mean
squared error on N(0,1).  Seven bits, because biased by 64 the entries lie in 0..127: an unsigned by signed
8-bit multiply-add (x86 `maddubs`) cannot saturate, and bit 7 of a CUDA `prmt` lookup is never set.

Signs: bit i of the first 64 fractional bits of pi (most significant bit first) set means channel i is
negated.  Any fixed aperiodic signs would serve; these digits show that nothing was tuned.

Scale search: see "Encoder" in tbq.h.  The grids are geometric; their ends and sizes were chosen on 40000
Gaussian blocks of 64, where they come within 1 % (4 bit), 0.4 % (3 bit) and 0.1 % (2 bit) of the MSE of
141 scales.
"""

import argparse
import math
import pathlib
import struct
import sys
from collections.abc import Iterable, Sequence

LICENSE = "SPDX-License-Identifier: MIT"  # the first line of what is written here, too
BITS = (2, 3, 4)
# One normalized coordinate |y|/rms(y) = 1.0 in the fixed-point units of the scale search.  |y| <= 8 rms(y)
# for 64 values, so the largest coordinate is 16384 and fits int16 with room for rounding.
Q_ONE = 2048
DESCENT_STEPS = 5
SHAPING_FLOOR = 0.5
# Of the largest |x| of a block: below 2^-30, the best d is less than half of the smallest half.  Above 2^50, d
# saturates whatever the values are, but their squares must not overflow, so the block is quantized times 2^-100.  Below
# 2^-100, 127 over an activation is not finite.
SMALLEST, HUGE, HUGE_SCALE, SMALLEST_ACT = 2.0**-30, 2.0**50, 2.0**-100, 2.0**-100
F16_MAX, F16_NAN = 65504.0, 0x7E00
GRID = {2: (0.88, 1.33, 6), 3: (0.78, 1.45, 8), 4: (0.71, 1.32, 12)}  # first, last, count


def phi(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi) if math.isfinite(t) else 0.0


def cdf(t: float) -> float:
    return 0.5 * math.erfc(-t / math.sqrt(2))


def midpoints(levels: Sequence[float]) -> list[float]:
    return [-math.inf] + [(a + b) / 2 for a, b in zip(levels, levels[1:])] + [math.inf]


def lloyd_max(bits: int) -> list[float]:
    """Levels of the optimal 2**bits-level quantizer of N(0,1), ascending."""
    n = 2**bits
    x = [-2.5 + 5 * i / (n - 1) for i in range(n)]
    while True:
        t = midpoints(x)
        new = [(phi(a) - phi(b)) / (cdf(b) - cdf(a)) for a, b in zip(t, t[1:])]
        new = [(new[i] - new[n - 1 - i]) / 2 for i in range(n)]  # keep it exactly odd
        step = max(abs(a - b) for a, b in zip(new, x))
        x = new
        if step < 1e-13:
            return x


def distortion(levels: Sequence[float]) -> float:
    """E (X - Q(X))^2 for X ~ N(0,1), Q the nearest of levels."""
    d = 0.0
    t = midpoints(levels)
    for lo, hi, c in zip(t, t[1:], levels):
        # integral of (x-c)^2 phi(x) over (lo, hi)
        p = cdf(hi) - cdf(lo)
        x1 = phi(lo) - phi(hi)
        x2 = p + (lo * phi(lo) if math.isfinite(lo) else 0) - (hi * phi(hi) if math.isfinite(hi) else 0)
        d += x2 - 2 * c * x1 + c * c * p
    return d


def integer_codebook(levels: Sequence[float]) -> tuple[list[int], float, float]:
    """The best integers within -64..63 proportional to levels, and their multiplier: (ints, c, distortion)."""
    best: tuple[list[int], float, float] = ([], math.nan, math.inf)
    seen: set[tuple[int, ...]] = set()
    top = levels[-1]
    for step in range(int(63.49 / top * 1000)):
        ints = [round((step + 1) / 1000 * x) for x in levels]
        if len(set(ints)) < len(ints) or ints[-1] > 63 or tuple(ints) in seen:
            continue
        seen.add(tuple(ints))
        # the multiplier for which the rounded levels serve N(0,1) best: ternary search, unimodal
        lo, hi = ints[-1] / top * 0.8, ints[-1] / top * 1.2
        for _ in range(100):
            a, b = lo + (hi - lo) / 3, hi - (hi - lo) / 3
            if distortion([k / a for k in ints]) < distortion([k / b for k in ints]):
                hi = b
            else:
                lo = a
        c = (lo + hi) / 2
        d = distortion([k / c for k in ints])
        if d < best[2]:
            best = ints, c, d
    return best


def signs() -> list[int]:
    """The 64 signs as a list of +1.0/-1.0, from pi = 3.243F6A88 85A308D3... in base 16."""
    word = 0x243F6A8885A308D3
    return [-1 if word >> (63 - i) & 1 else 1 for i in range(64)]


def grid(bits: int) -> list[float]:
    lo, hi, n = GRID[bits]
    return [lo * (hi / lo) ** (i / (n - 1)) for i in range(n)]


def thresholds(ints: list[int], c: float, scale: float) -> list[int]:
    """Decision thresholds of the positive half, in fixed-point units, for a scale relative to rms(y)."""
    pos = ints[len(ints) // 2 :]
    return [math.floor((a + b) / 2 / c * scale * Q_ONE) for a, b in zip(pos, pos[1:])]


def gaps(ints: list[int]) -> list[int]:
    return [b - a for a, b in zip(ints, ints[1:])]


def float_bits(x: float) -> str:
    """The bits of a 32-bit float as hexadecimal C and Python."""
    return f"0x{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


def power(x: float) -> str:
    """A power of two as a hexadecimal float of C."""
    return f"0x1p{math.frexp(x)[1] - 1}f"


def braces(values: Iterable[object]) -> str:
    return "{ " + ", ".join(str(v) for v in values) + " }"


def header() -> str:
    out = [
        f"// {LICENSE}",
        "// Generated by tools/tables.py; do not edit.  The derivations are there.",
        "// Initializers only, so that C, C++ and CUDA each place them in the memory they need.",
        "#pragma once",
        "",
    ]
    word = sum(1 << i for i, s in enumerate(signs()) if s < 0)
    out += [
        "// bit i set: channel i of a block is negated before (encode) or after (decode) the Hadamard transform",
        f"#define TBQ_SIGN_BITS 0x{word:016X}ull",
        "",
        "// |y|/rms(y) = 1.0 in the fixed-point units of the scale search",
        f"#define TBQ_Q_ONE {Q_ONE}",
        "",
        (
            "// Noise shaping (cpu/rows/rows.inc): steps of the coordinate descent, of two moves each; the least weight"
            " of a channel"
        ),
        f"#define TBQ_DESCENT_STEPS {DESCENT_STEPS}",
        f"#define TBQ_SHAPING_FLOOR {SHAPING_FLOOR}f",
        "",
        "// Bounds on the largest |x| of a block, as the bits of a float: what is not negative orders like its bits.",
        f"#define TBQ_BITS_SMALLEST     {float_bits(SMALLEST)}u // {power(SMALLEST)}: below, d is 0",
        (
            f"#define TBQ_BITS_SMALLEST_ACT {float_bits(SMALLEST_ACT)}u // {power(SMALLEST_ACT)}: the same of an"
            " activation block"
        ),
        (
            f"#define TBQ_BITS_HUGE         {float_bits(HUGE)}u // {power(HUGE)}: above, the block is quantized times"
            " TBQ_HUGE_SCALE"
        ),
        f"#define TBQ_BITS_INF          {float_bits(math.inf)}u // from here on, Inf or NaN: d is NaN",
        f"#define TBQ_HUGE_SCALE   {power(HUGE_SCALE)}",
        f"#define TBQ_HUGE_UNSCALE {power(1 / HUGE_SCALE)}",
        "",
        "// Halves: the largest, and the NaN that is written",
        f"#define TBQ_F16_MAX {F16_MAX}f",
        f"#define TBQ_F16_NAN 0x{F16_NAN:04X}",
    ]
    for bits in BITS:
        levels = lloyd_max(bits)
        ints, c, d = integer_codebook(levels)
        d0 = distortion(levels)
        rows = [thresholds(ints, c, g) for g in grid(bits)]
        out += [
            "",
            (
                f"// tbq{bits}_0: Lloyd-Max levels of N(0,1) times {c:.4f}; "
                f"distortion {d:.6f}, {100 * (d / d0 - 1):.2f} % above {d0:.6f} of the real-valued levels"
            ),
            f"#define TBQ{bits}_LEVELS {braces(ints)}",
            f"#define TBQ{bits}_HALF_LEVELS {braces(ints[len(ints) // 2 :])}",
            f"#define TBQ{bits}_GAPS_UP {braces([*gaps(ints), 0])}",
            f"#define TBQ{bits}_GAPS_DOWN {braces([0, *gaps(ints)])}",
            f"#define TBQ{bits}_N_SCALES {len(rows)}",
            f"#define TBQ{bits}_N_THRESHOLDS {len(rows[0])}",
            f"// scales {', '.join(f'{g:.4f}' for g in grid(bits))} of rms(y)",
            f"#define TBQ{bits}_THRESHOLDS {{ \\",
            *[f"    {braces(r)}, \\" for r in rows],
            "}",
        ]
    return "\n".join(out) + "\n"


def module() -> str:
    books = {bits: integer_codebook(lloyd_max(bits))[:2] for bits in BITS}
    out = [
        f"# {LICENSE}",
        '"""Generated by tools/tables.py; do not edit.  tbq-tables.h for kernels that are compiled from Python."""',
        f"SIGNS = {tuple(signs())}",
        f"Q_ONE = {Q_ONE}",
        f"DESCENT_STEPS = {DESCENT_STEPS}",
        f"SHAPING_FLOOR = {SHAPING_FLOOR}",
        f"BITS_SMALLEST = {float_bits(SMALLEST)}",
        f"BITS_SMALLEST_ACT = {float_bits(SMALLEST_ACT)}",
        f"BITS_HUGE = {float_bits(HUGE)}",
        f"BITS_INF = {float_bits(math.inf)}",
        f"HUGE_SCALE = {HUGE_SCALE!r}",
        f"HUGE_UNSCALE = {1 / HUGE_SCALE!r}",
        f"F16_MAX = {F16_MAX}",
        f"F16_NAN = 0x{F16_NAN:04X}",
        "",
        "# by bits: bytes of a block, a half and the levels of 64 values",
        "BLOCK_BYTES = {" + ", ".join(f"{bits}: {2 + 8 * bits}" for bits in BITS) + "}",
        "",
        "# by bits: the codebook, ascending; thresholds of the positive half for each scale of the search",
        "LEVELS = {",
        *[f"    {bits}: {tuple(ints)}," for bits, (ints, _) in books.items()],
        "}",
        "THRESHOLDS = {",
    ]
    for bits, (ints, c) in books.items():
        rows = [tuple(thresholds(ints, c, g)) for g in grid(bits)]
        out += [f"    {bits}: (", *[f"        {row}," for row in rows], "    ),"]
    return "\n".join([*out, "}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parent.parent
    for path, text in (
        (root / "ggml_tbq" / "include" / "tbq-tables.h", header()),
        (root / "python" / "tbq" / "hf" / "_tables.py", module()),
    ):
        if not args.check:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path} is not what tables.py derives; run python3 tools/tables.py")


if __name__ == "__main__":
    main()
