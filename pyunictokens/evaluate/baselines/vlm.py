"""Any image-text-to-text model of transformers (Qwen2.5-VL, LLaVA, Chameleon, …), told about the concept in words or by
photos. It answers; transformers ships no image decoder for these models, so it does not draw.

Loads from a folder or hub id with the checkpoint's own processor and chat template; decoding is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...utils.errors import UserError
from ..model import Nothing
from ..subject import Subject
from .prompts import photos, told

if TYPE_CHECKING:
    from PIL.Image import Image


class Backbone:
    """The checkpoint, loaded once and shared by all concepts."""

    def __init__(self, path: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.path, self.device = path, torch.device(device)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(path)
            model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"{path}: cannot be loaded as an image-text-to-text model with its processor: {error}"
            ) from error
        self.model = model.to(self.device).eval()
        self.token = str(getattr(self.processor, "image_token", "<image>"))

    @torch.no_grad()
    def answer(self, images: Sequence[Image], question: str, max_new_tokens: int) -> str:
        """The likeliest continuation after the pictures and the question."""
        text = self._prompt(len(images), question)
        inputs = self.processor(text=[text], images=list(images) or None, return_tensors="pt").to(self.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        made = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()

    def _prompt(self, pictures: int, question: str) -> str:
        """By the checkpoint's chat template, else pictures first and the question after them."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
            turns = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        return self.token * pictures + ("\n" if pictures else "") + question


class Vlm(Nothing):
    """A backbone that was told about one concept. `shown` photos are the image prompt; 0 is the text prompt alone."""

    def __init__(self, backbone: Backbone, subject: Subject, shown: int = 0, max_new_tokens: int = 100):
        self.backbone, self.subject, self.max_new_tokens = backbone, subject, max_new_tokens
        self._photos = photos(subject, shown)
        if shown and not self._photos:
            raise UserError(f"{subject.name}: no photos, so there is no image prompt")

    def answer(self, images: Sequence[Image], question: str) -> str:
        """TP: the description, then the question. IP: the photos first, and words that say what they show."""
        if not self._photos:
            return self.backbone.answer(images, told(self.subject, question), self.max_new_tokens)
        first = "The first picture shows" if len(self._photos) == 1 else f"The first {len(self._photos)} pictures show"
        last = " The question is about the last picture." if images else ""
        words = f"{first} {self.subject.sks}.{last} {question}"
        return self.backbone.answer([*self._photos, *images], words, self.max_new_tokens)
