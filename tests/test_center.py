# SPDX-License-Identifier: MIT
"""Centered keys: attention stays the same, quantized keys get better, and nothing wrong is accepted."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tbq
from llama_tools import ENV, THREADS, Divergence, Server, python_text, run, tiny_llama, tiny_mla, write_gguf
from tbq.kv_cache.calibrate import Scratch, calibrate, center_file_for, center_of_model
from tbq.kv_cache.center_file import Center, _hash, fingerprint, read_center
from tbq.kv_cache.settings import calibration_context
from test_plan import attention, gemma2, gemma3, gemma3n, gemma4, gpt_oss, lfm2, mamba, openelm, write_model

HERE = Path(__file__).parent


# -- the mathematics, on tiny models of each kind ----------------------------------------------------------------------


def biased(path, arch="qwen2", size=64, layers=2, **fields):
    """Keys with biases as large as the keys. Their mean is large, because RoPE hardly changes slow channels."""
    biases = {f"attn_{x}.bias": (n * size,) for x, n in (("q", 2), ("k", 1), ("v", 1))}
    write_model(
        path,
        arch,
        layers,
        lambda i: attention(2, 1, size, 2 * size) | biases,
        embd=2 * size,
        heads=2,
        kv_heads=1,
        size=size,
        **fields,
    )
    import gguf

    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith("attn_k.bias"):
            tensor.data[:] = np.random.default_rng(1).standard_normal(tensor.data.shape)
    reader.data.flush()
    return path


def partial_rope(path):
    """RoPE on half of each head."""
    return tiny_llama(path, 64, arch="stablelm", rope=32)


def yarn(path):
    return biased(
        path, rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__original_context_length=64
    )


def fused_layer_with_biases(i):
    """A layer of gpt2 and of bloom."""
    return {
        "attn_norm.bias": (128,),
        "attn_qkv.weight": (384, 128),
        "attn_qkv.bias": (384,),
        "attn_output.weight": (128, 128),
        "attn_output.bias": (128,),
        "ffn_norm.bias": (128,),
        "ffn_up.bias": (64,),
        "ffn_down.bias": (128,),
        "ffn_gate.weight": None,
    }


def no_rope(path):
    """Positions are added to the embeddings, as in gpt2."""

    return write_model(
        path,
        "gpt2",
        2,
        fused_layer_with_biases,
        tied=True,
        more={"position_embd.weight": (4096, 128), "output_norm.bias": (128,)},
        attention__layer_norm_epsilon=1e-5,
    )


def alibi(path):
    """bloom: biases by distance (ALiBi) instead of RoPE."""

    return write_model(
        path,
        "bloom",
        2,
        fused_layer_with_biases,
        tied=True,
        more={"token_embd_norm.weight": (128,), "token_embd_norm.bias": (128,), "output_norm.bias": (128,)},
        attention__layer_norm_epsilon=1e-5,
    )


def m_rope(path):
    return biased(path, "qwen2vl", rope__dimension_sections=[8, 12, 12, 0], rope__dimension_count=64)


EXACT = {
    "llama": lambda path: tiny_llama(path, 64, heads=4, kv_heads=2),
    "llama-h80": lambda path: tiny_llama(path, 80),
    "K biases": biased,
    "partial RoPE": partial_rope,
    "YaRN": yarn,
    "no RoPE": no_rope,
    "ALiBi": alibi,
    "M-RoPE": m_rope,
    "windows": gemma3,
    "windows of other heads, shared caches": gemma4,
    "layers without a cache": gemma3n,
    "convolutions": lfm2,
    "heads by layer": openelm,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that maps a maker of models to the file."""
    folder, files = tmp_path_factory.mktemp("center"), {}

    def get(make, name):
        if name not in files:
            files[name] = make(folder / f"{len(files)}.gguf")
        return files[name]

    return get


class Logits:
    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def __call__(self, model, status=0, **spec):
        self.count += 1
        wish, out = self.folder / f"{self.count}.json", self.folder / f"{self.count}.npy"
        wish.write_text(
            json.dumps({"model": str(model), **{k: str(v) if isinstance(v, Path) else v for k, v in spec.items()}})
        )
        done = subprocess.run(
            [sys.executable, HERE / "center_logits.py", wish, out], capture_output=True, text=True, env=ENV, timeout=180
        )
        assert done.returncode == status, done.stderr[-3000:]
        self.log = done.stderr
        return np.load(out) if out.exists() else None


@pytest.fixture
def logits(tmp_path):
    return Logits(tmp_path)


def difference(a, b):
    """The mean square of the difference, relative to a's variance."""
    assert np.isfinite(a).all() and np.isfinite(b).all() and a.std() > 0
    return float(np.square(a - b).mean() / a.var())


def assert_same(a, b, nudged):
    """Equal up to the noise of f32, which random models amplify, some of them a lot.

    The measure of this noise is the same model with its weights changed by one unit in the last place.
    """
    noise = difference(a, nudged)
    assert 0 < noise < 1e-3
    assert difference(a, b) < 10 * noise


def nudge(model):
    """A copy of a model in which every weight of the matrices is changed by about the last bit."""
    path = model.with_suffix(".nudged.gguf")
    if not path.exists():
        import gguf

        shutil.copy(model, path)
        reader, rng = gguf.GGUFReader(path, "r+"), np.random.default_rng(5)
        for tensor in reader.tensors:
            if len(tensor.shape) > 1:
                tensor.data[:] *= 1 + rng.choice([-1, 1], tensor.data.shape) * 2.0**-23
        reader.data.flush()
    return path


@pytest.mark.parametrize("kind", EXACT)
def test_attention_does_not_notice(kind, made, logits, tmp_path):
    model, center = made(EXACT[kind], kind), tmp_path / "center.gguf"
    logits(model, measure=center)
    assert max(read_center(center).shares.values()) > 0.005  # the mean that is subtracted is not zero
    plain, nudged = logits(model, flash=False), logits(nudge(model), flash=False)
    assert_same(plain, logits(model, flash=False, center=center), nudged)
    assert "keys are stored minus their means" in logits.log
    # and it is subtracted: 4-bit keys change
    if "h80" not in kind:
        assert difference(logits(model, type_k="q4_0"), logits(model, type_k="q4_0", center=center)) > 100 * difference(
            plain, nudged
        )


@pytest.mark.parametrize("kind", ["llama", "K biases", "partial RoPE", "YaRN", "windows", "no RoPE"])
def test_shift(kind, made, logits, tmp_path):
    """Keys that move to other positions: the mean is added, RoPE turns them, the mean is subtracted."""
    model, center = made(EXACT[kind], kind), tmp_path / "center.gguf"
    logits(model, measure=center)
    for type_k in ("f32", "f16"):
        plain = logits(model, flash=False, shift=16, type_k=type_k)
        moved = logits(model, flash=False, shift=16, type_k=type_k, center=center)
        if type_k == "f32":
            assert_same(plain, moved, logits(nudge(model), flash=False, shift=16))
            assert difference(plain[96:], logits(model, flash=False, center=center)[96:]) > 1e-3
        else:
            assert difference(plain, moved) < 1e-3


def test_shift_of_quantized_keys(made, logits, tmp_path):
    """Shifted 4-bit keys are at least as near to f32's with centering as without."""
    model, center = made(biased, "K biases"), tmp_path / "center.gguf"
    logits(model, measure=center)
    exact = logits(model, shift=16)
    for type_k in ("tbq4_0", "q4_0", "q8_0"):
        plain, centered = (
            difference(exact[96:], logits(model, shift=16, type_k=type_k, center=c)[96:]) for c in (None, center)
        )
        assert centered < plain


