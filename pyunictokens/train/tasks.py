"""What a group of rollouts is about, and where such tasks come from: a concept, or a list of prompts.

A `TaskSource` draws the task of each group and says how its texts are read: by the model, by who judges images, by who
judges answers. The loop (grpo.py) and the collector know nothing else, so another source is one class here.

Which task is drawn follows from (seed, number) alone, so a resumed run asks what it would have asked, and every task
of a kind comes once before any comes twice.
"""

from __future__ import annotations

import hashlib
import json
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
from ..rewards.base import plain_text
from ..utils import fingerprint
from ..utils.errors import UserError
from .images import ReferenceImages
from .prompts import as_prompt

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

    def image_codes(self, task: Task) -> Tensor:
        """Codes int64 [N] of the image that the task's question is about."""
        ...

    def for_model(self, text: str) -> str:
        """A prompt or question as the model reads it."""
        ...

    def for_image_judges(self, text: str) -> str:
        """A prompt as one reads it who judges images."""
        ...

    def for_answer_judges(self, text: str) -> str:
        """An answer or fact as one reads it who judges answers."""
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
    (`Concept.in_words`).
    """

    def __init__(
        self,
        concept: Concept,
        tokens: ConceptTokens,
        images: ReferenceImages,
        *,
        visual_ratio: float = 0.5,
        judged_as: Literal["class", "info"] = "class",
        seed: int = 0,
    ):
        self.concept, self.tokens, self.images, self._judged_as = concept, tokens, images, judged_as
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

    def image_codes(self, task: Task) -> Tensor:
        return self.images.codes(task.image)

    def for_model(self, text: str) -> str:
        return as_prompt(self.tokens, text)

    def for_image_judges(self, text: str) -> str:
        return plain_text(text, self.concept.in_words(self._judged_as))

    def for_answer_judges(self, text: str) -> str:
        return plain_text(text, self.concept.class_word)

    def identity(self) -> dict[str, object]:
        return {
            "concept": self.tokens.name,
            "concept_tokens": self.tokens.num_tokens,
            "starting_concept": fingerprint.of_tensors(dict(self.tokens.named_parameters())),
        }


# --- a list of prompts ---------------------------------------------------------------------------------------------


class PromptTasks:
    """A list of prompts: each is drawn as it stands, once before any comes twice, in an order by `seed`.

    Reward functions get its columns. Nothing is asked, and there are no reference images.
    """

    kind = "object"

    def __init__(self, prompts: Sequence[Prompt], *, seed: int = 0):
        self._tasks = [Task(PROMPT, each.text, columns=each.columns) for each in prompts]
        self._seed = seed

    @property
    def references(self) -> Tensor:
        return torch.empty(0, 3, 1, 1)

    def draw(self, number: int) -> Task:
        epoch, place = divmod(number, len(self._tasks))
        order = np.random.default_rng([self._seed, 4, epoch]).permutation(len(self._tasks))
        return self._tasks[int(order[place])]

    def image_codes(self, task: Task) -> Tensor:
        raise UserError("a list of prompts asks nothing about images")

    def for_model(self, text: str) -> str:
        return text

    def for_image_judges(self, text: str) -> str:
        return text

    def for_answer_judges(self, text: str) -> str:
        return text

    def identity(self) -> dict[str, object]:
        texts = json.dumps([task.prompt for task in self._tasks], ensure_ascii=False)
        return {"prompts": len(self._tasks), "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest()[:16]}
