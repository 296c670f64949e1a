"""What somebody prefers, learned from their choices between two images: a Bradley-Terry model on image features.

    P(chosen beats rejected) = sigmoid(w · (f(chosen) − f(rejected)))          (Bradley and Terry, 1952)

f is a frozen network's vector of an image, scaled so that differences have mean square 1; w is the most likely one
under a normal prior of precision `l2`. The score of an image is the probability that it beats the average image of the
choices, so it lies in [0, 1]. The prompt is not read.

`path` is a file of choices as the studio's page *Rate* writes it: one JSON object a line, whose `chosen` and `rejected`
name image files beside it. How many choices are told right that the fit has not seen is cross-validated and logged; one
pair that was rated twice is never on both sides.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.weight_files import WeightFiles
from ...utils.errors import UserError
from ...utils.files import parse_json, safe_name
from ...utils.text import read_text
from ..base import Device, ImageEncoder, RewardBatch, WithNetwork, as_rows
from ..registry import register
from .clip import ClipConfig, OpenClip
from .der import DerConfig, Dinov2

log = logging.getLogger(__name__)

LEAST = 10
"""Choices below which nothing is fitted."""

FOLDS = 5
"""Parts of the cross-validation."""

FEATURES: dict[str, Callable[[str | None, Device], ImageEncoder]] = {}
"""Networks whose features can be taken, by name: (weights or None, device) -> encoder. The toy world adds its own."""


@dataclass(frozen=True)
class PreferenceConfig:
    """A file of choices and the network that looks at their images."""

    path: str
    """The file of choices: preferences.jsonl, or the folder that holds it."""
    features: str = "dino"
    """dino (DINOv2's mean patch features), clip (OpenAI's ViT-L/14), or toy (the toy's image-text network)."""
    weights: str | None = None
    """The network's weights; None: their usual place."""
    l2: float = 0.3
    """Precision of the normal prior of w: larger trusts few choices less."""

    def __post_init__(self) -> None:
        if not 0 < self.l2 < float("inf"):
            raise UserError(f"l2={self.l2}: must be a finite number > 0")


@dataclass(frozen=True)
class Choice:
    """Two images, and which is the better one."""

    chosen: Path
    rejected: Path

    @property
    def pair(self) -> frozenset[bytes]:
        """The same for the same two images, whichever is better."""
        return frozenset(hashlib.sha256(file.read_bytes()).digest() for file in (self.chosen, self.rejected))


def read_choices(path: Path) -> list[Choice]:
    """The choices of a file. Raises UserError naming file and line of what cannot be used."""
    path = path / "preferences.jsonl" if path.is_dir() else path
    choices = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is not JSON: {error}") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("chosen", "rejected")):
            raise UserError(f"{where}: must be an object with chosen and rejected, names of image files beside it")
        files = [path.parent / safe_name(row[key], f"{where}: {key}") for key in ("chosen", "rejected")]
        if absent := [str(file) for file in files if not file.is_file()]:
            raise UserError(f"{where}: no such image: {', '.join(absent)}; take the line out")
        choices.append(Choice(*files))
    return choices


def fit(differences_ND: Tensor, l2: float) -> Tensor:
    """w [D], float64: minimises Σ log(1 + exp(−w·d)) + l2/2 |w|² over differences d (chosen minus rejected), by
    Newton's method with halved steps where a whole one goes too far."""
    d = differences_ND.double()
    w = torch.zeros(d.shape[1], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return F.softplus(-d @ w).sum() + l2 / 2 * w @ w

    for _ in range(100):
        p = torch.sigmoid(-d @ w)
        slope = l2 * w - d.T @ p
        if slope.norm() < 1e-9:
            break
        curve = (d * (p * (1 - p))[:, None]).T @ d + l2 * torch.eye(len(w), dtype=torch.float64)
        step = torch.linalg.solve(curve, slope)
        size = 1.0
        while loss(w - size * step) > loss(w) and size > 1e-6:
            size /= 2
        w = w - size * step
    return w


def told_right(differences_ND: Tensor, pairs: Sequence[object], l2: float) -> float:
    """The part of choices that a fit tells right which has not seen them, nor their pair: cross-validation in FOLDS
    parts. A draw counts as half."""
    place = {pair: number % FOLDS for number, pair in enumerate(dict.fromkeys(pairs))}
    fold_N = torch.tensor([place[pair] for pair in pairs])
    right = 0.0
    for fold in range(FOLDS):
        seen, rest = differences_ND[fold_N != fold], differences_ND[fold_N == fold]
        margin = rest.double() @ fit(seen, l2)
        right += float((margin > 0).sum() + 0.5 * (margin == 0).sum())
    return right / len(pairs)


@register("preference", label="Preference: own choices", settings=PreferenceConfig, judges_previews=True)
class Preference(WithNetwork[ImageEncoder]):
    """Scores images by a Bradley-Terry model that is fitted here to `choices`.

    device: where the encoder is. Raises UserError for fewer than LEAST different pairs, and where no image differs from
    the other for the encoder.
    """

    def __init__(self, encoder: ImageEncoder, choices: Sequence[Choice], l2: float = 0.3, device: Device = "cpu"):
        super().__init__(encoder)
        pairs = [choice.pair for choice in choices]
        if len(set(pairs)) < LEAST:
            raise UserError(
                f"{len(set(pairs))} choices between different images: a preference needs {LEAST} or more, and some "
                "dozens are better: rate more of them on the studio's page Rate"
            )
        chosen, rejected = (
            torch.cat([self._look(file, device) for file in files]).double()
            for files in ([each.chosen for each in choices], [each.rejected for each in choices])
        )
        differences = chosen - rejected
        scale = differences.square().sum(1).mean().sqrt()
        if not scale > 0:
            raise UserError("the images of every choice look the same to this network: choose between others")
        differences = differences / scale
        self.accuracy = told_right(differences, pairs, l2)
        """Part of the choices told right by fits that have not seen them; 0.5 is chance."""
        self.number = len(choices)
        """Choices that it was fitted to."""
        self._w_D = fit(differences, l2) / scale
        self._middle = float(torch.cat([chosen, rejected]).mean(0) @ self._w_D)
        log.info("%s", self)
        if self.accuracy <= 0.5:
            log.warning("%s: no better than chance; rate more, or take other features", self)

    @classmethod
    def from_settings(cls, settings: PreferenceConfig, device: Device) -> Preference:
        if settings.features not in FEATURES:
            raise UserError(f"features={settings.features!r}: must be one of {', '.join(sorted(FEATURES))}")
        choices = read_choices(Path(settings.path).expanduser())
        return cls(FEATURES[settings.features](settings.weights, device), choices, settings.l2, device)

    def __str__(self) -> str:
        return f"preference of {self.number} choices, {self.accuracy:.0%} of unseen ones told right (chance: 50%)"

    @torch.no_grad()
    def _look(self, file: Path, device: Device) -> Tensor:
        """Features [1, D] of an image file, on the CPU."""
        from ...data.images import from_pil, read_image  # wants Pillow, which nothing else here does

        return self._features(from_pil(read_image(file))[None].to(device)).cpu()

    def _features(self, pixels: Tensor) -> Tensor:
        return as_rows(self._encoder.encode_image(pixels), len(pixels), "encode_image").float()

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [0, 1]."""
        features = self._features(batch.images)
        return torch.sigmoid(features @ self._w_D.to(features) - self._middle)


def _usual(files: WeightFiles) -> str:
    return files.home if Path(files.home).exists() else files.source


def _dino(weights: str | None, device: Device) -> ImageEncoder:
    return Dinov2.located(DerConfig(weights or _usual(Dinov2.files)), device)


def _clip(weights: str | None, device: Device) -> ImageEncoder:
    return OpenClip.located(ClipConfig(weights or _usual(OpenClip.files)), device)


FEATURES |= {"dino": _dino, "clip": _clip}
