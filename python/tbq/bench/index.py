# SPDX-License-Identifier: MIT
"""`tbq bench index`: recall and queries per second of the vector index and of faiss's indices, on the same vectors."""

import contextlib
import dataclasses
import importlib.util
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.index.index import Index

Floats = npt.NDArray[np.float32]
Search = Callable[[Floats, int, int], npt.NDArray[np.int64]]  # queries, k, threads
Clock = Callable[[], float]

DEFAULT = "flat,sq8,sq4,pq,pqfs,tbq4,tbq4+4,tbq3,tbq2"
#: The names that --indices takes.  +r after a tbq index rescores the best r * k with float16 vectors.
_SPEC = re.compile(r"flat|sq8|sq4|pq|pq9|pqs|pqfs|tbq[234](-unbiased)?(\+\d{1,4})?")


@dataclasses.dataclass(frozen=True)
class Vectors:
    """A set of unit vectors in float32, and queries that are not in the set."""

    name: str
    base: Floats  #: (n, dim)
    queries: Floats  #: (q, dim)


@dataclasses.dataclass
class Measured:
    """The figures of an index on a set."""

    bytes: float = 0  #: bytes of a vector without its id
    build: float = float("inf")  #: seconds for training and for adding all vectors
    recall: float = 0  #: share of the true nearest k among the k found
    batch: float = 0  #: queries per second, all queries in one call
    single: float = 0  #: queries per second of one thread, one query in a call


def parse_specs(text: str) -> list[str]:
    """The names of indices in a list that is separated by commas; TBQError for an unknown name."""
    names = list(dict.fromkeys(part for part in text.split(",") if part))
    for name in names:
        if not _SPEC.fullmatch(name):
            raise TBQError(
                f"{name!r} is not one of flat, sq8, sq4, pq, pq9, pqs, pqfs, tbq4, tbq3, tbq2, tbq4-unbiased, tbq4+4"
            )
    return names


def gaussian(dim: int, n: int, queries: int, seed: int = 0) -> Vectors:
    """Vectors that are uniform on the sphere.

    They have no structure that training could find, and neighbors are hardly nearer than other vectors.
    """
    x = np.random.default_rng(seed).standard_normal((n + queries, dim), dtype=np.float32)
    return split(f"sphere {dim}", x, queries)


def split(name: str, x: Floats, queries: int) -> Vectors:
    """Scales vectors to unit length, and takes some of them, chosen at random, as queries."""
    if not np.isfinite(x).all():
        raise TBQError(f"{name} holds a NaN or an infinity")
    if len(x) < 2 * queries:
        raise TBQError(f"{name} has {len(x)} vectors; {queries} queries need twice as many")
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-30))
    order = np.random.default_rng(1).permutation(len(x))
    return Vectors(name, x[order[queries:]], x[order[:queries]])


def sentences() -> list[str]:
    """The sentences of Python's reference and of its standard library's docstrings, which every user has."""
    import ast
    import sysconfig
    from pydoc_data.topics import topics

    texts = list(topics.values())
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        # Python's tests include files that are wrong on purpose
        with contextlib.suppress(ValueError, SyntaxError, OSError):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            nodes = (
                node
                for node in ast.walk(tree)
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            )
            texts += filter(None, map(ast.get_docstring, nodes))
    found: dict[str, None] = {}
    for text in texts:
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text):
            words = sentence.split()
            if len(words) >= 5 and len(sentence) <= 300:
                found[" ".join(words)] = None
    return list(found)


def embed(texts: Sequence[str]) -> Floats:
    """Sentence embeddings, float32 of shape (n, 256).  Each is the mean of its tokens' vectors, as in WordLlama.

    The model's files are read from the package wordllama, because its loader may use the network.
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
    weights = folder / "weights" / "l2_supercat_256.safetensors"
    tokenizer = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    if not weights.is_file() or not tokenizer.is_file():
        raise TBQError(f"{folder} has no l2_supercat_256; wordllama 0.3 and 0.4 have it")
    table = next(iter(load_file(weights).values())).astype(np.float32)
    coder = Tokenizer.from_file(str(tokenizer))
    coder.no_padding()
    tokens = [code.ids for code in coder.encode_batch(list(texts), add_special_tokens=False)]
    means: Floats = np.stack([table[ids].mean(axis=0) for ids in tokens])
    return means


# --- the indices --------------------------------------------------------------------------------------------------


def load_faiss() -> Any:
    """The module faiss; TBQError if it is not installed."""
    try:
        import faiss  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise TBQError("tbq bench index needs faiss: pip install 'ggml-tbq[bench]'") from None
    return faiss


def _build_faiss(spec: str, base: Floats, train: int, threads: int) -> tuple[Search, float]:
    """The search function of one of faiss's indices, and its bytes per vector."""
    faiss = load_faiss()
    faiss.omp_set_num_threads(threads)
    dim = base.shape[1]
    if spec in ("pq", "pq9", "pqs") and dim % 2:
        raise TBQError(f"{spec} needs an even number of dimensions, not {dim}; leave it out of --indices")
    # np: faiss does not train an order of the centroids; this search does not use it, and it takes longest to train
    kinds = {
        "flat": "Flat",
        "sq8": "SQ8",
        "sq4": "SQ4",
        "pq": f"PQ{dim // 2}x8np",
        "pqs": f"PQ{dim // 2}x8np",
        "pq9": f"PQ{dim // 2}x9np",
        "pqfs": f"PQ{dim}x4fs",
    }
    index = faiss.index_factory(dim, kinds[spec], faiss.METRIC_INNER_PRODUCT)
    if spec == "pqs":
        index.pq.train_type = faiss.ProductQuantizer.Train_shared
    try:
        index.train(base[:train])
    except RuntimeError as error:  # in most cases there are too few vectors
        raise TBQError(
            f"faiss cannot train {spec} with {min(train, len(base))} vectors: {str(error).rpartition(': ')[2]}"
        ) from None
    index.add(base)
    size = 4 * dim if spec == "flat" else dim // 2 if spec == "pqfs" else index.sa_code_size()

    def search(queries: Floats, k: int, threads: int) -> npt.NDArray[np.int64]:
        faiss.omp_set_num_threads(threads)
        found: npt.NDArray[np.int64] = index.search(queries, k)[1]
        return found

    return search, size


