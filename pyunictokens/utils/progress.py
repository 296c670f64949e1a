"""How far the work is: one form of call for everything that takes longer than a moment.

Trainers, evaluation and the readers of folders call it; the command line draws bars from it (cli/shell.py), a notebook
or a service whatever it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

Numbers = Mapping[str, object]
"""What there is to tell of the step just done, by name; `note` is a word for people."""


NO_NUMBERS: Numbers = MappingProxyType({})


class Progress(Protocol):
    """``progress("grpo", 3, 100, {"loss": 0.2})``: of the part `what`, `done` of `wanted` steps are done."""

    def __call__(self, what: str, done: int, wanted: int, numbers: Numbers = ..., /) -> None: ...


def silent(what: str, done: int, wanted: int, numbers: Numbers = NO_NUMBERS, /) -> None:
    """Tells nobody."""


def note_of(numbers: Numbers) -> str:
    """The one thing to show beside a bar: the note, the mean reward, or the loss."""
    if numbers.get("note"):
        return str(numbers["note"])
    shown = ((key, numbers.get(key)) for key in ("reward_mean", "loss"))
    return next((f"{key} {value:.3f}" for key, value in shown if isinstance(value, float)), "")
