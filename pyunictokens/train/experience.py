"""One group of rollouts: answers, the images drawn from them, their rewards and advantages (paper, 3.1 to 3.3).

    task → G answers (IR) → CP = BP/IP + IR → G images, previews judged → rewards → A_i = R_i − mean(R)

It calls the engine and the reward ensemble; it does not know gradients or optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import profiling
from ..models import ConceptTokens, prompting
from ..rewards.base import RewardBatch, plain_text
from ..rollout.dsog import Dsog, DsogThreshold
from ..rollout.engine import RolloutEngine
from ..rollout.types import ImageRollout, TextRollout
from .config import GrpoConfig
from .deadline import NoAnswer, ask
from .pictures import Pictures
from .prompts import as_prompt, as_question
from .tasks import Task
from .update import AnswerTrajectories, ImageTrajectories, token_mask

PreviewScorer = Callable[[Sequence[str]], Callable[[Tensor, Tensor], Tensor]]
"""Plain prompts of a group → a judge of previews: (pixels [P, 3, H, W], prompt_index [P]) → scores [P]."""


@dataclass
class Experience:
    """A group of G rollouts with everything the update and the log want to know."""

    task: Task
    answers: TextRollout | None
    """None where the model draws without answering."""
    texts: list[str]
    """What the experts take for the answers."""
    images: ImageRollout
    prompts: list[str]
    """The compound prompts as text, the concept as `<name>`."""
    rewards: Tensor
    """float32 [G]."""
    parts: dict[str, Tensor]
    no_face: int
    advantages: Tensor

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.rewards).all())


class Collector:
    """Samples groups from the model as it is."""

    def __init__(
        self,
        engine: RolloutEngine,
        concept: ConceptTokens,
        concept_data: Any,
        pictures: Pictures,
        rewards: Any,
        preview_scorer: PreviewScorer | None,
        threshold: DsogThreshold,
        config: GrpoConfig,
    ):
        self.engine, self.concept, self.data, self.pictures = engine, concept, concept_data, pictures
        self.rewards, self.preview_scorer, self.threshold, self.config = rewards, preview_scorer, threshold, config
        self._hung: NoAnswer | None = None
        self.references = torch.stack([pictures.pixels(path) for path in concept_data.train_images])

    def collect(self, task: Task, step: int) -> Experience:
        """The group of step `step`: all noise follows from the seed and the step."""
        config = self.config
        sample_ids = [step * config.group_size + place for place in range(config.group_size)]
        answers = self._answer(task, sample_ids) if config.reasoning else None
        texts = answers.texts if answers is not None else [task.answer] * config.group_size
        prompts = [task.prompt] * config.group_size
        if answers is not None:
            prompts = [prompting.compound_prompt(task.prompt, prompting.first_sentence(text)) for text in texts]
        judged = [prompting.compound_prompt(task.prompt, task.answer)] * len(prompts)
        if config.judged_prompt == "compound":
            judged = prompts
        plain = [plain_text(text, self.data.in_words(config.judged_as)) for text in judged]
        images = self.engine.generate_images(
            [as_prompt(self.concept, text) for text in prompts],
            steps=config.timesteps,
            guidance_scale=config.guidance_scale,
            temperature=config.temperature,
            seed=2 * config.seed,
            sample_ids=sample_ids,
            dsog=self._dsog(plain),
        )
        if self._hung is not None:
            raise self._hung
        assert images.pixels is not None
        batch = RewardBatch(
            images=images.pixels.float().clamp(-1, 1),
            prompts=plain,
            answers=[plain_text(text, self.data.class_word) for text in texts],
            facts=[plain_text(fact, self.data.class_word) for fact in task.facts],
            correct=task.correct,
            references=self.references.to(images.pixels.device),
            kind=self.data.kind,
        )
        with profiling.phase("rewards"):
            score = ask("scoring by the experts", self.rewards.score, batch, seconds=config.expert_timeout)
        total = score.total.float()
        return Experience(
            task, answers, texts, images, prompts, total, score.parts, score.no_face, total - total.mean()
        )

    def _answer(self, task: Task, sample_ids: list[int]) -> TextRollout:
        config = self.config
        return self.engine.generate_text(
            self.pictures.codes(task.image)[None],
            [as_question(self.concept, task.question)],
            samples=config.group_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.answer_temperature,
            top_k=config.top_k,
            seed=2 * config.seed + 1,
            sample_ids=sample_ids,
        )

    def _dsog(self, plain: list[str]) -> Dsog | None:
        if not self.config.dsog.enabled or self.preview_scorer is None:
            return None
        judge, limit = self.preview_scorer(plain), self.config.expert_timeout

        def score(pixels: Tensor, index: Tensor) -> Tensor:
            if self._hung is not None:
                raise self._hung
            inside = pixels.float().clamp(-1, 1)  # decoders overshoot, experts refuse that
            try:
                return ask("judging previews", judge, inside, index, seconds=limit)
            except NoAnswer as error:
                self._hung = error  # the engine takes a failed preview for a bad one; this one ends the step
                raise

        return Dsog(
            self.threshold,
            score,
            preview_step=self.config.dsog.preview_step or None,
            max_candidates=self.config.dsog.max_candidates,
            cap_by_row=True,  # a row's outcome depends on nothing but itself, wherever the others are drawn
        )


def trajectories(
    experience: Experience, engine: RolloutEngine, scope: str
) -> tuple[ImageTrajectories, AnswerTrajectories | None]:
    """What the update needs of a group, and nothing else; no answers where there were none."""
    images, answers = experience.images, experience.answers
    assert images.inputs is not None and images.chosen is not None and images.logp is not None
    ids = prompting.SpecialIds.of(engine.model)
    distinct: dict[tuple[int, ...], int] = {}
    of_prompt = [
        distinct.setdefault(tuple(prompting.t2i_text(text, ids, images.max_text)), len(distinct))
        for text in images.prompt_ids
    ]
    return (
        ImageTrajectories(
            prompts=[list(prompt) for prompt in distinct],
            prompt_of_row=[of_prompt[index] for index in images.prompt_index.tolist()],
            inputs_RTN=images.inputs,
            chosen_RTN=images.chosen,
            old_logp_RTN=images.logp,
            empty_prompt=prompting.t2i_text([], ids, images.max_text),
            max_text=images.max_text,
            guidance_scale=images.guidance_scale,
            mask_RTN=token_mask(images.inputs, scope),
        ),
        _of_answers(answers) if answers is not None else None,
    )


def _of_answers(answers: TextRollout) -> AnswerTrajectories:
    assert answers.image_codes is not None
    return AnswerTrajectories(
        codes_N=answers.image_codes[0],
        question=answers.question_ids[0],
        tokens_RL=answers.tokens,
        old_logp_RL=answers.logp,
        temperature=answers.temperature,
    )


def summary(experience: Experience) -> dict[str, Any]:
    """The group as numbers and texts for the log."""
    rewards, dsog = experience.rewards, experience.images.dsog
    best = int(rewards.nan_to_num(-math.inf).argmax())
    return {
        "mode": experience.task.mode,
        "reward_mean": float(rewards.mean()),
        "within_group_std": float(rewards.std()),
        "parts": {name: float(value.mean()) for name, value in experience.parts.items()},
        "parts_std": {name: float(value.std()) for name, value in experience.parts.items()},
        "no_face": experience.no_face,
        "threshold": dsog.threshold if dsog else None,
        "pass_rate": dsog.pass_rate if dsog else None,
        "candidates": dsog.previewed if dsog else len(experience.images),
        "question": experience.task.question,
        "answer": experience.texts[best],
        "prompt": experience.prompts[best],
    }
