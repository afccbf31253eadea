#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The Triton kernels of tbq.hf against the NumPy reference, and a llama-shaped model's decode time and memory.

    python3 tests/cuda/hf_bench.py                         all of it, on a CUDA device
    TRITON_INTERPRET=1 python3 tests/cuda/hf_bench.py --tiny       the same on the CPU, in Triton's interpreter, small

Needs torch, transformers, Triton and NumPy, and of this repository python/tbq, tests/numpy_reference.py, tests/golden.txt and
ggml_tbq/include/tbq-tables.h in their places; not the compiled package (tbq.hf is imported by itself).
Prints a line for each check and a table; exits with 1 if a check fails.  --json FILE: the figures.

Timing: the caches take turns, token by token from the same prompt; the median of the rounds is reported, and the ratio to
DynamicCache.  Memory: what torch's allocator holds more after the prompt than before.
"""
import argparse
import inspect
import json
import pathlib
import statistics
import sys
import time
import types

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "python")]
try:
    import tbq  # noqa: F401
except ImportError:  # no cffi, or not compiled: the submodules that are needed get by without
    package = types.ModuleType("tbq")
    package.__path__ = [str(ROOT / "python" / "tbq")]
    sys.modules["tbq"] = package

import numpy_reference as reference  # noqa: E402

FAILED = []


def check(name, ok, detail=""):
    print(f"{'ok  ' if ok else 'FAIL'} {name}{': ' if detail else ''}{detail}", flush=True)
    if not ok:
        FAILED.append(name)


# --- kernels ------------------------------------------------------------------------------------------------------


def states(shape, device, seed=0):
    """Values as caches have them and as they had better not be: outlier channels, every magnitude, zeros, NaN, infinities."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32) * np.exp(rng.standard_normal(shape[-1]) * 0.7).astype(np.float32)
    flat = x.reshape(-1, 64)
    special = min(12, len(flat))
    for row, (factor, at) in zip(range(special), [(0, None), (1e-12, None), (2.0**-29, None), (1e18, None), (1, np.nan), (1, np.inf), (1, -np.inf),
                                                  (2.0**60, None), (60000, None), (-1, None), (1e-3, None), (3, None)]):
        flat[row] *= np.float32(factor)
        if at is not None:
            flat[row, 7] = at
    return torch.from_numpy(x).to(device)


def check_golden(cuda, device):
    """The library's committed bytes, through the kernel."""
    inputs = reference.golden_inputs()
    for bits in (2, 3, 4):
        wanted = {line.split()[2]: bytes.fromhex(line.split()[3]) for line in reference.GOLDEN.read_text().splitlines()
                  if line.startswith(f"tbq{bits}_0 kv ")}
        x = torch.from_numpy(np.stack([inputs[name] for name in wanted])).to(device)[None, None]
        packed = torch.zeros((1, len(wanted), 1, 2 * (2 + 8 * bits)), dtype=torch.uint8, device=device)
        cuda.encode(x, packed, bits, x, None, 0)
        wrong = [name for name, row in zip(wanted, packed[0, :, 0].cpu().numpy()) if row.tobytes() != wanted[name]]
        check(f"golden bytes, tbq{bits}_0", not wrong, ", ".join(wrong))


def stored(size, half):
    """The order of channels in which c and c + half, of the first 2 half, are neighbours."""
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
                want, got = (p.reshape(-1, 2 + 8 * b) for p in (reference.quantize(rows, b, kv=True), packed.cpu().numpy()))
                differ = (want != got).any(axis=1)
                wrong, blocks = wrong + int(differ.sum()), blocks + len(want)
                if differ.any():  # a tie: as good a block
                    errors = [np.square(reference.dequantize(p[differ], b).reshape(-1, 64) - rows.reshape(-1, 64)[differ]).sum(axis=1) for p in (got, want)]
                    worst = max(worst, float(np.nanmax(errors[0] / errors[1])))
            check(f"encode {bits}/{other} bits, {dtype}", wrong <= blocks / 10000, f"{wrong} of {blocks} blocks differ from the library's" +
                  (f", worst error ratio {worst:.3f}" if wrong else ""))


