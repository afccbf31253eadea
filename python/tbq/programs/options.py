# SPDX-License-Identifier: MIT
"""llama.cpp's options: a table of those that tbq reads, and functions that read them."""

import csv
import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tbq.errors import TBQError

#: What an option is for.  ROPE and ADAPTER options change the keys, so a center is valid for one value of each.  MODEL
#: options change how a model runs, so every measurement of the model gets them too.  FILE, FILES and FOLDER options are
#: paths.  llama-server opens these late, or never, so tbq checks them first.
ROPE, ADAPTER, MODEL, FILE, FILES, FOLDER = "rope", "adapter", "model", "file", "files", "folder"


@dataclass(frozen=True)
class Option:
    """An option of llama.cpp's programs."""

    names: tuple[str, ...]  #: all spellings
    uses: frozenset[str] = frozenset()
    key: str = ""  #: the key under which server_options() returns the value
    values: int = 1  #: the number of values that follow
    argument: str = ""  #: the argument of llama_cpp.Llama with the same effect


def _option(names: str, *uses: str, key: str = "", values: int = 1, argument: str = "") -> Option:
    return Option(tuple(names.split()), frozenset(uses), key, values, argument)


OPTIONS = (
    # options that change the plan, and what a client must know of the server
    _option("-c --ctx-size", key="context"),
    _option("-np --parallel", key="parallel"),
    _option("-ub --ubatch-size", key="ubatch"),
    _option("-b --batch-size", key="batch"),
    _option("--swa-full", key="swa_full", values=0),
    _option("-kvu --kv-unified -no-kvu --no-kv-unified", key="unified", values=0),
    _option("--kv-unified-per-slot", key="per_slot"),
    _option("-ctk --cache-type-k -ctv --cache-type-v", key="types"),
    _option("-m --model -mu --model-url -dr --docker-repo -hf -hfr --hf-repo", key="model"),
    _option("-fa --flash-attn"),
    _option("--cache-recent", key="recent"),
    _option("--cache-first", key="first"),
    _option("--host", key="host"),
    _option("--port", key="port"),
    _option("--reuse-port", key="reuse_port", values=0),
    _option("--api-prefix", key="prefix"),
    _option("--api-key", key="key"),
    _option("--api-key-file", key="key_file"),
    # options that name files
    _option("--ssl-key-file", FILE, key="ssl_key"),
    _option("--ssl-cert-file", FILE, key="ssl_cert"),
    _option("--cache-center", FILE, key="center"),
    _option("--spec-draft-cache-center --cache-center-draft", FILE, key="draft_center"),
    _option("-mm --mmproj", FILE),
    _option("--lora", FILES, ADAPTER),
    _option("--control-vector", FILES, ADAPTER),
    _option("-md --model-draft --spec-draft-model", FILE),
    _option("-lcs --lookup-cache-static", FILE),
    _option("--mcp-servers-config", FILE),
    _option("--path", FOLDER),
    # options that change the keys
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
    _option("--lora-scaled", ADAPTER),
    _option("--lora-init-without-apply", ADAPTER, values=0),
    _option("--control-vector-scaled", ADAPTER),
    _option("--control-vector-layer-range", ADAPTER, values=2),
    # options that change how the model runs
    _option("-t --threads", MODEL, key="threads", argument="n_threads_batch"),
    _option("-ngl --gpu-layers --n-gpu-layers", MODEL, argument="n_gpu_layers"),
    _option("-dev --device", MODEL),
    _option("-sm --split-mode", MODEL),
    _option("-ts --tensor-split", MODEL),
    _option("-mg --main-gpu", MODEL, argument="main_gpu"),
    _option("-ot --override-tensor", MODEL),
    _option("-ncmoe --n-cpu-moe", MODEL),
    _option("-ncffn --n-cpu-ffn", MODEL),
    _option("--rpc", MODEL, key="rpc"),
    _option("-lm --load-mode", MODEL),
    _option("-lzm --lazy-mode", MODEL),
    _option("--numa", MODEL),
    _option("-cmoe --cpu-moe", MODEL, values=0),
    _option("-nr --no-repack", MODEL, values=0),
    _option("--no-host", MODEL, values=0),
)

_BY_NAME = {name: option for option in OPTIONS for name in option.names}


def normalize_name(option: str) -> str:
    """The name under which llama.cpp looks up an option: --ctx-size for --ctx_size."""
    return option.replace("_", "-") if option.startswith("--") else option


def parse_options(options: Sequence[str]) -> Iterator[tuple[Option | None, list[str]]]:
    """A command line, option by option: the option's entry in the table, and the words that belong to it.

    The entry is None for an option that is not in the table.  A value of such an option is given as one more option.
    An option whose value is missing has one word only.
    """
    rest = iter(options)
    for word in rest:
        known = _BY_NAME.get(normalize_name(word))
        yield known, [word, *itertools.islice(rest, known.values if known else 0)]


def select_options(options: Sequence[str], *uses: str) -> Iterator[tuple[Option, list[str]]]:
    """The options of a command line that have one of these uses, and the words that belong to each."""
    for option, words in parse_options(options):
        if option and option.uses & set(uses):
            yield option, words


def option_values(options: Sequence[str], name: str) -> list[str]:
    """All values of an option in a command line, under any of its names, in their order."""
    option = _BY_NAME[name]
    return [words[-1] if len(words) > 1 else "" for found, words in parse_options(options) if found is option]


