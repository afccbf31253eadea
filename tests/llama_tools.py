# SPDX-License-Identifier: MIT
"""Runs the patched llama.cpp's programs and reads what they print. Real processes only."""

import json
import os
import re
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

TBQ = ("tbq4_0", "tbq3_0", "tbq2_0")

# ggml type -> (values per block, bytes per block)
BLOCK = {
    "f32": (1, 4),
    "f16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "tbq4_0": (64, 34),
    "tbq3_0": (64, 26),
    "tbq2_0": (64, 18),
}

# SmolLM2-135M-Instruct
LAYERS, HEADS, KV_HEADS, HEAD = 30, 9, 3, 64

# Greedy and repeatable. Two threads, so that the suite gives the same results on every machine.
GREEDY = ("--temp", "0", "--seed", "1")
THREADS = ("-t", "2", "-tb", "2")
# Most tests are about the packed rows. Exact rows, which are on by default, would hide them: tests/test_exact.py.
PACKED = ("--cache-recent", 0, "--cache-first", 0)

# Waiting threads sleep instead of spinning. On a busy machine, spinning makes two threads ten times slower than one
# (measured). On an idle machine it makes no difference to a test.
# Keys are centered only where a test says so: test_center.py has the default, --cache-center auto.
ENV = {**os.environ, "OMP_WAIT_POLICY": "passive", "LLAMA_ARG_CACHE_CENTER": "none"}


def n_bytes(type_name, values):
    per_block, size = BLOCK[type_name]
    assert values % per_block == 0
    return values // per_block * size


def cache_mib(type_name, n_ctx, layers=LAYERS, kv_heads=KV_HEADS, head=HEAD):
    """MiB of the K or the V tensors of the cache."""
    return n_ctx * layers * n_bytes(type_name, kv_heads * head) / 2**20


