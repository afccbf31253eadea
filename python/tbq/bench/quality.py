# SPDX-License-Identifier: MIT
"""`tbq bench quality`: perplexity and KL divergence of cache types, measured with llama-perplexity."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import re
import shlex
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from tbq._files import naming
from tbq.bench.perplexity import (
    BASE,
    CENTER,
    LEAST_SCORES,
    QUIET,
    Score,
    Value,
    base_arguments,
    base_bytes,
    pair_arguments,
    score_pair,
    scores_per_chunk,
)
from tbq.errors import TBQError
from tbq.kv_cache.calibrate import calibrate
from tbq.kv_cache.model import Model
from tbq.kv_cache.type_pairs import TypePair
from tbq.programs import output
from tbq.programs.options import MODEL, ROPE, select_words
from tbq.programs.process import run

TYPES = "f16,q8_0,q5_1,q4_1,iq4_nl,q4_0,tbq4_0,tbq4_0/tbq3_0,tbq3_0,tbq2_0"


@dataclasses.dataclass
class Quality:
    """What was measured so far."""

    model: Model
    context: int
    chunks: int = 0
    base_ppl: float = math.nan
    scores: dict[TypePair, Score] = dataclasses.field(default_factory=dict)
    failures: dict[TypePair, str] = dataclasses.field(default_factory=dict)
    commands: list[list[str]] = dataclasses.field(default_factory=list)
    complete: bool = False

    @property
    def has_both(self) -> bool:
        """Whether a pair was measured both with and without centered keys."""
        plain = [dataclasses.replace(pair, centered=False, exact=False) for pair in self.scores if pair.centered]
        return any(pair in self.scores for pair in plain)

    @property
    def scored(self) -> int:
        """Tokens that were scored."""
        return self.chunks * scores_per_chunk(self.context)


def _make_base(
    report: Quality, folder: pathlib.Path, command: list[str], on_chunks: Callable[[int], None], text_name: str
) -> None:
    """Writes BASE, and sets the number of chunks in the report."""
    done = run("llama-perplexity", command, folder, lambda text: on_chunks(output.chunks_read(text)), QUIET)
    file = folder / BASE
    if short := output.tokens_of_short_text(done.text):
        raise TBQError(f"{text_name} has {short} tokens; --context {report.context} needs {2 * report.context}")
    with contextlib.suppress(OSError, struct.error):
        with file.open("rb") as stream:
            magic, _, vocab, report.chunks = struct.unpack("<8siii", stream.read(20))
        size = base_bytes(report.context, report.chunks, vocab)
        if done.status == 0 and magic == b"_logits_" and file.stat().st_size == size:
            return
    if shutil.disk_usage(folder).free < 1 << 20:
        raise TBQError(f"no space left in {folder.parent}; name another folder with --scratch, or fewer --chunks")
    raise TBQError(f"llama-perplexity failed for f16: {done.error()}")


def measure(
    model: Model,
    pairs: Sequence[TypePair],
    text: bytes,
    context: int = 1024,
    chunks: int = 6,
    threads: int = 2,
    options: Sequence[str] = (),
    scratch: pathlib.Path | None = None,
    center_text: bytes | None = None,
    text_name: str = "the text",
    ubatch: int | None = None,
) -> Quality:
    """Compares pairs with an f16 cache, on the first `chunks` times `context` tokens of a text.

    options: more options of llama-perplexity.
    scratch: folder for the probabilities of the f16 cache (base_bytes); the system's temporary folder if None.  They
    are removed at the end.
    center_text: the text that the means of the keys are measured on, for centered pairs; Python's language reference if
    None.  It must not be the text that is scored.  text_name: the name of the text in messages.
    ubatch: tokens that are read at once with a pair, llama.cpp's 512 if None.  With exact rows, theirs are exact for
    each other: 16 is like generating, 512 like a prompt.

    A pair that llama.cpp refuses is in the failures.  If the keys of the model cannot be centered, the centered pairs
    are left out, with a warning.  An interruption ends the measurement; the report has what is finished.
    Raises TBQError if the text, the model or the disk is too small.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    check_run(model, context, chunks, scratch)
    report = Quality(model, context)
    with tempfile.TemporaryDirectory(prefix="tbq-", dir=scratch) as name, contextlib.suppress(KeyboardInterrupt):
        folder = pathlib.Path(name)
        with naming(folder / "text.txt"):
            (folder / "text.txt").write_bytes(text)
        with tqdm(total=chunks * (1 + len(pairs)), unit="chunk", desc="f16, base") as bar:

            def show(i: int) -> Callable[[int], None]:
                return lambda done: bar.update(i * chunks + min(done, chunks) - bar.n)

            report.commands.append(base_arguments(model.path, context, chunks, threads, options))
            _make_base(report, folder, report.commands[-1], show(0), text_name)
            centers = any(pair.centered for pair in pairs) and _make_center(
                model, folder, context, center_text, [*select_words(options, MODEL, ROPE), "-t", str(threads)]
            )
            if not centers:  # what is left of the centered pairs may be in the list already
                pairs = list(dict.fromkeys(dataclasses.replace(pair, centered=False) for pair in pairs))
            for i, pair in enumerate(pairs):
                bar.set_description(str(pair))
                at_once = [] if ubatch is None else ["-ub", str(ubatch)]
                report.commands.append(pair_arguments(model.path, pair, context, threads, [*at_once, *options]))
                try:
                    report.scores[pair], report.base_ppl = score_pair(folder, report.commands[-1], show(i + 1))
                except TBQError as error:
                    report.failures[pair] = str(error)
        report.complete = True
    return report


