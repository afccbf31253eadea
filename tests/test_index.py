# SPDX-License-Identifier: MIT
"""The vector index: its results, its errors, its files, its commands."""

import importlib.util
import json
import math
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

import tbq
from tbq.cli import main
from tbq.errors import TBQError
from tbq.index import Index

METRICS = ("ip", "cosine", "l2")


def vectors(n, dim, seed=0):
    """Vectors of different lengths, in overlapping clusters, so that there are neighbors to find."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((20, dim))
    x = centers[rng.integers(0, 20, n)] + 0.7 * rng.standard_normal((n, dim))
    return (x * rng.gamma(9, 1 / 9, (n, 1))).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def exact(metric, q, x):
    """Scores in double precision; nearer vectors have higher scores."""
    q, x = q.astype(np.float64), x.astype(np.float64)
    if metric == "l2":
        return -np.stack([((row - x) ** 2).sum(-1) for row in q])
    return unit(q) @ unit(x).T if metric == "cosine" else q @ x.T


def recall(metric, q, x, ids, k):
    return share(exact(metric, q, x), ids, k)


def share(scores, ids, k):
    truth = np.argsort(-scores, axis=1)[:, :k]
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids, truth)]) / k


# --- search results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_finds_neighbors(metric):
    x = vectors(3000, 100)
    q = vectors(50, 100)
    # measured with 4, 3 and 2 bits, for the worst metric: 0.85, 0.74 and 0.58
    for bits, least in ((4, 0.82), (3, 0.69), (2, 0.52)):
        index = Index(100, bits, metric, keep="float32")
        assert index.add(x).tolist() == list(range(3000))
        scores, ids = index.search(q, 10)
        assert scores.dtype == np.float32 and ids.dtype == np.int64 and scores.shape == ids.shape == (50, 10)
        assert recall(metric, q, x, ids, 10) > least
        assert (np.diff(scores) * (1 if metric == "l2" else -1) >= 0).all()
        rescored, better = index.search(q, 10, rescore=8)
        assert recall(metric, q, x, better, 10) > 0.99
        truth = np.take_along_axis(exact(metric, q, x), better, 1) * (-1 if metric == "l2" else 1)
        np.testing.assert_allclose(rescored, truth, rtol=1e-4)


@pytest.mark.parametrize("estimator", ("mse", "unbiased"))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", (1, 3, 63, 64, 65, 200))
def test_scores_are_products_with_reconstructed_vectors(metric, estimator, dim):
    """For every vector, up to the rounding of the query to 8 bits."""
    x, q = vectors(70, dim), vectors(5, dim, seed=1)
    index = Index(dim, 4, metric, estimator=estimator)
    index.add(x)
    scores, ids = index.search(q, len(index))
    assert (np.sort(ids) == np.arange(70)).all()
    decoded = index.reconstruct(ids.ravel()).reshape(5, 70, dim).astype(np.float64)
    queries = unit(q) if metric == "cosine" else q
    product = np.einsum("qd,qnd->qn", queries, decoded)
    if metric == "l2":
        product = np.maximum(
            (q.astype(np.float64) ** 2).sum(-1)[:, None] + (x[ids].astype(np.float64) ** 2).sum(-1) - 2 * product, 0
        )
    # 127 levels: the error of a rotated value is at most 1/254 of the largest one, which is at most 8 times their rms
    size = np.linalg.norm(queries, axis=-1)[:, None] * np.linalg.norm(decoded, axis=-1)
    assert (np.abs(scores - product) < (2 if metric == "l2" else 1) * size * 0.03 + 1e-6).all()
    assert np.sqrt(np.mean(((scores - product) / size) ** 2)) < 0.012


def test_reconstruct():
    """The blocks are those of tbq.quantize."""
    x = vectors(40, 128)
    index = Index(128, 3, "cosine")
    index.add(x)
    scaled = (unit(x) * math.sqrt(128)).astype(np.float32)
    expected = tbq.dequantize(tbq.quantize(scaled, "tbq3_0"), "tbq3_0", scaled.shape) / math.sqrt(128)
    got = index.reconstruct(np.arange(40))
    # a level may differ where scaling rounds differently
    assert np.mean((got - expected) ** 2) < 1e-3 * np.mean((got - unit(x)) ** 2)
    assert index.reconstruct(7).shape == (128,) and (index.reconstruct(7) == got[7]).all()
    assert index.reconstruct([]).shape == (0, 128)


@pytest.mark.parametrize("bits, lost", ((4, 0.0070), (3, 0.0294), (2, 0.114)))
def test_estimators(bits, lost):
    """The slope of estimated products over true ones: 1, or 1 minus the energy that quantization lost."""
    rng = np.random.default_rng(bits)
    x = unit(rng.standard_normal((4000, 128))).astype(np.float32)
    slopes = {}
    for estimator in ("mse", "unbiased"):
        index = Index(128, bits, "ip", estimator=estimator)
        index.add(x)
        q = unit(x[:200] + 0.05 * rng.standard_normal((200, 128))).astype(np.float32)
        scores, ids = index.search(q, len(index))
        estimate = np.take_along_axis(scores, np.argsort(ids, axis=1), 1)[np.arange(200), np.arange(200)]
        truth = (q * x[:200]).sum(1)
        ratio = estimate / truth
        slopes[estimator] = ratio.mean(), 4 * ratio.std() / math.sqrt(200)
    mean, margin = slopes["unbiased"]
    assert abs(mean - 1) < margin < 0.05
    mean, margin = slopes["mse"]
    assert abs(mean - (1 - lost)) < margin + 0.003
    assert bits == 4 or mean + margin < 1  # the two differ


def test_lengths_of_any_size():
    """The scales are those of unit vectors, which fit f16; each length is a float."""
    x, q = vectors(500, 48), vectors(20, 48, seed=1)
    plain = Index(48)
    plain.add(x)
    scores, ids = plain.search(q)
    for size in (1e-30, 1e-12, 1e12):
        index = Index(48)
        index.add(x * np.float32(size))
        scaled, same = index.search(q)
        assert np.mean(same == ids) > 0.99
        np.testing.assert_allclose(scaled / size, scores, rtol=2e-2)


def test_input_types():
    x = np.arange(1, 13).reshape(3, 4)
    expected = None
    for values in (
        x,
        x.tolist(),
        x.astype(np.float16),
        x.astype(np.float64),
        np.asfortranarray(x),
        x.astype(np.uint8),
        x[:, ::-1][:, ::-1],
    ):
        index = Index(4)
        index.add(values)
        scores, ids = index.search(values, 2)
        expected = expected or (scores.tolist(), ids.tolist())
        assert (scores.tolist(), ids.tolist()) == expected
    one_score, one_id = index.search(x[0], 2)
    assert one_score.shape == one_id.shape == (2,) and one_id.tolist() == expected[1][0]
    assert index.add(x[0]).tolist() == [3]
    none, nobody = index.search(np.empty((0, 4)), 2)
    assert none.shape == nobody.shape == (0, 2)


@pytest.mark.parametrize("queries", (1, 3, 100))
def test_threads_do_not_matter(queries):
    """Work is divided by queries, or by vectors and merged.  Of equal scores, the vector that was added first wins."""
    x = np.repeat(vectors(3000, 192), 7, axis=0)
    q = vectors(queries, 192, seed=2)
    first = Index(192)
    first.add(x, threads=1)
    other = Index(192)
    other.add(x, threads=3)
    scores, ids = first.search(q, 20, threads=1)
    assert (np.diff(ids)[np.diff(scores) == 0] > 0).all() and (np.diff(scores) == 0).any()
    for index, threads in ((first, 2), (first, 5), (other, 3)):
        again = index.search(q, 20, threads=threads)
        assert (again[0] == scores).all() and (again[1] == ids).all()


# --- changes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, estimator, keep", (("ip", "mse", None), ("l2", "unbiased", "float32"), ("cosine", "mse", "float16"))
)
def test_changes(metric, estimator, keep, tmp_path):
    """Equal to a new index of the same vectors, after each of many random changes."""
    rng = np.random.default_rng(5)
    x, q = vectors(600, 72), vectors(4, 72, seed=1)
    index, held, used = Index(72, 3, metric, estimator=estimator, keep=keep), {}, 0
    for _ in range(60):
        kind = rng.integers(0, 4)
        if kind == 0:
            some = rng.integers(0, 600, rng.integers(0, 40))
            ids = index.add(x[some])
            assert ids.tolist() == list(range(used, used + len(some)))
            held.update(zip(ids.tolist(), some))
        elif kind == 1:
            some = rng.integers(0, 600, rng.integers(0, 20))
            free = np.setdiff1d(np.arange(used + 50), list(held))
            ids = rng.choice(free, len(some), replace=False)
            index.add_with_ids(x[some], ids)
            held.update(zip(ids.tolist(), some))
        elif kind == 2 and held:
            gone = rng.choice(list(held), rng.integers(0, len(held) + 1) // 2, replace=False)
            index.remove(int(gone[0]) if len(gone) == 1 else gone)
            for id in gone.tolist():
                del held[id]
        else:
            index.save(tmp_path / "index")
            index = Index.load(tmp_path / "index")
        used = max([used, *(id + 1 for id in held)])
        assert len(index) == len(held) and sorted(index.ids.tolist()) == sorted(held)
        if held:
            assert next(iter(held)) in index and used not in index
            fresh = Index(72, 3, metric, estimator=estimator, keep=keep)
            fresh.add_with_ids(x[list(held.values())], list(held))
            k = min(7, len(held))
            for rescore in (1, 3) if keep else (1,):
                np.testing.assert_array_equal(
                    index.search(q, k, rescore=rescore)[0], fresh.search(q, k, rescore=rescore)[0]
                )
            some = list(held)[:5]
            np.testing.assert_array_equal(index.reconstruct(some), fresh.reconstruct(some))
    assert used > 100


def test_nothing_is_left_of_removed_vectors(tmp_path):
    """Of removed vectors, the file of an index shows only the next id."""
    x = vectors(50, 64)
    index = Index(64, keep="float16")
    index.add(x)
    with pytest.raises(TBQError):
        index.add(np.vstack([x, np.full((1, 64), np.nan, np.float32)]))
    index.remove(np.arange(20, 50))
    index.save(tmp_path / "a")
    other = Index(64, keep="float16")
    other.add(x[:20])
    other._next = 50
    other.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- the center ---------------------------------------------------------------------------------------------------


def normal(n, dim, c, seed=0):
    return (np.random.default_rng(seed).standard_normal((n, dim)) + c).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("c", (0, 3, 10, 50))
def test_data_that_is_not_centered(metric, c):
    """Without a center, l2 and cosine find 0.65, 0.18 and 0.01 of the neighbors at 3, 10 and 50."""
    x, q = normal(2000, 128, c), normal(400, 128, c, seed=1)
    index = Index(128, 4, metric, keep="float16")
    index.add(x)
    center = (unit(x) if metric == "cosine" else x).mean(axis=0)
    assert np.abs(index.center - center).max() < 0.3 * np.abs(center).max() if c else not index.center.any()
    truth = exact(metric, q, x)
    for rescore, least, error in ((1, 0.88, 0.1), (4, 0.99, 2e-3)):
        scores, ids = index.search(q, 10, rescore=rescore)
        assert share(truth, ids, 10) >= least
        true = np.take_along_axis(truth, ids, 1) * (-1 if metric == "l2" else 1)
        assert np.sqrt(np.mean((scores - true) ** 2)) < error * truth.std()


@pytest.mark.parametrize("metric", ("ip", "cosine"))
def test_queries_that_are_not_like_the_vectors(metric):
    """Queries opposite to the vectors, around 0, and short ones: each finds its neighbors."""
    x = normal(3000, 64, 5)
    q = np.concatenate([normal(100, 64, -5, 1), normal(100, 64, 0, 2), normal(100, 64, 5, 3) * np.float32(1e-3)])[
        np.random.default_rng(0).permutation(300)
    ]
    index = Index(64, 4, metric)
    index.add(x)
    scores, ids = index.search(q, 10)
    assert recall(metric, q, x, ids, 10) > 0.88
    for some in (slice(0, 1), slice(5, 40)):  # a query's result does not depend on the other queries
        assert all((a == b[some]).all() for a, b in zip(index.search(q[some], 10), (scores, ids)))


@pytest.mark.parametrize("metric, keep", (("ip", None), ("cosine", "float16"), ("l2", "float32")))
@pytest.mark.parametrize("n", (1, 2, 255, 256, 300))
def test_how_vectors_are_divided_into_calls_does_not_matter(metric, keep, n, tmp_path):
    """The same file after one add and after many, with saving and loading in between."""
    x, path = normal(n, 70, 2), tmp_path / "index"
    files = set()
    for step in (1, 7, 100, 300):
        index = Index(70, 4, metric, keep=keep)
        for turn, start in enumerate(range(0, n, step)):
            index.add(x[start : start + step], threads=1 + turn % 2)
            if turn % 10 == 1:
                index.save(path)
                index = Index.load(path)
            assert index.search(x[0], 1)[1][0] == 0 or metric == "ip"
        index.save(path)
        files.add(path.read_bytes())
    assert len(files) == 1


def test_center_is_fixed_once_there_are_enough():
    index = Index(20, 4, "l2")
    index.add(normal(255, 20, 5))
    before = index.center
    index.add(normal(1, 20, 9))
    fixed = index.center
    assert (fixed != before).any()
    index.add(normal(1000, 20, 70))
    index.remove(np.arange(1000))
    assert (index.center == fixed).all()
    index.remove(index.ids)
    assert not index.center.any()  # an empty index has none
    index.add(normal(300, 20, 70))
    assert np.abs(index.center - 70).max() < 0.5


def test_removed_vectors_have_no_part_in_a_center_that_is_being_measured(tmp_path):
    x = normal(200, 20, 3)
    index = Index(20)
    index.add(x)
    index.remove(np.arange(0, 200, 2))
    other = Index(20)
    other.add_with_ids(x[1::2], np.arange(1, 200, 2))
    assert (index.center == other.center).all()
    assert (index.search(x, 10)[0] == other.search(x, 10)[0]).all() and (
        index.reconstruct([1, 99]) == other.reconstruct([1, 99])
    ).all()


def test_centers_of_the_caller(tmp_path):
    x, q = normal(500, 30, 40), normal(20, 30, 40, seed=1)
    for metric in METRICS:
        center = unit(np.ones(30)) if metric == "cosine" else np.full(30, 40)
        given = Index(30, 4, metric, center=center)
        given.add(x[:3])
        assert (given.center == center.astype(np.float32)).all()
        given.save(tmp_path / "given")
        given = Index.load(tmp_path / "given")
        given.add(x[3:])
        assert (given.center == center.astype(np.float32)).all() and recall(metric, q, x, given.search(q)[1], 10) > 0.85
        none = Index(30, 4, metric, center=np.zeros(30))
        none.add(x)
        assert not none.center.any() and recall(metric, q, x, none.search(q)[1], 10) < 0.5 or metric == "ip"
        assert none.nbytes < given.nbytes


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", (1, 300))
def test_vectors_that_are_all_equal(metric, n):
    """Nothing is left to quantize, and every score is right."""
    x, q = np.full((n, 20), 7.25, np.float32), normal(5, 20, 0)
    index = Index(20, 2, metric, keep="float16")
    index.add(x)
    for rescore in (1, 2):
        scores, ids = index.search(q, n, rescore=rescore)
        np.testing.assert_allclose(
            scores, np.abs(exact(metric, q, x)) if metric == "l2" else exact(metric, q, x), rtol=1e-5, atol=1e-6
        )
        assert (ids == np.arange(n)).all()
    assert np.abs(index.reconstruct(0) - (unit(x[0]) if metric == "cosine" else x[0])).max() < 1e-6


def test_a_few_vectors_far_away_do_not_move_the_center():
    x = normal(2000, 32, 0)
    x[10] *= np.float32(1e17)
    q = normal(50, 32, 0, seed=1)
    index = Index(32, 4, "l2")
    index.add(x)
    assert not index.center.any() and recall("l2", q, x, index.search(q)[1], 10) > 0.8


def test_center_and_halves():
    """float16 must hold the residual of a vector.  When the center moves, vectors that were accepted stay."""
    index = Index(8, 4, "l2", keep="float16")
    index.add(normal(3, 8, 1e5))
    with pytest.raises(TBQError, match=r"vectors\[1\] is too far from the center for float16"):
        index.add(np.concatenate([normal(1, 8, 1e5), normal(100, 8, 0)]))
    index.add(normal(20, 8, 1e5, seed=1))
    assert len(index) == 23 and index.search(normal(1, 8, 1e5), 1, rescore=2)[1][0, 0] == 0


# --- wrong arguments ----------------------------------------------------------------------------------------------

NAN, INF = np.full((1, 8), np.nan, np.float32), np.full(8, np.inf)
HUGE = np.full(8, 1e300)
WRONG = {
    "dim": (lambda i: Index(0), "dim is 0; it must be from 1 to 1048576"),
    "dim float": (lambda i: Index(8.0), "dim is 8.0; it must be an integer from 1 to 1048576"),
    "bits": (lambda i: Index(8, 5), "bits is 5; it must be from 2 to 4"),
    "metric": (lambda i: Index(8, 4, "cos"), "metric 'cos' is not one of ip, cosine, l2"),
    "metric array": (lambda i: Index(8, 4, np.ones(2)), "metric array([1., 1.]) is not one of ip, cosine, l2"),
    "estimator": (lambda i: Index(8, estimator=1), "estimator 1 is not one of mse, unbiased"),
    "keep": (lambda i: Index(8, keep="float64"), "keep 'float64' is not one of None, float16, float32"),
    "shape": (lambda i: i.add(np.ones((3, 7))), "vectors have shape (3, 7); it must be (n, 8), or (8,) for one"),
    "axes": (lambda i: i.add(np.ones((1, 3, 8))), "vectors have shape (1, 3, 8); it must be (n, 8), or (8,) for one"),
    "scalar": (lambda i: i.add(1.0), "vectors have shape (); it must be (n, 8), or (8,) for one"),
    "text": (lambda i: i.add(["abc"]), "the dtype of vectors is <U3; it must be a type of real numbers"),
    "complex": (
        lambda i: i.add(np.ones(8, complex)),
        "the dtype of vectors is complex128; it must be a type of real numbers",
    ),
    "objects": (
        lambda i: i.add(np.array([None] * 8)),
        "the dtype of vectors is object; it must be a type of real numbers",
    ),
    "ragged": (lambda i: i.add([[1, 2], [3]]), "vectors are ragged; rows must have one length"),
    "nan": (lambda i: i.add(np.vstack([np.ones((2, 8)), NAN])), "vectors[2] holds a NaN or an infinity"),
    "nan far": (
        lambda i: i.add(np.vstack([np.ones((300000, 8), np.float32), NAN])),
        "vectors[300000] holds a NaN or an infinity",
    ),
    "inf": (lambda i: i.add(INF), "vectors[0] holds a NaN or an infinity"),
    "huge": (lambda i: i.add(HUGE), "vectors[0] holds a NaN or an infinity"),
    "long": (lambda i: i.add(np.full(8, 1e18)), "vectors[0] has a length of 2^60 or more"),
    "zero": (lambda i: Index(8, 4, "cosine").add(np.zeros(8)), "vectors[0] is zero, which has no cosine with anything"),
    "half": (
        lambda i: Index(8, keep="float16", center=np.zeros(8)).add(np.full(8, 1e5)),
        "vectors[0] holds a value that float16 cannot; keep 'float32' can",
    ),
    "far": (
        lambda i: Index(8, keep="float16", center=np.ones(8)).add(np.full(8, 1e5)),
        "vectors[0] is too far from the center for float16; keep 'float32' can hold it",
    ),
    "center shape": (lambda i: Index(8, center=np.ones(9)), "center has shape (9,); it must be (8,)"),
    "center nan": (lambda i: Index(8, center=NAN[0]), "center[0] holds a NaN or an infinity"),
    "center text": (lambda i: Index(8, center="no"), "the dtype of center is <U2; it must be a type of real numbers"),
    "id twice": (lambda i: i.add_with_ids(np.ones((2, 8)), [9, 9]), "id 9 occurs twice"),
    "id taken": (lambda i: i.add_with_ids(np.ones((2, 8)), [9, 2]), "id 2 is already in the index"),
    "id count": (lambda i: i.add_with_ids(np.ones((2, 8)), [9]), "there are 2 vectors and 1 ids"),
    "id float": (
        lambda i: i.add_with_ids(np.ones(8), [1.5]),
        "ids have shape (1,) and dtype float64; they must be integers of shape (n,)",
    ),
    "id axes": (
        lambda i: i.add_with_ids(np.ones(8), [[1]]),
        "ids have shape (1, 1) and dtype int64; they must be integers of shape (n,)",
    ),
    "id negative": (lambda i: i.add_with_ids(np.ones(8), -1), "id -1 is not from 0 to 2^63 - 2"),
    "id large": (
        lambda i: i.add_with_ids(np.ones(8), np.uint64(1 << 63)),
        "id 9223372036854775808 is not from 0 to 2^63 - 2",
    ),
    "remove": (lambda i: i.remove([1, 77]), "id 77 is not in the index"),
    "remove twice": (lambda i: i.remove([1, 2, 1]), "id 1 occurs twice"),
    "reconstruct": (lambda i: i.reconstruct(-1), "id -1 is not from 0 to 2^63 - 2"),
    "reconstruct missing": (lambda i: i.reconstruct(5), "id 5 is not in the index"),
    "query shape": (lambda i: i.search(np.ones(9), 1), "queries have shape (9,); it must be (n, 8), or (8,) for one"),
    "query nan": (lambda i: i.search(NAN, 1), "queries[0] holds a NaN or an infinity"),
    "query zero": (
        lambda i: _one("cosine").search(np.zeros(8), 1),
        "queries[0] is zero, which has no cosine with anything",
    ),
    "empty": (lambda i: Index(8).search(np.ones(8), 1), "the index is empty"),
    "k large": (lambda i: i.search(np.ones(8), 6), "k is 6; it must be from 1 to 5; the index has 5 vectors"),
    "k": (lambda i: i.search(np.ones(8), 0), "k is 0; it must be from 1 to 5; the index has 5 vectors"),
    "k float": (lambda i: i.search(np.ones(8), 1.0), "k is 1.0; it must be an integer from 1 to 5"),
    "rescore": (
        lambda i: i.search(np.ones(8), 1, rescore=2),
        "rescore needs the vectors themselves; make the index with keep='float16'",
    ),
    "threads": (lambda i: i.search(np.ones(8), 1, threads=0), "threads is 0; it must be from 1 to 4096"),
}


def _one(metric):
    index = Index(8, 4, metric)
    index.add(np.ones(8))
    return index


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    """Each error is one line, and does not change the index."""
    index = Index(8)
    index.add(vectors(5, 8))
    before = index.ids.tolist(), index.search(np.ones(8), 5)[0].tolist(), index.nbytes
    act, message = WRONG[what]
    with pytest.raises(TBQError) as error:
        act(index)
    assert str(error.value) == message
    assert (index.ids.tolist(), index.search(np.ones(8), 5)[0].tolist(), index.nbytes) == before
    assert index.add(np.ones(8)).tolist() == [5]


LAST = 2**63 - 2  # of the ids


def test_ids_end(tmp_path):
    """An index with the last ids can be saved and loaded; vectors without an id are refused before anything changes."""
    x, path = vectors(12, 8), tmp_path / "index"
    index = Index(8)
    index.add_with_ids(x[:1], [LAST - 3])
    for n, ids in ((4, None), (3, [LAST - 2, LAST - 1, LAST]), (1, None)):
        before = index.ids.tolist(), index.nbytes, index.search(x, 1)[0].tolist()
        if ids is None:
            with pytest.raises(
                TBQError,
                match=f"{n} vectors would get ids from .*, but 2\\^63 - 2 is the last; add_with_ids takes others",
            ):
                index.add(x[:n])
            assert (index.ids.tolist(), index.nbytes, index.search(x, 1)[0].tolist()) == before
        else:
            assert index.add(x[:n]).tolist() == ids
        index.save(path)
        loaded = Index.load(path)
        assert loaded.ids.tolist() == index.ids.tolist()
        index = loaded
    assert index.add(x[:0]).tolist() == []
    index.remove(index.ids)  # ids are not given twice
    with pytest.raises(TBQError, match="1 vectors would get ids from"):
        index.add(x[0])
    index.add_with_ids(x[:2], [0, LAST])
    assert LAST in index and LAST + 1 not in index and 2**70 not in index and -1 not in index


@pytest.mark.parametrize(
    "ids, message",
    (
        ([2**63 - 1], "id 9223372036854775807 is not from 0 to"),
        (np.array([2**64 - 1], np.uint64), "id 18446744073709551615 is not from 0 to"),
        ([2**70], "must be integers of shape"),
        ([-(2**63)], "id -9223372036854775808 is not from 0 to"),
        (np.array([-1], np.int8), "id -1 is not from 0 to"),
        ([2.0], "must be integers of shape"),
        ([2**63, -1], "must be integers of shape"),
        ([True], "must be integers of shape"),
    ),
    ids=str,
)
def test_invalid_ids(ids, message):
    index = Index(8)
    index.add(vectors(2, 8))
    for act in (
        lambda: index.add_with_ids(vectors(len(ids), 8), ids),
        lambda: index.remove(ids),
        lambda: index.reconstruct(ids),
    ):
        with pytest.raises(TBQError, match=message):
            act()
    assert index.ids.tolist() == [0, 1]


def test_ids_of_any_layout():
    index = Index(8)
    x = np.asfortranarray(vectors(12, 8))
    index.add_with_ids(x[::4], np.arange(12, dtype=np.uint64)[::4])
    index.add_with_ids(x[1::4], np.arange(12, dtype=">i4")[1::4])
    index.add_with_ids(x[2::4], range(2, 12, 4))
    assert sorted(index.ids.tolist()) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    index.remove(np.array([1, 5], np.uint8)[::-1])
    fresh = Index(8)
    fresh.add_with_ids(x[index.ids], index.ids)
    assert (index.search(x, 7)[1] == fresh.search(x, 7)[1]).all()


@pytest.mark.parametrize("number", (2**31, 2**63, 2**64, 2**100))
def test_large_numbers(number):
    index = Index(8)
    index.add(vectors(2, 8))
    for act in (
        lambda: index.search(np.ones(8), number),
        lambda: index.search(np.ones(8), 1, threads=number),
        lambda: Index(number),
        lambda: Index(8, number),
    ):
        with pytest.raises(TBQError, match=f"is {number}; it must be from"):
            act()


def test_empty():
    index = Index(8)
    assert len(index) == 0 and index.nbytes == 0 and 0 not in index and "x" not in index
    assert index.add(np.empty((0, 8))).tolist() == []
    index.remove([])
    assert index.ids.tolist() == []
    assert repr(index).startswith("Index(8, bits=4, metric='ip', estimator='mse', keep=None): 0 vectors")


# --- files --------------------------------------------------------------------------------------------------------


SAVED = vectors(37, 70) + np.float32(2)


@pytest.fixture
def saved(tmp_path):
    index = Index(70, 3, "l2", keep="float16")
    index.add_with_ids(SAVED, np.arange(100, 137))
    path = tmp_path / "an index"
    index.save(path)
    return index, path


def test_file(saved):
    index, path = saved
    loaded = Index.load(path)
    q = vectors(3, 70, seed=1)
    for a, b in zip(index.search(q, 9, rescore=2), loaded.search(q, 9, rescore=2)):
        assert (a == b).all()
    assert repr(loaded) == repr(index)
    # as the module documents: a header of 128 bytes, sections at multiples of 64; 3 groups of 2 blocks
    sizes = [70 * 4, 3 * 2 * 32, 3 * 2 * 16 * 24, 48 * 4, 48 * 4, 37 * 8, 37 * 70 * 2, 37 * 70 * 4]
    at = 128
    for size in sizes[:-1]:
        at = -(-(at + size) // 64) * 64
    assert path.stat().st_size == at + sizes[-1]
    data = path.read_bytes()
    assert struct.unpack_from("<8s6I3Q2I", data) == (b"TBQINDEX", 2, 1, 3, 2, 0, 2, 70, 37, 137, 1, 2)
    assert (np.frombuffer(data, "<f4", 70, 128) == index.center).all() and index.center.all()
    assert np.frombuffer(data, "<u2", 16, _SCALES)[5] == tbq.quantize(_scaled(index, 5), "tbq3_0").view("<u2")[0]
    assert (np.frombuffer(data, "<f4", 37 * 70, at).reshape(37, 70) == SAVED).all()


_SCALES = 128 + 5 * 64  # where they begin, after the center of 280 bytes


def _scaled(index, row):
    x = np.zeros(128, np.float32)
    x[:70] = unit((SAVED[row] - index.center).astype(np.float64)) * math.sqrt(128)
    return x


def test_files_of_version_1(tmp_path):
    """Made here byte by byte: such an index has no center, whatever is added."""
    x, q = vectors(300, 70) + np.float32(1), vectors(3, 70, seed=1)
    for metric in METRICS:
        index = Index(70, 3, metric, keep="float16", center=np.zeros(70))
        index.add(x)
        sections = [index._arrays[name] for name in ("d", "codes", "mul", "add", "ids", "originals")]
        head = struct.pack("<8s6I3Q", b"TBQINDEX", 1, 1, 3, METRICS.index(metric), 0, 2, 70, 300, 300)
        head += struct.pack("<6I", *(zlib.crc32(section.tobytes()) for section in sections))
        data = (head + struct.pack("<I", zlib.crc32(head))).ljust(128, b"\0")
        for section in sections:
            data += bytes(-len(data) % 64) + section.tobytes()
        (tmp_path / "old").write_bytes(data)
        old = Index.load(tmp_path / "old")
        for rescore in (1, 3):
            for a, b in zip(old.search(q, 9, rescore=rescore), index.search(q, 9, rescore=rescore)):
                assert (a == b).all()
        for one in (old, index):
            one.remove(np.arange(300))
            one.add(x)
        assert not old.center.any() and (old.search(q, 9)[1] == index.search(q, 9)[1]).all()
        old.save(tmp_path / "old")
        assert (tmp_path / "old").read_bytes()[8] == 2 and len(Index.load(tmp_path / "old")) == 300


def test_file_is_mapped_and_never_written_to(saved):
    _, path = saved
    before = path.read_bytes()
    index = Index.load(path)
    if pathlib.Path("/proc/self/maps").exists():
        assert str(path) in pathlib.Path("/proc/self/maps").read_text()
    index.remove(100)
    index.add(vectors(1, 70))
    assert path.read_bytes() == before
    index.save(path)  # the other index still reads the old file
    again = Index.load(path)
    assert 100 not in again and 137 in again and len(again) == 37


def test_truncated(saved, tmp_path):
    _, path = saved
    data = path.read_bytes()
    cut = tmp_path / "cut"
    for size in [*range(140), *range(140, len(data), 97), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(TBQError, match="is not an index of tbq|truncated"):
            Index.load(cut)
    cut.write_bytes(data + b"\0")
    with pytest.raises(TBQError, match="truncated or corrupt"):
        Index.load(cut)


def test_tampered(saved, tmp_path):
    """Any bit: in the header, in a section, or between sections, where it has no effect."""
    _, path = saved
    data = path.read_bytes()
    other = tmp_path / "other"
    for at in [*range(128), *np.random.default_rng(0).integers(128, len(data), 150).tolist()]:
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        other.write_bytes(changed)
        try:
            Index.load(other)
        except TBQError as error:
            assert str(other) in str(error) and "\n" not in str(error)
        else:
            assert at >= 128 and data[at] == 0  # a gap between sections
    refused = 0
    for at in range(_SCALES, _SCALES + 192):
        changed = bytearray(data)
        changed[at] ^= 0x80
        other.write_bytes(changed)
        with pytest.raises(TBQError, match="checksum of its section 'd' is wrong"):
            Index.load(other)
        refused += 1
    assert refused == 192


_FIELDS = "magic version format bits metric estimator keep dim n next center source"


def _forged(data, **fields):
    """A file with other numbers in its header and valid checksums."""
    values = dict(zip(_FIELDS.split(), struct.unpack_from("<8s6I3Q2I", data))) | fields
    head = struct.pack("<8s6I3Q2I", *values.values()) + data[64:96]
    return head + struct.pack("<I", zlib.crc32(head)) + data[100:]


@pytest.mark.parametrize(
    "fields",
    (
        {"n": 1 << 62},
        {"n": 38},
        {"n": 48},
        {"dim": 1 << 19},
        {"dim": 0},
        {"dim": 1 << 40},
        {"bits": 9},
        {"bits": 4},
        {"metric": 7},
        {"keep": 4},
        {"keep": 3},
        {"estimator": 2},
        {"next": 3},
        {"next": 1 << 63},
        {"version": 1},
        {"version": 3},
        {"format": 2},
        {"center": 0},
        {"center": 2},
        {"source": 0},
        {"source": 3},
        {"n": 256},
    ),
    ids=str,
)
def test_forged(saved, tmp_path, fields):
    """Numbers that do not fit the file's size are refused before memory is allocated for them."""
    _, path = saved
    other = tmp_path / "other"
    other.write_bytes(_forged(path.read_bytes(), **fields))
    with pytest.raises(TBQError, match="corrupt|version") as error:
        Index.load(other)
    assert "\n" not in str(error.value)


