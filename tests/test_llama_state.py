# SPDX-License-Identifier: MIT
"""The cache as something that is saved, restored, copied and shifted, on the real model."""
import re

import pytest

from llama_tools import GREEDY, TBQ, THREADS, Server, complete, run, tiny_llama

PAIRS = [("tbq4_0", "tbq4_0"), ("tbq3_0", "tbq2_0"), ("tbq2_0", "f16"), ("q8_0", "tbq4_0")]
PROMPT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"


def types(k, v):
    return "-ctk", k, "-ctv", v


@pytest.mark.parametrize("k,v", PAIRS)
def test_slot_survives_the_process(bin_dir, demo_model, tmp_path, k, v):
    args = (*types(k, v), "--slot-save-path", tmp_path)
    with Server(bin_dir, demo_model, tmp_path / "1.log", *args) as server:
        server.complete(PROMPT, n=8)
        status, saved = server.slot("save", "slot.bin")
        assert status == 200 and saved["n_saved"] > 30
        kept = server.complete(PROMPT, n=24)
        assert kept["timings"]["cache_n"] > 30, "the prompt was not taken from the slot"
    with Server(bin_dir, demo_model, tmp_path / "2.log", *args) as server:
        status, restored = server.slot("restore", "slot.bin")
        assert status == 200 and restored["n_restored"] == saved["n_saved"]
        again = server.complete(PROMPT, n=24)
    # Same cells, same batches: not only alike but the same.
    assert again["timings"]["cache_n"] == kept["timings"]["cache_n"]
    assert again["content"] == kept["content"] and len(again["content"]) > 10


def test_state_of_another_type_is_refused(bin_dir, demo_model, tmp_path):
    """By name of the cause and without harm: the server goes on, the slot is empty and works."""
    path = ("--slot-save-path", tmp_path)
    with Server(bin_dir, demo_model, tmp_path / "1.log", *types("tbq4_0", "tbq4_0"), *path) as server:
        server.complete(PROMPT, n=4)
        assert server.slot("save", "slot.bin")[0] == 200
    for k, v, side in (("tbq3_0", "tbq4_0", "key"), ("tbq4_0", "tbq3_0", "value"), ("f16", "f16", "key"), ("q4_1", "q4_1", "key")):
        with Server(bin_dir, demo_model, tmp_path / "2.log", *types(k, v), *path) as server:
            before = server.complete(PROMPT, n=12, cache_prompt=False)["content"]
            status, answer = server.slot("restore", "slot.bin")
            assert status == 400 and "restore" in answer["error"]["message"], answer
            assert re.search(rf"mismatched {side} type", server.log)
            after = server.complete(PROMPT, n=12)
            assert after["timings"]["cache_n"] == 0 and after["content"] == before


@pytest.mark.parametrize("k,v", PAIRS)
def test_prompt_cache_file(bin_dir, demo_model, tmp_path, k, v):
    """llama-completion --prompt-cache, in three processes: without, writing, reading."""
    file = tmp_path / "prompt.bin"
    plain, _ = complete(bin_dir, demo_model, PROMPT, *types(k, v), n=16)
    first, log1 = complete(bin_dir, demo_model, PROMPT, *types(k, v), "--prompt-cache", file, n=16)
    second, log2 = complete(bin_dir, demo_model, PROMPT, *types(k, v), "--prompt-cache", file, n=16)
    assert file.stat().st_size > 30 * 30 * 100
    assert "session file" in log2 or "saved session" in log1
    # With a file the last prompt token is decoded by itself, so a near tie may fall the other way: "first" is the
    # same computation as "second", "plain" is not.
    assert second == first and len(first) > 8
    assert plain[:7] == first[:7]


def test_prompt_cache_of_another_type(bin_dir, demo_model, tmp_path):
    file = tmp_path / "prompt.bin"
    complete(bin_dir, demo_model, PROMPT, *types("tbq4_0", "tbq4_0"), "--prompt-cache", file, n=2)
    done = run(bin_dir / "llama-completion", "-m", demo_model, "-p", PROMPT, "-n", 2, "-c", 256, "-no-cnv", *types("tbq3_0", "tbq3_0"),
               "--prompt-cache", file, *THREADS, ok=False, until="mismatched key type")
    assert done.returncode not in (0, -6, -11) and "mismatched key type" in done.stderr


