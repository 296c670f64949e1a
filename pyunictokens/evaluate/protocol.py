"""How a benchmark is asked and scored, where readings differ: this project's protocol, and that of the authors' code.

    ours       the paper's words (appendix F), and where they leave something open, what this project takes
    sync-r1    the authors' later public code (Sync-R1): its templates, images a prompt, references, clauses, steps

A protocol decides what `suites/` ask and what scoring.py makes of it. Every table names it, column by column
(:meth:`BenchProtocol.how`), because numbers of two protocols cannot be compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..utils.errors import UserError
from . import metrics as m

DEFAULT_SAMPLES = 4
"""Images of a prompt where neither settings nor protocol say how many."""

_CLAUSE = re.compile(r"[,.!?;:()\[\]{}<>/\\-]")


def clauses(prompt: str) -> list[str]:
    """The parts of a prompt between the characters , . ! ? ; : ( ) [ ] { } < > / \\ and -, never none."""
    return [part.strip() for part in _CLAUSE.split(prompt) if part.strip()] or [prompt]


def first_word_says(answer: str, truth: str) -> bool:
    """Whether the first of the words yes and no in the answer is the true one."""
    return m.says_yes(answer) is (truth == "yes")


def contains(answer: str, truth: str) -> bool:
    """Whether the true one of yes and no stands anywhere in the answer."""
    return truth in answer.casefold()


@dataclass(frozen=True)
class BenchProtocol:
    """One way to ask and to score."""

    name: str
    about: str
    """Where it comes from."""
    tag: str = ""
    """Behind the names of encoders and judges where scores are kept: another protocol scores anew."""
    samples: Mapping[str, int] = field(default_factory=dict)
    """Images of each prompt by task; a task that is not here has as many as the settings say."""
    seed: int | None = None
    """Seed of the images; None: the settings say."""
    long_by_parts: bool = True
    """Whether CLIP-T of long prompts is the mean over their parts; else it takes the whole prompt."""
    parts: Callable[[str], list[str]] = m.segments
    """The parts of a prompt that the judge is asked about."""
    steps: tuple[float, ...] = ()
    """The scores that the judge may give; none named means any number of its scale."""
    recognised: Callable[[str, str], bool] = first_word_says
    """(answer, "yes" or "no") → whether it is right."""
    max_tokens: int = 0
    """Longest answer of the judge; 0 leaves it to the judge's settings."""
    temperature: float | None = None
    """Of the judge; None leaves it to the judge's settings."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What :meth:`how` says, by ``task.measure``, task, or measure."""

    def how(self, key: str) -> str:
        """How the column ``task.measure`` is asked and scored, in a few words."""
        task, _, measure = key.partition(".")
        said = [self.words[name] for name in (task, key, measure) if name in self.words]
        if task in self.samples:
            said.append(f"{self.samples[task]} images a prompt")
        return "; ".join(said)


OURS = BenchProtocol(
    "ours",
    "the paper's appendix F; what it leaves open is this project's (docs/evaluation.md)",
    words={
        "recognition": "test images against unseen others; the first yes or no of the answer counts",
        "reasoning": "which of all facts fits? against the right fact",
        "reasoning_dense": "which of all facts fits a long prompt? against the right fact",
        "pure": "the folder's short prompts",
        "dense": "the folder's long prompts",
        "reasoning_generation": "prompt and answered fact, scored with the fact spelled out",
        "dense_reasoning_generation": "long prompt and answered fact, scored with the fact spelled out",
        "vqa": "questions about test images",
        "qa": "questions without an image",
        "bleu": "character BLEU 0.7/0.3",
        "judge": "0 to 10 brought to 0…1",
        "dense.judge": "mean over parts between punctuation marks",
        "dense_reasoning_generation.judge": "mean over parts between punctuation marks",
        "clip_t": "class word for the token",
        "clip_i": "mean over all training images",
    },
)

SYNC_R1 = BenchProtocol(
    "sync-r1",
    "the authors' later public code (Sync-R1, arXiv 2605.10445), read in November 2026",
    tag=", protocol sync-r1",
    samples={"pure": 12, "dense": 10, "reasoning_generation": 10, "dense_reasoning_generation": 20},
    seed=3407,
    long_by_parts=False,
    parts=clauses,
    steps=(0.0, 0.5, 1.0),
    recognised=contains,
    max_tokens=64,
    temperature=1e-5,
    words={
        "recognition": "test_data/NAME.json, type rec; yes or no contained in the answer",
        "reasoning": "the fact that the prompt needs and nothing else; against the explicit prompt",
        "reasoning_dense": "the prompt rewritten with the facts it needs; against the explicit prompt",
        "pure": "25 templates by generation_type",
        "dense": "dense_prompt_generation",
        "reasoning_generation": "held-out prompts and the answered fact, scored with the explicit prompt",
        "dense_reasoning_generation": "from the rewritten prompt, scored with the explicit one",
        "vqa": "test_data/NAME.json, type vqa",
        "qa": "test_data/NAME.json, type text_only",
        "bleu": "character BLEU 0.7/0.3",
        "judge": "0, ½ or 1",
        "dense.judge": "mean over clauses",
        "dense_reasoning_generation.judge": "mean over clauses",
        "clip_t": "whole prompt, class word for the token",
        "clip_i": "one image of the concept",
    },
)

PROTOCOLS = {protocol.name: protocol for protocol in (OURS, SYNC_R1)}
"""The protocols by name."""


def protocol_named(name: str) -> BenchProtocol:
    """Raises UserError for a name that is none."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol={name!r}: must be one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
