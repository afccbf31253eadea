# SPDX-License-Identifier: MIT
"""llama.cpp's options: one table of those that tbq reads, and what follows from them."""

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tbq.errors import TBQError

#: What an option is for.  ROPE changes the keys, so a center is for one value of each.  MODEL changes how a model runs, so
#: whatever measures it gets these options too.  FILE, FILES and FOLDER are paths that llama-server opens only when much else
#: is done, or not at all: they are looked at before.
ROPE, MODEL, FILE, FILES, FOLDER = "rope", "model", "file", "files", "folder"


@dataclass(frozen=True)
class Option:
    """An option of llama.cpp's programs."""

    names: tuple[str, ...]  #: all spellings
    uses: frozenset[str] = frozenset()
    means: str = ""  #: the key under which server_options() returns the value
    value: bool = True  #: whether a value follows
    argument: str = ""  #: the argument of llama_cpp.Llama that does the same


def _option(names: str, *uses: str, means: str = "", value: bool = True, argument: str = "") -> Option:
    return Option(tuple(names.split()), frozenset(uses), means, value, argument)


OPTIONS = (
    # the plan, and where the server listens
    _option("-c --ctx-size", means="context"),
    _option("-np --parallel", means="parallel"),
    _option("-ub --ubatch-size", means="ubatch"),
    _option("-b --batch-size", means="batch"),
    _option("--swa-full", means="swa_full", value=False),
    _option("-kvu --kv-unified -no-kvu --no-kv-unified", means="unified", value=False),
    _option("--kv-unified-per-slot", means="per_slot"),
    _option("-ctk --cache-type-k -ctv --cache-type-v", means="types"),
    _option("-m --model -mu --model-url -dr --docker-repo -hf -hfr --hf-repo", means="model"),
    _option("-fa --flash-attn"),
    _option("--host", means="host"),
    _option("--port", means="port"),
    _option("--reuse-port", means="reuse_port", value=False),
    _option("--api-prefix", means="prefix"),
    _option("--api-key", means="key"),
    _option("--api-key-file", means="key_file"),
    # files
    _option("--ssl-key-file", FILE, means="ssl_key"),
    _option("--ssl-cert-file", FILE, means="ssl_cert"),
    _option("--cache-center", FILE, means="center"),
    _option("-mm --mmproj", FILE),
    _option("--lora", FILES),
    _option("--control-vector", FILES),
    _option("-md --model-draft --spec-draft-model", FILE),
    _option("-lcs --lookup-cache-static", FILE),
    _option("--mcp-servers-config", FILE),
    _option("--path", FOLDER),
    # the keys
    _option("--rope-scaling", ROPE),
    _option("--rope-scale", ROPE),
    _option("--rope-freq-base", ROPE, argument="rope_freq_base"),
    _option("--rope-freq-scale", ROPE, argument="rope_freq_scale"),
    _option("--yarn-ext-factor", ROPE, argument="yarn_ext_factor"),
    _option("--yarn-attn-factor", ROPE, argument="yarn_attn_factor"),
    _option("--yarn-beta-fast", ROPE, argument="yarn_beta_fast"),
    _option("--yarn-beta-slow", ROPE, argument="yarn_beta_slow"),
    _option("--yarn-orig-ctx", ROPE, argument="yarn_orig_ctx"),
    _option("--override-kv", ROPE),
    # how the model runs
    _option("-t --threads", MODEL, means="threads", argument="n_threads_batch"),
    _option("-ngl --gpu-layers --n-gpu-layers", MODEL, argument="n_gpu_layers"),
    _option("-dev --device", MODEL),
    _option("-sm --split-mode", MODEL),
    _option("-ts --tensor-split", MODEL),
    _option("-mg --main-gpu", MODEL, argument="main_gpu"),
    _option("-ot --override-tensor", MODEL),
    _option("-ncmoe --n-cpu-moe", MODEL),
    _option("-ncffn --n-cpu-ffn", MODEL),
    _option("--rpc", MODEL),
    _option("-lm --load-mode", MODEL),
    _option("-lzm --lazy-mode", MODEL),
    _option("--numa", MODEL),
    _option("-cmoe --cpu-moe", MODEL, value=False),
    _option("-nr --no-repack", MODEL, value=False),
    _option("--no-host", MODEL, value=False),
)

_BY_NAME = {name: option for option in OPTIONS for name in option.names}


