"""What training draws from a concept: items of understanding, generation and text-only reasoning, and their order.

Plain lists of small records with paths and texts in them, and one sampler whose state is four numbers. Images are
encoded, and `<name>` is expanded, by whoever trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from ..utils.errors import UserError
from .concept import Concept

T = TypeVar("T")


@dataclass(frozen=True)
class UnderstandingItem:
    """An image (None: the black one), a question and the answer to learn. `source` is conversation, text_only,
    positive or negative."""

    image: Path | None
    question: str
    answer: str
    source: str


@dataclass(frozen=True)
class GenerationItem:
    """An image and the prompt that should draw it."""

    image: Path
    prompt: str


@dataclass(frozen=True)
class TextOnlyItem:
    """A reasoning prompt with all facts; `facts[correct]`, which is `answer`, is the one it asks for."""

    facts: tuple[str, ...]
    prompt: str
    correct: int
    answer: str


def visual_items(concept: Concept) -> list[UnderstandingItem]:
    """Questions about the training images with their answers: visual-instruct reasoning (paper, section 3.2)."""
    return [UnderstandingItem(qa.image, qa.query, qa.answer, "conversation") for qa in concept.conversations]


def understanding_items(
    concept: Concept,
    *,
    text_only: bool = True,
    recognitions: bool = True,
    negatives_per_positive: float | None = None,
    seed: int = 0,
) -> list[UnderstandingItem]:
    """All that the understanding stages learn from: conversations, text-only questions, yes- and no-questions.

    `negatives_per_positive` keeps that many no-questions for each yes-question, drawn by `seed` (None keeps all; fewer
    than wanted is no error). Raises UserError when nothing is left to learn from.
    """
    if negatives_per_positive is not None and not 0 <= negatives_per_positive < float("inf"):
        raise UserError(f"negatives_per_positive={negatives_per_positive}: must be 0 or more")
    items = visual_items(concept)
    if text_only:
        items += [UnderstandingItem(None, qa.query, qa.answer, "text_only") for qa in concept.text_only]
    if recognitions:
        positive = [item for item in concept.recognitions if item.positive]
        negative = [item for item in concept.recognitions if not item.positive]
        if negatives_per_positive is not None:
            wanted = round(negatives_per_positive * len(positive))
            if wanted < len(negative):
                kept = np.random.default_rng(seed).choice(len(negative), size=wanted, replace=False)
                negative = [negative[index] for index in sorted(kept.tolist())]
        items += [UnderstandingItem(item.image, item.query, item.answer, "positive") for item in positive]
        items += [UnderstandingItem(item.image, item.query, item.answer, "negative") for item in negative]
    if not items:
        raise UserError(f"concept {concept.name!r} has no questions with answers: see {concept.train_folder}")
    return items


def generation_items(concept: Concept, prompt: str = "A photo of <sks>.") -> list[GenerationItem]:
    """Every training image under one prompt, in which `<sks>` becomes the concept's own token."""
    text = prompt.replace("<sks>", concept.sks)
    if concept.sks not in text:
        raise UserError(f"prompt {prompt!r}: must contain <sks> or {concept.sks}, else it draws nothing of the concept")
    if not concept.train_images:
        raise UserError(f"concept {concept.name!r} has no training images: see {concept.train_folder}")
    return [GenerationItem(image, text) for image in concept.train_images]


def text_only_items(concept: Concept, split: str = "train") -> list[TextOnlyItem]:
    """Reasoning prompts of one half (`train` or `test`), each with all facts (paper, Appendix C and D)."""
    if split not in ("train", "test"):
        raise UserError(f"split={split!r}: must be train or test")
    facts = tuple(concept.extra_info)
    pairs = concept.fact_pairs_train if split == "train" else concept.fact_pairs_test
    for prompt, correct in pairs:
        if not 0 <= correct < len(facts):
            raise UserError(f"prompt {prompt!r} asks for item {correct} of extra_info, which has {len(facts)} items")
    return [TextOnlyItem(facts, prompt, correct, facts[correct]) for prompt, correct in pairs]


class EpochSampler(Generic[T]):
    """Batches without end: every item once an epoch, in an order that depends on (seed, epoch) alone.

    The last batch of an epoch may be smaller (dropped with `drop_last`). The whole state is four numbers, so a run that
    was stopped goes on with the very batch that would have come next.
    """

    def __init__(
        self, items: Sequence[T], batch_size: int = 1, *, seed: int = 0, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        if not items:
            raise UserError("no items to sample from: the list is empty")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be 1 or more")
        if drop_last and batch_size > len(items):
            raise UserError(f"batch_size={batch_size}: more than the {len(items)} items, and drop_last drops them all")
        if seed < 0:
            raise UserError(f"seed={seed}: must be 0 or more")
        self.items = list(items)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Batches in one epoch."""
        whole, rest = divmod(len(self.items), self.batch_size)
        return whole if self.drop_last or not rest else whole + 1

    def next(self) -> list[T]:
        """The next batch; a new epoch begins by itself."""
        if self.position >= len(self):
            self.epoch += 1
            self.position = 0
            self._order = self._order_of(self.epoch)
        start = self.position * self.batch_size
        self.position += 1
        return [self.items[index] for index in self._order[start : start + self.batch_size]]

    def __iter__(self) -> Iterator[list[T]]:
        """What is left of this epoch, or a whole new one where nothing is left."""
        yield self.next()
        while self.position < len(self):
            yield self.next()

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch, position in it, and the number of items, to refuse the state of another list."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position, "items": len(self.items)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises UserError when it belongs to another list of items."""
        if set(state) != {"seed", "epoch", "position", "items"}:
            raise UserError(f"sampler state holds {sorted(state)}: must hold epoch, items, position, seed")
        if state["items"] != len(self.items):
            raise UserError(
                f"sampler state is of {state['items']} items, there are {len(self.items)}: the data changed"
            )
        if state["epoch"] < 0 or not 0 <= state["position"] <= len(self):
            raise UserError(f"sampler state at batch {state['position']}: an epoch has {len(self)}")
        self.seed, self.epoch, self.position = int(state["seed"]), int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.items)))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items)).tolist()
