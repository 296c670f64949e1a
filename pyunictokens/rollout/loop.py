"""The round of one generation: who waits gets a slot, slots step, previews are judged, finished rows leave.

It joins scheduler.py (who), sampler.py (the step) and previews.py (the verdict), and keeps the result row by row.

Shape suffixes: R rows of the result, N image codes, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..utils import profiling
from .previews import Previews, Verdict
from .sampler import EagerSlots, empty_records
from .scheduler import Candidate, Scheduler


class ImageLoop:
    """Draws all rows from `known` int64 [R, N] (−1 unknown). After :meth:`run` the public tensors hold the rollout."""

    def __init__(
        self,
        slots: EagerSlots,
        scheduler: Scheduler,
        known: Tensor,
        previews: Previews | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.slots, self.scheduler, self.previews, self.progress = slots, scheduler, previews, progress
        rows, count = known.shape
        self._known = known
        self.codes = known.clone()
        self.preview_codes = known.clone() if previews else None
        self.ended: dict[int, Candidate] = {}
        """Who each finished row ended with."""
        self.records: tuple[Tensor, ...] = ()
        """(inputs, chosen, logp), each [R, T, N]; empty where nothing is recorded."""
        if slots.settings.record:
            codebook = slots.model.codebook_size
            self.records = empty_records(rows, slots.settings.steps, count, codebook, known.device)

    @profiling.phase("rollout steps")
    def run(self) -> None:
        """Run every row to its last step. After an exception the rows of `ended` are whole."""
        scheduler, slots = self.scheduler, self.slots
        looked_at: tuple[list[Candidate], Verdict] | None = None
        while not scheduler.finished:
            for candidate in scheduler.admit():
                slots.place(candidate, self._known[candidate.row])
            slots.may_capture = looked_at is None
            if scheduler.running:
                steps = 1 if looked_at else min(scheduler.stretch(), slots.stretch)
                slots.run(scheduler.running, steps)
                scheduler.advance(steps)
            if looked_at:
                self._settle(*looked_at)
                looked_at = None
            due = scheduler.due()
            if due:
                assert self.previews is not None
                looked_at = due, self.previews.begin(slots.look(due), [candidate.row for candidate in due])
                if not (self.previews.overlap and scheduler.running):
                    self._settle(*looked_at)
                    looked_at = None
            for candidate in scheduler.done():
                self._keep(candidate)
            self._report()

    def _settle(self, candidates: list[Candidate], verdict: Verdict) -> None:
        """Judge what was looked at. The rows of those that failed start afresh, or wait to be filled."""
        codes = self.slots.look(candidates)
        assert self.preview_codes is not None
        for candidate, score, shown in zip(candidates, verdict(), codes, strict=True):
            self.scheduler.judge(candidate, score, self.slots.save)
            if candidate.settled:
                self.preview_codes[candidate.row] = shown

    def _keep(self, candidate: Candidate) -> None:
        row = candidate.row
        held = candidate.state if candidate.slot < 0 else self.slots.held(candidate)
        assert held is not None
        self.codes[row] = held.chosen
        for record, its in zip(self.records, held.records, strict=True):
            record[row] = its
        if candidate.state is not None and self.preview_codes is not None:
            self.preview_codes[row] = candidate.state.chosen
        candidate.state = None
        self.ended[row] = candidate

    def _report(self) -> None:
        if self.progress is not None:
            steps = self.slots.settings.steps
            under_way = sum(candidate.step for candidate in self.scheduler.running if candidate.settled)
            self.progress(len(self.ended) * steps + under_way, len(self.codes) * steps)

    @property
    def candidates(self) -> list[Candidate]:
        """Who each row ended with, by row, once all have."""
        return [self.ended[row] for row in range(len(self.codes))]

    def rows(self) -> Tensor:
        """int64: the rows that are finished, in their order."""
        return torch.tensor(sorted(self.ended), dtype=torch.int64)
