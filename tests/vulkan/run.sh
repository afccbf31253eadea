#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# What a GPU must show through its Vulkan driver:  tests/vulkan/run.sh BIN [check|speed]
#
# BIN: the folder with llama-bench of a build with Vulkan (`make vulkan`; `.venv/bin/tbq paths` prints it).
# PYTHON: an interpreter that has pytest and gguf; the package need not be installed.
# DEVICE: the number of the device, 0 by default.
#
# check builds what tests/test_vulkan.py needs, and runs it: bytes and values beside the CPU's, llama.cpp's own tests of
# operations. speed measures a model of random weights beside llama.cpp's own types. Ends with a status that is not 0
# if a check fails. Please send all of the output: nobody has measured most cards.
set -uo pipefail
bin=$(realpath -e "${1:?usage: tests/vulkan/run.sh BIN [check|speed]}") || exit 2
cd "$(dirname "$0")/../.."
what=${2:-all}
python=${PYTHON:-python3}
export GGML_VK_VISIBLE_DEVICES=${DEVICE:-0}
failed=0

echo "$(git rev-parse --short HEAD 2>/dev/null || echo '?')"
vulkaninfo --summary 2>/dev/null | grep -E "deviceName|driverInfo|apiVersion" ||
    echo "no vulkaninfo (Debian: apt install vulkan-tools)"

if [ "$what" = all ] || [ "$what" = check ]; then
    # without tests/conftest.py, which imports the package
    TBQ_VULKAN_DEVICE=$GGML_VK_VISIBLE_DEVICES "$python" -m pytest -c pyproject.toml --noconftest -p no:cacheprovider \
        -v -s tests/test_vulkan.py || failed=1
fi
if [ "$what" = all ] || [ "$what" = speed ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$python" tests/cuda/shape_model.py "$work/model.gguf" ${SHAPE:-32 4096 32 8 128 14336} || exit 1
    for pair in f16/f16 tbq4_0/tbq4_0 tbq3_0/tbq3_0 q8_0/q8_0 q4_0/q4_0; do
        "$bin/llama-bench" -m "$work/model.gguf" -ngl 99 -fa 1 -ctk ${pair%/*} -ctv ${pair#*/} -b 2048 -ub 512 \
            -p 2048 -n 32 -d ${DEPTHS:-0,32768} -r 2 || failed=1
    done
fi
[ $failed = 0 ] && echo "all is well" || echo "something failed"
exit $failed
