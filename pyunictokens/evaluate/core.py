"""The one place that asks a model: questions are answered, prompts become images, as the paper has them.

Whoever measures (`unifybench`, the tables) asks through :class:`Asker`, so both ask the same. A prompt that needs a
fact is answered first ("which fact fits?") and generated together with the answer. A model has two methods; everything
in `baselines/` has them, and so can any object of yours:

    answer(images, question)      a text about no, one or several images
    generate(prompt, n, seed)     n images

One that cannot do one of the two raises :class:`Unsupported` there, and its columns stay empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..data.wording import compound_prompt, first_sentence, text_only_question
from ..utils.errors import UserError
from .metrics import clean
from .tasks import Item, Subject

if TYPE_CHECKING:
    from PIL.Image import Image

_NAMED = re.compile(r"<[^<>|\s]+>")

Question = tuple[Sequence["Image"], str]
"""Images, and what is asked about them."""


class Unsupported(UserError):
    """This model does not answer, or generates no images: its columns are left empty, which is no fault."""


class Model(Protocol):
    """A model that is ready for one concept."""

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The answer to `question` (the concept as `<name>`) about upright RGB images of any size.

        Raises Unsupported where the model does not answer, UserError where this one question cannot be answered.
        """
        ...

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` images of `prompt`, float [n, 3, H, W] in [-1, 1]; the same seed gives the same images.

        Raises Unsupported where the model generates none, UserError where it cannot for this one prompt.
        """
        ...


@runtime_checkable
class Batched(Protocol):
    """A model that answers several questions at once."""

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """One answer a question, the same as one by one."""
        ...


@dataclass(frozen=True)
class Baseline:
    """A row of a table: a model by name, and how to make it ready for a concept. Loads nothing before it is needed."""

    name: str
    """What the row is called."""
    identity: str
    """All that decides what the model says: weights, settings, prompts. A record of another identity is not its own."""
    load: Callable[[Subject], Model]
    """Makes the model ready for one concept; called once a concept, and not at all when every record is there."""
    reasons: bool = False
    """Prompts that hint at a fact are answered first ("which fact fits?") and generated together with the answer."""
    answers: bool = True
    """Whether it answers questions; where not, none is asked of it in a plan."""
    generates: bool = True
    """Whether it generates images."""
    release: Callable[[], None] = lambda: None
    """Lets go of what `load` keeps for all concepts; called when the row is done: one model is held at a time."""


class AnswersOnly:
    """A base for models that generate no images."""

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        raise Unsupported(f"{type(self).__name__} generates no images")


class GeneratesOnly:
    """A base for models that do not answer."""

    def answer(self, images: Sequence[Image], question: str) -> str:
        raise Unsupported(f"{type(self).__name__} does not answer questions")


class Asker:
    """Asks one model about one subject. Answers about facts are remembered: each is asked for once.

    Args:
        model: gives the model; called when the first question is asked.
        read: an image file as the model is shown it.
        reasons: see :class:`Baseline`.
    """

    def __init__(self, model: Callable[[], Model], read: Callable[[Path], Image], reasons: bool = True):
        self.model, self.read, self.reasons = model, read, reasons
        self._facts: dict[str, str] = {}

    def answers(self, items: Sequence[Item]) -> list[str]:
        """The answers to the questions of `items`, cleaned of helper tokens."""
        found: dict[int, str] = {
            place: self._facts[item.text] for place, item in enumerate(items) if item.text in self._facts
        }
        new = [(place, item) for place, item in enumerate(items) if place not in found]
        questions: list[Question] = [([self.read(item.image)] if item.image else [], item.text) for _, item in new]
        for (place, item), answer in zip(new, self._ask(questions), strict=True):
            found[place] = answer
            if item.facts:
                self._facts[item.text] = answer
        return [found[place] for place in range(len(items))]

    def facts(self, prompts: Sequence[Item]) -> list[str]:
        """What the model takes each prompt to mean; "" where a prompt needs no fact or the model does not reason."""
        asked = {
            item: item.asks or text_only_question(item.facts, item.text)
            for item in prompts
            if self.reasons and item.facts
        }
        new = [question for question in dict.fromkeys(asked.values()) if question not in self._facts]
        self._facts.update(zip(new, self._ask([([], question) for question in new]), strict=True))
        return [self._facts[asked[item]] if item in asked else "" for item in prompts]

    def prompt(self, item: Item) -> tuple[str, str]:
        """(the prompt to generate from, the fact it was completed with)."""
        (answer,) = self.facts([item])
        if item.rewrites and answer and all(name in answer for name in _NAMED.findall(item.text)[:1]):
            return answer, answer
        return (compound_prompt(item.text, first_sentence(answer)) if answer else item.text), answer

    def _ask(self, questions: Sequence[Question]) -> list[str]:
        if not questions:
            return []
        model = self.model()
        if isinstance(model, Batched):
            return [clean(answer) for answer in model.answers(questions)]
        return [clean(model.answer(images, question)) for images, question in questions]


def checked(pixels: object, n: int, name: str) -> Tensor:
    """`pixels` where they are `n` images [n, 3, H, W] of finite numbers, else UserError."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (n, 3) or not pixels.numel():
        found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"{name} generated {found}: must be [{n}, 3, H, W]")
    if not bool(torch.isfinite(pixels).all()):
        raise UserError(f"{name} generated pixels that are not finite")
    return pixels
