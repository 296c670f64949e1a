"""This project's own model: a rollout engine with the concept's tokens attached, handed in by whoever owns it.

Answers are greedy; drawings follow from the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.images import black_image, from_pil, square
from ...rewards.base import plain_text
from ...utils.errors import UserError
from ..benchmark import Engine, Expander
from ..subject import Subject

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sampling:
    """How an engine draws and answers."""

    steps: int = 50
    guidance_scale: float = 5.0
    max_new_tokens: int = 100


class Ours:
    """A model that learned the concept. `tokens` None reads `<name>` as the class word (the bare model)."""

    def __init__(self, engine: Engine, tokens: Expander | None, subject: Subject, sampling: Sampling | None = None):
        self.engine, self.tokens, self.subject = engine, tokens, subject
        self.sampling = sampling or Sampling()
        self.size = isqrt(engine.model.config.num_vq_tokens) * engine.vq.downsampling

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The likeliest answer. Show-o looks at one picture at a time; without one it sees black, as in training."""
        if len(images) > 1:
            raise UserError(f"{len(images)} pictures: this model looks at one at a time")
        pixels = from_pil(square(images[0], self.size)) if images else black_image(self.size)
        return self._answer(pixels, self._read(question))

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` drawings, [n, 3, H, W]."""
        return self._draw(self._read(prompt), n, seed)

    def _answer(self, pixels: Tensor, question: str) -> str:
        rollout = self.engine.generate_text(
            pixels[None].to(self.engine.model.device),
            [question],
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=0.0,
        )
        return str(rollout.texts[0])

    def _draw(self, prompt: str, n: int, seed: int, **more: Any) -> Tensor:
        rollout = self.engine.generate_images(
            [prompt],
            samples=n,
            steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
            seed=seed,
            record=False,
            **more,
        )
        pixels: Tensor = rollout.pixels
        return pixels.clamp(-1, 1).to("cpu", torch.float32)

    def _read(self, text: str) -> str:
        """`text` with the concept's helper tokens, or with the class word where the model knows no concept."""
        return plain_text(text, self.subject.class_word) if self.tokens is None else self.tokens.expand(text)
