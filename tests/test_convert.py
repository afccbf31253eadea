# SPDX-License-Identifier: MIT
"""`tbq convert` and tbq.convert(): every tensor has the same bytes as with llama-quantize."""

import re
import resource
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest

import tbq
from llama_tools import ENV, TBQ, number, python_text, tiny_llama, write_gguf
from llama_tools import run as run_program
from tbq.gguf_files import codecs
from tbq.gguf_files import rules as type_rules
from tbq.gguf_files.reader import FORMAT_KEY, open_gguf

GGML = gguf.GGMLQuantizationType


def cli(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tbq", "convert", *map(str, arguments)], capture_output=True, text=True, **options
    )


def refused(done, message):
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    assert re.fullmatch(f"tbq: error: .*{message}.*", done.stderr.strip()), done.stderr


def llama_quantize(bin_dir, source, target, kind, *options):
    run_program(bin_dir / "llama-quantize", "--allow-requantize", *options, source, target, kind, 2)
    return target


def contents(path):
    """{name: (type, shape, bytes)}"""
    result = {}
    for tensor in open_gguf(path).tensors:
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            result[tensor.name] = tensor.type.name.lower(), tensor.shape, file.read(tensor.n_bytes)
    return result


def same(path, other):
    ours, theirs = contents(path), contents(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name][:2] != theirs[name][:2]] == []
    assert [name for name in ours if ours[name] != theirs[name]] == []


def kinds(path):
    return {name: kind for name, (kind, _, _) in contents(path).items()}


@pytest.fixture(scope="session")
def f16(bin_dir, demo_model, tmp_path_factory):
    return llama_quantize(bin_dir, demo_model, tmp_path_factory.mktemp("convert") / "f16.gguf", "f16")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "f32.gguf", 64)


# --- the same as llama-quantize ---------------------------------------------------------------------------------


def test_real_model(bin_dir, f16, tmp_path):
    """The bytes of tensors, the metadata, and the perplexity."""
    done = cli(f16, tmp_path / "ours.gguf", "--type", "tbq4_0")
    assert done.returncode == 0, done.stderr
    assert "token_embd.weight has q8_0, because 256 does not divide its rows of 576\n" in done.stdout
    assert "before" not in done.stdout
    theirs = llama_quantize(bin_dir, f16, tmp_path / "theirs.gguf", "tbq4_0")
    same(tmp_path / "ours.gguf", theirs)
    ours, source = open_gguf(tmp_path / "ours.gguf").metadata, open_gguf(f16).metadata
    assert ours.raw == {**open_gguf(theirs).metadata.raw, FORMAT_KEY: ours.raw[FORMAT_KEY]}
    assert {k: v for k, v in ours.items() if source.get(k) != v} == {
        FORMAT_KEY: tbq.FORMAT_VERSION,
        "general.file_type": 644,
    }
    text = python_text(tmp_path / "text")
    perplexity = []
    for name in ("ours.gguf", "theirs.gguf"):
        options = ["-c", 256, "-b", 256, "--chunks", 2, "-t", 2]
        done = run_program(bin_dir / "llama-perplexity", "-m", tmp_path / name, "-f", text, *options)
        perplexity.append(number("Final estimate: PPL", done.stdout + done.stderr))
    assert perplexity[0] == perplexity[1]


def test_from_quantized(bin_dir, demo_model, tmp_path):
    """The demo model itself: Q4_1 matrices and Q8_0 embeddings."""
    done = cli(demo_model, tmp_path / "ours.gguf", "--type", "tbq3_0")
    assert "210 tensors were quantized before" in done.stdout, done.stdout + done.stderr
    same(tmp_path / "ours.gguf", llama_quantize(bin_dir, demo_model, tmp_path / "theirs.gguf", "tbq3_0"))


@pytest.mark.parametrize("kind", [*TBQ, "q8_0", "f16", "bf16", "f32"])
def test_tiny(bin_dir, tiny, tmp_path, kind):
    """A model with an output matrix (which gets q6_K) and separate embeddings (q4_K with 2 and 3 bits)."""
    tbq.convert(tiny, tmp_path / "ours.gguf", kind)
    same(tmp_path / "ours.gguf", llama_quantize(bin_dir, tiny, tmp_path / "theirs.gguf", kind))


