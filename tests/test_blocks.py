# SPDX-License-Identifier: MIT
"""Quantize and dequantize: the bits of the NumPy oracle, the golden bytes, and every error."""

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import numpy_reference as reference
import tbq
from conftest import ROOT
from tbq._ffi import ffi, lib

NAMES = ("tbq2_0", "tbq3_0", "tbq4_0")
# The distortion of the Lloyd-Max quantizer of a Gaussian (Max 1960).
MAX_1960 = {"tbq2_0": 0.1175, "tbq3_0": 0.03454, "tbq4_0": 0.009497}


def bits_of(name):
    return tbq.types[name].bits


def same_floats(a, b):
    """Equal in every bit; a NaN equals a NaN, whatever its sign and payload."""
    nan = np.isnan(a) & np.isnan(b)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | nan).all())


def distributions():
    rng = np.random.default_rng(20250414)
    shape = (300, 128)
    normal = rng.standard_normal(shape).astype(np.float32)
    sparse = np.where(rng.random(shape) < 0.03, normal, 0).astype(np.float32)
    one_hot = np.zeros((128, 128), np.float32)
    one_hot[np.arange(128), np.arange(128)] = normal[:128, 0]
    steps = np.exp2(np.arange(-149, 128)).astype(np.float32)[:, None]
    lone = normal.copy()
    lone[::3, 7] = np.nan
    lone[1::3, 80] = np.inf
    lone[2::3, 127] = -np.inf
    with np.errstate(over="ignore"):
        every_exponent = (steps * normal[:277, :]).astype(np.float32)
    any_bits = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    return {
        "gaussian": normal,
        "heavy tails": rng.standard_t(1.5, shape).astype(np.float32),
        "uniform": rng.uniform(-1, 1, shape).astype(np.float32),
        "constant": np.repeat(normal[:, :1], 128, axis=1),
        "two values": np.sign(normal),
        "one-hot": one_hot,
        "sparse": sparse,
        "ramp": np.tile(np.arange(128, dtype=np.float32) - 64, (2, 1)),
        "denormal": (normal * np.float32(1e-40)).astype(np.float32),
        "around the smallest d": (normal * np.float32(2.0**-28)).astype(np.float32),
        "huge": (normal * np.float32(1e37)).astype(np.float32),
        "largest": np.where(normal > 0, np.float32(3.4028235e38), np.float32(-3.4028235e38)),
        "zero": np.zeros((2, 128), np.float32),
        "minus zero": -np.zeros((2, 128), np.float32),
        "NaN and infinity": lone,
        "every exponent": every_exponent,
        "any bits": any_bits,
    }


DISTRIBUTIONS = distributions()


def quantize_centered(x, name, mean, weight):
    """tbq_quantize_kv_centered of each row; mean and weight: arrays of a row, or None."""
    x = np.ascontiguousarray(x, np.float32)
    packed = np.empty((len(x), tbq.row_bytes(x.shape[1], name)), np.uint8)
    given = [ffi.NULL if a is None else ffi.cast("float *", ffi.from_buffer(a)) for a in (mean, weight)]
    for row, out in zip(x, packed):
        assert (
            lib.tbq_quantize_kv_centered(
                tbq.types[name].id, ffi.cast("float *", ffi.from_buffer(row)), *given, ffi.from_buffer(out), len(row)
            )
            == 0
        )
    return packed


