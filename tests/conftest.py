# SPDX-License-Identifier: MIT
"""What several test files use. The tests run against the installed package, never against python/."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import pytest

import tbq
from tbq.demo import fetch_model

ROOT = pathlib.Path(__file__).resolve().parent.parent


def script(name):
    """A script of tools/ as a module. It can import the modules next to it, as when it is started."""
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tools_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


install = script("install")


def pytest_addoption(parser):
    parser.addoption(
        "--model-d128",
        type=pathlib.Path,
        metavar="GGUF",
        help="a second model, with head size 128 and K biases; its tests are skipped without",
    )


def pytest_configure(config):
    # Centers that are measured on first use go here, once for all tests, and not into the user's folder.
    config.users_cache = tempfile.TemporaryDirectory(prefix="tbq-cache-")
    os.environ["XDG_CACHE_HOME"] = config.users_cache.name
    # A shell that runs the tests in the background ignores SIGINT, and children inherit that. Ctrl-C could not be
    # tested then.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config):
    config.users_cache.cleanup()


def pytest_report_header():
    return f"tbq {tbq.__version__}: {pathlib.Path(tbq.__file__).parent}"


@pytest.fixture(scope="session")
def installed():
    """What `tbq paths --json` prints."""
    out = subprocess.run([sys.executable, "-m", "tbq", "paths", "--json"], capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


@pytest.fixture(scope="session")
def bin_dir(installed):
    """Folder of llama-server and the other programs of the wheel."""
    return pathlib.Path(installed["bin"])


@pytest.fixture(scope="session")
def lib_dir(installed):
    """Folder of libllama and the other shared libraries of the wheel."""
    return pathlib.Path(installed["lib"])


@pytest.fixture(scope="session")
def build_dir():
    """CMake's folder, with llama.cpp-src (the patched tree) and bin (llama.cpp's own tests) in it."""
    folder = install.build_dir()
    if folder is None:
        pytest.skip("this checkout was not built here (make install)")
    return folder


@pytest.fixture(scope="session")
def demo_model():
    """Path of SmolLM2-135M-Instruct, head size 64."""
    return fetch_model(ROOT / "build" / "models")


@pytest.fixture(scope="session")
def model_d128(request):
    """Path of a second model with head size 128."""
    path = request.config.getoption("--model-d128")
    if path is None:
        pytest.skip("no second model (--model-d128 GGUF)")
    if not path.is_file():
        pytest.fail(f"--model-d128 {path} does not exist")
    return path
