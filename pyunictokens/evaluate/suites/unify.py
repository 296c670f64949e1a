"""UnifyBench and UnifyBench++ concept folders (docs/data-format.md) as subjects: what `unifybench` and Table 1 ask.

UnifyBench holds recognition, VQA, QA and prompts that need no fact; the ++ fields add reasoning prompts paired with
extra_info, dense prompts, and dense prompts that hint at facts. What a folder lacks becomes a note, never an error.
Only the held-out half of the facts is asked for, though all of them are offered to choose from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...data.concept import FACT_PROMPTS, Concept
from ...data.folder import list_concepts, load_concept
from ...data.wording import compound_prompt, text_only_question
from .. import metrics as m
from ..tasks import TASKS, Item, Subject

_LISTS = {"pure": "pure_generation", "dense": "dense_generation"}
_DENSE_FACTS = "personalized_dense_generation"
_ASKED_OF = {"reasoning": "reasoning_generation", "reasoning_dense": "dense_reasoning_generation"}
_NEGATIVES = 12


def names(root: Path) -> list[str]:
    """Concepts of a data folder."""
    return list_concepts(root)


def read(root: Path, name: str) -> Subject:
    """Concept `name` with all it can be asked. Raises UserError as `load_concept` does."""
    return subject_of(load_concept(root, name))


def subject_of(concept: Concept, tasks: Iterable[str] = TASKS) -> Subject:
    """A concept as a subject, with the items of `tasks`."""
    subject = Subject.of_concept(concept, concept.extra_info, concept.train_images)
    tasks = list(tasks)
    for task in tasks:
        if task == "recognition":
            items, note = recognition_items(concept)
        elif task in ("vqa", "qa"):
            asked = concept.vqa if task == "vqa" else concept.test_text_only
            items, note = [Item(task, qa.query, qa.answer, qa.image) for qa in asked], ""
        elif task in _ASKED_OF:
            prompts, note = _prompts(concept, _ASKED_OF[task])
            items = [_question(task, item) for item in prompts if item.correct is not None]
        else:
            items, note = _prompts(concept, task)
        subject.items += items
        if note and note not in subject.notes:
            subject.notes.append(note)
    subject.note_lacking(tasks)
    return subject


def recognition_items(concept: Concept) -> tuple[list[Item], str]:
    """Items and a note. Negatives unseen in training come first; without images of both sorts there are no items."""
    asked = list(dict.fromkeys(item.query for item in concept.recognitions))
    asked = asked or [f"Is {concept.sks} in this picture?"]
    seen = {item.image for item in concept.recognitions}
    fresh = [path for path in concept.negatives if path not in seen]
    note = ""
    if concept.negatives and not fresh:
        note = "recognition: every negative picture was also seen in training"
    images = [(path, "yes", "positive") for path in concept.test_images]
    images += [(path, "no", "negative") for path in (fresh or concept.negatives)[:_NEGATIVES]]
    if len({truth for _, truth, _ in images}) < 2:
        return [], ""
    return [Item("recognition", q, truth, path, group) for path, truth, group in images for q in asked[:2]], note


def _question(task: str, prompt: Item) -> Item:
    """Which fact does a prompt mean?"""
    assert prompt.correct is not None
    question, truth = text_only_question(prompt.facts, prompt.text), prompt.facts[prompt.correct]
    return Item(task, question, truth, facts=prompt.facts, prompt=prompt.text, correct=prompt.correct)


def _prompts(concept: Concept, task: str) -> tuple[list[Item], str]:
    """Prompts of a task that generates images, and a note."""
    lists, facts = concept.generation_prompts, tuple(concept.extra_info)
    if task in _LISTS:
        return [Item(task, prompt) for prompt in lists.get(_LISTS[task], [])], ""
    if task == "reasoning_generation":
        spelled, every = lists.get(f"explicit_{FACT_PROMPTS}", []), lists.get(FACT_PROMPTS, [])
        known = dict(zip(every, spelled, strict=True)) if len(spelled) == len(every) else {}
        found = [(p, known.get(p) or compound_prompt(p, facts[r]), r) for p, r in concept.fact_pairs_test]
    else:
        prompts, spelled = (lists.get(f"{more}{_DENSE_FACTS}", []) for more in ("", "explicit_"))
        if prompts and len(spelled) != len(prompts):
            return [], f"{task}: {len(spelled)} explicit prompts for {len(prompts)}: not measured"
        found = [
            (p, spelled_out, fact_of(concept, p, spelled_out)) for p, spelled_out in zip(prompts, spelled, strict=True)
        ]
    return [
        Item(task, prompt, "" if explicit == prompt else explicit, facts=facts, correct=fact)
        for prompt, explicit, fact in found
    ], ""


def fact_of(concept: Concept, prompt: str, explicit: str) -> int:
    """The held-out fact of a long prompt: by the short prompt it begins with, else by its wording."""
    starts = [fact for start, fact in concept.fact_pairs_test if prompt.startswith(start.rstrip(" ."))]
    return starts[0] if starts else m.nearest(explicit, concept.extra_info)
