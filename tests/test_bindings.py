# SPDX-License-Identifier: MIT
"""llama-cpp-python without changes works with the libraries of this package: one pin serves both."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, script

SCRIPT = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, type_k=644, type_v=643, flash_attn=True, verbose=True)
question = "What is the capital of France? Answer in one sentence."
answer = model.create_chat_completion([{"role": "user", "content": question}], max_tokens=24, temperature=0)
print(json.dumps(answer["choices"][0]["message"]["content"]))
"""


@pytest.fixture(scope="module")
def bindings():
    """A folder with the bindings only, installed once from the pin."""
    folder = ROOT / "build" / "bindings"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pin = script("patch_series")
        sdist = pin.fetch_sdist(pin.read_pin())
        result = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--target", folder, sdist],
            capture_output=True,
            text=True,
            env={**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        (folder / "complete").touch()
    return folder


def test_bindings(bindings, lib_dir, demo_model):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, demo_model],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(bindings), "LLAMA_CPP_LIB_PATH": str(lib_dir)},
    )
    assert result.returncode == 0, result.stderr
    assert "K (tbq4_0):" in result.stderr and "V (tbq3_0):" in result.stderr
    assert "Paris" in json.loads(result.stdout.splitlines()[-1])
