"""The two doors to reinforcement: `train_grpo` on a concept (UniCTask-GRPO), `reinforce` on a list of prompts.

Both build a source of tasks (tasks.py) and hand it to the loop (grpo.py).

    reinforce(load_toy(), ["a red star on sand", "a blue dog"], reward)      # no concept folder

    def reward(prompts, images, **columns):                                   # images [R, 3, H, W] in [-1, 1]
        return images[:, 0].mean(dim=(1, 2)).tolist()
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..config.training import GrpoConfig
from ..data.concept import Concept
from ..data.prompts import PromptSource, read_prompts
from ..models import ConceptTokens, ImageTokenizer, MaskedModel, TextTokenizer, owning_rows
from ..rewards.base import PreviewJudge
from ..rewards.ensemble import as_rewards
from ..utils.errors import UserError
from ..utils.progress import Progress
from ..utils.signals import Stop, never
from .distributed.ranks import Ranks
from .grpo import RunResult, run_grpo
from .images import ReferenceImages
from .tasks import ConceptTasks, PromptTasks


@dataclass
class GrpoResult(RunResult):
    """What training on a concept ends with."""

    concept: ConceptTokens


def train_grpo(
    model: MaskedModel,
    vq: ImageTokenizer,
    tokenizer: TextTokenizer,
    concept_data: Concept,
    rewards: object,
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
        ReferenceImages(model, vq),
        visual_ratio=config.visual_ratio,
        judged_as=config.judged_as,
        seed=config.seed,
    )
    result = run_grpo(
        model,
        vq,
        tokenizer,
        tasks,
        as_rewards(rewards),
        config,
        out_dir,
        preview_judge=preview_scorer,
        resume=resume,
        progress=progress,
        stop=stop,
        ranks=ranks,
    )
    return GrpoResult(result.folder, result.steps, result.skipped, result.last, tokens)


class Bundle(Protocol):
    """A model with the image tokenizer and the text tokenizer that belong to it."""

    @property
    def model(self) -> MaskedModel: ...

    @property
    def vq(self) -> ImageTokenizer: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...


def reinforce(
    model: Bundle,
    prompts: PromptSource,
    reward_funcs: object,
    config: GrpoConfig | None = None,
    out_dir: str | os.PathLike[str] = "runs/reinforce",
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    preview_scorer: PreviewJudge | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Stop = never,
    ranks: Ranks | None = None,
) -> RunResult:
    """Improve a model's images of a list of prompts by reinforcement: plain text-to-image, no concept.

    Args:
        model: a bundle with .model, .vq and .tokenizer, as `load_toy()` gives.
        prompts: texts; dicts with the key "prompt", whose other keys are columns; a .txt or .jsonl file of these; or a
            `datasets.Dataset` (`data/prompts.py`).
        reward_funcs: a function ``f(prompts=[...], images=[R, 3, H, W] in [-1, 1], **columns) -> list[float]``, a
            reward model (``score(batch) -> Tensor [R]``), an `Ensemble`, or several functions and models as a list or
            by name.
        config: by default `GrpoConfig(trainable="lora")`. Settings of answers have no effect.
        weights: of several reward functions, as a list or by name; 1 each by default.
        out_dir, preview_scorer, resume, progress, stop, ranks: as in `train_grpo`.

    Raises:
        UserError: also for prompts and reward functions that cannot be used, and for trainable=concept.
        Stopped: as `run_grpo`.
    """
    config = config or GrpoConfig(trainable="lora")
    if config.trainable == "concept":
        raise UserError("trainable=concept: a list of prompts has no concept whose rows could learn: set lora or full")
    if model.model.concept is not None:
        raise UserError(
            f"the concept {model.model.concept.name!r} is attached to this model: detach it (model.detach()), or train "
            "on its folder (train_grpo)"
        )
    return run_grpo(
        model.model,
        model.vq,
        model.tokenizer,
        PromptTasks(read_prompts(prompts), seed=config.seed),
        as_rewards(reward_funcs, weights),
        config,
        out_dir,
        preview_judge=preview_scorer,
        resume=resume,
        progress=progress,
        stop=stop,
        ranks=ranks,
    )
