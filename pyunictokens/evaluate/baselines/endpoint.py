"""A model behind an OpenAI-compatible endpoint, told about the concept in words (TP) or by references (IP).

Questions go to chat completions with images as data URLs; prompts to images/generations, or with references to
images/edits, where the endpoint has them and an image model is named. Retries, time-outs and the key are the business
of `rewards.endpoint`.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...data.images import fit_within, from_pil, square
from ...rewards.base import plain_text
from ...rewards.endpoint import Endpoint, EndpointConfig, EndpointError, gives_base64
from ...rewards.judge import data_url
from ...utils.errors import UserError, needs
from ..core import Unsupported
from ..tasks import Subject
from .prompts import described, pointed, references, told

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class RemoteConfig(EndpointConfig):
    """An endpoint as a contestant."""

    RETIRED = EndpointConfig.RETIRED

    image_model: str = ""
    """The model asked for images; empty means that it generates none."""
    size: str = ""
    """Size of generated images as the endpoint has it, such as 1024x1024; empty leaves it to the endpoint."""
    quality: str = ""
    """Their quality as the endpoint has it: low, medium, high; empty leaves it to the endpoint."""
    shown: int = 0
    """References of the image prompt; 0 is the text prompt."""
    image_side: int = 768
    """Images are sent no longer than this."""


class Remote:
    """An endpoint that is told about one concept."""

    def __init__(self, endpoint: Endpoint, config: RemoteConfig, subject: Subject):
        self.endpoint, self.config, self.subject = endpoint, config, subject
        self._references = references(subject, config.shown, config.image_side)

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The reply. Raises UserError where the endpoint gives none."""
        if self._references:
            question = pointed(self.subject, len(self._references), bool(images), question, "the last")
        else:
            question = told(self.subject, question)
        side = self.config.image_side
        shown = [data_url(from_pil(fit_within(image, side)), side) for image in (*self._references, *images)]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
        text = {"type": "text", "text": f"{question}\nAnswer briefly."}
        try:
            return self.endpoint.chat([{"role": "user", "content": [*content, text]}]).text
        except EndpointError as error:
            raise UserError(str(error)) from None

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` images, squares of one size. The endpoint decides its own noise: the seed is not sent.

        With an image prompt the references go along, where the image model takes images (gpt-image-1 and its kin).
        """
        model, config = self.config.image_model, self.config
        if not model:
            raise Unsupported(f"{config.model}: no image model was named")
        shown: list[bytes] = []
        if self._references and gives_base64(model):
            shown = [_png(image) for image in self._references]
            text = pointed(self.subject, len(shown), False, plain_text(prompt, self.subject.sks))
        else:
            text = described(self.subject, prompt)
        try:
            made = self.endpoint.draw(model, text, n, images=shown, size=config.size, quality=config.quality)
        except EndpointError as error:
            raise UserError(f"no image: {error}") from None
        return _stacked([_decoded(image) for image in made], n)


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _decoded(data: str) -> Image:
    with needs("evaluate"):
        from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            return image.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        raise UserError(f"the endpoint's image cannot be read: {error}") from None


def _stacked(images: Sequence[Image], n: int) -> Tensor:
    if len(images) != n:
        raise UserError(f"the endpoint gave {len(images)} images, {n} were asked for")
    side = min(min(image.size) for image in images)
    return torch.stack([from_pil(square(image, side)) for image in images])
