# SPDX-License-Identifier: MIT
"""`tbq serve` and tbq.Server: real llama-server processes on the demo model."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import pytest

import tbq
import tbq.programs.child
import tbq.programs.options
import tbq.serving.server
from llama_tools import ENV, tiny_llama
from tbq.kv_cache.calibrate import center_of_model
from tbq.kv_cache.center_file import read_center
from tbq.serving.address import free_port

SMALL = ("-c", "512", "-t", "2", "--no-warmup")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's /proc and PR_SET_PDEATHSIG")


@pytest.fixture(autouse=True, scope="module")
def measured(demo_model):
    """The means of the keys for the contexts of these tests.

    They take about 3 seconds, and otherwise a test would wait for them.
    """
    center_of_model(demo_model, 512)


@pytest.fixture(autouse=True)
def waiting_threads_sleep(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", ENV["OMP_WAIT_POLICY"])


class Serve:
    """A `tbq serve` process. What it has printed so far is in out and err."""

    def __init__(self, *arguments, env=None, without=(), become=(), **popen):
        # tbq serve passes no LLAMA_ARG_ on, and says so
        without = {*without, "LLAMA_ARG_CACHE_CENTER"}
        environment = {name: value for name, value in {**ENV, **(env or {})}.items() if name not in without}
        self.process = subprocess.Popen(
            [*become, sys.executable, "-m", "tbq", "serve", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **popen,
        )
        self.out, self.err = [], []
        self.readers = [
            threading.Thread(target=lambda to=to, stream=stream: to.extend(stream), daemon=True)
            for to, stream in ((self.out, self.process.stdout), (self.err, self.process.stderr))
        ]
        for reader in self.readers:
            reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.process.pid, *self.children]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def children(self):
        return children(self.process.pid)

    def until(self, text, stream="out", seconds=60):
        wait_for(
            lambda: any(text in line for line in getattr(self, stream)) or self.process.poll() is not None, seconds
        )
        assert any(text in line for line in getattr(self, stream)), (
            f"status {self.process.poll()}\n{''.join(self.out)}{''.join(self.err)}"
        )
        return self

    def end(self, seconds=30):
        status = self.process.wait(seconds)
        for reader in self.readers:
            reader.join(10)
        assert "Traceback" not in "".join(self.err)
        return status


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def children(pid):
    """The state of a process, on Linux."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def running(pid):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def post(url, body, **headers):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return json.load(answer)


# --- the command ----------------------------------------------------------------------------------------------------


def test_serves(demo_model):
    """The plan in three lines, the server's log on stderr, answers with a key under a prefix, the status at the end."""
    port = free_port()
    with Serve(
        demo_model,
        "--kv",
        "tbq4_0/tbq3_0",
        "-c",
        2048,
        "-np",
        2,
        "-t",
        2,
        "--port",
        port,
        "--api-key",
        "a,b",
        "--api-prefix",
        "/x/y",
        "-lv",
        4,
    ) as served:
        served.until("is up")
        assert served.out[-1] == f"tbq: llama-server is up: http://127.0.0.1:{port}/x/y; Ctrl-C stops it\n"
        assert len(served.out) == 4 and all(line.startswith("tbq: ") for line in served.out)
        assert served.out[1] == (
            "tbq: cache: keys tbq4_0, values tbq3_0: 14.0 MiB for 2048 tokens, 3.5 MiB of them exact rows, "
            "31 % of f16's 45.0 MiB\n"
        )
        question = {
            "messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
            "temperature": 0,
            "max_tokens": 16,
        }
        url = f"http://127.0.0.1:{port}/x/y/v1/chat/completions"
        assert "Paris" in post(url, question, Authorization="Bearer b")["choices"][0]["message"]["content"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(url, question)
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 0
    log = "".join(served.err)
    assert re.search(r"size = +10\.55 MiB.*K \(tbq4_0\): .*V \(tbq3_0\):", log), (
        "the plan's bytes are not those that were allocated"
    )
    assert "cleaning up before exit" in log
    assert "tbq: error" not in log


def test_auto(demo_model):
    with Serve(demo_model, *SMALL, "-c", 8192, "--port", 0) as served:
        served.until("is up")
        assert "keys tbq4_0, values tbq4_0: 54.2 MiB for 8192 tokens" in served.out[1]
        assert served.out[2].startswith("tbq: why:   ")
        served.process.send_signal(signal.SIGINT)
        assert served.end() == 0


def test_another_context_than_planned(demo_model, tmp_path):
    """llama-server may read its settings from a file. The memory of a GPU can change the context too."""
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "config.ini").write_text("ctx-size = 777\n")
    with Serve(
        demo_model, "-t", 2, "--no-warmup", "--kv", "tbq4_0", "--port", 0, env={"XDG_CONFIG_HOME": str(tmp_path)}
    ) as served:
        served.until("is up")
        assert "54.2 MiB for 8192 tokens" in served.out[1]
        assert served.out[3] == "tbq: llama-server took a context of 1024 tokens, so the cache has 12.4 MiB\n"


