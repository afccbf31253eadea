# SPDX-License-Identifier: MIT
"""`tbq inspect`: scales, use of the codebook, errors, output, pictures."""

import json
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest

import numpy_reference
import tbq
from llama_tools import TBQ, tiny_llama, write_gguf
from tbq.gguf_files.inspect import ERROR_BINS, inspect


def cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tbq", "inspect", *map(str, arguments)], capture_output=True, text=True
    )


def refused(done, message):
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    assert re.fullmatch(f"tbq: error: .*{message}.*", done.stderr.strip()), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as f32, f16 and each tbq type."""
    folder = tmp_path_factory.mktemp("inspect")
    tiny_llama(folder / "f32.gguf", 64)
    for kind in (*TBQ, "f16"):
        tensors = [("ffn_up", "tbq2_0")] if kind == "tbq4_0" else []
        tbq.convert(folder / "f32.gguf", folder / f"{kind}.gguf", kind, tensors=tensors)
    return folder


@pytest.mark.parametrize("kind", TBQ)
def test_scales_and_use(folder, kind):
    """The same as from what the NumPy reference unpacks."""
    report = inspect(folder / f"{kind}.gguf", threads=2)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / f"{kind}.gguf").tensors}
    total = 0
    for entry in report.entries:
        if entry.tensor.type.name.lower() != kind:
            continue
        bits = tbq.types[kind].bits
        index, d = numpy_reference.unpack(bits, read[entry.tensor.name].data.reshape(-1, tbq.types[kind].block_bytes))
        d = d.view(np.float16).astype(np.float32)
        assert entry.blocks.use.tolist() == np.bincount(index.reshape(-1), minlength=2**bits).tolist()
        assert entry.blocks.scales == (d.min(), np.median(d), d.max())
        assert (entry.blocks.zero, entry.blocks.corrupt) == (0, 0)
        assert entry.blocks.histogram.sum() == len(d)
        assert bits - 0.35 < entry.blocks.entropy < bits
        total += index.size
    assert report.totals[kind].use.sum() == total > 1e5


def test_errors(folder):
    """The same as from values that gguf reads and decodes.  A Gaussian's distortion with 4 bits is 0.0069."""
    report = inspect(folder / "tbq4_0.gguf", folder / "f32.gguf")
    new, old = (
        {
            t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64)
            for t in gguf.GGUFReader(folder / f"{name}.gguf").tensors
        }
        for name in ("tbq4_0", "f32")
    )
    for entry in report.entries:
        x, y = new[entry.tensor.name].reshape(-1), old[entry.tensor.name].reshape(-1)
        assert entry.error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-4, abs=1e-9)
        assert entry.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
        if entry.tensor.type.name == "TBQ4_0":
            assert entry.error**2 == pytest.approx(0.0069, rel=0.03)
    assert report.errors["tbq4_0"].sum() == sum(
        e.tensor.n_values for e in report.entries if e.tensor.type.name == "TBQ4_0"
    )
    center = np.arange(ERROR_BINS) / ERROR_BINS * 2 - 1 + 1 / ERROR_BINS
    spread = np.sqrt((report.errors["tbq4_0"] * center**2).sum() / report.errors["tbq4_0"].sum())
    assert spread == pytest.approx(0.083, rel=0.03)


def test_text(folder):
    done = cli(folder / "tbq4_0.gguf", "--against", folder / "f32.gguf")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{folder / 'tbq4_0.gguf'}, llama, MOSTLY_TBQ4_0"
    model = tbq.open_gguf(folder / "tbq4_0.gguf")
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["all"][1:3] == [str(len(model.tensors)), str(sum(t.n_values for t in model.tensors))]
    assert float(rows["all"][4]) == pytest.approx(
        8 * sum(t.n_bytes for t in model.tensors) / sum(t.n_values for t in model.tensors), abs=0.005
    )
    assert rows["tbq4_0"][4] == "4.25" or rows["tbq4_0"][0] == "tbq4_0"
    assert re.search(r"tbq4_0: an index carries 3\.8\d\d of 4 bits; 0 blocks are zero", done.stdout)
    assert [int(x) for x in re.findall(r"level (.*)", done.stdout)[0].split()] in [
        list(tbq.types[t].levels) for t in TBQ
    ]
    assert rows["blk.0.ffn_up.weight"][1:6] == ["512", "x", "256", "tbq2_0", "2.25"]
    error, cosine = map(float, rows["blk.0.attn_q.weight"][-2:])
    assert error == pytest.approx(0.083, abs=0.002) and cosine == pytest.approx(0.9965, abs=0.0005)
    assert len(lines) < 20 + len(model.tensors)