@pytest.mark.parametrize("experts,embd", [(8, 256), (4, 192)])
def test_experts_and_fallbacks(bin_dir, tmp_path, experts, embd):
    """With eight experts, keys and values get q8_0.  256 does not divide 192, so q5_0 and q8_0 replace K types."""
    source = tiny_llama(tmp_path / "f32.gguf", 64, experts=experts, embd=embd)
    for kind in TBQ:
        tbq.convert(source, tmp_path / f"{kind}.gguf", kind)
        same(tmp_path / f"{kind}.gguf", llama_quantize(bin_dir, source, tmp_path / "theirs.gguf", kind))


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q8_0", "q3_K_M", "q6_K", "iq4_nl", "tq2_0", "bf16", "tbq2_0"])
def test_any_input(bin_dir, tiny, tmp_path, kind):
    source = llama_quantize(bin_dir, tiny, tmp_path / "source.gguf", kind, "--pure")
    tbq.convert(source, tmp_path / "ours.gguf", "tbq4_0")
    same(tmp_path / "ours.gguf", llama_quantize(bin_dir, source, tmp_path / "theirs.gguf", "tbq4_0"))


def test_every_type_decodes_as_in_gguf():
    values = np.random.default_rng(0).standard_normal(1024, dtype=np.float32)
    done = []
    for kind in GGML:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            if kind.name.startswith("IQ"):  # for some of these, ggml makes tables for seconds before it encodes
                raise tbq.TBQError
            data = codecs.encoder(kind)(values)
        except tbq.TBQError:
            # bytes below 60 make small exponents, so there is no NaN
            data = np.random.default_rng(1).integers(0, 60, 1024 // block * block_bytes, np.uint8)
        try:
            expected = gguf.dequantize(data, kind).reshape(-1)
        except NotImplementedError:
            continue
        result = codecs.decoder(kind)(data)
        assert np.allclose(result, expected, rtol=1e-6, atol=0), kind.name
        done.append(kind.name)
    assert len(done) >= 26 and {"Q4_K", "IQ1_M", "MXFP4", "TBQ3_0", "BF16"} <= set(done)


# --- which tensors ------------------------------------------------------------------------------------------------


def test_patterns(tiny, tmp_path):
    rules = (r"blk\.1\.ffn_.*=tbq2_0", "ffn_|output.weight=tbq3_0", "token_embd=q5_K")
    options = [option for rule in rules for option in ("--tensor", rule)]
    done = cli(tiny, tmp_path / "o.gguf", "--type", "tbq4_0", *options)
    assert done.returncode == 0, done.stderr
    found = kinds(tmp_path / "o.gguf")
    assert found["blk.1.ffn_up.weight"] == found["blk.1.ffn_down.weight"] == "tbq2_0"
    assert found["blk.0.ffn_up.weight"] == found["output.weight"] == "tbq3_0" and found["token_embd.weight"] == "q5_k"
    assert found["blk.0.attn_k.weight"] == "tbq4_0" and found["blk.1.ffn_norm.weight"] == "f32"
    assert " f32 -> tbq2_0\n" in done.stdout and "because" not in done.stdout and "before" not in done.stdout


@pytest.mark.parametrize(
    "option,message",
    [
        ("blk.9.=tbq2_0", r"--tensor 'blk.9.' is not found in the name of any tensor"),
        ("norm=tbq2_0", r"--tensor 'norm' is not found"),
        ("(=tbq2_0", r"pattern '\(' is not a regular expression"),
        ("ffn=tbq5_0", r"type 'tbq5_0' is not one of f32, f16"),
        ("ffn=iq2_xs", r"type iq2_xs needs an importance matrix"),
        ("ffn=q8_k", r"type q8_k is not one that weights can have"),
        ("ffn=i32", r"type i32 is not one that weights can have"),
    ],
)
def test_bad_patterns(tiny, tmp_path, option, message):
    refused(cli(tiny, tmp_path / "o.gguf", "--type", "tbq4_0", "--tensor", option), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--type", "tbq5_0"),
        ("--type", "f16", "--tensor", "x"),
        ("--type", "f16", "--split", "0M"),
        ("--type", "f16", "--threads", "0"),
        (),
    ],
)
def test_bad_usage(tiny, tmp_path, arguments):
    done = cli(tiny, tmp_path / "o.gguf", *arguments)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_rows_that_do_not_fit_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    source = write_gguf(
        tmp_path / "in.gguf",
        {"general.architecture": "llama"},
        {
            "blk.0.ffn_up.weight": rng.standard_normal((64, 96)).astype("f4"),
            "blk.0.ffn_down.weight": rng.standard_normal((96, 64)).astype("f4"),
            "blk.0.ffn_gate.weight": (26, (4, 64), np.arange(256, dtype="<i4").tobytes()),
        },
    )
    report = tbq.convert(source, tmp_path / "out.gguf")
    assert report.notes == {
        "blk.0.ffn_up.weight": "f32, because 64 does not divide its rows of 96",
        "blk.0.ffn_gate.weight": "i32, because gguf cannot decode type i32",
    }
    ours, original = contents(tmp_path / "out.gguf"), contents(source)
    for name in ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"):
        assert ours[name] == original[name]
    assert ours["blk.0.ffn_down.weight"][0] == "tbq4_0"
    printed = cli(source, tmp_path / "2.gguf", "--type", "tbq2_0").stdout
    assert "blk.0.ffn_up.weight has f32, because 64 does not divide its rows of 96\n" in printed


