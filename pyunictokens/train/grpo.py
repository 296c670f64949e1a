"""Reinforcement, the whole loop: sample groups, reward them, update the policy, write everything down.

    for each step:  tasks → answers → images (previews judged) → rewards → reference log-probs → streamed update

tasks.py says what is asked, collector.py samples and rewards, objective.py says what is maximised, learner.py takes the
gradient steps, policy.py says what learns, bad_steps.py what happens when a number is not finite. Here is their order
(paper, section 3.2; appendix F). With several ranks (distributed/) each runs this loop on its share of the
rollouts; all take the same decisions, and rank 0 alone writes.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config.settings import save_yaml, to_mapping
from ..config.training import GrpoConfig
from ..models import ImageTokenizer, MaskedModel, TextTokenizer, WritingModel
from ..rewards.base import PreviewJudge, Rewards
from ..rollout.dsog import DsogThreshold
from ..rollout.engine import RolloutEngine
from ..utils import profiling
from ..utils.devices import check_training_dtype
from ..utils.errors import NotFinite, UserError
from ..utils.files import read_json_table
from ..utils.progress import Progress
from ..utils.signals import Stop, Stopped, never
from .bad_steps import BadSteps, invalid_rewards
from .checkpoint.run_state import RunFolder, identity, random_state, restore_random_state
from .checkpoint.writer import Saver, on_host
from .collector import ByReward, Collector, Group, RolloutSummary, summary
from .distributed.dealing import IDLE, questions_a_step
from .distributed.ranks import Ranks
from .headroom import FirstGroups, Headroom
from .held_out import LOG as HELD_OUT_LOG
from .held_out import HeldOut, Measurement, save_best
from .learner import Learner
from .metrics import MetricsLog, read_metrics, save_samples, save_texts
from .objective import objective_of
from .optimizer import learning_rate
from .policy import Policy
from .spread import SpreadWatch
from .statistics import UpdateStats
from .tasks import TaskSource
from .text_collector import TextCollector
from .trackers import check_trackers

if TYPE_CHECKING:
    from .distributed.sharded_layers import ShardedLayers

log = logging.getLogger(__name__)

_STILL_AFTER = 10
"""Steps after the warm-up at which a run is looked at: has the policy moved?"""
_MOVED, _KL_MOVED = 0.01, 1e-7
"""It has where this part of its numbers differs from the start, and its tokens' mean divergence is this large."""
_UNKNOWN = 0.5
"""DSOG's threshold until it is known where previews lie."""

PHASES = "phases.json"
"""Where the time of the run's last session went (utils/profiling.py)."""


@dataclass
class RunResult:
    """What a run ends with. The model holds the trained policy."""

    folder: Path
    """The run's folder; `folder / "final"` holds what was learned (`train.load_policy` reads it)."""
    steps: int
    skipped: int
    """Steps without an update because a number was not finite."""
    last: Mapping[str, object]
    """The numbers of the last step."""
    held_out: list[Measurement] = field(default_factory=list)
    """The measurements on held-out prompts, in order; empty without such prompts."""
    best: Measurement | None = None
    """The best of them; `folder / "best"` holds its policy."""
    ended_early: str = ""
    """Why the run ended before its last step; empty where it did not."""


def run_grpo(
    model: MaskedModel,
    vq: ImageTokenizer,
    tokenizer: TextTokenizer,
    tasks: TaskSource,
    rewards: Rewards,
    config: GrpoConfig,
    out_dir: str | os.PathLike[str],
    *,
    preview_judge: PreviewJudge | ByReward | None = None,
    held_out: HeldOut | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Stop = never,
    ranks: Ranks | None = None,
) -> RunResult:
    """Improve `model` on `tasks` by `rewards`. The other arguments are told by `train_grpo` (reinforcement.py).

    held_out: prompts to measure on every `held_out.every` steps, best policy and early end by them (held_out.py).

    Raises:
        MissingExtra: for a tracker of `config.report_to` that is not installed.
        UserError: for settings, data or checkpoints that cannot be used, for a model in float16, and when
            `max_bad_steps` steps in a row have a rollout, reward, loss or gradient that is not finite; a checkpoint
            then stands behind them, so that `resume` goes on with other draws.
        Stopped: `stop` said so before the last step; `resume` goes on from there.
    """
    out, ranks = Path(out_dir), ranks or Ranks()
    check_training_dtype(model.dtype, resume)
    check_trackers(config.report_to)
    config = _settled(config, out, resume, ranks)
    who = {**identity(model), **tasks.identity(), **(held_out.identity() if held_out else {})}
    settings = to_mapping(config)
    about = (who, settings, resume)
    if any(other != about for other in ranks.gather(about)):
        raise UserError(f"rank {ranks.rank} has another model, tasks or settings than another rank: start all alike")
    with RunFolder(out, who, settings, resume=resume, ranks=ranks) as folder:
        run = _Run(model, vq, tokenizer, tasks, rewards, preview_judge, held_out, config, folder, ranks)
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
            run.optimizer.release()


