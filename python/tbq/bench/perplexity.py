# SPDX-License-Identifier: MIT
"""llama-perplexity: its arguments, its files and what it prints."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from tbq.errors import TBQError
from tbq.kv_cache.type_pairs import TypePair
from tbq.programs import output
from tbq.programs.process import Done, run

BASE = "f16.logits"  # file of the f16 cache's probabilities, in the folder that the programs run in
CENTER = "center.gguf"  # the means of the keys, there too
LEAST_SCORES = 100  # llama-perplexity prints no result of fewer
ATTEMPTS = 5  # at this pin a program that ends quickly can lose its last lines
QUIET = {"OMP_WAIT_POLICY": "passive"}  # threads that wait leave the cores to whatever else runs


@dataclasses.dataclass(frozen=True)
class Value:
    """A mean and its standard error."""

    mean: float
    error: float

    def text(self, digits: int, scale: float = 1) -> str:
        mean = round(self.mean * scale, digits) + 0.0  # no "-0.000"
        return f"{mean:.{digits}f} ± {self.error * scale:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Score:
    """A pair beside f16, over the tokens scored."""

    ppl: Value
    ppl_ratio: Value  #: to f16's, on the same tokens: its error is smaller than those of the two perplexities
    kld: Value  #: nats
    kld_99: float  #: nats, the 99th percentile
    same_top: Value  #: share of tokens whose most likely successor is the same, 0 to 1
    rms_dp: Value  #: of the change in probability of the text's own next token, 0 to 1


def scores_per_chunk(context: int) -> int:
    """The second half of a chunk is scored, but for its last token."""
    return context - 1 - context // 2


def base_bytes(context: int, chunks: int, vocab: int) -> int:
    """Size of the file of an f16 cache's probabilities: 16 bits for each token of the vocabulary, two floats each time."""
    return 20 + 4 * chunks * context + chunks * scores_per_chunk(context) * 2 * (2 * ((vocab + 1) // 2) + 4)


def base_arguments(model: pathlib.Path, context: int, chunks: int, threads: int, options: Sequence[str]) -> list[str]:
    return [
        *_common(model, context, threads, options),
        "-f",
        "text.txt",
        "--chunks",
        str(chunks),
        "--kl-divergence-base",
        BASE,
        "-ctk",
        "f16",
        "-ctv",
        "f16",
    ]


def pair_arguments(
    model: pathlib.Path, pair: TypePair, context: int, threads: int, options: Sequence[str]
) -> list[str]:
    return [
        *_common(model, context, threads, options),
        "--kl-divergence",
        "--kl-divergence-base",
        BASE,
        *(["--cache-center", CENTER] if pair.centered else []),
        "-ctk",
        pair.k,
        "-ctv",
        pair.v,
    ]


def _common(model: pathlib.Path, context: int, threads: int, options: Sequence[str]) -> list[str]:
    # one chunk a batch and a fixed number of threads: the same sums in the same order, so the same digits again
    return [
        *options,
        "-m",
        str(model.absolute()),
        "-c",
        str(context),
        "-b",
        str(context),
        "-t",
        str(threads),
        "-tb",
        str(threads),
        "-fa",
        "on",
    ]


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
    done = Done(0, "", "")
    for _ in range(ATTEMPTS):
        done = run("llama-perplexity", command, folder, lambda text: on_chunks(output.chunks_compared(text)), QUIET)
        if done.status and not done.error().startswith("exit status"):
            break
        if not done.status and (found := parse_scores(done.stdout)):
            return found
    raise TBQError(done.error())
