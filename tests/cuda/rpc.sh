#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# rpc.sh BIN MODEL.gguf TEXT DEVICE...: the divergence of a tbq cache from f16, on this machine's devices and through one RPC
# server for each DEVICE.  CUDA0 CUDA1 for two GPUs, CUDA0 CUDA0 for one, CPU CPU without any.  Status 1 if the two differ by
# more than the sum of their errors, or if one of them cannot be measured.
set -euo pipefail
bin=$1 model=$2 text=$3
shift 3
folder=$(mktemp -d)
servers=() names=() pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; rm -rf "$folder"' EXIT
for device; do
    address=127.0.0.$((${#servers[@]} + 2))
    "$bin/ggml-rpc-server" --host "$address" --device "$device" >"$folder/$address.log" 2>&1 &
    pids+=($!)
    names+=("RPC${#servers[@]}")
    servers+=("$address:50052")
done
for server in "${servers[@]}"; do
    for ((i = 0; ; i++)); do
        (: </dev/tcp/"${server/:/\/}") 2>/dev/null && break
        ((i < 300)) || { echo "error: $server does not listen" >&2; cat "$folder/${server%:*}.log" >&2; exit 1; }
        sleep 0.1
    done
done
measure() { # NAME ARGUMENTS...
    "$bin/llama-perplexity" -m "$model" -f "$text" -c 1024 -b 1024 --chunks 2 -fa on --kl-divergence-base "$folder/base" \
        "${@:2}" >"$folder/$1.log" 2>&1 || { tail -n 3 "$folder/$1.log" >&2; exit 1; }
}
local=(-ngl 99)
case " $* " in *" CPU "*) local=(-ngl 0 -nr) ;; esac
remote=(--rpc "$(IFS=,; echo "${servers[*]}")" --device "$(IFS=,; echo "${names[*]}")")
cache=(--kl-divergence -ctk tbq4_0 -ctv tbq3_0 --cache-center auto)
measure f16 "${local[@]}"
measure here "${local[@]}" "${cache[@]}"
measure there "${remote[@]}" "${cache[@]}"
grep -H 'Mean *KLD' "$folder/here.log" "$folder/there.log" | sed "s|$folder/||; s|\.log||"
cat "$folder/here.log" "$folder/there.log" | awk '/Mean *KLD/ { n++; mean[n] = $3; error[n] = $5 }
    END { d = mean[1] - mean[2]; if (d < 0) d = -d; exit !(n == 2 && mean[1] > 0 && d <= error[1] + error[2]) }'
