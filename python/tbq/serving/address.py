# SPDX-License-Identifier: MIT
"""The address of a server: where it listens, and how a client reaches it."""

import contextlib
import errno
import pathlib
import socket
from collections.abc import Mapping

from tbq.errors import TBQError


def first_tcp_host(hosts: str) -> str:
    """The first address in llama-server's --host that has a port, which Unix sockets do not have."""
    for host in filter(None, (part.strip() for part in hosts.split(","))):
        if not host.endswith(".sock"):
            return host
    raise TBQError(
        f"host {hosts!r} has no address with a port; to serve on Unix sockets only, run $(tbq paths bin)/llama-server"
    )


def server_url(host: str, port: int, found: Mapping[str, str]) -> str:
    """The URL of a server.  found: its options, as server_options() returns them."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if {"ssl_key", "ssl_cert"} <= found.keys() else "http"
    prefix = found.get("prefix", "").strip("/")
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}" + (f"/{prefix}" if prefix else "")


def api_key(found: Mapping[str, str], environment: Mapping[str, str]) -> str | None:
    """A key that the server accepts; None if it accepts requests without a key."""
    keys = found.get("key", environment.get("LLAMA_API_KEY", "")).split(",")
    if "key_file" in found:
        with contextlib.suppress(OSError):  # the server will report it
            text = pathlib.Path(found["key_file"]).read_text(encoding="utf-8", errors="replace")
            keys += [line for line in text.splitlines() if not line.startswith("#")]
    return next(filter(None, keys), None)


def _bind(host: str, port: int) -> int:
    """The port that a server could listen on now.  port: 0 for any free one."""
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
    """A TCP port that no process listens on."""
    return _bind(host, 0)


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """Raises TBQError if a server cannot listen on a port."""
    _bind(host, port)
