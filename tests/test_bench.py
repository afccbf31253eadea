"""`tbq bench speed` on a model that it makes itself: real runs of llama-bench, short ones."""
import json
import re
import subprocess
import sys

import pytest

from tbq import bench
from llama_tools import cache_mib


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "tbq", "bench", "speed", *arguments], capture_output=True, text=True)


def test_table():
    done = run("--types", "f16,tbq4_0,q8_0/tbq3_0", "--depths", "0,512", "--prompts", "64", "--rounds", "1", "--threads", "2")
    assert done.returncode == 0, done.stderr
    speeds, reads = (t.splitlines() for t in done.stdout.strip().split("\n\n"))
    assert speeds[0] == "| K / V | tg @ 0 | tg @ 512 | pp 64 |"
    rows = {line.split(" | ")[0].strip("| "): line for line in speeds[2:]}
    assert list(rows) == ["f16", "tbq4_0", "q8_0/tbq3_0"]
    numbers = {name: [float(x) for x in re.findall(r"(?<=[|] )[\d.]+", row)] for name, row in rows.items()}
    assert all(len(n) == 3 and min(n) > 0 for n in numbers.values())
    for name in ("tbq4_0", "q8_0/tbq3_0"):  # the ratios are those of the numbers beside them
        ratios = [float(x) for x in re.findall(r"\(([\d.]+)\)", rows[name])]
        assert ratios == pytest.approx([a / b for a, b in zip(numbers[name], numbers["f16"])], abs=0.02)
    assert reads[0].startswith("| K / V | depth | attention, ms a token | cache, MB")
    assert [line.split(" | ")[3] for line in reads[2:]] == ["8.4", "2.2", "3.1"]  # 512 x 8 x 4 x 128 values, twice


def test_json():
    done = run("--types", "tbq2_0", "--depths", "", "--prompts", "32", "--rounds", "2", "--threads", "1", "--json")
    samples = json.loads(done.stdout)
    assert list(samples) == ["tbq2_0"] and list(samples["tbq2_0"]) == ["pp 32"]
    assert len(samples["tbq2_0"]["pp 32"]) == 2 and min(samples["tbq2_0"]["pp 32"]) > 0


def test_bytes_are_those_of_the_cache():
    for name in ("f16", "q8_0", "q4_0", "tbq4_0", "tbq3_0", "tbq2_0"):
        assert bench.cache_bytes(name) == pytest.approx(2 * cache_mib(name, 1, 8, 4, 128) * 2**20)
    assert bench.cache_bytes("q8_0/tbq3_0") * 2 == bench.cache_bytes("q8_0") + bench.cache_bytes("tbq3_0")


@pytest.mark.parametrize("arguments,message", [
    (("--types", "tbq5_0"), r"llama-bench failed for tbq5_0: error: invalid parameter for argument: -ctk"),
    (("--model", "nowhere.gguf"), r"model 'nowhere.gguf' is not a file"),
])
def test_errors(arguments, message):
    done = run("--depths", "0", "--prompts", "", "--rounds", "1", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(f"tbq: error: {message}", done.stderr.strip().splitlines()[-1]), done.stderr
