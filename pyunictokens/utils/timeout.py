"""Calls of foreign code (reward models) that may raise or never come back, turned into errors that say where.

A call with a time limit runs in a thread of its own. Python cannot end a thread, so one that hangs stays behind, idle
to this process, and ends with it.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import UserError

T = TypeVar("T")


class NoAnswer(UserError):
    """A call was not back in its time."""


def ask(what: str, function: Callable[..., T], *arguments: object, seconds: float = 0.0) -> T:
    """``function(*arguments)``; `seconds` is the longest it may take, 0 waits for ever.

    Raises UserError when it raises (its own UserErrors pass) or wants to end the process, and NoAnswer when it is not
    back in time; the message then names the line at which it hangs.
    """
    try:
        return _limited(what, function, arguments, seconds) if seconds > 0 else function(*arguments)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: foreign code does not end a run without a word
        raise UserError(f"{what} failed: {type(error).__name__}: {error}") from error


def _limited(what: str, function: Callable[..., T], arguments: tuple[object, ...], seconds: float) -> T:
    answers: list[T] = []
    errors: list[BaseException] = []
    gradients = torch.is_grad_enabled()  # a thread begins with its own

    def call() -> None:
        try:
            with torch.set_grad_enabled(gradients):
                answers.append(function(*arguments))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if answers:
        return answers[0]
    raise NoAnswer(
        f"{what} gave no answer in {seconds:g} s; it stands at {_place(thread)}: look there, or raise "
        "grpo.reward_timeout (0 waits for ever); the last checkpoint is untouched"
    )


def _place(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or -1)
    if frame is None:
        return "its end"
    last = traceback.extract_stack(frame)[-1]
    return f"{last.filename}:{last.lineno} ({last.name})"
