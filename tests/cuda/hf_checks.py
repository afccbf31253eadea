#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The Triton kernels of tbq.hf against the NumPy reference.

    python3 tests/cuda/hf_checks.py                                   on a CUDA device
    TRITON_INTERPRET=1 python3 tests/cuda/hf_checks.py --tiny         on the CPU, in Triton's interpreter, small

Needs torch, transformers, Triton and NumPy.  Of this repository it needs python/tbq, tests/numpy_reference.py,
tests/golden.txt and ggml_tbq/include/tbq-tables.h in their places, but not the compiled package.
Prints a line for each check, and exits with 1 if a check fails.  bench/hf.py measures the same kernels.
"""

import argparse
import pathlib
import sys

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


# --- kernels ------------------------------------------------------------------------------------------------------


def states(shape, device, seed=0):
    """Values of every kind: outlier channels, every magnitude, zeros, NaN, infinities."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32) * np.exp(rng.standard_normal(shape[-1]) * 0.7).astype(np.float32)
    flat = x.reshape(-1, 64)
    special = min(12, len(flat))
    for row, (factor, at) in zip(
        range(special),
        [
            (0, None),
            (1e-12, None),
            (2.0**-29, None),
            (1e18, None),
            (1, np.nan),
            (1, np.inf),
            (1, -np.inf),
            (2.0**60, None),
            (60000, None),
            (-1, None),
            (1e-3, None),
            (3, None),
        ],
    ):
        flat[row] *= np.float32(factor)
        if at is not None:
            flat[row, 7] = at
    return torch.from_numpy(x).to(device)


def check_golden(cuda, device):
    """The library's committed bytes, through the kernel."""
    inputs = reference.golden_inputs()
    for bits in (2, 3, 4):
        wanted = {
            line.split()[2]: bytes.fromhex(line.split()[3])
            for line in reference.GOLDEN.read_text().splitlines()
            if line.startswith(f"tbq{bits}_0 kv ")
        }
        x = torch.from_numpy(np.stack([inputs[name] for name in wanted])).to(device)[None, None]
        packed = torch.zeros((1, len(wanted), 1, 2 * (2 + 8 * bits)), dtype=torch.uint8, device=device)
        cuda.encode(x, packed, bits, x, None, 0)
        wrong = [name for name, row in zip(wanted, packed[0, :, 0].cpu().numpy()) if row.tobytes() != wanted[name]]
        check(f"golden bytes, tbq{bits}_0", not wrong, ", ".join(wrong))


def stored(size, half):
    """The order of channels in which c and c + half, of the first 2 half, are neighbors."""
    return [*np.arange(2 * half).reshape(2, half).T.ravel(), *range(2 * half, size)]


def check_encode(cuda, device, tokens):
    for bits in (2, 3, 4):
        other = 6 - bits or 4
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            k, v = states((2, 2, tokens, 128), device).to(dtype), states((2, 2, tokens, 64), device, 1).to(dtype)
            k_packed = torch.zeros((2, tokens, 2, 2 * (2 + 8 * bits)), dtype=torch.uint8, device=device)
            v_packed = torch.zeros((2, tokens, 2, 2 + 8 * other), dtype=torch.uint8, device=device)
            cuda.encode(k, k_packed, bits, v, v_packed, other, 48)
            k = k[..., stored(128, 48)]
            wrong, blocks, worst = 0, 0, 0.0
            for x, packed, b in ((k, k_packed, bits), (v, v_packed, other)):
                rows = x.float().cpu().numpy().transpose(0, 2, 1, 3)
                want, got = (
                    p.reshape(-1, 2 + 8 * b) for p in (reference.quantize(rows, b, kv=True), packed.cpu().numpy())
                )
                differ = (want != got).any(axis=1)
                wrong, blocks = wrong + int(differ.sum()), blocks + len(want)
                if differ.any():  # a tie: as good a block
                    errors = [
                        np.square(
                            reference.dequantize(p[differ], b).reshape(-1, 64) - rows.reshape(-1, 64)[differ]
                        ).sum(axis=1)
                        for p in (got, want)
                    ]
                    worst = max(worst, float(np.nanmax(errors[0] / errors[1])))
            check(
                f"encode {bits}/{other} bits, {dtype}",
                wrong <= blocks / 10000,
                f"{wrong} of {blocks} blocks differ from the library's"
                + (f", worst error ratio {worst:.3f}" if wrong else ""),
            )


