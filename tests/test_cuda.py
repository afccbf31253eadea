# SPDX-License-Identifier: MIT
"""The CUDA kernels. Without a GPU: that they compile for every architecture, as they should, and that a machine without
nvcc is told so. With one, the tests marked gpu: everything that docs/measurements/cuda.md claims but the speed, which
bench/cuda.py measures. tests/cuda/run.sh runs them where the package is not installed, so these import nothing of
it."""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TBQ = ROOT / "ggml_tbq"
CUDA = ROOT / "tests" / "cuda"
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


def has_gpu():
    return shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


needs_gpu = pytest.mark.skipif(
    not has_gpu(), reason="no NVIDIA GPU; docs/measurements/cuda.md has the log of the last run on one"
)


def compile_for(arch, out):
    """Compiles all kernels. Returns {name: (bytes of spilling, registers)}."""
    done = subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            "-O3",
            "-use_fast_math",
            f"-arch=sm_{arch}",
            "-Werror",
            "all-warnings",
            "-I",
            TBQ / "include",
            "-I",
            TBQ / "cuda",
            "-Xptxas",
            "-v",
            "-cubin",
            "-o",
            out,
            CUDA / "architectures.cu",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: (int(spill), int(registers))
        for name, spill, registers in re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", done.stderr, re.S
        )
    }


def compile_for_a_cpu(name, folder, change=None):
    """Compiles NAME_on_cpu.cpp and the kernels. change: a file of theirs, a text in it, and what takes its place."""
    folders = [CUDA, TBQ / "include", TBQ / "cpu", TBQ / "cuda"]
    folder.mkdir()
    if change:
        file, right, wrong = change
        source = (TBQ / "cuda" / file).read_text()
        assert right in source
        (folder / file).write_text(source.replace(right, wrong))
        folders.insert(0, folder)
    subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O1", "-cudart", "none"),  # which only gives its headers to the C++ compiler
            *("-Xcompiler", "-ffp-contract=off,-fno-strict-aliasing,-fno-pie,-no-pie"),
            *(part for path in folders for part in ("-I", path)),
            CUDA / f"{name}_on_cpu.cpp",
            next((folder.parent / "cpu").glob("libtbq*")),
            *("-o", folder / name),
        ],
        check=True,
    )
    return folder / name


ARCHITECTURES = ("75", "80", "86", "89", "90", "90a", "100", "120")
#: Programs that run kernels on a CPU, and changes of the kernels that they must notice.
ON_A_CPU = {
    "encoder": (
        None,
        ("tbq-quantize.cuh", "64.0f * TBQ_Q_ONE, (float) qk", "63.0f * TBQ_Q_ONE, (float) qk"),
        ("tbq-quantize.cuh", "y < 0.0f ? -q : q", "q"),
    ),
    # a row of the list counts twice
    "attention": (None, ("tbq-attention-rows.cuh", "listed >> row & 1", "false")),
    "heads": (None, ("tbq-attention-heads.cuh", ": ~0u << left) | listed", ": ~0u << left) | 0")),
}


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """What the tests that are run need of compile_for() and compile_for_a_cpu(), as futures: by architecture, and by
    name and change. nvcc is one thread, so there are as many at a time as cores."""
    needed = {mark.args[0] for item in request.session.items for mark in item.iter_markers("compiles")}
    folder = tmp_path_factory.mktemp("compiled")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for arch in ARCHITECTURES:
            if arch in needed:
                futures[arch] = pool.submit(compile_for, arch, folder / f"{arch}.cubin")
        if needed.intersection(ON_A_CPU):
            kernels = CUDA.parent / "kernels"
            subprocess.run(["cmake", "-S", kernels, "-B", folder / "cpu"], check=True, capture_output=True)
            subprocess.run(["cmake", "--build", folder / "cpu", "--target", "tbq"], check=True, capture_output=True)
        for name, changes in ON_A_CPU.items():
            for i, change in enumerate(changes if name in needed else ()):
                futures[name, change] = pool.submit(compile_for_a_cpu, name, folder / f"{name}-{i}", change)
        yield futures


