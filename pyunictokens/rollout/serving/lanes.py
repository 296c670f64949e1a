"""What is under way: rows in lanes, lanes on the bench of their model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from ...models import Prefix
from ..engine import RolloutEngine
from ..scheduler import Candidate
from .answers import AnswerLane
from .images import MixedSlots
from .jobs import Job
from .requests import Event
from .workers import Task


@dataclass(eq=False)
class Running:
    """One image row in its slot."""

    job: Job
    sample: int
    candidate: Candidate
    shows: list[int]
    """Steps after which it is shown, in order."""


LaneStep: TypeAlias = tuple[list[Running], list[Running], list[Event]]
"""What a step of a lane gave: (rows that took it, those of them that are done, events)."""


@dataclass(eq=False)
class Lane:
    """Images of one number of codes of one model, of one worker."""

    slots: MixedSlots
    running: list[Running] = field(default_factory=list)
    task: Task[LaneStep] | None = None
    """The step that its worker is at: meanwhile nobody else touches slots and rows."""

    @property
    def in_turn(self) -> bool:
        """Whether its images take turns (queue.py), as all of a model on a CPU do."""
        return bool(self.running) and self.running[0].job.ticket.in_turn


@dataclass(eq=False)
class Bench:
    """What runs of one model."""

    engine: RolloutEngine
    empty: Prefix | None = None
    """The unconditional prompt."""
    lanes: dict[tuple[int, int], Lane] = field(default_factory=dict)
    """By (codes, worker)."""
    answers: AnswerLane | None = None

    @property
    def busy(self) -> bool:
        return any(lane.running for lane in self.lanes.values()) or bool(self.answers and self.answers.rows)