def check_centered(cuda, device, tokens):
    """Keys minus a mean, with weights for the error."""
    generator = torch.Generator().manual_seed(4)
    for bits, half in ((2, 0), (3, 64), (4, 48)):
        k = states((2, 2, tokens, 128), device)
        mean = torch.randn(2, 128, generator=generator) * 10
        mean[0] = 0  # leaves zeros and what is tiny as they are
        weight = (torch.rand(2, 64, generator=generator) + 0.1).repeat_interleave(2, 1)
        rows = torch.zeros((2, tokens, 2, 2 * (2 + 8 * bits)), dtype=torch.uint8, device=device)
        exact = torch.zeros((2, tokens, 2, 2 * 68), dtype=torch.uint8, device=device)
        of_keys = mean.to(device), weight.to(device)
        cuda.encode(k, rows, bits, k, None, 0, half, *of_keys)
        cuda.encode(k, exact, 8, k, None, 0, half, *of_keys)
        x = k[..., stored(128, half)].cpu().numpy().transpose(0, 2, 1, 3)
        m, w = (np.broadcast_to(each.numpy(), x.shape) for each in (mean, weight))
        want = reference.quantize(x, bits, True, m, w).reshape(-1, 2 + 8 * bits)
        wrong = int((rows.cpu().numpy().reshape(want.shape) != want).any(axis=1).sum())
        check(f"encode centered, {bits} bits", wrong <= len(want) / 10000, f"{wrong} of {len(want)} blocks differ")
        want = exact_blocks(x - m).reshape(-1, 68)
        wrong = int((exact.cpu().numpy().reshape(want.shape) != want).any(axis=1).sum())
        check(f"encode centered exact rows, half {half}", wrong == 0, f"{wrong} of {len(want)} blocks differ")


def check_decode(cuda, device, tokens):
    for bits in (2, 3, 4):
        x = states((1, 2, tokens, 128), "cpu").numpy().transpose(0, 2, 1, 3)
        packed = torch.from_numpy(reference.quantize(x, bits, kv=True))
        want = torch.from_numpy(reference.dequantize(packed.numpy(), bits).reshape(x.shape)).transpose(1, 2)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            half = {torch.float32: 64, torch.float16: 32, torch.bfloat16: 48}[
                dtype
            ]  # all blocks paired, one, one and a half
            got = cuda.decode(packed.to(device), bits, 128, packed.to(device), bits, 128, dtype, half)
            got = got[0][..., stored(128, half)], got[1]
            rounded = want.to(dtype)
            if dtype == torch.bfloat16 and device == "cpu":  # the interpreter cuts off where the hardware rounds
                rounded = (want.view(torch.int32) & -65536).view(torch.float32).to(dtype)
            same = [bool(((g.cpu() == rounded) | (g.cpu().isnan() & want.isnan())).all()) for g in got]
            check(f"decode {bits} bits, {dtype}", all(same), "every bit" if all(same) else "differs")


