# SPDX-License-Identifier: MIT
"""Unusual but legal GGUF files.

The files that llama.cpp reads can be read, converted and inspected, and it reads the files that tbq writes.
"""

import json
import re
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest

import tbq
from llama_tools import run, tiny_llama, write_gguf
from tbq.cli.inspect import as_json, as_text
from tbq.gguf_files.inspect import inspect
from tbq.gguf_files.reader import open_gguf
from test_gguf_fuzz import entry, text

F32, F16, Q8_0, I32, TBQ3, TBQ4 = 0, 1, 8, 26, 643, 644

# llama.cpp's own reader.  It runs in another process, because it may abort.  It prints a line of JSON for each file,
# null for a file that it refuses.
LLAMA_CPP = """
import ctypes, json, sys
ggml = ctypes.CDLL(sys.argv[1])
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]
ggml.gguf_init_from_file.argtypes, ggml.gguf_init_from_file.restype = [ctypes.c_char_p, Params], ctypes.c_void_p
def function(name, result):
    found = getattr(ggml, f"gguf_get_{name}")
    found.restype = result
    return lambda *arguments: found(ctypes.c_void_p(arguments[0]), *map(ctypes.c_int64, arguments[1:]))
int64, size_t = ctypes.c_int64, ctypes.c_size_t
count, entries, start = function("n_tensors", int64), function("n_kv", int64), function("data_offset", size_t)
name, kind = function("tensor_name", ctypes.c_char_p), function("tensor_type", ctypes.c_int)
ne, size = function("tensor_ne", ctypes.POINTER(int64)), function("tensor_size", size_t)
offset = function("tensor_offset", size_t)
def tensor(file, i):
    place = start(file) + offset(file, i)
    return [name(file, i).decode(), kind(file, i), ne(file, i)[:4], size(file, i), place]
for path in sys.argv[2:]:
    file = ggml.gguf_init_from_file(path.encode(), Params(True, None))
    print(json.dumps(file and [entries(file), [tensor(file, i) for i in range(count(file))]]))
"""


@pytest.fixture(scope="module")
def llama_cpp(lib_dir):
    """Returns a function: from paths to what llama.cpp reads, (entries, [(name, type, ne, bytes, offset)]) or None."""
    library = next(path for path in sorted(lib_dir.glob("*ggml-base.*")) if path.suffix in (".so", ".dylib", ".dll"))

    def read(*paths):
        done = subprocess.run(
            [sys.executable, "-c", LLAMA_CPP, str(library), *map(str, paths)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(found) == len(paths)
        return [each and (each[0], [tuple(tensor) for tensor in each[1]]) for each in found]

    return read


def as_llama_cpp(model):
    """Returns an opened model in the same form."""
    return len(model.metadata), [
        (t.name, int(t.type), [*reversed(t.shape), 1, 1, 1][:4], t.n_bytes, t.offset) for t in model.tensors
    ]


# --- files ----------------------------------------------------------------------------------------------------------


ARCH = entry(b"general.architecture", 8, text(b"llama"))
VALUES = np.arange(1, 65, dtype="<f4").tobytes()
ORDINARY = ("first.weight", (1, 64), F32, VALUES)


def file(*tensors, entries=(ARCH,), alignment=32, version=3, order="<", padded=True, offsets=None):
    """Makes the bytes of a file.

    tensors: (name, shape in NumPy's order, type, bytes).  offsets: of the tensors; None: each follows the one before
    it.
    """
    head, data = b"", b""
    for i, (name, shape, kind, values) in enumerate(tensors):
        head += text(name.encode()) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data) if offsets is None else offsets[i]
        )
        data += values + bytes(-len(values) % alignment if padded or i + 1 < len(tensors) else 0)
    head = struct.pack(f"{order}4sIQQ", b"GGUF", version, len(tensors), len(entries)) + b"".join(entries) + head
    return head + bytes(-len(head) % alignment if tensors else 0) + data


