# SPDX-License-Identifier: MIT
"""Types of arguments: the package's own checks, as argparse calls them."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from tbq import _arguments
from tbq.errors import TBQError

T = TypeVar("T")


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """For add_argument(type=...): what parse refuses becomes an error that names the argument."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except TBQError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


at_least_one = argument(_arguments.at_least_one)