def exact_blocks(x):
    """Blocks of 8 bits, in NumPy: the rotated bytes and the scale of an activation's block."""
    d, q = reference.quantize_act(np.ascontiguousarray(x).reshape(-1))
    blocks = np.concatenate([d[:, None].view(np.uint8), q.astype(np.int8).view(np.uint8)], axis=1)
    return blocks.reshape(*x.shape[:-1], x.shape[-1] // 64 * 68)


def exact_values(blocks, size):
    """What blocks of 8 bits decode to."""
    b = np.ascontiguousarray(blocks).reshape(-1, 68)
    x = reference.unrotate(b[:, 4:].view(np.int8).astype(np.float32).reshape(-1)).reshape(-1, 64)  # exact
    return (x * np.ascontiguousarray(b[:, :4]).view(np.float32)).reshape(*blocks.shape[:-1], size)


def check_exact_rows(cuda, device, tokens):
    for dtype in (torch.float32, torch.bfloat16):
        x = states((2, 2, tokens, 128), device).to(dtype)
        y = x[..., stored(128, 48)].contiguous()
        want = exact_blocks(y.float().cpu().numpy().transpose(0, 2, 1, 3))
        rows = [torch.zeros(want.shape, dtype=torch.uint8, device=device) for _ in range(2)]
        cuda.encode(x, rows[0], 8, y, rows[1], 8, 48)
        wrong = sum(int((each.cpu().numpy() != want).reshape(-1, 68).any(axis=1).sum()) for each in rows)
        check(f"encode exact rows, {dtype}", wrong == 0, f"{wrong} of {want.size // 34} blocks differ")
        got, other = cuda.decode(rows[0], 8, 128, rows[1], 8, 128, torch.float32, 48)
        plain = torch.from_numpy(exact_values(want, 128)).transpose(1, 2)
        got = got[..., stored(128, 48)].cpu(), other.cpu()
        check(f"decode exact rows, {dtype}", all(((g == plain) | (g.isnan() & plain.isnan())).all() for g in got))


CASES = [  # bits of k and v, batch, query heads, KV heads, cached tokens, query tokens, sizes of k and v, options
    (4, 4, 1, 32, 8, 1000, 1, 64, 64, {}),
    (3, 2, 2, 16, 4, 333, 1, 128, 128, {"mask": "bool"}),
    (2, 3, 1, 8, 8, 257, 1, 256, 256, {"mask": "addend"}),
    (4, 3, 1, 6, 2, 150, 9, 128, 64, {"causal": True}),
    (4, 4, 1, 24, 2, 190, 40, 64, 128, {"causal": True, "softcap": 20.0}),
    (4, 2, 2, 8, 2, 129, 1, 192, 192, {"sinks": True}),
    (3, 3, 1, 4, 4, 64, 64, 64, 64, {"causal": True, "sinks": True}),
    (4, 3, 1, 8, 2, 100, 1, 128, 128, {"half": 64}),
    (2, 2, 1, 8, 2, 100, 1, 64, 64, {"half": 16}),
    (4, 2, 2, 8, 2, 129, 1, 192, 192, {"sinks": True, "mean": True}),
    (3, 4, 1, 12, 2, 90, 9, 128, 64, {"causal": True, "softcap": 5.0, "mean": True, "half": 48}),
    (2, 3, 1, 4, 4, 64, 64, 64, 64, {"causal": True, "sinks": True, "mean": True, "half": 32}),
    (4, 4, 1, 8, 2, 70, 1, 256, 128, {"sinks": True, "softcap": 5.0, "mean": True}),
]


def whole_keys(k, options, generator):
    """Keys (batch, heads, tokens, size) with a mean that was subtracted from them, and this mean."""
    if not options.get("mean"):
        return k, None
    mean = torch.randn(k.shape[1], k.shape[3], generator=generator)
    return k + mean[:, None], mean


def attention_reference(q, k, v, scale, mask, causal, softcap, sinks):
    """In float64; q (batch, heads, tokens, size)."""
    q, k, v = q.double(), k.double(), v.double()
    group, tokens, n_kv = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    s = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    if causal:
        s = s.masked_fill(~torch.ones(tokens, n_kv, dtype=torch.bool, device=s.device).tril(n_kv - tokens), -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)], dim=3)
    return (s.softmax(3).nan_to_num(0)[..., :n_kv] @ v.repeat_interleave(group, 1)).transpose(1, 2)


def check_attention(cuda, device, dtypes):
    generator = torch.Generator().manual_seed(1)
    for case in CASES:
        k_bits, v_bits, batch, heads, kv_heads, n_kv, tokens, k_size, v_size, options = case
        n_kv = min(n_kv, 200) if device == "cpu" else n_kv  # the interpreter takes a minute for the whole
        k, v = (
            torch.from_numpy(
                reference.quantize(torch.randn(batch, n_kv, kv_heads, size, generator=generator).numpy(), bits, kv=True)
            )
            for size, bits in ((k_size, k_bits), (v_size, v_bits))
        )
        k_plain, v_plain = (
            torch.from_numpy(reference.dequantize(p.numpy(), bits).reshape(batch, n_kv, kv_heads, size)).transpose(1, 2)
            for p, bits, size in ((k, k_bits, k_size), (v, v_bits, v_size))
        )
        mask = sinks = None
        if options.get("mask") == "bool":
            mask = torch.rand(batch, 1, tokens, n_kv, generator=generator) < 0.7
            mask[-1] = False  # sees nothing
        elif options.get("mask"):
            mask = torch.randn(1, 1, tokens, n_kv, generator=generator)
        if options.get("sinks"):
            sinks = torch.randn(heads, generator=generator)
        rest = options.get("causal", False), options.get("softcap", 0.0)
        k_plain, mean = whole_keys(k_plain, options, generator)
        for dtype in dtypes:
            q = torch.randn(batch, heads, tokens, k_size, generator=generator).to(dtype)
            places = np.argsort(stored(k_size, options.get("half", 0)))
            want = attention_reference(q, k_plain[..., places], v_plain, k_size**-0.5, mask, *rest, sinks)
            got = cuda.attention(
                q.to(device),
                k.to(device),
                k_bits,
                v.to(device),
                v_bits,
                k_size**-0.5,
                None if mask is None else mask.to(device),
                *rest,
                None if sinks is None else sinks.to(device),
                options.get("half", 0),
                k_mean=None if mean is None else mean.to(device),
            )
            error = float((got.cpu().double() - want).abs().max() / want.abs().max())
            bound = {torch.float32: 0.0015, torch.float16: 0.002, torch.bfloat16: 0.006}[
                dtype
            ]  # halves in the products; the result's own rounding
            check(
                f"attention {case}, {dtype}",
                error < bound,
                f"largest error {error:.5f} of the largest value, bound {bound}",
            )


