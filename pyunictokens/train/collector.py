"""The groups of one step: answers, the images drawn from them, their rewards and advantages (paper, 3.1 to 3.3).

    task → G answers (IR) → CP = BP/IP + IR → G images, previews judged → rewards → advantages

The rollouts of all groups are dealt over the ranks. Each rank samples and scores its own; what is light about them is
gathered once, so every rank knows all rewards and advantages, and keeps its own trajectories for the update.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..config.training import GrpoConfig
from ..data import wording
from ..models import AnsweringModel
from ..rewards.base import EnsembleScore, PreviewJudge, PreviewScorer, RewardBatch, Rewards
from ..rollout.dsog import Dsog, DsogThreshold
from ..rollout.engine import RolloutEngine
from ..rollout.types import ImageRollout, TextRollout
from ..utils import profiling
from ..utils.errors import NotFinite
from ..utils.timeout import NoAnswer, ask
from .distributed.dealing import deal
from .distributed.ranks import Ranks
from .objective import Objective
from .tasks import Task, TaskSource
from .trajectories import AnswerTrajectories, ImageTrajectories

ByReward = Literal["reward"]
"""In place of a judge of previews: the rewards themselves."""
log = logging.getLogger(__name__)


@dataclass
class RolloutSummary:
    """Some rollouts of a group as the log and the other ranks see them: light, and on the CPU."""

    texts: list[str]
    """What judges of answers read; the true answers where the model did not answer."""
    prompts: list[str]
    """What the images were drawn from, the concept as `<name>`."""
    rewards: Tensor
    """float32 [R]."""
    parts: dict[str, Tensor]
    """[R] by reward model."""
    no_face: int
    invalid: tuple[str, ...] = ()
    """What reward models gave that is no finite number, in words."""
    codes: Tensor | None = None
    """int [R, N], where they were wanted: the images."""
    preview_codes: Tensor | None = None
    """The same of what the previews showed, with DSOG."""
    accepted: int = 0
    previewed: int = 0

    @classmethod
    def scored(cls, texts: list[str], prompts: list[str], score: EnsembleScore) -> RolloutSummary:
        """Rollouts without previews, with their rewards."""
        parts = {name: value.float().cpu() for name, value in score.parts.items()}
        invalid = tuple(map(str, score.invalid))
        return cls(texts, prompts, score.total.float().cpu(), parts, score.no_face, invalid)

    @classmethod
    def merged(cls, parts: Sequence[RolloutSummary]) -> RolloutSummary:
        """Those of a whole group, from its parts in the order of their rows."""

        def joined(tensors: Iterable[Tensor | None]) -> Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(there) if there else None

        return cls(
            [text for part in parts for text in part.texts],
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.rewards for part in parts]),
            {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
            sum(part.no_face for part in parts),
            tuple(words for part in parts for words in part.invalid),
            joined(part.codes for part in parts),
            joined(part.preview_codes for part in parts),
            sum(part.accepted for part in parts),
            sum(part.previewed for part in parts),
        )


@dataclass
class LocalRollouts:
    """This rank's rollouts of a group, as the update takes them."""

    rows: Sequence[int]
    """Their places in the group, ascending."""
    images: ImageTrajectories
    answers: AnswerTrajectories | None
    """None where nothing was asked."""

    def only(self, rows: Sequence[int]) -> LocalRollouts | None:
        """Those of them that are among the group's `rows`; None where none is."""
        at = [place for place, row in enumerate(self.rows) if row in rows]
        if not at:
            return None
        answers = None if self.answers is None else self.answers.rows(at)
        return LocalRollouts([self.rows[place] for place in at], self.images.rows(at), answers)


@dataclass
class Group:
    """G rollouts of one task, of all ranks."""

    task: Task
    summary: RolloutSummary
    advantages: Tensor
    """float32 [G]."""
    threshold: float
    """What previews were compared with."""
    local: LocalRollouts | None
    """None where this rank has no rollout of the group."""


CALIBRATED_ON = 4
"""Tasks whose previews say where DSOG's threshold starts."""


@dataclass
class _Asked:
    """Some rollouts of a group before they are drawn."""

    ids: list[int]
    """The sample id of each."""
    answers: TextRollout | None
    texts: list[str]
    prompts: list[str]
    judged: list[str]
    """The prompts as judges of images read them."""


