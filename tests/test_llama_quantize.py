# SPDX-License-Identifier: MIT
"""tbq as the type of weights.

llama-quantize writes them, and every program runs them (MUL_MAT, MUL_MAT_ID, GET_ROWS).
"""

import pytest

from llama_tools import TBQ, Divergence, complete, n_bytes, python_text, run, tiny_llama

# SmolLM2-135M: the weights that are matrices, and among them the token embeddings, which are also the output matrix
MATRICES, EMBEDDINGS = 134_515_008 - 61 * 576, 49152 * 576


def quantize(bin_dir, source, target, kind, *args):
    done = run(bin_dir / "llama-quantize", *args, source, target, kind, 2)
    return target, done.stdout + done.stderr


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def f16(bin_dir, demo_model, folder):
    """The demo model is Q4_1; as f16 it is the same model."""
    return quantize(bin_dir, demo_model, folder / "f16.gguf", "f16", "--allow-requantize")[0]


@pytest.fixture(scope="session")
def pure(bin_dir, f16, folder):
    """All matrices in one type, by type; each file is made at its first use."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = quantize(bin_dir, f16, folder / f"{kind}.gguf", kind, "--pure")[0]
        return made[kind]

    return get


@pytest.fixture(scope="session")
def kld(bin_dir, f16, folder):
    return Divergence(bin_dir, f16, python_text(folder / "topics.txt"), folder / "logits", n_ctx=256, chunks=2)


@pytest.mark.parametrize("kind", TBQ)
def test_size_of_the_file(f16, pure, kind):
    """To the byte. The headers have the same size, so the difference to f16 is that of the matrices."""
    saved = n_bytes("f16", MATRICES) - n_bytes(kind, MATRICES)
    assert pure(kind).stat().st_size == f16.stat().st_size - saved


def test_default_mixture(bin_dir, f16, pure, folder):
    """Without --pure the matrix for output and embeddings keeps more bits, as with upstream's types.

    llama-quantize takes the name in either case, and its number.
    """
    for i, name in enumerate(("tbq4_0", "TBQ4_0", "644")):
        path, _ = quantize(bin_dir, f16, folder / f"default{i}.gguf", name)
        more = n_bytes("q8_0", EMBEDDINGS) - n_bytes("tbq4_0", EMBEDDINGS)
        assert pure("tbq4_0").stat().st_size < path.stat().st_size <= pure("tbq4_0").stat().st_size + more
    assert (folder / "default0.gguf").read_bytes() == (folder / "default1.gguf").read_bytes()


def test_one_tensor_by_name(bin_dir, f16, folder):
    """--tensor-type and --token-embedding-type read the names of tensor types."""
    path, log = quantize(
        bin_dir, f16, folder / "some.gguf", "q8_0", "--token-embedding-type", "tbq4_0", "--tensor-type", "ffn_up=tbq3_0"
    )
    assert log.count("converting to tbq3_0") == 30 and log.count("converting to tbq4_0") == 1
    text, _ = complete(bin_dir, path, "1, 2, 3, 4, 5, 6, 7,", n=10)
    assert text.startswith("8, 9, 10,")


def test_quality(kld, pure):
    """Compared with the f16 file, all matrices in one type, measured here.

    q4_0 0.35, tbq4_0 0.35. tbq3_0 2.1 (upstream's q2_k, of about as many bytes, 1.9). tbq2_0 8.0 and upstream's q2_0,
    of the same bytes, 17.7.  A good two-bit file also needs a mixture of types and an importance matrix, which matter
    most for a model of 135M parameters.
    """
    q4, four, three, two = (kld(model=pure(kind))["kld"] for kind in ("q4_0", *TBQ))
    assert four < 1.25 * q4, (q4, four)
    assert 2 * four < three < 3.5
    assert three < two < 12


@pytest.mark.parametrize("kind", ["tbq4_0", "tbq2_0"])
def test_repacking_and_batch_size(bin_dir, f16, pure, folder, tmp_path, kind):
    """The weights are the same, whatever the layout in memory and the number of rows."""
    kld = Divergence(bin_dir, f16, python_text(folder / "topics.txt"), tmp_path / "logits", n_ctx=256, chunks=1)
    usual = kld(model=pure(kind))["kld"]
    for args in (("--no-repack",), ("-ub", 1), ("-ub", 5)):
        assert kld("f16", "f16", *args, model=pure(kind))["kld"] == pytest.approx(usual, rel=0.05, abs=0.006), args


def test_weights_and_cache_together(bin_dir, pure):
    text, _ = complete(bin_dir, pure("tbq4_0"), "1, 2, 3, 4, 5, 6, 7,", "-ctk", "tbq4_0", "-ctv", "tbq4_0", n=10)
    assert text.startswith("8, 9, 10,")


def test_requantized_to_f16_and_back(bin_dir, f16, pure, kld, folder):
    """Reading tbq weights (dequantize) and writing them (quantize) are inverse for values on the grid.

    The rounding of the half-precision scale is the only difference.
    """
    back, _ = quantize(bin_dir, pure("tbq4_0"), folder / "back.gguf", "f16", "--allow-requantize")
    assert back.stat().st_size == f16.stat().st_size
    assert kld(model=back)["kld"] == pytest.approx(kld(model=pure("tbq4_0"))["kld"], rel=0.05, abs=0.006)


def test_corrupt_weights_are_found(bin_dir, pure, folder):
    """--check-tensors looks at the scales (ggml_validate_row_data)."""
    path = folder / "corrupt.gguf"
    raw = bytearray(pure("tbq4_0").read_bytes())
    raw[-34 * 100 :] = b"\xff" * 34 * 100  # NaN as the scale of the last hundred blocks
    path.write_bytes(raw)
    done = run(bin_dir / "llama-completion", "-m", path, "--check-tensors", "-p", "a", "-n", 1, "-no-cnv", ok=False)
    assert done.returncode not in (0, -6, -11) and "invalid data" in done.stderr, done.stderr
    assert run(bin_dir / "llama-completion", "-m", pure("tbq4_0"), "--check-tensors", "-p", "a", "-n", 1, "-no-cnv")


@pytest.mark.parametrize("experts", [0, 4])
def test_random_model(bin_dir, tmp_path, experts):
    """A small llama and a mixture of experts (MUL_MAT_ID, two of four experts per token) with Gaussian weights.

    tbq4_0 should be about as good as q4_0.  The prompt and generated tokens go through different kernels.
    """
    source = tiny_llama(tmp_path / "f32.gguf", 64, experts=experts)
    text = tmp_path / "text"
    text.write_text(python_text(text).read_text()[:9000])
    kld = Divergence(bin_dir, source, text, tmp_path / "logits", n_ctx=256, chunks=4)
    models = {kind: quantize(bin_dir, source, tmp_path / f"{kind}.gguf", kind, "--pure")[0] for kind in ("q4_0", *TBQ)}
    q4, four, three, two = (kld(model=models[kind])["kld"] for kind in ("q4_0", *TBQ))
    assert four < 1.4 * q4 and 1.5 * four < three < two, (q4, four, three, two)
    for args in (("-ub", 1), ("-ub", 3), ("--no-repack",)):
        assert kld("f16", "f16", *args, model=models["tbq4_0"])["kld"] == pytest.approx(four, rel=0.1), args
    one, _ = complete(bin_dir, models["tbq4_0"], "The quick", n=12)
    assert one == complete(bin_dir, models["tbq4_0"], "The quick", n=12)[0]