def test_back_to_f16(bin_dir, tiny, tmp_path):
    """No tbq tensor remains, of any kind, and the version of the tbq format is gone."""
    tbq.convert(tiny, tmp_path / "tbq.gguf", "tbq4_0", tensors=[(".", "tbq3_0")])
    tbq.convert(tmp_path / "tbq.gguf", tmp_path / "back.gguf", "f16")
    assert set(kinds(tmp_path / "back.gguf").values()) == {"f16", "f32"}
    assert FORMAT_KEY not in open_gguf(tmp_path / "back.gguf").metadata
    same(tmp_path / "back.gguf", llama_quantize(bin_dir, tmp_path / "tbq.gguf", tmp_path / "theirs.gguf", "f16"))
    odd = {
        "x_norm.weight": (644, (2, 64), tbq.quantize(np.ones((2, 64), "f4"), "tbq4_0").tobytes()),
        "x.bias": (642, (64,), tbq.quantize(np.ones(64, "f4"), "tbq2_0").tobytes()),
    }
    tbq.convert(
        write_gguf(tmp_path / "odd.gguf", {"general.architecture": "llama"}, odd), tmp_path / "even.gguf", "f16"
    )
    assert kinds(tmp_path / "even.gguf") == {"x_norm.weight": "f16", "x.bias": "f32"}


def test_without_llama_cpp(tiny, tmp_path, monkeypatch):
    """A package that was built without llama.cpp converts with the package gguf, except to K types."""
    tbq.convert(tiny, tmp_path / "with.gguf", tensors=[("token_embd|output.weight", "q8_0")])
    monkeypatch.setattr(codecs, "_load_ggml", lambda: None)
    monkeypatch.setattr(codecs, "_fast_f16_decoder", lambda: None)
    with pytest.raises(tbq.TBQError, match="gguf cannot encode type q6_k"):
        tbq.convert(tiny, tmp_path / "without.gguf")
    tbq.convert(tiny, tmp_path / "without.gguf", tensors=[("token_embd|output.weight", "q8_0")])
    same(tmp_path / "without.gguf", tmp_path / "with.gguf")
    tbq.convert(tmp_path / "with.gguf", tmp_path / "f16.gguf", "f16")
    tbq.convert(tmp_path / "f16.gguf", tmp_path / "tbq.gguf", tensors=[("token_embd|output.weight", "q4_0")])


# --- files ------------------------------------------------------------------------------------------------------