# -- copies of a sequence -----------------------------------------------------------------------

@pytest.mark.parametrize("unified", ["--kv-unified", "--no-kv-unified"])
@pytest.mark.parametrize("k,v", PAIRS)
def test_copied_sequences_agree(bin_dir, demo_model, tmp_path, k, v, unified):
    """n = 3: the server evaluates the prompt once and copies the sequence. Unified, that marks cells; apart, it
    copies the bytes of K and V from stream to stream."""
    with Server(bin_dir, demo_model, tmp_path / "log", *types(k, v), unified, slots=3, n_ctx=768) as server:
        alone = server.complete(PROMPT, n=12)["content"]
        copies = [c["content"] for c in server.complete(PROMPT, n=12, n_cmpl=3)]
    assert len(copies) == 3 and len(set(copies)) == 1
    assert copies[0][:8] == alone[:8]


def upstream_save_load(build_dir, cwd, *args, until):
    """llama.cpp's own test of states and copies: the numbers of its parts that passed, status, output."""
    done = run(next(build_dir.rglob("bin/test-save-load-state")), "-c", 512, "-t", 2, *args, ok=False, cwd=cwd, until=until)
    out = done.stdout + done.stderr
    parts = re.split(r"=== Test (\d).*===", done.stdout)
    passed = {int(n) for n, text in zip(parts[1::2], parts[2::2]) if re.search(r"^PASS$", text, re.M)}
    return passed, done.returncode, out


@pytest.mark.parametrize("k", TBQ)
def test_upstream_save_load_keys(build_dir, demo_model, tmp_path, k):
    """All nine parts, the last of which turns flash attention off and therefore wants an unquantized V.

    Parts 5 and 7 keep a copy on the device. There the unpatched pin copies one element per block for every
    quantized type (llama_io_write_device takes ggml_element_size for the size of one value) and crashes.
    """
    passed, status, out = upstream_save_load(build_dir, tmp_path, "-m", demo_model, "-ctk", k, until="All tests passed")
    assert status == 0 and passed == set(range(2, 10)), out[-3000:]


@pytest.mark.parametrize("k,v", [(k, v) for k, v in PAIRS if v != "f16"])
def test_upstream_save_load_pairs(build_dir, demo_model, tmp_path, k, v):
    """Parts 2 to 8; part 1 is the reference, and part 9 cannot run: it turns flash attention off."""
    passed, status, out = upstream_save_load(build_dir, tmp_path, "-m", demo_model, *types(k, v), until="failed to create context")
    assert passed >= set(range(2, 9)), out[-3000:]
    assert "quantized V cache requires flash_attn to be enabled" in out


def test_upstream_save_load_other_architectures(build_dir, tmp_path):
    """The same parts on tiny random models: keys of 576 whose first 512 are the values (MLA), one KV head for four
    heads, sliding windows, attention sinks, logit soft-capping, hybrids with recurrent layers, and caches of keys only
    (the indexers of sparse attention)."""
    models = tmp_path / "models"
    models.mkdir()
    names = "deepseek2|deepseek32|deepseek4|glm-dsa|qwen3|gemma2|gemma3|gpt-oss|falcon-h1|qwen2|phi3|lfm2"
    run(next(build_dir.rglob("bin/test-llama-archs")), "-o", models, "-a", f"^({names})$")
    made = sorted(m.stem for m in models.glob("*.gguf"))
    assert len(made) >= 12, made
    done = run(next(build_dir.rglob("bin/test-save-load-state")), "--models", models, *types("tbq4_0", "tbq4_0"), "-t", 2,
               ok=False, cwd=tmp_path, until=made[-1])
    table = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    for name in made:
        # the ninth column is the part that turns flash attention off
        assert re.search(rf"^{name}\.gguf +(PASS +){{8}}FAIL", table, re.M), table


