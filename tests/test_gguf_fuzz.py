# SPDX-License-Identifier: MIT
"""Corrupt and hostile GGUF files: one line of error, status 2, no file left, no more memory than the file has bytes."""

import os
import re
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

import tbq
from llama_tools import write_gguf
from tbq.cli.inspect import as_text
from tbq.gguf_files.inspect import inspect
from tbq.gguf_files.reader import FORMAT_KEY, MAX_COUNT, open_gguf

FIELDS = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "llama.expert_count": 0,
    "a.flag": True,
    "a.float": 0.5,
    "a.strings": ["one", "", "three"],
    "a.numbers": [1, 2, 3],
    "a.floats": [0.5, 2.0],
}


def tensors():
    rng = np.random.default_rng(0)
    packed = tbq.quantize(rng.standard_normal((2, 64), dtype=np.float32), "tbq4_0")
    return {
        "token_embd.weight": rng.standard_normal((4, 64)).astype("f4"),
        "blk.0.ffn_up.weight": rng.standard_normal((2, 128)).astype("f4"),
        "blk.0.ffn_down.weight": (644, (2, 64), packed.tobytes()),
        "blk.0.ffn_norm.weight": np.ones(64, "f4"),
    }


@pytest.fixture
def good(tmp_path):
    path = write_gguf(tmp_path / "good.gguf", FIELDS, tensors())
    return path.read_bytes(), open_gguf(path).tensors[0].offset


def attempt(tmp_path, data):
    """Opens, converts and inspects a file; returns the error or None.

    Fails for any other exception, a file that is left, or too much memory.
    """
    source, target = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(data)
    before = sorted(os.listdir(tmp_path))
    start = time.monotonic()
    try:
        tracemalloc.start()
        try:
            open_gguf(source)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 600_000 + 4 * len(data)  # the bytes that are read at a time, and the header
        tbq.convert(source, target, "tbq4_0", threads=1)
        target.unlink()
        as_text(inspect(source, source, threads=1))
        error = None
    except tbq.TBQError as found:
        error = str(found)
        assert error and len(error) < 600
    assert time.monotonic() - start < 5
    assert sorted(os.listdir(tmp_path)) == before
    return error


def test_the_good_file_is_good(tmp_path, good):
    assert attempt(tmp_path, good[0]) is None
    metadata = open_gguf(tmp_path / "in.gguf").metadata
    assert dict(metadata) == FIELDS


def test_truncated_anywhere(tmp_path, good):
    data, start = good
    for size in [*range(0, start, 3), *range(start, len(data), 97), len(data) - 1 - 0]:
        if size < len(data) - 32:  # the padding of the last tensor may be missing
            assert attempt(tmp_path, data[:size]), size


def test_bits_flipped(tmp_path, good):
    """Bits of the header, one at a time, then a few at a time: an error, or a file that is still valid."""
    data, start = good
    errors = 0
    for bit in range(0, 8 * start, 3):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        errors += attempt(tmp_path, bytes(changed)) is not None
    assert errors > start / 3
    rng = np.random.default_rng(1)
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(rng.integers(2, 9)):
            changed[rng.integers(0, start)] = rng.integers(0, 256)
        attempt(tmp_path, bytes(changed))


def test_weights_flipped(tmp_path, good):
    """Any bytes are blocks; values that are not finite are an error."""
    data, start = good
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.integers(start, len(data), 3):
            changed[place] = 0xFF
        seen.add(re.sub(r"tensor \S+", "tensor", attempt(tmp_path, bytes(changed)) or ""))
    assert seen - {
        "tensor has values beyond the range of q8_0; f32 can hold them",
        "tensor has values beyond the range of tbq4_0; f32 can hold them",
    } == {"", "tensor has values that are not finite; the file is corrupt"}


def header(n_tensors=1, n_entries=0, version=3, magic=b"GGUF"):
    return struct.pack("<4sIQQ", magic, version, n_tensors, n_entries)


def text(value, length=None):
    return struct.pack("<Q", len(value) if length is None else length) + value


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name=b"a.weight", dims=(64,), kind=0, offset=0, n_dims=None):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims) if n_dims is None else n_dims, *dims, kind, offset)


