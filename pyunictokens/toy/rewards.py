"""The toy world's reward models: the paper's four formulas over the toy's small networks.

Only adapts: the networks are in networks.py, the formulas in `rewards/experts/`. Does not touch the AttributeReader,
which measures and must never reward.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..rewards.base import Device, ImageEncoder, PreviewJudge, RewardModel
from ..rewards.ensemble import Ensemble
from ..rewards.experts.ber import Ber
from ..rewards.experts.der import Der
from ..rewards.experts.fer import Fer
from ..rewards.experts.preference import FEATURES
from ..rewards.experts.tier import Tier
from .networks import FaceNet, TextEncoder, ToyNetworks


@dataclass(frozen=True)
class ToyRewards:
    """What training and evaluation need of the toy world."""

    ensemble: Ensemble
    nets: ToyNetworks
    """The networks themselves: `nets.image_text` for CLIP scores, `nets.reader` for attribute accuracy."""

    @property
    def preview_scorer(self) -> PreviewJudge:
        """``preview_scorer(prompts)`` is the judge for DSOG: BER of a preview against its prompt."""
        judge = self.ensemble.preview_scorer
        assert judge is not None
        return judge


class _Sentences:
    def __init__(self, net: TextEncoder):
        self._net = net

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self._net(texts)

    def to(self, device: Device) -> None:
        self._net.to(device)


class _Faces:
    def __init__(self, net: FaceNet):
        self._net = net

    def encode_faces(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logit_B, face_BD = self._net(pixels)
        return logit_B > 0, face_BD

    def to(self, device: Device) -> None:
        self._net.to(device)


class _ToyFer(Fer):
    """FER over the toy's faces; a person's tokens start from every reference image, each is known to show the face."""

    def face_embedding(self, pixels: Tensor) -> Tensor:
        return self._encoder.encode_faces(pixels)[1]


def toy_rewards(nets: ToyNetworks, weights: Mapping[str, object] | None = None) -> ToyRewards:
    """The ensemble over networks already loaded."""
    models: dict[str, RewardModel] = {
        "tier": Tier(_Sentences(nets.sentence)),
        "ber": Ber(nets.image_text),
        "der": Der(nets.subject),
        "fer": _ToyFer(_Faces(nets.face)),
    }
    return ToyRewards(Ensemble(models, weights), nets)


def load_toy_rewards(
    assets: str | os.PathLike[str] | None = None,
    *,
    weights: Mapping[str, object] | None = None,
    device: Device = "cpu",
) -> ToyRewards:
    """Load the toy's reward models from a folder, by default the one shipped with the package.

    weights: as for :class:`~pyunictokens.rewards.ensemble.Ensemble`; by default the paper's.
    """
    return toy_rewards(ToyNetworks.from_pretrained(assets).to(device), weights)


def offer_features() -> None:
    """From here on, `features: toy` of the reward model `preference` means the toy's network of images and texts."""
    FEATURES["toy"] = _image_features


def _image_features(weights: str | None, device: Device) -> ImageEncoder:
    return ToyNetworks.from_pretrained(weights).image_text.to(device)
