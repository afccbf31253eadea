# SPDX-License-Identifier: MIT
"""tbq plan: the cache that it computes is what llama.cpp allocates, and the types that it recommends work."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import tbq
from llama_tools import THREADS, Server, byte_tokenizer, complete, run, tiny_llama, tiny_mla, write_gguf
from tbq._key_biases import LARGE_BIAS
from tbq._units import parse_size
from tbq.cli.plan import plot, report
from tbq.kv_cache.model import read_model
from tbq.kv_cache.plan import PAIRS

MIB = 2**20


# -- tiny models -------------------------------------------------------------------------------------------------------


def write_model(
    path,
    arch,
    layers=2,
    tensors=lambda i: {},
    embd=128,
    ff=64,
    heads=2,
    kv_heads=None,
    size=None,
    output_norm="output_norm",
    tied=False,
    more=(),
    general=(),
    **fields,
):
    """A model over the byte tokenizer.

    tensors(i): shapes of a layer's tensors in addition to the plain feed-forward network, by name ("attn_k.bias");
    None for one that is missing. size: size of a head, if the file names it. more: shapes of tensors that are in no
    layer. general: more metadata. fields: more metadata of the architecture, with "__" for a dot.
    """
    rng, tokenizer = np.random.default_rng(0), byte_tokenizer()
    vocab = len(tokenizer["tokenizer.ggml.tokens"])
    fields = {
        "context_length": 4096,
        "embedding_length": embd,
        "block_count": layers,
        "feed_forward_length": ff,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads or heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **{k.replace("__", "."): v for k, v in fields.items()},
    }
    if size:
        fields |= {"attention.key_length": size, "attention.value_length": size}
    shapes = {
        "token_embd.weight": (vocab, embd),
        **({f"{output_norm}.weight": (embd,)} if output_norm else {}),
        **dict(more),
    }
    if not tied:
        shapes["output.weight"] = vocab, embd
    for i in range(layers):
        plain = {
            "attn_norm.weight": (embd,),
            "ffn_norm.weight": (embd,),
            "ffn_gate.weight": (ff, embd),
            "ffn_up.weight": (ff, embd),
            "ffn_down.weight": (embd, ff),
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {**plain, **tensors(i)}.items() if shape}
    values = {
        name: rng.standard_normal(shape) / math.sqrt(shape[-1])
        if len(shape) > 1
        else np.full(shape, name.endswith("weight"))
        for name, shape in shapes.items()
    }
    return write_gguf(
        path,
        {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in fields.items()}, **tokenizer, **dict(general)},
        values,
    )


def attention(heads, kv_heads, size, embd=128, value=None, norms=False):
    value = value or size
    normed = {"attn_q_norm.weight": (size,), "attn_k_norm.weight": (size,)} if norms else {}
    return {
        "attn_q.weight": (heads * size, embd),
        "attn_k.weight": (kv_heads * size, embd),
        "attn_v.weight": (kv_heads * value, embd),
        "attn_output.weight": (embd, heads * value),
        **normed,
    }


POST = {"post_attention_norm.weight": (128,), "post_ffw_norm.weight": (128,)}


def qwen2(path, bias=0.0, layer=0, layers=2, heads=2, kv_heads=1, size=64):
    """Keys with biases: `bias` times the rest of a key in one layer, 0 in the others."""
    biases = {f"attn_{x}.bias": (n * size,) for x, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    path = write_model(
        path,
        "qwen2",
        layers,
        lambda i: attention(heads, kv_heads, size, heads * size) | biases,
        embd=heads * size,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
    )
    import gguf

    reader = gguf.GGUFReader(path, "r+")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weight = tensors[f"blk.{layer}.attn_k.weight"].data
    tensors[f"blk.{layer}.attn_k.bias"].data[:] = bias * np.sqrt(np.square(weight).sum() / kv_heads) / math.sqrt(size)
    reader.data.flush()
    return path


def gemma2(path, **fields):
    return write_model(
        path,
        "gemma2",
        3,
        lambda i: attention(2, 1, 64) | POST,
        tied=True,
        kv_heads=1,
        size=64,
        attention__sliding_window=512,
        **fields,
    )


def gemma3(path):
    """Seven layers. The sixth is global, as in this architecture."""
    return write_model(
        path,
        "gemma3",
        7,
        lambda i: attention(2, 1, 64, norms=True) | POST,
        kv_heads=1,
        size=64,
        attention__sliding_window=512,
    )


def gemma4(path):
    """Window layers with another number and size of heads, and three layers that use the cache of others."""

    def layer(i):
        size, kv_heads = (64, 2) if i % 3 != 2 else (128, 1)
        return attention(2, kv_heads, size, norms=True) | POST

    return write_model(
        path,
        "gemma4",
        9,
        layer,
        more={"rope_freqs.weight": (64,)},
        kv_heads=[2, 2, 1] * 3,
        size=128,
        attention__key_length_swa=64,
        attention__value_length_swa=64,
        attention__sliding_window=512,
        attention__sliding_window_pattern=[1, 1, 0] * 3,
        attention__shared_kv_layers=3,
        embedding_length_per_layer_input=0,
        rope__dimension_count=128,
        rope__dimension_count_swa=64,
    )


def gemma3n(path):
    """Only the first 20 layers have a cache. The other layers read it."""
    layer = (
        attention(2, 1, 64, norms=True)
        | POST
        | {
            "inp_gate.weight": (256, 128),
            "proj.weight": (128, 256),
            "post_norm.weight": (128,),
            "altup_correct_coef.weight": (4, 4),
            "altup_correct_scale.weight": (128,),
            "altup_predict_coef.weight": (16, 4),
            "altup_router.weight": (4, 128),
            "altup_router_norm.weight": (128,),
            "laurel_l.weight": (64, 128),
            "laurel_r.weight": (128, 64),
            "laurel_post_norm.weight": (128,),
        }
    )
    more = {
        "altup_proj.weight": (3, 128, 128),
        "altup_unembd_proj.weight": (3, 128, 128),
        "per_layer_token_embd.weight": (260, 256 * 23),
        "per_layer_model_proj.weight": (256 * 23, 128),
        "per_layer_proj_norm.weight": (256,),
    }
    return write_model(
        path, "gemma3n", 23, lambda i: layer, more=more, kv_heads=1, size=64, attention__sliding_window=512
    )


def gpt_oss(path, **fields):
    def layer(i):
        experts = {
            f"ffn_{x}_exps.{y}": s
            for x in ("gate", "up", "down")
            for y, s in (("weight", (2, 128, 128)), ("bias", (2, 128)))
        }
        return (
            attention(2, 1, 64)
            | experts
            | {
                "attn_sinks.weight": (2,),
                "post_attention_norm.weight": (128,),
                "ffn_gate_inp.weight": (2, 128),
                "ffn_gate_inp.bias": (2,),
                "attn_q.bias": (128,),
                "attn_k.bias": (64,),
                "attn_v.bias": (64,),
                "attn_output.bias": (128,),
                "ffn_norm.weight": None,
                "ffn_gate.weight": None,
                "ffn_up.weight": None,
                "ffn_down.weight": None,
            }
        )

    return write_model(
        path,
        "gpt-oss",
        3,
        layer,
        kv_heads=1,
        size=64,
        attention__sliding_window=128,
        expert_count=2,
        **{"expert_used_count": 1, **fields},
        expert_feed_forward_length=128,
        rope__dimension_count=64,
    )


def lfm2(path):
    """Layers 0 and 2 are convolutions."""

    def layer(i):
        if i % 2:
            return attention(2, 1, 64, norms=True)
        return {
            "shortconv.conv.weight": (128, 3),
            "shortconv.in_proj.weight": (384, 128),
            "shortconv.out_proj.weight": (128, 128),
        }

    return write_model(
        path, "lfm2", 4, layer, kv_heads=[0, 1, 0, 1], shortconv__l_cache=3, output_norm="token_embd_norm"
    )


def openelm(path):
    """Each layer has its own number of heads."""
    heads, kv_heads = [4, 8, 12], [1, 2, 3]

    def layer(i):
        return {
            "attn_qkv.weight": ((heads[i] + 2 * kv_heads[i]) * 64, 128),
            "attn_output.weight": (128, heads[i] * 64),
            "attn_q_norm.weight": (64,),
            "attn_k_norm.weight": (64,),
        }

    return write_model(path, "openelm", 3, layer, tied=True, heads=heads, kv_heads=kv_heads, size=64)


def deci(path):
    """The layer in the middle has no attention, and the last layer has fewer heads."""

    def layer(i):
        return {"attn_norm.weight": None} if i == 1 else attention(2, [2, 0, 1][i], 64)

    return write_model(path, "deci", 3, layer, heads=[2, 0, 2], kv_heads=[2, 0, 1])


def bert(path, heads=2):
    """An encoder with pooling: it has no cache."""

    def layer(i):
        biases = {
            f"{name}.bias": (128,)
            for name in (
                "attn_q",
                "attn_k",
                "attn_v",
                "attn_output",
                "attn_output_norm",
                "layer_output_norm",
                "ffn_down",
            )
        }
        return (
            attention(heads, heads, 128 // heads)
            | biases
            | {
                "attn_output_norm.weight": (128,),
                "layer_output_norm.weight": (128,),
                "ffn_up.bias": (64,),
                "attn_norm.weight": None,
                "ffn_norm.weight": None,
                "ffn_gate.weight": None,
            }
        )

    more = {
        "position_embd.weight": (512, 128),
        "token_types.weight": (2, 128),
        "token_embd_norm.weight": (128,),
        "token_embd_norm.bias": (128,),
    }
    return write_model(
        path,
        "bert",
        2,
        layer,
        tied=True,
        output_norm=None,
        heads=heads,
        more=more,
        context_length=512,
        attention__layer_norm_epsilon=1e-5,
        attention__causal=False,
        pooling_type=1,
        general={"tokenizer.ggml.token_type_count": 2},
    )


def mamba(path):
    """A model with a state and without keys and values."""

    def layer(i):
        return {
            "ssm_in.weight": (512, 128),
            "ssm_conv1d.weight": (256, 4),
            "ssm_conv1d.bias": (256,),
            "ssm_x.weight": (8 + 32, 256),
            "ssm_dt.weight": (256, 8),
            "ssm_dt.bias": (256,),
            "ssm_a": (256, 16),
            "ssm_d": (256,),
            "ssm_out.weight": (128, 256),
            "ffn_norm.weight": None,
            "ffn_gate.weight": None,
            "ffn_up.weight": None,
            "ffn_down.weight": None,
        }

    return write_model(
        path,
        "mamba",
        2,
        layer,
        heads=0,
        ssm__conv_kernel=4,
        ssm__inner_size=256,
        ssm__state_size=16,
        ssm__time_step_rank=8,
    )


MODELS = {
    "llama": lambda path: tiny_llama(path, 64, heads=4, kv_heads=2),
    "llama-k192": lambda path: tiny_llama(path, 192, heads=2, kv_heads=1),
    "qwen2": qwen2,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "gpt-oss": gpt_oss,
    "deepseek2": tiny_mla,
    "lfm2": lfm2,
    "openelm": openelm,
    "deci": deci,
    "llama-h80": lambda path: tiny_llama(path, 80),
    "llama-h96": lambda path: tiny_llama(path, 96),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A function that maps a name in MODELS to the file."""
    folder, made = tmp_path_factory.mktemp("plan"), {}

    def get(name):
        if name not in made:
            made[name] = MODELS[name](folder / f"{name}.gguf")
        return made[name]

    return get


