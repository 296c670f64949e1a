"""Model, image tokenizer and text tokenizer that belong together, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..utils.errors import UserError
from .base import ImageTokenizer, MaskedModel, writing
from .concept_tokens import ConceptTokens
from .tokenizer import TextTokenizer


class HasSources(Protocol):
    """Whatever names the three parts, or some of them."""

    @property
    def model(self) -> str | None: ...
    @property
    def vq(self) -> str | None: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def vision(self) -> str | None: ...


@dataclass(frozen=True)
class Sources:
    """Where the three parts come from: folders or hub ids; all None is the embedded toy."""

    model: str | None = None
    vq: str | None = None
    tokenizer: str | None = None
    vision: str | None = field(default=None, repr=False)
    """The image encoder of Show-o's CLIP-ViT variant; None takes the one it was trained with. Left out of the text
    that tells models apart: whoever needs it there names it."""

    @property
    def is_toy(self) -> bool:
        return self.model is None

    @classmethod
    def choose(cls, *candidates: HasSources) -> Sources:
        """The first value given for each part; a word such as show-o-512 implies what is not given. Raises UserError
        when some are named and others are not."""
        from .registry import implied

        models, vqs, tokenizers = zip(*((each.model, each.vq, each.tokenizer) for each in candidates), strict=True)
        model, vq, tokenizer = (next((v for v in part if v is not None), None) for part in (models, vqs, tokenizers))
        if model is not None:
            known = implied(model)
            model, vq, tokenizer = known.model, vq or known.vq, tokenizer or known.tokenizer
        chosen = cls(model, vq, tokenizer, next((c.vision for c in candidates if c.vision is not None), None))
        parts = {"--model": model, "--vq": vq, "--tokenizer": tokenizer}
        missing = [name for name, value in parts.items() if value is None]
        if 0 < len(missing) < 3:
            raise UserError(f"{' and '.join(missing)} missing: name all three parts, or none for the embedded toy")
        if chosen.vision is not None and model is None:
            raise UserError(f"--vision {chosen.vision}: the embedded toy looks at image codes and takes no features")
        return chosen


@dataclass
class ModelBundle:
    """Model, image tokenizer and text tokenizer that belong together, ready on one device.

    ``RolloutEngine.of(bundle)`` draws and answers with it.
    """

    model: MaskedModel
    vq: ImageTokenizer
    tokenizer: TextTokenizer
    """The plain one, without an attached concept's tokens."""
    sources: Sources = field(default_factory=Sources)

    @property
    def concept(self) -> ConceptTokens | None:
        return self.model.concept

    def as_text(self) -> ModelBundle:
        """The model as one of text, where it writes by blocks: what it writes can then be reinforced. Its image
        tokenizer reads the images that prompts are about."""
        writer = writing(self.model)
        return self if writer is self.model else ModelBundle(writer, self.vq, self.tokenizer, self.sources)

    @property
    def size(self) -> int:
        """Pixels along one side of a square image."""
        return self.model.grid[0] * self.vq.downsampling

    @property
    def device(self) -> torch.device:
        return self.model.device
