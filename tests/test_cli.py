# SPDX-License-Identifier: MIT
"""The command tbq, and what `tbq paths` says about the installation."""

import json
import pathlib
import subprocess
import sys

import pytest

import tbq
from conftest import ROOT
from tbq.programs.paths import program

PROGRAMS = ("llama-server", "llama-cli", "llama-perplexity", "llama-bench", "llama-batched-bench", "llama-quantize")


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "tbq", *arguments], capture_output=True, text=True)


def test_paths_as_json(installed):
    pin = json.loads((ROOT / "patches" / "pin.json").read_text(encoding="utf-8"))
    assert installed["llama_cpp_commit"] == pin["commit"]
    assert installed["llama_cpp_python"] == pin["requirement"]
    assert pathlib.Path(installed["bin"]).is_dir() and pathlib.Path(installed["lib"]).is_dir()


def test_paths_as_text(installed):
    lines = run("paths").stdout.splitlines()
    assert dict(line.split(maxsplit=1) for line in lines) == installed


def test_one_path(installed):
    assert run("paths", "bin").stdout.strip() == installed["bin"]
    assert json.loads(run("paths", "lib", "--json").stdout) == {"lib": installed["lib"]}
    result = run("paths", "cellar")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.strip() == f"tbq: error: key 'cellar' is not one of {', '.join(installed)}"


def test_script_is_installed():
    script = pathlib.Path(sys.executable).with_name("tbq")
    out = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert out.stdout.strip() == f"tbq {tbq.__version__}"


def test_unknown_command():
    result = run("fly")
    assert result.returncode == 2 and result.stdout == ""
    assert "invalid choice: 'fly'" in result.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_start_from_anywhere(name, bin_dir, tmp_path):
    """The programs of the wheel find the libraries of the wheel, not those in the build folder."""
    result = subprocess.run([bin_dir / name, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "cannot open shared object" not in result.stderr
    assert "usage" in result.stdout.lower()
    if name != "llama-bench":  # its help does not list types
        assert "tbq4_0" in result.stdout.lower()


@pytest.mark.skipif(sys.platform != "linux", reason="ldd is of Linux")
def test_nothing_points_into_the_build_folder(bin_dir, lib_dir):
    for path in [*bin_dir.iterdir(), *lib_dir.iterdir()]:
        out = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
        assert "not found" not in out, f"{path.name}: {out}"
        assert str(ROOT / "build") not in out, f"{path.name}: {out}"
        assert (
            str(ROOT / "build").encode() not in subprocess.run(["readelf", "-d", path], capture_output=True).stdout
        ), path.name


def test_libraries_for_the_bindings(lib_dir):
    """The libraries have the names that llama-cpp-python looks for, and there is no second copy under a versioned
    name.
    """
    names = {path.name for path in lib_dir.iterdir()}
    assert {"libllama.so", "libggml.so", "libmtmd.so"} <= names or sys.platform == "darwin"
    assert not [name for name in names if ".so." in name]


def test_unknown_program():
    with pytest.raises(tbq.TBQError, match="program 'llama-fly' is not in .*; there is .*llama-server"):
        program("llama-fly")


# --- the demo ---------------------------------------------------------------------------------------------------


def test_demo(demo_model):
    """What `make demo` prints after the build."""
    out = subprocess.run(
        [sys.executable, "-m", "tbq.cli.demo", "--cache", demo_model.parent],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    assert "Paris" in out.stdout
    assert "K tbq4_0, V tbq4_0" in out.stdout
    # 4.25 of 16 bits, and 8.5 bits for the newest and the first rows of 4 sequences
    assert "54.2 MiB for 8192 tokens, 6.4 of them exact rows, 30.1 % of f16's 180.0 MiB" in out.stdout


def test_demo_port_taken(demo_model):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        out = subprocess.run(
            [sys.executable, "-m", "tbq.cli.demo", "--cache", demo_model.parent, "--serve", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert out.returncode != 0 and out.stdout == ""
    assert (
        out.stderr.strip()
        == f"error: port {port} of 127.0.0.1 cannot be used (Address already in use); name another one"
    )


def test_server_is_stopped_after_an_error(demo_model):
    with (
        pytest.raises(tbq.TBQError, match="llama-server ended with status"),
        tbq.Server(demo_model, "tbq4_0", options=["--no-such-option"]),
    ):
        pass
    with pytest.raises(RuntimeError), tbq.Server(demo_model, "tbq4_0", options=["-c", "256"]) as server:
        raise RuntimeError
    assert server.process.poll() is not None


def test_nobody_reads_the_rest(demo_model):
    done = subprocess.run(
        f'"{sys.executable}" -m tbq inspect "{demo_model}" | head -1', shell=True, capture_output=True, text=True
    )
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
