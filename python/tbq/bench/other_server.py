# SPDX-License-Identifier: MIT
"""A llama-server of another build than the installed one, for measurements that compare builds."""

import json
import os
import pathlib
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tbq.errors import TBQError
from tbq.programs import output
from tbq.programs.child import start_child
from tbq.serving.address import free_port
from tbq.serving.answer import read_json


class OtherServer:
    """llama-server as a context manager: healthy inside, stopped afterwards.

    program: the path of llama-server.  options: all of its options except --host and --port.
    timeout: seconds to wait until the model is loaded.
    Raises TBQError if it does not start, with the reason that it gave.
    """

    def __init__(self, program: str | os.PathLike[str], options: Sequence[str], timeout: float = 600) -> None:
        if not pathlib.Path(program).is_file():
            raise TBQError(f"llama-server {str(program)!r} is not a file")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [str(pathlib.Path(program).absolute()), *options, "--host", "127.0.0.1", "--port", str(port)]
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._timeout = timeout

    def __enter__(self) -> "OtherServer":
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        self._log = tempfile.TemporaryFile()
        self._process = start_child(self._command, environment, self._log)
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._log.seek(0)
                lines = self._log.read().decode(errors="replace").splitlines()
                raise TBQError(f"llama-server ended: {output.server_error(lines) or 'it printed nothing'}")
            try:
                self.request("/health")
                return
            except (TBQError, OSError, ValueError):
                time.sleep(0.1)
        raise TBQError(f"llama-server was not ready after {self._timeout:.0f} s")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def request(self, path: str, body: Any = None) -> Any:
        """The answer to GET, or with a body to POST, as decoded JSON; TBQError if the server refuses the request."""
        data = None if body is None else json.dumps(body).encode()
        question = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return read_json(lambda: self._opener.open(question, timeout=10 if path == "/health" else None))
