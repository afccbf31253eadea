#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The speed of CUDA's kernels and of models on a GPU:  bench/cuda.sh BIN
#
# BIN: the folder with llama-bench and test-backend-ops of a build with CUDA, as for tests/cuda/run.sh.
# PYTHON: an interpreter that has gguf.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: bench/cuda.sh BIN}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

plain() { sed 's/\x1b\[[0-9;]*m//g'; }

model() { # model NAME LAYERS WIDTH HEADS KV_HEADS HEAD_SIZE FF: random Q8_0 weights
    "$python" tests/cuda/shape_model.py "$work/$1.gguf" "${@:2}"
}

# attention alone
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
