"""The tasks of UnifyBench++, each with its one name, and what is asked about a concept: items, references, words.

    recognition                  is it in the image?           truth "yes" or "no", group positive or negative
    vqa, qa                      questions with and without an image
    reasoning, reasoning_dense   which fact does a short, a long prompt mean? facts to choose from
    pure, dense                  generate images of a short, a long prompt
    reasoning_generation         the same for a prompt that hints at a fact; truth is the prompt with it spelled out
    dense_reasoning_generation   the same for long prompts

A task is one group of columns of the paper's Table 1. `suites/` makes subjects out of folders. No measure and no model
is known here.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.concept import Concept, in_words
from ..rewards.registry import labels
from ..utils.errors import UserError


@dataclass(frozen=True)
class Task:
    """What the evaluation has to say of one task."""

    paper: str
    """The heading of its columns in the paper."""
    title: str
    """Its name in the report."""
    key: str
    """Stands for the task in digests and noise seeds; never changes, so that samples stay what they are."""
    measures: tuple[str, ...]
    lacking: str
    """What a folder does not hold where the task has no items."""
    noise: int = 0
    """Which block of sample ids `unifybench` takes its noise from; 0: it generates no images."""

    @property
    def images(self) -> bool:
        """Whether images are generated; otherwise questions are answered."""
        return self.noise > 0


_ANSWER = ("bleu", "judge", "word_bleu", "exact", "accuracy")
_SHORT, _LONG = ("clip_t", "clip_i"), ("judge", "clip_i", "clip_t")
TASKS: dict[str, Task] = {
    "recognition": Task("Rec.", "Recognition", "rec", ("weight",), "images with and without the concept"),
    "vqa": Task("VQA", "Questions about images", "vqa", _ANSWER, "questions"),
    "qa": Task("QA", "Questions without an image", "qa", _ANSWER, "questions"),
    "reasoning": Task("Rea.", "Which fact is meant", "rea", ("bleu", "word_bleu", "accuracy"), "held-out facts"),
    "reasoning_dense": Task(
        "Dense Rea.", "Which fact is meant, long prompts", "dense_rea", ("judge", "bleu", "accuracy"), "prompts"
    ),
    "pure": Task("Pure Gen.", "Short prompts", "pure", _SHORT, "prompts", 4),
    "reasoning_generation": Task("Rea. Gen.", "Held-out prompts", "rea_gen", _SHORT, "prompts", 5),
    "dense": Task("Dense Gen.", "Long prompts", "dense", _LONG, "prompts", 6),
    "dense_reasoning_generation": Task(
        "Dense Rea. Gen.", "Long held-out prompts", "dense_rea_gen", _LONG, "prompts", 7
    ),
}
IMAGE_TASKS = tuple(name for name, task in TASKS.items() if task.images)
ALL_SAMPLES = "samples"
"""Stands for all image tasks together in the name of a measure: ``samples.clip_i``."""

MEASURES = {
    "weight": "0.5·yes + 0.5·no",
    "accuracy": "accuracy",
    "bleu": "BLEU",
    "word_bleu": "word BLEU",
    "exact": "same text",
    "judge": "judge",
    "clip_t": "CLIP-T, likeness to the prompt",
    "clip_i": "CLIP-I, likeness to the references",
    "attributes": "attributes right",
    "subject": "attributes of the subject right",
    "prompted": "attributes of the prompt right",
    "reward": "reward",
}
"""Measures as tables and reports call them; parts of the reward are called as their reward models are."""

_OLD_TASKS = {task.key: name for name, task in TASKS.items() if task.key != name}
_OLD_TASKS["dense_reasoning"] = "dense_reasoning_generation"
_OLD_PREFIXES = {**_OLD_TASKS, "drawings": ALL_SAMPLES}


def label(key: str) -> str:
    """``task.measure`` in words: the one label of this number wherever it is shown."""
    task, _, measure = key.partition(".")
    title = TASKS[task].title if task in TASKS else "All images"
    named = MEASURES.get(measure) or labels().get(measure, measure).replace(": ", ", ")
    return f"{title}: {named}"


def task_named(name: str) -> str:
    """The present name of a task in a file, which an earlier version may have written."""
    return _OLD_TASKS.get(name, name)


def measure_named(key: str) -> str:
    """The present name of a ``task.measure`` in a file."""
    task, dot, measure = key.partition(".")
    return _OLD_PREFIXES.get(task, task) + dot + measure


def wanted_tasks(names: Iterable[str], setting: str) -> tuple[str, ...]:
    """`names` as tasks; a name of an earlier version is taken with a warning. Raises UserError for any other."""
    if isinstance(names, str):
        raise UserError(f"{setting}={names!r}: must be a list of {', '.join(TASKS)}")
    names = list(names)
    for name in names:
        if name in _OLD_TASKS:
            warnings.warn(f"{setting}: {name!r} is now {_OLD_TASKS[name]!r}", FutureWarning, stacklevel=3)
        elif name not in TASKS:
            raise UserError(f"{setting}={names}: must be some of {', '.join(TASKS)}")
    return tuple(dict.fromkeys(map(task_named, names)))


@dataclass(frozen=True)
class Item:
    """One question or one prompt. All texts carry the concept as `<name>`."""

    task: str
    text: str
    """The question as it is asked, or the prompt."""
    truth: str = ""
    """The right answer; of a prompt, what its images should show, spelled out (empty: the prompt itself)."""
    image: Path | None = None
    """The image a question is about."""
    group: str = ""
    """Half of a balanced mean: positive or negative in recognition."""
    facts: tuple[str, ...] = ()
    """Facts to choose from, where the item needs one of them."""
    options: tuple[str, ...] = ()
    """Possible answers in the order A, B, C …, where the question gives them; truth is one of them."""
    prompt: str = ""
    """The prompt that a question of reasoning is about."""
    correct: int | None = None
    """Index in `facts` of the one that is meant."""
    asks: str = ""
    """The question that a prompt with `facts` is completed by; empty: which fact fits?"""
    rewrites: bool = False
    """Whether the answer to it is the prompt anew, in place of a fact that joins the prompt."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"task={self.task!r}: must be one of {', '.join(TASKS)}")

    @property
    def meant(self) -> str:
        """What an image should show."""
        return self.truth or self.text

    @property
    def digest(self) -> str:
        """16 letters that are the same for the same item; of its image, the file and its folder count."""
        image = "/".join(self.image.parts[-2:]) if self.image else ""
        key = TASKS[self.task].key
        parts = (key, self.text, self.truth, image, self.group, *self.facts, "|", *self.options)
        parts = (*parts, self.asks) if self.asks else parts
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@dataclass
class Subject:
    """One concept as models and measures see it."""

    name: str
    class_word: str
    kind: str = "object"
    """human, animal or object."""
    info: str = ""
    """What the references show, in a sentence: the text prompt of the +TP baselines."""
    facts: list[str] = field(default_factory=list)
    """What no reference shows; part of the text prompt."""
    references: list[Path] = field(default_factory=list)
    """Images that samples are compared with (CLIP-I), and the image prompt of the +IP baselines."""
    test_images: list[Path] = field(default_factory=list)
    """Images beside those: the real images of the upper bound. Empty: the references themselves."""
    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the folder does not hold and therefore cannot be measured."""

    @classmethod
    def of_concept(cls, concept: Concept, facts: Sequence[str], references: Sequence[Path]) -> Subject:
        """A concept folder as a subject without items."""
        about = (concept.name, concept.class_word, concept.kind, concept.info)
        return cls(*about, list(facts), list(references), list(concept.test_images))

    @property
    def sks(self) -> str:
        return f"<{self.name}>"

    def in_words(self, judged_as: str) -> str:
        """What judges read for `<name>` (`data.Concept.in_words`)."""
        return in_words(self.sks, self.class_word, self.info, judged_as)

    def of(self, task: str) -> list[Item]:
        """Items of one task, in order."""
        return [item for item in self.items if item.task == task]

    def add_recognition(self, others: Sequence[Path]) -> None:
        """Ask whether it is in each of its test photos, and in each of `others`, which show something else."""
        question = f"Can you see {self.sks} in this picture? Answer with yes or no."
        if not self.test_images or not others:
            self.notes.append("recognition: needs test photos of this concept and of others: not measured")
            return
        self.items += [Item("recognition", question, "yes", path, "positive") for path in self.test_images]
        self.items += [Item("recognition", question, "no", path, "negative") for path in others]

    def note_lacking(self, tasks: Sequence[str]) -> None:
        """Note each of `tasks` that has no items, where nothing else was noted of it."""
        for task in tasks:
            if not self.of(task) and not any(note.startswith(f"{task}:") for note in self.notes):
                self.notes.append(f"{task}: the folder has no {TASKS[task].lacking}: not measured")
