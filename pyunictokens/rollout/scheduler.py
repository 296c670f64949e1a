"""Who runs where: rows, candidates and slots of one generation, in plain Python.

A *row* is a place in the result and has candidates, attempt 0, 1, …, of which one stays. A *slot* is a place in the
batch. A candidate holds one slot from its first step until it is rejected or done, and the slot goes to whoever waits
at once.

Invariant, true between any two calls: every row has exactly one candidate that waits, runs, or is being looked at; or
it is vacant (its pool will fill it), or done. A running candidate's slot is its own, and ``0 ≤ step ≤ T``. A row's
attempts begin in order, each after the one before was rejected, so no candidate runs in vain.

**What does not depend on the number of slots.** A row keeps its first attempt that passes. With a cap for the group,
candidates count in the order (attempt, row), as if all rows tried once, then all that failed again, and so on: one
begins only when it is sure to be among the first `cap` of them. So who is accepted, who is rejected and who fills a
vacant row follow from the scores alone, whatever the slots, the batches and the order in which scores arrive. With a
cap for each row this holds for every row by itself, and so for a group that is spread over processes.

It handles numbers and ids; tensors and models are in sampler.py and loop.py. Source: DSOG, the paper's
3.3.1.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sampler import Trajectory

ATTEMPT_SHIFT = 32
"""Candidate a of the row with sample id i draws the noise of sample id i + a·2^32."""


@dataclass(eq=False)
class Candidate:
    """One trajectory in the making."""

    row: int
    sample_id: int
    attempt: int = 0
    step: int = 0
    """Steps it has done."""
    slot: int = -1
    """−1 where it holds none."""
    home: int = -1
    """The slot it takes if that is free: where its row's last candidate was, so that a slot keeps its prompt."""
    settled: bool = True
    """Runs to the end: accepted, chosen to fill, or never to be previewed."""
    score: float = math.nan
    state: Trajectory | None = None
    """What its slot held at the preview, where it was rejected and may be wanted again."""


@dataclass(frozen=True)
class Judging:
    """How candidates are previewed."""

    at: int
    """Steps before the preview, 1 … T."""
    threshold: float
    cap: int
    """Most candidates of the group, or of each row."""
    by_row: bool = False
    """Whether `cap` holds for each row, and a row is filled from its own candidates only."""
    ends: bool = False
    """Whether candidates end at their preview, whatever it scores: the scores are all that is wanted."""


@dataclass(order=True)
class _Rejected:
    score: float
    attempt: int
    """Negative: among equals the earlier attempt, then the lower row, is the better one."""
    row: int
    candidate: Candidate = field(compare=False)