EXACT_CASES = [  # as CASES, then first rows, newest rows, free slots between them
    ((4, 4, 1, 32, 8, 1000, 1, 64, 64, {}), (4, 128, 60)),
    ((2, 2, 2, 16, 4, 333, 1, 128, 128, {"mask": "bool"}), (4, 50, 0)),
    ((2, 3, 1, 8, 8, 257, 1, 256, 256, {"mask": "addend"}), (0, 30, 0)),
    ((3, 4, 1, 6, 2, 150, 9, 128, 64, {"causal": True}), (4, 40, 7)),
    ((2, 4, 1, 24, 2, 190, 40, 64, 128, {"causal": True, "softcap": 20.0}), (2, 60, 0)),
    ((4, 2, 2, 8, 2, 129, 1, 192, 192, {"sinks": True}), (0, 129, 0)),
    ((3, 3, 1, 4, 4, 64, 64, 64, 64, {"causal": True, "sinks": True}), (4, 60, 0)),
    ((2, 2, 1, 4, 4, 64, 9, 64, 64, {"causal": True}), (4, 0, 0)),
    ((2, 2, 1, 8, 2, 100, 1, 64, 64, {"half": 16}), (1, 16, 3)),
    ((4, 2, 2, 8, 2, 100, 1, 128, 128, {"sinks": True, "mean": True}), (4, 40, 7)),
    ((2, 4, 1, 24, 2, 90, 9, 128, 64, {"causal": True, "softcap": 5.0, "mean": True}), (2, 30, 0)),
]


def check_attention_to_exact_rows(cuda, device):
    from tbq.hf._buffers import ExactRows

    generator = torch.Generator().manual_seed(3)
    for (k_bits, v_bits, batch, heads, kv_heads, cached, tokens, k_size, v_size, options), places in EXACT_CASES:
        n_kv = min(cached, 200) if device == "cpu" else cached
        first, newest, unused = places
        newest = min(newest, n_kv - first)
        packed, exact, plain = [], [], []
        for size, bits in ((k_size, k_bits), (v_size, v_bits)):
            x = torch.randn(batch, n_kv, kv_heads, size, generator=generator).numpy()
            rows, blocks = reference.quantize(x, bits, kv=True), exact_blocks(x)
            values = reference.dequantize(rows, bits).reshape(x.shape)
            here = [*range(first), *range(n_kv - newest, n_kv)]
            values[:, here] = exact_values(blocks[:, here], size)
            garbage = np.full((batch, unused, *blocks.shape[2:]), 255, np.uint8)  # scales of NaN
            slots = np.concatenate([blocks[:, :first], garbage, blocks[:, n_kv - newest :]], axis=1)
            packed.append(torch.from_numpy(rows).to(device))
            exact.append(ExactRows(torch.from_numpy(slots).to(device), first, first + unused))
            plain.append(torch.from_numpy(values).transpose(1, 2))
        mask = sinks = None
        if options.get("mask") == "bool":
            mask = torch.rand(batch, 1, tokens, n_kv, generator=generator) < 0.7
            mask[-1] = False  # sees nothing
        elif options.get("mask"):
            mask = torch.randn(1, 1, tokens, n_kv, generator=generator)
        if options.get("sinks"):
            sinks = torch.randn(heads, generator=generator)
        rest = options.get("causal", False), options.get("softcap", 0.0)
        q = torch.randn(batch, heads, tokens, k_size, generator=generator)
        order = np.argsort(stored(k_size, options.get("half", 0)))
        keys, mean = whole_keys(plain[0], options, generator)
        want = attention_reference(q, keys[..., order], plain[1], k_size**-0.5, mask, *rest, sinks)
        got = cuda.attention(
            q.to(device),
            packed[0],
            k_bits,
            packed[1],
            v_bits,
            k_size**-0.5,
            None if mask is None else mask.to(device),
            *rest,
            None if sinks is None else sinks.to(device),
            options.get("half", 0),
            *exact,
            k_mean=None if mean is None else mean.to(device),
        )
        error = float((got.cpu().double() - want).abs().max() / want.abs().max())
        case = k_bits, v_bits, batch, heads, kv_heads, n_kv, tokens, k_size, v_size, options, places
        check(f"attention to exact rows {case}", error < 0.0015, f"largest error {error:.5f} of the largest value")