def check_decode(cuda, device, tokens):
    for bits in (2, 3, 4):
        x = states((1, 2, tokens, 128), "cpu").numpy().transpose(0, 2, 1, 3)
        packed = torch.from_numpy(reference.quantize(x, bits, kv=True))
        want = torch.from_numpy(reference.dequantize(packed.numpy(), bits).reshape(x.shape)).transpose(1, 2)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            half = {torch.float32: 64, torch.float16: 32, torch.bfloat16: 48}[dtype]  # all blocks paired, one, one and a half
            got = cuda.decode(packed.to(device), bits, 128, packed.to(device), bits, 128, dtype, half)
            got = got[0][..., stored(128, half)], got[1]
            rounded = want.to(dtype)
            if dtype == torch.bfloat16 and device == "cpu":  # the interpreter cuts off where the hardware rounds
                rounded = (want.view(torch.int32) & -65536).view(torch.float32).to(dtype)
            same = [bool(((g.cpu() == rounded) | (g.cpu().isnan() & want.isnan())).all()) for g in got]
            check(f"decode {bits} bits, {dtype}", all(same), "every bit" if all(same) else "differs")


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
]


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
        k, v = (torch.from_numpy(reference.quantize(torch.randn(batch, n_kv, kv_heads, size, generator=generator).numpy(), bits, kv=True))
                for size, bits in ((k_size, k_bits), (v_size, v_bits)))
        k_plain, v_plain = (torch.from_numpy(reference.dequantize(p.numpy(), bits).reshape(batch, n_kv, kv_heads, size)).transpose(1, 2)
                            for p, bits, size in ((k, k_bits, k_size), (v, v_bits, v_size)))
        mask = sinks = None
        if options.get("mask") == "bool":
            mask = torch.rand(batch, 1, tokens, n_kv, generator=generator) < 0.7
            mask[-1] = False  # sees nothing
        elif options.get("mask"):
            mask = torch.randn(1, 1, tokens, n_kv, generator=generator)
        if options.get("sinks"):
            sinks = torch.randn(heads, generator=generator)
        rest = options.get("causal", False), options.get("softcap", 0.0)
        for dtype in dtypes:
            q = torch.randn(batch, heads, tokens, k_size, generator=generator).to(dtype)
            places = np.argsort(stored(k_size, options.get("half", 0)))
            want = attention_reference(q, k_plain[..., places], v_plain, k_size**-0.5, mask, *rest, sinks)
            got = cuda.attention(q.to(device), k.to(device), k_bits, v.to(device), v_bits, k_size**-0.5, None if mask is None else mask.to(device),
                                 *rest, None if sinks is None else sinks.to(device), options.get("half", 0))
            error = float((got.cpu().double() - want).abs().max() / want.abs().max())
            bound = {torch.float32: 0.0015, torch.float16: 0.002, torch.bfloat16: 0.006}[dtype]  # halves in the products; the result's own rounding
            check(f"attention {case}, {dtype}", error < bound, f"largest error {error:.5f} of the largest value, bound {bound}")