def test_json(folder):
    found = json.loads(cli(folder / "tbq3_0.gguf", "--against", folder / "f32.gguf", "--json").stdout)
    tensor = next(t for t in found["tensors"] if t["name"] == "blk.1.ffn_down.weight")
    assert tensor["type"] == "tbq3_0" and tensor["shape"] == [256, 512] and tensor["bytes"] == 256 * 512 // 64 * 26
    assert sum(tensor["blocks"]["use"]) == 256 * 512 and found["levels"]["tbq3_0"] == list(tbq.types["tbq3_0"].levels)
    assert tensor["error"] ** 2 == pytest.approx(0.0292, rel=0.05)


@pytest.mark.parametrize("arguments", [(), ("--against", "f32.gguf")])
def test_picture(folder, tmp_path, arguments):
    pytest.importorskip("matplotlib", reason="the extra ggml-tbq[plot]")
    arguments = [folder / a if a.endswith(".gguf") else a for a in arguments]
    done = cli(folder / "tbq4_0.gguf", *arguments, "--plot", tmp_path / "picture.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    assert cli(folder / "tbq4_0.gguf", *arguments, "--plot", tmp_path / "picture.svg").returncode == 0
    labels = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert "<svg" in labels


def test_header_alone_reads_no_weights(folder):
    report = inspect(folder / "tbq4_0.gguf", header_only=True)
    assert report.totals == {} and all(entry.blocks is None for entry in report.entries)
    assert "tbq4_0" in cli(folder / "tbq4_0.gguf", "--header").stdout


def test_corrupt_and_zero_blocks(tmp_path):
    packed = tbq.quantize(np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32), "tbq4_0")
    packed[0, :2] = 0
    packed[1, :2] = 255
    path = write_gguf(
        tmp_path / "a.gguf", {"general.architecture": "llama"}, {"a.weight": (644, (4, 64), packed.tobytes())}
    )
    done = cli(path)
    assert "1 blocks are zero, 1 ARE CORRUPT (scale NaN or infinite)" in done.stdout and done.stderr == ""
    assert json.loads(cli(path, "--json", "--against", path).stdout)["tensors"][0]["error"] is None


def test_a_file_without_tbq_types(folder):
    done = cli(folder / "f16.gguf")
    assert done.returncode == 0 and "MOSTLY_F16" in done.stdout and "level" not in done.stdout


def test_errors_of_use(folder, tmp_path):
    other = write_gguf(tmp_path / "other.gguf", {"general.architecture": "llama"}, {"a.weight": np.ones((2, 64), "f4")})
    wrong = write_gguf(
        tmp_path / "wrong.gguf", {"general.architecture": "llama"}, {"output_norm.weight": np.ones(64, "f4")}
    )
    refused(cli(folder / "f16.gguf", "--against", other), "have no tensor in common")
    refused(
        cli(folder / "f16.gguf", "--against", wrong), r"was not made from .*: output_norm.weight is \[256\] and \[64\]"
    )
    refused(cli(tmp_path / "no.gguf"), "No such file or directory: .*no.gguf")
    refused(cli(folder / "f16.gguf", "--header", "--against", other), "--header reads no weights")
    refused(cli("/dev/null"), "is not a regular file")
    assert {path.name for path in tmp_path.iterdir()} == {"other.gguf", "wrong.gguf"}


def test_errors_of_pictures(folder, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra ggml-tbq[plot]")
    refused(cli(folder / "f16.gguf", "--plot", tmp_path / "x.png"), "has no tbq tensors to draw")
    refused(cli(folder / "tbq4_0.gguf", "--plot", tmp_path / "x.exe"), r"must end in one of .*\.png")
    refused(cli(folder / "tbq4_0.gguf", "--plot", tmp_path / "no" / "x.png"), "cannot be written")
    assert not any(tmp_path.iterdir())


def test_a_name_for_the_terminal(tmp_path):
    """A name in a file may have any characters, escape sequences too."""
    source = write_gguf(
        tmp_path / "in.gguf",
        {"general.architecture": "llama", "general.name": "\x1b]0;boo\x07"},
        {"blk.0.ffn_up.weight": np.ones((4, 64), "f4")},
    )
    done = cli(source)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "?]0;boo?" in done.stdout