def test_splits(bin_dir, tiny, tmp_path):
    """llama.cpp reads the split files of tbq, and tbq those of llama.cpp, starting from any file."""
    report = tbq.convert(tiny, tmp_path / "ours.gguf", "tbq4_0", split_bytes=200_000)
    assert [path.name for path in report.files] == [
        f"ours-{i + 1:05}-of-{len(report.files):05}.gguf" for i in range(len(report.files))
    ]
    assert len(report.files) >= 3 and not (tmp_path / "ours.gguf").exists()
    run_program(bin_dir / "llama-gguf-split", "--merge", report.files[0], tmp_path / "merged.gguf")
    tbq.convert(tiny, tmp_path / "whole.gguf", "tbq4_0")
    same(tmp_path / "merged.gguf", tmp_path / "whole.gguf")
    run_program(
        bin_dir / "llama-gguf-split", "--split", "--split-max-tensors", 5, tmp_path / "whole.gguf", tmp_path / "theirs"
    )
    theirs = sorted(tmp_path.glob("theirs-*"))
    assert len(theirs) > 3
    for first in (theirs[0], theirs[2]):
        tbq.convert(first, tmp_path / "from.gguf", "f16", force=True)
        assert len(contents(tmp_path / "from.gguf")) == len(contents(tiny))
    assert not any(key.startswith("split.") for key in open_gguf(tmp_path / "from.gguf").metadata)
    assert len(tbq.convert(tiny, tmp_path / "one.gguf", "tbq4_0", split_bytes=10**9).files) == 1
    theirs[1].rename(tmp_path / "elsewhere.gguf")
    refused(cli(theirs[0], tmp_path / "o.gguf", "--type", "f16"), rf"{theirs[1].name} is not in the same folder")


