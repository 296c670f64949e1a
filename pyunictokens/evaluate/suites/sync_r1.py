"""UnifyBench++ folders as the authors' later public code (Sync-R1) asks them: `--protocol sync-r1`.

    ROOT/test_data/NAME.json     [{type: rec | vqa | text_only, image, conversations: [{value}, {value}]}, …]
    ROOT/prompts.json            {"object": ["a {} on …", …], "live": […]}: the published templates; read if there
    info.json                    also `generation_type` (live_subject | object), which chooses the templates

Questions come from test_data/; Rea. asks for the one fact that a prompt needs, Dense Rea. for the prompt rewritten with
its facts, and both are compared with the explicit prompt. Pure Gen. takes 25 templates. One image of the concept is the
reference, and one fact the text prompt of the +TP rivals. The questions' wording is this project's own. Everything else
of a folder is read as always (docs/data-format.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ...data.concept import FACT_PROMPTS, Concept
from ...data.folder import load_concept
from ...data.parse import WARNING, ImageFinder, Ledger, TextFix, questions_of, show
from ...utils.errors import UserError
from .. import metrics as m
from ..tasks import TASKS, Item, Subject
from .dreambench import own_prompts
from .dreambooth import is_live, templates
from .unify import fact_of, names, recognition_items

__all__ = ["names", "read", "subject_of"]

_TYPES = {"rec": "recognition", "vqa": "vqa", "text_only": "qa", "qa": "qa"}
_DENSE_FACTS = "personalized_dense_generation"


def read(root: Path, name: str) -> Subject:
    """Concept `name` with all it is asked. Raises UserError as `load_concept` does."""
    return subject_of(load_concept(root, name))


def subject_of(concept: Concept, tasks: Iterable[str] = TASKS) -> Subject:
    """A concept as a subject, with the items of `tasks`."""
    photos = concept.test_images or concept.train_images
    subject = Subject.of_concept(concept, concept.extra_info[:1], photos[:1])
    tasks = list(tasks)
    asked = _test_data(concept, subject)
    for task in tasks:
        if task in _TYPES.values():
            subject.items += asked.get(task, [])
        elif task == "pure":
            subject.items += _pure(concept, subject)
        elif task == "dense":
            subject.items += [Item(task, text) for text in concept.generation_prompts.get("dense_generation", [])]
        elif task in ("reasoning", "reasoning_generation"):
            subject.items += [_short(concept, task, *each) for each in _held_out(concept, subject)]
        else:
            subject.items += [_long(concept, task, *each) for each in _long_pairs(concept, subject)]
    subject.note_lacking(tasks)
    return subject


# --- questions -----------------------------------------------------------------------------------------------------


def _test_data(concept: Concept, subject: Subject) -> dict[str, list[Item]]:
    """Items of test_data/NAME.json by task; where there is no such file, those of the test half."""
    places = [folder / "test_data" / f"{concept.name}.json" for folder in (concept.root, concept.root.parent)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        subject.notes.append(f"{places[0]}: no such file: rec, vqa and qa are those of the test half")
        items, _ = recognition_items(concept)
        asked = [Item("vqa", qa.query, qa.answer, qa.image) for qa in concept.vqa]
        asked += [Item("qa", qa.query, qa.answer) for qa in concept.test_text_only]
        return _by_task([*items, *asked])
    ledger, fix = Ledger(concept.root), TextFix(concept.name)
    finder, value = ImageFinder(ledger, concept.root), ledger.read(file)
    if value is not None and not isinstance(value, list):
        raise UserError(f"{file}: must be a list of {{type, image, conversations}}")
    items = []
    for index, entry in enumerate(value or []):
        where = f"[{index}]"
        kind = entry.get("type") if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or kind not in _TYPES:
            ledger.add(file, f"{where}.type", f"is {show(kind)}: must be one of rec, vqa, text_only", WARNING)
            continue
        for raw in questions_of(ledger, file, where, _as_chat(entry), fix):
            image = None
            if kind in ("rec", "vqa"):
                bases = [concept.test_folder, concept.root]
                image = finder.find(file, f"{where}.image", raw.image, bases) if raw.image else None
                if image is None:
                    continue
            item = _item(_TYPES[kind], raw.query, raw.answer, image)
            if item is None:
                ledger.add(file, where, f"{show(raw.answer)} says neither yes nor no: left out", WARNING)
            else:
                items.append(item)
    subject.notes += [str(problem) for problem in ledger.problems if "absolute path" not in problem.message]
    return _by_task(items)


def _as_chat(entry: dict[str, object]) -> dict[str, object]:
    """An entry whose turns say who speaks; the published ones may leave it out (question first, then answer)."""
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return entry
    who = ("human", "gpt")
    return {**entry, "conversations": [{"from": who[place % 2], **turn} for place, turn in enumerate(turns)]}


def _item(task: str, question: str, answer: str, image: Path | None) -> Item | None:
    if task != "recognition":
        return Item(task, question, answer, image)
    said = m.says_yes(answer)
    if said is None:
        return None
    return Item(task, question, "yes" if said else "no", image, "positive" if said else "negative")


def _by_task(items: Iterable[Item]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.task, []).append(item)
    return found


# --- prompts -------------------------------------------------------------------------------------------------------


def _pure(concept: Concept, subject: Subject) -> list[Item]:
    """25 templates, live or object by `generation_type`, else by the class word."""
    kind = str(concept.extra.get("generation_type", "")).casefold().replace("-", "_").replace(" ", "_")
    live = kind.startswith("live") if kind else concept.kind != "object" or is_live(concept.class_word)
    listed = own_prompts(concept.root, live)
    if listed is None:
        subject.notes.append(
            "pure: the 25 templates are this project's own words; put the published ones into prompts.json to compare"
        )
        listed = templates(concept.class_word, live)
    return [Item("pure", prompt.replace("{}", concept.sks)) for prompt in listed]


def _held_out(concept: Concept, subject: Subject) -> list[tuple[str, str, int]]:
    """(prompt, explicit prompt, fact) of the held-out half."""
    lists = concept.generation_prompts
    every, spelled = lists.get(FACT_PROMPTS, []), lists.get(f"explicit_{FACT_PROMPTS}", [])
    if every and len(every) != len(spelled):
        note = f"reasoning: {len(spelled)} explicit prompts for {len(every)}: not measured"
        subject.notes += [] if note in subject.notes else [note]
        return []
    explicit = dict(zip(every, spelled, strict=True))
    return [(prompt, explicit[prompt], fact) for prompt, fact in concept.fact_pairs_test if prompt in explicit]


def _long_pairs(concept: Concept, subject: Subject) -> list[tuple[str, str, int]]:
    lists = concept.generation_prompts
    prompts, spelled = lists.get(_DENSE_FACTS, []), lists.get(f"explicit_{_DENSE_FACTS}", [])
    if len(prompts) != len(spelled) or (prompts and not concept.extra_info):
        note = f"reasoning_dense: {len(spelled)} explicit prompts for {len(prompts)}: not measured"
        subject.notes += [] if note in subject.notes else [note]
        return []
    return [(p, explicit, fact_of(concept, p, explicit)) for p, explicit in zip(prompts, spelled, strict=True)]


def _short(concept: Concept, task: str, prompt: str, explicit: str, fact: int) -> Item:
    facts, asks = tuple(concept.extra_info), fact_question(concept.extra_info, prompt)
    if task == "reasoning":
        return Item(task, asks, explicit, facts=facts, prompt=prompt, correct=fact)
    return Item(task, prompt, explicit, facts=facts, correct=fact, asks=asks)


def _long(concept: Concept, task: str, prompt: str, explicit: str, fact: int) -> Item:
    facts, asks = tuple(concept.extra_info), rewriting_question(concept.extra_info, prompt)
    if task == "reasoning_dense":
        return Item(task, asks, explicit, facts=facts, prompt=prompt, correct=fact)
    return Item(task, prompt, explicit, facts=facts, correct=fact, asks=asks, rewrites=True)


def fact_question(facts: Iterable[str], prompt: str) -> str:
    """All facts and a prompt: the one that it needs is to be given back, alone."""
    return f"{_known(facts)} Request: {_line(prompt)}. Give back the one piece of information it needs, nothing else."


def rewriting_question(facts: Iterable[str], prompt: str) -> str:
    """All facts and a prompt: the prompt is to be rewritten with those it needs."""
    return f"{_known(facts)} Request: {_line(prompt)}. Rewrite the request with the information it needs, nothing else."


def _known(facts: Iterable[str]) -> str:
    return f"Information: {'. '.join(_line(fact) for fact in facts)}."


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".")
