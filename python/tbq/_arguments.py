# SPDX-License-Identifier: MIT
"""Values of arguments: what a number of threads may be, and how several failures are told."""

import math
import os
from collections.abc import Mapping

from tbq import _limits
from tbq.errors import TBQError


def cores() -> int:
    """Cores that this process may use, a container's share of their time rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, math.ceil(_limits.cpus() or count))


def at_least_one(text: str) -> int:
    """The number in a text; TBQError if there is none of at least 1."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise TBQError(f"{text!r} is not a number of at least 1")
    return int(text)


def by_reason(failures: Mapping[str, str]) -> str:
    """What failed and why, things with one reason together."""
    reasons: dict[str, list[str]] = {}
    for what, why in failures.items():
        reasons.setdefault(why, []).append(what)
    return "; ".join(f"{', '.join(what)}: {why}" for why, what in reasons.items())
