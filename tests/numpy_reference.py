# SPDX-License-Identifier: MIT
"""The tbq formats in NumPy: the oracle of the tests, bit for bit.

    python tests/numpy_reference.py    rewrites tests/golden.txt

Written from the description in tbq.h and the steps in rows.inc; shares no code with the library.  Where the
library runs butterflies, this builds the Hadamard matrix by doubling and sums its products as a balanced tree:
because a butterfly only adds and subtracts, and rounding is symmetric in sign, the two agree in every bit except
the sign of a zero.
"""

import pathlib
import re

import numpy as np

BLOCK = 64
# The codebooks and signs are the format.  They are written here a second time, and compared with the header.
LEVELS = {
    2: (-50, -15, 15, 50),
    3: (-62, -39, -22, -7, 7, 22, 39, 62),
    4: (-61, -46, -36, -28, -21, -15, -9, -3, 3, 9, 15, 21, 28, 36, 46, 61),
}
PI_FRACTION = 0x243F6A8885A308D3  # pi = 3.243F6A88 85A308D3...: channel 0 is the first bit
SIGNS = np.array([-1 if PI_FRACTION >> (63 - i) & 1 else 1 for i in range(BLOCK)], np.float32)
SMALLEST = np.float32(2.0**-30)  # below, d is zero
HUGE = np.float32(2.0**50)  # above, squares could overflow: scaled by 2^-100 meanwhile
F16_MAX = np.float32(65504)
F16_NAN = 0x7E00
SMALLEST_ACT = np.float32(2.0**-100)
DESCENT_STEPS = 5  # two levels may move in each
SHAPING_FLOOR = 0.5  # least weight of a channel
BATCH = 1024  # blocks at a time, for memory

HEADER = pathlib.Path(__file__).parent.parent / "ggml_tbq" / "include" / "tbq-tables.h"
GOLDEN = pathlib.Path(__file__).with_name("golden.txt")


def hadamard(n):
    """The Sylvester matrix by doubling: [[H, H], [H, -H]]."""
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


H = hadamard(BLOCK)


def header_numbers(name):
    """The integers of a macro of tbq-tables.h, in order."""
    text = HEADER.read_text(encoding="utf-8").replace("\\\n", " ")
    body = re.search(rf"(?m)^#define {name} (.*)$", text)[1]
    return [int(n) for n in re.findall(r"-?\d+", body)]


def encoder_tables(bits):
    """(fixed-point one, thresholds of shape (scales, levels/2 - 1)): the encoder's tuning, not a part of the format."""
    flat = np.array(header_numbers(f"TBQ{bits}_THRESHOLDS"), np.int64)
    return header_numbers("TBQ_Q_ONE")[0], flat.reshape(-1, 2 ** (bits - 1) - 1)


# --- the rotation -----------------------------------------------------------------------------------------------


def tree_sum(terms):
    """Sum of the last axis: neighbors first, then the sums of neighbors, and so on."""
    while terms.shape[-1] > 1:
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]


def forward(x, factor):
    """factor . H . diag(s) . x of float32 blocks (n, 64)."""
    return np.float32(factor) * tree_sum(H * (x * SIGNS)[:, None, :])


def inverse(y, factor):
    """diag(s) . (factor . H . y)."""
    return (factor * tree_sum(H * y[:, None, :])) * SIGNS


def _in_batches(function, *arrays):
    parts = [function(*(a[i : i + BATCH] for a in arrays)) for i in range(0, len(arrays[0]), BATCH)]
    return np.concatenate(parts) if parts else function(*arrays)


def rotate(x):
    """y = H . diag(s) . x / 8 of each 64 values of the last axis."""
    x = np.asarray(x, np.float32)
    return _in_batches(lambda b: forward(b, 0.125), x.reshape(-1, BLOCK)).reshape(x.shape)


def unrotate(y):
    """The inverse of rotate, up to rounding."""
    y = np.asarray(y, np.float32)
    return _in_batches(lambda b: inverse(b, np.float32(0.125)), y.reshape(-1, BLOCK)).reshape(y.shape)


# --- bits -------------------------------------------------------------------------------------------------------


