"""What methods share that teach an image-text-to-text model of transformers to answer: samples, loss, plan.

A question is put to the model as a table puts it (`evaluate/baselines/vlm.py: Backbone.inputs`); the answer with the
end of text is what is learned, and nothing else has a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.limits import MOST, above, within
from ..data.batches import understanding_items
from ..data.concept import Concept
from ..data.images import read_image
from ..evaluate.baselines.vlm import Backbone
from ..utils.errors import needs
from .base import BaselineSettings, Job, Plan, Settings
from .loop import Losses, batch_of, learn
from .planning import bytes_of, lacking, numbers_of

if TYPE_CHECKING:
    from PIL.Image import Image

_TOKENS = 700
"""Tokens of a question with one image of 576 patches, for the estimate of operations."""


@dataclass(frozen=True)
class AnsweringSettings(BaselineSettings):
    """How long is learned, and how fast."""

    epochs: int = 15
    """Passes over all questions."""
    max_steps: int = 0
    """Steps at most; 0 takes all epochs."""
    batch: int = 1
    """Questions a step."""
    lr: float = 1e-3
    """Learning rate of AdamW, constant."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    flip: float = 0.5
    """Share of the images that are mirrored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, MOST, epochs=self.epochs, batch=self.batch)
        within(0, MOST, max_steps=self.max_steps)
        above(0, lr=self.lr)
        within(0, 10, lr=self.lr, weight_decay=self.weight_decay)
        within(0, 1, flip=self.flip)


@dataclass(frozen=True)
class Sample:
    """A question with its answer; the concept as `<name>`."""

    image: Path | None
    question: str
    answer: str


def samples_of(concept: Concept) -> list[Sample]:
    """All that a folder teaches to answer: conversations, questions without an image, recognition."""
    return [Sample(item.image, item.question, item.answer) for item in understanding_items(concept)]


def steps_of(count: int, settings: AnsweringSettings) -> int:
    """Optimizer steps over `count` samples."""
    steps = -(-count // settings.batch) * settings.epochs
    return min(steps, settings.max_steps or steps)


def picked(count: int, settings: AnsweringSettings, step: int) -> list[int]:
    """The samples of a step."""
    return batch_of(count, settings.batch, settings.seed, step)


def learn_samples(
    job: Job[AnsweringSettings],
    what: str,
    named: Mapping[str, nn.Parameter],
    losses: Losses,
    samples: int,
    eps: float = 1e-8,
    schedule: str = "constant",
) -> int:
    """:func:`learn` over so many samples as the job's settings say; returns its steps. With another schedule than
    "constant" 3 % of them warm up."""
    settings, steps = job.settings, steps_of(samples, job.settings)
    warmup = 0 if schedule == "constant" else round(0.03 * steps)
    learn(
        job,
        what,
        named,
        losses,
        steps=steps,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        eps=eps,
        warmup=warmup,
        schedule=schedule,
    )
    return steps


def shown(path: Path | None, flip: float, generator: torch.Generator) -> list[Image]:
    """A sample's image, mirrored as often as `flip` says; none without one."""
    if path is None:
        return []
    mirrored = float(torch.rand((), generator=generator)) < flip
    image = read_image(path)
    if not mirrored:
        return [image]
    with needs("data"):
        from PIL import ImageOps

    return [ImageOps.mirror(image)]


def answer_ids(backbone: Backbone, answer: str) -> Tensor:
    """[A] ids of an answer with the end of text."""
    tokenizer = backbone.processor.tokenizer
    ids = [int(index) for index in tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]]
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return torch.tensor([*ids, *end], device=backbone.device)


def losses(
    backbone: Backbone, batch: Sequence[tuple[Sequence[Image], str, str]], placed: bool = False
) -> Iterator[Tensor]:
    """The mean cross-entropy over the answers' tokens of a batch of (images, question, answer), a part a sample.

    placed: whether the questions have placed their images themselves (`Backbone.inputs`).
    """
    targets = [answer_ids(backbone, answer) for _, _, answer in batch]
    total = sum(len(each) for each in targets)
    for (images, question, _), target_A in zip(batch, targets, strict=True):
        inputs = dict(backbone.inputs(images, question, placed))
        prompt = inputs.pop("input_ids")
        ids = torch.cat([prompt, target_A[None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(target_A)))
        logits_AV = backbone.model(input_ids=ids, **inputs, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
        if logits_AV.dtype in (torch.float16, torch.bfloat16):
            logits_AV = logits_AV.float()
        yield F.cross_entropy(logits_AV, target_A, reduction="sum") / total


def vlm_plan(job: Job[Settings], steps: int, samples: int, learned: Callable[[int], int]) -> Plan:
    """A plan of `steps` steps with `samples` samples each on the model that `job` names.

    learned: numbers that learn, of the model's width. Sizes are those of the config, where it is on this machine.
    """
    place = job.sources.model or ""
    absent = lacking([place])
    if absent:
        return Plan(steps, downloads=absent, notes=("its size is not known before it is here",))
    from ..models.checkpoint import resolve

    with needs("evaluate"):
        from transformers import AutoConfig, AutoModelForImageTextToText

    config: Any = AutoConfig.from_pretrained(resolve(place, offline=True))
    held = numbers_of(lambda: AutoModelForImageTextToText.from_config(config))
    numbers = learned(int(config.get_text_config().hidden_size))
    # forward, and backward to what learns: 2 + 2 operations a weight and token
    flops = 4.0 * held * _TOKENS * steps * samples
    return Plan(steps, flops, bytes_of(held, numbers, job.dtype))
