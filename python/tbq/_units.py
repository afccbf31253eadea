# SPDX-License-Identifier: MIT
"""Sizes as people type and read them."""

import re

from tbq.errors import TBQError

#: What a help text says about sizes; they mean the same everywhere.
SIZES = "8G and 8GiB are 8 x 1024^3 bytes, 8GB is 8 x 1000^3"


def parse_size(size: int | str) -> int:
    """Bytes of "8G", "512M", "6.5GiB" (powers of 1024), "24GB" (of 1000) or a number of bytes; TBQError for anything else."""
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


def amount(size: float) -> str:
    """A size for people: "47.8 MiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return (
                f"{size:.0f} {unit}"
                if unit == "bytes"
                else f"{size:.1f} {unit}"
                if size < 100
                else f"{size:.0f} {unit}"
            )
        size /= 1024
    raise AssertionError
