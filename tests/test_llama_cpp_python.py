# SPDX-License-Identifier: MIT
"""tbq.llama: llama-cpp-python's bindings with the libraries of tbq.

Each test runs in a new process, because a process loads the libraries only once.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

import tbq
from conftest import ROOT, script
from llama_tools import ENV, tiny_llama
from tbq._exact_rows import FIRST, RECENT

CENTER = 68  # bytes that a state with centered keys adds: a mark, and the hash of their center
VENDORED = pathlib.Path(tbq.paths()["lib"]).parent / "_vendor" / "llama_cpp"

for dependency in ("diskcache", "jinja2", "typing_extensions"):
    pytest.importorskip(dependency, reason=f"{dependency} is not installed: pip install 'ggml-tbq[llama]'")


def python(code, *arguments, path=None, cwd=None, **variables):
    """Runs code in a new process."""
    env = {
        k: v for k, v in {**ENV, **variables}.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB", "PYTHONPATH")
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**env, **({"PYTHONPATH": str(path)} if path else {})},
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory, lib_dir):
    """A llama-cpp-python as pip would install it: the pinned release, with its own libraries."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(VENDORED, folder / "llama_cpp")
    shutil.copytree(lib_dir, folder / "llama_cpp" / "lib")
    return folder


GENERATE = """
import json, os, sys
import tbq
from tbq.llama import Llama
assert not {"LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"} & os.environ.keys()
import llama_cpp, llama_cpp.mtmd_cpp
libraries = {"library": llama_cpp.llama_cpp._lib._name, "mtmd": llama_cpp.mtmd_cpp._libmtmd._name}
found = {**libraries, "file": llama_cpp.__file__}

def ask(name, model):
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    answer = model.create_chat_completion(question, max_tokens=16, temperature=0)["choices"][0]["message"]["content"]
    found[name] = {"answer": answer, "tokens": model.n_tokens, "state": len(model.save_state().llama_state)}
    return found[name]

common = {"n_ctx": 512, "n_threads": 2, "verbose": True}
model = Llama(sys.argv[1], kv="tbq4_0", recent=0, first=0, **common)
ask("ours", model)["plan"] = model.plan.pair(model.k, model.v).bytes
ask("exact rows", Llama(sys.argv[1], kv="tbq4_0", **common))
four, three = tbq.types["tbq4_0"].id, tbq.types["tbq3_0"].id
ask("numbers", llama_cpp.Llama(sys.argv[1], type_k=four, type_v=four, flash_attn=True, **common))
model = Llama(sys.argv[1], type_k="q8_0", type_v=three, **common)
ask("sides", model)["types"] = [model.k, model.v]
model = Llama(sys.argv[1], kv="auto", type_v="f16", **{**common, "n_ctx": 8192})
ask("auto keys", model)["types"] = [model.k, model.v]
ask("f16", Llama(sys.argv[1], kv="f16", **common))
print(json.dumps(found))
"""


