# SPDX-License-Identifier: MIT
"""`tbq bench quality`: real runs of llama-perplexity on the smallest text that gives results, 254 scores."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import pytest

import tbq
from llama_tools import ENV, cache_line, complete, number, tiny_llama
from tbq import _text
from tbq.bench import perplexity, quality
from tbq.kv_cache.model import Model, _cache, read_model, sha256
from tbq.kv_cache.type_pairs import TypePair

SMALL = ("--context", "256", "--chunks", "2", "--threads", "2")
TYPES = ("f16", "q4_0", "tbq4_0", "tbq4_0/tbq3_0", "tbq2_0")
ROWS = tuple(
    row
    for name in TYPES
    for row in (name, f"{name} centered", f"{name} centered exact")[: 1 + (name != "f16") + name.startswith("tbq")]
)


def run(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "tbq", "bench", "quality", *map(str, arguments)], capture_output=True, text=True, **more
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def table(demo_model, folder):
    """What is printed, and quality.png in the folder."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    (folder / "scratch").mkdir()
    done = run(
        "--model",
        demo_model,
        *SMALL,
        "--types",
        ",".join(TYPES),
        "--plot",
        folder / "quality.png",
        "--scratch",
        folder / "scratch",
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"tbq: 25 MB of probabilities of the f16 cache go to .*scratch while this runs", done.stderr)
    assert not list((folder / "scratch").iterdir())
    return done.stdout