@pytest.mark.parametrize("name", NAMES)
def test_centered(name):
    """Keys minus their mean, with weights of channels: the oracle's bytes, and more error where weights are small."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 600, 128)).astype(np.float32)[0]
    mean = np.float32(3) * rng.standard_normal(128).astype(np.float32)
    weight = np.repeat(np.exp(rng.standard_normal(64)).astype(np.float32), 2)
    for m, w in ((mean, weight), (mean, None), (None, weight)):
        packed = quantize_centered(x, name, m, w)
        np.testing.assert_array_equal(packed, reference.quantize(x, bits_of(name), True, m, w))
    np.testing.assert_array_equal(quantize_centered(x, name, None, None), tbq.quantize(x, name, kv=True))
    np.testing.assert_array_equal(
        quantize_centered(x, name, None, weight), quantize_centered(x, name, None, 8 * weight)
    )
    error = {
        kind: np.square(tbq.dequantize(quantize_centered(x + mean, name, mean, w), name, x.shape) - x).mean(0)
        for kind, w in (("even", np.ones(128, np.float32)), ("weighted", weight))
    }
    assert (weight * error["weighted"]).sum() < 0.9 * (weight * error["even"]).sum()


@pytest.mark.parametrize("kv", [False, True], ids=["plain", "kv"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_oracle(name, distribution, kv):
    x = DISTRIBUTIONS[distribution]
    packed = tbq.quantize(x, name, kv=kv)
    wrong = np.flatnonzero((packed != reference.quantize(x, bits_of(name), kv)).any(axis=1))
    assert wrong.size == 0, f"{wrong.size} of {len(x)} rows differ, first row {wrong[0]}: {x[wrong[0]]}"
    values = tbq.dequantize(packed, name, x.shape)
    assert same_floats(values.reshape(-1), reference.dequantize(packed, bits_of(name)))


@pytest.mark.parametrize("name", NAMES)
def test_decoder_takes_any_bytes(name):
    """Bytes that no encoder writes, with every possible d, have values too."""
    rng = np.random.default_rng(7)
    size = tbq.types[name].block_bytes
    packed = rng.integers(0, 256, (2**16, size), dtype=np.uint8)
    packed[:, :2] = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    assert same_floats(tbq.dequantize(packed, name, (2**16 * 64,)), reference.dequantize(packed, bits_of(name)))


@pytest.mark.parametrize("name", NAMES)
def test_golden_bytes(name):
    """If these bytes change, files and saved caches of earlier builds decode to other values."""
    golden = dict(line.rsplit(" ", 1) for line in reference.GOLDEN.read_text(encoding="utf-8").splitlines()[1:])
    for case, x in reference.golden_inputs().items():
        for encoder in ("plain", "kv"):
            assert tbq.quantize(x, name, kv=encoder == "kv").tobytes().hex() == golden[f"{name} {encoder} {case}"], (
                f"{case}, {encoder}; if the encoder was meant to change: python tests/numpy_reference.py"
            )


def test_golden_file_is_what_the_reference_writes():
    assert reference.GOLDEN.read_text(encoding="utf-8").splitlines()[1:] == reference.golden_lines()


def test_format_constants():
    for name in NAMES:
        assert tbq.types[name].levels == reference.LEVELS[bits_of(name)]
        assert tuple(reference.header_numbers(f"TBQ{bits_of(name)}_LEVELS")) == reference.LEVELS[bits_of(name)]
    negative = sum(1 << i for i in range(64) if reference.SIGNS[i] < 0)
    assert lib.tbq_sign_bits() == negative


def test_generated_header_is_current():
    subprocess.run([sys.executable, str(ROOT / "tools" / "tables.py"), "--check"], check=True)


def test_types():
    assert [(t.name, t.id, t.bits, t.bits_per_value, t.block_bytes) for t in tbq.types.values()] == [
        ("tbq2_0", 642, 2, 2.25, 18),
        ("tbq3_0", 643, 3, 3.25, 26),
        ("tbq4_0", 644, 4, 4.25, 34),
    ]
    with pytest.raises(TypeError):
        tbq.types["tbq5_0"] = None


@pytest.mark.parametrize("name", NAMES)
def test_distortion_of_a_gaussian(name):
    x = np.random.default_rng(3).standard_normal((2000, 256)).astype(np.float32)
    plain, kv = (
        np.mean((x - tbq.dequantize(tbq.quantize(x, name, kv=kv), name, x.shape)) ** 2) for kv in (False, True)
    )
    # The search fits the scale to each block; its error is 5 to 27 % below that of the fixed quantizer.
    assert 0.7 * MAX_1960[name] < plain < 0.96 * MAX_1960[name]
    # Noise shaping makes the total error larger: 6 to 9 % were measured.
    assert 1.03 * plain < kv < 1.11 * plain


@pytest.mark.parametrize("name", NAMES)
def test_zero_and_nan_stay_in_their_block(name):
    x = np.ones((1, 256), np.float32)
    x[0, 64:128] = 0
    x[0, 130] = np.nan
    y = tbq.dequantize(tbq.quantize(x, name), name, x.shape)[0]
    assert same_floats(y[64:128], np.zeros(64, np.float32))  # +0 exactly
    assert np.isnan(y[128:192]).all()
    assert np.isfinite(y[:64]).all() and np.isfinite(y[192:]).all()


def test_rotation():
    x = DISTRIBUTIONS["heavy tails"]
    y = tbq.rotate(x)
    assert y.shape == x.shape and y.dtype == np.float32
    assert np.array_equal(y, reference.rotate(x))  # equal numbers; zeros may differ in sign (see the reference)
    exact = (x.reshape(-1, 64) * reference.SIGNS).astype(np.float64) @ reference.H.astype(np.float64).T / 8
    scale = np.linalg.norm(exact, axis=1, keepdims=True)
    # six additions after one another; the error of each is at most half an ulp of a number up to 8 times the norm
    assert np.max(np.abs(y.reshape(-1, 64) - exact) / scale) < 6 * 2.0**-24 * 8
    assert np.array_equal(tbq.unrotate(y), reference.unrotate(y))
    assert np.array_equal(
        tbq.rotate(x[..., ::-1]), tbq.rotate(x[..., ::-1].copy())
    )  # an array with another layout is copied


@pytest.mark.parametrize("name", NAMES)
def test_dot(name):
    rng = np.random.default_rng(11)
    for values in (0, 64, 192, 1024):
        x, y = rng.standard_normal((2, values)).astype(np.float32)
        row = tbq.quantize(x, name)
        act = np.empty(lib.tbq_row_bytes(lib.TBQ_TYPE_TBQ8_ACT, values), np.uint8)
        result = ffi.new("float *")
        assert (
            lib.tbq_quantize(
                lib.TBQ_TYPE_TBQ8_ACT, ffi.from_buffer("float[]", y), ffi.from_buffer("char[]", act), values
            )
            == lib.TBQ_OK
        )
        assert (
            lib.tbq_dot(
                tbq.types[name].id, ffi.from_buffer("char[]", row), ffi.from_buffer("char[]", act), values, result
            )
            == lib.TBQ_OK
        )
        assert result[0] == reference.dot(row, bits_of(name), reference.quantize_act(y))


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name):
    size = tbq.types[name].block_bytes
    for shape in ((64,), (192,), (3, 64), (2, 3, 128), (0, 64), (5, 0), (2, 1, 1, 64)):
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        packed = tbq.quantize(x, name)
        assert packed.dtype == np.uint8 and packed.shape == (*shape[:-1], shape[-1] // 64 * size)
        assert tbq.dequantize(packed, name, shape).shape == shape
        assert tbq.row_bytes(shape[-1], name) == packed.shape[-1]


@pytest.mark.parametrize("name", NAMES)
def test_float16(name):
    # every finite f16: in order, so that a block has one magnitude, and in random order
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)][: 63488 // 64 * 64]
    for x in (every, np.random.default_rng(5).permutation(every), np.float16(np.nan) * every):
        packed = tbq.quantize(x, name)
        assert np.array_equal(packed, tbq.quantize(x.astype(np.float32), name))
        wide = tbq.dequantize(packed, name, x.shape)
        narrow = tbq.dequantize(packed, name, x.shape, np.float16)
        assert narrow.dtype == np.float16
        with np.errstate(over="ignore"):
            expected = wide.astype(np.float16)
        assert np.array_equal(narrow, expected, equal_nan=True)


def test_layouts_are_copied():
    x = np.random.default_rng(2).standard_normal((128, 128)).astype(np.float32)
    expected = tbq.quantize(np.ascontiguousarray(x.T), "tbq4_0")
    assert np.array_equal(tbq.quantize(x.T, "tbq4_0"), expected)
    strided = np.zeros((128, 256), np.float32)
    strided[:, ::2] = x.T
    assert np.array_equal(tbq.quantize(strided[:, ::2], "tbq4_0"), expected)
    assert np.array_equal(tbq.quantize(x.T.astype(np.float32, order="F"), "tbq4_0"), expected)
    reverse = np.ascontiguousarray(expected[:, ::-1])[:, ::-1]
    assert np.array_equal(tbq.dequantize(reverse, "tbq4_0", x.shape), tbq.dequantize(expected, "tbq4_0", x.shape))


def test_misaligned_bytes_and_read_only_memory():
    x = np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32)
    x.flags.writeable = False
    packed = tbq.quantize(x, "tbq3_0").tobytes()
    expected = tbq.dequantize(packed, "tbq3_0", (2, 64))
    for data in (bytearray(packed), memoryview(packed), memoryview(b"x" + packed)[1:], np.frombuffer(packed, np.uint8)):
        assert np.array_equal(tbq.dequantize(data, "tbq3_0", (2, 64)), expected)


def test_nothing_is_copied():
    """The library gets the array's own pointer."""
    from tbq import blocks

    x = np.zeros((2, 64), np.float32)
    assert int(ffi.cast("uintptr_t", blocks._pointer("float[]", x))) == x.ctypes.data
    data = b"\0" * 34
    assert blocks._bytes_of(data).ctypes.data == int(ffi.cast("uintptr_t", ffi.from_buffer(data)))


