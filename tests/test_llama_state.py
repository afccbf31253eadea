# SPDX-License-Identifier: MIT
"""The cache as something that is saved, restored, copied and shifted, on the real model."""

import itertools
import re
import struct
import subprocess

import pytest

from llama_tools import GREEDY, TBQ, THREADS, Server, complete, run, tiny_llama
from test_plan import gemma3, lfm2

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
    # The same cells and the same batches, so not only similar but the same.
    assert again["timings"]["cache_n"] == kept["timings"]["cache_n"]
    assert again["content"] == kept["content"] and len(again["content"]) > 10


def test_state_of_another_type_is_refused(bin_dir, demo_model, tmp_path):
    """A refusal names the cause and does no harm: the server goes on, and the slot is empty and works."""
    path = ("--slot-save-path", tmp_path)
    with Server(bin_dir, demo_model, tmp_path / "1.log", *types("tbq4_0", "tbq4_0"), *path) as server:
        server.complete(PROMPT, n=4)
        assert server.slot("save", "slot.bin")[0] == 200
    for k, v, side in (
        ("tbq3_0", "tbq4_0", "key"),
        ("tbq4_0", "tbq3_0", "value"),
        ("f16", "f16", "key"),
        ("q4_1", "q4_1", "key"),
    ):
        with Server(bin_dir, demo_model, tmp_path / "2.log", *types(k, v), *path) as server:
            before = server.complete(PROMPT, n=12, cache_prompt=False)["content"]
            status, answer = server.slot("restore", "slot.bin")
            assert status == 400 and "restore" in answer["error"]["message"], answer
            assert re.search(rf"mismatched {side} type", server.log)
            after = server.complete(PROMPT, n=12)
            assert after["timings"]["cache_n"] == 0 and after["content"] == before


@pytest.mark.parametrize("k,v", PAIRS)
def test_prompt_cache_file(bin_dir, demo_model, tmp_path, k, v):
    """llama-completion --prompt-cache, in three processes: without the file, writing it, reading it."""
    file = tmp_path / "prompt.bin"
    plain, _ = complete(bin_dir, demo_model, PROMPT, *types(k, v), n=16)
    first, log1 = complete(bin_dir, demo_model, PROMPT, *types(k, v), "--prompt-cache", file, n=16)
    second, log2 = complete(bin_dir, demo_model, PROMPT, *types(k, v), "--prompt-cache", file, n=16)
    assert file.stat().st_size > 30 * 30 * 100
    assert "session file" in log2 or "saved session" in log1
    # With a file the last prompt token is decoded separately, so a near tie may fall the other way. "first" is the
    # same computation as "second", "plain" is not.
    assert second == first and len(first) > 8
    assert plain[:7] == first[:7]


def test_prompt_cache_of_another_type(bin_dir, demo_model, tmp_path):
    file = tmp_path / "prompt.bin"
    complete(bin_dir, demo_model, PROMPT, *types("tbq4_0", "tbq4_0"), "--prompt-cache", file, n=2)
    done = run(
        bin_dir / "llama-completion",
        "-m",
        demo_model,
        "-p",
        PROMPT,
        "-n",
        2,
        "-c",
        256,
        "-no-cnv",
        *types("tbq3_0", "tbq3_0"),
        "--prompt-cache",
        file,
        *THREADS,
        ok=False,
    )
    assert done.returncode not in (0, -6, -11) and "mismatched key type" in done.stderr


# -- files that are not what was saved ----------------------------------------------------------

SHORT = "1, 2, 3, 4,"