class Groups(ABC):
    """The groups of a step: their rollouts are dealt over the ranks, and what is light about them is gathered."""

    tasks: TaskSource
    objective: Objective
    config: GrpoConfig
    ranks: Ranks

    def collect(self, step: int, with_codes: bool = False) -> list[Group]:
        """The groups of step `step`: all noise follows from the seed and the step, whatever the ranks.

        Raises NotFinite, on all ranks alike, where a model or an image decoder of any rank gave numbers that are not
        finite.
        """
        size, count, threshold = self.config.group_size, self.config.groups, self._threshold_now()
        tasks = [self.tasks.draw(step * count + group) for group in range(count)]
        mine = self._mine(tasks)
        local: dict[int, LocalRollouts] = {}
        pending: list[tuple[int, Callable[[], RolloutSummary]]] = []
        problem = ""
        try:
            for group, task in enumerate(tasks):
                rows = range(max(mine.start - group * size, 0), min(mine.stop - group * size, size))
                if rows:
                    local[group], finish = self._sample(task, step * count + group, rows, with_codes)
                    pending.append((group, finish))
        except NotFinite as error:  # what is being scored is waited for all the same
            problem = f"rollouts of group {group}: {error}"
        scored = [(group, finish()) for group, finish in pending]
        told = self.ranks.gather((problem, scored))
        if problem := next((problem for problem, _ in told if problem), ""):
            raise NotFinite(problem)
        everything = [each for _, part in told for each in part]
        groups = []
        for group, task in enumerate(tasks):
            summary = RolloutSummary.merged([part for place, part in everything if place == group])
            self._note(task, summary)
            advantages = self.objective.advantages(summary.rewards, torch.zeros(size, dtype=torch.int64))
            groups.append(Group(task, summary, advantages, threshold, local.get(group)))
        return groups

    @abstractmethod
    def _mine(self, tasks: Sequence[Task]) -> range:
        """This rank's rollouts, counted through all groups of `tasks`."""

    @abstractmethod
    def _sample(
        self, task: Task, number: int, rows: range, with_codes: bool
    ) -> tuple[LocalRollouts, Callable[[], RolloutSummary]]:
        """`rows` of one group, and who waits for their scores; `number` counts the groups of the run."""

    def _threshold_now(self) -> float:
        """What previews of this step are compared with; 0 where there are none."""
        return 0.0

    @abstractmethod
    def _note(self, task: Task, summary: RolloutSummary) -> None:
        """Learn from a finished group; they are told in their order."""


