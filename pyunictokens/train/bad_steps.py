"""What happens to a step whose numbers are not finite: one policy for the concept stages and for reinforcement.

The step is left out: nothing is learned from it, or from the inner epochs that remain. It is counted and logged, and
the noise moves on, so the next step draws otherwise. `most` of them in a row end the run with a diagnosis, behind a
checkpoint from which it may go on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .collector import Group


class BadSteps:
    """Counts the steps that were left out."""

    def __init__(self, most: int, log: logging.Logger, speaks: bool = True):
        self.most, self.log, self.speaks = most, log, speaks
        self.total = self.row = 0
        """Left out in all, and without a good one between."""

    def count(self, step: str, problem: str) -> None:
        """A step is over; `problem` says what was not finite, "" where all was."""
        if not problem:
            self.row = 0
            return
        self.total, self.row = self.total + 1, self.row + 1
        if self.speaks:
            self.log.warning("%s is left out: %s", step, problem)

    @property
    def too_many(self) -> bool:
        """Whether the run ends."""
        return self.row >= self.most

    @property
    def carried(self) -> int:
        """What a checkpoint keeps of the row: who resumes an ended run has as many tries again."""
        return 0 if self.too_many else self.row

    def diagnosis(self, last: str, checkpoint: str, problem: str, advice: str) -> str:
        """Why the run ends."""
        return (
            f"{self.most} steps in a row, the last of them {last}, are not finite: {problem}. They were left out; the "
            f"checkpoint of {checkpoint} stands behind them: --resume goes on with other draws. If it comes again, "
            f"{advice}"
        )


def invalid_rewards(groups: Sequence[Group]) -> str:
    """Which rewards are not finite, and which reward model gave them for what; "" where all are."""
    rewards = torch.cat([group.summary.rewards for group in groups])
    if torch.isfinite(rewards).all():
        return ""
    words = [words for group in groups for words in group.summary.invalid]
    return f"rewards {[round(value, 4) for value in rewards.tolist()]}" + (f" ({words[0]})" if words else "")
