"""UniCTask-GRPO, the whole loop: sample a group, reward it, update the policy, write everything down.

    for each step:  task → answers → images (previews judged) → rewards → reference log-probs → streamed update

The parts live beside this file: tasks.py, collector.py, update.py, policy.py, checkpoint/, metrics.py. (Paper: section
3.2, equation 7; appendix F.) With several ranks (distributed/ranks.py) each runs this loop on its share of the rows;
what they decide, they decide alike, and rank 0 alone writes.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config.settings import save_yaml, to_mapping
from ..config.training import GrpoConfig
from ..models import ConceptTokens, MagvitV2, Showo, TextTokenizer
from ..models import costs as cost
from ..rollout.dsog import DsogThreshold
from ..rollout.engine import RolloutEngine
from ..utils import profiling
from ..utils.errors import UserError
from ..utils.signals import Stop, Stopped, never
from .checkpoint.run_state import RunFolder, identity, random_state, restore_random_state
from .checkpoint.writer import Saver, on_host
from .collector import Collector, Experience, Own, PreviewScorer, summary, trajectories
from .distributed.ranks import Ranks
from .images import Pictures
from .metrics import MetricsLog, save_samples
from .objective import objective_of
from .optimizer import Optimiser, learning_rate
from .policy import Policy
from .statistics import UpdateStats
from .tasks import TaskSampler
from .trajectories import AnswerTrajectories, ImageTrajectories, choose_timesteps
from .update import LossSettings, PieceSizes, answer_logprobs, image_logprobs, streamed_backward

log = logging.getLogger(__name__)

PHASES = "phases.json"
"""Where the time of the run's last session went (utils/profiling.py)."""

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
    ranks: Ranks | None = None,
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
        stop: asked after every step; where it says so (on any rank), a checkpoint is written and Stopped raised.
        ranks: the processes that train together, each of which calls this with the same arguments; by default this one
            alone. All must see `out_dir`. Experts score a rank's own rows.

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
    out, ranks = Path(out_dir), ranks or Ranks()
    about: dict[str, Any] = {
        "identity": identity(model, model.concept),
        "settings": to_mapping(config),
        "resume": resume,
    }
    if any(other != about for other in ranks.gather(about)):
        raise UserError(f"rank {ranks.rank} has another model, concept or settings than another rank: start all alike")
    with RunFolder(out, about["identity"], about["settings"], resume=resume, ranks=ranks) as folder:
        run = _Run(model, vq, tokenizer, concept_data, rewards, preview_scorer, config, folder, ranks)
        if ranks.first:
            save_yaml(out / "grpo.yaml", config)
        try:
            if resume:
                run.restore()
            with profiling.Recorder(model.device) as recorder:
                result = run.train(progress, stop)
            if ranks.first:
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
        ranks: Ranks,
    ):
        assert model.concept is not None
        self.model, self.config, self.folder, self.ranks = model, config, folder, ranks
        known = tokenizer if tokenizer.token_id(model.concept.sks) is not None else None
        self.engine = RolloutEngine(
            model, vq, known or tokenizer.with_concept(model.concept.tokens), max_text=config.max_text
        )
        settings = config.dsog
        self.objective = objective_of(config)
        self.threshold = DsogThreshold(
            settings.initial, settings.target_pass_rate, settings.mu, settings.eta, settings.epsilon0
        )
        if preview_scorer is None:
            preview_scorer = getattr(getattr(rewards, "experts", {}).get("ber"), "preview_scorer", None)
        if settings.enabled and preview_scorer is None and ranks.first:
            log.warning("no judge for previews (an expert named ber): DSOG is off")
        pictures = Pictures(model, vq)
        self.tasks = TaskSampler(concept_data, visual_ratio=config.visual_ratio, seed=config.seed)
        self.collector = Collector(
            self.engine,
            model.concept,
            concept_data,
            pictures,
            rewards,
            preview_scorer,
            self.threshold,
            self.objective,
            config,
            ranks,
        )
        self.policy = self._make_policy()
        model.checkpoint_layers = config.checkpoint_layers
        self.optimiser = self._make_optimiser()
        self.saver = Saver(config.save_in_background)
        self.aside = ranks.aside() if config.save_in_background else ranks
        self.settings = LossSettings(
            config.beta,
            config.clip_low,
            config.clip_high,
            config.alpha_answer,
            config.alpha_image,
            config.micro_rows,
            config.micro_timesteps,
            self.objective,
        )
        self.sizes = PieceSizes()
        self.step = self.skipped = self.bad = 0
        self.recent: list[float] = []

    def _make_policy(self) -> Policy:
        """What learns. The reference file is rank 0's to write, so the others come after it."""
        if not self.ranks.first:
            self.ranks.barrier()
        config = self.config
        policy = Policy(
            self.model,
            config.trainable,
            train_concept=config.train_concept,
            lora=config.lora,
            reference_file=self.folder.path / "reference.safetensors",
            seed=config.seed,
            write_reference=self.ranks.first,
        )
        if self.ranks.first:
            self.ranks.barrier()
        return policy

    def _make_optimiser(self) -> Optimiser:
        config, named = self.config, self.policy.named_parameters()
        settings: dict[str, Any] = {
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "max_grad_norm": config.max_grad_norm,
            "undecayed": frozenset(name for name in named if name.startswith("concept.")),
            "ranks": self.ranks,
        }
        wanted = config.shard_optimiser == "always" or (config.shard_optimiser == "auto" and config.trainable == "full")
        if wanted and self.ranks.world > 1:
            from .distributed.sharded_optimizer import ShardedOptimiser

            return ShardedOptimiser(named, **settings)
        return Optimiser(named, **settings)

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self, progress: Progress | None, stop: Stop) -> GrpoResult:
        config, values = self.config, {}
        with ExitStack() as undo:
            metrics = None
            if self.ranks.first:
                metrics = undo.enter_context(MetricsLog(self.folder.path, from_step=self.step))
            undo.callback(self.saver.wait)
            while self.step < config.steps:
                values = self._one_step()
                if metrics is not None:
                    metrics.write(values)
                self.step += 1
                profiling.step_done()
                self.recent.append(values["reward_mean"])
                due = config.checkpoint_every and self.step % config.checkpoint_every == 0
                stopping = self.ranks.any(stop()) and self.step < config.steps
                self.saver.check()
                if due or stopping or self.step == config.steps:
                    if metrics is not None:
                        metrics.sync()
                    self.save()
                if progress is not None:
                    progress("grpo", self.step, config.steps, values)
                if stopping:
                    self.saver.wait()
                    raise Stopped(f"stopped after step {self.step} of {config.steps}, its checkpoint is written")
        if self.ranks.first:
            self.policy.export(self.folder.path / "final")
        self.policy.merge().requires_grad_(False)
        assert self.model.concept is not None
        return GrpoResult(self.model.concept, self.folder.path, self.step, self.skipped, values)

    def _one_step(self) -> dict[str, Any]:
        started, config = time.perf_counter(), self.config
        first = self.step * config.groups
        tasks = [self.tasks.draw(number) for number in range(first, first + config.groups)]
        groups = self.collector.collect(tasks, self.step)
        rate = learning_rate(
            self.step, lr=config.lr, steps=config.steps, warmup=config.warmup, schedule=config.schedule
        )
        problem, stats, norm = "", UpdateStats(), math.nan
        rewards = torch.cat([group.rewards for group in groups])
        if not all(group.finite for group in groups):
            problem = f"rewards {[round(value, 4) for value in rewards.tolist()]}"
        else:
            problem, stats, norm = self._update(groups, rate)
        self._count(problem)
        if config.sample_every and (self.step % config.sample_every == 0 or self.step == config.steps - 1):
            self._samples(groups)
        facts = summary(groups)
        return {
            "step": self.step,
            "mode": facts.pop("mode"),
            "loss": stats.loss,
            "loss_answer": stats.loss_answer,
            "loss_image": stats.loss_image,
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

    def _update(self, groups: Sequence[Experience], rate: float) -> tuple[str, UpdateStats, float]:
        """Optimiser steps on the groups of a step: (what was not finite, statistics of the first, gradient's length).

        Each rank takes its own rows; the loss is divided by all, so the sum over ranks is the whole objective.
        """
        config = self.config
        rows = config.groups * config.group_size
        parts = [
            (group.advantages[group.own.rows], *self._trajectories(group.own, self.step * config.groups + place))
            for place, group in enumerate(groups)
            if group.own is not None
        ]
        first, norm = UpdateStats(), math.nan
        for inner in range(config.inner_epochs):
            self.optimiser.zero_grad()
            own = []
            for advantages, images, answers in parts:
                with profiling.phase("update"):
                    own.append(
                        streamed_backward(self.model, advantages, self.settings, images, answers, self.sizes, rows)
                    )
                profiling.count("update", partial(self._image_flops, images, update=True))
            stats = UpdateStats.merged([each for part in self.ranks.gather(own) for each in part])
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

    def _trajectories(self, own: Own, number: int) -> tuple[ImageTrajectories, AnswerTrajectories | None]:
        """What the update takes of this rank's rows of group `number`, with the reference's log-probs."""
        config = self.config
        images, answers = trajectories(own, self.engine, self.objective.token_scope)
        images = self._actions(images, own, number)
        if config.beta > 0:
            with profiling.phase("reference"), self.policy.reference():
                if config.alpha_image > 0:
                    images.ref_logp_RTN = self._logprobs(images)
                if config.alpha_answer > 0 and answers is not None:
                    answers.ref_logp_RL = answer_logprobs(self.model, answers)
            profiling.count("reference", lambda: self._image_flops(images, update=False))
        return images, answers

    def _actions(self, images: ImageTrajectories, own: Own, number: int) -> ImageTrajectories:
        """The timesteps that the update looks at, and what the objective makes of them."""
        config, sample_RN = self.config, own.images.codes
        embedding_KD = self.model.image_head()[0].detach() if config.timestep_choice == "largest_change" else None
        images = choose_timesteps(
            images,
            config.timestep_choice,
            config.timestep_fraction,
            seed=(config.seed << 32) + number,
            embedding_KD=embedding_KD,
        )
        keys = [(config.seed, 3, number, row) for row in range(own.rows.start, own.rows.stop)]
        images = self.objective.actions(images, sample_RN, keys)
        if config.alpha_image > 0:
            self.objective.check(images)
            if not len(images.old_logp_RTN):
                with profiling.phase("reference"):
                    images.old_logp_RTN = self._logprobs(images)
        return images

    def _logprobs(self, images: ImageTrajectories) -> torch.Tensor:
        return image_logprobs(self.model, images, self.config.micro_rows, self.config.micro_timesteps, self.sizes)

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
        if self.ranks.first:
            log.warning("step %d is left out: %s", self.step, problem)
        if self.bad >= self.config.max_bad_steps:
            raise UserError(
                f"{self.bad} steps in a row, the last of them step {self.step}, are not finite: {problem}. Look at the "
                "experts, lower lr, or use dtype=float32; the last checkpoint is untouched"
            )

    @torch.no_grad()
    def _samples(self, groups: Sequence[Experience]) -> None:
        vq, codes = self.engine.vq, torch.cat([group.codes for group in groups])
        if not self.ranks.first or vq is None:
            return
        previews = [group.preview_codes for group in groups if group.preview_codes is not None]
        device = next(vq.parameters()).device
        save_samples(
            self.folder.path,
            self.step,
            final=vq.decode(codes.to(device)),
            preview=vq.decode(torch.cat(previews).to(device).long()) if previews else None,
            prompts=[prompt for group in groups for prompt in group.prompts],
            answers=[text for group in groups for text in group.texts],
            rewards=[reward for group in groups for reward in group.rewards.tolist()],
        )

    # --- stopping and going on -------------------------------------------------------------------------------------

    def save(self) -> None:
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors.update(self.optimiser.state_dict())
        tensors.update(random_state())
        shards = self.optimiser.shards()
        good = [reward for reward in self.recent if math.isfinite(reward)]
        state = {
            "threshold": self.threshold.state_dict(),
            "skipped": self.skipped,
            "bad": self.bad,
            "reward": sum(good) / len(good) if good else None,
        }
        self.recent.clear()
        self.saver.wait()
        if self.saver.background:
            tensors = on_host(tensors) if self.ranks.first else {}
            shards = on_host(shards)
        keep = self.config.keep_last, self.config.keep_best
        self.saver.run(partial(self.folder.save, self.step, tensors, state, *keep, shards, self.aside))

    def restore(self) -> None:
        """Put the newest whole checkpoint into everything; without one the run begins anew."""
        checkpoint = self.folder.latest()
        if checkpoint is None:
            return
        if checkpoint.step > self.config.steps:
            raise UserError(f"{checkpoint.folder}: is of step {checkpoint.step}, the run has {self.config.steps} steps")
        mine = {name[7:]: value for name, value in checkpoint.tensors.items() if name.startswith("policy.")}
        self.policy.load_state_dict(mine, checkpoint.folder)
        self.optimiser.restore(checkpoint.tensors, checkpoint.shards, checkpoint.folder)
        restore_random_state(checkpoint.tensors)
        self.threshold.load_state_dict(checkpoint.state["threshold"])
        self.step, self.skipped, self.bad = (int(checkpoint.state[key]) for key in ("step", "skipped", "bad"))
