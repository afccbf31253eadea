# SPDX-License-Identifier: MIT
"""`tbq plan`."""

import argparse
import io
import json
import pathlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from tbq._exact_rows import FIRST, RECENT
from tbq._files import replace
from tbq._plots import picture_format
from tbq._units import SIZES, format_size
from tbq.errors import TBQError
from tbq.kv_cache.devices import LAYER, TENSOR
from tbq.kv_cache.layers import GLOBAL, NONE, WINDOW
from tbq.kv_cache.plan import CELLS, Plan, pad_cells, plan


def _layer_lines(plan: Plan) -> Iterator[str]:
    groups: dict[tuple[Any, ...], int] = {}
    for layer in plan.layers:
        key = (layer.kind, layer.kv_heads, layer.key_size, layer.value_size, layer.indexer_key_size, layer.state_bytes)
        groups[key] = groups.get(key, 0) + 1
    for (kind, heads, key_size, value_size, indexer, state), count in groups.items():
        text = f"{count:4} x {kind}"
        if kind == WINDOW:
            text += f" of {plan.window} tokens"
        if kind != NONE:
            text += f": {_count(heads, 'KV head')}, keys of {key_size}, "
            text += f"values of {value_size}" if value_size else "values among the keys"
        if indexer:
            text += f", an indexer key of {indexer}"
        if state:
            text += f"{',' if kind != NONE else ':'} recurrent state of {format_size(state)} a sequence"
        yield text


def report(plan: Plan) -> str:
    """The plan as the text that `tbq plan` prints."""
    lines = [
        f"{_title(plan)}: {plan.architecture}, {_count(len(plan.layers), 'layer')}, trained for {plan.context_train} "
        f"tokens, weights {format_size(plan.weights_bytes)}",
        *_layer_lines(plan),
        "",
    ]
    memory = ""
    if plan.memory is not None:
        memory = f", memory {format_size(plan.memory)} for {'the cache' if plan.cache_only else 'weights and cache'}"
    lines.append(
        f"context {plan.context}, {_count(plan.parallel, 'sequence')}{memory}"
        + ("; bytes of keys (K) and values (V):" if plan.cached else "")
    )
    if plan.state_bytes:
        lines.append(
            f"recurrent states take {plan.state_bytes:,} bytes" + (" in addition to the cache" if plan.cached else "")
        )
    if not plan.cached:
        small = ["warning: the memory is too small for the weights and the state"] if plan.fits is False else []
        lines += [f"no cache: {plan.reason}", *_devices(plan), *small]
        return "\n".join([*lines, *(f"warning: {text}" for text in plan.warnings)])
    lines += [*_table(plan), ""]
    lines += _devices(plan)
    why: dict[str, list[str]] = {}
    for name, text in plan.refused.items():
        why.setdefault(text, []).append(name)
    lines += [f"refused: {', '.join(names)}: {text}" for text, names in why.items()]
    k, v = plan.recommended
    lines += [f"recommended: -c {plan.context} --cache-type-k {k} --cache-type-v {v}", f"  {plan.reason}"]
    if plan.memory is not None:
        lines.append("  not counted: llama.cpp's compute buffers, and everything else that needs the memory")
    lines += [f"warning: {text}" for text in plan.warnings]
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    return plan.name or pathlib.Path(plan.model).name


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _devices(plan: Plan) -> Iterator[str]:
    """What each device holds with the recommended types."""
    if not plan.devices:
        return
    pair = plan.pair(*plan.recommended) if plan.cached else None
    types = f" with {pair.k} / {pair.v}" if pair else ""
    yield f"devices{types}, split by {plan.split_mode}s (the CPU's memory has the rest of the model):"
    rows = [["", "layers", "weights", "cache", *["state"] * bool(plan.state_bytes), "total", "", "of its memory"]]
    for i, device in enumerate(plan.devices):
        cache = pair.by_device[i] if pair else 0
        total = device.weights_bytes + device.state_bytes + cache
        memory = (
            f"{format_size(device.memory)}{'' if plan.fits_on(i, pair) else ', too little'}" if device.memory else ""
        )
        state = [f"{device.state_bytes:,}"] * bool(plan.state_bytes)
        sizes = [f"{device.weights_bytes:,}", f"{cache:,}", *state, f"{total:,}"]
        rows.append([device.name, str(device.layers), *sizes, format_size(total), memory])
    yield from _columns(rows, left=0)
    yield ""