def _make_center(model: Model, folder: pathlib.Path, context: int, text: bytes | None, options: Sequence[str]) -> bool:
    """Writes CENTER.  If the keys cannot be centered: a warning, and False."""
    try:
        calibrate(model.opened or model.path, folder / CENTER, context, text=text, options=options)
    except TBQError as error:
        print(f"tbq: warning: no rows with centered keys: {error}", file=sys.stderr)
        return False
    return True


def check_run(model: Model, context: int, chunks: int, scratch: pathlib.Path | None = None) -> None:
    """Raises TBQError for a run that cannot succeed.

    That is a model without a cache or tokenizer, too few scored tokens, too long a context, or too small a disk.
    """
    model.check_cached()
    if not model.vocab:
        raise TBQError(f"model {str(model.path)!r} has no tokenizer; perplexity needs one")
    if chunks * scores_per_chunk(context) < LEAST_SCORES:
        raise TBQError(
            f"--chunks {chunks} of --context {context} score {chunks * scores_per_chunk(context)} tokens; "
            f"at least {LEAST_SCORES} are needed"
        )
    if 0 < model.context < context:
        raise TBQError(f"--context {context} is more than the {model.context} tokens that the model was trained for")
    folder = scratch or pathlib.Path(tempfile.gettempdir())
    size, free = base_bytes(context, chunks, model.vocab) + (1 << 20), shutil.disk_usage(folder).free
    if size > free:
        raise TBQError(
            f"the probabilities of the f16 cache take {size / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB; "
            "name another folder with --scratch, or fewer --chunks"
        )


# --- output -------------------------------------------------------------------------------------------------------