@pytest.mark.parametrize("k,v", [("tbq4_0", "tbq4_0"), ("tbq2_0", "tbq3_0")])
def test_upstream_restore_into_a_fragmented_cache(build_dir, demo_model, tmp_path, k, v):
    """ctest would run this one on a model it downloads."""
    program = next(build_dir.rglob("bin/test-state-restore-fragmented"))
    run(program, "-m", demo_model, *types(k, v), "-t", 2, cwd=tmp_path)


# -- context shift ------------------------------------------------------------------------------

def count_on(bin_dir, model, k, v, prompt=PROMPT):
    """Count from 12 for longer than the context: the numbers written, the log. The first four cells stay, as the
    model leans on them; the rest of the keys are turned to their new positions (dequantized, turned, quantized)."""
    done = run(bin_dir / "llama-completion", "-m", model, "-p", prompt, "-n", 340, "-c", 256, "--keep", 4, "--context-shift",
               "--ignore-eos", "-no-cnv", "--no-display-prompt", "-lv", 5, *types(k, v), *THREADS, *GREEDY, until="graphs reused")
    assert "applying K-shift" in done.stderr, "the context never filled"
    assert re.search(r"n_ctx_seq += 256", done.stderr)
    return [int(n) for n in re.findall(r"\d+", done.stdout)], done.stdout


@pytest.mark.parametrize("k,v,share,last", [
    ("f16", "f16", 0.98, 90), ("tbq4_0", "tbq4_0", 0.9, 90), ("tbq4_0", "f16", 0.9, 90), ("tbq3_0", "tbq3_0", 0.75, 0)])
def test_context_shift(bin_dir, demo_model, k, v, share, last):
    """Before and after the shift the model counts: nearly each number is one more than the last (a coarser cache
    skips or repeats one now and then, and at three bits starts again from 9 once). f16 is the yardstick: it writes
    13 to 97."""
    numbers, text = count_on(bin_dir, demo_model, k, v)
    shifted = numbers[numbers.index(67):] if 67 in numbers else numbers[len(numbers) * 2 // 3:]
    for part in (numbers, shifted):
        steps = [b - a for a, b in zip(part, part[1:])]
        assert len(steps) >= 20, text
        assert sum(s in (1, 2) for s in steps) / len(steps) >= share, text
    assert max(numbers[-2:]) >= last, text  # the last may be cut off: "101, 1"


@pytest.mark.parametrize("k,v", [("tbq4_0", "tbq2_0"), ("tbq2_0", "tbq2_0")])
def test_context_shift_two_bits(bin_dir, demo_model, k, v):
    """At two bits this model loses count, shift or no shift; it must go on writing all the same."""
    numbers, text = count_on(bin_dir, demo_model, k, v)
    assert len(text) > 300 and len(numbers) > 50, text


def test_cache_reuse_by_shifting(bin_dir, demo_model, tmp_path):
    """The server's other use of the shift: a chunk that moved within the prompt is turned, not computed again."""
    # the server takes a slot over when the prompts begin alike
    head, gone, tail = "Here are some words: apple", ", pear, plum, cherry, quince", ". Now we count slowly: " + PROMPT
    with Server(bin_dir, demo_model, tmp_path / "log", *types("tbq4_0", "tbq4_0"), "--cache-reuse", 16) as server:
        server.complete(head + gone + tail, n=1)
        moved = server.complete(head + tail, n=10)
        assert moved["timings"]["prompt_n"] < 12, moved["timings"]
        fresh = server.complete(head + tail, n=10, cache_prompt=False)
    assert moved["content"][:8] == fresh["content"][:8] == " 13, 14,"


@pytest.mark.parametrize("k", ["f16", *TBQ])
def test_context_shift_of_a_part_of_the_head(bin_dir, tmp_path, k):
    """RoPE on the first 32 channels of 64: a block holds channels that turn and channels that stay. The unpatched view
    of 32 channels would be half a block: without the padding of patch 0005 every tbq type aborts here."""
    model = tiny_llama(tmp_path / "m.gguf", 64, arch="stablelm", rope=32)
    _, text = count_on(bin_dir, model, k, "f16", prompt="abc")
    assert len(text) >= 300
