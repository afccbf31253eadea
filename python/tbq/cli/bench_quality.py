# SPDX-License-Identifier: MIT
"""`tbq bench quality`."""

import argparse
import dataclasses
import hashlib
import pathlib
import platform
import sys
import tempfile

from tbq._arguments import cores, group_by_reason
from tbq._files import replace
from tbq._plots import picture_format
from tbq._text import python_text, read_text
from tbq._types import types
from tbq.bench.perplexity import base_bytes
from tbq.bench.quality import TYPES, as_json, as_text, check_run, measure, picture
from tbq.cli._argument import at_least_one
from tbq.errors import TBQError
from tbq.kv_cache.model import read_model, sha256
from tbq.kv_cache.type_pairs import TypePair, parse_pairs
from tbq.kv_cache.whole_keys import needs_whole_keys
from tbq.programs.paths import versions
from tbq.programs.signals import interruptible


def _add_centered(pairs: list[TypePair], only_tbq: bool) -> list[TypePair]:
    """The pairs, each followed by the same pair with centered keys if centering changes it.

    only_tbq: the model's keys can be centered in a tbq type only.
    """
    found = []
    for pair in pairs:
        found.append(pair)
        if pair.may_be_centered and (pair.k in types or not only_tbq):
            found.append(dataclasses.replace(pair, centered=True))
    return found


def _add_exact(pairs: list[TypePair]) -> list[TypePair]:
    """The pairs, each of a tbq type followed by the same pair with exact rows.

    Of a pair that is there with and without centered keys, only the centered one.
    """
    found = []
    for pair in pairs:
        found.append(pair)
        if pair.has_tbq and (pair.centered or dataclasses.replace(pair, centered=True) not in pairs):
            found.append(dataclasses.replace(pair, exact=True))
    return found


def _identify(args: argparse.Namespace, text: bytes) -> dict[str, str]:
    """What was measured, and with which versions."""
    source = args.text.name if args.text else f"topics of the language reference of Python {platform.python_version()}"
    return {
        "model": args.model.name,
        "model_sha256": sha256(args.model),
        "text": source,
        "text_sha256": hashlib.sha256(text).hexdigest(),
        **versions(),
        "center_text": "Python's language reference" if args.text else "the second half of the text",
    }


def _run(args: argparse.Namespace) -> int:
    format = picture_format(args.plot) if args.plot else ""
    if args.scratch and not args.scratch.is_dir():
        raise TBQError(f"--scratch {str(args.scratch)!r} is not a folder")
    pairs = parse_pairs(args.types)
    text = read_text(args.text) if args.text else python_text()
    model = read_model(args.model, args.options)
    if not args.no_center:
        pairs = _add_centered(pairs, model.opened is not None and needs_whole_keys(model.opened) is not None)
    check_run(model, args.context, args.chunks, args.scratch)
    # python_text() is scored from its beginning, and the means are measured on its second half, which has other words
    half = len(text) // 2
    if not args.text and 8 * args.context * args.chunks > half and any(pair.centered for pair in pairs):
        print(
            "tbq: warning: no rows with centered keys: so many chunks would be scored on the text "
            "that the means are measured on; name a text with --text",
            file=sys.stderr,
        )
        pairs = [pair for pair in pairs if not pair.centered]
    if not args.no_exact:
        pairs = _add_exact(pairs)
    with interruptible():
        print(
            f"tbq: {base_bytes(args.context, args.chunks, model.vocab) / 1e6:.0f} MB of probabilities of the f16 cache "
            f"go to {args.scratch or tempfile.gettempdir()} while this runs",
            file=sys.stderr,
        )
        identity = _identify(args, text)
        report = measure(
            model,
            pairs,
            text,
            args.context,
            args.chunks,
            args.threads,
            args.options,
            args.scratch,
            None if args.text else text[half:],
            f"text {str(args.text)!r}" if args.text else "Python's language reference",
            args.ubatch,
        )
        if report.scores:
            print(as_json(report, identity) if args.json else as_text(report, identity))
        if report.scores and report.complete and args.plot:
            replace(args.plot, picture(report, args.model.name, format))
    if not report.complete:
        print(f"tbq: interrupted after {len(report.scores)} of {len(pairs)} pairs", file=sys.stderr)
        return 130
    if report.failures:
        raise TBQError(group_by_reason({str(pair): why for pair, why in report.failures.items()}))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """compare cache types with f16 in perplexity and KL divergence, with llama-perplexity"""
    parser.epilog = (
        "examples: tbq bench quality --model model.gguf --plot quality.png\n"
        "          tbq bench quality --model model.gguf --text book.txt --types q8_0,tbq4_0 --chunks 20 -- -ngl 99"
    )
    parser.add_argument("--model", type=pathlib.Path, required=True, metavar="GGUF", help="the model")
    parser.add_argument("--types", default=TYPES, metavar="K/V,...", help="cache types (%(default)s)")
    parser.add_argument("--no-center", action="store_true", help="leave out the rows with centered keys")
    parser.add_argument("--no-exact", action="store_true", help="leave out the measurements with exact rows")
    parser.add_argument(
        "--ubatch",
        type=at_least_one,
        metavar="N",
        help="tokens that are read at once: 16 is like generating, llama.cpp's 512 like a prompt",
    )
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="FILE", help="UTF-8 text to read (topics of Python's language reference)"
    )
    parser.add_argument(
        "--context", type=at_least_one, default=1024, metavar="N", help="tokens of a chunk (%(default)s)"
    )
    parser.add_argument(
        "--chunks",
        type=at_least_one,
        default=6,
        metavar="N",
        help="number of chunks to read, fewer if the text is shorter (%(default)s)",
    )
    parser.add_argument(
        "--threads", type=at_least_one, default=cores(), metavar="N", help="threads of the CPU (%(default)s)"
    )
    parser.add_argument(
        "--scratch",
        type=pathlib.Path,
        metavar="FOLDER",
        help="folder for the probabilities of the f16 cache (the system's temporary folder)",
    )
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="FILE",
        help="also draw KL divergence against bits, for example quality.png",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("options", nargs="*", metavar="-- OPTION ...", help="options of llama-perplexity: -- -ngl 99")
    parser.set_defaults(run=_run)