def check_attention_edges(cuda, device):
    """Values of every magnitude, blocks of zeros, and NaN, which must reach those that see it and nobody else."""
    generator = torch.Generator().manual_seed(2)
    for size in (64, 128):
        k, v = (torch.randn(1, 200, 2, size, generator=generator).numpy() for _ in range(2))
        v *= np.exp2(np.random.default_rng(2).integers(-30, 12, (1, 200, 2, 1))).astype(np.float32)
        k[0, 9] = v[0, 7] = v[0, 100:140] = 0
        k[0, 40], v[0, 41, :, :64] = np.nan, np.nan
        packed = [torch.from_numpy(reference.quantize(x, 4, kv=True)) for x in (k, v)]
        plain = [torch.from_numpy(reference.dequantize(p.numpy(), 4).reshape(1, 200, 2, size)).transpose(1, 2).nan_to_num(0) for p in packed]
        q = torch.randn(1, 6, 1, size, generator=generator)
        for name, hidden in (("of every magnitude", [40, 41]), ("of zeros", [*range(100), *range(140, 200)])):
            mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
            mask[..., hidden] = False
            want = attention_reference(q, *plain, size**-0.5, mask, False, 0.0, None)
            for kind, given in (("bool", mask), ("addend", torch.zeros(mask.shape).masked_fill(~mask, -torch.inf))):
                got = cuda.attention(q.to(device), packed[0].to(device), 4, packed[1].to(device), 4, size**-0.5, given.to(device)).cpu().double()
                error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
                check(f"attention, values {name}, heads of {size}, mask: {kind}", error < 0.0015, f"largest error {error:.5f} of the largest value, bound 0.0015")
        for name, hidden in (("value", 40), ("key", 41)):
            mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
            mask[..., hidden] = False
            got = cuda.attention(q.to(device), packed[0].to(device), 4, packed[1].to(device), 4, size**-0.5, mask.to(device))
            check(f"attention, a NaN in a {name} is seen, heads of {size}", bool(got.isnan().all()))


