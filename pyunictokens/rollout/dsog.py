"""Dynamic scaling of the group (DSOG): bad candidates leave at a preview, the threshold follows the policy.

    Δ = TPR − PR,   T ← T^(1 + μΔ − ετΔ),   τ ← ητ + (1 − η)(T_new − T_old),   ε = ε0 where τΔ > 0, else 0

(paper, section 3.3.1, equations 9 and 10). `DsogThreshold` is that rule, `Dsog` what a caller chooses, :func:`settle`
the end of a group. Which candidate runs where, and which one stays, is scheduler.py's business; decoding and scoring
that of previews.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.errors import UserError
from .scheduler import Candidate, Judging, Scheduler
from .types import DsogReport

LOWEST, HIGHEST = 0.01, 0.99
"""The threshold stays inside: at 0 or 1 the power rule could never move it again."""


class DsogThreshold:
    """The preview threshold T and its trend τ (equations 9 and 10).

    Args:
        initial: the first threshold, in 0.01…0.99.
        target_pass_rate: TPR, the share of previews that should pass, in 0…1.
        mu: how strongly the threshold follows the pass rate, ≥ 0.
        eta: how slowly the trend changes, between 0 and 1.
        epsilon0: how strongly the trend works against a turn, ≥ 0.

    Raises:
        UserError: a value outside these ranges.

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

    def start_at(self, scores: Iterable[float]) -> float:
        """Start where `target_pass_rate` of `scores` pass; returns the threshold. Scores that are not finite count as
        failed, and where none is finite the threshold stays."""
        finite = sorted((score if math.isfinite(score) else -math.inf for score in scores), reverse=True)
        if finite and math.isfinite(finite[0]):
            passing = round(self.target_pass_rate * len(finite))
            around = finite[max(passing - 1, 0) : passing + 1]
            low = around[-1] if math.isfinite(around[-1]) else around[0] - 1e-3
            self.value, self.trend = min(max((around[0] + low) / 2, LOWEST), HIGHEST), 0.0
        return self.value

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

    threshold: DsogThreshold | float
    """Asked once at the start of the group and updated once at its end, by the engine. A number stays as it is: for
    callers that spread a group over processes, count all of it and then move their threshold themselves."""
    scorer: Callable[[Tensor, Tensor], Tensor]
    """(pixels [P, 3, H, W], prompt_index int64 [P]) → scores [P]; a preview passes when its score is above the
    threshold. One that raises, or gives NaN, fails its previews; the report says so."""
    preview_step: int | None = None
    """Steps a candidate runs before it is looked at; None means max(1, T // 5)."""
    max_candidates: int = 8
    """At most max_candidates · rows candidates are started; past it the best rejected previews fill the group."""
    cap_by_row: bool = False
    """Each row has max_candidates of its own and is filled from its own only. Then a row's outcome depends on nothing
    but itself, so that a group may be spread over any number of ranks; otherwise the cap holds for the rows of a
    call."""
    only_previews: bool = False
    """Stop at the previews: nothing is rejected, rows hold their codes as they were drawn there, and the report has the
    scores. For a caller that wants to know how scores lie before it sets a threshold."""
    overlap: bool = False
    """The scorer may be called from another thread while the other rows take a step: it shares nothing with anybody."""

    def __post_init__(self) -> None:
        if self.max_candidates < 1:
            raise UserError(f"max_candidates={self.max_candidates}: must be ≥ 1 (candidates for each row of the group)")
        if self.preview_step is not None and self.preview_step < 1:
            raise UserError(f"preview_step={self.preview_step}: must be ≥ 1 (default: a fifth of the steps)")

    @property
    def level(self) -> float:
        """What previews are compared with now."""
        return self.threshold.value if isinstance(self.threshold, DsogThreshold) else self.threshold

    def preview_at(self, steps: int) -> int:
        """Steps run before the preview, for a generation of `steps`."""
        at = max(1, steps // 5) if self.preview_step is None else self.preview_step
        if at > steps:
            raise UserError(f"preview_step={at}: must be ≤ steps={steps}")
        return at

    def judging(self, steps: int, rows: int) -> Judging:
        """The scheduler's view of this, for a generation of `steps` and `rows`."""
        cap = self.max_candidates * (1 if self.cap_by_row else rows)
        return Judging(self.preview_at(steps), self.level, cap, self.cap_by_row, self.only_previews)


def settle(
    dsog: Dsog, scheduler: Scheduler, ended: list[Candidate], preview_codes: Tensor, errors: list[str]
) -> DsogReport:
    """Move the threshold, warn of rows that had to be filled, and write the report of a group that is complete."""
    accepted, previewed = scheduler.accepted, scheduler.previewed
    pass_rate, before = accepted / previewed, dsog.level
    after = dsog.threshold.update(pass_rate) if isinstance(dsog.threshold, DsogThreshold) else before
    if scheduler.filled:
        warnings.warn(
            f"{scheduler.filled} of {len(ended)} rows are filled with the best rejected previews: "
            f"{scheduler.previewed} candidates were tried, {scheduler.accepted} scored above {before:.3f}",
            stacklevel=4,
        )
    if errors:
        warnings.warn(f"the DSOG scorer failed {len(errors)} times, first with {errors[0]}", stacklevel=4)
    return DsogReport(
        accepted=accepted,
        previewed=previewed,
        filled=scheduler.filled,
        pass_rate=pass_rate,
        threshold=before,
        next_threshold=after,
        scores=torch.tensor([candidate.score for candidate in ended]),
        attempts=torch.tensor([candidate.attempt for candidate in ended]),
        preview_codes=preview_codes,
        row_steps=scheduler.row_steps,
        errors=errors,
    )
