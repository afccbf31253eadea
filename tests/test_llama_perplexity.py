# SPDX-License-Identifier: MIT
"""What the cache costs in KL divergence on the real model, compared with upstream's types, in one run."""

import math

import pytest

from llama_tools import TBQ, THREADS, Divergence, python_text, run

# Every CPython has this text, so the numbers are not those of docs/measurements/quality.md (WikiText-2), but they are
# near them. Measured here (Python 3.11's text, 2 chunks of 512, perplexity 12.6 with f16):
#            both    K       V        both on the model with head size 128
#   q8_0     0.0040                   0.0004
#   q4_0     0.0515  0.0519  0.0088   0.0112
#   tbq4_0   0.033   0.026   0.0084   0.0100
#   tbq3_0   0.156   0.124   0.0229   0.0375
#   tbq2_0   0.82    0.70    0.0935   0.160
# The text differs a little from one Python to the next, and a mean over 510 tokens is exact to about 10 %. So the
# tests check ratios within one run.


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return python_text(tmp_path_factory.mktemp("text") / "topics.txt")


@pytest.fixture(scope="session")
def kld(bin_dir, demo_model, text, tmp_path_factory):
    """Statistics of a pair, measured once."""
    base = Divergence(bin_dir, demo_model, text, tmp_path_factory.mktemp("kld") / "f16.logits", n_ctx=512, chunks=2)
    known = {}

    def get(k, v):
        if (k, v) not in known:
            known[k, v] = base(k, v)
        return known[k, v]["kld"]

    get.base, get.known = base, known
    return get


def test_four_bits_against_q4_0(kld):
    """4.25 bits against 4.5, and better: by a third on this text, of which half may be noise."""
    assert kld("tbq4_0", "tbq4_0") <= 0.85 * kld("q4_0", "q4_0")
    assert kld("tbq4_0", "tbq4_0") <= 0.05


def test_three_and_two_bits(kld):
    """The bounds are a third above what was measured on this text. On WikiText-2 the goals are 0.21 and 0.9."""
    assert kld("tbq3_0", "tbq3_0") <= 0.21
    assert kld("tbq2_0", "tbq2_0") <= 1.1


def test_fewer_bits_cost_more(kld):
    """Squared error grows by a factor of four per bit, so divergence grows by about that, never by less than two."""
    assert kld("q8_0", "q8_0") < 0.012
    for sides in (lambda t: (t, t), lambda t: (t, "f16"), lambda t: ("f16", t)):
        costs = [kld("q8_0", "q8_0"), *(kld(*sides(t)) for t in TBQ)]
        four, three, two = costs[1:]
        assert 2 * four < three and 2 * three < two, costs
        assert four > 0.001, "a cache of four bits cannot be free: is it used?"


@pytest.mark.parametrize("t", TBQ)
def test_keys_need_more_bits_than_values(kld, t):
    """On this model by a factor of 3 to 8, because half of the keys' energy is constant. A pair costs about the sum."""
    k, v, both = kld(t, "f16"), kld("f16", t), kld(t, t)
    assert k > 2 * v
    assert max(k, v) * 0.75 < both < 1.6 * (k + v)


def test_perplexity_follows(kld):
    """Perplexity from the same runs is finite, near the f16 cache's at four bits, and in order."""
    for t in TBQ:
        kld(t, t)
    four, three, two = (kld.known[t, t]["ppl"] for t in TBQ)
    assert all(math.isfinite(x) for x in (four, three, two))
    assert abs(math.log(four / kld.base.base_ppl)) < 0.12
    assert kld.base.base_ppl < three < two < 10 * kld.base.base_ppl


@pytest.mark.parametrize(
    "k,v", [("tbq4_0", "tbq4_0"), ("tbq3_0", "tbq3_0"), ("tbq2_0", "f16"), ("f16", "tbq2_0"), ("q8_0", "tbq4_0")]
)
def test_batch_size_does_not_matter(bin_dir, demo_model, text, tmp_path, k, v):
    """Attention has other code for one query row than for many.

    With micro-batches of 1 and 4, the whole text goes through this code, as generated tokens do.  Upstream's
    quantized types give the same number to the last digit.  Its two kernels for f16 lie 0.0035 nats apart, and keys
    of two bits moved by 0.011 when flash attention was switched off.  Code that reads the cache wrongly gives several
    nats.
    """
    kld = Divergence(bin_dir, demo_model, text, tmp_path / "logits", n_ctx=256, chunks=1)
    whole = kld(k, v)
    for ubatch in (1, 4):
        small = kld(k, v, "-ub", ubatch)
        assert small["kld"] == pytest.approx(whole["kld"], rel=0.2, abs=0.006), (ubatch, small, whole)
        assert small["ppl"] == pytest.approx(whole["ppl"], rel=0.1), (ubatch, small, whole)


def test_second_model(bin_dir, model_d128, text, tmp_path):
    """Head size 128 and biases on K; the last column above."""
    kld = Divergence(bin_dir, model_d128, text, tmp_path / "logits", n_ctx=512, chunks=2)
    q4, four, three, two = (kld(t, t)["kld"] for t in ("q4_0", *TBQ))
    assert four <= 1.1 * q4
    assert 2 * four < three and 2 * three < two


def test_too_few_scores_are_an_error(bin_dir, demo_model, text, tmp_path):
    """No statistics mean no success: for the divergence, and for a text that is too short for a perplexity."""
    size = ("-c", 128, "-b", 128, "--chunks", 1, "--kl-divergence-base", tmp_path / "base.bin", *THREADS)
    run(bin_dir / "llama-perplexity", "-m", demo_model, "-f", text, *size)
    done = run(bin_dir / "llama-perplexity", "-m", demo_model, "--kl-divergence", *size, ok=False)
    assert done.returncode == 1 and "63 tokens were scored, statistics need 100" in done.stderr
    (tmp_path / "short").write_text("a few words")
    done = run(bin_dir / "llama-perplexity", "-m", demo_model, "-f", tmp_path / "short", "-c", 128, *THREADS, ok=False)
    assert done.returncode == 1 and "you need at least 256 tokens" in done.stderr
