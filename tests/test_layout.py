# SPDX-License-Identifier: MIT
"""The layout of the package: which module may import which, and when files are read and keys are measured."""

import ast
import pathlib
import time

import pytest

import tbq
from conftest import ROOT
from tbq.cli import main
from tbq.gguf_files import reader
from tbq.kv_cache import calibrate

PACKAGE = ROOT / "python" / "tbq"
#: From the ground up. A module imports from its own floor and from those below.
FLOORS = (
    ("_ffi", "_limits", "_key_biases", "errors"),
    (
        "_types",
        "_version",
        "_text",
        "_units",
        "_files",
        "_arguments",
        "_exact_rows",
        "_plots",
        "blocks",
        "turboquant",
        "hf",
    ),
    ("programs", "gguf_files", "vllm"),
    ("kv_cache", "index"),
    ("serving", "bench"),
    ("demo", "llama"),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}


def modules():
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
        if "_vendor" not in path.parts
    }


def imported(tree, of_package=True):
    """The modules that a module imports, anywhere in it.

    of_package: those of this package without "tbq."; otherwise the others.
    """
    names = set()
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = PACKAGE.joinpath(*node.module.split(".")[1:])
            for alias in node.names:
                is_module = (
                    (below / f"{alias.name}.py").exists() or (below / alias.name).is_dir() or alias.name == "_ffi"
                )
                # what `from tbq import plan` takes is defined in __init__
                names.add(
                    f"{node.module}.{alias.name}"
                    if is_module
                    else f"{node.module}{'.__init__' * (node.module == 'tbq')}"
                )
    return (
        {name.removeprefix("tbq.") for name in names if name.startswith("tbq.")}
        if of_package
        else {name for name in names if not name.startswith("tbq")}
    )


def test_nothing_imports_upwards():
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in imported(tree)
        if FLOOR[other.split(".")[0]] > FLOOR[name.split("/")[0]]
    ]
    assert not wrong


def test_no_circles():
    """Neither wings of one floor nor modules import in a circle."""
    arrows = {
        name.replace("/", "."): imported(tree) for name, tree in modules().items() if not name.endswith("__init__")
    }
    wings = {}
    for name, others in arrows.items():
        wing = name.split(".")[0]
        wings.setdefault(wing, set()).update({other.split(".")[0] for other in others} - {wing})
    assert len(arrows) > 60 and len(wings) > 15
    for graph in (arrows, wings):
        done = set()

        def visit(name, path, graph=graph, done=done):
            assert name not in path, f"a circle of imports: {' -> '.join([*path[path.index(name) :], name])}"
            if name not in done:
                for other in sorted(graph.get(name, ())):
                    visit(other, [*path, name])
                done.add(name)

        for name in sorted(graph):
            visit(name, [])


def test_what_stands_alone():
    """The papers' algorithms need nothing of the package but its errors, and a rule for biases nothing at all."""
    found = {name: imported(tree) for name, tree in modules().items()}
    papers = set().union(*(others for name, others in found.items() if name.startswith("turboquant/")))
    assert {other for other in papers if not other.startswith("turboquant")} == {"errors"}
    assert not found["_key_biases"] and not found["_limits"]


def test_only_the_command_line_knows_argparse():
    assert {
        name.split("/")[0] for name, tree in modules().items() if "argparse" in imported(tree, of_package=False)
    } == {"cli"}


def test_no_name_hides_a_module():
    """The names that `import tbq` defines are not those of modules: otherwise tbq.plan.LARGE_BIAS would fail."""
    there = {path.stem for path in PACKAGE.iterdir()} - {"__init__"}
    assert not there & set(tbq.__all__)


# --- what is read and measured --------------------------------------------------------------------------------------


@pytest.fixture
def headers(monkeypatch):
    """The names of the files whose headers were read, in order."""
    read, whole = [], reader._read_file
    monkeypatch.setattr(reader, "_read_file", lambda path: (read.append(pathlib.Path(path).name), whole(path))[1])
    return read


def test_a_model_is_opened_once(demo_model, headers, tmp_path, capsys):
    calibrate.center_of_model(demo_model, 512)  # measured here, so that it is kept later
    headers.clear()
    server = tbq.Server(demo_model, "tbq4_0", options=["-c", "512"])
    server.prepare()
    assert server.center and headers.count(demo_model.name) == 1
    for arguments in (
        ["plan", demo_model],
        ["calibrate", demo_model, "-o", tmp_path / "center.gguf"],
        ["inspect", demo_model],
        ["convert", demo_model, tmp_path / "out.gguf", "--type", "q8_0", "--threads", "2"],
    ):
        headers.clear()
        assert main.main([str(argument) for argument in arguments]) == 0
        assert headers.count(demo_model.name) == 1, arguments
    capsys.readouterr()


def test_making_a_server_measures_nothing(demo_model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start = time.monotonic()
    server = tbq.Server(demo_model, "tbq4_0", options=["-c", "512"])
    assert time.monotonic() - start < 5 and server.center is None and not list(tmp_path.iterdir())
    server.prepare()
    assert server.center and server.center.is_relative_to(tmp_path)
