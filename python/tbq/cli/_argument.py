# SPDX-License-Identifier: MIT
"""Helpers for argparse: the package's checks as types of arguments, and subcommands."""

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from tbq import _arguments
from tbq.errors import TBQError

T = TypeVar("T")


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A function for add_argument(type=...).  A TBQError of parse becomes an error that names the argument."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except TBQError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


at_least_one = argument(_arguments.at_least_one)


def add_command(commands: Any, name: str, add_arguments: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds a subcommand.  commands: from add_subparsers().  The docstring of add_arguments is the line in the help."""
    text = add_arguments.__doc__
    raw = argparse.RawDescriptionHelpFormatter
    add_arguments(commands.add_parser(name, help=text, description=text, formatter_class=raw))