def _settled(config: GrpoConfig, out: Path, resume: bool, ranks: Ranks) -> GrpoConfig:
    """`config` with the number of questions a step: as the run in `out` began, else by the ranks."""
    if config.groups:
        return config
    begun = read_json_table(out / "run.json") if resume and (out / "run.json").is_file() else {}
    settings = begun.get("settings")
    kept = settings.get("groups") if isinstance(settings, dict) else None
    idle = 0.0 if config.shard == "full" else IDLE
    groups = kept if isinstance(kept, int) and kept > 0 else questions_a_step(config.group_size, ranks.world, idle)
    if ranks.first and groups > 1:
        log.info("%d questions a step: %d rollouts for %d ranks", groups, groups * config.group_size, ranks.world)
    return replace(config, groups=groups)


class _Run:
    def __init__(
        self,
        model: MaskedModel,
        vq: ImageTokenizer,
        tokenizer: TextTokenizer,
        tasks: TaskSource,
        rewards: Rewards,
        preview_judge: PreviewJudge | ByReward | None,
        held_out: HeldOut | None,
        config: GrpoConfig,
        folder: RunFolder,
        ranks: Ranks,
    ):
        self.model, self.config, self.folder, self.ranks = model, config, folder, ranks
        if model.concept is not None and tokenizer.token_id(model.concept.sks) is None:
            tokenizer = tokenizer.with_concept(model.concept.tokens)
        engine = RolloutEngine(
            model,
            vq,
            tokenizer,
            capture=config.capture,
            repeats=True,
            products=config.rollout_products,
            head=config.rollout_head,
            blocks=config.rollout_blocks,
        )
        dsog = config.dsog
        initial = _UNKNOWN if isinstance(dsog.initial, str) else dsog.initial
        self.threshold = DsogThreshold(initial, dsog.target_pass_rate, dsog.mu, dsog.eta, dsog.epsilon0)
        preview_judge = preview_judge or rewards.preview_scorer
        self.objective = objective_of(config)
        self.collector: Collector | TextCollector
        if isinstance(model, WritingModel):
            self.collector = TextCollector(engine, model, tasks, rewards, self.objective, config, ranks)
        else:
            if dsog.enabled and preview_judge is None and ranks.first:
                log.warning("no reward model judges previews: DSOG is off")
            self.collector = Collector(
                engine, tasks, rewards, preview_judge, self.threshold, self.objective, config, ranks
            )
        self.policy = self._make_policy()
        self.layers = self._spread_layers()
        self.learner = Learner(model, self.policy, self.objective, config, ranks)
        self.optimizer = self.learner.optimizer
        self.saver = Saver(config.save_in_background)
        self.aside = ranks.aside() if config.save_in_background else ranks
        self.step = 0
        self.bad = BadSteps(config.max_bad_steps, log, ranks.first)
        self.recent: list[float] = []
        self.rewards, self.held_out = rewards, held_out
        self.training: dict[int, float] = {}
        self.headroom = FirstGroups(tasks, rewards, folder.path, config.reward_timeout)
        self.best: Measurement | None = None
        self.spread = SpreadWatch()
        self.metrics: MetricsLog | None = None

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

    def _spread_layers(self) -> ShardedLayers | None:
        """The layers' weights spread over ranks, where that is wanted and there are others."""
        config = self.config
        if config.offload and self.ranks.world == 1:
            raise UserError(
                "grpo.offload=true on one rank: start several ranks with torchrun, or set grpo.offload=false"
            )
        if config.shard != "full" or self.ranks.world == 1:
            return None
        from .distributed.plan import gathers_ahead
        from .distributed.sharded_layers import ShardedLayers, check_shares

        check_shares(config.groups, config.group_size, config.micro_rows, config.micro_timesteps, self.ranks.world)
        ahead = gathers_ahead(self.model, config, self.ranks)
        return ShardedLayers(self.model, self.ranks, offload=config.offload, ahead=ahead)

    def _sampling(self) -> AbstractContextManager[None]:
        """Around rollouts: how their weights come together."""
        return nullcontext() if self.layers is None else self.layers.sampling()

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self, progress: Progress | None, stop: Stop) -> RunResult:
        config, values, why = self.config, {}, ""
        with ExitStack() as undo:
            metrics = measured = None
            if self.ranks.first:
                told, settings = config.report_to, to_mapping(config)
                log_of = MetricsLog(self.folder.path, from_step=self.step, report_to=told, settings=settings)
                metrics = self.metrics = undo.enter_context(log_of)
            if self.ranks.first and self.held_out is not None:
                log_of = MetricsLog(self.folder.path, from_step=self.step + 1, name=HELD_OUT_LOG)
                measured = undo.enter_context(log_of)
            undo.callback(self.saver.wait)
            if self.step == 0 and config.dsog.enabled and config.dsog.initial == "auto":
                with self._sampling():
                    self.collector.calibrate()
            while self.step < config.steps:
                why = self._measure(measured) if self.step % config.held_out.every == 0 else ""
                if why:
                    break
                values = self._one_step()
                kl = values["kl"]
                if values["skipped"] is None and isinstance(kl, float):
                    self._warn_if_still(kl)
                if metrics is not None:
                    metrics.write(values)
                reward = values["reward_mean"]
                assert isinstance(reward, float)
                if math.isfinite(reward):
                    self.training[self.step] = reward
                self.step += 1
                profiling.step_done()
                self.recent.append(reward)
                given_up = self.bad.too_many
                due = config.checkpoint_every and self.step % config.checkpoint_every == 0
                stopping = self.ranks.any(stop()) and self.step < config.steps
                self.saver.check()
                if due or stopping or given_up or self.step == config.steps:
                    if metrics is not None:
                        metrics.sync()
                    self.save()
                if given_up:
                    self.saver.wait()
                    raise UserError(self._diagnosis(str(values["skipped"])))
                if progress is not None:
                    progress("grpo", self.step, config.steps, values)
                if stopping:
                    self.saver.wait()
                    raise Stopped(f"stopped after step {self.step} of {config.steps}, its checkpoint is written")
            if why and self.recent:
                self.save()
            if not why:
                self._measure(measured)
        self.optimizer.settle()
        if self.layers is not None:
            self.layers.undo()
        if self.ranks.first:
            self.policy.export(self.folder.path / "final")
        self.policy.merge().requires_grad_(False)
        history = self.held_out.history if self.held_out is not None else []
        return RunResult(self.folder.path, self.step, self.bad.total, values, history, self.best, why)

    def _measure(self, measured: MetricsLog | None) -> str:
        """Measure on the held-out prompts, where there are any; returns why the run should end here, "" to go on."""
        held_out, config = self.held_out, self.config
        if held_out is None:
            return ""
        done = [each for each in held_out.history if each.step == self.step]  # a run that went on here
        if done:
            held_out.history.remove(done[0])
        with self.optimizer.averaged():
            with self._sampling(), profiling.phase("held-out prompts"):
                now = (
                    done[0]
                    if done
                    else held_out.measure(self.step, self.collector.engine, self.rewards, config, self.ranks)
                )
            said = held_out.add(now, self.training, config.held_out.by)
            if measured is not None and not done:
                measured.write(now.line())
            if measured is not None and self.step == 0 and not done:
                self._held_out_headroom(now)
            if said.best is now:
                with nullcontext() if self.layers is None else self.layers.whole():
                    if self.ranks.first:
                        save_best(self.folder.path, now, self.policy.export)
        self.best = said.best
        why = held_out.why_it_ends(said, config.held_out)
        if why and self.ranks.first:
            log.warning("step %d: %s", self.step, why)
        return why

    def _held_out_headroom(self, now: Measurement) -> None:
        """Of the held-out prompts that have a reference image."""
        assert self.held_out is not None
        tasks = self.held_out.tasks
        batches = {place: tasks.reference(tasks.at(place)) for place in range(len(tasks))}
        own = [now.values["reward"][place] for place, batch in batches.items() if batch is not None]
        true = [float(self.rewards.score(batch).total.mean()) for batch in batches.values() if batch is not None]
        if true:
            Headroom(sum(true) / len(true), sum(own) / len(own), len(true)).say(self.folder.path)

    def _one_step(self) -> dict[str, object]:
        started, config = time.perf_counter(), self.config
        every = config.sample_every
        shown = every > 0 and (self.step % every == 0 or self.step == config.steps - 1)
        groups: list[Group] = []
        problem, stats, norm = "", UpdateStats(), math.nan
        try:
            with self._sampling():
                groups = self.collector.collect(self.step, with_codes=shown)
        except NotFinite as error:
            problem = str(error)
        if groups and self.ranks.first:
            self.headroom.look(groups)
        rate = learning_rate(
            self.step, lr=config.lr, steps=config.steps, warmup=config.warmup, schedule=config.schedule
        )
        problem = problem or invalid_rewards(groups)
        if not problem:
            problem, stats, norm = self.learner.update(groups, self.step, rate)
        self.bad.count(f"step {self.step}", problem)
        if (said := self.spread.see(groups)) and self.ranks.first:
            log.warning("step %d: %s", self.step, said)
        if shown and groups and self.ranks.first:
            self._save_samples(groups)
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

    def _warn_if_still(self, kl: float) -> None:
        """Say so once where the steps after the warm-up are lost: in the rounding of the weights, or in being small."""
        config = self.config
        if self.step != config.warmup + _STILL_AFTER or not self.ranks.first:
            return
        changed = self.policy.changed()
        if changed >= _MOVED and (config.beta == 0 or kl >= _KL_MOVED):
            return
        log.warning(
            "the policy has not moved: after %d steps %.2g %% of the trained numbers differ from where they began "
            "(in %s), and its divergence from the reference is %.2g. Raise grpo.lr (%g), or train more than %s "
            "(grpo.trainable)",
            self.step,
            100 * changed,
            str(self.model.dtype).removeprefix("torch."),
            kl,
            config.lr,
            {"concept": "the concept's rows", "lora": "adapters"}.get(config.trainable, "now"),
        )

    @torch.no_grad()
    def _save_samples(self, groups: Sequence[Group]) -> None:
        """Decoded here, all together: other batches round otherwise, and the files would depend on the ranks."""
        shown, vq = RolloutSummary.merged([group.summary for group in groups]), self.collector.engine.vq
        if shown.codes is None:
            save_texts(self.folder.path, self.step, shown)
            return
        assert vq is not None and shown.codes is not None
        device = next(vq.parameters()).device
        previews = None if shown.preview_codes is None else vq.decode(shown.preview_codes.to(device).long())
        grids = save_samples(self.folder.path, self.step, shown, vq.decode(shown.codes.to(device)), previews)
        if self.metrics is not None:
            for name, grid in grids.items():
                self.metrics.show(f"samples/{name}", grid, self.step)

    def _diagnosis(self, problem: str) -> str:
        return self.bad.diagnosis(
            f"step {self.step - 1}",
            f"step {self.step}",
            problem,
            "look at the reward models, lower lr, or use dtype=float32",
        )

    # --- stopping and going on -------------------------------------------------------------------------------------

    def save(self) -> None:
        tensors = {f"policy.{name}": value for name, value in self._trained().items()}
        tensors.update(self.optimizer.state_dict())
        tensors.update(random_state())
        shards = self.optimizer.shards()
        good = [reward for reward in self.recent if math.isfinite(reward)]
        state = {
            "threshold": self.threshold.state_dict(),
            "skipped": self.bad.total,
            "bad": self.bad.carried,
            "reward": sum(good) / len(good) if good else None,
        }
        self.recent.clear()
        self.saver.wait()
        if self.saver.background:
            tensors = on_host(tensors) if self.ranks.first else {}
            shards = on_host(shards)
        keep = self.config.keep_last, self.config.keep_best
        self.saver.run(partial(self.folder.save, self.step, tensors, state, *keep, shards, self.aside))

    def _trained(self) -> dict[str, torch.Tensor]:
        """The trained tensors, whole: on rank 0 alone where they are spread."""
        state = self.policy.state_dict()
        if self.layers is None:
            return state
        from .distributed.sharded_layers import whole

        found = {}
        for name, value in state.items():  # one by one: all of them would be another model
            gathered = whole(value)
            if self.ranks.first:
                found[name] = gathered if gathered is value else gathered.cpu()
        return found

    def restore(self) -> None:
        """Put the newest whole checkpoint into everything; without one the run begins anew."""
        checkpoint = self.folder.latest()
        if checkpoint is None:
            return
        if checkpoint.step > self.config.steps:
            raise UserError(f"{checkpoint.folder}: is of step {checkpoint.step}, the run has {self.config.steps} steps")
        mine = {name[7:]: value for name, value in checkpoint.tensors.items() if name.startswith("policy.")}
        self.policy.load_state_dict(mine, checkpoint.folder)
        self.optimizer.restore(checkpoint.tensors, checkpoint.shards, checkpoint.folder)
        restore_random_state(checkpoint.tensors)
        self.threshold.load_state_dict(checkpoint.state["threshold"])
        self.step, self.bad.total, self.bad.row = (int(checkpoint.state[key]) for key in ("step", "skipped", "bad"))
        if self.held_out is None:
            return
        lines = read_metrics(self.folder.path) if self.ranks.first else []
        rewards = {line["step"]: line["reward_mean"] for line in lines if line["step"] < self.step}
        self.training = self.ranks.broadcast({step: value for step, value in rewards.items() if value is not None})
        self.held_out.restore(self.folder.path, self.step, self.ranks)
