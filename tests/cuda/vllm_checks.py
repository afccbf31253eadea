#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The Triton kernels of tbq.vllm, over pages, against the NumPy reference; vLLM is not needed.

    python3 tests/cuda/vllm_checks.py                                 on a CUDA device: checks, then times
    TRITON_INTERPRET=1 python3 tests/cuda/vllm_checks.py --tiny       on the CPU, in Triton's interpreter, small

Needs torch, transformers, Triton and NumPy.  Of this repository it needs python/tbq and tests/numpy_reference.py in
their places, but not the compiled package.
Prints a line for each check, and exits with 1 if a check fails.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import pathlib
import sys
import types

import hf_package  # noqa: F401
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy_reference as reference

FAILED = []


def check(name, ok, detail=""):
    print(f"{'ok  ' if ok else 'FAIL'} {name}{': ' if detail else ''}{detail}", flush=True)
    if not ok:
        FAILED.append(name)


def stored(size, half):
    """The order of channels in which c and c + half, of the first 2 half, are neighbors."""
    return [*np.arange(2 * half).reshape(2, half).T.ravel(), *range(2 * half, size)]


def row_bytes(size, bits):
    return size // 64 * (2 + 8 * bits)


def pages_of(lengths, page, heads, slot, generator, spare=3):
    """Empty pages, and a block table with the pages of each sequence in random order."""
    needed = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(needed) + spare, generator=generator).tolist()
    table = torch.full((len(lengths), max(needed) + 1), 10**6, dtype=torch.int32)  # what is not used is not read
    for i, n in enumerate(needed):
        table[i, :n] = torch.tensor([order.pop() for _ in range(n)])
    return torch.full((sum(needed) + spare, page, heads, slot), 0xAA, dtype=torch.uint8), table


