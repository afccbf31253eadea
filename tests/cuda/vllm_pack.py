#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""vLLM in parts of at most 55 MB, for a GPU machine without internet that has torch 2.11, Triton and transformers.

    python3 tests/cuda/vllm_pack.py OUT                               here, with pip: downloads 300 MB
    python3 -m zipfile -e PART.zip SITE                               there, for each part
    PYTHONPATH=SITE python3 tests/cuda/vllm_model.py speed            there

Parts: p1.zip, vLLM's Python files and what it imports; p2.zip, its kernels; p3.zip, FlashAttention 3, which bfloat16
caches use on an H100 or H200; p4.zip.part0 and 1, FlashAttention 2, which vLLM's own TurboQuant types use;
put together again (cat p4.zip.part* > p4.zip); src.zip, of this repository; model.part0 and 1, the demo model
(cat model.part* > model.gguf, then tests/hf_model.py).
What a Llama does not need is left out: kernels for experts and MLA, the web server's Rust programs.
"""

import pathlib
import re
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
VLLM = "0.25.1"
PART = "45M"
#: What vLLM imports, as it was found in sys.modules after a run, without what comes with torch and transformers.
NEEDED = [
    "annotated-types",
    "apache-tvm-ffi==0.1.9",
    "cachetools",
    "cbor2",
    "cffi",
    "pycparser",
    "dill",
    "email-validator",
    "dnspython",
    "fastapi==0.136.3",
    "gguf",
    "googleapis-common-protos",
    "jsonschema",
    "jsonschema-specifications",
    "llguidance==1.7.6",
    "mistral-common==1.13.1",
    "msgspec",
    "openai==3.57.0",
    "httpcore2",
    "httpx2",
    "opentelemetry-api==1.45.2",
    "opentelemetry-sdk==1.45.2",
    "opentelemetry-semantic-conventions==0.66b2",
    "opentelemetry-semantic-conventions-ai==0.5.1",
    "opentelemetry-proto==1.45.2",
    "opentelemetry-exporter-otlp==1.45.2",
    "opentelemetry-exporter-otlp-proto-common==1.45.2",
    "opentelemetry-exporter-otlp-proto-grpc==1.45.2",
    "opentelemetry-exporter-otlp-proto-http==1.45.2",
    "opentelemetry-exporter-otlp-common==0.66b2",
    "opentelemetry-exporter-http-transport==0.66b2",
    "openai-harmony",
    "partial-json-parser",
    "pybase64",
    "pycountry",
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "pydantic-extra-types",
    "python-multipart",
    "pyzmq",
    "referencing",
    "rpds-py",
    "sniffio",
    "starlette==1.10.0",
    "truststore",
    "typing-inspection",
    "xgrammar==0.2.8",
    "blake3",
    "diskcache==5.6.3",
    "lark==1.2.2",
    "outlines_core==0.2.14",
    "lm-format-enforcer==0.11.3",
    "interegular",
    "compressed-tensors==0.17.0",
    "loguru",
    "depyf==0.20.0",
    "astor",
    "watchfiles",
    "python-json-logger",
    "ijson",
    "setproctitle",
    "jiter",
    "distro",
    "uvicorn",
    "prometheus-fastapi-instrumentator",
    "model-hosting-container-standards",
    "jmespath",
    "mcp==2.0.0",
    "httpx-sse",
    "sse-starlette",
    "pydantic-settings",
    "python-dotenv",
    "anthropic",
    "docstring-parser",
    "supervisor",
    "nvtx",
]


def download(names, folder):
    """Wheels for Python 3.12 on x86-64 Linux."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    options += [each for abi in ("cp312", "abi3", "none") for each in ("--abi", abi)]
    tags = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)] + ["manylinux2014_x86_64", "any"]
    options += [each for tag in tags for each in ("--platform", tag)]
    for name in names:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", folder, *options, name], check=True)


def is_python(name):
    left_out = (".so", ".hpp", ".h", ".cuh", ".cu", ".js", ".css", "vllm/vllm-rs")
    return not name.endswith(left_out) and not ("third_party/deep_gemm" in name and "/include/" in name)


def main():
    out = pathlib.Path(sys.argv[1])
    wheels = out / "wheels"
    download([f"vllm=={VLLM}"], out)
    download(NEEDED, wheels)
    source = zipfile.ZipFile(next(out.glob("vllm-*.whl")))
    with zipfile.ZipFile(out / "p1.zip", "w", zipfile.ZIP_DEFLATED) as target:
        for name in filter(is_python, source.namelist()):
            target.writestr(name, source.read(name))
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as part:
                for name in part.namelist():
                    to = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)
                    if not name.endswith("/") and ".data/" not in to and "/tests/" not in to:
                        target.writestr(to, part.read(name))
    for number, name in {
        2: "vllm/_C_stable_libtorch.abi3.so",
        3: "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
        4: "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    }.items():
        with zipfile.ZipFile(out / f"p{number}.zip", "w", zipfile.ZIP_DEFLATED) as target:
            target.writestr(name, source.read(name))
    subprocess.run(["split", "-b", PART, "-d", "-a", "1", "p4.zip", "p4.zip.part"], cwd=out, check=True)
    (out / "p4.zip").unlink()
    with zipfile.ZipFile(out / "src.zip", "w", zipfile.ZIP_DEFLATED) as target:
        for pattern in (
            "python/tbq/**/*.py",
            "tests/*.py",
            "tests/cuda/*.py",
            "tests/golden.txt",
            "ggml_tbq/include/*.h",
        ):
            for path in ROOT.glob(pattern):
                target.write(path, path.relative_to(ROOT))
    model = next((ROOT / "build" / "models").glob("*.gguf"))
    subprocess.run(["split", "-b", "47M", "-d", "-a", "1", model, out / "model.part"], check=True)


if __name__ == "__main__":
    main()