# -- what llama.cpp allocates ------------------------------------------------------------------------------------------


class Allocated:
    """The caches that llama-batched-bench makes.

    Rows (indices of layers, MiB of K, MiB of V), and MiB of recurrent states.
    """

    def __init__(self, bin_dir, path, k, v, context, parallel=1, unified=True, swa_full=False, ubatch=512):
        arguments = (
            "-m",
            path,
            "-c",
            context,
            "-ctk",
            k,
            "-ctv",
            v,
            "-npp",
            1,
            "-ntg",
            1,
            "-npl",
            parallel,
            "-ub",
            ubatch,
            "--fit",
            "off",
            "-lv",
            5,
            *THREADS,
            *(["-kvu"] if unified else []),
            *(["--swa-full"] if swa_full else []),
        )
        # at this line everything is allocated; what the model computes afterwards does not matter here
        done = run(bin_dir / "llama-batched-bench", *arguments, ok=False)
        self.log = done.stdout + done.stderr
        self.started = "reserve took" in self.log
        self.caches, layers = [], []
        for line in self.log.splitlines():
            if layer := re.search(r"llama_kv_cache: layer +(\d+): dev = ", line):
                layers.append(int(layer[1]))
            elif size := re.search(
                r"llama_kv_cache: size = .* K \(\w+\): +([\d.]+) MiB, V \(\w+\): +([\d.]+) MiB", line
            ):
                self.caches.append((layers, float(size[1]), float(size[2])))
                layers = []
        self.states = sum(float(x) for x in re.findall(r"llama_memory_recurrent: size = +([\d.]+) MiB", self.log))


