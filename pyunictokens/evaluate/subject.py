"""What is asked of a model about one concept: items (questions and prompts with their truth), photos, words.

The same for every data set: `suites/` makes subjects out of folders, the runner hands their items to models, the tables
count them. A task is one column group of the paper's Table 1.

    rec            is it in the picture?            truth "yes" or "no", group positive or negative
    rea            which fact does a prompt mean?   facts to choose from, truth is the right one
    dense_rea      the same for long prompts
    vqa, qa        questions with and without a picture
    pure, dense    draw a short, a long prompt
    rea_gen        draw a prompt that hints at a fact; truth is the prompt with the fact spelled out
    dense_rea_gen  the same for long prompts
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import UserError

ANSWERING = ("rec", "rea", "dense_rea", "vqa", "qa")
DRAWING = ("pure", "dense", "rea_gen", "dense_rea_gen")
TASKS = ANSWERING + DRAWING


@dataclass(frozen=True)
class Item:
    """One question or one prompt. All texts carry the concept as `<name>`."""

    task: str
    text: str
    """The question as it is asked, or the prompt."""
    truth: str = ""
    """The right answer; of a prompt, what its picture should show, spelled out (empty: the prompt itself)."""
    image: Path | None = None
    """The picture a question is about."""
    group: str = ""
    """Half of a balanced mean: positive or negative in rec."""
    facts: tuple[str, ...] = ()
    """Facts to choose from, where the item needs one of them."""
    options: tuple[str, ...] = ()
    """Possible answers in the order A, B, C …, where the question gives them; truth is one of them."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"task={self.task!r}: must be one of {', '.join(TASKS)}")

    @property
    def meant(self) -> str:
        """What a drawing should show."""
        return self.truth or self.text

    @property
    def digest(self) -> str:
        """16 letters that are the same for the same item; of its picture, the file and its folder count."""
        image = "/".join(self.image.parts[-2:]) if self.image else ""
        parts = (self.task, self.text, self.truth, image, self.group, *self.facts, "|", *self.options)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@dataclass
class Subject:
    """One concept as models and measures see it."""

    name: str
    class_word: str
    kind: str = "object"
    """human, animal or object."""
    info: str = ""
    """What the photos show, in a sentence: the text prompt of the +TP baselines."""
    facts: list[str] = field(default_factory=list)
    """What no photo shows; part of the text prompt."""
    photos: list[Path] = field(default_factory=list)
    """What drawings are compared with (CLIP-I), and the image prompt of the +IP baselines."""
    test_photos: list[Path] = field(default_factory=list)
    """Photos beside those: the real images of the upper bound. Empty: the photos themselves."""
    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the folder does not hold and therefore cannot be measured."""

    @property
    def sks(self) -> str:
        return f"<{self.name}>"

    def of(self, task: str) -> list[Item]:
        """Items of one task, each once."""
        return list({item.digest: item for item in self.items if item.task == task}.values())
