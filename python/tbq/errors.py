# SPDX-License-Identifier: MIT
"""The exception that this package raises, and helpers for the text of a message."""


class TBQError(ValueError):
    """A wrong argument or a missing file.  The text is one line: the argument, its value, and what would work."""


def one_line(error: TBQError | OSError) -> str:
    """The text of an error as one line for the terminal."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.strerror or error}: {error.filename}"
    return " ".join(text.split())


def printable(name: object) -> str | None:
    """A name that is safe for the terminal.  A file can hold any text, so control characters become "?".

    None if the name is empty or not a text.
    """
    return "".join(c if c.isprintable() else "?" for c in name[:80]) if isinstance(name, str) and name else None
