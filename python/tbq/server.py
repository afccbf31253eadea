# SPDX-License-Identifier: MIT
"""llama-server with a tbq cache: Server for programs, `tbq serve` for the command line."""
import argparse
import concurrent.futures
import contextlib
import csv
import errno
import functools
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from tbq import _limits
from tbq._run import INTERRUPTIONS, cores, handled, interruptible
from tbq._settings import select, spelled
from tbq.caches import read_model, split_pair
from tbq.center import Scratch, for_cache
from tbq.errors import TBQError
from tbq.paths import paths, program

if TYPE_CHECKING:
    from openai import OpenAI

    from tbq.plan import Plan

F16_BYTES = 2
_STOP_SECONDS = 10
_LOG_LINES = 5000

# Options of llama-server that the plan or the wait depends on, or that would contradict them, and whether a value follows.
_OPTIONS = {"-c": ("context", True), "--ctx-size": ("context", True), "-np": ("parallel", True), "--parallel": ("parallel", True),
            "-ub": ("ubatch", True), "--ubatch-size": ("ubatch", True), "-b": ("batch", True), "--batch-size": ("batch", True), "--swa-full": ("swa_full", False),
            "-kvu": ("unified", False), "--kv-unified": ("unified", False), "-no-kvu": ("unified", False), "--no-kv-unified": ("unified", False),
            "--kv-unified-per-slot": ("per_slot", True), "--cache-center": ("center", True),
            "--host": ("host", True), "--port": ("port", True), "--reuse-port": ("reuse_port", False), "--api-prefix": ("prefix", True),
            "--api-key": ("key", True), "--api-key-file": ("key_file", True), "--ssl-key-file": ("ssl_key", True), "--ssl-cert-file": ("ssl_cert", True),
            "-ctk": ("types", True), "--cache-type-k": ("types", True), "-ctv": ("types", True), "--cache-type-v": ("types", True),
            "-t": ("threads", True), "--threads": ("threads", True),
            **{name: ("model", True) for name in ("-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo", "-hf", "-hfr", "--hf-repo")}}

# Options whose value is a file (a folder: True) that llama-server opens only when much else is done, or not at all.  It
# looks at those of its other options by itself, before it does anything.
_FILES = {"--ssl-key-file": False, "--ssl-cert-file": False, "-mm": False, "--mmproj": False, "--lora": False, "--control-vector": False,
          "--cache-center": False, "-md": False, "--model-draft": False, "--spec-draft-model": False, "-lcs": False, "--lookup-cache-static": False,
          "--mcp-servers-config": False, "--path": True}
_LISTS = ("--lora", "--control-vector")


def _check_files(options: Sequence[str]) -> None:
    """TBQError for a file that is not there."""
    for option, value in select(options, dict.fromkeys(_FILES, True)):
        name = spelled(option)
        for path in next(csv.reader([value or ""]), []) if name in _LISTS else [value or ""]:
            if not (os.path.isdir(path) if _FILES[name] else os.path.exists(path) and not os.path.isdir(path)):
                raise TBQError(f"{option} {path!r} is not a {'folder' if _FILES[name] else 'file'}")


def _check_tls(found: Mapping[str, str], build: Mapping[str, str]) -> None:
    """TBQError for a key and a certificate that this build has no use for, or one of them without the other.

    build: of tbq.paths.paths(); without "tls" it is not known, and llama-server will say so.
    """
    given = [name for name in ("ssl_key", "ssl_cert") if name in found]
    if given and build.get("tls") == "no":
        raise TBQError("--ssl-key-file and --ssl-cert-file: this llama-server is built without TLS; build it where OpenSSL is installed, "
                       "or put a proxy that has it in front")
    if len(given) == 1:
        one, other = ("--ssl-key-file", "--ssl-cert-file")[::1 if given == ["ssl_key"] else -1]
        raise TBQError(f"{one} without {other}: llama-server would serve without TLS; give both")


