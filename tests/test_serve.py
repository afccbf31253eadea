"""`tbq serve` and tbq.Server: real servers, real signals."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

import tbq
from tbq.server import free_port

SMALL = ("-c", "512", "-t", "2", "--no-warmup")
ENV = {**os.environ, "OMP_WAIT_POLICY": "passive", "LLAMA_ARG_CTX_SIZE": "77"}


def serve(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "tbq", "serve", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=ENV, **options)


def until_up(process):
    """The lines up to the one that says so."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if "is up" in line:
            return lines
    raise AssertionError(f"never up: {lines}\n{process.stderr.read()[-3000:]}")


def finished(*arguments):
    process = serve(*arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(x) for x in found.split()]


def gone(pid, seconds=15):
    for _ in range(10 * seconds):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_plan_health_answer_and_end(demo_model, number):
    port = free_port()
    process = serve(demo_model, "--kv", "tbq4_0/tbq3_0", "--port", port, *SMALL)
    lines = until_up(process)
    assert len(lines) == 4 and all(line.startswith("tbq: ") for line in lines)
    assert lines[1] == "tbq: cache: keys tbq4_0, values tbq3_0: 2.6 MiB for 512 tokens, 23 % of f16's 11.2 MiB"
    assert "as asked for; tbq plan would take tbq4_0/tbq4_0: " in lines[2]
    assert lines[3] == f"tbq: llama-server is up: http://127.0.0.1:{port}; Ctrl-C stops it"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/props", timeout=10) as answer:
        assert json.load(answer)["default_generation_settings"]["n_ctx"] == 512  # not of LLAMA_ARG_CTX_SIZE
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == ""
    assert "listening" in err and "Traceback" not in err


def test_auto_takes_the_plan(demo_model):
    process = serve(demo_model, "--port", free_port(), *SMALL)
    lines = until_up(process)
    process.terminate()
    process.communicate(timeout=30)
    plan = tbq.plan(demo_model, context=512)
    assert f"keys {plan.recommended[0]}, values {plan.recommended[1]}: " in lines[1] and lines[2] == f"tbq: why:   {plan.reason}"


def test_a_server_behind_a_key_and_a_prefix(demo_model):
    port = free_port()
    process = serve(demo_model, "--port", port, "--api-key", "secret", "--api-prefix", "/models/one", *SMALL)
    assert until_up(process)[-1] == f"tbq: llama-server is up: http://127.0.0.1:{port}/models/one; Ctrl-C stops it"
    process.terminate()
    process.communicate(timeout=30)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its parent")
def test_no_orphan_after_kill(demo_model):
    process = serve(demo_model, "--port", free_port(), *SMALL)
    until_up(process)
    server, = children(process.pid)
    process.kill()
    process.wait()
    assert gone(server)


def test_the_servers_own_failure(demo_model):
    status, out, err = finished(demo_model, "--port", free_port(), "--no-such-option")
    assert status == 1 and "is up" not in out
    assert err.splitlines()[-1] == "tbq: error: llama-server ended with status 1: invalid argument: --no-such-option"


def test_mistakes_are_one_line(demo_model, tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    for arguments, what in (((tmp_path / "none.gguf",), "is not a file"), ((text,), "text.gguf"),
                            ((demo_model, "--kv", "tbq5_0"), "cache type 'tbq5_0' is not one of"),
                            ((demo_model, "--kv"), "--kv needs a value"),
                            ((demo_model, "-ctk", "f16"), "chosen with --kv"),
                            ((demo_model, "--port", "x"), "--port 'x' is not a port"),
                            ((demo_model, "--host", "a.sock"), "Unix sockets")):
        status, out, err = finished(*arguments)
        assert status == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("tbq: error: ") and what in err, (arguments, out, err)


def test_port_taken(demo_model):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        status, _, err = finished(demo_model, "--port", port)
    assert status == 2 and err.strip() == f"tbq: error: port {port} of 127.0.0.1 cannot be used (Address already in use); name another one"


# --- from Python ---------------------------------------------------------------------------------------------------


def test_server_and_its_client(demo_model):
    lines = []
    with tbq.Server(demo_model, "tbq4_0", options=[*SMALL, "--verbosity", "4"], on_line=lines.append) as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server.url)
        pair = server.plan.pair("tbq4_0", "tbq4_0")
        assert server.cache()["k_type"] == "tbq4_0" and server.cache()["mib"] == pytest.approx(pair.bytes / 2**20, abs=0.01)
        assert "Paris" in server.chat("What is the capital of France?", temperature=0, max_tokens=24)["choices"][0]["message"]["content"]
        pytest.importorskip("openai", reason="no openai package")
        answer = server.client().chat.completions.create(model="any", temperature=0, max_tokens=24,
                                                         messages=[{"role": "user", "content": "What is the capital of France?"}])
        assert "Paris" in answer.choices[0].message.content
    assert server.process.returncode == 0 and lines == server.log


def test_client_without_openai(demo_model, monkeypatch):
    server = tbq.Server(demo_model, "f16", options=SMALL)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(tbq.TBQError, match="pip install openai"):
        server.client()


def test_refused_before_anything_starts(demo_model):
    with pytest.raises(tbq.TBQError, match="chosen with --kv"):
        tbq.Server(demo_model, options=["--cache-type-k", "f16"])
    with pytest.raises(tbq.TBQError, match="is not a file"):
        tbq.Server("nowhere.gguf")
