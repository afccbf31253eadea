# SPDX-License-Identifier: MIT
"""Signals: an interruption ends a command and everything that the command started."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType


@contextlib.contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Sends signals to a handler while the block runs, in the main thread only.

    A signal that is ignored (SIGHUP under nohup) stays ignored.
    """
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
def hold_interruptions() -> Iterator[None]:
    """Delays interruptions to the end of the block.  Inside Popen one would leave a child process that nobody knows."""
    caught: list[int] = []
    numbers = [number for number in INTERRUPTIONS if callable(signal.getsignal(number))]
    with handle_signals(numbers, lambda number, _: caught.append(number)):
        yield
    if caught:
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into KeyboardInterrupt, so that everything that was started is cleaned up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with handle_signals((number for number in INTERRUPTIONS if number != signal.SIGINT), interrupt):
        yield
