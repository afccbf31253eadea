# SPDX-License-Identifier: MIT
"""What llama-server answers."""

import json
import urllib.error
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tbq.errors import TBQError


def read_json(send: Callable[[], AbstractContextManager[Any]]) -> Any:
    """The decoded JSON of an answer; TBQError with the server's reason if it refuses the request.

    send: sends the request and opens the answer.
    """
    try:
        with send() as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise TBQError(f"llama-server answered {error.code}: {error.read(1000).decode(errors='replace')}") from None
