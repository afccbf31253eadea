#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Everything that a GPU must show:  tests/cuda/run.sh BIN [check|kernels|ops|splits|center|speed]
#
# BIN: the folder with llama-bench, llama-perplexity, llama-cache-center and test-backend-ops of a build with CUDA (`make cuda`, then
# `make test TESTS=tests/test_cuda.py` builds the latter into build/cp*/bin).  Ends with a status that is not 0 if a
# check fails.  PYTHON: an interpreter that has gguf.  CENTER_MODEL: a file that `tests/cuda/center.py --make` made, where
# PYTHON has not what the tests need.
set -uo pipefail
cd "$(dirname "$0")/../.."
bin=${1:?usage: tests/cuda/run.sh BIN [check|kernels|ops|splits|center|speed]}
what=${2:-all}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

wanted() { # wanted PART: is it what was asked for?
    [ "$what" = all ] || [ "$what" = "$1" ] || { [ "$what" = check ] && [ "$1" != speed ]; }
}

plain() { sed 's/\x1b\[[0-9;]*m//g'; }

ops() { # ops NAME PATTERN: llama.cpp's own comparison with the CPU
    "$bin/test-backend-ops" test -b CUDA0 -o "$1" -p "$2" > "$work/ops" 2>&1 || failed=1
    plain < "$work/ops" | grep -E "FAIL|tests passed" | sed "s/^ */$1, $2: /"
    grep -q "tests passed" "$work/ops" || { echo "$1, $2: no result"; tail -3 "$work/ops"; failed=1; }
}

splits() { # splits MODEL K V: the parts that the graph falls into; 2 is the embedding on the CPU and the rest
    "$bin/llama-bench" -m "$1" -ngl 99 -fa 1 -ctk "$2" -ctv "$3" -p 8 -n 1 -r 1 --no-warmup -v 2>&1 | plain |
        grep -oE "splits = [0-9]+" | sort -u | tail -1 | grep -oE "[0-9]+"
}

model() { # model NAME LAYERS WIDTH HEADS KV_HEADS HEAD_SIZE FF: random Q8_0 weights
    "$python" tests/cuda/shape_model.py "$work/$1.gguf" "${@:2}"
}

echo "$(git rev-parse --short HEAD 2>/dev/null || echo '?'), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"

if wanted kernels; then
    if command -v nvcc > /dev/null; then
        "$python" tests/cuda/build.py "$work" || exit 1
        "$work/blocks" 100000 | grep -v encode
        [ "${PIPESTATUS[0]}" = 0 ] || failed=1
        "$work/attention" check 360 || failed=1
        if command -v compute-sanitizer > /dev/null; then
            for tool in memcheck racecheck; do
                compute-sanitizer --tool $tool --error-exitcode 9 "$work/attention" check 18 7 > "$work/san" 2>&1 || failed=1
                echo "attention, $tool: $(tail -1 "$work/san")"
                compute-sanitizer --tool $tool --error-exitcode 9 "$work/blocks" 500 > "$work/san" 2>&1 || failed=1
                echo "blocks, $tool: $(tail -1 "$work/san")"
            done
        fi
    else
        echo "no nvcc: the kernels by themselves are not checked"
    fi
fi

if wanted ops; then
    for op in SET_ROWS ROPE_SET_ROWS CENTER_SET_ROWS CPY GET_ROWS MUL_MAT MUL_MAT_ID FLASH_ATTN_EXT; do
        ops $op tbq
    done
    ops CENTER_SET_ROWS "type=[qif]" # fused with the SUB of the mean
    # what the patches must leave as it is
    ops SET_ROWS "type_dst=(f16|q8_0|q4_0)"
    ops GET_ROWS "type=(f16|q8_0|q4_0)"
    ops FLASH_ATTN_EXT "hsk=128,.*type_K=(f16|q8_0|q4_0),type_V=(f16|q8_0|q4_0)"
fi

if wanted splits; then
    for head in 64 128 256; do
        model tiny 2 512 8 2 $head 512
        base=$(splits "$work/tiny.gguf" f16 f16)
        same=0
        for k in f16 q8_0 tbq2_0 tbq3_0 tbq4_0; do
            for v in f16 q8_0 tbq2_0 tbq3_0 tbq4_0; do
                n=$(splits "$work/tiny.gguf" $k $v)
                if [ -n "$n" ] && [ "$n" = "$base" ]; then same=$((same + 1)); else echo "head size $head, $k/$v: ${n:-no} splits, f16 ${base:-none}"; failed=1; fi
            done
        done
        echo "head size $head: $same of 25 pairs of cache types have f16's ${base:-?} splits"
    done
fi

if wanted center; then
    "$python" tests/cuda/center.py "$bin" ${CENTER_MODEL:+--model "$CENTER_MODEL"} || failed=1
fi

if wanted speed; then
    "$bin/test-backend-ops" perf -b CUDA0 -o FLASH_ATTN_EXT -p "nr23=\[[48],1\],kv=(256|32768|131072),nb=1,.*permute=\[0,2,1,3\]" 2>&1 | plain |
        sed -nE 's/.*hsk=([0-9]+),hsv=[0-9]+,nh=([0-9]+),nr23=\[([0-9]+),1\],kv=([0-9]+),.*type_K=([a-z0-9_]+),type_V=([a-z0-9_]+).* - +([0-9.]+) us.*/attention, head size \1, \2 x \3 heads, \4 tokens, \5\/\6: \7 us/p'
    bench() { # bench MODEL ARGUMENTS: a line for each type and depth
        for pair in ${pairs:-f16/f16 tbq4_0/tbq4_0 q4_0/q4_0}; do
            "$bin/llama-bench" -m "$work/$1.gguf" -ngl 99 -fa 1 -ctk ${pair%/*} -ctv ${pair#*/} -b 2048 -d 0,32768,131072 -r 2 "${@:2}" -o jsonl 2> /dev/null |
                "$python" -c "
import json, sys
for d in map(json.loads, sys.stdin):
    print(f\"$1, $pair, {'pp' if d['n_prompt'] else 'tg'}{d['n_prompt'] or d['n_gen']} @ {d['n_depth']}, ubatch {d['n_ubatch']}: {d['avg_ts']:.2f} +- {d['stddev_ts']:.2f}\", flush=True)"
        done
    }
    model 7b 32 4096 32 8 128 14336
    pairs="f16/f16 tbq4_0/tbq4_0 tbq3_0/tbq3_0 tbq4_0/tbq3_0 q8_0/tbq4_0 q4_0/q4_0" bench 7b -ub 2048 -p 2048 -n 32
    pairs="f16/f16 tbq4_0/tbq4_0" bench 7b -ub 512 -p 2048 -n 0 -d 0,32768
    rm "$work/7b.gguf"
    model 7b-kv4 32 4096 32 4 128 14336
    bench 7b-kv4 -ub 2048 -p 0 -n 32
    rm "$work/7b-kv4.gguf"
    model 1b-head256 16 2048 16 2 256 8192
    bench 1b-head256 -ub 2048 -p 0 -n 32
    model 1b-head64 16 2048 64 8 64 8192
    bench 1b-head64 -ub 2048 -p 0 -n 32
fi
exit $failed
