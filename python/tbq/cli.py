"""The command `tbq`.

A subcommand is a function that takes a parser of its own and sets `run`, which gets the parsed arguments and returns
the exit status; add it to COMMANDS.
"""
import argparse
import json
import sys

from tbq import __version__, bench
from tbq.errors import TBQError
from tbq.paths import paths


def _paths(parser):
    """where the patched programs and libraries are"""
    parser.add_argument("key", nargs="?", metavar="KEY", help="print only this one: bin, lib, ...")
    parser.add_argument("--json", action="store_true", help="print a JSON object")

    def run(args):
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


COMMANDS = {"bench": bench.define, "paths": _paths}


def _parser():
    parser = argparse.ArgumentParser(prog="tbq", description="TurboQuant tensor types for llama.cpp")
    parser.add_argument("--version", action="version", version=f"tbq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, define in COMMANDS.items():
        define(commands.add_parser(name, help=define.__doc__, description=define.__doc__))
    return parser


def main(argv=None):
    """Runs a command; returns the exit status.  An error is one line on stderr and status 1 (2 for usage)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except TBQError as error:
        print(f"tbq: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
