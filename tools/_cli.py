# SPDX-License-Identifier: MIT
"""Errors of the scripts in this folder: one line on stderr and status 1 (standard library only, any Python 3)."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Failure(Exception):
    """An error whose text is the one line that the user sees."""


def run_main(main: Callable[[], object]) -> None:
    """Runs a script's main function, and turns errors into that line."""
    try:
        main()
    except Failure as failure:
        sys.exit(f"error: {failure}")
    except OSError as error:
        sys.exit(f"error: {error.strerror}: {error.filename}" if error.filename else f"error: {error}")
    except KeyboardInterrupt:
        # a terminal shows ^C at the start of the line
        sys.exit("\n" * sys.stderr.isatty() + "error: interrupted; the same command continues from here")
