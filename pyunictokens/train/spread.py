"""Whether rewards differ inside the groups at all: what all rollouts of a group have alike teaches nothing.

A reward model that answers with a constant (a judge that always says 5, weights of 0, a face that is never found)
raises no error and lets a run of days learn nothing, so it is said while it trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .collector import Group

FLAT_GROUPS = 5
"""Groups in a row without spread before it is said; it is said again whenever their number has doubled."""
_SAME = 1e-6
"""Rewards nearer than this are one: the same image in another batch is rounded otherwise."""


def is_flat(group: Group) -> bool:
    """Whether all rollouts of the group have one reward, so that their advantages are nothing but rounding."""
    rewards = group.summary.rewards
    return float(rewards.max() - rewards.min()) <= _SAME * max(1.0, float(rewards.abs().max()))


class SpreadWatch:
    """Counts groups in a row whose rollouts all have the same reward."""

    def __init__(self) -> None:
        self.flat = 0
        self._due = FLAT_GROUPS

    def see(self, groups: Sequence[Group]) -> str:
        """Take note of a step's groups; returns what there is to say, mostly nothing."""
        said = ""
        for group in groups:
            rewards = group.summary.rewards
            if not torch.isfinite(rewards).all():  # said elsewhere
                continue
            if not is_flat(group):
                self.flat, self._due = 0, FLAT_GROUPS
                continue
            self.flat += 1
            if self.flat == self._due:
                said, self._due = self._words(group), 2 * self._due
        return said

    def _words(self, group: Group) -> str:
        rewards, parts = group.summary.rewards, group.summary.parts
        of = ", ".join(f"{name} {_range(values)}" for name, values in parts.items())
        return (
            f"in {self.flat} groups in a row all {len(rewards)} rollouts had one reward (the last: "
            f"{float(rewards.mean()):.4g}{f'; {of}' if of else ''}), so nothing is learned from them. Look at samples/ "
            "and at what each reward model answers: one that gives every image the same number, or the weight 0 to all "
            "that differ, cannot teach; where the images themselves are all alike, raise temperature or group_size"
        )


def _range(values: torch.Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g}" if high - low <= _SAME * max(1.0, abs(high)) else f"{low:.4g} to {high:.4g}"