class SlotFile:
    """The offset of each number in a saved slot.

    `fields` is {name: (offset, struct format)}; the data of cells is left out. parts: the memories that the model's
    state consists of, "attention" or "recurrent", in order.
    """

    def __init__(self, data, parts):
        self.data, self.at, self.fields = data, 0, {}
        self.take("magic", "<I"), self.take("version", "<I")
        for i in range(
            self.take("n_tokens", "<I")
        ):  # the server's list: a mark, its version, a count, the tokens, no media
            self.take(f"tokens[{i}]", "<i")
        for i, part in enumerate(parts):
            getattr(self, part)(f"{part}{i}.")

    def take(self, name, fmt):
        self.fields[name] = self.at, fmt
        (value,) = struct.unpack_from(fmt, self.data, self.at)
        self.at += struct.calcsize(fmt)
        return value

    def rows(self, prefix, cells, layers):
        for layer in range(layers):
            self.take(f"{prefix}type[{layer}]", "<i")
            row = self.take(f"{prefix}row[{layer}]", "<Q")
            self.at += cells * row

    def attention(self, p):
        self.take(p + "n_stream", "<I")
        cells = self.take(p + "n_cells", "<I")
        for i in range(cells):
            self.take(f"{p}pos[{i}]", "<i"), self.take(f"{p}n_seq[{i}]", "<I"), self.take(f"{p}seq[{i}]", "<i")
        assert self.take(p + "v_trans", "<I") == 0
        layers = self.take(p + "n_layer", "<I")
        self.rows(p + "k_", cells, layers), self.rows(p + "v_", cells, layers)

    def recurrent(self, p):
        assert self.take(p + "n_cells", "<I") == 1
        self.take(p + "pos[0]", "<i"), self.take(p + "n_seq[0]", "<I")
        self.take(p + "s_trans", "<I"), self.take(p + "n_layer", "<I")
        self.rows(p + "r_", 1, 1)  # the numbers of the first layer

    def changed(self, name, value):
        at, fmt = self.fields[name]
        return self.data[:at] + struct.pack(fmt, value) + self.data[at + struct.calcsize(fmt) :]

    def value(self, name):
        at, fmt = self.fields[name]
        return struct.unpack_from(fmt, self.data, at)[0]