def between(shape, kind, values=b"", name="edge.weight"):
    """A file with a tensor between two ordinary ones."""
    return file(ORDINARY, (name, shape, kind, values), ("last.weight", (1, 64), F32, VALUES))


def aligned(value, kind=4, pack="<I"):
    return file(
        ORDINARY,
        ("b.weight", (1, 1), F32, VALUES[:4]),
        ("c.weight", (64,), F32, VALUES),
        alignment=value or 32,
        entries=(ARCH, entry(b"general.alignment", kind, struct.pack(pack, value))),
    )


def with_entry(key, kind, value):
    return file(ORDINARY, entries=(ARCH, entry(key, kind, value)))


def array(kind, count=0, values=b""):
    return struct.pack("<IQ", kind, count) + values


#: Files that llama.cpp and tbq read.
LEGAL = {
    **{
        f"{kind} of shape {shape}": between(shape, number)
        for kind, number in (("f32", F32), ("f16", F16), ("q8_0", Q8_0), ("i32", I32), ("tbq4_0", TBQ4))
        for shape in ((0,), (0, 64), (4, 0), (2, 0, 64), (2, 3, 0), (0, 0, 0, 0))
    },
    "nothing but empty tensors": file(
        ("a.weight", (0,), F32, b""), ("b.weight", (4, 0), F32, b""), ("c.weight", (0, 64), TBQ4, b"")
    ),
    "empty first and last": file(("a.weight", (4, 0), F32, b""), ORDINARY, ("z.weight", (0, 64), F32, b"")),
    "scalar of no axis": between((), F32, VALUES[:4]),
    "scalar of one axis": between((1,), F32, VALUES[:4]),
    "scalar of four axes": between((1, 1, 1, 1), F32, VALUES[:4]),
    "four axes": between((2, 2, 2, 8), F32, VALUES),
    "no tensors": file(),
    "no tensors and no entries": file(entries=()),
    "no entries": file(ORDINARY, entries=()),
    "version 2": file(ORDINARY, version=2),
    "last tensor without padding": file(ORDINARY, ("b.weight", (1,), F32, VALUES[:4]), padded=False),
    **{f"alignment {n}": aligned(n) for n in (1, 2, 4, 8, 16, 64, 1 << 16)},
    "empty string": with_entry(b"k", 8, text(b"")),
    "string with a null": with_entry(b"k", 8, text(b"a\0b")),
    "string of other bytes": with_entry(b"k", 8, text(b"\xff\xfe")),
    **{f"empty array of type {kind}": with_entry(b"k", 9, array(kind)) for kind in (*range(9), 10, 11, 12)},
    "array of empty strings": with_entry(b"k", 9, array(8, 3, text(b"") * 3)),
    "array of booleans": with_entry(b"k", 9, array(7, 3, b"\0\1\2")),
    "key of 65535 bytes": with_entry(b"k" * 65535, 4, bytes(4)),
    "key with a space": with_entry("a key, ключ".encode(), 4, bytes(4)),
    "tensor without a name": between((1, 64), F32, VALUES, ""),
    "name of 63 bytes": between((1, 64), F32, VALUES, "n" * 63),
    "name of 63 bytes, fewer characters": between((1, 64), F32, VALUES, "é" * 31 + "n"),
}

