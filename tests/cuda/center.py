#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Centered keys wherever a model and its cache can lie: one device, several, some layers on the CPU, the cache on the
CPU.

    python3 tests/cuda/center.py BIN [--model FILE]

BIN: the folder with llama-bench, llama-perplexity and llama-cache-center.  Without --model, a model is made, which
needs what the tests in tests/ need: 4 layers of random weights, with biases on the keys 16 times as large as the rest,
in channels that turn slowly, so that quantized keys lose everything that centering does not save.  --make FILE only
makes it.

Prints, for each place and pair of types, the KL divergence to an f16 cache on one device, without and with a center;
exits with 1 if a centered one is more than 1.5 times that of one device (0.0002 is noise), or if centering does not
save anything.
"""

import argparse
import math
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS, HEADS, KV_HEADS, SIZE = 4, 8, 4, 64
BIAS = 16
CHUNKS = 8
PAIRS = (("tbq4_0", "f16"), ("tbq3_0", "tbq4_0"), ("q8_0", "f16"), ("q4_0", "q4_0"))


def make(path):
    sys.path.insert(0, str(ROOT / "tests"))
    import gguf
    import numpy as np

    from test_plan import attention, write_model

    embd = HEADS * SIZE
    biases = {f"attn_{x}.bias": (n * SIZE,) for x, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
    write_model(
        path,
        "qwen2",
        LAYERS,
        lambda i: attention(HEADS, KV_HEADS, SIZE, embd) | biases,
        embd=embd,
        heads=HEADS,
        kv_heads=KV_HEADS,
        size=SIZE,
    )
    reader = gguf.GGUFReader(path, "r+")
    rng = np.random.default_rng(1)
    slow = np.arange(SIZE) % (SIZE // 2) >= SIZE // 4  # the slower half of the pairs (c, c + SIZE / 2)
    for tensor in reader.tensors:
        if tensor.name.endswith("attn_k.bias"):
            tensor.data[:] = np.tile(slow, KV_HEADS) * BIAS * rng.choice([-1, 1], KV_HEADS * SIZE)
    reader.data.flush()


def run(program, *arguments):
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout + done.stderr


def divergence(status, log):
    """The mean over the chunks, from the last row of the table: this llama.cpp may lose its last line, not more.  None
    if the program failed before the first row."""
    rows = [line.replace("±", " ").split() for line in log.splitlines() if re.match(r" +\d+ +\S+ ± ", line)]
    if not rows:
        return None
    kld = float(rows[-1][5])
    return kld if not status and len(rows) >= CHUNKS - 1 and math.isfinite(kld) else math.inf


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--make", type=pathlib.Path, help="make the model, and nothing else")
    args = parser.parse_args()
    if args.make:
        make(args.make)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        model = args.model or work / "model.gguf"
        if not args.model:
            make(model)
        text = work / "text"
        text.write_text(" ".join(str(i * 7919 % 10007) for i in range(3000)))
        devices = len(re.findall(r"^ +\w+: ", run(args.bin / "llama-bench", "--list-devices")[1], re.M))
        status, log = run(args.bin / "llama-cache-center", "-m", model, "-f", text, "-c", 512, "-o", work / "center")
        if status:
            print(log[-2000:])
            return 1
        whole = ["-ngl", "99", "-sm", "none"] if devices else []
        places = {"one device" if devices else "CPU": whole}
        if devices:
            places |= {
                "half of the layers on the CPU": ["-ngl", str(LAYERS // 2), "-sm", "none"],
                "cache on the CPU": [*whole, "-nkvo"],
                "all on the CPU": ["-ngl", "0"],
            }
        if devices > 1:
            places |= {
                f"{devices} devices, split by {how}": ["-ngl", "99", "-sm", how] for how in ("layer", "row", "tensor")
            }
        common = [
            "-m",
            model,
            "-f",
            text,
            "-c",
            "512",
            "-b",
            "512",
            "-fa",
            "on",
            "-t",
            "8" if devices else "2",
            "--chunks",
            str(CHUNKS),
        ]
        status, log = run(args.bin / "llama-perplexity", *common, *whole, "--kl-divergence-base", work / "base")
        failed, wanted = bool(status), {}
        print(log[-2000:] if status else f"{devices} devices; KL divergence to an f16 cache, without and with a center")
        for place, options in places.items():
            for k, v in PAIRS:
                found = []
                for center in ("none", work / "center"):
                    status, log = run(
                        args.bin / "llama-perplexity",
                        *common,
                        *options,
                        "-ctk",
                        k,
                        "-ctv",
                        v,
                        "--cache-center",
                        center,
                        "--kl-divergence",
                        "--kl-divergence-base",
                        work / "base",
                    )
                    found.append(divergence(status, log))
                    if found[-1] is None:
                        print(
                            f"{place}, {k}/{v}{'' if center == 'none' else ', centered'}: status {status}:"
                            f" {log.strip().splitlines()[-1] if log.strip() else ''}"
                        )
                if None in found:  # some ways to split are not for every type; if one is, it is with a center too
                    failed |= found[0] is not None or "split" not in place
                    continue
                limit = 1.5 * wanted.setdefault((k, v), found[1]) + 0.0002
                ok = found[1] <= limit and (k == "q8_0" or found[1] < found[0] / 2)
                failed |= not ok
                print(f"{'ok  ' if ok else 'FAIL'} {place}, {k}/{v}: {found[0]:.5f} -> {found[1]:.5f}", flush=True)
        return int(failed)


if __name__ == "__main__":
    sys.exit(main())
