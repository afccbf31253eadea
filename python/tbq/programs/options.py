# SPDX-License-Identifier: MIT
"""llama.cpp's options: which of them tbq reads, and what follows from them."""
import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tbq.errors import TBQError

#: Options that change the keys, each with a value: a center is for one value of each.
ROPE_OPTIONS = {name: True for name in (
    "--rope-scaling", "--rope-scale", "--rope-freq-base", "--rope-freq-scale", "--yarn-orig-ctx", "--yarn-ext-factor", "--yarn-attn-factor",
    "--yarn-beta-slow", "--yarn-beta-fast", "--override-kv")}


def select(options: Sequence[str], names: Mapping[str, bool]) -> Iterator[tuple[str, str | None]]:
    """Of llama.cpp's options those named, as given, with their values.  names: whether a value follows."""
    rest = iter(options)
    for option in rest:
        name = spelled(option)
        if name in names:
            yield option, next(rest, None) if names[name] else None


def spelled(option: str) -> str:
    """As llama.cpp looks an option up: --ctx_size is --ctx-size."""
    return option.replace("_", "-") if option.startswith("--") else option


# Options of llama-server that the plan or the wait depends on, or that would contradict them, and whether a value follows.
SERVER_OPTIONS = {"-c": ("context", True), "--ctx-size": ("context", True), "-np": ("parallel", True), "--parallel": ("parallel", True),
            "-ub": ("ubatch", True), "--ubatch-size": ("ubatch", True), "-b": ("batch", True), "--batch-size": ("batch", True), "--swa-full": ("swa_full", False),
            "-kvu": ("unified", False), "--kv-unified": ("unified", False), "-no-kvu": ("unified", False), "--no-kv-unified": ("unified", False),
            "--kv-unified-per-slot": ("per_slot", True), "--cache-center": ("center", True),
            "--host": ("host", True), "--port": ("port", True), "--reuse-port": ("reuse_port", False), "--api-prefix": ("prefix", True),
            "--api-key": ("key", True), "--api-key-file": ("key_file", True), "--ssl-key-file": ("ssl_key", True), "--ssl-cert-file": ("ssl_cert", True),
            "-ctk": ("types", True), "--cache-type-k": ("types", True), "-ctv": ("types", True), "--cache-type-v": ("types", True),
            "-t": ("threads", True), "--threads": ("threads", True),
            **{name: ("model", True) for name in ("-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo", "-hf", "-hfr", "--hf-repo")}}

# Options whose value is a file (a folder: True) that llama-server opens only when much else is done, or not at all.  It
# looks at those of its other options by itself, before it does anything.
FILE_OPTIONS = {"--ssl-key-file": False, "--ssl-cert-file": False, "-mm": False, "--mmproj": False, "--lora": False, "--control-vector": False,
          "--cache-center": False, "-md": False, "--model-draft": False, "--spec-draft-model": False, "-lcs": False, "--lookup-cache-static": False,
          "--mcp-servers-config": False, "--path": True}
LIST_OPTIONS = ("--lora", "--control-vector")


def check_files(options: Sequence[str]) -> None:
    """TBQError for a file that is not there."""
    for option, value in select(options, dict.fromkeys(FILE_OPTIONS, True)):
        name = spelled(option)
        for path in next(csv.reader([value or ""]), []) if name in LIST_OPTIONS else [value or ""]:
            if not (os.path.isdir(path) if FILE_OPTIONS[name] else os.path.exists(path) and not os.path.isdir(path)):
                raise TBQError(f"{option} {path!r} is not a {'folder' if FILE_OPTIONS[name] else 'file'}")


def check_tls(found: Mapping[str, str], build: Mapping[str, str]) -> None:
    """TBQError for a key and a certificate that this build has no use for, or one of them without the other.

    build: of tbq.paths.paths(); without "tls" it is not known, and llama-server will say so.
    """
    given = [name for name in ("ssl_key", "ssl_cert") if name in found]
    if given and build.get("tls") == "no":
        raise TBQError("--ssl-key-file and --ssl-cert-file: this llama-server is built without TLS; build it where OpenSSL is installed, "
                       "or put a proxy that has it in front")
    if len(given) == 1:
        one, other = ("--ssl-key-file", "--ssl-cert-file")[::1 if given == ["ssl_key"] else -1]
        raise TBQError(f"{one} without {other}: llama-server would serve without TLS; give both")


def read_server_options(options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Those of llama-server's options that are in _OPTIONS, the last of each, as it takes them; and all without --host and --port."""
    found, others = {}, []
    rest = iter(options)
    for option in rest:
        name, has_value = SERVER_OPTIONS.get(spelled(option), ("", False))
        given = [option]
        if has_value:
            value = next(rest, None)
            if value is None:
                raise TBQError(f"{option} needs a value")
            given.append(value)
        if name:
            found[name] = given[-1]
        if name not in ("host", "port"):
            others += given
    return found, others


def positive(found: Mapping[str, str], name: str) -> int | None:
    """Of an option; None where llama-server's own default applies (not given, 0, negative) or it will complain itself."""
    text = found.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) and int(text) else None


def plan_arguments(found: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of choose() that llama-server's options ask for."""
    shape: dict[str, Any] = {"context": positive(found, "context"), "swa_full": "swa_full" in found, "unified": True}
    if parallel := positive(found, "parallel"):
        shape.update(parallel=parallel, unified="no-" not in found.get("unified", "no-"))
    if (per_slot := positive(found, "per_slot")) and not shape["context"]:
        shape.update(context=per_slot * (parallel or 4))
    if {"ubatch", "batch"} & found.keys():
        shape.update(ubatch=min(positive(found, "ubatch") or 512, positive(found, "batch") or 2048))
    return shape


#: Options of llama.cpp's programs that change how the model runs, and whether a value follows: the measuring gets them too.
MODEL_OPTIONS = {**{name: True for name in (
    "-t", "--threads", "-ngl", "--gpu-layers", "--n-gpu-layers", "-dev", "--device", "-sm", "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu",
    "-ot", "--override-tensor", "-ncmoe", "--n-cpu-moe", "-ncffn", "--n-cpu-ffn", "--rpc", "-lm", "--load-mode", "-lzm", "--lazy-mode", "--numa")},
    **{name: False for name in ("-cmoe", "--cpu-moe", "-nr", "--no-repack", "--no-host")}}


def model_options(options: Sequence[str]) -> list[str]:
    """Those of llama.cpp's options that the measuring needs too."""
    return [text for pair in select(options, MODEL_OPTIONS | ROPE_OPTIONS) for text in pair if text is not None]
