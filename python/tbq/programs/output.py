# SPDX-License-Identifier: MIT
"""What llama.cpp's programs print: every pattern that tbq looks for.

tests/output/ has recorded samples.  Lines that only a small GPU prints are typed into tests/test_output.py.
After an update of llama.cpp the samples are recorded again (tests/test_output.py).  Patterns that no longer match are
corrected here.
"""

import re
from collections.abc import Sequence

#: The time and the level at the start of a log line, "0.00.000.000 E ".
_CLOCK = re.compile(r"^[\d.]+ [A-Z] ")


def failure_reason(text: str) -> str | None:
    """Why a program failed, as one of its lines says; None if no line says it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if found := rpc_refusal(lines):
        return found
    for mark in ("llama_init_from_model: ", "error: ", "error loading model: ", " E "):
        for line in lines:
            if mark in line:
                return line.rpartition(mark)[2]
    return None


def rpc_refusal(lines: Sequence[str]) -> str | None:
    """Why an RPC server cannot be used, or was lost; None if no line says it."""
    found = (re.fullmatch(r"(?:[\d.]+ E )?(.*\bRPC server\b(?! \S+ cannot be used).*)", line) for line in lines)
    return next((match[1].strip() for match in found if match and "error while handling" not in match[1]), None)


def last_line(text: str) -> str | None:
    """The last line that is not empty; None if all are."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)


# --- every program: --help ------------------------------------------------------------------------------------------


def cache_types(text: str) -> list[str] | None:
    """The cache types that --help names, in its order; None if it names none."""
    found = re.search(r"--cache-type-k TYPE.*?allowed values: (.*?)\(default", text, re.S)
    return found[1].replace(",", " ").split() if found else None


# --- every program: --list-devices ----------------------------------------------------------------------------------


def devices(text: str) -> list[tuple[str, int]]:
    """The names and bytes of free memory of the devices that --list-devices prints, in its order."""
    rows = re.findall(r"^ *(\w+): .* \(\d+ MiB, (\d+) MiB free\)$", text, re.M)
    return [(name, int(free) << 20) for name, free in rows]


# --- llama-server: its log ------------------------------------------------------------------------------------------


def server_error(log: Sequence[str]) -> str | None:
    """The line of a log that says most about a failure; None if the log is empty."""
    if found := rpc_refusal(log):
        return found
    patterns = (
        (r"(?:GGML_ASSERT|error|terminate called)\b.*", 0),
        (r"[\d.]+ E (.*)", 0),
        (r"(.*(?:error|failed|unsupported|invalid).*)", re.I),
    )
    for pattern, flags in patterns:
        for line in log:
            if match := re.match(pattern, line, flags):
                return match[match.re.groups].strip().removeprefix("error: ")
    lines = [line for line in log if line.strip()]
    return _CLOCK.sub("", lines[-1]) if lines else None


def refused_center(log: Sequence[str]) -> str | None:
    """Why a context refused the file of --cache-center; None if it did not."""
    mark = "llama_set_cache_center: "
    return next((line.partition(mark)[2] for line in log if mark in line), None)


def server_context(log: Sequence[str]) -> int | None:
    """Tokens of all slots together; None if the log does not say."""
    found = re.search(r"n_slots = (\d+), n_ctx_slot = (\d+), kv_unified = '(\w+)'", "\n".join(log))
    return int(found[2]) * (1 if found[3] == "true" else int(found[1])) if found else None


def server_cache(log: Sequence[str]) -> dict[str, str | float | int] | None:
    """The cache of a model, as --verbosity 4 logs it; None if the log does not have it.

    Keys of the result: cells, layers, k_type, k_mib, v_type, v_mib; exact_mib, of the exact rows; k_values and v_values
    are the values of a token in a layer.
    """
    text = "\n".join(log)
    size = re.search(
        r"llama_kv_cache: size = +[\d.]+ MiB \( *(\d+) cells, *(\d+) layers.*?"
        r"K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB",
        text,
    )
    exact = re.search(r"llama_set_cache_exact: the newest .* layers, ([\d.]+) MiB", text)
    widths = [re.search(rf"n_embd_{kv}_gqa += (\d+)", text) for kv in "kv"]
    if not size or not widths[0] or not widths[1]:
        return None
    cells, layers, k_type, k_mib, v_type, v_mib = size.groups()
    return {
        "cells": int(cells),
        "layers": int(layers),
        "k_type": k_type,
        "k_mib": float(k_mib),
        "v_type": v_type,
        "v_mib": float(v_mib),
        "exact_mib": float(exact[1]) if exact else 0.0,
        "k_values": int(widths[0][1]),
        "v_values": int(widths[1][1]),
    }


