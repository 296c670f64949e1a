"""Operations of the concept stages and of reinforcement, counted ahead of a run from the sizes of a model."""

from __future__ import annotations

from pathlib import Path

from ..config.stages import StageConfig
from ..config.training import GrpoConfig
from ..data.concept import Concept
from ..models.checkpoint import read_config
from ..models.showo.costs import ShowoCosts
from ..models.showo.family import published_config
from ..models.showo.sizes import ShowoConfig
from .concept_tokens.stages import PLANS, questions_of, stage_steps
from .objective import objective_of

PROMPT = 64
"""Positions of a prompt, in a plan's arithmetic."""
QUESTION = (40, 16)
"""Positions of a question and of its answer in the stages, in the plan's arithmetic."""


def sizes_of(model: str | None) -> ShowoCosts:
    """What Show-o's parts cost by its sizes: those of config.json beside local weights, else of the published model."""
    config, folder = published_config(model), Path(model).expanduser() if model else None
    if folder is not None and (folder / "config.json").is_file():
        said = read_config(folder)
        known = {name: said[name] for name in vars(config) if isinstance(said.get(name), int)}
        config = ShowoConfig(**{**vars(config), **known})
    return ShowoCosts(config, 2)


def training_flops(costs: ShowoCosts, grpo: GrpoConfig) -> float:
    """Operations of one run's reinforcement; of each accepted preview, those that failed go along."""
    rows, count = grpo.group_size * (grpo.groups or 1), costs.count
    prompt, guided = PROMPT, grpo.guidance_scale > 0
    refused = 1 / max(grpo.dsog.target_pass_rate, 1 / grpo.dsog.max_candidates) - 1 if grpo.dsog.enabled else 0.0
    steps = grpo.timesteps + refused * max(1, grpo.timesteps // 5)
    rollout = costs.image_step(rows, prompt, count, guided).flops * steps
    rollout += costs.answers(count + 40, [grpo.max_new_tokens] * rows).flops if grpo.reasoning else 0.0
    looked_at = objective_of(grpo).looks_at(grpo)
    taken = grpo.rollouts_taken * (grpo.groups or 1)
    update = costs.update(taken, looked_at, prompt, count, guided, grpo.trainable).flops * grpo.inner_epochs
    reference = costs.reference(taken, looked_at, prompt, count, guided).flops if grpo.beta > 0 else 0.0
    return grpo.steps * (rollout + reference + update)


def stages_flops(
    costs: ShowoCosts, stages: StageConfig, concept: Concept, question: tuple[int, int] = QUESTION
) -> float:
    """Operations of the concept stages on one concept; a question and its answer have `question` positions.

    Only the concept's rows learn, so a backward pass costs as much as the forward one.
    """
    count, questions = costs.count, questions_of(concept, stages)
    looked_at, (words, answer) = costs.prefill(count + 3).flops, question
    answered = costs.answers(count + 3 + words, [answer]).flops - costs.prefill(count + 3 + words).flops
    one = 2 * (costs.prefill(words).flops + answered)
    total = looked_at * len({item.image for item in questions})
    for stage in stages.stages:
        plan, steps = PLANS[stage], stage_steps(stage, stages, len(questions), len(concept.train_images))
        total += steps * one * (stages.batch_mixed if plan.mixed else stages.batch_understanding)
        if plan.mixed:
            total += steps * costs.update(stages.batch_generation, 1, PROMPT, count, False, "concept").flops
        if stage == "deepening" and stages.num_extra:
            image = costs.image_step(1, PROMPT, count, stages.generated_guidance > 0).flops
            total += stages.generated_images * stages.generated_timesteps * image
    return total
