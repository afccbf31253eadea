# SPDX-License-Identifier: MIT
"""`tbq bench recall`: what a model still finds in a long text with a cache of some types, compared with f16.

    from tbq.bench import recall
    report = recall.measure("model.gguf", ["tbq4_0", "tbq4_0/tbq3_0"], ["needle", "names"], [4096])
    print(recall.as_text(report))

recall_questions.py has the questions, recall_answers.py how they are asked.
"""

import contextlib
import dataclasses
import http.client
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tbq.bench.paired import bootstrap, mcnemar
from tbq.bench.recall_answers import Answer, Respondent, costs, tokens_alike, uses_files
from tbq.bench.recall_questions import PATHS, TASKS, Connection, Question, Questions, Writer
from tbq.errors import TBQError

TYPES = "f16,q8_0,q4_0,tbq4_0,tbq4_0/tbq3_0,tbq3_0,tbq2_0"
BASE = "f16"
#: Starts a llama-server with a cache of types "K/V" and options.
OpenServer = Callable[[str, Sequence[str]], contextlib.AbstractContextManager[Connection]]


@dataclasses.dataclass
class Recall:
    """What was measured so far."""

    questions: Questions = dataclasses.field(default_factory=Questions)
    #: by types "K/V", then by the index of a question
    answers: dict[str, dict[int, Answer]] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    options: list[str] = dataclasses.field(default_factory=list)  #: of llama-server, the same for all types
    chat: bool = False  #: whether the model was asked through its chat template
    seed: int = 0
    complete: bool = False

    @property
    def tasks(self) -> list[str]:
        """The tasks that have answers, in their order."""
        answered = set().union(*self.answers.values())
        return list(dict.fromkeys(q.task for i, q in enumerate(self.questions.questions) if i in answered))

    def lengths(self, task: str) -> list[int]:
        """The lengths of a task."""
        return sorted({question.length for question in self.questions.questions if question.task == task})

    def select(self, task: str, length: int | None = None, path: str | None = None) -> list[int]:
        """Indices of the questions of a task, of one length and one path if they are named."""
        return [
            i
            for i, q in enumerate(self.questions.questions)
            if q.task == task and length in (None, q.length) and path in (None, q.path)
        ]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Answers with a cache of some types compared with those of f16, question by question."""

    count: int  #: questions that both have answered
    right: float  #: the share of right answers, 0 to 1; of right tokens in `copy`, of right records in `json`
    fewer: tuple[float, float, float]  #: how much that is below f16's, and the ends of its 95 % interval
    lost: int  #: questions that f16 answers better
    won: int  #: questions that these types answer better
    p: float  #: McNemar's exact test of lost and won, as if questions about one text were independent
    logprob: float  #: mean log-probability of a token of the right answer, nats
    loss: float  #: how much it is below f16's
    low: float  #: the loss's 95 % interval, a bootstrap over texts; NaN with a single text
    high: float
    until: float  #: mean number of tokens of the right answer until the first that would not have been chosen
    alike: float  #: mean number of tokens until the first choice that is not f16's
    more: dict[str, float]  #: of `json`: shares, 0 to 1


def compare(report: Recall, types: str, indices: Sequence[int], base: str = BASE) -> Comparison | None:
    """Compares types with others on some questions (Recall.select); None if no question has both answers."""
    mine, theirs = report.answers.get(types, {}), report.answers.get(base, {})
    both = [i for i in indices if i in mine and i in theirs]
    if not both:
        return None
    losses = [theirs[i].logprob - mine[i].logprob for i in both]
    groups = [_group(report.questions.questions[i]) for i in both]
    loss, low, high = bootstrap(losses, groups, report.seed)
    lost = sum(theirs[i].right > mine[i].right for i in both)
    won = sum(mine[i].right > theirs[i].right for i in both)

    def mean(value: Callable[[int], float]) -> float:
        return float(np.mean([value(i) for i in both]))

    return Comparison(
        count=len(both),
        right=mean(lambda i: mine[i].right),
        fewer=bootstrap([theirs[i].right - mine[i].right for i in both], groups, report.seed),
        lost=lost,
        won=won,
        p=mcnemar(lost, won),
        logprob=mean(lambda i: mine[i].logprob),
        loss=loss,
        low=low,
        high=high,
        until=mean(lambda i: mine[i].until),
        alike=mean(lambda i: tokens_alike(mine[i].chosen, theirs[i].chosen)),
        more={key: float(np.mean([mine[i].more[key] for i in both])) for key in mine[both[0]].more},
    )


def _group(question: Question) -> int:
    return question.length * 1_000_000 + question.group


def compare_paths(report: Recall, types: str, path: str, base: str = BASE) -> tuple[float, float, float] | None:
    """How much more a path to a prefix loses than a cold one does: nats, and the ends of the 95 % interval.

    Both losses are to f16 on the same path: in a shifted text the rows have seen tokens that are gone, with any types.
    None if no question has all four answers.
    """
    mine, theirs = report.answers.get(types, {}), report.answers.get(base, {})

    def losses(path: str) -> dict[tuple[int, tuple[int, ...]], float]:
        return {
            (report.questions.questions[i].text, report.questions.questions[i].answer): theirs[i].logprob
            - mine[i].logprob
            for i in report.select("prefix", path=path)
            if i in mine and i in theirs
        }

    one, cold = losses(path), losses("cold")
    both = [key for key in one if key in cold]
    if not both:
        return None
    return bootstrap([one[key] - cold[key] for key in both], [text for text, _ in both], report.seed)


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(
    model: str | os.PathLike[str],
    types: Sequence[str],
    tasks: Sequence[str] = ("needle", "names"),
    lengths: Sequence[int] = (4096,),
    depths: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    samples: int = 4,
    seed: int = 0,
    text: str | None = None,
    options: Sequence[str] = (),
    chat: bool | None = None,
    passage: int = 256,
    open_server: OpenServer | None = None,
    progress: bool = True,
) -> Recall:
    """Asks a model the same questions with caches of several types.

    types: "K/V", or one type for both.  f16, which the others are compared with, is always measured, and first.
    tasks: of TASKS.  lengths: tokens of a text, its question and the answer together.
    depths: of `needle`, 0 (the start) to 1 (as far from the end as no window of exact rows reaches).
    samples: texts for each task and length; for `needle` also for each depth.
    text: what the texts are made of; Python's language reference if None.
    options: options of llama-server, for example ["--cache-recent", "0"], ["-ngl", "99"].
    chat: whether to ask through the chat template; None: if the model has one.
    passage: tokens of an answer of `copy`.
    open_server: starts a llama-server in another way than tbq.Server(model, types, options=options); with it, chat must
    be given.

    Types that llama.cpp refuses are in the failures.  An interruption ends the measurement; the report has what is
    finished.  Raises TBQError for questions that do not fit, and if f16 cannot be measured.
    """
    types = list(dict.fromkeys([BASE, *types]))
    check(tasks, lengths, depths, samples)
    if chat is None:
        chat = has_chat_template(model)
    if text is None:
        from tbq._text import python_text

        text = python_text().decode()
    report = Recall(chat=chat, seed=seed)
    with tempfile.TemporaryDirectory(prefix="tbq-") as folder, contextlib.suppress(KeyboardInterrupt):
        report.options = ["-c", str(max(lengths)), "-np", "1", "--cache-ram", "0", *options]
        # the folder's name is no part of what has to be repeated
        given = [*report.options, *(["--slot-save-path", folder] if uses_files(tasks) else [])]
        with _bar(progress) as bar:
            for pair in types:
                bar.set_description(f"{pair}, loading")
                try:
                    with (open_server or _tbq_server(model))(pair, given) as server:
                        if pair == BASE:
                            writer = Writer(server, text, chat, seed, passage)
                            report.questions = _write(server, writer, tasks, lengths, depths, samples)
                            bar.reset(total=len(types) * sum(costs(report.questions)))
                        _ask_all(report, pair, server, bar)
                except TBQError as error:
                    if pair == BASE:
                        raise
                    report.failures[pair] = str(error)
                    answered = len(report.answers.get(pair, {}))
                    bar.total -= sum(costs(report.questions)[answered:])
        report.complete = True
    return report


def check(tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], samples: int) -> None:
    """Raises TBQError for arguments of measure() that cannot be measured."""
    for task in tasks:
        if task not in TASKS:
            raise TBQError(f"task {task!r} is not one of {', '.join(TASKS)}")
    if not tasks or not lengths or samples < 1 or ("needle" in tasks and not depths):
        raise TBQError("there must be at least one task, one length, one sample, and for needle one depth")
    if not all(0 <= depth <= 1 for depth in depths):
        raise TBQError(f"depths {', '.join(map(str, depths))} must be from 0 to 1")


def has_chat_template(model: str | os.PathLike[str]) -> bool:
    """Whether the file of a model has a chat template."""
    from tbq.gguf_files.reader import open_gguf

    return bool(open_gguf(model).metadata.get("tokenizer.chat_template"))


def _tbq_server(model: str | os.PathLike[str]) -> OpenServer:
    def start(types: str, options: Sequence[str]) -> contextlib.AbstractContextManager[Connection]:
        from tbq.serving.server import Server

        return Server(model, types, options=options, timeout=None)

    return start


def other_server(program: str | os.PathLike[str], model: str | os.PathLike[str]) -> OpenServer:
    """Starts a llama-server of another build.  What measure() takes as open_server."""

    def start(types: str, options: Sequence[str]) -> contextlib.AbstractContextManager[Connection]:
        from tbq.bench.other_server import OtherServer

        k, _, v = types.partition("/")
        return OtherServer(program, ["-m", os.fspath(model), "-ctk", k, "-ctv", v or k, *options])

    return start


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Any]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    # the unit, about a token of a prompt, is nobody's
    form = "{l_bar}{bar}| {elapsed}<{remaining}"
    with tqdm(total=1, bar_format=form, disable=not shown, smoothing=0.05) as bar:
        yield bar


def _write(
    server: Connection,
    writer: Writer,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
) -> Questions:
    trained = server.request("/v1/models")["data"][0]["meta"]["n_ctx_train"]
    if max(lengths) > trained > 0:
        raise TBQError(f"length {max(lengths)} is more than the {trained} tokens that the model was trained for")
    for task in dict.fromkeys(tasks):
        for length in dict.fromkeys(lengths):
            for sample in range(samples):
                writer.write(task, length, depths, sample)
    return writer.made


def _ask_all(report: Recall, types: str, server: Connection, bar: Any) -> None:
    respondent = Respondent(server, report.chat)
    answers = report.answers.setdefault(types, {})
    for i, (question, cost) in enumerate(zip(report.questions.questions, costs(report.questions))):
        bar.set_description(f"{types}, {question.task} {question.length}")
        try:
            answers[i] = respondent.ask(report.questions.texts[question.text], question)
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:  # also an answer that is cut off
            raise TBQError(f"llama-server ended: {error}") from None
        bar.update(cost)


# --- output -------------------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{round(value, 4) + 0.0:.4f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{_signed(low)} to {_signed(high)}"


_JSON = {"parses": "parses", "as_long": "as long", "ends": "ends", "right_under_grammar": "right under a grammar"}


def _cells(found: Comparison, is_base: bool, task: str) -> list[str]:
    cells = [f"{found.count}", f"{100 * found.right:.1f}"]
    cells += ["", ""] if is_base else [f"{found.lost} / {found.won}", f"{found.p:.2g}"]
    cells += [f"{found.logprob:.4f}"]
    cells += ["", ""] if is_base else [_signed(found.loss), _interval(found.low, found.high)]
    if task == "copy":
        cells += [f"{found.until:.1f}", "" if is_base else f"{found.alike:.1f}"]
    if task == "json":
        cells += [f"{100 * found.more[key]:.1f}" for key in _JSON]
    return cells


def table(report: Recall, task: str) -> str:
    """A Markdown table of a task: a row for each pair of types, and for each length if there are several."""
    head = ["questions", "right, %", "lost / won", "p", "log p", "loss", "95 %"]
    head += ["right until", "as f16 until"] * (task == "copy")
    head += [f"{name}, %" for name in _JSON.values()] * (task == "json")
    parts: list[tuple[list[str], list[int]]] = [([], report.select(task))]
    if task == "prefix":
        head = ["path", *head, "more than cold", "95 %"]
        parts = [([path], report.select(task, path=path)) for path in PATHS]
    elif len(lengths := report.lengths(task)) > 1:
        head = ["length", *head]
        parts = [([str(length)], report.select(task, length)) for length in lengths] + [(["all"], report.select(task))]
    lines = ["| " + " | ".join(["K / V", *head]) + " |", "|---" * (1 + len(head)) + "|"]
    for types in report.answers:
        for name, indices in parts:
            if found := compare(report, types, indices):
                cells = [types, *name, *_cells(found, types == BASE, task)]
                if task == "prefix":
                    more = None if types == BASE or name == ["cold"] else compare_paths(report, types, name[0])
                    cells += [_signed(more[0]), _interval(*more[1:])] if more else ["", ""]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def needle_table(report: Recall) -> str:
    """A Markdown table of `needle`: the share of right answers for each pair of types, length and depth."""
    depths = _depths(report)
    lines = ["| K / V | length | " + " | ".join(f"depth {depth:g}" for depth in depths) + " |"]
    lines.append("|---" * (2 + len(depths)) + "|")
    for types in report.answers:
        grid = _grid(report, types)
        for length, row in zip(report.lengths("needle"), [] if np.isnan(grid).all() else grid):
            cells = ["" if math.isnan(x) else f"{100 * x:.0f} %" for x in row]
            lines.append(f"| {types} | {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _depths(report: Recall) -> list[float]:
    return sorted({report.questions.questions[i].asked_depth for i in report.select("needle")})


def _grid(report: Recall, types: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The share of right answers of `needle`, float64 [lengths, depths]; NaN where there is none."""
    depths, answers = _depths(report), report.answers[types]
    grid = np.full((len(report.lengths("needle")), len(depths)), np.nan)
    for row, length in enumerate(report.lengths("needle")):
        for column, depth in enumerate(depths):
            found = [
                answers[i].right
                for i in report.select("needle", length)
                if i in answers and report.questions.questions[i].asked_depth == depth
            ]
            if found:
                grid[row, column] = np.mean(found)
    return grid