def select_words(options: Sequence[str], *uses: str) -> list[str]:
    """The words of a command line that belong to options with one of these uses, as they were typed."""
    return [word for _, words in select_options(options, *uses) for word in words]


def adapter_options(options: Sequence[str]) -> list[str]:
    """The words of the options for adapters and control vectors that are in force from the start."""
    selected = list(select_options(options, ADAPTER))
    if any("--lora-init-without-apply" in option.names for option, _ in selected):
        selected = [(option, words) for option, words in selected if not option.names[0].startswith("--lora")]
    return [word for _, words in selected for word in words]


def adapter_files(options: Sequence[str]) -> list[str]:
    """The files of adapter_options()."""
    found = select_options(adapter_options(options), ADAPTER)
    return [path for option, words in found for path, _ in _split_adapters(option, words)]


def with_absolute_adapters(options: Sequence[str]) -> list[str]:
    """A command line for another folder: the files of adapters and control vectors are absolute."""
    words: list[str] = []
    for option, some in parse_options(options):
        adapters = list(_split_adapters(option, some)) if option and ADAPTER in option.uses else []
        if not adapters:
            words += some
            continue
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow([os.path.abspath(path) + scale for path, scale in adapters])
        words += [some[0], text.getvalue()]
    return words


def _split_adapters(option: Option, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The files that an option names, each with what follows it (":SCALE")."""
    if option.values == 1 and len(words) > 1:
        for item in next(csv.reader([words[1]]), []):
            path, colon, scale = item.rpartition(":") if option.names[0].endswith("-scaled") else (item, "", "")
            yield path, colon + scale


def check_files(options: Sequence[str]) -> None:
    """Raises TBQError if an option names a file or folder that does not exist."""
    for option, words in select_options(options, FILE, FILES, FOLDER):
        value = words[1] if len(words) > 1 else ""
        for path in next(csv.reader([value]), []) if FILES in option.uses else [value]:
            if FOLDER in option.uses:
                if not os.path.isdir(path):
                    raise TBQError(f"{words[0]} {path!r} is not a folder")
            elif option.key in ("center", "draft_center") and path in ("auto", "none"):
                continue
            elif not os.path.exists(path) or os.path.isdir(path):
                raise TBQError(f"{words[0]} {path!r} is not a file")


def check_tls(found: Mapping[str, str], build: Mapping[str, str]) -> None:
    """Raises TBQError for a TLS key without its certificate or the reverse, and for either in a build without TLS.

    build: what paths() returns.  Without "tls" in it, it is not known whether the build has TLS, and llama-server will
    report it.
    """
    given = [name for name in ("ssl_key", "ssl_cert") if name in found]
    if given and build.get("tls") == "no":
        raise TBQError(
            "--ssl-key-file and --ssl-cert-file: this llama-server is built without TLS; "
            "build it where OpenSSL is installed, or put a proxy that has it in front"
        )
    if len(given) == 1:
        one, other = ("--ssl-key-file", "--ssl-cert-file")[:: 1 if given == ["ssl_key"] else -1]
        raise TBQError(f"{one} without {other}: llama-server would serve without TLS; give both")


def server_options(options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of llama-server's options by Option.key, and all options except --host and --port.

    Of an option that is repeated, the last value counts, as in llama-server.
    """
    found, others = {}, []
    for option, words in parse_options(options):
        if option and option.key and option.values and len(words) < 2:
            raise TBQError(f"{words[0]} needs a value")
        if option and option.key:
            found[option.key] = words[-1]
        if not option or option.key not in ("host", "port"):
            others += words
    return found, others


def positive_number(found: Mapping[str, str], key: str) -> int | None:
    """The value of an option as a number.

    None if llama-server would use its default (no value, 0, or a negative one), or would refuse the value.
    """
    text = found.get(key, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) and int(text) else None


def plan_arguments(found: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of tbq.plan() that llama-server's options mean.  found: what server_options() returns."""
    shape: dict[str, Any] = {
        "context": positive_number(found, "context"),
        "swa_full": "swa_full" in found,
        "unified": True,
    }
    # a value that is not a number of rows is left to llama-server, which refuses it
    shape.update(
        {key: int(found[key]) for key in ("recent", "first") if re.fullmatch(r"[0-9]{1,9}", found.get(key, ""))}
    )
    if parallel := positive_number(found, "parallel"):
        shape.update(parallel=parallel, unified="no-" not in found.get("unified", "no-"))
    if (per_slot := positive_number(found, "per_slot")) and not shape["context"]:
        shape.update(context=per_slot * (parallel or 4))
    if {"ubatch", "batch"} & found.keys():
        ubatch, batch = positive_number(found, "ubatch") or 512, positive_number(found, "batch") or 2048
        shape.update(ubatch=min(ubatch, batch))
    return shape


def options_from_arguments(arguments: Mapping[str, Any]) -> Iterator[str]:
    """llama.cpp's options with the effect of arguments of llama_cpp.Llama.  A 0 that means the default is left out."""
    for option in OPTIONS:
        value = arguments.get(option.argument) if option.argument else None
        if value is not None and (value != 0 or option.argument in ("n_gpu_layers", "yarn_ext_factor")):
            yield from (option.names[0], str(value))
