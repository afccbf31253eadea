#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Builds everything and installs it into a virtual environment (standard library only).

    install.py VENV --server  llama-server and the package, for the demo; all programs if they were built before
    install.py VENV           the package and all programs of llama.cpp
    install.py VENV --cuda    the same with the CUDA backend, here and in every later build of this folder
    install.py VENV --vulkan  the same with the Vulkan backend
    install.py VENV --tests   installs what the tests import, and builds llama.cpp's own tests in the same build folder
    install.py VENV --bench   builds the kernels' benchmarks there, and runs them
    install.py VENV --moved   corrects the paths in an environment whose checkout was moved

Every step can be interrupted and repeated: pip replaces a package in one step, and ninja continues where it stopped.
The complete output is written to build/install.log.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import importlib.util
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, ModuleType
from typing import TextIO

from _cli import Failure, run_main

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOG = ROOT / "build" / "install.log"
# These files say what is installed: make compares their times with those of the sources.
SERVER_STAMP = ROOT / "build" / ".installed-server"
STAMP = ROOT / "build" / ".installed"
# This file has the path of the checkout, which the scripts of the environment contain.
WHERE = ROOT / "build" / ".where"
# For a fresh build, its downloads and the environment.  A later build needs less.
DISK_BYTES = 1_500_000_000
# g++ needs 1.2 GB for the largest of llama.cpp's sources.
BYTES_PER_JOB = 1_300_000_000


def check_machine() -> None:
    if sys.version_info < (3, 10):
        raise Failure(
            f"Python 3.10 or newer is needed; {sys.executable} is {sys.version.split()[0]} "
            "(make PYTHON=... names another)"
        )
    if not shutil.which("git"):
        raise Failure("git is not installed; it applies the patches")
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        if not os.environ.get(variable) and not any(map(shutil.which, names)):
            raise Failure(
                f"no {'C++' if variable == 'CXX' else 'C'} compiler found ({', '.join(names)}); "
                f"install one (Debian: apt install g++) or name it in ${variable}"
            )
    free = shutil.disk_usage(ROOT).free
    if free < DISK_BYTES and not build_dir():
        raise Failure(f"no disk space: {free / 1e9:.1f} GB free under {ROOT}, {DISK_BYTES / 1e9:.1f} GB needed")


def load_limits() -> ModuleType:
    """Loads tbq/_limits.py, the limits of a container, alone: the package is not installed yet."""
    spec = importlib.util.spec_from_file_location("limits", ROOT / "python" / "tbq" / "_limits.py")
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jobs(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Returns how many compilers may run at once: one for each core, fewer if memory is short.

    root: the folder with proc and sys.
    """
    limits = load_limits()
    count: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(count, math.ceil(limits.cpus(root) or count))
    memory: list[int | None] = [limits.memory(root)]
    with contextlib.suppress(OSError):
        available = re.search(r"MemAvailable: +(\d+) kB", (root / "proc" / "meminfo").read_text())
        memory.append(int(available[1]) * 1024 if available else None)
    return max(1, min([count, *(size // BYTES_PER_JOB for size in memory if size)]))


def build_dir() -> pathlib.Path | None:
    """Returns CMake's build folder of the last install (build-dir in pyproject.toml), or None before the first one."""
    found = [path.parent for path in ROOT.glob("build/cp*/CMakeCache.txt")]
    return max(found, key=lambda folder: (folder / "CMakeCache.txt").stat().st_mtime, default=None)


# --- running commands, with progress ----------------------------------------------------------------------------


class Progress:
    """Shows ninja's [n/m] as a percentage: in place on a terminal, and elsewhere a line for each 10 %."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.shown = -1
        self.start = time.monotonic()

    def line(self, text: str) -> None:
        step = re.match(r"\s*\[(\d+)/(\d+)\]", text)
        if not step or int(step[2]) < 20:
            return
        percent = 100 * int(step[1]) // int(step[2])
        elapsed = int(time.monotonic() - self.start)
        message = f"    {percent:3d} %, {step[1]} of {step[2]} steps, {elapsed // 60}:{elapsed % 60:02d} min"
        if self.terminal:
            print(f"\r{message} ", end="", flush=True)
        elif percent // 10 > self.shown:
            print(message, flush=True)
        self.shown = percent // 10

    def end(self) -> None:
        if self.terminal and self.shown >= 0:
            print(flush=True)


def run(
    command: Sequence[str | os.PathLike[str]], log: TextIO, extra: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Runs a command and writes its output to the log.  Returns (exit status, output)."""
    log.write(f"\n$ {' '.join(map(str, command))}\n")
    lines = []
    progress = Progress()
    # The command has its own session, so that an interruption ends pip, CMake, ninja and the compilers together.  It
    # inherits the log and its lock: if this process is killed, the next make waits until the command has ended.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(log.fileno(),),
        env={**os.environ, **(extra or {})},
    )
    assert process.stdout is not None  # a pipe
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            lines.append(line)
            progress.line(line)
            if "tbq: patch series" in line or "tbq: downloading" in line:
                print("    " + line.split("tbq: ", 1)[1].strip(), flush=True)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    progress.end()
    return process.wait(), "".join(lines)


