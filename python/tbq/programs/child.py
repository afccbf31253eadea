# SPDX-License-Identifier: MIT
"""Starting a program that, on Linux, ends with its parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

# Linux ends a process when its parent is gone, even after SIGKILL, if the process asked for that.  It asks with
# prctl(1), PR_SET_PDEATHSIG, which survives execv.  Asking between fork and exec is not safe in a program with threads.
# So a bare Python asks and then becomes the program.  It starts with SIGINT blocked, so that Ctrl-C ends it without a
# traceback.
_ASK_AND_BECOME = """\
import _signal, ctypes, os, sys
if _signal.getsignal(2) != _signal.SIG_IGN:
    _signal.signal(2, _signal.SIG_DFL)
_signal.pthread_sigmask(_signal.SIG_UNBLOCK, [2])
ctypes.CDLL(None).prctl(1, ctypes.c_ulong(9))
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def start_child(
    command: Sequence[str], environment: Mapping[str, str], to: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """Starts a program, which on Linux ends with the calling thread.

    to: a file for stdout and stderr; if None, they are in the stdout of the process.
    """
    # sys.executable is another program where Python is embedded
    if sys.platform.startswith("linux") and "python" in os.path.basename(sys.executable or ""):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        command = [sys.executable, "-I", "-S", "-c", _ASK_AND_BECOME, str(os.getpid()), *command]
    # The child gets a new session: Ctrl-C then reaches it through this process, once.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE if to is None else to,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
