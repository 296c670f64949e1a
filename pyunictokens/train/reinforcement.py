"""The two doors to reinforcement: `train_grpo` on a concept (UniCTask-GRPO), `reinforce` on a list of prompts.

Both build a source of tasks (tasks.py) and hand it to the loop (grpo.py).

    reinforce(load_toy(), ["a red star on sand", "a blue dog"], reward)      # no concept folder

    def reward(prompts, images, **columns):                                   # images [R, 3, H, W] in [-1, 1]
        return images[:, 0].mean(dim=(1, 2)).tolist()
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..config.settings import save_yaml, to_mapping
from ..config.training import GrpoConfig, TrainConfig
from ..data.concept import Concept
from ..data.prompts import PromptSource, read_prompts
from ..models import (
    ConceptTokens,
    ImageTokenizer,
    MaskedModel,
    ModelBundle,
    TextTokenizer,
    WritingModel,
    owning_rows,
)
from ..rewards.base import AsksColumns, PreviewJudge, RewardModel
from ..rewards.ensemble import Ensemble, as_rewards
from ..utils.errors import UserError
from ..utils.progress import Progress
from ..utils.signals import Stop, never
from .collector import ByReward
from .distributed.ranks import Ranks
from .grpo import RunResult, run_grpo
from .held_out import HeldOut
from .images import ReferenceImages
from .tasks import REFERENCE, ConceptTasks, PromptTasks
from .text_collector import IMAGE

CONFIG = "config.yaml"
"""What a run's folder says of the model and the settings."""


@dataclass
class GrpoResult(RunResult):
    """What training on a concept ends with."""

    concept: ConceptTokens = field(kw_only=True)


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
        config: by default the `paper` preset's.
        preview_scorer: judge of DSOG's previews (`ToyRewards.preview_scorer`, `Ber.preview_scorer`); by default the
            first reward model that judges previews. Without one, no previews are taken.
        out_dir: the run's folder; one that holds a run is refused unless `resume`.
        resume: go on from the newest whole checkpoint as if the run had never stopped.
        progress: called after every step with ("grpo", steps done, steps wanted, numbers of the step).
        stop: asked after every step; where it says so (on any rank), a checkpoint is written and Stopped raised.
        ranks: the processes that train together, each of which calls this with the same arguments; by default this one
            alone. All must see `out_dir`. Reward models score a rank's own images.

    Returns:
        GrpoResult: the run's folder, steps done and skipped, and the concept; `model` holds the trained policy.

    Raises:
        UserError: settings, data or checkpoints that cannot be used, a model without a concept, and `max_bad_steps`
            steps in a row with a number that is not finite.
        Stopped: `stop` said so before the last step; `resume` goes on from there.
    """
    config = config or TrainConfig.preset("paper").grpo
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
        compound=config.compound,
        question_form=config.question_form,
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
    return GrpoResult(result.folder, result.steps, result.skipped, result.last, concept=tokens)


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
    held_out: PromptSource | None = None,
    metrics: Mapping[str, RewardModel | Callable[..., object]] | None = None,
    preview_scorer: PreviewJudge | ByReward | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Stop = never,
    ranks: Ranks | None = None,
) -> RunResult:
    """Improve a model's images of a list of prompts by reinforcement: plain text-to-image, no concept needed. For a
    model that writes by blocks (LLaDA; MMaDA as `bundle.as_text()`), improve its texts.

    Args:
        model: a bundle with .model, .vq and .tokenizer, as `load_toy()` gives. With a concept attached, prompts may
            name it as `<name>`, and its rows may learn.
        prompts: texts; dicts with the key "prompt", whose other keys are columns; a .txt or .jsonl file of these; or a
            `datasets.Dataset` (`data/prompts.py`). The column `reference_image` names a file with a good picture of
            the prompt, by which the run says how much there is to gain (headroom.py). For a model of text that reads
            images, the column `image` names the file that a prompt is about.
        reward_funcs: a function ``f(prompts=[...], images=[R, 3, H, W] in [-1, 1], **columns) -> list[float]``, of
            texts ``f(prompts=[...], completions=[...], **columns)``; a reward model (``score(batch) -> Tensor [R]``),
            the name of a registered one ("jpeg_size"), an `Ensemble`, or several of these as a list or by name.
        config: by default `GrpoConfig(trainable="lora")`, whose lr of 1e-6 hardly moves adapters: give `lr`, as 1e-4.
            Settings of answers have no effect, except for texts: `max_new_tokens`, `answer_temperature`,
            `block_length`, `text_steps`. `groups` is the number of prompts of a step, `group_size` that of images (or
            texts) of each.
        weights: of several reward functions, as a list or by name; 1 each by default.
        held_out: prompts that do not train, in the same forms: drawn with the same noise every `config.held_out.every`
            steps. The best policy by them is kept, and the run ends where they fall (held_out.py).
        metrics: what is measured on the held-out prompts and never rewarded, by name: functions or reward models.
        preview_scorer: as in `train_grpo`, or "reward": previews are scored by the reward itself, columns included.
        out_dir, resume, progress, stop, ranks: as in `train_grpo`.

    Returns:
        RunResult: the run's folder, steps done and skipped, and the measurements on held-out prompts; `model` holds the
        trained policy.

    Raises:
        UserError: prompts, reward functions, settings or checkpoints that cannot be used; a column that a reward
            function asks for and the prompts do not have; trainable=concept without a concept; `max_bad_steps` steps
            in a row with a number that is not finite.
        Stopped: `stop` said so before the last step; `resume` goes on from there.
    """
    config = config or GrpoConfig(trainable="lora")
    if isinstance(model.model, WritingModel):
        config = replace(config, alpha_image=1.0, dsog=replace(config.dsog, enabled=False))
    concept = model.model.concept
    if config.trainable == "concept" and concept is None:
        raise UserError(
            "trainable=concept: this model has no concept whose rows could learn: set lora or full, or attach one"
        )
    if metrics and held_out is None:
        raise UserError("metrics are measured on held-out prompts: give held_out as well")
    rewards = as_rewards(reward_funcs, weights, model.model.device)
    measured = Ensemble(metrics, dict.fromkeys(metrics, 1.0)) if metrics else None
    training = _tasks(model, prompts, "prompts", config.seed, rewards)
    fixed = None
    if held_out is not None:
        fixed = HeldOut(_tasks(model, held_out, "held_out", config.seed, rewards, measured), measured)
        both = set(training.texts) & set(fixed.tasks.texts)
        if both:
            warnings.warn(
                f"{len(both)} of {len(fixed.tasks)} held-out prompts also train, as {min(both)!r}: what is measured on "
                "them is not held out",
                stacklevel=2,
            )
    result = run_grpo(
        model.model,
        model.vq,
        model.tokenizer,
        training,
        rewards,
        config,
        out_dir,
        preview_judge=preview_scorer,
        held_out=fixed,
        resume=resume,
        progress=progress,
        stop=stop,
        ranks=ranks,
    )
    if isinstance(model, ModelBundle) and (ranks is None or ranks.first):
        save_yaml(result.folder / CONFIG, _description(model, config))
    return result


def _description(model: ModelBundle, config: GrpoConfig) -> dict[str, object]:
    """What a run's config.yaml says of the model, so that commands open the run without being told."""
    from .. import __version__

    sources = model.sources
    parts: dict[str, object] = {"model": sources.model, "vq": sources.vq, "tokenizer": sources.tokenizer}
    if not isinstance(model.model, WritingModel):  # MMaDA as a model of text has another than MMaDA
        parts["max_text"] = model.model.max_text
    return {
        "version": __version__,
        **parts,
        "parts": ["grpo"],
        "grpo": to_mapping(config),
    }


