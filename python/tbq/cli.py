"""The command `tbq`.

A subcommand is a function that takes a parser of its own and sets `run`, which gets the parsed arguments and returns
the exit status; its docstring is the line in the help, `parser.epilog` has an example.  Add it to COMMANDS.
"""
import argparse
import json
import sys
from collections.abc import Callable, Sequence

from tbq import __version__, bench, conversion, inspection, server
from tbq.errors import TBQError
from tbq.paths import paths
from tbq.plan import define as define_plan  # tbq.plan is the function


def _paths(parser: argparse.ArgumentParser) -> None:
    """where the patched programs and libraries are"""
    parser.epilog = "example: $(tbq paths bin)/llama-server -m model.gguf --cache-type-k tbq4_0 --cache-type-v tbq4_0"
    parser.add_argument("key", nargs="?", metavar="KEY", help="print only this one: bin, lib, ...")
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


def _completion(parser: argparse.ArgumentParser) -> None:
    """print the script that lets a shell complete these commands"""
    parser.epilog = "example: tbq completion bash > ~/.local/share/bash-completion/completions/tbq"
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")

    def run(args: argparse.Namespace) -> int:
        try:
            import shtab  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            raise TBQError("tbq completion needs shtab: pip install 'ggml-tbq[completion]'") from None
        print(shtab.complete(_parser(), args.shell))
        return 0

    parser.set_defaults(run=run)


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "bench": bench.define,
    "completion": _completion,
    "convert": conversion.define,
    "inspect": inspection.define,
    "paths": _paths,
    "plan": define_plan,
    "serve": server.define,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tbq", description="TurboQuant tensor types for llama.cpp")
    parser.add_argument("--version", action="version", version=f"tbq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, define in COMMANDS.items():
        text = define.__doc__
        define(commands.add_parser(name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.  An error is one line on stderr and status 2."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{getattr(args, 'hint', '')}")
    try:
        return int(args.run(args))
    except TBQError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    except KeyboardInterrupt:
        return 130
    print(f"tbq: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
