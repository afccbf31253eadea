# SPDX-License-Identifier: MIT
"""build.py OUT [PROGRAM ..]: compiles the programs (without names all of them) into the folder OUT, for this GPU."""

import concurrent.futures
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
TBQ = HERE.parents[1] / "ggml_tbq"


PROGRAMS = ("blocks", "attention", "attention-heads", "prompt")


def build(out, arch="native", programs=PROGRAMS):
    out = pathlib.Path(out)
    # The reference that both compare with: tests/kernels' build has the flags of every instruction set.
    subprocess.run(["cmake", "-S", HERE.parent / "kernels", "-B", out / "cpu"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", out / "cpu", "--target", "tbq"], check=True, capture_output=True)
    library = next((out / "cpu").glob("libtbq*"))

    def nvcc(*arguments):
        # prompt.cu has no kernels for another GPU
        target = "sm_90a" if HERE / "prompt.cu" in arguments else arch
        flags = ["-std=c++17", "-O3", f"-arch={target}", "-use_fast_math", "--split-compile=0"]
        subprocess.run(["nvcc", *flags, "-I", TBQ / "include", "-I", TBQ / "cuda", *arguments], check=True)

    # Compiled side by side: a file for each head size, all kernels of which take minutes.
    objects = {name: [(name, HERE / f"{name}.cu")] for name in programs}
    if "attention" in programs:
        kernels = HERE / "attention-kernels.cu"
        objects["attention"] += [(f"attention-{d}", kernels, f"-DHEAD_SIZE={d}") for d in (64, 128, 256)]
        objects["attention"].append(("attention-rows", HERE / "attention-rows.cu"))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        every = [one for some in objects.values() for one in some]
        list(pool.map(lambda one: nvcc("-c", *one[1:], "-o", out / f"{one[0]}.o"), every))
    for name, parts in objects.items():
        nvcc(*[out / f"{part[0]}.o" for part in parts], library, "-o", out / name)


if __name__ == "__main__":
    build(sys.argv[1], programs=sys.argv[2:] or PROGRAMS)
