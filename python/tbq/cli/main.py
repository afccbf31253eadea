# SPDX-License-Identifier: MIT
"""The command `tbq`.

A subcommand is a function that gets its own parser.  It sets `run`, a function that gets the parsed arguments and
returns the exit status.  The docstring of the function is its line in the help, and `parser.epilog` has an example.
A new subcommand is added to COMMANDS.
"""

import argparse
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence

from tbq._version import __version__
from tbq.cli import (
    bench_index,
    bench_quality,
    bench_recall,
    bench_speed,
    calibrate,
    convert,
    inspect,
    plan,
    rpc_server,
    search,
    serve,
)
from tbq.cli._argument import add_command
from tbq.errors import TBQError, one_line
from tbq.programs.paths import paths


def _add_bench(parser: argparse.ArgumentParser) -> None:
    """measure the speed, quality or recall of cache types, or the vector index, compared with others"""
    parser.epilog = (
        "examples: tbq bench speed, tbq bench quality --model model.gguf, tbq bench recall model.gguf, "
        "tbq bench index; each has its own --help"
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    modules = {"speed": bench_speed, "quality": bench_quality, "recall": bench_recall, "index": bench_index}
    for name, module in modules.items():
        add_command(commands, name, module.add_arguments)


def _add_paths(parser: argparse.ArgumentParser) -> None:
    """print the paths of the patched programs and libraries"""
    parser.epilog = "example: $(tbq paths bin)/llama-server -m model.gguf --cache-type-k tbq4_0 --cache-type-v tbq4_0"
    parser.add_argument("key", nargs="?", metavar="KEY", help="print only this path: bin, lib, ...")
    parser.add_argument("--json", action="store_true", help="print a JSON object")

    def run(args: argparse.Namespace) -> int:
        found = paths()
        if args.key is not None:
            if args.key not in found:
                raise TBQError(f"key {args.key!r} is not one of {', '.join(found)}")
            found = {args.key: found[args.key]}
        if args.key and not args.json:
            print(found[args.key])
        elif args.json:
            print(json.dumps(found, indent=2))
        else:
            width = max(map(len, found))
            for key, value in found.items():
                print(f"{key:{width}}  {value}")
        return 0

    parser.set_defaults(run=run)


def _add_completion(parser: argparse.ArgumentParser) -> None:
    """print the script that lets a shell complete these commands"""
    parser.epilog = (
        "examples: tbq completion bash > ~/.local/share/bash-completion/completions/tbq\n"
        "          tbq completion zsh > ~/.zfunc/_tbq        # a folder of $fpath\n"
        "          tbq completion fish > ~/.config/fish/completions/tbq.fish"
    )
    parser.add_argument(
        "shell", choices=("bash", "zsh", "fish"), help="the shell; needs pip install 'ggml-tbq[completion]'"
    )

    def run(args: argparse.Namespace) -> int:
        try:
            import shtab  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            raise TBQError("tbq completion needs shtab: pip install 'ggml-tbq[completion]'") from None
        root = _parser()
        for command in commands(root).values():
            for action in command._actions:
                if _IS_PATH.search(str(action.metavar)):
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        try:
            print(shtab.complete(root, args.shell))
        except NotImplementedError:
            raise TBQError(
                f"shtab {shtab.__version__} does not know {args.shell}: pip install --upgrade 'ggml-tbq[completion]'"
            ) from None
        return 0

    parser.set_defaults(run=run)


#: Metavars of arguments that are paths.  Shells complete file names for them.
_IS_PATH = re.compile(r"FILE|FOLDER|GGUF|MODEL|ORIGINAL|PICTURE|\.gguf$")

COMMANDS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "bench": _add_bench,
    "calibrate": calibrate.add_arguments,
    "completion": _add_completion,
    "convert": convert.add_arguments,
    "inspect": inspect.add_arguments,
    "paths": _add_paths,
    "plan": plan.add_arguments,
    "rpc-server": rpc_server.add_arguments,
    "search": search.add_arguments,
    "serve": serve.add_arguments,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tbq",
        description="TurboQuant tensor types for llama.cpp",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples: tbq plan model.gguf\n          tbq serve model.gguf -c 32768\n          tbq COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"tbq {__version__}")
    children = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add_arguments in COMMANDS.items():
        add_command(children, name, add_arguments)
    return parser


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """This parser and all below it, by the words that a user types: "tbq", "tbq bench", "tbq bench speed"."""
    found = {parser.prog: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found.update(commands(child))
    return found


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the words that no parser knows."""
    args, unknown = parser.parse_known_args(argv)
    if unknown and "--" in argv and isinstance(getattr(args, "options", None), list):
        # argparse loses the options of MODEL -o FILE -- OPTION, because it decides at MODEL that there are none
        at = list(argv).index("--")
        args, unknown = parser.parse_known_args(argv[:at])
        args.options += argv[at + 1 :]
    return args, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.  An error is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and models can hold any character
    try:
        parser = _parser()
        args, unknown = _parse(parser, sys.argv[1:] if argv is None else argv)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{getattr(args, 'hint', '')}")
        status = int(args.run(args))
        if sys.stdout is not None:  # it is None if it was closed at the start
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # `tbq plan ... | head`: no process reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (TBQError, OSError) as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, OSError) and error.filename is None and error.errno in full:
            error.filename = "standard output"  # the errors of all other files name the file
        print(f"tbq: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
