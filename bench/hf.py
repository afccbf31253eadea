#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times of tbq.hf: its Triton kernels, the decode step and the memory of a llama-shaped model, a layer on the CPU.

    python3 bench/hf.py                                               kernels and model, on a CUDA device
    python3 bench/hf.py --only cpu                                    a layer on this CPU, with the compiled package
    TRITON_INTERPRET=1 python3 bench/hf.py --tiny --only model        a model on the CPU, in Triton's interpreter, small

Needs torch, transformers and Triton, and python/tbq of this repository; the compiled package for --only cpu alone.
Prints a table; --json FILE writes the figures.  tests/cuda/hf_checks.py says whether the kernels are right.

Timing: the caches take turns, token by token from the same prompt.  Reported are the median of the rounds and its ratio
to DynamicCache.  Memory: what torch's allocator holds more after the prompt than before.
"""

import argparse
import inspect
import json
import pathlib
import statistics
import sys
import time
import types

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "cuda"))

import hf_package  # noqa: F401

# --- kernels and a layer --------------------------------------------------------------------------------------------


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
        for name, run in {
            "encode a token": lambda: cuda.encode(new, row, bits, new, row, bits),
            "encode all": lambda: cuda.encode(long, packed, bits, long, packed, bits),
            "decode all": lambda: cuda.decode(packed, bits, head_size, packed, bits, head_size, torch.bfloat16),
            "attend": lambda: cuda.attention(q, packed, bits, packed, bits, 0.125),
            "torch's attention, bf16": lambda: torch.nn.functional.scaled_dot_product_attention(
                q, long, long, enable_gqa=True
            ),
            "torch.cat of a token": lambda: torch.cat([long, new], dim=2),
        }.items():
            gpu = do_bench(run, warmup=20, rep=100) * 1000
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                run()
            host = (time.perf_counter() - start) / 200 * 1e6
            torch.cuda.synchronize()
            print(
                f"{bits} bits, {n_kv} tokens, {kv_heads} KV heads of {head_size}: {name}: {gpu:.1f} us on the GPU, host"
                f" {host:.1f} us",
                flush=True,
            )
            figures.append({"kernel": name, "bits": bits, "n_kv": n_kv, "gpu_us": gpu, "host_us": host})


def time_cpu_layer(n_kv, figures):
    """One layer's update and attention of one token on one thread of this CPU; time of the thread, which a busy machine
    does not lengthen."""
    from transformers.cache_utils import DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from tbq._exact_rows import FIRST, RECENT
    from tbq.hf import TBQLayer, attention

    torch.set_num_threads(1)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 4
    blocks = types.SimpleNamespace(_attn_implementation="tbq")
    for dtype in (torch.float32, torch.bfloat16):
        for size in (64, 128):
            kinds = {
                "DynamicCache": (DynamicLayer(), sdpa_attention_forward),
                "tbq4_0, decoded": (TBQLayer(4, 4, None, size // 2), sdpa_attention_forward),
                "tbq4_0, from blocks": (TBQLayer(4, 4, blocks, size // 2), attention),
                "tbq3_0, from blocks": (TBQLayer(3, 3, blocks, size // 2), attention),
                "tbq4_0, from blocks, exact rows": (TBQLayer(4, 4, blocks, size // 2, RECENT, FIRST), attention),
                "tbq3_0, from blocks, exact rows": (TBQLayer(3, 3, blocks, size // 2, RECENT, FIRST), attention),
            }
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
                print(
                    f"{dtype}, 32 query and 8 KV heads of {size}, {n_kv} tokens: {kind}: {ms:.2f} ms, {ms / base:.3f}"
                    " of DynamicCache",
                    flush=True,
                )
                figures.append(
                    {"layer": kind, "dtype": str(dtype), "head_size": size, "n_kv": n_kv, "ms": ms, "ratio": ms / base}
                )


# --- a model ------------------------------------------------------------------------------------------------------


def build_model(tiny, head_size, layers, device, dtype):
    """A llama with random weights: 2048 wide, 1.2e9 parameters with 16 layers."""
    import transformers

    width, heads = (128, 128 // head_size) if tiny else (2048, 2048 // head_size)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=head_size,
        vocab_size=512 if tiny else 128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_theta=500000.0,
    )
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
    prompt = torch.randint(0, config.vocab_size, (batch, args.tokens), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    kinds = {"DynamicCache": lambda: DynamicCache(config=config)}
    for bits in args.bits:
        kinds[f"tbq{bits}_0"] = lambda bits=bits: TBQCache(config, bits, bits)
        kinds[f"tbq{bits}_0 fused"] = kinds[f"tbq{bits}_0"]
        kinds[f"tbq{bits}_0 packed fused"] = lambda bits=bits: TBQCache(config, bits, bits, recent=0, first=0)
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
        print(
            f"\n{n / 1e9:.2f}e9 parameters, {config.num_hidden_layers} layers, {config.num_attention_heads} query and"
            f" {config.num_key_value_heads} KV heads of {config.head_dim}, bfloat16, batch {batch}, prompt of"
            f" {args.tokens}; {args.rounds} rounds of {args.new} tokens"
        )
        print(
            f"{'cache':19} {'ms/token':>9} {'of Dynamic':>10} {'spread':>7} {'cache MB':>9} {'ratio':>6} {'step MB':>8}"
            f" {'KLD':>9}"
        )
        for run in runs:
            ms, base_ms = statistics.median(run.times), statistics.median(base.times)
            ratio = base.bytes / run.bytes if run.bytes else 0.0
            kld = float(
                (base.logits.log_softmax(-1).exp() * (base.logits.log_softmax(-1) - run.logits.log_softmax(-1)))
                .sum(-1)
                .mean()
            )
            print(
                f"{run.kind:19} {ms:9.3f} {ms / base_ms:10.3f} {max(run.times) / min(run.times) - 1:7.1%}"
                f" {run.bytes / 1e6:9.1f} {ratio:6.3f} {run.peak / 1e6:8.1f} {kld:9.2e}",
                flush=True,
            )
            figures.append(
                {
                    "kind": run.kind,
                    "batch": batch,
                    "tokens": args.tokens,
                    "head_size": args.head_size,
                    "ms": ms,
                    "times": run.times,
                    "time_ratio": ms / base_ms,
                    "bytes": run.bytes,
                    "memory_ratio": ratio,
                    "peak_step_bytes": run.peak,
                    "kld": kld,
                }
            )
            if not run.logits.isfinite().all():
                sys.exit(f"error: {run.kind}, batch {batch}: a logit is not finite")
        if cuda and args.profile:
            profile(runs, sync)


def profile(runs, sync):
    for run in runs:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as seen:
            run.step(8, sync)
        print(f"\n{run.kind}, 8 tokens")
        print(seen.key_averages().table(sort_by="self_device_time_total", row_limit=8, max_name_column_width=40))
        print(
            seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40), flush=True
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU: for Triton's interpreter")
    parser.add_argument(
        "--only", choices=("kernels", "model", "cpu"), help="cpu: a layer on this CPU, with the compiled package"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--no-cudnn",
        action="store_true",
        help="torch's attention without cuDNN, which plans anew, for 3 ms a layer, at every length",
    )
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

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "CPU" if args.only == "cpu" else "interpreter" if args.tiny else torch.cuda.get_device_name(),
    }
    figures = []
    if args.only == "cpu":
        print(versions, flush=True)
        time_cpu_layer(args.tokens, figures)
    else:
        import triton

        from tbq.hf import _cuda

        if args.tiny:
            _backend.backend_for = lambda device: _cuda  # the kernels for CUDA, on the CPU
        print(versions := versions | {"triton": triton.__version__}, flush=True)
        if args.only != "model" and not args.tiny:
            time_kernels(_cuda, device, 64, 32, 8, args.tokens, figures)
            time_kernels(_cuda, device, 128, 32, 8, args.tokens, figures)
        for batch in args.batch if args.only != "kernels" else ():
            measure_model(args, device, batch, figures)
    if args.json:
        args.json.write_text(json.dumps({**versions, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
