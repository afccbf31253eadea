# SPDX-License-Identifier: MIT
"""The questions of `tbq bench recall`: long texts with facts in them, what is asked, and the right answers, as tokens.

Everything is made from a seed and a text.  A text, its facts and its questions do not depend on the other lengths,
depths and tasks of a run, so that two runs can be compared.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from tbq.errors import TBQError

#: The last tokens of a text have no facts, so that every fact has left the window of exact rows (128 by default, and
#: 17 spare ones) and the micro-batches that the question is read in.
FAR = 256
NAMES = 8  # facts in a text of `names` and `prefix`
ASKED = 2  # of them, in `prefix`, where most questions need a text of their own
LISTS, RECORDS = 3, 3  # lists that are asked for in a text of `json`, and records of a list
PASSAGES = 4  # of a text of `copy`
GIVEN = 16  # tokens of a passage that are given
JUNK = 256  # tokens that are taken out at the start of a text; a shorter shift hardly turns the channels with means

#: Ways to a prefix in the cache, of `prefix`.
PATHS = ("cold", "reused", "restored", "shifted")

_PEOPLE = [
    "Alice",
    "Bob",
    "Carol",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Irene",
    "Jack",
    "Karen",
    "Leo",
    "Maria",
    "Nick",
    "Olivia",
    "Peter",
    "Rachel",
    "Simon",
    "Tina",
    "Victor",
]
_MARK = "\ue000"  # a private character, which no text has

#: The JSON of `json`, as a grammar of llama.cpp.
GRAMMAR = r"""root ::= " "? "[" record ("," " "? record)* "]"
record ::= "{" "\"name\": \"" [A-Za-z]+ "\", " "\"number\": " [0-9]+ "}"
"""


class Connection(Protocol):
    """What can ask llama-server: a tbq.Server, for example."""

    def request(self, path: str, body: Any = None) -> Any:
        """The answer to GET, or with a body to POST, as decoded JSON."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a text, and the right answer."""

    task: str
    length: int  #: tokens of everything together: the text, the question, the answer
    depth: float  #: where in the text the answer is: 0 at the start, 1 FAR tokens before the end
    text: int  #: index in Questions.texts
    group: int  #: questions of one group are not independent
    prompt: tuple[int, ...]  #: tokens after the text: the question, and how the answer begins
    answer: tuple[int, ...]  #: tokens of the right answer
    records: tuple[tuple[str, int], ...] = ()  #: of `json`: the names and numbers to list
    asked_depth: float = -1  #: of `needle`: the depth that was asked for
    path: str = "reused"  #: how the text gets into the cache, one of PATHS


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that questions are about."""

    tokens: tuple[int, ...]
    head: int = 0  #: how many of them are before the text itself: the template of a chat
    junk: tuple[int, ...] = ()  #: tokens to put behind the head and take out again, of `prefix`


@dataclasses.dataclass
class Questions:
    """All questions of a run, those about one text in a row."""

    texts: list[Text] = dataclasses.field(default_factory=list)
    questions: list[Question] = dataclasses.field(default_factory=list)


def split_text(text: str) -> list[str]:
    """The sentences of a text, each at most about 60 words."""
    found = []
    for paragraph in text.splitlines():
        for sentence in re.split(r"(?<=[.!?;:])\s+", paragraph.strip()):
            words = sentence.split()
            found += [" ".join(words[i : i + 60]) for i in range(0, len(words), 60)]
    return found


class Writer:
    """Writes texts and questions in the tokens of a model.

    connection: a llama-server with the model.  text: what the texts are made of.
    chat: whether the model is asked through its chat template, or continues a text.
    seed: makes the choice of sentences, names and numbers.  passage: tokens of an answer of `copy`.
    """

    def __init__(self, connection: Connection, text: str, chat: bool, seed: int = 0, passage: int = 256) -> None:
        self._connection, self._chat, self._seed, self.passage = connection, chat, seed, passage
        self._sentences = split_text(text)
        self._known: dict[tuple[str, bool], list[tuple[int, str]]] = {}
        self._sound = False  # whether a sentence has tokens of whole characters only
        self.made = Questions()
        if not self._sentences:
            raise TBQError("the text has no sentences; name one that the model can read")

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _pieces(self, text: str, start: bool = False) -> list[tuple[int, str]]:
        """The tokens of a text, each with the text of its own ("" for a part of a character).

        start: whether it is the start of a prompt, where the model may want a token of its own.
        """
        if (text, start) not in self._known:
            body = {"content": text, "add_special": start, "parse_special": self._chat, "with_pieces": True}
            found = self._connection.request("/tokenize", body)["tokens"]
            self._known[text, start] = [(x["id"], x["piece"] if isinstance(x["piece"], str) else "") for x in found]
        return self._known[text, start]

    def _tokens(self, text: str, start: bool = False) -> list[int]:
        tokens = [token for token, _ in self._pieces(text, start)]
        # a template may begin with the token that llama.cpp puts there as well
        return tokens[1:] if start and len(tokens) > 1 and tokens[0] == tokens[1] else tokens

    def _frame(self, question: str, reply: str, example: tuple[str, str] | None = None) -> tuple[str, str]:
        """What stands before the text and what stands after it.

        reply: how the answer begins.  example: a question and its answer before; of a model without a chat template,
        the answer only.
        """
        if not self._chat:
            return "", f"\n\n{example[1]}\n{reply}" if example else f"\n\n{reply}"
        said = [*(example or ()), question]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        messages[0]["content"] = f"Read this text.\n\n{_MARK}\n\n{said[0]}"
        body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
        before, mark, after = self._connection.request("/apply-template", body)["prompt"].partition(_MARK)
        if not mark:
            raise TBQError("the chat template of the model does not repeat a message; ask it as a base model")
        return before, after + reply

    def _prompt(
        self, question: str, reply: str, answer: str, example: tuple[str, str, str] | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens after the text up to the answer, and those of the answer.

        A first token of the answer that is only a space is given, because it is no part of what has to be found.
        """
        before = (example[0], example[1] + example[2]) if example else None
        after = self._frame(question, reply, before)[1]
        given, whole = self._pieces(after), self._pieces(after + answer)
        n = next((i for i, (a, b) in enumerate(zip(given, whole)) if a != b), min(len(given), len(whole)))
        while n < len(whole) - 1 and whole[n][1].isspace():
            n += 1
        tokens = [token for token, _ in whole]
        return tuple(tokens[:n]), tuple(tokens[n:])

    # --- texts --------------------------------------------------------------------------------------------------------

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])

    def _sentences_from(self, start: int) -> Iterator[list[int]]:
        """The tokens of sentences, from one on, endlessly.

        Sentences with a token that is only a part of a character are left out: a grammar cannot force it.
        """
        for i in itertools.count(start):
            if i == start + 2 * len(self._sentences) and not self._sound:
                raise TBQError("every sentence of the text has characters of several tokens; name another text")
            line = self._sentences[i % len(self._sentences)] + "\n"
            if all(piece for _, piece in self._pieces(line)):
                self._sound = True
                yield self._tokens(line)

    def _text(
        self, random: np.random.Generator, size: int, facts: Sequence[tuple[float, str]], junk: int = 0
    ) -> tuple[Text, list[float]]:
        """A text of `size` tokens with facts in it, and the depths at which they stand.

        facts: for each one a depth and a line.  Depth 1 is FAR tokens before the end.
        """
        head = self._tokens(self._frame("", "")[0], start=True)
        lines = [self._tokens(line + "\n") for _, line in facts]
        room = size - len(head) - sum(map(len, lines))
        if room < FAR + 32:
            raise TBQError(f"a text of {size} tokens has no room for {len(facts)} facts and {FAR} tokens after them")
        start = int(random.integers(len(self._sentences)))
        body: list[int] = []
        ends = [0]
        for sentence in self._sentences_from(start):
            body += sentence
            if len(body) > room:
                break
            ends.append(len(body))
        places = [max(end for end in ends if end <= max(depth, 0) * (room - FAR)) for depth, _ in facts]
        tokens, at = list(head), 0
        for place, line in sorted(zip(places, lines), key=lambda pair: pair[0]):
            tokens += body[at:place] + line
            at = place
        tokens += body[at:room]
        others = itertools.chain.from_iterable(self._sentences_from(start + len(self._sentences) // 2))
        extra = itertools.islice(others, junk)
        return Text(tuple(tokens), len(head), tuple(extra)), [place / max(1, room - FAR) for place in places]

    def _add(self, text: Text, group: int, questions: Sequence[dict[str, Any]], **common: Any) -> None:
        """Adds a text and its questions."""
        self.made.texts.append(text)
        for fields in questions:
            question = Question(**{"text": len(self.made.texts) - 1, "group": group, **common, **fields})
            used = len(text.tokens) + len(text.junk) + len(question.prompt) + len(question.answer)
            if used + 8 > question.length:
                raise TBQError(f"task {question.task}: a question needs {used} tokens of {question.length}")
            self.made.questions.append(question)

    # --- tasks --------------------------------------------------------------------------------------------------------

    def needle(self, length: int, depths: Sequence[float], sample: int) -> None:
        """One number in a text, once at each depth.  The deepest is first, so that the start is evaluated once."""
        number = int(self._random(0, length, sample, 1).integers(10000, 100000))
        ask = self._prompt("What is the magic number?", "The magic number is", f" {number}")
        for depth in sorted(depths, reverse=True):
            fact = (depth, f"The magic number is {number}.")
            text, at = self._text(self._random(0, length, sample), length - _room(0, *ask), [fact])
            asked = {"prompt": ask[0], "answer": ask[1], "depth": at[0], "asked_depth": depth}
            self._add(text, sample, [asked], task="needle", length=length)

    def _numbered(self, random: np.random.Generator, count: int) -> list[tuple[str, int]]:
        people = random.choice(_PEOPLE, count, replace=False)
        return [(str(name), int(random.integers(10000, 100000))) for name in people]

    def _named(self, key: int, length: int, sample: int, junk: int) -> tuple[Text, list[dict[str, Any]]]:
        random = self._random(key, length, sample)
        people = self._numbered(random, NAMES)
        facts = [
            ((i + random.random()) / NAMES, f"The number of {name} is {number}.")
            for i, (name, number) in enumerate(people)
        ]
        asks = [
            self._prompt(f"What is the number of {name}?", f"The number of {name} is", f" {number}")
            for name, number in people
        ]
        room = junk + max(_room(0, *ask) for ask in asks)
        text, depths = self._text(random, length - room, facts, junk)
        asked = [{"prompt": prompt, "answer": answer, "depth": depth} for (prompt, answer), depth in zip(asks, depths)]
        return text, asked

    def names(self, length: int, depths: Sequence[float], sample: int) -> None:
        """NAMES numbers of people in a text, each asked for."""
        text, asked = self._named(1, length, sample, 0)
        self._add(text, sample, asked, task="names", length=length)

    def prefix(self, length: int, depths: Sequence[float], sample: int) -> None:
        """As `names`, ASKED of them, each once for every way that the text can get into the cache."""
        text, asked = self._named(2, length, sample, JUNK)
        asked = [asked[i] for i in self._random(2, length, sample, 1).choice(NAMES, ASKED, replace=False)]
        paths = [{**fields, "path": path} for path in PATHS for fields in asked]
        self._add(text, sample, paths, task="prefix", length=length)

    def copy(self, length: int, depths: Sequence[float], sample: int) -> None:
        """PASSAGES passages of a text, each to be repeated from its first words on."""
        random = self._random(3, length, sample)
        after = self._tokens(self._frame("Repeat a passage of this text, word for word.", "")[1])
        n = GIVEN + self.passage
        text, _ = self._text(random, length - _room(GIVEN, after, range(self.passage)), [])
        first, last = text.head, len(text.tokens) - FAR - n
        if last < first + PASSAGES:
            raise TBQError(f"task copy: length {length} has no room for a passage of {n} tokens far from the end")
        asked = []
        for i in range(PASSAGES):
            at = first + int((i + random.random()) / PASSAGES * (last - first))
            passage = text.tokens[at : at + n]
            depth = (at - first) / (len(text.tokens) - FAR - first)
            asked.append({"prompt": (*after, *passage[:GIVEN]), "answer": passage[GIVEN:], "depth": depth})
        self._add(text, sample, asked, task="copy", length=length)

    def json(self, length: int, depths: Sequence[float], sample: int) -> None:
        """LISTS lists of RECORDS people with numbers, to be given as JSON, after one that is given as an example."""
        random = self._random(4, length, sample)
        count = (LISTS + 1) * RECORDS
        people = self._numbered(random, count)
        order = random.permutation(count)  # the people of a list do not stand together in the text
        facts = [
            ((int(order[i]) + random.random()) / count, f"The number of {name} is {number}.")
            for i, (name, number) in enumerate(people)
        ]
        example, *lists = [people[i : i + RECORDS] for i in range(0, count, RECORDS)]
        asks = [self._prompt(*self._ask_for_list(records), self._ask_for_list(example)) for records in lists]
        # what is generated may be half as long again
        room = max(_room(len(ask[1]) // 2 + 16, *ask) for ask in asks)
        text, at = self._text(random, length - room, facts)
        asked = [
            {"prompt": prompt, "answer": answer, "depth": min(at[i : i + RECORDS]), "records": tuple(records)}
            for (prompt, answer), i, records in zip(asks, range(RECORDS, count, RECORDS), lists)
        ]
        self._add(text, sample, asked, task="json", length=length)

    def _ask_for_list(self, records: Sequence[tuple[str, int]]) -> tuple[str, str, str]:
        """A question for a list, how the answer begins, and the answer."""
        names = [name for name, _ in records]
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        answer = json.dumps([{"name": name, "number": number} for name, number in records])
        begin = "" if self._chat else f"{listed} with their numbers as JSON:"
        return f"List {listed} with their numbers as JSON.", begin, answer if self._chat else f" {answer}"

    def write(self, task: str, length: int, depths: Sequence[float], sample: int) -> None:
        """Adds a text of a task, or for `needle` one for each depth, with its questions."""
        makers: dict[str, Callable[[int, Sequence[float], int], None]] = {
            "needle": self.needle,
            "names": self.names,
            "copy": self.copy,
            "json": self.json,
            "prefix": self.prefix,
        }
        makers[task](length, depths, sample)


TASKS = ("needle", "names", "copy", "json", "prefix")


def _room(more: int, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens after a text, rounded up, so that questions of a few tokens more or less have texts of one size."""
    return -(-(len(prompt) + len(answer) + more + 16) // 64) * 64