# --- llama-cache-center ---------------------------------------------------------------------------------------------


def center_error(text: str) -> str | None:
    """The error of llama-cache-center, without the time before it; None if it printed no error."""
    found = re.search(r"^(?:[\d.]+ E )?error: (.*)", text, re.M)
    return found[1] if found else None


def center_progress(text: str) -> tuple[int, int] | None:
    """The number of finished chunks and of all chunks; None before the first is finished."""
    found = re.findall(r"^chunk (\d+)/(\d+)$", text, re.M)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def nothing_to_center(text: str) -> str | None:
    """Why the keys of a model cannot be centered; None if the program does not say that."""
    found = re.search(r"nothing to measure(?:, [^:\n]*)?: (.*)", text)
    return found[1] if found else None


def center_not_written(text: str) -> bool:
    """Whether llama-cache-center could not write its file."""
    return "llama_center_save: center" in text


def is_too_large(error: str) -> bool:
    """Whether an error of llama-cache-center may come from a GPU that is too small for the model."""
    return re.search("cannot be loaded$|^no context", error) is not None


def center_shares(text: str) -> str:
    """The table with the share of the keys' energy that is in their means."""
    return text[text.find("share of the keys") :].rstrip()


# --- llama-perplexity -----------------------------------------------------------------------------------------------


def chunks_read(text: str) -> int:
    """Chunks that the run with the f16 cache has scored so far."""
    return len(re.findall(r"\[\d+\]", text))


def chunks_compared(text: str) -> int:
    """Rows that --kl-divergence has printed so far, one for each chunk."""
    return len(re.findall(r"^ +\d+ +\S+ ±.*\n", text, re.M))


def tokens_of_short_text(text: str) -> int | None:
    """Tokens of a text that is too short for the context; None if it is long enough."""
    found = re.search(r"tokenizes to only (\d+) tokens", text)
    return int(found[1]) if found else None


_NUMBER = r"\s*(-?(?:[\d.]+|nan|inf))"
_MEANS = {
    "ppl": r"Mean PPL\(Q\)",
    "ppl_ratio": r"Mean PPL\(Q\)/PPL\(base\)",
    "kld": r"Mean\s+KLD",
    "same_top": "Same top p",
    "rms_dp": "RMS Δp",
    "base_ppl": r"Mean PPL\(base\)",
}


def kl_divergence(text: str) -> dict[str, tuple[float, float]] | None:
    """What --kl-divergence printed, each as a mean and its standard error; None if a line is missing.

    Keys of the result: ppl, ppl_ratio, kld (nats), same_top and rms_dp (percent), base_ppl, and kld_99.  kld_99 is the
    99th percentile of kld; its error is given as 0.
    """
    found = {}
    for name, label in _MEANS.items():
        match = re.search(label + r"\s*:" + _NUMBER + r"\s*±" + _NUMBER, text)
        if not match:
            return None
        found[name] = (_float(match[1]), _float(match[2]))
    percentile = re.search(r"99\.0%\s+KLD:" + _NUMBER, text)
    return {**found, "kld_99": (_float(percentile[1]) if percentile else float("nan"), 0.0)}


def _float(text: str) -> float:
    return float(text.replace("-nan", "nan"))


# --- llama-bench ----------------------------------------------------------------------------------------------------


def has_no_context(text: str) -> bool:
    """Whether llama-bench failed to make a context.  It says why only with -v."""
    return "failed to create context" in text


def ran_out_of_memory(text: str) -> bool:
    """Whether llama-bench failed because memory ran out."""
    return "failed to allocate" in text or "out of memory" in text.lower()