@pytest.mark.parametrize("installed_too", (False, True))
def test_generates(installed_too, demo_model, lib_dir, other):
    """Sensible text from a cache with the named types, with the bindings of the wheel or with installed ones."""
    done = python(GENERATE, demo_model, path=other if installed_too else None)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert pathlib.Path(found["library"]).parent == pathlib.Path(found["mtmd"]).parent == lib_dir
    assert pathlib.Path(found["file"]).parent == (other / "llama_cpp" if installed_too else VENDORED)
    for name in ("ours", "exact rows", "numbers", "sides", "auto keys", "f16"):
        assert "Paris" in found[name]["answer"], name
    assert found["sides"]["types"] == ["q8_0", "tbq3_0"] and found["auto keys"]["types"] == ["tbq4_0", "f16"]
    caches = re.findall(r"K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB", done.stderr)
    assert [(k, v) for k, _, v, _ in caches] == [
        ("tbq4_0", "tbq4_0"),
        ("tbq4_0", "tbq4_0"),
        ("tbq4_0", "tbq4_0"),
        ("q8_0", "tbq3_0"),
        ("tbq4_0", "f16"),
        ("f16", "f16"),
    ]
    assert float(caches[0][1]) + float(caches[0][3]) == pytest.approx(found["ours"]["plan"] / 2**20, abs=0.011)
    # 30 layers, keys and values of 3 heads of 64: 34 bytes per head instead of 128
    saved = 2 * 30 * 3 * (128 - 34)
    assert found["f16"]["tokens"] == found["ours"]["tokens"]
    assert found["f16"]["state"] - found["ours"]["state"] + CENTER == saved * found["ours"]["tokens"]
    assert found["numbers"]["state"] == found["ours"]["state"] - CENTER
    # each of the few rows is a first or a recent one: "EXAC", streams, rows, then for each its number and its bytes
    rows = found["ours"]["tokens"]
    assert found["exact rows"]["tokens"] == rows < RECENT
    assert found["exact rows"]["state"] - found["ours"]["state"] == 12 + rows * (4 + 2 * 30 * 3 * 68)
    assert f"the newest {RECENT} and the first {FIRST} rows of a sequence are kept in 8 bits" in done.stderr


REFUSE = """
import json, sys
import tbq
from tbq.llama import Llama
for arguments in json.loads(sys.argv[1]):
    try:
        Llama(**{"n_ctx": 512, "verbose": False, **arguments})
    except tbq.TBQError as error:
        print(error)
    else:
        print("it works")
"""


def test_refusals(demo_model, tmp_path):
    (tmp_path / "short.gguf").write_bytes(demo_model.read_bytes()[:5_000_000])
    model, head_80 = str(demo_model), str(tiny_llama(tmp_path / "head80.gguf", head=80, layers=1))
    cases = [
        ({"model_path": model, "kv": "fly"}, "cache type 'fly' is not one of tbq2_0, tbq3_0, tbq4_0, "),
        ({"model_path": model, "type_k": "fly"}, "cache type 'fly' is not one of "),
        ({"model_path": model, "type_v": 999}, "cache type 999 is not a type's name or number; 644 is tbq4_0"),
        ({"model_path": model, "type_v": True}, "cache type True is not a type's name or number"),
        ({"model_path": model, "type_k": 14}, "cache type 'q6_k' is not one of "),
        ({"model_path": model, "kv": 644}, "kv 644 must be"),
        ({"model_path": model, "n_ctx": -1}, "n_ctx is -1; it must be a number of tokens"),
        ({"model_path": model, "flash_attn": False}, "values of tbq4_0 need flash attention"),
        ({"model_path": head_80, "kv": "tbq4_0"}, "cache tbq4_0/tbq4_0 is refused: tbq4_0 has blocks of 64 values"),
        ({"model_path": str(tmp_path / "nosuch.gguf")}, f"model {str(tmp_path / 'nosuch.gguf')!r} is not a file"),
        ({"model_path": str(tmp_path / "short.gguf")}, "Failed to load model from file: "),
        ({"model_path": model, "type_v": "f16", "flash_attn": False}, "it works"),
    ]
    done = python(REFUSE, json.dumps([arguments for arguments, _ in cases]))
    assert done.returncode == 0, done.stderr[-3000:]
    for (arguments, message), line in zip(cases, done.stdout.splitlines(), strict=True):
        assert message in line, arguments
    assert "ignored" not in done.stderr  # no exception in __del__


IMPORT = """
import sys
try:
    import {first}
    import tbq.llama
except ValueError as error:
    print(type(error).__name__, error)
    print(sorted(name for name in sys.modules if name.startswith("llama_cpp")) if {first!r} == "sys" else "")
"""


