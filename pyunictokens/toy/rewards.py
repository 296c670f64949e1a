"""The toy world's experts behind the same interface as the real ones: small networks in, an Ensemble out.

Only adapts: the networks are in networks.py, the formulas in rewards/experts/. Does not touch the AttributeReader,
which measures and must never reward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rewards.base import Expert
from ..rewards.ensemble import Ensemble
from ..rewards.experts.ber import Ber
from ..rewards.experts.der import Der
from ..rewards.experts.fer import Fer
from ..rewards.experts.tier import Tier
from .networks import FaceNet, TextEncoder, ToyExperts


class ToyRewards(NamedTuple):
    """What training and evaluation need of the toy world."""

    ensemble: Ensemble
    preview_scorer: Callable[[Sequence[str]], Callable[[Tensor, Tensor], Tensor]]
    """``preview_scorer(prompts)`` is the judge for DSOG: BER of a preview against its prompt."""
    nets: ToyExperts
    """The networks themselves: `nets.image_text` for CLIP scores, `nets.reader` for attribute accuracy."""


class _Sentences:
    def __init__(self, net: TextEncoder):
        self._net = net

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self._net(texts)

    def to(self, device: str | torch.device) -> None:
        self._net.to(device)


class _Faces:
    def __init__(self, net: FaceNet):
        self._net = net

    def encode_faces(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logit_B, face_BD = self._net(pixels)
        return logit_B > 0, face_BD

    def to(self, device: str | torch.device) -> None:
        self._net.to(device)


def toy_rewards(nets: ToyExperts, weights: Mapping[str, object] | None = None) -> ToyRewards:
    """The ensemble over networks already loaded."""
    ber = Ber(nets.image_text)
    experts: dict[str, Expert] = {
        "tier": Tier(_Sentences(nets.sentence)),
        "ber": ber,
        "der": Der(nets.subject),
        "fer": Fer(_Faces(nets.face)),
    }
    return ToyRewards(Ensemble(experts, weights), ber.preview_scorer, nets)


def load_toy_experts(
    assets: str | os.PathLike[str] | None = None,
    *,
    weights: Mapping[str, object] | None = None,
    device: str | torch.device = "cpu",
) -> ToyRewards:
    """Load the toy experts from a folder, by default the one shipped with the package.

    weights: as for :class:`~pyunictokens.rewards.ensemble.Ensemble`; by default the paper's.
    """
    return toy_rewards(ToyExperts.from_pretrained(assets).to(device), weights)
