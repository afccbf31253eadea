# SPDX-License-Identifier: MIT
"""tbq.Server: llama-server with a tbq cache, as an object.  The command line is in tbq.cli.serve."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tbq import _limits
from tbq._arguments import cores, rpc_servers
from tbq.errors import TBQError
from tbq.kv_cache.calibrate import Scratch, center_file_for
from tbq.kv_cache.center_file import read_center
from tbq.kv_cache.choose import choose, context_of_a_sequence, open_model
from tbq.programs import output
from tbq.programs.child import start_child
from tbq.programs.options import check_files, check_tls, plan_arguments, positive_number, server_options
from tbq.programs.paths import paths, program
from tbq.serving.address import api_key, check_port, first_tcp_host, free_port, server_url
from tbq.serving.answer import read_json

if TYPE_CHECKING:
    from openai import OpenAI

F16_BYTES = 2
_STOP_SECONDS = 10
_LOG_LINES = 5000


def _threads(found: Mapping[str, str]) -> list[str]:
    """The --threads option for llama-server in a container.

    llama-server starts a thread for each core of the machine.  A container may have the time of half of the cores or
    fewer; then it gets fewer threads.
    """
    few = "threads" not in found and _limits.cpus() is not None and cores() <= (os.cpu_count() or 1) // 2
    return ["-t", str(cores())] if few else []


def _check_options(
    found: Mapping[str, str], model: str | os.PathLike[str], center: bool | str | os.PathLike[str]
) -> None:
    """Raises TBQError for options that contradict the arguments."""
    if "types" in found:
        raise TBQError(
            "cache types are chosen with --kv (kv=), tbq4_0/tbq3_0 for example, not with llama-server's own options"
        )
    if "model" in found:
        raise TBQError(f"there are two models, {str(model)!r} and {found['model']!r}; name one, as MODEL")
    if "center" in found and not isinstance(center, bool):
        raise TBQError(f"there are two centers, {str(center)!r} and {found['center']!r}; name one")


class Server:
    """llama-server as a context manager: healthy inside, stopped afterwards whatever happens.

        with tbq.Server("model.gguf", "tbq4_0", options=["-c", "32768"]) as server:
            server.client().chat.completions.create(...)

    model: a GGUF file.  kv: "auto" (what tbq.plan recommends), a cache type, or "K/V".
    center: whether quantized keys are mean-centered, or a file of `tbq calibrate`.  Without a file, start() measures
    the means on the first use of a model, which a line on stderr says.
    host, port: where to listen; None or 0 for a free port.
    rpc: RPC servers on which the model and its cache lie, as "HOST:PORT,..." or a list; `tbq rpc-server` runs one.
    options: options of llama-server.  --host and --port in them replace the arguments.
    timeout: seconds to wait until the model is loaded; None to wait without a limit.
    on_line: is called with each line of the log, from another thread.  After an exception it is not called again.
    LLAMA_ARG_... variables are not passed to the server, because they may have been set for another one.
    On Linux the server also ends when this process is killed; on other systems it does not.

    Attributes:
    url: "http://127.0.0.1:8080" for example; append a path such as /v1/chat/completions.
    k, v: the cache types.  For a model without a cache they are f16, and the server gets no types.
    plan: the tbq.Plan of the cache, or None.
    center: the file with the means of the keys, or None; known after prepare().  Where the user's folder for caches
    cannot be written, the file is a temporary one, which stop() removes.
    log: lines of the log; of a long log only the first and the last thousands.  process: the subprocess.Popen.

    Raises TBQError if the server cannot be started, or if it ends before it is healthy, with the reason that it gave.
    """

    process: "subprocess.Popen[bytes]"

    def __init__(
        self,
        model: str | os.PathLike[str],
        kv: str = "auto",
        *,
        center: bool | str | os.PathLike[str] = True,
        host: str = "127.0.0.1",
        port: int | None = None,
        rpc: str | Sequence[str] | None = None,
        options: Sequence[str] = (),
        timeout: float | None = 600,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        if isinstance(options, str) or not all(isinstance(option, str) for option in options):
            raise TBQError(f'options {options!r} must be a list of strings, ["-c", "32768"] for example')
        found, others = server_options(options)
        _check_options(found, model, center)
        if rpc is not None:
            if "rpc" in found:
                raise TBQError(f"there are two lists of RPC servers, {rpc!r} and {found['rpc']!r}; name one")
            found["rpc"] = ",".join(rpc_servers(rpc))
            others = ["--rpc", found["rpc"], *others]  # in front of a --device that names them
        elif "rpc" in found:
            rpc_servers(found["rpc"])
        hosts, number = found.get("host", host), found.get("port", str(port or 0))
        if not re.fullmatch(r"[0-9]{1,5}", number) or int(number) >= 1 << 16:
            raise TBQError(f"port {number!r} is not a number from 1 to 65535, or 0 for a free one")
        self._host = first_tcp_host(hosts)
        check_files(others)
        if not isinstance(center, bool):
            read_center(center)
        if {"ssl_key", "ssl_cert"} & found.keys():
            check_tls(found, paths())
        self._given, self._center, self._kv = found, center, kv
        centered = found.get("center") != "none" and (center is not False or "center" in found)
        self._shape = {**plan_arguments(found), "center": centered, "options": others}
        self._model = open_model(model)
        self.k, self.v, self.plan = choose(self._model, kv, **self._shape)
        self.port = int(number) or free_port(self._host)
        self._share_port = "reuse_port" in found
        if not self._share_port:
            check_port(self.port, self._host)  # before prepare() measures anything
        self._options = ["--host", hosts, "--port", str(self.port), *_threads(found), *others]
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        self.url = server_url(self._host, self.port, found)
        self.log: list[str] = []
        self.center: pathlib.Path | None = None
        self._scratch = Scratch()
        self._key = api_key(found, self._environment)
        self._timeout, self._on_line = timeout, on_line
        self._prepared = False
        self._stopping = False  # whether the server is meant to end
        self._started: concurrent.futures.Future[subprocess.Popen[bytes]] | None = None

    def prepare(self) -> None:
        """Measures the means of the keys, if they are needed and not kept yet.

        That takes as long as loading the model and a prompt of 1024 tokens.  start() calls it.  Afterwards center, k,
        v and plan are those that the server starts with.
        """
        if self._prepared:
            return
        center = self._center
        if center is True and not self._options_are_accepted():
            center = False  # the server will refuse to start and report why, so nothing is measured for it
        if "center" not in self._given:
            per_slot = positive_number(self._given, "per_slot")
            context = context_of_a_sequence(self._model, self.plan, self._shape, per_slot)
            options = self._shape["options"]
            self.center = center_file_for(self._model, self.k, context, center, options, _warn, self._scratch)
            if self._kv == "auto" and self.plan and self.plan.center and not self.center:
                self._choose_uncentered()
        self._prepared = True

    def _choose_uncentered(self) -> None:
        self.k, self.v, self.plan = choose(self._model, self._kv, **{**self._shape, "center": False})

    def _options_are_accepted(self) -> bool:
        """Whether llama-server knows its options and can read their files.

        With --version it ends after it has checked them.
        """
        command = [str(program("llama-server")), *self._options, "--version"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return not subprocess.run(
                command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
            ).returncode
        return True

    @property
    def context_is_capped(self) -> bool:
        """Whether a slot has less context than the cache (--kv-unified-per-slot).

        Its length then does not tell the cache's.
        """
        return "per_slot" in self._given

    @property
    def _command(self) -> list[str]:
        types = ["--cache-type-k", self.k, "--cache-type-v", self.v] if self.plan is None or self.plan.cached else []
        # prepare() decides, and not the default of llama-server
        center = [] if "center" in self._given else ["--cache-center", str(self.center or "none")]
        if center and self._center is not False and "draft_center" not in self._given:
            center += ["--cache-center-draft", "auto"]  # the draft's types are its own
        return [str(program("llama-server")), "-m", os.fspath(self._model), *types, *center, *self._options]

    def __enter__(self) -> "Server":
        try:
            self.start()
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Calls prepare() and starts the process.  Does not wait until the model is loaded."""
        if self._started is not None:
            raise TBQError("a Server runs once; make another one")
        self.prepare()
        self._launch()

    def _launch(self) -> None:
        if not self._share_port:
            check_port(self.port, self._host)
        self._started = concurrent.futures.Future()
        # On Linux the process ends with the thread that started it, so the thread that reads the log starts it.
        self._reader = threading.Thread(
            target=self._run_process, args=(self._started,), name="llama-server", daemon=True
        )
        self._reader.start()
        self.process = self._started.result()

    def _run_process(self, started: "concurrent.futures.Future[subprocess.Popen[bytes]]") -> None:
        """Starts the process, reads its log and waits for its end."""
        try:
            process = start_child(self._command, self._environment)
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(process)
        on_line = self._on_line
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.log.append(line.decode(errors="replace").rstrip())
                if len(self.log) == 3 * _LOG_LINES:
                    del self.log[_LOG_LINES : 2 * _LOG_LINES]
                if on_line:
                    try:
                        on_line(self.log[-1])
                    except Exception:  # reading goes on, because a full pipe would stop the server
                        self._on_line = on_line = None
        process.wait()

    def wait_until_healthy(self) -> None:
        """Waits until the model is loaded; TBQError if it does not get loaded."""
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while deadline is None or time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError, ValueError, http.client.HTTPException),
                self._open("/health", timeout=2) as answer,
            ):
                if answer.status == 200 and self.process.poll() is None:  # else another server has answered
                    return
            if self.process.poll() is not None:
                if not self._restart_uncentered():
                    raise TBQError(f"llama-server {self.describe_ending()}: {self.last_error()}")
                deadline = None if self._timeout is None else time.monotonic() + self._timeout
            time.sleep(0.05)
        raise TBQError(f"llama-server was not ready after {self._timeout:.0f} s: {self.last_error()}")

    def _restart_uncentered(self) -> bool:
        """Starts the server again without a center, if it refused the center that was measured for it.

        If the planned context does not fit in the memory, the server may take another context, and with it another
        RoPE.
        Returns whether it has started the server again.
        """
        self._reader.join(5)
        refusal = output.refused_center(self.log)
        if self._stopping or self._center is not True or self.center is None or not refusal:
            return False
        before = self.k, self.v
        self.center = None
        self._choose_uncentered()  # with large biases "auto" may choose other types
        types = "" if before == (self.k, self.v) else f"; keys are {self.k} and values {self.v} instead"
        _warn(f"keys are not centered: {refusal}{types}; --no-center saves this attempt")
        self.log.clear()
        self._launch()
        if self._stopping:  # since the check above
            self.process.terminate()
        return True

    def _open(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """The answer to a request; the caller closes it.

        The server is on this machine, so no proxy is used, and a self-signed certificate is accepted.
        """
        import ssl

        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
        )
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}".encode().decode("latin-1")} if self._key else {}),
        }
        return opener.open(
            urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode(), headers),
            timeout=timeout,
        )

    def describe_ending(self) -> str:
        """How the process ended, for a message."""
        status = self.process.returncode
        return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"

    def last_error(self) -> str:
        """The line of the log that says most about a failure."""
        if self.process.poll() is not None:
            self._reader.join(5)
        return output.server_error(list(self.log)) or "it printed nothing"

    def stop(self) -> None:
        """Ends the process and removes its temporary files.  After 10 seconds the process is killed."""
        try:
            self._end()
        finally:
            self._scratch.close()

    def _end(self) -> None:
        try:
            process = None if self._started is None else self._started.result(_STOP_SECONDS)
        except Exception:
            process = None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            finally:  # Ctrl-C may have ended the wait
                if process.poll() is None:
                    process.kill()
        process.wait()

    def client(self, api_key: str | None = None, **options: Any) -> "OpenAI":
        """An openai.OpenAI for this server; options are its other arguments.

        api_key: if None, the first key that the server was started with.
        Raises TBQError if the package openai is not installed.
        """
        try:
            import openai
        except ImportError:
            raise TBQError("client() needs the openai package: pip install 'ggml-tbq[openai]'") from None
        if "http_client" not in options:  # no proxy, any certificate: as in _open()
            options["http_client"] = openai.DefaultHttpxClient(trust_env=False, verify=not self.url.startswith("https"))
        return openai.OpenAI(base_url=self.url + "/v1", api_key=api_key or self._key or "none", **options)

    def chat(self, question: str, **options: Any) -> dict[str, Any]:
        """The answer of /v1/chat/completions to one question, as a decoded JSON object.

        options: more fields of the request.  There is no timeout.
        Raises TBQError if the server refuses the request, OSError if the server has ended.
        """
        if options.get("stream"):
            raise TBQError("chat() returns whole answers; client() has streams")
        body = {"messages": [{"role": "user", "content": question}], **options}
        found: dict[str, Any] = self.request("/v1/chat/completions", body)
        return found

    def request(self, path: str, body: Any = None) -> Any:
        """The answer of llama-server to GET, or with a body to POST, as decoded JSON: request("/props").

        body: what json.dumps takes.  There is no timeout.
        Raises TBQError if the server refuses the request, OSError if the server has ended.
        """
        return read_json(lambda: self._open(path, body))

    def cache(self) -> dict[str, Any]:
        """What the server logs about its cache with --verbosity 4: types, cells, MiB, and the MiB of an f16 cache.

        exact_mib, of the exact rows, is a part of mib.
        """
        found: Any = output.server_cache(list(self.log))
        if found is None:
            raise TBQError("llama-server did not log the size of its cache; --verbosity 4 makes it")
        f16 = found["cells"] * found["layers"] * (found["k_values"] + found["v_values"]) * F16_BYTES
        return {
            "k_type": found["k_type"],
            "v_type": found["v_type"],
            "cells": found["cells"],
            "mib": found["k_mib"] + found["v_mib"] + found["exact_mib"],
            "exact_mib": found["exact_mib"],
            "f16_mib": f16 / 2**20,
        }


def say(text: str, to_stderr: bool = False) -> None:
    """Prints a line.  Errors are ignored: a server goes on when its terminal is gone."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def _warn(text: str) -> None:
    say(f"tbq: {text}", to_stderr=True)