class Scheduler:
    """The candidates of one group of rows over a number of slots.

    `kinds[row]` says which rows are interchangeable (same prompt, same known codes): a rejected candidate may fill any
    row of its kind. The caller goes round: :meth:`admit`, run `running` for at most :meth:`stretch` steps,
    :meth:`advance`, :meth:`judge` those of :meth:`due`, :meth:`done`, until :attr:`finished`.
    """

    def __init__(
        self, sample_ids: Sequence[int], kinds: Sequence[int], slots: int, steps: int, judging: Judging | None = None
    ):
        rows = len(sample_ids)
        least = 0 if judging is None else 1 if judging.by_row else rows
        if judging is not None and judging.cap < least:
            raise ValueError(f"cap={judging.cap}: must be ≥ {least}, one candidate a row")
        self.steps, self.judging = steps, judging
        self.running: list[Candidate] = []
        """Those that step next."""
        self.accepted = self.previewed = self.filled = self.row_steps = 0
        self._base = list(sample_ids)
        self._pool = list(range(rows)) if judging is not None and judging.by_row else list(kinds)
        self._free = list(range(slots))
        self._waiting = [Candidate(row, sample_ids[row], settled=judging is None) for row in range(rows)]
        self._looked_at: list[Candidate] = []
        self._complete: list[Candidate] = []
        self._tried = [0] * rows
        self._open = [judging is not None] * rows
        """Rows whose candidate is not decided yet."""
        self._vacant: dict[int, list[int]] = {}
        self._best: dict[int, list[_Rejected]] = {}

    @property
    def finished(self) -> bool:
        """Nothing runs, waits or is looked at."""
        return not (self._waiting or self.running or self._looked_at or self._complete)

    def admit(self) -> list[Candidate]:
        """Give free slots to those that wait; returns who got one."""
        admitted: list[Candidate] = []
        place = 0
        while place < len(self._waiting) and (self._free or self.judging is not None):
            candidate = self._waiting[place]
            allowed = self._allowed(candidate)
            if allowed is False:
                self._waiting.pop(place)
                self._leave_vacant(candidate.row)
            elif allowed and self._free:
                self._waiting.pop(place)
                candidate.slot = self._take(candidate.home)
                if not candidate.settled or self.judging is None:
                    self._tried[candidate.row] += 1
                admitted.append(candidate)
                self.running.append(candidate)
            else:
                place += 1
        return admitted

    def stretch(self) -> int:
        """Steps until the first running candidate reaches its preview or its end."""
        return min(self._stop(candidate) - candidate.step for candidate in self.running)

    def advance(self, steps: int = 1) -> None:
        """Every running candidate has done `steps` more."""
        for candidate in self.running:
            candidate.step += steps
            if candidate.step > self._stop(candidate):
                raise ValueError(f"a candidate at step {candidate.step} ran past {self._stop(candidate)}")
        self.row_steps += steps * len(self.running)

    def due(self) -> list[Candidate]:
        """Those at their preview. They keep their slots and stand still until :meth:`judge`."""
        due = [c for c in self.running if not c.settled and c.step == self._stop(c)]
        self.running = [c for c in self.running if c not in due]
        self._looked_at += due
        return due

    def judge(self, candidate: Candidate, score: float, save: Callable[[Candidate], Trajectory]) -> None:
        """Settle a previewed candidate. `save` keeps what its slot holds if it may be wanted to fill a row."""
        assert self.judging is not None
        self._looked_at.remove(candidate)
        self.previewed += 1
        candidate.score = score if math.isfinite(score) else -math.inf
        if self.judging.ends:
            candidate.state, candidate.settled = save(candidate), True
            self._free.append(candidate.slot)
            self._open[candidate.row], candidate.slot = False, -1
            self._complete.append(candidate)
            return
        if candidate.score > self.judging.threshold:
            self.accepted += 1
            candidate.settled = True
            self._open[candidate.row] = False
            self.running.append(candidate)
            self._fill(self._pool[candidate.row])
            return
        self._remember(candidate, save)
        row, attempt, home = candidate.row, candidate.attempt + 1, candidate.slot
        self._free.append(home)
        candidate.slot, candidate.home = -1, home
        sample_id = self._base[row] + (attempt << ATTEMPT_SHIFT)
        self._waiting.append(Candidate(row, sample_id, attempt, home=home, settled=False))

    def done(self) -> list[Candidate]:
        """Those that have done all steps. A slot that one holds is free, and stays as it is until the next `admit`."""
        done = [c for c in self.running if c.settled and c.step == self.steps]
        self.running = [c for c in self.running if c not in done]
        self._free += [candidate.slot for candidate in done]
        done, self._complete = self._complete + done, []
        return done

    # --- the rules -------------------------------------------------------------------------------------------------

    def _stop(self, candidate: Candidate) -> int:
        return self.steps if candidate.settled or self.judging is None else self.judging.at

    def _take(self, home: int) -> int:
        """A free slot: `home` if it is one, else the lowest."""
        slot = home if home in self._free else min(self._free)
        self._free.remove(slot)
        return slot

    def _allowed(self, candidate: Candidate) -> bool | None:
        """Whether the cap lets it begin; None while that is not certain."""
        if self.judging is None or candidate.settled:
            return True
        cap, attempt, row = self.judging.cap, candidate.attempt, candidate.row
        if self.judging.by_row:
            return attempt < cap
        if attempt * len(self._base) + row < cap:
            return True
        before = least = attempt  # candidates that count before this one: at most, and at least
        for other, tried in enumerate(self._tried):
            if other != row:
                most = attempt + (other < row)
                least += min(tried, most)
                before += most if self._open[other] else min(tried, most)
        return True if before < cap else False if least >= cap else None

    def _remember(self, candidate: Candidate, save: Callable[[Candidate], Trajectory]) -> None:
        pool = self._pool[candidate.row]
        best = self._best.setdefault(pool, [])
        entry = _Rejected(candidate.score, -candidate.attempt, -candidate.row, candidate)
        if len(best) < self._pool.count(pool):
            candidate.state = save(candidate)
            heapq.heappush(best, entry)
        elif best[0] < entry:
            candidate.state = save(candidate)
            heapq.heapreplace(best, entry).candidate.state = None

    def _leave_vacant(self, row: int) -> None:
        self._open[row] = False
        self._vacant.setdefault(self._pool[row], []).append(row)
        self._fill(self._pool[row])

    def _fill(self, pool: int) -> None:
        """Once all rows of a pool are decided, its vacant rows take the best rejected ones, where they stopped."""
        if any(self._open[row] for row, its in enumerate(self._pool) if its == pool):
            return
        best = sorted(self._best.pop(pool, []), reverse=True)
        for row, entry in zip(sorted(self._vacant.pop(pool, [])), best, strict=False):
            candidate = entry.candidate
            candidate.row, candidate.settled = row, True
            self.filled += 1
            (self._complete if candidate.step == self.steps else self._waiting).append(candidate)
