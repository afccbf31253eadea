# SPDX-License-Identifier: MIT
"""Triton kernels over tbq blocks: encode, decode, attention.  tbq.h has the format, cpu/rows/rows.inc the encoder's
steps.

`tables` is the float32 tensor of one bit width that _cuda.tables() lays out; the constants below are its offsets.  A
"row" is a cached token's blocks of one head: strides of packed tensors are bytes, those of the others elements.

BITS is 2, 3 or 4, or 8 for exact rows (block_tbq8_0 of tbq.h): a float and 64 rotated values as bytes, in order.
"""

# Triton's language has no annotations that mypy could check.
# mypy: ignore-errors
import inspect

import triton
import triton.language as tl

from tbq.hf import _tables

SIGNS = tl.constexpr(0)
LEVELS = tl.constexpr(64)
GAPS_UP = tl.constexpr(80)
GAPS_DOWN = tl.constexpr(96)
LEVEL_BYTES = tl.constexpr(112)  # level + 64, four to an int32
THRESHOLDS = tl.constexpr(116)

Q_ONE = tl.constexpr(_tables.Q_ONE)
DESCENT_STEPS = tl.constexpr(_tables.DESCENT_STEPS)
SHAPING_FLOOR = tl.constexpr(_tables.SHAPING_FLOOR)

# tbq-tables.h says what these are
BITS_SMALLEST = tl.constexpr(_tables.BITS_SMALLEST)
BITS_SMALLEST_ACT = tl.constexpr(_tables.BITS_SMALLEST_ACT)
BITS_HUGE = tl.constexpr(_tables.BITS_HUGE)
BITS_INF = tl.constexpr(_tables.BITS_INF)
HUGE_SCALE = tl.constexpr(_tables.HUGE_SCALE)
HUGE_UNSCALE = tl.constexpr(_tables.HUGE_UNSCALE)
F16_MAX = tl.constexpr(_tables.F16_MAX)
F16_NAN = tl.constexpr(_tables.F16_NAN)
LOG2E = tl.constexpr(1.4426950408889634)


def _look_up(bits):
    """PTX: $4, four indices in its low four nibbles, to $0 ... $3, four halves.  The codebook, as bytes of level + 64,
    is in $5 and, as far as it goes, $6, $7, $8."""
    found = {
        2: "prmt.b32 f, $5, $5, $4;",
        3: "and.b32 s, $4, 0x7777; prmt.b32 f, $5, $6, s;",
        # both halves of the codebook, and then of each pair the one that the index's top bit says
        4: "and.b32 s, $4, 0x7777; prmt.b32 f, $5, $6, s; prmt.b32 g, $7, $8, s; "
        "and.b32 s, $4, 0x8888; shr.u32 s, s, 1; or.b32 s, s, 0x3210; prmt.b32 f, f, g, s;",
    }[bits]
    # bytes to the mantissas of 1024 + 64 + level, two at a time
    return (
        f"{{ .reg .b32 f, g, s, one; {found} "
        "mov.b32 one, 0x64646464; prmt.b32 g, f, one, 0x4342; prmt.b32 f, f, one, 0x4140; "
        "mov.b32 one, 0x64406440; sub.rn.f16x2 f, f, one; sub.rn.f16x2 g, g, one; "
        "mov.b32 {$0, $1}, f; mov.b32 {$2, $3}, g; }"
    )


LOOK_UP_2, LOOK_UP_3, LOOK_UP_4 = (tl.constexpr(_look_up(bits)) for bits in (2, 3, 4))
#: Four outputs, the nibbles, four registers of codebook; 2 and 3 bits leave the last ones unused.
LOOK_UP_REGISTERS = tl.constexpr("=h,=h,=h,=h,r,r,r,r,r")


def kernel(*aligned):
    """A kernel that is compiled once for all values of arguments that are not constants: lengths change at every token,
    and a compilation takes seconds.  aligned: pointers that the compiler may take to be multiples of 16 where they are,
    as torch's tensors do begin."""

    def decorate(function):
        names = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.annotation is not tl.constexpr
        ]
        return triton.jit(function, do_not_specialize=[name for name in names if name not in aligned])

    return decorate


# --- pieces: N blocks of 64 ---------------------------------------------------------------------------------------