def test_refusals(tiny, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("something")
    refused(cli(tiny, out, "--type", "tbq4_0"), "exists; --force replaces it")
    assert out.read_text() == "something"
    refused(cli(tiny, tiny, "--type", "tbq4_0", "--force"), "is the file that is read")
    refused(cli(tiny, tmp_path / "no" / "out.gguf", "--type", "tbq4_0"), "no does not exist")
    refused(cli(tiny, tmp_path, "--type", "tbq4_0", "--force"), "is not a file that can be replaced")
    refused(cli(tiny, "/dev/null", "--type", "tbq4_0", "--force"), "null is not a file that can be replaced")
    refused(cli(tmp_path / "nothing.gguf", out, "--type", "tbq4_0"), "No such file or directory: .*nothing.gguf")
    refused(cli(tmp_path, out, "--type", "tbq4_0"), "is not a regular file")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert cli(tiny, out, "--type", "tbq4_0", "--force").returncode == 0 and "blk.0.ffn_up.weight" in contents(out)


@pytest.mark.parametrize(
    "arguments",
    [
        (3, "o.gguf"),
        ("i\0.gguf", "o.gguf"),
        (None, "o.gguf"),
        ("in.gguf", "o\0.gguf"),
        ("in.gguf", None),
        ("in.gguf", "o.gguf", 5),
        ("in.gguf", "o.gguf", ["f16"]),
        ("in.gguf", "o.gguf", "f16", {"ffn": "f16"}),
        ("in.gguf", "o.gguf", "f16", [(1, "f16")]),
        ("in.gguf", "o.gguf", "f16", [("ffn", None)]),
        ("in.gguf", "o.gguf", "f16", (), "2"),
        ("in.gguf", "o.gguf", "f16", (), 0),
    ],
)
def test_wrong_types_in_python(tiny, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.gguf").symlink_to(tiny)
    with pytest.raises(tbq.TBQError):
        tbq.convert(*arguments[:3], **dict(zip(("tensors", "threads"), arguments[3:])))
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_permissions_are_the_users(tiny, tmp_path):
    tbq.convert(tiny, tmp_path / "out.gguf")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "out.gguf").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_values_that_are_not_numbers(tmp_path):
    weights = np.ones((64, 64), "f4")
    weights[5, 7] = np.nan
    source = write_gguf(tmp_path / "in.gguf", {"general.architecture": "llama"}, {"blk.0.ffn_up.weight": weights})
    refused(
        cli(source, tmp_path / "o.gguf", "--type", "tbq4_0"),
        "tensor blk.0.ffn_up.weight has values that are not finite",
    )
    weights[5, 7] = -1e5
    source = write_gguf(tmp_path / "in.gguf", {"general.architecture": "llama"}, {"blk.0.ffn_up.weight": weights})
    refused(cli(source, tmp_path / "o.gguf", "--type", "f16"), "beyond 65504")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


@pytest.mark.parametrize("kind", ["tbq4_0", "q8_0"])
def test_values_beyond_the_range_of_scales(tmp_path, kind):
    """A scale is an f16.  Values beyond its range are refused, not clamped."""
    weights = np.ones((64, 64), "f4")
    weights[5] = 1e9
    source = write_gguf(tmp_path / "in.gguf", {"general.architecture": "llama"}, {"blk.0.ffn_up.weight": weights})
    refused(
        cli(source, tmp_path / "o.gguf", "--type", kind),
        f"blk.0.ffn_up.weight has values beyond the range of {kind}; f32 can hold them",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_full_disk(tiny, tmp_path):
    """A write that fails, here because of a limit on file sizes, gives one line of error and leaves no file."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    refused(
        cli(tiny, tmp_path / "o.gguf", "--type", "tbq4_0", preexec_fn=limit), "o.gguf cannot be written: File too large"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruption_leaves_nothing(f16, tmp_path, sent):
    options = ["--type", "tbq4_0", "--threads", "1", "--tensor", "token_embd|attn|ffn=q5_1"]
    command = [sys.executable, "-m", "tbq", "convert", f16, tmp_path / "o.gguf", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(path.stat().st_size > 1 << 20 for path in tmp_path.glob(".tbq-*/*")):
        time.sleep(0.005)
    process.send_signal(sent)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 130 and log == "", log
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files, /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A tensor of 1.2 GB in a sparse file.  ru_maxrss cannot be used: a child's starts at the memory of its parent."""
    source = tmp_path / "in.gguf"
    write_gguf(source, {"general.architecture": "llama"}, {"blk.0.ffn_up.weight": (1, (300_000, 2048), b"")})
    with open(source, "r+b") as file:
        file.truncate(source.stat().st_size + 300_000 * 2048 * 2)
    code = (
        "import sys, tbq; tbq.convert(*sys.argv[1:]); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "out.gguf", "tbq2_0"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 300_000, "KiB"
    assert open_gguf(tmp_path / "out.gguf").tensors[0].n_bytes == tbq.row_bytes(300_000 * 2048, "tbq2_0")


def test_speed(bin_dir, f16, tmp_path):
    """As fast as llama-quantize to q4_0, apart from Python's start and noise (docs/measurements/speed.md)."""

    def fastest(command):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=ENV)
            times.append(time.perf_counter() - start)
        return min(times)

    theirs = fastest([bin_dir / "llama-quantize", f16, tmp_path / "q4_0.gguf", "q4_0", "2"])
    options = ["--type", "tbq4_0", "--force", "--threads", "2"]
    ours = fastest([sys.executable, "-m", "tbq", "convert", f16, tmp_path / "o.gguf", *options])
    start = fastest([sys.executable, "-m", "tbq", "--version"])
    assert ours - start < 1.5 * theirs, (ours, start, theirs)


def test_alignment_is_kept(tmp_path):
    """If the offsets of a file are multiples of 256, those of the new file are too."""
    weights = {f"blk.{i}.ffn_up.weight": np.full((2, 64), i + 1, "f4") for i in range(3)}
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_custom_alignment(256)
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    split = tbq.convert(tmp_path / "in.gguf", tmp_path / "split.gguf", split_bytes=100).files
    assert len(split) == 3
    for path in (*tbq.convert(tmp_path / "in.gguf", tmp_path / "out.gguf").files, *split):
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.data_offset % 256 == 0 and (tensor.data == tbq.quantize(weights[tensor.name], "tbq4_0")).all()


def test_rules_are_those_of_the_pin(build_dir):
    """The names of tensors that keep their type are those of llama-quant.cpp; a new one there fails this test."""
    text = (build_dir / "llama.cpp-src" / "src" / "llama-quant.cpp").read_text(encoding="utf-8")
    rules = text[text.index("static bool tensor_allows_quantization") : text.index("// tensor type selection")]
    general, special = re.split(r"if \(arch == LLM_ARCH_GLM5_NEXT\) \{", rules)
    special, rest = special.split("}", 1)
    for pattern, part in ((type_rules._KEPT, general + rest), (type_rules._KEPT_IN_GLM5_NEXT, special)):
        names = re.findall(r'name\.find\("([^"]+)"\)', part)
        assert len(names) > 8 and [name for name in names if not pattern.search(name)] == []
        assert sorted(pattern.pattern.replace("\\", "").split("|")) == sorted(names)
