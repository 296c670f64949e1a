"""Limits of numbers among settings: an error names setting, value and limit."""

from __future__ import annotations

import math

from ..utils.errors import UserError

MAX_SEED = 2**31 - 1
MOST = 65536
"""Of anything that is made row by row or token by token: more is a slip of the keyboard, and memory for none of it."""


def at_least(low: float, **values: float) -> None:
    """Raise UserError for a number below `low`, or one that is not finite."""
    for name, value in values.items():
        if not low <= value < math.inf:  # a NaN fails too
            raise UserError(f"{name}={value}: must be ≥ {low:g}")


def above(low: float, **values: float) -> None:
    """Raise UserError for a number that is not above `low`, or not finite."""
    for name, value in values.items():
        if not low < value < math.inf:
            raise UserError(f"{name}={value}: must be > {low:g}")


def within(low: float, high: float, **values: float) -> None:
    """Raise UserError for a number that is not from `low` to `high`."""
    for name, value in values.items():
        if not low <= value <= high:
            raise UserError(f"{name}={value}: must be between {low:g} and {high:g}")