def explain(output: str) -> str:
    """Finds the line of a build's output that says why it failed."""
    for pattern, text in (
        (r"tbq: (?:CMake )?error: (.+)", "{0}"),
        (r"(No space left on device)", "no disk space left"),
        (r"(Killed signal.*)", "the compiler was killed, probably for memory: {0}"),
        (
            r"No matching distribution found for (\S+)",
            "{0} is not in the configured package index, or the index cannot be reached",
        ),
        (r"(\S+:\d+:\d+: (?:fatal )?error: .+)", "{0}"),
        (r"CMake Error.*\n\s*(.+)", "{0}"),
        (r"(?m)^\s*(?:ERROR|error): (.+)", "{0}"),
    ):
        found = re.search(pattern, output)
        if found:
            return text.format(found[1].strip())
    return "it failed"


def announce_step(number: int, text: str) -> None:
    print(f"[{number}/3] {text}", flush=True)


# --- the three steps --------------------------------------------------------------------------------------------


def make_venv(venv: pathlib.Path, log: TextIO) -> pathlib.Path:
    """Creates the environment; also if an earlier attempt left an incomplete one."""
    python = venv / "bin" / "python"
    if python.exists() and run([python, "-m", "pip", "--version"], log)[0] == 0:
        return python
    announce_step(1, f"creating {venv.name}")
    status, output = run([sys.executable, "-m", "venv", "--clear", str(venv)], log)
    if status:
        if "ensurepip" in output:
            raise Failure(f"{sys.executable} has no ensurepip; install venv (Debian: apt install python3-venv)")
        raise Failure(f"{venv.name} cannot be created: {explain(output)}")
    return python


def requirements() -> list[str]:
    """Returns the packages that the build needs: the list in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"(?m)^requires = (\[.*\])$", text)
    if not found:
        raise Failure("pyproject.toml has no list `requires` on one line")
    names: list[str] = ast.literal_eval(found[1])
    return names


def pip(
    python: pathlib.Path, arguments: Sequence[str], log: TextIO, extra: Mapping[str, str] | None = None
) -> tuple[int, str]:
    return run([python, "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"], log, extra)


def install_requirements(python: pathlib.Path, log: TextIO) -> None:
    wanted = requirements()
    if pip(python, ["install", "--quiet", "--no-index", "--dry-run", *wanted], log)[0] == 0:
        return
    announce_step(2, "installing cmake, ninja and the Python packages that the build needs")
    status, output = pip(python, ["install", *wanted], log)
    if status:
        raise Failure(explain(output))


def check_cuda() -> None:
    """Checks that nvcc is installed, before an hour of work.  CMake looks in the same places: $CUDACXX, then $PATH."""
    compiler = os.environ.get("CUDACXX", "nvcc")
    if not shutil.which(compiler):
        raise Failure(
            f"no CUDA compiler ({compiler}); install the CUDA toolkit and put nvcc into $PATH, or name it in $CUDACXX"
        )


def check_vulkan() -> None:
    """Checks that the shader compiler and the headers are installed.  CMake looks in the same places: $VULKAN_SDK, then
    where the compilers look."""
    sdk = os.environ.get("VULKAN_SDK")
    path = os.pathsep.join([*([f"{sdk}/bin"] if sdk else []), os.environ.get("PATH", "")])
    missing = [] if shutil.which("glslc", path=path) else ["glslc, which compiles shaders"]
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    for header in ("vulkan/vulkan.hpp", "spirv/unified1/spirv.hpp"):
        found = subprocess.run(
            [*compiler.split(), *([f"-I{sdk}/include"] if sdk else []), "-E", "-x", "c++", "-"],
            input=f"#include <{header}>\n",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        if found.returncode:
            missing.append(header)
    if missing:
        raise Failure(
            f"the Vulkan backend cannot be built without {' and '.join(missing)} "
            "(Debian: apt install glslc libvulkan-dev spirv-headers)"
        )


#: GPU backends, by the argument that asks for one: its name, the check of what it needs, how long a first build takes.
BACKENDS: dict[str, tuple[str, Callable[[], None], str]] = {
    "--cuda": ("CUDA", check_cuda, "about an hour of one core's work"),
    "--vulkan": ("Vulkan", check_vulkan, "about 15 minutes on 2 cores"),
}


def has_all_programs() -> bool:
    """Whether the last build had all programs.  Then --server builds all of them again, so that none is removed."""
    folder = build_dir()
    return folder is not None and "TBQ_TOOLS:BOOL=ON" in (folder / "CMakeCache.txt").read_text(
        encoding="utf-8", errors="replace"
    )


def install_package(python: pathlib.Path, log: TextIO, tools: bool, backend: str | None) -> None:
    folder = build_dir()
    again = folder and (folder / "bin" / "llama-server").exists()
    what = "llama.cpp" if tools else "llama-server"
    options = [f"-Ccmake.define.TBQ_TOOLS={'ON' if tools else 'OFF'}"]
    if backend:
        name, _, how_long = BACKENDS[backend]
        options.append(f"-Ccmake.define.TBQ_{name.upper()}=ON")
        announce_step(3, f"building llama.cpp with the tbq types and {name}, the first time {how_long}")
    else:
        minutes = 9 if tools else 7
        announce_step(
            3,
            f"building {what} with the tbq types"
            + ("" if again else f", the first time about {minutes} minutes on 2 cores"),
        )
    # CMake's cache keeps these options for later builds
    status, output = pip(python, ["install", "-v", "--no-build-isolation", *options, "."], log, environment(python))
    if status:
        raise Failure(f"{explain(output)} (complete output: {LOG.relative_to(ROOT)})")


def install_test_requirements(python: pathlib.Path, log: TextIO) -> None:
    """Installs the packages of the extra `test`."""
    wanted = "ggml-tbq[test]"
    if pip(python, ["install", "--quiet", "--no-index", "--dry-run", wanted], log)[0] == 0:
        return
    print("Installing what the tests import (about 400 MB)", flush=True)
    status, output = pip(python, ["install", wanted], log)
    if status:
        raise Failure(explain(output))


def environment(python: pathlib.Path) -> dict[str, str]:
    """The environment of a build: the virtual environment's CMake and ninja, and the number of compilers at once."""
    return {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(jobs())),
    }


