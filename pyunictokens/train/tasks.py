"""What one step of UniCTask-GRPO is about: a question about a picture, or a request for a fact (paper, section 3.1).

Which of the two, and which item, follows from (seed, step) alone, so a resumed run asks what it would have asked. Every
item of a kind comes once before any comes twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.showo import prompting
from ..utils.errors import UserError

VISUAL, TEXT_ONLY = "visual", "text_only"

_BLOCK = 10
"""Steps in which the ratio of the two is kept exactly; inside, their order is drawn."""


@dataclass(frozen=True)
class Task:
    """One question, and the prompt that its answers complete. Texts name the concept as `<name>`."""

    mode: str
    """"visual" or "text_only"."""
    image: Path | None
    """The picture asked about; None is the black one."""
    question: str
    prompt: str
    """BP in visual steps, IP in text-only ones."""
    facts: tuple[str, ...]
    """What an answer is held against: the true answer alone, or all facts."""
    correct: int
    """Which of `facts` is true."""

    @property
    def answer(self) -> str:
        return self.facts[self.correct]


def visual_tasks(concept: Any) -> list[Task]:
    """Every conversation about a training picture: Image + Question → IR, CP = BP + IR (equations 1 and 3)."""
    base = prompting.base_prompt(concept.sks)
    return [Task(VISUAL, qa.image, qa.query, base, (qa.answer,), 0) for qa in concept.conversations]


def text_only_tasks(concept: Any, pairs: Sequence[tuple[str, int]]) -> list[Task]:
    """Reasoning prompts with their fact: Extra_info + IP → IR, CP = IP + IR (equations 2 and 4)."""
    facts = tuple(concept.extra_info)
    return [
        Task(TEXT_ONLY, None, prompting.text_only_question(facts, prompt), prompt, facts, correct)
        for prompt, correct in pairs
    ]


class TaskSampler:
    """Draws the task of each step. Only the training half of the facts is ever asked for."""

    def __init__(self, concept: Any, *, visual_ratio: float = 0.5, seed: int = 0):
        self._tasks = {
            VISUAL: visual_tasks(concept) if visual_ratio > 0 else [],
            TEXT_ONLY: text_only_tasks(concept, concept.fact_pairs_train) if visual_ratio < 1 else [],
        }
        wanted = {VISUAL: "conversations about training pictures", TEXT_ONLY: "facts with reasoning prompts"}
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

    def draw(self, step: int) -> Task:
        """The task of step `step` (from 0)."""
        while len(self._modes) <= step:
            block, rng = len(self._modes) // _BLOCK, np.random.default_rng([self._seed, 1, len(self._modes) // _BLOCK])
            visual = round((block + 1) * _BLOCK * self._ratio) - round(block * _BLOCK * self._ratio)
            modes = [VISUAL] * visual + [TEXT_ONLY] * (_BLOCK - visual)
            self._modes += [modes[place] for place in rng.permutation(_BLOCK)]
        mode = self._modes[step]
        tasks = self._tasks[mode]
        epoch, place = divmod(self._modes[:step].count(mode), len(tasks))
        order = np.random.default_rng([self._seed, 2, mode == VISUAL, epoch]).permutation(len(tasks))
        return tasks[int(order[place])]