def compiles(what, *marks):
    return pytest.param(what, marks=(pytest.mark.compiles(what), *marks))


@needs_nvcc
@pytest.mark.parametrize("arch", [compiles(arch) for arch in ARCHITECTURES])
def test_compiles(compiled, arch):
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout
    if f"sm_{arch.rstrip('a')}\n" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    kernels = compiled[arch].result()
    assert len(kernels) == 27
    for name, (spill, registers) in kernels.items():
        # q8_0 keys: three words at most, also where their rows are read at the cells of exact ones; f16 values: one
        allowed = 12 if "Li128ELi8ELi4ELi8E" in name else 4 if "Li128ELi4ELi16ELi8E" in name else 0
        # 64 columns of 512 channels: a word that is the same for all tiles
        allowed = 8 if "tbq_attention_headsILi576ELi512ELi64E" in name else allowed
        assert spill <= allowed, name
        if "tbq_attentionILi128ELi4ELi4ELi8E" in name:
            assert registers <= 128, "two CTAs of 256 threads must fit a multiprocessor"
        if "tbq_promptI" in name:  # tbq_prompt_compiled() tells them apart by this
            assert registers == 168 if arch == "90a" else registers < 32


@needs_nvcc
def test_standalone_programs_compile(tmp_path):
    """What the tests on a GPU build: one program is enough here."""
    sys.path.insert(0, str(CUDA))
    import build

    build.build(tmp_path, arch="sm_90", programs=("blocks",))
    # without a GPU it must say so, not pass
    done = subprocess.run([tmp_path / "blocks", "100"], capture_output=True, text=True)
    assert (done.returncode == 0) == bool(has_gpu()) and ("0 differences" in done.stdout) == bool(has_gpu())


on_a_cpu = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ucontext and GNU's C++")


@needs_nvcc
@on_a_cpu
@pytest.mark.compiles("encoder")
def test_encoder_on_a_cpu(compiled):
    """The CUDA encoders write the reference's bytes, and the program notices where they do not."""
    for change in ON_A_CPU["encoder"]:
        done = subprocess.run(
            [compiled["encoder", change].result(), "8" if change else "40"], capture_output=True, text=True
        )
        count = int(re.fullmatch(r"(\d+) differences", done.stdout.splitlines()[-1])[1])
        assert (count > 0) == bool(change) == (done.returncode != 0), (change, done.stdout)