def spelled(option: str) -> str:
    """As llama.cpp looks an option up: --ctx_size is --ctx-size."""
    return option.replace("_", "-") if option.startswith("--") else option


def scan(options: Sequence[str]) -> Iterator[tuple[Option | None, list[str]]]:
    """What was typed, option by option: what the table knows of it (None if it is not there), and the words that belong to it.

    An option whose value is missing has one word only.  A value of an option that is not in the table comes as one more.
    """
    rest = iter(options)
    for word in rest:
        known = _BY_NAME.get(spelled(word))
        value = next(rest, None) if known and known.value else None
        yield known, [word] if value is None else [word, value]


def select(options: Sequence[str], *uses: str) -> Iterator[tuple[Option, list[str]]]:
    """Of llama.cpp's options those for one of these uses, and the words that belong to each."""
    for option, words in scan(options):
        if option and option.uses & set(uses):
            yield option, words


def values(options: Sequence[str], name: str) -> list[str]:
    """The values that were given to an option, by any of its names, in their order."""
    option = _BY_NAME[name]
    return [words[-1] if len(words) > 1 else "" for found, words in scan(options) if found is option]


def words_for(options: Sequence[str], *uses: str) -> list[str]:
    """Of llama.cpp's options those for one of these uses, as they were typed."""
    return [word for _, words in select(options, *uses) for word in words]


def check_files(options: Sequence[str]) -> None:
    """TBQError for a file that is not there."""
    for option, words in select(options, FILE, FILES, FOLDER):
        value = words[1] if len(words) > 1 else ""
        for path in next(csv.reader([value]), []) if FILES in option.uses else [value]:
            if not (os.path.isdir(path) if FOLDER in option.uses else os.path.exists(path) and not os.path.isdir(path)):
                raise TBQError(f"{words[0]} {path!r} is not a {'folder' if FOLDER in option.uses else 'file'}")


def check_tls(found: Mapping[str, str], build: Mapping[str, str]) -> None:
    """TBQError for a key and a certificate that this build has no use for, or one of them without the other.

    build: what paths() returns; without "tls" it is not known, and llama-server will say so.
    """
    given = [name for name in ("ssl_key", "ssl_cert") if name in found]
    if given and build.get("tls") == "no":
        raise TBQError(
            "--ssl-key-file and --ssl-cert-file: this llama-server is built without TLS; build it where OpenSSL is installed, "
            "or put a proxy that has it in front"
        )
    if len(given) == 1:
        one, other = ("--ssl-key-file", "--ssl-cert-file")[:: 1 if given == ["ssl_key"] else -1]
        raise TBQError(f"{one} without {other}: llama-server would serve without TLS; give both")


def server_options(options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What llama-server's options say, by Option.means, the last of each as it takes them; and all but --host and --port."""
    found, others = {}, []
    for option, words in scan(options):
        if option and option.means and option.value and len(words) < 2:
            raise TBQError(f"{words[0]} needs a value")
        if option and option.means:
            found[option.means] = words[-1]
        if not option or option.means not in ("host", "port"):
            others += words
    return found, others


def positive(found: Mapping[str, str], name: str) -> int | None:
    """The number that an option gives; None where llama-server's default applies (not given, 0, negative) or it will complain."""
    text = found.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) and int(text) else None


def plan_arguments(found: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of tbq.plan() that llama-server's options ask for.  found: what server_options() returns."""
    shape: dict[str, Any] = {"context": positive(found, "context"), "swa_full": "swa_full" in found, "unified": True}
    if parallel := positive(found, "parallel"):
        shape.update(parallel=parallel, unified="no-" not in found.get("unified", "no-"))
    if (per_slot := positive(found, "per_slot")) and not shape["context"]:
        shape.update(context=per_slot * (parallel or 4))
    if {"ubatch", "batch"} & found.keys():
        shape.update(ubatch=min(positive(found, "ubatch") or 512, positive(found, "batch") or 2048))
    return shape


def from_arguments(arguments: Mapping[str, Any]) -> Iterator[str]:
    """llama.cpp's options that say what arguments of llama_cpp.Llama say.  A 0 is left out where it stands for the default."""
    for option in OPTIONS:
        value = arguments.get(option.argument) if option.argument else None
        if value is not None and (value != 0 or option.argument in ("n_gpu_layers", "yarn_ext_factor")):
            yield from (option.names[0], str(value))
