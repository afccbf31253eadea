"""Every implementation of the kernels against the scalar reference: same bytes, same floats."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
# What /proc/cpuinfo must show for an implementation to run.
X86_FLAGS = {
    "avx2": {"avx2", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c", "avx512_vnni"},
}


def build(folder, *options):
    subprocess.run(["cmake", "-S", HERE / "kernels", "-B", folder, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder], check=True, capture_output=True)
    return folder / "fuzz"


def fuzz(*command):
    """The implementations that were compared, after none of them differed."""
    run = subprocess.run(command, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\n0 differences\n" in run.stdout
    return dict(re.findall(r"compared with ref: (\S+), (\d+) blocks", run.stdout))


@pytest.mark.skipif(not X86, reason="checks the x86 implementations")
def test_x86(tmp_path):
    compared = fuzz(build(tmp_path), "25000")
    cpu = set(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    expected = {name for name, flags in X86_FLAGS.items() if flags <= cpu}
    assert set(compared) == expected
    assert all(int(blocks) > 1_000_000 for blocks in compared.values())


def test_arm(tmp_path):
    """NEON, natively or under an emulator."""
    if platform.machine() in ("aarch64", "arm64"):
        compared = fuzz(build(tmp_path), "25000")
        assert "neon" in compared
        return
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip("NEON not tested: needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_C_COMPILER={compiler}"]
    binary = build(tmp_path, *options)
    # an old core has no dot product instructions, a new one does
    assert set(fuzz(emulator, "-cpu", "cortex-a53", binary, "200")) == {"neon"}
    assert set(fuzz(emulator, "-cpu", "max", binary, "1000")) == {"neon", "neon-dotprod"}