def as_text(report: Recall, identity: Mapping[str, str] | None = None) -> str:
    """The tables, and everything that is needed to repeat the measurement.

    identity: what the command knows of the model and the text; each item becomes a line.
    """
    parts = []
    for task in report.tasks:
        parts.append(f"{task}:\n\n{table(report, task)}")
        if task == "needle":
            parts.append(needle_table(report))
    facts = {
        **(identity or {}),
        "asked": f"{'through the chat template' if report.chat else 'as a text to continue'}, seed {report.seed}",
        "options": " ".join(report.options),
    }
    return "\n\n".join([*parts, "\n".join(f"{key:9}{value}" for key, value in facts.items())])


def as_json(report: Recall, identity: Mapping[str, str] | None = None) -> str:
    """The report with every answer as a JSON object.  Numbers are not rounded; NaN becomes null."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        if isinstance(x, tuple):
            return [plain(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    base = report.answers.get(BASE, {})
    comparisons = {
        task: {
            types: plain(dataclasses.asdict(found))
            for types in report.answers
            if (found := compare(report, types, report.select(task)))
        }
        for task in report.tasks
    }
    questions = [
        {
            "task": q.task,
            "length": q.length,
            "depth": q.depth,
            "path": q.path,
            "text": q.text,
            "group": q.group,
            "tokens": len(q.answer),
            "answers": {
                types: {
                    "right": found[i].right,
                    "logprob": found[i].logprob,
                    "until": found[i].until,
                    "as_f16_until": tokens_alike(found[i].chosen, base[i].chosen) if i in base else None,
                    **found[i].more,
                }
                for types, found in report.answers.items()
                if i in found
            },
        }
        for i, q in enumerate(report.questions.questions)
    ]
    everything = {
        **(identity or {}),
        "chat": report.chat,
        "seed": report.seed,
        "options": report.options,
        "complete": report.complete,
        "compared": comparisons,
        "questions": questions,
        "failures": report.failures,
    }
    return json.dumps(everything, indent=1, ensure_ascii=False)


def picture(report: Recall, title: str, format: str) -> bytes:
    """A picture as a file in a format ("png", "svg", ...).

    `needle`: a panel for each pair of types, lengths against depths.  All other tasks: the loss of log-probability.
    """
    from matplotlib.figure import Figure

    needle = "needle" in report.tasks
    others = [task for task in report.tasks if task != "needle"]
    shown = [types for types in report.answers if needle and not np.isnan(_grid(report, types)).all()]
    columns = min(4, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * max(columns, 2), 2.7 * rows + 3.6 * bool(others) + 0.4), layout="constrained")
    figure.suptitle(title)
    parts = figure.subfigures(bool(needle) + bool(others) or 1, 1, squeeze=False)[:, 0]
    if needle:
        _draw_needle(report, parts[0], shown, rows, columns)
    if others:
        _draw_losses(report, parts[-1], others)
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=150)
    return file.getvalue()


def _draw_needle(report: Recall, figure: Any, shown: Sequence[str], rows: int, columns: int) -> None:
    lengths, depths = report.lengths("needle"), _depths(report)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, types in zip(panels.flat, shown):
        grid = _grid(report, types).T
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set(title=f"{types}: {100 * np.nanmean(grid):.0f} %")
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    figure.supxlabel("tokens")
    figure.supylabel("depth of the fact")
    figure.colorbar(image, ax=panels, label="share found")


def _draw_losses(report: Recall, figure: Any, tasks: Sequence[str]) -> None:
    axes = figure.subplots()
    shown = [types for types in report.answers if types != BASE]
    for i, task in enumerate(tasks):
        points = [(j, found) for j, types in enumerate(shown) if (found := compare(report, types, report.select(task)))]
        if points:
            x = [j + (i - (len(tasks) - 1) / 2) * 0.15 for j, _ in points]
            y = [found.loss for _, found in points]
            low = [max(0.0, np.nan_to_num(found.loss - found.low)) for _, found in points]
            high = [max(0.0, np.nan_to_num(found.high - found.loss)) for _, found in points]
            axes.errorbar(x, y, [low, high], label=task, marker="o", linestyle="none", capsize=3)
    axes.axhline(0, color="tab:gray", linewidth=1)
    axes.set_xticks(range(len(shown)), shown, rotation=20)
    axes.set(ylabel="loss to f16 of the answer's\nlog-probability, nats a token, 95 %")
    axes.set_yscale("symlog", linthresh=0.02)
    axes.grid(axis="y", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