def run(program, *args, ok=True, timeout=180, cwd=None, env=ENV):
    """Runs a program to its end; stdout and stderr are separate. With ok, a status other than 0 is a failure."""
    cmd = [str(program), *map(str, args)]
    done = subprocess.run(
        cmd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        cwd=cwd,
        env=env,
    )
    if ok and done.returncode != 0:
        raise AssertionError(f"status {done.returncode}: {' '.join(cmd)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def number(label, text):
    """The number that is printed after a label. A missing one fails with what was printed instead."""
    m = re.search(label + r"[ :=]*(-?(?:[\d.]+|nan|inf))", text)
    assert m, f"no {label!r} in:\n{text[-3000:]}"
    return float(m[1])


def complete(bin_dir, model, prompt, *args, n=16, n_ctx=256, **kw):
    """llama-completion on a raw prompt: (generated text, log). Level 4 shows libllama's own lines."""
    done = run(
        Path(bin_dir) / "llama-completion",
        "-m",
        model,
        "-p",
        prompt,
        "-n",
        n,
        "-c",
        n_ctx,
        "-no-cnv",
        "--no-display-prompt",
        "-lv",
        4,
        *THREADS,
        *GREEDY,
        *PACKED,
        *args,
        **kw,
    )
    return done.stdout.strip(), done.stderr + done.stdout


def cache_line(log):
    """The start-up line about the cache, as a dict."""
    m = re.search(
        r"llama_kv_cache: size = *([\d.]+) MiB \( *(\d+) cells, *(\d+) layers.*"
        r"K \((\w+)\): *([\d.]+) MiB, V \((\w+)\): *([\d.]+) MiB",
        log,
    )
    assert m, f"no cache line in the log:\n{log[-3000:]}"
    size, cells, layers, k, k_mib, v, v_mib = m.groups()
    return {
        "mib": float(size),
        "cells": int(cells),
        "layers": int(layers),
        "k": k,
        "k_mib": float(k_mib),
        "v": v,
        "v_mib": float(v_mib),
    }


def flash_attention_on(log):
    """Whether `-fa auto` ended at on. A quantized V decides it at once, otherwise the scheduler's probe decides."""
    return bool(
        re.search(
            r"enabling flash_attn since it is required for quantized V cache"
            r"|resolve_fused_ops: Flash Attention enabled",
            log,
        )
    )


# -- perplexity ---------------------------------------------------------------------------------


def python_text(path):
    """The topics of Python's language reference, in alphabetical order. Every CPython has this text."""
    from pydoc_data.topics import topics

    Path(path).write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


class Divergence:
    """llama-perplexity against logits that an f16 cache saved once.

    Only the second half of each chunk is scored.  With fewer than 100 scores there is no sum, so n_ctx must be at
    least 256.
    """

    def __init__(self, bin_dir, model, text, base, n_ctx=512, chunks=2, args=()):
        self.program, self.model, self.base = Path(bin_dir) / "llama-perplexity", model, base
        self.size = ("-c", n_ctx, "-b", n_ctx, "--chunks", chunks)
        self.base_ppl = number("Final estimate: PPL", self._run(model, "-f", text, *args))

    def _run(self, model, *args):
        done = run(
            self.program,
            "-m",
            model,
            "--kl-divergence-base",
            self.base,
            *self.size,
            *THREADS,
            *PACKED,
            *args,
            timeout=300,
        )
        return done.stdout + done.stderr

    def __call__(self, k="f16", v="f16", *args, model=None):
        """Statistics of a K/V pair, or of another file of the same model: kld, kld_max, ppl, same_top (percent)."""
        out = self._run(model or self.model, "--kl-divergence", "-ctk", k, "-ctv", v, *args)
        return {
            key: number(label, out)
            for key, label in (
                ("kld", r"Mean +KLD"),
                ("kld_max", r"Maximum KLD"),
                ("ppl", r"Mean PPL\(Q\)"),
                ("same_top", r"Same top p"),
            )
        }


# -- server -------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """llama-server for the length of a `with` block. It never outlives the block."""

    def __init__(self, bin_dir, model, log, *args, n_ctx=512, slots=1, env=ENV):
        self.port, self.log_path, self.env = free_port(), Path(log), env
        # No prompt cache in RAM and no reuse that depends on batches: only the test saves and restores.
        self.cmd = [
            str(x)
            for x in (
                Path(bin_dir) / "llama-server",
                "-m",
                model,
                "--host",
                "127.0.0.1",
                "--port",
                self.port,
                "-c",
                n_ctx,
                "-np",
                slots,
                "--no-ui",
                "--no-warmup",
                "--cache-ram",
                0,
                "-lv",
                4,
                *THREADS,
                *GREEDY,
                *PACKED,
                *args,
            )
        ]

    def __enter__(self):
        self.out = open(self.log_path, "wb")
        self.process = subprocess.Popen(
            self.cmd, stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.out, env=self.env
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_ready(self):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"llama-server ended with status {self.process.returncode}:\n{self.written[-3000:]}"
                )
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"llama-server not ready after 60 s:\n{self.written[-3000:]}")

    def __exit__(self, *exc):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.out.close()

    @property
    def written(self):
        """What is in the log. A thread of its own writes it, so the last lines may be missing."""
        return self.log_path.read_text(errors="replace")

    @property
    def log(self):
        """What the server has said up to now. Lines are written in order, so one is provoked and waited for: of a
        request that is no JSON, which the server cites. It wakes a server that sleeps."""
        if self.process.poll() is None:
            mark = f"mark {time.monotonic_ns()}'"
            request = urllib.request.Request(f"http://127.0.0.1:{self.port}/tokenize", f'"{mark[:-1]}'.encode())
            try:
                urllib.request.urlopen(request, timeout=10).close()
            except urllib.error.HTTPError as error:
                error.close()
            except OSError:
                return self.written  # it hangs, or ended
            end = time.monotonic() + 10
            while self.process.poll() is None and mark not in self.written:
                assert time.monotonic() < end, f"llama-server did not log a request:\n{self.written[-3000:]}"
                time.sleep(0.005)
        return self.written

    def request(self, path, body=None):
        """The status and the parsed answer of a request, whatever the status."""
        req = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(req, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path):
        return self.request(path)

    def complete(self, prompt, n=24, **body):
        """The answer of /completion. It fails unless the status is 200."""
        status, answer = self.request(
            "/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "seed": 1, **body}
        )
        assert status == 200, answer
        return answer

    def slot(self, action, filename, slot=0):
        return self.request(f"/slots/{slot}?action={action}", {"filename": filename})


