# SPDX-License-Identifier: MIT
"""`tbq search`."""

import argparse
import json
import os
import pathlib

from tbq._arguments import cores
from tbq._files import target
from tbq.cli._argument import add_command, at_least_one
from tbq.errors import TBQError
from tbq.index.index import Index
from tbq.index.vectors import read_vectors, room
from tbq.programs.signals import interruptible


def _build(args: argparse.Namespace) -> int:
    from tqdm import tqdm  # type: ignore[import-untyped]

    vectors = read_vectors(args.vectors)
    ids = read_vectors(args.ids, 1) if args.ids else None
    if args.index.exists() and not args.force:
        raise TBQError(f"{args.index} exists; --force replaces it")
    folder = target(args.index).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TBQError(f"{folder} is not a folder that can be written to")
    if args.index.exists() and any(args.index.samefile(path) for path in (args.vectors, args.ids) if path):
        raise TBQError(f"{args.index} has the vectors or ids of the index; name another file to write")
    index = Index(
        vectors.shape[1], args.bits, args.metric, estimator="unbiased" if args.unbiased else "mse", keep=args.keep
    )
    with interruptible(), room(len(vectors)):
        with tqdm(total=len(vectors), unit=" vectors", unit_scale=True, leave=False, delay=2) as bar:
            if ids is None:
                index.add(vectors, threads=args.threads, progress=bar.update)
            else:
                index.add_with_ids(vectors, ids, threads=args.threads, progress=bar.update)
        index.save(args.index)
    size = args.index.stat().st_size
    print(
        f"{args.index}: {len(index)} vectors of {index.dim}, {size} bytes, {size / max(1, len(index)):.1f} a vector "
        f"(float32: {4 * index.dim})"
    )
    return 0


def _query(args: argparse.Namespace) -> int:
    index = Index.load(args.index, verify=not args.no_verify)
    queries = read_vectors(args.queries)
    with interruptible(), room(len(queries)):
        scores, ids = index.search(
            queries, min(args.k, len(index)) if len(index) else args.k, rescore=args.rescore, threads=args.threads
        )
    if args.json:
        print(json.dumps([{"ids": i, "scores": s} for i, s in zip(ids.tolist(), scores.tolist())]))
        return 0
    out = ["query\trank\tid\tscore"]
    for query, (row_ids, row_scores) in enumerate(zip(ids.tolist(), scores.tolist())):
        out += [f"{query}\t{rank}\t{id}\t{score:.6g}" for rank, (id, score) in enumerate(zip(row_ids, row_scores), 1)]
    print("\n".join(out))
    return 0


def _add_build(parser: argparse.ArgumentParser) -> None:
    """make an index of vectors: 2 to 4 bits per value, no training"""
    parser.epilog = (
        "examples: tbq search build embeddings.npy embeddings.tbqi --metric cosine\n"
        "          tbq search build embeddings.npy embeddings.tbqi --keep float16   # for --rescore"
    )
    parser.add_argument("vectors", type=pathlib.Path, metavar="VECTORS_FILE", help="a .npy file of shape (n, dim)")
    parser.add_argument(
        "index", type=pathlib.Path, metavar="INDEX_FILE", help="the index to write, whole or not at all"
    )
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4, help="bits per value (%(default)s)")
    parser.add_argument(
        "--metric",
        choices=("ip", "cosine", "l2"),
        default="cosine",
        help="inner product, cosine or squared distance (%(default)s)",
    )
    parser.add_argument(
        "--ids",
        type=pathlib.Path,
        metavar="IDS_FILE",
        help="a .npy file of n integers, the ids of the vectors (0, 1, 2, ...)",
    )
    parser.add_argument(
        "--keep", choices=("float16", "float32"), help="keep the vectors too, for tbq search query --rescore"
    )
    parser.add_argument(
        "--unbiased", action="store_true", help="estimate products without bias instead of with the least error"
    )
    parser.add_argument(
        "--threads", type=at_least_one, default=cores(), metavar="N", help="threads of the CPU (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace the index if it exists")
    parser.set_defaults(run=_build)


def _add_query(parser: argparse.ArgumentParser) -> None:
    """print the nearest vectors of an index: query, rank, id, score"""
    parser.epilog = (
        "examples: tbq search query embeddings.tbqi queries.npy -k 5\n"
        "          tbq search query embeddings.tbqi queries.npy --rescore 4 --json"
    )
    parser.add_argument("index", type=pathlib.Path, metavar="INDEX_FILE", help="what tbq search build wrote")
    parser.add_argument("queries", type=pathlib.Path, metavar="QUERIES_FILE", help="a .npy file of shape (n, dim)")
    parser.add_argument(
        "-k",
        type=at_least_one,
        default=10,
        metavar="K",
        help="neighbors to find for each query, all vectors if there are fewer (%(default)s)",
    )
    parser.add_argument(
        "--rescore",
        type=at_least_one,
        default=1,
        metavar="R",
        help="find the best R * K, then choose by exact products (%(default)s)",
    )
    parser.add_argument(
        "--threads", type=at_least_one, default=cores(), metavar="N", help="threads of the CPU (%(default)s)"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not verify the file's checksums, for which all of it is read"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: for each query its ids and scores")
    parser.set_defaults(run=_query)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """find nearest neighbors among vectors of 2 to 4 bits per value"""
    parser.epilog = (
        "examples: tbq search build vectors.npy index.tbqi\n"
        "          tbq search query index.tbqi queries.npy\n"
        "Each command has its own --help."
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    add_command(commands, "build", _add_build)
    add_command(commands, "query", _add_query)
