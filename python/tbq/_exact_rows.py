# SPDX-License-Identifier: MIT
"""How many of the cache's rows are exact: kept in 8 bits beside the packed ones, and read by attention instead of them.

Attention reads mostly the newest tokens and the first ones.
"""

from tbq.errors import TBQError

#: The newest rows of each sequence that are exact, and its first ones.
RECENT, FIRST = 128, 4

_MOST = 999_999_999  # that the options of llama.cpp's programs take


def check_exact_rows(recent: object, first: object) -> None:
    """Raises TBQError unless both are integers from 0 to 999999999.  Both 0: every row is read packed."""
    for name, rows in (("recent", recent), ("first", first)):
        if isinstance(rows, bool) or not isinstance(rows, int) or not 0 <= rows <= _MOST:
            raise TBQError(f"{name} is {rows!r}; it must be a whole number of rows, from 0 to {_MOST}")


#: Bytes of a block of exact rows: 64 values and their scale (tbq8_0).
BLOCK_BYTES = 68

_SPARE = 16  # N_SPARE of llama-kv-exact.cpp


def slots(recent: int, first: int, sequences: int, cells: int) -> int:
    """The exact rows that a stream of llama.cpp's cache has room for.

    sequences: those that share the stream.  cells: the rows of the stream.
    """
    if not recent and not first:
        return 0
    return min(sequences * (recent + first) + _SPARE + sequences, cells)
