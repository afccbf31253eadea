"""llama-cpp-python, unchanged, on our libraries: one pin serves both."""
import json
import os
import subprocess
import sys

import pytest

from conftest import script

for needed in ("diskcache", "jinja2", "typing_extensions"):
    pytest.importorskip(needed, reason="the bindings need ggml-tbq[llama]")

ASK = """
answer = model.create_chat_completion([{"role": "user", "content": "What is the capital of France?"}], max_tokens=24, temperature=0)
print(json.dumps(answer["choices"][0]["message"]["content"]))
"""


def python(code, *arguments, **variables):
    return subprocess.run([sys.executable, "-c", "import json, sys\n" + code, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "OMP_WAIT_POLICY": "passive", **variables})


@pytest.fixture(scope="module")
def bindings(tmp_path_factory):
    """A folder to import llama_cpp from, as an installation of its own would be: the bindings as their source distribution has them."""
    folder = tmp_path_factory.mktemp("bindings")
    script("llama_cpp").bindings(folder / "llama_cpp")
    return folder


def test_by_name(demo_model):
    done = python("import tbq.llama\nmodel = tbq.llama.Llama(sys.argv[1], kv='tbq4_0/tbq3_0')" + ASK, demo_model)
    assert done.returncode == 0, done.stderr
    assert "K (tbq4_0):" in done.stderr and "V (tbq3_0):" in done.stderr and "flash_attn            = enabled" in done.stderr
    assert "Paris" in json.loads(done.stdout.splitlines()[-1])


def test_sides_by_name_and_number(demo_model):
    code = """
from tbq.llama import Llama
import tbq
a = Llama(sys.argv[1], type_k="q8_0", type_v=tbq.types["tbq4_0"].id)
b = Llama(sys.argv[1], kv="auto", type_v="tbq2_0", n_ctx=256)
c = Llama(model_path=sys.argv[1], kv="auto", n_ctx=256, n_batch=64)
print(a.plan, b.plan.recommended, c.plan.recommended)
"""
    done = python(code, demo_model)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "llama_kv_cache: size" in line]
    assert "K (q8_0):" in lines[0] and "V (tbq4_0):" in lines[0]
    assert "V (tbq2_0):" in lines[1] and len(lines) == 3
    assert done.stdout.startswith("None (")


def test_plain_integers(bindings, lib_dir, demo_model):
    """llama_cpp by itself, after tbq.llama and without it."""
    code = "import llama_cpp\nmodel = llama_cpp.Llama(sys.argv[1], n_ctx=512, type_k=644, type_v=643, flash_attn=True)" + ASK
    for done in (python("import tbq.llama\n" + code, demo_model),
                 python(code, demo_model, PYTHONPATH=str(bindings), LLAMA_CPP_LIB_PATH=str(lib_dir))):
        assert done.returncode == 0, done.stderr
        assert "K (tbq4_0):" in done.stderr and "V (tbq3_0):" in done.stderr
        assert "Paris" in json.loads(done.stdout.splitlines()[-1])


def test_the_variable_is_left_as_it_was():
    code = "import os, tbq.llama; print(os.environ.get('LLAMA_CPP_LIB_PATH'))"
    assert python(code).stdout.strip() == "None"
    assert python(code, LLAMA_CPP_LIB_PATH="/elsewhere").stdout.strip() == "/elsewhere"


def error(code, **variables):
    done = python(f"import tbq\ntry:\n    {code}\nexcept tbq.TBQError as error:\n    print(error)", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imported_before_with_other_libraries(bindings, lib_dir, tmp_path):
    for library in lib_dir.iterdir():
        (tmp_path / library.name).write_bytes(library.read_bytes())
    said = error("import llama_cpp; import tbq.llama", PYTHONPATH=str(bindings), LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert said == f"llama_cpp was imported before, with the libraries in {tmp_path}, which have no tbq types; import tbq.llama before llama_cpp, in a new process"


def test_another_release(tmp_path):
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text('__version__ = "0.2.1"\n')
    for code in ("import tbq.llama", "import llama_cpp; import tbq.llama"):
        said = error(code, PYTHONPATH=str(tmp_path))
        assert said.startswith("llama-cpp-python 0.2.1 (") and "pip uninstall llama-cpp-python" in said, said


def test_mistakes(demo_model, tmp_path):
    for call, what in ((f"Llama({str(tmp_path / 'none')!r})", "is not a file"), (f"Llama({str(demo_model)!r}, kv='tbq9')", "cache type 'tbq9' is not one of"),
                       (f"Llama({str(demo_model)!r}, type_k='x')", "cache type 'x' is not one of"),
                       (f"Llama({str(demo_model)!r}, type_k=1, type_v='x')", "cache type 'x' is not one of")):
        assert what in error(f"from tbq.llama import Llama; {call}"), call


def test_without_what_they_need(tmp_path):
    (tmp_path / "diskcache.py").write_text("raise ModuleNotFoundError(\"No module named 'diskcache'\", name='diskcache')")
    assert error("import tbq.llama", PYTHONPATH=str(tmp_path)) == "llama_cpp needs diskcache: pip install 'ggml-tbq[llama]'"
