"""Dynamic scaling of the group (DSOG): bad candidates leave at a preview, the threshold follows the policy.

    Δ = TPR − PR,   T ← T^(1 + μΔ − ετΔ),   τ ← ητ + (1 − η)(T_new − T_old),   ε = ε0 where τΔ > 0, else 0

(paper, section 3.3.1, equations 9 and 10). `DsogThreshold` is that rule, `Dsog` what a caller chooses, `Selection` the
bookkeeping of one group: which candidate runs in which row, who passed, who fills a row when the cap on candidates is
reached. It decides over numbers and ids only; tensors, models and images are the business of images.py.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import UserError

LOWEST, HIGHEST = 0.01, 0.99
"""The threshold stays inside: at 0 or 1 the power rule could never move it again."""

ATTEMPT_SHIFT = 32
"""Candidate a of the row with sample id i draws the noise of sample id i + a·2^32."""


class DsogThreshold:
    """The preview threshold T and its trend τ (equations 9 and 10).

    >>> DsogThreshold().update(0.1)  # few passed: the threshold falls
    0.4938...
    """

    def __init__(
        self,
        initial: float = 0.5,
        target_pass_rate: float = 0.25,
        mu: float = 0.12,
        eta: float = 0.8,
        epsilon0: float = 2.0,
    ):
        if not LOWEST <= initial <= HIGHEST:
            raise UserError(f"initial={initial}: the DSOG threshold must lie in {LOWEST}…{HIGHEST}")
        if not 0 <= target_pass_rate <= 1:
            raise UserError(f"target_pass_rate={target_pass_rate}: must lie in 0…1")
        if not 0 < eta < 1:
            raise UserError(f"eta={eta}: must lie between 0 and 1")
        if not (mu >= 0 and epsilon0 >= 0 and math.isfinite(mu + epsilon0)):
            raise UserError(f"mu={mu}, epsilon0={epsilon0}: must be finite and ≥ 0")
        self.target_pass_rate, self.mu, self.eta, self.epsilon0 = target_pass_rate, mu, eta, epsilon0
        self.value, self.trend = float(initial), 0.0

    def update(self, pass_rate: float) -> float:
        """Take one group's pass rate in 0…1 and return the new threshold."""
        if not 0 <= pass_rate <= 1:
            raise UserError(f"pass_rate={pass_rate}: must lie in 0…1 (accepted / previewed)")
        delta = self.target_pass_rate - pass_rate
        epsilon = self.epsilon0 if self.trend * delta > 0 else 0.0
        new = self.value ** (1 + self.mu * delta - epsilon * self.trend * delta)
        new = min(max(new, LOWEST), HIGHEST)
        self.trend = self.eta * self.trend + (1 - self.eta) * (new - self.value)
        self.value = new
        return new

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep: value and trend."""
        return {"value": self.value, "trend": self.trend}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`."""
        value, trend = float(state["value"]), float(state["trend"])
        if not (LOWEST <= value <= HIGHEST and math.isfinite(trend)):
            raise UserError(f"DSOG state value={value}, trend={trend}: value must lie in {LOWEST}…{HIGHEST}")
        self.value, self.trend = value, trend


@dataclass
class Dsog:
    """How candidates are previewed in one call of `generate_images`. The group is all rows of the call."""

    threshold: DsogThreshold
    """Asked once at the start of the group and updated once at its end, by the engine."""
    scorer: Callable[[Tensor, Tensor], Tensor]
    """(pixels [P, 3, H, W], prompt_index int64 [P]) → scores [P]; a preview passes when its score is above the
    threshold. One that raises, or gives NaN, fails its previews; the report says so."""
    preview_step: int | None = None
    """Steps a candidate runs before it is looked at; None means max(1, T // 5)."""
    max_candidates: int = 8
    """At most max_candidates · rows candidates are started; past it the best rejected previews fill the group."""
    reduce: Callable[[int, int], tuple[int, int]] | None = None
    """(accepted, previewed) of this process → of all ranks, so that every rank's threshold moves alike."""

    def __post_init__(self) -> None:
        if self.max_candidates < 1:
            raise UserError(f"max_candidates={self.max_candidates}: must be ≥ 1 (candidates for each row of the group)")
        if self.preview_step is not None and self.preview_step < 1:
            raise UserError(f"preview_step={self.preview_step}: must be ≥ 1 (default: a fifth of the steps)")

    def preview_at(self, steps: int) -> int:
        """Steps run before the preview, for a generation of `steps`."""
        at = max(1, steps // 5) if self.preview_step is None else self.preview_step
        if at > steps:
            raise UserError(f"preview_step={at}: must be ≤ steps={steps}")
        return at


@dataclass
class Candidate:
    """One trajectory in the making: the row it runs in, its number there, and the steps it has done."""

    row: int
    sample_id: int
    attempt: int = 0
    step: int = 0
    settled: bool = True
    """Runs to the end: accepted, chosen to fill, or never to be previewed."""
    score: float = math.nan


@dataclass(order=True)
class _Rejected:
    score: float
    age: int
    candidate: Candidate = field(compare=False)
    state: Any = field(compare=False)


class Selection:
    """The candidates of one group of rows.

    `kinds[row]` says which rows are interchangeable (same prompt, same known codes): a rejected candidate may fill any
    row of its kind. Every row starts with one candidate and at most `cap` are started in all, so every loop ends.
    """

    def __init__(self, sample_ids: Sequence[int], kinds: Sequence[int], threshold: float, cap: int):
        self._base, self._kinds, self._threshold = list(sample_ids), list(kinds), threshold
        self._left = cap - len(self._base)
        if self._left < 0:
            raise ValueError(f"cap={cap}: must be ≥ {len(self._base)}, one candidate a row")
        self._best: dict[int, list[_Rejected]] = {}
        self._vacant: list[int] = []
        self.accepted = self.previewed = self.filled = 0

    def judge(self, candidate: Candidate, score: float, save: Callable[[], Any]) -> Candidate | None:
        """Settle a previewed candidate. Returns who runs in its row next: itself when it passed, a fresh candidate when
        not, None when no more may be started (the row waits for :meth:`fill`). `save` keeps its state if it may be
        wanted again."""
        self.previewed += 1
        candidate.score = score if math.isfinite(score) else -math.inf
        if candidate.score > self._threshold:
            self.accepted += 1
            candidate.settled = True
            return candidate
        self._remember(candidate, save)
        row = candidate.row
        if self._left == 0:
            self._vacant.append(row)
            return None
        self._left -= 1
        attempt = candidate.attempt + 1
        return Candidate(row, self._base[row] + (attempt << ATTEMPT_SHIFT), attempt, settled=False)

    def _remember(self, candidate: Candidate, save: Callable[[], Any]) -> None:
        kind = self._kinds[candidate.row]
        best = self._best.setdefault(kind, [])
        entry = _Rejected(candidate.score, -self.previewed, candidate, None)
        if len(best) < self._kinds.count(kind):
            entry.state = save()
            heapq.heappush(best, entry)
        elif best[0] < entry:
            entry.state = save()
            heapq.heapreplace(best, entry)

    def fill(self) -> list[tuple[Candidate, Any]]:
        """Give every vacant row the best rejected candidate of its kind, with its saved state.

        Call it when no candidate is left to judge.
        """
        chosen = []
        for best in self._best.values():
            best.sort(reverse=True)
        for row in self._vacant:
            entry = self._best[self._kinds[row]].pop(0)
            candidate = entry.candidate
            candidate.row, candidate.settled = row, True
            chosen.append((candidate, entry.state))
        self.filled += len(chosen)
        self._vacant = []
        return chosen