def _build_tbq(spec: str, base: Floats, train: int, threads: int) -> tuple[Search, float]:
    """The search function of a tbq index, and its bytes per vector, without the 8 of an id."""
    name, _, factor = spec.partition("+")
    rescore = int(factor or 1)
    index = Index(
        base.shape[1],
        int(name[3]),
        "ip",
        estimator="unbiased" if "-" in name else "mse",
        keep="float16" if rescore > 1 else None,
    )
    index.add(base, threads=threads)

    def search(queries: Floats, k: int, threads: int) -> npt.NDArray[np.int64]:
        return index.search(queries, k, rescore=rescore, threads=threads)[1]

    return search, index.nbytes / len(base) - 8


def _queries_per_second(search: Search, queries: Floats, k: int, threads: int, at_once: int, clock: Clock) -> float:
    start = clock()
    for i in range(0, len(queries), at_once):
        search(queries[i : i + at_once], k, threads)
    return len(queries) / (clock() - start)


def measure(
    vectors: Vectors,
    specs: Sequence[str],
    k: int,
    threads: int,
    rounds: int,
    train: int,
    clock: Clock = time.perf_counter,
    timed: int | None = None,
    report: Callable[[str], object] = lambda step: None,
) -> dict[str, Measured]:
    """Builds each index, then searches with all of them in turn, round by round.  The best round of an index counts.

    train: the most vectors that faiss's indices are trained with.  clock: a function that returns seconds.
    timed: how many of the queries are timed, all if None.
    The true neighbors are those that an exhaustive search finds: faiss's flat index.
    """
    found: dict[str, Measured] = {}
    searches: dict[str, Search] = {}
    some = vectors.queries[:timed]
    truth = _build_faiss("flat", vectors.base, train, threads)[0](vectors.queries, k, threads)
    for spec in specs:
        report(f"{vectors.name}: building {spec}")
        start = clock()
        build = _build_tbq if spec.startswith("tbq") else _build_faiss
        search, size = build(spec, vectors.base, train, threads)
        built = clock() - start
        hits = sum(len(np.intersect1d(a, b)) for a, b in zip(search(vectors.queries, k, threads), truth))
        found[spec] = Measured(size, built, hits / truth.size)
        searches[spec] = search
    for turn in range(rounds):
        for spec, search in searches.items():
            report(f"{vectors.name}: round {turn + 1}, {spec}")
            one = found[spec]
            one.batch = max(one.batch, _queries_per_second(search, some, k, threads, len(some), clock))
            one.single = max(one.single, _queries_per_second(search, some[:50], k, 1, 1, clock))
    return found


# --- output -------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Measured], k: int) -> str:
    """A Markdown table with a row for each index."""
    lines = [
        f"| index | bytes a vector | recall@{k} | queries/s | of sq4's | one by one, one thread | build, s |",
        "|---|---|---|---|---|---|---|",
    ]
    base = found.get("sq4")
    for spec, m in found.items():
        relative = f"{m.batch / base.batch:.2f}" if base and base.batch else ""
        lines.append(
            f"| {spec} | {m.bytes:.0f} | {m.recall:.4f} | {m.batch:.0f} | {relative} | {m.single:.0f} | {m.build:.2f} |"
        )
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Measured]], k: int, format: str) -> bytes:
    """A picture of recall against queries per second, with a panel for each set."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, found) in zip(panels, results.items()):
        for spec, m in found.items():
            is_tbq = spec.startswith("tbq")
            axes.plot(m.recall, m.batch, "o" if is_tbq else "s", color="C3" if is_tbq else "0.45")
            axes.annotate(spec, (m.recall, m.batch), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(title=name, xlabel=f"recall@{k}", yscale="log")
        axes.margins(0.15)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("queries per second")
    out = io.BytesIO()
    figure.savefig(out, format=format, dpi=120)
    return out.getvalue()