# -- tiny models ---------------------------------------------------------------------------------


def write_gguf(path, fields, tensors):
    """Writes a GGUF file.

    fields: {key: bool, int (u32), float (f32), str, or a list of str, float or int (i32)}. tensors: {name: float32
    array, or (type number, shape as in NumPy, bytes)}.
    """
    import numpy as np

    def text(s):
        s = s.encode()
        return struct.pack("<Q", len(s)) + s

    def kind_and_bytes(value):
        if isinstance(value, list):
            kind = 5 if isinstance(value[0], int) else kind_and_bytes(value[0])[0]
            return 9, struct.pack("<IQ", kind, len(value)) + b"".join(kind_and_bytes(x)[1] for x in value)
        for of, kind, pack in (
            (bool, 7, lambda v: struct.pack("<B", v)),
            (int, 4, lambda v: struct.pack("<I", v)),
            (float, 6, lambda v: struct.pack("<f", v)),
            (str, 8, text),
        ):
            if isinstance(value, of):
                return kind, pack(value)
        raise TypeError(value)

    head, data = [], b""
    for key, value in fields.items():
        kind, packed = kind_and_bytes(value)
        head.append(text(key) + struct.pack("<I", kind) + packed)
    for name, tensor in tensors.items():
        kind, shape, raw = (
            tensor if isinstance(tensor, tuple) else (0, tensor.shape, np.ascontiguousarray(tensor, "<f4").tobytes())
        )
        head.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data)))
        data += raw + bytes(-len(raw) % 32)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields)) + b"".join(head)
    Path(path).write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def byte_tokenizer():
    """<unk>, <s>, </s> and the 256 bytes, which are enough for every text.

    One unused token makes the number even, because llama-perplexity misreads its own file of logits when the
    vocabulary is odd.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<unused>"]
    prefix = "tokenizer.ggml."
    return {
        prefix + "model": "llama",
        prefix + "tokens": tokens,
        prefix + "scores": [0.0] * len(tokens),
        prefix + "token_type": [2, 3, 3, *[6] * 256, 5],  # unknown, control, control, bytes, unused
        prefix + "unknown_token_id": 0,
        prefix + "bos_token_id": 1,
        prefix + "eos_token_id": 2,
        prefix + "add_space_prefix": False,
    }


def write_random(path, arch, fields, layer, layers, embd, ff, seed):
    """A model of Gaussian float32 weights over the byte tokenizer.

    layer(add, ones, prefix) adds the attention of a block.  Unless it returns True, a plain feed-forward network is
    added.
    """
    import numpy as np

    rng, tensors, tokenizer = np.random.default_rng(seed), {}, byte_tokenizer()
    vocab = len(tokenizer["tokenizer.ggml.tokens"])
    fields = {
        "context_length": 2048,
        "embedding_length": embd,
        "block_count": layers,
        "feed_forward_length": ff,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        **fields,
    }

    def add(name, *shape, scale=1.0):
        tensors[f"{name}.weight"] = (rng.standard_normal(shape) * scale / np.sqrt(shape[-1])).astype("f4")

    def ones(name, n=embd):
        tensors[f"{name}.weight"] = np.ones(n, "f4")

    add("token_embd", vocab, embd, scale=embd**0.5)
    add("output", vocab, embd, scale=3)
    ones("output_norm")
    if arch == "stablelm":
        tensors["output_norm.bias"] = np.zeros(embd, "f4")
    for b in (f"blk.{i}" for i in range(layers)):
        ones(f"{b}.attn_norm"), ones(f"{b}.ffn_norm")
        if arch == "stablelm":  # its norms have biases
            tensors[f"{b}.attn_norm.bias"] = tensors[f"{b}.ffn_norm.bias"] = np.zeros(embd, "f4")
        if not layer(add, ones, b):
            add(f"{b}.ffn_gate", ff, embd), add(f"{b}.ffn_up", ff, embd), add(f"{b}.ffn_down", embd, ff)
    return write_gguf(
        path, {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in fields.items()}, **tokenizer}, tensors
    )


def tiny_llama(
    path,
    head,
    heads=4,
    kv_heads=2,
    layers=2,
    embd=256,
    ff=512,
    experts=0,
    seed=1,
    arch="llama",
    rope=None,
    sections=None,
):
    """A random llama with a given head size; with experts, a mixture of experts, of which a token uses two.

    The scales make attention matter: logits are a few units before the softmax, and the residual stream does not
    drown the values.  So a cache that is read wrongly shows in the output.
    """
    fields = {
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": rope or head,
        **({"expert_count": experts, "expert_used_count": 2} if experts else {}),
        **({"rope.dimension_sections": sections} if sections else {}),
    }

    def layer(add, ones, b):
        add(f"{b}.attn_q", heads * head, embd, scale=2)
        add(f"{b}.attn_k", kv_heads * head, embd)
        add(f"{b}.attn_v", kv_heads * head, embd)
        add(f"{b}.attn_output", embd, heads * head, scale=2)
        if experts:
            add(f"{b}.ffn_gate_inp", experts, embd)
            add(f"{b}.ffn_gate_exps", experts, ff, embd), add(f"{b}.ffn_up_exps", experts, ff, embd)
            add(f"{b}.ffn_down_exps", experts, embd, ff)
        return experts > 0

    return write_random(path, arch, fields, layer, layers, embd, ff, seed)


def tiny_qwen2vl(path, **sizes):
    """A random model with M-RoPE: each of a token's three positions turns a part of the channels."""
    return tiny_llama(path, head=64, arch="qwen2vl", sections=[8, 12, 12, 0], **sizes)


