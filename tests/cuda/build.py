# SPDX-License-Identifier: MIT
"""build.py OUT [nvcc arguments]: compiles blocks.cu and attention.cu into the folder OUT, for this machine's GPU."""

import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
TBQ = HERE.parents[1] / "ggml_tbq"


def build(out, arch="native", programs=("blocks", "attention")):
    out = pathlib.Path(out)
    # The reference that both compare with: tests/kernels' build has the flags of every instruction set.
    subprocess.run(["cmake", "-S", HERE.parent / "kernels", "-B", out / "cpu"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", out / "cpu", "--target", "tbq"], check=True, capture_output=True)
    for name in programs:
        subprocess.run(
            [
                "nvcc",
                "-std=c++17",
                "-O3",
                f"-arch={arch}",
                "-use_fast_math",
                "-I",
                TBQ / "include",
                "-I",
                TBQ / "cuda",
                HERE / f"{name}.cu",
                next((out / "cpu").glob("libtbq*")),
                "-o",
                out / name,
            ],
            check=True,
        )


if __name__ == "__main__":
    build(sys.argv[1])
