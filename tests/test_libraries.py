# SPDX-License-Identifier: MIT
"""Another llama.cpp on the machine: tbq still finds its own libraries.

The other one is in $LD_LIBRARY_PATH, in the current folder or in the process.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from llama_tools import ENV
from tbq.demo import QUESTION

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="RPATH and LD_LIBRARY_PATH are of ELF systems"
)
#: The names of llama.cpp's own libraries, as packages of llama.cpp have them.
STOCK = ("llama", "ggml", "ggml-base", "ggml-cpu", "llama-common", "mtmd")


@pytest.fixture(scope="module")
def stock(tmp_path_factory, lib_dir):
    """A folder with libraries that have the names of llama.cpp's and of tbq's. None of them has any symbol."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for libraries without symbols")
    folder = tmp_path_factory.mktemp("stock")
    (folder / "empty.c").write_text("int stock_llama_cpp;\n", encoding="utf-8")
    names = (
        {f"lib{name}.so" for name in STOCK}
        | {f"lib{name}.so.0" for name in STOCK}
        | {path.name for path in lib_dir.glob("*.so")}
    )
    for name in sorted(names):
        subprocess.run(
            [compiler, "-shared", f"-Wl,-soname,{name}", "-o", folder / name, folder / "empty.c"], check=True
        )
    return folder


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_programs_with_others_in_the_library_path(bin_dir, stock):
    for path in sorted(bin_dir.iterdir()):
        if path.name in ("llama-results",):  # it compares two files and has no help
            continue
        done = run([path, "--help"], env={**ENV, "LD_LIBRARY_PATH": str(stock)})
        assert "undefined symbol" not in done.stderr and "usage" in (done.stdout + done.stderr).lower(), (
            f"{path.name}: {done.stderr}"
        )


ASK = """
import json, sys
import ctypes
for name in sys.argv[2:]:
    ctypes.CDLL(name)  # another llama.cpp is in the process already
from tbq.llama import Llama
model = Llama(sys.argv[1], kv="tbq4_0", n_ctx=512, n_threads=2, center=False, verbose=False)
text = model.create_completion("The capital of France is", max_tokens=4, temperature=0)["choices"][0]["text"]
with open("/proc/self/maps", encoding="utf-8") as maps:
    files = {line.split()[-1] for line in maps if "/libtbq-" in line or "/libllama" in line or "/libggml" in line}
print(json.dumps([text, sorted(files)]))
"""


@pytest.mark.parametrize("where", ("library path", "process", "current folder"))
def test_bindings_with_others(where, demo_model, stock, lib_dir, tmp_path):
    for dependency in ("diskcache", "jinja2", "typing_extensions"):
        pytest.importorskip(dependency, reason=f"{dependency} is not installed: pip install 'ggml-tbq[llama]'")
    loaded = [str(stock / f"lib{name}.so") for name in STOCK] if where == "process" else []
    environment = {**ENV, **({"LD_LIBRARY_PATH": str(stock)} if where == "library path" else {})}
    done = run(
        [sys.executable, "-c", ASK, str(demo_model), *loaded],
        env=environment,
        cwd=stock if where == "current folder" else tmp_path,
    )
    assert done.returncode == 0, done.stderr
    text, files = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in text
    others = [file for file in files if not file.startswith(str(lib_dir)) and file not in loaded]
    assert not others and f"{lib_dir}/libtbq-llama.so" in files


def test_server_in_a_folder_with_others(demo_model, stock):
    """Backends that are modules are looked for in tbq's folder, not in the current folder."""
    shutil.copy(stock / "libggml-cpu.so", stock / "libggml-cpu-haswell.so")
    import tbq

    before = os.getcwd()
    os.chdir(stock)
    try:
        with tbq.Server(demo_model, "tbq4_0", center=False, options=["-c", "512"]) as server:
            answer = server.chat(QUESTION, temperature=0, max_tokens=16)
        assert "Paris" in answer["choices"][0]["message"]["content"]
    finally:
        os.chdir(before)


def test_names_of_our_own(lib_dir):
    """Only three empty libraries have names of llama.cpp, for its bindings. Their contents are in tbq's libraries."""
    names = {path.name for path in lib_dir.glob("*.so") if not path.name.startswith("libtbq-")}
    assert {"libllama.so", "libggml.so", "libmtmd.so"} <= names
    for name in ("libllama.so", "libggml.so", "libmtmd.so"):
        dynamic = run(["readelf", "-d", lib_dir / name]).stdout
        assert "SONAME" not in dynamic and f"libtbq-{name[3:]}" in dynamic
    # with TBQ_PORTABLE the CPU backends are modules in the same folder
    assert all(name.startswith("libggml-") for name in names - {"libllama.so", "libggml.so", "libmtmd.so"})
