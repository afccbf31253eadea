# SPDX-License-Identifier: MIT
"""Arguments: numbers, addresses, the cores that a thread count may use, and how several failures are reported."""

import math
import os
import re
from collections.abc import Mapping, Sequence

from tbq import _limits
from tbq.errors import TBQError


def cores() -> int:
    """Cores that this process may use.  In a container: its share of CPU time, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, math.ceil(_limits.cpus() or count))


def at_least_one(text: str) -> int:
    """The number that a text holds; TBQError unless it is 1 or more."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise TBQError(f"{text!r} is not a number of at least 1")
    return int(text)


def rpc_servers(servers: str | Sequence[str]) -> list[str]:
    """The RPC servers of a list or of "HOST:PORT,..."; TBQError for one that is not HOST:PORT, or is there twice."""
    found = servers.split(",") if isinstance(servers, str) else list(servers)
    for server in found:
        host, _, port = str(server).partition(":")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise TBQError(f"RPC server {server!r} is not HOST:PORT; 10.0.0.2:50052 would be one")
        if found.count(server) > 1:
            raise TBQError(f"RPC server {server} is named twice; it serves one client")
    return found


def group_by_reason(failures: Mapping[str, str]) -> str:
    """What failed and why, as one line.  Names with the same reason are listed together."""
    reasons: dict[str, list[str]] = {}
    for what, why in failures.items():
        reasons.setdefault(why, []).append(what)
    return "; ".join(f"{', '.join(what)}: {why}" for why, what in reasons.items())
