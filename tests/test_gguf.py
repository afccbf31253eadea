# SPDX-License-Identifier: MIT
"""The package gguf knows the tbq types after `import tbq`."""

import importlib
import subprocess
import sys
import textwrap

import gguf
import numpy as np
import pytest

import tbq
from llama_tools import TBQ, complete, tiny_llama
from tbq.gguf_files import register

# Runs in another interpreter, which may have another release of gguf.
ROUND_TRIP = """
    import sys
    first, folder = sys.argv[1:]
    if first == "gguf":
        import gguf, tbq
    else:
        import tbq, gguf
    import numpy as np
    x = np.random.default_rng(0).standard_normal((6, 128), dtype=np.float32)
    path = f"{folder}/file.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_TBQ4_0)
    for name in tbq.types:
        kind = gguf.GGMLQuantizationType[name.upper()]
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    for tensor in gguf.GGUFReader(path).tensors:
        assert tensor.tensor_type == tbq.types[tensor.name].id and tensor.tensor_type.name == tensor.name.upper()
        assert tensor.shape.tolist() == [128, 6] and tensor.n_bytes == 6 * tbq.row_bytes(128, tensor.name)
        packed = tbq.quantize(x, tensor.name)
        assert (tensor.data == packed).all()
        assert (gguf.dequantize(tensor.data, tensor.tensor_type) == tbq.dequantize(packed, tensor.name, x.shape)).all()
    print(len(gguf.GGUFReader(path).tensors), gguf.__file__)
"""


def round_trip(first, folder, gguf_folder=None):
    code = textwrap.dedent(ROUND_TRIP)
    if gguf_folder:
        code = f"import sys; sys.path.insert(0, {str(gguf_folder)!r})\n" + code
    done = subprocess.run([sys.executable, "-c", code, first, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, path = done.stdout.split(maxsplit=1)
    assert count == "3"
    return path


@pytest.mark.parametrize("first", ["gguf", "tbq"])
def test_written_and_read(first, tmp_path):
    round_trip(first, tmp_path)


@pytest.mark.parametrize("release", ["0.17.*", "0.18.*", "0.19.*"])
def test_releases(release, tmp_path):
    target = tmp_path / "site"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", target]
    command = [sys.executable, "-m", "pip", "install", *options, f"gguf=={release}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"gguf {release} cannot be installed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    assert round_trip("tbq", tmp_path, target).startswith(str(target))


def test_numbers():
    for name, info in tbq.types.items():
        member = gguf.GGMLQuantizationType[name.upper()]
        assert member == info.id and member is gguf.GGMLQuantizationType(info.id) is getattr(
            gguf.GGMLQuantizationType, name.upper()
        )
        assert gguf.GGML_QUANT_SIZES[member] == (64, info.block_bytes)
        assert gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] == info.id
        assert repr(member) == f"<GGMLQuantizationType.{name.upper()}: {info.id}>" and isinstance(
            member, gguf.GGMLQuantizationType
        )
    assert list(gguf.GGMLQuantizationType)[-3:] == [info.id for info in tbq.types.values()]


def test_twice_is_once():
    before = len(gguf.GGMLQuantizationType), len(gguf.LlamaFileType), len(gguf.GGML_QUANT_SIZES)
    register.register()
    importlib.reload(register)
    assert before == (len(gguf.GGMLQuantizationType), len(gguf.LlamaFileType), len(gguf.GGML_QUANT_SIZES))


def test_conflicting_numbers_and_names():
    """A gguf in which another type has the number or the name of a tbq type is refused."""
    with pytest.raises(tbq.TBQError, match="TBQ9_0 or the number 644"):
        register._add_member(gguf.GGMLQuantizationType, "TBQ9_0", 644)
    with pytest.raises(tbq.TBQError, match="the name F16 or the number 9999"):
        register._add_member(gguf.GGMLQuantizationType, "F16", 9999)


@pytest.mark.parametrize("kind", TBQ)
def test_rows_that_64_does_not_divide(kind):
    with pytest.raises(gguf.quants.QuantError, match=r"shape \(2, 96\)"):
        gguf.quantize(np.zeros((2, 96), np.float32), gguf.GGMLQuantizationType[kind.upper()])


def test_a_file_of_the_writer_runs(bin_dir, tmp_path):
    """llama.cpp runs a file that GGUFWriter wrote, with weights from gguf.quantize."""
    source = gguf.GGUFReader(tiny_llama(tmp_path / "f32.gguf", 64))
    kind = gguf.GGMLQuantizationType.TBQ4_0
    writer = gguf.GGUFWriter(tmp_path / "tbq.gguf", "llama")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in source.tensors:
        matrix = tensor.name.startswith("blk") and "norm" not in tensor.name
        writer.add_tensor(
            tensor.name, gguf.quantize(tensor.data, kind) if matrix else tensor.data, raw_dtype=kind if matrix else None
        )
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    text, _ = complete(bin_dir, tmp_path / "tbq.gguf", "The quick", n=8)
    assert text
