# SPDX-License-Identifier: MIT
"""What cache types cost in perplexity and KL divergence, with llama-perplexity: `tbq bench quality`."""
import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import platform
import re
import shlex
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence

from tbq import caches
from tbq._files import naming
from tbq._pictures import picture_format, replace
from tbq._run import Done, at_least_one, by_reason, cores, interruptible, run
from tbq.caches import Model, TypePair
from tbq.center import calibrate, model_options
from tbq.errors import TBQError

TYPES = "f16,q8_0,q5_1,q4_1,iq4_nl,q4_0,tbq4_0,tbq4_0/tbq3_0,tbq3_0,tbq2_0"
BASE = "f16.logits"  # file of the f16 cache's probabilities, in the folder that the programs run in
CENTER = "center.gguf"  # the means of the keys, there too
LEAST_SCORES = 100  # llama-perplexity prints no result of fewer
ATTEMPTS = 5  # at this pin a program that ends quickly can lose its last lines
_QUIET = {"OMP_WAIT_POLICY": "passive"}  # threads that wait leave the cores to whatever else runs


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


@dataclasses.dataclass
class Report:
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
        """Whether there are pairs with centred keys, and the same without."""
        return any(pair.centered and dataclasses.replace(pair, centered=False) in self.scores for pair in self.scores)

    @property
    def scored(self) -> int:
        return self.chunks * scores_per_chunk(self.context)


# --- the text -----------------------------------------------------------------------------------------------------


