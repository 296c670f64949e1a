"""Which of two forms of the same work is faster on this card: tried once per case, then remembered.

The two forms of `engine.Head`: "rows" (the library's product, then a kernel that keeps or passes over each row) and
"product" (`scores.score_tiles`, whose epilogue forms the statistics). What the better one is depends on the card, the
library's version and the shape, so arithmetic does not decide it. The first piece of the first call of a case is
computed by both a few times, which changes no result; nothing is tried while a CUDA graph is captured.

The forms differ in the order of their sums, so that a choice made anew could change last bits. Choices are therefore
kept in a file (`file()`), where the first one made of a case stays; torch.use_deterministic_algorithms means "rows".
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from .launch import capturing

SOFTWARE = f"torch {torch.__version__}, Triton {triton.__version__}"
FORMS = ("rows", "product")
ROUNDS = 5
"""Times that each form is timed, in turn, after one call that compiles it."""
AGREE = 0.02
"""Relative difference of gradients beyond which the second form is taken for broken: 16-bit rounding is a tenth."""

COMPARED = 256
"""Rows whose gradients are compared."""


@dataclass(frozen=True)
class Key:
    """One case: what the faster form depends on."""

    card: str
    software: str
    """Versions of torch and Triton."""
    dtype: str
    rows: int
    """Rows of a piece, rounded up to a power of two."""
    width: int
    entries: int
    bias: bool
    counted: bool
    """Whether the number of rows is known on the device alone."""


@dataclass(frozen=True)
class Choice:
    """What was found: the form, and the seconds of each (none where a form could not run)."""

    form: str | None
    seconds: dict[str, float]


UNKNOWN = Choice(None, {})
"""Of a case that was not met yet."""

_choices: dict[Key, Choice] | None = None


def bucket(rows: int) -> int:
    """Rows rounded up to a power of two: masks keep another number of tokens each time."""
    return 1 << max(rows - 1, 0).bit_length()


def file() -> Path:
    """Where choices are kept: PYUNICTOKENS_PLANS, else pyunictokens/plans.json in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PYUNICTOKENS_PLANS") or Path(cache) / "pyunictokens" / "plans.json")


def _kept() -> dict[Key, Choice]:
    """What the file holds.

    Raises:
        ValueError: it is not one that this module wrote.
    """
    found: dict[Key, Choice] = {}
    try:
        for each in json.loads(file().read_text(encoding="utf-8")):
            found[Key(**each["case"])] = Choice(each["form"], each["seconds"])
    except OSError:  # none yet, or none that can be read: measured anew
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file()}: no file of measured choices ({error!r}); delete it") from error
    return found


def choices() -> dict[Key, Choice]:
    """Everything remembered, here and in the file. Raises ValueError where that is no file of choices."""
    global _choices
    if _choices is None:
        _choices = _kept()
    return _choices


def _remember(key: Key, choice: Choice) -> Choice:
    """Keep a choice, in the file as well where it was measured; that of another process which was first stands."""
    choices()[key] = choice
    if choice.seconds:
        kept = _kept()
        choices()[key] = choice = kept.setdefault(key, choice)
        content = [{"case": dataclasses.asdict(k), **dataclasses.asdict(c)} for k, c in kept.items()]
        part = file().with_name(f"{file().name}.{os.getpid()}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            part.replace(file())
        except OSError as error:
            warnings.warn(
                f"{file()}: {error}; the next process measures again (PYUNICTOKENS_PLANS names another file)",
                RuntimeWarning,
                stacklevel=3,
            )
    return choice


def remembered(key: Key, like: Tensor) -> str | None:
    """The form of a case; None where it is to be measured (`faster`)."""
    if torch.are_deterministic_algorithms_enabled():
        return "rows"
    known = choices().get(key, UNKNOWN).form
    return known or (None if like.is_cuda and not capturing(like) else "rows")


def faster(key: Key, run: Callable[[str], None], gradient: Tensor) -> str:
    """Time `run(form)` for both forms on the current stream, and remember the faster.

    `gradient` is what both write: a form that cannot run, or writes something else, is said in a warning and not taken.
    """
    try:
        gradient.zero_()  # rows beyond a count are nobody's
        run("rows")
        wanted = gradient[:COMPARED].to(torch.float32, copy=True)
        run("product")
        wrong = difference(gradient[:COMPARED].float(), wanted)
        if not wrong <= AGREE:
            raise ArithmeticError(f"gradients differ by {wrong:.1e}, allowed {AGREE:g}")
        seconds = _timed(run)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, a driver's: training goes on by the form that needs neither
        warnings.warn(
            f"softmax statistics in the product's epilogue: {type(error).__name__}: {str(error)[:300]}; the row kernel "
            f"forms them ({key})",
            RuntimeWarning,
            stacklevel=2,
        )
        seconds = {}
    form = min(seconds, key=seconds.__getitem__, default="rows")
    return _remember(key, Choice(form, seconds)).form or "rows"


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative difference of two tensors; NaN where one of them alone is NaN."""
    both = torch.isnan(found) & torch.isnan(wanted)
    off = torch.where((found == wanted) | both, 0.0, found - wanted)
    return float(off.norm() / wanted.nan_to_num().norm().clamp_min(1e-30))


def _timed(run: Callable[[str], None]) -> dict[str, float]:
    """Median seconds of each form, in alternating order."""
    taken: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form in FORMS:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(form)
            end.record()
            end.synchronize()
            taken[form].append(begin.elapsed_time(end) / 1e3)
    return {form: statistics.median(times) for form, times in taken.items()}
