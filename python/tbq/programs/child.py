# SPDX-License-Identifier: MIT
"""Starting a program that, on Linux, ends with its parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

# Linux ends a process whose parent is gone, even by SIGKILL, if it has asked for that (1 is PR_SET_PDEATHSIG, which
# survives execv).  Asking takes code between fork and exec, which is not safe in a program with threads, so a bare Python
# does it and becomes llama-server.  It starts with SIGINT blocked, so that Ctrl-C ends it without a word.
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


def start(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Starts a program, which on Linux ends with the calling thread."""
    if sys.platform.startswith("linux") and "python" in os.path.basename(
        sys.executable or ""
    ):  # not a program that embeds it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        command = [sys.executable, "-I", "-S", "-c", _ASK_AND_BECOME, str(os.getpid()), *command]
    # A session of its own: Ctrl-C reaches it through us, once.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
