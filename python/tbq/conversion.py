# SPDX-License-Identifier: MIT
"""Converts GGUF files from one type of weights to another: `tbq convert`."""
import argparse
import collections
import contextlib
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGML
from gguf import GGUFValueType

from tbq import _coders, _files
from tbq._run import at_least_one, cores, interruptible
from tbq._types import BLOCK, types
from tbq._version import FORMAT_VERSION
from tbq.errors import TBQError
from tbq.gguf_files import FORMAT_KEY, Model, Tensor, as_path, entry, header, open_gguf, pieces

#: Values that a thread takes at a time: a multiple of every type's block.
CHUNK = 1 << 20

#: What `type` may be, and the file type that llama.cpp shows.
FILE_TYPES = {
    **{name: gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] for name in (*types, "q8_0", "f16", "bf16")},
    "f32": gguf.LlamaFileType.ALL_F32,
}

# The rules below are those of src/llama-quant.cpp of llama.cpp: tensor_allows_quantization(),
# llama_tensor_get_type_impl() and tensor_type_fallback(), as far as they concern FILE_TYPES.

#: Tensors with these in their name stay as they are: small, or sensitive.
_KEPT = re.compile("|".join(map(re.escape, (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    *(f"time_mix_{x}.weight" for x in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused")),
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd"))))
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_KEPT_IN_GLM5_NEXT = re.compile("|".join(map(re.escape, (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape", "ssm_f_a.weight",
    "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"))))
_Q8_IN_GLM5_NEXT = re.compile("attn_q_a|attn_q_b|nextn.eh_proj")
_Q8_IN_EIGHT_EXPERTS = re.compile(r"attn_(qkv|kv_b|v|k)\.weight")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
#: From here on the scale of a block may leave the range of a half.
_LARGE = 65504 / 8
_SMALLER_BLOCK = {GGML.Q6_K: GGML.Q8_0, GGML.Q4_K: GGML.Q5_0}


@dataclass(frozen=True)
class Report:
    """What convert() has done."""

    files: tuple[pathlib.Path, ...]
    bytes_in: int  #: of the tensors
    bytes_out: int
    bits_per_value: float  #: of the tensors written, all together
    counts: dict[tuple[str, str], int]  #: (type before, type after): tensors
    notes: dict[str, str] = field(default_factory=dict)  #: name of a tensor that did not get its type: what it has, and why


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], type: str = "tbq4_0", *,
            tensors: Sequence[tuple[str, str]] = (), force: bool = False, split_bytes: int | None = None,
            threads: int | None = None, progress: bool = False) -> Report:
    """Writes a GGUF file with weights of another type.

    source: a file, or one of a split (all of it is read).  target: the file to write; it appears when it is complete.
    type: tbq2_0, tbq3_0, tbq4_0, q8_0, f16, bf16 or f32.  Which tensors get it is as with llama-quantize: norms and
    other small ones stay, the output matrix (or embeddings that serve as one) gets q6_K or q8_0.  Into a float type, a
    tbq tensor goes always.
    tensors: (pattern, type) pairs that come before these rules, the first that is found in a name counts; types of
    llama.cpp are possible where they need no importance matrix.
    force: replace target.  split_bytes: write files of at most so many bytes of tensors each, NAME-00001-of-00003.gguf.
    threads: all cores if None.  progress: show a bar.
    Weights that were quantized before lose precision twice.  A tensor whose rows its new type does not divide is kept;
    see Report.notes.
    Raises TBQError for a bad file, type, pattern or value (NaN, infinity); nothing is left behind then.
    """
    path = as_path(target)
    if threads is None:
        threads = cores()
    for name, value in (("threads", threads), ("split_bytes", split_bytes)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise TBQError(f"{name} is {value!r}; it must be an integer, at least 1")
    model = open_gguf(source)
    notes: dict[str, str] = {}
    plan = [(tensor, _fitting(tensor, wanted, notes)) for tensor, wanted in zip(model.tensors, _wanted(model, type, tensors))]
    parts = _parts(plan, path, split_bytes)
    names = [name for name, _ in parts]
    _check_target(model, names, force)
    headers = [_header(model, parts, i, FILE_TYPES[type]) for i in range(len(parts))]
    try:
        # the first file of a split gets its name last: without it, no program opens the rest
        with _files.writing(path, names) as files, _bar(plan, progress) as advance, ThreadPoolExecutor(threads) as pool:
            _check_room(names, headers)  # once what a killed writer left is gone
            for (_, part), (text, offsets, size), file in zip(parts, headers, files):
                file.write(text)
                for tensor, offset, data in _converted(part, offsets, pool, 2 * threads):
                    file.write(bytes(offset - file.tell()) if offset > file.tell() else b"")
                    file.write(data)
                    advance(tensor, len(data))
                file.write(bytes(size - file.tell()))
    except OSError as error:
        if error.filename not in map(str, names):  # the source's, for example
            raise
        raise TBQError(f"{error.filename} cannot be written: {error.strerror}") from None
    return _report(plan, names, notes)


Plan = list[tuple[Tensor, GGML]]


# --- which type ---------------------------------------------------------------------------------------------------


def _wanted(model: Model, type: str, patterns: Sequence[tuple[str, str]]) -> list[GGML]:
    """The type of each tensor, before it is known whether the rows fit."""
    if not isinstance(type, str) or type not in FILE_TYPES:
        raise TBQError(f"type {type!r} is not one of {', '.join(FILE_TYPES)}")
    default = GGML[type.upper()]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in patterns):
        raise TBQError("tensors must be pairs of a pattern and the name of a type")
    chosen = [(_pattern(pattern), _type(name)) for pattern, name in patterns]
    arch = str(model.metadata.get(gguf.Keys.General.ARCHITECTURE, ""))
    experts = model.metadata.integer(gguf.Keys.LLM.EXPERT_COUNT.format(arch=arch), 0)
    tied = all(tensor.name != "output.weight" for tensor in model.tensors)
    used = set()
    result = []
    for tensor in model.tensors:
        if not _convertible(tensor, arch):
            result.append(_without_tbq(tensor) if default in _FLOATS else tensor.type)
            continue
        found = next((i for i, (pattern, _) in enumerate(chosen) if pattern.search(tensor.name)), None)
        if found is None:
            result.append(_default(tensor, default, arch, experts, tied))
        else:
            used.add(found)
            result.append(chosen[found][1])
    unused = [text for i, (text, _) in enumerate(patterns) if i not in used]
    if unused:
        raise TBQError(f"--tensor {unused[0]!r} is not found in the name of any tensor that can be converted and that no "
                       "earlier pattern has taken")
    return result


_FLOATS = (GGML.F32, GGML.F16, GGML.BF16)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError, TypeError) as error:
        raise TBQError(f"pattern {text!r} is not a regular expression: {error}") from None


def _type(name: str) -> GGML:
    if not isinstance(name, str) or name.upper() not in GGML.__members__:
        raise TBQError(f"type {name!r} is not one of {', '.join(t.name.lower() for t in GGML)}")
    _coders.encoder(GGML[name.upper()])
    return GGML[name.upper()]


def _convertible(tensor: Tensor, arch: str) -> bool:
    dimensions = len(tensor.shape) - next((i for i, n in enumerate(tensor.shape) if n > 1), len(tensor.shape) - 1)
    return (dimensions >= 2 and tensor.name.endswith("weight") and tensor.name not in _KEPT_NAMES
            and not _KEPT.search(tensor.name) and not (arch == "glm5-next" and _KEPT_IN_GLM5_NEXT.search(tensor.name)))


def _without_tbq(tensor: Tensor) -> GGML:
    if tensor.type.name.lower() not in types:
        return tensor.type
    return GGML.F16 if len(tensor.shape) > 1 else GGML.F32


def _default(tensor: Tensor, default: GGML, arch: str, experts: int, tied: bool) -> GGML:
    if default in _FLOATS:
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


def _fitting(tensor: Tensor, wanted: GGML, notes: dict[str, str]) -> GGML:
    """The type, or one of smaller blocks in the place of a K type, or the present one; what is not as wanted is noted."""
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
        _coders.decoder(tensor.type)
    except TBQError as error:
        notes[tensor.name] = f"{tensor.type.name.lower()}, because {error}"
        return tensor.type
    _coders.encoder(wanted)
    return wanted


# --- the files ----------------------------------------------------------------------------------------------------


def _n_bytes(tensor: Tensor, type: GGML) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    return tensor.n_values // block * block_bytes


def _parts(plan: Plan, target: pathlib.Path, limit: int | None) -> list[tuple[pathlib.Path, Plan]]:
    """The files to write; one if limit is None or everything fits in one."""
    groups: list[Plan] = [[]]
    size = 0
    for tensor, type in plan:
        size += _n_bytes(tensor, type)
        if limit is not None and size > limit and groups[-1]:
            groups.append([])
            size = _n_bytes(tensor, type)
        groups[-1].append((tensor, type))
    if len(groups) == 1:
        return [(target, plan)]
    if len(groups) > 0xffff:
        raise TBQError(f"{limit} bytes a file would make {len(groups)} files; 65535 are possible")
    stem = target.name.removesuffix(".gguf")
    return [(target.with_name(f"{stem}-{i + 1:05}-of-{len(groups):05}.gguf"), group) for i, group in enumerate(groups)]


def _header(model: Model, parts: list[tuple[pathlib.Path, Plan]], index: int, file_type: int) -> tuple[bytes, list[int], int]:
    """header() of a part: the first has the metadata, as the source has it but for what is new."""
    entries: dict[str, bytes] = {}

    def put(key: str, kind: GGUFValueType, value: int) -> None:
        entries[key] = entry(key, kind, value)

    if index == 0:
        entries.update(model.metadata.raw)
        put(gguf.Keys.General.QUANTIZATION_VERSION, GGUFValueType.UINT32, gguf.GGML_QUANT_VERSION)
        put(gguf.Keys.General.FILE_TYPE, GGUFValueType.UINT32, int(file_type))
        for key in (FORMAT_KEY, *_SPLIT_KEYS):
            entries.pop(key, None)
        if any(type.name.lower() in types for _, part in parts for _, type in part):
            put(FORMAT_KEY, GGUFValueType.UINT32, FORMAT_VERSION)
    elif gguf.Keys.General.ALIGNMENT in model.metadata:
        put(gguf.Keys.General.ALIGNMENT, GGUFValueType.UINT32, model.metadata.alignment)
    if len(parts) > 1:
        put(gguf.Keys.Split.LLM_KV_SPLIT_NO, GGUFValueType.UINT16, index)
        put(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, GGUFValueType.UINT16, len(parts))
        put(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, GGUFValueType.INT32, sum(len(part) for _, part in parts))
    return header(entries, [(tensor.name, type, tensor.shape) for tensor, type in parts[index][1]], model.metadata.alignment)


_SPLIT_KEYS = (gguf.Keys.Split.LLM_KV_SPLIT_NO, gguf.Keys.Split.LLM_KV_SPLIT_COUNT, gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)


def _check_target(model: Model, paths: list[pathlib.Path], force: bool) -> None:
    for path in paths:
        folder = _files.target(path).parent
        if not folder.is_dir():
            raise TBQError(f"folder {folder} does not exist")
        if not os.access(folder, os.W_OK):
            raise TBQError(f"folder {folder} cannot be written to")
        if path.exists():
            if any(path.samefile(file) for file in model.files):
                raise TBQError(f"{path} is the file that is read; name another one")
            if not force:
                raise TBQError(f"{path} exists; --force replaces it")


def _check_room(paths: list[pathlib.Path], headers: list[tuple[bytes, list[int], int]]) -> None:
    need: collections.Counter[pathlib.Path] = collections.Counter()
    for path, (_, _, size) in zip(paths, headers):
        folder = _files.target(path).parent
        need[folder] += size
        if need[folder] > shutil.disk_usage(folder).free:
            raise TBQError(f"{path} cannot be written: {folder} has no room for {need[folder]} bytes")


# --- the tensors --------------------------------------------------------------------------------------------------


def _converted(plan: Plan, offsets: list[int], pool: ThreadPoolExecutor, window: int) -> Iterator[tuple[Tensor, int, Any]]:
    """(tensor, where in the file, bytes) in the order of the file, up to `window` pieces ahead of the reader."""
    waiting: collections.deque[tuple[Tensor, int, Future[Any]]] = collections.deque()
    try:
        for (tensor, type), offset in zip(plan, offsets):
            work = _work(tensor, type)
            for data in pieces(tensor, CHUNK):
                waiting.append((tensor, offset, pool.submit(work, data)))
                offset = 0  # the next one follows
                if len(waiting) >= window:
                    first, at, future = waiting.popleft()
                    yield first, at, future.result()
        while waiting:
            first, at, future = waiting.popleft()
            yield first, at, future.result()
    finally:
        for _, _, future in waiting:
            future.cancel()


def _work(tensor: Tensor, type: GGML) -> Callable[[np.ndarray[Any, np.dtype[np.uint8]]], Any]:
    """What a thread does with a piece of the tensor."""
    if type == tensor.type:
        return lambda data: data
    decode, encode = _coders.decoder(tensor.type), _coders.encoder(type)
    limit = float(np.finfo(np.float16).max) if type == GGML.F16 else None

    def work(data: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
        values = decode(data)
        low, high = float(values.min()), float(values.max())  # a NaN anywhere is both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise TBQError(f"tensor {tensor.name} has values that are not finite; the file is damaged")
        if limit is not None and max(high, -low) > limit:
            raise TBQError(f"tensor {tensor.name} has values beyond {limit:.0f}, the largest of f16; bf16 and f32 can hold them")
        result = encode(values)
        if type not in (GGML.F32, GGML.F16) and max(high, -low) > _LARGE:
            lost = np.linalg.norm(_coders.decoder(type)(result).astype(np.float64) - values)
            if not lost < 0.5 * np.linalg.norm(values.astype(np.float64)):  # of 2 bits it is a third
                raise TBQError(f"tensor {tensor.name} has values beyond the range of {type.name.lower()}; f32 can hold them")
        return result

    return work


@contextlib.contextmanager
def _bar(plan: Plan, show: bool) -> Iterator[Callable[[Tensor, int], None]]:
    if not show:
        yield lambda tensor, size: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    total = sum(_n_bytes(tensor, type) for tensor, type in plan)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=0.5, disable=None) as bar:
        def advance(tensor: Tensor, size: int) -> None:
            bar.set_description(tensor.name, refresh=False)
            bar.update(size)

        yield advance


def _report(plan: Plan, files: list[pathlib.Path], notes: dict[str, str]) -> Report:
    size = sum(_n_bytes(tensor, type) for tensor, type in plan)
    return Report(
        files=tuple(files), bytes_in=sum(tensor.n_bytes for tensor, _ in plan), bytes_out=size,
        bits_per_value=8 * size / max(1, sum(tensor.n_values for tensor, _ in plan)),
        counts=dict(collections.Counter((tensor.type.name.lower(), type.name.lower()) for tensor, type in plan)), notes=notes)


# --- the command --------------------------------------------------------------------------------------------------


def _tensor_option(text: str) -> tuple[str, str]:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=TYPE")
    return pattern, name


def _size_option(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9})([MG])", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 4G")
    return int(match[1]) * {"M": 1000 ** 2, "G": 1000 ** 3}[match[2]]


