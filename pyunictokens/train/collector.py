"""The groups of one step: answers, the images drawn from them, their rewards and advantages (paper, 3.1 to 3.3).

    task → G answers (IR) → CP = BP/IP + IR → G images, previews judged → rewards → A_i = R_i − mean(R)

The rows of all groups are dealt over the ranks. Each rank samples, draws and scores its own; what is light about them
is gathered once, so every rank knows all rewards and advantages, and keeps its own trajectories for the update. It
calls the engine and the reward ensemble; it does not know gradients or optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..config.training import GrpoConfig
from ..models import ConceptTokens
from ..models.showo import prompting
from ..rewards.base import RewardBatch, plain_text
from ..rewards.ensemble import EnsembleScore
from ..rollout.dsog import Dsog, DsogThreshold
from ..rollout.engine import RolloutEngine
from ..rollout.types import ImageRollout, TextRollout
from ..utils import profiling
from ..utils.timeout import NoAnswer, ask
from .distributed.ranks import Ranks
from .images import Pictures
from .objective import Objective
from .prompts import as_prompt, as_question
from .tasks import Task
from .trajectories import AnswerTrajectories, ImageTrajectories

PreviewScorer = Callable[[Sequence[str]], Callable[[Tensor, Tensor], Tensor]]
"""Plain prompts of a group → a judge of previews: (pixels [P, 3, H, W], prompt_index [P]) → scores [P]."""


@dataclass
class Own:
    """This rank's rows of a group, with everything the update wants to know of them."""

    rows: slice
    answers: TextRollout | None
    """None where the model draws without answering."""
    images: ImageRollout


@dataclass
class Scored:
    """What the other ranks and the log want to know of some rows of a group: light, and on the CPU."""

    group: int
    texts: list[str]
    prompts: list[str]
    rewards: Tensor
    parts: dict[str, Tensor]
    no_face: int
    codes: Tensor
    preview_codes: Tensor | None = None
    accepted: int = 0
    previewed: int = 0


