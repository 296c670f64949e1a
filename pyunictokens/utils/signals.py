"""Ending in good order: a scheduler's SIGTERM or a Ctrl-C becomes a question that the work asks itself between steps.

The first signal lets the step at hand finish, so that its checkpoint can be written; the second ends at once. What is
saved, and where, is the business of whoever asks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Stop = Callable[[], bool]
"""Whether to end at the next good moment."""


class Stopped(Exception):
    """The work was asked to end and has saved what it had; the message says where it stands. Not a failure."""


def never() -> bool:
    """The answer of those that nobody stops."""
    return False


@contextmanager
def stop_on_signals(say: Callable[[str], None] = lambda text: None, patient: bool = False) -> Iterator[Stop]:
    """While the context lasts, SIGTERM and SIGINT are remembered; the given function tells whether one came.

    A second signal raises KeyboardInterrupt, unless `patient`: a launcher hands on what its processes may have got from
    the scheduler already, and ends by itself those that take too long. Outside the main thread, where Python takes no
    signals, nothing changes.
    """
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if came and patient:
            return
        if came:
            raise KeyboardInterrupt
        came.append(number)
        more = "" if patient else "; once more stops at once"
        say(f"{signal.Signals(number).name}: stopping after this step{more}")

    if threading.current_thread() is not threading.main_thread():
        yield never
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
