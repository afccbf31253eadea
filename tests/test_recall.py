# SPDX-License-Identifier: MIT
"""`tbq bench recall`: real runs of llama-server on short texts."""

import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tbq
from llama_tools import ENV
from tbq._text import python_text
from tbq.bench import paired, recall
from tbq.bench.recall_answers import Respondent, read_records
from tbq.bench.recall_questions import FAR, GRAMMAR, NAMES, Writer, split_text
from tbq.errors import TBQError
from tbq.kv_cache.calibrate import center_of_model

LENGTH = 768  # the shortest in which every task but copy and prefix fits
SMALL = ("-t", "2", "--no-warmup")


@pytest.fixture(autouse=True, scope="module")
def waiting_threads_sleep():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", ENV["OMP_WAIT_POLICY"])
        yield


def run(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "tbq", "bench", "recall", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENV,
        **more,
    )


# --- statistics -------------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_the_normal_distribution():
    """With many independent differences the interval is the mean plus or minus 1.96 standard errors."""
    values = np.random.default_rng(1).exponential(size=500)
    mean, low, high = paired.bootstrap(values, range(500))
    error = values.std(ddof=1) / math.sqrt(500)
    assert mean == pytest.approx(values.mean())
    assert (low - mean) / error == pytest.approx(-1.96, abs=0.15)
    assert (high - mean) / error == pytest.approx(1.96, abs=0.15)
    assert paired.bootstrap(values, range(500)) == (mean, low, high)


def test_bootstrap_draws_groups():
    """Ten copies of a difference in a group say no more than one."""
    values = np.random.default_rng(2).normal(size=50)
    one = paired.bootstrap(values, range(50))
    ten = paired.bootstrap(np.repeat(values, 10), np.repeat(np.arange(50), 10))
    assert ten == pytest.approx(one)
    assert all(map(math.isnan, paired.bootstrap([1.0, 2.0], [7, 7])[1:]))


def test_bootstrap_of_few_groups_covers_what_it_says():
    """The mean of four normal differences lies in the interval 95 times of 100; without the correction 80 times."""
    random = np.random.default_rng(3)
    trials = [paired.bootstrap(random.normal(size=4), range(4), seed)[1:] for seed in range(400)]
    assert 0.92 <= np.mean([low <= 0 <= high for low, high in trials]) <= 0.985


@pytest.mark.parametrize("freedom, quantile", [(2, 4.303), (3, 3.182), (9, 2.262), (30, 2.042)])
def test_students_quantile(freedom, quantile):
    assert paired._student(0.95, freedom) == pytest.approx(quantile, rel=0.01)


@pytest.mark.parametrize("lost,won,p", [(0, 0, 1), (3, 3, 1), (10, 0, 2 / 1024), (2, 8, 2 * 56 / 1024), (1, 0, 1)])
def test_mcnemar(lost, won, p):
    assert paired.mcnemar(lost, won) == pytest.approx(p)


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def center(demo_model):
    """The means of the keys, so that no test waits for them."""
    center_of_model(demo_model, LENGTH)


@pytest.fixture(scope="module")
def server(demo_model):
    with tbq.Server(demo_model, "f16", options=["-c", "2048", "-np", "1", "--cache-ram", "0", *SMALL]) as server:
        yield server


def write(server, *tasks, chat=True, length=LENGTH, seed=0, samples=1, passage=32):
    writer = Writer(server, python_text().decode(), chat, seed, passage)
    for task in tasks:
        for sample in range(samples):
            writer.write(task, length, (0, 0.5, 1), sample)
    return writer.made


def text_of(server, tokens):
    return server.request("/detokenize", {"tokens": list(tokens)})["content"]


@pytest.mark.parametrize("chat", [True, False])
def test_questions_fit_and_facts_are_far(server, chat):
    made = write(server, "needle", "names", "copy", "json", "prefix", chat=chat, length=1024)
    count = {task: sum(q.task == task for q in made.questions) for task in recall.TASKS}
    assert count == {"needle": 3, "names": NAMES, "copy": 4, "json": 3, "prefix": 8}
    for question in made.questions:
        text = made.texts[question.text]
        used = len(text.tokens) + len(text.junk) + len(question.prompt) + len(question.answer)
        assert 1024 - 160 < used < 1024 and 0 <= question.depth <= 1
        said = text_of(server, text.tokens[: -FAR + 16])
        answer = text_of(server, question.answer).strip()
        if question.task == "copy":
            assert answer in said and text_of(server, question.prompt).strip()
        elif question.task == "json":
            assert json.loads(answer) == [{"name": name, "number": number} for name, number in question.records]
            assert all(f"The number of {name} is {number}." in said for name, number in question.records)
        else:
            assert re.fullmatch(r"\d{5}", answer) and f" is {answer}." in said
        if chat:
            assert "<|im_start|>assistant\n" in text_of(server, question.prompt)
    assert len({question.answer for question in made.questions if question.task == "names"}) == NAMES


