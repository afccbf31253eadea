# SPDX-License-Identifier: MIT
"""The CUDA kernels. Without a GPU: that they compile for every architecture, as they should, and that a machine without
nvcc is told so. With one: tests/cuda/run.sh, which has everything that docs/measurements/cuda.md claims."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TBQ = ROOT / "ggml_tbq"
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


def has_gpu():
    return shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


needs_gpu = pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU; docs/measurements/cuda.md has the log of the last run on one")


def compile_for(arch, out):
    done = subprocess.run(["nvcc", "-std=c++17", "-O3", "-use_fast_math", f"-arch=sm_{arch}", "-Werror", "all-warnings",
                           "-I", TBQ / "include", "-I", TBQ / "cuda", "-Xptxas", "-v", "-cubin", "-o", out,
                           ROOT / "tests" / "cuda" / "architectures.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # name, bytes of spilling, registers
    return {name: (int(spill), int(registers)) for name, spill, registers in re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", done.stderr, re.S)}


@needs_nvcc
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
def test_compiles(tmp_path, arch):
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout
    if f"sm_{arch}\n" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    kernels = compile_for(arch, tmp_path / "x.cubin")
    assert len(kernels) == 11
    for name, (spill, registers) in kernels.items():
        assert spill <= (8 if "tbq_attentionILi128ELi8ELi4ELi8E" in name else 0), name  # q8_0 keys: two words on sm_86
        if "tbq_attentionILi128ELi4ELi4ELi8E" in name:
            assert registers <= 128, "two CTAs of 256 threads must fit a multiprocessor"


@needs_nvcc
def test_standalone_programs_compile(tmp_path):
    """What run.sh builds: one pair of types is enough here."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda"))
    import build
    build.build(tmp_path, arch="sm_90", programs=("blocks",))
    # without a GPU it must say so, not pass
    done = subprocess.run([tmp_path / "blocks", "100"], capture_output=True, text=True)
    assert (done.returncode == 0) == bool(has_gpu()) and ("0 differences" in done.stdout) == bool(has_gpu())


def test_few_instance_files():
    """Each is compiled for every architecture of a release build."""
    assert len(list((TBQ / "cuda").glob("*.cu"))) <= 20


def test_make_cuda_without_nvcc(tmp_path):
    """One line, before anything is downloaded or built."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("git", "cc", "c++", "gcc", "g++"):
        if found := shutil.which(tool):
            (path / tool).symlink_to(found)
    done = subprocess.run([sys.executable, ROOT / "tools" / "install.py", tmp_path / "venv", "--cuda"], capture_output=True, text=True,
                          env={"PATH": str(path)}, cwd=ROOT)
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    assert done.stderr.strip() == ("error: no CUDA compiler (nvcc); install the CUDA toolkit and put nvcc into $PATH, "
                                   "or name it in $CUDACXX")


@pytest.mark.parametrize("platform", ["HIP", "MUSA"])
def test_other_platforms_say_no(tmp_path, platform):
    """Nobody has run the kernels there: the backend must not claim the types, and then the context is refused."""
    source = tmp_path / "no.cpp"
    source.write_text("""
#include <cstddef>
enum ggml_type { GGML_TYPE_TBQ4_0 = 644 };
struct ggml_tensor {};
#include "tbq-ggml-cuda.cuh"
int main() {
    ggml_tensor t;
    const bool any = tbq_cuda_supports_op(&t) || tbq_cuda_kv_type_supported(GGML_TYPE_TBQ4_0) ||
        tbq_cuda_flash_attn_ext_supported(0, &t) || tbq_cuda_compute(t, &t) || tbq_cuda_to_fp16(GGML_TYPE_TBQ4_0) != nullptr;
    return any ? 1 : 0;
}
""")
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++17", f"-DGGML_USE_{platform}", "-I", TBQ / "ggml", "-o", tmp_path / "no", source],
                   check=True)
    assert subprocess.run([tmp_path / "no"]).returncode == 0


def test_a_device_that_lacks_the_types_is_noticed(tmp_path, build_dir):
    """The question that llama_kv_cache asks before it makes a layer; without it the layer would run on the CPU."""
    source, ggml = ROOT / "tests" / "cuda" / "refusal.cpp", build_dir / "llama.cpp-src" / "ggml"
    library = next((build_dir / "bin").glob("lib*ggml-base.*"))
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++17", "-I", ggml / "include", "-I", ggml / "src", "-I", TBQ / "include", "-I", TBQ / "ggml",
                    "-o", tmp_path / "refusal", source, library, f"-Wl,-rpath,{library.parent}"], check=True)
    done = subprocess.run([tmp_path / "refusal"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_gpu
def test_on_the_gpu(build_dir):
    """Correctness only; `tests/cuda/run.sh BIN speed` measures."""
    if not list(build_dir.glob("bin/lib*ggml-cuda*")):
        pytest.skip("built without CUDA: make cuda")
    done = subprocess.run([ROOT / "tests" / "cuda" / "run.sh", build_dir / "bin", "check"], env={**os.environ, "PYTHON": sys.executable},
                          capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