def test_imported_before_with_other_libraries(other, lib_dir):
    lines = python(IMPORT.format(first="llama_cpp"), path=other).stdout.splitlines()
    assert lines[0] == (
        f"TBQError llama_cpp was imported before, with the libraries in {other / 'llama_cpp' / 'lib'} "
        f"instead of {lib_dir}; import tbq.llama before anything that imports llama_cpp, in a new process"
    )


@pytest.mark.parametrize("first", ("llama_cpp", "sys"))
@pytest.mark.parametrize("line, release", (("__version__ = '0.3.20'\n", "0.3.20"), ("", "of an unknown release")))
def test_another_release(first, line, release, tmp_path):
    """Another release is refused, whether it is only installed or imported already."""
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text(line)
    lines = python(IMPORT.format(first=first), path=tmp_path).stdout.splitlines()
    assert lines[0].startswith(f"TBQError llama-cpp-python {release} (") and str(tmp_path) in lines[0]
    assert (
        "does not fit these libraries, which are of llama-cpp-python==" in lines[0]
        and "pip uninstall llama-cpp-python" in lines[0]
    )
    assert lines[1] == ("[]" if first == "sys" else "")


def test_a_folder_of_that_name_is_no_package(tmp_path):
    """In a checkout of llama-cpp-python, for example."""
    (tmp_path / "llama_cpp").mkdir()
    done = python("import tbq.llama, llama_cpp; print(llama_cpp.__file__)", cwd=tmp_path)
    assert done.stdout.strip() == str(VENDORED / "__init__.py"), done.stderr


def test_missing_dependency():
    code = """
import sys
sys.modules["diskcache"] = None
try:
    import tbq.llama
except ValueError as error:
    print(error)
assert not [name for name in sys.modules if name.startswith("llama_cpp")]
del sys.modules["diskcache"]
import tbq.llama
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "llama_cpp needs diskcache: pip install 'ggml-tbq[llama]'"


# --- how the bindings get into the wheel ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist():
    pin = script("patch_series")
    return pin.fetch_sdist(pin.read_pin())


def test_bindings_are_the_pin_s(sdist, tmp_path):
    """The wheel has every module of the package and its license, byte by byte and once."""
    command = [sys.executable, ROOT / "tools" / "patch_series.py", "bindings", tmp_path / "bindings"]
    (tmp_path / ".bindings-tmp-killed").mkdir()
    subprocess.run(command, check=True, capture_output=True)
    with tarfile.open(sdist) as tar:
        wanted = {
            path.name: tar.extractfile(member).read()
            for member in tar
            if member.isfile()
            for path in [pathlib.PurePosixPath(*pathlib.PurePosixPath(member.name).parts[1:])]
            if str(path.parent) == "llama_cpp" or str(path) == "LICENSE.md"
        }
    found = {path.name: path.read_bytes() for path in (tmp_path / "bindings").iterdir() if path.name != ".tbq-stamp"}
    assert found == wanted and "llama_cpp.py" in found and b"MIT License" in found["LICENSE.md"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "bindings").iterdir()}
    subprocess.run(command, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bindings").iterdir()} == times
    assert [path.name for path in tmp_path.iterdir()] == ["bindings"]


def test_the_wheel_s_bindings_are_complete(sdist):
    with tarfile.open(sdist) as tar:
        names = {
            pathlib.PurePosixPath(member.name).name
            for member in tar
            if re.fullmatch(r"[^/]+/(llama_cpp/\w+\.py|LICENSE\.md)", member.name)
        }
    assert names <= {path.name for path in VENDORED.iterdir()}


def test_the_extra_has_what_the_bindings_require(sdist):
    with tarfile.open(sdist) as tar:
        theirs = next(tar.extractfile(m).read().decode() for m in tar if re.fullmatch(r"[^/]+/pyproject\.toml", m.name))
    ours = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def requirements(text, key):
        return set(re.findall(r'"([\w-]+)[><=]', re.search(rf"(?ms)^{key} = \[(.*?)\]$", text)[1]))

    assert requirements(theirs, "dependencies") <= requirements(ours, "dependencies") | requirements(ours, "llama")


CENTERED = """
import sys, numpy as np, tbq
from tbq.llama import Llama, set_center
common = {"n_ctx": 512, "n_threads": 2, "verbose": True, "logits_all": True}
text = open(sys.argv[2], "rb").read()