def time_kernels(cuda, device, head_size, heads, kv_heads, n_kv, figures):
    """Microseconds on the GPU, and of the host to launch: what an eager model is bound by."""
    from triton.testing import do_bench

    q = torch.randn(1, heads, 1, head_size, device=device, dtype=torch.bfloat16)
    new = torch.randn(1, kv_heads, 1, head_size, device=device, dtype=torch.bfloat16)
    long = torch.randn(1, kv_heads, n_kv, head_size, device=device, dtype=torch.bfloat16)
    for bits in (4, 3, 2):
        packed = torch.zeros((1, n_kv, kv_heads, head_size // 64 * (2 + 8 * bits)), dtype=torch.uint8, device=device)
        cuda.encode(long, packed, bits, long, None, 0)
        row = packed[:, :1].clone()
        for name, run in {"encode a token": lambda: cuda.encode(new, row, bits, new, row, bits),
                          "encode all": lambda: cuda.encode(long, packed, bits, long, packed, bits),
                          "decode all": lambda: cuda.decode(packed, bits, head_size, packed, bits, head_size, torch.bfloat16),
                          "attend": lambda: cuda.attention(q, packed, bits, packed, bits, 0.125),
                          "torch's attention, bf16": lambda: torch.nn.functional.scaled_dot_product_attention(q, long, long, enable_gqa=True),
                          "torch.cat of a token": lambda: torch.cat([long, new], dim=2)}.items():
            gpu = do_bench(run, warmup=20, rep=100) * 1000
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                run()
            host = (time.perf_counter() - start) / 200 * 1e6
            torch.cuda.synchronize()
            print(f"{bits} bits, {n_kv} tokens, {kv_heads} KV heads of {head_size}: {name}: {gpu:.1f} us on the GPU, host {host:.1f} us", flush=True)
            figures.append({"kernel": name, "bits": bits, "n_kv": n_kv, "gpu_us": gpu, "host_us": host})


def time_cpu_layer(n_kv, figures):
    """One layer's update and attention of one token on one thread of this CPU; time of the thread, which a busy machine does not lengthen."""
    from transformers.cache_utils import DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from tbq.hf import TBQLayer, attention

    torch.set_num_threads(1)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 4
    blocks = types.SimpleNamespace(_attn_implementation="tbq")
    for dtype in (torch.float32, torch.bfloat16):
        for size in (64, 128):
            kinds = {"DynamicCache": (DynamicLayer(), sdpa_attention_forward), "tbq4_0, decoded": (TBQLayer(4, 4, None, size // 2), sdpa_attention_forward),
                     "tbq4_0, from blocks": (TBQLayer(4, 4, blocks, size // 2), attention), "tbq3_0, from blocks": (TBQLayer(3, 3, blocks, size // 2), attention)}
            k, q = torch.randn(1, 8, n_kv, size).to(dtype), torch.randn(1, 32, 1, size).to(dtype)
            times = {kind: [] for kind in kinds}
            with torch.inference_mode():
                for layer, _ in kinds.values():
                    layer.update(k, k)
                for _ in range(15):
                    for kind, (layer, attend) in kinds.items():
                        start = time.thread_time()
                        attend(module, q, *layer.update(k[:, :, :1], k[:, :, :1]), None, scaling=size**-0.5)
                        times[kind].append((time.thread_time() - start) * 1000)
            base = statistics.median(times["DynamicCache"])
            for kind, each in times.items():
                ms = statistics.median(each)
                print(f"{dtype}, 32 query and 8 KV heads of {size}, {n_kv} tokens: {kind}: {ms:.2f} ms, {ms / base:.3f} of DynamicCache", flush=True)
                figures.append({"layer": kind, "dtype": str(dtype), "head_size": size, "n_kv": n_kv, "ms": ms, "ratio": ms / base})


# --- a model ------------------------------------------------------------------------------------------------------


def build_model(tiny, head_size, layers, device, dtype):
    """A llama with random weights: 2048 wide, 1.2e9 parameters with 16 layers."""
    import transformers

    width, heads = (128, 128 // head_size) if tiny else (2048, 2048 // head_size)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        head_dim=head_size, vocab_size=512 if tiny else 128256, max_position_embeddings=131072, tie_word_embeddings=True, rope_theta=500000.0)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model, config


class Run:
    """A model with a cache of one kind, fed with a prompt."""

    def __init__(self, model, kind, prompt, make):
        self.model, self.kind, self.make = model, kind, make
        self.parameter = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.prompt, self.times = prompt, []

    def switch(self):
        self.model.set_attn_implementation("tbq" if self.kind.endswith("fused") else "sdpa")

    def forward(self, ids, **more):
        return self.model(input_ids=ids, use_cache=True, **{self.parameter: self.cache}, **more).logits[:, -1]

    def start(self, sync, allocated):
        self.switch()
        sync()
        before = allocated()
        self.cache = self.make()
        self.logits = self.forward(self.prompt, logits_to_keep=1).float()
        sync()
        self.bytes = allocated() - before - self.logits.numel() * 4
        self.next = self.logits.argmax(-1, keepdim=True)

    def step(self, n, sync):
        self.switch()
        sync()
        start = time.perf_counter()
        for _ in range(n):
            self.next = self.forward(self.next).argmax(-1, keepdim=True)
        sync()
        return (time.perf_counter() - start) / n * 1000


def measure_model(args, device, batch, figures):
    from transformers import DynamicCache

    from tbq.hf import TBQCache

    cuda = device == "cuda"
    sync = torch.cuda.synchronize if cuda else (lambda: None)
    allocated = torch.cuda.memory_allocated if cuda else (lambda: 0)
    model, config = build_model(args.tiny, args.head_size, args.layers, device, torch.bfloat16)
    n = sum(p.numel() for p in model.parameters())
    prompt = torch.randint(0, config.vocab_size, (batch, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    kinds = {"DynamicCache": lambda: DynamicCache(config=config)}
    for bits in args.bits:
        kinds[f"tbq{bits}_0"] = lambda bits=bits: TBQCache(config, bits, bits)
        kinds[f"tbq{bits}_0 fused"] = kinds[f"tbq{bits}_0"]
    runs = [Run(model, kind, prompt, make) for kind, make in kinds.items()]
    with torch.inference_mode():
        for measured in (False, True):  # compiles, and allocates what libraries keep
            for run in runs:
                run.start(sync, allocated)
                if not measured:
                    run.step(4, sync)
                    del run.cache
        for _ in range(args.rounds):
            for run in runs:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    held = allocated()
                run.times.append(run.step(args.new, sync))
                run.peak = torch.cuda.max_memory_allocated() - held if cuda else 0
        base = runs[0]
        print(f"\n{n / 1e9:.2f}e9 parameters, {config.num_hidden_layers} layers, {config.num_attention_heads} query and {config.num_key_value_heads} KV heads "
              f"of {config.head_dim}, bfloat16, batch {batch}, prompt of {args.tokens}; {args.rounds} rounds of {args.new} tokens")
        print(f"{'cache':18} {'ms/token':>9} {'of Dynamic':>10} {'spread':>7} {'cache MB':>9} {'ratio':>6} {'step MB':>8} {'KLD':>9}")
        for run in runs:
            ms, base_ms = statistics.median(run.times), statistics.median(base.times)
            ratio = base.bytes / run.bytes if run.bytes else 0.0
            kld = float((base.logits.log_softmax(-1).exp() * (base.logits.log_softmax(-1) - run.logits.log_softmax(-1))).sum(-1).mean())
            print(f"{run.kind:18} {ms:9.3f} {ms / base_ms:10.3f} {max(run.times) / min(run.times) - 1:7.1%} {run.bytes / 1e6:9.1f} {ratio:6.3f} "
                  f"{run.peak / 1e6:8.1f} {kld:9.2e}", flush=True)
            figures.append({"kind": run.kind, "batch": batch, "tokens": args.tokens, "head_size": args.head_size, "ms": ms, "times": run.times,
                            "time_ratio": ms / base_ms, "bytes": run.bytes, "memory_ratio": ratio, "peak_step_bytes": run.peak, "kld": kld})
            check(f"{run.kind}, batch {batch}: logits are finite", bool(run.logits.isfinite().all()))
        if cuda and args.profile:
            profile(runs, sync)


def profile(runs, sync):
    for run in runs:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as seen:
            run.step(8, sync)
        print(f"\n{run.kind}, 8 tokens")
        print(seen.key_averages().table(sort_by="self_device_time_total", row_limit=8, max_name_column_width=40))
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU: for Triton's interpreter")
    parser.add_argument("--only", choices=("checks", "encode", "decode", "attention", "kernels", "model", "cpu"),
                        help="a part; encode, decode, attention: of the checks; cpu: a layer on this CPU, with the compiled package")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--no-cudnn", action="store_true", help="torch's attention without cuDNN, which plans anew, for 3 ms a layer, at every length")
    parser.add_argument("--profile", action="store_true", help="what the time goes to")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.new, args.rounds, args.batch, args.layers = 70, 1, 1, [1], 1
    device = "cpu" if args.tiny else "cuda"
    if args.no_cudnn:
        torch.backends.cuda.enable_cudnn_sdp(False)
    import transformers

    from tbq.hf import _backend

    if args.only == "cpu":
        triton = types.SimpleNamespace(__version__=None)
    else:
        import triton

        from tbq.hf import _cuda

    if args.tiny and args.only != "cpu":
        _backend.backend_for = lambda device: _cuda  # the kernels for CUDA, on the CPU
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "triton": triton.__version__, "numpy": np.__version__,
                "device": "CPU" if args.only == "cpu" else "interpreter" if args.tiny else torch.cuda.get_device_name()}
    print(versions, flush=True)
    figures = []
    if args.only == "cpu":
        time_cpu_layer(args.tokens, figures)
    if args.only in (None, "checks", "encode"):
        check_golden(_cuda, device)
        check_encode(_cuda, device, 9 if args.tiny else 1500)
        check_encode(_cuda, device, 3)
    if args.only in (None, "checks", "decode"):
        check_decode(_cuda, device, 9 if args.tiny else 1500)
    if args.only in (None, "checks", "attention"):
        check_attention(_cuda, device, [torch.float32] if args.tiny else [torch.float32, torch.float16, torch.bfloat16])
        check_attention_edges(_cuda, device)
    if args.only in (None, "kernels") and not args.tiny:
        time_kernels(_cuda, device, 64, 32, 8, args.tokens, figures)
        time_kernels(_cuda, device, 128, 32, 8, args.tokens, figures)
    if args.only in (None, "model"):
        for batch in args.batch:
            measure_model(args, device, batch, figures)
    if args.json:
        args.json.write_text(json.dumps({**versions, "failed": FAILED, "figures": figures}, indent=1))
    print("FAILED: " + "; ".join(FAILED) if FAILED else "all checks passed")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
