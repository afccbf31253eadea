# SPDX-License-Identifier: MIT
"""Runs llama-perplexity: its arguments, its files and its results."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from tbq.errors import TBQError
from tbq.kv_cache.type_pairs import TypePair
from tbq.programs import output
from tbq.programs.process import Done, run

BASE = "f16.logits"  # file with the probabilities of the f16 cache, in the folder that the programs run in
CENTER = "center.gguf"  # file with the means of the keys, in the same folder
LEAST_SCORES = 100  # llama-perplexity prints no result for fewer scored tokens
ATTEMPTS = 5  # the pinned llama.cpp can lose the last lines of a program that ends quickly
QUIET = {"OMP_WAIT_POLICY": "passive"}  # waiting threads leave the cores to other programs


@dataclasses.dataclass(frozen=True)
class Value:
    """A mean and its standard error."""

    mean: float
    error: float

    def text(self, digits: int, scale: float = 1) -> str:
        """The mean and the error, rounded."""
        mean = round(self.mean * scale, digits) + 0.0  # no "-0.000"
        return f"{mean:.{digits}f} ± {self.error * scale:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Score:
    """How a pair of types compares with f16, over the scored tokens."""

    ppl: Value
    ppl_ratio: Value  #: ratio to f16's perplexity on the same tokens; its error is smaller than that of ppl
    kld: Value  #: nats
    kld_99: float  #: nats, the 99th percentile
    same_top: Value  #: share of tokens whose most likely next token is the same, 0 to 1
    rms_dp: Value  #: root mean square change in the probability of the text's next token, 0 to 1


def scores_per_chunk(context: int) -> int:
    """Tokens of a chunk that are scored: the second half, except for the last token."""
    return context - 1 - context // 2


def base_bytes(context: int, chunks: int, vocab: int) -> int:
    """Bytes of the file with the probabilities of the f16 cache.

    For each scored token it has two floats, and 16 bits for each token of the vocabulary.
    """
    return 20 + 4 * chunks * context + chunks * scores_per_chunk(context) * 2 * (2 * ((vocab + 1) // 2) + 4)


def base_arguments(model: pathlib.Path, context: int, chunks: int, threads: int, options: Sequence[str]) -> list[str]:
    """Arguments of the run that writes BASE."""
    files = ["-f", "text.txt", "--chunks", str(chunks), "--kl-divergence-base", BASE]
    return [*_common_arguments(model, context, threads, options), *files, "-ctk", "f16", "-ctv", "f16"]


def pair_arguments(
    model: pathlib.Path, pair: TypePair, context: int, threads: int, options: Sequence[str]
) -> list[str]:
    """Arguments of a run that compares a pair with BASE."""
    cache = ["--cache-center", CENTER if pair.centered else "none"]
    if pair.has_tbq and not pair.exact:
        cache += ["--cache-recent", "0", "--cache-first", "0"]
    files = ["--kl-divergence", "--kl-divergence-base", BASE, *cache]
    return [*_common_arguments(model, context, threads, options), *files, "-ctk", pair.k, "-ctv", pair.v]


def _common_arguments(model: pathlib.Path, context: int, threads: int, options: Sequence[str]) -> list[str]:
    # one chunk in a batch and a fixed number of threads: sums in the same order, so that a result can be repeated
    n, t = str(context), str(threads)
    return [*options, "-m", str(model.absolute()), "-c", n, "-b", n, "-t", t, "-tb", t, "-fa", "on"]


def parse_scores(text: str) -> tuple[Score, float] | None:
    """The Score that llama-perplexity printed, and f16's perplexity; None if a line is missing."""
    found = output.kl_divergence(text)
    if found is None:
        return None

    def value(name: str, scale: float = 1) -> Value:
        return Value(*(number / scale for number in found[name]))

    score = Score(
        ppl=value("ppl"),
        ppl_ratio=value("ppl_ratio"),
        kld=value("kld"),
        kld_99=found["kld_99"][0],
        same_top=value("same_top", 100),
        rms_dp=value("rms_dp", 100),
    )
    return score, found["base_ppl"][0]


def score_pair(folder: pathlib.Path, command: list[str], on_chunks: Callable[[int], None]) -> tuple[Score, float]:
    """The Score of a pair, and f16's perplexity.  on_chunks: is called with the number of finished chunks."""
    done = Done(0, "", "")
    for _ in range(ATTEMPTS):
        done = run("llama-perplexity", command, folder, lambda text: on_chunks(output.chunks_compared(text)), QUIET)
        if done.status and not done.error().startswith("exit status"):
            break
        if not done.status and (found := parse_scores(done.stdout)):
            return found
    raise TBQError(done.error())