def assert_same(plan, k, v, real):
    """llama.cpp prints hundredths of a MiB, which are 10,486 bytes.

    A layer of 256 cells with one block more or less, at least 18 bytes, would differ by 4,608 bytes in a sum of few
    lines.  So any wrong layer, head or type shows at the contexts of these tests.
    """
    assert real.started, real.log[-2000:]
    pair = plan.pair(k, v)
    near = pytest.approx
    slack = 0.0051 * max(1, len(real.caches))
    assert sum(c[1] for c in real.caches) == near(pair.k_bytes / MIB, abs=slack), (real.caches, pair)
    assert sum(c[2] for c in real.caches) == near(pair.v_bytes / MIB, abs=slack), (real.caches, pair)
    assert real.states == near(plan.state_bytes / MIB, abs=0.0051)
    if "window" in pair.by_kind and len(real.caches) == 2:  # the global cache comes first
        for (layers, *sizes), kind in zip(real.caches, ("global", "window")):
            assert sizes == [near(n / MIB, abs=0.0051) for n in pair.by_kind.get(kind, (0, 0))]
            assert layers == [layer.index for layer in plan.layers if layer.kind == kind]
    elif len(real.caches) == 1 and plan.architecture != "deci":  # it makes empty tensors for layers without heads
        assert real.caches[0][0] == [layer.index for layer in plan.layers if layer.kind != "none"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        dict(context=32768),
        dict(context=1000, ubatch=64),
        dict(context=20000, parallel=3),
        dict(context=20000, parallel=3, unified=False),
        dict(context=16384, parallel=2, swa_full=True),
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_bytes_are_those_that_llama_cpp_allocates(name, options, model, bin_dir):
    pairs = [("f16", "f16"), ("tbq4_0", "tbq3_0"), ("tbq4_0", "tbq4_0"), ("q8_0", "q8_0"), ("q4_0", "tbq2_0")]
    plan = tbq.plan(model(name), pairs=pairs, **{"parallel": 1, **options})
    assert plan.exact
    k, v = next((p for p in pairs[1:] if f"{p[0]}/{p[1]}" not in plan.refused), pairs[0])
    for pair in {pairs[0], (k, v)}:
        assert_same(plan, *pair, Allocated(bin_dir, model(name), *pair, **options))


@pytest.mark.parametrize("name", ["llama", "deepseek2", "llama-h80", "llama-h96", "lfm2"])
def test_refuses_what_llama_cpp_refuses(name, model, bin_dir):
    plan = tbq.plan(model(name))
    assert {f"{p.k}/{p.v}" for p in plan.pairs}.isdisjoint(plan.refused)
    for k, v in PAIRS:
        real = Allocated(bin_dir, model(name), k, v, 512)
        assert real.started == (f"{k}/{v}" not in plan.refused), (k, v, real.log[-800:])


def test_demo_model(demo_model, bin_dir):
    plan = tbq.plan(demo_model, context=1024)
    for k, v in (("f16", "f16"), ("tbq4_0", "tbq3_0")):
        _, log = complete(bin_dir, demo_model, "a", "-ctk", k, "-ctv", v, n=1, n_ctx=1024)
        size = re.search(r"llama_kv_cache: size = *([\d.]+) MiB", log)
        assert float(size[1]) == pytest.approx((plan.pair(k, v).k_bytes + plan.pair(k, v).v_bytes) / MIB, abs=0.006)
    assert plan.pair("f16", "f16").bytes == 2 * 2 * 1024 * 30 * 3 * 64


# -- every architecture that llama.cpp makes a model of ----------------------------------------------------------------


@pytest.fixture(scope="module")
def architectures(build_dir):
    """llama.cpp's own tiny models, one or two of each architecture.

    They take 1 GB, so they do not outlive this file.
    """
    program = build_dir / "bin" / "test-llama-archs"
    if not program.is_file():
        pytest.skip("test-llama-archs was not built")
    with tempfile.TemporaryDirectory() as folder:
        run(program, "-o", folder, timeout=300)
        yield Path(folder)


def test_every_architecture(architectures, bin_dir):
    files = sorted(architectures.glob("*.gguf"))
    assert len(files) > 100
    unknown = set()
    for path in files:
        options = dict(context=8192, parallel=64)  # recurrent states are small and show only with many sequences
        try:
            plan = tbq.plan(path, **options)
        except tbq.TBQError:
            unknown.add(path.name.rsplit("-", 1)[0])
            continue
        k, v = ("tbq4_0", "tbq4_0") if "tbq4_0/tbq4_0" not in plan.refused else ("f16", "f16")
        assert_same(plan, k, v, Allocated(bin_dir, path, k, v, **options))
    assert unknown == {"deepseek4"}


def stretched(source, target, layers, like, *without, **more):
    """A copy of a model with more layers.

    Layer i is a copy of layer like(i), or has no tensors if that is None.  Metadata in `without` are left out,
    numbers in `more` are added.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    count = reader.fields[f"{arch}.block_count"].contents()
    writer = gguf.GGUFWriter(str(target), arch)
    for name, field in reader.fields.items():
        value = field.contents()
        if name.startswith("GGUF.") or name == "general.architecture" or value == []:
            continue
        if name.removeprefix(f"{arch}.") in {*without, *more}:
            continue
        if name == f"{arch}.block_count":
            value = layers
        elif isinstance(value, list) and name.startswith(arch) and len(value) == count:
            value = [value[like(i) or 0] for i in range(layers)]
        writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for key, value in more.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for tensor in reader.tensors:
        block = re.match(r"blk\.(\d+)\.(.*)", tensor.name)
        for name in (
            [f"blk.{i}.{block[2]}" for i in range(layers) if like(i) == int(block[1])] if block else [tensor.name]
        ):
            writer.add_tensor(name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    "name,layers",
    [
        *(
            (name, 13)
            for name in (
                "afmoe-moe",
                "cohere2-dense",
                "cohere2moe-moe",
                "exaone-moe-moe",
                "gemma2-dense",
                "gemma3-dense",
                "gpt-oss-moe",
                "laguna-moe",
                "llama4-moe",
                "mellum-moe",
                "muse-glimmer-dense",
                "olmo2-dense",
                "plamo3-dense",
                "smallthinker-moe",
            )
        ),
        ("exaone4-dense", 64),
        ("exaone4-dense", 63),
    ],
)
def test_windows_where_the_file_does_not_list_them(name, layers, architectures, bin_dir, tmp_path):
    like = (lambda i: i % 4) if "llama4" in name else (lambda i: min(i, 1))
    path = stretched(
        architectures / f"{name}.gguf",
        tmp_path / "model.gguf",
        layers,
        like,
        "attention.sliding_window_pattern",
        **{"attention.sliding_window": 512},
    )
    plan = tbq.plan(path, context=8192, parallel=2)
    assert plan.exact and plan.window == (
        0 if layers == 63 else {"llama4-moe": 8192, "smallthinker-moe": 4096}.get(name, 512)
    )
    assert {layer.kind for layer in plan.layers} == ({"global"} if layers == 63 else {"global", "window"})
    assert_same(plan, "f16", "f16", Allocated(bin_dir, path, "f16", "f16", 8192, parallel=2))


@pytest.mark.parametrize("name,interval", [("qwen3next-moe", 4), ("qwen35-dense", 4), ("minimax-01-moe", 8)])
def test_recurrent_layers_where_the_file_does_not_list_them(name, interval, architectures, bin_dir, tmp_path):
    path = stretched(
        architectures / f"{name}.gguf",
        tmp_path / "model.gguf",
        9,
        lambda i: int((i + 1) % interval == 0),
        "full_attention_interval",
        "attention.recurrent_layers",
    )
    plan = tbq.plan(path, context=8192, parallel=2)
    assert [layer.index for layer in plan.layers if layer.kind == "global"] == list(range(interval - 1, 9, interval))
    assert_same(plan, "f16", "f16", Allocated(bin_dir, path, "f16", "f16", 8192, parallel=2))


@pytest.mark.parametrize(
    "name", ["deepseek2-moe", "mimo2-moe", "bailingmoe3-moe", "cohere2moe-moe", "deepseek32-moe", "glm-dsa-moe"]
)
def test_layers_that_predict_further_tokens(name, architectures, bin_dir, tmp_path):
    """A file may come without the tensors of its last layer, which drafts. Most architectures make no cache for it."""
    path = stretched(
        architectures / f"{name}.gguf", tmp_path / "model.gguf", 3, (0, 1, None).__getitem__, nextn_predict_layers=1
    )
    plan = tbq.plan(path, context=8192, parallel=2)
    assert plan.layers[2].kind == ("global" if name == "bailingmoe3-moe" else "none")
    assert_same(plan, "f16", "f16", Allocated(bin_dir, path, "f16", "f16", 8192, parallel=2))


# -- the longest context -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek2", "lfm2"])
@pytest.mark.parametrize("unified", [True, False])
def test_longest_context_is_the_last_that_fits(name, unified, model):
    plan = tbq.plan(model(name), context=512, memory="40M", parallel=3, unified=unified)
    step = 256 * (1 if unified else 3)
    for pair in plan.pairs:
        room = plan.memory - plan.weights_bytes - plan.state_bytes
        assert pair.longest % step == 0
        assert plan.bytes_at(pair.k, pair.v, pair.longest) <= room < plan.bytes_at(pair.k, pair.v, pair.longest + step)
        assert pair.fits and plan.fits
    only = tbq.plan(
        model(name), context=512, memory=plan.memory - plan.weights_bytes, cache_only=True, parallel=3, unified=unified
    )
    assert [p.longest for p in only.pairs] == [p.longest for p in plan.pairs]


def test_memory_that_is_too_small(model):
    plan = tbq.plan(model("llama"), context=4096, memory="3M")  # the weights alone are larger
    assert plan.fits is False and all(pair.longest == 0 and pair.fits is False for pair in plan.pairs)
    assert plan.reason == "no pair fits 4096 tokens in the memory; this one comes nearest, with 0 tokens"
    assert "none fits" in report(plan)


def test_context_follows_the_memory(model):
    """Without a context from the user, the context gets shorter before the quality drops.

    The exception: slightly fewer bits are enough for the whole context.
    """
    path = model("llama")
    packed = {"recent": 0, "first": 0}  # exact rows take the same memory in every context
    everything = tbq.plan(path, **packed).pair("tbq4_0", "tbq4_0").bytes
    less = tbq.plan(path, **packed).pair("tbq4_0", "tbq3_0").bytes
    for memory, pair, context in (
        (everything, ("tbq4_0", "tbq4_0"), 2048),
        (less, ("tbq4_0", "tbq3_0"), 2048),
        (everything // 2, ("tbq4_0", "tbq4_0"), 1024),
    ):
        plan = tbq.plan(path, memory=memory, cache_only=True, **packed)
        assert (plan.recommended, plan.context, plan.fits) == (pair, context, True)


# -- the recommendation ------------------------------------------------------------------------------------------------


def test_recommends_4_bits_and_fewer_if_it_must(demo_model):
    plan = tbq.plan(demo_model)
    assert plan.recommended == ("tbq4_0", "tbq4_0") and plan.fits is None and plan.warnings == ()
    for k, v in (("tbq4_0", "tbq4_0"), ("tbq4_0", "tbq3_0"), ("tbq3_0", "tbq3_0"), ("tbq3_0", "tbq2_0")):
        plan = tbq.plan(demo_model, context=8192, memory=plan.pair(k, v).bytes, cache_only=True)
        assert plan.recommended == (k, v) and plan.fits
    assert tbq.plan(demo_model, context=8192, memory=1000, cache_only=True).recommended == ("tbq3_0", "tbq2_0")


def test_leaves_a_small_cache_alone(demo_model):
    plan = tbq.plan(demo_model, context=256)  # 6 MiB of f16 cache, 92 of weights
    assert plan.recommended == ("f16", "f16")
    assert "small compared with the weights" in plan.reason
    little = {"context": 256, "memory": "3M", "cache_only": True}
    assert tbq.plan(demo_model, **little, recent=0, first=0).recommended == ("tbq4_0", "tbq4_0")
    assert any("exact rows take more than all packed ones" in text for text in tbq.plan(demo_model, **little).warnings)


def test_a_token_reads_few_of_the_experts(tmp_path):
    """2 of 8 experts are 6 of the 24 MiB.

    A cache of 1 MiB is not small compared with that, although it is compared with the file.
    """
    path = tiny_llama(tmp_path / "model.gguf", 64, experts=8)
    assert tbq.plan(path, context=256).recommended == ("f16", "f16")
    plan = tbq.plan(path, context=1024)
    assert plan.recommended == ("tbq4_0", "tbq4_0") and plan.pair("f16", "f16").bytes < plan.weights_bytes / 16


@pytest.mark.parametrize(
    "name, why", [("gpt-oss", "attention sinks"), ("gemma2", "a soft-cap"), ("deepseek2", r"latent attention \(MLA\)")]
)
def test_kinds_that_nobody_measured(name, why, model):
    """Centered keys are exact there, but how much a few bits lose on real weights is not known."""
    plan = tbq.plan(model(name), context=200_000)
    assert plan.recommended == ("tbq4_0", "tbq4_0") and plan.center == (name == "gpt-oss")
    assert re.search(f"^centered keys are exact with {why}.* not measured on {name} weights.* tbq3_0", plan.reason)
    assert any(text.startswith(f"not measured on {name} weights") for text in plan.warnings)
    smaller = tbq.plan(model(name), context=200_000, memory=plan.pair("tbq3_0", "tbq3_0").bytes, cache_only=True)
    assert smaller.recommended == ("tbq3_0", "tbq3_0")
    assert any(text.startswith("not measured") for text in smaller.warnings)
    assert not any("not measured" in text for text in tbq.plan(model(name), center=False).warnings)


def test_sinks_without_centering_keep_f16_keys(model):
    plan = tbq.plan(model("gpt-oss"), context=200_000, center=False)
    assert plan.sinks and plan.recommended == ("f16", "tbq4_0")
    assert "attention sinks" in plan.reason and any("attention sinks" in text for text in plan.warnings)
    memory = plan.pair("f16", "tbq4_0").bytes - 1
    smaller = tbq.plan(model("gpt-oss"), context=200_000, memory=memory, cache_only=True, center=False)
    assert smaller.recommended == ("f16", "tbq3_0")


@pytest.mark.parametrize(
    "bias,kept", [(0.0, "tbq4_0"), (0.5 * LARGE_BIAS, "tbq4_0"), (1.5 * LARGE_BIAS, "q8_0"), (1e4, "q8_0")]
)
def test_large_key_biases_keep_q8_0_keys(bias, kept, tmp_path):
    """One layer of many is enough: what its heads attend to is lost for all layers after it."""
    path = qwen2(tmp_path / "model.gguf", bias, layer=1, layers=3)
    plan = tbq.plan(path, context=32768)
    assert plan.recommended == (kept, "tbq4_0")
    if kept == "q8_0":
        assert list(plan.large_key_biases) == [1]
        assert plan.large_key_biases[1] == pytest.approx(bias, rel=0.1)  # the plan reads every 8th row
        assert any(re.search(r"large key biases in 1 of 3 layers \(layer 1: ", text) for text in plan.warnings)
    else:
        assert not plan.large_key_biases and plan.warnings[1:] == ()


@pytest.mark.parametrize("context,center", [(256, True), (1 << 20, False)])
def test_biases_that_centering_removes(context, center, tmp_path):
    """Large biases in slow channels: tbq keys that must be centered.

    Large biases in fast channels: q8_0 keys, as above.
    """
    import gguf

    path = qwen2(tmp_path / "model.gguf", 0.0)
    reader = gguf.GGUFReader(path, "r+")
    bias = next(t for t in reader.tensors if t.name == "blk.1.attn_k.bias").data
    bias[28:32], bias[60:64] = 20, 20  # the slowest four of 32 NEOX pairs
    reader.data.flush()
    long = (
        "--override-kv",
        "qwen2.context_length=int:1048576",
    )  # no sequence of llama-server is longer than the context that the model was trained for
    plan = tbq.plan(path, context=context, memory="1M", cache_only=True, options=long)
    assert list(plan.large_key_biases) == [1] and plan.center == center
    assert any(("center the keys" in text) == center for text in plan.warnings if "large key biases" in text)
    assert (plan.recommended[0] in tbq.types) == center
    uncentered = json.loads(
        command(
            path, "--context", context, "--memory", "1M", "--cache-only", "--no-center", "--json", "--", *long
        ).stdout
    )
    assert uncentered["recommended"][0] not in tbq.types
    assert tbq.plan(
        path, context=context, memory="1M", cache_only=True, center=False, options=long
    ).recommended == tuple(uncentered["recommended"])


def test_fused_projections_have_key_biases_too(tmp_path):
    """phi2 and others keep queries, keys and values in one tensor.

    A large bias of queries or values is not one of the keys.
    """
    import gguf

    for part, kept in ((0, "tbq4_0"), (1, "q8_0"), (2, "tbq4_0")):
        path = write_model(
            tmp_path / f"{part}.gguf", "qwen", 2, lambda i: {"attn_qkv.weight": (384, 128), "attn_qkv.bias": (384,)}
        )
        reader = gguf.GGUFReader(path, "r+")
        next(t for t in reader.tensors if t.name == "blk.1.attn_qkv.bias").data[128 * part : 128 * (part + 1)] = 10
        reader.data.flush()
        assert tbq.plan(path, context=32768).recommended == (kept, "tbq4_0")


def test_biases_that_cannot_be_judged(tmp_path):
    """Corrupt or unusual tensors of biases: a warning, but still a plan."""
    for name, shapes in {
        "shape": {"attn_k.bias": (32,)},
        "axes": {"attn_k.weight": (2, 64, 128)},
        "fused": {"attn_k.bias": None, "attn_qkv.weight": (64, 128), "attn_qkv.bias": (64,)},
    }.items():
        path = write_model(
            tmp_path / f"{name}.gguf",
            "qwen2",
            2,
            lambda i: attention(2, 1, 64) | {"attn_k.bias": (64,)} | shapes,
            kv_heads=1,
        )
        plan = tbq.plan(path)
        assert ["key biases are large is unknown" in text for text in plan.warnings] == [True]
        assert plan.pair("f16", "f16").bytes == 2 * 2 * 2 * 4096 * 64


@pytest.mark.parametrize("kind", ["q8_0", "tbq4_0", "q4_k"])
def test_biases_with_quantized_weights(kind, bin_dir, tmp_path):
    """The ratio barely depends on the type of the weights, tbq types included."""
    path = qwen2(tmp_path / "f32.gguf", 2 * LARGE_BIAS, heads=4, kv_heads=2)
    small = tmp_path / "small.gguf"
    # without --pure, some tensors get other types
    run(bin_dir / "llama-quantize", "--pure", path, small, kind)
    a, b = tbq.plan(path, context=32768), tbq.plan(small, context=32768)
    assert b.weights_bytes < a.weights_bytes / 1.8 and b.layers == a.layers
    assert b.large_key_biases[0] == pytest.approx(a.large_key_biases[0], rel=0.03)


@pytest.mark.parametrize(
    "name,pair", [("llama-h80", ("f16", "f16")), ("llama-h96", ("q8_0", "q8_0")), ("deepseek2", ("tbq4_0", "tbq4_0"))]
)
def test_recommends_what_starts(name, pair, model, bin_dir):
    plan = tbq.plan(model(name), context=65536)
    assert plan.recommended == pair
    assert Allocated(bin_dir, model(name), *plan.recommended, 512).started
    if name != "deepseek2":
        assert any(f"head size {name[-2:]}: 64 does not divide it" in text for text in plan.warnings)


def test_unknown_architecture_with_windows_is_uncertain(tmp_path):
    path = write_model(
        tmp_path / "model.gguf", "future", 2, lambda i: attention(2, 2, 64), attention__sliding_window=128
    )
    plan = tbq.plan(path)
    assert not plan.exact and "uncertain" in plan.warnings[0] and "128" in plan.warnings[0]
    assert {layer.kind for layer in plan.layers} == {"global"}


def test_longer_than_trained(model):
    assert any("longer than the 2048" in text for text in tbq.plan(model("llama"), context=4096).warnings)


# -- models without a cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", (bert, mamba))
def test_no_cache(make, bin_dir, tmp_path):
    """A plan, not an error: llama.cpp runs these models."""
    path = make(tmp_path / "model.gguf")
    plan = tbq.plan(path, parallel=3)
    assert (
        not plan.cached
        and plan.exact
        and plan.recommended == ("f16", "f16")
        and all(pair.bytes == 0 for pair in plan.pairs)
    )
    assert_same(plan, "f16", "f16", Allocated(bin_dir, path, "f16", "f16", plan.context, parallel=3))
    done = command(path)
    assert done.returncode == 0 and done.stderr == ""
    assert (
        f"no cache: a model of architecture '{make.__name__}' keeps no keys and values" in done.stdout
        and "recommended" not in done.stdout
    )
    assert ("recurrent states take" in done.stdout) == (make is mamba)
    small = command(path, "--memory", "100K")
    assert small.returncode == 0 and "warning: the memory is too small for the weights and the state" in small.stdout


def test_no_cache_types_to_compare(tmp_path):
    path = bert(tmp_path / "model.gguf")
    for what in ("quality", "speed"):
        done = subprocess.run(
            [sys.executable, "-m", "tbq", "bench", what, "--model", path], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and done.stdout == ""
        assert (
            done.stderr
            == f"tbq: error: model {str(path)!r} keeps no keys and values, so there are no cache types to compare\n"
        )


# -- options that change what the file says ----------------------------------------------------------------------------

#: Options, the most tokens that llama-server then gives a sequence, and the tokens that RoPE is set up for. The model
#: was trained for 4096 tokens.
STRETCHED = {
    "nothing": ((), 4096, 4096),
    "YaRN": (("--rope-scaling", "yarn", "--rope-scale", "4"), 16384, 16384),
    "YaRN, frequency": (("--rope_scaling", "yarn", "--rope-freq-scale", "0.3"), 13653, 13653),
    "YaRN, original": (("--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "2048"), 8192, 8192),
    "the last counts": (("--rope-scaling", "yarn", "--rope-scale", "4", "--rope-freq-scale", "0.5"), 8192, 8192),
    "YaRN of no scale": (("--rope-scaling", "yarn", "--yarn-orig-ctx", "2048"), 4096, 4096),
    "linear": (("--rope-scale", "2"), 4096, 8192),
    "none": (("--rope-scaling", "none", "--rope-scale", "2"), 4096, 4096),
    "override": (
        ("--override-kv", "tokenizer.ggml.add_bos_token=bool:false,llama.context_length=int:6000"),
        6000,
        6000,
    ),
    "override and YaRN": (
        (
            "--override-kv",
            "llama.context_length=int:2048",
            "--override-kv",
            "llama.rope.scaling.type=str:yarn",
            "--rope-scale",
            "2",
        ),
        4096,
        4096,
    ),
    "override of another type": (("--override-kv", "llama.context_length=float:6000"), 4096, 4096),
    "nonsense": (("--rope-scaling", "yarn", "--rope-scale", "no", "--override-kv", "x"), 4096, 4096),
}


@pytest.fixture(scope="module")
def trained_for_4096(tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("rope") / "model.gguf",
        "llama",
        1,
        lambda i: attention(2, 1, 64),
        kv_heads=1,
        size=64,
        rope__dimension_count=64,
    )


@pytest.mark.parametrize("name", STRETCHED)
def test_contexts_that_options_make(name, trained_for_4096, bin_dir, tmp_path):
    """As long as llama-server's slots."""
    options, slot, reach = STRETCHED[name]
    plan = tbq.plan(trained_for_4096, options=options)
    assert (plan.context_train, plan.context) == (slot, slot)
    assert read_model(trained_for_4096, options).context == reach
    if name != "nonsense":  # llama-server refuses it
        with Server(bin_dir, trained_for_4096, tmp_path / "log", *options, n_ctx=32768) as server:
            assert int(re.search(r"n_ctx_slot = (\d+)", server.log)[1]) == slot


def test_options_that_change_the_cache(trained_for_4096, bin_dir):
    """--override-kv changes what the plan reads, and -fa off what it recommends."""
    options = ("--override-kv", "llama.attention.head_count_kv=int:2")
    assert tbq.plan(trained_for_4096, options=options).layers[0].kv_heads == 2
    for options in (("-fa", "off"), ("--flash-attn", "0")):
        plan = tbq.plan(trained_for_4096, context=32768, options=options)
        assert plan.recommended == ("tbq4_0", "f16") and "-fa off" in plan.refused["tbq4_0/tbq4_0"]
    log = run(
        bin_dir / "llama-batched-bench",
        "-m",
        trained_for_4096,
        "-c",
        512,
        "-ctk",
        "tbq4_0",
        "-ctv",
        "f16",
        "-fa",
        "off",
        "-npp",
        1,
        "-ntg",
        1,
        "-npl",
        1,
    )
    assert log.returncode == 0
    done = command(trained_for_4096, "--json", "--", "--rope-scaling", "yarn", "--rope-scale", "4")
    assert json.loads(done.stdout)["context"] == 16384


# -- files -------------------------------------------------------------------------------------------------------------


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "tbq", "plan", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=60
    )