def python_text() -> bytes:
    """The topics of Python's language reference, in alphabetical order: a text that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def read_text(path: pathlib.Path) -> bytes:
    """A file's text; TBQError unless it is UTF-8 and has some."""
    try:
        text = path.read_bytes()
        if not text.decode().strip():
            raise TBQError(f"text {str(path)!r} is empty; name one that the model can read")
    except UnicodeDecodeError as error:
        raise TBQError(f"text {str(path)!r} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise TBQError(f"text {str(path)!r} cannot be read ({error.strerror})") from None
    return text


# --- llama-perplexity ---------------------------------------------------------------------------------------------


def scores_per_chunk(context: int) -> int:
    """The second half of a chunk is scored, but for its last token."""
    return context - 1 - context // 2


def base_bytes(context: int, chunks: int, vocab: int) -> int:
    """Size of the file of an f16 cache's probabilities: 16 bits for each token of the vocabulary, two floats each time."""
    return 20 + 4 * chunks * context + chunks * scores_per_chunk(context) * 2 * (2 * ((vocab + 1) // 2) + 4)


def _base_command(model: pathlib.Path, context: int, chunks: int, threads: int, options: Sequence[str]) -> list[str]:
    return [*_common(model, context, threads, options), "-f", "text.txt", "--chunks", str(chunks), "--kl-divergence-base", BASE,
            "-ctk", "f16", "-ctv", "f16"]


def _pair_command(model: pathlib.Path, pair: TypePair, context: int, threads: int, options: Sequence[str]) -> list[str]:
    return [*_common(model, context, threads, options), "--kl-divergence", "--kl-divergence-base", BASE,
            *(["--cache-center", CENTER] if pair.centered else []), "-ctk", pair.k, "-ctv", pair.v]


def _common(model: pathlib.Path, context: int, threads: int, options: Sequence[str]) -> list[str]:
    # one chunk a batch and a fixed number of threads: the same sums in the same order, so the same digits again
    return [*options, "-m", str(model.absolute()), "-c", str(context), "-b", str(context),
            "-t", str(threads), "-tb", str(threads), "-fa", "on"]


def _number(text: str) -> float:
    return float(text.replace("-nan", "nan"))


def parse(output: str) -> tuple[Score, float] | None:
    """The Score that llama-perplexity printed, and f16's perplexity; None if a line is missing."""
    number = r"\s*(-?(?:[\d.]+|nan|inf))"

    def value(label: str, scale: float = 1) -> Value:
        found = re.search(label + r"\s*:" + number + r"\s*±" + number, output)
        if not found:
            raise LookupError(label)
        return Value(_number(found[1]) / scale, _number(found[2]) / scale)

    percentile = re.search(r"99\.0%\s+KLD:" + number, output)
    try:
        score = Score(ppl=value(r"Mean PPL\(Q\)"), ppl_ratio=value(r"Mean PPL\(Q\)/PPL\(base\)"), kld=value(r"Mean\s+KLD"),
                      kld_99=_number(percentile[1]) if percentile else math.nan,
                      same_top=value("Same top p", 100), rms_dp=value("RMS Δp", 100))
        return score, value(r"Mean PPL\(base\)").mean
    except LookupError:
        return None


def _make_base(report: Report, folder: pathlib.Path, command: list[str], on_chunks: Callable[[int], None], text: str) -> None:
    """Writes BASE; fills in the number of chunks.  text: its name."""
    done = run("llama-perplexity", command, folder, lambda text: on_chunks(len(re.findall(r"\[\d+\]", text))), _QUIET)
    file = folder / BASE
    short = re.search(r"tokenizes to only (\d+) tokens", done.stdout + done.stderr)
    if short:
        raise TBQError(f"{text} has {short[1]} tokens; --context {report.context} needs {2 * report.context}")
    with contextlib.suppress(OSError, struct.error):
        with file.open("rb") as stream:
            magic, _, vocab, report.chunks = struct.unpack("<8siii", stream.read(20))
        if done.status == 0 and magic == b"_logits_" and file.stat().st_size == base_bytes(report.context, report.chunks, vocab):
            return
    if shutil.disk_usage(folder).free < 1 << 20:
        raise TBQError(f"no space left in {folder.parent}; name another folder with --scratch, or fewer --chunks")
    raise TBQError(f"llama-perplexity failed for f16: {done.error()}")


def _score(folder: pathlib.Path, command: list[str], on_chunks: Callable[[int], None]) -> tuple[Score, float]:
    rows = re.compile(r"^ +\d+ +\S+ ±.*\n", re.M)
    done = Done(0, "", "")
    for _ in range(ATTEMPTS):
        done = run("llama-perplexity", command, folder, lambda text: on_chunks(len(rows.findall(text))), _QUIET)
        if done.status and not done.error().startswith("exit status"):
            break
        if not done.status and (found := parse(done.stdout)):
            return found
    raise TBQError(done.error())


def measure(model: Model, pairs: Sequence[TypePair], text: bytes, context: int = 1024, chunks: int = 6, threads: int = 2,
            options: Sequence[str] = (), scratch: pathlib.Path | None = None, center_text: bytes | None = None,
            name_of_text: str = "the text") -> Report:
    """Scores of pairs against an f16 cache, on the first `chunks` times `context` tokens of a text.

    options: more of llama-perplexity's.  scratch: folder for the probabilities of the f16 cache (base_bytes), the
    system's temporary one if None; they are gone afterwards, whatever happens.
    center_text: what the means of the keys are measured on for pairs that are centred, Python's language reference if None;
    not the text that is scored.  name_of_text: what a message calls the text.
    A pair that llama.cpp refuses is among the failures, centred pairs of a model whose keys cannot be are left out, with a warning.  An interruption ends it with what there was time for.
    Raises TBQError if the text, the model or the disk is too small.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    check(model, context, chunks, scratch)
    report = Report(model, context)
    with tempfile.TemporaryDirectory(prefix="tbq-", dir=scratch) as name, contextlib.suppress(KeyboardInterrupt):
        folder = pathlib.Path(name)
        with naming(folder / "text.txt"):
            (folder / "text.txt").write_bytes(text)
        with tqdm(total=chunks * (1 + len(pairs)), unit="chunk", desc="f16, base") as bar:
            def show(i: int) -> Callable[[int], None]:
                return lambda done: bar.update(i * chunks + min(done, chunks) - bar.n)

            report.commands.append(_base_command(model.path, context, chunks, threads, options))
            _make_base(report, folder, report.commands[-1], show(0), name_of_text)
            uncentered = ""
            if any(pair.centered for pair in pairs):
                try:
                    calibrate(model.path, folder / CENTER, context, text=center_text, options=[*model_options(options), "-t", str(threads)])
                except TBQError as error:
                    uncentered = str(error)
                    print(f"tbq: warning: no rows with centred keys: {uncentered}", file=sys.stderr)
            for i, pair in enumerate(pairs):
                bar.set_description(str(pair))
                if pair.centered and uncentered:
                    continue
                report.commands.append(_pair_command(model.path, pair, context, threads, options))
                try:
                    report.scores[pair], report.base_ppl = _score(folder, report.commands[-1], show(i + 1))
                except TBQError as error:
                    report.failures[pair] = str(error)
        report.complete = True
    return report


def check(model: Model, context: int, chunks: int, scratch: pathlib.Path | None = None) -> None:
    """TBQError if there is no cache, if there are too few scores, or too little room in the folder for the probabilities."""
    model.check_cached()
    if not model.vocab:
        raise TBQError(f"model {str(model.path)!r} has no tokenizer; perplexity needs one")
    if chunks * scores_per_chunk(context) < LEAST_SCORES:
        raise TBQError(f"--chunks {chunks} of --context {context} score {chunks * scores_per_chunk(context)} tokens; "
                       f"at least {LEAST_SCORES} are needed")
    if 0 < model.context < context:
        raise TBQError(f"--context {context} is more than the {model.context} tokens that the model was trained for")
    folder = scratch or pathlib.Path(tempfile.gettempdir())
    size, free = base_bytes(context, chunks, model.vocab) + (1 << 20), shutil.disk_usage(folder).free
    if size > free:
        raise TBQError(f"the probabilities of the f16 cache take {size / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB; "
                       "name another folder with --scratch, or fewer --chunks")


# --- what is shown ------------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """Markdown, a row for each pair."""
    lines = ["| K / V | bits | bytes a token | PPL | PPL / f16's | KLD | 99 % | same top, % |", "|---|---|---|---|---|---|---|---|"]
    for pair, score in report.scores.items():
        size = f"{pair.bytes(report.model.cache)}" if report.model.cache else ""
        lines.append(f"| {pair} | {_bits(pair)} | {size} | {score.ppl.text(3)} | {score.ppl_ratio.text(4)} | {score.kld.text(5)} "
                     f"| {score.kld_99:.4f} | {score.same_top.text(2, 100)} |")
    return "\n".join(lines)


def _bits(pair: TypePair) -> str:
    return f"{sum(pair.bits) / 2:g}"


def as_text(report: Report, identity: dict[str, str]) -> str:
    """The table, and what somebody else needs to measure the same."""
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
        facts["center"] = f"tbq calibrate MODEL --ctx {report.context} -o {CENTER}, on {identity['center_text']}; pairs with --cache-center {CENTER}"
    return "\n".join([table(report), "", *(f"{key:7}{value}" for key, value in facts.items())])


def as_json(report: Report, identity: dict[str, str]) -> str:
    """Numbers as measured; null where there is none."""
    def plain(x: object) -> object:
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    cache = report.model.cache
    pairs = {str(pair): {"centered": pair.centered, "bits_k": pair.bits[0], "bits_v": pair.bits[1], "bytes_per_token": pair.bytes(cache) if cache else None,
                         **dataclasses.asdict(score)} for pair, score in report.scores.items()}
    everything = {
        **identity, "context": report.context, "chunks": report.chunks, "scored": report.scored, "base_ppl": report.base_ppl, "pairs": pairs,
        "failures": {str(pair): why for pair, why in report.failures.items()},
        "commands": [shlex.join(["llama-perplexity", *command]) for command in report.commands],
    }
    return json.dumps(plain(everything), indent=2, ensure_ascii=False)


def picture(report: Report, title: str, format: str) -> bytes:
    """KL divergence against bits per value, upstream's types and ours: a file of that format ("png", "svg", ...)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for ours, centered, label, color, marker in ((False, False, "llama.cpp's types", "tab:gray", "s"), (False, True, "llama.cpp's types, keys centred", "tab:brown", "D"),
                                                 (True, False, "with tbq types", "tab:cyan", "^"), (True, True, "with tbq types, keys centred", "tab:blue", "o")):
        points = [(sum(pair.bits) / 2, score.kld, str(pair).partition(" ")[0]) for pair, score in report.scores.items()
                  if (pair.ours, pair.centered) == (ours, centered) and score.kld.mean > 0 and pair != TypePair("f16", "f16")]
        points.sort(key=lambda point: (point[0], point[1].mean))
        if points:
            axes.errorbar([bits for bits, _, _ in points], [kld.mean for _, kld, _ in points], [kld.error for _, kld, _ in points],
                          label=label, color=color, marker=marker, capsize=3, linewidth=1)
        for i, (bits, kld, name) in enumerate([] if centered and report.has_both else points):
            crowded = [point[0] for point in points[i + 1:i + 2]] == [bits]  # the next is above it
            axes.annotate(name, (bits, kld.mean), xytext=(-8, -8) if ours else (8, -14 if crowded else 4), textcoords="offset points",
                          ha="right" if ours else "left", fontsize=9, color=color)
    axes.set(yscale="log", xlabel="bits per value, mean of keys and values", ylabel="KL divergence to an f16 cache, nats", title=title)
    axes.margins(x=0.13)
    axes.grid(which="both", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=150)
    return file.getvalue()


# --- the command --------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    format = picture_format(args.plot) if args.plot else ""
    if args.scratch and not args.scratch.is_dir():
        raise TBQError(f"--scratch {str(args.scratch)!r} is not a folder")
    pairs = caches.parse(args.types)
    if not args.no_center:
        pairs = [both for pair in pairs for both in ([pair, dataclasses.replace(pair, centered=True)] if pair.may_be_centered else [pair])]
    text = read_text(args.text) if args.text else python_text()
    model = caches.read_model(args.model, args.options)
    source = args.text.name if args.text else f"topics of the language reference of Python {platform.python_version()}"
    check(model, args.context, args.chunks, args.scratch)
    # python_text() is read from its beginning: what is far behind the scored part has other words
    behind = len(text) // 2
    if not args.text and 8 * args.context * args.chunks > behind and any(pair.centered for pair in pairs):
        print("tbq: warning: no rows with centred keys: so many chunks would be scored on the text that the means are measured on; name a text with --text",
              file=sys.stderr)
        pairs = [pair for pair in pairs if not pair.centered]
    with interruptible():
        print(f"tbq: {base_bytes(args.context, args.chunks, model.vocab) / 1e6:.0f} MB of probabilities of the f16 cache go to "
              f"{args.scratch or tempfile.gettempdir()} while this runs", file=sys.stderr)
        identity = {"model": args.model.name, "model_sha256": caches.sha256(args.model), "text": source,
                    "text_sha256": hashlib.sha256(text).hexdigest(), **caches.versions(),
                    "center_text": "Python's language reference" if args.text else "the second half of the text"}
        report = measure(model, pairs, text, args.context, args.chunks, args.threads, args.options, args.scratch, None if args.text else text[behind:],
                         f"text {str(args.text)!r}" if args.text else "Python's language reference")
        if report.scores:
            print(as_json(report, identity) if args.json else as_text(report, identity))
        if report.scores and report.complete and args.plot:
            replace(args.plot, picture(report, args.model.name, format))
    if not report.complete:
        print(f"tbq: interrupted after {len(report.scores)} of {len(pairs)} pairs", file=sys.stderr)
        return 130
    if report.failures:
        raise TBQError(by_reason({str(pair): why for pair, why in report.failures.items()}))
    return 0


def define(parser: argparse.ArgumentParser) -> None:
    """perplexity and KL divergence of cache types against f16, with llama-perplexity"""
    parser.epilog = ("examples: tbq bench quality --model model.gguf --plot quality.png\n"
                     "          tbq bench quality --model model.gguf --text book.txt --types q8_0,q8_0/tbq4_0,tbq4_0 --chunks 20 -- -ngl 99")
    parser.add_argument("--model", type=pathlib.Path, required=True, metavar="GGUF", help="the model")
    parser.add_argument("--types", default=TYPES, metavar="K/V,...", help="cache types (%(default)s)")
    parser.add_argument("--no-center", action="store_true", help="without the rows with centred keys")
    parser.add_argument("--text", type=pathlib.Path, metavar="FILE", help="UTF-8 text to read (topics of Python's language reference)")
    parser.add_argument("--context", type=at_least_one, default=1024, metavar="N", help="tokens of a chunk (%(default)s)")
    parser.add_argument("--chunks", type=at_least_one, default=6, metavar="N", help="chunks to read, fewer if the text ends (%(default)s)")
    parser.add_argument("--threads", type=at_least_one, default=cores(), metavar="N", help="threads of the CPU (%(default)s)")
    parser.add_argument("--scratch", type=pathlib.Path, metavar="FOLDER", help="for the probabilities of the f16 cache (the system's temporary one)")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="also draw KL divergence against bits, for example quality.png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("options", nargs="*", metavar="-- OPTION ...", help="options of llama-perplexity: -- -ngl 99")
    parser.set_defaults(run=_run)