def test_questions_are_made_from_the_seed(server):
    """A text does not depend on what else is measured, so that two runs can be compared."""
    made = write(server, "names", "json")
    assert write(server, "names", "json") == made
    alone = write(server, "json")
    assert [alone.texts[q.text] for q in alone.questions] == [
        made.texts[q.text] for q in made.questions if q.task == "json"
    ]
    assert write(server, "json", seed=1).texts != alone.texts


def test_needle_moves_in_one_text(server):
    """The same text and number at every depth, from the deepest on, so that the server evaluates the start once."""
    made = write(server, "needle")
    assert [q.asked_depth for q in made.questions] == [1, 0.5, 0]
    assert len({q.answer for q in made.questions}) == 1 and len({len(text.tokens) for text in made.texts}) == 1
    places = [text_of(server, text.tokens).index("The magic number") for text in made.texts]
    assert places[0] > places[1] > places[2]


def test_what_does_not_fit(server):
    with pytest.raises(TBQError, match=r"a text of \d+ tokens has no room for 8 facts and 256 tokens after them"):
        write(server, "names", length=400)
    with pytest.raises(TBQError, match="task copy: length 768 has no room for a passage of 272 tokens"):
        write(server, "copy", passage=256)


def test_split_text():
    assert split_text("One. Two!\n\n Three four") == ["One.", "Two!", "Three four"]
    assert [len(part.split()) for part in split_text("word " * 130)] == [60, 60, 10]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model(server):
    """Forced in one request they are what the model says token by token, of the whole vocabulary.  The same for the
    tokens it would have chosen."""
    made = write(server, "names")
    question, text = made.questions[0], made.texts[0]
    logprobs, chosen = Respondent(server, True).force(text, question)
    assert len(logprobs) == len(question.answer) == 5
    for i, token in enumerate(question.answer):
        prompt = [*text.tokens, *question.prompt, *question.answer[:i]]
        body = {"prompt": prompt, "n_predict": 1, "n_probs": 100000, "temperature": 0, "cache_prompt": True}
        (found,) = server.request("/completion", body)["completion_probabilities"]
        known = {x["id"]: x["logprob"] for x in found["top_logprobs"]}
        assert sum(map(math.exp, known.values())) == pytest.approx(1, abs=1e-3)
        # one by one a token is a prompt, and other kernels compute it
        assert logprobs[i] == pytest.approx(known[token], abs=0.02)
        assert known[chosen[i]] > max(known.values()) - 0.02


def test_right_is_what_the_model_writes(server):
    """A question counts as right if greedy sampling gives the answer."""
    made = write(server, "names")
    respondent = Respondent(server, True)
    rights = []
    for question in made.questions:
        text = made.texts[question.text]
        answer = respondent.ask(text, question)
        prompt = [*text.tokens, *question.prompt]
        body = {"prompt": prompt, "n_predict": len(question.answer), "temperature": 0, "return_tokens": True}
        wrote = server.request("/completion", body)["tokens"]
        assert answer.right == (wrote == list(question.answer))
        assert answer.until == recall.tokens_alike(wrote, question.answer)
        rights.append(answer.right)
    assert 4 <= sum(rights)  # f16 finds most of them in so short a text


def test_rows_that_are_not_from_the_cache(server):
    """An answer whose text was evaluated again, with the question, is refused."""

    class Forgetful:
        def request(self, path, body=None):
            return server.request(path, {**body, "cache_prompt": False})

    made = write(server, "names")
    with pytest.raises(TBQError, match=rf"took 0 tokens from the cache instead of {len(made.texts[0].tokens)}"):
        Respondent(Forgetful(), True).force(made.texts[0], made.questions[0])


@pytest.mark.parametrize(
    "text,records,rest",
    [
        ('[{"name": "A", "number": 1}, {"name": "B", "number": 2}]', [("A", 1), ("B", 2)], ""),
        ('```json\n[{"number": 1, "name": "A"}]\n```', [("A", 1)], "\n```"),
        ('[{"name": "A", "number": "1"}, {"name": "B"}, 7]', [("", -1)] * 3, ""),
        ('[{"name": "A", "number": 1}', None, ""),
        ("none", None, ""),
        ("[] more", [], " more"),
    ],
)
def test_read_records(text, records, rest):
    assert read_records(text) == (records, rest)


