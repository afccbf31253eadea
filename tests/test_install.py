# SPDX-License-Identifier: MIT
"""The commands of the Makefile: what they check first, and the one line that a failure comes down to."""
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT, install


@pytest.mark.parametrize("output, line", [
    ("x\n  CMake Error at cmake/llama.cmake:14 (message):\n   tbq: error: patch 0001-a.patch does not apply to b\n\n"
     "  *** CMake configuration failed\nERROR: Failed building wheel", "patch 0001-a.patch does not apply to b"),
    ("a.cpp:1:2: warning: w\ncc1plus: fatal error: x.o: No space left on device\n", "no disk space left"),
    ("  g++: fatal error: Killed signal terminated program cc1plus\n",
     "the compiler was killed, probably for memory: Killed signal terminated program cc1plus"),
    ("WARNING: Retrying (Retry(total=0 ...\nERROR: Could not find a version that satisfies the requirement cmake\n"
     "ERROR: No matching distribution found for cmake>=3.21\n",
     "cmake>=3.21 is not in the configured package index, or the index cannot be reached"),
    ("[3/9] Building\n  src/a.cpp:10:3: error: expected ';'\n  more\nERROR: Failed building wheel\n",
     "src/a.cpp:10:3: error: expected ';'"),
    ("  CMake Error at CMakeLists.txt:3 (find_package):\n    By not providing ...\n", "By not providing ..."),
    ("ERROR: something of pip\n", "something of pip"),
    ("nothing that helps\n", "it failed"),
])
def test_explain(output, line):
    assert install.explain(output) == line


def test_requirements_are_those_of_pyproject():
    assert {"scikit-build-core", "cffi", "pip", "cmake", "ninja"} == {r.split(">")[0] for r in install.requirements()}


def failure():
    with pytest.raises(install.Failure) as error:
        install.check_machine()
    return str(error.value)


def test_no_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "git" else "/usr/bin/" + name)
    assert failure() == "git is not installed; it applies the patches"


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name if name in ("git", "gcc") else None)
    assert failure().startswith("no C++ compiler found (c++, g++, clang++); install one")


def test_no_disk_space(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10, 10**8))
    monkeypatch.setattr(install, "build_dir", lambda: None)
    assert failure().startswith("no disk space: 0.1 GB free under ")


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert failure().startswith("Python 3.10 or newer is needed; ")


def test_cmake_without_a_compiler(tmp_path):
    """pip install . does not pass through install.py: CMake has to say it too."""
    tools = pathlib.Path(sys.executable).parent
    if not (tools / "cmake").exists():
        pytest.skip("cmake is not in this environment (make install)")
    path = tmp_path / "path"
    path.mkdir()
    for tool in ("cmake", "ninja"):
        os.symlink(tools / tool, path / tool)
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    result = subprocess.run([path / "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", "-DTBQ_LLAMA=OFF",
                             "-DTBQ_PYTHON=OFF"], capture_output=True, text=True, env={**environment, "PATH": str(path)})
    assert result.returncode != 0
    assert "tbq: error: no C compiler found; install one (Debian: apt install g++) or name it in $CC and $CXX\n" \
        in result.stderr


def test_interrupted_command_ends_with_its_children(tmp_path, monkeypatch):
    """A terminal's Ctrl-C reaches pip's, CMake's and ninja's processes as one."""
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import install, signal\n"
              "signal.signal(signal.SIGTERM, install.interrupt)\n"
              "print('started', flush=True)\n"
              "install.run(['sh', '-c', 'sleep 77.5 & wait'], open(sys.argv[2], 'w'))")
    process = subprocess.Popen([sys.executable, "-c", script, str(ROOT / "cmake"), str(tmp_path / "log")],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.stdout.readline()
    time.sleep(0.5)
    process.terminate()
    assert process.wait(10) != 0
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 77.5" not in left
