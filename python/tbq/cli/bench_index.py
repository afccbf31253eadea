# SPDX-License-Identifier: MIT
"""`tbq bench index`."""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tbq._arguments import cores
from tbq._files import replace
from tbq._plots import picture_format
from tbq._version import __version__
from tbq.bench.index import (
    DEFAULT,
    Measured,
    Vectors,
    draw,
    embed,
    gaussian,
    load_faiss,
    measure,
    parse_specs,
    sentences,
    split,
    table,
)
from tbq.cli._argument import argument, at_least_one
from tbq.errors import TBQError
from tbq.index.vectors import read_vectors
from tbq.programs.signals import interruptible


def _sets(args: argparse.Namespace) -> Iterator[Vectors]:
    """The sets, made one after the other, because a set may take much memory."""
    paths = args.vectors or []
    for path in paths:
        name = path.stem if [p.stem for p in paths].count(path.stem) == 1 else str(path)
        yield split(name, np.ascontiguousarray(read_vectors(path)[: args.n + args.queries], np.float32), args.queries)
    for name in args.sets:
        if name == "text":
            yield split("text", embed(sentences()[: args.n + args.queries]), args.queries)
        else:
            yield gaussian(int(name), args.n, args.queries)


def _parse_sets(text: str) -> list[str]:
    """The sets of --sets: "text" and numbers of dimensions, separated by commas."""
    names = list(dict.fromkeys(part for part in text.split(",") if part))
    for name in names:
        is_number = name.isascii() and name.isdigit()
        if name != "text" and not (is_number and 2 <= int(name) <= 65536 and int(name) % 2 == 0):
            raise argparse.ArgumentTypeError(f"{name!r} is neither 'text' nor an even number of dimensions")
    return names


def _run(args: argparse.Namespace) -> int:
    try:
        return _compare(args)
    except MemoryError:
        raise TBQError(f"not enough memory for {args.n} vectors; choose fewer with --n") from None


def _check(args: argparse.Namespace) -> None:
    """Raises TBQError for arguments that leave nothing to measure; fills in the default of --sets."""
    if args.cpu_time and args.threads != 1:
        raise TBQError("--cpu-time needs --threads 1, because threads that wait for each other use CPU time too")
    if not args.specs:
        raise TBQError("--indices is empty; name at least one")
    if args.sets is None:
        args.sets = [] if args.vectors else ["text", "128"]
    if not args.sets and not args.vectors:
        raise TBQError("--sets is empty; name at least one, or --vectors")


def _compare(args: argparse.Namespace) -> int:
    from tqdm import tqdm  # type: ignore[import-untyped]

    faiss = load_faiss()
    _check(args)
    format = picture_format(args.plot) if args.plot else ""
    results: dict[str, dict[str, Measured]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    complete, clock = False, time.process_time if args.cpu_time else time.perf_counter
    with (
        interruptible(),
        tqdm(bar_format="{desc} [{elapsed}]", leave=False) as bar,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for vectors in _sets(args):
            n, dim = shapes[vectors.name] = vectors.base.shape
            limits = args.k, args.threads, args.rounds, args.train
            found = measure(vectors, args.specs, *limits, clock, args.timed, bar.set_description_str)
            results[vectors.name] = found
            if not args.json:
                bar.clear()
                print(f"{vectors.name}: {n} vectors of {dim}, {args.queries} queries", end="\n\n")
                print(table(found, args.k), end="\n\n", flush=True)
        complete = True
    if args.plot and results:
        replace(args.plot, draw(results, args.k, format))
    facts = _facts(args, faiss)
    if args.json:
        print(json.dumps({**facts, "sets": _as_dict(results, shapes, args.queries)}, indent=2))
    else:
        print(
            f"tbq {__version__} ({facts['kernels']}), faiss {faiss.__version__} ({facts['faiss_instructions']}); "
            f"{args.threads} threads{', CPU time' * args.cpu_time}; best of {args.rounds} rounds; "
            f"faiss trained with up to {args.train} vectors; bytes without ids"
        )
    if not complete:
        print("tbq: interrupted", file=sys.stderr)
    return 0 if complete else 130


def _facts(args: argparse.Namespace, faiss: Any) -> dict[str, Any]:
    """What is needed to repeat the measurement."""
    return {
        "tbq": __version__,
        "faiss": faiss.__version__,
        "kernels": _kernels(),
        "faiss_instructions": faiss.get_compile_options().strip(),
        "machine": platform.machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "cpu_time": args.cpu_time,
        "train": args.train,
        "k": args.k,
    }


def _as_dict(
    results: dict[str, dict[str, Measured]], shapes: dict[str, tuple[int, int]], queries: int
) -> dict[str, Any]:
    """The results by set."""
    return {
        name: {
            "n": shapes[name][0],
            "dim": shapes[name][1],
            "queries": queries,
            "indices": {spec: dataclasses.asdict(measured) for spec, measured in found.items()},
        }
        for name, found in results.items()
    }


def _kernels() -> str:
    from tbq._ffi import ffi, lib

    return ffi.string(lib.tbq_best_kernels().name).decode()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """compare the vector index with faiss's indices in recall and queries per second"""
    parser.epilog = (
        "examples: tbq bench index --plot recall.png\n"
        "          tbq bench index --sets 128,384,768,1536 --indices sq4,sq8,tbq4,tbq4+4\n"
        "          tbq bench index --vectors embeddings.npy --k 100\n\n"
        "indices of faiss: flat, sq8, sq4, pq (a byte for two dimensions), pq9 (9 bits for two dimensions),\n"
        "                  pqs (pq with one codebook for all), pqfs (4 bits for each dimension, fast scan)\n"
        "indices of tbq:   tbq4, tbq3, tbq2; -unbiased after the name chooses the other estimator,\n"
        "                  +r rescores the best r * k with float16 vectors"
    )
    parser.add_argument(
        "--sets",
        type=_parse_sets,
        metavar="NAME,...",
        help="text (sentence embeddings of Python's documentation), or a number of dimensions for vectors that are "
        "uniform on the sphere (text,128; none with --vectors)",
    )
    parser.add_argument(
        "--vectors",
        type=pathlib.Path,
        action="append",
        metavar="FILE.npy",
        help="a set of vectors, of shape (n, dim); may be repeated",
    )
    parser.add_argument(
        "--indices",
        type=argument(parse_specs),
        dest="specs",
        default=DEFAULT,
        metavar="INDEX,...",
        help="indices to compare (%(default)s)",
    )
    parser.add_argument(
        "--n", type=at_least_one, default=100000, metavar="N", help="largest number of vectors of a set (%(default)s)"
    )
    parser.add_argument(
        "--queries",
        type=at_least_one,
        default=1000,
        metavar="N",
        help="queries, which are not in the set (%(default)s)",
    )
    parser.add_argument("--timed", type=at_least_one, metavar="N", help="number of queries that are timed (all)")
    parser.add_argument("--k", type=at_least_one, default=10, metavar="K", help="neighbors to find (%(default)s)")
    parser.add_argument(
        "--threads", type=at_least_one, default=cores(), metavar="N", help="threads, also for faiss (%(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=3,
        metavar="N",
        help="number of measurements of each index; the best counts (%(default)s)",
    )
    parser.add_argument(
        "--train",
        type=at_least_one,
        default=65536,
        metavar="N",
        help="largest number of vectors that faiss trains with (%(default)s)",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure CPU time instead of wall-clock time: for busy machines, with --threads 1",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="PICTURE",
        help="draw recall against queries per second, for example recall.png",
    )
    parser.set_defaults(run=_run)
