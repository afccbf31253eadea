# SPDX-License-Identifier: MIT
"""`tbq bench index`: recall and queries per second of our index beside faiss's, on the same vectors in one run."""
import argparse
import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tbq import _pictures
from tbq._run import at_least_one, cores, interruptible
from tbq._version import __version__
from tbq.errors import TBQError
from tbq.index import Index
from tbq.vectors import read_vectors

__all__ = ["Measured", "Vectors", "define", "measure", "spec_names"]

Floats = npt.NDArray[np.float32]
Search = Callable[[Floats, int, int], npt.NDArray[np.int64]]  # queries, k, threads
Clock = Callable[[], float]

DEFAULT = "flat,sq8,sq4,pq,pqfs,tbq4,tbq4+4,tbq3,tbq2"
#: What --indices takes; ours may be followed by +r, to rescore the best r k with float16 vectors.
_SPEC = re.compile(r"flat|sq8|sq4|pq|pq9|pqs|pqfs|tbq[234](-unbiased)?(\+\d{1,4})?")


@dataclasses.dataclass(frozen=True)
class Vectors:
    """A set of unit vectors, float32, and the queries, which are not among them."""

    name: str
    base: Floats  #: (n, dim)
    queries: Floats  #: (q, dim)


@dataclasses.dataclass
class Measured:
    """What was found out about an index on a set."""

    bytes: float = 0  #: of a vector, ids left out
    build: float = float("inf")  #: seconds: training, and adding all vectors
    recall: float = 0  #: share of the true nearest k among the k found
    batch: float = 0  #: queries per second, all at once
    single: float = 0  #: queries per second of one thread, one query after the other


def spec_names(text: str) -> list[str]:
    """For argparse: names of indices, separated by commas."""
    names = list(dict.fromkeys(part for part in text.split(",") if part))
    for name in names:
        if not _SPEC.fullmatch(name):
            raise argparse.ArgumentTypeError(f"{name!r} is not one of flat, sq8, sq4, pq, pq9, pqs, pqfs, tbq4, tbq3, tbq2, "
                                             "tbq4-unbiased, tbq4+4")
    return names


def gaussian(dim: int, n: int, queries: int, seed: int = 0) -> Vectors:
    """Uniform on the sphere: no structure that training could find, and neighbours that are hardly nearer than the rest."""
    x = np.random.default_rng(seed).standard_normal((n + queries, dim), dtype=np.float32)
    return split(f"sphere {dim}", x, queries)


def split(name: str, x: Floats, queries: int) -> Vectors:
    """Unit vectors, of which some, chosen at random, are the queries."""
    if not np.isfinite(x).all():
        raise TBQError(f"{name} holds a NaN or an infinity")
    if len(x) < 2 * queries:
        raise TBQError(f"{name} has {len(x)} vectors; {queries} queries need twice as many")
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-30))
    order = np.random.default_rng(1).permutation(len(x))
    return Vectors(name, x[order[queries:]], x[order[:queries]])


def sentences() -> list[str]:
    """Those of Python's reference and of the docstrings of its standard library: every user has them."""
    import ast
    import sysconfig

    from pydoc_data.topics import topics

    texts = list(topics.values())
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        with contextlib.suppress(ValueError, SyntaxError, OSError):  # the tests of Python have files that are wrong on purpose
            tree = ast.parse(path.read_text(encoding="utf-8"))
            nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
            texts += filter(None, map(ast.get_docstring, nodes))
    found: dict[str, None] = {}
    for text in texts:
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text):
            words = sentence.split()
            if len(words) >= 5 and len(sentence) <= 300:
                found[" ".join(words)] = None
    return list(found)


