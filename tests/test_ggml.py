# SPDX-License-Identifier: MIT
"""ggml's operations on the tbq types, with the libraries of the installed package: see ggml/ops.cpp."""

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def test_operations(lib_dir, bin_dir, build_dir, tmp_path):
    include = build_dir / "llama.cpp-src" / "ggml" / "include"
    program = tmp_path / "ops"
    includes = [f"-I{include}", f"-I{ROOT / 'ggml_tbq/include'}", f"-I{ROOT / 'ggml_tbq/ggml'}"]
    libraries = [f"-L{lib_dir}", "-ltbq-ggml-cpu", "-ltbq-ggml-base", f"-Wl,-rpath,{lib_dir}"]
    command = ["c++", "-std=c++17", "-O2", *includes, HERE / "ggml/ops.cpp", "-o", program, *libraries]
    subprocess.run(command, check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " checks, 0 failed" in run.stdout
