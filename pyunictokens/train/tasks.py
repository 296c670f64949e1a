"""What a group of rollouts is about, and where such tasks come from: a concept, or a list of prompts.

A `TaskSource` draws the task of each group and says how its texts are read: by the model, by who judges images, by who
judges answers. The loop (grpo.py) and the collector know nothing else, so another source is one class here.

Which task is drawn follows from (seed, number) alone, so a resumed run asks what it would have asked, and every task
of a kind comes once before any comes twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data import wording
from ..data.concept import Concept
from ..data.prompts import Prompt
from ..models import ConceptTokens
from ..models.published_form import PublishedForm
from ..rewards.base import RewardBatch, plain_text
from ..utils import fingerprint
from ..utils.errors import UserError
from .images import ReferenceImages
from .prompts import as_prompt, as_question

VISUAL, TEXT_ONLY, PROMPT = "visual", "text_only", "prompt"

_BLOCK = 10
"""Steps in which the ratio of the two kinds is kept exactly; inside, their order is drawn."""


@dataclass(frozen=True)
class Task:
    """What the rollouts of one group share. A concept's texts name it as `<name>`."""

    mode: str
    """What kind of task it is, for the log."""
    prompt: str
    """What images are drawn from; the model's answer goes behind it."""
    question: str | None = None
    """Asked before an image is generated; None: nothing is."""
    image: Path | None = None
    """The image asked about; None is the black one."""
    facts: tuple[str, ...] = ()
    """What an answer is compared with: the true answer alone, or all facts."""
    correct: int = 0
    """Which of `facts` is true."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """What reward functions get by name, the same for every rollout of the group."""

    @property
    def answer(self) -> str:
        """The true answer; empty where there is none."""
        return self.facts[self.correct] if self.facts else ""


class TaskSource(Protocol):
    """Where tasks come from, and how their texts are read."""

    @property
    def kind(self) -> str:
        """human, animal or object: which weights reward models have."""
        ...

    @property
    def references(self) -> Tensor:
        """Reference images [M, 3, H, W] in [-1, 1]; M may be 0."""
        ...

    def draw(self, number: int) -> Task:
        """The task of group `number` of the run, from 0."""
        ...

    def seen(self, task: Task) -> Tensor:
        """The image that the task's question is about: codes int64 [N], or features [patches, E] where the model takes
        those."""
        ...

    def completed(self, prompt: str, answer: str) -> str:
        """What an image is drawn from: a task's prompt, and what the model answered."""
        ...

    def for_model(self, text: str) -> str:
        """A prompt as the model reads it."""
        ...

    def question_for_model(self, text: str) -> tuple[str, bool]:
        """A question as the model reads it, and whether the wording around it is in it; else the model adds its own."""
        ...

    def for_image_judges(self, text: str) -> str:
        """A prompt as one reads it who judges images."""
        ...

    def for_answer_judges(self, text: str) -> str:
        """An answer or fact as one reads it who judges answers."""
        ...

    def reference(self, task: Task) -> RewardBatch | None:
        """What reward models would be asked about a true image of this task; None where there is none."""
        ...

    def identity(self) -> dict[str, object]:
        """What must be the same where a run is resumed, as JSON values."""
        ...


# --- a concept -----------------------------------------------------------------------------------------------------


def visual_tasks(concept: Concept) -> list[Task]:
    """Every conversation about a training image: Image + Question → IR, CP = BP + IR (equations 1 and 3)."""
    base = wording.base_prompt(concept.sks)
    return [Task(VISUAL, base, qa.query, qa.image, (qa.answer,)) for qa in concept.conversations]


def text_only_tasks(concept: Concept, pairs: Sequence[tuple[str, int]]) -> list[Task]:
    """Reasoning prompts with their fact: Extra_info + IP → IR, CP = IP + IR (equations 2 and 4)."""
    facts = tuple(concept.extra_info)
    return [
        Task(TEXT_ONLY, prompt, wording.text_only_question(facts, prompt), None, facts, correct)
        for prompt, correct in pairs
    ]


