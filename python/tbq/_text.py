# SPDX-License-Identifier: MIT
"""Texts that a model reads, for calibration and for `tbq bench quality`."""

import pathlib

from tbq.errors import TBQError


def python_text() -> bytes:
    """The topics of Python's language reference, in alphabetical order.  Every Python has this text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def read_text(path: pathlib.Path) -> bytes:
    """The bytes of a text file; TBQError if it is not UTF-8 or is empty."""
    try:
        text = path.read_bytes()
        if not text.decode().strip():
            raise TBQError(f"text {str(path)!r} is empty; name one that the model can read")
    except UnicodeDecodeError as error:
        raise TBQError(f"text {str(path)!r} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise TBQError(f"text {str(path)!r} cannot be read ({error.strerror})") from None
    return text
