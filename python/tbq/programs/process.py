# SPDX-License-Identifier: MIT
"""Runs llama.cpp's programs as child processes, which do not outlive the caller unless it is killed with SIGKILL."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from tbq.programs import output
from tbq.programs.paths import program
from tbq.programs.signals import hold_interruptions


@dataclasses.dataclass(frozen=True)
class Done:
    """A program that has ended."""

    status: int  #: the exit status; -N if signal N ended it
    stdout: str
    stderr: str

    def error(self) -> str:
        """The line that says most about a failure."""
        if self.status < 0:
            name = signal.Signals(-self.status).name
            return f"ended by {name}" + (", most likely because memory ran out" if name == "SIGKILL" else "")
        if found := output.failure_reason(self.text):
            return found
        if not self.status:
            return "it ended without a result"
        return output.last_line(self.text) or f"exit status {self.status}"

    @property
    def text(self) -> str:
        return self.stderr + self.stdout


def run(
    name: str,
    arguments: Sequence[str],
    folder: pathlib.Path | None = None,
    on_output: Callable[[str], None] | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Done:
    """Runs a program to its end.

    folder: the folder to run it in.  on_output: is called with all of stdout so far, each time there is more.
    environment: variables for the program; a variable that the user has set keeps the user's value.
    """
    # variables that a user has set for servers must not change a measurement
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_ARG_")}
    with tempfile.TemporaryFile(dir=folder) as errors:
        process = None
        try:
            with hold_interruptions():
                process = subprocess.Popen(
                    [str(program(name)), *arguments],
                    cwd=folder,
                    env={**environment, **inherited},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
            assert process.stdout is not None
            written = b""
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                written += piece
                if on_output:
                    on_output(written.decode(errors="replace"))
            process.wait()
        finally:
            if process is not None:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if process.stdout is not None:
                    process.stdout.close()
        errors.seek(0)
        return Done(process.returncode, written.decode(errors="replace"), errors.read().decode(errors="replace"))
