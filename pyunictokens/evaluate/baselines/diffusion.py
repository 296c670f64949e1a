"""Any text-to-image pipeline of diffusers: weights of DreamBooth (a whole pipeline, or a LoRA over one) or of textual
inversion (an embedding over one). It generates images and does not answer.

In prompts the concept's name becomes the words its weights were trained with: DreamBooth's "sks dog", or the token of
the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.checkpoint import local_or_hub
from ...rewards.base import plain_text
from ...utils.errors import UserError, require
from ...utils.files import unreadable
from ..core import GeneratesOnly
from ..tasks import Subject


@dataclass(frozen=True)
class DiffusionSource:
    """Where the pipeline comes from and how it is called."""

    path: str
    """Folder or hub id of the pipeline (model_index.json)."""
    lora: str | None = None
    """DreamBooth weights as a LoRA: a folder or a .safetensors file."""
    embedding: str | None = None
    """A textual-inversion embedding: a folder or a .safetensors file."""
    token: str = ""
    """What stands for the concept in prompts; `{class}` is its class word. Default: "sks {class}" for DreamBooth, and
    the embedding's own "<name>" for textual inversion."""
    steps: int = 50
    guidance_scale: float = 7.5
    size: int | None = None
    """Side in pixels; by default the pipeline's own."""


class Pipeline:
    """The pipeline, loaded once."""

    def __init__(self, source: DiffusionSource, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        diffusers = require("diffusers", "diffusers")
        self.device = torch.device(device)
        found = {"lora": source.lora, "embedding": source.embedding}
        for name, given in found.items():
            try:
                found[name] = local_or_hub(given) if given else given
            except UserError as error:
                raise UserError(f"{name}={error}") from None
        source = replace(source, lora=found["lora"], embedding=found["embedding"])
        self.source, place = source, local_or_hub(source.path)
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(place)
        except Exception as error:  # diffusers and torch raise many kinds for files that they cannot read
            why = unreadable(source.path, error)
            raise UserError(f"{source.path}: cannot be loaded as a pipeline of diffusers: {why}") from error
        self.pipe: Any = pipe.to(self.device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        if getattr(self.pipe, "safety_checker", None) is not None:
            self.pipe.safety_checker = None  # it blackens images, which would be scored as they are
        if source.lora:
            self._load("load_lora_weights", source.lora)
        self._embedded: set[str] = set()

    def embed(self, token: str) -> None:
        """Load the textual-inversion embedding under `token`, once."""
        if self.source.embedding and token not in self._embedded:
            self._load("load_textual_inversion", self.source.embedding, token=token)
            self._embedded.add(token)

    def _load(self, method: str, given: str, **more: object) -> None:
        if not hasattr(self.pipe, method):
            raise UserError(f"{type(self.pipe).__name__} has no {method}: {given} does not fit this pipeline")
        try:
            getattr(self.pipe, method)(given, **more)
        except Exception as error:  # as above
            why = unreadable(given, error)
            raise UserError(f"{given}: cannot be loaded into {type(self.pipe).__name__}: {why}") from error

    @torch.no_grad()
    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """[n, 3, H, W] in [-1, 1]; each image has a generator of its own, so its number decides and not the batch."""
        more: dict[str, int] = {}
        if self.source.size:
            more = {"height": self.source.size, "width": self.source.size}
        generators = [torch.Generator("cpu").manual_seed(seed * 1000 + index) for index in range(n)]
        made = self.pipe(
            [prompt] * n,
            generator=generators,
            num_inference_steps=self.source.steps,
            guidance_scale=self.source.guidance_scale,
            output_type="np",
            **more,
        )
        pixels = torch.from_numpy(np.asarray(made.images, dtype=np.float32)).permute(0, 3, 1, 2)
        return pixels * 2.0 - 1.0


class Diffusion(GeneratesOnly):
    """A pipeline that generates one concept."""

    def __init__(self, pipeline: Pipeline, subject: Subject):
        self.pipeline, self.subject = pipeline, subject
        token = pipeline.source.token or (subject.sks if pipeline.source.embedding else "sks {class}")
        self.words = token.replace("{class}", subject.class_word)
        pipeline.embed(self.words)

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` images of the prompt with the concept's own words in place of its name."""
        return self.pipeline.generate(plain_text(prompt, self.words), n, seed)


def parse_source(words: Sequence[str]) -> DiffusionSource:
    """A source from ``PATH`` followed by ``key=value`` words (lora, embedding, token, steps, guidance_scale, size)."""
    path, *rest = words
    values: dict[str, Any] = {}
    kinds = {"lora": str, "embedding": str, "token": str, "steps": int, "guidance_scale": float, "size": int}
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals or key not in kinds:
            raise UserError(f"{word!r}: must be KEY=VALUE with one of {', '.join(kinds)}")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            raise UserError(f"{word!r}: {value!r} is no {kinds[key].__name__}") from None
    return DiffusionSource(path, **values)