def _tasks(model: Bundle, source: PromptSource, name: str, seed: int, *askers: object) -> PromptTasks:
    """The tasks of `source`. Raises UserError where reward functions among `askers` ask for a column it lacks."""
    prompts = read_prompts(source)
    columns = prompts[0].columns
    for asker in askers:
        models = asker.models if isinstance(asker, Ensemble) else {}
        for label, each in models.items():
            wanted = each.columns if isinstance(each, AsksColumns) else ()
            missing = [column for column in wanted if column not in columns]
            if missing:
                raise UserError(
                    f"reward function {label!r} asks for {', '.join(missing)}, and {name} have "
                    f"{'the columns ' + ', '.join(columns) if columns else 'no column'}: add it to every prompt, or "
                    "give the argument a default"
                )
            for prompt in prompts:
                empty = [column for column in wanted if prompt.columns[column] is None]
                if empty:
                    raise UserError(
                        f"{name}: {prompt.text!r} has no {empty[0]}, which reward function {label!r} asks for"
                    )
    if REFERENCE in columns and isinstance(model.model, WritingModel):
        raise UserError(f"{name} have the column {REFERENCE}, and {model.model.family} draws nothing: rename it")
    if IMAGE in columns and isinstance(model.model, WritingModel):
        drawing = model.model.drawing
        if drawing is None:
            raise UserError(f"{name} have the column {IMAGE}, and {model.model.family} reads text alone: rename it")
        if drawing.grid[0] != drawing.grid[1]:
            raise UserError(f"{name} have the column {IMAGE}, and this model's images are {drawing.grid}: no squares")
    images = ReferenceImages(model.model, model.vq) if REFERENCE in columns else None
    return PromptTasks(prompts, seed=seed, concept=model.model.concept, images=images)
