"""What the tables ask of a model: two methods. Everything in `adapters/` has them, and so can any object of yours.

    answer(images, question)      a text about no, one or several pictures
    generate(prompt, n, seed)     n drawings

A model that cannot do one of the two raises :class:`Unsupported` there, and its columns stay empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..utils.errors import UserError
from .subject import Subject

if TYPE_CHECKING:
    from PIL.Image import Image


class Unsupported(UserError):
    """This model does not answer, or does not draw: its columns are left empty, which is no fault."""


class Model(Protocol):
    """A model that is ready for one concept."""

    def answer(self, images: Sequence[Image], question: str) -> str:
        """The answer to `question` (the concept as `<name>`) about upright RGB pictures of any size.

        Raises Unsupported where the model does not answer, UserError where this one question cannot be answered.
        """
        ...

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        """`n` drawings of `prompt`, float [n, 3, H, W] in [-1, 1]; the same seed gives the same drawings.

        Raises Unsupported where the model does not draw, UserError where this one prompt cannot be drawn.
        """
        ...


@dataclass(frozen=True)
class Candidate:
    """A row of a table: a model by name, and how to make it ready for a concept. Loads nothing before it is needed."""

    name: str
    """What the row is called."""
    identity: str
    """All that decides what the model says: weights, settings, prompts. A cell of another identity is not its own."""
    load: Callable[[Subject], Model]
    """Makes the model ready for one concept; called once a concept, and not at all when every cell is there."""
    reasons: bool = False
    """Prompts that hint at a fact are answered first ("which fact fits?") and drawn together with the answer."""
    release: Callable[[], None] = lambda: None
    """Lets go of what `load` keeps for all concepts; called when the row is done: one model is held at a time."""


class Nothing:
    """Neither answers nor draws; a base for adapters that do one of the two."""

    def answer(self, images: Sequence[Image], question: str) -> str:
        raise Unsupported(f"{type(self).__name__} does not answer questions")

    def generate(self, prompt: str, n: int, seed: int) -> Tensor:
        raise Unsupported(f"{type(self).__name__} does not draw")