def build_target(venv: pathlib.Path, log: TextIO, target: str) -> pathlib.Path:
    """Builds a target in the build folder of the last install, and returns that folder."""
    folder = build_dir()
    if not folder:
        raise Failure("nothing is built yet; run make first")
    status, output = run(
        [venv / "bin" / "cmake", "--build", folder, "--target", target], log, environment(venv / "bin" / "python")
    )
    if status:
        raise Failure(f"{explain(output)} (complete output: {LOG.relative_to(ROOT)})")
    return folder


def correct_paths(venv: pathlib.Path) -> None:
    """Replaces the old path of the checkout in the environment: its scripts have absolute paths."""
    before = f"{WHERE.read_text(encoding='utf-8')}/{venv.name}"
    print(f"This checkout was in {before.removesuffix('/' + venv.name)}: mending the paths in {venv.name}", flush=True)
    for path in [venv / "pyvenv.cfg", *(venv / "bin").iterdir()]:
        if path.is_symlink() or not path.is_file():
            continue
        with contextlib.suppress(UnicodeDecodeError):  # a binary file
            text = path.read_text(encoding="utf-8")
            if before in text:
                path.write_text(text.replace(before, str(venv)), encoding="utf-8")
    WHERE.write_text(str(ROOT), encoding="utf-8")


def mark(stamps: Sequence[pathlib.Path], start: float) -> None:
    """Sets stamps to the time when the build started: the next make builds files that were edited meanwhile."""
    for stamp in stamps:
        stamp.touch()
        os.utime(stamp, (start, start))
    WHERE.write_text(str(ROOT), encoding="utf-8")


def open_log() -> TextIO:
    """Opens and locks the log.  Two builds in one folder would break each other, so the second one waits."""
    LOG.parent.mkdir(exist_ok=True)
    log = open(LOG, "a", encoding="utf-8")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Waiting for another make in this folder", flush=True)
        fcntl.flock(log, fcntl.LOCK_EX)
    log.truncate(0)
    return log


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(venv: pathlib.Path, extra: str | None) -> None:
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    with open_log() as log:
        if extra == "--moved":
            correct_paths(venv)
            return
        if extra == "--tests":
            install_test_requirements(venv / "bin" / "python", log)
            print("Building llama.cpp's own tests (the first time about 4 minutes on 2 cores)", flush=True)
            build_target(venv, log, "tbq-llama-tests")
            return
        if extra == "--bench":
            for program in ("tbq-bench-kernels", "tbq-bench-attention"):
                folder = build_target(venv, log, program)
                subprocess.run([folder / "bin" / program], check=False)
            return
        check_machine()
        backend = extra if extra in BACKENDS else None
        if backend:
            BACKENDS[backend][1]()
        start = time.time()
        python = make_venv(venv, log)
        install_requirements(python, log)
        tools = extra != "--server" or has_all_programs()
        install_package(python, log, tools, backend)
        mark([SERVER_STAMP, *([STAMP] if tools else [])], start)


if __name__ == "__main__":
    run_main(lambda: main(pathlib.Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else None))
