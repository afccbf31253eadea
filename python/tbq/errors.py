# SPDX-License-Identifier: MIT
"""The one exception of this package, and what may stand in a message."""


class TBQError(ValueError):
    """A wrong argument or a missing file; the text is one line that names it and what would work."""


def one_line(error: TBQError | OSError) -> str:
    """An error for the terminal."""
    text = (
        f"{error.strerror or error}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
    )
    return " ".join(text.split())


def printable(name: object) -> str | None:
    """A name for the terminal: what a file says may be anything.  None for what is no text, or empty."""
    return "".join(c if c.isprintable() else "?" for c in name[:80]) if isinstance(name, str) and name else None
