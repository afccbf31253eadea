#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The speed of models on a GPU with caches of several types, as one table: python3 bench/cuda.py BIN

BIN: the folder with llama-bench and llama-batched-bench of a build with CUDA.  Needs gguf and NumPy, which write models
of random Q8_0 weights into a temporary folder (7.7 GB), but not the package.

Each row is a measurement with an f16 cache and with others, one after the other on the same GPU, in tokens per second;
behind the others, in relation to f16.  An empty cell is a program that failed, for example for lack of memory; the
status is then 1.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
#: layers, width, query heads, KV heads, head size, width of the feed-forward network
MODELS = {
    "7b": (32, 4096, 32, 8, 128, 14336),
    "7b-kv4": (32, 4096, 32, 4, 128, 14336),
    "1b-head256": (16, 2048, 16, 2, 256, 8192),
    "1b-head64": (16, 2048, 64, 8, 64, 8192),
}
#: sequences x tokens of each; u: they share one cache (--kv-unified)
BATCHES = "8x8192,32x8192,64x8192,8x32768,8x8192u,32x8192u"


def run(command, failed):
    """The lines of JSON that a program prints; none if it fails, and then its last words on stderr."""
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if done.returncode:
        failed.append(command)
        print(f"{command[0].name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr, flush=True)
        return []
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def types(pair):
    k, _, v = pair.partition("/")
    return ["-ctk", k, "-ctv", v or k]


class Table:
    """Rows are printed as soon as they are complete."""

    def __init__(self, pairs):
        self.pairs, self.failed = pairs, []
        print(f"| model | what | {' | '.join(pairs)} |\n|{'---|' * (2 + len(pairs))}", flush=True)

    def add(self, model, what, found):
        """found: by types, the mean and the standard deviation."""
        base = found.get("f16", (0, 0))[0]
        cells = []
        for pair in self.pairs:
            mean, deviation = found.get(pair, (None, None))
            noise = f" ± {deviation:.1f}" if deviation else ""
            ratio = f" ({mean / base:.3f})" if mean and base and pair != "f16" else ""
            cells.append(f"{mean:.1f}{noise}{ratio}" if mean else "")
        print(f"| {model} | {what} | {' | '.join(cells)} |", flush=True)


def measure(bin, model, path, table, args):
    common = ["-m", path, "-ngl", 99, "-b", 2048, "-ub", args.ubatch]
    for depth in args.depths:
        found = {"tg": {}, "pp": {}}
        for pair in table.pairs:
            tests = ["-p", 2048 if "prompt" in args.only else 0, "-n", args.tokens if "decode" in args.only else 0]
            if tests[1] or tests[3]:
                more = ["-d", depth, "-r", args.repeat, "-fa", 1, "-o", "jsonl"]
                for each in run([bin / "llama-bench", *common, *types(pair), *tests, *more], table.failed):
                    found["pp" if each["n_prompt"] else "tg"][pair] = each["avg_ts"], each["stddev_ts"]
        for what in ("tg", "pp"):
            if found[what]:
                table.add(model, f"{what}{args.tokens if what == 'tg' else 2048} @ {depth}", found[what])
    if "batched" in args.only and model == "7b":
        for batch in args.batches.split(","):
            unified, found = batch.endswith("u"), {}
            n, length = map(int, batch.rstrip("u").split("x"))
            for pair in table.pairs:
                size = n * (length + max(64, args.tokens))
                more = ["-c", size, "-npp", length, "-ntg", args.tokens, "-npl", n, "-fa", "on", *["-kvu"] * unified]
                more += ["--output-format", "jsonl"]
                for each in run([bin / "llama-batched-bench", *common, *types(pair), *more], table.failed):
                    found[pair] = each["speed_tg"], 0
            table.add(model, f"decode, {n} x {length}{', one cache' * unified}", found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=pathlib.Path)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--types", default="f16,tbq4_0,tbq3_0,q4_0", help="K/V, or one type for both; f16 is the measure"
    )
    parser.add_argument("--only", default="decode,prompt,batched")
    parser.add_argument("--depths", default="0,32768,131072")
    parser.add_argument("--batches", default=BATCHES, help="sequences x tokens; u: in one cache")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--ubatch", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the models there, and uses those that are there")
    args = parser.parse_args()
    args.only, args.depths = args.only.split(","), [int(x) for x in args.depths.split(",")]
    table = Table(args.types.split(","))
    with tempfile.TemporaryDirectory() as work:
        for model in args.models.split(","):
            path = (args.folder or pathlib.Path(work)) / f"{model}.gguf"
            if not path.exists():
                writer = ROOT / "tests" / "cuda" / "shape_model.py"
                subprocess.run([sys.executable, writer, path, *map(str, MODELS[model])], check=True)
            measure(args.bin, model, path, table, args)
            if not args.folder:
                os.unlink(path)
    return bool(table.failed)


if __name__ == "__main__":
    sys.exit(main())
