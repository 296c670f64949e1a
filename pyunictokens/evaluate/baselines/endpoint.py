"""A model behind an OpenAI-compatible endpoint, told about the concept in words (TP) or by photos (IP).

Questions go to chat completions with pictures as data URLs; drawings to images/generations, where the endpoint has it
and a drawing model is named. Retries, time-outs and the key are the business of `rewards.endpoint`.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.images import fit_within, from_pil, square
from ...rewards.endpoint import Endpoint, EndpointConfig, EndpointError
from ...rewards.judge import data_url
from ...utils.errors import UserError, needs, require
from ..model import Unsupported
from ..subject import Subject
from .prompts import described, photos, told

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class RemoteConfig(EndpointConfig):
    """An endpoint as a contestant."""

    drawing_model: str = ""
    """The model asked for drawings; empty means that it does not draw."""
    shown: int = 0
    """Photos of the image prompt; 0 is the text prompt."""
    image_side: int = 768
    """Pictures are sent no longer than this."""


class Remote:
    """An endpoint that is told about one concept."""

    def __init__(self, endpoint: Endpoint, config: RemoteConfig, subject: Subject):
        self.endpoint, self.config, self.subject = endpoint, config, subject
        self._photos = photos(subject, config.shown, config.image_side)
        if config.shown and not self._photos:
            raise UserError(f"{subject.name}: no photos, so there is no image prompt")

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The reply. Raises UserError where the endpoint gives none."""
        if self._photos:
            count = len(self._photos)
            first = "The first picture shows" if count == 1 else f"The first {count} pictures show"
            question = f"{first} {self.subject.sks}.{' The question is about the last.' if images else ''} {question}"
        else:
            question = told(self.subject, question)
        shown = [fit_within(image, self.config.image_side) for image in (*self._photos, *images)]
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(from_pil(image), self.config.image_side)}}
            for image in shown
        ]
        content.append({"type": "text", "text": f"{question}\nAnswer briefly."})
        try:
            return self.endpoint.chat([{"role": "user", "content": content}]).text
        except EndpointError as error:
            raise UserError(str(error)) from None

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` drawings, squares of one size. The endpoint decides its own noise: the seed is not sent."""
        if not self.config.drawing_model:
            raise Unsupported(f"{self.config.model}: no drawing model was named")
        openai = require("openai", "judge")
        try:
            made = self._openai().images.generate(
                model=self.config.drawing_model,
                prompt=described(self.subject, prompt),
                n=n,
                response_format="b64_json",
            )
        except openai.OpenAIError as error:
            why = f"HTTP {error.status_code}" if hasattr(error, "status_code") else type(error).__name__
            raise UserError(f"{self.config.drawing_model}: no drawing ({why})") from None
        pictures = [picture.b64_json or "" for picture in (made.data or [])]
        return _stacked([_decoded(picture) for picture in pictures], n)

    def _openai(self) -> Any:
        """A client for drawings; its own retries are enough for them."""
        key = os.environ.get(self.config.key_env, "").strip() if self.config.key_env else ""
        if self.config.key_env and not key:
            raise UserError(f"{self.config.key_env} is not set: the key comes from the environment")
        return require("openai", "judge").OpenAI(
            api_key=key or "none",
            base_url=self.config.base_url,
            timeout=self.config.timeout,
            max_retries=self.config.attempts - 1,
        )


def _decoded(picture: str) -> Image:
    with needs("evaluate"):
        from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(base64.b64decode(picture, validate=True))) as image:
            return image.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        raise UserError(f"the endpoint's drawing cannot be read: {error}") from None


def _stacked(images: Sequence[Image], n: int) -> Tensor:
    if len(images) != n:
        raise UserError(f"the endpoint drew {len(images)} pictures, {n} were asked for")
    side = min(min(image.size) for image in images)
    return torch.stack([from_pil(square(image, side)) for image in images])
