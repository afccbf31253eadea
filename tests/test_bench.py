# SPDX-License-Identifier: MIT
"""`tbq bench speed` on a model that it makes: real, short runs of llama-bench."""

import contextlib
import hashlib
import json
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

from llama_tools import BLOCK, cache_mib, tiny_llama
from tbq.bench import random_model
from tbq.kv_cache.type_pairs import TypePair

SMALL = (
    "--shape",
    "layers=2,width=256,heads=4,kv_heads=2,head_size=64,ff=512,vocab=1000",
    "--rounds",
    "1",
    "--generate",
    "4",
)


def run(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "tbq", "bench", "speed", *arguments], capture_output=True, text=True, **more
    )


def test_table():
    done = run(
        "--types",
        "f16,tbq4_0,q8_0/tbq3_0",
        "--depths",
        "0,512",
        "--prompts",
        "64,32@512",
        "--rounds",
        "1",
        "--threads",
        "2",
    )
    assert done.returncode == 0, done.stderr
    speeds, reads, facts = (t.splitlines() for t in done.stdout.strip().split("\n\n"))
    assert speeds[0] == "| K / V | tg @ 0 | tg @ 512 | pp 64 | pp 32 @ 512 |"
    rows = {line.split(" | ")[0].strip("| "): line for line in speeds[2:]}
    assert list(rows) == ["f16", "tbq4_0", "q8_0/tbq3_0"]
    numbers = {name: [float(x) for x in re.findall(r"(?<=[|] )[\d.]+", row)] for name, row in rows.items()}
    assert all(len(n) == 4 and min(n) > 0 for n in numbers.values())
    for name in ("tbq4_0", "q8_0/tbq3_0"):  # the ratios are those of the numbers in the same row
        ratios = [float(x) for x in re.findall(r"\(([\d.]+)\)", rows[name])]
        for ratio, a, b in zip(ratios, numbers[name], numbers["f16"], strict=True):
            assert abs(ratio - a / b) < 0.006 + a / b * (
                0.06 / a + 0.06 / b
            )  # speeds are printed with one digit, ratios with two
    assert reads[0].startswith("| K / V | depth | attention, ms a token | cache, MB")
    sizes = {line.split(" | ")[0].strip("| "): line.split(" | ")[3] for line in reads[2:]}
    # 512 x 8 x 4 x 128 values, twice; noise may drop a row
    assert sizes and sizes.items() <= {"f16": "8.4", "tbq4_0": "2.2", "q8_0/tbq3_0": "3.1"}.items()
    assert facts[1].startswith("model: random weights, --shape layers=8,width=1024,heads=16,")
    assert re.match(r"llama.cpp \w{9}, tbq \d.*; 2 threads; .*CPU", facts[2])


def test_json():
    done = run(
        *SMALL,
        "--types",
        "tbq2_0",
        "--depths",
        "",
        "--prompts",
        "32",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--json",
        "--",
        "-ub",
        "16",
    )
    found = json.loads(done.stdout)
    samples = found["tokens_per_second"]
    assert list(samples) == ["tbq2_0"] and list(samples["tbq2_0"]) == ["pp 32"]
    assert len(samples["tbq2_0"]["pp 32"]) == 2 and min(samples["tbq2_0"]["pp 32"]) > 0
    assert found["threads"] == 1 and found["options"] == ["-ub", "16"] and found["failures"] == {}


