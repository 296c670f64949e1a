"""Show-o without training, told about the concept by a text prompt (TP) or an image prompt (IP).

TP: questions follow a description of the concept, drawings get the description in place of its name.
IP: Show-o reads one picture and draws on one grid, so the photo shares them, both squeezed to half their width. A
question is asked about the photo left and the picture in question right. A drawing begins with the photo's codes on the
left half of the grid and the right half is painted beside them (inpainting, as Show-o does it); that half, stretched
back to a square, is the drawing.
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
from ..benchmark import Engine
from ..subject import Subject
from .ours import Ours, Sampling
from .prompts import described, photos, told

if TYPE_CHECKING:
    from PIL.Image import Image


class ShowoText(Ours):
    """Show-o + TP."""

    def __init__(self, engine: Engine, subject: Subject, sampling: Sampling | None = None):
        super().__init__(engine, None, subject, sampling)

    def answer(self, images: Sequence[Image], question: str) -> str:
        return super().answer(images, told(self.subject, question))

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        return self._draw(described(self.subject, prompt), n, seed)


class ShowoImage(Ours):
    """Show-o + IP. Raises UserError for a subject without photos, or a grid that has no left half."""

    def __init__(self, engine: Engine, subject: Subject, sampling: Sampling | None = None):
        super().__init__(engine, None, subject, sampling)
        shown = photos(subject, 1)
        if not shown:
            raise UserError(f"{subject.name}: no photos, so there is no image prompt")
        self._grid = engine.model.grid[0]
        if self._grid % 2:
            raise UserError(f"{self._grid}×{self._grid} codes: an image prompt needs an even number of columns")
        self._photo = from_pil(square(shown[0], self.size))

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The left half shows the concept's photo, the right half the picture asked about (black: none)."""
        if len(images) > 1:
            raise UserError(f"{len(images)} pictures: this model looks at one at a time")
        right = from_pil(square(images[0], self.size)) if images else torch.full_like(self._photo, -1.0)
        both = torch.cat([_half(self._photo), _half(right)], dim=-1)
        name, word = self.subject.sks, self.subject.class_word
        words = f"The left half shows {name}. About the right half: {question}"
        return self._answer(both, plain_text(words.replace(name, f"this {word}"), word))

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """Drawings [n, 3, H, W], each the right half of the grid at its full width."""
        canvas = torch.cat([_half(self._photo), torch.full_like(_half(self._photo), -1.0)], dim=-1)
        codes_N = self.engine.vq.encode(canvas[None].to(self.engine.model.device))[0].cpu()
        codes_HW = codes_N.view(self._grid, self._grid).clone()
        codes_HW[:, self._grid // 2 :] = -1
        word = self.subject.class_word
        drawn = self._draw(plain_text(prompt, f"the same {word}"), n, seed, known_codes=codes_HW.flatten())
        right = drawn[..., drawn.shape[-1] // 2 :]
        return F.interpolate(right, drawn.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)


def _half(pixels: Tensor) -> Tensor:
    """A square picture [3, H, W] squeezed to half its width."""
    shape = (pixels.shape[-2], pixels.shape[-1] // 2)
    return F.interpolate(pixels[None], shape, mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)
