#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Divergence of stored pages: those of tbq.vllm beside vLLM's own TurboQuant types, on a CPU, without vLLM.

    python3 bench/vllm.py [--tokens 4096] [--texts 6]

Needs torch, transformers, accelerate, gguf and the compiled package.  A model reads a prompt with a plain cache; then
all of its rows go through pages and back, and 64 more tokens are read in one step.  KL divergence of their
distributions to those of the plain cache.  The bytes of tbq's pages are the library's.  vLLM's types are computed as
vLLM 0.25.1 says (their kernels are for GPUs): keys by their length, a Hadamard transform, Lloyd-Max levels for
N(0, 1/d) and a correction of the length; values uniform between the smallest and the largest; 16-bit scales.  As in
vLLM, they leave the first and the last two layers as they are, which counts in their bits.
"""

import argparse
import functools
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

FED = 64
SKIPPED = 2  #: layers at either end that vLLM's types leave as they are


@functools.cache
def lloyd_max(bits, size):
    """Levels for a normal distribution of variance 1 / size, by Lloyd's iteration on its quantiles."""
    x = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    levels = torch.linspace(-3, 3, 2**bits, dtype=torch.float64)
    for _ in range(150):
        index = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        levels = torch.zeros_like(levels).index_add_(0, index, x) / torch.bincount(index, minlength=2**bits)
    return (levels / size**0.5).float()


def hadamard(size):
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


def theirs(k, v, k_bits, v_bits):
    """What vLLM's turboquant types make of keys and values, (..., size)."""
    size = k.shape[-1]
    levels, h = lloyd_max(k_bits, size), hadamard(size)
    length = k.norm(dim=-1, keepdim=True)
    y = levels[torch.bucketize(k / (length + 1e-8) @ h, (levels[1:] + levels[:-1]) / 2)]
    k = length.half().float() * (y / y.norm(dim=-1, keepdim=True)) @ h
    low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
    step = ((high - low) / (2**v_bits - 1)).clamp_min(1e-8)
    index = ((v - low) / step + 0.5).floor().clamp(0, 2**v_bits - 1)
    return k, index * step.half().float() + low.half().float()


def ours(k, v, bits, half, center):
    """Through pages and back; k, v (tokens, heads, size)."""
    from tbq.vllm import _cpu

    tokens, heads, size = k.shape
    pages = torch.zeros((-(-tokens // 64), 64, heads, bits.slot_bytes(size)), dtype=torch.uint8)
    means = (None, None) if center is None else (center.mean, center.weight)
    _cpu.store(k, v, pages, torch.arange(tokens), *bits, half, *means)
    out = torch.empty_like(k), torch.empty_like(v)
    table = torch.arange(pages.shape[0], dtype=torch.int32)
    _cpu.unpack(pages, table, 0, *out, *bits, half, None if center is None else center.whole)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--texts", type=int, default=6)
    args = parser.parse_args()
    import transformers

    import hf_model
    from tbq._text import python_text
    from tbq.vllm import DTYPES
    from tbq.vllm._options import center_of_layer, half_of, load_center

    folder = hf_model.make(ROOT / "build" / "models" / "SmolLM2-135M-Instruct-hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    config = model.config
    heads, size, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    half = half_of("auto", config, size)
    file = load_center(str(hf_model.center_of(folder)))
    centers = [center_of_layer(file, i, heads, size, 0, 1, half, torch.device("cpu")) for i in range(layers)]
    ids = torch.tensor(tokenizer(python_text().decode()[50_000:])["input_ids"])
    total = args.tokens + FED
    kinds = {}
    for name in ("tbq4", "tbq4_tbq3", "tbq3", "tbq2"):
        kinds[f"{name}, centered"] = 8 * DTYPES[name].slot_bytes(size) / (2 * size), name, True
        kinds[name] = 8 * DTYPES[name].slot_bytes(size) / (2 * size), name, False
    for name, k_bits, v_bits in (("4bit_nc", 4, 4), ("k3v4_nc", 3, 4), ("3bit_nc", 3, 3)):
        packed = 8 * (size * (k_bits + v_bits) / 8 + 6) / (2 * size)
        whole = (packed * (layers - 2 * SKIPPED) + 16 * 2 * SKIPPED) / layers
        kinds[f"turboquant_{name}"] = whole, (k_bits, v_bits), True
        kinds[f"turboquant_{name}, no layer left out"] = packed, (k_bits, v_bits), False
    sums = {name: [] for name in kinds}
    for text in range(args.texts):
        part = ids[text * total : (text + 1) * total][None]
        assert part.shape[1] == total, "the text is too short"
        with torch.inference_mode():
            cache = transformers.DynamicCache(config=config)
            model(part[:, : args.tokens], past_key_values=cache, logits_to_keep=1)
            rows = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

            def scores(states):
                for layer, (k, v) in zip(cache.layers, states):
                    layer.keys, layer.values = k, v
                return model(part[:, args.tokens :], past_key_values=cache).logits[0].double().log_softmax(-1)

            base = scores(rows)
            for name, (_, kind, option) in kinds.items():
                states = []
                for i, (k, v) in enumerate(rows):
                    if isinstance(kind, str):
                        sides = (x[0].transpose(0, 1).contiguous() for x in (k, v))
                        new = ours(*sides, DTYPES[kind], half, centers[i] if option else None)
                        states.append(tuple(x.transpose(0, 1)[None] for x in new))
                    elif option and not SKIPPED <= i < layers - SKIPPED:
                        states.append((k, v))
                    else:
                        states.append(theirs(k, v, *kind))
                got = scores(states)
                sums[name].append(float((base.exp() * (base - got)).sum(-1).mean()))
        print(f"text {text}: " + ", ".join(f"{name} {each[-1]:.4f}" for name, each in sums.items()), flush=True)
    print(f"| type | bits a value | KLD at {args.tokens} tokens | smallest, largest text |\n|---|---|---|---|")
    for name, each in sums.items():
        print(f"| {name} | {kinds[name][0]:.2f} | {sum(each) / len(each):.4f} | {min(each):.4f}, {max(each):.4f} |")


if __name__ == "__main__":
    main()