def table(report: Quality) -> str:
    """A Markdown table with a row for each pair."""
    lines = [
        "| K / V | bits | bytes a token | PPL | PPL / f16's | KLD | 99 % | same top, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair, score in report.scores.items():
        size = f"{pair.bytes(report.model.cache)}" if report.model.cache else ""
        lines.append(
            f"| {pair} | {_bits(pair)} | {size} | {score.ppl.text(3)} | {score.ppl_ratio.text(4)} "
            f"| {score.kld.text(5)} | {score.kld_99:.4f} | {score.same_top.text(2, 100)} |"
        )
    return "\n".join(lines)


def _bits(pair: TypePair) -> str:
    return f"{sum(pair.bits) / 2:g}"


def as_text(report: Quality, identity: dict[str, str]) -> str:
    """The table, and everything that is needed to repeat the measurement."""
    base, pair = (shlex.join(["llama-perplexity", *command]) for command in report.commands[:2])
    facts = {
        "model": f"{identity['model']}, sha256 {identity['model_sha256']}",
        "text": f"{identity['text']}, sha256 {identity['text_sha256']}",
        "scored": f"{report.scored} tokens: the second halves of {report.chunks} chunks of {report.context}",
        "built": f"llama.cpp {identity['llama_cpp_commit']}, tbq {identity['tbq']}",
        "base": base,
        "pairs": re.sub(r"-ctk \S+ -ctv \S+$", "-ctk K -ctv V", pair),
    }
    if any(pair.centered for pair in report.scores):
        facts["center"] = (
            f"tbq calibrate MODEL --ctx {report.context} -o {CENTER}, on {identity['center_text']}; "
            f"pairs with --cache-center {CENTER}"
        )
    return "\n".join([table(report), "", *(f"{key:7}{value}" for key, value in facts.items())])


def as_json(report: Quality, identity: dict[str, str]) -> str:
    """The report as a JSON object.  Numbers are not rounded; NaN and infinity become null."""

    def plain(x: object) -> object:
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    cache = report.model.cache
    pairs = {
        str(pair): {
            "centered": pair.centered,
            "exact": pair.exact,
            "bits_k": pair.bits[0],
            "bits_v": pair.bits[1],
            "bytes_per_token": pair.bytes(cache) if cache else None,
            **dataclasses.asdict(score),
        }
        for pair, score in report.scores.items()
    }
    everything = {
        **identity,
        "context": report.context,
        "chunks": report.chunks,
        "scored": report.scored,
        "base_ppl": report.base_ppl,
        "pairs": pairs,
        "failures": {str(pair): why for pair, why in report.failures.items()},
        "commands": [shlex.join(["llama-perplexity", *command]) for command in report.commands],
    }
    return json.dumps(plain(everything), indent=2, ensure_ascii=False)


#: The series of the picture: whether a type is a tbq type, keys are centered, and rows are exact; label, color, marker.
_SERIES = (
    (False, False, False, "llama.cpp's types", "tab:gray", "s"),
    (False, True, False, "llama.cpp's types, keys centered", "tab:brown", "D"),
    (True, False, False, "with tbq types", "tab:cyan", "^"),
    (True, True, False, "with tbq types, keys centered", "tab:blue", "o"),
    (True, False, True, "with tbq types, exact rows", "tab:olive", "v"),
    (True, True, True, "with tbq types, keys centered, exact rows", "tab:green", "P"),
)


def picture(report: Quality, title: str, format: str) -> bytes:
    """A picture of KL divergence against bits per value, as a file in a format ("png", "svg", ...)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for has_tbq, centered, exact, label, color, marker in _SERIES:
        points = [
            (sum(pair.bits) / 2, score.kld, str(pair).partition(" ")[0])
            for pair, score in report.scores.items()
            if (pair.has_tbq, pair.centered, pair.exact) == (has_tbq, centered, exact)
            and score.kld.mean > 0
            and pair != TypePair("f16", "f16")
        ]
        points.sort(key=lambda point: (point[0], point[1].mean))
        if points:
            bits, means, errors = zip(*((bits, kld.mean, kld.error) for bits, kld, _ in points))
            axes.errorbar(bits, means, errors, label=label, color=color, marker=marker, capsize=3, linewidth=1)
        if not exact and (not centered or not report.has_both):
            _write_names(axes, points, has_tbq, color)
    axes.set(
        yscale="log",
        xlabel="bits per value, mean of keys and values",
        ylabel="KL divergence to an f16 cache, nats",
        title=title,
    )
    axes.margins(x=0.13)
    axes.grid(which="both", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=150)
    return file.getvalue()


def _write_names(axes: Any, points: Sequence[tuple[float, Value, str]], left: bool, color: str) -> None:
    """Writes the names of pairs next to their points.  left: to the left of them instead of to the right."""
    for i, (bits, kld, name) in enumerate(points):
        crowded = [point[0] for point in points[i + 1 : i + 2]] == [bits]  # the next point is above this one
        axes.annotate(
            name,
            (bits, kld.mean),
            xytext=(-8, -8) if left else (8, -14 if crowded else 4),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=9,
            color=color,
        )