def wrong_problems(program, *arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    count = re.match(r"[1-9]\d* problems, (\d+) wrong", done.stdout.splitlines()[-1])
    assert count and (done.returncode == 0) == (count[1] == "0"), done.stdout
    return int(count[1])


@needs_nvcc
@on_a_cpu
@pytest.mark.compiles("attention")
def test_attention_on_a_cpu(compiled):
    """Attention over whole rows is right, and the program notices where it is not."""
    ours, changed = (compiled["attention", change].result() for change in ON_A_CPU["attention"])
    assert wrong_problems(ours, "exact", "10") == 0
    assert wrong_problems(ours, "center", "15") == 0
    assert wrong_problems(changed, "exact", "10") > 0


@needs_nvcc
@on_a_cpu
@pytest.mark.compiles("heads")
def test_attention_of_large_heads_on_a_cpu(compiled):
    """Attention for head sizes 192/128, 512 and 576/512 is right, and the program notices where it is not."""
    ours, changed = (compiled["heads", change].result() for change in ON_A_CPU["heads"])
    assert wrong_problems(ours, "center", "6", "3") == 0
    assert wrong_problems(changed, "exact", "1") > 0


def test_a_model_of_random_weights_without_the_package(tmp_path):
    """The GPU checks make one on machines that have gguf and NumPy, but no compiled module."""
    run(sys.executable, CUDA / "shape_model.py", tmp_path / "tiny.gguf", 2, 512, 8, 2, 64, 512)
    assert (tmp_path / "tiny.gguf").read_bytes()[:4] == b"GGUF"


def test_speed_table(bin_dir, tmp_path):
    """bench/cuda.py on this machine's CPU, with a model that it need not write."""
    run(sys.executable, CUDA / "shape_model.py", tmp_path / "7b.gguf", 1, 256, 4, 2, 64, 256)
    what = ("--models", "7b", "--types", "f16,tbq4_0/tbq3_0", "--depths", "0,64", "--tokens", "2", "--folder", tmp_path)
    number, ratio = r"\d+\.\d( ± \d+\.\d)?", r" \(\d+\.\d{3}\)"
    out = run(sys.executable, ROOT / "bench" / "cuda.py", bin_dir, *what, "--only", "decode")
    for name in ("tg2 @ 0", "tg2 @ 64"):
        assert re.search(rf"^\| 7b \| {name} \| {number} \| {number}{ratio} \|$", out, re.M), out
    wrong = ("--types", "f16,no_type", *what[:2], *what[4:], "--only", "decode")
    assert (
        subprocess.run([sys.executable, ROOT / "bench" / "cuda.py", bin_dir, *wrong], capture_output=True).returncode
        == 1
    )


def test_few_instance_files():
    """Each is compiled for every architecture of a release build."""
    assert len(list((TBQ / "cuda").glob("*.cu"))) <= 20


def test_make_cuda_without_nvcc(tmp_path):
    """One line, before anything is downloaded or built."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("git", "cc", "c++", "gcc", "g++"):
        if found := shutil.which(tool):
            (path / tool).symlink_to(found)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "install.py", tmp_path / "venv", "--cuda"],
        capture_output=True,
        text=True,
        env={"PATH": str(path)},
        cwd=ROOT,
    )
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    assert (
        done.stderr.strip()
        == "error: no CUDA compiler (nvcc); install the CUDA toolkit and put nvcc into $PATH, or name it in $CUDACXX"
    )


@pytest.mark.parametrize("platform", ["HIP", "MUSA"])
def test_other_platforms_say_no(tmp_path, platform):
    """Nobody has run the kernels there: the backend must not claim the types, and then the context is refused."""
    source = tmp_path / "no.cpp"
    source.write_text("""
#include <cstddef>
enum ggml_type { GGML_TYPE_TBQ4_0 = 644 };
struct ggml_tensor {};
#include "tbq-ggml-cuda.cuh"
int main() {
    ggml_tensor t;
    const bool any = tbq_cuda_supports_op(&t) || tbq_cuda_kv_type_supported(GGML_TYPE_TBQ4_0) ||
        tbq_cuda_flash_attn_ext_supported(0, &t) || tbq_cuda_compute(t, &t) ||
        tbq_cuda_to_fp16(GGML_TYPE_TBQ4_0) != nullptr;
    return any ? 1 : 0;
}
""")
    subprocess.run(
        [
            os.environ.get("CXX", "c++"),
            "-std=c++17",
            f"-DGGML_USE_{platform}",
            "-I",
            TBQ / "ggml",
            "-o",
            tmp_path / "no",
            source,
        ],
        check=True,
    )
    assert subprocess.run([tmp_path / "no"]).returncode == 0


def test_a_device_that_lacks_the_types_is_noticed(tmp_path, build_dir):
    """The question that llama_kv_cache asks before it makes a layer; without it the layer would run on the CPU."""
    source, ggml = CUDA / "refusal.cpp", build_dir / "llama.cpp-src" / "ggml"
    library = next((build_dir / "bin").glob("lib*ggml-base.*"))
    subprocess.run(
        [
            os.environ.get("CXX", "c++"),
            "-std=c++17",
            "-I",
            ggml / "include",
            "-I",
            ggml / "src",
            "-I",
            TBQ / "include",
            "-I",
            TBQ / "ggml",
            "-o",
            tmp_path / "refusal",
            source,
            library,
            f"-Wl,-rpath,{library.parent}",
        ],
        check=True,
    )
    done = subprocess.run([tmp_path / "refusal"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- on a GPU -----------------------------------------------------------------------------------------------------


def on_gpu(test):
    return pytest.mark.gpu(needs_gpu(test))


@pytest.fixture(scope="module")
def programs(request):
    """The folder with the programs of a build with CUDA: what tests/cuda/run.sh was given, or this checkout's."""
    if given := os.environ.get("TBQ_CUDA_BIN"):
        return Path(given)
    folder = request.getfixturevalue("build_dir") / "bin"
    if not list(folder.glob("lib*ggml-cuda*")):
        pytest.skip("built without CUDA: make cuda")
    return folder


@pytest.fixture(scope="module")
def standalone(tmp_path_factory):
    """The folder with the programs of tests/cuda that run the kernels alone."""
    sys.path.insert(0, str(CUDA))
    import build

    folder = tmp_path_factory.mktemp("standalone")
    build.build(folder)
    return folder


def run(*command):
    """The output of a command that ends well, without colors."""
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    out = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert done.returncode == 0, f"status {done.returncode}\n{out[-4000:]}"
    return out


@on_gpu
@needs_nvcc
def test_gpu_kernels_blocks(standalone):
    """Encoder and decoder: the bytes and values of the scalar reference."""
    out = run(standalone / "blocks", "100000")
    print(re.sub(r"(?m)^ +encode .*\n", "", out))
    assert "\n0 differences" in out


@on_gpu
@needs_nvcc
def test_gpu_kernels_attention(standalone):
    """Random problems against double precision."""
    out = run(standalone / "attention", "check", "360")
    print(out)
    assert "360 problems, 0 wrong" in out
    out = run(standalone / "attention", "center")
    print(out)
    assert "252 problems, 0 wrong" in out


def has_compute_capability(wanted):
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
    )
    return wanted in done.stdout.split()


