# SPDX-License-Identifier: MIT
"""The memory that llama.cpp reports is what it uses, also for a draft model's cache."""

import re

import pytest

from llama_tools import TBQ, Server, cache_line, cache_mib, complete, run

PAIRS = [("tbq4_0", "tbq4_0"), ("tbq3_0", "tbq2_0"), ("tbq2_0", "q8_0"), ("f16", "tbq3_0")]
MANY = 16384  # with so many cells, two decimals of the MiB are one part in 10000, less than one byte per row


@pytest.mark.parametrize("k,v", PAIRS)
def test_allocated_bytes(bin_dir, demo_model, k, v):
    _, log = complete(bin_dir, demo_model, "a", "-ctk", k, "-ctv", v, "--no-warmup", n=1, n_ctx=MANY)
    line = cache_line(log)
    assert line["cells"] == MANY
    assert line["k_mib"] == pytest.approx(cache_mib(k, MANY), abs=0.0051)
    assert line["v_mib"] == pytest.approx(cache_mib(v, MANY), abs=0.0051)
    # the buffer holds K and V of all layers and nothing else
    buffer = sum(float(x) for x in re.findall(r"KV buffer size = *([\d.]+) MiB", log))
    assert buffer == pytest.approx(cache_mib(k, MANY) + cache_mib(v, MANY), abs=0.0051)
    # upstream compares the compute buffers with what it expected and warns when they differ
    assert "does not match expectation" not in log


def test_share_of_f16(bin_dir, demo_model):
    """4.25 of 16 bits: 26.6 %."""
    mib = {
        t: cache_line(complete(bin_dir, demo_model, "a", "-ctk", t, "-ctv", t, "--no-warmup", n=1, n_ctx=MANY)[1])[
            "mib"
        ]
        for t in ("f16", *TBQ)
    }
    assert [round(100 * mib[t] / mib["f16"], 1) for t in TBQ] == [26.6, 20.3, 14.1]


@pytest.mark.parametrize("k,v", PAIRS)
def test_estimate(bin_dir, demo_model, k, v):
    """llama-fit-params loads no weights and prints whole MiB: model, context, compute."""
    out = run(bin_dir / "llama-fit-params", "-m", demo_model, "-c", MANY, "-ctk", k, "-ctv", v, "-fitp", "on").stdout
    context = int(re.search(r"Host \d+ (\d+) \d+", out)[1])
    assert context == int(cache_mib(k, MANY) + cache_mib(v, MANY))


@pytest.mark.parametrize("k,v", PAIRS)
def test_fit_dry_run(bin_dir, demo_model, k, v):
    """--fit on, alone: it ends with status 0 and changes nothing that it need not change."""
    done = run(bin_dir / "llama-fit-params", "-m", demo_model, "-c", 1024, "-ctk", k, "-ctv", v, "-lv", 4)
    assert "-c 1024" in done.stdout
    assert "failed to fit" not in done.stderr and "encountered an error" not in done.stderr


def test_compute_buffer(bin_dir, demo_model):
    """Scratch memory does not use up the saving: the compute buffer is that of f16 within 5 %."""
    size = {}
    for t in ("f16", "tbq4_0", "tbq2_0"):
        _, log = complete(bin_dir, demo_model, "a", "-ctk", t, "-ctv", t, "--no-warmup", n=1, n_ctx=MANY)
        size[t] = float(re.search(r"CPU compute buffer size = *([\d.]+) MiB", log)[1])
    assert size["tbq4_0"] <= 1.05 * size["f16"] and size["tbq2_0"] <= 1.05 * size["f16"], size


# -- draft model --------------------------------------------------------------------------------

PROMPT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"


@pytest.mark.parametrize("k,v", [("tbq4_0", "tbq4_0"), ("tbq2_0", "tbq3_0"), ("q8_0", "tbq4_0")])
def test_draft_cache(bin_dir, demo_model, tmp_path, k, v):
    """The model is its own draft.

    A draft is checked, so the text is the one without it.  A draft cache that works gets most of its drafts accepted.
    """
    types = ("-ctk", "tbq4_0", "-ctv", "tbq4_0")
    with Server(bin_dir, demo_model, tmp_path / "1.log", *types) as server:
        plain = server.complete(PROMPT, n=40)["content"]
    with Server(
        bin_dir,
        demo_model,
        tmp_path / "2.log",
        *types,
        "-md",
        demo_model,
        "--spec-type",
        "draft-simple",
        "--spec-draft-n-max",
        4,
        "-ctkd",
        k,
        "-ctvd",
        v,
    ) as server:
        drafted = server.complete(PROMPT, n=40)
        log = server.log
    lines = [cache_line(x) for x in log.splitlines() if "llama_kv_cache: size" in x]
    assert {(x["k"], x["v"]) for x in lines} == {("tbq4_0", "tbq4_0"), (k, v)}
    # Batches differ in size with and without a draft, so a near tie may fall the other way late in the text. Counting
    # has no early near ties.
    assert drafted["content"][:30] == plain[:30] and plain.startswith(" 13, 14, 15")
    proposed, accepted = drafted["timings"]["draft_n"], drafted["timings"]["draft_n_accepted"]
    assert proposed > 10 and accepted / proposed > 0.5, drafted["timings"]


def test_draft_cache_name_is_checked(bin_dir, demo_model):
    done = run(bin_dir / "llama-server", "-m", demo_model, "-ctkd", "tbq5_0", ok=False, timeout=30)
    out = done.stdout + done.stderr
    assert done.returncode not in (0, -6, -11)
    assert "tbq5_0" in out and "tbq4_0" in out