@dataclass
class Experience:
    """A group of G rollouts, of all ranks."""

    task: Task
    texts: list[str]
    """What the experts take for the answers."""
    prompts: list[str]
    """The compound prompts as text, the concept as `<name>`."""
    rewards: Tensor
    """float32 [G]."""
    parts: dict[str, Tensor]
    no_face: int
    advantages: Tensor
    codes: Tensor
    """[G, N]: the images."""
    preview_codes: Tensor | None
    """[G, N]: what their previews showed; None without DSOG."""
    threshold: float
    """What previews were held against."""
    accepted: int
    previewed: int
    own: Own | None
    """None where this rank has no row of this group."""

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
        objective: Objective,
        config: GrpoConfig,
        ranks: Ranks | None = None,
    ):
        self.engine, self.concept, self.data, self.pictures = engine, concept, concept_data, pictures
        self.rewards, self.preview_scorer, self.threshold, self.config = rewards, preview_scorer, threshold, config
        self.objective, self.ranks = objective, ranks or Ranks()
        self._hung: NoAnswer | None = None
        self.references = torch.stack([pictures.pixels(path) for path in concept_data.train_images])

    def collect(self, tasks: Sequence[Task], step: int) -> list[Experience]:
        """The groups of step `step`, one a task: all noise follows from the seed and the step, whatever the ranks.

        All groups are held against the threshold as it is, which then moves once a group, in their order.
        """
        size = self.config.group_size
        mine = self.ranks.share(len(tasks) * size)
        own: dict[int, Own] = {}
        pending: list[Callable[[], Scored]] = []
        for group, task in enumerate(tasks):
            rows = range(max(mine.start - group * size, 0), min(mine.stop - group * size, size))
            if rows:
                own[group], finish = self._sample(task, group, step * len(tasks) + group, rows)
                pending.append(finish)
        scored = [finish() for finish in pending]
        everything = [each for part in self.ranks.gather(scored) for each in part]
        before = self.threshold.value
        return [
            self._whole(task, [each for each in everything if each.group == group], before, own.get(group))
            for group, task in enumerate(tasks)
        ]

    def _whole(self, task: Task, parts: list[Scored], threshold: float, own: Own | None) -> Experience:
        """A group from its parts in the order of their rows; moves the threshold."""
        rewards = torch.cat([part.rewards for part in parts])
        previews = [part.preview_codes for part in parts if part.preview_codes is not None]
        accepted, previewed = sum(part.accepted for part in parts), sum(part.previewed for part in parts)
        if previewed:
            self.threshold.update(accepted / previewed)
        return Experience(
            task,
            [text for part in parts for text in part.texts],
            [prompt for part in parts for prompt in part.prompts],
            rewards,
            {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
            sum(part.no_face for part in parts),
            self.objective.advantages(rewards, torch.zeros(len(rewards), dtype=torch.int64)),
            torch.cat([part.codes for part in parts]),
            torch.cat(previews) if previews else None,
            threshold,
            accepted,
            previewed,
            own,
        )

    def _sample(self, task: Task, group: int, number: int, rows: range) -> tuple[Own, Callable[[], Scored]]:
        """`rows` of one group, and who waits for their scores; `number` counts the groups of the run."""
        config = self.config
        sample_ids = [number * config.group_size + row for row in rows]
        answers = self._answer(task, sample_ids) if config.reasoning else None
        texts = answers.texts if answers is not None else [task.answer] * len(rows)
        prompts = [task.prompt] * len(rows)
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
        scoring, codes, dsog = self._scoring(batch), images.codes.cpu(), images.dsog
        images.pixels = None  # handed over, and as large as everything else together

        def finish() -> Scored:
            score = scoring()
            found = Scored(
                group,
                texts,
                prompts,
                score.total.float().cpu(),
                {name: value.float().cpu() for name, value in score.parts.items()},
                score.no_face,
                codes,
            )
            if dsog is not None:
                found.preview_codes = dsog.preview_codes.cpu()
                found.accepted, found.previewed = dsog.accepted, dsog.previewed
            return found

        return Own(slice(rows.start, rows.stop), answers, images), finish

    @profiling.phase("rewards")
    def _scoring(self, batch: RewardBatch) -> Callable[[], EnsembleScore]:
        """Have the experts score; call what is returned for the scores. An ensemble with `submit`
        (rewards/served/client.py) is left to it, and the next group is drawn meanwhile."""
        submit, limit = getattr(self.rewards, "submit", None), self.config.expert_timeout
        if submit is None:
            score = ask("scoring by the experts", self.rewards.score, batch, seconds=limit)
            return lambda: score
        future = ask("handing drawings to the experts", submit, batch, seconds=limit)

        def wait() -> EnsembleScore:
            with profiling.phase("rewards"):
                return ask("scoring by the experts", future.result, seconds=limit)

        return wait

    def _answer(self, task: Task, sample_ids: list[int]) -> TextRollout:
        config = self.config
        return self.engine.generate_text(
            self.pictures.codes(task.image)[None],
            [as_question(self.concept, task.question)],
            samples=len(sample_ids),
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
            copy(self.threshold),  # the true one moves when all ranks have counted
            score,
            preview_step=self.config.dsog.preview_step or None,
            max_candidates=self.config.dsog.max_candidates,
            cap_by_row=True,  # a row's candidates depend on nothing but the row, so not on the ranks
        )


def trajectories(own: Own, engine: RolloutEngine, scope: str) -> tuple[ImageTrajectories, AnswerTrajectories | None]:
    """What the update needs of a group, and nothing else; no answers where there were none."""
    images, answers = own.images, own.answers
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
            mask_RTN=ops.token_mask(images.inputs, scope),
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


def summary(groups: Sequence[Experience]) -> dict[str, Any]:
    """The groups of a step as numbers and texts for the log; question, answer and prompt are of the best rollout."""
    rewards = torch.cat([group.rewards for group in groups])
    best, row = divmod(int(rewards.nan_to_num(-math.inf).argmax()), len(groups[0].rewards))
    names = groups[0].parts

    def mean(values: Iterable[Tensor]) -> float:
        return float(torch.stack(list(values)).mean())

    previewed = sum(group.previewed for group in groups)
    modes = {group.task.mode for group in groups}
    return {
        "mode": modes.pop() if len(modes) == 1 else "both",
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "within_group_std": mean(group.rewards.std() for group in groups),
        "parts": {name: mean(group.parts[name].mean() for group in groups) for name in names},
        "parts_std": {name: mean(group.parts[name].std() for group in groups) for name in names},
        "no_face": sum(group.no_face for group in groups),
        "threshold": groups[0].threshold if previewed else None,
        "pass_rate": sum(group.accepted for group in groups) / previewed if previewed else None,
        "candidates": previewed or len(rewards),
        "question": groups[best].task.question,
        "answer": groups[best].texts[row],
        "prompt": groups[best].prompts[row],
    }