U64 = 2**64 - 1
HOSTILE = {
    "empty": (b"", "is truncated or not GGUF"),
    "text": (b"# a model card\n" * 40, r"is not a GGUF file: it begins with b'# a '"),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":{"dtype":"F16"}}' * 4, "is not a GGUF file"),
    "version 1": (header(version=1), "has GGUF version 1; 2 and 3 are read"),
    "version 4": (header(version=4), "has GGUF version 4"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "is big-endian"),
    "tensors": (header(U64) + bytes(999), f"at most {MAX_COUNT} are read"),
    "entries": (header(0, 2**63) + bytes(999), f"at most {MAX_COUNT} are read"),
    "many tensors": (header(MAX_COUNT) + bytes(999), "a header of 131072 tensors and 0 entries would end"),
    "key": (header(0, 1) + text(b"k", U64) + bytes(99), "key 0 of the metadata would end"),
    "key of bytes": (header(0, 1) + entry(b"\xff\xfe", 4, bytes(4)) + bytes(99), "is not text"),
    "empty key": (header(0, 1) + entry(b"", 4, bytes(4)) + bytes(99), "key 0 of the metadata is ''"),
    "key of lines": (header(0, 1) + entry(b"a\nb", 4, bytes(4)) + bytes(99), r"key 0 of the metadata is 'a\\nb'"),
    "key twice": (header(0, 2) + entry(b"k", 4, bytes(4)) * 2 + bytes(99), "metadata k occurs twice"),
    "type of an entry": (header(0, 1) + entry(b"k", 13, bytes(4)) + bytes(99), "metadata k has type 13"),
    "string": (header(0, 1) + entry(b"k", 8, text(b"v", 2**40)) + bytes(99), "metadata k would end at byte"),
    "array": (
        header(0, 1) + entry(b"k", 9, struct.pack("<IQ", 4, 2**62)) + bytes(99),
        r"metadata k, 4611686018427387904 elements, would end",
    ),
    "array of strings": (
        header(0, 1) + entry(b"k", 9, struct.pack("<IQ", 8, 2**61)) + bytes(99),
        "elements, would end",
    ),
    "array of bytes": (header(0, 1) + entry(b"k", 9, struct.pack("<IQ", 0, U64)) + bytes(99), "elements, would end"),
    "array of arrays": (
        header(0, 1) + entry(b"k", 9, struct.pack("<IQ", 9, 1) * 20) + bytes(99),
        "is an array of arrays, which llama.cpp does not read either",
    ),
    "array of nothing": (
        header(0, 1) + entry(b"k", 9, struct.pack("<IQ", 77, 1)) + bytes(99),
        "is an array of type 77",
    ),
    "alignment 0": (header(0, 1) + entry(b"general.alignment", 4, bytes(4)) + bytes(99), "general.alignment is 0"),
    "alignment 48": (
        header(0, 1) + entry(b"general.alignment", 4, struct.pack("<I", 48)) + bytes(99),
        "must be a power of two",
    ),
    "alignment 2 GB": (
        header(0, 1) + entry(b"general.alignment", 4, struct.pack("<I", 1 << 31)) + bytes(99),
        "up to 65536",
    ),
    "alignment text": (
        header(0, 1) + entry(b"general.alignment", 8, text(b"x")) + bytes(99),
        "general.alignment is 'x'",
    ),
    "format": (
        header(0, 1) + entry(FORMAT_KEY.encode(), 4, struct.pack("<I", 9)) + bytes(99),
        f"{FORMAT_KEY} is '9'; this tbq reads 1",
    ),
    "split": (
        header(0, 1) + entry(b"split.count", 2, struct.pack("<H", 65535)) + bytes(99),
        "one of 65535 files of a split; its name",
    ),
    "split text": (
        header(0, 1) + entry(b"split.count", 8, text(b"2")) + bytes(99),
        "split.count is '2'; it must be an integer",
    ),
    "dimensions": (header() + tensor(n_dims=2**32 - 1) + bytes(999), "has 4294967295 dimensions"),
    "no dimension": (header() + tensor(dims=()), "has 4 bytes at"),
    "empty tensor": (header() + tensor(dims=(64, 0), offset=2**32) + bytes(999), "has 0 bytes at"),
    "empty and huge": (header() + tensor(dims=(U64, 0)) + bytes(999), r"must multiply to less than 2\^60"),
    "empty inside another": (
        header(2) + tensor() + tensor(b"b.weight", (64, 0), offset=64) + bytes(999),
        "tensors a.weight and b.weight overlap",
    ),
    "overflow": (header() + tensor(dims=(2**32, 2**32)) + bytes(999), "has 73786976294838206464 bytes"),
    "huge": (header() + tensor(dims=(U64,) * 4) + bytes(999), "bytes at"),
    "too long": (
        header() + tensor(dims=(64, 1000)) + bytes(999),
        "is truncated or corrupt: tensor a.weight has 256000 bytes",
    ),
    "rows": (header() + tensor(dims=(63,), kind=644) + bytes(999), "is tbq4_0 in rows of 63; 64 must divide them"),
    "unknown type": (header() + tensor(kind=36) + bytes(999), "has type 36, which the installed gguf does not know"),
    "activation type": (header() + tensor(kind=648) + bytes(999), "has type 648"),
    "offset": (header() + tensor(offset=2**64 - 32) + bytes(999), "bytes at 18446744073709551"),
    "odd offset": (header() + tensor(offset=1) + bytes(999), "bytes at"),
    "same bytes": (header(2) + tensor() + tensor(b"b.weight") + bytes(999), "tensors a.weight and b.weight overlap"),
    "same name": (header(2) + tensor() + tensor(offset=256) + bytes(999), "tensor a.weight occurs twice"),
    "long name": (header() + tensor(b"a" * 64) + bytes(999), "has a name of 64 bytes or more"),
    "name of lines": (header() + tensor(b"a\n\x1b[31mb") + bytes(999), r"the name of tensor 0 is 'a\\n"),
    "experts": (
        header(0, 2)
        + entry(b"general.architecture", 8, text(b"llama"))
        + entry(b"llama.expert_count", 8, text(b"x" * 999)),
        "llama.expert_count is 'x{40}'; it must be an integer",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path, name):
    data, message = HOSTILE[name]
    assert re.search(message, attempt(tmp_path, data) or "no error"), attempt(tmp_path, data)


@pytest.mark.parametrize("name", ["text", "array", "overflow", "name of lines", "same bytes"])
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_command_line(tmp_path, name, command):
    (tmp_path / "in.gguf").write_bytes(HOSTILE[name][0])
    arguments = (
        ["convert", "in.gguf", "out.gguf", "--type", "tbq4_0"] if command == "convert" else ["inspect", "in.gguf"]
    )
    done = subprocess.run(
        [sys.executable, "-m", "tbq", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("tbq: error: in.gguf")
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr
    assert os.listdir(tmp_path) == ["in.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files")
def test_hostile_lengths_in_a_large_file(tmp_path):
    """In a sparse file of 40 GB, a string of 30 GB or a list of a billion strings would fit, but is refused."""
    for value in (
        entry(b"k", 8, text(b"", 30 << 30)),
        entry(b"k", 9, struct.pack("<IQ", 8, 10**9)),
        entry(b"k", 9, struct.pack("<IQ", 0, 30 << 30)),
    ):
        path = tmp_path / "big.gguf"
        path.write_bytes(header(0, 1) + value)
        os.truncate(path, 40 << 30)
        start = time.monotonic()
        with pytest.raises(tbq.TBQError, match="beyond the 256 MiB of a header"):
            open_gguf(path)
        assert time.monotonic() - start < 2
        path.unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_paths_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(tbq.TBQError, match="is not a regular file"):
            open_gguf(path)
    with pytest.raises(OSError):
        open_gguf(tmp_path / "nothing")


def test_a_file_that_becomes_shorter(tmp_path, good, monkeypatch):
    """The file is truncated between the check of the header and the reading of weights."""
    path = tmp_path / "in.gguf"
    path.write_bytes(good[0])
    model = open_gguf(path)
    os.truncate(path, good[1] + 100)
    monkeypatch.setattr("tbq.gguf_files.convert.open_gguf", lambda _: model)
    with pytest.raises(tbq.TBQError, match="became shorter"):
        tbq.convert(path, tmp_path / "out.gguf")
    assert sorted(os.listdir(tmp_path)) == ["good.gguf", "in.gguf"]


def test_splits_that_contradict_themselves(tmp_path):
    def part(number, no, count=2, total=2, name="a.weight"):
        fields = {"general.architecture": "llama", "split.no": no, "split.count": count, "split.tensors.count": total}
        return write_gguf(tmp_path / f"x-{number:05}-of-00002.gguf", fields, {name: np.ones((2, 64), "f4")})

    first, second = part(1, 0), part(2, 1, name="b.weight")
    assert [t.path for t in open_gguf(second).tensors] == [first, second]
    for change, message in (
        (dict(no=0), "is not file 2 of 2"),
        (dict(no=1, count=3), "is not file 2 of 2"),
        (dict(no=1, name="a.weight"), "occurs twice"),
    ):
        part(2, **change)
        with pytest.raises(tbq.TBQError, match=message):
            open_gguf(first)
    part(2, 1, name="b.weight")
    part(1, 0, total=7)
    with pytest.raises(tbq.TBQError, match="have 2 tensors, not 7"):
        open_gguf(first)
    second.write_bytes(b"GGUF")
    with pytest.raises(tbq.TBQError, match="x-00002-of-00002.gguf is truncated"):
        open_gguf(first)