def one_line(done):
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("tbq: error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_split_model(demo_model, bin_dir, tmp_path):
    run(bin_dir / "llama-gguf-split", "--split-max-size", "40M", demo_model, tmp_path / "part")
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    whole, split = tbq.plan(demo_model), tbq.plan(parts[0])
    assert (split.layers, split.pairs, split.weights_bytes) == (whole.layers, whole.pairs, whole.weights_bytes)
    assert tbq.plan(parts[1]).pairs == whole.pairs
    parts[1].unlink()
    with pytest.raises(tbq.TBQError, match=r"00002-of-.* is not in the same folder"):
        tbq.plan(parts[0])


def test_truncated_anywhere(model, tmp_path):
    """Wherever a file ends, there is an error of one line, and never a crash, a hang or a plan."""
    data, path = Path(model("qwen2")).read_bytes(), tmp_path / "cut.gguf"
    for length in (*range(64), *range(64, 9000, 97), *range(9000, len(data), len(data) // 20), len(data) - 1000):
        path.write_bytes(data[:length])
        with pytest.raises(tbq.TBQError, match=r"cut\.gguf") as error:
            tbq.plan(path)
        assert "\n" not in str(error.value)


def test_corrupt_anywhere(model, tmp_path):
    """With another byte in the header there is a plan or a TBQError."""
    data, path, rng = bytearray(Path(model("qwen2")).read_bytes()), tmp_path / "corrupt.gguf", np.random.default_rng(0)
    for at in [*range(600), *rng.integers(600, 9000, 300)]:
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            tbq.plan(path)
        except tbq.TBQError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({}, "names no general.architecture"),
        ({"general.architecture": "bert"}, "has no bert.block_count"),
        ({"general.architecture": "clip"}, "is not a language model"),
        ({"general.architecture": "deepseek4"}, "compressed cache whose size this command does not know"),
        ({"general.architecture": "llama"}, "has no llama.block_count"),
        ({"general.architecture": "llama", "llama.block_count": 100000}, "takes 1 to 512 layers"),
        ({"general.architecture": "llama", "llama.block_count": "two"}, "llama.block_count is 'two'"),
        (
            {
                "general.architecture": "llama",
                "llama.block_count": 2,
                "llama.context_length": 8,
                "llama.embedding_length": 128,
                "llama.attention.head_count": [2],
            },
            r"head_count has 1 values; 2 layers need one each",
        ),
    ],
)
def test_metadata_that_describes_no_model(fields, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", {"general.name": "x", **fields}, {"a": np.zeros(4, "f4")})
    with pytest.raises(tbq.TBQError, match=message):
        tbq.plan(path)


# -- the command -------------------------------------------------------------------------------------------------------


def test_command(demo_model, tmp_path):
    done = command(demo_model, "--memory", "1G", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"^ +30 x global: 3 KV heads, keys of 64, values of 64$", done.stdout, re.M)
    assert re.search(
        r"^\* +tbq4_0 / tbq4_0 +25,067,520 +25,067,520 +6,719,760 +56,854,800 +54.2 MiB +30.1 % +\d+$",
        done.stdout,
        re.M,
    )
    assert "recommended: -c 8192 --cache-type-k tbq4_0 --cache-type-v tbq4_0" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json(model):
    done = command(model("gemma3"), "--json", "--context", "8192", "--types", "f16,tbq4_0/tbq3_0")
    data = json.loads(done.stdout)
    plan = tbq.plan(model("gemma3"), context=8192, pairs=[("f16", "f16"), ("tbq4_0", "tbq3_0")])
    assert [(p["k"], p["v"], p["bytes"]) for p in data["pairs"]] == [(p.k, p.v, p.bytes) for p in plan.pairs]
    assert data["pairs"][0]["by_kind"] == {kind: list(sizes) for kind, sizes in plan.pairs[0].by_kind.items()}
    assert data["recommended"] == list(plan.recommended)
    assert [layer["kind"] for layer in data["layers"]].count("window") == 6


@pytest.mark.parametrize("name", ["a.png", "b.svg", "C.PDF"])
def test_plot(name, model, tmp_path):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib (pip install 'ggml-tbq[plot]')")
    done = command(model("llama"), "--memory", "64M", "--plot", tmp_path / name)
    assert done.returncode == 0, done.stderr
    data = (tmp_path / name).read_bytes()
    assert data[:4] in (b"\x89PNG", b"%PDF", b"<?xm") and len(data) > 5000
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_plot_shows_the_bytes(model, tmp_path, monkeypatch):
    """The curves are those of bytes_at, and the memory is a line."""
    figure = pytest.importorskip(
        "matplotlib.figure", reason="the pictures need matplotlib (pip install 'ggml-tbq[plot]')"
    )
    kept = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **_: kept.append(self))
    plan = tbq.plan(model("llama"), memory="64M")
    plot(plan, tmp_path / "a.png")
    lines = {line.get_label(): line for line in kept[0].axes[0].get_lines()}
    x, y = lines["tbq4_0 / tbq4_0 (recommended)"].get_data()
    expected = [plan.weights_bytes + plan.state_bytes + plan.bytes_at("tbq4_0", "tbq4_0", int(n)) for n in x]
    assert list(np.asarray(y) * 2**30) == pytest.approx(expected)
    assert lines["memory"].get_ydata()[0] == 64 / 1024
    assert len(lines) == len(plan.pairs) + 2


def test_plot_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib (pip install 'ggml-tbq[plot]')")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        plot(tbq.plan(model("llama")), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("nowhere.gguf",), "No such file or directory: nowhere.gguf"),
        (("/",), "/ is not a regular file"),
        ((__file__,), "is not a GGUF file"),
        (("MODEL", "--memory", "lots"), "size 'lots' is not understood; write 8G"),
        (("MODEL", "--memory", "0"), "size '0' must be more than 0"),
        (("MODEL", "--context", "0"), "context is 0; it must be an integer from 1"),
        (("MODEL", "--context", "99999999999"), "context is 99999999999"),
        (("MODEL", "--parallel", "1000"), "at most 256 sequences"),
        (("MODEL", "--types", "f16,tbq5_0"), "cache type 'tbq5_0' is not one of tbq2_0, tbq3_0, tbq4_0, f32, f16"),
        (("MODEL", "--types", "tbq4_0/"), "cache type '' is not one of"),
        (("MODEL", "--types", ""), "--types names no pair"),
        (("MODEL", "--plot", "a.bmp"), "--plot 'a.bmp' must end in one of ."),
        (("MODEL", "--plot", "no/such/folder/a.png"), "--plot 'no/such/folder/a.png' cannot be written"),
    ],
)
def test_errors(arguments, message, model, tmp_path):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="the pictures need matplotlib (pip install 'ggml-tbq[plot]')")
    done = command(*(model("llama") if x == "MODEL" else x for x in arguments), cwd=tmp_path)
    if message is None:
        assert done.returncode == 0
    else:
        assert message in one_line(done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text,size",
    [
        ("8G", 8 << 30),
        ("512M", 512 << 20),
        ("6.5GiB", 13 << 29),
        ("24GB", 24 * 10**9),
        ("1 t", 1 << 40),
        ("100", 100),
        ("100B", 100),
        (".5k", 512),
        (4096, 4096),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "8X", "-1G", "1e400", "nan", "8 GiBs", "9" * 400, -5, True, 1.5])