def _read(options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Those of llama-server's options that are in _OPTIONS, the last of each, as it takes them; and all without --host and --port."""
    found, others = {}, []
    rest = iter(options)
    for option in rest:
        name, has_value = _OPTIONS.get(spelled(option), ("", False))
        given = [option]
        if has_value:
            value = next(rest, None)
            if value is None:
                raise TBQError(f"{option} needs a value")
            given.append(value)
        if name:
            found[name] = given[-1]
        if name not in ("host", "port"):
            others += given
    return found, others


def _number(found: Mapping[str, str], name: str) -> int | None:
    """Of an option; None where llama-server's own default applies (not given, 0, negative) or it will complain itself."""
    text = found.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) and int(text) else None


def _shape(found: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of choose() that llama-server's options ask for."""
    shape: dict[str, Any] = {"context": _number(found, "context"), "swa_full": "swa_full" in found, "unified": True}
    if parallel := _number(found, "parallel"):
        shape.update(parallel=parallel, unified="no-" not in found.get("unified", "no-"))
    if (per_slot := _number(found, "per_slot")) and not shape["context"]:
        shape.update(context=per_slot * (parallel or 4))
    if {"ubatch", "batch"} & found.keys():
        shape.update(ubatch=min(_number(found, "ubatch") or 512, _number(found, "batch") or 2048))
    return shape


def _reachable(hosts: str) -> str:
    """The first address of llama-server's --host that has a port."""
    for host in filter(None, (part.strip() for part in hosts.split(","))):
        if not host.endswith(".sock"):
            return host
    raise TBQError(f"host {hosts!r} has no address with a port; for Unix sockets alone start $(tbq paths bin)/llama-server itself")


def _url(host: str, port: int, found: Mapping[str, str]) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if {"ssl_key", "ssl_cert"} <= found.keys() else "http"
    prefix = found.get("prefix", "").strip("/")
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}" + (f"/{prefix}" if prefix else "")


def _api_key(found: Mapping[str, str], environment: Mapping[str, str]) -> str | None:
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


def choose(model: str | os.PathLike[str], kv: str, **shape: Any) -> tuple[str, str, "Plan | None"]:
    """Types of keys and values for a model, and the plan with their sizes (None where there can be none).

    kv: "auto", a type, or "K/V"; for a model without a cache it is f16, llama.cpp's default, whatever was asked for.
    shape: context, parallel, unified, ubatch, swa_full, center, options of tbq.plan.
    Raises TBQError for a model that is no file, a pair that llama.cpp refuses, and an "auto" that cannot be planned.
    """
    from tbq.plan import plan

    if not isinstance(model, (str, os.PathLike)) or not isinstance(kv, str):
        raise TBQError(f"model {model!r} and kv {kv!r} must be the path of a GGUF file, and auto, a cache type or K/V")
    model = pathlib.Path(model)
    if not model.is_file():
        raise TBQError(f"model {str(model)!r} is not a file")
    if kv == "auto":
        planned = plan(model, **shape)
        return *planned.recommended, planned
    k, v = split_pair(kv)
    try:
        planned = plan(model, pairs=[("f16", "f16"), (k, v)], **shape)
    except TBQError:
        try:
            plan(model, **shape)
        except TBQError:  # it is not the types; llama.cpp may know more models than the plan does, or say better what is wrong
            return k, v, None
        raise
    if not planned.cached:
        return *planned.recommended, planned
    if why := planned.refused.get(f"{k}/{v}"):
        raise TBQError(f"cache {k}/{v} is refused: {why}")
    return k, v, planned


def _context_of_a_sequence(model: str | os.PathLike[str], plan: "Plan | None", shape: Mapping[str, Any], per_slot: int | None) -> int:
    """Tokens: the positions that keys can have; n_ctx_slot() of server-context.cpp."""
    trained = plan.context_train if plan else 0
    if not plan:
        with contextlib.suppress(TBQError):  # llama-server will say what is wrong with the file
            trained = read_model(pathlib.Path(model), shape["options"]).context
    context = shape.get("context") or (plan.context if plan else trained) or 8192
    each = int(context) // (1 if shape.get("unified", True) else shape.get("parallel", 1))
    return min(filter(None, (max(1, each), trained, per_slot)))


def _threads(found: Mapping[str, str]) -> list[str]:
    """For llama-server, which would take a thread for each of the machine's cores, in a container with the time of half of them or fewer."""
    few = "threads" not in found and _limits.cpus() is not None and cores() <= (os.cpu_count() or 1) // 2
    return ["-t", str(cores())] if few else []


