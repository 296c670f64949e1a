"""What an objective says of rollouts. The objectives themselves are in objective.py and masked_objectives.py.

Every objective is a sum over rollouts of clipped ratios with a divergence penalty (`ops.grpo_loss`):

    loss = −1/R Σ_i Σ_j w_ij·( min(D_ij·A_i, clip(D_ij)·A_i) − β·k3_ij ),   D = exp(reduce(logp) − reduce(old_logp))

and says five things: the advantages A, which tokens count (`token_scope`), what a ratio is a ratio of (`reduce`: a
token, a timestep, a rollout), what each term counts for (`weights`), and whether a loss of some timesteps is a part of
the whole loss (`splits_timesteps`), so that the update may take them one by one.

Shape suffixes: R rollouts, T timesteps, N image codes, L answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from ..config.training import GrpoConfig
from .trajectories import ImageTrajectories


class Tokens(Protocol):
    """What an objective asks of the tokens of some rollouts: images [R, T, N] or answers [R, L]."""

    weight: float

    @property
    def shape(self) -> torch.Size: ...

    @property
    def mask(self) -> Tensor | None:
        """bool, which tokens count; None counts all."""
        ...


class Loss(NamedTuple):
    """A loss of some rollouts, divided by their number."""

    loss: Tensor
    stats: ops.GrpoStats
    ratios: Tensor
    """How many there were, float 0-d: the weight of `stats` among others."""


@dataclass(frozen=True)
class Objective:
    """UniCTask-GRPO (the paper, equation 7): a ratio for every token, summed; other objectives change what differs."""

    token_scope: str = "all"
    """Which image tokens of a timestep count: all, masked (before it), newly_unmasked (by it)."""
    reduction: str = "sum"
    """sum: every term counts 1; mean: a rollout's terms count 1 together."""
    advantage: str = "mean"
    """What becomes of a group's rewards: minus their mean; over their std as well; minus the mean of the others."""

    published_reduction: ClassVar[str] = "sum"
    """What `grpo.reduction=auto` means."""
    per_token: ClassVar[bool] = True
    """A ratio for every token: head, log-probs and loss are then one operation (`ops.maskgit_grpo_loss`)."""
    splits_timesteps: ClassVar[bool] = True
    """Whether the loss is a sum over timesteps. Otherwise the update takes log-probs of everything first, then forms
    the gradient with respect to each, then sends that back microbatch by microbatch."""

    own_views: ClassVar[int] = 0
    """Masks that it hides the finished sample under, for each inner epoch, instead of looking at recorded timesteps;
    0: it looks at those."""

    @classmethod
    def of(cls, config: GrpoConfig) -> Objective:
        """This objective with the numbers of `config`. Raises UserError where they do not fit it."""
        reduction = cls.published_reduction if config.reduction == "auto" else config.reduction
        return cls(config.token_scope, reduction, config.advantage)

    def looks_at(self, config: GrpoConfig) -> int:
        """Timesteps of a rollout, or masks of its own, that one pass of the update goes through."""
        return self.own_views or max(1, round(config.timestep_fraction * config.timesteps))

    def advantages(self, rewards_R: Tensor, groups_R: Tensor) -> Tensor:
        """[R]: each reward against the others of its group. `groups_R` numbers the groups, integer [R]."""
        found = torch.zeros_like(rewards_R)
        for group in groups_R.unique():
            place = groups_R == group
            found[place] = self._of_group(rewards_R[place])
        return found

    def _of_group(self, rewards_G: Tensor) -> Tensor:
        centred = rewards_G - rewards_G.mean()
        if self.advantage == "std":
            return centred / (rewards_G.std() + 1e-4)
        if self.advantage == "leave_one_out":
            return centred * (len(rewards_G) / (len(rewards_G) - 1))
        return centred

    def actions(self, images: ImageTrajectories, sample_RN: Tensor, keys: Sequence[Sequence[int]]) -> ImageTrajectories:
        """What log-probs are taken of: the recorded choices as they are, or something made of the finished samples.

        `keys` are seeds, some numbers a rollout. Where the result's `old_logp_RTN` is empty, the caller takes it under
        the policy of the rollout.
        """
        return images

    def views(
        self, images: ImageTrajectories, sample_RN: Tensor, keys: Sequence[Sequence[int]], epochs: int
    ) -> list[ImageTrajectories]:
        """:meth:`actions` of each inner epoch, or one that serves all of them."""
        return [self.actions(images, sample_RN, keys)]

    def reduce(self, logp: Tensor, mask: Tensor | None) -> Tensor:
        """What a ratio is a ratio of: log-probs of tokens [R, …] as those of larger actions [R], [R, T] or the same."""
        return logp

    def terms(self, tokens: Tokens) -> Tensor:
        """Ratios of each rollout, [R], or a number of them for all."""
        if tokens.mask is None:
            return torch.tensor(tokens.shape[1:].numel())
        return tokens.mask.flatten(1).sum(1)

    def weights(self, tokens: Tokens) -> float | Tensor:
        """What each term counts for: a number, or a tensor that broadcasts to the shape of `reduce`.

        It is taken of all timesteps at once, so a tensor's second dimension has size 1 (or T, and is cut with them).
        """
        if self.reduction == "sum":
            return tokens.weight
        share = 1.0 / self.terms(tokens).clamp_min(1).double()
        return share.view(-1, *[1] * (len(tokens.shape) - 1)) if share.dim() else float(share)

    def check(self, tokens: Tokens) -> None:
        """Raise UserError where nothing can be learned from `tokens`."""

    def loss(
        self,
        logp: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor | None,
        advantages_R: Tensor,
        *,
        weights: Tensor | float,
        mask: Tensor | None,
        clip_low: float,
        clip_high: float,
        beta: float,
    ) -> Loss:
        """The loss of log-probs [R, …]: of these rollouts' tokens, or (where `splits_timesteps`) of some timesteps.

        Tokens outside `mask` have no effect, even if they are NaN.
        """
        new, old = self.reduce(logp, mask), self.reduce(old_logp, mask)
        reference = None if ref_logp is None else self.reduce(ref_logp, mask)
        if new.shape != logp.shape:
            mask = None  # it has had its effect
        loss, stats = ops.grpo_loss(
            new,
            old,
            reference,
            advantages_R,
            alpha=weights,
            clip_low=clip_low,
            clip_high=clip_high,
            beta=beta if reference is not None else 0.0,
            mask=mask,
        )
        ratios = torch.tensor(float(new.numel()), device=new.device) if mask is None else mask.sum().float()
        return Loss(loss, stats, ratios)
