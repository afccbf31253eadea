# SPDX-License-Identifier: MIT
"""Programs of llama.cpp as child processes that do not outlive the caller, unless it is killed by force."""
import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType

from tbq import _limits
from tbq.paths import program


@dataclasses.dataclass(frozen=True)
class Done:
    status: int  #: below 0: the signal that ended it
    stdout: str
    stderr: str

    def error(self) -> str:
        """The line that says most about a failure."""
        if self.status < 0:
            name = signal.Signals(-self.status).name
            return f"ended by {name}" + (", most likely because memory ran out" if name == "SIGKILL" else "")
        lines = [line.strip() for line in (self.stderr + self.stdout).splitlines() if line.strip()]
        for mark in ("llama_init_from_model: ", "error: ", "error loading model: ", " E "):
            for line in lines:
                if mark in line:
                    return line.rpartition(mark)[2]
        if not self.status:
            return "it ended without a result"
        return lines[-1] if lines else f"exit status {self.status}"


def run(name: str, arguments: Sequence[str], folder: pathlib.Path | None = None,
        on_output: Callable[[str], None] | None = None, environment: Mapping[str, str] = MappingProxyType({})) -> Done:
    """Runs a program to its end in a folder; on_output gets all of stdout so far, each time there is more.

    environment: variables for the program, where the user has not set them.
    """
    # what a user has set for servers must not change a measurement
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_ARG_")}
    with tempfile.TemporaryFile(dir=folder) as errors:
        process = None
        try:
            with _held():
                process = subprocess.Popen([str(program(name)), *arguments], cwd=folder, env={**environment, **inherited}, stdin=subprocess.DEVNULL,
                                           stdout=subprocess.PIPE, stderr=errors)
            assert process.stdout is not None
            output = b""
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                output += piece
                if on_output:
                    on_output(output.decode(errors="replace"))
            process.wait()
        finally:
            if process is not None:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if process.stdout is not None:
                    process.stdout.close()
        errors.seek(0)
        return Done(process.returncode, output.decode(errors="replace"), errors.read().decode(errors="replace"))


def cores() -> int:
    """Those that this process may use, a container's share of their time rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, math.ceil(_limits.cpus() or count))


def at_least_one(text: str) -> int:
    """For argparse."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals go to a handler; not where they are ignored (nohup's SIGHUP), and only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


INTERRUPTIONS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """An interruption comes at the end: in the middle of Popen it would leave a child that nobody knows."""
    caught: list[int] = []
    with handled((number for number in INTERRUPTIONS if callable(signal.getsignal(number))), lambda number, _: caught.append(number)):
        yield
    if caught:
        raise KeyboardInterrupt


def by_reason(failures: Mapping[str, str]) -> str:
    """What failed and why, things with one reason together."""
    reasons: dict[str, list[str]] = {}
    for what, why in failures.items():
        reasons.setdefault(why, []).append(what)
    return "; ".join(f"{', '.join(what)}: {why}" for why, what in reasons.items())


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP become KeyboardInterrupt, so that whatever was begun is cleaned up."""
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with handled((number for number in INTERRUPTIONS if number != signal.SIGINT), interrupt):
        yield