@pytest.fixture(scope="module")
def found(demo_model):
    """The same measurement again, as JSON."""
    done = run("--model", demo_model, *SMALL, "--types", ",".join(TYPES), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_two_runs_agree(table, found):
    """The figures agree to the last digit that is printed."""

    def text(value, digits, scale=1):
        return perplexity.Value(**value).text(digits, scale)

    for row, (name, pair) in zip(rows(table), found["pairs"].items(), strict=True):
        assert row == [
            name,
            f"{(pair['bits_k'] + pair['bits_v']) / 2:g}",
            str(pair["bytes_per_token"]),
            text(pair["ppl"], 3),
            text(pair["ppl_ratio"], 4),
            text(pair["kld"], 5).replace("-0.00000", "0.00000"),
            f"{pair['kld_99']:.4f}",
            text(pair["same_top"], 2, 100),
        ]


def test_figures(found):
    """The figures are those that tests/test_llama_perplexity.py gets for this model in another way."""
    pairs = found["pairs"]
    assert list(pairs) == list(ROWS) and found["failures"] == {}
    assert all(pair["centered"] == (" centered" in name) for name, pair in pairs.items())
    assert all(pair["exact"] == name.endswith(" exact") for name, pair in pairs.items())
    kld = {name: pair["kld"]["mean"] for name, pair in pairs.items()}
    assert abs(kld["f16"]) < 1e-4 and pairs["f16"]["same_top"]["mean"] == 1
    assert 0.001 < kld["tbq4_0"] < kld["q4_0"] < 0.1 and kld["tbq4_0"] < kld["tbq4_0/tbq3_0"] < kld["tbq2_0"] < 1.1
    for pair in pairs.values():
        assert pair["ppl"]["mean"] / found["base_ppl"] == pytest.approx(pair["ppl_ratio"]["mean"], rel=1e-3)
        assert 0 <= pair["kld"]["error"] < 0.1 and 0 <= pair["rms_dp"]["mean"] < 1
    assert [(pairs[name]["bits_k"], pairs[name]["bits_v"]) for name in TYPES] == [
        (16, 16),
        (4.5, 4.5),
        (4.25, 4.25),
        (4.25, 3.25),
        (2.25, 2.25),
    ]
    # 254 scores cannot tell small gains from noise, so only large gains are compared
    assert kld["tbq2_0 centered"] < 0.8 * kld["tbq2_0"]
    assert kld["tbq2_0 centered exact"] < 0.5 * kld["tbq2_0 centered"]


@pytest.mark.parametrize("k,v", [("f16", "f16"), ("tbq4_0", "tbq3_0")])
def test_bytes_are_those_that_llama_cpp_allocates(bin_dir, demo_model, k, v):
    cache = read_model(demo_model).cache
    line = cache_line(complete(bin_dir, demo_model, "a", "-ctk", k, "-ctv", v, n=1, n_ctx=8192)[1])
    assert TypePair(k, v).bytes(cache) * line["cells"] / 2**20 == pytest.approx(line["mib"], abs=0.01)


def test_what_is_needed_to_measure_the_same(table, found, demo_model, installed):
    digest = hashlib.sha256(demo_model.read_bytes()).hexdigest()
    text = hashlib.sha256(_text.python_text()).hexdigest()
    assert (found["model_sha256"], found["text_sha256"], found["scored"]) == (digest, text, 254)
    assert (found["llama_cpp_commit"], found["tbq"]) == (installed["llama_cpp_commit"], tbq.__version__)
    assert all(
        x in table for x in (digest, text, "254 tokens", installed["llama_cpp_commit"], f"tbq {tbq.__version__}")
    )


def test_commands_give_the_same(found, bin_dir, tmp_path):
    (tmp_path / "text.txt").write_bytes(_text.python_text())
    base, *pairs = map(shlex.split, found["commands"])
    assert len(pairs) == len(ROWS)
    program = bin_dir / base[0]
    subprocess.run([program, *base[1:]], cwd=tmp_path, env=ENV, check=True, capture_output=True)
    for _ in range(12):  # the last lines can be lost
        out = subprocess.run(
            [program, *pairs[ROWS.index("tbq4_0")][1:]],
            cwd=tmp_path,
            env=ENV,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        if perplexity.parse_scores(out):
            break
    assert number(r"Mean +KLD", out) == found["pairs"]["tbq4_0"]["kld"]["mean"]
    cut = out[: out.index("Same top p:")]
    # an output that was cut off is not read as a result
    assert perplexity.parse_scores(out) and not perplexity.parse_scores(cut)


def test_picture(table, folder):
    """The picture shows what was measured, and no other file is left in the folder."""
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in folder.iterdir()) == ["quality.png", "scratch"]


def test_picture_has_both_series_and_every_label():
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    model = Model(pathlib.Path("m.gguf"), 0, 2, None)
    report = quality.Quality(model, 256)
    some = perplexity.Value(1.0, 0.1)
    # two types with the same number of bits
    for i, name in enumerate(("f16", "q8_0", "q4_0", "iq4_nl", "tbq4_0", "tbq2_0")):
        report.scores[TypePair(name, name)] = perplexity.Score(
            some, some, perplexity.Value(0.01 * i, 0.001), 1, some, some
        )
    svg = quality.picture(report, "a title", "svg").decode()
    for said in ("a title", "llama.cpp's types", "with tbq types", "q8_0", "q4_0", "iq4_nl", "tbq4_0", "tbq2_0"):
        assert svg.count(f"<!-- {said} -->") == 1
    assert "<!-- f16 -->" not in svg


def test_without_centering(demo_model):
    done = run("--model", demo_model, *SMALL, "--types", "f16,tbq4_0", "--no-center")
    assert (
        done.returncode == 0
        and [row[0] for row in rows(done.stdout)] == ["f16", "tbq4_0", "tbq4_0 exact"]
        and "centered" not in done.stdout
        and "--cache-center none" in done.stdout
    )


def test_keys_that_can_be_centered_in_tbq_types_only(tmp_path):
    """A soft-cap of the logits: no row of centered q8_0 keys."""
    from test_plan import gemma2

    done = run("--model", gemma2(tmp_path / "model.gguf"), *SMALL, "--types", "f16,q8_0,tbq4_0")
    assert done.returncode == 0, done.stderr
    found = [row[0] for row in rows(done.stdout)]
    assert found == ["f16", "q8_0", "tbq4_0", "tbq4_0 centered", "tbq4_0 centered exact"]
    assert "warning" not in done.stderr


def test_keys_that_cannot_be_centered(tmp_path, capsys):
    """The text for the means is too short: one warning, and the rows that the user named."""
    model = read_model(tiny_llama(tmp_path / "tiny.gguf", 64), [])
    plain = TypePair("tbq4_0", "tbq4_0")
    pairs = [plain, dataclasses.replace(plain, centered=True)]
    report = quality.measure(model, pairs, b"Hello, world. " * 200, context=256, chunks=1, center_text=b"a")
    assert report.complete and list(report.scores) == [plain]
    assert capsys.readouterr().err.count("tbq: warning: no rows with centered keys: ") == 1


def test_text_of_the_user(demo_model, tmp_path):
    """A pair that the model cannot have is named at the end. The other pairs are measured, on the given text."""
    model = tiny_llama(tmp_path / "tiny.gguf", 80)
    text = tmp_path / "a text.txt"
    text.write_text("Grüße, world. " * 60, encoding="utf-8")
    done = run("--model", model, *SMALL, "--types", "f16,tbq4_0,bf16", "--text", text, cwd=tmp_path)
    assert done.returncode == 2
    assert [row[0] for row in rows(done.stdout)] == ["f16", "bf16"]
    assert f"text   a text.txt, sha256 {hashlib.sha256(text.read_bytes()).hexdigest()}" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "tbq: error: tbq4_0, tbq4_0 centered, tbq4_0 centered exact: K cache type tbq4_0 with block size 64 "
        "does not divide n_embd_head_k=80; types that do: f32, f16, bf16"
    )


