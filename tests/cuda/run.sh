#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# What a GPU must show:  tests/cuda/run.sh BIN [check|kernels|ops|splits|center|logits|hf|speed]
#
# The checks are the tests of tests/test_cuda.py that have the marker gpu; speed is bench/cuda.py; without a part, both.
#
# BIN: the folder with llama-bench, llama-perplexity, llama-cache-center and test-backend-ops of a build with CUDA
# (`make cuda`, then `make test TESTS=tests/test_cuda.py` builds the latter into build/cp*/bin).
# PYTHON: an interpreter that has pytest and gguf; the package need not be installed.
# CENTER_MODEL: a file that `tests/cuda/center.py --make` made, where PYTHON has not what the tests need.
# LOGITS_MODELS, LLAMA_CPP_SOURCE: a folder that `tests/cuda/logits.py --make` made, likewise, and the source of BIN.
# Ends with a status that is not 0 if a check fails, or if there is no GPU.
set -uo pipefail
bin=$(realpath -e "${1:?usage: tests/cuda/run.sh BIN [check|kernels|ops|splits|center|logits|hf|speed]}") || exit 2
cd "$(dirname "$0")/../.."
what=${2:-all}
python=${PYTHON:-python3}
failed=0

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader) || { echo "error: no NVIDIA GPU" >&2; exit 1; }
echo "$(git rev-parse --short HEAD 2>/dev/null || echo '?'), $gpu"

case $what in
    all|check) tests=gpu ;;
    kernels|ops|splits|center|logits|hf) tests=test_gpu_$what ;;
    speed) tests= ;;
    *) echo "error: $what is not check, kernels, ops, splits, center, logits, hf or speed" >&2; exit 2 ;;
esac
if [ -n "$tests" ]; then
    # without tests/conftest.py, which imports the package
    TBQ_CUDA_BIN=$bin "$python" -m pytest -c pyproject.toml --noconftest -p no:cacheprovider -v -s -m gpu -k "$tests" \
        tests/test_cuda.py || failed=1
fi
if [ "$what" = all ] || [ "$what" = speed ]; then
    "$python" bench/cuda.py "$bin" || failed=1
fi
exit $failed
