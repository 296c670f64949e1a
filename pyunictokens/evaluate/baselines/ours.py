"""A rollout engine as a model of the evaluation: this project's own, with the concept's tokens, or bare.

Answers are greedy; images follow from the seed and their sample ids alone. Who made the engine is not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ...data.images import black_image, from_pil, square
from ...models.published_form import PublishedForm
from ...rewards.base import plain_text
from ...utils.errors import UserError
from ..core import Question
from ..tasks import Subject

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...rollout.engine import RolloutEngine


class Expander(Protocol):
    """What is asked of a concept's tokens (`ConceptTokens` has it)."""

    def expand(self, text: str) -> str:
        """`text` with the helper tokens before the first `<name>`."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How an engine generates and answers."""

    steps: int = 50
    guidance_scale: float = 5.0
    max_new_tokens: int = 100


class EngineModel:
    """A model that learned the concept. `tokens` None reads `<name>` as the class word (the bare model).

    `size` is the side of the images it is shown, in pixels; by default the engine's own. One that looks at features of
    an image encoder is shown squares of the encoder's side.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokens: Expander | None,
        subject: Subject,
        sampling: Sampling | None = None,
        size: int | None = None,
    ):
        if engine.vq is None:
            raise UserError("the engine has no image tokenizer: evaluation shows and judges images")
        self.engine, self.vq, self.device = engine, engine.vq, engine.model.device
        self.tokens, self.subject, self.sampling = tokens, subject, sampling or Sampling()
        self.grid = engine.model.grid[0]
        self.size = size or self.grid * self.vq.downsampling
        self._looks: dict[str, Tensor] = {}

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The likeliest answer. Show-o looks at one image at a time; without one it sees black, as in training."""
        return self.answers([(images, question)])[0]

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """:meth:`answer` of several questions in one batch."""
        shown = [self.shown(images, question) for images, question in questions]
        seen, texts = torch.stack([self._seen_as(pixels) for pixels, _ in shown]), [text for _, text in shown]
        longest = self.sampling.max_new_tokens
        if isinstance(self.tokens, PublishedForm):
            found = self.engine.generate_text(seen, texts, max_new_tokens=longest, temperature=0.0, raw=True)
        else:
            found = self.engine.generate_text(seen, texts, max_new_tokens=longest, temperature=0.0)
        return list(found.texts)

    def generate(self, prompt: str, n: int, seed: int, first_id: int = 0) -> Tensor:
        """`n` images, [n, 3, H, W]; their sample ids count from `first_id`."""
        return self.images(self.reads(prompt), n, seed, first_id)

    def shown(self, images: Sequence[Image], question: str) -> tuple[Tensor, str]:
        """The image and the words that a question becomes."""
        side = self.engine.features_side or self.size
        pixels = from_pil(square(single(images), side)) if images else black_image(side)
        if isinstance(self.tokens, PublishedForm):
            return pixels, self.tokens.question(question)
        return pixels, self.reads(question)

    def reads(self, text: str) -> str:
        """`text` with the concept's helper tokens, or with the class word where the model knows no concept."""
        return plain_text(text, self.subject.class_word) if self.tokens is None else self.tokens.expand(text)

    def images(self, prompt: str, n: int, seed: int, first_id: int = 0, known_codes: Tensor | None = None) -> Tensor:
        """`n` images of a prompt as it stands; `known_codes` are painted around."""
        images = self.engine.generate_images(
            [prompt],
            samples=n,
            steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
            seed=seed,
            sample_ids=list(range(first_id, first_id + n)),
            known_codes=known_codes,
            record=False,
        )
        assert images.pixels is not None  # the engine has an image tokenizer
        return images.pixels.clamp(-1, 1)

    def _seen_as(self, pixels: Tensor) -> Tensor:
        """What questions are asked about of pixels [3, H, W], made once for each image."""
        key = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        if key not in self._looks:
            self._looks[key] = self.engine.look(pixels[None].to(self.device))[0]
        return self._looks[key]


def single(images: Sequence[Image]) -> Image:
    """The one image there is. Raises UserError for several."""
    if len(images) > 1:
        raise UserError(f"{len(images)} images: this model looks at one at a time")
    return images[0]
