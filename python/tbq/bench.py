"""Measures the speed of cache types side by side: `tbq bench speed`."""
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from tbq.errors import TBQError
from tbq.paths import program

# The shape of docs/attention.md: a token reads 153 MB of weights, so that on two cores attention dominates from depth
# 4096 on.
SHAPE = {"layers": 8, "width": 1024, "heads": 16, "kv_heads": 4, "head_size": 128, "ff": 2816, "vocab": 32000}


def write_shape_model(path, layers, width, heads, kv_heads, head_size, ff, vocab, seed=0):
    """Writes a llama of random Q8_0 weights without a tokenizer, to measure speed on; returns the path."""
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("shape only, random weights")
    writer.add_block_count(layers)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    def add(name, rows, columns):
        # uniform bytes (standard deviation 74) times d: outputs of the size of inputs
        blocks = np.empty((rows, columns // 32, 34), np.uint8)
        blocks[..., :2] = np.array([1 / (74 * columns ** 0.5)], "<f2").view(np.uint8)
        blocks[..., 2:] = rng.integers(-127, 128, (rows, columns // 32, 32), np.int8).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def ones(name):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    add("token_embd", vocab, width)
    add("output", vocab, width)
    ones("output_norm")
    for i in range(layers):
        block = f"blk.{i}"
        ones(f"{block}.attn_norm")
        ones(f"{block}.ffn_norm")
        add(f"{block}.attn_q", heads * head_size, width)
        add(f"{block}.attn_k", kv_heads * head_size, width)
        add(f"{block}.attn_v", kv_heads * head_size, width)
        add(f"{block}.attn_output", width, heads * head_size)
        add(f"{block}.ffn_gate", ff, width)
        add(f"{block}.ffn_up", ff, width)
        add(f"{block}.ffn_down", width, ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split_pair(pair):
    """("tbq4_0", "tbq3_0") of "tbq4_0/tbq3_0"; one name is for both sides."""
    k, _, v = pair.partition("/")
    return k, v or k


def cache_bytes(pair, shape=None):
    """Bytes of keys and values of one token, in all layers."""
    import gguf

    shape = shape or SHAPE
    values = shape["layers"] * shape["kv_heads"] * shape["head_size"]
    ours = {"tbq2_0": (64, 18), "tbq3_0": (64, 26), "tbq4_0": (64, 34)}
    total = 0
    for name in split_pair(pair):
        block, size = ours.get(name) or gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        total += values // block * size
    return total


def read_bandwidth(size, threads):
    """Bytes per second of a plain read of `size` bytes by so many threads: the floor of any attention over them."""
    parts = [np.ones(max(1, size // 8 // threads), np.uint64) for _ in range(threads)]
    best = float("inf")
    for _ in range(5):
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - start)
    return 8 * sum(map(len, parts)) / best


def llama_bench(model, pair, threads, options):
    """Tokens per second of each repetition of the one test that the options ask llama-bench for."""
    k, v = split_pair(pair)
    command = [program("llama-bench"), "-m", model, "-t", str(threads), "-fa", "1", "-ctk", k, "-ctv", v, "-o", "json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        errors = [line for line in lines if "error: " in line] or lines[-1:] or [f"exit status {done.returncode}"]
        raise TBQError(f"llama-bench failed for {pair}: {errors[0].strip()}")
    test, = json.loads(done.stdout)
    return test["samples_ts"]


def measure(pairs, depths, prompts, threads, model=None, generate=16, rounds=3):
    """Tokens per second of cache types, each test of each type in turn within a round.

    pairs: names such as "f16", "tbq4_0/tbq3_0".  depths: tokens in the cache when `generate` more are generated.
    prompts: tokens of prompts from an empty cache.  model: a GGUF; a model of SHAPE is made if None.
    Returns {pair: {"tg @ 8192": (median, [samples]), "pp 512": ...}}.  After an interruption, what there was time for.
    """
    from tqdm import tqdm

    tests = [(f"tg @ {d}", ["-p", "0", "-n", str(generate), "-d", str(d)]) for d in depths]
    tests += [(f"pp {p}", ["-p", str(p), "-n", "0", "-d", "0"]) for p in prompts]
    samples = {pair: {name: [] for name, _ in tests} for pair in pairs}
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = write_shape_model(pathlib.Path(folder) / "shape.gguf", **SHAPE)
        runs = [(name, options, pair) for _ in range(rounds) for name, options in tests for pair in pairs]
        with tqdm(runs, unit="run") as bar, contextlib.suppress(KeyboardInterrupt):
            for name, options, pair in bar:
                bar.set_description(f"{pair} {name}")
                samples[pair][name] += llama_bench(model, pair, threads, [*options, "-r", "1"])
    return {pair: {name: (float(np.median(s)), s) for name, s in found.items() if s} for pair, found in samples.items()}


def table(results, depths, threads, shape_known):
    """Markdown: each type's tokens/s, relative to the first type; then what attention reads."""
    pairs = list(results)
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    lines = ["| K / V | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for pair in pairs:
        cells = []
        for name in names:
            speed, base = (results[p].get(name, (None,))[0] for p in (pair, pairs[0]))
            cells.append("" if not speed else f"{speed:.1f}" if pair == pairs[0] or not base else f"{speed:.1f} ({speed / base:.2f})")
        lines.append(f"| {pair} | " + " | ".join(cells) + " |")
    deep = [d for d in depths if d > 0]
    if 0 in depths and deep and shape_known:
        lines += ["", "| K / V | depth | attention, ms a token | cache, MB | GB/s | plain read, GB/s |", "|---|---|---|---|---|---|"]
        for pair in pairs:
            for depth in deep:
                if not {"tg @ 0", f"tg @ {depth}"} <= set(results[pair]):
                    continue
                seconds = 1 / results[pair][f"tg @ {depth}"][0] - 1 / results[pair]["tg @ 0"][0]
                size = cache_bytes(pair) * depth
                if seconds <= 0:  # a short cache, and noise
                    continue
                lines.append(f"| {pair} | {depth} | {seconds * 1e3:.2f} | {size / 1e6:.1f} | {size / seconds / 1e9:.2f} "
                             f"| {read_bandwidth(size, threads) / 1e9:.2f} |")
    return "\n".join(lines)


def numbers(text):
    return [int(x) for x in text.split(",") if x]


def define(parser):
    """measure the speed of cache types side by side"""
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    speed = commands.add_parser("speed", help="tokens per second, with llama-bench", description=measure.__doc__.split("\n")[0])
    speed.add_argument("--types", default="f16,q8_0,q4_0,tbq4_0,tbq3_0,tbq2_0", metavar="K/V,...",
                       help="cache types, the first is what the others are compared with (%(default)s)")
    speed.add_argument("--depths", type=numbers, default=[0, 8192], metavar="N,...", help="tokens in the cache when generating (0,8192)")
    speed.add_argument("--prompts", type=numbers, default=[512, 4096], metavar="N,...", help="lengths of prompts (512,4096)")
    speed.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), metavar="N")
    speed.add_argument("--rounds", type=int, default=3, metavar="N")
    speed.add_argument("--model", metavar="GGUF", help="instead of a model of random weights")
    speed.add_argument("--json", action="store_true", help="print every sample as JSON instead of tables")

    def run(args):
        if not args.depths and not args.prompts:
            raise TBQError("--depths and --prompts are both empty; one of them names what to measure")
        if args.rounds < 1 or args.threads < 1:
            raise TBQError(f"--rounds {args.rounds} and --threads {args.threads} must be at least 1")
        if args.model and not pathlib.Path(args.model).is_file():
            raise TBQError(f"model {args.model!r} is not a file")
        results = measure(args.types.split(","), args.depths, args.prompts, args.threads, args.model, rounds=args.rounds)
        done = sum(len(s) for tests in results.values() for _, s in tests.values())
        runs = len(results) * (len(args.depths) + len(args.prompts)) * args.rounds
        if done == 0:
            return 130
        if args.json:
            print(json.dumps({pair: {name: s for name, (_, s) in tests.items()} for pair, tests in results.items()}, indent=2))
        else:
            print(table(results, args.depths, args.threads, args.model is None))
        if done < runs:
            print(f"tbq: interrupted after {done} of {runs} runs", file=sys.stderr)
            return 130
        return 0

    speed.set_defaults(run=run)
