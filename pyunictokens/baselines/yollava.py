"""Yo'LLaVA (Nguyen et al., 2024): a concept as an identifier and sixteen soft tokens of a LLaVA, which answers.

"<bo> is <token_0>…<token_15>." stands before every question. Only the rows of these tokens in embedding and head learn,
on the answers' tokens: AdamW 1e-3, weight decay 0.01, one question a step, fifteen epochs, images mirrored at random.
The language model inside may be any (vicuna, Phi): the checkpoint says which.

    DIR/tokens.safetensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..config.limits import within
from ..evaluate.baselines.vlm import Backbone
from ..evaluate.core import AnswersOnly, Model
from ..evaluate.tasks import Subject
from ..utils.errors import UserError
from . import answering
from .answering import AnsweringSettings, samples_of, steps_of, vlm_plan
from .base import Job, Method, Plan, Reading, Settings
from .loop import finished
from .token_rows import TokenRows, add_tokens

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_TOKENS = 512


@dataclass(frozen=True)
class YoLlavaSettings(AnsweringSettings):
    """The published recipe."""

    tokens: int = 16
    """Soft tokens of the concept, beside its identifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, MOST_TOKENS, tokens=self.tokens)


def names_of(concept: str, tokens: int, start: int = 0) -> list[str]:
    """The tokens of a concept: identifier, then soft tokens."""
    return [f"<{concept}>", *(f"<token_{start + place}>" for place in range(tokens))]


def sentence(names: Sequence[str]) -> str:
    """What stands before every question."""
    return f"{names[0]} is {''.join(names[1:])}."


class YoLlava(Method[YoLlavaSettings]):
    """The identifier and its soft tokens."""

    name, title, model, generates = "yollava", "Yo'LLaVA", "llava-hf/llava-1.5-13b-hf", False
    about = "an identifier and sixteen soft tokens of a LLaVA; it answers"
    settings: ClassVar[type[Settings]] = YoLlavaSettings

    def plan(self, job: Job[YoLlavaSettings]) -> Plan:
        """Counted from the folder's questions and the sizes of the model."""
        job = self.named(job)
        steps = steps_of(len(self.samples(job)), job.settings)
        rows = len(self.tokens(job))
        return vlm_plan(job, steps, job.settings.batch, lambda width: 2 * rows * width)

    def train(self, job: Job[YoLlavaSettings]) -> Mapping[str, object]:
        """Learn the rows; they are saved when all steps are taken."""
        job = self.named(job)
        backbone = Backbone(str(job.sources.model), job.device, job.dtype)
        names = self.tokens(job)
        rows = self._rows(backbone, names, job.settings.seed)
        self.begin(job, backbone, rows)  # also with `resume`: the stop may have come before the first checkpoint
        samples, settings, before = self.samples(job), job.settings, self.before(names, job.settings)

        def losses(step: int, generator: torch.Generator) -> Iterator[Tensor]:
            batch = [samples[place] for place in answering.picked(len(samples), settings, step)]
            asked = [
                (answering.shown(each.image, settings.flip, generator), f"{before} {each.question}", each.answer)
                for each in batch
            ]
            return answering.losses(backbone, asked)

        steps = answering.learn_samples(job, "tokens", rows.named(), losses, len(samples))
        rows.save(job.folder)
        finished(job)
        return {"rows": len(names), "steps": steps, "tokens": names, "before": before}

    def open(self, reading: Reading, subject: Subject) -> Model:
        facts, settings = reading.trained.facts, reading.trained.settings
        backbone = Backbone(str(reading.trained.model or self.model), reading.device, reading.dtype)
        names = facts["tokens"]
        assert isinstance(names, list)
        rows = self._rows(backbone, [str(name) for name in names], int(str(settings["seed"])))
        rows.restore(reading.folder)
        return Asked(backbone, str(facts["before"]), reading.sampling.max_new_tokens)

    def tokens(self, job: Job[YoLlavaSettings]) -> list[str]:
        """All tokens that learn."""
        return names_of(job.concept.name, job.settings.tokens)

    def before(self, names: Sequence[str], settings: YoLlavaSettings) -> str:
        """What stands before every question."""
        return sentence(names)

    def samples(self, job: Job[YoLlavaSettings]) -> list[answering.Sample]:
        """What is learned from."""
        return samples_of(job.concept)

    def begin(self, job: Job[YoLlavaSettings], backbone: Backbone, rows: TokenRows) -> None:
        """Where the rows start; here where they were drawn."""

    def _rows(self, backbone: Backbone, names: Sequence[str], seed: int) -> TokenRows:
        ids = add_tokens(backbone.model, backbone.processor.tokenizer, names, seed)
        return TokenRows(backbone.model, names, ids)


class YoLlavaPhi(YoLlava):
    """The same on a LLaVA whose language model is Phi-1.5."""

    name, title, model = "yollava-phi", "Yo'LLaVA (Phi-1.5)", ""
    about = "the same on a LLaVA with Phi-1.5 inside, which --model names; it answers"

    def named(self, job: Job[YoLlavaSettings]) -> Job[YoLlavaSettings]:
        if job.sources.model is None:
            raise UserError(
                "yollava-phi: no LLaVA with Phi-1.5 is published in the layout of transformers: give --model, the "
                "folder of one (LlavaForConditionalGeneration with a text_config of model_type phi)"
            )
        return job


class Asked(AnswersOnly):
    """A model with a concept's tokens, asked with the sentence that introduces them."""

    def __init__(self, backbone: Backbone, before: str, max_new_tokens: int):
        self.backbone, self.before, self.max_new_tokens = backbone, before, max_new_tokens

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The likeliest answer."""
        return self.backbone.answer(images, f"{self.before} {question}", self.max_new_tokens)
