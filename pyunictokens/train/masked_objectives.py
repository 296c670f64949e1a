"""Objectives of masked diffusion models: they score the finished sample under masks of their own.

    unigrpo       a part drawn anew each step is masked, each inner epoch another part (MMaDA, arXiv 2505.15809)
    diffu_grpo    everything is masked, and some tokens of the prompt (d1, arXiv 2504.12216)
    coupled       one mask, its complement, and everything masked: every token is scored twice (DiffuCoder, 2506.20639)

Masks are drawn anew for each inner epoch. One to three forward passes do where the recorded steps need one each.
Samples are images or texts; of a text, what follows its end does not count and is never masked.

Shape suffixes: R rollouts, T views, N image codes or text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..config.training import GrpoConfig
from ..ops.reference import working_dtype
from .objective_base import Objective, Tokens
from .trajectories import ImageTrajectories, masked_views, random_masks

PROMPT_MASKED = 0.15
"""Part of the prompt's tokens that `diffu_grpo` hides."""
COUPLED_PARTS = (0.2, 0.8)
"""Between these the part is drawn that the first mask of `coupled` hides."""


class _OfMasks(Objective):
    """The masks say which tokens count; a rollout's terms are averaged."""

    published_reduction = "mean"
    own_views: ClassVar[int] = 1

    @classmethod
    def of(cls, config: GrpoConfig) -> Objective:
        return replace(super().of(config), token_scope="masked")

    def actions(self, images: ImageTrajectories, sample_RN: Tensor, keys: Sequence[Sequence[int]]) -> ImageTrajectories:
        return self.views(images, sample_RN, keys, 1)[0]

    def views(
        self, images: ImageTrajectories, sample_RN: Tensor, keys: Sequence[Sequence[int]], epochs: int
    ) -> list[ImageTrajectories]:
        sources = [np.random.default_rng(list(key)) for key in keys]
        return self._views(images, sample_RN, sources, epochs)

    def _views(
        self, images: ImageTrajectories, sample_RN: Tensor, sources: Sequence[np.random.Generator], epochs: int
    ) -> list[ImageTrajectories]:
        raise NotImplementedError


class UniGrpo(_OfMasks):
    """UniGRPO: of each rollout a part is masked, drawn from (0, 1); a ratio for each masked token. The parts of the
    inner epochs lie evenly apart, so that together they see few and many tokens masked."""

    def _views(
        self, images: ImageTrajectories, sample_RN: Tensor, sources: Sequence[np.random.Generator], epochs: int
    ) -> list[ImageTrajectories]:
        starts = [source.random() for source in sources]
        made = []
        for epoch in range(epochs):
            parts = [(start + epoch / epochs) % 1.0 for start in starts]
            made.append(masked_views(images, sample_RN, random_masks(images, parts, sources)[:, None]))
        return made


class DiffuGrpo(_OfMasks):
    """diffu-GRPO: every token of the sample is masked, and each token of the prompt with a chance of 0.15, where the
    model reads such prompts (llada, mmada); a ratio for each token, all from one pass."""

    def _views(
        self, images: ImageTrajectories, sample_RN: Tensor, sources: Sequence[np.random.Generator], epochs: int
    ) -> list[ImageTrajectories]:
        everything = masked_views(images, sample_RN, images.kept[:, None])
        hidden = images.prompt_mask_id
        if hidden is None:
            return [everything]
        made = []
        for _ in range(epochs):
            prompts = []
            for row, source in enumerate(sources):
                ids = images.prompts[images.prompt_of_row[row]]
                away = source.random(len(ids)) < PROMPT_MASKED
                prompts.append([hidden if off else token for token, off in zip(ids, away, strict=True)])
            made.append(replace(everything, prompts=prompts, prompt_of_row=list(range(len(prompts)))))
        return made


class Coupled(_OfMasks):
    """Coupled sampling: one mask, its complement, and everything masked. A token's log-prob is the mean of the two
    views that hide it, so each is scored as often as any other; a ratio for each token."""

    per_token: ClassVar[bool] = False
    splits_timesteps: ClassVar[bool] = False
    own_views: ClassVar[int] = 3

    def _views(
        self, images: ImageTrajectories, sample_RN: Tensor, sources: Sequence[np.random.Generator], epochs: int
    ) -> list[ImageTrajectories]:
        low, high = COUPLED_PARTS
        made = []
        for _ in range(epochs):
            first = random_masks(images, [low + (high - low) * source.random() for source in sources], sources)
            masks = torch.stack([first, images.kept & ~first, images.kept], dim=1)
            made.append(masked_views(images, sample_RN, masks))
        return made

    def reduce(self, logp: Tensor, mask: Tensor | None) -> Tensor:
        if logp.dim() < 3 or mask is None:  # an answer
            return logp
        return torch.where(mask, logp, 0.0).to(working_dtype(logp)).sum(1) / 2

    def terms(self, tokens: Tokens) -> Tensor:
        if tokens.mask is None or len(tokens.shape) < 3:
            return super().terms(tokens)
        return tokens.mask[:, -1].sum(-1)

    def weights(self, tokens: Tokens) -> float | Tensor:
        if tokens.mask is None or len(tokens.shape) < 3:
            return super().weights(tokens)
        counted = tokens.mask[:, -1].double()  # the view that hides everything
        return counted if self.reduction == "sum" else counted / self.terms(tokens).clamp_min(1)[:, None]