def test_model(tmp_path):
    """A depth beyond the context that the model was trained for is measured, with a note."""
    model = tiny_llama(tmp_path / "tiny.gguf", 64)
    done = run(
        "--model", str(model), "--types", "f16,tbq4_0", "--depths", "2040", "--prompts", "", "--rounds", "1", "--json"
    )
    assert done.returncode == 0 and "the model was trained for 2048 tokens, 2056 are asked for" in done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "tiny.gguf" and found["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert all(found["tokens_per_second"][name]["tg @ 2040"][0] > 0 for name in ("f16", "tbq4_0"))


def test_bytes_are_those_of_the_cache():
    cache = random_model.RandomModel().cache()
    for name in BLOCK:
        assert TypePair(name, name).bytes(cache) == pytest.approx(2 * cache_mib(name, 1, 8, 4, 128) * 2**20)
        assert TypePair(name, name).bits == (8 * BLOCK[name][1] / BLOCK[name][0],) * 2
    assert TypePair("q8_0", "tbq3_0").bytes(cache) * 2 == TypePair("q8_0", "q8_0").bytes(cache) + TypePair(
        "tbq3_0", "tbq3_0"
    ).bytes(cache)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--types", "tbq5_0"), r"cache type 'tbq5_0' is not one of f32, .*tbq4_0; a pair is K/V, as in tbq4_0/tbq3_0"),
        (("--types", "q8_0/"), r"cache type '' is not one of .*"),
        (("--types", ","), r"no cache types; .*"),
        (("--depths", "", "--prompts", ""), r"--depths and --prompts are both empty; .*"),
        (("--model", "nowhere.gguf"), r"No such file or directory: nowhere.gguf"),
        (("--model", __file__), r".*test_bench.py is not a GGUF file: .*"),
        (
            ("--shape", "layers=1000,width=65536,ff=65536"),
            r"the model takes [\d.]+ GB, .* has [\d.]+ GB; name another folder .*",
        ),
        (("--scratch", "nowhere"), r"--scratch 'nowhere' is not a folder"),
        ((*SMALL, "--types", "f16,q8_0", "--", "-foo"), r"f16 @ 0, q8_0 @ 0: invalid parameter for argument: -foo"),
        ((*SMALL, "--types", "f16", "--", "-ub", "32,64"), r"f16 @ 0: llama-bench ran 2 tests instead of 1; .*"),
        ((*SMALL, "--types", "f16", "--", "--list-devices"), r"f16 @ 0: llama-bench printed no results; .*"),
    ],
)
def test_errors(arguments, message, tmp_path):
    before = ("--depths", "0") if "--depths" not in arguments else ()
    done = run(*before, "--prompts", "", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(f"tbq: error: {message}", done.stderr.strip().splitlines()[-1]), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--shape", "heads=3"), "argument --shape: heads=3 must be a multiple of kv_heads, 4"),
        (("--shape", "depth=3"), "argument --shape: 'depth=3' is not one of layers, width, heads, .*"),
        (("--depths", "-1"), "argument --depths: .*"),
        (("--prompts", "12@"), "argument --prompts: '12@' is not a length such as 512, .*"),
        (("--rounds", "0"), "argument --rounds: '0' is not a number of at least 1"),
        (("--shape", "layers=2", "--model", "x.gguf"), "argument --model: not allowed with argument --shape"),
    ],
)
def test_wrong_options(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(f"tbq bench speed: error: {message}", done.stderr.strip().splitlines()[-1]), done.stderr


def test_no_room_at_a_depth(tmp_path):
    """The other depth is measured. The error names the pair, the tokens and llama.cpp's reason."""
    done = run(
        *SMALL,
        "--types",
        "f16",
        "--depths",
        "16,5000000",
        "--prompts",
        "",
        "--scratch",
        str(tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.returncode == 2, done.stderr
    row = [cell.strip() for cell in done.stdout.splitlines()[2].split("|")[1:-1]]
    assert row[0] == "f16" and float(row[1]) > 0 and row[2] == ""
    assert done.stderr.splitlines()[-1] == (
        "tbq: error: f16 @ 5000000: not enough memory for 5000004 tokens "
        "(failed to initialize the context: failed to allocate buffer for kv cache)"
    )
    assert not list(tmp_path.iterdir())


def arguments_with(folder):
    """Processes that have a word in their arguments."""
    found = []
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder) in file.read_text():
                found.append(file)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruption_leaves_nothing(tmp_path, sent):
    process = subprocess.Popen(
        [sys.executable, "-m", "tbq", "bench", "speed", "--depths", "65536", "--scratch", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("*/shape.gguf")):
        assert process.poll() is None
        time.sleep(0.05)
    while len(arguments_with(tmp_path)) < 2:  # the command itself, and llama-bench
        time.sleep(0.05)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    assert not list(tmp_path.iterdir()) and not arguments_with(tmp_path)