def test_grammar(server):
    """The grammar of `json` allows the right answer, and makes a model write a list."""
    made = write(server, "json")
    question, text = made.questions[0], made.texts[0]
    body = {"prompt": text.tokens + question.prompt, "n_predict": 100, "temperature": 0}
    wrote = server.request("/completion", {**body, "n_predict": 20, "grammar": GRAMMAR})["content"]
    assert re.match(r'\[\{"name": "[A-Za-z]+", "number": \d+', wrote), wrote
    # with the names and numbers of the right answer as the only ones, it writes the right answer
    only = re.sub(r"record \(.*\)\*", 'r0 "," " " r1 "," " " r2', GRAMMAR.splitlines()[0]) + "\n"
    for i, (name, number) in enumerate(question.records):
        record = GRAMMAR.splitlines()[1].replace("[A-Za-z]+", f'"{name}"').replace("[0-9]+", f'"{number}"')
        only += record.replace("record", f"r{i}") + "\n"
    wrote = server.request("/completion", {**body, "grammar": only})["content"]
    assert read_records(wrote) == (list(question.records), "") and wrote.strip() == text_of(server, question.answer)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recall")


@pytest.fixture(scope="module")
def table(demo_model, folder, center):
    """What is printed, and recall.png in the folder."""
    pytest.importorskip("matplotlib", reason="-o needs matplotlib")
    done = run(demo_model, "--tasks", "needle,json", "--types", "tbq4_0,tbq2_0", "--lengths", LENGTH, "--depths", "0,1",
               "--samples", 1, "-o", folder / "recall.png", "--", *SMALL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_table(table, demo_model):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    heads = [row for row in rows if row[0] == "K / V"]
    assert [len(head) for head in heads] == [8, 4, 12] and all(len(row) in (8, 4, 12) for row in rows)
    assert [row[0] for row in rows if len(row) == 8][2:] == ["f16", "tbq4_0", "tbq2_0"]
    assert heads[1] == ["K / V", "length", "depth 0", "depth 1"]
    assert f"model    {demo_model.name}, sha256 {tbq.kv_cache.model.sha256(demo_model)}" in table
    assert "options  -c 768 -np 1 --cache-ram 0 -t 2 --no-warmup" in table and "through the chat template" in table


def test_picture(table, folder):
    assert (folder / "recall.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.fixture(scope="module")
def found(demo_model, bin_dir):
    """A base model's questions, with the llama-server that --llama-server names, as JSON."""
    done = run(demo_model, "--tasks", "names", "--types", "q8_0", "--lengths", LENGTH, "--samples", 2, "--no-chat",
               "--json", "--llama-server", bin_dir / "llama-server", "--", *SMALL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json(found, bin_dir):
    assert found["complete"] and not found["chat"] and found["failures"] == {} and len(found["questions"]) == 2 * NAMES
    assert found["llama_server"] == str(bin_dir / "llama-server")
    compared = found["compared"]["names"]
    answers = [question["answers"] for question in found["questions"]]
    losses = [answer["f16"]["logprob"] - answer["q8_0"]["logprob"] for answer in answers]
    assert compared["q8_0"]["loss"] == pytest.approx(np.mean(losses)) and compared["f16"]["loss"] == 0
    assert compared["q8_0"]["low"] <= compared["q8_0"]["loss"] <= compared["q8_0"]["high"]
    for types in ("f16", "q8_0"):
        assert compared[types]["count"] == 2 * NAMES
        assert compared[types]["right"] == pytest.approx(np.mean([answer[types]["right"] for answer in answers]))
    assert abs(compared["q8_0"]["loss"]) < 0.1 and compared["f16"]["right"] > 0.5


def test_types_that_are_refused(demo_model):
    """They are named at the end, and the others are measured."""
    options = ("--", *SMALL, "-fa", "off")
    done = run(demo_model, "--tasks", "needle", "--types", "q8_0", "--lengths", 512, "--depths", 0, *options)
    assert done.returncode == 2 and re.findall(r"(?m)^\| (\S+) \| 4 \|", done.stdout) == ["f16"], done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tbq: error: q8_0: cache q8_0/q8_0 is refused: values of q8_0 need flash attention"), last


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_what_was_measured(demo_model, sent, center):
    process = subprocess.Popen(
        [sys.executable, "-m", "tbq", "bench", "recall", str(demo_model), "--tasks", "names", "--types", "tbq4_0",
         "--lengths", str(LENGTH), "--samples", "1", "--", *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
    )  # fmt: skip
    read = b""
    while b"tbq4_0, names" not in read:
        piece = process.stderr.read1(1 << 16)
        assert piece, read
        read += piece
    time.sleep(0.2)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err
    assert re.search(rb"\| f16 \| 8 \|", out), out
    assert re.search(rb"tbq: interrupted after (8|9|1[0-5]) of 16 answers\n$", err), err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--tasks", "haystack"), r"task 'haystack' is not one of needle, names, copy, json, prefix"),
        (("--depths", "2"), r"depths 2.0 must be from 0 to 1"),
        (("--types", "tbq4"), r"cache type 'tbq4' is not one of .*"),
        (("--lengths", "9000"), r"length 9000 is more than the 8192 tokens that the model was trained for"),
        (("--lengths", "300", "--tasks", "names"), r"a text of \d+ tokens has no room for 8 facts .*"),
        (("--text", "nowhere.txt"), r"text 'nowhere.txt' cannot be read \(No such file or directory\)"),
        (("-o", "recall"), r"-o 'recall' must end in one of .*\.png.*"),
        (("--llama-server", "nowhere"), r"llama-server 'nowhere' is not a file"),
        (("--", "--no-such-option"), r"llama-server ended with status 1: invalid argument: --no-such-option"),
    ],
)
def test_errors(demo_model, tmp_path, arguments, message):
    if "-o" in arguments:
        pytest.importorskip("matplotlib", reason="-o needs matplotlib")
    done = run(demo_model, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert re.fullmatch(f"tbq: error: {message}", done.stderr.replace("\r", "\n").strip().splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_sources_and_a_llama_server_are_enough(demo_model, bin_dir, tmp_path):
    """bench/recall.py, with the package's compiled module out of reach."""
    root = pathlib.Path(__file__).resolve().parents[1]
    script = """if True:
        import runpy, sys
        sys.modules.update({"tbq._ffi": None, "gguf": None})
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    small = ("--tasks", "names", "--types", "tbq4_0", "--lengths", "512", "--samples", "1", "--chat", "--", "-t", "2")
    command = [sys.executable, "-c", script, root / "bench" / "recall.py", bin_dir / "llama-server", demo_model]
    done = subprocess.run([*command, tmp_path / "out", *small], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "| tbq4_0 | 8 |" in done.stdout, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["complete"] and all(len(q["answers"]) == 2 for q in report["questions"])


# --- a small fixed set ------------------------------------------------------------------------------------------------

#: The most that these types may lose to f16, in nats: on average, in one token, and on average after a shift.
LARGEST = {"tbq4_0/tbq3_0": (0.045, 1.2, 0.2), "tbq3_0": (0.13, 1.9, 0.38), "tbq2_0": (0.4, 5, 0.5)}


@pytest.fixture(scope="module")
def losses(demo_model, center):
    """For each pair of types the losses of tokens, float64 [questions, 5], of `names` and after a shift."""
    found, base, made = {}, None, None
    for types in ("f16", *LARGEST):
        with tbq.Server(demo_model, types, options=["-c", "1024", "-np", "1", "--cache-ram", "0", *SMALL]) as server:
            if made is None:
                made = write(server, "names", samples=2), write(server, "prefix", length=1024)
            respondent = Respondent(server, True)
            logprobs = [
                [
                    respondent.force(questions.texts[q.text], q)[0]
                    for q in questions.questions
                    if (q.task, q.path) in (("names", "reused"), ("prefix", "shifted"))
                ]
                for questions in made
            ]
        base = base or logprobs
        found[types] = [np.array(theirs) - np.array(mine) for theirs, mine in zip(base, logprobs)]
    return found


@pytest.mark.parametrize("types", LARGEST)
def test_fixed_set(losses, types):
    """A broken kernel fails, noise does not.

    Tried on 2026-11-29 on a CPU with AVX-512 VNNI.  The three numbers are those of LARGEST:

    | build | tbq4_0/tbq3_0 | tbq3_0 |
    |---|---|---|
    | as it is | 0.017, 0.43, -0.02 | 0.084, 1.06, 0.17 |
    | one row in 64 hidden when generating | **0.087**, **2.5**, -0.03 | **0.169**, **2.8**, 0.17 |
    | the nibbles of one byte in 32 swapped in each key of 4 bits | **0.68**, **3.3**, **1.2** | 0.084, 1.06, 0.17 |
    | the K-shift neither adds nor subtracts the center | 0.017, 0.43, **0.39** | 0.084, 1.06, **0.57** |

    On 2026-11-30, with the scale of keys unbiased:

    | build | tbq4_0/tbq3_0 | tbq3_0 | tbq2_0 |
    |---|---|---|---|
    | as it is | 0.015, 0.46, 0.07 | 0.049, 0.85, 0.24 | 0.19, 2.6, 0.25 |
    | the K-shift writes keys without their weights | 0.015, 0.46, 0.06 | 0.049, 0.85, 0.17 | 0.19, 2.6, **0.77** |

    A shift of 64 tokens does not show the center's: RoPE then hardly turns the channels that have means.
    """
    mean, token, shifted = LARGEST[types]
    names, after_shift = losses[types]
    assert names.shape == (2 * NAMES, 5) and after_shift.shape == (2, 5)
    assert -0.05 < names.mean() < mean and names.max() < token
    assert after_shift.mean() < shifted