def _table(plan: Plan) -> Iterator[str]:
    kinds = [kind for kind in (GLOBAL, WINDOW) if any(kind in pair.by_kind for pair in plan.pairs)]
    exact = any(pair.exact_bytes for pair in plan.pairs)
    head = ["", "K / V", *(f"{kind} {tensor}" for kind in kinds for tensor in "KV"), *["exact rows"] * exact]
    head += ["total", "", "of f16"]
    if plan.memory is not None:
        head.append("longest context")
    full = next((pair.bytes for pair in plan.pairs if (pair.k, pair.v) == ("f16", "f16")), 0)
    rows = [head]
    for pair in plan.pairs:
        cells = [f"{n:,}" for kind in kinds for n in pair.by_kind[kind]]
        row = [
            "*" if (pair.k, pair.v) == plan.recommended else "",
            f"{pair.k} / {pair.v}",
            *cells,
            *[f"{pair.exact_bytes:,}"] * exact,
            f"{pair.bytes:,}",
            format_size(pair.bytes),
            f"{100 * pair.bytes / full:.1f} %" if full else "",
        ]
        if plan.memory is not None:
            row.append("none fits" if pair.longest == 0 else "any" if pair.longest is None else str(pair.longest))
        rows.append(row)
    yield from _columns(rows, left=1)


