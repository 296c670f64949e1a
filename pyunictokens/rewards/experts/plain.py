"""Rewards without a network, for first runs and tests: the size of an image as JPEG, and how much of a colour it has.

jpeg_size   1 − bytes / (3·H·W): images that compress well score more (`aim: large` turns it round)
colour      how near the pixels come to a colour, in [0, 1]; the prompt's column `colour`, else the setting
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

from ...utils.errors import UserError, needs
from ..base import RewardBatch
from ..networks import to_bytes
from ..registry import register

COLOURS = {
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "pink": (255, 192, 203),
    "brown": (165, 42, 42),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
}
"""Names of colours as sRGB bytes."""


@register("jpeg_size", label="JPEG size")
class JpegSize:
    """How small (or large) an image is as a JPEG of the given quality, as a part of its raw size."""

    def __init__(self, aim: str = "small", quality: int = 95):
        if aim not in ("small", "large"):
            raise UserError(f"aim={aim!r}: must be small or large")
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 95:
            raise UserError(f"quality={quality!r}: must be a whole number from 1 to 95")
        self.aim, self.quality = aim, quality

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [0, 1], but for images so small that the file's head counts."""
        with needs("data"):
            from PIL import Image

        parts = []
        for pixels in to_bytes(batch.images).cpu():
            file = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=self.quality)
            parts.append(len(file.getvalue()) / pixels.numel())
        size = torch.tensor(parts)
        return size if self.aim == "large" else 1 - size


@register("colour", label="Colour")
class Colour:
    """1 − mean distance of the pixels to a colour, over the largest distance there is between two colours."""

    def __init__(self, colour: str = "red"):
        self.colour = _rgb(colour, "colour")

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [0, 1]."""
        wanted = batch.columns.get("colour")
        rows = [
            self.colour if wanted is None or wanted[row] is None else _rgb(wanted[row], f"prompt {prompt!r}: colour")
            for row, prompt in enumerate(batch.prompts)
        ]
        images = batch.images.float()
        target = (torch.tensor(rows, dtype=torch.float32, device=images.device) / 127.5 - 1)[:, :, None, None]
        return 1 - (images - target).pow(2).sum(1).sqrt().mean((1, 2)) / (2 * 3**0.5)


def _rgb(name: object, where: str) -> tuple[int, int, int]:
    if name not in COLOURS:
        raise UserError(f"{where}={name!r}: must be one of {', '.join(COLOURS)}")
    return COLOURS[str(name)]
