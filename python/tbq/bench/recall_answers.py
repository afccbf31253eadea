# SPDX-License-Identifier: MIT
"""How llama-server answers the questions of `tbq bench recall`.

A text is evaluated in a request of its own, which generates nothing.  A question is then a prompt that begins with the
same tokens (cache_prompt), so the server evaluates only the question, in a micro-batch of its own, and the answer token
by token.  All rows of the text are read from the cache as they are stored: none of them is in the micro-batch, where
rows are exact for each other, and none that has a fact is in the window of exact rows (FAR).  The number of tokens that
the server took from the cache is checked for every question.

The right answer is forced with a grammar of token ids, and the probabilities are those before the grammar (n_probs
without post_sampling_probs), so one request gives the log-probability of every token of the answer, exactly, and the
token that the model would have chosen there.  If that is the right one everywhere, greedy sampling gives this answer.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from tbq.bench.recall_questions import GRAMMAR, Connection, Question, Questions, Text
from tbq.errors import TBQError

LOWEST = -80.0  # nats; llama-server computes probabilities in float32, which end at -87
_SLOT_FILE = "text.slot"
_FIELDS = ["completion_probabilities", "content", "stop_type", "timings"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to a Question."""

    logprobs: tuple[float, ...]  #: of each token of the right answer, in nats, after the right ones before it
    chosen: tuple[int, ...]  #: the most likely token at each place
    right: float  #: 1 if the answer is right, 0 if not; of `copy` and `json` the share of tokens and records that are
    until: int  #: tokens of the right answer until the first one that would not have been chosen
    more: dict[str, float] = dataclasses.field(default_factory=dict)  #: of `json`: what else is right, 0 to 1

    @property
    def logprob(self) -> float:
        """The mean log-probability of a token of the right answer, in nats."""
        return sum(self.logprobs) / len(self.logprobs)


def tokens_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens until the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def read_records(text: str) -> tuple[list[tuple[str, int]] | None, str]:
    """The records of the first JSON list in a text, and what follows it.

    None if there is no list that ends.  A record that is not {"name": ..., "number": ...} is ("", -1).
    """
    at = text.find("[")
    try:
        found, end = json.JSONDecoder().raw_decode(text[at:] if at >= 0 else "")
    except (ValueError, RecursionError):
        return None, ""

    def record(x: Any) -> tuple[str, int]:
        alike = isinstance(x, dict) and x.keys() == {"name", "number"} and isinstance(x["name"], str)
        return (x["name"], x["number"]) if alike and isinstance(x["number"], int) else ("", -1)

    return [record(x) for x in found], text[at + end :]