def test_sizes_that_are_none(text):
    with pytest.raises(tbq.TBQError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(model=5), "model is 5"),
        (dict(context="8k"), "context is '8k'"),
        (dict(context=True), "context is True"),
        (dict(memory=-1), "size -1"),
        (dict(parallel=0), "parallel is 0"),
        (dict(ubatch=0), "ubatch is 0"),
        (dict(pairs=["f16"]), "pair 'f16' must be two names"),
        (dict(pairs=[("f16", "q9")]), "cache type 'q9'"),
    ],
)
def test_wrong_arguments(arguments, message, model):
    with pytest.raises(tbq.TBQError, match=re.escape(message)):
        tbq.plan(**{"model": model("llama"), **arguments})


def test_names_in_files_do_not_reach_the_terminal_as_they_are(tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf",
        {
            "general.architecture": "llama",
            "general.name": "a\x1b[31m\nb" + "c" * 1000,
            "llama.block_count": 1,
            "llama.context_length": 8,
            "llama.embedding_length": 64,
            "llama.attention.head_count": 1,
        },
        {"a": np.zeros(4, "f4")},
    )
    assert report(tbq.plan(path)).startswith("a?[31m?bccc")
    assert len(report(tbq.plan(path)).splitlines()[0]) < 200


def test_pair_that_is_not_in_the_plan(model):
    plan = tbq.plan(model("llama-h80"))
    with pytest.raises(tbq.TBQError, match="pair tbq4_0/tbq4_0 is not in the plan; tbq4_0 has blocks of 64 values"):
        plan.pair("tbq4_0", "tbq4_0")
    with pytest.raises(tbq.TBQError, match="pair q5_0/q5_0 is not in the plan; there is f16/f16"):
        plan.pair("q5_0", "q5_0")
