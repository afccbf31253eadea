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
    sentences,
    spec_names,
    split,
    table,
)
from tbq.cli._argument import argument, at_least_one
from tbq.errors import TBQError
from tbq.index.vectors import read_vectors
from tbq.programs.signals import interruptible


def _sets(args: argparse.Namespace) -> Iterator[Vectors]:
    """One after the other, because a set may take much memory."""
    paths = args.vectors or []
    for path in paths:
        name = path.stem if [p.stem for p in paths].count(path.stem) == 1 else str(path)
        yield split(name, np.ascontiguousarray(read_vectors(path)[: args.n + args.queries], np.float32), args.queries)
    for name in args.sets:
        if name == "text":
            yield split("text", embed(sentences()[: args.n + args.queries]), args.queries)
        else:
            yield gaussian(int(name), args.n, args.queries)


def set_names(text: str) -> list[str]:
    """For argparse: "text" and dimensions, separated by commas."""
    names = list(dict.fromkeys(part for part in text.split(",") if part))
    for name in names:
        if name != "text" and not (
            name.isascii() and name.isdigit() and 2 <= int(name) <= 65536 and int(name) % 2 == 0
        ):
            raise argparse.ArgumentTypeError(f"{name!r} is neither 'text' nor an even number of dimensions")
    return names


def _run(args: argparse.Namespace) -> int:
    try:
        return _compare(args)
    except MemoryError:
        raise TBQError(f"no room for {args.n} vectors; fewer with --n") from None


def _compare(args: argparse.Namespace) -> int:
    from tqdm import tqdm  # type: ignore[import-untyped]

    faiss = load_faiss()
    if args.cpu_time and args.threads != 1:
        raise TBQError("--cpu-time needs --threads 1: the seconds of threads that wait for each other say nothing")
    if not args.specs:
        raise TBQError("--indices is empty; name at least one")
    if args.vectors and args.sets is None:
        args.sets = []
    args.sets = ["text", "128"] if args.sets is None else args.sets
    if not args.sets and not args.vectors:
        raise TBQError("--sets is empty; name at least one, or --vectors")
    format = picture_format(args.plot) if args.plot else ""
    results: dict[str, dict[str, Measured]] = {}
    shapes = {}
    complete, clock = False, time.process_time if args.cpu_time else time.perf_counter
    with (
        interruptible(),
        tqdm(bar_format="{desc} [{elapsed}]", leave=False) as bar,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for vectors in _sets(args):
            shapes[vectors.name] = vectors.base.shape
            results[vectors.name] = measure(
                vectors,
                args.specs,
                args.k,
                args.threads,
                args.rounds,
                args.train,
                clock,
                args.timed,
                bar.set_description_str,
            )
            if not args.json:
                bar.clear()
                n, dim = vectors.base.shape
                print(
                    f"{vectors.name}: {n} vectors of {dim}, {args.queries} queries\n\n{table(results[vectors.name], args.k)}\n",
                    flush=True,
                )
        complete = True
    if args.plot and results:
        replace(args.plot, draw(results, args.k, format))
    facts = {
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
    if args.json:
        print(
            json.dumps(
                {
                    **facts,
                    "sets": {
                        name: {
                            "n": shapes[name][0],
                            "dim": shapes[name][1],
                            "queries": args.queries,
                            "indices": {spec: dataclasses.asdict(m) for spec, m in found.items()},
                        }
                        for name, found in results.items()
                    },
                },
                indent=2,
            )
        )
    else:
        print(
            f"tbq {__version__} ({facts['kernels']}), faiss {faiss.__version__} ({facts['faiss_instructions']}); "
            f"{args.threads} threads{', seconds of the processor' * args.cpu_time}; best of {args.rounds} rounds; "
            f"faiss trained with up to {args.train} vectors; bytes without ids"
        )
    if not complete:
        print("tbq: interrupted", file=sys.stderr)
    return 0 if complete else 130


def _kernels() -> str:
    from tbq._ffi import ffi, lib

    return ffi.string(lib.tbq_best_kernels().name).decode()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """recall and queries per second of the vector index beside faiss's indices"""
    parser.epilog = (
        "examples: tbq bench index --plot recall.png\n"
        "          tbq bench index --sets 128,384,768,1536 --indices sq4,sq8,tbq4,tbq4+4\n"
        "          tbq bench index --vectors embeddings.npy --k 100\n\n"
        "indices: faiss's flat, sq8, sq4, pq (a byte for two dimensions; pq9: 9 bits; pqs: one codebook for all),\n"
        "         pqfs (4 bits for each, fast scan); ours tbq4, tbq3, tbq2, followed by -unbiased for the other estimator,\n"
        "         by +r to rescore the best r k with float16 vectors"
    )
    parser.add_argument(
        "--sets",
        type=set_names,
        metavar="NAME,...",
        help="text (sentence embeddings of Python's documentation) or a number of dimensions, for vectors that are uniform on the "
        "sphere (text,128, or none with --vectors)",
    )
    parser.add_argument(
        "--vectors",
        type=pathlib.Path,
        action="append",
        metavar="FILE.npy",
        help="a set of your own, of shape (n, dim); may be repeated",
    )
    parser.add_argument(
        "--indices",
        type=argument(spec_names),
        dest="specs",
        default=DEFAULT,
        metavar="INDEX,...",
        help="what to compare (%(default)s)",
    )
    parser.add_argument(
        "--n", type=at_least_one, default=100000, metavar="N", help="vectors of a set at the most (%(default)s)"
    )
    parser.add_argument(
        "--queries",
        type=at_least_one,
        default=1000,
        metavar="N",
        help="queries, which are not in the set (%(default)s)",
    )
    parser.add_argument("--timed", type=at_least_one, metavar="N", help="of the queries, so many are timed (all)")
    parser.add_argument("--k", type=at_least_one, default=10, metavar="K", help="neighbors to find (%(default)s)")
    parser.add_argument(
        "--threads", type=at_least_one, default=cores(), metavar="N", help="threads, of faiss too (%(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=3,
        metavar="N",
        help="times that each is measured; the best counts (%(default)s)",
    )
    parser.add_argument(
        "--train",
        type=at_least_one,
        default=65536,
        metavar="N",
        help="vectors that faiss trains with at the most (%(default)s)",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the processor's seconds instead of the wall clock's: for busy machines, with --threads 1",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="PICTURE",
        help="draw recall against queries per second; the ending says the format",
    )
    parser.set_defaults(run=_run)
