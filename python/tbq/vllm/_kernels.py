# SPDX-License-Identifier: MIT
"""Triton kernels over pages of tbq blocks: store, unpack, attend.  The arithmetic is that of tbq.hf._kernels.

A page holds PAGE tokens; a token's slot of a head is its key's blocks and then its value's.  `pages` is the first byte
of a layer's pages; page_stride, token_stride and head_stride are bytes.  A block table has the pages of a sequence in
order, int32.
"""

# Triton's language has no annotations that mypy could check.
# mypy: ignore-errors
import triton
import triton.language as tl

from tbq.hf._kernels import (
    LOG2E,
    channel,
    element,
    encode_blocks,
    kernel,
    level_bytes,
    levels,
    mean_product,
    merge_block,
    packed_tile,
    power_of_two,
    query_block,
    scale_of,
    weighted_values,
)


@triton.jit
def store_side(
    first,
    source,
    s_token,
    s_head,
    pages,
    page_stride,
    token_stride,
    head_stride,
    slots,
    heads,
    total,
    tables,
    mean,
    weight,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
):
    i = first + tl.arange(0, N)
    ok = i < total
    i = tl.where(ok, i, 0)
    block = i % BLOCKS
    head = i // BLOCKS % heads
    token = (i // BLOCKS // heads).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    ok = ok & (slot >= 0)
    slot = tl.maximum(slot, 0)
    column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    at = token * s_token + head.to(tl.int64) * s_head
    x = tl.load(source + at[:, None] + channel(column, HALF)).to(tl.float32)
    place = (head * (BLOCKS * 64))[:, None] + column
    if MEAN:
        x -= tl.load(mean + place)
    w = x
    if WEIGHT:
        w = tl.load(weight + place)
    to = pages + slot // PAGE * page_stride + slot % PAGE * token_stride + head * head_stride + block * BLOCK_BYTES
    encode_blocks(x, w, to, ok, tables, WEIGHT, BITS, SCALES, BLOCK_BYTES, N)


@kernel()
def store(
    k,
    k_token,
    k_head,
    k_tables,
    v,
    v_token,
    v_head,
    v_tables,
    pages,
    page_stride,
    token_stride,
    head_stride,
    slots,
    heads,
    k_total,
    v_total,
    mean,
    weight,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    K_BITS: tl.constexpr,
    K_SCALES: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BITS: tl.constexpr,
    V_SCALES: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    V_BYTES: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
):
    """New keys and values, (tokens, heads, size), to their slots: slots[token] is page . PAGE + place, negative for a
    token that is not stored.  mean, weight, HALF: as of tbq.hf._kernels.encode."""
    k_programs = tl.cdiv(k_total, N)
    pid = tl.program_id(0)
    if pid < k_programs:
        store_side(
            pid * N,
            k,
            k_token,
            k_head,
            pages,
            page_stride,
            token_stride,
            head_stride,
            slots,
            heads,
            k_total,
            k_tables,
            mean,
            weight,
            MEAN,
            WEIGHT,
            K_BITS,
            K_SCALES,
            K_BLOCKS,
            K_BYTES,
            HALF,
            PAGE,
            N,
        )
    else:
        store_side(
            (pid - k_programs) * N,
            v,
            v_token,
            v_head,
            pages + K_BLOCKS * K_BYTES,
            page_stride,
            token_stride,
            head_stride,
            slots,
            heads,
            v_total,
            v_tables,
            None,
            None,
            False,
            False,
            V_BITS,
            V_SCALES,
            V_BLOCKS,
            V_BYTES,
            0,
            PAGE,
            N,
        )


@triton.jit
def unpack_side(
    tile,
    unit,
    pages,
    page_stride,
    token_stride,
    head_stride,
    table,
    first,
    tokens,
    target,
    t_token,
    tables,
    transforms,
    mean,
    MEAN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
):
    """One block of one head of N tokens."""
    n = tile * N + tl.arange(0, N)
    ok = n < tokens
    block, head = unit % BLOCKS, unit // BLOCKS
    cell = first + n
    page = tl.load(table + cell // PAGE, ok, 0).to(tl.int64)
    row = pages + page * page_stride + cell % PAGE * token_stride + head * head_stride + block * BLOCK_BYTES
    qs, qh = packed_tile(row, ok, BITS)
    d = scale_of(row, ok, BITS)
    column = tl.arange(0, 64)
    paired = 0
    if HALF % 32 == 0:  # the second transform gives both halves of the pairs in the channels' order
        paired = (block * 64 < 2 * HALF).to(tl.int32)
        begin = tl.where(paired != 0, block * 32, block * 64)
        at = begin + column % 32 + column // 32 * tl.where(paired != 0, HALF, 32)
    else:
        at = channel(block * 64 + column, HALF)
    transform = tl.load(transforms + paired * 4096 + column[:, None] * 64 + column[None, :])
    x = tl.dot(levels(qs, qh, level_bytes(tables), BITS), tl.trans(transform))  # exact: eighths of integers below 2^12
    x = tl.where((d == 0.0)[:, None], 0.0, x * d[:, None])
    at = head * (BLOCKS * 64) + at
    if MEAN:
        x += tl.load(mean + at)[None, :]
    tl.store(target + n.to(tl.int64)[:, None] * t_token + at[None, :], x, ok[:, None])


@kernel("k_target", "k_transforms", "v_target", "v_transforms")
def unpack(
    pages,
    page_stride,
    token_stride,
    head_stride,
    table,
    first,
    tokens,
    heads,
    k_target,
    kt_token,
    k_tables,
    k_transforms,
    v_target,
    vt_token,
    v_tables,
    v_transforms,
    mean,
    MEAN: tl.constexpr,
    K_BITS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BITS: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    V_BYTES: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
):
    """The tokens first ... first + tokens - 1 of one sequence to keys and values, (tokens, heads, size), whose last two
    axes are contiguous, in the original domain.  mean, float32 (heads, size) in the channels' order, is added to keys.
    grid: (tiles of N tokens, blocks of keys and then of values)."""
    tile, unit = tl.program_id(0), tl.program_id(1)
    if unit < heads * K_BLOCKS:
        unpack_side(
            tile,
            unit,
            pages,
            page_stride,
            token_stride,
            head_stride,
            table,
            first,
            tokens,
            k_target,
            kt_token,
            k_tables,
            k_transforms,
            mean,
            MEAN,
            K_BITS,
            K_BLOCKS,
            K_BYTES,
            HALF,
            PAGE,
            N,
        )
    else:
        unpack_side(
            tile,
            unit - heads * K_BLOCKS,
            pages + K_BLOCKS * K_BYTES,
            page_stride,
            token_stride,
            head_stride,
            table,
            first,
            tokens,
            v_target,
            vt_token,
            v_tables,
            v_transforms,
            None,
            False,
            V_BITS,
            V_BLOCKS,
            V_BYTES,
            0,
            PAGE,
            N,
        )


@triton.jit
def page_of(table, n0, limit, PAGE: tl.constexpr, BN: tl.constexpr):
    """The page of a tile that lies in one page, or those of each of its tokens; page 0 for what is not below limit."""
    if PAGE % BN == 0:
        return tl.load(table + n0 // PAGE, n0 < limit, 0).to(tl.int64)
    else:
        n = n0 + tl.arange(0, BN)
        return tl.load(table + n // PAGE, n < limit, 0).to(tl.int64)


@triton.jit
def slots_of(base, page, n0, page_stride, token_stride, PAGE: tl.constexpr, BN: tl.constexpr):
    """Pointers to the slots of a tile."""
    ahead = tl.arange(0, BN)
    if PAGE % BN == 0:  # one 64-bit sum for the tile
        return base + page * page_stride + n0 % PAGE * token_stride + ahead * token_stride
    else:
        return base + page * page_stride + (n0 + ahead) % PAGE * token_stride


@triton.jit
def block_of(row, ok, BITS: tl.constexpr):
    """A block's packed indices, as words that need no conversion later, and its scale."""
    qs, qh = packed_tile(row, ok, BITS)
    return qs.to(tl.int32), qh.to(tl.int32), scale_of(row, ok, BITS)


@triton.jit
def products(s, query, qs, qh, d, codebook, BITS: tl.constexpr):
    return s + tl.dot(query, tl.trans(levels(qs, qh, codebook, BITS))) * d[None, :]


@kernel("k_transform", "partial", "out")
def attend(
    q,
    q_token,
    q_head,
    starts,
    lengths,
    pages,
    page_stride,
    token_stride,
    head_stride,
    table,
    table_stride,
    k_tables,
    k_transform,
    v_tables,
    partial,
    arrived,
    out,
    o_token,
    sinks,
    k_mean,
    heads,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    K_BITS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BITS: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    V_BYTES: tl.constexpr,
    SEVERAL: tl.constexpr,
    SLIDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    MEAN: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A chunk of a sequence's pages for M query rows of one KV head, of which the first R may exist; row r is query
    head r % GROUP at token r // GROUP of the sequence's query tokens starts[sequence] ... starts[sequence + 1] - 1 of
    q, (tokens, query heads, size).  The pages hold lengths[sequence] tokens, these included; token t sees those before
    it and itself, and of them the newest `window` if SLIDING.

    grid: (row tiles, sequences . KV heads, chunks).  A sequence takes as many of the chunks as it has tiles for, so the
    grid depends on no length.  partial: float32 [sequences . heads][tiles][chunks][R][2 + value size], as of
    tbq.hf._kernels.attend.  The last program of a row tile merges them; arrived, int32 [sequences . heads][tiles], is
    zero before and after.
    AHEAD: the loads of a tile are issued before the tile before it is used, those of its place in the block table one
    tile earlier: the memory's latency passes while products are computed, for more registers.
    """
    tile, bh, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = bh // heads
    head = bh % heads
    start = tl.load(starts + sequence)
    tokens = tl.load(starts + sequence + 1) - start
    length = tl.load(lengths + sequence)
    before = length - tokens
    newest = tl.minimum((tile * M + M - 1) // GROUP, tokens - 1)  # query token of the tile
    last = tl.minimum(length, before + newest + 1)
    begin = 0
    if SLIDING:
        begin = tl.maximum(before + tile * M // GROUP - window + 1, 0) // BN * BN
    tiles = tl.cdiv(tl.maximum(last - begin, 0), BN)
    chunk = tl.cdiv(tiles, tl.num_programs(2)) * BN
    chunks = tl.cdiv(tiles * BN, tl.maximum(chunk, BN))
    if (split < chunks) & (tile * M < tokens * GROUP):
        first = begin + split * chunk
        last = tl.minimum(first + chunk, last)

        r = tl.arange(0, M)
        row = tile * M + r
        token = row // GROUP
        q_row_head = head * GROUP + row % GROUP
        seen = token < tokens
        at = (start + token).to(tl.int64) * q_token + q_row_head * q_head

        base = pages + head * head_stride
        pages_of = table + sequence.to(tl.int64) * table_stride

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
        k_codebook, v_codebook = level_bytes(k_tables), level_bytes(v_tables)
        ahead = tl.arange(0, BN)

        if AHEAD:  # the first tile
            page = page_of(pages_of, first, last, PAGE, BN)
            page_next = page_of(pages_of, first + BN, last, PAGE, BN)
            ok = first + ahead < last
            slot = slots_of(base, page, first, page_stride, token_stride, PAGE, BN)
            value = slot + K_BLOCKS * K_BYTES
            ks0, kh0, kd0 = block_of(slot, ok, K_BITS)
            if K_BLOCKS > 1:
                ks1, kh1, kd1 = block_of(slot + K_BYTES, ok, K_BITS)
            if K_BLOCKS > 2:
                ks2, kh2, kd2 = block_of(slot + 2 * K_BYTES, ok, K_BITS)
            if K_BLOCKS > 3:
                ks3, kh3, kd3 = block_of(slot + 3 * K_BYTES, ok, K_BITS)
            vs0, vh0, d0 = block_of(value, ok, V_BITS)
            if V_BLOCKS > 1:
                vs1, vh1, d1 = block_of(value + V_BYTES, ok, V_BITS)
            if V_BLOCKS > 2:
                vs2, vh2, d2 = block_of(value + 2 * V_BYTES, ok, V_BITS)
            if V_BLOCKS > 3:
                vs3, vh3, d3 = block_of(value + 3 * V_BYTES, ok, V_BITS)

        for n0 in range(first, last, BN):
            n = n0 + ahead
            ok = n < last
            if AHEAD:  # what comes next
                page = page_next
                page_next = page_of(pages_of, n0 + 2 * BN, last, PAGE, BN)
                ok_next = n + BN < last
                slot = slots_of(base, page, n0 + BN, page_stride, token_stride, PAGE, BN)
                value = slot + K_BLOCKS * K_BYTES
                nks0, nkh0, nkd0 = block_of(slot, ok_next, K_BITS)
                if K_BLOCKS > 1:
                    nks1, nkh1, nkd1 = block_of(slot + K_BYTES, ok_next, K_BITS)
                if K_BLOCKS > 2:
                    nks2, nkh2, nkd2 = block_of(slot + 2 * K_BYTES, ok_next, K_BITS)
                if K_BLOCKS > 3:
                    nks3, nkh3, nkd3 = block_of(slot + 3 * K_BYTES, ok_next, K_BITS)
                nvs0, nvh0, nd0 = block_of(value, ok_next, V_BITS)
                if V_BLOCKS > 1:
                    nvs1, nvh1, nd1 = block_of(value + V_BYTES, ok_next, V_BITS)
                if V_BLOCKS > 2:
                    nvs2, nvh2, nd2 = block_of(value + 2 * V_BYTES, ok_next, V_BITS)
                if V_BLOCKS > 3:
                    nvs3, nvh3, nd3 = block_of(value + 3 * V_BYTES, ok_next, V_BITS)
            else:
                page = page_of(pages_of, n0, last, PAGE, BN)
                slot = slots_of(base, page, n0, page_stride, token_stride, PAGE, BN)
                value = slot + K_BLOCKS * K_BYTES
                ks0, kh0, kd0 = block_of(slot, ok, K_BITS)
                if K_BLOCKS > 1:
                    ks1, kh1, kd1 = block_of(slot + K_BYTES, ok, K_BITS)
                if K_BLOCKS > 2:
                    ks2, kh2, kd2 = block_of(slot + 2 * K_BYTES, ok, K_BITS)
                if K_BLOCKS > 3:
                    ks3, kh3, kd3 = block_of(slot + 3 * K_BYTES, ok, K_BITS)
                vs0, vh0, d0 = block_of(value, ok, V_BITS)
                if V_BLOCKS > 1:
                    vs1, vh1, d1 = block_of(value + V_BYTES, ok, V_BITS)
                if V_BLOCKS > 2:
                    vs2, vh2, d2 = block_of(value + 2 * V_BYTES, ok, V_BITS)
                if V_BLOCKS > 3:
                    vs3, vh3, d3 = block_of(value + 3 * V_BYTES, ok, V_BITS)

            s = products(tl.zeros([M, BN], tl.float32), q0, ks0, kh0, kd0, k_codebook, K_BITS)
            if K_BLOCKS > 1:
                s = products(s, q1, ks1, kh1, kd1, k_codebook, K_BITS)
            if K_BLOCKS > 2:
                s = products(s, q2, ks2, kh2, kd2, k_codebook, K_BITS)
            if K_BLOCKS > 3:
                s = products(s, q3, ks3, kh3, kd3, k_codebook, K_BITS)
            s *= factor[:, None]
            if SOFTCAP and MEAN:
                s += taken[:, None]
            if SOFTCAP:  # softcap . tanh(s / softcap)
                s = softcap * (1.0 - 2.0 / (tl.exp(s * (2.0 / softcap)) + 1.0)) * LOG2E
            visible = ok[None, :] & seen[:, None]
            if SEVERAL:  # query tokens
                visible = visible & (n[None, :] <= before + token[:, None])
            if SLIDING:
                visible = visible & (n[None, :] > before + token[:, None] - window)
            # tbq.hf._kernels.attend says why the exponent of d is part of the logit
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
            floor = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - floor[:, None])
            keep = tl.exp2(largest - floor)
            largest = new
            weights = weights * keep[:, None] + p * unit[None, :]
            acc0 = weighted_values(acc0, keep, p, d0, unit, vs0, vh0, v_codebook, V_BITS)
            if V_BLOCKS > 1:
                acc1 = weighted_values(acc1, keep, p, d1, unit, vs1, vh1, v_codebook, V_BITS)
            if V_BLOCKS > 2:
                acc2 = weighted_values(acc2, keep, p, d2, unit, vs2, vh2, v_codebook, V_BITS)
            if V_BLOCKS > 3:
                acc3 = weighted_values(acc3, keep, p, d3, unit, vs3, vh3, v_codebook, V_BITS)

            if AHEAD:
                ks0, kh0, kd0, vs0, vh0, d0 = nks0, nkh0, nkd0, nvs0, nvh0, nd0
                if K_BLOCKS > 1:
                    ks1, kh1, kd1 = nks1, nkh1, nkd1
                if K_BLOCKS > 2:
                    ks2, kh2, kd2 = nks2, nkh2, nkd2
                if K_BLOCKS > 3:
                    ks3, kh3, kd3 = nks3, nkh3, nkd3
                if V_BLOCKS > 1:
                    vs1, vh1, d1 = nvs1, nvh1, nd1
                if V_BLOCKS > 2:
                    vs2, vh2, d2 = nvs2, nvh2, nd2
                if V_BLOCKS > 3:
                    vs3, vh3, d3 = nvs3, nvh3, nd3
        total = tl.sum(weights, axis=1)

        V_SIZE: tl.constexpr = V_BLOCKS * 64
        WIDTH: tl.constexpr = V_SIZE + 2
        group = bh * tl.num_programs(0) + tile  # of the programs that work on these rows
        first_part = partial + group.to(tl.int64) * tl.num_programs(2) * (R * WIDTH)
        column = element(tl.arange(0, 64), V_BITS)[None, :]
        part = first_part + split * (R * WIDTH) + r * WIDTH
        kept = r < R
        tl.store(part, largest, kept)
        tl.store(part + 1, total, kept)
        tl.store(part[:, None] + (2 + column), acc0, kept[:, None])
        if V_BLOCKS > 1:
            tl.store(part[:, None] + (66 + column), acc1, kept[:, None])
        if V_BLOCKS > 2:
            tl.store(part[:, None] + (130 + column), acc2, kept[:, None])
        if V_BLOCKS > 3:
            tl.store(part[:, None] + (194 + column), acc3, kept[:, None])
        tl.debug_barrier()  # all threads' parts are written before one of them says so
        if tl.atomic_add(arrived + group, 1, sem="acq_rel", scope="gpu") == chunks - 1:
            tl.store(arrived + group, 0)
            out_row = tile * M + tl.arange(0, R)
            out_token = out_row // GROUP
            exists = out_token < tokens
            out_head = head * GROUP + out_row % GROUP
            to = out + (start + out_token).to(tl.int64) * o_token + out_head * V_SIZE
            logit = tl.full([R], float("-inf"), tl.float32)
            if SINKS:
                logit = tl.load(sinks + out_head, exists, 0.0).to(tl.float32)
                if MEAN and not SOFTCAP:
                    of_query = (start + out_token).to(tl.int64) * q_token + out_head * q_head
                    mean_of_head = k_mean + head * (K_BLOCKS * 64)
                    logit -= scale * mean_product(q, of_query, exists, mean_of_head, K_BLOCKS, HALF, R)
                logit *= LOG2E
            for block in range(V_BLOCKS):
                merge_block(first_part, to, exists, logit, v_tables, block, chunks, WIDTH, SINKS, R)