class Collector(Groups):
    """Samples groups from the model as it is, and moves DSOG's threshold: all groups of a step are compared with it as
    it is, then it moves once a group. It stays where a step's numbers were not finite."""

    def __init__(
        self,
        engine: RolloutEngine,
        tasks: TaskSource,
        rewards: Rewards,
        preview_judge: PreviewJudge | ByReward | None,
        threshold: DsogThreshold,
        objective: Objective,
        config: GrpoConfig,
        ranks: Ranks | None = None,
    ):
        self.engine, self.tasks, self.rewards, self.preview_judge = engine, tasks, rewards, preview_judge
        self.threshold, self.objective, self.config = threshold, objective, config
        self.ranks = ranks or Ranks()
        self._hung: NoAnswer | None = None
        self._lost_steps: dict[str, float] = {}
        """Steps that candidates of a rollout took which previews rejected, by the kind of task: a running mean."""

    def _mine(self, tasks: Sequence[Task]) -> range:
        costs = [self._cost_of_row(task) for task in tasks for _ in range(self.config.group_size)]
        return deal(costs, self.ranks.world)[self.ranks.rank]

    def _threshold_now(self) -> float:
        return self.threshold.value

    def _cost_of_row(self, task: Task) -> float:
        """What a rollout of such a task is expected to cost, in steps of an image: its steps, those of the update, and
        those of candidates that earlier rollouts of its kind lost to previews."""
        config = self.config
        if config.shard == "full":  # all ranks have as many rows: each layer's weights come together for all at once
            return 1.0
        passes = 3 * config.inner_epochs + (1 if config.beta > 0 else 0)
        update = passes * self.objective.looks_at(config) * config.rollouts_taken / config.group_size
        return config.timesteps + update + self._lost_steps.get(task.mode, 0.0)

    def _note(self, task: Task, summary: RolloutSummary) -> None:
        size = self.config.group_size
        at = self.config.dsog.preview_step or max(1, self.config.timesteps // 5)
        lost = at * max(0, summary.previewed - size) / size
        before = self._lost_steps.get(task.mode, lost)
        self._lost_steps[task.mode] = 0.7 * before + 0.3 * lost
        if summary.previewed:
            self.threshold.update(summary.accepted / summary.previewed)

    def calibrate(self) -> None:
        """Start DSOG's threshold where the wanted part of previews passes: it looks at previews of the first tasks'
        rollouts, as the first steps will draw them, and goes no further with them.

        The scores of a judge have a scale of their own: BLIP-2's cosines lie around 0.3 to 0.4, and a threshold of 0.5
        would reject every candidate for a dozen groups before it has come down.
        """
        if self.preview_judge is None:
            return
        size = self.config.group_size
        scores: list[float] = []
        for number in range(CALIBRATED_ON):
            task = self.tasks.draw(number)
            share = self.ranks.share(size)
            rows = range(share.start, share.stop)
            if not rows:
                continue
            asked = self._asked(task, number, rows)
            dsog = self._dsog(task, asked.judged)
            assert dsog is not None
            only_looked_at = replace(dsog, only_previews=True, max_candidates=1)
            report = self._drawn(asked, only_looked_at, record=False, decode=False).dsog
            assert report is not None
            scores += report.scores.tolist()
        every = [score for part in self.ranks.gather(scores) for score in part]
        self.threshold.start_at(every)
        if self.ranks.first:
            if not any(map(math.isfinite, every)):
                log.warning("no preview could be judged: DSOG's threshold starts at %g", self.threshold.value)
            log.info(
                "DSOG: the threshold starts at %.3f, which %d of %d previews pass",
                self.threshold.value,
                sum(score > self.threshold.value for score in every),
                len(every),
            )

    def _asked(self, task: Task, number: int, rows: range) -> _Asked:
        """The answers of `rows` of one group, and what their images are drawn from and judged by."""
        config, tasks = self.config, self.tasks
        ids = [number * config.group_size + row for row in rows]
        asks = config.reasoning and task.question is not None and isinstance(self.engine.model, AnsweringModel)
        answers = self._answer(task, ids) if asks else None
        texts = answers.texts if answers is not None else [task.answer] * len(rows)
        prompts = [task.prompt] * len(rows)
        if answers is not None:
            prompts = [tasks.completed(task.prompt, wording.first_sentence(text)) for text in texts]
        judged = prompts
        if config.judged_prompt == "truth":
            judged = [tasks.completed(task.prompt, task.answer)] * len(prompts)
        return _Asked(ids, answers, texts, prompts, [tasks.for_image_judges(text) for text in judged])

    def _drawn(self, asked: _Asked, dsog: Dsog | None, *, record: bool = True, decode: bool = True) -> ImageRollout:
        config = self.config
        images = self.engine.generate_images(
            [self.tasks.for_model(text) for text in asked.prompts],
            steps=config.timesteps,
            guidance_scale=config.guidance_scale,
            temperature=config.temperature,
            seed=2 * config.seed,
            sample_ids=asked.ids,
            dsog=dsog,
            record=record,
            decode=decode,
        )
        if self._hung is not None:
            raise self._hung
        return images

    def _sample(
        self, task: Task, number: int, rows: range, with_codes: bool
    ) -> tuple[LocalRollouts, Callable[[], RolloutSummary]]:
        tasks = self.tasks
        asked = self._asked(task, number, rows)
        answers, texts, prompts, judged = asked.answers, asked.texts, asked.prompts, asked.judged
        images = self._drawn(asked, self._dsog(task, judged))
        assert images.pixels is not None
        pixels, images.pixels = images.pixels.float().clamp(-1, 1), None
        batch = RewardBatch(
            images=pixels,
            prompts=judged,
            answers=[tasks.for_answer_judges(text) for text in texts] if answers is not None or task.facts else (),
            facts=[tasks.for_answer_judges(fact) for fact in task.facts],
            correct=task.correct,
            references=tasks.references.to(pixels.device),
            kind=tasks.kind,
            columns={name: [value] * len(rows) for name, value in task.columns.items()},
        )
        scoring, dsog = self._scoring(batch), images.dsog
        codes = images.codes.cpu() if with_codes else None
        preview_codes = dsog.preview_codes.cpu() if with_codes and dsog is not None else None
        del pixels, batch  # handed over, and as large as everything else together

        def finish() -> RolloutSummary:
            summary = RolloutSummary.scored(texts, prompts, scoring())
            summary.codes, summary.preview_codes = codes, preview_codes
            if dsog is not None:
                summary.accepted, summary.previewed = dsog.accepted, dsog.previewed
            return summary

        mask = ops.token_mask(images.inputs, self.objective.token_scope) if images.inputs is not None else None
        local = LocalRollouts(
            rows,
            ImageTrajectories.of(self.engine.model, images, mask),
            AnswerTrajectories.of(answers) if answers is not None else None,
        )
        return local, finish

    @profiling.phase("rewards")
    def _scoring(self, batch: RewardBatch) -> Callable[[], EnsembleScore]:
        """Have the images scored; call what is returned for the scores. Where they are scored elsewhere, the next group
        is sampled meanwhile."""
        limit = self.config.reward_timeout
        future = ask("scoring by the reward models", self.rewards.submit, batch, seconds=limit)

        def wait() -> EnsembleScore:
            with profiling.phase("rewards"):
                return ask("scoring by the reward models", future.result, seconds=limit)

        return wait

    def _answer(self, task: Task, sample_ids: list[int]) -> TextRollout:
        config = self.config
        assert task.question is not None
        question, worded = self.tasks.question_for_model(task.question)
        return self.engine.generate_text(
            self.tasks.seen(task)[None],
            [question],
            raw=worded,
            samples=len(sample_ids),
            max_new_tokens=config.max_new_tokens,
            temperature=config.answer_temperature,
            top_k=config.top_k,
            seed=2 * config.seed + 1,
            sample_ids=sample_ids,
        )

    def _by_reward(self, task: Task, judged: list[str]) -> PreviewScorer:
        """Previews scored as the finished images will be."""

        def score(pixels: Tensor, index: Tensor) -> Tensor:
            rows = index.tolist()
            columns = {name: [value] * len(rows) for name, value in task.columns.items()}
            return self.rewards.score(RewardBatch(pixels, [judged[row] for row in rows], columns=columns)).total

        return score

    def _dsog(self, task: Task, judged: list[str]) -> Dsog | None:
        judge = self.preview_judge
        if not self.config.dsog.enabled or judge is None:
            return None
        scorer = self._by_reward(task, judged) if judge == "reward" else judge(judged)
        limit = self.config.reward_timeout

        def score(pixels: Tensor, index: Tensor) -> Tensor:
            if self._hung is not None:
                raise self._hung
            inside = pixels.float().clamp(-1, 1)  # decoders overshoot, reward models refuse that
            try:
                return ask("judging previews", scorer, inside, index, seconds=limit)
            except NoAnswer as error:
                self._hung = error  # the engine takes a failed preview for a bad one; this one ends the step
                raise

        return Dsog(
            self.threshold.value,  # it moves when all ranks have counted
            score,
            preview_step=self.config.dsog.preview_step or None,
            max_candidates=self.config.dsog.max_candidates,
            cap_by_row=True,  # a row's candidates depend on nothing but the row, so not on the ranks
        )


def summary(groups: Sequence[Group]) -> dict[str, object]:
    """The groups of a step as numbers and texts for the log; question, answer and prompt are of the best rollout.

    Without groups (their sampling failed) next to nothing is said."""
    if not groups:
        return {"mode": None, "reward_mean": math.nan, "parts": {}, "threshold": None, "pass_rate": None}
    parts = [group.summary for group in groups]
    rewards = torch.cat([part.rewards for part in parts])
    best, row = divmod(int(rewards.nan_to_num(-math.inf).argmax()), len(parts[0].rewards))

    def mean(values: Iterable[Tensor]) -> float:
        return float(torch.stack(list(values)).mean())

    previewed = sum(part.previewed for part in parts)
    modes = {group.task.mode for group in groups}
    names = parts[0].parts
    return {
        "mode": modes.pop() if len(modes) == 1 else "both",
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "within_group_std": mean(part.rewards.std() for part in parts),
        "parts": {name: mean(part.parts[name].mean() for part in parts) for name in names},
        "parts_std": {name: mean(part.parts[name].std() for part in parts) for name in names},
        "no_face": sum(part.no_face for part in parts),
        "threshold": groups[0].threshold if previewed else None,
        "pass_rate": sum(part.accepted for part in parts) / previewed if previewed else None,
        "candidates": previewed or len(rewards),
        "question": groups[best].task.question,
        "answer": parts[best].texts[row],
        "prompt": parts[best].prompts[row],
    }
