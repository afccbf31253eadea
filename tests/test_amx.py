# SPDX-License-Identifier: MIT
"""The AMX tile configuration that the patched llama.cpp loads.

GCC 12 dropped the stores of this configuration.  A patch of the series makes the configuration a constant.  Without the
patch, GCC 12.2 at -O3 gives a configuration without rows.
The test does not need AMX: see amx/tile_config.cpp.
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
    # functions that the test does not call may remain unresolved
    compiler = shutil.which("g++") or "c++"
    flags = ["-std=c++17", level, "-march=sapphirerapids", "-w", "-no-pie", "-ffunction-sections", "-fdata-sections"]
    linker = ["-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all"]
    source = HERE / "amx" / "tile_config.cpp"
    subprocess.run(
        [compiler, *flags, *linker, *[f"-I{folder}" for folder in includes], source, "-o", program], check=True
    )
    run = subprocess.run([program], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("this compiler does not know AMX")
    assert run.returncode == 0, run.stdout
