"""Show-o without training, told about the concept by a text prompt (TP) or an image prompt (IP).

TP: questions follow a description of the concept, prompts get the description in place of its name.
IP: Show-o reads one image and generates on one grid, so the reference shares them, both squeezed to half their width. A
question is asked about the reference left and the image in question right. Generation begins with the reference's codes
on the left half of the grid and the right half is painted beside them (inpainting, as Show-o does it); that half,
stretched back to a square, is the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.images import from_pil, square
from ...rewards.base import plain_text
from ...utils.errors import UserError
from ..tasks import Subject
from .ours import EngineModel, Sampling, single
from .prompts import described, references, told

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...rollout.engine import RolloutEngine


class ShowoText(EngineModel):
    """Show-o + TP."""

    def __init__(self, engine: RolloutEngine, subject: Subject, sampling: Sampling | None = None):
        super().__init__(engine, None, subject, sampling)

    def shown(self, images: Sequence[Image], question: str) -> tuple[Tensor, str]:
        return super().shown(images, told(self.subject, question))

    def generate(self, prompt: str, n: int, seed: int, first_id: int = 0) -> Tensor:
        return self.images(described(self.subject, prompt), n, seed, first_id)


class ShowoImage(EngineModel):
    """Show-o + IP. Raises UserError for a subject without references, or a grid that has no left half."""

    def __init__(self, engine: RolloutEngine, subject: Subject, sampling: Sampling | None = None):
        super().__init__(engine, None, subject, sampling)
        if self.grid % 2:
            raise UserError(f"{self.grid}×{self.grid} codes: an image prompt needs an even number of columns")
        (reference,) = references(subject, 1)
        self._left = _half(from_pil(square(reference, self.size)))

    def shown(self, images: Sequence[Image], question: str) -> tuple[Tensor, str]:
        """The left half shows the reference, the right half the image asked about (black: none)."""
        right = _half(from_pil(square(single(images), self.size))) if images else torch.full_like(self._left, -1.0)
        words = f"The left half shows {self.subject.sks}. About the right half: {question}"
        words = words.replace(self.subject.sks, f"this {self.subject.class_word}")
        return torch.cat([self._left, right], dim=-1), self.reads(words)

    def generate(self, prompt: str, n: int, seed: int, first_id: int = 0) -> Tensor:
        """Images [n, 3, H, W], each the right half of the grid at its full width."""
        canvas = torch.cat([self._left, torch.full_like(self._left, -1.0)], dim=-1)
        codes_N = self.vq.encode(canvas[None].to(self.device))[0].cpu()
        codes_HW = codes_N.view(self.grid, self.grid).clone()
        codes_HW[:, self.grid // 2 :] = -1
        words = plain_text(prompt, f"the same {self.subject.class_word}")
        made = self.images(words, n, seed, first_id, codes_HW.flatten()).to("cpu", torch.float32)
        right = made[..., made.shape[-1] // 2 :]
        return F.interpolate(right, made.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)


def _half(pixels: Tensor) -> Tensor:
    """A square image [3, H, W] squeezed to half its width."""
    shape = (pixels.shape[-2], pixels.shape[-1] // 2)
    return F.interpolate(pixels[None], shape, mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)