needs_hopper = pytest.mark.skipif(
    not has_gpu() or not has_compute_capability("9.0"), reason="no GPU of compute capability 9.0"
)


@on_gpu
@needs_nvcc
@needs_hopper
def test_gpu_kernels_prompt(standalone):
    """The kernels of prompts: random problems against double precision."""
    out = run(standalone / "prompt", "check", "270")
    print(out)
    assert "270 problems, 0 wrong" in out


@on_gpu
@needs_nvcc
def test_gpu_kernels_attention_rows(standalone):
    """The kernel for whole rows, which the launcher calls for long contexts: the same problems."""
    for how in (
        ("check", "192"),
        ("exact", "120"),
        ("center", "100"),
        ("early", "check", "60"),
        ("early", "exact", "60"),
    ):
        out = run(standalone / "attention", "rows", *how, "3")
        print(out)
        assert f"{how[-1]} problems, 0 wrong" in out
        if "; 0 launches" in out:
            pytest.skip("it needs 227 KiB of shared memory: sm_90, sm_100")


@on_gpu
@needs_nvcc
def test_gpu_kernels_attention_heads(standalone):
    """The kernel for head sizes 192/128, 512 and 576/512: random problems against double precision."""
    early = [("early", "exact", "60")] if has_compute_capability("9.0") else []
    for how in (("check", "189"), ("exact", "120"), ("center", "120"), *early):
        out = run(standalone / "attention-heads", *how)
        print(out)
        assert f"{how[-1]} problems, 0 wrong" in out


@on_gpu
@needs_nvcc
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    "program",
    [
        ("attention", "check", "18", "7"),
        ("attention", "center", "24", "7"),
        ("attention-heads", "check", "9", "7"),
        ("attention-heads", "center", "18", "7"),
        ("blocks", "500"),
    ],
    ids=lambda program: "-".join(program[:2]),
)
def test_gpu_kernels_sanitized(standalone, tool, program):
    out = run("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", standalone / program[0], *program[1:])
    print(out.strip().splitlines()[-1])


