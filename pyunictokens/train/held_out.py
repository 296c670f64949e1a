"""Measuring on prompts that never train, with the same noise each time, so that what changes is the policy's doing.

    held_out.jsonl     one line a measurement: the step, its means, and every prompt's values
    best/              the policy of the best measurement (`train.load_policy` reads it); its numbers in held_out.json

The run is measured before its first step, every `held_out.every` steps, and at its end. Measurements are compared
prompt by prompt: the noise is the same, so the difference of two policies is far less noisy than each of them. Where
the held-out value falls while the reward of training rises, the policy has found something that the reward likes and
that does not carry over; the run says so, and ends.

Letters: R rows (prompts × images of each).
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..config.training import GrpoConfig, HeldOutConfig
from ..models import WritingModel
from ..rewards.base import RewardBatch, Rewards
from ..rewards.ensemble import Ensemble
from ..rollout.engine import RolloutEngine
from ..utils.errors import UserError
from ..utils.files import read_json_lines, write_json
from ..utils.timeout import ask
from .distributed.ranks import Ranks
from .tasks import PromptTasks, Task
from .text_collector import TextPrompts, written

log = logging.getLogger(__name__)

LOG, BEST = "held_out.jsonl", "best"
SEED = 0x48E1D007
"""The key of the noise of held-out images: the same in every run, so that runs can be compared too."""
_ROWS = 64
"""Most images at once between sampling and scoring."""

Values = dict[str, list[float]]
"""By name (reward, each reward model, each metric) one number a prompt, the mean of its images; NaN: not known."""


@dataclass(frozen=True)
class Measurement:
    """The held-out prompts after some steps."""

    step: int
    values: Values

    def mean(self, name: str) -> float:
        """The mean over the prompts whose value is known; NaN where none is."""
        known = [value for value in self.values[name] if math.isfinite(value)]
        return sum(known) / len(known) if known else math.nan

    def means(self) -> dict[str, float]:
        return {name: self.mean(name) for name in self.values}

    def line(self) -> dict[str, object]:
        """What held_out.jsonl holds of it."""
        return {"step": self.step, "means": self.means(), "prompts": self.values}

    @classmethod
    def read(cls, line: Mapping[str, object]) -> Measurement:
        step, values = line.get("step"), line.get("prompts")
        if not isinstance(step, int) or not isinstance(values, Mapping):
            raise UserError(f"{LOG}: a line without step or prompts: is it of another program?")
        read = {name: [math.nan if v is None else float(v) for v in row] for name, row in values.items()}
        return cls(step, read)


def difference(now: Measurement, before: Measurement, name: str) -> tuple[float, float]:
    """(mean, standard error) of `now` − `before`, prompt by prompt. The error of a single prompt is infinite."""
    pairs = zip(now.values[name], before.values[name], strict=True)
    gaps = [a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    if not gaps:
        return math.nan, math.inf
    mean = sum(gaps) / len(gaps)
    if len(gaps) == 1:
        return mean, math.inf
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1))
    return mean, spread / math.sqrt(len(gaps))


@dataclass(frozen=True)
class Verdict:
    """What the measurements so far say."""

    best: Measurement
    falls: int
    """Measurements in a row, up to the last, that lie clearly below the best."""
    drop: float
    """How far the last one lies below the best, over the prompts known in both."""
    training_rose: bool
    """Whether the reward of training since the best step is above that of as many steps before it."""


def verdict(history: Sequence[Measurement], training: Mapping[int, float], by: str) -> Verdict:
    """`history` in order, at least one; `training` the mean reward of training by step, where it is known; `by` the
    value that decides. A measurement that lost a prompt is compared over those it has: it is no better for the loss."""
    best = history[0]
    for each in history[1:]:
        if difference(each, best, by)[0] > 0 or math.isnan(best.mean(by)):
            best = each
    falls = 0
    for each in history:
        mean, error = difference(each, best, by)
        falls = falls + 1 if each.step > best.step and mean < -error else 0
    since = history[-1].step - best.step
    after = [training[s] for s in range(best.step, history[-1].step) if s in training]
    before = [training[s] for s in range(max(0, best.step - since), best.step) if s in training]
    before = before or after[: max(1, len(after) // 3)]  # the best was the beginning
    rose = bool(after) and sum(after) / len(after) > sum(before) / len(before)
    return Verdict(best, falls, difference(best, history[-1], by)[0], rose)


@dataclass
class HeldOut:
    """What `reinforce` hands over: prompts that never train, and metrics that are measured and never rewarded."""

    tasks: PromptTasks
    metrics: Ensemble | None = None
    history: list[Measurement] = field(default_factory=list)

    def identity(self) -> dict[str, object]:
        """What must be the same where a run is resumed."""
        return {f"held_out_{name}": value for name, value in self.tasks.identity().items()}

    def measure(
        self, step: int, engine: RolloutEngine, rewards: Rewards, config: GrpoConfig, ranks: Ranks
    ) -> Measurement:
        """Draw every held-out prompt and score it; all ranks together, each its share. Raises UserError where no reward
        is finite, or a reward function fails."""
        count, images = len(self.tasks), config.held_out.images
        mine, found = ranks.share(count * images), {}
        for start in range(mine.start, mine.stop, _ROWS):
            rows = range(start, min(start + _ROWS, mine.stop))
            found.update(self._scored(rows, engine, rewards, config))
        scores = {row: values for part in ranks.gather(found) for row, values in part.items()}
        names = list(scores[0])
        values: Values = {name: [] for name in names}
        for prompt in range(count):
            for name in names:
                own = [scores[prompt * images + k][name] for k in range(images)]
                values[name].append(sum(own) / images)
        made = Measurement(step, values)
        if not math.isfinite(made.mean("reward")):
            raise UserError("held-out prompts: no image has a finite reward: look at the reward functions")
        return made

    def _scored(
        self, rows: range, engine: RolloutEngine, rewards: Rewards, config: GrpoConfig
    ) -> dict[int, dict[str, float]]:
        tasks = [self.tasks.at(row // config.held_out.images) for row in rows]
        batch = self._batch(tasks, rows, engine, config)
        return {row: values for row, values in zip(rows, self._values(batch, rewards, config), strict=True)}

    def _batch(self, tasks: Sequence[Task], rows: range, engine: RolloutEngine, config: GrpoConfig) -> RewardBatch:
        """What the policy draws (or writes) of each task."""
        prompts = [self.tasks.for_model(task.prompt) for task in tasks]
        if isinstance(engine.model, WritingModel):
            read = TextPrompts(engine, engine.model)
            asked = [read(task, prompt) for task, prompt in zip(tasks, prompts, strict=True)]
            return self.tasks.text_batch(tasks, written(engine, asked, config, SEED, rows, record=False).texts)
        drawn = engine.generate_images(
            prompts,
            steps=config.timesteps,
            guidance_scale=config.guidance_scale,
            temperature=config.temperature,
            seed=SEED,
            sample_ids=list(rows),
            record=False,
        )
        assert drawn.pixels is not None
        return self.tasks.batch(tasks, drawn.pixels.float().clamp(-1, 1))

    def _values(self, batch: RewardBatch, rewards: Rewards, config: GrpoConfig) -> list[dict[str, float]]:
        """By row: the reward, each reward model, each metric."""
        limit = config.reward_timeout
        score = ask("scoring held-out images", rewards.score, batch, seconds=limit)
        named = {"reward": score.total, **score.parts}
        bad = list(score.invalid)
        if self.metrics is not None:
            measured = ask("measuring held-out images", self.metrics.score, batch, seconds=limit)
            named.update(measured.parts)
            bad += measured.invalid
        for each in bad:
            log.warning("held-out prompts: %s; the prompt is left out of this measurement", each)
        return [dict(zip(named, row, strict=True)) for row in torch.stack(list(named.values()), 1).tolist()]

    # --- the run ---------------------------------------------------------------------------------------------------

    def restore(self, folder: Path, step: int, ranks: Ranks) -> None:
        """Take up the measurements of a run that goes on at `step`; that of `step` itself is of the same policy."""
        lines = read_json_lines(folder / LOG) if ranks.first and (folder / LOG).exists() else []
        read = [Measurement.read(line) for line in lines]
        self.history = ranks.broadcast([each for each in read if each.step <= step])

    def check_names(self, config: HeldOutConfig, names: Sequence[str]) -> None:
        """Raises UserError where `held_out.by` names nothing that is measured."""
        if config.by not in names:
            raise UserError(f"held_out.by={config.by!r}: must be one of {', '.join(names)}")

    def add(self, now: Measurement, training: Mapping[int, float], by: str) -> Verdict:
        """Take up a measurement; returns what all of them say, and logs it."""
        self.check_names(HeldOutConfig(by=by), list(now.values))
        self.history.append(now)
        said = verdict(self.history, training, by)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in now.means().items())
        log.info("held-out prompts after %d steps: %s", now.step, shown)
        return said

    def why_it_ends(self, said: Verdict, config: HeldOutConfig) -> str:
        """Why the run should end here; "" where it should not."""
        if not config.patience or said.falls < config.patience:
            return ""
        what = f"{config.by} of held-out prompts has fallen by {said.drop:.3f} since step {said.best.step}"
        if said.training_rose:
            return (
                f"{what} while the reward of training rose: reward hacking, or training prompts learned by heart. "
                f"The policy of step {said.best.step} is in {BEST}/; go on with held_out.patience=0 to see more"
            )
        return f"{what}: the policy of that step is in {BEST}/; try a lower lr, or a larger group_size"


def save_best(folder: Path, best: Measurement, export: Callable[[Path], object]) -> None:
    """Write the policy of the best measurement, whole or not at all."""
    aside, final = folder / f".{BEST}.part", folder / BEST
    shutil.rmtree(aside, ignore_errors=True)
    export(aside)
    write_json(aside / "held_out.json", {"step": best.step, "means": best.means()})
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