def embed(texts: Sequence[str]) -> Floats:
    """Sentence embeddings, float32 of shape (n, 256): the mean of the vectors of the tokens, as WordLlama makes them.

    The model's files are in the package wordllama; its own loader may ask the network for them.
    """
    spec = importlib.util.find_spec("wordllama")
    try:
        from safetensors.numpy import load_file  # type: ignore[import-not-found, unused-ignore]
        from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise TBQError("the set 'text' needs wordllama: pip install 'ggml-tbq[bench]'")
    folder = pathlib.Path(spec.origin).parent
    weights, tokenizer = folder / "weights" / "l2_supercat_256.safetensors", folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    if not weights.is_file() or not tokenizer.is_file():
        raise TBQError(f"{folder} has no l2_supercat_256; wordllama 0.3 and 0.4 have it")
    table = next(iter(load_file(weights).values())).astype(np.float32)
    coder = Tokenizer.from_file(str(tokenizer))
    coder.no_padding()
    tokens = [code.ids for code in coder.encode_batch(list(texts), add_special_tokens=False)]
    means: Floats = np.stack([table[ids].mean(axis=0) for ids in tokens])
    return means


# --- the indices --------------------------------------------------------------------------------------------------


def _faiss() -> Any:
    try:
        import faiss  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise TBQError("tbq bench index needs faiss: pip install 'ggml-tbq[bench]'") from None
    return faiss


def _theirs(spec: str, base: Floats, train: int, threads: int) -> tuple[Search, float]:
    faiss = _faiss()
    faiss.omp_set_num_threads(threads)
    dim = base.shape[1]
    if spec in ("pq", "pq9", "pqs") and dim % 2:
        raise TBQError(f"{spec} needs an even number of dimensions, not {dim}; leave it out of --indices")
    # np: without the training of an order of the centroids that this search does not use, which takes longer than the rest
    kinds = {"flat": "Flat", "sq8": "SQ8", "sq4": "SQ4", "pq": f"PQ{dim // 2}x8np", "pqs": f"PQ{dim // 2}x8np", "pq9": f"PQ{dim // 2}x9np",
             "pqfs": f"PQ{dim}x4fs"}
    index = faiss.index_factory(dim, kinds[spec], faiss.METRIC_INNER_PRODUCT)
    if spec == "pqs":
        index.pq.train_type = faiss.ProductQuantizer.Train_shared
    try:
        index.train(base[:train])
    except RuntimeError as error:  # too few vectors, for the most part
        raise TBQError(f"faiss cannot train {spec} with {min(train, len(base))} vectors: {str(error).rpartition(': ')[2]}") from None
    index.add(base)
    size = 4 * dim if spec == "flat" else dim // 2 if spec == "pqfs" else index.sa_code_size()

    def search(queries: Floats, k: int, threads: int) -> npt.NDArray[np.int64]:
        faiss.omp_set_num_threads(threads)
        found: npt.NDArray[np.int64] = index.search(queries, k)[1]
        return found

    return search, size


def _ours(spec: str, base: Floats, train: int, threads: int) -> tuple[Search, float]:
    name, _, rescore = spec.partition("+")
    kept = int(rescore or 1)
    index = Index(base.shape[1], int(name[3]), "ip", estimator="unbiased" if "-" in name else "mse", keep="float16" if kept > 1 else None)
    index.add(base, threads=threads)
    return lambda queries, k, threads: index.search(queries, k, rescore=kept, threads=threads)[1], index.nbytes / len(base) - 8


def _rate(search: Search, queries: Floats, k: int, threads: int, at_once: int, clock: Clock) -> float:
    start = clock()
    for i in range(0, len(queries), at_once):
        search(queries[i:i + at_once], k, threads)
    return len(queries) / (clock() - start)


def measure(vectors: Vectors, specs: Sequence[str], k: int, threads: int, rounds: int, train: int, clock: Clock = time.perf_counter,
            timed: int | None = None, report: Callable[[str], object] = lambda step: None) -> dict[str, Measured]:
    """Builds each index, then searches with all of them in turn, round by round: the best round of each counts.

    train: vectors that faiss's indices are trained with, at the most.  clock: of seconds.  timed: so many of the queries are
    timed (all).  Recall is measured against faiss's flat index.
    """
    found: dict[str, Measured] = {}
    searches: dict[str, Search] = {}
    some = vectors.queries[:timed]
    truth = _theirs("flat", vectors.base, train, threads)[0](vectors.queries, k, threads)
    for spec in specs:
        report(f"{vectors.name}: building {spec}")
        start = clock()
        search, size = (_ours if spec.startswith("tbq") else _theirs)(spec, vectors.base, train, threads)
        built = clock() - start
        hits = sum(len(np.intersect1d(a, b)) for a, b in zip(search(vectors.queries, k, threads), truth))
        found[spec] = Measured(size, built, hits / truth.size)
        searches[spec] = search
    for turn in range(rounds):
        for spec, search in searches.items():
            report(f"{vectors.name}: round {turn + 1}, {spec}")
            one = found[spec]
            one.batch = max(one.batch, _rate(search, some, k, threads, len(some), clock))
            one.single = max(one.single, _rate(search, some[:50], k, 1, 1, clock))
    return found


