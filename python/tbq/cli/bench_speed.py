# SPDX-License-Identifier: MIT
"""`tbq bench speed`."""

import argparse
import contextlib
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from tbq import _files
from tbq._arguments import cores, group_by_reason
from tbq.bench.random_model import RandomModel, parse_shape, write_random_model
from tbq.bench.speed import Speeds, Test, attention_table, measure, table
from tbq.cli._argument import argument, at_least_one
from tbq.errors import TBQError
from tbq.kv_cache.model import read_model, sha256
from tbq.kv_cache.type_pairs import Cache, parse_pairs
from tbq.programs.paths import versions
from tbq.programs.signals import interruptible


def _parse_depths(text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,8192")
    return [int(part) for part in dict.fromkeys(parts)]


def _parse_prompts(text: str) -> list[Test]:
    tests = []
    for part in filter(None, text.split(",")):
        length, at, depth = part.partition("@")
        if not all(n.isascii() and n.isdigit() for n in (length, depth or "0")) or not int(length) or at and not depth:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not a length such as 512, or a length and a depth such as 512@8192"
            )
        tests.append(Test(int(length), 0, int(depth or 0)))
    return list(dict.fromkeys(tests))


@contextlib.contextmanager
def _open_or_make_model(args: argparse.Namespace) -> Iterator[tuple[pathlib.Path, Cache | None, dict[str, str]]]:
    """The path, cache and identity of the model that --model names, or of a model of random weights.

    The model of random weights is removed at the end of the block.
    """
    if args.model:
        model = read_model(args.model)
        model.check_cached()
        longest = max(t.depth + t.prompt + t.generate for t in args.tests)
        if 0 < model.context < longest:
            print(
                f"tbq: note: the model was trained for {model.context} tokens, {longest} are asked for; "
                "speed does not depend on it",
                file=sys.stderr,
            )
        yield args.model, model.cache, {"model": args.model.name, "model_sha256": sha256(args.model)}
        return
    with tempfile.TemporaryDirectory(prefix="tbq-", dir=args.scratch) as folder:
        free = shutil.disk_usage(folder).free
        if args.shape.size() * 1.01 > free:
            raise TBQError(
                f"the model takes {args.shape.size() / 1e9:.1f} GB, {pathlib.Path(folder).parent} has {free / 1e9:.1f} "
                "GB; name another folder with --scratch, or a smaller --shape"
            )
        path = pathlib.Path(folder) / "shape.gguf"
        with _files.naming(path):
            write_random_model(path, args.shape)
        yield path, args.shape.cache(), {"shape": str(args.shape)}


def _as_dict(args: argparse.Namespace, speeds: Speeds, identity: dict[str, str]) -> dict[str, Any]:
    return {
        **identity,
        **versions(),
        "device": speeds.device,
        "threads": args.threads,
        "options": args.options,
        "tokens_per_second": {
            str(pair): {str(test): found for test, found in tests.items()} for pair, tests in speeds.samples.items()
        },
        "failures": {f"{pair} @ {depth}": why for (pair, depth), why in speeds.failures.items()},
    }


def _print(args: argparse.Namespace, speeds: Speeds, cache: Cache | None, identity: dict[str, str]) -> None:
    if args.json:
        print(json.dumps(_as_dict(args, speeds, identity), indent=2))
        return
    built = versions()
    model = f"random weights, --shape {identity['shape']}" if "shape" in identity else ""
    facts = [
        f"tokens per second, medians of {args.rounds}, and relative to {next(iter(speeds.samples))}; "
        "tg: generating, pp: a prompt, @: tokens in the cache before",
        f"model: {model or identity['model'] + ', sha256 ' + identity['model_sha256']}",
        f"llama.cpp {built['llama_cpp_commit']}, tbq {built['tbq']}; {args.threads} threads; {speeds.device}",
    ]
    # before the bandwidth is measured, which could fail
    print(table(speeds, args.tests), end="\n\n", flush=True)
    if attention := cache and attention_table(speeds, cache, None if speeds.gpu else args.threads):
        print(attention, end="\n\n")
    print("\n".join(facts))


def _run(args: argparse.Namespace) -> int:
    args.tests = [Test(0, args.generate, depth) for depth in args.depths] + args.prompts
    if not args.tests:
        raise TBQError("--depths and --prompts are both empty; at least one of them must name something to measure")
    if args.scratch and not args.scratch.is_dir():
        raise TBQError(f"--scratch {str(args.scratch)!r} is not a folder")
    pairs = parse_pairs(args.types)
    with interruptible(), _open_or_make_model(args) as (model, cache, identity):
        speeds = measure(pairs, args.tests, args.threads, model, args.rounds, args.options)
        if any(speeds.samples.values()):
            _print(args, speeds, cache, identity)
    if not speeds.complete:
        print("tbq: interrupted", file=sys.stderr)
        return 130
    if speeds.failures:
        raise TBQError(group_by_reason({f"{pair} @ {depth}": why for (pair, depth), why in speeds.failures.items()}))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """compare cache types in tokens per second, with llama-bench"""
    parser.epilog = (
        "examples: tbq bench speed --types f16,tbq4_0,tbq4_0/tbq3_0\n"
        "          tbq bench speed --model model.gguf --depths 0,32768 --prompts 2048@32768 -- -ngl 99\n"
        "          tbq bench speed --shape layers=32,width=4096,heads=32,kv_heads=8,ff=14336 --depths 0,131072"
    )
    parser.add_argument(
        "--types",
        default="f16,q8_0,q4_0,tbq4_0,tbq3_0,tbq2_0",
        metavar="K/V,...",
        help="cache types; the others are compared with the first (%(default)s)",
    )
    parser.add_argument(
        "--depths",
        type=_parse_depths,
        default="0,8192",
        metavar="N,...",
        help="tokens in the cache before generating (%(default)s)",
    )
    parser.add_argument(
        "--generate", type=at_least_one, default=16, metavar="N", help="tokens to generate at each depth (%(default)s)"
    )
    parser.add_argument(
        "--prompts",
        type=_parse_prompts,
        default="512,4096,512@8192",
        metavar="N[@DEPTH],...",
        help="lengths of prompts, with an empty cache or after DEPTH tokens (%(default)s)",
    )
    parser.add_argument(
        "--threads", type=at_least_one, default=cores(), metavar="N", help="threads of the CPU (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=at_least_one, default=3, metavar="N", help="number of measurements of each test (%(default)s)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", type=pathlib.Path, metavar="GGUF", help="a model to use instead of one with random weights"
    )
    which.add_argument(
        "--shape",
        type=argument(parse_shape),
        default=RandomModel(),
        metavar="KEY=N,...",
        help="shape of the model of random weights (%(default)s)",
    )
    parser.add_argument(
        "--scratch",
        type=pathlib.Path,
        metavar="FOLDER",
        help="folder for the model of random weights (the system's temporary folder)",
    )
    parser.add_argument("--json", action="store_true", help="print every sample as JSON instead of tables")
    parser.add_argument(
        "options", nargs="*", metavar="-- OPTION ...", help="options of llama-bench, one value each: -- -ngl 99"
    )
    parser.set_defaults(run=_run)