def test_a_run_that_ends_by_itself(demo_model):
    with Serve(demo_model, "--kv", "tbq4_0", "--port", 0, "--version") as served:
        assert served.end() == 0 and "tbq: error" not in "".join(served.err)


@linux
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_signal_while_loading(demo_model, number):
    """llama-server has no signal handlers yet, so the signal ends it."""
    with Serve(demo_model, *SMALL, "--kv", "tbq4_0", "--port", 0) as served:
        served.until("tbq: why")
        wait_for(lambda: served.children or served.process.poll() is not None)
        children = served.children
        served.process.send_signal(number)
        assert served.end() in (0, 128 + number)
        assert not any(map(running, children))


@linux
def test_second_signal_kills(demo_model):
    with Serve(demo_model, *SMALL, "--kv", "tbq4_0", "--port", 0) as served:
        served.until("is up")
        (child,) = served.children
        os.kill(child, signal.SIGSTOP)  # it cannot react to the first signal
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert served.process.poll() is None and running(child)
        served.process.send_signal(signal.SIGINT)
        assert served.end(10) == 128 + signal.SIGKILL
        assert not running(child)


@linux
def test_no_orphan_when_killed(demo_model):
    with Serve(demo_model, *SMALL, "--kv", "tbq4_0", "--port", 0) as served:
        served.until("is up")
        (child,) = served.children
        os.kill(child, signal.SIGSTOP)  # a server that hangs does not remain either
        served.process.kill()
        wait_for(lambda: not running(child), 10)


@linux
def test_status_of_a_server_that_is_killed(demo_model):
    with Serve(demo_model, *SMALL, "--kv", "tbq4_0", "--port", 0) as served:
        served.until("is up")
        os.kill(*served.children, signal.SIGKILL)
        assert served.end() == 128 + signal.SIGKILL
        assert any(line.startswith("tbq: error: llama-server was ended by SIGKILL: ") for line in served.err)


@linux
def test_nohup(demo_model):
    """SIGHUP stays ignored if it was ignored before."""
    with Serve(
        demo_model,
        *SMALL,
        "--kv",
        "tbq4_0",
        "--port",
        0,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as served:
        served.until("is up")
        served.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert served.process.poll() is None and len(served.children) == 1


def test_nobody_reads(demo_model):
    """The server goes on when its terminal is gone."""
    port, out, err = free_port(), os.pipe(), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "tbq", "serve", demo_model, *SMALL, "--kv", "tbq4_0", "--port", str(port)],
        env=ENV,
        stdin=subprocess.DEVNULL,
        stdout=out[1],
        stderr=err[1],
    )
    for end in (*out, *err):
        os.close(end)

    def healthy():
        assert process.poll() is None
        with contextlib.suppress(OSError):
            return (
                urllib.request.build_opener(urllib.request.ProxyHandler({}))
                .open(f"http://127.0.0.1:{port}/health", timeout=5)
                .status
                == 200
            )

    try:
        wait_for(healthy)
        time.sleep(0.5)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_variables_for_other_servers(demo_model):
    with Serve(
        demo_model,
        *SMALL,
        "--kv",
        "tbq4_0",
        "--port",
        0,
        env={
            "LLAMA_ARG_CTX_SIZE": "77",
            "LLAMA_ARG_API_PREFIX": "/z",
            "LLAMA_API_KEY": "k",
            "http_proxy": "http://127.0.0.1:9",
        },
    ) as served:
        served.until("is up")
        served.until("tbq: warning: LLAMA_ARG_API_PREFIX, LLAMA_ARG_CTX_SIZE: not passed on", "err")
        url = re.search(r"http://\S+(?=;)", served.out[-1])[0]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(url + "/tokenize", {"content": "a"})
        assert post(url + "/tokenize", {"content": "a"}, Authorization="Bearer k")["tokens"]


