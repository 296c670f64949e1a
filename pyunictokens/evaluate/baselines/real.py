"""Real images in place of drawings: the upper bound of CLIP-I. It takes the photos kept for testing, else the reference
photos themselves (which are then not compared with themselves). It does not answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...data.images import load_pixels
from ...utils.errors import UserError
from ..model import Nothing
from ..subject import Subject


class RealImages(Nothing):
    """Photos of one concept, in turn."""

    def __init__(self, subject: Subject, size: int = 512):
        self.paths = subject.test_photos or subject.photos
        self.size = size
        if not self.paths:
            raise UserError(f"{subject.name}: no photos to take as real images")

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` photos, [n, 3, size, size], from a place on that the seed decides; no two alike where there are n."""
        first = seed % len(self.paths)
        return torch.stack([load_pixels(self.paths[(first + i) % len(self.paths)], self.size) for i in range(n)])
