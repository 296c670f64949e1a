"""UniCTask-GRPO, the whole loop: sample a group, reward it, update the policy, write everything down.

    for each step:  task → answers → images (previews judged) → rewards → reference log-probs → streamed update

The parts live beside this file: tasks.py, experience.py, update.py, policy.py, state.py, logs.py. This one knows their
order, the random keys and what to do when a number is not finite (paper, section 3.2, equation 7; appendix F).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import cost, profiling
from ..errors import UserError
from ..models import ConceptTokens, MagvitV2, Showo, TextTokenizer
from ..rollout.dsog import DsogThreshold
from ..rollout.engine import RolloutEngine
from ..stopping import Stop, Stopped, never
from .config import GrpoConfig
from .experience import Collector, Experience, PreviewScorer, summary, trajectories
from .logs import MetricsLog, save_samples
from .optim import Optimiser, learning_rate
from .pictures import Pictures
from .policy import Policy
from .settings import save_yaml, to_mapping
from .state import RunFolder, identity, random_state, restore_random_state
from .tasks import TaskSampler
from .update import (
    ImageTrajectories,
    LossSettings,
    PieceSizes,
    UpdateStats,
    answer_logprobs,
    image_logprobs,
    some_timesteps,
    streamed_backward,
)

log = logging.getLogger(__name__)

PHASES = "phases.json"
"""Where the time of the run's last session went (profiling.py)."""

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Called after every step: (phase, steps done, steps wanted, numbers of this step)."""


@dataclass
class GrpoResult:
    """What a run ends with. The model holds the trained policy."""

    concept: ConceptTokens
    folder: Path
    """The run's folder; `folder / "final"` holds what was learned (`train.load_policy` reads it)."""
    steps: int
    skipped: int
    """Steps without an update because a number was not finite."""
    last: dict[str, Any]
    """The numbers of the last step."""


def train_grpo(
    model: Showo,
    vq: MagvitV2,
    tokenizer: TextTokenizer,
    concept_data: Any,
    rewards: Any,
    config: GrpoConfig | None = None,
    out_dir: str | os.PathLike[str] = "runs/grpo",
    *,
    concept: ConceptTokens | None = None,
    preview_scorer: PreviewScorer | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Stop = never,
) -> GrpoResult:
    """Improve a personalised model by reinforcement on its own answers and images.

    Args:
        model: the model with its concept attached, or give `concept` to attach.
        tokenizer: the plain tokenizer; the concept's tokens are added here.
        concept_data: a `data.Concept`; only the training half of its facts is used.
        rewards: an `Ensemble`, or anything whose score(batch) gives .total [R], .parts and .no_face.
        preview_scorer: judge of DSOG's previews (`ToyRewards.preview_scorer`, `Ber.preview_scorer`); by default the
            ensemble's expert "ber". Without one, no previews are taken.
        out_dir: the run's folder; one that holds a run is refused unless `resume`.
        resume: go on from the newest whole checkpoint as if the run had never stopped.
        stop: asked after every step; where it says so, a checkpoint is written and Stopped raised.

    Raises:
        UserError: for settings, data or checkpoints that cannot be used, and when `max_bad_steps` steps in a row have a
            reward, loss or gradient that is not finite.
        Stopped: `stop` said so before the last step; `resume` goes on from there.
    """
    config = config or GrpoConfig()
    if concept is not None:
        model.attach(concept)
    if model.concept is None:
        raise UserError("this model has no concept attached: learn one first (train_concept_tokens), or pass concept=")
    out = Path(out_dir)
    with RunFolder(out, identity(model, model.concept), to_mapping(config), resume=resume) as folder:
        run = _Run(model, vq, tokenizer, concept_data, rewards, preview_scorer, config, folder)
        save_yaml(out / "grpo.yaml", config)
        try:
            if resume:
                run.restore()
            with profiling.Recorder(model.device) as recorder:
                result = run.train(progress, stop)
            profiling.Recorder.save(out / PHASES, recorder.report(model.dtype))
            return result
        finally:
            run.optimiser.release()