@pytest.fixture(scope="module")
def head_80(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "head80.gguf", head=80, layers=1)


ERRORS = {
    "missing model": (["{tmp}/nosuch.gguf"], 2, "model '{tmp}/nosuch.gguf' is not a file"),
    "no GGUF, auto": (["{text}"], 2, "{text} is not a GGUF file"),
    "no GGUF": (
        ["{text}", "--kv", "tbq4_0"],
        1,
        "llama-server ended with status 1: gguf_init_from_reader: invalid magic characters",
    ),
    "truncated": (["{short}", "--kv", "tbq4_0"], 1, "llama-server ended with status 1: "),
    "unknown type": (["{model}", "--kv", "fly"], 2, "cache type 'fly' is not one of tbq2_0, tbq3_0, tbq4_0, "),
    "unknown value type": (["{model}", "--kv", "tbq4_0/fly"], 2, "cache type 'fly' is not one of "),
    "no type": (["{model}", "--kv"], 2, "--kv needs a value"),
    "refused type": (
        ["{head_80}", "--kv", "tbq4_0"],
        2,
        "cache tbq4_0/tbq4_0 is refused: tbq4_0 has blocks of 64 values, which do not divide the key head size 80",
    ),
    "no flash attention": (
        ["{model}", "--kv", "tbq4_0", "-fa", "off"],
        2,
        "cache tbq4_0/tbq4_0 is refused: values of tbq4_0 need flash attention: -fa off",
    ),
    "server's refusal": (
        ["{model}", "--kv", "tbq4_0", "--lora", "{text}"],
        1,
        "llama-server ended with status 1: gguf_init_from_reader: invalid magic characters",
    ),
    "unknown option": (["{model}", "--nosuch"], 1, "llama-server ended with status 1: invalid argument: --nosuch"),
    "no adapter": (["{model}", "--lora", "{text},{tmp}/nosuch"], 2, "--lora '{tmp}/nosuch' is not a file"),
    "no projector": (["{model}", "--mmproj", "{tmp}/nosuch"], 2, "--mmproj '{tmp}/nosuch' is not a file"),
    "no draft": (["{model}", "--model_draft", "nosuch"], 2, "--model_draft 'nosuch' is not a file"),
    "no pages": (["{model}", "--path", "{text}"], 2, "--path '{text}' is not a folder"),
    "no certificate": (
        ["{model}", "--ssl-key-file", "{text}", "--ssl-cert-file", "nosuch"],
        2,
        "--ssl-cert-file 'nosuch' is not a file",
    ),
    "half of TLS": (
        ["{model}", "--ssl-key-file", "{text}"],
        2,
        "--ssl-key-file without --ssl-cert-file: llama-server would serve without TLS",
    ),
    "no keys": (["{model}", "--kv", "tbq4_0", "--api-key-file", "nosuch"], 1, "llama-server ended with status 1: "),
    "types twice": (["{model}", "-ctk", "f16"], 2, "cache types are chosen with --kv"),
    "two models": (["{model}", "-m", "other.gguf"], 2, "there are two models, '{model}' and 'other.gguf'"),
    "taken port": (
        ["{model}", "--port", "{taken}"],
        2,
        "port {taken} of 127.0.0.1 cannot be used (Address already in use); name another one",
    ),
    "no port": (["{model}", "--port", "http"], 2, "port 'http' is not a number from 1 to 65535"),
    "large port": (["{model}", "--port", "65536"], 2, "port '65536' is not a number from 1 to 65535"),
    "half an option": (["{model}", "--port"], 2, "--port needs a value"),
    "socket": (["{model}", "--host", "{tmp}/a.sock"], 2, "host '{tmp}/a.sock' has no address with a port"),
    "foreign host": (["{model}", "--host", "192.0.2.1"], 2, "host '192.0.2.1' is not an address of this machine"),
    "unknown host": (
        ["{model}", "--host", "no.such.invalid"],
        2,
        "host 'no.such.invalid' is not an address of this machine",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case, demo_model, head_80, tmp_path):
    (tmp_path / "text.gguf").write_text("# no model\n")
    (tmp_path / "short.gguf").write_bytes(demo_model.read_bytes()[:5_000_000])
    arguments, status, message = ERRORS[case]
    if case == "half of TLS" and tbq.paths()["tls"] == "no":
        message = "--ssl-key-file and --ssl-cert-file: this llama-server is built without TLS"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {
            "tmp": tmp_path,
            "text": tmp_path / "text.gguf",
            "short": tmp_path / "short.gguf",
            "model": demo_model,
            "head_80": head_80,
            "taken": taken.getsockname()[1],
        }
        arguments = [argument.format(**names) for argument in arguments]
        if "--port" not in arguments:
            arguments[1:1] = ["--port", "0"]
        with Serve(*arguments, cwd=tmp_path) as served:
            assert served.end(60) == status, served.err
    assert served.err[-1].startswith("tbq: error: " + message.format(**names))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.gguf", "text.gguf"]


# --- Server ---------------------------------------------------------------------------------------------------------


def test_server_and_client(demo_model, monkeypatch):
    """Neither the wait nor the client uses a proxy, and the client knows the key."""
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'ggml-tbq[openai]'")
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with tbq.Server(demo_model, "tbq4_0/tbq3_0", timeout=60, options=[*SMALL, "--api-key", "secret"]) as server:
        assert (server.k, server.v) == ("tbq4_0", "tbq3_0")
        pair = server.plan.pair("tbq4_0", "tbq3_0")
        assert pair.k_bytes + pair.v_bytes == 512 * 30 * 3 * (34 + 26)
        assert pair.exact_bytes == (512 + 1) * 2 * 30 * 3 * 68  # no more than the cache has cells, and one
        ask = {
            "model": "any",
            "temperature": 0,
            "max_tokens": 16,
            "messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        }
        with server.client() as client:
            answer = client.chat.completions.create(**ask)
        assert "Paris" in answer.choices[0].message.content
        assert (
            "Paris"
            in server.chat(ask["messages"][0]["content"], temperature=0, max_tokens=16)["choices"][0]["message"][
                "content"
            ]
        )
        with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(**ask)
        with pytest.raises(tbq.TBQError, match="llama-server answered 400: "):
            server.chat("Hello", max_tokens="many")
        with pytest.raises(tbq.TBQError, match="runs once"):
            server.start()
    assert server.process.poll() == 0


def test_client_without_openai(demo_model, monkeypatch):
    server = tbq.Server(demo_model, "tbq4_0")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(tbq.TBQError, match=r"pip install 'ggml-tbq\[openai\]'"):
        server.client()
    server.stop()  # a server that was never started


def test_started_by_a_thread_that_ends(demo_model, monkeypatch):
    """On Linux a process may end with the thread that started it, and an error in on_line must not stop the server."""
    monkeypatch.setattr(tbq.serving.server, "_LOG_LINES", 5)
    seen = []

    def on_line(line):
        seen.append(line)
        raise RuntimeError

    server = tbq.Server(demo_model, "tbq4_0", timeout=60, options=[*SMALL, "-lv", "5"], on_line=on_line)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        server.wait_until_healthy()
        time.sleep(0.5)
        assert server.process.poll() is None
        assert server.chat("Hello", max_tokens=1)["usage"]["completion_tokens"] == 1
        assert len(seen) == 1 and server.log[0] == seen[0] and len(server.log) < 15
    finally:
        server.stop()


def test_server_that_is_not_ready_in_time(demo_model):
    with (
        pytest.raises(tbq.TBQError, match="not ready after 0 s"),
        tbq.Server(demo_model, "tbq4_0", options=SMALL, timeout=0.01) as server,
    ):
        pass
    assert "server" not in locals() or server.process.poll() is not None


@pytest.mark.parametrize(
    "arguments, message",
    (
        ({"model": 7}, "model 7 and kv 'auto' must be"),
        ({"kv": None}, "and kv None must be"),
        ({"options": "-c 512"}, "options '-c 512' must be a list of strings"),
        ({"options": ["-c", 512]}, "must be a list of strings"),
        ({"port": -1}, "port '-1' is not a number"),
    ),
)
def test_wrong_arguments(demo_model, arguments, message):
    with pytest.raises(tbq.TBQError, match=re.escape(message)):
        tbq.Server(**{"model": demo_model, **arguments})


@pytest.mark.parametrize(
    "options, url",
    (
        ([], "http://127.0.0.1:9000"),
        (["--host", "0.0.0.0"], "http://127.0.0.1:9000"),
        (["--host", "/tmp/a.sock, ::1"], "http://[::1]:9000"),
        (["--port", "9001", "--api_prefix", "/x/"], "http://127.0.0.1:9001/x"),
        (["--ssl-key-file", "k", "--ssl-cert-file", "c"], "https://127.0.0.1:9000"),
    ),
)
def test_url(demo_model, options, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tbq.serving.server, "paths", lambda: {"tls": "yes"})
    for name in "kc":
        (tmp_path / name).write_text("")
    server = tbq.Server(demo_model, "tbq4_0", port=9000, options=options)
    assert server.url == url
    assert server._command.count("--port") == server._command.count("--host") == 1


def test_key_file(demo_model, tmp_path):
    (tmp_path / "keys").write_text("# ours\nsecret\n")
    with tbq.Server(
        demo_model,
        "tbq4_0",
        timeout=60,
        options=[*SMALL, "--api-key-file", str(tmp_path / "keys"), "--api-prefix", "/p"],
    ) as server:
        assert server.chat("Hello", max_tokens=1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "options, shape",
    (
        ([], {"context": None, "unified": True, "swa_full": False}),
        (
            ["-c", "0", "-np", "-1", "-no-kvu"],
            {"context": None, "unified": True, "swa_full": False},
        ),  # server.cpp: with its default number of slots, the slots share a cache
        (["-np", "2", "-kvu", "-no-kvu"], {"context": None, "unified": False, "swa_full": False, "parallel": 2}),
        (["--kv-unified-per-slot", "512"], {"context": 2048, "unified": True, "swa_full": False}),
        (
            ["-c", "1", "--ctx-size", "4096", "-np", "2", "-ub", "64", "--swa-full"],
            {"context": 4096, "unified": False, "swa_full": True, "parallel": 2, "ubatch": 64},
        ),
        (["-b", "64"], {"context": None, "unified": True, "swa_full": False, "ubatch": 64}),
        (
            ["--batch-size", "4096", "-ub", "1024"],
            {"context": None, "unified": True, "swa_full": False, "ubatch": 1024},
        ),
        (["--parallel", "2", "-kvu"], {"context": None, "unified": True, "swa_full": False, "parallel": 2}),
        (
            ["--cache-recent", "0", "--cache-first", "1", "--cache-first", "x"],
            {"context": None, "unified": True, "swa_full": False, "recent": 0},
        ),
    ),
)
def test_options_for_the_plan(options, shape):
    assert tbq.programs.options.plan_arguments(tbq.programs.options.server_options(options)[0]) == shape


@linux
def test_interrupted_before_it_is_llama_server():
    """For some milliseconds a Python asks for the death signal. Ctrl-C ends it too without a traceback."""
    ends = []

    def interrupt():
        for delay in range(48):
            process = tbq.programs.child.start_child([shutil.which("sleep"), "30"], os.environ)
            time.sleep(delay / 2000)
            process.send_signal(signal.SIGINT)
            ends.append((process.communicate(timeout=30)[0], process.returncode))

    thread = threading.Thread(target=interrupt)
    thread.start()
    thread.join()
    assert ends == [(b"", -signal.SIGINT)] * 48


def test_keys_are_centered(demo_model, tmp_path, monkeypatch):
    """The center is measured on first use, which one line says.

    Nothing is measured for keys of 16 bits, with --no-center, or if the user names a file.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    for first, arguments in (
        (True, ("--kv", "tbq4_0", demo_model)),
        (False, ("--kv", "q4_0", demo_model)),
        (None, ("--no-center", "--kv", "tbq4_0", demo_model)),
        (None, ("--kv", "tbq4_0", demo_model, "--no-center")),
        (None, ("--kv", "f16/tbq4_0", demo_model)),
    ):
        with Serve(*arguments, *SMALL, "--port", str(free_port()), "-lv", "4", env=environment) as serve:
            serve.until("llama-server is up", seconds=120)
            log = "".join(serve.err)
            assert ("tbq: measuring the mean of the keys" in log) == bool(first)
            assert ("keys are stored minus their means" in log) == (first is not None)
            serve.process.send_signal(signal.SIGTERM)
            serve.end()
    center = next((tmp_path / "ggml-tbq" / "centers").iterdir())
    server = prepared(demo_model, options=[*SMALL, "--cache-center", str(center)])
    assert server.center is None and server._command.count("--cache-center") == 1
    assert prepared(demo_model, options=[*SMALL, "--cache-center", "auto"])._command[-2:] == ["--cache-center", "auto"]
    assert prepared(demo_model, options=SMALL).center == center
    server = prepared(demo_model, center=False, options=SMALL)
    assert server.center is None and "--cache-center none" in " ".join(server._command)
    assert prepared(demo_model, center=center, options=SMALL).center == center


def prepared(model, **arguments):
    server = tbq.Server(model, "tbq4_0", **arguments)
    server.prepare()
    return server


def test_preparing_again_after_an_interruption(demo_model, monkeypatch):
    """What was not measured to its end is measured by the next start, never left out in silence."""
    server = tbq.Server(demo_model, "tbq4_0", options=SMALL)
    with monkeypatch.context() as patched:

        def interrupted(*_):
            raise KeyboardInterrupt

        patched.setattr(tbq.serving.server, "center_file_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.prepare()
    server.prepare()
    assert server.center


def test_a_center_that_is_not_there(demo_model):
    with pytest.raises((tbq.TBQError, OSError), match="nosuch"):
        tbq.Server(demo_model, "tbq4_0", center="nosuch.gguf", options=SMALL)


def test_center_that_is_refused(demo_model, tmp_path, monkeypatch):
    """llama-server refuses a center of another RoPE.

    If tbq chose it, the server runs without a center; if the user named it, that is an error.  Here the file has the
    right name and another RoPE.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours, other = center_of_model(demo_model, 512), center_of_model(demo_model, 512, ["--rope-freq-base", "5000"])
    os.replace(other, ours)
    with Serve(
        "--kv", "tbq4_0", demo_model, *SMALL, "--port", str(free_port()), env={"XDG_CACHE_HOME": str(tmp_path)}
    ) as serve:
        serve.until("llama-server is up")
        assert (
            sum("tbq: keys are not centered" in line and "measured with another RoPE" in line for line in serve.err)
            == 1
        )
    with tbq.Server(demo_model, "auto", options=SMALL) as server:
        assert server.center is None and server.chat("Hello", max_tokens=2)["choices"]
    with (
        pytest.raises(tbq.TBQError, match="measured with another RoPE"),
        tbq.Server(demo_model, "tbq4_0", center=ours, options=SMALL),
    ):
        pass


def test_keys_that_cannot_be_centered(tmp_path):
    """One line on stderr, and the server runs."""
    from test_plan import gemma2

    with Serve("--kv", "q8_0", gemma2(tmp_path / "model.gguf"), *SMALL, "--port", str(free_port())) as serve:
        serve.until("llama-server is up")
        assert [line for line in serve.err if line.startswith("tbq: keys are not centered: ") and "soft-cap" in line]


# --- models without a cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ("auto", "tbq4_0/tbq3_0"))
def test_embedding_model(tmp_path, kv):
    """There are no cache types, a line says why, and embeddings work."""
    from test_plan import bert

    with Serve("--kv", kv, bert(tmp_path / "model.gguf"), "-t", 2, "--embedding", "--port", 0) as served:
        served.until("is up")
        assert served.out[1] == "tbq: cache: none\n"
        assert (
            served.out[2]
            == "tbq: why:   a model of architecture 'bert' keeps no keys and values, so there are no types to choose\n"
        )
        url = re.search(r"http://\S+(?=;)", served.out[-1])[0]
        vector = post(url + "/embedding", {"content": "Hello"})[0]["embedding"][0]
        assert len(vector) == 128 and any(vector)
        command = (
            pathlib.Path(f"/proc/{served.children[0]}/cmdline").read_text() if sys.platform.startswith("linux") else ""
        )
        assert "cache-type" not in command and not any("centered" in line or "measuring" in line for line in served.err)
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 0


def test_recurrent_model(tmp_path):
    """The model has a state but no keys and values. The names of types are checked nevertheless."""
    from test_plan import mamba

    model = mamba(tmp_path / "model.gguf")
    with tbq.Server(model, timeout=60, options=["-t", "2"]) as server:
        assert (server.k, server.v, server.center) == ("f16", "f16", None) and not server.plan.cached
        assert not any("cache-type" in part for part in server._command)
        assert server.chat("Hello", max_tokens=2)["usage"]["completion_tokens"] == 2
    with pytest.raises(tbq.TBQError, match="cache type 'fly' is not one of"):
        tbq.Server(model, "fly")


# --- one center for a range of contexts -----------------------------------------------------------------------------


def answer(url, prompt, **options):
    return post(url + "/completion", {"prompt": prompt, "n_predict": 12, "temperature": 0, "id_slot": 0, **options})


def test_slots_of_another_context(demo_model, tmp_path):
    """A slot that was saved under one -c is restored under another, and continues with the same text."""
    prompt, shared = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is", {}
    for context in (2048, 4096):
        with tbq.Server(
            demo_model,
            "tbq4_0",
            timeout=60,
            options=["-c", str(context), "-np", "1", "-t", "2", "--no-warmup", "--slot-save-path", str(tmp_path)],
        ) as server:
            if not shared:
                shared = {"center": server.center, "text": answer(server.url, prompt)["content"]}
                answer(server.url, prompt, n_predict=0)
                assert post(server.url + "/slots/0?action=save", {"filename": "slot"})["n_saved"] > 10
            else:
                assert server.center == shared["center"]
                assert post(server.url + "/slots/0?action=restore", {"filename": "slot"})["n_restored"] > 10
                again = answer(server.url, prompt)
                assert again["content"] == shared["text"] and again["timings"]["cache_n"] > 10


@pytest.mark.parametrize(
    "options, positions",
    (
        (["-c", "16384"], 8192),  # a slot has no more tokens than the model was trained for
        (["-c", "16384", "--rope-scaling", "yarn", "--rope-scale", "4"], 16384),
        (["-c", "65536", "-np", "2", "--rope-scaling", "yarn", "--rope-scale", "4"], 32768),
        (["-c", "65536", "--rope-scaling", "yarn", "--rope-scale", "4", "--kv-unified-per-slot", "12000"], 12000),
        (["-c", "16384", "--override-kv", "llama.context_length=int:16384"], 16384),
        (["--rope-scale", "2"], 8192),
        (["-c", "1024", "-np", "4"], 256),
    ),
)
def test_positions_of_the_slots(demo_model, options, positions, monkeypatch):
    """The context of the center is that of a slot of llama-server, whatever the file says."""
    asked = []
    monkeypatch.setattr(tbq.serving.server, "center_file_for", lambda model, k, context, *rest: asked.append(context))
    server = tbq.Server(demo_model, "tbq4_0", timeout=100, options=[*options, "-t", "2", "--no-warmup"])
    server.prepare()
    assert asked == [positions]
    server.k = server.v = "tbq2_0"  # less memory for the same slots
    with server:
        assert re.search(rf"n_ctx_slot = {positions},", "\n".join(server.log))


def test_center_of_a_stretched_context(demo_model):
    """The center is measured with the RoPE of the options and over its positions, and the server accepts it."""
    options = ["-c", "32768", "--rope-scaling", "yarn", "--rope-scale", "4", "-t", "2", "--no-warmup"]
    with tbq.Server(demo_model, "tbq2_0", timeout=200, options=options) as server:
        assert read_center(server.center).context > 8192
        assert server.chat("Hello", max_tokens=2)["usage"]["completion_tokens"]


# --- before anything is measured ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build, refused", (({"tls": "no"}, True), ({"tls": "yes"}, False), ({}, False)))
def test_tls(demo_model, tmp_path, monkeypatch, build, refused):
    """A build without TLS says so at once. If it is not known whether the build has TLS, llama-server says it."""
    monkeypatch.setattr(tbq.serving.server, "paths", lambda: build)
    for name in ("key", "certificate"):
        (tmp_path / name).write_text("")
    options = ["--ssl-key-file", str(tmp_path / "key"), "--ssl-cert-file", str(tmp_path / "certificate")]
    if refused:
        with pytest.raises(tbq.TBQError, match="this llama-server is built without TLS"):
            tbq.Server(demo_model, "tbq4_0", options=options)
    else:
        assert tbq.Server(demo_model, "tbq4_0", options=options).url.startswith("https://")


def test_https(demo_model, tmp_path):
    """Requests over TLS, from server.client() and from a client that checks the certificate."""
    if tbq.paths()["tls"] != "yes":
        pytest.skip("this llama-server was built without OpenSSL's headers")
    if shutil.which("openssl") is None:
        pytest.skip("the program openssl, which makes a certificate, is not installed")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    options = ["-c", "512", "--ssl-key-file", str(key), "--ssl-cert-file", str(certificate)]
    with tbq.Server(demo_model, "tbq4_0", center=False, options=options) as server:
        assert server.url.startswith("https://")
        assert server.chat("Hello", max_tokens=2)["choices"]
        with urllib.request.urlopen(
            f"{server.url}/health", context=ssl.create_default_context(cafile=certificate)
        ) as answer:
            assert answer.status == 200


def test_nothing_is_measured_for_options_that_are_refused(demo_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for options in (["--nosuch"], ["--api-key-file", "nosuch"], ["-c"], ["--grammar-file", "nosuch"]):
        with pytest.raises(tbq.TBQError), tbq.Server(demo_model, "tbq4_0", options=options):
            pass
    assert not list(tmp_path.iterdir()) and "measuring" not in capfd.readouterr().err


def test_threads_in_a_container(demo_model, monkeypatch):
    """Without -t llama-server would start a thread for each core of the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for quota, options, threads in (
        (2.5, [], ["-t", "3"]),
        (2.5, ["--threads", "5"], []),
        (12.0, [], []),
        (None, [], []),
    ):
        monkeypatch.setattr("tbq._limits.cpus", lambda: quota)
        command = tbq.Server(demo_model, "f16", options=options)._command
        assert command[command.index("-t") : command.index("-t") + 2] == threads if threads else "-t" not in command


# --- users without a folder -----------------------------------------------------------------------------------------


def folders_of(pid):
    return [path for path in pathlib.Path(tempfile.gettempdir()).glob("tbq-????????") if path.stat().st_uid == pid]


@linux
def test_user_without_an_entry_or_a_home(demo_model):
    """A container that was started with a bare user id can serve, and its center lasts as long as the server."""
    user, setpriv = 54321, shutil.which("setpriv")
    if os.getuid() or not setpriv:
        pytest.skip("only root can become a user who has no entry in passwd, with setpriv")
    # reads everything, as a container's user can; on this machine Python may be in a folder that only root can read
    become = [
        setpriv,
        "--reuid",
        str(user),
        "--regid",
        str(user),
        "--clear-groups",
        "--inh-caps",
        "+dac_read_search",
        "--ambient-caps",
        "+dac_read_search",
    ]
    environment = {
        name: value
        for name, value in ENV.items()
        if not name.startswith("XDG_") and name not in ("HOME", "USER", "LOGNAME")
    }
    with Serve(
        demo_model,
        *SMALL,
        "--kv",
        "tbq4_0",
        "--port",
        0,
        become=become,
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        without=set(ENV) - set(environment),
    ) as served:
        served.until("is up", seconds=120)
        lines = [line for line in served.err if line.startswith("tbq: ")]
        assert (
            len(lines) == 1
            and "at each start, because it cannot be kept (the user has no folder for caches" in lines[0]
        )
        assert len([path for folder in folders_of(user) for path in folder.glob("*.gguf")]) == 1
        assert post(re.search(r"http://\S+(?=;)", served.out[-1])[0] + "/completion", {"prompt": "a", "n_predict": 1})[
            "content"
        ]
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 0
    assert not folders_of(user)


def test_center_in_a_temporary_folder(demo_model, tmp_path, monkeypatch, capfd):
    """The folder exists while the server lives. It is gone after stop(), also for a server that never started."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with tbq.Server(demo_model, "tbq4_0", timeout=60, options=SMALL) as server:
        assert server.center.is_file() and str(server.center) in server._command
        assert server.chat("Hello", max_tokens=1)["usage"]["completion_tokens"] == 1
    assert not server.center.parent.exists()
    assert capfd.readouterr().err.count("tbq: ") == 1
    never = tbq.Server(demo_model, "tbq4_0", options=SMALL)
    never.prepare()
    assert never.center.is_file()
    never.stop()
    assert not never.center.parent.exists()