TBQ_OPS = (
    "SET_ROWS",
    "ROPE_SET_ROWS",
    "CENTER_SET_ROWS",
    "CPY",
    "GET_ROWS",
    "MUL_MAT",
    "MUL_MAT_ID",
    "FLASH_ATTN_EXT",
    "CENTER_FLASH_ATTN_EXT",
    "EXACT_SET_ROWS",
    "EXACT_STEP",
)
# whose cases do not name the type
EXACT_OPS = (("EXACT_CONCAT", "."), ("EXACT_CPY", "."))
# what is fused with the SUB of the mean, and what the patches must leave as it is
STOCK_OPS = (
    ("CENTER_SET_ROWS", "type=[qif]"),
    ("SET_ROWS", "type_dst=(f16|q8_0|q4_0)"),
    ("GET_ROWS", "type=(f16|q8_0|q4_0)"),
    ("FLASH_ATTN_EXT", "hsk=128,.*type_K=(f16|q8_0|q4_0),type_V=(f16|q8_0|q4_0)"),
)


@on_gpu
@pytest.mark.parametrize("op, pattern", [*((op, "tbq") for op in TBQ_OPS), *EXACT_OPS, *STOCK_OPS])
def test_gpu_ops(programs, op, pattern):
    """llama.cpp's own comparison with the CPU."""
    out = run(programs / "test-backend-ops", "test", "-b", "CUDA0", "-o", op, "-p", pattern)
    passed, count = map(int, re.search(r"(\d+)/(\d+) tests passed", out).groups())
    print(f"{op}, {pattern}: {passed}/{count}")
    assert passed == count > 0


def splits(programs, model, k, v):
    """The parts that the graph falls into; 2 are the embedding on the CPU and the rest."""
    out = run(
        programs / "llama-bench",
        "-m",
        model,
        "-ngl",
        "99",
        "-fa",
        "1",
        "-ctk",
        k,
        "-ctv",
        v,
        "-p",
        "8",
        "-n",
        "1",
        "-r",
        "1",
        "--no-warmup",
        "-v",
    )
    return {int(n) for n in re.findall(r"splits = (\d+)", out)}


@on_gpu
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_gpu_splits(programs, tmp_path, head_size):
    """Every pair of cache types has the splits of f16: no operation falls back to the CPU."""
    model = tmp_path / "tiny.gguf"
    run(sys.executable, CUDA / "shape_model.py", model, 2, 512, 8, 2, head_size, 512)
    kinds = ("f16", "q8_0", "tbq2_0", "tbq3_0", "tbq4_0")
    found = {(k, v): splits(programs, model, k, v) for k in kinds for v in kinds}
    wanted = found["f16", "f16"]
    print(f"head size {head_size}: f16 has {wanted} splits")
    assert wanted and not {pair: n for pair, n in found.items() if n != wanted}


@on_gpu
def test_gpu_center(programs):
    """Centered keys wherever a model and its cache can be placed."""
    model = os.environ.get("CENTER_MODEL")
    print(run(sys.executable, CUDA / "center.py", programs, *(("--model", model) if model else ())))


@on_gpu
def test_gpu_logits(programs, request, tmp_path):
    """Attention that sees more of a key than softmax does gets the mean: sinks, soft-caps, latent attention."""
    models = os.environ.get("LOGITS_MODELS")
    if not models:
        models = tmp_path / "models"
        run(sys.executable, CUDA / "logits.py", "--make", models)
    source = os.environ.get("LLAMA_CPP_SOURCE") or request.getfixturevalue("build_dir") / "llama.cpp-src"
    print(run(sys.executable, CUDA / "logits.py", models, programs, source))


@on_gpu
def test_gpu_hf():
    """The Triton kernels."""
    for package in ("torch", "transformers", "triton"):
        pytest.importorskip(package, reason=f"no {package}")
    out = run(sys.executable, CUDA / "hf_checks.py")
    print(out)
    assert out.strip().endswith("all checks passed")
