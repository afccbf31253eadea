# SPDX-License-Identifier: MIT
"""GCC 12 dropped the stores of llama.cpp's AMX tile configuration (patch 0001): what does our build's code load?

Needs no AMX: see amx/tile_config.cpp.  On the unpatched pin, GCC 12.2 at -O3 gives a configuration without rows.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is x86-64 only")
@pytest.mark.parametrize("level", ["-O2", "-O3"])
def test_tile_configuration_survives_optimization(build_dir, tmp_path, level):
    ggml = build_dir / "llama.cpp-src" / "ggml"
    includes = [
        ggml / "src",
        ggml / "include",
        ggml / "src" / "ggml-cpu",
        ROOT / "ggml_tbq/include",
        ROOT / "ggml_tbq/ggml",
    ]
    program = tmp_path / "tile_config"
    # the functions that the test does not reach may stay without the rest of ggml
    subprocess.run(
        [shutil.which("g++") or "c++", "-std=c++17", level, "-march=sapphirerapids", "-w", "-no-pie",
         "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all",
         *[f"-I{folder}" for folder in includes], HERE / "amx" / "tile_config.cpp", "-o", program],
        check=True)  # fmt: skip
    run = subprocess.run([program], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("this compiler does not know AMX")
    assert run.returncode == 0, run.stdout
