# SPDX-License-Identifier: MIT
"""`tbq bench recall`."""

import argparse
import hashlib
import pathlib
import platform
import sys

from tbq._arguments import group_by_reason
from tbq._files import replace
from tbq._plots import picture_format
from tbq._text import python_text, read_text
from tbq.bench.recall import BASE, TYPES, as_json, as_text, check, measure, other_server, picture
from tbq.bench.recall_questions import TASKS
from tbq.cli._argument import at_least_one
from tbq.errors import TBQError
from tbq.kv_cache.model import read_model, sha256
from tbq.kv_cache.type_pairs import parse_pairs
from tbq.programs.paths import versions
from tbq.programs.signals import interruptible


def _parse_lengths(text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths such as 1024,4096")
    return [int(part) for part in dict.fromkeys(parts)]


def _parse_depths(text: str) -> list[float]:
    try:
        return [float(part) for part in dict.fromkeys(filter(None, text.split(",")))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of depths such as 0,0.5,1") from None


def _lines(found: dict[str, str]) -> dict[str, str]:
    """What was measured, and with which versions, as lines under the tables."""
    built = f"llama.cpp {found['llama_cpp_commit']}, tbq {found['tbq']}" if "tbq" in found else found["llama_server"]
    names = {name: f"{found[name]}, sha256 {found[f'{name}_sha256']}" for name in ("model", "text")}
    return {**names, "built": built}


def _run(args: argparse.Namespace) -> int:
    format = picture_format(args.output, "-o") if args.output else ""
    tasks = list(dict.fromkeys(filter(None, args.tasks.split(","))))
    check(tasks, args.lengths, args.depths, args.samples)
    pairs = [str(pair) for pair in parse_pairs(args.types)]
    text = read_text(args.text) if args.text else python_text()
    model = read_model(args.model, args.options)
    model.check_cached()
    if not model.vocab:
        raise TBQError(f"model {str(args.model)!r} has no tokenizer; questions need one")
    source = args.text.name if args.text else f"topics of the language reference of Python {platform.python_version()}"
    with interruptible():
        found = {
            "model": args.model.name,
            "model_sha256": sha256(args.model),
            "text": source,
            "text_sha256": hashlib.sha256(text).hexdigest(),
            # the versions of another llama-server are not known here
            **({"llama_server": str(args.llama_server)} if args.llama_server else versions()),
        }
        report = measure(
            args.model,
            pairs,
            tasks,
            args.lengths,
            args.depths,
            args.samples,
            args.seed,
            text.decode(),
            args.options,
            False if args.no_chat else None,
            args.passage,
            other_server(args.llama_server, args.model) if args.llama_server else None,
        )
        if any(report.answers.values()):
            print(as_json(report, found) if args.json else as_text(report, _lines(found)))
            if args.output:
                replace(args.output, picture(report, args.model.name, format))
    if not report.complete:
        done, asked = sum(map(len, report.answers.values())), len(report.questions.questions)
        count = asked * len(dict.fromkeys([BASE, *pairs]))
        if report.failures:
            print(f"tbq: {group_by_reason(report.failures)}", file=sys.stderr)
        print(f"tbq: interrupted after {done} of {count} answers", file=sys.stderr)
        return 130
    if report.failures:
        raise TBQError(group_by_reason(report.failures))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """compare cache types with f16 in what a model still finds in a long text, with llama-server"""
    parser.epilog = (
        "examples: tbq bench recall model.gguf -o recall.png\n"
        "          tbq bench recall model.gguf --tasks names,json --types q4_0,tbq4_0 --samples 40 -- -ngl 99\n"
        "          tbq bench recall model.gguf -- --cache-recent 0 --cache-first 0"
    )
    parser.add_argument("model", type=pathlib.Path, metavar="MODEL", help="the model, a GGUF file")
    parser.add_argument(
        "--tasks", default="needle,names", metavar="TASK,...", help=f"what to ask, of {', '.join(TASKS)} (%(default)s)"
    )
    parser.add_argument(
        "--types", default=TYPES, metavar="K/V,...", help="cache types; f16 is always one (%(default)s)"
    )
    parser.add_argument(
        "--lengths",
        type=_parse_lengths,
        default="1024,2048,4096",
        metavar="N,...",
        help="tokens of a text with its question and answer (%(default)s)",
    )
    parser.add_argument(
        "--depths",
        type=_parse_depths,
        default="0,0.25,0.5,0.75,1",
        metavar="X,...",
        help="where the fact of needle is, 0 at the start to 1 far from the end (%(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=at_least_one,
        default=4,
        metavar="N",
        help="texts for each task and length, of needle also for each depth (%(default)s)",
    )
    parser.add_argument(
        "--passage", type=at_least_one, default=256, metavar="N", help="tokens to repeat in copy (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="makes the texts and questions (%(default)s)")
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="FILE", help="UTF-8 text to use (topics of Python's language reference)"
    )
    parser.add_argument("--no-chat", action="store_true", help="do not use the model's chat template")
    parser.add_argument(
        "--llama-server", type=pathlib.Path, metavar="FILE", help="a llama-server of another build to measure"
    )
    parser.add_argument("--json", action="store_true", help="print every answer as JSON instead of tables")
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, metavar="PICTURE", help="also draw what was found, for example recall.png"
    )
    parser.add_argument("options", nargs="*", metavar="-- OPTION ...", help="options of llama-server: -- -ngl 99")
    parser.set_defaults(run=_run)
