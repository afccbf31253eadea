# SPDX-License-Identifier: MIT
"""What llama.cpp's programs print, recorded from the pin in tests/output/, and the values that tbq reads from it.

After an update of llama.cpp, record a file again if its test fails.  Run the program that the name says, on the demo
model, in an empty folder so that no path gets into the file.  Keep the lines around the pattern.
"""

import pytest

from conftest import ROOT
from tbq.programs import output

SAMPLES = ROOT / "tests" / "output"


def sample(name):
    return (SAMPLES / f"{name}.txt").read_text(encoding="utf-8")


SHARES = "share of the keys' energy in their mean, by the tokens of context that it is taken over\nlayer      128"
EXPECTED = [
    (
        output.cache_types,
        "help",
        ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1", "tbq2_0", "tbq3_0", "tbq4_0"],
    ),
    (output.cache_types, "server", None),
    (output.failure_reason, "bench-no-context", "failed to create context with model 'model.gguf'"),
    (output.failure_reason, "server-unknown-option", "invalid argument: --nosuch"),
    (output.failure_reason, "center", None),
    (output.last_line, "perplexity-base", "[1]16.6612,[2]15.4728,"),
    (output.center_error, "center-short-text", "the text has 2 tokens, a chunk takes 128"),
    (output.center_error, "center-no-model", "nosuch.gguf cannot be loaded"),
    (output.center_error, "center", None),
    (output.center_progress, "center", (8, 8)),
    (output.center_progress, "center-no-model", None),
    (output.center_not_written, "center-not-written", True),
    (output.center_not_written, "center", False),
    (output.chunks_read, "perplexity-base", 2),
    (output.chunks_compared, "perplexity-kl-divergence", 2),
    (output.tokens_of_short_text, "perplexity-short-text", 2),
    (output.tokens_of_short_text, "perplexity-base", None),
    (output.kl_divergence, "perplexity-base", None),
    (output.has_no_context, "bench-no-context", True),
    (output.has_no_context, "center", False),
]
LOGS = [
    (output.server_error, "server-unknown-option", "invalid argument: --nosuch"),
    (
        output.server_error,
        "server-not-gguf",
        "gguf_init_from_reader: invalid magic characters: 'The ', expected 'GGUF'",
    ),
    (
        output.refused_center,
        "server-refused-center",
        "center.gguf was measured with another RoPE (layer 0: base 100000, scale 1, factors none; "
        "here 77, 1, none); measure again with the same options",
    ),
    (output.refused_center, "server", None),
    (output.server_context, "server", 512),
    (output.server_context, "server-not-gguf", None),
    (
        output.server_cache,
        "server",
        {
            "cells": 512,
            "layers": 30,
            "k_type": "tbq4_0",
            "k_mib": 1.49,
            "v_type": "tbq4_0",
            "v_mib": 1.49,
            "exact_mib": 3.09,
            "k_values": 192,
            "v_values": 192,
        },
    ),
    (output.server_cache, "server-unknown-option", None),
]


@pytest.mark.parametrize("function, name, value", EXPECTED, ids=lambda x: getattr(x, "__name__", None) or str(x)[:20])
def test_output(function, name, value):
    assert function(sample(name)) == value


@pytest.mark.parametrize("function, name, value", LOGS, ids=lambda x: getattr(x, "__name__", None) or str(x)[:20])
def test_logs(function, name, value):
    assert function(sample(name).splitlines()) == value


def test_kl_divergence():
    """Every figure is read, and none from output that was cut off before it had all figures."""
    text = sample("perplexity-kl-divergence")
    assert output.kl_divergence(text) == {
        "ppl": (16.089257, 2.686495),
        "ppl_ratio": (1.039842, 0.018947),
        "kld": (0.0369, 0.003095),
        "same_top": (87.795, 2.058),
        "rms_dp": (5.605, 0.745),
        "base_ppl": (15.472797, 2.603443),
        "kld_99": (0.258207, 0.0),
    }
    for missing in ("Mean PPL(Q)/PPL(base)", "Same top p", "Mean    KLD"):
        assert output.kl_divergence(text.partition(missing)[0]) is None


def test_shares():
    shares = output.center_shares(sample("center"))
    assert shares.startswith(SHARES) and len(shares.splitlines()) == 32


def test_a_gpu_that_is_too_small():
    assert output.is_too_large("model.gguf cannot be loaded") and not output.is_too_large(
        "the text has 2 tokens, a chunk takes 128"
    )
    assert output.ran_out_of_memory(
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 1 MiB on device 0: cudaMalloc failed: out of memory"
    )


def test_nothing_to_center():
    line = "0.01.746.898 E error: nothing to measure, the keys of this model stay as they are: attention sinks"
    assert output.nothing_to_center(line) == "attention sinks" and output.nothing_to_center(sample("center")) is None


def test_every_sample_is_used():
    used = {name for _, name, _ in [*EXPECTED, *LOGS]} | {"perplexity-kl-divergence"}
    assert {path.stem for path in SAMPLES.iterdir()} == used
