"""UnifyBench and UnifyBench++ concept folders (docs/data-format.md) as subjects for the paper's Table 1.

UnifyBench holds recognition, VQA, QA and prompts that need no fact; the ++ fields add reasoning prompts paired with
extra_info, dense prompts, and dense prompts that hint at facts. What a folder lacks becomes a note, never an error.
Only the held-out half of the facts is asked for, though all of them are offered to choose from.
"""

from __future__ import annotations

from pathlib import Path

from ...data.concept import Concept
from ...data.folder import list_concepts, load_concept
from ...models.showo.prompting import text_only_question
from ..items import drawing_prompts, recognition_pairs
from ..subject import TASKS, Item, Subject

_SPLITS = {
    "pure": "pure",
    "dense": "dense",
    "rea_gen": "reasoning_generation",
    "dense_rea_gen": "dense_reasoning",
}
_ASKING = {"rea": "rea_gen", "dense_rea": "dense_rea_gen"}


def names(root: Path) -> list[str]:
    """Concepts of a data folder."""
    return list_concepts(root)


def read(root: Path, name: str) -> Subject:
    """Concept `name` with all it can be asked. Raises UserError as `load_concept` does."""
    return subject_of(load_concept(root, name))


def subject_of(concept: Concept) -> Subject:
    """A concept as a subject of Table 1."""
    subject = Subject(
        concept.name,
        concept.class_word,
        concept.kind,
        concept.info,
        list(concept.extra_info),
        list(concept.train_images),
        list(concept.test_images),
    )
    pairs, note = recognition_pairs(concept)
    subject.notes += [note] if note else []
    subject.items += [
        Item("rec", query, "yes" if yes else "no", path, "positive" if yes else "negative")
        for path, query, yes in pairs
    ]
    facts = tuple(concept.extra_info)
    drawn: dict[str, list[Item]] = {}
    for task, split in _SPLITS.items():
        prompts, note = drawing_prompts(concept, split)
        subject.notes += [note] if note else []
        drawn[task] = [
            Item(task, prompt, "" if explicit == prompt else explicit, facts=facts if fact is not None else ())
            for prompt, explicit, fact in prompts
        ]
        if task in _ASKING.values():
            asking = next(ask for ask, draw in _ASKING.items() if draw == task)
            subject.items += [
                Item(asking, text_only_question(facts, prompt), facts[fact], facts=facts)
                for prompt, _, fact in prompts
                if fact is not None
            ]
    subject.items += [Item("vqa", qa.query, qa.answer, qa.image) for qa in concept.vqa]
    subject.items += [Item("qa", qa.query, qa.answer) for qa in concept.test_text_only]
    subject.items += [item for items in drawn.values() for item in items]
    for task in TASKS:
        if not subject.of(task):
            subject.notes.append(f"{task}: the folder asks nothing of this kind: not measured")
    return subject
