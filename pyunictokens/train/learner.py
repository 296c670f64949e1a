"""Optimizer steps on the groups of a step: the reference's log-probs, the streamed gradient, its sum over ranks, AdamW.

Each rank takes its own rollouts; the loss is divided by all, so the sum over ranks is the whole objective (paper,
equation 7). What groups are is the collector's business, the gradient that of update.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..config.training import GrpoConfig
from ..models import MaskedModel, answering
from ..utils import profiling
from .collector import Group, LocalRollouts
from .distributed.ranks import Ranks
from .objective import Objective
from .optimizer import make_optimizer
from .policy import Policy
from .spread import is_flat
from .statistics import UpdateStats
from .trajectories import AnswerTrajectories, ImageTrajectories, choose_timesteps
from .update import LossSettings, MicrobatchSizes, answer_logprobs, image_logprobs, streamed_backward

log = logging.getLogger(__name__)


class Learner:
    """The policy's gradient steps."""

    def __init__(self, model: MaskedModel, policy: Policy, objective: Objective, config: GrpoConfig, ranks: Ranks):
        self.model, self.policy, self.objective, self.config, self.ranks = model, policy, objective, config, ranks
        model.checkpoint_layers = config.checkpoint_layers
        self.optimizer = make_optimizer(config, policy.named_parameters(), ranks)
        self.settings = LossSettings(
            config.beta,
            config.clip_low,
            config.clip_high,
            config.alpha_answer,
            config.alpha_image,
            config.micro_rows,
            config.micro_timesteps,
            objective,
        )
        self.sizes = MicrobatchSizes()
        if objective.own_views and config.timestep_fraction < 1 and ranks.first:
            log.warning(
                "timestep_fraction=%g does nothing: grpo.objective=%s hides the finished sample under masks of its own",
                config.timestep_fraction,
                config.objective,
            )

    def update(self, groups: Sequence[Group], step: int, rate: float) -> tuple[str, UpdateStats, float]:
        """Optimizer steps on the groups of a step: (what was not finite, statistics of the first, gradient's length).

        Each rank takes its own rollouts; the loss is divided by all, so the sum over ranks is the whole objective.
        """
        config = self.config
        chosen = most_different(groups, config.groups_kept)
        rows = len(chosen) * config.rollouts_taken
        if config.beta == 0 and config.shard != "full":  # with whole layers spread, ranks must take as many passes
            # a group without spread adds nothing to the gradient, and would cost as much as any other
            chosen = [each for each in chosen if not is_flat(each[1])] or chosen[:1]
        parts = []
        for place, group in chosen:
            local, advantages = self._kept(group)
            if local is not None:
                parts.append((advantages[list(local.rows)], *self._prepared(local, step * config.groups + place)))
        first, norm = UpdateStats(), math.nan
        for epoch in range(config.inner_epochs):
            self.optimizer.zero_grad()
            own = []
            for advantages, views, answers in parts:
                images = views[min(epoch, len(views) - 1)]
                with profiling.phase("update"):
                    own.append(
                        streamed_backward(self.model, advantages, self.settings, images, answers, self.sizes, rows)
                    )
                profiling.count("update", partial(self._image_flops, images, update=True))
            stats = UpdateStats.merged([each for part in self.ranks.gather(own) for each in part])
            first = stats if epoch == 0 else first
            problem = "" if math.isfinite(stats.loss) else f"loss {stats.loss}"
            if not problem:
                with profiling.phase("optimizer"):
                    norm = self.optimizer.step(rate)
                problem = "" if math.isfinite(norm) else f"gradient of length {norm}"
            self.optimizer.zero_grad()
            if problem:
                taken = (
                    "" if epoch == 0 else f" in inner epoch {epoch + 1} of {config.inner_epochs}; those before it stand"
                )
                return problem + taken, stats, norm
        return "", first, norm

    def _kept(self, group: Group) -> tuple[LocalRollouts | None, Tensor]:
        """This rank's rollouts among those of the group that the update takes, and the advantages [G] of all of these,
        0 elsewhere."""
        count = self.config.rollouts_taken
        if count == len(group.advantages):
            return group.local, group.advantages
        rewards, advantages = group.summary.rewards, torch.zeros_like(group.advantages)
        rows = widest(rewards, count)
        advantages[rows] = self.objective.advantages(rewards[rows], torch.zeros(count, dtype=torch.int64))
        return None if group.local is None else group.local.only(rows), advantages

    def _prepared(self, local: LocalRollouts, number: int) -> tuple[list[ImageTrajectories], AnswerTrajectories | None]:
        """What the update takes of this rank's rollouts of group `number`: the timesteps it looks at, what the
        objective makes of them (for each inner epoch, or once for all), and the reference's log-probs.

        Old log-probs that no rollout recorded are taken here only where an optimizer step comes between: in the first
        inner epoch they are those of the update's own forward pass."""
        config, answers = self.config, local.answers
        by_change = config.timestep_choice == "largest_change"
        images = choose_timesteps(
            local.images,
            config.timestep_choice,
            config.timestep_fraction,
            seed=(config.seed << 32) + number,
            embedding_KD=self.model.image_head()[0].detach() if by_change else None,
        )
        keys = [(config.seed, 3, number, row) for row in local.rows]
        views = self.objective.views(images, local.images.chosen_RTN[:, -1], keys, config.inner_epochs)
        for epoch, images in enumerate(views if config.alpha_image > 0 else ()):
            self.objective.check(images)
            once = epoch == 0 and (len(views) > 1 or config.inner_epochs == 1)
            if not len(images.old_logp_RTN) and not once:
                with profiling.phase("reference"):
                    images.old_logp_RTN = self._logprobs(images)
        if config.beta > 0:
            with profiling.phase("reference"), self.policy.reference():
                for images in views if config.alpha_image > 0 else ():
                    images.ref_logp_RTN = self._logprobs(images)
                if config.alpha_answer > 0 and answers is not None:
                    answers.ref_logp_RL = answer_logprobs(answering(self.model), answers)
            profiling.count("reference", lambda: sum(self._image_flops(each, update=False) for each in views))
        return views, answers

    def _logprobs(self, images: ImageTrajectories) -> Tensor:
        return image_logprobs(self.model, images, self.config.micro_rows, self.config.micro_timesteps, self.sizes)

    def _image_flops(self, images: ImageTrajectories, update: bool) -> float:
        """Operations of the image tokens' part, beside which answers hardly count; recomputed layers left out."""
        if self.config.alpha_image == 0:
            return 0.0
        rows, steps, count = images.inputs_RTN.shape
        longest = max(len(prompt) for prompt in images.prompts)
        sizes, costs = (rows, steps, longest, count, images.guidance_scale > 0), self.model.costs
        return (costs.update(*sizes, self.config.trainable) if update else costs.reference(*sizes)).flops


def most_different(groups: Sequence[Group], part: float) -> list[tuple[int, Group]]:
    """(place, group) of the part of the groups whose rewards differ most, at least one, in the order given. Every rank
    sees the rewards of whole groups, so all choose the same."""
    spread = [float(group.summary.rewards.std()) for group in groups]
    first = sorted(range(len(groups)), key=lambda place: -spread[place])[: max(1, round(part * len(groups)))]
    return [(place, groups[place]) for place in sorted(first)]


def widest(rewards_G: Tensor, count: int) -> list[int]:
    """The `count` of a group's rollouts whose rewards have the largest variance, in ascending order: some of the
    highest and some of the lowest (PODS, arXiv 2504.13818). Every rank chooses the same."""
    order: list[int] = rewards_G.double().argsort(stable=True).tolist()
    low_high = [order[:low] + order[len(order) - count + low :] for low in range(count + 1)]

    def variance(rows: list[int]) -> float:
        return float(rewards_G[rows].double().var(correction=0))

    best = max(low_high, key=variance)
    return sorted(best)
