# SPDX-License-Identifier: MIT
"""Signals: an interruption ends a command with everything that it began."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals go to a handler; not where they are ignored (nohup's SIGHUP), and only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


INTERRUPTIONS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def held() -> Iterator[None]:
    """An interruption comes at the end: in the middle of Popen it would leave a child that nobody knows."""
    caught: list[int] = []
    with handled(
        (number for number in INTERRUPTIONS if callable(signal.getsignal(number))),
        lambda number, _: caught.append(number),
    ):
        yield
    if caught:
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP become KeyboardInterrupt, so that whatever was begun is cleaned up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with handled((number for number in INTERRUPTIONS if number != signal.SIGINT), interrupt):
        yield
