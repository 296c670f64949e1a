"""Real images in place of generated ones: the upper bound of CLIP-I. It takes the test images, else the references
themselves (which are then not compared with themselves). It does not answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...data.images import load_pixels
from ...utils.errors import UserError
from ..core import GeneratesOnly
from ..tasks import Subject


class RealImages(GeneratesOnly):
    """Images of one concept, in turn."""

    def __init__(self, subject: Subject, size: int = 512):
        self.paths, self.size = subject.test_images or subject.references, size
        if not self.paths:
            raise UserError(f"{subject.name}: no references to take as real images")

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` images, [n, 3, size, size], from a place on that the seed decides; no two alike where there are n."""
        places = [(seed + index) % len(self.paths) for index in range(n)]
        return torch.stack([load_pixels(self.paths[place], self.size) for place in places])