@pytest.fixture
def wrong(tmp_path, demo_model):
    """Files that are not as they should be."""
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    with demo_model.open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(1 << 20))
        whole.seek(0)
        (tmp_path / "halved.gguf").write_bytes(whole.read(1 << 25))
    return tmp_path


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--model", "nowhere.gguf"), r"No such file or directory: nowhere.gguf"),
        (("--model", "cut.gguf"), r"cut.gguf is truncated or not GGUF: .*"),
        (("--model", "halved.gguf"), r"halved.gguf is truncated or corrupt: .*"),
        (("--text", "nowhere.txt"), r"text 'nowhere.txt' cannot be read \(No such file or directory\)"),
        (("--text", "latin1.txt"), r"text 'latin1.txt' is not UTF-8 \(byte 2\)"),
        (("--text", "short.txt"), r"text 'short.txt' has \d+ tokens; --context 256 needs 512"),
        (("--text", "empty.txt"), r"text 'empty.txt' is empty; name one that the model can read"),
        (("--text", "blank.txt"), r"text 'blank.txt' is empty; .*"),
        (("--text", "."), r"text '\.' cannot be read \(Is a directory\)"),
        (("--types", "tbq4"), r"cache type 'tbq4' is not one of .*"),
        (
            ("--chunks", "1", "--context", "128"),
            r"--chunks 1 of --context 128 score 63 tokens; at least 100 are needed",
        ),
        (("--context", "8193"), r"--context 8193 is more than the 8192 tokens that the model was trained for"),
        (
            ("--chunks", "100000000"),
            r"the probabilities of the f16 cache take \d+\.\d\d GB, .* has \d+\.\d\d GB; name another folder .*",
        ),
        (("--plot", "quality"), r"--plot 'quality' must end in one of .*\.png.*"),
        (
            ("--plot", "nowhere/quality.png"),
            r"--plot 'nowhere/quality.png' cannot be written: .*/nowhere is not a folder that can be written to",
        ),
        (("--scratch", "nowhere"), r"--scratch 'nowhere' is not a folder"),
        (("--", "--no-such-option"), r"llama-perplexity failed for f16: .*invalid argument: --no-such-option"),
    ],
)
def test_errors(wrong, demo_model, arguments, message):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    before = {path.name for path in wrong.iterdir()}
    if "--scratch" not in arguments:
        arguments = ("--scratch", ".", *arguments)
    done = run("--model", demo_model, "--types", "f16", *SMALL, *arguments, cwd=wrong)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert re.fullmatch(f"tbq: error: {message}", done.stderr.replace("\r", "\n").strip().splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr and {path.name for path in wrong.iterdir()} == before


def test_no_tokenizer(tmp_path):
    from tbq.bench.random_model import RandomModel, write_random_model

    model = write_random_model(
        tmp_path / "shape.gguf", RandomModel(layers=1, width=64, heads=1, kv_heads=1, head_size=64, ff=64, vocab=64)
    )
    done = run("--model", model, *SMALL)
    assert (
        done.returncode == 2
        and done.stderr.strip() == f"tbq: error: model '{model}' has no tokenizer; perplexity needs one"
    )


def test_file_that_cannot_grow(demo_model, tmp_path):
    """The disk fills up during the run."""
    done = run(
        "--model",
        demo_model,
        *SMALL,
        "--types",
        "f16",
        "--scratch",
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 23, 1 << 23)),
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.replace("\r", "\n").strip().splitlines()[-1]
        == "tbq: error: llama-perplexity failed for f16: ended by SIGXFSZ"
    )
    assert not list(tmp_path.iterdir())


def children_in(folder, word):
    """Processes in a folder with a word in their arguments."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                process.joinpath("cwd").readlink().is_relative_to(folder)
                and word in process.joinpath("cmdline").read_text()
            ):
                found.append(process)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(demo_model, tmp_path, sent):
    """The finished pair is printed. The folder and the child process are gone."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tbq",
            "bench",
            "quality",
            "--model",
            demo_model,
            *SMALL,
            "--types",
            "f16,tbq4_0",
            "--scratch",
            tmp_path,
            "--plot",
            tmp_path / "q.svg",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    while not (children := children_in(tmp_path, "tbq4_0")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert [row[0] for row in rows(out)] == ["f16"] and err.endswith("tbq: interrupted after 1 of 4 pairs\n")
    assert not list(tmp_path.iterdir())
    assert not any(child.exists() for child in children)


def test_bytes_do_not_count_what_does_not_grow():
    """No number is made up for a cache that is not known."""
    of = {"block_count": 3, "attention.head_count": 8, "embedding_length": 512, "context_length": 64}

    def cache(architecture, **more):
        return _cache(
            {"general.architecture": architecture, **{f"{architecture}.{k}": v for k, v in {**of, **more}.items()}}
        )

    assert cache("llama") == [(512, 512)] * 3
    assert cache(
        "lfm2", **{"attention.head_count_kv": [2, 0, 4], "attention.key_length": 128, "shortconv.l_cache": 3}
    ) == [(256, 128), (512, 256)]
    assert cache("gemma2", **{"attention.sliding_window": 4096}) == [(512, 512)]
    assert cache("deepseek4") is None


def test_split_models_hash(tmp_path):
    """The same as `cat model-*.gguf | sha256sum`."""
    for i in (1, 2):
        (tmp_path / f"model-{i:05}-of-00002.gguf").write_bytes(bytes([i]) * 100)
    assert sha256(tmp_path / "model-00001-of-00002.gguf") == hashlib.sha256(b"\1" * 100 + b"\2" * 100).hexdigest()


def test_missing_matplotlib(demo_model, tmp_path):
    """One line, before anything is measured."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError\n")
    done = run("--model", demo_model, *SMALL, "--plot", "q.png", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "tbq: error: --plot needs matplotlib: pip install 'ggml-tbq[plot]'\n"
