# SPDX-License-Identifier: MIT
"""The help and the completion of every command: everything has an explanation, and every command has an example."""

import argparse
import shutil
import subprocess

import pytest

from tbq.cli import main

COMMANDS = main.commands(main._parser())

# bash's completion function, called as readline calls it, with a line of words
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_tbq "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_commands_are_found():
    assert {
        "tbq",
        "tbq bench",
        "tbq bench speed",
        "tbq completion",
        "tbq paths",
        "tbq plan",
        "tbq serve",
    } <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    parser = COMMANDS[name]
    assert parser.description, f"{name}: no description"
    assert parser.epilog and "example" in parser.epilog and name in parser.epilog, f"{name}: no example"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names = {choice.dest for choice in action._choices_actions if choice.help}
            assert names == set(action.choices), f"{name}: a command has no line in the help"
        else:
            assert action.help, f"{name}: {'/'.join(action.option_strings) or action.dest} has no help"
    assert name in parser.format_help()  # fails for a % that argparse takes for a format


@pytest.mark.parametrize("shell", ("bash", "zsh", "fish"))
def test_completion_is_a_script(shell, tmp_path, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'ggml-tbq[completion]'")
    assert main.main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    assert "serve" in script.read_text(encoding="utf-8")
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_completes(tmp_path, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'ggml-tbq[completion]'")
    main.main(["completion", "bash"])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "model.gguf").touch()

    def complete(*words):
        done = subprocess.run(
            ["bash", "--norc", "-c", COMPLETE, "bash", script, *words], capture_output=True, text=True, cwd=tmp_path
        )
        return done.stdout.split()

    assert complete("tbq", "ser") == ["serve"]
    assert complete("tbq", "bench", "sp") == ["speed"]
    assert complete("tbq", "completion", "") == ["bash", "zsh", "fish"]
    assert complete("tbq", "plan", "model.gguf", "--mem") == ["--memory"]
    assert complete("tbq", "serve", "mod") == ["model.gguf"]
    assert complete("tbq", "bench", "speed", "--model", "mod") == ["model.gguf"]


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "tbq: error: tbq completion needs shtab: pip install 'ggml-tbq[completion]'\n"


def test_options_before_the_model(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["serve", "--port", "9000", "model.gguf"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --port; llama-server's options come after MODEL" in capsys.readouterr().err
