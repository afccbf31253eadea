# SPDX-License-Identifier: MIT
"""Images (`--mmproj`): real llama-server processes on tiny random models and projectors that the tests write.

One model has M-RoPE, where all tokens of an image share a position; one has a position for each; one has sliding
windows, and the tokens of an image see each other there.
"""

import base64
import math
import re
import struct
import zlib

import numpy as np
import pytest

import tbq
from llama_tools import Server, tiny_llama, tiny_qwen2vl, write_gguf
from tbq._exact_rows import FIRST, RECENT
from test_plan import gemma3

CONTEXT, SLOTS = 2048, 2
KINDS = ("m-rope", "llava", "gemma3")


def png(draw, size=448):
    """A PNG file, size x size, of draw(y, x): RGB values from 0 to 1."""
    y, x = np.mgrid[:size, :size] / size
    pixels = (255 * np.clip(np.stack(np.broadcast_arrays(*draw(y, x)), axis=-1), 0, 1)).astype("u1")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each row begins with its filter: none

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


STRIPES = png(lambda y, x: (np.sin(40 * x) > 0, np.sin(40 * x) > 0.5, x))
DISC = png(lambda y, x: ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.1, y, 1 - x))


def write_projector(path, kind, embd, image=224, patch=14, width=64, ff=128, heads=2, layers=2, seed=3):
    """A vision encoder of Gaussian weights whose outputs are as large as the embeddings of tokens."""
    rng = np.random.default_rng(seed)
    projector = {"m-rope": "qwen2vl_merger", "llava": "mlp", "gemma3": "gemma3"}[kind]
    fields = {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.projector_type": projector,
        "clip.use_gelu": True,
        "clip.vision.image_size": image,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": width,
        "clip.vision.feed_forward_length": ff,
        "clip.vision.projection_dim": embd,
        "clip.vision.block_count": layers,
        "clip.vision.attention.head_count": heads,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.25, 0.25, 0.25],
    }
    tensors = {}

    def linear(name, inputs, outputs):
        tensors[f"{name}.weight"] = rng.standard_normal((outputs, inputs)) / math.sqrt(inputs)
        tensors[f"{name}.bias"] = np.zeros(outputs)

    def norm(name):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = np.ones(width), np.zeros(width)

    for i in range(layers):
        b = f"v.blk.{i}"
        norm(f"{b}.ln1"), norm(f"{b}.ln2")
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            linear(f"{b}.{name}", width, width)
        linear(f"{b}.ffn_up", width, ff), linear(f"{b}.ffn_down", ff, width)
    norm("v.post_ln")
    kernel = rng.standard_normal((width, 3, patch, patch)) / math.sqrt(3 * patch * patch)
    tensors["v.patch_embd.weight"] = kernel
    if kind == "m-rope":
        tensors["v.patch_embd.weight.1"] = kernel
        linear("mm.0", 4 * width, 4 * width), linear("mm.2", 4 * width, embd)
    else:
        tensors["v.position_embd.weight"] = rng.standard_normal(((image // patch) ** 2, width))
    if kind == "llava":
        linear("mm.0", width, embd), linear("mm.2", embd, embd)
    if kind == "gemma3":
        tensors["mm.input_projection.weight"] = rng.standard_normal((width, embd)) / math.sqrt(width)
        tensors["mm.soft_emb_norm.weight"] = np.ones(width)
        fields["clip.vision.projector.scale_factor"] = 2
    return write_gguf(path, fields, tensors)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (model, projector)."""
    folder = tmp_path_factory.mktemp("vision")
    made = {}
    for kind, write, embd in (("m-rope", tiny_qwen2vl, 256), ("llava", tiny_llama, 256), ("gemma3", gemma3, 128)):
        more = {"head": 64} if kind == "llava" else {}
        model = write(folder / f"{kind}.gguf", **more)
        made[kind] = model, write_projector(folder / f"mmproj-{kind}.gguf", kind, embd)
    return made


def server(bin_dir, model, projector, log, k, v, *options):
    return Server(
        bin_dir,
        model,
        log,
        *("--mmproj", projector, "-ctk", k, "-ctv", v, "--cache-center", "auto"),
        *("--cache-recent", RECENT, "--cache-first", FIRST, "--image-min-tokens", 8, "-kvu", *options),
        n_ctx=CONTEXT,
        slots=SLOTS,
    )


def ask(running, *content, n=8, **body):
    """The answer to a message of texts and images: (its tokens, log probabilities of all tokens for the first one)."""
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(part).decode()}}
        for part in content
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": n,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 260,
        # no ends and no halves of letters, for which the server waits
        "logit_bias": [[token, False] for token in (*range(3), *range(3 + 128, 260))],
        **body,
    }
    status, answer = running.request("/v1/chat/completions", body)
    assert status == 200, answer
    tokens = answer["choices"][0]["logprobs"]["content"]
    first = {bytes(top["bytes"]) or top["id"]: top["logprob"] for top in tokens[0]["top_logprobs"]}
    return [token["id"] for token in tokens], first, answer["usage"]


def distance(a, b):
    """The largest difference of two answers' log probabilities for the first token."""
    assert a.keys() == b.keys() and len(a) > 200
    return max(abs(a[token] - b[token]) for token in a)


QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def answers(models, bin_dir, tmp_path_factory):
    """(kind, type) -> what the server answered, and its log."""
    folder, found = tmp_path_factory.mktemp("answers"), {}

    def get(kind, type_):
        if (kind, type_) in found:
            return found[kind, type_]
        options = ("--slot-save-path", f"{folder}/", "--cache-ram", 64)
        with server(bin_dir, *models[kind], folder / f"{kind}-{type_}.log", type_, type_, *options) as running:
            stripes = ask(running, QUESTION, STRIPES, id_slot=0)
            saved = running.slot("save", f"{kind}-{type_}")
            disc = ask(running, QUESTION, DISC, id_slot=0)
            restored = running.slot("restore", f"{kind}-{type_}")
            found[kind, type_] = {
                "stripes": stripes,
                "disc": disc,
                "saved": saved[0],
                "restored": restored[0],
                "again": ask(running, QUESTION, STRIPES, id_slot=0),
                "two": ask(running, QUESTION, STRIPES, DISC, QUESTION, id_slot=1),
                "text": ask(running, QUESTION, id_slot=1),
                "log": running.log,
            }
        return found[kind, type_]

    return get


PICTURES = ("stripes", "disc", "two")


@pytest.mark.parametrize("kind", KINDS)
def test_same_start_as_f16(kind, answers):
    """The text begins as that of f16.

    The probabilities differ by what four bits lose: a few tenths of a nat, as with q4_0. Another picture, or none,
    changes them by several nats.
    """
    f16, packed = answers(kind, "f16"), answers(kind, "tbq4_0")
    assert (
        "the newest 128 and the first 4 rows" in packed["log"] and "keys are stored minus their means" in packed["log"]
    )
    lost = [distance(f16[name][1], packed[name][1]) for name in (*PICTURES, "text")]
    other = [distance(f16[a][1], f16[b][1]) for a, b in (("stripes", "disc"), ("stripes", "two"), ("stripes", "text"))]
    print(kind, lost, other, [(f16[name][0], packed[name][0]) for name in PICTURES])  # -s shows it
    assert max(lost) < min(other) / 3, (lost, other)
    for name in PICTURES:
        assert f16[name][0][:4] == packed[name][0][:4], name
        assert f16[name][2]["prompt_tokens"] == packed[name][2]["prompt_tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_slot_has_its_image(kind, answers):
    """A slot with an image is saved and restored, with its exact rows, and answers as before."""
    for type_ in ("f16", "tbq4_0"):
        found = answers(kind, type_)
        assert (found["saved"], found["restored"]) == (200, 200)
        cached = found["again"][2]["prompt_tokens_details"]["cached_tokens"]
        # a server with sliding windows begins anew
        assert cached == found["again"][2]["prompt_tokens"] - 1 or kind == "gemma3"
        assert distance(found["again"][1], found["stripes"][1]) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_plan(kind, answers, models):
    """tbq plan is right to the byte: cache and exact rows."""
    found = tbq.plan(models[kind][0], context=CONTEXT, parallel=SLOTS, unified=True).pair("tbq4_0", "tbq4_0")
    log = answers(kind, "tbq4_0")["log"]
    caches = re.findall(r"llama_kv_cache: size = .*K \(tbq4_0\): +([\d.]+) MiB, V \(tbq4_0\): +([\d.]+) MiB", log)
    exact = float(re.search(r"kept in 8 bits: \d+ layers, ([\d.]+) MiB", log)[1])
    assert len(caches) == (2 if kind == "gemma3" else 1)
    assert found.exact_bytes / 2**20 == pytest.approx(exact, abs=0.006)
    assert (found.bytes - found.exact_bytes) / 2**20 == pytest.approx(
        sum(float(size) for pair in caches for size in pair), abs=0.006 * 2 * len(caches)
    )


REFUSALS = {
    "m-rope": "KV cache shifting is not supported for this context",
    "llava": "ctx_shift is not supported by multimodal",
}


@pytest.mark.parametrize("type_", ["f16", "tbq4_0"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_the_context_ends(kind, type_, models, bin_dir, tmp_path):
    """Nothing shifts a context that can have images: the answer ends where the context does."""
    with server(
        bin_dir, *models[kind], tmp_path / "log", type_, type_, "--context-shift", "-c", 512, "-np", 1
    ) as running:
        tokens, _, usage = ask(running, QUESTION, STRIPES, n=400)
        assert usage["total_tokens"] <= 512 and 50 < len(tokens) < 400
        assert REFUSALS[kind] in running.log
        assert ask(running, QUESTION, DISC, n=4)[0]
