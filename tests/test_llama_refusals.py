# SPDX-License-Identifier: MIT
"""What cannot work is refused at once, in one line that says what would work."""

import re
import subprocess
import time

import pytest

from llama_tools import TBQ, THREADS, byte_tokenizer, complete, run, tiny_llama, write_gguf

PLAIN = {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Random models by head size; each file is made at its first use."""
    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def get(head):
        return made.setdefault(head, tiny_llama(folder / f"head{head}.gguf", head) if head not in made else None)

    return get


def attempt(bin_dir, model, *args):
    return run(
        bin_dir / "llama-completion", "-m", model, "-p", "abc", "-n", 2, "-c", 256, "-no-cnv", *THREADS, *args, ok=False
    )


def refused(bin_dir, model, *args):
    """The output of a program that ended with an error. An assertion or a crash is not a refusal."""
    done = attempt(bin_dir, model, *args)
    assert done.returncode not in (0, -6, -11), done.stderr
    return done.stderr


@pytest.mark.parametrize("sides", ["k", "v", "kv"])
@pytest.mark.parametrize("head", [80, 96, 112])
def test_head_size_not_divisible_by_64(bin_dir, models, head, sides):
    for t in TBQ:
        said = refused(bin_dir, models(head), *(x for s in sides for x in (f"-ct{s}", t)))
        lines = [x for x in said.splitlines() if re.search(rf"\b{head}\b", x) and t in x]
        assert lines, said
        named = set(re.findall(r"\w+", lines[0])) & PLAIN
        assert named & {"f16", "q8_0"}, lines[0]
    # The types that the line recommends must work for K or V (V includes flash attention).
    for name in sorted(named):
        other = attempt(bin_dir, models(head), *(x for s in sides for x in (f"-ct{s}", name)))
        assert other.returncode == 0, (name, other.stderr)


@pytest.mark.parametrize("head", [80, 112])
def test_head_size_without_flash_attention(bin_dir, models, head):
    """Upstream checks the head size only when flash attention may be used. A tbq K cannot work without it either."""
    said = refused(bin_dir, models(head), "-ctk", "tbq4_0", "-fa", "off")
    assert re.search(rf"tbq4_0.*\b{head}\b|\b{head}\b.*tbq4_0", said), said


def test_server_refuses_too(bin_dir, models):
    done = run(
        bin_dir / "llama-server",
        "-m",
        models(80),
        "--port",
        0,
        "-c",
        256,
        "-ctk",
        "tbq4_0",
        "-ctv",
        "tbq4_0",
        ok=False,
        timeout=60,
    )
    assert done.returncode not in (0, -6, -11)
    assert re.search(r"tbq4_0.*\b80\b|\b80\b.*tbq4_0", done.stderr), done.stderr


@pytest.mark.parametrize("head", [64, 128, 192, 256, 320, 512])
def test_head_size_divisible_by_64(bin_dir, models, head):
    """The output is random bytes, but four bits give the same bytes as eight.

    The most likely token of a random model stands out.
    """
    for t in TBQ:
        _, log = complete(bin_dir, models(head), "The quick brown fox", "-ctk", t, "-ctv", t, n=8)
        assert f"K ({t})" in log and f"V ({t})" in log
        assert "nan" not in log.lower()


def allowed(help_text):
    """The names between "allowed values:" and the next text. The list may go over several lines."""
    m = re.search(r"allowed values:([\s\w,]*?)\(", help_text)
    return set(re.findall(r"\w+", m[1])) if m else None


@pytest.mark.parametrize("program", ["llama-completion", "llama-cli", "llama-server", "llama-perplexity"])
@pytest.mark.parametrize("option", ["-ctk", "-ctv"])
def test_misspelled_type(bin_dir, demo_model, program, option):
    """With one letter too many, the line names the value, and the help after it every name that exists."""
    done = run(bin_dir / program, "-m", demo_model, option, "tbq4_00", ok=False, timeout=30)
    out = done.stdout + done.stderr
    assert done.returncode not in (0, -6, -11)
    assert re.search(rf'argument "{option}".*tbq4_00', out), out
    assert {*TBQ, *PLAIN} == allowed(out), out


@pytest.mark.parametrize("name", ["tbq8_act", "tbq8_0"])
def test_inner_types_are_no_cache_types(bin_dir, demo_model, name):
    """The types inside dot products and of exact rows are no user's choice."""
    done = run(bin_dir / "llama-completion", "-m", demo_model, "-ctk", name, ok=False, timeout=30)
    assert done.returncode not in (0, -6, -11)
    assert allowed(done.stdout + done.stderr) == {*TBQ, *PLAIN}


def test_quantized_values_want_flash_attention(bin_dir, demo_model):
    done = run(
        bin_dir / "llama-completion", "-m", demo_model, "-ctv", "tbq4_0", "-fa", "off", "-c", 256, ok=False, timeout=60
    )
    assert done.returncode not in (0, -6, -11)
    assert "quantized V cache requires flash_attn" in done.stderr


# -- files --------------------------------------------------------------------------------------


def one_tensor_file(path, type_id):
    """A file whose only tensor has the type with this number."""
    return write_gguf(
        path,
        {"general.architecture": "llama", "llama.block_count": 1, **byte_tokenizer()},
        {"token_embd.weight": (type_id, (4, 256), bytes(4 * 256 * 4))},
    )


@pytest.mark.parametrize("type_id", [43, 100, 641, 646, 647, 649, 700, 2**31 - 1])
def test_unknown_type_in_a_file(bin_dir, tmp_path, type_id):
    """Numbers in the gaps around those of tbq are no types. Such a file is refused, and not read as something else."""
    said = refused(bin_dir, one_tensor_file(tmp_path / "bad.gguf", type_id))
    assert re.search(rf"token_embd\.weight.*\b{type_id}\b", said), said


@pytest.mark.parametrize("type_id,name", [(645, "tbq8_0"), (648, "tbq8_act"), (9, "q8_1"), (15, "q8_K")])
def test_inner_type_in_a_file(bin_dir, tmp_path, type_id, name):
    """These types are made of activations on the fly, or are those of exact rows in a cache.

    So weights of such a type mean a corrupt file.
    """
    assert re.search(
        rf"token_embd\.weight.*\b{name}\b", refused(bin_dir, one_tensor_file(tmp_path / "bad.gguf", type_id))
    )


# -- programs that end early --------------------------------------------------------------------


@pytest.mark.parametrize(
    "program,arguments,last",
    [
        ("llama-completion", ("-p", "x", "-no-cnv"), "error: unable to create context"),
        ("llama-perplexity", ("-f", __file__), "unable to load model"),
        ("llama-server", ("--port", 0), "exiting due to model loading error"),
    ],
)
def test_the_last_line_is_printed(bin_dir, tmp_path, program, arguments, last):
    """The logger prints from a separate thread, which the end of the process cut off.

    The first two programs lost the line in two of three runs.
    """
    for _ in range(30):
        done = run(bin_dir / program, "-m", tmp_path / "none.gguf", *arguments, ok=False)
        assert done.returncode == 1 and last in done.stderr.splitlines()[-1], done.stderr


def test_a_reader_that_takes_its_time_gets_every_line(bin_dir, demo_model):
    """More lines than the logger's queue and the pipe hold are read after the program would have ended."""
    with subprocess.Popen(
        [
            bin_dir / "llama-completion",
            "-m",
            demo_model,
            "-p",
            "a",
            "-n",
            "1",
            "-c",
            "256",
            "-no-cnv",
            "-lv",
            "5",
            *THREADS,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        time.sleep(5)
        lines = process.stderr.read().decode(errors="replace").splitlines()
        assert process.wait() == 0
    assert len(lines) > 600 and any("graphs reused" in line for line in lines[-20:]), lines[-5:]
