#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# What a GPU must show through its Vulkan driver:  tests/vulkan/run.sh BIN [check|text|speed]
#
# BIN: the folder with llama-bench of a build with Vulkan (`make vulkan`; `.venv/bin/tbq paths` prints it).
# PYTHON: an interpreter that has pytest and gguf; the package need not be installed.
# DEVICE: the number of the device, 0 by default. DEPTHS: contexts to measure at, 0,32768 by default.
#
# check is tests/test_vulkan.py: bytes and values beside the CPU's, llama.cpp's own tests of operations. It builds the
# programs that it needs, unless `blocks` and `test-backend-ops` are in BIN; then all cases of operations are run.
# text runs a real model, MODEL with the text TEXT: the graph has as many splits as with f16, what the model writes, and
# the KL divergence to an f16 cache, which must be that of the CPU. Without them this part is left out, and says so.
# speed measures kernels alone, and a model of random weights, beside llama.cpp's own types.
# Ends with a status that is not 0 if a check fails. Please send all of the output: nobody has measured most cards.
set -uo pipefail
bin=$(realpath -e "${1:?usage: tests/vulkan/run.sh BIN [check|text|speed]}") || exit 2
cd "$(dirname "$0")/../.."
what=${2:-all}
python=${PYTHON:-python3}
export GGML_VK_VISIBLE_DEVICES=${DEVICE:-0}
failed=0

plain() { sed 's/\x1b\[[0-9;]*m//g'; }

echo "$(git rev-parse --short HEAD 2>/dev/null || echo '?')"
vulkaninfo --summary 2>/dev/null | grep -E "deviceName|driverInfo|apiVersion" ||
    echo "no vulkaninfo (Debian: apt install vulkan-tools)"

if [ "$what" = all ] || [ "$what" = check ]; then
    [ -x "$bin/blocks" ] && export TBQ_VULKAN_BIN=$bin
    # without tests/conftest.py, which imports the package
    TBQ_VULKAN_DEVICE=$GGML_VK_VISIBLE_DEVICES "$python" -m pytest -c pyproject.toml --noconftest -p no:cacheprovider \
        -v -s -k "not model" tests/test_vulkan.py || failed=1 # those are for the installed package; text has its own
    if [ -x "$bin/test-backend-ops" ]; then
        echo "all cases of operations: what is not OK"
        "$bin/test-backend-ops" test -b Vulkan0 -p tbq 2>&1 | plain | grep -vE "OK$|not supported" || failed=1
        [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    fi
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ "$what" = all ] || [ "$what" = text ]; then
    if [ -e "${MODEL:-}" ] && [ -e "${TEXT:-}" ]; then
        run_model() { "$bin/$1" -m "$MODEL" -ngl 99 -fa on "${@:2}" 2>&1; }
        splits() { run_model llama-completion -ctk "$1" -ctv "$1" -n 1 -p a -no-cnv -v | sed -nE 's/.* splits = ([0-9]+).*/\1/p' | tail -1; }
        divergence() { sed -nE 's/^Mean +KLD: +([-0-9.]+).*/\1/p'; }
        f16=$(splits f16)
        for type in tbq4_0 tbq3_0 tbq2_0; do
            n=$(splits $type)
            echo "$type: $n graph splits, f16 has $f16"
            [ -n "$n" ] && [ "$n" = "$f16" ] || failed=1
        done
        prompt="The three primary colors are"
        run_model llama-completion -ctk tbq4_0 -ctv tbq4_0 -n 32 --temp 0 -no-cnv -p "$prompt" |
            grep -A2 "^$prompt" | head -3
        # generation reads packed rows, so the batches are small
        options=(-f "$TEXT" -c 512 -b 512 -ub 16 --chunks 2 --kl-divergence-base "$work/base")
        run_model llama-perplexity "${options[@]}" >/dev/null
        for type in tbq4_0 tbq3_0 tbq2_0; do
            options=(-ctk $type -ctv $type --kl-divergence --kl-divergence-base "$work/base" -b 512 -ub 16 --chunks 2)
            on_gpu=$(run_model llama-perplexity "${options[@]}" | divergence)
            on_cpu=$("$bin/llama-perplexity" -m "$MODEL" -dev none -ngl 0 -fa on "${options[@]}" 2>&1 | divergence)
            echo "$type: KL divergence to f16 $on_gpu, on the CPU $on_cpu"
            # products of weights round differently on both, which is the noise
            awk -v g="$on_gpu" -v c="$on_cpu" 'BEGIN { exit !(g > 0 && c > 0 && g < c * 1.15 + 0.003) }' || failed=1
        done
    else
        echo "text: left out, because MODEL or TEXT names no file"
    fi
fi
if [ "$what" = all ] || [ "$what" = speed ]; then
    if [ -x "$bin/test-backend-ops" ]; then
        for op in SET_ROWS MUL_MAT; do
            "$bin/test-backend-ops" perf -b Vulkan0 -o $op -p "ne=\[1024,4096,1,1\]|m=4096,n=1,k=4096,.*bs=\[1,1\]" 2>&1 | plain |
                sed -nE "s/^ *$op\((.*)\): .* ([0-9.]+) us.*/$op of a token, \1: \2 us/p"
        done
        "$bin/test-backend-ops" perf -b Vulkan0 -o FLASH_ATTN_EXT \
            -p "nr23=\[[48],1\],kv=(256|32768|131072),nb=1,.*permute=\[0,2,1,3\]" 2>&1 | plain |
            sed -nE 's/.*hsk=([0-9]+),.*nh=([0-9]+),nr23=\[([0-9]+),1\],kv=([0-9]+),.*type_K=([a-z0-9_]+),type_V=([a-z0-9_]+).* - +([0-9.]+) us.*/attention, head size \1, \2 x \3 heads, \4 tokens, \5\/\6: \7 us/p'
    fi
    "$python" tests/cuda/shape_model.py "$work/model.gguf" ${SHAPE:-32 4096 32 8 128 14336} || exit 1
    for pair in f16/f16 tbq4_0/tbq4_0 tbq3_0/tbq3_0 q8_0/q8_0 q4_0/q4_0; do
        "$bin/llama-bench" -m "$work/model.gguf" -ngl 99 -fa 1 -ctk ${pair%/*} -ctv ${pair#*/} -b 2048 -ub 512 \
            -p 2048 -n 32 -d "${DEPTHS:-0,32768}" -r 2 || failed=1
    done
fi
[ $failed = 0 ] && echo "all is well" || echo "something failed"
exit $failed
