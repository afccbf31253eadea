# SPDX-License-Identifier: MIT
"""Sizes in bytes as people type and read them."""

import re

from tbq.errors import TBQError

#: What help texts say about sizes.  A size means the same in every command.
SIZES = "8G and 8GiB are 8 x 1024^3 bytes, 8GB is 8 x 1000^3"


def parse_size(size: int | str) -> int:
    """The number of bytes that a size means.

    "8G", "512M" and "6.5GiB" use powers of 1024, "24GB" powers of 1000; a number is one of bytes.
    Raises TBQError for anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    else:
        pattern = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT])(iB|B)?|B)?\s*"
        match = re.fullmatch(pattern, size, re.IGNORECASE) if isinstance(size, str) else None
        if match is None:
            raise TBQError(f"size {size!r} is not understood; write 8G, 512M, 6.5GiB, 24GB or a number of bytes")
        number, prefix, suffix = match.groups()
        base = 1000 if (suffix or "").lower() == "b" else 1024
        try:
            found = int(float(number) * base ** (" KMGT".index(prefix.upper()) if prefix else 0))
        except OverflowError:
            raise TBQError(f"size {size!r} is larger than any memory") from None
    if not 0 < found < 2**63:
        raise TBQError(f"size {size!r} must be more than 0 bytes and less than 2^63")
    return found


def format_size(size: float) -> str:
    """A size for people: "47.8 MiB"."""
    if size < 1024:
        return f"{size:.0f} bytes"
    unit = 0
    while size >= 1024 and unit < 3:
        size, unit = size / 1024, unit + 1
    return f"{size:.{1 if size < 100 else 0}f} {'KMG'[unit - 1]}iB"
