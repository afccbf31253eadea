# SPDX-License-Identifier: MIT
"""`tbq convert`."""

import argparse

from tbq._arguments import cores
from tbq._units import SIZES, parse_size
from tbq.cli._argument import argument, at_least_one
from tbq.gguf_files.convert import convert
from tbq.gguf_files.rules import FILE_TYPES, FLOATS
from tbq.programs.signals import interruptible


def _tensor_option(text: str) -> tuple[str, str]:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=TYPE")
    return pattern, name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """write a GGUF file with weights of another type"""
    parser.epilog = r"""examples:
  tbq convert model-f16.gguf model-tbq4.gguf --type tbq4_0
  tbq convert model-f16.gguf mixed.gguf --type tbq4_0 --tensor 'blk\.\d+\.ffn_.*=tbq3_0'
  tbq convert model-tbq4.gguf model-f16.gguf --type f16     # a file that any llama.cpp opens

Norms and other small tensors keep their type.  The output matrix gets q6_K or q8_0, as with llama-quantize."""
    parser.add_argument("source", metavar="IN.gguf", help="the model; any file of a split model")
    parser.add_argument("target", metavar="OUT.gguf", help="the file to write")
    parser.add_argument(
        "--type", required=True, metavar="TYPE", choices=list(FILE_TYPES), help=f"one of {', '.join(FILE_TYPES)}"
    )
    parser.add_argument(
        "--tensor",
        action="append",
        default=[],
        type=_tensor_option,
        metavar="PATTERN=TYPE",
        help="another type for tensors whose names contain a match of the regular expression; the first match counts",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    parser.add_argument(
        "--split",
        type=argument(parse_size),
        metavar="SIZE",
        help=f"write several files, each with at most this size of tensors; {SIZES}",
    )
    parser.add_argument("--threads", type=at_least_one, default=cores(), metavar="N", help="threads (%(default)s)")

    def run(args: argparse.Namespace) -> int:
        with interruptible():
            report = convert(
                args.source,
                args.target,
                args.type,
                tensors=args.tensor,
                force=args.force,
                split_bytes=args.split,
                threads=args.threads,
                progress=True,
            )
        for (before, after), count in sorted(report.counts.items()):
            print(f"{count:5} tensors  {before}" + (f" -> {after}" if before != after else ""))
        for name, note in report.notes.items():
            print(f"{name} has {note}")
        again = sum(
            count
            for (before, after), count in report.counts.items()
            if before != after and not {before, after} & {t.name.lower() for t in FLOATS}
        )
        if again:
            print(f"{again} tensors were quantized before; converting from an f16 file is more exact")
        more = f" and {len(report.files) - 1} more" if report.files[1:] else ""
        sizes = f"{report.bytes_out / 1e6:.1f} MB of {report.bytes_in / 1e6:.1f}"
        print(f"{report.files[0]}{more}: {sizes}, {report.bits_per_value:.2f} bits per weight")
        return 0

    parser.set_defaults(run=run)