@pytest.mark.parametrize("type_k", ["tbq4_0", "tbq3_0", "tbq2_0"])
@pytest.mark.parametrize("centered", [False, True])
def test_keys_that_stay_are_not_written_again(type_k, centered, made, logits, tmp_path):
    """Two of 96 tokens move, so at most two rows of each layer change."""
    model, center = made(biased, "K biases"), tmp_path / "center.gguf"
    logits(model, measure=center)
    changed = logits(model, type_k=type_k, center=center if centered else None, wander=4)
    layers, row = 2, {"tbq4_0": 34, "tbq3_0": 26, "tbq2_0": 18}[type_k]
    assert 0 < len(changed) <= layers * 2 * row


@pytest.mark.parametrize("unified", [True, False])
def test_sequences(unified, made, logits, tmp_path):
    model, center = made(biased, "K biases"), tmp_path / "center.gguf"
    logits(model, measure=center)
    shape = {"sequences": 3, "unified": unified, "tokens": 40}
    exact = logits(model, flash=False, **shape)
    assert_same(exact, logits(model, flash=False, center=center, **shape), logits(nudge(model), flash=False, **shape))
    for type_k in ("tbq4_0", "q8_0"):  # and SET_ROWS of the tbq types takes rows of several streams
        plain, centered = (difference(exact, logits(model, type_k=type_k, center=c, **shape)) for c in (None, center))
        assert centered < plain


# -- attention that sees more of a key than softmax does ---------------------------------------------------------------


def edited(path, change):
    """A model whose tensors change(name, data) changes in place."""
    import gguf

    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        change(tensor.name, tensor.data)
    reader.data.flush()
    return path


SLOW = {"rope__freq_base": 1e12}  # few channels turn within a test, so the mean of a key's constant part is most of it


def with_large_means(path):
    """All embeddings get a constant, five times the rest, so that keys have a large mean."""
    constant = 5 * np.random.default_rng(3).standard_normal(4096)

    def change(name, data):
        if name == "token_embd.weight":
            data[:] += data.std() * constant[: data.shape[1]]
        elif "attn_q" in name and data.ndim > 1:  # attention matters
            data[:] *= 2
        elif name.endswith("attn_sinks.weight"):
            data[:] = 1.5

    return edited(path, change)


def sinks(path):
    return with_large_means(gpt_oss(path, expert_used_count=2, **SLOW))  # all, so that no error chooses others


def soft_cap(path):
    return with_large_means(gemma2(path, attn_logit_softcapping=3.0, **SLOW))


def neither(path):
    return with_large_means(biased(path, **SLOW))


def soft_cap_without_flash_attention(path):
    """grok, for which llama.cpp has no flash attention."""
    experts = {
        f"ffn_{x}_exps.weight": s for x, s in (("gate", (2, 64, 128)), ("up", (2, 64, 128)), ("down", (2, 128, 64)))
    }
    other = {
        "attn_output_norm.weight": (128,),
        "layer_output_norm.weight": (128,),
        "ffn_gate_inp.weight": (2, 128),
        **{f"ffn_{x}.weight": None for x in ("gate", "up", "down")},
    }
    return with_large_means(
        write_model(
            path,
            "grok",
            2,
            lambda i: attention(2, 1, 64) | experts | other,
            kv_heads=1,
            size=64,
            rope__dimension_count=64,
            expert_count=2,
            expert_used_count=2,
            attn_logit_softcapping=3.0,
            attention__output_scale=0.125,
            embedding_scale=1.0,
            **SLOW,
        )
    )


def latent(path):
    return with_large_means(tiny_mla(path))


# how each is read: the type of values, and whether flash attention is on
WHOLE = {
    "sinks": (sinks, "f16", True),
    "sinks, products": (sinks, "f16", False),
    "soft-cap": (soft_cap, "f16", True),
    "soft-cap, products": (soft_cap, "f16", False),
    "soft-cap, grok": (soft_cap_without_flash_attention, "f16", False),
    "latent": (latent, None, True),
    "control": (neither, "f16", True),
}


def any_center(source, target):
    """A center with other means: as large as these, but of no model."""
    rng = np.random.default_rng(2)

    def change(fields, tensors):
        for name, data in tensors.items():
            if name.endswith("attn_k.center"):
                data[:] = rng.standard_normal(data.shape) * np.sqrt(np.square(data).mean())

    return rewrite(source, target, change)


