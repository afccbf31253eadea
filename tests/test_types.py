# SPDX-License-Identifier: MIT
"""mypy in strict mode: the package, and a user's program against the installed package."""

import ast
import subprocess
import sys

import pytest

from conftest import ROOT
from tbq import _ffi

#: Optional imports of the package that mypy reads.
OPTIONAL = {"matplotlib": "plot", "openai": "openai"}


def needs(name, extra):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'ggml-tbq[{extra}]'")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


def mypy(folder, cache, *arguments):
    needs("mypy", "test")
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", cache, *arguments], cwd=folder, capture_output=True, text=True
    )


def test_package_but_for_hf(cache):
    """The part that can be checked without torch."""
    for name, extra in OPTIONAL.items():
        needs(name, extra)
    done = mypy(ROOT, cache, "--exclude", "_vendor", "--exclude", "tbq/hf/", "--exclude", "tbq/vllm/")
    assert done.returncode == 0, done.stdout + done.stderr


def test_package(cache):
    for name, extra in {**OPTIONAL, "torch": "hf"}.items():
        needs(name, extra)
    done = mypy(ROOT, cache)
    assert done.returncode == 0, done.stdout + done.stderr


def test_users_program(cache, tmp_path):
    """The annotations reach users: py.typed and the stub are installed."""
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\nimport tbq\n"
        'reveal_type(tbq.quantize(np.ones((2, 64), np.float32), "tbq4_0", kv=True).dtype)\n'
        'reveal_type(tbq.row_bytes(64, "tbq4_0"))\n'
        'reveal_type(tbq.types["tbq4_0"].levels)\n'
        "tbq.quantize(np.ones(64), 4)\n"
    )
    done = mypy(tmp_path, cache, "--strict", "program.py")
    said = done.stdout.replace("builtins.", "")
    assert 'note: Revealed type is "int"' in said and 'note: Revealed type is "tuple[int, ...]"' in said, said
    assert "unsignedinteger" in said or "uint8" in said
    assert (
        'error: Argument 2 to "quantize" has incompatible type "int"; expected "str"' in said
        and "Found 1 error" in said
    ), said


def test_stub_has_the_names_of_the_compiled_module():
    stub = ast.parse((ROOT / "python" / "tbq" / "_ffi.pyi").read_text(encoding="utf-8"))
    lib = next(node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "Lib")
    names = {node.target.id if isinstance(node, ast.AnnAssign) else node.name for node in lib.body}
    assert names == set(dir(_ffi.lib))
    parameters = {node.name: len(node.args.args) - 1 for node in lib.body if isinstance(node, ast.FunctionDef)}
    for name, count in parameters.items():
        assert len(_ffi.ffi.typeof(getattr(_ffi.lib, name)).args) == count, name
