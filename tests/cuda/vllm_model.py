#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""vLLM with pages of tbq blocks on a CUDA device, beside its own cache types: divergence, and time of a decoding step.

    python3 tests/cuda/vllm_model.py quality MODEL --text FILE [--center FILE]
    python3 tests/cuda/vllm_model.py speed [--shape 1.2B|7B]

Needs vLLM with CUDA; of this repository python/tbq, whose entry points need not be installed.  Each cache type has a
process of its own.  MODEL: a folder of tests/hf_model.py.

quality: 8 sequences of 4096 tokens are a prompt, and 64 more of each are fed one at a time, whatever the model would
choose.  KL divergence of the 512 distributions to those of the bfloat16 cache.
speed: a decoding step of 1, 8 and 32 sequences with 8192 and 32768 tokens each, as a CUDA graph, the model's weights
random and its pages random; the median of 20 steps, without choosing a token.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import hf_package  # noqa: F401

N_PROMPT, N_FED, N_SEQUENCES = 4096, 64, 8
SHAPES = {
    "1.2B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
    "7B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128),
}


def engine(model, dtype, **options):
    from vllm import LLM

    import tbq.vllm

    tbq.vllm.register()
    backend = "TBQ" if dtype.startswith("tbq") else None  # theirs has another for its first and last layers
    if dtype.startswith("turbo"):
        mend_shapes(dtype)
    if backend:
        options["attention_backend"] = backend
    return LLM(
        str(model),
        kv_cache_dtype=dtype,
        dtype="bfloat16",
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )


def mend_shapes(dtype):
    """vLLM 0.25.1's older model runner asks for the pages of its TurboQuant types as if they were "auto"."""
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend as Theirs

    own = Theirs.get_kv_cache_shape

    def get_kv_cache_shape(blocks, size, heads, head_size, cache_dtype_str="auto"):
        return own(blocks, size, heads, head_size, dtype if cache_dtype_str == "auto" else cache_dtype_str)

    if hasattr(Theirs, "get_kv_cache_shape"):
        Theirs.get_kv_cache_shape = staticmethod(get_kv_cache_shape)


# --- quality --------------------------------------------------------------------------------------------------------


class Feed:
    """What the logits processor feeds, and what it keeps: by the first tokens of a sequence."""

    fed: "dict" = {}  # noqa: RUF012
    kept: "dict" = {}  # noqa: RUF012


