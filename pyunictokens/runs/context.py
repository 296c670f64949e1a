"""What a run works with, in one object that goes from the command line to the trainers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.concept import Concept
from ..models.bundle import ModelBundle
from ..models.concept_tokens import ConceptTokens
from ..utils.errors import UserError
from ..utils.progress import Progress, silent
from ..utils.signals import Stop, never
from .bundle import Scorers
from .run_dir import CONFIG, RunConfig

if TYPE_CHECKING:
    from ..train.distributed.ranks import Ranks


@dataclass
class RunContext:
    """One run: whose concept it learns, with which model and rewards, by which settings, and where it leaves files."""

    bundle: ModelBundle
    """Model, image tokenizer and text tokenizer."""
    concept: Concept
    """The concept's folder."""
    settings: RunConfig
    folder: Path
    """Where everything is left."""
    rewards: Scorers | None = None
    """The reward models, and the encoders that evaluation measures with."""
    rewards_from: str | Mapping[str, object] | None = None
    """What the reward models were made of, as config.yaml keeps it."""
    clip: str | None = None
    """The CLIP model that evaluation measures with, as it was named; config.yaml keeps it."""
    ranks: Ranks = field(default_factory=lambda: _alone())
    """The processes that train together."""
    progress: Progress = silent
    stop: Stop = never
    """Asked between steps and between parts."""


@dataclass(frozen=True)
class Parts:
    """Which parts of a run are wanted."""

    start: ConceptTokens | None = None
    """Tokens to begin with."""
    stages: bool = True
    grpo: bool = True
    evaluate: bool = True
    resume: bool = False
    """Go on with the run that the folder holds."""
    start_from: str | None = None
    """Where `start` was read, as config.yaml keeps it."""

    def check(self, folder: Path, rewards: Scorers | None) -> None:
        """Raise UserError for a run that cannot work, before anything is loaded."""
        if not (self.stages or self.grpo):
            raise UserError("nothing to do: neither stages nor reinforcement was asked for")
        if not self.stages and self.start is None:
            raise UserError("no stages and no tokens to begin with: give --start RUN, or let the stages run")
        if self.grpo and (rewards is None or rewards.ensemble is None):
            raise UserError(
                "reinforcement needs reward models, and this model brings none: "
                "give --rewards FILE.yaml (docs/rewards.md), or --no-grpo"
            )
        if (folder / CONFIG).exists() and not self.resume:
            raise UserError(f"{folder}: already holds a run: go on with it (--resume) or choose another folder")
        if self.resume and not (folder / CONFIG).exists():
            raise UserError(f"{folder}: holds no run to resume: start one without --resume")


def _alone() -> Ranks:
    from ..train.distributed.ranks import Ranks

    return Ranks()