def tiny_mla(path, heads=4, layers=2, embd=256, ff=512, seed=1):
    """A random deepseek2 with latent attention: one KV head, and keys of 576, whose first 512 values are the values."""
    lora_q, lora_kv, rope, k_mla, v_mla = 128, 512, 64, 192, 128
    fields = {
        "attention.head_count": heads,
        "attention.head_count_kv": 1,
        "attention.key_length": lora_kv + rope,
        "attention.value_length": lora_kv,
        "attention.key_length_mla": k_mla,
        "attention.value_length_mla": v_mla,
        "attention.q_lora_rank": lora_q,
        "attention.kv_lora_rank": lora_kv,
        "rope.dimension_count": rope,
        "leading_dense_block_count": layers,
        "expert_feed_forward_length": ff,
        "expert_shared_count": 1,
    }

    def layer(add, ones, b):
        add(f"{b}.attn_q_a", lora_q, embd), ones(f"{b}.attn_q_a_norm", lora_q)
        add(f"{b}.attn_q_b", heads * k_mla, lora_q, scale=2)
        add(f"{b}.attn_kv_a_mqa", lora_kv + rope, embd), ones(f"{b}.attn_kv_a_norm", lora_kv)
        add(f"{b}.attn_k_b", heads, lora_kv, k_mla - rope), add(f"{b}.attn_v_b", heads, v_mla, lora_kv)
        add(f"{b}.attn_output", embd, heads * v_mla, scale=2)

    return write_random(path, "deepseek2", fields, layer, layers, embd, ff, seed)