def some(items, n=3):
    """The first item, the last one, and some between."""
    items = list(items)
    return items if len(items) <= n else [items[i * (len(items) - 1) // (n - 1)] for i in range(n)]


def wrong_values(file):
    """The pairs (field, value) that a restore must refuse, for every kind of field.

    Of fields that repeat, the first, a middle and the last one.  A token may become another one of the vocabulary and
    a sequence another number: neither can be told from a saved one.
    """
    kinds = {}
    for name in file.fields:
        kinds.setdefault(re.sub(r"\[\d+\]$", "", name), []).append(name)
    for kind, names in kinds.items():
        for name in some(names):
            limit = {"i": 2**31, "I": 2**32, "Q": 2**64}[file.fields[name][1][1]]
            low = -limit if limit == 2**31 else 0
            values = {low, limit - 1, 0, 1, file.value(name) - 1, file.value(name) + 1, 1 << 20}
            if kind == "tokens":
                values = (
                    {low, limit - 1, 1 << 20}
                    if name not in ("tokens[0]", "tokens[1]", "tokens[2]")
                    else values - {1 << 20}
                )
            elif kind.endswith(".seq"):
                values = {low, -1, 256, limit - 1}
            for value in sorted(values - {file.value(name)}):
                if low <= value < limit:
                    yield name, value


def tiny(path):
    return tiny_llama(path, 64)


MEMORIES = {
    "f16": ("f16", ["attention"], tiny),
    "tbq4_0": ("tbq4_0", ["attention"], tiny),
    "windows": ("tbq4_0", ["attention", "attention"], gemma3),
    "hybrid": ("tbq4_0", ["attention", "recurrent"], lfm2),
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_corrupt_slot_files_are_refused(bin_dir, tmp_path, memory):
    """A file that is cut off anywhere, or has another number in it, gives an error.

    The server lives, and the slot is empty and works.
    """
    kind, parts, make = MEMORIES[memory]
    model = make(tmp_path / "model.gguf")
    args = (*types(kind, kind), "-fa", "on", "--slot-save-path", tmp_path)
    with Server(bin_dir, model, tmp_path / "log", *args, n_ctx=256) as server:
        content = server.complete(SHORT, n=4)["content"]
        assert server.slot("save", "good.bin")[0] == 200
        file = SlotFile((tmp_path / "good.bin").read_bytes(), parts)
        size = len(file.data)
        if memory != "hybrid":
            assert file.at == size  # every number of the file is known

        sizes = {
            0,
            *(file.fields[name][0] + n for name in some(file.fields, 24) for n in (0, 1)),
            *(size * i // 16 for i in range(16)),
            size - 1,
        }
        cases = [(f"cut off at {n} of {size}", file.data[:n]) for n in sorted(sizes)]
        cases += [
            (f"{name} {file.value(name)} -> {value}", file.changed(name, value)) for name, value in wrong_values(file)
        ]
        assert len(cases) > 120
        for i, (what, data) in enumerate(cases):
            (tmp_path / "bad.bin").write_bytes(data)
            try:
                status, answer = server.slot("restore", "bad.bin")
            except OSError as error:
                raise AssertionError(f"{what}: no answer ({error})\n{server.written[-3000:]}") from None
            assert status == 400 and answer["error"]["message"].startswith("Unable to restore slot: "), (what, answer)
            if i % 4 == 0 or i + 1 == len(cases):
                after = server.complete(SHORT, n=4)
                assert after["timings"]["cache_n"] == 0 and after["content"] == content, (what, after)
        status, restored = server.slot("restore", "good.bin")
        assert status == 200 and restored["n_restored"] == file.value("tokens[2]")
        after = server.complete(SHORT, n=4)
        assert after["content"] == content and (
            after["timings"]["cache_n"] > 8 or make is not tiny
        )  # other memories cannot go back


def test_the_answer_says_why_a_slot_is_not_restored(bin_dir, demo_model, tmp_path):
    path = ("--slot-save-path", tmp_path)
    with Server(bin_dir, demo_model, tmp_path / "1.log", *types("tbq4_0", "tbq4_0"), *path) as server:
        server.complete(" ".join(str(i) for i in range(100)), n=1)
        assert server.slot("save", "slot.bin")[0] == 200
    (tmp_path / "short.bin").write_bytes((tmp_path / "slot.bin").read_bytes()[:-1])
    (tmp_path / "other.bin").write_bytes(b"GGUF" * 100)
    reasons = {
        "slot.bin": "mismatched key type",
        "short.bin": "",
        "other.bin": "unknown (magic, version)",
        "none.bin": "failed to open",
    }
    with Server(bin_dir, demo_model, tmp_path / "2.log", *types("tbq3_0", "tbq4_0"), *path) as server:
        for name, reason in reasons.items():
            status, answer = server.slot("restore", name)
            assert status == 400 and reason in answer["error"]["message"], answer
    with Server(bin_dir, demo_model, tmp_path / "3.log", *types("tbq4_0", "tbq4_0"), *path) as server:
        status, answer = server.slot("restore", "short.bin")
        assert status == 400 and "unexpectedly reached end of file" in answer["error"]["message"], answer
    with Server(bin_dir, demo_model, tmp_path / "4.log", *types("tbq4_0", "tbq4_0"), *path, n_ctx=256) as server:
        status, answer = server.slot("restore", "slot.bin")
        assert status == 400 and re.search(
            r"does not fit in the slot context|not enough cells", answer["error"]["message"]
        ), answer


@pytest.mark.parametrize("kind", ["f16", "tbq4_0"])
def test_corrupt_prompt_cache_files_are_refused(bin_dir, tmp_path, kind):
    """The same for --prompt-cache, whose file holds all sequences: an error, never a signal."""
    model = tiny(tmp_path / "model.gguf")
    good, bad = tmp_path / "good.bin", tmp_path / "bad.bin"
    complete(bin_dir, model, SHORT, *types(kind, kind), "--prompt-cache", good, n=2)
    data = good.read_bytes()
    (n_tokens,) = struct.unpack_from("<I", data, 8)
    cells = 12 + 4 * n_tokens + 4 + len("llama") + 4  # tokens, the architecture, the number of streams
    n_cells, pos, n_seq, seq = struct.unpack_from("<IiIi", data, cells)
    assert (n_cells, pos, n_seq, seq) == (n_tokens - 1, 0, 1, 0)
    changes = [data[:n] for n in (1, 7, 11, 12 + 2 * n_tokens, cells, cells + 30, len(data) // 2, len(data) - 1)] + [
        data + b"more"
    ]
    for at, value in [
        (8, n_tokens + 1),
        (8, 2**32 - 1),
        (12 + 4 * n_tokens, 2**32 - 1),
        (cells - 4, 7),
        (cells, n_cells + 1),
        (cells, 2**32 - 1),
        (cells + 4, 2**32 - 1),
        (cells + 4, 2**31 - 1),
        (cells + 8, 0),
        (cells + 8, 2**32 - 1),
        (cells + 12, 1),
        (cells + 12, 2**32 - 1),
    ]:
        changes.append(data[:at] + struct.pack("<I", value) + data[at + 4 :])
    changes.append(data[: cells + 8] + struct.pack("<Iii", 2, 0, 0) + data[cells + 16 :])  # the same sequence twice
    for i, changed in enumerate(changes):
        bad.write_bytes(changed)
        done = run(
            bin_dir / "llama-completion",
            "-m",
            model,
            "-p",
            SHORT,
            "-n",
            2,
            "-c",
            256,
            "-no-cnv",
            *types(kind, kind),
            "--prompt-cache",
            bad,
            *THREADS,
            ok=False,
        )
        assert done.returncode == 1, (i, done.returncode, done.stderr[-2000:])
        assert re.search("error loading session file|failed to load session file", done.stderr), (
            i,
            done.stderr[-2000:],
        )


# -- files that are replaced --------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a file system of 2 MB cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_no_slot(bin_dir, demo_model, tmp_path, small_disk):
    """The old file stays until the new one is complete, and no other file is left in the folder."""
    with Server(
        bin_dir, demo_model, tmp_path / "log", *types("tbq4_0", "tbq4_0"), "--slot-save-path", small_disk, n_ctx=2048
    ) as server:
        server.complete(PROMPT, n=4)
        assert server.slot("save", "slot.bin")[0] == 200
        good = (small_disk / "slot.bin").read_bytes()
        server.complete(" ".join(str(i) for i in range(300)), n=1)
        status, answer = server.slot("save", "slot.bin")
        assert status == 500 and "No space left on device" in answer["error"]["message"], answer
        assert [p.name for p in small_disk.iterdir()] == ["slot.bin"] and (small_disk / "slot.bin").read_bytes() == good
        status, restored = server.slot("restore", "slot.bin")
        assert status == 200 and restored["n_restored"] > 30
        # the files of a killed writer make room, links stay links, and modes stay
        (small_disk / "slot.bin").chmod(0o600)
        (small_disk / "link.bin").symlink_to("slot.bin")
        assert server.slot("save", "link.bin")[0] == 200
        assert (small_disk / "link.bin").is_symlink() and (small_disk / "slot.bin").stat().st_mode & 0o777 == 0o600
        assert (small_disk / "slot.bin").read_bytes() == good


def test_a_full_disk_costs_no_prompt_cache(bin_dir, demo_model, small_disk):
    file = small_disk / "prompt.bin"
    args = (*types("tbq4_0", "tbq4_0"), "--prompt-cache", file)
    complete(bin_dir, demo_model, PROMPT, *args, n=2)
    good = file.read_bytes()
    _, log = complete(bin_dir, demo_model, " ".join(str(i) for i in range(300)), *args, n=2, n_ctx=2048)
    assert f"error saving session file {file}: write error: No space left on device" in log
    assert "saved session before" not in log
    assert [p.name for p in small_disk.iterdir()] == ["prompt.bin"] and file.read_bytes() == good


def test_a_slot_of_a_long_name(bin_dir, demo_model, tmp_path):
    """Names of 255 bytes are legal, so the file that is written first needs a short name."""
    with Server(bin_dir, demo_model, tmp_path / "log", "--slot-save-path", tmp_path) as server:
        server.complete(SHORT, n=1)
        assert server.slot("save", "n" * 255)[0] == 200
        assert server.slot("restore", "n" * 255)[0] == 200
        assert server.slot("save", "n" * 255)[0] == 200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "n" * 255]


# -- copies of a sequence -----------------------------------------------------------------------


@pytest.mark.parametrize("unified", ["--kv-unified", "--no-kv-unified"])
@pytest.mark.parametrize("k,v", PAIRS)
def test_copied_sequences_agree(bin_dir, demo_model, tmp_path, k, v, unified):
    """n = 3: the server evaluates the prompt once and copies the sequence.

    With a unified cache that marks cells.  Otherwise it copies the bytes of K and V from stream to stream.
    """
    with Server(bin_dir, demo_model, tmp_path / "log", *types(k, v), unified, slots=3, n_ctx=768) as server:
        alone = server.complete(PROMPT, n=12)["content"]
        copies = [c["content"] for c in server.complete(PROMPT, n=12, n_cmpl=3)]
    assert len(copies) == 3 and len(set(copies)) == 1
    assert copies[0][:8] == alone[:8]


def upstream_save_load(build_dir, cwd, *args):
    """llama.cpp's own test of states and copies: the numbers of the parts that passed, status, output."""
    done = run(next(build_dir.rglob("bin/test-save-load-state")), "-c", 512, "-t", 2, *args, ok=False, cwd=cwd)
    out = done.stdout + done.stderr
    parts = re.split(r"=== Test (\d).*===", done.stdout)
    passed = {int(n) for n, text in zip(parts[1::2], parts[2::2]) if re.search(r"^PASS$", text, re.M)}
    return passed, done.returncode, out


@pytest.mark.parametrize("k", TBQ)
def test_upstream_save_load_keys(build_dir, demo_model, tmp_path, k):
    """All nine parts. The last one turns flash attention off and therefore needs an unquantized V.

    Parts 5 and 7 keep a copy on the device.  There the unpatched pin copies one element per block for every quantized
    type and crashes (llama_io_write_device takes ggml_element_size for the size of one value).
    """
    passed, status, out = upstream_save_load(build_dir, tmp_path, "-m", demo_model, "-ctk", k)
    assert status == 0 and passed == set(range(2, 10)), out[-3000:]


@pytest.mark.parametrize("k,v", [(k, v) for k, v in PAIRS if v != "f16"])
def test_upstream_save_load_pairs(build_dir, demo_model, tmp_path, k, v):
    """Parts 2 to 8. Part 1 is the reference. Part 9 cannot run, because it turns flash attention off."""
    passed, _, out = upstream_save_load(build_dir, tmp_path, "-m", demo_model, *types(k, v))
    assert passed >= set(range(2, 9)), out[-3000:]
    assert "quantized V cache requires flash_attn to be enabled" in out


def test_upstream_save_load_other_architectures(build_dir, tmp_path):
    """The same parts on tiny random models.

    They have keys of 576 whose first 512 are the values (MLA), one KV head for four heads, sliding windows, attention
    sinks, logit soft-capping, hybrids with recurrent layers, and caches of keys only (the indexers of sparse
    attention).
    """
    models = tmp_path / "models"
    models.mkdir()
    names = "deepseek2|deepseek32|deepseek4|glm-dsa|qwen3|gemma2|gemma3|gpt-oss|falcon-h1|qwen2|phi3|lfm2"
    run(next(build_dir.rglob("bin/test-llama-archs")), "-o", models, "-a", f"^({names})$")
    made = sorted(m.stem for m in models.glob("*.gguf"))
    assert len(made) >= 12, made
    done = run(
        next(build_dir.rglob("bin/test-save-load-state")),
        "--models",
        models,
        *types("tbq4_0", "tbq4_0"),
        "-t",
        2,
        ok=False,
        cwd=tmp_path,
    )
    table = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    for name in made:
        # the ninth column is the part that turns flash attention off
        assert re.search(rf"^{name}\.gguf +(PASS +){{8}}FAIL", table, re.M), table


@pytest.mark.parametrize("k,v", [("tbq4_0", "tbq4_0"), ("tbq2_0", "tbq3_0")])
def test_upstream_restore_into_a_fragmented_cache(build_dir, demo_model, tmp_path, k, v):
    """ctest would run this test on a model that it downloads."""
    program = next(build_dir.rglob("bin/test-state-restore-fragmented"))
    run(program, "-m", demo_model, *types(k, v), "-t", 2, cwd=tmp_path)


# -- context shift ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", ["f16", "q8_0", "tbq4_0"])
def test_latent_vectors_at_the_end_of_the_context(build_dir, bin_dir, tmp_path, k):
    """RoPE turns the last channels of a latent vector, which a CPU cannot quantize alone: no shift, and no abort."""
    run(next(build_dir.rglob("bin/test-llama-archs")), "-o", tmp_path, "-a", "^(deepseek2|deepseek32|mistral4)$")
    models = sorted(tmp_path.glob("*.gguf"))
    assert len(models) == 3
    for model in models:
        options = ("-p", "a", "-n", 330, "-c", 256, "--context-shift", "--ignore-eos", "-no-cnv", "--no-warmup")
        done = run(bin_dir / "llama-completion", "-m", model, *options, *types(k, k), *THREADS, *GREEDY)
        shifts = "KV cache shifting is not supported for this context" not in done.stdout + done.stderr
        assert shifts == (k == "f16"), done.stderr[-1000:]


def count_on(bin_dir, model, k, v, prompt=PROMPT):
    """Counts from 12 for longer than the context: the numbers written, and the log.

    The first four cells stay, because the model depends on them.  The keys of the others are turned to their new
    positions (dequantized, turned, quantized).
    """
    done = run(
        bin_dir / "llama-completion",
        "-m",
        model,
        "-p",
        prompt,
        "-n",
        340,
        "-c",
        256,
        "--keep",
        4,
        "--context-shift",
        "--ignore-eos",
        "-no-cnv",
        "--no-display-prompt",
        "-lv",
        5,
        *types(k, v),
        *THREADS,
        *GREEDY,
    )
    assert "applying K-shift" in done.stderr, "the context never filled"
    assert re.search(r"n_ctx_seq += 256", done.stderr)
    return [int(n) for n in re.findall(r"\d+", done.stdout)], done.stdout


@pytest.mark.parametrize(
    "k,v,share,last",
    [
        ("f16", "f16", 0.98, 90),
        ("tbq4_0", "tbq4_0", 0.9, 90),
        ("tbq4_0", "f16", 0.9, 90),
        ("tbq3_0", "tbq3_0", 0.75, 0),
    ],
)
def test_context_shift(bin_dir, demo_model, k, v, share, last):
    """The model counts before and after the shift: nearly each number is one more than the last.

    A coarser cache skips or repeats one now and then, and at three bits starts again from 9 once. f16 writes 13 to
    97.
    """
    numbers, text = count_on(bin_dir, demo_model, k, v)
    shifted = numbers[numbers.index(67) :] if 67 in numbers else numbers[len(numbers) * 2 // 3 :]
    for part in (numbers, shifted):
        steps = [b - a for a, b in itertools.pairwise(part)]
        assert len(steps) >= 20, text
        assert sum(s in (1, 2) for s in steps) / len(steps) >= share, text
    assert max(numbers[-2:]) >= last, text  # the last number may be cut off: "101, 1"


@pytest.mark.parametrize("k,v", [("tbq4_0", "tbq2_0"), ("tbq2_0", "tbq2_0")])
def test_context_shift_two_bits(bin_dir, demo_model, k, v):
    """At two bits this model loses count, with a shift or without. It must still go on writing."""
    numbers, text = count_on(bin_dir, demo_model, k, v)
    assert len(text) > 300 and len(numbers) > 50, text


def test_cache_reuse_by_shifting(bin_dir, demo_model, tmp_path):
    """The server uses the shift for another purpose too: a chunk that moved within the prompt is turned and not
    computed again.
    """
    # the server takes over a slot when the prompts begin with the same text
    head, gone, tail = "Here are some words: apple", ", pear, plum, cherry, quince", ". Now we count slowly: " + PROMPT
    with Server(bin_dir, demo_model, tmp_path / "log", *types("tbq4_0", "tbq4_0"), "--cache-reuse", 16) as server:
        server.complete(head + gone + tail, n=1)
        moved = server.complete(head + tail, n=10)
        assert moved["timings"]["prompt_n"] < 12, moved["timings"]
        fresh = server.complete(head + tail, n=10, cache_prompt=False)
    assert moved["content"][:8] == fresh["content"][:8] == " 13, 14,"


@pytest.mark.parametrize("head, rope", [(64, 32), (128, 64), (256, 96)])
@pytest.mark.parametrize("k", ["f16", "q8_0", *TBQ])
def test_context_shift_of_a_part_of_the_head(bin_dir, tmp_path, k, head, rope):
    """RoPE on the first channels of a head: a block may hold channels that turn and channels that stay.

    The unpatched view of 32 channels would be half a block of a tbq type, and abort.  One of 64 channels of 128 has
    gaps between its rows, and aborts with every quantized type.
    """
    model = tiny_llama(tmp_path / "m.gguf", head, embd=4 * head, arch="stablelm", rope=rope)
    _, text = count_on(bin_dir, model, k, "f16", prompt="abc")
    assert len(text) >= 300
