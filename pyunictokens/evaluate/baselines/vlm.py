"""Any image-text-to-text model of transformers (Qwen2.5-VL, LLaVA, Chameleon, …), told about the concept in words or
by references. It answers; transformers ships no image decoder for these models, so it generates no images.

Loads from a folder or hub id with the checkpoint's own processor and chat template; decoding is greedy.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...models.checkpoint import local_or_hub
from ...utils.errors import UserError, needs
from ...utils.files import unreadable
from ..core import AnswersOnly
from ..tasks import Subject
from .prompts import pointed, references, told

if TYPE_CHECKING:
    from PIL.Image import Image


class Backbone:
    """The checkpoint, loaded once and shared by all concepts."""

    def __init__(self, path: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        with needs("evaluate"):
            from transformers import AutoModelForImageTextToText, AutoProcessor

        self.path, self.device = path, torch.device(device)
        path = local_or_hub(path)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(path)
            model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        except Exception as error:  # transformers raises many kinds for files that it cannot read
            raise UserError(
                f"{path}: cannot be loaded as an image-text-to-text model with its processor: {unreadable(path, error)}"
            ) from error
        self.model = model.to(self.device).eval()
        self.token = str(getattr(self.processor, "image_token", "<image>"))

    @torch.no_grad()
    def answer(self, images: Sequence[Image], question: str, max_new_tokens: int, placed: bool = False) -> str:
        """The likeliest continuation after the images and the question (:meth:`inputs`)."""
        inputs = self.inputs(images, question, placed)
        made = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()

    def inputs(self, images: Sequence[Image], question: str, placed: bool = False) -> MutableMapping[str, Tensor]:
        """What the model is given for the images and the question, by the checkpoint's processor. The images come
        first, unless the question has placed them: by :attr:`token`, in their order."""
        text = self._prompt(0 if placed else len(images), question)
        inputs = self.processor(text=[text], images=list(images) or None, return_tensors="pt").to(self.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        return inputs

    def _prompt(self, images: int, question: str) -> str:
        """By the checkpoint's chat template, else images first and the question after them."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
            turns = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        return self.token * images + ("\n" if images else "") + question


class Vlm(AnswersOnly):
    """A backbone that was told about one concept. `shown` references are the image prompt; 0: the text prompt."""

    def __init__(self, backbone: Backbone, subject: Subject, shown: int = 0, max_new_tokens: int = 100):
        self.backbone, self.subject, self.max_new_tokens = backbone, subject, max_new_tokens
        self._references = references(subject, shown)

    def answer(self, images: Sequence[Image], question: str) -> str:
        """TP: the description, then the question. IP: the references first, and words that say what they show."""
        if self._references:
            words = pointed(self.subject, len(self._references), bool(images), question)
        else:
            words = told(self.subject, question)
        return self.backbone.answer([*self._references, *images], words, self.max_new_tokens)
