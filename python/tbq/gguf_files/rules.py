# SPDX-License-Identifier: MIT
"""Chooses the type of each tensor in a converted file: the rules of llama-quantize."""

import re
from collections.abc import Sequence

import gguf
from gguf import GGMLQuantizationType as GGML

from tbq._types import types
from tbq.errors import TBQError
from tbq.gguf_files.codecs import decoder, encoder
from tbq.gguf_files.reader import GGUFModel, Tensor

#: The types that `type` may name, with the file type that llama.cpp shows.
FILE_TYPES = {
    **{name: gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] for name in (*types, "q8_0", "f16", "bf16")},
    "f32": gguf.LlamaFileType.ALL_F32,
}


def _any_of(names: str, *more: str) -> re.Pattern[str]:
    """Compiles a pattern that finds each of these names."""
    return re.compile("|".join(map(re.escape, [*names.split(), *more])))


_TIME_MIX = "w0 w1 w2 v0 v1 v2 a0 a1 a2 g1 g2 decay_w1 decay_w2 lerp_fused"
#: Tensors with one of these in their name keep their type: they are small, or sensitive.
_KEPT = _any_of(
    """
    _norm.weight ffn_gate_inp.weight ffn_gate_tid2eid.weight altup laurel per_layer_model_proj
    ssm_conv1d shortconv.conv.weight indexer.k_proj.weight indexer.q_proj.weight time_mix_first.weight
    attn_rel_b.weight .position_embd sam.pos_embd sam.neck. sam.net_ .rel_pos .patch_embd .patch_merger
    a.rvq.codebook mm.a.code_embd
    """,
    *(f"time_mix_{name}.weight" for name in _TIME_MIX.split()),
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_KEPT_IN_GLM5_NEXT = _any_of(
    """
    hc_ indexer.attn_q_b indexer.attn_k indexer.proj indexer_compressor_gate indexer_compressor_ape
    ssm_f_a.weight ssm_f_b.weight ssm_g_a.weight ssm_g_b.weight ssm_beta.weight
    attn_kv_a_mqa.weight attn_k_b.weight attn_v_b.weight
    """
)
_Q8_IN_GLM5_NEXT = re.compile("attn_q_a|attn_q_b|nextn.eh_proj")
_Q8_IN_EIGHT_EXPERTS = re.compile(r"attn_(qkv|kv_b|v|k)\.weight")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

_SMALLER_BLOCK = {GGML.Q6_K: GGML.Q8_0, GGML.Q4_K: GGML.Q5_0}


def wanted_types(model: GGUFModel, type: str, patterns: Sequence[tuple[str, str]]) -> list[GGML]:
    """Returns the type of each tensor by the rules; fitting_type() then checks whether the rows fit."""
    if not isinstance(type, str) or type not in FILE_TYPES:
        raise TBQError(f"type {type!r} is not one of {', '.join(FILE_TYPES)}")
    default = GGML[type.upper()]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in patterns):
        raise TBQError("tensors must be pairs of a pattern and the name of a type")
    chosen = [(_compile_pattern(pattern), _parse_type(name)) for pattern, name in patterns]
    arch = str(model.metadata.get(gguf.Keys.General.ARCHITECTURE, ""))
    experts = model.metadata.integer(gguf.Keys.LLM.EXPERT_COUNT.format(arch=arch), 0)
    tied = all(tensor.name != "output.weight" for tensor in model.tensors)
    used = set()
    result = []
    for tensor in model.tensors:
        if not _is_convertible(tensor, arch):
            result.append(_replace_tbq(tensor) if default in FLOATS else tensor.type)
            continue
        found = next((i for i, (pattern, _) in enumerate(chosen) if pattern.search(tensor.name)), None)
        if found is None:
            result.append(_default_type(tensor, default, arch, experts, tied))
        else:
            used.add(found)
            result.append(chosen[found][1])
    unused = [text for i, (text, _) in enumerate(patterns) if i not in used]
    if unused:
        raise TBQError(
            f"--tensor {unused[0]!r} is not found in the name of any tensor that can be converted and that no "
            "earlier pattern has taken"
        )
    return result


FLOATS = (GGML.F32, GGML.F16, GGML.BF16)


def _compile_pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError, TypeError) as error:
        raise TBQError(f"pattern {text!r} is not a regular expression: {error}") from None


def _parse_type(name: str) -> GGML:
    if not isinstance(name, str) or name.upper() not in GGML.__members__:
        raise TBQError(f"type {name!r} is not one of {', '.join(t.name.lower() for t in GGML)}")
    encoder(GGML[name.upper()])
    return GGML[name.upper()]


def _is_convertible(tensor: Tensor, arch: str) -> bool:
    dimensions = len(tensor.shape) - next((i for i, n in enumerate(tensor.shape) if n > 1), len(tensor.shape) - 1)
    return (
        dimensions >= 2
        and tensor.name.endswith("weight")
        and tensor.name not in _KEPT_NAMES
        and not _KEPT.search(tensor.name)
        and not (arch == "glm5-next" and _KEPT_IN_GLM5_NEXT.search(tensor.name))
    )


def _replace_tbq(tensor: Tensor) -> GGML:
    if tensor.type.name.lower() not in types:
        return tensor.type
    return GGML.F16 if len(tensor.shape) > 1 else GGML.F32


def _default_type(tensor: Tensor, default: GGML, arch: str, experts: int, tied: bool) -> GGML:
    if default in FLOATS:
        return default
    if arch == "glm5-next" and _Q8_IN_GLM5_NEXT.search(tensor.name):
        return GGML.Q8_0
    if tensor.name == "output.weight" or (tied and tensor.name in _EMBEDDINGS):
        block = gguf.GGML_QUANT_SIZES[default][0]
        return GGML.Q8_0 if default == GGML.Q8_0 or arch == "falcon" or tensor.shape[-1] % block else GGML.Q6_K
    if tensor.name in _EMBEDDINGS and default in (GGML["TBQ2_0"], GGML["TBQ3_0"]):
        return GGML.Q4_K
    if experts == 8 and _Q8_IN_EIGHT_EXPERTS.search(tensor.name):
        return GGML.Q8_0
    return default


def fitting_type(tensor: Tensor, wanted: GGML, notes: dict[str, str]) -> GGML:
    """Returns the wanted type if its block divides the rows.

    Otherwise: a type with smaller blocks in place of a K type, or the tensor's own type.  notes says so and why.
    """
    width, block = tensor.shape[-1], gguf.GGML_QUANT_SIZES[wanted][0]
    if wanted == tensor.type:
        return wanted
    if width % block:
        smaller = _SMALLER_BLOCK.get(wanted)
        fits = smaller is not None and width % gguf.GGML_QUANT_SIZES[smaller][0] == 0
        result = smaller if smaller is not None and fits else tensor.type
        notes[tensor.name] = f"{result.name.lower()}, because {block} does not divide its rows of {width}"
        if result == tensor.type:
            return result
        wanted = result
    try:
        decoder(tensor.type)
    except TBQError as error:
        notes[tensor.name] = f"{tensor.type.name.lower()}, because {error}"
        return tensor.type
    encoder(wanted)
    return wanted
