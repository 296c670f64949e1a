"""Image rows of many requests in one batch: each with a prompt, a number of steps, guidance and a seed of its own.

It is the step of rollout/sampler.py; only what is one number for all rows there is one a row here. Rows come and go
between any two steps, by bookkeeping alone: prompts are gathered at the next step, where what fails is told to those it
concerns.

Shape suffixes: B rows of one step, N image codes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from operator import add

import torch
from torch import Tensor

from ...models import MaskedModel, Prefix
from ...utils.memory import RowLimit
from ..head import GuidedStates
from ..sampler import EagerSlots, LoopSettings, StepNumbers
from ..scheduler import Candidate


@dataclass(frozen=True)
class RowNumbers:
    """What one row is sampled with."""

    steps: int
    strength: float
    """s in (1 + s)·cond − s·uncond; 0: no guidance."""
    temperatures: Sequence[float]
    """Of the re-masking noise at each step."""
    wanted: Sequence[int]
    """Codes to stay masked after each step."""
    seed: int


class MixedSlots(EagerSlots):
    """Slots of one number of codes. A candidate's row is its slot."""

    def __init__(
        self,
        model: MaskedModel,
        empty: Prefix,
        slots: int,
        count: int,
        schedule: str,
        *,
        limit: RowLimit,
        backend: str | None,
        head: str = "auto",
    ):
        nobodys = LoopSettings(1, 0.0, 0.0, schedule, 0, False, slots, backend, head)
        rows = [0] * slots
        super().__init__(model, empty, rows, rows, slots, count, nobodys, limit=limit, keep_first=False)
        self._empty = empty
        self._prompts: dict[int, Prefix] = {}
        self._own: dict[int, RowNumbers] = {}
        self._gathered = True

    def seat(self, candidate: Candidate, known: Tensor, prompt: Prefix, look: int, numbers: RowNumbers) -> None:
        """Put a candidate into its slot, over the one prompt of `prompt`. Rows of one `look` begin with the same known
        codes."""
        slot = candidate.row = candidate.slot
        self.place(candidate, known)
        self._look_of_row[slot], self._own[slot], self._prompts[slot] = look, numbers, prompt
        self._gathered = False

    def leave(self, slots: Sequence[int]) -> None:
        """These slots are free."""
        for slot in slots:
            del self._own[slot], self._prompts[slot]
        self._gathered = False

    def run(self, active: Sequence[Candidate], steps: int = 1) -> None:
        if not self._gathered:
            self._gather()
        super().run(active, steps)

    def _gather(self) -> None:
        """The prompts that are read now, those of one request once, and the unconditional one last."""
        distinct = {id(prompt): prompt for prompt in self._prompts.values()}
        place = {key: number for number, key in enumerate(distinct)}
        self.prompts = reduce(add, [*distinct.values(), self._empty])
        for slot, prompt in self._prompts.items():
            self._prompt_of_row[slot] = place[id(prompt)]
        self._gathered = True

    def _order(self, candidate: Candidate) -> tuple[int, ...]:
        own = self._own[candidate.slot]  # guided rows first, rows of one seed side by side
        return int(own.strength == 0), own.seed, *super()._order(candidate)

    def _numbers(self, active: Sequence[Candidate], at: list[int], steps: Tensor) -> StepNumbers:
        own, device = [self._own[candidate.slot] for candidate in active], self.codes.device
        totals = torch.tensor([its.steps for its in own])
        wanted = torch.tensor([its.wanted[step] for its, step in zip(own, at, strict=True)])
        heat = [its.temperatures[step] for its, step in zip(own, at, strict=True)]
        return StepNumbers(steps / totals.to(device), wanted.to(device), torch.tensor(heat).to(device))

    def _seeds(self, active: Sequence[Candidate]) -> list[tuple[slice, int]]:
        runs, start = [], 0
        for seed, rows in groupby(self._own[candidate.slot].seed for candidate in active):
            count = len(list(rows))
            runs.append((slice(start, start + count), seed))
            start += count
        return runs

    def _states(self, active: Sequence[Candidate], at: list[int], codes: Tensor, timestep: Tensor) -> GuidedStates:
        strengths = [self._own[candidate.slot].strength for candidate in active]
        guided = sum(strength > 0 for strength in strengths)
        looks = [-1 - row if step else self._look_of_row[active[row].slot] for row, step in enumerate(at)]
        cond = [(self._prompt_of_row[candidate.slot], look) for candidate, look in zip(active, looks, strict=True)]
        empty = len(self.prompts) - 1
        hidden = self._hidden_of(cond + [(empty, look) for look in looks[:guided]], codes, timestep)
        if not guided:
            return GuidedStates(hidden)
        rows, strength = len(active), torch.tensor(strengths[:guided], dtype=torch.float64)
        return GuidedStates(hidden[:rows], hidden[rows:], strength)