#: Files that both refuse, with the message of tbq.
ILLEGAL = {
    "five axes": (between((1, 1, 1, 1, 64), F32, VALUES), "has 5 dimensions; 4 are possible"),
    "rows that 64 does not divide": (between((0, 63), TBQ4), "is tbq4_0 in rows of 63; 64 must divide them"),
    "axis of 2^63 next to 0": (between((2**63, 0), F32), r"must multiply to less than 2\^60"),
    "empty tensor where another one is": (file(ORDINARY, ("b.weight", (0, 64), F32, b""), offsets=(0, 32)), "overlap"),
    "empty tensor beyond the end": (
        file(ORDINARY, ("b.weight", (0, 64), F32, b""), offsets=(0, 4096)),
        "has 0 bytes at",
    ),
    "alignment 0": (aligned(0), "general.alignment is 0; it must be a power of two"),
    "alignment 24": (aligned(24), "general.alignment is 24; it must be a power of two"),
    "alignment of 16 bits": (aligned(32, 2, "<H"), "general.alignment is '32' of type uint16; it must be a uint32"),
    "alignment of 64 bits": (aligned(32, 10, "<Q"), "general.alignment is '32' of type uint64; it must be a uint32"),
    "alignment with a sign": (aligned(32, 5, "<i"), "general.alignment is '32' of type int32; it must be a uint32"),
    "array of arrays": (
        with_entry(b"k", 9, array(9, 1, array(4, 1, bytes(4)))),
        "metadata k is an array of arrays, which llama.cpp does not read either",
    ),
    "array of a type that is not there": (with_entry(b"k", 9, array(13)), "metadata k is an array of type 13"),
    "key of no bytes": (with_entry(b"", 4, bytes(4)), "key 1 of the metadata is ''"),
    "long key twice": (
        file(ORDINARY, entries=[entry(b"k" * 65535, 4, bytes(4))] * 2),
        r"metadata k{80}\.\.\. occurs twice",
    ),
    "long key, its value cut": (
        file(entries=[text(b"k" * 65535) + struct.pack("<IQ", 8, 99)]),
        r"metadata k{80}\.\.\. would end at byte",
    ),
    "name of 64 bytes": (between((1, 64), F32, VALUES, "n" * 64), "has a name of 64 bytes or more"),
    "name twice": (file(ORDINARY, ORDINARY), "tensor first.weight occurs twice"),
    "no name twice": (file(("", *ORDINARY[1:]), ("", *ORDINARY[1:])), "tensor  occurs twice"),
    "version 0": (file(ORDINARY, version=0), "has GGUF version 0; 2 and 3 are read"),
    "big-endian": (file(order=">", entries=()), "is big-endian; only little-endian GGUF files are read"),
}

#: Files for which the two differ: (bytes, whether llama.cpp reads it, whether tbq reads it, why).
DIFFERENT = {
    "tensors in another order": (
        file(ORDINARY, ("b.weight", (1, 64), F32, VALUES), offsets=(256, 0)),
        False,
        True,
        "nothing is lost",
    ),
    "a gap between tensors": (
        file(ORDINARY, ("b.weight", (1, 64), F32, bytes(32) + VALUES), offsets=(0, 288)),
        False,
        True,
        "nothing is lost",
    ),
    "alignment of a megabyte": (aligned(1 << 20), True, False, "padding is copied, and a page is enough"),
    "name of two lines": (between((1, 64), F32, VALUES, "a\nb"), True, False, "names are printed"),
    "key of two lines": (with_entry(b"a\nb", 4, bytes(4)), True, False, "keys are printed"),
    "empty tensor after one without padding": (
        file(("a.weight", (1,), F32, VALUES[:4]), ("b.weight", (0,), F32, b""), padded=False)[:-28],
        True,
        False,
        "llama.cpp's loader of models refuses it too, by the end of the file",
    ),
}


def written(folder, files):
    paths = []
    for i, data in enumerate(files):
        paths.append(folder / f"{i}.gguf")
        paths[-1].write_bytes(data)
    return paths


def test_legal_files(llama_cpp, tmp_path):
    """Tensors, types, shapes, sizes and offsets are those of llama.cpp's own reader."""
    paths = written(tmp_path, LEGAL.values())
    for name, path, theirs in zip(LEGAL, paths, llama_cpp(*paths)):
        assert theirs is not None, name
        assert as_llama_cpp(open_gguf(path)) == theirs, name


def test_illegal_files(llama_cpp, tmp_path):
    paths = written(tmp_path, [data for data, _ in ILLEGAL.values()])
    for (name, (_, message)), path, theirs in zip(ILLEGAL.items(), paths, llama_cpp(*paths)):
        assert theirs is None, name
        with pytest.raises(tbq.TBQError, match=message) as error:
            open_gguf(path)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value), name


