# SPDX-License-Identifier: MIT
"""Measures cache types side by side: `tbq bench speed` here, `tbq bench quality` in quality.py, `tbq bench index` in
index_bench.py."""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np

from tbq.errors import TBQError
from tbq.kv_cache.type_pairs import Cache, TypePair
from tbq.programs import output
from tbq.programs.process import Done, run


@dataclasses.dataclass(frozen=True)
class Test:
    """Tokens read at once, or generated one by one, with so many in the cache before."""

    prompt: int
    generate: int
    depth: int

    def __str__(self) -> str:
        if self.generate:
            return f"tg @ {self.depth}"
        return f"pp {self.prompt}" + (f" @ {self.depth}" if self.depth else "")


@dataclasses.dataclass
class Speeds:
    """What was measured so far."""

    samples: dict[TypePair, dict[Test, list[float]]]  #: tokens per second, one each round
    failures: dict[tuple[TypePair, int], str] = dataclasses.field(
        default_factory=dict
    )  #: why a pair has none at a depth
    device: str = ""
    complete: bool = False

    @property
    def gpu(self) -> bool:
        return not self.device.endswith("(CPU)")

    def median(self, pair: TypePair, test: Test) -> float | None:
        found = self.samples[pair].get(test)
        return statistics.median(found) if found else None


def read_bandwidth(size: int, threads: int) -> float:
    """Bytes per second of a plain read of `size` bytes of memory (of 1 GiB, if it is more) by so many threads: the floor of
    any attention over them on the CPU."""
    parts = [np.ones(max(1, min(size, 1 << 30) // 8 // threads), np.uint64) for _ in range(threads)]
    best = float("inf")
    for _ in range(5):
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - start)
    return 8 * sum(map(len, parts)) / best


def bench_arguments(
    model: pathlib.Path, pair: TypePair, tests: Sequence[Test], threads: int, options: Sequence[str]
) -> list[str]:
    """llama-bench's, for tests at one depth, once each."""
    prompts = ",".join(str(t.prompt) for t in tests if t.prompt) or "0"
    generate = ",".join(str(t.generate) for t in tests if t.generate) or "0"
    return [
        *options,
        "-m",
        str(model),
        "-t",
        str(threads),
        "-fa",
        "1",
        "-ctk",
        pair.k,
        "-ctv",
        pair.v,
        "-p",
        prompts,
        "-n",
        generate,
        "-d",
        str(tests[0].depth),
        "-r",
        "1",
        "-o",
        "json",
    ]


def llama_bench(
    model: pathlib.Path, pair: TypePair, tests: Sequence[Test], threads: int, options: Sequence[str] = ()
) -> tuple[dict[Test, float], str]:
    """Tokens per second of each test, all at one depth; and the device.  TBQError with llama.cpp's reason if it fails."""
    arguments = bench_arguments(model, pair, tests, threads, options)
    done = run("llama-bench", arguments)
    if done.status > 0 and output.has_no_context(done.stderr):
        done = run("llama-bench", [*arguments, "-v"])  # only then it says why
    if done.status:
        raise TBQError(_failure(done, tests))
    try:
        rows = json.loads(done.stdout)
        found = {Test(row["n_prompt"], row["n_gen"], row["n_depth"]): float(row["avg_ts"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        raise TBQError("llama-bench printed no results; are the options after -- such that it runs?") from None
    if len(rows) != len(tests) or set(found) != set(tests):
        raise TBQError(
            f"llama-bench ran {len(rows)} tests instead of {len(tests)}; an option after -- must have one value, "
            "and cache types, depths and prompts have options of their own"
        )
    return found, " and ".join(filter(None, (rows[0]["cpu_info"], rows[0]["gpu_info"]))) + f" ({rows[0]['backends']})"


def _failure(done: Done, tests: Sequence[Test]) -> str:
    tokens = max(t.depth + t.prompt + t.generate for t in tests)
    reason = done.error()
    if output.ran_out_of_memory(done.stderr) or done.status == -9:
        return f"no room for {tokens} tokens ({reason})"
    return reason


def measure(
    pairs: Sequence[TypePair],
    tests: Sequence[Test],
    threads: int,
    model: pathlib.Path,
    rounds: int = 3,
    options: Sequence[str] = (),
) -> Speeds:
    """Speeds of pairs, each in turn within a round; a depth is filled once for all tests at it.

    model: a GGUF file.  options: more of llama-bench's.
    A pair that fails at a depth is left out there.  An interruption ends it with what there was time for.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    speeds = Speeds({pair: {} for pair in pairs})
    depths = dict.fromkeys(test.depth for test in tests)
    runs = [(pair, depth) for _ in range(rounds) for depth in depths for pair in pairs]
    with tqdm(runs, unit="run") as bar, contextlib.suppress(KeyboardInterrupt):
        for pair, depth in bar:
            if (pair, depth) in speeds.failures:
                continue
            bar.set_description(f"{pair} @ {depth}")
            try:
                found, speeds.device = llama_bench(
                    model, pair, [t for t in tests if t.depth == depth], threads, options
                )
            except TBQError as error:
                speeds.failures[pair, depth] = str(error)
                continue
            for test, speed in found.items():
                speeds.samples[pair].setdefault(test, []).append(speed)
        speeds.complete = True
    return speeds


def table(speeds: Speeds, tests: Sequence[Test]) -> str:
    """Markdown: each pair's tokens/s, and relative to the first pair."""
    pairs = list(speeds.samples)
    lines = ["| K / V | " + " | ".join(map(str, tests)) + " |", "|---|" + "---|" * len(tests)]
    for pair in pairs:
        cells = []
        for test in tests:
            speed, base = speeds.median(pair, test), speeds.median(pairs[0], test)
            cells.append(
                ""
                if speed is None
                else f"{speed:.1f}"
                if pair == pairs[0] or not base
                else f"{speed:.1f} ({speed / base:.2f})"
            )
        lines.append(f"| {pair} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attention_table(speeds: Speeds, cache: Cache, threads: int | None) -> str:
    """Markdown: what attention over the cache takes, from the difference to an empty one; "" without both.

    threads: of a plain read to compare with; None where the cache is not in the CPU's memory.
    """
    lines = []
    for pair, found in speeds.samples.items():
        generated = {test.depth: speeds.median(pair, test) for test in found if test.generate}
        for depth, speed in generated.items():
            if not depth or not speed or not generated.get(0):
                continue
            seconds = 1 / speed - 1 / (generated[0] or 1)
            size = pair.bytes(cache) * depth
            if seconds > 0:  # not a short cache and noise
                lines.append(
                    f"| {pair} | {depth} | {seconds * 1e3:.2f} | {size / 1e6:.1f} | {size / seconds / 1e9:.2f} |"
                    + (f" {read_bandwidth(size, threads) / 1e9:.2f} |" if threads else "")
                )
    head = [
        "| K / V | depth | attention, ms a token | cache, MB | GB/s |" + " plain read, GB/s |" * bool(threads),
        "|---|---|---|---|---|" + "---|" * bool(threads),
    ]
    return "\n".join(head + lines) if lines else ""
