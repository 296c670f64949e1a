"""Ending in good order: a scheduler's SIGTERM, a Ctrl-C or a closed terminal becomes a question that the work asks
itself between steps.

The first signal lets the step at hand finish, so that its checkpoint can be written; the second ends at once. What is
saved, and where, is the business of whoever asks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stop = Callable[[], bool]
"""Whether to end at the next good moment."""


ENDS_WITH_STDIN = "PYUNICTOKENS_ENDS_WITH_STDIN"
"""Environment variable: this process was started by one that holds its stdin, and ends when that one is gone."""

GRACE = 600.0
"""Seconds that a process whose parent is gone has for its checkpoint."""


class Stopped(Exception):
    """The work was asked to end and has saved what it had; the message says where it stands. Not a failure."""


def never() -> bool:
    """The answer of those that nobody stops."""
    return False


@contextmanager
def stop_on_signals(say: Callable[[str], None] = lambda text: None, patient: bool = False) -> Iterator[Stop]:
    """While the context lasts, SIGTERM, SIGINT and SIGHUP are remembered; the given function tells whether one came.

    SIGHUP (a terminal that closes, and takes no more words) is left alone where somebody ignores it already, as nohup
    does. A second signal raises KeyboardInterrupt, unless `patient`: a launcher hands on what its processes may have
    got from the scheduler already, and ends by itself those that take too long. Outside the main thread, where Python
    takes no signals, nothing changes.
    """
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if came and patient:
            return
        if came:
            raise KeyboardInterrupt
        came.append(number)
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        more = "" if patient else "; once more stops at once"
        say(f"{signal.Signals(number).name}: stopping after this step{more}")

    if threading.current_thread() is not threading.main_thread():
        yield never
        return
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """What would be written to a terminal that has closed goes nowhere, in place of failing at the next word."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def end_with_parent() -> None:
    """End when stdin closes, which is when the process at its other end is gone, however it went.

    It is as if SIGTERM had come: a run writes its checkpoint. What is left after GRACE seconds is killed.
    """

    def watch() -> None:
        try:
            while os.read(0, 1024):
                pass
        except OSError:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def end_with_parent_process() -> None:
    """In a process of `multiprocessing` (as the `initializer` of a pool): end at once when the one that started it is
    gone, however it went. A worker that is killed loses nothing but what it had at hand.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child has a parent to end with"

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
