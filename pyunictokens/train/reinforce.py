"""Reinforcement on a concept: `train_grpo` builds its tasks (tasks.py) and hands them to the loop (grpo.py)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..config.training import GrpoConfig
from ..data.concept import Concept
from ..models import ConceptTokens, ImageTokenizer, MaskedModel, TextTokenizer, owning_rows
from ..utils.errors import UserError
from ..utils.signals import Stop, never
from .collector import PreviewJudge
from .distributed.ranks import Ranks
from .grpo import Progress, RunResult, run_grpo
from .images import Pictures
from .tasks import ConceptTasks


@dataclass
class GrpoResult(RunResult):
    """What training on a concept ends with."""

    concept: ConceptTokens


def train_grpo(
    model: MaskedModel,
    vq: ImageTokenizer,
    tokenizer: TextTokenizer,
    concept_data: Concept,
    rewards: Any,
    config: GrpoConfig | None = None,
    out_dir: str | os.PathLike[str] = "runs/grpo",
    *,
    concept: ConceptTokens | None = None,
    preview_scorer: PreviewJudge | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Stop = never,
    ranks: Ranks | None = None,
) -> GrpoResult:
    """Improve a personalised model by reinforcement on its own answers and images.

    Args:
        model: the model with its concept attached, or give `concept` to attach.
        tokenizer: the plain tokenizer; the concept's tokens are added here.
        concept_data: a `data.Concept`; only the training half of its facts is used.
        rewards: an `Ensemble`, or anything whose score(batch) gives .total [R], .parts and .no_face.
        preview_scorer: judge of DSOG's previews (`ToyRewards.preview_scorer`, `Ber.preview_scorer`); by default the
            first reward model that judges previews. Without one, no previews are taken.
        out_dir: the run's folder; one that holds a run is refused unless `resume`.
        resume: go on from the newest whole checkpoint as if the run had never stopped.
        progress: called after every step with ("grpo", steps done, steps wanted, numbers of the step).
        stop: asked after every step; where it says so (on any rank), a checkpoint is written and Stopped raised.
        ranks: the processes that train together, each of which calls this with the same arguments; by default this one
            alone. All must see `out_dir`. Reward models score a rank's own images.

    Raises:
        UserError, Stopped: as `run_grpo`.
    """
    config = config or GrpoConfig()
    if concept is not None:
        owning_rows(model).attach(concept)
    tokens = model.concept
    if tokens is None:
        raise UserError("this model has no concept attached: learn one first (train_concept_tokens), or pass concept=")
    tasks = ConceptTasks(
        concept_data,
        tokens,
        Pictures(model, vq),
        visual_ratio=config.visual_ratio,
        judged_as=config.judged_as,
        seed=config.seed,
    )
    result = run_grpo(
        model,
        vq,
        tokenizer,
        tasks,
        rewards,
        config,
        out_dir,
        preview_judge=preview_scorer,
        resume=resume,
        progress=progress,
        stop=stop,
        ranks=ranks,
    )
    return GrpoResult(result.folder, result.steps, result.skipped, result.last, tokens)
