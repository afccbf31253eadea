# SPDX-License-Identifier: MIT
"""Measures cache types side by side: `tbq bench speed` here, `tbq bench quality` in quality.py, `tbq bench index` in
index_bench.py."""
import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from tbq import _files, caches, index_bench, quality, shape
from tbq._run import Done, at_least_one, by_reason, cores, interruptible, run
from tbq.caches import Cache, TypePair
from tbq.errors import TBQError
from tbq.shape import Shape

__all__ = ["Speeds", "Test", "attention_table", "define", "measure", "read_bandwidth", "table"]


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
    failures: dict[tuple[TypePair, int], str] = dataclasses.field(default_factory=dict)  #: why a pair has none at a depth
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


def bench_arguments(model: pathlib.Path, pair: TypePair, tests: Sequence[Test], threads: int, options: Sequence[str]) -> list[str]:
    """llama-bench's, for tests at one depth, once each."""
    prompts = ",".join(str(t.prompt) for t in tests if t.prompt) or "0"
    generate = ",".join(str(t.generate) for t in tests if t.generate) or "0"
    return [*options, "-m", str(model), "-t", str(threads), "-fa", "1", "-ctk", pair.k, "-ctv", pair.v,
            "-p", prompts, "-n", generate, "-d", str(tests[0].depth), "-r", "1", "-o", "json"]


