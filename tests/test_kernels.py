# SPDX-License-Identifier: MIT
"""Every implementation of the kernels against the scalar reference: same bytes, same floats."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tbq._arguments import cores

HERE = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
# The flags in /proc/cpuinfo with which an implementation must run.
X86_FLAGS = {
    "avx2": {"avx2", "f16c", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c", "avx512_vnni"},
}


def build(folder, *options):
    """Builds kernels/fuzz.c, attention.c and search.c; returns the folder with the programs."""
    subprocess.run(["cmake", "-S", HERE / "kernels", "-B", folder, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", str(cores())], check=True, capture_output=True)
    return folder


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 differences\n" in done.stdout
    return done.stdout


def fuzz(*command):
    """Returns the implementations that were compared on blocks, and on how many; none differed."""
    return dict(re.findall(r"compared with ref: (\S+), (\d+) blocks", run(*command)))


def attention(*command, problems, seed=1):
    """Returns the implementations that were compared on attention.

    Some problems must have split the cache, some must have had exact rows, and some keys whose mean matters.
    """
    out = run(*command, str(problems), str(seed))
    pattern = r"(\d+) problems, (\d+) of them in chunks, (\d+) with exact rows, (\d+) with a mean"
    count, chunked, listed, centered = map(int, re.search(pattern, out).groups())
    assert count == problems and min(chunked, listed, centered) >= problems // 8
    return set(re.findall(r"compared with ref: (\S+)$", out, re.M)) - {"ref"}


def search(*command, problems, seed=1):
    """Returns the implementations that were compared on exhaustive search."""
    out = run(*command, str(problems), str(seed))
    assert f"\n{problems} problems\n" in out
    return set(re.findall(r"compared with ref: (\S+)$", out, re.M)) - {"ref"}


def expected_x86():
    cpu = set(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    return {name for name, flags in X86_FLAGS.items() if flags <= cpu}


@pytest.mark.skipif(not X86, reason="checks the x86 implementations")
def test_x86(tmp_path):
    folder = build(tmp_path)
    compared = fuzz(folder / "fuzz", "25000")
    assert set(compared) == expected_x86()
    assert all(int(blocks) > 1_000_000 for blocks in compared.values())
    assert attention(folder / "attention", problems=200) == expected_x86()
    assert search(folder / "search", problems=400) == expected_x86()


@pytest.mark.skipif(not X86, reason="checks the x86 implementations")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitized(tmp_path, sanitizers):
    """Reads past a buffer's end, undefined arithmetic, and races between the threads that share a cache."""
    # with -g and without -fno-var-tracking, compiling takes 197 s instead of 120 s
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all -g1 -fno-var-tracking"
    folder = build(tmp_path, f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_EXE_LINKER_FLAGS={flags}")
    assert attention(folder / "attention", problems=32, seed=2) == expected_x86()
    assert search(folder / "search", problems=100, seed=2) == expected_x86()


def test_arm(tmp_path):
    """NEON, on the machine itself or in an emulator."""
    if platform.machine() in ("aarch64", "arm64"):
        folder = build(tmp_path)
        assert "neon" in fuzz(folder / "fuzz", "25000")
        assert "neon" in attention(folder / "attention", problems=200)
        assert "neon" in search(folder / "search", problems=400)
        return
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip(
            "NEON not tested: needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)"
        )
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_C_COMPILER={compiler}"]
    folder = build(tmp_path, *options)
    # an old core has no dot product instructions, a new one does
    for cpu, blocks, problems, expected in (
        ("cortex-a53", "200", 8, {"neon"}),
        ("max", "1000", 16, {"neon", "neon-dotprod"}),
    ):
        assert set(fuzz(emulator, "-cpu", cpu, folder / "fuzz", blocks)) == expected
        assert attention(emulator, "-cpu", cpu, folder / "attention", problems=problems, seed=7) == expected
        assert search(emulator, "-cpu", cpu, folder / "search", problems=4 * problems, seed=4) == expected