# --- the command --------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Measured], k: int) -> str:
    """Markdown."""
    lines = [f"| index | bytes a vector | recall@{k} | queries/s | of sq4's | one by one, one thread | build, s |",
             "|---|---|---|---|---|---|---|"]
    base = found.get("sq4")
    for spec, m in found.items():
        relative = f"{m.batch / base.batch:.2f}" if base and base.batch else ""
        lines.append(f"| {spec} | {m.bytes:.0f} | {m.recall:.4f} | {m.batch:.0f} | {relative} | {m.single:.0f} | {m.build:.2f} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Measured]], k: int, format: str) -> bytes:
    """A picture: recall against queries per second, a panel for each set."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, found) in zip(panels, results.items()):
        for spec, m in found.items():
            ours = spec.startswith("tbq")
            axes.plot(m.recall, m.batch, "o" if ours else "s", color="C3" if ours else "0.45")
            axes.annotate(spec, (m.recall, m.batch), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(title=name, xlabel=f"recall@{k}", yscale="log")
        axes.margins(0.15)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("queries per second")
    out = io.BytesIO()
    figure.savefig(out, format=format, dpi=120)
    return out.getvalue()


def _sets(args: argparse.Namespace) -> Iterator[Vectors]:
    """One after the other, because a set may take much memory."""
    paths = args.vectors or []
    for path in paths:
        name = path.stem if [p.stem for p in paths].count(path.stem) == 1 else str(path)
        yield split(name, np.ascontiguousarray(read_vectors(path)[:args.n + args.queries], np.float32), args.queries)
    for name in args.sets:
        if name == "text":
            yield split("text", embed(sentences()[:args.n + args.queries]), args.queries)
        else:
            yield gaussian(int(name), args.n, args.queries)


def set_names(text: str) -> list[str]:
    """For argparse: "text" and dimensions, separated by commas."""
    names = list(dict.fromkeys(part for part in text.split(",") if part))
    for name in names:
        if name != "text" and not (name.isascii() and name.isdigit() and 2 <= int(name) <= 65536 and int(name) % 2 == 0):
            raise argparse.ArgumentTypeError(f"{name!r} is neither 'text' nor an even number of dimensions")
    return names


def _run(args: argparse.Namespace) -> int:
    try:
        return _compare(args)
    except MemoryError:
        raise TBQError(f"no room for {args.n} vectors; fewer with --n") from None


def _compare(args: argparse.Namespace) -> int:
    from tqdm import tqdm  # type: ignore[import-untyped]

    faiss = _faiss()
    if args.cpu_time and args.threads != 1:
        raise TBQError("--cpu-time needs --threads 1: the seconds of threads that wait for each other say nothing")
    if not args.specs:
        raise TBQError("--indices is empty; name at least one")
    if args.vectors and args.sets is None:
        args.sets = []
    args.sets = ["text", "128"] if args.sets is None else args.sets
    if not args.sets and not args.vectors:
        raise TBQError("--sets is empty; name at least one, or --vectors")
    format = _pictures.picture_format(args.plot) if args.plot else ""
    results: dict[str, dict[str, Measured]] = {}
    shapes = {}
    complete, clock = False, time.process_time if args.cpu_time else time.perf_counter
    with interruptible(), tqdm(bar_format="{desc} [{elapsed}]", leave=False) as bar, contextlib.suppress(KeyboardInterrupt):
        for vectors in _sets(args):
            shapes[vectors.name] = vectors.base.shape
            results[vectors.name] = measure(vectors, args.specs, args.k, args.threads, args.rounds, args.train, clock, args.timed,
                                            bar.set_description_str)
            if not args.json:
                bar.clear()
                n, dim = vectors.base.shape
                print(f"{vectors.name}: {n} vectors of {dim}, {args.queries} queries\n\n{table(results[vectors.name], args.k)}\n", flush=True)
        complete = True
    if args.plot and results:
        _pictures.replace(args.plot, draw(results, args.k, format))
    facts = {"tbq": __version__, "faiss": faiss.__version__, "kernels": _kernels(), "faiss_instructions": faiss.get_compile_options().strip(),
             "machine": platform.machine(), "threads": args.threads, "rounds": args.rounds, "cpu_time": args.cpu_time,
             "train": args.train, "k": args.k}
    if args.json:
        print(json.dumps({**facts, "sets": {name: {"n": shapes[name][0], "dim": shapes[name][1], "queries": args.queries,
                                                   "indices": {spec: dataclasses.asdict(m) for spec, m in found.items()}}
                                            for name, found in results.items()}}, indent=2))
    else:
        print(f"tbq {__version__} ({facts['kernels']}), faiss {faiss.__version__} ({facts['faiss_instructions']}); "
              f"{args.threads} threads{', seconds of the processor' * args.cpu_time}; best of {args.rounds} rounds; "
              f"faiss trained with up to {args.train} vectors; bytes without ids")
    if not complete:
        print("tbq: interrupted", file=sys.stderr)
    return 0 if complete else 130


def _kernels() -> str:
    from tbq._ffi import ffi, lib

    return ffi.string(lib.tbq_best_kernels().name).decode()


def define(parser: argparse.ArgumentParser) -> None:
    """recall and queries per second of the vector index beside faiss's indices"""
    parser.epilog = ("examples: tbq bench index --plot recall.png\n"
                     "          tbq bench index --sets 128,384,768,1536 --indices sq4,sq8,tbq4,tbq4+4\n"
                     "          tbq bench index --vectors embeddings.npy --k 100\n\n"
                     "indices: faiss's flat, sq8, sq4, pq (a byte for two dimensions; pq9: 9 bits; pqs: one codebook for all),\n"
                     "         pqfs (4 bits for each, fast scan); ours tbq4, tbq3, tbq2, followed by -unbiased for the other estimator,\n"
                     "         by +r to rescore the best r k with float16 vectors")
    parser.add_argument("--sets", type=set_names, metavar="NAME,...",
                        help="text (sentence embeddings of Python's documentation) or a number of dimensions, for vectors that are uniform on the "
                             "sphere (text,128, or none with --vectors)")
    parser.add_argument("--vectors", type=pathlib.Path, action="append", metavar="FILE.npy",
                        help="a set of your own, of shape (n, dim); may be repeated")
    parser.add_argument("--indices", type=spec_names, dest="specs", default=DEFAULT, metavar="INDEX,...",
                        help="what to compare (%(default)s)")
    parser.add_argument("--n", type=at_least_one, default=100000, metavar="N", help="vectors of a set at the most (%(default)s)")
    parser.add_argument("--queries", type=at_least_one, default=1000, metavar="N",
                        help="queries, which are not in the set (%(default)s)")
    parser.add_argument("--timed", type=at_least_one, metavar="N", help="of the queries, so many are timed (all)")
    parser.add_argument("--k", type=at_least_one, default=10, metavar="K", help="neighbours to find (%(default)s)")
    parser.add_argument("--threads", type=at_least_one, default=cores(), metavar="N", help="threads, of faiss too (%(default)s)")
    parser.add_argument("--rounds", type=at_least_one, default=3, metavar="N",
                        help="times that each is measured; the best counts (%(default)s)")
    parser.add_argument("--train", type=at_least_one, default=65536, metavar="N",
                        help="vectors that faiss trains with at the most (%(default)s)")
    parser.add_argument("--cpu-time", action="store_true",
                        help="count the processor's seconds instead of the wall clock's: for busy machines, with --threads 1")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PICTURE",
                        help="draw recall against queries per second; the ending says the format")
    parser.set_defaults(run=_run)