def test_garbage_under_valid_checksums(saved, tmp_path):
    """verify=False does not check values, but never reads outside the file."""
    _, path = saved
    data = bytearray(path.read_bytes())
    data[_SCALES:] = np.random.default_rng(0).integers(0, 256, len(data) - _SCALES, np.uint8).tobytes()
    other = tmp_path / "other"
    other.write_bytes(data)
    with np.errstate(all="ignore"):
        Index.load(other, verify=False).search(vectors(3, 70), 9, rescore=2)
    for wrong in (np.inf, np.nan, 1e30):  # every query uses the center
        data[128:132] = np.float32(wrong).tobytes()
        other.write_bytes(data)
        with pytest.raises(TBQError, match="is corrupt: its center has a NaN or is too far away"):
            Index.load(other, verify=False)


def test_not_files(tmp_path):
    with pytest.raises(TBQError, match="is not a regular file"):
        Index.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TBQError, match="is not a regular file"):
        Index.load(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path / "nothing")
    index = Index(8)
    with pytest.raises(TBQError, match="is not a file that can be replaced"):
        index.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        index.save(tmp_path / "no" / "index")
    assert os.listdir(tmp_path) == ["pipe"]
    index.save(tmp_path / "empty")
    assert len(Index.load(tmp_path / "empty")) == 0