def logits(**how):
    model = Llama(sys.argv[1], **common, **how)
    model.eval(model.tokenize(text)[:500])
    return model, np.array(model.scores[100:500], copy=True)

def log_softmax(x):
    return x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), axis=1)[:, None]

exact = log_softmax(logits(kv="f16")[1])
rows = {"recent": 0, "first": 0}
centered, plain = logits(kv="tbq4_0", **rows), logits(kv="tbq4_0", center=False, **rows)
# the divergence; measured: 0.82 of the one without a center
errors = [float((np.exp(exact) * (exact - log_softmax(x))).sum(1).mean()) for x in (centered[1], plain[1])]
assert errors[0] < 0.92 * errors[1], errors
assert centered[0].center.is_file() and plain[0].center is None
state = centered[0].save_state()
other = Llama(sys.argv[1], kv="tbq4_0", center=False, **common)
try:
    other.load_state(state)
    raise SystemExit("a state of centered keys was taken by a cache that is not centered")
except RuntimeError:
    pass
set_center(other, centered[0].center)
set_center(other, None)
other.eval([1, 2, 3])
for bad in (sys.argv[1], "none.gguf"):
    for use in (lambda: set_center(other, bad), lambda: Llama(sys.argv[1], kv="tbq4_0", center=bad, **common)):
        try:
            use()
            raise SystemExit(f"{bad} was taken")
        except (tbq.TBQError, OSError) as error:
            assert "\\n" not in str(error)
try:
    set_center(other, centered[0].center)
    raise SystemExit("a cache with keys was centered")
except tbq.TBQError:
    pass
print("done")
"""


def test_centered_keys(demo_model):
    """Keys are centered by default and measured once, which is more exact. States and files are checked."""
    done = python(CENTERED, demo_model, ROOT / "README.md")
    assert done.stdout.strip().endswith("done"), done.stdout + done.stderr[-3000:]
    assert done.stderr.count("tbq: measuring the mean of the keys") <= 1
    assert (
        "this state was saved with a different calibration file" in done.stderr
        and "the cache holds keys already" in done.stderr
    )


OTHERS = """
import gc, sys
from tbq.llama import Llama
common = {"n_ctx": 512, "n_threads": 2, "verbose": False}
model = Llama(sys.argv[1], kv="tbq4_0", **common)
assert model.center.is_file() and model.eval([1, 2, 3]) is None
folder = model.center.parent
del model
gc.collect()
assert not folder.exists(), "a center that cannot be kept outlives its model"
overrides = {"llama.rope.freq_base": 50000.0, "tokenizer.ggml.add_bos_token": False}
yarn = {"rope_scaling_type": 2, "rope_freq_scale": 0.25, "kv_overrides": overrides}
stretched = Llama(sys.argv[1], kv="tbq4_0", **yarn, **common)
assert stretched.plan.context_train == 32768 and stretched.center.is_file()
recurrent = Llama(sys.argv[2], **common)
assert (recurrent.k, recurrent.v, recurrent.center) == ("f16", "f16", None) and recurrent.eval([1, 2, 3]) is None
print("done")
"""


def test_no_folder_other_rope_no_cache(demo_model, tmp_path):
    """If the center cannot be kept, it is measured each time, with the RoPE of the arguments.

    A model without a cache needs no types.
    """
    from test_plan import mamba

    (tmp_path / "file").write_text("")
    done = python(OTHERS, demo_model, mamba(tmp_path / "mamba.gguf"), XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stdout.strip().endswith("done"), done.stdout + done.stderr[-3000:]
    assert done.stderr.count("at each start, because it cannot be kept") == 2 and "not centered" not in done.stderr
