"""How much there is to gain: the reward of reference images beside that of the model's own, at the start of a run.

A reward whose value for the true image hardly lies above its value for what the model draws already can teach nothing,
however long the run. A task has a reference where somebody knows what a good picture looks like: the photo that a
concept's question is about, or the file in the column `reference_image` of a prompt list.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..rewards.base import RewardBatch, Rewards
from ..utils.errors import UserError
from ..utils.files import write_json
from ..utils.timeout import ask
from .collector import Group
from .tasks import TaskSource

log = logging.getLogger(__name__)

FILE = "headroom.json"
TASKS = 4
"""Tasks with a reference that are looked at before it is said."""
LITTLE = 0.02
"""Below this the headroom is called none."""


@dataclass(frozen=True)
class Headroom:
    """Mean rewards over some tasks."""

    references: float
    own: float
    tasks: int

    @property
    def gap(self) -> float:
        return self.references - self.own

    def __str__(self) -> str:
        return (
            f"reward of reference images {self.references:.2f}, of your model {self.own:.2f}: headroom {self.gap:.2f}"
        )

    def say(self, folder: Path) -> None:
        """Log it, and write it into the run's folder."""
        write_json(folder / FILE, {"references": self.references, "own": self.own, "tasks": self.tasks})
        if self.gap < LITTLE:
            log.warning(
                "%s: none. This reward does not prefer the true images to what the model draws already, so "
                "reinforcement can gain little by it: use a reward that looks closer, or harder prompts",
                self,
            )
        else:
            log.info("%s", self)


class FirstGroups:
    """Counts the headroom of the first tasks of a run that have a reference, from groups that are sampled anyway.

    Nothing is asked of the rewards before there are enough tasks, and a reward that fails on reference images is
    reported, not the end of the run.
    """

    def __init__(self, tasks: TaskSource, rewards: Rewards, folder: Path, seconds: float = 0.0):
        self._tasks, self._rewards, self._folder, self._seconds = tasks, rewards, folder, seconds
        self._found: list[tuple[RewardBatch, float]] = []
        self._open = True

    def look(self, groups: Sequence[Group]) -> None:
        """The groups of a step. Says the headroom once, when there are enough tasks."""
        self._open = self._open and not (self._folder / FILE).exists()
        for group in groups if self._open else ():
            batch, own = self._tasks.reference(group.task), float(group.summary.rewards.mean())
            if batch is not None and math.isfinite(own):
                self._found.append((batch, own))
        if self._open and len(self._found) >= TASKS:
            self._open = False
            self._say()

    def _say(self) -> None:
        try:
            scores = [
                ask("scoring a reference image", self._rewards.score, batch, seconds=self._seconds).total
                for batch, _ in self._found
            ]
        except UserError as error:
            log.warning("the headroom is not known: %s", error)
            return
        count = len(self._found)
        true, own = float(torch.cat(scores).float().mean()), sum(own for _, own in self._found) / count
        Headroom(true, own, count).say(self._folder)
