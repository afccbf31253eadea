# SPDX-License-Identifier: MIT
"""`tbq bench speed`: tokens per second of cache types, measured with llama-bench."""

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
    """A test: tokens that are read at once or generated one by one, after a number of tokens in the cache."""

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

    samples: dict[TypePair, dict[Test, list[float]]]  #: tokens per second, one for each round
    #: why a pair has no samples at a depth
    failures: dict[tuple[TypePair, int], str] = dataclasses.field(default_factory=dict)
    device: str = ""
    complete: bool = False

    @property
    def gpu(self) -> bool:
        """Whether a GPU was used."""
        return not self.device.endswith("(CPU)")

    def median(self, pair: TypePair, test: Test) -> float | None:
        """The median of a pair in a test; None without samples."""
        found = self.samples[pair].get(test)
        return statistics.median(found) if found else None


def read_bandwidth(size: int, threads: int) -> float:
    """Bytes per second of a plain read of `size` bytes of memory, at most 1 GiB, by a number of threads.

    Attention on the CPU cannot read a cache of that size faster.
    """
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
    """The arguments of llama-bench that run each test once.  All tests have the same depth."""
    prompts = ",".join(str(t.prompt) for t in tests if t.prompt) or "0"
    generate = ",".join(str(t.generate) for t in tests if t.generate) or "0"
    what = ["-p", prompts, "-n", generate, "-d", str(tests[0].depth), "-r", "1", "-o", "json"]
    return [*options, "-m", str(model), "-t", str(threads), "-fa", "1", "-ctk", pair.k, "-ctv", pair.v, *what]


def llama_bench(
    model: pathlib.Path, pair: TypePair, tests: Sequence[Test], threads: int, options: Sequence[str] = ()
) -> tuple[dict[Test, float], str]:
    """Tokens per second of each test, and the device.  All tests have the same depth.

    Raises TBQError with llama.cpp's reason if the run fails.
    """
    arguments = bench_arguments(model, pair, tests, threads, options)
    done = run("llama-bench", arguments)
    if done.status > 0 and output.has_no_context(done.stderr):
        done = run("llama-bench", [*arguments, "-v"])  # only with -v it says why
    if done.status:
        raise TBQError(_reason_of(done, tests))
    try:
        rows = json.loads(done.stdout)
        found = {Test(row["n_prompt"], row["n_gen"], row["n_depth"]): float(row["avg_ts"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        raise TBQError("llama-bench printed no results; check the options after --") from None
    if len(rows) != len(tests) or set(found) != set(tests):
        raise TBQError(
            f"llama-bench ran {len(rows)} tests instead of {len(tests)}; an option after -- must have one value; "
            "use --types, --depths and --prompts for cache types, depths and prompts"
        )
    return found, " and ".join(filter(None, (rows[0]["cpu_info"], rows[0]["gpu_info"]))) + f" ({rows[0]['backends']})"


def _reason_of(done: Done, tests: Sequence[Test]) -> str:
    """Why a run failed."""
    tokens = max(t.depth + t.prompt + t.generate for t in tests)
    reason = done.error()
    if output.ran_out_of_memory(done.stderr) or done.status == -9:
        return f"not enough memory for {tokens} tokens ({reason})"
    return reason


def measure(
    pairs: Sequence[TypePair],
    tests: Sequence[Test],
    threads: int,
    model: pathlib.Path,
    rounds: int = 3,
    options: Sequence[str] = (),
) -> Speeds:
    """Measures pairs in rounds.  Each round measures all pairs in turn, and fills a depth once for all tests at it.

    model: a GGUF file.  options: more options of llama-bench.
    A pair that fails at a depth is not measured there again.  An interruption ends the measurement; the result has what
    is finished.
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
    """A Markdown table: the tokens per second of each pair, also relative to the first pair."""
    pairs = list(speeds.samples)
    lines = ["| K / V | " + " | ".join(map(str, tests)) + " |", "|---|" + "---|" * len(tests)]
    for pair in pairs:
        cells = []
        for test in tests:
            speed, base = speeds.median(pair, test), speeds.median(pairs[0], test)
            cell = "" if speed is None else f"{speed:.1f}"
            if speed is not None and base and pair != pairs[0]:
                cell += f" ({speed / base:.2f})"
            cells.append(cell)
        lines.append(f"| {pair} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attention_table(speeds: Speeds, cache: Cache, threads: int | None) -> str:
    """A Markdown table: the time of attention, which is the difference to a token with an empty cache.

    It is "" if there are no speeds with both a full and an empty cache.
    threads: number of threads of a plain read to compare with; None if the cache is not in the CPU's memory.
    """
    lines = []
    for pair, found in speeds.samples.items():
        generated = {test.depth: speeds.median(pair, test) for test in found if test.generate}
        for depth, speed in generated.items():
            if not depth or not speed or not generated.get(0):
                continue
            seconds = 1 / speed - 1 / (generated[0] or 1)
            size = pair.bytes(cache) * depth
            if seconds > 0:  # with a short cache, noise can be larger than the difference
                lines.append(
                    f"| {pair} | {depth} | {seconds * 1e3:.2f} | {size / 1e6:.1f} | {size / seconds / 1e9:.2f} |"
                    + (f" {read_bandwidth(size, threads) / 1e9:.2f} |" if threads else "")
                )
    head = [
        "| K / V | depth | attention, ms a token | cache, MB | GB/s |" + " plain read, GB/s |" * bool(threads),
        "|---|---|---|---|---|" + "---|" * bool(threads),
    ]
    return "\n".join(head + lines) if lines else ""
