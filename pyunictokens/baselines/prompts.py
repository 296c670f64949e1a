"""Models that are told about a concept and learn nothing: in words (TP) or by a reference (IP).

Training one writes down which model is meant, so that a table names it as it names all others; `evaluate/baselines/`
asks it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..utils.errors import UserError
from .base import BaselineSettings, Job, Method, Plan, Trained
from .planning import lacking, parts_lacking


@dataclass(frozen=True)
class EndpointSettings(BaselineSettings):
    """Which endpoint is asked."""

    url: str = "https://api.openai.com/v1"
    """The endpoint, up to /v1."""
    draw: str = ""
    """The model asked for images; empty: it generates none."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; `none` where the endpoint wants none."""


class _Prompted(Method[BaselineSettings]):
    """What they share: nothing is trained."""

    settings: ClassVar[type[BaselineSettings]] = BaselineSettings
    trains = False
    asks: ClassVar[str] = ""
    """The model in the words of `evaluate.baselines`; {model} is the one named."""
    shows: ClassVar[bool] = False
    """Whether it is shown a reference."""

    def plan(self, job: Job[BaselineSettings]) -> Plan:
        """No step; what has to be fetched before it can be asked."""
        return Plan(0, downloads=self._lacking(job), needs=tuple(self._problems(job)))

    def train(self, job: Job[BaselineSettings]) -> Mapping[str, object]:
        """Writes down what is to be asked. Raises UserError where it cannot be."""
        for problem in self._problems(job):
            raise UserError(f"{self.name}: {problem}")
        return {"words": self.asks.format(model=job.sources.model or self.model)}

    def words(self, folder: Path, trained: Trained) -> str:
        return str(trained.facts["words"])

    def _problems(self, job: Job[BaselineSettings]) -> list[str]:
        """Why it could not be asked."""
        if self.shows and not job.concept.train_images:
            return [f"an image prompt needs a reference, and {job.concept.train_folder} has none"]
        return []

    def _lacking(self, job: Job[BaselineSettings]) -> tuple[str, ...]:
        """What must be fetched before it can be asked."""
        return parts_lacking(job.sources) if self.masked else lacking([job.sources.model or self.model])


class ShowoText(_Prompted):
    """Show-o + TP."""

    name, title, masked, asks = "showo-tp", "Show-o + TP", True, "showo-tp"
    about = "the bare masked model, told about the concept in words"


class ShowoImage(_Prompted):
    """Show-o + IP."""

    name, title, masked, asks, shows = "showo-ip", "Show-o + IP", True, "showo-ip", True
    about = "the bare masked model, shown a reference beside each image"


class _Transformers(_Prompted):
    """An image-text-to-text model of transformers; it draws nothing."""

    asks, generates = "transformers:{model}", False


class ChameleonText(_Transformers):
    """Chameleon + TP."""

    name, title, model = "chameleon-tp", "Chameleon + TP", "facebook/chameleon-7b"
    about = "Chameleon, told about the concept in words; it answers"


class ChameleonImage(_Transformers):
    """Chameleon + IP."""

    name, title, model = "chameleon-ip", "Chameleon + IP", "facebook/chameleon-7b"
    about = "Chameleon, shown a reference; it answers"
    asks, shows = "transformers:{model}+ip", True


class QwenText(_Transformers):
    """Qwen2.5-VL + TP."""

    name, title, model = "qwen-tp", "Qwen2.5-VL + TP", "Qwen/Qwen2.5-VL-7B-Instruct"
    about = "Qwen2.5-VL, told about the concept in words; it answers"


class LlavaText(_Transformers):
    """LLaVA-1.5 + TP."""

    name, title, model = "llava-tp", "LLaVA-1.5 + TP", "llava-hf/llava-1.5-13b-hf"
    about = "LLaVA-1.5, told about the concept in words; it answers"


class GptText(_Prompted):
    """GPT-4o + TP."""

    name, title, model = "gpt-tp", "GPT-4o + TP", "gpt-4o"
    about = "a model behind an OpenAI-compatible endpoint, told about the concept in words"
    settings: ClassVar[type[BaselineSettings]] = EndpointSettings

    def train(self, job: Job[BaselineSettings]) -> Mapping[str, object]:
        settings = job.settings
        assert isinstance(settings, EndpointSettings)
        super().train(job)
        draw = f",draw={settings.draw}" if settings.draw else ""
        key = "" if settings.key_env == "OPENAI_API_KEY" else f",key={settings.key_env}"
        model = job.sources.model or self.model
        return {"words": f"endpoint:{settings.url},model={model}{draw}{key}{'+ip' if self.shows else ''}"}

    def abilities(self, settings: BaselineSettings) -> tuple[bool, bool]:
        assert isinstance(settings, EndpointSettings)
        return True, bool(settings.draw)

    def _problems(self, job: Job[BaselineSettings]) -> list[str]:
        assert isinstance(job.settings, EndpointSettings)
        key = job.settings.key_env
        wanted = [] if key == "none" or os.environ.get(key) else [f"the endpoint's key: set {key}, or key_env=none"]
        return [*super()._problems(job), *wanted]

    def _lacking(self, job: Job[BaselineSettings]) -> tuple[str, ...]:
        return ()


class GptImage(GptText):
    """GPT-4o + IP."""

    name, title, shows = "gpt-ip", "GPT-4o + IP", True
    about = "a model behind an OpenAI-compatible endpoint, shown a reference"