def test_mode_and_link(tmp_path):
    index = Index(8)
    old = os.umask(0o027)
    try:
        index.save(tmp_path / "index")
    finally:
        os.umask(old)
    assert (tmp_path / "index").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to("index")
    index.add(np.ones(8))
    index.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(Index.load(tmp_path / "index")) == 1


def test_full_disk(saved):
    """The old file stays, and no other file is left."""
    index, path = saved
    before = path.read_bytes()
    index.add(vectors(500, 70))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
        with pytest.raises(OSError):
            index.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


CRASH = """
import os, sys
from tbq.index import Index
index = Index.load(sys.argv[1])
index.add(index.reconstruct(index.ids))
write = os.fsync
def crash(descriptor):
    print("written", flush=True)
    os.kill(os.getpid(), 9)
os.fsync = crash
index.save(sys.argv[1])
"""


def test_crash_while_saving(saved):
    _, path = saved
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", CRASH, path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and done.stdout == "written\n"
    assert path.read_bytes() == before and len(Index.load(path)) == 37


# --- commands -----------------------------------------------------------------------------------------------------


def command(folder, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tbq", *map(str, arguments)], cwd=folder, capture_output=True, text=True, **options
    )


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "x.npy", vectors(300, 24))
    np.save(tmp_path / "q.npy", vectors(300, 24)[[5, 250]])
    np.save(tmp_path / "ids.npy", np.arange(1000, 1300))
    return tmp_path


