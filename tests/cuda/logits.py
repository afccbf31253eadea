#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Logits of models whose attention sees more of a key than softmax does, on a GPU: sinks, soft-caps, latent attention.

    python3 tests/cuda/logits.py --make FOLDER     # where the package and the tests' packages are installed
    python3 tests/cuda/logits.py FOLDER BIN SOURCE # where the GPU is; needs NumPy and a C++ compiler

FOLDER: tiny models of tests/test_center.py, the means of their keys, and other means that are of no model.  BIN: the
folder with the libraries of a build with CUDA.  SOURCE: the patched llama.cpp that was built.

Every row of the cache is kept in 8 bits as well, so that what is left is the error of 8 bits and of the arithmetic: the
mean square of the difference to the logits with keys in f16, without flash attention, on the same device, relative to
their variance.  Then with 4 bits only, as KL divergence.  Exits with 1 if a center of any size makes an error
of 2e-5 or more, or if a measured one does not take away half of the divergence.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
TOKENS = 96
NOISE = 1e-7  # a KL divergence that rounding alone makes
SPLITS = (TOKENS, 7, 1)  # tokens at a time: the kernels of prompts, of a few rows, of decode


def make(folder):
    """Writes the models, their means, and index.json, which has a line for each."""
    sys.path.insert(0, str(HERE.parent))
    import test_center

    folder.mkdir(parents=True, exist_ok=True)
    index = []
    with tempfile.TemporaryDirectory() as work:
        logits = test_center.Logits(pathlib.Path(work))
        for i, (kind, (maker, v, flash)) in enumerate(test_center.WHOLE.items()):
            if flash:
                model = maker(folder / f"{i}.gguf")
                logits(model, measure=folder / f"{i}.center")
                test_center.any_center(folder / f"{i}.center", folder / f"{i}.any")
                index.append({"kind": kind, "number": i, "v": v})
    (folder / "index.json").write_text(json.dumps(index))


class Logits:
    """The logits of logits.cpp, compiled beside a build."""

    def __init__(self, folder, source, work):
        self.program, self.work = work / "logits", work
        subprocess.run(
            [
                *("c++", "-std=c++17", "-O1", "-I", source / "include", "-I", source / "ggml" / "include"),
                *("-o", self.program, HERE / "logits.cpp"),
                *(next(folder.glob(f"lib*{name}.so")) for name in ("llama", "ggml", "ggml-base")),
                f"-Wl,-rpath,{folder}",
            ],
            check=True,
        )

    def __call__(self, model, device, k="f16", v="f16", flash=True, recent=0, split=96, center=None):
        descriptor, out = tempfile.mkstemp(dir=self.work)
        os.close(descriptor)
        asked = (model, device, k, v, int(flash), recent, split, center or "none", out)
        done = subprocess.run([self.program, *map(str, asked)], capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise SystemExit(f"logits {asked}: status {done.returncode}\n{done.stderr[-3000:]}")
        return np.fromfile(out, np.float32).reshape(TOKENS, -1).astype(np.float64)


def difference(a, b):
    return float(np.square(a - b).mean() / a.var())


def divergence(exact, other):
    p, q = (x - np.logaddexp.reduce(x, 1)[:, None] for x in (exact, other))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def lines(logits, folder, one, device):
    """The lines of the table for one model on one device, and whether they are as they must be."""
    model, measured, other = (str(folder / f"{one['number']}.{end}") for end in ("gguf", "center", "any"))
    plain = logits(model, device, flash=False)
    found, fine = [], True
    for split in SPLITS:
        cache = {"device": device, "k": "tbq4_0", "v": one["v"] or "tbq4_0", "split": split}
        exact = [
            difference(plain, logits(model, **cache, recent=400, center=center)) for center in (None, measured, other)
        ]
        packed = [divergence(plain, logits(model, **cache, center=center)) for center in (None, measured)]
        ok = max(exact) < 2e-5 and packed[1] < max(packed[0] / 2, NOISE)
        fine &= ok
        cells = [f"{x:.1e}" for x in exact] + [f"{x:.2e}" for x in packed]
        found.append(f"| {one['kind']} | {device} | {split} | {' | '.join(cells)} |{'' if ok else ' FAIL'}")
    return found, fine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("bin", type=pathlib.Path, nargs="?")
    parser.add_argument("source", type=pathlib.Path, nargs="?")
    parser.add_argument("--make", action="store_true", help="make the models, and nothing else")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not args.make and not args.source:
        parser.error("name the folders, or --make")
    if args.make:
        make(folder)
        return 0
    with tempfile.TemporaryDirectory() as work, concurrent.futures.ThreadPoolExecutor(8) as pool:
        logits = Logits(args.bin.resolve(), args.source.resolve(), pathlib.Path(work))
        index = json.loads((folder / "index.json").read_text())
        asked = [pool.submit(lines, logits, folder, one, device) for one in index for device in ("CPU", "GPU")]
        print("| model | device | tokens at a time | no center | measured | any | 4 bits: no center | measured |")
        print("|---|---|---|---|---|---|---|---|")
        for one in asked:
            print(*one.result()[0], sep="\n", flush=True)
    return int(not all(one.result()[1] for one in asked))


if __name__ == "__main__":
    sys.exit(main())