class ConceptTasks:
    """UniCTask (paper, section 3.1): questions about a concept's images, and requests for one of its facts.

    Only the training half of the facts is ever asked for. `judged_as` says what image judges read for `<name>`
    (`Concept.in_words`); `question_form` "unictokens" names the concept to the model in the form of its published code.
    """

    def __init__(
        self,
        concept: Concept,
        tokens: ConceptTokens,
        images: ReferenceImages,
        *,
        visual_ratio: float = 0.5,
        judged_as: Literal["class", "info"] = "class",
        compound: Literal["answer", "info"] = "answer",
        question_form: Literal["auto", "ours", "unictokens"] = "auto",
        seed: int = 0,
    ):
        self.concept, self.tokens, self.images, self._judged_as = concept, tokens, images, judged_as
        self._published = PublishedForm(tokens) if question_form == "unictokens" else None
        self._compound = compound
        self._tasks = {
            VISUAL: visual_tasks(concept) if visual_ratio > 0 else [],
            TEXT_ONLY: text_only_tasks(concept, concept.fact_pairs_train) if visual_ratio < 1 else [],
        }
        wanted = {VISUAL: "conversations about training images", TEXT_ONLY: "facts with reasoning prompts"}
        missing = [mode for mode, share in ((VISUAL, visual_ratio), (TEXT_ONLY, 1 - visual_ratio)) if share > 0]
        missing = [mode for mode in missing if not self._tasks[mode]]
        if missing:
            other = "1" if missing[0] == TEXT_ONLY else "0"
            raise UserError(
                f"concept {concept.name!r} has no {wanted[missing[0]]}: add some, or train without them "
                f"(visual_ratio={other})"
            )
        self._ratio, self._seed = visual_ratio, seed
        self._modes: list[str] = []
        self._references = torch.stack([images.pixels(path) for path in concept.train_images])

    @property
    def kind(self) -> str:
        return self.concept.kind

    @property
    def references(self) -> Tensor:
        return self._references

    def draw(self, number: int) -> Task:
        while len(self._modes) <= number:
            block, rng = len(self._modes) // _BLOCK, np.random.default_rng([self._seed, 1, len(self._modes) // _BLOCK])
            visual = round((block + 1) * _BLOCK * self._ratio) - round(block * _BLOCK * self._ratio)
            modes = [VISUAL] * visual + [TEXT_ONLY] * (_BLOCK - visual)
            self._modes += [modes[place] for place in rng.permutation(_BLOCK)]
        mode = self._modes[number]
        tasks = self._tasks[mode]
        epoch, place = divmod(self._modes[:number].count(mode), len(tasks))
        order = np.random.default_rng([self._seed, 2, mode == VISUAL, epoch]).permutation(len(tasks))
        return tasks[int(order[place])]

    def seen(self, task: Task) -> Tensor:
        return self.images.seen(task.image)

    def completed(self, prompt: str, answer: str) -> str:
        if self._compound == "answer":
            return wording.compound_prompt(prompt, answer)
        named = named_for_class(answer, self.concept.class_word, self.concept.sks)
        return wording.compound_prompt(wording.compound_prompt(prompt, self.concept.info), named)

    def for_model(self, text: str) -> str:
        return as_prompt(self.tokens, text) if self._published is None else self._published.expand(text)

    def question_for_model(self, text: str) -> tuple[str, bool]:
        if self._published is not None:
            return self._published.question(text), True
        return as_question(self.tokens, text), False

    def for_image_judges(self, text: str) -> str:
        return plain_text(text, self.concept.in_words(self._judged_as))

    def for_answer_judges(self, text: str) -> str:
        return plain_text(text, self.concept.class_word)

    def reference(self, task: Task) -> RewardBatch | None:
        """The image that the question is about, with the true answer; the references are the other images."""
        if task.mode != VISUAL or task.image is None:
            return None
        mine = self.images.pixels(task.image)
        others = [image for image in self._references if not torch.equal(image, mine)]
        answer = self.for_answer_judges(task.answer)
        return RewardBatch(
            images=mine[None],
            prompts=[self.for_image_judges(self.completed(task.prompt, task.answer))],
            answers=[answer],
            facts=[answer],
            references=torch.stack(others) if others else self._references,
            kind=self.kind,
        )

    def identity(self) -> dict[str, object]:
        return {
            "concept": self.tokens.name,
            "concept_tokens": self.tokens.num_tokens,
            "starting_concept": fingerprint.of_tensors(dict(self.tokens.named_parameters())),
        }