def measure(args):
    import torch
    from vllm import SamplingParams

    ids = json.loads(pathlib.Path(args.text).read_text())
    total = N_PROMPT + N_FED
    sequences = [ids[i * total : (i + 1) * total] for i in range(N_SEQUENCES)]
    assert len(sequences[-1]) == total, "the text is too short"
    from vllm.v1.sample.logits_processor import LogitsProcessor

    Feed.fed = {tuple(s[:8]): s[N_PROMPT:] for s in sequences}
    Feed.kept = {key: {} for key in Feed.fed}

    class Processor(LogitsProcessor):
        def __init__(self, vllm_config, device, is_pin_memory):
            self.requests = {}

        def is_argmax_invariant(self):
            return False

        def update_state(self, batch_update):
            if not batch_update:
                return
            for index in batch_update.removed:
                self.requests.pop(index, None)
            for index, _, prompt, output in batch_update.added:
                self.requests[index] = (tuple(prompt[:8]), output)
            for one, other, direction in batch_update.moved:
                mine, theirs = self.requests.pop(one, None), self.requests.pop(other, None)
                if mine is not None:
                    self.requests[other] = mine
                if theirs is not None and direction.name == "SWAP":
                    self.requests[one] = theirs

        def apply(self, logits):
            for row, (key, output) in self.requests.items():
                step = len(output)
                if row >= logits.shape[0] or step >= N_FED or key not in Feed.fed:
                    continue
                Feed.kept[key][step] = logits[row].float().log_softmax(0).cpu()
                logits[row] = -torch.inf
                logits[row, Feed.fed[key][step]] = 0.0
            return logits

    config = {"tbq": {"center": args.center}} if args.center and args.one.startswith("tbq") else {}
    llm = engine(
        args.model,
        args.one,
        enforce_eager=True,
        max_model_len=total + 8,
        max_num_seqs=N_SEQUENCES,
        max_num_batched_tokens=args.batched,
        gpu_memory_utilization=0.5,
        logits_processors=[Processor],
        async_scheduling=False,
        additional_config=config,
    )
    llm.generate(
        [{"prompt_token_ids": s[:N_PROMPT]} for s in sequences],
        SamplingParams(temperature=0, max_tokens=N_FED, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    assert all(len(kept) == N_FED for kept in Feed.kept.values()), {k: len(v) for k, v in Feed.kept.items()}
    torch.save(torch.stack([torch.stack([kept[i] for i in range(N_FED)]) for kept in Feed.kept.values()]), args.out)
    caches = {(*c.shape, c.element_size()) for c in runner_of(llm).kv_caches}
    print("caches:", sorted(caches), flush=True)


def quality(args):
    import torch
    import transformers

    folder = pathlib.Path(tempfile.mkdtemp())
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    text = pathlib.Path(args.text).read_text()
    (folder / "ids.json").write_text(json.dumps(tokenizer(text)["input_ids"]))
    base = None
    for name, dtype, center in (
        ("bfloat16", "auto", None),
        ("tbq4, centered", "tbq4", args.center),
        ("tbq4", "tbq4", None),
        ("turboquant_4bit_nc", "turboquant_4bit_nc", None),
        ("tbq4_tbq3, centered", "tbq4_tbq3", args.center),
        ("tbq3, centered", "tbq3", args.center),
        ("turboquant_3bit_nc", "turboquant_3bit_nc", None),
        ("tbq2, centered", "tbq2", args.center),
    ):
        if args.types and dtype not in args.types and dtype != "auto":
            continue
        out = folder / "logits.pt"
        if not run_one(
            ["quality", args.model, "--text", folder / "ids.json", "--one", dtype, "--out", out]
            + ["--batched", args.batched]
            + (["--center", center] if center else []),
            name,
        ):
            continue
        got = torch.load(out).double()
        if base is None:
            base = got
        kld = (base.exp() * (base - got)).sum(-1)
        same = (base.argmax(-1) == got.argmax(-1)).double().mean()
        print(
            f"{name}: KLD {kld.mean():.5f} +- {kld.std() / kld.numel() ** 0.5:.5f}, same token {same:.4f}", flush=True
        )


# --- speed ----------------------------------------------------------------------------------------------------------


def runner_of(llm):
    worker = llm.llm_engine.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def time_steps(args):
    import torch
    import transformers

    folder = pathlib.Path(tempfile.mkdtemp())
    config = transformers.LlamaConfig(
        num_key_value_heads=8,
        vocab_size=32768,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **SHAPES[args.shape],
    )
    config.save_pretrained(folder)
    sizes = [1, 8, 32]
    llm = engine(
        folder,
        args.one,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=32768 + 64,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.95,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes},
    )
    runner = runner_of(llm)
    for cache in runner.kv_caches:  # numbers of every kind would do, infinities not
        if cache.dtype == torch.uint8:
            cache.fill_(0x22)
        else:
            cache.normal_()
    table = runner.input_batch.block_table[0]
    blocks = runner.kv_caches[0].shape[0] if runner.kv_caches[0].shape[0] != 2 else runner.kv_caches[0].shape[1]
    import numpy as np

    size = llm.llm_engine.vllm_config.cache_config.block_size
    print(
        f"blocks of {size}: {blocks}; cache {tuple(runner.kv_caches[0].shape)}, {runner.kv_caches[0].dtype}", flush=True
    )
    rng = np.random.default_rng(0)
    result = {}
    from vllm.config import CUDAGraphMode

    for length in (8192, 32768):
        for n in sizes:
            per = -(-length // size) + 1
            order = rng.permutation(blocks)
            pages = np.resize(order, n * per).reshape(n, per)
            target = table.block_table.np
            target[:n, : min(per, target.shape[1])] = pages[:, : target.shape[1]]

            def step():
                runner._dummy_run(
                    n, cudagraph_runtime_mode=CUDAGraphMode.FULL, uniform_decode=True, profile_seq_lens=length
                )

            with torch.inference_mode():
                for _ in range(4):
                    step()
                times = []
                for _ in range(20):
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    torch.cuda.synchronize()
                    begin.record()
                    step()
                    end.record()
                    torch.cuda.synchronize()
                    times.append(begin.elapsed_time(end))
            result[f"{length} x {n}"] = sorted(times)[10]
            shared = n * per > blocks
            print(
                f"{args.one}, {args.shape}, {length} x {n}: {sorted(times)[10]:.3f} ms"
                f"{' (pages shared)' if shared else ''}",
                flush=True,
            )
    pathlib.Path(args.out).write_text(json.dumps(result))


def speed(args):
    folder = pathlib.Path(tempfile.mkdtemp())
    results = {}
    for dtype in args.types or ("auto", "tbq4", "turboquant_4bit_nc", "tbq3"):
        out = folder / "times.json"
        if run_one(["speed", "--shape", args.shape, "--one", dtype, "--out", out], f"{args.shape}, {dtype}"):
            results[dtype] = json.loads(out.read_text())
    names = list(results)
    print("| tokens x sequences | " + " | ".join(names) + " |")
    for row in results[names[0]]:
        base = results[names[0]][row]
        print(f"| {row} | " + " | ".join(f"{results[d][row]:.2f} ({base / results[d][row]:.2f})" for d in names) + " |")


def run_one(arguments, name):
    begin = time.time()
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = done.stdout.splitlines()
    told = [line for line in lines if " ms" in line or line.startswith(("caches", "blocks"))]
    print("\n".join([f"--- {name}, {time.time() - begin:.0f} s", *told]), flush=True)
    if done.returncode:
        print("\n".join(lines[-40:]), flush=True)
        print(f"FAILED: {name}", flush=True)
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text")
    parser.add_argument("--center")
    parser.add_argument("--shape", choices=SHAPES, default="1.2B")
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--batched", type=int, default=8192)
    parser.add_argument("--one", help="the cache type of this process")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.one:
        (measure if args.what == "quality" else time_steps)(args)
    else:
        (quality if args.what == "quality" else speed)(args)


if __name__ == "__main__":
    main()
