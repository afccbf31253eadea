# SPDX-License-Identifier: MIT
"""llama.cpp's own tests on the patched tree."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_tools import ENV, TBQ, run, tiny_llama

MASK = Path(__file__).parent / "llama" / "mask.cpp"
TBQ_LLAMA = Path(__file__).parents[1] / "ggml_tbq" / "llama"

# What ctest registers at this pin and cannot pass without a network. The unpatched pin fails these in the same way.
NETWORK = {
    "test-download-model",  # fetches stories15M
    "test-thread-safety",  # needs that model; runs on the demo model below
    "test-state-restore-fragmented",  # needs that model; runs on the demo model in test_llama_state.py
    "test-arg-parser",  # its last part downloads a file
    "test-tokenizers-ggml-vocabs",  # clones vocabularies, and passes if it cannot
}
# These pass at once without a model, which proves nothing.
WANT_A_MODEL = {
    "test-model-load-cancel",
    "test-autorelease",  # on the demo model below
    "test-backend-sampler",  # aborts on the demo model, unpatched too: it needs stories15M's vocabulary
}
# jinja-py compares the template engine with Python's jinja2, which takes a minute; the patches do not touch it.
# quantize-fns runs below, where its lines are read too.
ELSEWHERE = {"test-jinja-py", "test-quantize-fns"}


def program(build_dir, name):
    found = [p for p in build_dir.rglob(f"bin/{name}") if p.is_file()]
    assert found, f"{name} was not built"
    return found[0]


def ctest_program(build_dir):
    """The ctest in the folder of the cmake that configured the build. pip may have deleted it since."""
    cached = re.search(r"^CMAKE_CTEST_COMMAND:INTERNAL=(.*)$", (build_dir / "CMakeCache.txt").read_text(), re.M)
    for path in (cached and cached[1], shutil.which("ctest"), Path(sys.executable).parent / "ctest"):
        if path and Path(path).is_file():
            return str(path)
    pytest.fail("no ctest: neither the one that configured the build, nor on PATH, nor in the folder of this Python")


@pytest.fixture(scope="session")
def ctest(build_dir):
    """The results by test name, and the output, of one run of everything that can pass here."""
    skip = "|".join(f"^{name}$" for name in sorted(NETWORK | ELSEWHERE | WANT_A_MODEL))
    done = subprocess.run(
        [
            ctest_program(build_dir),
            "--test-dir",
            str(build_dir),
            "-E",
            skip,
            "--timeout",
            "240",
            "--no-tests=error",
            "-j2",
        ],
        capture_output=True,
        text=True,
        timeout=540,
        env=ENV,
    )
    results = dict(
        re.findall(r"Test +#\d+: (\S+) \.*(?: |\*\*\*)*(Passed|Failed|Not Run|Skipped|Timeout|Exception)", done.stdout)
    )
    return results, done.stdout[-3000:] + done.stderr[-2000:]


def test_everything_that_needs_no_network(ctest):
    results, out = ctest
    assert {name: r for name, r in results.items() if r != "Passed"} == {}, out
    # The tests that walk over all types or all kinds of operation must be there.
    must = {
        "test-quantize-perf",
        "test-barrier",
        "test-rope",
        "test-alloc",
        "test-gguf",
        "test-opt",
        "test-generate-models",
        "test-save-load-state",
        "test-recurrent-state-rollback",
        "test-tiled-mulmat",
        "test-rpc-multi-server",
    }
    assert must <= set(results), must - set(results)


def test_lists_above_name_real_tests(build_dir):
    """A test that upstream renames must not stay excluded under its old name."""
    text = "\n".join(p.read_text() for p in build_dir.rglob("CTestTestfile.cmake"))
    known = set(re.findall(r'add_test\(\[*=*\[*"?([\w-]+)', text))
    assert NETWORK | ELSEWHERE | WANT_A_MODEL <= known, (NETWORK | ELSEWHERE | WANT_A_MODEL) - known


@pytest.mark.parametrize("name", ["test-model-load-cancel", "test-autorelease"])
def test_with_the_demo_model(build_dir, demo_model, name):
    run(program(build_dir, name), demo_model)


@pytest.mark.parametrize("kind", TBQ)
def test_thread_safety(build_dir, demo_model, kind):
    """Two models with four contexts each, all generating at once."""
    done = run(
        program(build_dir, "test-thread-safety"),
        "-m",
        demo_model,
        "-p",
        "The meaning of life is",
        "-n",
        12,
        "-c",
        256,
        "-ub",
        32,
        "-np",
        4,
        "-t",
        1,
        "-ctk",
        kind,
        "-ctv",
        kind,
    )
    assert "All threads finished without errors" in done.stdout + done.stderr


def test_quantize_fns_walks_our_types(build_dir):
    done = run(program(build_dir, "test-quantize-fns"), "-v", ok=False)
    for name in TBQ:
        for part in ("absolute quantization error", "reference implementation error", "dot product error"):
            assert re.search(rf"{name} +{part}: +ok", done.stdout), done.stdout[-3000:]
    assert done.returncode == 0, done.stdout[-3000:]


def backend_ops(build_dir, op, pattern):
    """The tests that passed and all tests of test-backend-ops on the CPU for one operation.

    Each case is compared with a plain float reference.
    """
    out = run(program(build_dir, "test-backend-ops"), "test", "-b", "CPU", "-o", op, "-p", pattern, timeout=300)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.stdout + out.stderr)
    m = re.search(r"(\d+)/(\d+) tests passed", text)
    assert m, text[-3000:]
    assert "FAIL" not in text, text[-3000:]
    # The CPU backend takes none of these cases for its own quantized types either.
    refused = [line for line in text.splitlines() if "not supported" in line and "type_b=f16" not in line]
    assert not refused, refused
    return int(m[1]), int(m[2])


@pytest.mark.parametrize(
    "op", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "SET_ROWS", "CENTER_SET_ROWS", "CPY", "FLASH_ATTN_EXT"]
)
def test_backend_ops(build_dir, op):
    passed, total = backend_ops(build_dir, op, "tbq[234]_0")
    assert passed == total
    # enough cases that each type is in several; an empty selection also "passes"
    assert total >= (18 if op == "CENTER_SET_ROWS" else 20)


def test_text_that_a_vocabulary_lacks(bin_dir, tmp_path):
    """Tokens of bytes: the time grows with the length. With its square, this text would take five minutes."""
    text = tmp_path / "text"
    text.write_text("ж" * 1_000_000, encoding="utf-8")
    model = tiny_llama(tmp_path / "model.gguf", 64)
    start = time.monotonic()
    done = run(bin_dir / "llama-tokenize", "-m", model, "-f", text, "--ids", "--show-count", "--log-disable")
    assert done.stdout.endswith("Total number of tokens: 2000001\n") and time.monotonic() - start < 60


def test_masks_of_single_tokens(build_dir, tmp_path):
    """They are those of a loop that asks every cell, and the program notices where they are not."""
    tree, header = build_dir / "llama.cpp-src", TBQ_LLAMA / "llama-kv-mask.h"
    folders = (tmp_path, tree / "src", tree / "include", tree / "ggml" / "include")

    def wrong():
        command = ("-std=c++17", "-O2", *(f"-I{folder}" for folder in folders), MASK, "-o", tmp_path / "mask")
        run(os.environ.get("CXX", "c++"), *command)
        done = run(tmp_path / "mask", ok=False)
        count = re.match(r"20000 problems, (\d+) wrong", done.stdout)
        assert count and (done.returncode == 0) == (count[1] == "0"), done.stdout + done.stderr
        return int(count[1])

    source = header.read_text()
    (tmp_path / header.name).write_text(source)
    assert wrong() == 0
    for right, changed in (
        ("<= last", "< last"),
        ("[first + i] + 1)", "[first + i])"),
        (" != cells.seq_get", " == cells.seq_get"),
    ):
        assert source.count(right) == 1
        (tmp_path / header.name).write_text(source.replace(right, changed))
        assert wrong() > 0, changed