def test_build_and_query(folder):
    done = command(folder, "search", "build", "x.npy", "x.tbqi", "--ids", "ids.npy", "--keep", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("x.tbqi: 300 vectors of 24, ")
    done = command(folder, "search", "query", "x.tbqi", "q.npy", "-k", "3", "--rescore", "4")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines[0] == ["query", "rank", "id", "score"] and len(lines) == 7
    assert [line[:3] for line in (lines[1], lines[4])] == [["0", "1", "1005"], ["1", "1", "1250"]]
    assert float(lines[1][3]) == pytest.approx(1, abs=1e-3)
    done = command(folder, "search", "query", "x.tbqi", "q.npy", "-k", "1000", "--json")
    rows = json.loads(done.stdout)
    assert len(rows) == 2 and len(rows[0]["ids"]) == 300 and rows[0]["ids"][0] == 1005
    done = command(folder, "search", "build", "x.npy", "x.tbqi")
    assert done.returncode == 2 and done.stderr == "tbq: error: x.tbqi exists; --force replaces it\n"
    assert (
        command(
            folder, "search", "build", "x.npy", "x.tbqi", "--force", "--bits", "2", "--metric", "l2", "--unbiased"
        ).returncode
        == 0
    )
    index = Index.load(folder / "x.tbqi")
    assert (index.bits, index.metric, index.estimator, index.keep) == (2, "l2", "unbiased", None)
    assert sorted(os.listdir(folder)) == ["ids.npy", "q.npy", "x.npy", "x.tbqi"]


WRONG_FILES = {
    "missing": (("build", "nothing.npy", "o"), "nothing.npy does not exist"),
    "folder": (("build", ".", "o"), ". is not a regular file"),
    "text": (("build", "text.npy", "o"), "text.npy is not a .npy file"),
    "empty": (("build", "empty.npy", "o"), "empty.npy is not a .npy file"),
    "truncated": (("build", "cut.npy", "o"), "cut.npy is not a .npy file of numbers, or is truncated"),
    "objects": (("build", "objects.npy", "o"), "objects.npy is not a .npy file of numbers"),
    "archive": (("build", "z.npz", "o"), "z.npz is an archive; save one array with numpy.save"),
    "axes": (
        ("build", "ids.npy", "o"),
        "ids.npy has shape (300,) and dtype int64; it must be numbers of shape (n, dim)",
    ),
    "ids": (
        ("build", "x.npy", "o", "--ids", "q.npy"),
        "q.npy has shape (2, 24) and dtype float32; it must be numbers of shape (n,)",
    ),
    "few ids": (("build", "q.npy", "o", "--ids", "ids.npy"), "there are 2 vectors and 300 ids"),
    "nan": (("build", "nan.npy", "o"), "vectors[299] holds a NaN or an infinity"),
    "no columns": (("build", "thin.npy", "o"), "dim is 0; it must be from 1 to 1048576"),
    "no folder": (("build", "x.npy", "no/o"), "is not a folder that can be written to"),
    "itself": (
        ("build", "x.npy", "x.npy", "--force"),
        "x.npy has the vectors or ids of the index; name another file to write",
    ),
    "index": (("query", "x.npy", "q.npy"), "x.npy is not an index of tbq"),
    "no index": (("query", "nothing", "q.npy"), "No such file or directory: nothing"),
    "wrong width": (
        ("query", "x.tbqi", "wide.npy"),
        "queries have shape (2, 25); it must be (n, 24), or (24,) for one",
    ),
    "rescore": (("query", "x.tbqi", "q.npy", "--rescore", "2"), "rescore needs the vectors themselves"),
    "empty index": (("query", "empty.tbqi", "q.npy"), "the index is empty"),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_wrong_files(folder, what, monkeypatch, capsys):
    x = np.load(folder / "x.npy")
    index = Index(24)
    index.save(folder / "empty.tbqi")
    index.add(x)
    index.save(folder / "x.tbqi")
    (folder / "text.npy").write_text("1 2 3\n")
    (folder / "empty.npy").touch()
    (folder / "cut.npy").write_bytes((folder / "x.npy").read_bytes()[:-100])
    np.save(folder / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.savez(folder / "z.npz", x)
    np.save(folder / "wide.npy", np.ones((2, 25)))
    np.save(folder / "thin.npy", np.ones((2, 0)))
    x[299, 3] = np.nan
    np.save(folder / "nan.npy", x)
    before = sorted(os.listdir(folder))
    monkeypatch.chdir(folder)
    arguments, message = WRONG_FILES[what]
    assert main.main(["search", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("tbq: error: ") and message in err and err.count("\n") == 1
    assert sorted(os.listdir(folder)) == before


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/maps").exists(), reason="cannot tell when the work has begun: no /proc"
)
def test_interrupted(folder):
    """Ctrl-C during the work: no traceback, and nothing new in the folder."""
    np.save(folder / "large.npy", np.ones((400000, 384), np.float16))
    before = sorted(os.listdir(folder))
    process = subprocess.Popen(
        [sys.executable, "-m", "tbq", "search", "build", "large.npy", "o"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "large.npy" not in maps.read_text():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and not out
    assert sorted(os.listdir(folder)) == before
    os.unlink(folder / "large.npy")


# --- compared with faiss ------------------------------------------------------------------------------------------


def test_bench(tmp_path, capsys):
    """The claims, on a small set.  Sizes are those of a file."""
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'ggml-tbq[bench]'")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'ggml-tbq[bench]'")
    picture = tmp_path / "recall.png"
    arguments = [
        "bench",
        "index",
        "--sets",
        "64",
        "--n",
        "10000",
        "--queries",
        "100",
        "--indices",
        "flat,sq4,pqs,tbq4,tbq4+4",
        "--threads",
        "1",
        "--cpu-time",
        "--train",
        "1000",
    ]
    assert main.main([*arguments, "--json", "--plot", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["sets"]["sphere 64"]["indices"]
    assert found["flat"]["recall"] == 1 and found["tbq4+4"]["recall"] > 0.99
    assert found["tbq4"]["recall"] > max(found["sq4"]["recall"], found["pqs"]["recall"]) > 0.6
    assert found["tbq4"]["batch"] > found["sq4"]["batch"] and 10 * found["tbq4"]["build"] < found["pqs"]["build"]
    assert found["tbq4"]["bytes"] == pytest.approx(34 + 4, abs=0.1) and found["sq4"]["bytes"] == 32
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_texts(capsys):
    """Sentences of similar meaning have near embeddings."""
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'ggml-tbq[bench]'")
    for name in ("wordllama", "tokenizers"):
        if importlib.util.find_spec(name) is None:  # importing wordllama takes seconds
            pytest.skip("wordllama is not installed: pip install 'ggml-tbq[bench]'")
    from tbq.bench.index import embed

    texts = ["The cat sat on the mat.", "A kitten lay on the rug.", "Raises ValueError if the argument is negative."]
    similar = unit(embed(texts)) @ unit(embed(texts)).T
    assert similar[0, 1] > similar[0, 2] + 0.2


def test_bench_wrong(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main.main(["bench", "index", "--indices", "hnsw"])
    assert "'hnsw' is not one of flat" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["bench", "index", "--sets", "127"])
    assert "'127' is neither 'text' nor an even number of dimensions" in capsys.readouterr().err
    if importlib.util.find_spec("faiss"):
        np.save(tmp_path / "x.npy", np.ones((100, 5)))
        arguments = ["bench", "index", "--vectors", str(tmp_path / "x.npy"), "--queries"]
        for more, message in (
            (["60"], "x has 100 vectors; 60 queries need twice as many"),
            (["10", "--indices", "pq"], "pq needs an even number of dimensions, not 5; leave it out of --indices"),
            (["10", "--k", "91", "--indices", "tbq4"], "k is 91; it must be from 1 to 90; the index has 90 vectors"),
            (["10", "--cpu-time", "--threads", "2"], "--cpu-time needs --threads 1"),
        ):
            assert main.main([*arguments, *more]) == 2
            assert f"tbq: error: {message}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main.main(["bench", "index"]) == 2
    assert capsys.readouterr().err == "tbq: error: tbq bench index needs faiss: pip install 'ggml-tbq[bench]'\n"
