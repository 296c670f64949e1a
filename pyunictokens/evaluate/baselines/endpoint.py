"""A model behind an OpenAI-compatible endpoint, told about the concept in words (TP) or by references (IP).

Questions go to chat completions with images as data URLs; prompts to images/generations, where the endpoint has it and
an image model is named. Retries, time-outs and the key are the business of `rewards.endpoint`.
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
from ...rewards.endpoint import Endpoint, EndpointConfig, EndpointError
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
        """`n` images, squares of one size. The endpoint decides its own noise: the seed is not sent."""
        if not self.config.image_model:
            raise Unsupported(f"{self.config.model}: no image model was named")
        try:
            made = self.endpoint.draw(self.config.image_model, described(self.subject, prompt), n)
        except EndpointError as error:
            raise UserError(f"no image: {error}") from None
        return _stacked([_decoded(image) for image in made], n)


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