def check_attention_edges(cuda, device):
    """Values of every magnitude, blocks of zeros, and NaN, which must reach those that see it and nobody else."""
    generator = torch.Generator().manual_seed(2)
    for size in (64, 128):
        k, v = (torch.randn(1, 200, 2, size, generator=generator).numpy() for _ in range(2))
        v *= np.exp2(np.random.default_rng(2).integers(-30, 12, (1, 200, 2, 1))).astype(np.float32)
        k[0, 9] = v[0, 7] = v[0, 100:140] = 0
        k[0, 40], v[0, 41, :, :64] = np.nan, np.nan
        packed = [torch.from_numpy(reference.quantize(x, 4, kv=True)) for x in (k, v)]
        plain = [
            torch.from_numpy(reference.dequantize(p.numpy(), 4).reshape(1, 200, 2, size)).transpose(1, 2).nan_to_num(0)
            for p in packed
        ]
        q = torch.randn(1, 6, 1, size, generator=generator)
        for name, hidden in (("of every magnitude", [40, 41]), ("of zeros", [*range(100), *range(140, 200)])):
            mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
            mask[..., hidden] = False
            want = attention_reference(q, *plain, size**-0.5, mask, False, 0.0, None)
            for kind, given in (("bool", mask), ("addend", torch.zeros(mask.shape).masked_fill(~mask, -torch.inf))):
                got = (
                    cuda.attention(
                        q.to(device), packed[0].to(device), 4, packed[1].to(device), 4, size**-0.5, given.to(device)
                    )
                    .cpu()
                    .double()
                )
                error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
                check(
                    f"attention, values {name}, heads of {size}, mask: {kind}",
                    error < 0.0015,
                    f"largest error {error:.5f} of the largest value, bound 0.0015",
                )
        for name, hidden in (("value", 40), ("key", 41)):
            mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
            mask[..., hidden] = False
            got = cuda.attention(
                q.to(device), packed[0].to(device), 4, packed[1].to(device), 4, size**-0.5, mask.to(device)
            )
            check(f"attention, a NaN in a {name} is seen, heads of {size}", bool(got.isnan().all()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU: for Triton's interpreter")
    parser.add_argument("--only", choices=("encode", "decode", "attention"))
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    import triton

    from tbq.hf import _cuda

    print(
        {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "numpy": np.__version__,
            "device": "interpreter" if args.tiny else torch.cuda.get_device_name(),
        },
        flush=True,
    )
    if args.only in (None, "encode"):
        check_golden(_cuda, device)
        check_encode(_cuda, device, 9 if args.tiny else 1500)
        check_encode(_cuda, device, 3)
        check_exact_rows(_cuda, device, 9 if args.tiny else 1500)
        check_centered(_cuda, device, 9 if args.tiny else 1500)
    if args.only in (None, "decode"):
        check_decode(_cuda, device, 9 if args.tiny else 1500)
    if args.only in (None, "attention"):
        check_attention(_cuda, device, [torch.float32] if args.tiny else [torch.float32, torch.float16, torch.bfloat16])
        check_attention_to_exact_rows(_cuda, device)
        check_attention_edges(_cuda, device)
    print("FAILED: " + "; ".join(FAILED) if FAILED else "all checks passed")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
