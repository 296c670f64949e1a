"""What reinforcement maximises: one setting, `grpo.objective`, chooses a class of this file or of masked_objectives.py.

What they have to say is told in objective_base.py. A new objective is a class, its line in `REGISTRY`, and its name in
`config/training.py: OBJECTIVES`; one of your own is chosen as `grpo.objective=MODULE:CLASS`.

Shape suffixes: R rollouts, T timesteps, N image codes, L answer tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from ..config.training import GrpoConfig
from ..ops.reference import working_dtype
from ..utils.errors import UserError
from .masked_objectives import Coupled, DiffuGrpo, UniGrpo
from .objective_base import Loss, Objective, Tokens
from .trajectories import ImageTrajectories, remask

__all__ = ["REGISTRY", "Loss", "Objective", "Tokens", "objective_of"]


class UniCTask(Objective):
    """The paper: a ratio for every answer token and every image token of all timesteps, summed."""


class MaskGrpo(Objective):
    """Mask-GRPO (arXiv 2510.13418): a timestep is one action, its probability that of the codes it made known; the
    mean over timesteps. An answer's tokens keep a ratio each."""

    published_reduction = "mean"
    per_token = False

    @classmethod
    def of(cls, config: GrpoConfig) -> Objective:
        return replace(super().of(config), token_scope="newly_unmasked")

    def reduce(self, logp: Tensor, mask: Tensor | None) -> Tensor:
        if logp.dim() < 3:  # an answer
            return logp
        kept = logp if mask is None else torch.where(mask, logp, 0.0)
        return kept.to(working_dtype(logp)).sum(-1)

    def terms(self, tokens: Tokens) -> Tensor:
        return torch.tensor(tokens.shape[1]) if len(tokens.shape) == 3 else super().terms(tokens)


class Gspo(Objective):
    """GSPO (arXiv 2507.18071): one ratio for the whole image and one for the whole answer, length-normalised.

    These ratios lie close to 1: the paper clips at 3e-4 and 4e-4 (`grpo.clip_low`, `grpo.clip_high`).
    """

    published_reduction = "mean"
    per_token = False
    splits_timesteps = False

    def reduce(self, logp: Tensor, mask: Tensor | None) -> Tensor:
        return ops.sequence_logprob(logp, mask)

    def weights(self, tokens: Tokens) -> float | Tensor:
        return 1.0  # one term a rollout

    def check(self, tokens: Tokens) -> None:
        if tokens.mask is None:
            return
        empty = (~tokens.mask.flatten(1).any(1)).nonzero().flatten().tolist()
        if empty:
            raise UserError(
                f"grpo.objective=gspo: no token of rollout {empty[0]} counts (token_scope={self.token_scope}, "
                f"{tokens.shape[1]} timesteps), so it has no ratio: set grpo.token_scope=masked or all, or a larger "
                "grpo.timestep_fraction"
            )


class FinalSample(Objective):
    """The finished sample under random re-masking (UDM-GRPO, MaskFocus): as many positions masked as at each timestep,
    but random ones; a ratio for each of these, summed. The old log-probs are taken under the same masks."""

    @classmethod
    def of(cls, config: GrpoConfig) -> Objective:
        return replace(super().of(config), token_scope="masked")

    def actions(self, images: ImageTrajectories, sample_RN: Tensor, keys: Sequence[Sequence[int]]) -> ImageTrajectories:
        return remask(images, sample_RN, keys)


REGISTRY: dict[str, type[Objective]] = {
    "unictask": UniCTask,
    "mask_grpo": MaskGrpo,
    "gspo": Gspo,
    "final_sample": FinalSample,
    "unigrpo": UniGrpo,
    "diffu_grpo": DiffuGrpo,
    "coupled": Coupled,
}
"""Objectives by the name that `grpo.objective` gives."""


def objective_of(config: GrpoConfig) -> Objective:
    """The objective that `config` chooses, by name or as MODULE:CLASS. Raises UserError where it cannot be had."""
    name = config.objective
    if name in REGISTRY:
        return REGISTRY[name].of(config)
    module, _, kind = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise UserError(f"grpo.objective={name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UserError(f"grpo.objective={name!r}: must be a class derived from pyunictokens.train.objective.Objective")
    return found.of(config)