def test_differences_from_llama_cpp(llama_cpp, tmp_path):
    paths = written(tmp_path, [data for data, *_ in DIFFERENT.values()])
    for (name, (_, theirs, ours, _)), path, found in zip(DIFFERENT.items(), paths, llama_cpp(*paths)):
        assert (found is not None) == theirs, name
        if ours:
            assert open_gguf(path).tensors, name
        else:
            with pytest.raises(tbq.TBQError):
                open_gguf(path)


def tensor_bytes(path):
    return {t.name: path.read_bytes()[t.offset : t.offset + t.n_bytes] for t in open_gguf(path).tensors}


@pytest.mark.parametrize("kind", ["tbq4_0", "f16"])
def test_converted_and_back(llama_cpp, tmp_path, kind):
    """llama.cpp reads the new file.  It has every tensor and entry; tensors that keep their type keep their bytes."""
    paths = written(tmp_path, LEGAL.values())
    targets, returns = ([path.with_suffix(f".{end}.gguf") for path in paths] for end in ("there", "back"))
    for path, target, back in zip(paths, targets, returns):
        tbq.convert(path, target, kind, threads=1)
        tbq.convert(target, back, "f32", threads=1)
    read = llama_cpp(*targets, *returns)
    for i, (name, path) in enumerate(zip(LEGAL, paths)):
        source, values = open_gguf(path), tensor_bytes(path)
        for target, theirs in ((targets[i], read[i]), (returns[i], read[len(paths) + i])):
            assert theirs is not None and as_llama_cpp(open_gguf(target)) == theirs, name
            converted, after = open_gguf(target), tensor_bytes(target)
            assert [(t.name, t.shape) for t in converted.tensors] == [(t.name, t.shape) for t in source.tensors], name
            assert source.metadata.raw.items() <= converted.metadata.raw.items(), name
            assert all(
                after[t.name] == values[s.name] for s, t in zip(source.tensors, converted.tensors) if s.type == t.type
            ), name
            assert len(target.read_bytes()) % converted.metadata.alignment == 0, name


def test_types_of_empty_tensors(tmp_path):
    """As with llama-quantize: (4, 0) is a matrix and gets the type; (0, 64) counts as a row and keeps its own."""
    path = tmp_path / "in.gguf"
    for shape, kind in (((4, 0), "tbq4_0"), ((2, 0, 64), "tbq4_0"), ((0, 64), "f32"), ((0,), "f32")):
        path.write_bytes(between(shape, F32))
        report = tbq.convert(path, tmp_path / "out.gguf", "tbq4_0", force=True)
        tensor = open_gguf(tmp_path / "out.gguf").tensors[1]
        assert (tensor.type.name.lower(), tensor.shape, tensor.n_bytes) == (kind, shape, 0)
        assert tensor.bits_per_value == {"tbq4_0": 4.25, "f32": 32}[kind] and not report.notes