def divergence(exact, other):
    """Mean KL divergence of what the logits predict."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), 1)[:, None] for x in (exact, other))
    return float((np.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.parametrize("split", [96, 7, 1])
@pytest.mark.parametrize("kind", WHOLE)
def test_any_center_is_exact(kind, split, made, logits, tmp_path):
    """A center, even a wrong one, leaves an error of the rows' bits.

    With flash attention all rows are read in 8 bits.  Products of keys and queries read packed rows, so there the bound
    is ten times what 4 bits lose.
    """
    make, v, flash = WHOLE[kind]
    model, center = made(make, kind.split(",")[0] + make.__name__), tmp_path / "center.gguf"
    logits(model, measure=center)
    plain = logits(model, flash=False)

    def error(**spec):
        cache = {"type_k": "tbq4_0", "type_v": v or "tbq4_0", "recent": 400, "flash": flash, "split": split}
        return difference(plain, logits(model, **cache, **spec))

    whole, measured = error(), error(center=center)
    assert "keys are stored minus their means" in logits.log
    arbitrary = error(center=any_center(center, tmp_path / "any.gguf"))
    assert measured < whole and arbitrary < 10 * whole, (whole, measured, arbitrary)
    if flash:
        assert max(whole, arbitrary) < 2e-5  # 8 bits; measured: 6e-6


@pytest.mark.parametrize("kind", WHOLE)
def test_large_means_are_harmless(kind, made, logits, tmp_path):
    """At most a third of the divergence, with every row in so few bits."""
    make, v, flash = WHOLE[kind]
    model, center = made(make, kind.split(",")[0] + make.__name__), tmp_path / "center.gguf"
    logits(model, measure=center)
    plain = logits(model, flash=False)
    for k in ("tbq4_0", "tbq3_0"):
        cache = {"type_k": k, "type_v": v or k, "flash": flash}
        whole, centered = (divergence(plain, logits(model, **cache, center=c)) for c in (None, center))
        assert centered < whole / 3, (k, whole, centered)


@pytest.mark.parametrize("kind", ["sinks", "soft-cap", "latent"])
@pytest.mark.parametrize("k", ["f32", "f16", "q8_0"])
def test_keys_of_other_types_stay_whole(kind, k, made, logits, tmp_path):
    model, center = made(WHOLE[kind][0], kind + WHOLE[kind][0].__name__), tmp_path / "center.gguf"
    logits(model, measure=center)
    cache = {"type_k": k, "type_v": k}
    plain = logits(model, **cache)
    assert (logits(model, **cache, center=center) == plain).all()
    assert re.search(f"keys of type {k} are not centered where there are", logits.log)
    assert "their means: " not in logits.log


@pytest.mark.parametrize("kind", ["sinks", "soft-cap"])  # llama.cpp cannot shift quantized latent vectors on a CPU
def test_shift_of_keys_that_attention_gets_the_mean_of(kind, made, logits, tmp_path):
    model, center = made(WHOLE[kind][0], kind + WHOLE[kind][0].__name__), tmp_path / "center.gguf"
    logits(model, measure=center)
    exact = logits(model, shift=16)
    cache = {"type_k": "tbq4_0", "type_v": WHOLE[kind][1] or "tbq4_0", "shift": 16}
    whole, centered = (difference(exact[96:], logits(model, **cache, center=c)[96:]) for c in (None, center))
    assert centered < whole


@pytest.mark.parametrize("make, why", [(gemma2, "a soft-cap"), (gpt_oss, "attention sinks"), (tiny_mla, "latent")])
def test_python_centers_tbq_keys_only(make, why, made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, said = made(make, make.__name__), []
    assert center_file_for(model, "q8_0", 512, True, [], said.append, Scratch()) is None
    assert said[0].startswith(f"keys are not centered: with {why}") and len(said) == 1
    path = center_file_for(model, "tbq4_0", 512, True, [], said.append, Scratch())
    assert read_center(path).model == fingerprint(model)


# -- what must not get in ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_center(demo_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.center.gguf"
    calibrate(demo_model, path, 1024, chunks=4)
    return path


def refused(bin_dir, model, center, *args):
    done = run(
        bin_dir / "llama-perplexity",
        "-m",
        model,
        "-f",
        __file__,
        "-c",
        256,
        "--cache-center",
        center,
        "-ctk",
        "tbq4_0",
        "-ctv",
        "tbq4_0",
        *THREADS,
        *args,
        ok=False,
    )
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_another_model_or_rope(bin_dir, demo_model, demo_center, made, logits):
    model = made(biased, "K biases")
    logits(model, center=demo_center, status=3)
    assert "was measured on another model (llama, tensors" in logits.log and "this one is qwen2" in logits.log
    for options in (
        ("--rope-freq-base", 50000),
        ("--rope-freq-scale", 0.5),
        ("--rope-scaling", "yarn", "--rope-scale", 2),
    ):
        assert "was measured with another RoPE" in refused(bin_dir, demo_model, demo_center, *options)


def test_a_model_with_other_weights(demo_model, tmp_path):
    """A fine-tuned model has the same shapes. The first bytes of a tensor differ."""
    other = shutil.copy(demo_model, tmp_path / "other.gguf")
    tensor = next(t for t in tbq.open_gguf(other).tensors if t.name == "blk.7.attn_k.weight")
    with open(other, "r+b") as file:
        file.seek(tensor.offset)
        byte = file.read(1)[0]
        file.seek(tensor.offset)
        file.write(bytes([byte ^ 1]))
    assert fingerprint(other) != fingerprint(demo_model)


def test_fingerprints_agree(demo_model, demo_center, made, logits, tmp_path):
    """The fingerprints of Python and of llama.cpp agree, for several types of weights and for a split model."""
    assert read_center(demo_center).model == fingerprint(demo_model)
    model = made(gemma3, "windows")
    logits(model, measure=tmp_path / "center.gguf")
    assert read_center(tmp_path / "center.gguf").model == fingerprint(model)


def test_a_split_has_the_fingerprint_of_the_whole(bin_dir, demo_model, demo_center, logits, tmp_path):
    run(bin_dir / "llama-gguf-split", "--split-max-tensors", 100, demo_model, tmp_path / "part")
    assert fingerprint(tmp_path / "part-00001-of-00003.gguf") == fingerprint(demo_model)
    logits(tmp_path / "part-00001-of-00003.gguf", center=demo_center, tokens=8)


@pytest.mark.parametrize("load", ["relative", "stream"])
def test_fingerprint_after_the_model_was_loaded(load, made, logits, tmp_path):
    """It is computed when a center is set: by then the folder may be another, or the FILE closed."""
    model = shutil.copy(made(gemma3, "windows"), tmp_path / "model.gguf")
    logits(model, measure=tmp_path / "center.gguf")
    plain = logits(model, center=tmp_path / "center.gguf", tokens=8)
    assert (logits(model, center=tmp_path / "center.gguf", tokens=8, load=load) == plain).all()


def test_a_model_whose_file_is_gone(made, logits, tmp_path):
    """A center is refused by name; without one nobody reads the file a second time."""
    model = shutil.copy(made(gemma3, "windows"), tmp_path / "model.gguf")
    logits(model, measure=tmp_path / "center.gguf")
    plain = logits(model, tokens=8)
    copy = shutil.copy(model, tmp_path / "copy.gguf")
    assert (logits(copy, tokens=8, gone=True) == plain).all()
    logits(model, center=tmp_path / "center.gguf", gone=True, status=3)
    assert f"the model's file {model} cannot be read again: " in logits.log


def rewrite(source, target, change, rehash=True):
    """A center with changed entries and tensors, and with a new hash unless the hash is to stay."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "none")
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith(("cache_center", "general.type"))
    }
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    change(fields, tensors)
    if rehash:
        layers = fields["cache_center.layers"]
        means, energies = (
            {il: np.atleast_2d(tensors[f"blk.{il}.{what}"]) for il in layers if f"blk.{il}.{what}" in tensors}
            for what in ("attn_k.center", "attn_q.energy")
        )
        center = Center(
            *(fields[f"cache_center.{key}"] for key in ("model", "architecture", "n_ctx", "n_tokens", "hash")),
            means,
            energies,
            dict(zip(layers, fields["cache_center.share"])),
        )
        fields["cache_center.hash"] = _hash(center, fields["cache_center.rope"], fields["cache_center.rope_factors"])
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            if value and isinstance(value[0], int):
                writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)
            else:
                writer.add_array(name, value)
        elif name.endswith("n_tokens"):
            writer.add_uint64(name, value)
        else:
            writer.add_uint32(name, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_damage(made, logits, tmp_path):
    """After bytes are changed anywhere or cut off, Python and llama.cpp refuse the file, or it is the same center.

    Nothing crashes.
    """
    model, center = made(biased, "K biases"), tmp_path / "center.gguf"
    logits(model, measure=center)
    data, rng, bad = center.read_bytes(), np.random.default_rng(0), tmp_path / "bad.gguf"
    good = read_center(center)
    harmless = 0
    for i in range(400):
        broken = bytearray(data)
        if i % 4 == 0:
            broken = broken[: rng.integers(0, len(data))]
        else:
            broken[rng.integers(0, len(data))] ^= 1 << rng.integers(0, 8)
        bad.write_bytes(broken)
        try:
            assert read_center(bad).hash == good.hash
            harmless += 1  # padding, or an entry that nothing reads
        except tbq.TBQError as error:
            assert "\n" not in str(error)
        if i % 40 < 2:
            logits(model, center=bad, tokens=8, status=logits_status(bad))
    assert harmless < 100


def logits_status(path):
    try:
        read_center(path)
        return 0
    except tbq.TBQError:
        return 3


REFUSED = {
    "tensor missing": (False, "the means of layer 1 are missing"),
    "hash": (False, "its contents have another hash"),
    "version": (False, "is of a newer version"),
    "key": (False, r"\(cache_center.rope is missing\)"),
    "layer missing": (True, "has no means for layer 1"),
    "layer too many": (True, "has means for 3 layers, the cache 2"),
    "heads": (True, "layer 1 has 2 heads of 32 there and 1 of 64 here"),
    "nan": (True, "the means of layer 1 are not finite"),
    "negative energy": (True, "the means of layer 1 are not finite"),
    "rope": (True, "was measured with another RoPE"),
    "model": (True, "was measured on another model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_named_refusals(what, made, logits, tmp_path):
    model, center = made(biased, "K biases"), tmp_path / "center.gguf"
    logits(model, measure=center)
    rehash, why = REFUSED[what]
    mean, energy = (f"blk.1.attn_{x}" for x in ("k.center", "q.energy"))

    def change(fields, tensors):
        if what == "tensor missing":
            del tensors[mean]
        elif what == "hash":
            fields["cache_center.hash"] = "0" * 64
        elif what == "version":
            fields["cache_center.version"] = 2
        elif what == "key":
            del fields["cache_center.rope"]
        elif what == "layer missing":
            n = len(fields["cache_center.rope"]) // 2
            for key, count in (("layers", 1), ("share", 1), ("rope", n), ("rope_factors", 1)):
                fields[f"cache_center.{key}"] = fields[f"cache_center.{key}"][:count]
            del tensors[mean], tensors[energy]
        elif what == "layer too many":
            n = len(fields["cache_center.rope"]) // 2
            for key, count in (("share", 1), ("rope", n), ("rope_factors", 1)):
                fields[f"cache_center.{key}"] += fields[f"cache_center.{key}"][:count]
            fields["cache_center.layers"].append(2)
            tensors |= {"blk.2.attn_k.center": tensors[mean], "blk.2.attn_q.energy": tensors[energy]}
        elif what == "heads":
            tensors |= {name: tensors[name].reshape(2, 32) for name in (mean, energy)}
        elif what == "nan":
            tensors[mean].reshape(-1)[3] = math.nan
        elif what == "negative energy":
            tensors[energy].reshape(-1)[3] = -1
        elif what == "rope":
            fields["cache_center.rope"][0] *= 2
        elif what == "model":
            fields["cache_center.model"] = "0" * 64

    logits(model, center=rewrite(center, tmp_path / "same.gguf", lambda fields, tensors: None), tokens=8)
    logits(model, center=rewrite(center, tmp_path / "bad.gguf", change, rehash), status=3)
    assert re.search(why, logits.log), logits.log[-1000:]


def test_sizes_that_no_memory_holds(made, logits, tmp_path):
    """A flipped bit makes a shape huge. The file is refused before memory is allocated."""
    import gguf

    model, center, bad = made(biased, "K biases"), tmp_path / "center.gguf", tmp_path / "bad.gguf"
    logits(model, measure=center)
    data = bytearray(center.read_bytes())
    at = data.index(b"blk.1.attn_k.center") + len("blk.1.attn_k.center") + 4
    assert int.from_bytes(data[at : at + 8], "little") == 64
    for bit in (20, 36, 44):
        data[at : at + 8] = (64 | 1 << bit).to_bytes(8, "little")
        bad.write_bytes(data)
        logits(model, center=bad, status=3)
        with pytest.raises(tbq.TBQError):
            read_center(bad)
    assert gguf.GGUFReader(center).tensors


def test_no_such_file(bin_dir, demo_model, demo_center, tmp_path):
    text = python_text(tmp_path / "text")
    for path in (tmp_path / "none.gguf", text, demo_model):
        log = refused(bin_dir, demo_model, path)
        assert re.search(f"llama_set_cache_center: {re.escape(str(path))}", log), log[-1000:]


def test_states_know_their_center(bin_dir, demo_model, demo_center, tmp_path):
    """A state with one center is not restored with another or none, nor the other way round."""
    args = ("-ctk", "tbq4_0", "-ctv", "tbq4_0", "--slot-save-path", tmp_path)
    other = tmp_path / "other.gguf"
    calibrate(demo_model, other, 2048, chunks=2)
    hashes = {}
    for name, center in (("none", None), ("a", demo_center), ("b", other)):
        with Server(
            bin_dir, demo_model, tmp_path / "log", *args, *(["--cache-center", center] if center else [])
        ) as server:
            server.complete("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,", n=4)
            assert server.slot("save", f"{name}.bin")[0] == 200
            hashes[name] = read_center(center).hash[:12] if center else "none"
            for there, saved in hashes.items():
                status, answer = server.slot("restore", f"{there}.bin")
                assert status == (200 if there == name else 400), answer
                if there != name:  # the answer says it, and not only the log
                    assert answer["error"]["message"].endswith(
                        "this state was saved with a different calibration file "
                        f"(hash {saved}; this context: {hashes[name]})"
                        + ("; --cache-center none loads it" if saved == "none" else "")
                    )
    # an invalid hash does not get into an answer
    data = bytearray((tmp_path / "b.bin").read_bytes())
    at = data.index(read_center(other).hash.encode())
    data[at : at + 4] = b"\xff\n\0\x80"
    (tmp_path / "b.bin").write_bytes(data)
    with Server(bin_dir, demo_model, tmp_path / "log", *args, "--cache-center", other) as server:
        status, answer = server.slot("restore", "b.bin")
        assert status == 400 and answer["error"]["message"].endswith(
            "the hash of the calibration file that this state names is corrupt"
        )


def fall_asleep(server, times):
    """Waits until a server with --sleep-idle-seconds 1 sleeps."""
    end = time.monotonic() + 60
    while server.written.count("server is entering sleeping state") < times:
        assert server.process.poll() is None and time.monotonic() < end, server.written[-2000:]
        time.sleep(0.1)


def test_a_server_that_wakes_up_has_its_center(bin_dir, demo_model, demo_center, tmp_path):
    """The file is read once. Changes of the file while the server sleeps make no difference."""
    file, prompt = tmp_path / "center.gguf", "1, 2, 3, 4, 5, 6, 7, 8,"
    shutil.copyfile(demo_center, file)
    other = tmp_path / "other.gguf"
    calibrate(demo_model, other, 512, chunks=1)
    args = ("-ctk", "tbq4_0", "-ctv", "tbq4_0", "--cache-center", file, "--sleep-idle-seconds", 1)
    with Server(bin_dir, demo_model, tmp_path / "log", *args) as server:
        first = server.complete(prompt, n=8)["content"]
        for times, change in enumerate(
            (lambda: other.replace(file), file.unlink, lambda: file.write_bytes(b"GGUF")), 1
        ):
            fall_asleep(server, times)
            change()
            assert server.complete(prompt, n=8)["content"] == first
        centers = re.findall(r"keys are stored minus their means: .* hash (\w+)", server.log)
    assert centers == [read_center(demo_center).hash[:12]] * 4


def test_a_server_that_cannot_wake_up_says_so(bin_dir, tmp_path):
    """The model file is gone: the server answers, and ends without a crash."""
    model = tiny_llama(tmp_path / "model.gguf", 64)
    with Server(bin_dir, model, tmp_path / "log", "--sleep-idle-seconds", 1) as server:
        server.complete("1, 2,", n=1)
        fall_asleep(server, 1)
        model.unlink()
        status, answer = server.request("/completion", {"prompt": "1, 2,", "n_predict": 1})
        assert status == 500 and "without having woken up" in answer["error"]["message"], answer
        assert server.process.wait(20) == 1
        assert re.search("failed to reload model after sleeping", server.log)


def test_a_full_disk_costs_no_center(demo_model, bin_dir, demo_center, tmp_path):
    """llama-cache-center replaces a good file, but there is no room for a new file: the old file stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = -(-demo_center.stat().st_size * 3 // 2 // 4096) * 4096
    if (
        done := subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, text=True
        )
    ).returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        shutil.copyfile(demo_center, disk / "center.gguf")
        done = run(
            bin_dir / "llama-cache-center",
            "-m",
            demo_model,
            "-f",
            python_text(tmp_path / "text"),
            "-c",
            512,
            "--chunks",
            1,
            "-o",
            disk / "center.gguf",
            *THREADS,
            ok=False,
        )
        assert done.returncode == 1 and f"error: {disk / 'center.gguf'} was not written" in done.stderr
        assert [p.name for p in disk.iterdir()] == ["center.gguf"]
        assert (disk / "center.gguf").read_bytes() == demo_center.read_bytes()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_calibration_is_deterministic(demo_model, demo_center, tmp_path):
    calibrate(demo_model, tmp_path / "again.gguf", 1024, chunks=4)
    assert (tmp_path / "again.gguf").read_bytes() == demo_center.read_bytes()


def test_what_it_says(demo_model, tmp_path):
    """The command prints a table by layer and length, and writes a file of a few KB and nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "tbq", "calibrate", demo_model, "--ctx", "2048", "--chunks", "8"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    rows = [[float(x) for x in line.split()] for line in done.stdout.splitlines() if re.match(r" +\d+ +\d", line)]
    assert len(rows) == 30 and all(
        len(row) == 5 and 0 < row[4] < row[1] < 1 for row in rows
    )  # a mean over a longer context keeps less
    assert [p.name for p in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.center.gguf"]
    center = read_center(next(tmp_path.iterdir()))
    assert (center.architecture, center.context, len(center.means)) == ("llama", 2048, 30)
    assert center.means[0].shape == center.energies[0].shape == (3, 64)
    assert [round(center.shares[i], 3) for i in range(30)] == [pytest.approx(row[4], abs=1e-3) for row in rows]


def test_the_mean_is_that_of_the_keys(made, logits, tmp_path):
    """A model whose keys are nothing but biases. The slow channels' stay."""
    model = made(lambda path: biased(path, rope__freq_base=1e12), "slow")
    import gguf

    reader = gguf.GGUFReader(model, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith("attn_k.weight"):
            tensor.data[:] = 0
    bias = next(t.data for t in reader.tensors if t.name == "blk.1.attn_k.bias").copy()
    reader.data.flush()
    logits(model, measure=tmp_path / "center.gguf")
    mean = read_center(tmp_path / "center.gguf").means[1][0]
    # NEOX pairs, 32 apart; the other pairs turn fully within the 104 tokens
    slow = [c for c in range(64) if c % 32 >= 8]
    np.testing.assert_allclose(mean[slow], bias[slow], atol=0.1)


@pytest.mark.parametrize(
    "arguments,why",
    [
        (["missing.gguf"], "missing.gguf"),
        (["MODEL", "--ctx", "0"], "at least 1"),
        (["MODEL", "--ctx", "4"], "too short"),
        (["MODEL", "--text", "short.txt"], "tokens"),
        (["MODEL", "-o", "MODEL"], "is the model itself"),
        (["MODEL", "--text", "short.txt", "-o", "short.txt"], "is the text itself"),
        (["MODEL", "-o", "none/x.gguf"], "not a folder"),
        (["MODEL", "-o", "."], "is a folder"),
        (["short.txt"], "short.txt"),
        (["MODEL", "--text", "none.txt"], "none.txt"),
        (["MODEL", "--text", "short.txt"], "text 'short.txt' is too short: it has 2 tokens, a chunk takes 128"),
        (["MODEL", "--text", "empty.txt"], "text 'empty.txt' is empty"),
        (["MODEL", "--text", "blank.txt"], "text 'blank.txt' is empty"),
        (["MODEL", "--text", "latin.txt"], "text 'latin.txt' is not UTF-8 (byte 3)"),
        (["MODEL", "--text", "."], "text '.' cannot be read (Is a directory)"),
    ],
)
def test_errors_are_one_line(arguments, why, demo_model, tmp_path):
    texts = {"short.txt": b"too short", "empty.txt": b"", "blank.txt": b" \n\t\n", "latin.txt": b"caf\xe9"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    command = [str(demo_model) if a == "MODEL" else a for a in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "tbq", "calibrate", *command], cwd=tmp_path, capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 2 and not done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert "error: " in line and why in line, done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == texts


def test_options_after_others(demo_model, tmp_path):
    """Options of llama.cpp follow --, after tbq's options."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tbq",
            "calibrate",
            demo_model,
            "--ctx",
            "1024",
            "--chunks",
            "1",
            "-o",
            "out.gguf",
            "--",
            "--rope-freq-base",
            "5000",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    calibrate(demo_model, tmp_path / "same.gguf", 1024, chunks=1, options=["--rope-freq-base", "5000"])
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_texts(demo_model, tmp_path):
    """The text can be bytes or a file."""
    (tmp_path / "text").write_bytes(b"Words and numbers, 123. " * 100)
    for name, text in (
        ("a", tmp_path / "text"),
        ("b", str(tmp_path / "text")),
        ("c", (tmp_path / "text").read_bytes()),
    ):
        calibrate(demo_model, tmp_path / name, 512, text=text, chunks=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    with pytest.raises(tbq.TBQError, match="the text is empty"):
        calibrate(demo_model, tmp_path / "d", 512, text=b"\n")


# -- what it is worth --------------------------------------------------------------------------------------------------


def test_quantized_keys_gain(bin_dir, demo_model, demo_center, tmp_path):
    """On a text unlike that of the calibration. docs/measurements/quality.md has figures for more text."""
    text = tmp_path / "text"
    text.write_text(
        "".join(
            path.read_text(encoding="utf-8", errors="replace") for path in sorted((HERE.parent / "docs").rglob("*.md"))
        )
    )
    divergence = Divergence(bin_dir, demo_model, text, tmp_path / "base", n_ctx=512, chunks=3)
    for k in ("tbq4_0", "tbq2_0", "q4_0"):
        plain, centered = (divergence(k, "f16", *args)["kld"] for args in ((), ("--cache-center", demo_center)))
        assert centered < (0.85 if k.startswith("tbq") else 0.95) * plain, (k, plain, centered)


# -- first use ---------------------------------------------------------------------------------------------------------


def test_kept_in_the_users_cache(made, tmp_path, monkeypatch):
    """A model and a length are measured once.

    A corrupt file is measured again.  If the folder cannot be written, there is no center.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        "tbq.kv_cache.calibrate.python_text", lambda: b"Words and numbers, 123. " * 400
    )  # each byte of a part; the whole file would take half a minute
    model, said = made(biased, "K biases"), []
    first = center_of_model(model, 1000, say=said.append)
    assert first.is_relative_to(tmp_path) and len(said) == 1 and model.name in said[0]
    assert center_of_model(model, 1024, say=said.append) == first and len(said) == 1
    # one center for a range of contexts
    assert center_of_model(model, 2048, say=said.append) == first and len(said) == 1
    longer = ["--rope-scaling", "yarn", "--rope-scale", "4"]  # 4096 tokens then mean 16384
    assert center_of_model(model, 16384, say=said.append) == first and len(said) == 1
    assert (
        read_center(center_of_model(model, 16384, longer, said.append)).context > read_center(first).context
        and len(said) == 2
    )
    assert center_of_model(model, 1024, ["--rope-freq-base", "123"], said.append) != first and len(said) == 3
    good = first.read_bytes()
    first.write_bytes(good[:-1])
    assert center_of_model(model, 1024, say=said.append) == first and first.read_bytes() == good and len(said) == 4
    rest = [], said.append, Scratch()
    assert center_file_for(model, "f16", 1024, True, *rest) is None and len(said) == 4
    assert center_file_for(model, "tbq4_0", 1024, False, *rest) is None
    assert center_file_for(model, "tbq4_0", 1024, first, *rest) == first
    with pytest.raises(tbq.TBQError):
        center_file_for(model, "tbq4_0", 1024, model, *rest)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def unusable(case, tmp_path, monkeypatch, request):
    """Makes the user's folder for caches unusable. The line then says why."""
    if case == "a file in its place":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        return "Not a directory"
    if case == "a folder of the system":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
        return "No such file or directory"
    if case == "full":
        monkeypatch.setenv("XDG_CACHE_HOME", str(request.getfixturevalue("small_disk")))
        return "No space left on device"
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    # the user has no entry in passwd; test_serve.py has such a user
    monkeypatch.setattr("os.path.expanduser", lambda path: path)

    def unknown():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", unknown)
    return "the user has no folder for caches"


@pytest.mark.parametrize("case", ["a file in its place", "a folder of the system", "full", "no home"])
def test_folder_that_cannot_be_used(case, made, tmp_path, monkeypatch, request):
    """The means are measured each time, into a folder that lasts as long as its user. One line says so."""
    monkeypatch.setattr("tbq.kv_cache.calibrate.python_text", lambda: b"Words and numbers, 123. " * 400)
    why = unusable(case, tmp_path, monkeypatch, request)
    model, said, before = made(biased, "K biases"), [], sorted(tmp_path.iterdir())
    for _ in range(2):
        scratch = Scratch()
        path = center_file_for(model, "tbq4_0", 1024, True, [], said.append, scratch)
        assert read_center(path).model == fingerprint(model)
        assert len(said) == 1 and why in said[0] and "at each start, because it cannot be kept" in said.pop()
        scratch.close()
        assert not path.parent.exists()
    path = center_file_for(model, "tbq4_0", 1024, True, [], said.append, Scratch())
    assert not path.parent.exists()  # the owner of this scratch is gone
    with pytest.raises(tbq.TBQError, match="cannot be kept"):
        center_of_model(model, 1024)
    assert sorted(tmp_path.iterdir()) == before


def test_disk_that_fills_up(made, small_disk, monkeypatch):
    """The message names the file, and no file is left."""
    monkeypatch.setattr("tbq.kv_cache.calibrate.python_text", lambda: b"Words and numbers, 123. " * 400)
    model = made(biased, "K biases")
    (small_disk / "other").write_bytes(bytes((1 << 20) - 8192))
    with pytest.raises(OSError) as error:
        calibrate(model, small_disk / "center.gguf", 1024)
    assert (error.value.strerror, error.value.filename) == ("No space left on device", str(small_disk / "center.gguf"))
    assert [path.name for path in small_disk.iterdir()] == ["other"]


# -- what the programs do by themselves --------------------------------------------------------------------------------


class Plain:
    """llama-perplexity as a user starts it: --cache-center has its default, and the folder for caches is empty."""

    def __init__(self, bin_dir, folder):
        self.program, self.folder, self.runs = bin_dir / "llama-perplexity", folder, 0
        self.caches, self.text = folder / "caches", folder / "text"
        self.text.write_text("Words and numbers, 123. " * 100)
        self.env = {name: value for name, value in ENV.items() if name != "LLAMA_ARG_CACHE_CENTER"}
        self.env["XDG_CACHE_HOME"] = str(self.caches)

    def command(self, model, *args, k="tbq4_0", n_ctx=512):
        self.runs += 1
        self.base = self.folder / f"{self.runs}.base"
        files = ("-m", model, "-f", self.text, "--kl-divergence-base", self.base)
        size = ("-c", n_ctx, "-b", n_ctx, "--chunks", 1, "-ctk", k, "-lv", 4)
        return [str(word) for word in (self.program, *files, *size, *THREADS, *args)]

    def __call__(self, model, *args, cwd=None, **kw):
        """The logits and the log."""
        done = run(*self.command(model, *args, **kw), env=self.env, cwd=cwd)
        return self.base.read_bytes(), done.stdout + done.stderr

    @property
    def kept(self):
        return sorted(self.caches.rglob("*"))[2:]  # after ggml-tbq and ggml-tbq/centers


@pytest.fixture
def plain(bin_dir, tmp_path):
    return Plain(bin_dir, tmp_path)


def said(log):
    """The lines about centered keys."""
    return [
        line for line in log.splitlines() if re.search("keys are not centered|the means of the keys|their means", line)
    ]


MEASURED, CENTERED = "means of the keys were measured once, they are kept in ", "keys are stored minus their means"


def test_a_program_centers_by_itself(plain, made, tmp_path):
    """The first run measures and keeps the means, the second one reads them."""
    model = made(biased, "K biases")
    first, log = plain(model)
    (kept,) = plain.kept
    assert MEASURED + str(kept) in log and CENTERED in log
    assert kept.is_relative_to(tmp_path / "caches" / "ggml-tbq" / "centers")  # where Python's centers are, too
    assert read_center(kept).model == fingerprint(model) and read_center(kept).tokens == 8 * 120
    again, log = plain(model)
    assert again == first and CENTERED in log and f"the means of the keys are those in {kept}" in log
    assert len(said(log)) == 2
    assert plain(model, "--cache-center", "auto")[0] == plain(model, "--cache-center", kept)[0] == first
    assert plain.kept == [kept]
    uncentered, log = plain(model, "--cache-center", "none")
    assert uncentered != first and not said(log)


# no quantized type divides heads of 80
@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind != "llama-h80"])
def test_a_program_centers_models_of_each_kind(kind, plain, made):
    log = plain(made(EXACT[kind], kind), k="q4_0", n_ctx=256)[1]
    assert MEASURED in log and CENTERED in log and len(plain.kept) == 1


@pytest.mark.parametrize("k", ["f16", "bf16", "f32"])
def test_keys_that_are_not_quantized_are_left_alone(k, plain, made):
    model = made(biased, "K biases")
    default, log = plain(model, k=k)
    assert not said(log) and not plain.caches.exists()
    assert plain(model, "--cache-center", "none", k=k)[0] == default


@pytest.mark.parametrize(
    "make, why",
    [
        (gemma2, "with a soft-cap of the attention logits, keys of a tbq type can be centered, q8_0 keys cannot"),
        (gpt_oss, "with attention sinks, keys of a tbq type can be centered, q8_0 keys cannot"),
        (tiny_mla, "with latent attention (MLA), keys of a tbq type can be centered, q8_0 keys cannot"),
        (mamba, "the memory of a mamba model has no keys that can be centered"),
    ],
)
def test_models_that_a_program_does_not_center(make, why, plain, made):
    """One line says why, and the result is that of a cache without centers."""
    model = made(make, make.__name__)
    default, log = plain(model, "-ctv", "q8_0", k="q8_0")
    (line,) = said(log)
    assert line.endswith(f"the keys are not centered: {why}") and not plain.kept
    assert plain(model, "-ctv", "q8_0", "--cache-center", "none", k="q8_0")[0] == default


# -- adapters and control vectors --------------------------------------------------------------------------------------


def of_three_layers(path):
    return biased(path, layers=3)


def control_vector(path):
    """For layer 1, so that the keys of layer 2 change."""
    return write_gguf(
        path,
        {"general.architecture": "controlvector", "controlvector.model_hint": "qwen2"},
        {"direction.1": np.ones(128, "f4")},
    )


def adapter(path):
    """A LoRA of rank 4 for the keys of of_three_layers()."""
    rng, name = np.random.default_rng(4), "blk.1.attn_k.weight"
    return write_gguf(
        path,
        {
            "general.architecture": "qwen2",
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": 4.0,
        },
        {
            f"{name}.lora_a": rng.standard_normal((4, 128)).astype("f4"),
            f"{name}.lora_b": rng.standard_normal((64, 4)).astype("f4"),
        },
    )


@pytest.mark.parametrize("option, make", [("--control-vector", control_vector), ("--lora", adapter)])
def test_adapters_given_at_the_start(option, make, plain, made, tmp_path):
    """They are in force while the means are measured, and a file belongs to them."""
    model, file = made(of_three_layers, "three layers"), make(tmp_path / "adapter.gguf")
    plain(model)
    (without,) = plain.kept
    first, log = plain(model, option, file)
    (kept,) = set(plain.kept) - {without}
    assert MEASURED in log and CENTERED in log and "with other adapters" not in log
    means = read_center(kept).means[2]
    assert np.abs(means - read_center(without).means[2]).max() > 0.01 * np.abs(means).max()
    assert read_center(kept).model.split()[0] == fingerprint(model)
    again, log = plain(model, option, file)
    assert again == first and f"the means of the keys are those in {kept}" in log
    # the same strength with other words, and another strength
    words = f"{option}-scaled", f"{file}:1.0"
    assert f"the means of the keys are those in {kept}" in plain(model, *words)[1]
    assert MEASURED in plain(model, f"{option}-scaled", f"{file}:0.5")[1] and len(plain.kept) == 3
    for center, args in ((kept, ()), (without, (option, file))):
        done = run(*plain.command(model, *args, "--cache-center", center), env=plain.env, ok=False)
        assert done.returncode == 1
        assert "was measured with other adapters or control vectors" in done.stdout + done.stderr


@pytest.mark.parametrize("option, make", [("--control-vector", control_vector), ("--lora", adapter)])
def test_python_measures_with_adapters(option, make, plain, made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(plain.caches))
    monkeypatch.setattr("tbq.kv_cache.calibrate.python_text", lambda: b"Words and numbers, 123. " * 400)
    model, file = made(of_three_layers, "three layers"), make(tmp_path / "adapter.gguf")
    monkeypatch.chdir(tmp_path)
    center = center_of_model(model, 512, [option, file.name])
    assert center != center_of_model(model, 512) and len(plain.kept) == 2
    assert center_of_model(model, 512, [option, file.name]) == center
    assert CENTERED in plain(model, option, file, "--cache-center", center)[1]
    if option == "--lora":  # loaded, and not in force
        assert center_of_model(model, 512, [option, file.name, "--lora-init-without-apply"]) != center
    assert len(plain.kept) == 2


def test_an_adapter_that_changes_while_the_server_runs(bin_dir, plain, made, tmp_path):
    """The means stay, and one line says so."""
    model, file = made(of_three_layers, "three layers"), adapter(tmp_path / "adapter.gguf")
    args = ("-ctk", "tbq4_0", "--lora", file)
    with Server(bin_dir, model, tmp_path / "log", *args, env=plain.env) as server:
        server.complete("1, 2, 3,", n=4)
        assert CENTERED in server.log and "with other adapters" not in server.log
        server.request("/lora-adapters", [{"id": 0, "scale": 0.5}])
        server.complete("1, 2, 3,", n=4)
        server.complete("4, 5, 6,", n=4)
        assert server.log.count("the means of the keys were measured with other adapters") == 1


# -- drafts ------------------------------------------------------------------------------------------------------------


EXACT_ROWS = ("--cache-recent", 128, "--cache-first", 4)  # the default of the programs; a draft has twice as many


def test_a_draft_is_accepted_as_with_f16(bin_dir, plain, demo_model, tmp_path):
    """The model is its own draft, with text that is longer than the exact rows.

    docs/measurements/centering.md has figures for these prompts: tbq2_0 has 0.85 to 0.91 of f16, with an error of 0.02
    for so few tokens; not centered 0.80.
    """
    text = python_text(tmp_path / "python").read_text()
    prompts = [text[i : i + 1600] for i in range(20_000, 92_000, 9_000)]

    def acceptance(types):
        args = ("-md", demo_model, "--spec-type", "draft-simple", "--spec-draft-n-max", 4, "-c", 4096, *EXACT_ROWS)
        log = tmp_path / f"{types}.log"
        with Server(bin_dir, demo_model, log, *args, "-ctkd", types, "-ctvd", types, env=plain.env) as server:
            timings = [server.complete(prompt, n=48)["timings"] for prompt in prompts]
            assert (f"{CENTERED}" in server.log) == (types != "f16")
        return sum(each["draft_n_accepted"] for each in timings) / sum(each["draft_n"] for each in timings)

    found = {types: acceptance(types) for types in ("f16", "tbq4_0", "tbq2_0")}
    assert found["tbq4_0"] >= 0.97 * found["f16"] and found["tbq2_0"] >= 0.8 * found["f16"], found


def test_the_choice_of_a_draft(bin_dir, plain, demo_model, tmp_path):
    center = tmp_path / "center.gguf"
    calibrate(demo_model, center, 512, chunks=2)
    types = ("-md", demo_model, "--spec-type", "draft-simple", "-ctkd", "tbq4_0", "-ctvd", "tbq4_0", "-c", 512)
    for args, centered in (
        ((), True),
        (("--cache-center", "none"), False),
        (("--cache-center-draft", "none"), False),
        (("--cache-center", "none", "--cache-center-draft", "auto"), True),
        (("--cache-center", "none", "--cache-center-draft", center), True),
    ):
        with Server(bin_dir, demo_model, tmp_path / "log", *types, *args, env=plain.env) as server:
            assert (CENTERED in server.log) == centered, args


def predictor(path):
    """A glm4moe with one layer that predicts further tokens."""
    experts = {f"ffn_{x}_exps.weight": (2, 128, 128) for x in ("gate", "up", "down")}
    moe = {"ffn_gate_inp.weight": (2, 128), "exp_probs_b.bias": (2,)}
    dense = {f"ffn_{x}.weight": None for x in ("gate", "up", "down")}
    norms = {"post_attention_norm.weight": (128,), "ffn_norm.weight": None}
    nextn = {"nextn.eh_proj.weight": (128, 256), "nextn.enorm.weight": (128,), "nextn.hnorm.weight": (128,)}
    return write_model(
        path,
        "glm4moe",
        3,
        lambda i: attention(2, 1, 64) | norms | (experts | moe | dense | nextn if i == 2 else {}),
        kv_heads=1,
        size=64,
        nextn_predict_layers=1,
        expert_count=2,
        expert_used_count=1,
        expert_feed_forward_length=128,
        expert_shared_count=0,
        leading_dense_block_count=2,
    )


def test_a_head_that_predicts_further_tokens(bin_dir, plain, made, tmp_path):
    """It has layers of its own of the same model, and its means are kept in a file of their own."""
    model = made(predictor, "MTP")
    args = ("--spec-type", "draft-mtp", "-ctk", "tbq4_0", "-ctkd", "tbq4_0", "-ctvd", "tbq4_0", "-c", 512)
    with Server(bin_dir, model, tmp_path / "log", *args, env=plain.env) as server:
        server.complete("1, 2, 3,", n=8)
        assert server.log.count(CENTERED) == 2
    assert sorted(tuple(read_center(kept).means) for kept in plain.kept) == [(0, 1), (2,)]
    assert all(read_center(kept).model == fingerprint(model) for kept in plain.kept)


@pytest.mark.parametrize(
    "variables, why",
    [
        ({"XDG_CACHE_HOME": "{tmp}/text"}, "{tmp}/text/ggml-tbq/centers cannot be written: Not a directory"),
        ({"XDG_CACHE_HOME": "/proc"}, "/proc/ggml-tbq/centers cannot be written: No such file or directory"),
        ({"XDG_CACHE_HOME": "", "HOME": ""}, "the user has no folder for caches"),
        ({"XDG_CACHE_HOME": "caches"}, "the user has no folder for caches"),
    ],
)
def test_folder_that_a_program_cannot_use(variables, why, plain, made, tmp_path):
    """The means are measured at each start; the result is the same."""
    model = made(biased, "K biases")
    kept, _ = plain(model)
    plain.env |= {name: value.format(tmp=tmp_path) for name, value in variables.items()}
    for _ in range(2):
        found, log = plain(model, cwd=tmp_path)
        assert f"measured at each start: {why.format(tmp=tmp_path)}" in log and CENTERED in log
        assert found == kept
    assert len(plain.kept) == 1


def test_full_disk(plain, made, small_disk):
    """The means are used although they cannot be kept."""
    model = made(biased, "K biases")
    (small_disk / "ggml-tbq" / "centers").mkdir(parents=True)
    with contextlib.suppress(OSError), (small_disk / "other").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    plain.env["XDG_CACHE_HOME"] = str(small_disk)
    _, log = plain(model)
    assert "measured at each start" in log and CENTERED in log
    assert not list(small_disk.rglob("*.part")) and not list(small_disk.rglob("*.gguf"))


@pytest.mark.parametrize("damage", ["cut off", "changed", "empty", "of another model"])
def test_kept_means_that_are_corrupt(damage, plain, made, logits, tmp_path):
    """They are measured again."""
    model = made(biased, "K biases")
    first, _ = plain(model)
    (kept,) = plain.kept
    good = kept.read_bytes()
    if damage == "of another model":
        logits(made(gemma3, "windows"), measure=kept)
    else:
        kept.write_bytes({"cut off": good[:-1], "changed": good[:-1] + b"x", "empty": b""}[damage])
    again, log = plain(model)
    assert MEASURED in log and again == first and kept.read_bytes() == good and plain.kept == [kept]


def test_two_programs_at_once(plain, made):
    """Both measure, and one complete file is kept."""
    model = made(biased, "K biases")
    processes = [
        subprocess.Popen(
            plain.command(model),
            env=plain.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(3)
    ]
    logs = [process.communicate(timeout=180)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert all(CENTERED in log for log in logs)
    (kept,) = plain.kept
    assert read_center(kept).model == fingerprint(model)


def test_kept_by_context_and_rope(plain, made):
    """Contexts that share a center in Python share it here, and each RoPE has its own."""
    model = made(biased, "K biases")
    names = set()
    for n_ctx, rope_context, args in (
        (256, 4096, ()),
        (512, 4096, ("--rope-freq-base", 50000)),
        (512, 8192, ("--rope-scaling", "yarn", "--rope-scale", 2)),
        (512, 8192, ("--rope-scaling", "linear", "--rope-scale", 4)),
    ):
        _, log = plain(model, *args, n_ctx=n_ctx)
        (new,) = set(plain.kept) - names
        assert CENTERED in log
        assert read_center(new).context == calibration_context(n_ctx, rope_context)
        names.add(new)
    plain(model, n_ctx=512)
    assert set(plain.kept) == names


def test_kept_means_are_shared_with_python(plain, made, monkeypatch):
    """So a slot that `tbq serve` saved fits a plain llama-server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(plain.caches))
    monkeypatch.setattr("tbq.kv_cache.calibrate.python_text", lambda: b"Words and numbers, 123. " * 400)
    model, said = made(biased, "K biases"), []
    kept = center_of_model(model, 512)
    _, log = plain(model)
    assert f"the means of the keys are those in {kept}" in log and plain.kept == [kept]
    kept.unlink()
    plain(model)
    assert center_of_model(model, 512, say=said.append) == kept and not said


def test_a_file_named_auto(plain, made, tmp_path):
    model = made(biased, "K biases")
    first, _ = plain(model)
    shutil.copy(plain.kept[0], tmp_path / "auto")
    shutil.rmtree(plain.caches)
    assert plain(model, "--cache-center", "./auto", cwd=tmp_path)[0] == first and not plain.kept
    done = run(*plain.command(model, "--cache-center", "missing.gguf"), env=plain.env, ok=False)
    assert done.returncode == 1


def test_a_server_that_wakes_up_measures_once(bin_dir, plain, made, tmp_path):
    """Although its means cannot be kept."""
    model, prompt = made(biased, "K biases"), "1, 2, 3,"
    plain.env["XDG_CACHE_HOME"] = str(plain.text)
    args = ("-ctk", "tbq4_0", "--sleep-idle-seconds", 1)
    with Server(bin_dir, model, tmp_path / "log", *args, env=plain.env) as server:
        first = server.complete(prompt, n=8)["content"]
        fall_asleep(server, 1)
        assert server.complete(prompt, n=8)["content"] == first
        assert server.log.count("measured at each start") == 1
        assert len(set(re.findall(r"keys are stored minus their means: .* hash (\w+)", server.log))) == 1
        assert server.log.count(CENTERED) == 2


def test_the_text_is_as_good_as_pythons(bin_dir, plain, demo_model, tmp_path):
    """docs/measurements/centering.md has figures for more text."""
    text = tmp_path / "docs"
    text.write_text("".join(path.read_text(encoding="utf-8") for path in sorted((HERE.parent / "docs").rglob("*.md"))))
    plain(demo_model, n_ctx=256)
    divergence = Divergence(bin_dir, demo_model, text, tmp_path / "base", n_ctx=512, chunks=3)
    none, own, python = (
        divergence("tbq4_0", "f16", "--cache-center", center)["kld"]
        for center in ("none", *plain.kept, center_of_model(demo_model, 256))
    )
    assert own < 0.85 * none and own < 1.2 * python, (none, own, python)


# -- a range of contexts -----------------------------------------------------------------------------------------------


def test_ranges():
    """Similar contexts share a center, and four times the context has another.  RoPE's context is the limit."""
    assert len({calibration_context(context, 1 << 20) for context in (1, 512, 2048, 4096, 8192)}) == 1
    ranges = [calibration_context(context, 1 << 20) for context in (8192, 8193, 32768, 32769, 131072)]
    assert ranges[1] == ranges[2] == 4 * ranges[0] and ranges[3] == ranges[4] == 4 * ranges[1]
    assert all(context <= calibration_context(context, 1 << 20) < 4 * context for context in range(2049, 100_000, 999))
    assert [calibration_context(context, 2048) for context in (100, 2048, 1 << 20)] == [2048] * 3
    assert calibration_context(100_000, 0) == 131072