@triton.jit
def halves(v, N: tl.constexpr, W: tl.constexpr):
    """(N, W) to its first and its second half, (N, W/2) each."""
    return tl.split(tl.permute(tl.reshape(v, [N, 2, W // 2]), [0, 2, 1]))


INTERPRETED = tl.constexpr(not isinstance(halves, triton.JITFunction))  # there, PTX has no meaning


@triton.jit
def butterflies(v, N: tl.constexpr):
    """H64 . v by a + b, a - b at distances 1, 2, 4, ... 32."""
    place = tl.zeros([N, 64], tl.int32) + tl.arange(0, 64)[None, :]
    for step in range(6):
        partner = tl.gather(v, place ^ (1 << step), 1)
        v = partner + tl.where((place >> step & 1) != 0, -v, v)
    return v


@triton.jit
def sum_squares(z, N: tl.constexpr):
    s = z * z
    a, b = halves(s, N, 64)
    j0, j1 = halves(a, N, 32)
    j2, j3 = halves(b, N, 32)
    p = j0 + j1 + j2 + j3
    a, b = halves(p, N, 16)
    p = a + b
    a, b = halves(p, N, 8)
    p = a + b
    a, b = halves(p, N, 4)
    p = a + b
    a, b = tl.split(p)
    return a + b


@triton.jit
def levels_above(size, thresholds, BORDERS: tl.constexpr, N: tl.constexpr):
    above = tl.zeros([N, 64], tl.int32)
    for t in tl.static_range(BORDERS):
        above += (size > tl.load(thresholds + t)).to(tl.int32)
    return above


@triton.jit
def coordinate_descent_step(g, index, m, m0, d, tables):
    """Of these 32 coordinates, all even or all odd, makes the move that gains most, if one gains."""
    place = tl.arange(0, 32)[None, :]
    rise = g > 0
    gap = d[:, None] * tl.load(tables + tl.where(rise, GAPS_UP, GAPS_DOWN) + index)
    size = tl.abs(g)
    gain, at = tl.max(
        gap * ((size + size) - gap * m0[:, None]), axis=1, return_indices=True, return_indices_tie_break_left=True
    )
    at = at[:, None]
    moves = (gain > 0)[:, None]
    change = tl.gather(tl.where(rise, gap, -gap), at, 1) * tl.gather(m, place ^ at, 1)
    return tl.where(moves, g - change, g), tl.where(moves & (place == at), index + tl.where(rise, 1, -1), index)


@triton.jit
def pack_pairs(index, BITS: tl.constexpr, N: tl.constexpr):
    """The bytes qs, (N, 8 BITS) or, with 3 bits, (N, 16)."""
    if BITS == 4:
        low, high = halves(index, N, 64)
        return low | high << 4
    else:
        a, b = halves(index & 3, N, 64)
        j0, j1 = halves(a, N, 32)
        j2, j3 = halves(b, N, 32)
        return j0 | j1 << 2 | j2 << 4 | j3 << 6


@triton.jit
def pack_qh(index, N: tl.constexpr):
    """The bytes qh of tbq3_0, (N, 8)."""
    a, b = halves(index >> 2, N, 64)
    j0, j1 = halves(a, N, 32)
    j2, j3 = halves(b, N, 32)
    low, high = halves(j0 | j1 << 1 | j2 << 4 | j3 << 5, N, 16)
    return low | high << 2


@triton.jit
def encode_blocks(
    x,
    weight,
    target,
    ok,
    tables,
    WEIGHT: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    N: tl.constexpr,
):
    """x: float32 (N, 64).  target: N pointers to blocks, written where ok.  As tbq_quantize_kv, bit for bit if the
    compiler contracts nothing (enable_fp_fusion=False).
    WEIGHT: the squared error in each channel has the weight (N, 64), equal for 2i and 2i + 1; otherwise those of x."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    BORDERS: tl.constexpr = HALF - 1
    place = tl.arange(0, 64)[None, :]
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    bad = top >= BITS_INF
    zero = top < BITS_SMALLEST
    huge = (top > BITS_HUGE) & (top < BITS_INF)
    x = tl.where((bad | zero)[:, None], 1.0, x)
    signs = tl.load(tables + SIGNS + place)
    z = butterflies(tl.where(huge[:, None], x * HUGE_SCALE, x) * signs, N)
    rms = tl.sqrt_rn(sum_squares(z, N) * 0.015625)
    inverse = tl.div_rn(tl.full([N], Q_ONE, tl.float32), rms)
    q = (tl.abs(z) * inverse[:, None] + 0.5).to(tl.int32)

    # the scale whose levels have the largest cosine to q
    best_qk = tl.zeros([N], tl.int32)
    best_kk = tl.full([N], 1, tl.int32)
    index = tl.zeros([N, 64], tl.int32)
    tl.static_assert(SCALES % 2 == 0)
    of_size = q.to(tl.float32)
    for first in range(0, SCALES, 2):  # no more at once: the kernel is bound by fetching its own instructions
        for s in tl.static_range(2):
            above = levels_above(of_size, tables + THRESHOLDS + (first + s) * BORDERS, BORDERS, N)
            k = tl.load(tables + LEVELS + HALF + above).to(tl.int32)
            qk, kk = tl.sum(q * k, axis=1), tl.sum(k * k, axis=1)
            left = qk.to(tl.uint64) * qk.to(tl.uint64) * best_kk.to(tl.uint64)
            right = best_qk.to(tl.uint64) * best_qk.to(tl.uint64) * kk.to(tl.uint64)
            better = left > right
            best_qk, best_kk = tl.where(better, qk, best_qk), tl.where(better, kk, best_kk)
            index = tl.where(better[:, None], above, index)
    index = tl.where(z < 0, HALF - 1 - index, HALF + index)

    # noise shaping; what it makes of a huge block is dropped, and must not overflow
    x = tl.where(huge[:, None], 1.0, x)
    if WEIGHT:
        w = weight
    else:
        squares, other = tl.split(tl.reshape(x * x, [N, 32, 2]))
        half = tl.div_rn(tl.full([N], 0.5, tl.float32), rms * rms * 0.015625)
        w = tl.sqrt_rn((squares + other) * half[:, None]) + SHAPING_FLOOR
        w = tl.reshape(tl.join(w, w), [N, 64])
    m, _ = tl.split(tl.reshape(butterflies(w, N) * 0.015625, [N, 32, 2]))  # exactly 0 at odd places
    m0 = tl.sum(tl.where(tl.arange(0, 32)[None, :] == 0, m, 0.0), axis=1)
    if WEIGHT:  # moves are judged by the scale that is used
        d = tl.div_rn(tl.full([N], 64.0 * Q_ONE * Q_ONE, tl.float32), best_qk.to(tl.float32))
    else:
        d = tl.div_rn(best_qk.to(tl.float32), best_kk.to(tl.float32))
    g = z * inverse[:, None] - d[:, None] * tl.load(tables + LEVELS + index)
    g = butterflies(butterflies(g, N) * w, N) * 0.015625
    g_even, g_odd = tl.split(tl.reshape(g, [N, 32, 2]))
    i_even, i_odd = tl.split(tl.reshape(index, [N, 32, 2]))
    for _ in range(DESCENT_STEPS):
        g_even, i_even = coordinate_descent_step(g_even, i_even, m, m0, d, tables)
        g_odd, i_odd = coordinate_descent_step(g_odd, i_odd, m, m0, d, tables)
    shaped = tl.reshape(tl.join(i_even, i_odd), [N, 64])
    index = tl.where(huge[:, None], index, shaped)
    k = tl.load(tables + LEVELS + index).to(tl.int32)
    kk = tl.sum(k * k, axis=1)

    d = tl.div_rn(rms * 0.125 * 8.0, tl.sqrt_rn(kk.to(tl.float32))) * tl.where(huge, HUGE_UNSCALE, 1.0)
    if WEIGHT:  # not biased, d <y, k> = <y, y>, instead of norm-preserving
        qk = tl.sum(tl.where(z < 0, -q, q) * k, axis=1)
        ratio = tl.div_rn(tl.full([N], 64.0 * Q_ONE, tl.float32), qk.to(tl.float32))
        d = tl.where(huge | (qk <= 0), d, rms * 0.125 * ratio)
    d = tl.where(zero, 0.0, tl.where(d < F16_MAX, d, F16_MAX))
    half = tl.where(bad, F16_NAN, d.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32))
    index = tl.where((zero | bad)[:, None], 0, index)

    tl.store(target, (half & 0xFF).to(tl.uint8), ok)
    tl.store(target + 1, (half >> 8 & 0xFF).to(tl.uint8), ok)
    if BITS == 4:
        tl.store(target[:, None] + 2 + tl.arange(0, 32)[None, :], pack_pairs(index, BITS, N).to(tl.uint8), ok[:, None])
    else:
        tl.store(target[:, None] + 2 + tl.arange(0, 16)[None, :], pack_pairs(index, BITS, N).to(tl.uint8), ok[:, None])
    if BITS == 3:
        tl.store(target[:, None] + 18 + tl.arange(0, 8)[None, :], pack_qh(index, N).to(tl.uint8), ok[:, None])


@triton.jit
def encode_exact_blocks(x, target, ok, tables, N: tl.constexpr):
    """x: float32 (N, 64).  target: N pointers to blocks of 8 bits, written where ok.  As tbq_quantize, bit for bit."""
    place = tl.arange(0, 64)[None, :]
    y = butterflies(x * tl.load(tables + SIGNS + place), N) * 0.125
    top = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    bad = top >= BITS_INF
    zero = (top < BITS_SMALLEST_ACT) | bad
    largest = tl.where(zero, 1.0, top.to(tl.float32, bitcast=True))
    inverse = tl.div_rn(tl.full([N], 127.0, tl.float32), largest)
    q = (tl.abs(tl.where(zero[:, None], 0.0, y)) * inverse[:, None] + 0.5).to(tl.int32)
    q = tl.where(y < 0, -q, q)
    d = tl.where(zero, 0.0, tl.div_rn(largest, tl.full([N], 127.0, tl.float32)))
    d = tl.where(bad, float("nan"), d)
    tl.store(target.to(tl.pointer_type(tl.float32)), d, ok)
    tl.store(target[:, None] + 4 + place, (q & 0xFF).to(tl.uint8), ok[:, None])


@triton.jit
def packed_tile(row, ok, BITS: tl.constexpr):
    """The indices of the blocks that the N pointers row point at, packed: words of 16 bits, (N, 16 or 8), and for
    3 bits the words of qh, (N, 8).  For 8 bits, pairs of values, (N, 32).  Apart from their use, so that the memory's
    latency passes while something else is done."""
    words = row.to(tl.pointer_type(tl.int16))[:, None] + (2 if BITS == 8 else 1)
    at = tl.arange(0, 4 * BITS if BITS != 3 else 8)[None, :]
    qs = tl.load(words + at, ok[:, None], 0)
    qh = qs
    if BITS == 3:
        qh = tl.load(words + 8 + (at & 3), ok[:, None], 0)
    return qs, qh


@triton.jit
def level_bytes(tables):
    """The codebook for look_up(), to be loaded once: as constants of the instructions it would be moved to registers at
    each use."""
    words = (tables + LEVEL_BYTES).to(tl.pointer_type(tl.int32))
    return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)


@triton.jit
def look_up(nibbles, codebook, BITS: tl.constexpr):
    """Four indices, in the low four nibbles of each word, to the four levels, float16.

    A byte permutation is a table of eight, and one of its instructions looks four up.  tl.load(tables + index) does the
    same, but Triton moves its 64-bit addresses, and what it loads, to another layout through shared memory: 12 times
    the bytes of the levels."""
    b0, b1, b2, b3 = codebook
    if INTERPRETED:
        return (
            byte_of(nibbles, 0, b0, b1, b2, b3),
            byte_of(nibbles, 4, b0, b1, b2, b3),
            byte_of(nibbles, 8, b0, b1, b2, b3),
            byte_of(nibbles, 12, b0, b1, b2, b3),
        )
    else:
        PTX: tl.constexpr = LOOK_UP_4 if BITS == 4 else LOOK_UP_3 if BITS == 3 else LOOK_UP_2
        return tl.inline_asm_elementwise(
            PTX, LOOK_UP_REGISTERS, [nibbles, b0, b1, b2, b3], (tl.float16, tl.float16, tl.float16, tl.float16), True, 1
        )


@triton.jit
def byte_of(nibbles, SHIFT: tl.constexpr, b0, b1, b2, b3):
    """What the PTX does, one level at a time."""
    i = nibbles >> SHIFT & 15
    word = tl.where(i < 8, tl.where(i < 4, b0, b1), tl.where(i < 12, b2, b3))
    return ((word >> 8 * (i & 3) & 0xFF) - 64).to(tl.float16)


@triton.jit
def levels(qs, qh, codebook, BITS: tl.constexpr):
    """Levels, float16 (N, 64), of a packed_tile, in the order of element(): what comes out of a word become neighbors,
    because joining keeps them in the registers where they are."""
    word = qs.to(tl.int32)
    if BITS == 8:
        v = tl.join((word << 24 >> 24).to(tl.float16), (word >> 8).to(tl.float16))
    elif BITS == 4:
        l0, l1, l2, l3 = look_up(word, codebook, BITS)
        v = tl.join(tl.join(l0, l2), tl.join(l1, l3))
    else:
        even, odd = word & 0x3333, word >> 2 & 0x3333  # quarters 0 and 2, 1 and 3 of both bytes
        if BITS == 3:
            high = qh.to(tl.int32) >> (tl.arange(0, 8)[None, :] >> 2 << 1)
            even |= (high & 0x1111) << 2
            odd |= (high >> 1 & 0x1111) << 2
        e0, e1, e2, e3 = look_up(even, codebook, BITS)
        o0, o1, o2, o3 = look_up(odd, codebook, BITS)
        v = tl.join(tl.join(tl.join(e0, e2), tl.join(o0, o2)), tl.join(tl.join(e1, e3), tl.join(o1, o3)))
    return tl.reshape(v, [qs.shape[0], 64])


@triton.jit
def element(at, BITS: tl.constexpr):
    """Which value of its block column `at` of levels() holds."""
    if BITS == 8:
        return at
    elif BITS == 4:
        return (at >> 1) + 32 * (at & 1)
    else:
        return (at >> 2) + 16 * (at >> 1 & 1) + 32 * (at & 1)


@triton.jit
def channel(at, HALF: tl.constexpr):
    """Which channel of a head lies at place `at` of its blocks: of the first 2 HALF, c and c + HALF are
    neighbors: NEOX pairs are stored interleaved."""
    if HALF:
        return tl.where(at < 2 * HALF, (at >> 1) + (at & 1) * HALF, at)
    else:
        return at


@triton.jit
def scale_of(row, ok, BITS: tl.constexpr):
    """d, float32, of the blocks that the pointers row point at; they are even, those of 8 bits multiples of 4."""
    if BITS == 8:
        return tl.load(row.to(tl.pointer_type(tl.float32)), ok, 0.0)
    else:
        return tl.load(row.to(tl.pointer_type(tl.float16)), ok, 0.0).to(tl.float32)


# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def encode_side(
    first,
    source,
    s_batch,
    s_head,
    s_token,
    target,
    t_batch,
    t_token,
    heads,
    tokens,
    total,
    tables,
    mean,
    weight,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    HALF: tl.constexpr,
    N: tl.constexpr,
):
    i = first + tl.arange(0, N)
    ok = i < total
    i = tl.where(ok, i, 0)
    block = i % PER_HEAD
    head = i // PER_HEAD % heads
    token = (i // (PER_HEAD * heads) % tokens).to(tl.int64)
    batch = (i // (PER_HEAD * heads) // tokens).to(tl.int64)
    at = batch * s_batch + head.to(tl.int64) * s_head + token * s_token
    x = tl.load(source + at[:, None] + channel(block[:, None] * 64 + tl.arange(0, 64)[None, :], HALF)).to(tl.float32)
    to = target + batch * t_batch + token * t_token + (head * PER_HEAD + block) * BLOCK_BYTES
    place = (head * PER_HEAD + block)[:, None] * 64 + tl.arange(0, 64)[None, :]
    if MEAN:
        x -= tl.load(mean + place)
    w = x
    if WEIGHT:
        w = tl.load(weight + place)
    if BITS == 8:
        encode_exact_blocks(x, to, ok, tables, N)
    else:
        encode_blocks(x, w, to, ok, tables, WEIGHT, BITS, SCALES, BLOCK_BYTES, N)


@kernel()
def encode(
    k,
    k_batch,
    k_head,
    k_token,
    k_target,
    kt_batch,
    kt_token,
    k_total,
    k_tables,
    v,
    v_batch,
    v_head,
    v_token,
    v_target,
    vt_batch,
    vt_token,
    v_total,
    v_tables,
    heads,
    tokens,
    mean,
    weight,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    K_BITS: tl.constexpr,
    K_SCALES: tl.constexpr,
    K_PER_HEAD: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BITS: tl.constexpr,
    V_SCALES: tl.constexpr,
    V_PER_HEAD: tl.constexpr,
    V_BYTES: tl.constexpr,
    HALF: tl.constexpr,
    N: tl.constexpr,
):
    """New keys and values, (batch, heads, tokens, size), to blocks.  A side of 0 bits is left out; its total is 0.
    HALF: see channel(), of the keys.
    MEAN, WEIGHT: `mean` is subtracted from keys, and `weight` is that of a key's error: float32 (heads, size), in the
    order in which channels are stored."""
    k_programs = tl.cdiv(k_total, N)
    pid = tl.program_id(0)
    if pid < k_programs:
        if K_BITS:
            encode_side(
                pid * N,
                k,
                k_batch,
                k_head,
                k_token,
                k_target,
                kt_batch,
                kt_token,
                heads,
                tokens,
                k_total,
                k_tables,
                mean,
                weight,
                MEAN,
                WEIGHT,
                K_BITS,
                K_SCALES,
                K_PER_HEAD,
                K_BYTES,
                HALF,
                N,
            )
    else:
        if V_BITS:
            encode_side(
                (pid - k_programs) * N,
                v,
                v_batch,
                v_head,
                v_token,
                v_target,
                vt_batch,
                vt_token,
                heads,
                tokens,
                v_total,
                v_tables,
                None,
                None,
                False,
                False,
                V_BITS,
                V_SCALES,
                V_PER_HEAD,
                V_BYTES,
                0,
                N,
            )


@triton.jit
def decode_side(
    pid,
    source,
    s_batch,
    s_token,
    target,
    heads,
    tokens,
    tables,
    transforms,
    BITS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    HALF: tl.constexpr,
    N: tl.constexpr,
):
    """One block of one head of N tokens."""
    tiles = tl.cdiv(tokens, N)
    n = pid % tiles * N + tl.arange(0, N)
    ok = n < tokens
    pid = pid // tiles
    block = pid % PER_HEAD
    head = pid // PER_HEAD % heads
    batch = (pid // PER_HEAD // heads).to(tl.int64)
    row = source + batch * s_batch + (head * PER_HEAD + block) * BLOCK_BYTES + n.to(tl.int64) * s_token
    qs, qh = packed_tile(row, ok, BITS)
    d = scale_of(row, ok, BITS)
    column = tl.arange(0, 64)
    to = target + (batch * heads + head) * tokens * (PER_HEAD * 64)
    paired = 0
    if HALF % 32 == 0:
        paired = (block * 64 < 2 * HALF).to(
            tl.int32
        )  # the second transform gives both halves of the pairs in channels' order
    transform = tl.load(transforms + paired * 4096 + column[:, None] * 64 + column[None, :])
    x = tl.dot(levels(qs, qh, level_bytes(tables), BITS), tl.trans(transform))  # exact: eighths of integers below 2^12
    x = tl.where((d == 0.0)[:, None], 0.0, x * d[:, None])
    to += n.to(tl.int64)[:, None] * (PER_HEAD * 64)
    if HALF % 32 == 0:  # 32 channels in a line
        first = tl.where(paired != 0, block * 32, block * 64) + tl.arange(0, 2) * tl.where(paired != 0, HALF, 32)
        tl.store(
            to[:, :, None] + first[None, :, None] + tl.arange(0, 32)[None, None, :],
            tl.reshape(x, [N, 2, 32]),
            ok[:, None, None],
        )
    else:
        tl.store(to + channel(block * 64 + column, HALF)[None, :], x, ok[:, None])


@kernel("k_target", "k_transforms", "v_target", "v_transforms")
def decode(
    k,
    k_batch,
    k_token,
    k_target,
    k_tables,
    k_transforms,
    v,
    v_batch,
    v_token,
    v_target,
    v_tables,
    v_transforms,
    heads,
    tokens,
    k_programs,
    K_BITS: tl.constexpr,
    K_PER_HEAD: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BITS: tl.constexpr,
    V_PER_HEAD: tl.constexpr,
    V_BYTES: tl.constexpr,
    HALF: tl.constexpr,
    N: tl.constexpr,
):
    """Blocks to values, (batch, heads, tokens, size) contiguous, in the original domain.  k_programs: those of keys."""
    pid = tl.program_id(0)
    if pid < k_programs:
        if K_BITS:
            decode_side(
                pid,
                k,
                k_batch,
                k_token,
                k_target,
                heads,
                tokens,
                k_tables,
                k_transforms,
                K_BITS,
                K_PER_HEAD,
                K_BYTES,
                HALF,
                N,
            )
    else:
        if V_BITS:
            decode_side(
                pid - k_programs,
                v,
                v_batch,
                v_token,
                v_target,
                heads,
                tokens,
                v_tables,
                v_transforms,
                V_BITS,
                V_PER_HEAD,
                V_BYTES,
                0,
                N,
            )


@triton.jit
def query_block(q, at, ok, transform, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """(rows, 64) of the rotated query, block BLOCK, float32, columns in the order of element()."""
    x = tl.load(q + at[:, None] + channel(BLOCK * 64 + tl.arange(0, 64), HALF)[None, :], ok[:, None], 0.0)
    if x.dtype == tl.float32:
        return tl.dot(x, transform, input_precision="tf32x3")
    else:  # every product is exact
        return tl.dot(x, transform)


@triton.jit
def mean_product(q, at, ok, mean, BLOCKS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """(rows,) products of queries and the mean of their keys, float32."""
    product = tl.zeros([ROWS], tl.float32)
    for block in tl.static_range(BLOCKS):
        place = block * 64 + tl.arange(0, 64)
        x = tl.load(q + at[:, None] + channel(place, HALF)[None, :], ok[:, None], 0.0).to(tl.float32)
        product += tl.sum(x * tl.load(mean + place)[None, :], axis=1)
    return product


@triton.jit
def key_products(
    s, query, k_row, ok, qs, qh, codebook, BLOCK: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr
):
    return (
        s
        + tl.dot(query, tl.trans(levels(qs, qh, codebook, BITS)))
        * scale_of(k_row + BLOCK * BLOCK_BYTES, ok, BITS)[None, :]
    )


@triton.jit
def power_of_two(d):
    """(e, 2^-e), float32, with 2^e <= d < 2^(e + 1); NaN and 1 of a NaN, and of zero what is far below f16's smallest
    number."""
    number = d == d
    bits = tl.maximum(tl.where(number, d.to(tl.int32, bitcast=True) >> 23, 127), 127 - 80)
    return tl.where(number, (bits - 127).to(tl.float32), d), (254 - bits << 23).to(tl.float32, bitcast=True)


@triton.jit
def weighted_values(acc, keep, p, d, unit, qs, qh, codebook, BITS: tl.constexpr):
    part = tl.where(d == d, d * unit, 0.0)  # an unseen NaN has no effect, its p being 0; one that is seen made p NaN
    return acc * keep[:, None] + tl.dot((p * part[None, :]).to(tl.float16), levels(qs, qh, codebook, BITS))


@kernel("k_transform", "partial", "out")
def attend(
    q,
    q_batch,
    q_head,
    q_token,
    k,
    k_batch,
    k_token,
    k_tables,
    k_transform,
    v,
    v_batch,
    v_token,
    v_tables,
    mask,
    m_batch,
    m_head,
    m_token,
    partial,
    arrived,
    out,
    o_batch,
    o_token,
    sinks,
    k_mean,
    heads,
    tokens,
    n_kv,
    before,
    chunk,
    chunks,
    first_chunk,
    n_first,
    newest,
    shift,
    scale,
    softcap,
    GROUP: tl.constexpr,
    K_BITS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BITS: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    V_BYTES: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    MEAN: tl.constexpr,
    HALF: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    """A chunk of the cache for M query rows of one KV head, of which the first R may exist; row r is query head r %
    GROUP at token r // GROUP.

    grid: (row tiles, batch . KV heads, chunks).  partial: float32 [batch . heads][tiles][chunks][R][2 + value size]:
    the largest sum of a logit in base 2 and the exponent of its values' d, and relative to 2 to that power the sum of
    weights and the sum of weighted values in the rotated domain.  The last program of a group of chunks merges them
    into out, (batch, tokens, query heads, value size) with the last two contiguous; arrived is its counter, int32
    [batch . heads][tiles], zero before and after.
    MEAN: whether k_mean, float32 (KV heads, key size) in the order of storage, was subtracted from the keys, and the
    result depends on that.  What it takes from every logit of a query is given back before a soft-cap, and is taken
    from a sink where there is no soft-cap.
    MASK: 0 none, 1 bool, 2 an addend.  CAUSAL: token t sees the first before + t + 1 rows of the cache.

    Packed rows and exact ones are read by two launches, each with its chunks of the same `partial`, from first_chunk
    on.  The last program of both merges.  k and v of 8 bits have slots: n_kv counts these.  Slot n holds row n of the
    cache if it is below n_first, row n + shift from `newest` on, and none in between.  Packed: these three are 0.
    """
    tile, bh, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = (bh // heads).to(tl.int64)
    head = bh % heads
    r = tl.arange(0, M)
    row = tile * M + r
    token = row // GROUP
    q_row_head = head * GROUP + row % GROUP
    seen = token < tokens
    at = batch * q_batch + q_row_head.to(tl.int64) * q_head + token.to(tl.int64) * q_token

    place = tl.arange(0, 64)
    transform = tl.load(k_transform + place[:, None] * 64 + place[None, :])
    q0 = query_block(q, at, seen, transform, 0, HALF)
    top = tl.max(tl.abs(q0), axis=1)
    if K_BLOCKS > 1:
        q1 = query_block(q, at, seen, transform, 1, HALF)
        top = tl.maximum(top, tl.max(tl.abs(q1), axis=1))
    if K_BLOCKS > 2:
        q2 = query_block(q, at, seen, transform, 2, HALF)
        top = tl.maximum(top, tl.max(tl.abs(q2), axis=1))
    if K_BLOCKS > 3:
        q3 = query_block(q, at, seen, transform, 3, HALF)
        top = tl.maximum(top, tl.max(tl.abs(q3), axis=1))
    # halves relative to the largest: 11 bits wherever the query lies
    top = tl.where(top > 0.0, top, 1.0)
    q0 = (q0 / top[:, None]).to(tl.float16)
    if K_BLOCKS > 1:
        q1 = (q1 / top[:, None]).to(tl.float16)
    if K_BLOCKS > 2:
        q2 = (q2 / top[:, None]).to(tl.float16)
    if K_BLOCKS > 3:
        q3 = (q3 / top[:, None]).to(tl.float16)
    if SOFTCAP:
        factor = top * scale
        if MEAN:
            taken = scale * mean_product(q, at, seen, k_mean + head * (K_BLOCKS * 64), K_BLOCKS, HALF, M)
    else:
        factor = top * (scale * LOG2E)

    largest = tl.full([M], float("-inf"), tl.float32)
    weights = tl.zeros([M, BN], tl.float32)  # their sum, by place in a tile: warps need not meet for it
    acc0 = tl.zeros([M, 64], tl.float32)
    if V_BLOCKS > 1:
        acc1 = tl.zeros([M, 64], tl.float32)
    if V_BLOCKS > 2:
        acc2 = tl.zeros([M, 64], tl.float32)
    if V_BLOCKS > 3:
        acc3 = tl.zeros([M, 64], tl.float32)

    first = split * chunk
    last = tl.minimum(first + chunk, n_kv)
    if CAUSAL:  # what no row of the tile sees
        seen_last = before - shift + tl.minimum((tile * M + M - 1) // GROUP, tokens - 1) + 1
        last = tl.minimum(last, tl.maximum(seen_last, n_first))
    k_head = k + batch * k_batch + head * (K_BLOCKS * K_BYTES)
    v_head = v + batch * v_batch + head * (V_BLOCKS * V_BYTES)
    k_codebook, v_codebook = level_bytes(k_tables), level_bytes(v_tables)
    ahead = tl.arange(0, BN)
    for done in range(0, last - first, BN):
        n0 = first + done
        n = n0 + ahead
        ok = n < last
        if V_BITS == 8:
            ok = ok & ((n < n_first) | (n >= newest))
        k_row = k_head + n0.to(tl.int64) * k_token + ahead * k_token
        v_row = v_head + n0.to(tl.int64) * v_token + ahead * v_token
        # all of the tile but the keys' scales before any of it is used
        ks0, kh0 = packed_tile(k_row, ok, K_BITS)
        if K_BLOCKS > 1:
            ks1, kh1 = packed_tile(k_row + K_BYTES, ok, K_BITS)
        if K_BLOCKS > 2:
            ks2, kh2 = packed_tile(k_row + 2 * K_BYTES, ok, K_BITS)
        if K_BLOCKS > 3:
            ks3, kh3 = packed_tile(k_row + 3 * K_BYTES, ok, K_BITS)
        vs0, vh0 = packed_tile(v_row, ok, V_BITS)
        d0 = scale_of(v_row, ok, V_BITS)
        if V_BLOCKS > 1:
            vs1, vh1 = packed_tile(v_row + V_BYTES, ok, V_BITS)
            d1 = scale_of(v_row + V_BYTES, ok, V_BITS)
        if V_BLOCKS > 2:
            vs2, vh2 = packed_tile(v_row + 2 * V_BYTES, ok, V_BITS)
            d2 = scale_of(v_row + 2 * V_BYTES, ok, V_BITS)
        if V_BLOCKS > 3:
            vs3, vh3 = packed_tile(v_row + 3 * V_BYTES, ok, V_BITS)
            d3 = scale_of(v_row + 3 * V_BYTES, ok, V_BITS)
        s = key_products(tl.zeros([M, BN], tl.float32), q0, k_row, ok, ks0, kh0, k_codebook, 0, K_BITS, K_BYTES)
        if K_BLOCKS > 1:
            s = key_products(s, q1, k_row, ok, ks1, kh1, k_codebook, 1, K_BITS, K_BYTES)
        if K_BLOCKS > 2:
            s = key_products(s, q2, k_row, ok, ks2, kh2, k_codebook, 2, K_BITS, K_BYTES)
        if K_BLOCKS > 3:
            s = key_products(s, q3, k_row, ok, ks3, kh3, k_codebook, 3, K_BITS, K_BYTES)
        s *= factor[:, None]
        if SOFTCAP and MEAN:
            s += taken[:, None]
        if SOFTCAP:  # softcap . tanh(s / softcap)
            s = softcap * (1.0 - 2.0 / (tl.exp(s * (2.0 / softcap)) + 1.0)) * LOG2E
        visible = ok[None, :] & seen[:, None]
        if V_BITS == 8:
            n = tl.where(n < n_first, n, n + shift)
        if CAUSAL:
            visible = visible & (n[None, :] <= before + token[:, None])
        if MASK:
            spot = (
                mask
                + batch * m_batch
                + (q_row_head.to(tl.int64) * m_head + token.to(tl.int64) * m_token)[:, None]
                + n[None, :]
            )
            if MASK == 1:
                visible = visible & (tl.load(spot, visible, 0) != 0)
            else:
                addend = tl.load(spot, visible, 0.0).to(tl.float32) * LOG2E
                visible = visible & (addend != float("-inf"))
                s += addend
        # The second product needs p d, in halves, and the sum of weights p.  The softmax is therefore that of logits
        # with the exponent of d added, whose numbers are at most 1 whatever the scales are; the product takes them
        # times d's mantissa, the sum times 2 to the minus exponent.  A token's blocks share the exponent, of their
        # largest d:
        # what is 2^14 below that loses digits.
        d = d0
        if V_BLOCKS > 1:
            d = tl.maximum(d, d1, tl.PropagateNan.ALL)
        if V_BLOCKS > 2:
            d = tl.maximum(d, d2, tl.PropagateNan.ALL)
        if V_BLOCKS > 3:
            d = tl.maximum(d, d3, tl.PropagateNan.ALL)
        exponent, unit = power_of_two(d)
        s = tl.where(visible, s + exponent[None, :], float("-inf"))
        new = tl.maximum(largest, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        keep = tl.exp2(largest - base)
        largest = new
        weights = weights * keep[:, None] + p * unit[None, :]
        acc0 = weighted_values(acc0, keep, p, d0, unit, vs0, vh0, v_codebook, V_BITS)
        if V_BLOCKS > 1:
            acc1 = weighted_values(acc1, keep, p, d1, unit, vs1, vh1, v_codebook, V_BITS)
        if V_BLOCKS > 2:
            acc2 = weighted_values(acc2, keep, p, d2, unit, vs2, vh2, v_codebook, V_BITS)
        if V_BLOCKS > 3:
            acc3 = weighted_values(acc3, keep, p, d3, unit, vs3, vh3, v_codebook, V_BITS)
    total = tl.sum(weights, axis=1)

    V_SIZE: tl.constexpr = V_BLOCKS * 64
    WIDTH: tl.constexpr = V_SIZE + 2
    group = bh * tl.num_programs(0) + tile  # of the programs that work on these rows
    first_part = partial + group.to(tl.int64) * chunks * (R * WIDTH)
    place = element(tl.arange(0, 64), V_BITS)[None, :]
    part = first_part + (first_chunk + split) * (R * WIDTH) + r * WIDTH
    kept = r < R
    tl.store(part, largest, kept)
    tl.store(part + 1, total, kept)
    tl.store(part[:, None] + (2 + place), acc0, kept[:, None])
    if V_BLOCKS > 1:
        tl.store(part[:, None] + (66 + place), acc1, kept[:, None])
    if V_BLOCKS > 2:
        tl.store(part[:, None] + (130 + place), acc2, kept[:, None])
    if V_BLOCKS > 3:
        tl.store(part[:, None] + (194 + place), acc3, kept[:, None])
    tl.debug_barrier()  # all threads' parts are written before one of them says so
    if tl.atomic_add(arrived + group, 1, sem="acq_rel", scope="gpu") == chunks - 1:
        tl.store(arrived + group, 0)
        out_row = tile * M + tl.arange(0, R)
        out_token = out_row // GROUP
        exists = out_token < tokens
        out_head = head * GROUP + out_row % GROUP
        to = out + batch * o_batch + out_token.to(tl.int64) * o_token + out_head * V_SIZE
        logit = tl.full([R], float("-inf"), tl.float32)
        if SINKS:
            logit = tl.load(sinks + out_head, exists, 0.0).to(tl.float32)
            if MEAN and not SOFTCAP:
                of_query = batch * q_batch + out_head.to(tl.int64) * q_head + out_token.to(tl.int64) * q_token
                logit -= scale * mean_product(q, of_query, exists, k_mean + head * (K_BLOCKS * 64), K_BLOCKS, HALF, R)
            logit *= LOG2E
        for block in range(V_BLOCKS):
            merge_block(first_part, to, exists, logit, v_tables, block, chunks, WIDTH, SINKS, R)


@triton.jit
def merge_block(
    part, to, seen, logit, tables, block, chunks, WIDTH: tl.constexpr, SINKS: tl.constexpr, R: tl.constexpr
):
    """The chunks' sums of one block of R rows to the values of out, in the original domain.

    Several chunks at once: one after the other, each would wait for its part to come from the L2 cache."""
    AT_ONCE: tl.constexpr = 64 // R
    column = tl.arange(0, 64)
    c, r = tl.arange(0, AT_ONCE)[:, None], tl.arange(0, R)[None, :]
    largest = logit
    total = tl.full([R], 1.0 if SINKS else 0.0, tl.float32)
    acc = tl.zeros([R, 64], tl.float32)
    for first in range(0, chunks, AT_ONCE):
        here = first + c < chunks
        theirs_at = part + ((first + c) * R + r) * WIDTH
        theirs = tl.load(theirs_at, here, float("-inf"))
        sums = tl.load(theirs_at + 1, here, 0.0)
        values = tl.load(theirs_at[:, :, None] + (2 + block * 64 + column[None, None, :]), here[:, :, None], 0.0)
        new = tl.maximum(largest, tl.max(theirs, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)
        keep, take = tl.exp2(largest - base), tl.exp2(theirs - base[None, :])
        total = total * keep + tl.sum(sums * take, axis=0)
        acc = acc * keep[:, None] + tl.sum(values * take[:, :, None], axis=0)
        largest = new
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a row that sees nothing is zero
    x = butterflies(acc, R) * 0.125 * tl.load(tables + SIGNS + column)[None, :]
    tl.store(to[:, None] + (block * 64 + column)[None, :], x, seen[:, None])