def slots_of(table, i, first, last, page):
    n = torch.arange(first, last)
    return table[i, n // page].long() * page + n % page


def check_store(cuda, device):
    generator = torch.Generator().manual_seed(0)
    for k_bits, v_bits, k_size, v_size, page, half, centered, dtype in (
        (4, 4, 64, 64, 16, 32, False, torch.bfloat16),
        (3, 2, 128, 64, 32, 48, True, torch.float32),
        (2, 4, 192, 256, 16, 0, True, torch.float16),
    ):
        heads, tokens = 2, 8 if device == "cpu" else 21
        slot = row_bytes(k_size, k_bits) + row_bytes(v_size, v_bits)
        pages, table = pages_of([tokens], page, heads, slot, generator)
        slots = slots_of(table, 0, 0, tokens, page)
        slots[[3, tokens - 4]] = -1
        k, v = (torch.randn(tokens + 2, heads, n, generator=generator).to(dtype) for n in (k_size, v_size))
        mean = torch.randn(heads, k_size, generator=generator) * 3 if centered else None
        weight = (
            (torch.rand(heads, k_size // 2, generator=generator) + 0.1).repeat_interleave(2, 1) if centered else None
        )
        got = pages.to(device)
        on_device = [None if each is None else each.to(device) for each in (mean, weight)]
        cuda.store(k.to(device), v.to(device), got, slots.to(device), k_bits, v_bits, half, *on_device)
        x = k[:tokens, :, stored(k_size, half)].float().numpy()
        of_keys = [None if each is None else np.broadcast_to(each.numpy(), x.shape) for each in (mean, weight)]
        rows = reference.quantize(x, k_bits, True, *of_keys).reshape(tokens, heads, -1)
        v_rows = reference.quantize(v[:tokens].float().numpy(), v_bits, kv=True).reshape(tokens, heads, -1)
        want = pages.clone().reshape(-1, heads, slot)
        some = slots >= 0
        want[slots[some]] = torch.from_numpy(np.concatenate([rows, v_rows], axis=2))[some]
        differ = int((got.cpu().reshape(want.shape) != want).any(2).sum())
        check(
            f"store {k_bits}/{v_bits} bits, heads of {k_size} and {v_size}, {dtype}",
            differ == 0,
            f"{differ} slots differ",
        )


def random_pages(lengths, page, heads, k_size, v_size, k_bits, v_bits, generator):
    """Pages with random keys and values, their table, and what they decode to, by sequence."""
    pages, table = pages_of(lengths, page, heads, row_bytes(k_size, k_bits) + row_bytes(v_size, v_bits), generator)
    flat, plain = pages.view(-1, heads, pages.shape[3]), []
    for i, length in enumerate(lengths):
        sides = []
        for size, bits in ((k_size, k_bits), (v_size, v_bits)):
            x = torch.randn(length, heads, size, generator=generator).numpy()
            rows = reference.quantize(x, bits, kv=True).reshape(length, heads, row_bytes(size, bits))
            sides.append((torch.from_numpy(rows), torch.from_numpy(reference.dequantize(rows, bits).reshape(x.shape))))
        flat[slots_of(table, i, 0, length, page)] = torch.cat([sides[0][0], sides[1][0]], dim=2)
        plain.append((sides[0][1], sides[1][1]))
    return pages, table, plain


def check_unpack(cuda, device):
    generator = torch.Generator().manual_seed(1)
    for k_bits, v_bits, k_size, v_size, half, centered in (
        (4, 4, 128, 128, 64, True),
        (3, 2, 64, 192, 16, False),
        (2, 3, 256, 64, 48, True),
    ):
        pages, table, plain = random_pages([75, 40], 16, 2, k_size, v_size, k_bits, v_bits, generator)
        mean = torch.randn(2, k_size, generator=generator) if centered else None
        for i, first in ((0, 0), (1, 5)):
            k, v = plain[i]
            k = k[..., np.argsort(stored(k_size, half))]
            k = k if mean is None else k + mean
            got = [torch.empty(each[first:].shape, device=device) for each in (k, v)]
            on_device = None if mean is None else mean.to(device)
            cuda.unpack(pages.to(device), table[i].to(device), first, *got, k_bits, v_bits, half, on_device)
            error = max(float((g.cpu() - w[first:]).abs().max()) for g, w in zip(got, (k, v)))
            check(f"unpack {k_bits}/{v_bits} bits, heads of {k_size} and {v_size}", error < 1e-6, f"{error:.1e}")


CASES = [  # bits of k and v, query and KV heads, sizes of k and v, tokens of a page, (length, query tokens)s, options
    (4, 4, 32, 8, 64, 64, 64, [(300, 1), (64, 1), (1, 1), (0, 0)], {}),
    (3, 2, 9, 3, 128, 128, 16, [(75, 1), (130, 1)], {"half": 64}),
    (2, 3, 8, 8, 256, 256, 32, [(90, 1), (33, 1)], {}),
    (4, 3, 6, 2, 128, 64, 64, [(150, 3), (70, 2), (2, 2)], {}),
    (4, 4, 24, 2, 64, 128, 16, [(190, 5), (5, 5)], {"softcap": 20.0}),
    (4, 2, 8, 2, 192, 192, 16, [(129, 1), (40, 1)], {"sinks": True, "mean": True}),
    (3, 4, 12, 2, 128, 64, 16, [(90, 3), (64, 1)], {"softcap": 5.0, "mean": True, "half": 48}),
    (4, 4, 8, 2, 64, 64, 16, [(200, 1), (50, 1), (10, 1)], {"window": 37}),
    (2, 2, 8, 4, 128, 128, 64, [(140, 4), (30, 3)], {"window": 20, "sinks": True}),
]


def attention_reference(q, k, v, scale, window=0, softcap=0.0, sinks=None):
    """In float64, of the newest tokens of a sequence; (tokens, heads, size)."""
    group, tokens, length = q.shape[1] // k.shape[1], q.shape[0], k.shape[0]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    s = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    at, n = torch.arange(length - tokens, length)[:, None], torch.arange(length)
    s = s.masked_fill((n > at) | ((n <= at - window) if window else False), -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[:, None, None].expand(*s.shape[:2], 1)], dim=2)
    return (s.softmax(2)[..., :length] @ v.repeat_interleave(group, 0)).transpose(0, 1)


def check_attend(cuda, device, cases):
    generator = torch.Generator().manual_seed(2)
    for case in cases:
        k_bits, v_bits, q_heads, heads, k_size, v_size, page, sequences, options = CASES[case]
        dtypes = [torch.float32 if device == "cpu" else (torch.bfloat16, torch.float16, torch.float32)[case % 3]]
        options = dict(options)
        if device == "cpu":  # the interpreter takes a minute for the whole
            sequences = [(max(t, n * 2 // 5), t) for n, t in sequences]
        lengths, tokens = [n for n, _ in sequences], [t for _, t in sequences]
        pages, table, plain = random_pages(lengths, page, heads, k_size, v_size, k_bits, v_bits, generator)
        mean = torch.randn(heads, k_size, generator=generator) if options.pop("mean", False) else None
        sinks = torch.randn(q_heads, generator=generator) if options.pop("sinks", False) else None
        half = options.pop("half", 0)
        places = np.argsort(stored(k_size, half))
        starts = torch.tensor([0, *itertools.accumulate(tokens)], dtype=torch.int32)
        for dtype in dtypes:
            q = torch.randn(sum(tokens), q_heads, k_size, generator=generator).to(dtype)
            rows = max(tokens) * (q_heads // heads)
            for chunks in (3,) if device == "cpu" else (1, 7):
                arrived = cuda.counters(len(sequences) * heads * (1 + rows // 16), torch.device(device))
                out = torch.full((sum(tokens), q_heads, v_size), torch.nan, dtype=dtype, device=device)
                cuda.attend(
                    q.to(device),
                    starts.to(device),
                    torch.tensor(lengths, dtype=torch.int32, device=device),
                    pages.to(device),
                    table.to(device),
                    out,
                    k_bits,
                    v_bits,
                    k_size**-0.5,
                    max(tokens),
                    chunks,
                    arrived,
                    half=half,
                    sinks=None if sinks is None else sinks.to(device),
                    mean=None if mean is None else mean.to(device),
                    **options,
                )
                error = top = 0.0
                for i, (k, v) in enumerate(plain):
                    if not tokens[i]:
                        continue
                    part = slice(starts[i], starts[i + 1])
                    whole = (k if mean is None else k + mean)[..., places]
                    want = attention_reference(q[part], whole, v, k_size**-0.5, sinks=sinks, **options)
                    error = max(error, float((out[part].cpu().double() - want).abs().nan_to_num(1e9).max()))
                    top = max(top, float(want.abs().max()))
                bound = {torch.float32: 0.0015, torch.float16: 0.002, torch.bfloat16: 0.006}[dtype]
                check(
                    f"attend {k_bits}/{v_bits} bits, {q_heads}/{heads} heads of {k_size} and {v_size}, pages of {page},"
                    f" {sequences}, {options}, {dtype}, {chunks} chunks",
                    error < bound * top and not arrived.any(),
                    f"largest error {error / top:.5f} of the largest value, bound {bound}",
                )


# --- times --------------------------------------------------------------------------------------------------------


#: What is timed, the most important first: KV heads, size, query heads; tokens; sequences.
ROWS = [(kind, n, m) for kind in ((8, 128, 32), (8, 64, 32)) for n in (32768, 8192) for m in (1, 8, 32)]
#: Launch shapes that are compared, by blocks of a head.
SHAPES = {
    1: [(16, 64, 2, 4, True), (16, 64, 2, 6, False), (16, 64, 4, 3, False), (16, 32, 2, 8, False)],
    2: [(16, 64, 4, 2, True), (16, 64, 4, 3, False), (16, 32, 4, 4, False), (16, 128, 8, 1, False)],
}


def shapes_of(cuda, size, bits):
    """All of them for 4 bits; for others the one that tbq.vllm uses."""
    blocks = size // 64
    return [cuda.Shape(*shape) for shape in SHAPES[blocks]] if bits == 4 else [cuda.tile_shape(4, blocks)]


def load_theirs(folder):
    """vLLM's decoding kernel of its TurboQuant types, from an unpacked wheel, without the rest of vLLM."""
    import importlib

    import triton

    platform = types.SimpleNamespace(is_cuda_alike=lambda: True, is_rocm=lambda: False)
    triton_utils = types.ModuleType("vllm.triton_utils")
    triton_utils.triton, triton_utils.tl = triton, triton.language
    platforms = types.ModuleType("vllm.platforms")
    platform.get_device_capability = torch.cuda.get_device_capability
    platforms.current_platform = platform
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.ops"):
        package = types.ModuleType(name)
        package.__path__ = [str(pathlib.Path(folder, *name.split(".")))]
        sys.modules[name] = package
    sys.modules |= {"vllm.triton_utils": triton_utils, "vllm.platforms": platforms}
    ops = importlib.import_module("vllm.v1.attention.ops.triton_turboquant_decode")
    return ops.triton_turboquant_decode_attention


def prepare_theirs(theirs, size, heads, q, table, lengths):
    """A call of that kernel for turboquant_4bit_nc, on pages of any content."""
    device = q.device
    slot = size // 2 + 2 + size // 2 + 4
    cache = torch.full((table.numel() * 4, 16, heads, slot), 0x22, dtype=torch.uint8, device=device)
    small = (table[:, :, None] * 4 + torch.arange(4, device=device, dtype=torch.int32)).flatten(1).contiguous()
    eye, centroids = torch.eye(size, device=device), torch.linspace(-1, 1, 16, device=device)
    given = q, cache, small, lengths, eye, centroids, 0.1, 4, size // 2 + 2, 4
    return lambda: theirs(*given, norm_correction=True, PiT=eye)


def time_attention(cuda, theirs, rows):
    """Microseconds of a layer's attention of one token of each sequence, and of bfloat16 keys and values of torch's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from triton.testing import do_bench

    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    print(
        "| heads, size, query heads | tokens | sequences | bf16, torch | tbq4 | tbq3 | theirs | bf16 / tbq4 | shapes |"
    )
    for (heads, size, q_heads), length, sequences in rows:
        q = torch.randn(sequences, q_heads, size, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(sequences, heads, length, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        plain = []
        for choice in (contextlib.nullcontext(), sdpa_kernel(SDPBackend.FLASH_ATTENTION)):
            with contextlib.suppress(RuntimeError), choice:
                attention = functools.partial(
                    torch.nn.functional.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True
                )
                plain.append(do_bench(attention, warmup=10, rep=30) * 1000)
        del k, v
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        lengths = torch.full((sequences,), length, dtype=torch.int32, device=device)
        out = torch.empty_like(q)
        arrived = cuda.counters(sequences * heads, device)
        per = -(-length // 64)
        table = torch.randperm(sequences * per, device=device).int().reshape(sequences, per)
        times = {}
        for bits in (4, 3):
            pages = torch.zeros(
                (sequences * per, 64, heads, 2 * row_bytes(size, bits)), dtype=torch.uint8, device=device
            )
            some = torch.randn(sequences * length, heads, size, device=device, dtype=torch.bfloat16)
            cuda.store(some, some, pages, torch.arange(sequences * length, device=device), bits, bits)
            del some
            for shape in shapes_of(cuda, size, bits):
                chunks = max(1, min(shape.programs * processors // (sequences * heads), -(-length // shape.keys)))
                given = q, starts, lengths, pages, table, out, bits, bits, 0.1, 1, chunks, arrived
                try:
                    run = functools.partial(cuda.attend, *given, shape=shape)
                    times[bits, tuple(shape)] = do_bench(run, warmup=5, rep=20) * 1000
                except Exception as error:  # a shape that does not compile
                    print(f"shape {shape}: {str(error)[:80]}")
        of_theirs = float("nan")
        if theirs:
            of_theirs = do_bench(prepare_theirs(theirs, size, heads, q, table, lengths), warmup=5, rep=20) * 1000
        best = {bits: min(us for (b, _), us in times.items() if b == bits) for bits in (4, 3)}
        print(
            f"| {heads}, {size}, {q_heads} | {length} | {sequences} | {min(plain):.1f} | {best[4]:.1f} | {best[3]:.1f}"
            f" | {of_theirs:.1f} | {min(plain) / best[4]:.2f} | "
            + ", ".join(f"{s[1]}/{s[2]}/{s[3]}{'a' if s[4] else ''} {us:.0f}" for (b, s), us in times.items() if b == 4)
            + " |",
            flush=True,
        )


def compile_one(arguments):
    """Fills Triton's cache of compiled kernels, in a process of its own."""
    from tbq.vllm import _cuda

    (heads, size, q_heads), bits, shape, theirs = arguments
    device = torch.device("cuda")
    table = torch.zeros((1, 2), dtype=torch.int32, device=device)
    ones = torch.ones(1, dtype=torch.int32, device=device)
    q = torch.zeros((1, q_heads, size), dtype=torch.bfloat16, device=device)
    with contextlib.suppress(Exception):  # a shape that does not compile
        if shape is None:
            prepare_theirs(load_theirs(theirs), size, heads, q, table, ones)()
            return
        pages = torch.zeros((2, 64, heads, 2 * row_bytes(size, bits)), dtype=torch.uint8, device=device)
        some = torch.zeros((1, heads, size), dtype=torch.bfloat16, device=device)
        _cuda.store(some, some, pages, torch.zeros(1, dtype=torch.int64, device=device), bits, bits)
        starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
        counters = _cuda.counters(heads, device)
        _cuda.attend(q, starts, ones, pages, table, q.clone(), bits, bits, 0.1, 1, 2, counters, shape=shape)


def checks_of(part, device="cuda"):
    """Runs some checks, and returns the names of those that failed."""
    from tbq.vllm import _cuda

    if part == "store":
        check_store(_cuda, device)
    elif part == "unpack":
        check_unpack(_cuda, device)
    else:
        check_attend(_cuda, device, [part])
    return FAILED


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on the CPU: for Triton's interpreter")
    parser.add_argument("--only", choices=("checks", "times"))
    parser.add_argument("--theirs", metavar="FOLDER", help="an unpacked wheel of vLLM 0.25, whose kernel is timed too")
    args = parser.parse_args()
    import triton

    from tbq.vllm import _cuda

    print({"torch": torch.__version__, "triton": triton.__version__}, flush=True)
    parts = ["store", "unpack", *range(len(CASES))]
    if args.tiny:
        for part in ("store", "unpack", 0, 1, 3, 6, 8):  # half a minute
            checks_of(part, "cpu")
    else:
        # Most of the time is the compiler's.  Children come before CUDA, which does not outlive a fork.
        needed = {
            (kind, bits, shape, args.theirs)
            for kind, _, _ in ROWS
            for bits in (4, 3)
            for shape in shapes_of(_cuda, kind[1], bits)
        } | ({(kind, 4, None, args.theirs) for kind, _, _ in ROWS} if args.theirs else set())
        with concurrent.futures.ProcessPoolExecutor(15, multiprocessing.get_context("fork")) as processes:
            compiling = [processes.submit(compile_one, each) for each in needed if args.only != "checks"]
            checking = [processes.submit(checks_of, part) for part in parts if args.only != "times"]
            for each in [*compiling, *checking]:
                FAILED.extend(each.result() or ())
    if not args.tiny and args.only != "checks":
        print(torch.cuda.get_device_name(), flush=True)
        time_attention(_cuda, load_theirs(args.theirs) if args.theirs else None, ROWS)
    print(f"{len(FAILED)} checks failed" if FAILED else "all checks passed")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