def positions(bits):
    """For each value of a block, in order: (byte, shift) of its low bits and of its high bit, d counted."""
    if bits == 4:
        return [(2 + e % 32, 4 * (e // 32)) for e in range(BLOCK)], None
    low = [(2 + e % 16, 2 * (e // 16)) for e in range(BLOCK)]
    if bits == 2:
        return low, None
    high = []
    for e in range(BLOCK):
        i, j = e % 16, e // 16
        high.append((18 + i % 8, (j & 1) | (i >= 8) << 1 | (j >> 1) << 2))
    return low, high


def pack(bits, index, d):
    """Blocks of uint8 (n, block bytes) from indices (n, 64) and uint16 d (n,)."""
    blocks = np.zeros((len(index), 2 + bits * BLOCK // 8), np.uint8)
    blocks[:, :2] = d.astype("<u2").view(np.uint8).reshape(-1, 2)
    low, high = positions(bits)
    width = 4 if bits == 4 else 2
    for e in range(BLOCK):
        byte, shift = low[e]
        blocks[:, byte] |= ((index[:, e] & (1 << width) - 1) << shift).astype(np.uint8)
        if high:
            byte, shift = high[e]
            blocks[:, byte] |= ((index[:, e] >> 2) << shift).astype(np.uint8)
    return blocks


def unpack(bits, blocks):
    """(indices (n, 64), d as uint16 (n,))."""
    low, high = positions(bits)
    mask = 15 if bits == 4 else 3
    index = np.stack([blocks[:, byte] >> shift & mask for byte, shift in low], axis=1).astype(np.int64)
    if high:
        index |= np.stack([(blocks[:, byte] >> shift & 1) << 2 for byte, shift in high], axis=1).astype(np.int64)
    return index, blocks[:, :2].copy().view("<u2")[:, 0]


# --- quantize ---------------------------------------------------------------------------------------------------


def sum_squares(z):
    """16 partial sums, of every 16th value in order; then those 8, 4, 2 and 1 apart are added."""
    squares = (z * z).reshape(-1, 4, 16)
    p = squares[:, 0]
    for i in range(1, 4):
        p = p + squares[:, i]
    for h in (8, 4, 2, 1):
        p = p[:, :h] + p[:, h : 2 * h]
    return p[:, 0]


def search(bits, q):
    """Magnitudes (n, 64) of the scale whose levels have the largest cosine to q, and their <q, k> and <k, k>."""
    _, table = encoder_tables(bits)
    half = np.array(LEVELS[bits][2 ** (bits - 1) :], np.int64)
    best_m = np.zeros(q.shape, np.int64)
    best_qk = np.zeros(len(q), np.int64)
    best_kk = np.ones(len(q), np.int64)
    for thresholds in table:
        m = (q[:, :, None] > thresholds).sum(axis=2)
        k = half[m]
        qk, kk = (q * k).sum(axis=1), (k * k).sum(axis=1)
        left = (qk * qk).astype(np.uint64) * best_kk.astype(np.uint64)
        right = (best_qk * best_qk).astype(np.uint64) * kk.astype(np.uint64)
        better = left > right
        best_m[better], best_qk[better], best_kk[better] = m[better], qk[better], kk[better]
    return best_m, best_qk, best_kk


def shape_noise(bits, x, weight, p, mean_square, d, index):
    """Moves of single levels to a neighbor that lower the sum of w e^2 over the channels; see rows.inc."""
    levels = np.array(LEVELS[bits], np.float32)
    gap_up = np.append(np.diff(levels), np.float32(0))
    gap_down = np.append(np.float32(0), np.diff(levels))
    pairs = (x * x).reshape(-1, BLOCK // 2, 2)
    energy = np.repeat(pairs[:, :, 0] + pairs[:, :, 1], 2, axis=1)
    w = (
        np.sqrt(energy * (np.float32(0.5) / mean_square)[:, None]) + np.float32(SHAPING_FLOOR)
        if weight is None
        else weight
    )
    m = tree_sum(H * w[:, None, :]) * np.float32(1 / BLOCK)
    e = p - d[:, None] * levels[index]
    g = tree_sum(H * (tree_sum(H * e[:, None, :]) * w)[:, None, :]) * np.float32(1 / BLOCK)
    rows = np.arange(len(x))
    place = np.arange(BLOCK)
    for _ in range(DESCENT_STEPS):
        for parity in (0, 1):
            rise = g > 0
            gap = d[:, None] * np.where(rise, gap_up[index], gap_down[index])
            gain = gap * ((np.abs(g) + np.abs(g)) - gap * m[:, :1])
            gain[:, 1 - parity :: 2] = -1  # the other half of the coordinates
            at = gain.argmax(axis=1)  # the first of equals
            move = gain[rows, at] > 0
            s = np.where(rise[rows, at], gap[rows, at], -gap[rows, at])
            column = m[rows[:, None], place ^ at[:, None]]
            g = np.where(move[:, None], g - s[:, None] * column, g)
            index[rows, at] += np.where(move, np.where(rise[rows, at], 1, -1), 0)
    k = np.array(LEVELS[bits], np.int64)[index]
    return (k * k).sum(axis=1)


def scale_of(rms, qk, kk, one, kv):
    """d before it is rounded to half: for keys and values d . |k| = |y| = 8 rms, else least squares."""
    if kv:
        return rms * np.float32(8) / np.sqrt(kk.astype(np.float32))
    return rms * (qk.astype(np.float32) / (kk.astype(np.float32) * np.float32(one)))


def _shape_noise_of(bits, x, weight, z, inverse_rms, rms, qk, kk, one, index, some):
    """shape_noise() of the blocks that some selects, in place; their <k, k>."""
    part = index[some]
    p = z[some] * inverse_rms[some, None]
    mean_square = rms[some] * rms[some] * np.float32(1 / BLOCK)
    d = qk[some].astype(np.float32) / kk[some].astype(np.float32)
    if weight is not None:
        d = np.float32(BLOCK * one * one) / qk[some].astype(np.float32)
    result = shape_noise(bits, x[some], None if weight is None else weight[some], p, mean_square, d, part)
    index[some] = part
    return result


def _quantize_blocks(bits, kv, x, weight=None):
    top = np.abs(x).max(axis=1)  # NaN if there is one
    finite = np.isfinite(top)
    ordinary = finite & (top >= SMALLEST)
    huge = ordinary & (top > HUGE)
    safe = np.where(ordinary[:, None], x, np.float32(1))
    one, _ = encoder_tables(bits)

    z = forward(np.where(huge[:, None], safe * np.float32(2.0**-100), safe), 1)
    rms = np.sqrt(sum_squares(z) / np.float32(BLOCK))
    inverse_rms = np.float32(one) / rms
    q = (np.abs(z) * inverse_rms[:, None] + np.float32(0.5)).astype(np.int64)
    m, qk, kk = search(bits, q)
    half = 2 ** (bits - 1)
    index = np.where(z < 0, half - 1 - m, half + m)
    shaped = ordinary & ~huge
    if kv:
        kk[shaped] = _shape_noise_of(bits, safe, weight, z, inverse_rms, rms, qk, kk, one, index, shaped)

    d = scale_of(rms * np.float32(0.125), qk, kk, one, kv)
    if kv and weight is not None:
        # a key: d . <y, k> = <y, y>
        product = (np.where(z < 0, -q, q) * np.array(LEVELS[bits], np.int64)[index]).sum(axis=1)
        unbiased = rms * np.float32(0.125) * (np.float32(BLOCK * one) / np.maximum(product, 1).astype(np.float32))
        d = np.where(shaped & (product > 0), unbiased, d)
    d = d * np.where(huge, np.float32(2.0**100), np.float32(1))
    d = np.minimum(d, F16_MAX).astype(np.float16).view(np.uint16)
    index[~ordinary] = 0
    d[~ordinary] = np.where(finite[~ordinary], 0, F16_NAN)
    return pack(bits, index, d)


def quantize(x, bits, kv=False, mean=None, weight=None):
    """uint8 (..., bytes) of float32 or float16 (..., multiple of 64); kv as the cache does, else for the least error.

    mean, weight: float32 of a row, for kv: what is subtracted first, and what error costs in each channel.
    """
    x = np.asarray(x).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if mean is not None:
            x = x - mean
        if weight is None:
            blocks = _in_batches(lambda b: _quantize_blocks(bits, kv, b), x.reshape(-1, BLOCK))
        else:
            blocks = _quantize_blocks(
                bits, kv, x.reshape(-1, BLOCK), np.broadcast_to(weight, x.shape).reshape(-1, BLOCK)
            )
    return blocks.reshape(*x.shape[:-1], x.shape[-1] // BLOCK * blocks.shape[1])


# --- dequantize, dot --------------------------------------------------------------------------------------------


def _split(packed, bits):
    size = 2 + bits * BLOCK // 8
    return np.frombuffer(np.ascontiguousarray(packed), np.uint8).reshape(-1, size)


def rotated(packed, bits):
    """(d as float32 (n,), k[idx] as float32 (n, 64)): what the blocks hold, in the rotated domain."""
    index, d = unpack(bits, _split(packed, bits))
    return d.view(np.float16).astype(np.float32), np.array(LEVELS[bits], np.float32)[index]


def dequantize(packed, bits):
    """float32 (number of values,)."""
    d, k = rotated(packed, bits)
    with np.errstate(invalid="ignore"):
        x = _in_batches(lambda d, k: inverse(k, (d * np.float32(0.125))[:, None]), d, k)
    x[d == 0] = 0
    return x.reshape(-1)


def quantize_act(x):
    """(d float32 (n,), q int64 (n, 64)) of the operand of dot products."""
    y = rotate(np.asarray(x, np.float32)).reshape(-1, BLOCK)
    top = np.abs(y).max(axis=1)
    ordinary = np.isfinite(top) & (top >= SMALLEST_ACT)
    safe_top = np.where(ordinary, top, np.float32(1))
    q = (np.abs(np.where(ordinary[:, None], y, 0)) * (np.float32(127) / safe_top)[:, None] + np.float32(0.5)).astype(
        np.int64
    )
    d = np.where(ordinary, top / np.float32(127), np.where(np.isfinite(top), np.float32(0), np.float32(np.nan)))
    return d.astype(np.float32), np.where(y < 0, -q, q)


def dot(packed, bits, act):
    """The dot product of a row and quantize_act of another, as the library rounds it."""
    d, k = rotated(packed, bits)
    act_d, q = act
    # partial sum l: values 4l..4l+3 and 32+4l..32+4l+3; integers, so their order does not matter
    p = (k.astype(np.int64) * q).reshape(-1, 2, 8, 4).sum(axis=(1, 3))
    sums = np.zeros(8, np.float32)
    for block in range(len(p)):
        sums = sums + (d[block] * act_d[block]) * p[block].astype(np.float32)
    for h in (4, 2, 1):
        sums = sums[:h] + sums[h : 2 * h]
    return sums[0]


# --- golden bytes -----------------------------------------------------------------------------------------------


def golden_inputs():
    """Two blocks each, made of exact arithmetic so that every machine has the same; name -> float32 (128,)."""
    state = 1
    words = []
    for _ in range(12 * 128):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        words.append(state >> 48)
    sums = np.array(words, np.int64).reshape(128, 12).sum(axis=1) - 12 * 32768
    bell = (sums / 65536).astype(np.float32)  # variance 1
    one_hot = np.zeros(128, np.float32)
    one_hot[[5, 64 + 63]] = 1.5, -3
    tails = bell * np.abs(bell) ** 3
    broken = bell.copy()
    broken[70] = np.nan
    return {
        "bell": bell,
        "tails": tails.astype(np.float32),
        "one-hot": one_hot,
        "constant": np.full(128, -0.75, np.float32),
        "tiny": bell * np.float32(2.0**-24),
        "huge": bell * np.float32(2.0**90),
        "broken": broken,
        "zero": np.zeros(128, np.float32),
    }


def golden_lines():
    return [
        f"tbq{bits}_0 {encoder} {name} {quantize(x, bits, encoder == 'kv').tobytes().hex()}"
        for bits in LEVELS
        for encoder in ("plain", "kv")
        for name, x in golden_inputs().items()
    ]


if __name__ == "__main__":
    GOLDEN.write_text(
        "\n".join(["# python tests/numpy_reference.py writes this file", *golden_lines()]) + "\n", encoding="utf-8"
    )
