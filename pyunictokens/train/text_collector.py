"""The groups of one step where a model writes: texts of a prompt list's prompts, their rewards and advantages.

    task → G texts, unmasked by blocks → rewards of prompts and texts → advantages

A prompt may be about an image: the column `image` names its file, for a model that reads images (MMaDA).
As collector.py does it for images, so that loop and update know no difference: rollouts of all groups are dealt over
the ranks, and the tokens of a text are the codes of its trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..config.training import GrpoConfig
from ..data.images import load_pixels
from ..models import BlockAnsweringModel, WritingModel
from ..rewards.base import EnsembleScore, RewardBatch, Rewards
from ..rollout.engine import RolloutEngine
from ..rollout.types import TextRollout
from ..utils import profiling
from ..utils.errors import UserError
from ..utils.timeout import ask
from .collector import Groups, LocalRollouts, RolloutSummary
from .distributed.ranks import Ranks
from .objective import Objective
from .tasks import Task, TaskSource
from .trajectories import ImageTrajectories

IMAGE = "image"
"""The column of a prompt list that names the image a prompt is about."""


class TextPrompts:
    """What a model of text reads of a task: its prompt, with the image that the column `image` names before it."""

    def __init__(self, engine: RolloutEngine, model: WritingModel):
        self.engine, self.model = engine, model
        self._codes: dict[Path, list[int]] = {}

    def __call__(self, task: Task, text: str) -> str | list[int]:
        file = task.columns.get(IMAGE)
        if file is None:
            return text
        if not isinstance(file, (str, Path)):
            raise UserError(f"prompt {task.prompt!r}: {IMAGE}={file!r}: must be the name of an image file")
        drawing, tokenizer = self.model.drawing, self.engine.tokenizer
        assert drawing is not None and tokenizer is not None  # `reinforce` has looked
        return drawing.question_prompt(self._seen(Path(file), drawing), tokenizer.encode(drawing.question_text(text)))

    @torch.no_grad()
    def _seen(self, file: Path, drawing: BlockAnsweringModel) -> list[int]:
        vq = self.engine.vq
        assert vq is not None
        if file not in self._codes:
            weight = next(vq.parameters())
            pixels = load_pixels(file, drawing.grid[0] * vq.downsampling)[None]
            self._codes[file] = vq.encode(pixels.to(weight.device, weight.dtype))[0].tolist()
        return self._codes[file]


def written(
    engine: RolloutEngine,
    prompts: Sequence[str | Sequence[int]],
    config: GrpoConfig,
    seed: int,
    sample_ids: Sequence[int],
    record: bool,
) -> TextRollout:
    """One text of each prompt, with the numbers of `config`."""
    return engine.write(
        prompts,
        max_new_tokens=config.max_new_tokens,
        block_length=config.block_length or None,
        steps=config.text_steps or None,
        temperature=config.answer_temperature,
        seed=seed,
        sample_ids=sample_ids,
        record=record,
    )


class TextCollector(Groups):
    """Samples groups of texts from the model as it is. There are no previews."""

    def __init__(
        self,
        engine: RolloutEngine,
        model: WritingModel,
        tasks: TaskSource,
        rewards: Rewards,
        objective: Objective,
        config: GrpoConfig,
        ranks: Ranks | None = None,
    ):
        self.engine, self.model, self.tasks, self.rewards = engine, model, tasks, rewards
        self.objective, self.config, self.ranks = objective, config, ranks or Ranks()
        self._read = TextPrompts(engine, model)

    def calibrate(self) -> None:
        """Nothing: there are no previews."""

    def _note(self, task: Task, summary: RolloutSummary) -> None:
        """Nothing: rollouts of texts cost alike."""

    def _mine(self, tasks: Sequence[Task]) -> range:
        return self.ranks.share(len(tasks) * self.config.group_size)

    def _sample(
        self, task: Task, number: int, rows: range, with_codes: bool
    ) -> tuple[LocalRollouts, Callable[[], RolloutSummary]]:
        config = self.config
        ids = [number * config.group_size + row for row in rows]
        prompt = self._read(task, self.tasks.for_model(task.prompt))
        rollout = written(self.engine, [prompt] * len(rows), config, 2 * config.seed, ids, record=True)
        scope = self.objective.token_scope
        images = ImageTrajectories.of_texts(self.model, rollout, "newly_unmasked" if scope == "all" else scope)
        summary = RolloutSummary.scored(rollout.texts, [task.prompt] * len(rows), self._scored(task, rollout.texts))
        return LocalRollouts(rows, images, None), lambda: summary

    @profiling.phase("rewards")
    def _scored(self, task: Task, texts: Sequence[str]) -> EnsembleScore:
        columns = {name: [value] * len(texts) for name, value in task.columns.items()}
        batch = RewardBatch.of_texts(texts, [task.prompt] * len(texts), columns)
        return ask("scoring by the reward models", self.rewards.score, batch, seconds=self.config.reward_timeout)