class _Run:
    def __init__(
        self,
        model: Showo,
        vq: MagvitV2,
        tokenizer: TextTokenizer,
        concept_data: Any,
        rewards: Any,
        preview_scorer: PreviewScorer | None,
        config: GrpoConfig,
        folder: RunFolder,
    ):
        assert model.concept is not None
        self.model, self.config, self.folder = model, config, folder
        known = tokenizer if tokenizer.token_id(model.concept.sks) is not None else None
        self.engine = RolloutEngine(
            model, vq, known or tokenizer.with_concept(model.concept.tokens), max_text=config.max_text
        )
        settings = config.dsog
        self.threshold = DsogThreshold(
            settings.initial, settings.target_pass_rate, settings.mu, settings.eta, settings.epsilon0
        )
        if preview_scorer is None:
            preview_scorer = getattr(getattr(rewards, "experts", {}).get("ber"), "preview_scorer", None)
        if settings.enabled and preview_scorer is None:
            log.warning("no judge for previews (an expert named ber): DSOG is off")
        pictures = Pictures(model, vq)
        self.tasks = TaskSampler(concept_data, visual_ratio=config.visual_ratio, seed=config.seed)
        self.collector = Collector(
            self.engine, model.concept, concept_data, pictures, rewards, preview_scorer, self.threshold, config
        )
        self.policy = Policy(
            model,
            config.trainable,
            train_concept=config.train_concept,
            lora=config.lora,
            reference_file=folder.path / "reference.safetensors",
            seed=config.seed,
        )
        model.checkpoint_layers = config.checkpoint_layers
        named = self.policy.named_parameters()
        self.optimiser = Optimiser(
            named,
            lr=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            undecayed=frozenset(name for name in named if name.startswith("concept.")),
        )
        self.settings = LossSettings(
            config.beta,
            config.clip_low,
            config.clip_high,
            config.alpha_answer,
            config.alpha_image,
            config.micro_rows,
            config.micro_timesteps,
        )
        self.sizes = PieceSizes()
        self.step = self.skipped = self.bad = 0
        self.recent: list[float] = []

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self, progress: Progress | None, stop: Stop) -> GrpoResult:
        config, values = self.config, {}
        with MetricsLog(self.folder.path, from_step=self.step) as metrics:
            while self.step < config.steps:
                values = self._one_step()
                metrics.write(values)
                self.step += 1
                profiling.step_done()
                self.recent.append(values["reward_mean"])
                due = config.checkpoint_every and self.step % config.checkpoint_every == 0
                stopping = stop() and self.step < config.steps
                if due or stopping or self.step == config.steps:
                    metrics.sync()
                    self.save()
                if progress is not None:
                    progress("grpo", self.step, config.steps, values)
                if stopping:
                    raise Stopped(f"stopped after step {self.step} of {config.steps}, its checkpoint is written")
        self.policy.export(self.folder.path / "final")
        self.policy.merge().requires_grad_(False)
        assert self.model.concept is not None
        return GrpoResult(self.model.concept, self.folder.path, self.step, self.skipped, values)

    def _one_step(self) -> dict[str, Any]:
        started, config = time.perf_counter(), self.config
        experience = self.collector.collect(self.tasks.draw(self.step), self.step)
        rate = learning_rate(
            self.step, lr=config.lr, steps=config.steps, warmup=config.warmup, schedule=config.schedule
        )
        problem, stats, norm = "", UpdateStats(), math.nan
        if not experience.finite:
            problem = f"rewards {[round(value, 4) for value in experience.rewards.tolist()]}"
        else:
            problem, stats, norm = self._update(experience, rate)
        self._count(problem)
        if config.sample_every and (self.step % config.sample_every == 0 or self.step == config.steps - 1):
            self._samples(experience)
        facts = summary(experience)
        return {
            "step": self.step,
            "mode": facts.pop("mode"),
            "loss": stats.loss,
            "loss_answer": stats.loss_answer,
            "loss_image": stats.loss_image,
            "reward_std": facts["within_group_std"],
            "kl": stats.kl,
            "clip_fraction": stats.clip_fraction,
            "ratio_max": stats.ratio_max,
            "ratio_mean": stats.ratio_mean,
            "entropy": stats.entropy,
            "grad_norm": norm,
            "lr": rate,
            "packed_rows": stats.packed_rows,
            **facts,
            "skipped": problem or None,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _update(self, experience: Experience, rate: float) -> tuple[str, UpdateStats, float]:
        """Optimiser steps on one group: (what was not finite, statistics of the first, gradient's length)."""
        config = self.config
        images, answers = trajectories(experience, self.engine, config.token_scope)
        images = some_timesteps(images, config.timestep_fraction, (config.seed << 32) + self.step)
        if config.beta > 0:
            with profiling.phase("reference"), self.policy.reference():
                if config.alpha_image > 0:
                    images.ref_logp_RTN = image_logprobs(
                        self.model, images, config.micro_rows, config.micro_timesteps, self.sizes
                    )
                if config.alpha_answer > 0 and answers is not None:
                    answers.ref_logp_RL = answer_logprobs(self.model, answers)
            profiling.count("reference", lambda: self._image_flops(images, update=False))
        first, norm = UpdateStats(), math.nan
        for inner in range(config.inner_updates):
            self.optimiser.zero_grad()
            with profiling.phase("update"):
                stats = streamed_backward(self.model, experience.advantages, self.settings, images, answers, self.sizes)
            profiling.count("update", lambda: self._image_flops(images, update=True))
            first = stats if inner == 0 else first
            problem = "" if math.isfinite(stats.loss) else f"loss {stats.loss}"
            if not problem:
                with profiling.phase("optimiser"):
                    norm = self.optimiser.step(rate)
                problem = "" if math.isfinite(norm) else f"gradient of length {norm}"
            self.optimiser.zero_grad()
            if problem:
                return problem, stats, norm
        return "", first, norm

    def _image_flops(self, images: ImageTrajectories, update: bool) -> float:
        """Operations of the image tokens' part, beside which answers hardly count; recomputed layers left out."""
        if self.config.alpha_image == 0:
            return 0.0
        rows, steps, count = images.inputs_RTN.shape
        sizes = (self.model.config, rows, steps, max(len(prompt) for prompt in images.prompts), count)
        guided = images.guidance_scale > 0
        if not update:
            return cost.reference(*sizes, guided=guided).flops
        return cost.update(*sizes, guided=guided, trainable=self.config.trainable).flops

    def _count(self, problem: str) -> None:
        if not problem:
            self.bad = 0
            return
        self.skipped, self.bad = self.skipped + 1, self.bad + 1
        log.warning("step %d is left out: %s", self.step, problem)
        if self.bad >= self.config.max_bad_steps:
            raise UserError(
                f"{self.bad} steps in a row, the last of them step {self.step}, are not finite: {problem}. Look at the "
                "experts, lower lr, or use dtype=float32; the last checkpoint is untouched"
            )

    def _samples(self, experience: Experience) -> None:
        images, preview = experience.images, None
        assert images.pixels is not None
        if images.dsog is not None and self.engine.vq is not None:
            with torch.no_grad():
                preview = self.engine.vq.decode(images.dsog.preview_codes.long(), images.grid)
        save_samples(
            self.folder.path,
            self.step,
            final=images.pixels,
            preview=preview,
            prompts=experience.prompts,
            answers=experience.texts,
            rewards=experience.rewards.tolist(),
        )

    # --- stopping and going on -------------------------------------------------------------------------------------

    def save(self) -> None:
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors.update(self.optimiser.state_dict())
        tensors.update(random_state())
        good = [reward for reward in self.recent if math.isfinite(reward)]
        state = {
            "threshold": self.threshold.state_dict(),
            "skipped": self.skipped,
            "bad": self.bad,
            "reward": sum(good) / len(good) if good else None,
        }
        self.recent.clear()
        self.folder.save(self.step, tensors, state, self.config.keep_last, self.config.keep_best)

    def restore(self) -> None:
        """Put the newest whole checkpoint into everything; without one the run begins anew."""
        checkpoint = self.folder.latest()
        if checkpoint is None:
            return
        if checkpoint.step > self.config.steps:
            raise UserError(f"{checkpoint.folder}: is of step {checkpoint.step}, the run has {self.config.steps} steps")
        mine = {name[7:]: value for name, value in checkpoint.tensors.items() if name.startswith("policy.")}
        self.policy.load_state_dict(mine, checkpoint.folder)
        self.optimiser.load_state_dict(checkpoint.tensors, checkpoint.folder)
        restore_random_state(checkpoint.tensors)
        self.threshold.load_state_dict(checkpoint.state["threshold"])
        self.step, self.skipped, self.bad = (int(checkpoint.state[key]) for key in ("step", "skipped", "bad"))