def _columns(rows: list[list[str]], left: int) -> Iterator[str]:
    """Rows with aligned columns.  left: the column that is aligned on its left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(
            cell.ljust(w) if i == left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()


def as_json(plan: Plan) -> str:
    """The plan as a JSON object; sizes in bytes."""
    data = asdict(plan)
    data["pairs"] = [{**asdict(pair), "bytes": pair.bytes} for pair in plan.pairs]
    return json.dumps(data, indent=2)


def plot(plan: Plan, path: str | pathlib.Path) -> None:
    """Draws memory against context for the plan's pairs.

    The memory includes weights and recurrent states, unless the plan is cache_only.

    path: the picture, a .png or another format that matplotlib writes.
    Raises TBQError for an unknown ending, without matplotlib, and if the picture cannot be written.
    """
    target = pathlib.Path(path)
    format = picture_format(target)
    from matplotlib.figure import Figure

    base = 0 if plan.cache_only else plan.weights_bytes + plan.state_bytes
    recommended = plan.pair(*plan.recommended)
    end = max(plan.context, plan.context_train, min(recommended.longest or 0, 4 * plan.context_train), 2 * CELLS)
    contexts = sorted({pad_cells(int(x)) for x in np.linspace(CELLS, end, 65)})
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for pair in sorted(plan.pairs, key=lambda pair: -pair.bytes):
        sizes = [(base + plan.bytes_at(pair.k, pair.v, n)) / 2**30 for n in contexts]
        chosen = pair == recommended
        label = f"{pair.k} / {pair.v}{' (recommended)' if chosen else ''}"
        axes.plot(contexts, sizes, label=label, linewidth=3 if chosen else 1.2)
    if plan.memory is not None:
        axes.axhline(plan.memory / 2**30, color="black", linestyle="--", linewidth=1, label="memory")
    axes.axvline(plan.context_train, color="gray", linestyle=":", linewidth=1, label="trained for")
    axes.set(
        xlabel="context, tokens",
        ylabel=f"GiB of {'cache' if plan.cache_only else 'weights and cache'}",
        title=f"{_title(plan)}, {_count(plan.parallel, 'sequence')}",
        ylim=(0, None),
        xlim=(0, end),
    )
    axes.legend(title="keys / values", fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=format)
    replace(target, drawn.getvalue())


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise TBQError(f"--tensor-split {text!r} is not a list of numbers; 3,1 would be one") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """compute what the KV cache of a model will take, and recommend cache types"""
    parser.epilog = (
        "examples:\n  tbq plan model.gguf --context 32768\n  tbq plan model.gguf --memory 24G\n"
        "  tbq plan model.gguf --memory 2GiB --cache-only --types q8_0,tbq4_0/tbq3_0 --json\n"
        "  tbq plan model.gguf --devices 24G,24G --split-mode tensor\n"
        "  tbq plan model.gguf --rpc 10.0.0.2:50052,10.0.0.3:50052"
    )
    parser.add_argument(
        "model", metavar="MODEL.gguf", help="the model; any file of a split model (no weights are loaded)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of context, -c (what the model was trained for, if it fits)"
    )
    parser.add_argument("--memory", metavar="SIZE", help=f"memory for weights, cache and recurrent state; {SIZES}")
    parser.add_argument("--cache-only", action="store_true", help="--memory is not for the weights")
    parser.add_argument(
        "--types", metavar="K/V,...", help="pairs to show, tbq4_0/tbq3_0 for example; a single name is for both"
    )
    parser.add_argument("--parallel", type=int, default=4, metavar="N", help="sequences, -np (4, llama-server's own)")
    parser.add_argument(
        "--no-kv-unified", action="store_true", help="a separate cache for each sequence, with its part of the context"
    )
    parser.add_argument("--ubatch", type=int, default=512, metavar="N", help="tokens of a physical batch, -ub (512)")
    parser.add_argument("--swa-full", action="store_true", help="sliding windows keep the whole context (--swa-full)")
    parser.add_argument("--no-center", action="store_true", help="recommend types for keys that are not centered")
    for name, rows, default in (("recent", "newest", RECENT), ("first", "first", FIRST)):
        text = f"exact rows: the {rows} rows of each sequence that a tbq cache keeps in 8 bits as well ({default})"
        parser.add_argument(f"--cache-{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--devices", metavar="SIZE,...", help="the free memory of each of several GPUs: what each of them will hold"
    )
    parser.add_argument(
        "--rpc",
        metavar="HOST:PORT,...",
        help="the same for the devices of RPC servers, which are asked for their memory",
    )
    parser.add_argument(
        "--split-mode", default=LAYER, choices=(LAYER, TENSOR), help="what the devices share, llama.cpp's -sm (layer)"
    )
    parser.add_argument(
        "--tensor-split",
        metavar="N,...",
        help="their shares, -ts (for layers the free memory, for tensors equal parts)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object, sizes in bytes")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw memory against context; needs pip install 'ggml-tbq[plot]'"
    )
    parser.add_argument(
        "options",
        nargs="*",
        metavar="-- OPTION ...",
        help="llama.cpp's options that change what the file says: -- --rope-scaling yarn --rope-scale 4",
    )

    def run(args: argparse.Namespace) -> int:
        from tbq.kv_cache.type_pairs import split_pair

        pairs = [split_pair(pair) for pair in args.types.split(",") if pair] if args.types is not None else None
        if pairs == []:
            raise TBQError("--types names no pair; tbq4_0/tbq3_0,q8_0 would show two")
        found = plan(
            args.model,
            context=args.context,
            memory=args.memory,
            cache_only=args.cache_only,
            pairs=pairs,
            parallel=args.parallel,
            unified=not args.no_kv_unified,
            ubatch=args.ubatch,
            swa_full=args.swa_full,
            center=not args.no_center,
            recent=args.cache_recent,
            first=args.cache_first,
            devices=args.devices,
            rpc=args.rpc,
            split_mode=args.split_mode,
            tensor_split=_numbers(args.tensor_split),
            options=args.options,
        )
        if args.plot is not None:
            plot(found, args.plot)
        print(as_json(found) if args.json else report(found))
        return 0

    parser.set_defaults(run=run)