def test_threads():
    """Calls from several threads at once give the same result as one call, and other threads run meanwhile."""
    x = np.random.default_rng(9).standard_normal((4096, 1024)).astype(np.float32)
    expected = {name: tbq.quantize(x, name) for name in NAMES}
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda name: (name, tbq.quantize(x, name)), NAMES * 2))
    assert all(np.array_equal(packed, expected[name]) for name, packed in results)

    done, ticks = threading.Event(), 0
    worker = threading.Thread(target=lambda: (tbq.quantize(x, "tbq4_0"), done.set()))
    worker.start()
    while not done.is_set():
        ticks += 1
    worker.join()
    # If the call held the GIL, this loop would run only once or twice; an iteration takes nanoseconds.
    assert ticks > 1000


# --- errors -----------------------------------------------------------------------------------------------------

X = np.zeros((2, 64), np.float32)
PACKED = np.zeros((2, 34), np.uint8)

ERRORS = [
    (lambda: tbq.quantize(X, "q4_0"), "type 'q4_0' is not one of tbq2_0, tbq3_0, tbq4_0"),
    (lambda: tbq.quantize(X, 644), "type 644 is not one of tbq2_0, tbq3_0, tbq4_0"),
    (lambda: tbq.quantize(X.astype(np.float64), "tbq4_0"), "array has dtype float64; it must be float32 or float16"),
    (lambda: tbq.quantize(X.astype(">f4"), "tbq4_0"), "array has dtype >f4; it must be float32 or float16"),
    (lambda: tbq.quantize([[1, 2]], "tbq4_0"), "array has dtype int64; it must be float32 or float16"),
    (lambda: tbq.quantize(np.float32(1), "tbq4_0"), "array has no axis; its last axis must be a multiple of 64"),
    (
        lambda: tbq.quantize(np.zeros((2, 80), np.float32), "tbq4_0"),
        "array has shape (2, 80): its last axis is 80; it must be a multiple of 64",
    ),
    (lambda: tbq.dequantize(PACKED, "tbq1_0", (2, 64)), "type 'tbq1_0' is not one of tbq2_0, tbq3_0, tbq4_0"),
    (lambda: tbq.dequantize(PACKED, "tbq4_0", (2, 64), np.float64), "dtype is float64; it must be float32 or float16"),
    (
        lambda: tbq.dequantize(PACKED, "tbq4_0", (2, 80)),
        "shape is (2, 80): its last axis is 80; it must be a multiple of 64",
    ),
    (
        lambda: tbq.dequantize(PACKED, "tbq4_0", (2, -64)),
        "shape is (2, -64); it must have at least one axis and none below 0",
    ),
    (lambda: tbq.dequantize(PACKED, "tbq4_0", ()), "shape is (); it must have at least one axis and none below 0"),
    (lambda: tbq.dequantize(PACKED, "tbq4_0", (2.0, 64)), "shape is (2.0, 64); it must be a tuple of integers"),
    (lambda: tbq.dequantize(PACKED, "tbq4_0", None), "shape is None; it must be a tuple of integers"),
    (lambda: tbq.dequantize(PACKED, "tbq4_0", (3, 64)), "data has 68 bytes; tbq4_0 of shape (3, 64) has 102"),
    (lambda: tbq.dequantize(b"", "tbq2_0", 64), "data has 0 bytes; tbq2_0 of shape (64,) has 18"),
    (lambda: tbq.dequantize(PACKED.astype(np.int8), "tbq4_0", (2, 64)), "data has dtype int8; it must be uint8"),
    (lambda: tbq.dequantize("text", "tbq4_0", (2, 64)), "data is a str; it must be bytes-like or a uint8 array"),
    (lambda: tbq.rotate(X.astype(np.float16)), "array has dtype float16; it must be float32"),
    (lambda: tbq.rotate(X[:, :60]), "array has shape (2, 60): its last axis is 60; it must be a multiple of 64"),
    (lambda: tbq.unrotate(np.float32(1)), "array has no axis; its last axis must be a multiple of 64"),
    (lambda: tbq.row_bytes(100, "tbq4_0"), "n is 100; it must be a multiple of 64"),
    (lambda: tbq.row_bytes(-64, "tbq4_0"), "n is -64; it must be a multiple of 64"),
    (lambda: tbq.row_bytes("64", "tbq4_0"), "n is '64'; it must be a multiple of 64"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[message for _, message in ERRORS])
def test_error(call, message):
    with pytest.raises(tbq.TBQError, match=f"^{re.escape(message)}$") as error:
        call()
    assert isinstance(error.value, ValueError)


# --- symbols ----------------------------------------------------------------------------------------------------


def exported(path, *options):
    out = subprocess.run(
        ["nm", *options, "--extern-only", "--defined-only", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1] for line in out.splitlines() if len(line.split()) == 3}


def test_the_choice_of_kernels_is_fast():
    """llama.cpp asks for the kernels at each row.

    CPUID would leave a virtual machine, which took 4.5 us where it was measured.  The fastest of many short runs is the
    time without other processes.
    """
    source, target = ffi.new("uint8_t[34]"), ffi.new("float[64]")

    def run():
        start = time.perf_counter()
        for _ in range(100):
            lib.tbq_dequantize(lib.TBQ_TYPE_TBQ4_0, source, target, 64)
        return (time.perf_counter() - start) / 100

    assert min(run() for _ in range(50)) < 2e-6


def test_symbols_have_the_prefix(build_dir):
    symbols = exported(build_dir / "libtbq.a")
    assert "tbq_quantize" in symbols
    assert {s for s in symbols if not s.lstrip("_").startswith("tbq_")} == set()


@pytest.mark.skipif(sys.platform != "linux", reason="nm -D is about ELF")
def test_module_exports_one_symbol():
    import tbq._ffi

    assert exported(tbq._ffi.__file__, "-D") == {"PyInit__ffi"}
