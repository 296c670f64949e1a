"""Prompts computed once: what a model keeps of them, and how callers pass it on without knowing what it is."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TypeVar

from torch import Tensor

AnyPrefix = TypeVar("AnyPrefix", bound="Prefix")


class Prefix:
    """What a model computed of several prompts, each without padding. Image and answer rows are computed over it.

    `parts[i]` are the tensors of prompt i (keys and values, or the states of a text encoder, as the model defines),
    `lengths[i]` how many positions it has, `next_position[i]` the absolute position of what follows it.
    """

    def __init__(
        self, parts: Sequence[Sequence[Tensor]], lengths: Sequence[int], next_position: Sequence[int] | None = None
    ):
        self.parts = [list(part) for part in parts]
        self.lengths = list(lengths)
        self.next_position = list(lengths if next_position is None else next_position)

    def __len__(self) -> int:
        return len(self.parts)

    def __add__(self: AnyPrefix, other: Prefix) -> AnyPrefix:
        made = copy(self)
        made.parts = self.parts + other.parts
        made.lengths = self.lengths + other.lengths
        made.next_position = self.next_position + other.next_position
        return made

    def select(self: AnyPrefix, prompts: Sequence[int]) -> AnyPrefix:
        """The prompts of the given indices, in that order. Nothing is copied."""
        made = copy(self)
        made.parts = [self.parts[i] for i in prompts]
        made.lengths = [self.lengths[i] for i in prompts]
        made.next_position = [self.next_position[i] for i in prompts]
        return made

    def tensors(self) -> list[Tensor]:
        """All tensors, prompt after prompt."""
        return [tensor for part in self.parts for tensor in part]

    def with_tensors(self: AnyPrefix, tensors: Sequence[Tensor]) -> AnyPrefix:
        """The same prompts with other tensors in the order of :meth:`tensors`: copies, or leaves of another graph."""
        made, left = copy(self), iter(tensors)
        made.parts = [[next(left) for _ in part] for part in self.parts]
        return made
