# SPDX-License-Identifier: MIT
"""`tbq calibrate`."""

import argparse
import pathlib
import re

from tbq.cli._argument import at_least_one
from tbq.errors import TBQError, printable
from tbq.gguf_files.reader import open_gguf
from tbq.kv_cache.calibrate import calibrate
from tbq.kv_cache.center_file import read_center
from tbq.kv_cache.model import read_model
from tbq.programs.signals import interruptible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """measure the mean of a model's keys, for --cache-center"""
    parser.epilog = (
        "examples: tbq calibrate model.gguf\n"
        "          tbq calibrate model.gguf --ctx 32768 -o model.center.gguf -- -ngl 99\n"
        "          llama-server -m model.gguf --cache-type-k tbq4_0 --cache-center model.center.gguf\n"
        "          tbq calibrate folder-of-a-model -o model.center.safetensors    (for tbq.hf and vLLM)\n\n"
        "tbq serve and tbq.llama do this automatically.  Options after -- are llama.cpp's."
    )
    parser.add_argument(
        "model",
        type=pathlib.Path,
        metavar="MODEL.gguf",
        help="the model; the first file of a split model, or a folder of transformers",
    )
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="FILE", help="text for the model to read (Python's language reference)"
    )
    parser.add_argument(
        "--ctx",
        type=at_least_one,
        metavar="N",
        help="tokens of context that the cache will have (what the model was trained for)",
    )
    parser.add_argument(
        "--chunks",
        type=at_least_one,
        metavar="N",
        help="number of chunks of 128 tokens to read, spread over the context (8)",
    )
    parser.add_argument(
        "-o",
        dest="out",
        type=pathlib.Path,
        metavar="OUT.gguf",
        help="file to write (MODEL.center.gguf, or FOLDER.center.safetensors, in the current folder)",
    )
    parser.add_argument(
        "options", nargs="*", metavar="-- OPTION ...", help="options of llama.cpp for the measurement: -- -ngl 99"
    )

    def run_command(args: argparse.Namespace) -> int:
        if args.model.is_dir():
            return _calibrate_folder(args)
        from tqdm import tqdm  # type: ignore[import-untyped]

        model = args.model if args.ctx else open_gguf(args.model)
        context = args.ctx or read_model(model, args.options).context or 8192
        out = args.out or pathlib.Path(re.sub(r"(-00001-of-\d{5})?\.gguf$", "", args.model.name) + ".center.gguf")
        if args.text and out.exists() and out.samefile(args.text):
            raise TBQError(f"{out} is the text itself; name another file to write")
        with interruptible(), tqdm(unit="chunk", desc="keys", disable=None) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            shares = calibrate(
                model, out, context, text=args.text, chunks=args.chunks, options=args.options, on_chunk=show
            )
        print(shares)
        center = read_center(out)
        print(
            f"{printable(str(out)) or out}: {len(center.means)} layers, {center.tokens} keys each, "
            f"for a context of {center.context} tokens"
        )
        return 0

    parser.set_defaults(run=run_command)


def _calibrate_folder(args: argparse.Namespace) -> int:
    """Measures a model of transformers, for tbq.hf and tbq.vllm."""
    for name, value in {"--text": args.text, "--ctx": args.ctx, "--chunks": args.chunks, "--": args.options}.items():
        if value:
            raise TBQError(f"{name} is for GGUF models; {args.model} is a folder of transformers")
    out = args.out or pathlib.Path(f"{args.model.resolve().name}.center.safetensors")
    if out.resolve().parent == args.model.resolve():
        raise TBQError(f"{out} would be among the model's weights, where vLLM would read it; name a file outside")
    if not out.resolve().parent.is_dir():
        raise TBQError(f"{printable(str(out.parent))} is not a folder, so {printable(str(out))} cannot be written")
    from tbq.hf._folder import measure_folder

    layers = measure_folder(args.model, out)
    print(f"{printable(str(out)) or out}: {layers} layers")
    return 0