def llama_bench(model: pathlib.Path, pair: TypePair, tests: Sequence[Test], threads: int,
                options: Sequence[str] = ()) -> tuple[dict[Test, float], str]:
    """Tokens per second of each test, all at one depth; and the device.  TBQError with llama.cpp's reason if it fails."""
    arguments = bench_arguments(model, pair, tests, threads, options)
    done = run("llama-bench", arguments)
    if done.status > 0 and "failed to create context" in done.stderr:
        done = run("llama-bench", [*arguments, "-v"])  # only then it says why
    if done.status:
        raise TBQError(_failure(done, tests))
    try:
        rows = json.loads(done.stdout)
        found = {Test(row["n_prompt"], row["n_gen"], row["n_depth"]): float(row["avg_ts"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        raise TBQError("llama-bench printed no results; are the options after -- such that it runs?") from None
    if len(rows) != len(tests) or set(found) != set(tests):
        raise TBQError(f"llama-bench ran {len(rows)} tests instead of {len(tests)}; an option after -- must have one value, "
                       "and cache types, depths and prompts have options of their own")
    return found, " and ".join(filter(None, (rows[0]["cpu_info"], rows[0]["gpu_info"]))) + f" ({rows[0]['backends']})"


def _failure(done: Done, tests: Sequence[Test]) -> str:
    tokens = max(t.depth + t.prompt + t.generate for t in tests)
    reason = done.error()
    if "failed to allocate" in done.stderr or "out of memory" in done.stderr.lower() or done.status == -9:
        return f"no room for {tokens} tokens ({reason})"
    return reason


def measure(pairs: Sequence[TypePair], tests: Sequence[Test], threads: int, model: pathlib.Path, rounds: int = 3,
            options: Sequence[str] = ()) -> Speeds:
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
                found, speeds.device = llama_bench(model, pair, [t for t in tests if t.depth == depth], threads, options)
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
            cells.append("" if speed is None else f"{speed:.1f}" if pair == pairs[0] or not base else f"{speed:.1f} ({speed / base:.2f})")
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
                lines.append(f"| {pair} | {depth} | {seconds * 1e3:.2f} | {size / 1e6:.1f} | {size / seconds / 1e9:.2f} |"
                             + (f" {read_bandwidth(size, threads) / 1e9:.2f} |" if threads else ""))
    head = ["| K / V | depth | attention, ms a token | cache, MB | GB/s |" + " plain read, GB/s |" * bool(threads), "|---|---|---|---|---|" + "---|" * bool(threads)]
    return "\n".join(head + lines) if lines else ""


# --- the command --------------------------------------------------------------------------------------------------


def _depths(text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,8192")
    return [int(part) for part in dict.fromkeys(parts)]


def _prompts(text: str) -> list[Test]:
    tests = []
    for part in filter(None, text.split(",")):
        length, at, depth = part.partition("@")
        if not all(n.isascii() and n.isdigit() for n in (length, depth or "0")) or not int(length) or at and not depth:
            raise argparse.ArgumentTypeError(f"{part!r} is not a length such as 512, or a length and a depth such as 512@8192")
        tests.append(Test(int(length), 0, int(depth or 0)))
    return list(dict.fromkeys(tests))


@contextlib.contextmanager
def _model(args: argparse.Namespace) -> Iterator[tuple[pathlib.Path, Cache | None, dict[str, str]]]:
    """Path, cache and identity of the file named, or of one of random weights that exists inside only."""
    if args.model:
        model = caches.read_model(args.model)
        model.check_cached()
        longest = max(t.depth + t.prompt + t.generate for t in args.tests)
        if 0 < model.context < longest:
            print(f"tbq: note: the model was trained for {model.context} tokens, {longest} are asked for; speed does not depend on it",
                  file=sys.stderr)
        yield args.model, model.cache, {"model": args.model.name, "model_sha256": caches.sha256(args.model)}
        return
    with tempfile.TemporaryDirectory(prefix="tbq-", dir=args.scratch) as folder:
        free = shutil.disk_usage(folder).free
        if args.shape.size() * 1.01 > free:
            raise TBQError(f"the model takes {args.shape.size() / 1e9:.1f} GB, {pathlib.Path(folder).parent} has {free / 1e9:.1f} GB; "
                           "name another folder with --scratch, or a smaller --shape")
        path = pathlib.Path(folder) / "shape.gguf"
        with _files.naming(path):
            shape.write(path, args.shape)
        yield path, args.shape.cache(), {"shape": str(args.shape)}


def _print(args: argparse.Namespace, speeds: Speeds, cache: Cache | None, identity: dict[str, str]) -> None:
    if args.json:
        print(json.dumps({**identity, **caches.versions(), "device": speeds.device, "threads": args.threads, "options": args.options,
                          "tokens_per_second": {str(pair): {str(test): found for test, found in tests.items()}
                                                for pair, tests in speeds.samples.items()},
                          "failures": {f"{pair} @ {depth}": why for (pair, depth), why in speeds.failures.items()}}, indent=2))
        return
    versions = caches.versions()
    facts = [f"tokens per second, medians of {args.rounds}, and relative to {next(iter(speeds.samples))}; "
             "tg: generating, pp: a prompt, @: tokens in the cache before",
             f"model: {identity['model']}, sha256 {identity['model_sha256']}" if "model" in identity else
             f"model: random weights, --shape {identity['shape']}",
             f"llama.cpp {versions['llama_cpp_commit']}, tbq {versions['tbq']}; {args.threads} threads; {speeds.device}"]
    print(table(speeds, args.tests), end="\n\n", flush=True)  # before anything that could fail
    if attention := cache and attention_table(speeds, cache, None if speeds.gpu else args.threads):
        print(attention, end="\n\n")
    print("\n".join(facts))


def _run(args: argparse.Namespace) -> int:
    args.tests = [Test(0, args.generate, depth) for depth in args.depths] + args.prompts
    if not args.tests:
        raise TBQError("--depths and --prompts are both empty; one of them names what to measure")
    if args.scratch and not args.scratch.is_dir():
        raise TBQError(f"--scratch {str(args.scratch)!r} is not a folder")
    pairs = caches.parse(args.types)
    with interruptible(), _model(args) as (model, cache, identity):
        speeds = measure(pairs, args.tests, args.threads, model, args.rounds, args.options)
        if any(speeds.samples.values()):
            _print(args, speeds, cache, identity)
    if not speeds.complete:
        print("tbq: interrupted", file=sys.stderr)
        return 130
    if speeds.failures:
        raise TBQError(by_reason({f"{pair} @ {depth}": why for (pair, depth), why in speeds.failures.items()}))
    return 0


def _define_speed(parser: argparse.ArgumentParser) -> None:
    """tokens per second of cache types side by side, with llama-bench"""
    parser.epilog = ("examples: tbq bench speed --types f16,tbq4_0,tbq4_0/tbq3_0\n"
                     "          tbq bench speed --model model.gguf --depths 0,32768 --prompts 2048@32768 -- -ngl 99\n"
                     "          tbq bench speed --shape layers=32,width=4096,heads=32,kv_heads=8,ff=14336 --depths 0,131072")
    parser.add_argument("--types", default="f16,q8_0,q4_0,tbq4_0,tbq3_0,tbq2_0", metavar="K/V,...",
                        help="cache types, the first is what the others are compared with (%(default)s)")
    parser.add_argument("--depths", type=_depths, default="0,8192", metavar="N,...",
                        help="tokens in the cache when generating (%(default)s)")
    parser.add_argument("--generate", type=at_least_one, default=16, metavar="N", help="tokens to generate at each depth (%(default)s)")
    parser.add_argument("--prompts", type=_prompts, default="512,4096,512@8192", metavar="N[@DEPTH],...",
                        help="lengths of prompts, from an empty cache or after so many tokens (%(default)s)")
    parser.add_argument("--threads", type=at_least_one, default=cores(), metavar="N", help="threads of the CPU (%(default)s)")
    parser.add_argument("--rounds", type=at_least_one, default=3, metavar="N", help="times that each is measured (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=pathlib.Path, metavar="GGUF", help="instead of a model of random weights")
    which.add_argument("--shape", type=shape.parse, default=Shape(), metavar="KEY=N,...", help="of the model of random weights (%(default)s)")
    parser.add_argument("--scratch", type=pathlib.Path, metavar="FOLDER", help="for the model of random weights (the system's temporary one)")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON instead of tables")
    parser.add_argument("options", nargs="*", metavar="-- OPTION ...", help="options of llama-bench, one value each: -- -ngl 99")
    parser.set_defaults(run=_run)


def define(parser: argparse.ArgumentParser) -> None:
    """measure the speed or the quality of cache types, or the vector index, side by side with others"""
    parser.epilog = "examples: tbq bench speed, tbq bench quality --model model.gguf, tbq bench index; each has its own --help"
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, of in (("speed", _define_speed), ("quality", quality.define), ("index", index_bench.define)):
        of(commands.add_parser(name, help=of.__doc__, description=of.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
