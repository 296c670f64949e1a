"""What a concept folder lets one ask: pictures to recognise, prompts to draw and the facts they hint at.

Shared by the evaluation of a run (benchmark.py) and by the tables (suites/unify.py), so that both ask the same. Only
the held-out half of the facts is used. Asks nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.concept import FACT_PROMPTS, Concept
from ..models.showo import prompting
from . import metrics as m

DRAWING = {"pure": "pure_generation", "dense": "dense_generation", "dense_reasoning": "personalized_dense_generation"}
"""Splits that draw a list of prompts as they stand, and the list's name in t2i_conditions.json."""

_NEGATIVES = 12


def recognition_pairs(concept: Concept) -> tuple[list[tuple[Path, str, bool]], str]:
    """([(picture, question, is the concept in it?)], note). Negatives unseen in training come first; without pictures
    of both sorts the list is empty."""
    asked = list(dict.fromkeys(item.query for item in concept.recognitions))
    asked = asked or [f"Is {concept.sks} in this picture?"]
    seen = {item.image for item in concept.recognitions}
    fresh = [path for path in concept.negatives if path not in seen]
    note = ""
    if concept.negatives and not fresh:
        note = "recognition: every negative picture was also seen in training"
    pictures = [(path, True) for path in concept.test_images]
    pictures += [(path, False) for path in (fresh or concept.negatives)[:_NEGATIVES]]
    if len({positive for _, positive in pictures}) < 2:
        return [], note
    return [(path, query, yes) for path, yes in pictures for query in asked[:2]], note


def drawing_prompts(concept: Concept, split: str) -> tuple[list[tuple[str, str, int | None]], str]:
    """([(prompt, what it means spelled out, index of the fact it needs or None)], note) of a split that draws."""
    lists, facts = concept.generation_prompts, concept.extra_info
    tested = concept.fact_pairs_test
    if split in ("pure", "dense"):
        return [(prompt, prompt, None) for prompt in lists.get(DRAWING[split], [])], ""
    if split == "reasoning_generation":
        spelled, every = lists.get(f"explicit_{FACT_PROMPTS}", []), lists.get(FACT_PROMPTS, [])
        known = dict(zip(every, spelled, strict=True)) if len(spelled) == len(every) else {}
        return [(p, known.get(p) or prompting.compound_prompt(p, facts[r]), r) for p, r in tested], ""
    prompts, spelled = (lists.get(f"{more}{DRAWING[split]}", []) for more in ("", "explicit_"))
    if prompts and len(spelled) != len(prompts):
        return [], f"{split}: {len(spelled)} explicit prompts for {len(prompts)}: not measured"
    return [
        (prompt, explicit, _fact_of(prompt, explicit, tested, facts))
        for prompt, explicit in zip(prompts, spelled, strict=True)
    ], ""


def _fact_of(prompt: str, explicit: str, tested: Sequence[tuple[str, int]], facts: Sequence[str]) -> int:
    """The held-out fact of a long prompt: by the short prompt it begins with, else by its wording."""
    starts = [r for start, r in tested if prompt.startswith(start.rstrip(" ."))]
    return starts[0] if starts else m.nearest(explicit, facts)
