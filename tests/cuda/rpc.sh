#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# rpc.sh BIN MODEL.gguf TEXT DEVICE...: the divergence of a tbq cache from f16, on this machine's devices and through one RPC
# server for each DEVICE.  CUDA0 CUDA1 for two GPUs, CUDA0 CUDA0 for one, CPU CPU without any.  Both lines must agree.
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
sleep 3
measure() {
    "$bin/llama-perplexity" -m "$model" -f "$text" -c 1024 -b 1024 --chunks 2 -fa on --kl-divergence-base "$folder/base" "$@" 2>&1
}
local=(-ngl 99)
case " $* " in *" CPU "*) local=(-ngl 0 -nr) ;; esac
measure "${local[@]}" >"$folder/f16.log"
cache=(--kl-divergence -ctk tbq4_0 -ctv tbq3_0 --cache-center auto)
echo "here:  $(measure "${local[@]}" "${cache[@]}" | grep 'Mean *KLD')"
remote=(--rpc "$(IFS=,; echo "${servers[*]}")" --device "$(IFS=,; echo "${names[*]}")")
echo "there: $(measure "${remote[@]}" "${cache[@]}" | tee "$folder/rpc.log" | grep 'Mean *KLD')"
grep -q 'RPC server .* was lost' "$folder/rpc.log" && exit 1
exit 0
