"""llama-server with a tbq cache: Server for programs, `tbq serve` for the command line."""
import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from tbq.errors import TBQError
from tbq.paths import program

if TYPE_CHECKING:
    from openai import OpenAI

    from tbq.plan import Plan

F16_BYTES = 2
_STOP_SECONDS = 10

# Options of llama-server that the plan or the wait depends on, and whether a value follows.
_OPTIONS = {"-c": ("context", True), "--ctx-size": ("context", True), "-np": ("parallel", True), "--parallel": ("parallel", True),
            "-ub": ("ubatch", True), "--ubatch-size": ("ubatch", True), "--swa-full": ("swa_full", False),
            "-kvu": ("unified", False), "--kv-unified": ("unified", False), "-no-kvu": ("separate", False), "--no-kv-unified": ("separate", False),
            "--host": ("host", True), "--port": ("port", True), "--api-prefix": ("prefix", True),
            "--ssl-key-file": ("ssl", True), "--ssl-cert-file": ("ssl", True),
            "-ctk": ("types", True), "--cache-type-k": ("types", True), "-ctv": ("types", True), "--cache-type-v": ("types", True)}


def _read(options: Sequence[str]) -> dict[str, str]:
    """Those of llama-server's options that are in _OPTIONS; the last of each, as it takes them."""
    found = {}
    rest = iter(options)
    for option in rest:
        if option in _OPTIONS:
            name, has_value = _OPTIONS[option]
            found[name] = next(rest, "") if has_value else option
    return found


def _number(found: dict[str, str], name: str) -> int | None:
    """Of an option; None where llama-server's own default applies (not given, 0, negative) or it will complain itself."""
    text = found.get(name, "")
    return int(text) if re.fullmatch(r"\d{1,9}", text) and int(text) else None


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """TBQError if a server cannot listen there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
    except (OSError, OverflowError) as error:
        raise TBQError(f"port {port} of {host} cannot be used ({getattr(error, 'strerror', None) or error}); name another one") from None


def choose(model: str | os.PathLike[str], kv: str, **shape: Any) -> tuple[str, str, "Plan | None"]:
    """Types of keys and values for a model, and the plan with their sizes (None where there can be none).

    kv: "auto", a type, or "K/V".  shape: context, parallel, unified, ubatch, swa_full of tbq.plan.
    Raises TBQError for a model that is no file, a pair that llama.cpp refuses, and an "auto" that cannot be planned.
    """
    from tbq.plan import plan

    model = pathlib.Path(model)
    if not model.is_file():
        raise TBQError(f"model {str(model)!r} is not a file")
    if kv == "auto":
        chosen = plan(model, **shape)
        return *chosen.recommended, chosen
    k, slash, v = kv.partition("/")
    v = v if slash else k
    try:
        chosen = plan(model, pairs=[("f16", "f16"), (k, v)], **shape)
    except TBQError as error:
        if "cache type" in str(error):
            raise
        return k, v, None  # llama.cpp may know more models than the plan does
    if why := chosen.refused.get(f"{k}/{v}"):
        raise TBQError(f"cache {k}/{v} is refused: {why}")
    return k, v, chosen


def _shape(found: dict[str, str]) -> dict[str, Any]:
    """The arguments of choose() that llama-server's options ask for."""
    shape: dict[str, Any] = {"context": _number(found, "context"), "swa_full": "swa_full" in found, "unified": "separate" not in found}
    if parallel := _number(found, "parallel"):
        shape.update(parallel=parallel, unified="unified" in found)
    if ubatch := _number(found, "ubatch"):
        shape.update(ubatch=ubatch)
    return shape