def named_for_class(text: str, class_word: str, sks: str) -> str:
    """`text` with the concept's token where it speaks of "the dog", "a dog" or "dog"; as it is where it holds the token
    or the concept has no class word."""
    if not class_word.strip() or sks in text:
        return text
    word = rf"\b(?:(?:the|a|an|this)\s+)?{re.escape(class_word.strip())}\b"
    return re.sub(word, lambda _: sks, text, flags=re.IGNORECASE)


# --- a list of prompts ---------------------------------------------------------------------------------------------


REFERENCE = "reference_image"
"""The column of a prompt list that names a file with a good picture of the prompt."""


class PromptTasks:
    """A list of prompts: each is drawn as it stands, once before any comes twice, in an order by `seed`.

    Reward functions get its columns. Nothing is asked. With a concept attached to the model, prompts may name it as
    `<name>`: the model reads its tokens, reward models read its name.
    """

    kind = "object"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int = 0,
        concept: ConceptTokens | None = None,
        images: ReferenceImages | None = None,
    ):
        self._tasks = [Task(PROMPT, each.text, columns=each.columns) for each in prompts]
        self._seed, self._concept, self._images = seed, concept, images

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def references(self) -> Tensor:
        return torch.empty(0, 3, 1, 1)

    @property
    def texts(self) -> list[str]:
        """The prompts in their order."""
        return [task.prompt for task in self._tasks]

    def at(self, place: int) -> Task:
        """The task of the list's prompt number `place`."""
        return self._tasks[place]

    def draw(self, number: int) -> Task:
        epoch, place = divmod(number, len(self._tasks))
        order = np.random.default_rng([self._seed, 4, epoch]).permutation(len(self._tasks))
        return self._tasks[int(order[place])]

    def batch(self, tasks: Sequence[Task], pixels: Tensor) -> RewardBatch:
        """Images [R, 3, H, W] of R tasks as reward models get them."""
        return RewardBatch(
            images=pixels,
            prompts=[self.for_image_judges(task.prompt) for task in tasks],
            kind=self.kind,
            columns={name: [task.columns[name] for task in tasks] for name in tasks[0].columns},
        )

    def text_batch(self, tasks: Sequence[Task], texts: Sequence[str]) -> RewardBatch:
        """R texts of R tasks as reward models get them."""
        columns = {name: [task.columns[name] for task in tasks] for name in tasks[0].columns}
        return RewardBatch.of_texts(texts, [task.prompt for task in tasks], columns)

    def seen(self, task: Task) -> Tensor:
        raise UserError("a list of prompts asks nothing about images")

    def completed(self, prompt: str, answer: str) -> str:
        return wording.compound_prompt(prompt, answer)

    def for_model(self, text: str) -> str:
        return text if self._concept is None else as_prompt(self._concept, text)

    def question_for_model(self, text: str) -> tuple[str, bool]:
        return self.for_model(text), False

    def for_image_judges(self, text: str) -> str:
        return text if self._concept is None else plain_text(text, self._concept.name)

    def for_answer_judges(self, text: str) -> str:
        return text

    def reference(self, task: Task) -> RewardBatch | None:
        """The image that the task's column `reference_image` names."""
        file = task.columns.get(REFERENCE)
        if file is None or self._images is None:
            return None
        if not isinstance(file, (str, Path)):
            raise UserError(f"prompt {task.prompt!r}: {REFERENCE}={file!r}: must be the name of an image file")
        return self.batch([task], self._images.pixels(Path(file))[None])

    def identity(self) -> dict[str, object]:
        texts = json.dumps(self.texts, ensure_ascii=False)
        return {"prompts": len(self._tasks), "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest()[:16]}