def test_inspected(tmp_path):
    """A tensor without values has neither an error nor a cosine."""
    for name, path in zip(LEGAL, written(tmp_path, LEGAL.values())):
        report = inspect(path, path if open_gguf(path).tensors else None, threads=1)
        printed, found = as_text(report), json.loads(as_json(report))
        assert "nan" not in printed.lower().replace("nothing", ""), name
        assert [t["shape"] for t in found["tensors"]] == [list(t.shape) for t in report.model.tensors], name
        if "of shape" in name:
            edge = found["tensors"][1]
            assert "error" not in edge and "cosine" not in edge and edge["bytes"] == 0 and edge["bits_per_value"] > 0
            lines = [line for line in printed.splitlines() if re.match("(edge|last).weight", line)]
            assert re.search(r" +- +-$", lines[0]) and re.search(r"0\.00000 1\.000000$", lines[1]), name


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "in.gguf", "--against", "in.gguf"),
        ("inspect", "--json", "in.gguf"),
        ("convert", "in.gguf", "out.gguf", "--type", "tbq3_0"),
    ],
)
def test_commands(tmp_path, command):
    edges = [(shape, kind) for shape in ((0,), (0, 64), (4, 0)) for kind in (F32, Q8_0, TBQ3, TBQ4)]
    tensors = [(f"{i}.weight", shape, kind, b"") for i, (shape, kind) in enumerate(edges)]
    (tmp_path / "in.gguf").write_bytes(file(ORDINARY, *tensors))
    done = subprocess.run([sys.executable, "-m", "tbq", *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "nan" not in done.stdout.lower()


def test_nothing_but_empty_tbq_tensors(tmp_path):
    path = tmp_path / "in.gguf"
    path.write_bytes(file(("a.weight", (0, 64), TBQ4, b"")))
    assert "4.25" in as_text(inspect(path, path))
    tbq.convert(path, tmp_path / "out.gguf", "f16")
    assert open_gguf(tmp_path / "out.gguf").tensors[0].type.name == "F16"


def test_planned(tmp_path):
    """With a norm without values, the size of key biases is unknown, and the plan says so."""
    fields = {
        "general.architecture": "qwen2",
        "qwen2.block_count": 1,
        "qwen2.context_length": 4096,
        "qwen2.embedding_length": 128,
        "qwen2.attention.head_count": 2,
        "qwen2.attention.head_count_kv": 1,
    }
    tensors = {
        "blk.0.attn_k.weight": np.ones((64, 128), "f4"),
        "blk.0.attn_k.bias": np.ones(64, "f4"),
        "blk.0.attn_norm.weight": np.ones(0, "f4"),
    }
    plan = tbq.plan(write_gguf(tmp_path / "in.gguf", fields, tensors))
    assert any("whether the key biases are large is unknown" in warning for warning in plan.warnings)


# --- llama.cpp's programs -------------------------------------------------------------------------------------------


def model_with(path, shape):
    """Writes a random llama with an additional tensor, which no architecture has."""
    source = tiny_llama(path.with_name("plain.gguf"), 64)
    opened, data = open_gguf(source), source.read_bytes()
    tensors = {t.name: (int(t.type), t.shape, data[t.offset : t.offset + t.n_bytes]) for t in opened.tensors}
    middle = len(tensors) // 2
    names = list(tensors)
    ordered = (
        {name: tensors[name] for name in names[:middle]}
        | {"edge.weight": (F32, shape, b"")}
        | {name: tensors[name] for name in names[middle:]}
    )
    return write_gguf(path, dict(opened.metadata), ordered)


def test_llama_quantize_writes_the_same(bin_dir, llama_cpp, tmp_path):
    """For a shape that it can write: it divides by a first axis of 0, and drops a last axis of 0."""
    source = model_with(tmp_path / "in.gguf", (2, 0, 64))
    run(bin_dir / "llama-quantize", source, tmp_path / "theirs.gguf", "tbq4_0", 2)
    tbq.convert(source, tmp_path / "ours.gguf", "tbq4_0")
    ours, theirs = open_gguf(tmp_path / "ours.gguf"), open_gguf(tmp_path / "theirs.gguf")
    # llama-quantize sorts the tensors
    assert {(t.name, t.type, t.shape) for t in ours.tensors} == {(t.name, t.type, t.shape) for t in theirs.tensors}
    assert next(t.type.name for t in ours.tensors if t.name == "edge.weight") == "TBQ4_0"
    assert tensor_bytes(tmp_path / "ours.gguf") == tensor_bytes(tmp_path / "theirs.gguf")


@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0)])
def test_llama_cpps_programs_read_what_is_written(bin_dir, tmp_path, shape):
    """llama-gguf-split opens the file.  The loader of models, which llama-tokenize uses, finds every tensor."""
    source = model_with(tmp_path / "in.gguf", shape)
    tbq.convert(source, tmp_path / "ours.gguf", "tbq4_0")
    options = ("--split", "--split-max-tensors", 300, "--dry-run")
    run(bin_dir / "llama-gguf-split", *options, tmp_path / "ours.gguf", tmp_path / "part")
    tokens = run(bin_dir / "llama-tokenize", "-m", tmp_path / "ours.gguf", "-p", "a", "--ids").stdout
    assert tokens.splitlines()[-1] == f"[1, {3 + ord('a')}]"


