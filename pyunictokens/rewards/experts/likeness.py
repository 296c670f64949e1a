"""How much an image resembles the one that its prompt names: DINOv2's features, for prompt lists.

The file in a prompt's column `reference_image` is looked at with the features of DER (der.py), whose formula it shares:
the cosine of both images' mean patch features, or with `match: best` that of patches that find each other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...utils.errors import UserError
from ..base import Device, RewardBatch
from ..registry import register
from .der import FILES, Der, DerConfig, Dinov2


@register("dino", label="DINOv2: likeness", settings=DerConfig, files=FILES)
class Likeness:
    """DER of each image against the image in its prompt's column; files are read and embedded once."""

    columns = ("reference_image",)

    def __init__(self, der: Der):
        self._der = der
        self._pixels: dict[tuple[str, int], Tensor] = {}
        self.to = der.to

    @classmethod
    def from_settings(cls, settings: DerConfig, device: Device) -> Likeness:
        return cls(Der(Dinov2.located(settings, device), settings.match))

    @property
    def bytes(self) -> int:
        return self._der.bytes

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [-1, 1]. Raises UserError naming the prompt that names no image."""
        files = batch.columns.get("reference_image")
        if files is None:
            raise UserError("the prompts have no column reference_image: name a file for each")
        scores = torch.empty(len(batch), device=batch.images.device)
        for file in dict.fromkeys(map(str, files)):
            rows = [row for row, name in enumerate(files) if str(name) == file]
            if files[rows[0]] is None:
                raise UserError(f"prompt {batch.prompts[rows[0]]!r} has no reference_image")
            group = RewardBatch(
                images=batch.images[rows],
                prompts=[batch.prompts[row] for row in rows],
                references=self._read(file, batch.images.shape[-1])[None].to(batch.images.device),
            )
            scores[rows] = self._der.score(group).to(scores)
        return scores

    def _read(self, file: str, size: int) -> Tensor:
        from ...data.images import load_pixels  # wants Pillow, which nothing else here does

        if (file, size) not in self._pixels:
            self._pixels[file, size] = load_pixels(Path(file), size)
        return self._pixels[file, size]