def define(parser: argparse.ArgumentParser) -> None:
    """write a GGUF file with weights of another type"""
    parser.epilog = r"""examples:
  tbq convert model-f16.gguf model-tbq4.gguf --type tbq4_0
  tbq convert model-f16.gguf mixed.gguf --type tbq4_0 --tensor 'blk\.\d+\.ffn_.*=tbq3_0'
  tbq convert model-tbq4.gguf model-f16.gguf --type f16     # back to what any llama.cpp opens

Norms and other small tensors stay as they are; the output matrix gets q6_K or q8_0, as with llama-quantize."""
    parser.add_argument("source", metavar="IN.gguf", help="the model; of a split, any of its files")
    parser.add_argument("target", metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--type", required=True, metavar="TYPE", choices=list(FILE_TYPES), help=f"one of {', '.join(FILE_TYPES)}")
    parser.add_argument("--tensor", action="append", default=[], type=_tensor_option, metavar="PATTERN=TYPE",
                        help="another type for tensors in whose name the regular expression is found; the first that is found counts")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    parser.add_argument("--split", type=_size_option, metavar="N(M|G)", help="several files of at most so many bytes of tensors each")
    parser.add_argument("--threads", type=at_least_one, default=cores(), metavar="N", help="threads (%(default)s)")

    def run(args: argparse.Namespace) -> int:
        with interruptible():
            report = convert(args.source, args.target, args.type, tensors=args.tensor, force=args.force,
                             split_bytes=args.split, threads=args.threads, progress=True)
        for (before, after), count in sorted(report.counts.items()):
            print(f"{count:5} tensors  {before}" + (f" -> {after}" if before != after else ""))
        for name, note in report.notes.items():
            print(f"{name} has {note}")
        again = sum(count for (before, after), count in report.counts.items()
                    if before != after and not {before, after} & {t.name.lower() for t in _FLOATS})
        if again:
            print(f"{again} tensors were quantized before; from a file of f16 they lose less")
        print(f"{report.files[0]}" + (f" and {len(report.files) - 1} more" if report.files[1:] else "")
              + f": {report.bytes_out / 1e6:.1f} MB of {report.bytes_in / 1e6:.1f}, {report.bits_per_value:.2f} bits per weight")
        return 0

    parser.set_defaults(run=run)