def test_first_file_of_a_split_without_tensors(bin_dir, tmp_path):
    """llama-gguf-split writes such a file; it is read and written again."""
    source = tiny_llama(tmp_path / "in.gguf", 64)
    options = ("--split", "--split-max-tensors", 15, "--no-tensor-first-split")
    run(bin_dir / "llama-gguf-split", *options, source, tmp_path / "part")
    first = tmp_path / "part-00001-of-00003.gguf"
    assert {t.path.name for t in open_gguf(first).tensors} == {"part-00002-of-00003.gguf", "part-00003-of-00003.gguf"}
    for path in (first, tmp_path / "part-00003-of-00003.gguf"):
        tbq.convert(path, tmp_path / "whole.gguf", "tbq4_0", force=True)
        tbq.convert(source, tmp_path / "plain.gguf", "tbq4_0", force=True)
        assert tensor_bytes(tmp_path / "whole.gguf") == tensor_bytes(tmp_path / "plain.gguf")
    assert "and 2 more" in as_text(inspect(first, source))


# --- the package gguf, and arrays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0), (2, 0, 64), (2, 3, 0)])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", *(name.upper() for name in tbq.types)])
def test_the_package_gguf(tmp_path, shape, kind):
    """tbq reads the files of its writer, and its reader reads the files of tbq."""
    path, kind = tmp_path / "in.gguf", gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        writer.add_tensor("edge.weight", np.zeros(shape, np.float32 if kind == 0 else np.float16))
    else:
        writer.add_tensor(
            "edge.weight", np.zeros(gguf.quant_shape_to_byte_shape(shape, kind), np.uint8), raw_dtype=kind
        )
    writer.add_tensor("last.weight", np.ones((2, 64), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    edge = open_gguf(path).tensors[0]
    assert (edge.name, edge.type, edge.shape, edge.n_bytes) == ("edge.weight", kind, shape, 0)
    tbq.convert(path, tmp_path / "out.gguf", "tbq4_0")
    edge, last = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert edge.shape.tolist() == [*reversed(shape)] and edge.n_bytes == edge.data.size == 0
    assert last.tensor_type.name == "TBQ4_0" and np.allclose(gguf.dequantize(last.data, last.tensor_type), 1, atol=0.5)


@pytest.mark.parametrize("kind", tbq.types)
@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0), (0, 0), (2, 0, 64), (2, 3, 0)])
def test_arrays(kind, shape):
    """Arrays without rows, or with rows of no values: 0 is a multiple of 64."""
    member, bytes_shape = gguf.GGMLQuantizationType[kind.upper()], (*shape[:-1], tbq.row_bytes(shape[-1], kind))
    for dtype in (np.float32, np.float16):
        for kv in (False, True):
            packed = tbq.quantize(np.zeros(shape, dtype), kind, kv=kv)
            assert packed.shape == bytes_shape and packed.dtype == np.uint8
        for data in (packed, b"", bytearray(), memoryview(b"")):
            values = tbq.dequantize(data, kind, shape, dtype)
            assert values.shape == shape and values.dtype == dtype
    packed = gguf.quantize(np.zeros(shape, np.float32), member)
    assert packed.shape == bytes_shape and packed.dtype == np.uint8
    values = gguf.dequantize(packed, member)
    assert values.shape == shape and values.dtype == np.float32
    with pytest.raises(tbq.TBQError, match="data has 1 bytes; .* has 0"):
        tbq.dequantize(b"x", kind, shape)