class Server:
    """llama-server as a context manager: healthy inside, stopped afterwards whatever happens.

        with tbq.Server("model.gguf", "tbq4_0", options=["-c", "32768"]) as server:
            server.client().chat.completions.create(...)

    model: a GGUF file.  kv: "auto" (what tbq.plan recommends), a cache type, or "K/V".
    host, port: where to listen; a free port if None.  options: more of llama-server's.
    timeout: seconds to wait until the model is loaded; None for as long as it takes.
    on_line: is called with each line of the log, from another thread.
    LLAMA_ARG_... variables are not passed on: what is set for other servers must not change this one.

    url: "http://127.0.0.1:8080", to put paths such as /v1/chat/completions behind.  plan: the tbq.Plan of its cache, or
    None.  log: lines so far.  process: the subprocess.Popen.
    Raises TBQError if the server cannot be started or ends before it is healthy, with the reason that it gave.
    """

    process: "subprocess.Popen[bytes]"

    def __init__(self, model: str | os.PathLike[str], kv: str = "auto", *, host: str = "127.0.0.1", port: int | None = None,
                 options: Sequence[str] = (), timeout: float | None = 600, on_line: Callable[[str], None] | None = None) -> None:
        found = _read(options)
        if "types" in found:
            raise TBQError("cache types are chosen with --kv (kv=), tbq4_0/tbq3_0 for example, not with llama-server's own options")
        self.k, self.v, self.plan = choose(model, kv, **_shape(found))
        self.port = free_port(host) if port is None else port
        prefix = found.get("prefix", "").strip("/")
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        scheme = "https" if "ssl" in found else "http"
        self.url = f"{scheme}://{f'[{name}]' if ':' in name else name}:{self.port}" + (f"/{prefix}" if prefix else "")
        self.log: list[str] = []
        self._host, self._timeout, self._on_line, self._die_with_us = host, timeout, on_line, False
        self._command = [str(program("llama-server")), "-m", os.fspath(model), "--cache-type-k", self.k, "--cache-type-v", self.v,
                         "--host", host, "--port", str(self.port), *options]

    def __enter__(self) -> "Server":
        self.start()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process and returns at once."""
        check_port(self.port, self._host)
        env = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        # A session of its own: Ctrl-C reaches it through us, once.
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env,
                                        start_new_session=True, preexec_fn=_die_with_parent() if self._die_with_us else None)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.decode(errors="replace").rstrip())
            if self._on_line:
                self._on_line(self.log[-1])

    def wait_until_healthy(self) -> None:
        """Returns when the model is loaded; TBQError if that does not happen."""
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        # it is this machine, and the certificate may be its own
        context = ssl._create_unverified_context() if self.url.startswith("https") else None
        while deadline is None or time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise TBQError(f"llama-server ended with status {self.process.returncode}: {self.last_error()}")
            with contextlib.suppress(OSError, ValueError):
                with urllib.request.urlopen(self.url + "/health", timeout=2, context=context) as answer:
                    if answer.status == 200:
                        return
            time.sleep(0.1)
        raise TBQError(f"llama-server was not ready after {self._timeout:.0f} s: {self.last_error()}")

    def last_error(self) -> str:
        """The line of the log that says most about a failure."""
        if self.process.poll() is not None:
            self._reader.join(5)
        lines = [re.sub(r"^[\d.]+ [A-Z] ", "", line) for line in self.log if line]
        errors = [line for line in lines if re.search(r"error|failed|unsupported|invalid", line, re.I)]
        return (errors[:1] or lines[-1:] or ["it printed nothing"])[0]

    def stop(self) -> None:
        """Ends the process, by force if it does not end within 10 seconds."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
                return
            self.process.kill()
        self.process.wait()

    def client(self, api_key: str = "none", **options: Any) -> "OpenAI":
        """openai.OpenAI for this server; options are its own.  TBQError if the package is not installed."""
        try:
            from openai import OpenAI
        except ImportError:
            raise TBQError("client() needs the openai package: pip install openai") from None
        return OpenAI(base_url=self.url + "/v1", api_key=api_key, **options)

    def chat(self, question: str, **options: Any) -> dict[str, Any]:
        """The answer of /v1/chat/completions to one question, as the decoded JSON object; options go into the request."""
        body = {"messages": [{"role": "user", "content": question}], **options}
        request = urllib.request.Request(self.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def cache(self) -> dict[str, Any]:
        """What the server logged about its cache, with --verbosity 4: types, bytes, and what f16 would take."""
        text = "\n".join(self.log)
        size = re.search(r"llama_kv_cache: size = +[\d.]+ MiB \( *(\d+) cells, *(\d+) layers.*?"
                         r"K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB", text)
        widths = [int(w[1]) for side in "kv" if (w := re.search(rf"n_embd_{side}_gqa += (\d+)", text))]
        if not size or len(widths) != 2:
            raise TBQError("llama-server did not log the size of its cache; --verbosity 4 makes it")
        cells, layers, k_type, k_mib, v_type, v_mib = size.groups()
        return {"k_type": k_type, "v_type": v_type, "cells": int(cells), "mib": float(k_mib) + float(v_mib),
                "f16_mib": int(cells) * int(layers) * sum(widths) * F16_BYTES / 2**20}


def _die_with_parent() -> Callable[[], object] | None:
    """For preexec_fn: Linux ends the child when the thread that started it is gone, even by SIGKILL."""
    if not sys.platform.startswith("linux"):
        return None
    libc, set_death_signal = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG
    return lambda: libc.prctl(set_death_signal, signal.SIGTERM)


# --- the command ----------------------------------------------------------------------------------------------------


def summary(server: Server, kv: str) -> list[str]:
    """The plan in three lines."""
    from tbq.plan import amount

    plan = server.plan
    if plan is None:
        return [f"cache: keys {server.k}, values {server.v}; its size is not known for this model"]
    pair = plan.pair(server.k, server.v)
    full = plan.bytes_at("f16", "f16", plan.context)
    share = f", {100 * pair.bytes / full:.0f} % of f16's {amount(full)}" if full else ""
    why = plan.reason if kv == "auto" else "as asked for" + ("" if (server.k, server.v) == plan.recommended else
                                                             f"; tbq plan would take {'/'.join(plan.recommended)}: {plan.reason}")
    return [f"model: {plan.name or pathlib.Path(plan.model).name}, {plan.architecture}, {len(plan.layers)} layers, {amount(plan.weights_bytes)} of weights",
            f"cache: keys {pair.k}, values {pair.v}: {amount(pair.bytes)} for {plan.context} tokens{share}",
            f"why:   {'; '.join([why, *plan.warnings])}"]


class _Signals:
    """Passes SIGINT, SIGTERM and SIGHUP on to a server; the second one kills it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.early: int | None = None  # came before there was a process
        self.count = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if not hasattr(self.server, "process"):
            self.early = number
        elif self.server.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.server.process.send_signal(number if self.count == 1 else signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    def started(self) -> None:
        if self.early is not None:
            self.server.process.send_signal(self.early)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone is no reason to stop serving
        print(text, file=sys.stderr, flush=True)


def serve(model: str, kv: str, options: Sequence[str]) -> int:
    """Runs llama-server in the foreground; its exit status, 128 + N if signal N ended it."""
    found = _read(options)
    host = found.get("host", "127.0.0.1")
    if host.endswith(".sock"):
        raise TBQError(f"--host {host}: Unix sockets are llama-server's; start it yourself, $(tbq paths bin)/llama-server")
    port = found.get("port", "8080")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise TBQError(f"--port {port!r} is not a port from 1 to 65535")
    server = Server(model, kv, host=host, port=int(port), options=options, timeout=None, on_line=_say)
    server._die_with_us = True
    for line in summary(server, kv):
        print(f"tbq: {line}", flush=True)
    signals = _Signals(server)
    server.start()
    signals.started()
    try:
        server.wait_until_healthy()
        print(f"tbq: llama-server is up: {server.url}; Ctrl-C stops it", flush=True)
        server.process.wait()
    except TBQError as error:
        if not signals.count:
            _say(f"tbq: error: {error}")
    finally:
        server.stop()
    status = server.process.returncode
    return status if status >= 0 else 128 - status


def define(parser: argparse.ArgumentParser) -> None:
    """plan a model's cache and run llama-server with it"""
    parser.usage = "tbq serve [-h] [--kv auto|TYPE|K/V] MODEL [llama-server's options ...]"
    parser.epilog = ("examples: tbq serve model.gguf\n"
                     "          tbq serve --kv tbq4_0/tbq3_0 model.gguf -c 131072 --port 9000 -ngl 99\n\n"
                     "The exit status is llama-server's; LLAMA_ARG_... variables are not passed on to it.")
    parser.add_argument("--kv", default="auto", metavar="auto|TYPE|K/V",
                        help="cache types: what `tbq plan` recommends (auto, the default), one for both sides, or keys/values")
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, the first one if it is split")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="any option of llama-server, passed on as it is")

    def run(args: argparse.Namespace) -> int:
        kv, options, rest = args.kv, [], iter(args.options)
        for option in rest:  # ours may come after the model too
            if option == "--kv":
                kv = next(rest, "")
            elif option.startswith("--kv="):
                kv = option[len("--kv="):]
            elif option in ("-h", "--help"):
                parser.print_help()
                return 0
            elif option != "--":
                options.append(option)
        if not kv:
            raise TBQError("--kv needs a value: auto, a type, or K/V")
        return serve(args.model, kv, options)

    parser.set_defaults(run=run)