class Respondent:
    """A llama-server that is asked, in its slot 0.

    connection: its requests.  chat: whether it is asked through its chat template.
    """

    def __init__(self, connection: Connection, chat: bool) -> None:
        self._connection, self._chat = connection, chat
        self._loaded: Text | None = None
        self._shifted = False  # whether it got into the cache by a shift

    def _complete(self, prompt: Sequence[int], n: int, **fields: Any) -> Any:
        body = {
            "prompt": list(prompt),
            "n_predict": n,
            "id_slot": 0,
            "cache_prompt": True,
            "temperature": 0,
            "response_fields": _FIELDS,
            **fields,
        }
        return self._connection.request("/completion", body)

    def _slot(self, action: str) -> None:
        self._connection.request(f"/slots/0?action={action}", {"filename": _SLOT_FILE})

    def load(self, text: Text) -> None:
        """Evaluates a text, unless it was the last one.  Tokens that the cache has from another text are not again."""
        if self._loaded is not text or self._shifted:
            # with llama.cpp's own types a shift encodes all rows again, so none of them is used for another text
            self._complete(text.tokens, 0, cache_prompt=not self._shifted)
            self._loaded, self._shifted = text, False

    def _load_shifted(self, text: Text) -> dict[str, Any]:
        """Evaluates a text with tokens in it that the next request takes out, unless that has been done.

        Returns the field for that request.
        """
        if self._loaded is not text or not self._shifted:
            longer = (*text.tokens[: text.head], *text.junk, *text.tokens[text.head :])
            self._complete(longer, 0, cache_prompt=False)
            self._loaded, self._shifted = text, True
        return {"n_cache_reuse": len(text.junk)}

    def _prepare(self, text: Text, question: Question) -> dict[str, Any]:
        """Brings a text into the cache on the path of a question.  Returns fields for the request that asks."""
        if question.path == "cold":
            self._loaded, self._shifted = None, False
            return {"cache_prompt": False}
        if question.path == "shifted":
            return self._load_shifted(text)
        self.load(text)
        if question.path == "restored":
            for action in ("save", "erase", "restore"):
                self._slot(action)
        return {}

    def force(self, text: Text, question: Question) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """The log-probabilities of the tokens of the right answer, and the most likely token at each place."""
        fields = self._prepare(text, question)
        grammar = "root ::= " + " ".join(f"<[{token}]>" for token in question.answer)
        done = self._complete(
            (*text.tokens, *question.prompt), len(question.answer), n_probs=1, grammar=grammar, **fields
        )
        self._check_cached(done, text, question)
        found = done.get("completion_probabilities", [])
        if [x["id"] for x in found] != list(question.answer):
            raise TBQError(f"llama-server did not give the {len(question.answer)} tokens of an answer in one request")
        logprobs = tuple(max(LOWEST, float(x["logprob"])) for x in found)
        return logprobs, tuple(int(x["top_logprobs"][0]["id"]) for x in found)

    @staticmethod
    def _check_cached(done: Any, text: Text, question: Question) -> None:
        cached, wanted = done["timings"]["cache_n"], 0 if question.path == "cold" else len(text.tokens)
        if cached < wanted or question.path == "cold" and cached:
            why = "; a model with sliding windows needs --swa-full"
            if question.path == "shifted":
                why = ": it cannot shift this cache, or the model has sliding windows and needs --swa-full"
            raise TBQError(f"llama-server took {cached} tokens from the cache instead of {wanted}{why}")

    def _generate(self, text: Text, question: Question, **fields: Any) -> tuple[str, bool]:
        """What the model writes, and whether it ended by itself."""
        n = len(question.answer) + len(question.answer) // 2 + 16
        stop = [] if self._chat else ["\n"]  # a text goes on after a list
        done = self._complete((*text.tokens, *question.prompt), n, stop=stop, **fields)
        return done["content"], done["stop_type"] != "limit"

    def ask(self, text: Text, question: Question) -> Answer:
        """Asks a question about a text."""
        logprobs, chosen = self.force(text, question)
        until = tokens_alike(chosen, question.answer)
        if question.task == "json":
            more = self._ask_json(text, question)
            return Answer(logprobs, chosen, more.pop("right"), until, more)
        if question.task == "copy":
            right = sum(a == b for a, b in zip(chosen, question.answer)) / len(chosen)
        else:
            right = float(until == len(question.answer))
        return Answer(logprobs, chosen, right, until)

    def _ask_json(self, text: Text, question: Question) -> dict[str, float]:
        written, ended = self._generate(text, question)
        found, rest = read_records(written)
        under = read_records(self._generate(text, question, grammar=GRAMMAR)[0])[0]
        wanted = question.records

        def share(records: list[tuple[str, int]] | None) -> float:
            return sum(a == b for a, b in zip(records or [], wanted)) / len(wanted)

        return {
            "right": share(found),
            "parses": float(found is not None),
            "as_long": float(found is not None and len(found) == len(wanted)),
            "ends": float(found is not None and ended and len(rest.strip()) <= len("```")),
            "right_under_grammar": share(under),
        }


def costs(made: Questions) -> list[int]:
    """About how long each question takes, in tokens of a prompt; a token that is generated takes as long as eight."""
    found, before = [], None
    for question in made.questions:
        is_read = question.path == "cold" or (question.text, question.path == "shifted") != before
        before = None if question.path == "cold" else (question.text, question.path == "shifted")
        generated = len(question.answer) * (4 if question.task == "json" else 1)
        found.append(is_read * len(made.texts[question.text].tokens) + len(question.prompt) + 8 * generated)
    return found


def uses_files(tasks: Sequence[str]) -> bool:
    """Whether tasks save and restore a slot."""
    return "prefix" in tasks