# Linux ends a process whose parent is gone, even by SIGKILL, if it has asked for that (1 is PR_SET_PDEATHSIG, which
# survives execv).  Asking takes code between fork and exec, which is not safe in a program with threads, so a bare Python
# does it and becomes llama-server.  It starts with SIGINT blocked, so that Ctrl-C ends it without a word.
_ASK_AND_BECOME = """\
import _signal, ctypes, os, sys
if _signal.getsignal(2) != _signal.SIG_IGN:
    _signal.signal(2, _signal.SIG_DFL)
_signal.pthread_sigmask(_signal.SIG_UNBLOCK, [2])
ctypes.CDLL(None).prctl(1, ctypes.c_ulong(9))
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def _popen(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Starts a program, which on Linux ends with the calling thread."""
    if sys.platform.startswith("linux") and "python" in os.path.basename(sys.executable or ""):  # not a program that embeds it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        command = [sys.executable, "-I", "-S", "-c", _ASK_AND_BECOME, str(os.getpid()), *command]
    # A session of its own: Ctrl-C reaches it through us, once.
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)


class Server:
    """llama-server as a context manager: healthy inside, stopped afterwards whatever happens.

        with tbq.Server("model.gguf", "tbq4_0", options=["-c", "32768"]) as server:
            server.client().chat.completions.create(...)

    model: a GGUF file.  kv: "auto" (what tbq.plan recommends), a cache type, or "K/V".
    center: whether quantized keys are centred (tbq.center; measured on first use, which a line on stderr says), or a file for it.
    host, port: where to listen; a free port if None or 0.  options: more of llama-server's, whose --host and --port go first.
    timeout: seconds to wait until the model is loaded; None for as long as it takes.
    on_line: is called with each line of the log, from another thread; not again once it raised something.
    LLAMA_ARG_... variables are not passed on: what is set for other servers must not change this one.
    Only on Linux the server also ends when this process is killed.

    url: "http://127.0.0.1:8080", to put paths such as /v1/chat/completions behind.  k, v: the cache types; of a model without a
    cache f16, and the server is given none.  plan: the tbq.Plan of its cache, or None.  center: the file with the means of the
    keys, or None; it is gone after stop() where the user's folder for caches cannot be written.
    log: lines; of a long one the first and the last thousands.  process: the subprocess.Popen.
    Raises TBQError if the server cannot be started or ends before it is healthy, with the reason that it gave.
    """

    process: "subprocess.Popen[bytes]"

    def __init__(self, model: str | os.PathLike[str], kv: str = "auto", *, center: bool | str | os.PathLike[str] = True,
                 host: str = "127.0.0.1", port: int | None = None, options: Sequence[str] = (), timeout: float | None = 600, on_line: Callable[[str], None] | None = None) -> None:
        if isinstance(options, str) or not all(isinstance(option, str) for option in options):
            raise TBQError(f'options {options!r} must be a list of strings, ["-c", "32768"] for example')
        found, others = _read(options)
        if "types" in found:
            raise TBQError("cache types are chosen with --kv (kv=), tbq4_0/tbq3_0 for example, not with llama-server's own options")
        if "model" in found:
            raise TBQError(f"there are two models, {str(model)!r} and {found['model']!r}; name one, as MODEL")
        hosts, number = found.get("host", host), found.get("port", str(port or 0))
        if not re.fullmatch(r"[0-9]{1,5}", number) or int(number) >= 1 << 16:
            raise TBQError(f"port {number!r} is not a number from 1 to 65535, or 0 for a free one")
        self._host = _reachable(hosts)
        if "center" in found and not isinstance(center, bool):
            raise TBQError(f"there are two centers, {str(center)!r} and {found['center']!r}; name one")
        _check_files(others)
        if {"ssl_key", "ssl_cert"} & found.keys():
            _check_tls(found, paths())
        shape = {**_shape(found), "center": center is not False or "center" in found, "options": others}
        self.k, self.v, self.plan = choose(model, kv, **shape)
        self.port = int(number) or free_port(self._host)
        self._share_port = "reuse_port" in found
        if not self._share_port:
            check_port(self.port, self._host)  # before anything is measured
        others = [*_threads(found), *others]
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        self._scratch = Scratch()
        if center is True and not self._accepts(others):
            center = False  # nothing is measured for a server that will not start, and say why
        self.center = None if "center" in found else for_cache(
            model, self.k, _context_of_a_sequence(model, self.plan, shape, _number(found, "per_slot")), center, others,
            lambda line: _say(f"tbq: {line}", to_stderr=True), self._scratch)
        self._measured = center is True and self.center is not None
        self._choose_uncentred = functools.partial(choose, model, kv, **{**shape, "center": False})
        if kv == "auto" and self.plan and self.plan.center and not self.center and "center" not in found:
            self.k, self.v, self.plan = self._choose_uncentred()
        self.url = _url(self._host, self.port, found)
        self.log: list[str] = []
        self._key = _api_key(found, self._environment)
        self._timeout, self._on_line = timeout, on_line
        self._capped = "per_slot" in found
        self._model, self._options = os.fspath(model), ["--host", hosts, "--port", str(self.port), *others]
        self._stopping = False  # somebody wants it to end
        self._started: "concurrent.futures.Future[subprocess.Popen[bytes]] | None" = None

    def _accepts(self, options: Sequence[str]) -> bool:
        """Whether llama-server knows these options and can read their files; --version ends it when it has looked at them."""
        command = [str(program("llama-server")), *options, "--version"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return not subprocess.run(command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode
        return True

    @property
    def _command(self) -> list[str]:
        types = ["--cache-type-k", self.k, "--cache-type-v", self.v] if self.plan is None or self.plan.cached else []
        center = ["--cache-center", str(self.center)] if self.center else []
        return [str(program("llama-server")), "-m", self._model, *types, *center, *self._options]

    def __enter__(self) -> "Server":
        try:
            self.start()
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process and returns at once."""
        if self._started is not None:
            raise TBQError("a Server runs once; make another one")
        self._launch()

    def _launch(self) -> None:
        if not self._share_port:
            check_port(self.port, self._host)
        self._started = concurrent.futures.Future()
        # On Linux the process ends with the thread that started it, so that is the one that reads the log.
        self._reader = threading.Thread(target=self._run, args=(self._started,), name="llama-server", daemon=True)
        self._reader.start()
        self.process = self._started.result()

    def _run(self, started: "concurrent.futures.Future[subprocess.Popen[bytes]]") -> None:
        try:
            process = _popen(self._command, self._environment)
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
                    del self.log[_LOG_LINES:2 * _LOG_LINES]
                if on_line:
                    try:
                        on_line(self.log[-1])
                    except Exception:  # a full pipe would stop the server
                        self._on_line = on_line = None
        process.wait()

    def wait_until_healthy(self) -> None:
        """Returns when the model is loaded; TBQError if that does not happen."""
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while deadline is None or time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                with self._open("/health", timeout=2) as answer:
                    if answer.status == 200 and self.process.poll() is None:  # not another server's
                        return
            if self.process.poll() is not None:
                if not self._starts_uncentred():
                    raise TBQError(f"llama-server {self._ending()}: {self.last_error()}")
                deadline = None if self._timeout is None else time.monotonic() + self._timeout
            time.sleep(0.05)
        raise TBQError(f"llama-server was not ready after {self._timeout:.0f} s: {self.last_error()}")

    def _starts_uncentred(self) -> bool:
        """Whether it did, because the server refused the center that was measured for it: too little memory for the context that
        was planned may give it another, and with it another RoPE."""
        self._reader.join(5)
        refusal = next((line.partition("llama_set_cache_center: ")[2] for line in self.log if "llama_set_cache_center: " in line), "")
        if self._stopping or not self._measured or not refusal:
            return False
        before = self.k, self.v
        self.center, self._measured = None, False
        self.k, self.v, self.plan = self._choose_uncentred()  # "auto" may take others for large biases
        types = "" if before == (self.k, self.v) else f"; keys are {self.k} and values {self.v} instead"
        _say(f"tbq: keys are not centred: {refusal}{types}; --no-center saves this attempt", to_stderr=True)
        self.log.clear()
        self._launch()
        if self._stopping:  # meanwhile
            self.process.terminate()
        return True

    def _open(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """The answer, to be closed, of this machine: no proxy has a part in it, and a certificate may be its own."""
        import ssl

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context()))
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}".encode().decode("latin-1")} if self._key else {})}
        return opener.open(urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode(), headers), timeout=timeout)

    def _ending(self) -> str:
        status = self.process.returncode
        return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"

    def last_error(self) -> str:
        """The line of the log that says most about a failure."""
        if self.process.poll() is not None:
            self._reader.join(5)
        for pattern in (r"(?:GGML_ASSERT|error|terminate called)\b.*", r"[\d.]+ E (.*)", r"(.*(?:error|failed|unsupported|invalid).*)"):
            for line in list(self.log):
                if match := re.match(pattern, line, re.I if pattern.endswith("*)") else 0):
                    return match[match.re.groups].strip().removeprefix("error: ")
        lines = [line for line in self.log if line.strip()]
        return re.sub(r"^[\d.]+ [A-Z] ", "", lines[-1]) if lines else "it printed nothing"

    def stop(self) -> None:
        """Ends the process, by force if it does not end within 10 seconds, and removes what was for it alone."""
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
            finally:  # also when Ctrl-C ends the wait
                if process.poll() is None:
                    process.kill()
        process.wait()

    def client(self, api_key: str | None = None, **options: Any) -> "OpenAI":
        """openai.OpenAI for this server; options are its own.  TBQError if the package is not installed.

        api_key: if None, the first that the server was started with.
        """
        try:
            import openai
        except ImportError:
            raise TBQError("client() needs the openai package: pip install 'ggml-tbq[openai]'") from None
        if "http_client" not in options:  # as in _open
            options["http_client"] = openai.DefaultHttpxClient(trust_env=False, verify=not self.url.startswith("https"))
        return openai.OpenAI(base_url=self.url + "/v1", api_key=api_key or self._key or "none", **options)

    def chat(self, question: str, **options: Any) -> dict[str, Any]:
        """The answer of /v1/chat/completions to one question, as the decoded JSON object; options go into the request.

        Waits as long as it takes.  Raises TBQError if the server refuses the request, OSError if it is gone.
        """
        if options.get("stream"):
            raise TBQError("chat() returns whole answers; client() has streams")
        try:
            with self._open("/v1/chat/completions", {"messages": [{"role": "user", "content": question}], **options}) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            with error:
                raise TBQError(f"llama-server answered {error.code}: {error.read(1000).decode(errors='replace')}") from None

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


# --- the command ----------------------------------------------------------------------------------------------------


def summary(server: Server, kv: str) -> list[str]:
    """The plan in three lines."""
    from tbq.plan import amount

    plan = server.plan
    if plan is None:
        return [f"cache: keys {server.k}, values {server.v}; its size is not known for this model"]
    head = f"model: {plan.name or pathlib.Path(plan.model).name}, {plan.architecture}, {len(plan.layers)} layers, {amount(plan.weights_bytes)} of weights"
    if not plan.cached:
        return [head, "cache: none", f"why:   {'; '.join([plan.reason, *plan.warnings])}"]
    pair = plan.pair(server.k, server.v)
    full = plan.bytes_at("f16", "f16", plan.context)
    share = f", {100 * pair.bytes / full:.0f} % of f16's {amount(full)}" if full else ""
    why = plan.reason if kv == "auto" else "as asked for" + ("" if (server.k, server.v) == plan.recommended else
                                                             f"; tbq plan would take {'/'.join(plan.recommended)}: {plan.reason}")
    return [head,
            f"cache: keys {pair.k}, values {pair.v}: {amount(pair.bytes)} for {plan.context} tokens{share}",
            f"why:   {'; '.join([why, *plan.warnings])}"]


class _Signals:
    """Passes SIGINT, SIGTERM and SIGHUP on to a server; the second one kills it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.early: int | None = None  # came before there was a process
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.server._stopping = True
        if not hasattr(self.server, "process"):
            self.early = number
        else:
            self._send(number if self.count == 1 else signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.server.process.send_signal(number)

    def started(self) -> None:
        if self.early is not None:
            self._send(self.early)


def _correction(server: Server) -> str | None:
    """If the server took another context than the plan: a GPU's memory or a file of its own settings may make it."""
    if server._capped:  # n_ctx_slot is less than the cache then
        return None
    found = re.search(r"n_slots = (\d+), n_ctx_slot = (\d+), kv_unified = '(\w+)'", "\n".join(server.log))
    if not found or server.plan is None or server.plan.context > server.plan.context_train:  # a slot is never longer than that
        return None
    context = int(found[2]) * (1 if found[3] == "true" else int(found[1]))
    size = server.plan.bytes_at(server.k, server.v, context)
    if size == server.plan.bytes_at(server.k, server.v, server.plan.context):
        return None
    from tbq.plan import amount

    return f"llama-server took a context of {context} tokens, so the cache has {amount(size)}"


def _say(text: str, to_stderr: bool = False) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone is no reason to stop serving
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def serve(model: str, kv: str, options: Sequence[str], center: bool = True) -> int:
    """Runs llama-server in the foreground; its exit status, 128 + N if signal N ended it."""
    with interruptible():
        server = Server(model, kv, center=center, port=8080, options=options, timeout=None, on_line=lambda line: _say(line, to_stderr=True))
    for line in summary(server, kv):
        _say(f"tbq: {line}")
    if ignored := sorted(name for name in os.environ if name.startswith("LLAMA_ARG_")):
        _say(f"tbq: warning: {', '.join(ignored)}: not passed on to llama-server; give it the options instead", to_stderr=True)
    signals = _Signals(server)
    with handled(INTERRUPTIONS, signals):  # what is ignored stays ignored, and the server inherits that
        server.start()
        signals.started()
        try:
            server.wait_until_healthy()
            if correction := _correction(server):
                _say(f"tbq: {correction}")
            _say(f"tbq: llama-server is up: {server.url}; Ctrl-C stops it")
            if server.process.wait() and not signals.count:
                raise TBQError(f"llama-server {server._ending()}: {server.last_error()}")
        except TBQError as error:
            if not signals.count and server.process.poll() != 0:  # --version, for example, ends well
                _say(f"tbq: error: {' '.join(str(error).split())}", to_stderr=True)
        finally:
            server.stop()
            server._reader.join(5)  # its last lines
    status = server.process.returncode
    return status if status >= 0 else 128 - status


def define(parser: argparse.ArgumentParser) -> None:
    """plan a model's cache and run llama-server with it"""
    parser.usage = "tbq serve [-h] [--kv auto|TYPE|K/V] [--no-center] MODEL [llama-server's options ...]"
    parser.epilog = ("examples: tbq serve model.gguf\n"
                     "          tbq serve --kv tbq4_0/tbq3_0 model.gguf -c 131072 --port 9000 -ngl 99\n\n"
                     "The exit status is llama-server's; LLAMA_ARG_... variables are not passed on to it.")
    parser.add_argument("--kv", default="auto", metavar="auto|TYPE|K/V",
                        help="cache types: what `tbq plan` recommends (auto, the default), one for both sides, or keys/values")
    parser.add_argument("--no-center", action="store_true", help="do not centre the keys (docs/center.md): quantized ones lose some accuracy")
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, the first one if it is split")
    rest = parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="any option of llama-server, passed on as it is")
    rest.required = False  # or it would be called missing beside MODEL

    def run(args: argparse.Namespace) -> int:
        kv, center, options, given = args.kv, not args.no_center, [], iter(args.options)
        for option in given:  # ours may come after the model too
            if option == "--kv":
                kv = next(given, "")
            elif option.startswith("--kv="):
                kv = option[len("--kv="):]
            elif option == "--no-center":
                center = False
            elif option in ("-h", "--help"):
                parser.print_help()
                return 0
            elif option != "--":
                options.append(option)
        if not kv:
            raise TBQError("--kv needs a value: auto, a type, or K/V")
        return serve(args.model, kv, options, center)

    parser.set_defaults(run=run, hint="; llama-server's options come after MODEL")
