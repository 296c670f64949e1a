"""A plain function as a reward model: ``f(prompts, images, **columns) -> list[float]``.

    def red(prompts, images, **columns):
        return images[:, 0].mean(dim=(1, 2)).tolist()

    Ensemble({"red": RewardFunction(red)}, {"red": 1.0})

The function is called with keywords: `prompts`, a list of R texts; `images` [R, 3, H, W] in [-1, 1]; `answers`, where
the model answered; and every column of the prompt list by its name. One without ``**columns`` gets those it names.
Where a model writes it is ``f(prompts, completions, **columns)``: `completions` is a list of R texts, and there are no
images.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

from ..utils.errors import UserError
from .base import RewardBatch, shape_of

Function = Callable[..., "Sequence[float] | Tensor"]


class RewardFunction:
    """`function` as a :class:`~pyunictokens.rewards.base.RewardModel`. Raises UserError where it cannot be called so.

    name: what errors call it; by default the function's own name.
    """

    def __init__(self, function: Function, name: str | None = None):
        if not callable(function):
            raise UserError(f"a reward function must be callable, is a {type(function).__name__}")
        self.function = function
        self.name = name or (function.__name__ if inspect.isroutine(function) else type(function).__name__)
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # some functions written in C tell nothing
            parameters = ()  # type: ignore[assignment]
        given = ("prompts", "images", "completions")
        by_name = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        self.columns = tuple(each.name for each in by_name if each.default is each.empty and each.name not in given)
        """Columns without which it cannot be called."""
        self._needs = {each.name for each in by_name if each.default is each.empty} & {"images", "completions"}
        takes_all = not parameters or any(each.kind is each.VAR_KEYWORD for each in parameters)
        self._wanted = None if takes_all else {each.name for each in parameters}
        if self._wanted is not None and not self._wanted & {"prompts", "images", "completions"}:
            raise UserError(f"{self.name}({', '.join(sorted(self._wanted))}): a reward function takes prompts, images")

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R], float32, on the images' device. Raises UserError naming the prompt whose value is no number."""
        there = "completions" if batch.completions else "images"
        if self._needs - {there}:
            raise UserError(
                f"{self.name} asks for {', '.join(sorted(self._needs - {there}))}, and this model gives {there}: take "
                f"f(prompts, {there}, **columns)"
            )
        given: dict[str, object] = {"answers": list(batch.answers)} if batch.answers else {}
        given |= {name: list(values) for name, values in batch.columns.items()}
        given["prompts"] = list(batch.prompts)
        given[there] = list(batch.completions) if batch.completions else batch.images
        if self._wanted is not None:
            given = {name: value for name, value in given.items() if name in self._wanted}
        found = self.function(**given)
        rows = len(batch)
        if isinstance(found, Tensor):
            if found.shape != (rows,):
                raise UserError(f"{self.name} returned {shape_of(found)} for {rows} images: must be one each")
            return found.detach().to(batch.images.device, torch.float32)
        if isinstance(found, (str, bytes)) or not isinstance(found, Iterable):
            raise UserError(f"{self.name} returned a {type(found).__name__}: must be a list of {rows} numbers")
        found = list(found)
        if len(found) != rows:
            raise UserError(
                f"{self.name} returned {len(found)} numbers for {rows} images: must be one an image; first prompt "
                f"{batch.prompts[0]!r}"
            )
        values = [_number(value) for value in found]
        for row, value in enumerate(values):
            if value is None:
                raise UserError(
                    f"{self.name} gave {found[row]!r} for image {row} (prompt {batch.prompts[row]!r}): must be a number"
                )
        return torch.tensor(values, dtype=torch.float32, device=batch.images.device)


def _number(value: object) -> float | None:
    """`value` as a float (also of numpy and torch); None for what is no number."""
    if isinstance(value, (str, bytes)) or not isinstance(value, SupportsFloat):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers
        return None
