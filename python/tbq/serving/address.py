# SPDX-License-Identifier: MIT
"""Where a server listens, and how a client reaches it."""

import contextlib
import errno
import pathlib
import socket
from collections.abc import Mapping

from tbq.errors import TBQError


def reachable(hosts: str) -> str:
    """The first address of llama-server's --host that has a port."""
    for host in filter(None, (part.strip() for part in hosts.split(","))):
        if not host.endswith(".sock"):
            return host
    raise TBQError(
        f"host {hosts!r} has no address with a port; for Unix sockets alone start $(tbq paths bin)/llama-server itself"
    )


def url(host: str, port: int, found: Mapping[str, str]) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if {"ssl_key", "ssl_cert"} <= found.keys() else "http"
    prefix = found.get("prefix", "").strip("/")
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}" + (f"/{prefix}" if prefix else "")


def api_key(found: Mapping[str, str], environment: Mapping[str, str]) -> str | None:
    """A key that the server will take; None if it takes requests without one."""
    keys = found.get("key", environment.get("LLAMA_API_KEY", "")).split(",")
    if "key_file" in found:
        with contextlib.suppress(OSError):  # the server will say so
            text = pathlib.Path(found["key_file"]).read_text(encoding="utf-8", errors="replace")
            keys += [line for line in text.splitlines() if not line.startswith("#")]
    return next(filter(None, keys), None)


def _bind(host: str, port: int) -> int:
    """The port that a server could listen on now; 0 is any."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
            return int(s.getsockname()[1])
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        if isinstance(error, (socket.gaierror, UnicodeError)) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise TBQError(f"host {host!r} is not an address of this machine ({why})") from None
        raise TBQError(f"port {port} of {host} cannot be used ({why}); name another one") from None


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on."""
    return _bind(host, 0)


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """TBQError if a server cannot listen there."""
    _bind(host, port)
