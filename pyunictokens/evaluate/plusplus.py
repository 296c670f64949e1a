"""UnifyBench++ texts for a UnifyBench folder, proposed by a language model: facts with reasoning prompts, long prompts,
long prompts that hint at facts.

It asks any OpenAI-compatible endpoint and fills a sheet; nothing goes into the data from here. A person reviews the
sheet, and `data/review_sheet.py` writes what was accepted. The model invents: a "fact" is true because somebody says
so, and the sheet is where it becomes true, or is refused.

The sheet is also the memory: what it holds is not asked for again, however often the command is given.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config.limits import at_least
from ..data.concept import Concept, held_out
from ..data.review_sheet import Row, read_sheet, write_sheet
from ..rewards.endpoint import Endpoint, EndpointError
from ..rewards.judge import Message, unfenced
from ..utils.errors import UserError
from ..utils.progress import Progress, silent
from .metrics import nearest

_TOKEN = re.compile(r"<[^<>\s]+>")
_LONGEST = 600
"""Characters of one text; CLIP and the models read about a hundred tokens."""
_SHORTEST_DENSE = 12
"""Words of a long prompt."""
_TOLD = 12
"""Questions with answers that the model is told."""


@dataclass(frozen=True)
class PlusPlusSettings:
    """How many texts a concept gets, of those it lacks."""

    facts: int = 8
    """Facts with a reasoning prompt each; one half trains, the other half tests. A folder's own facts are kept."""
    dense: int = 10
    """Long prompts that need no fact."""
    dense_reasoning: int = 10
    """Long prompts that hint at the facts of the test half, in turn."""
    answers: int = 3
    """How often the model is asked for one kind of text before what is usable of it is taken."""

    def __post_init__(self) -> None:
        if self.facts < 2:
            raise UserError(f"facts={self.facts}: must be at least 2, one half to train and one to test")
        at_least(0, dense=self.dense, dense_reasoning=self.dense_reasoning)
        at_least(1, answers=self.answers)


@dataclass
class Proposed:
    """What was done for a sheet."""

    new: int = 0
    """Rows that are new in it."""
    kept: int = 0
    """Rows that it had."""
    failures: list[str] = field(default_factory=list)
    """Concept and kind for which the model gave nothing usable, and why."""
    notes: list[str] = field(default_factory=list)


def propose(
    concepts: Sequence[Concept],
    endpoint: Endpoint,
    sheet: str | os.PathLike[str],
    settings: PlusPlusSettings | None = None,
    progress: Progress = silent,
) -> Proposed:
    """Ask for what each concept's folder and `sheet` lack, and add it to the sheet, kind by kind.

    Rows that are there stay as a person left them. Raises UserError where the endpoint does not answer; what it had
    answered before is in the sheet, and the same call goes on from there.
    """
    settings, path, done = settings or PlusPlusSettings(), Path(sheet), Proposed()
    rows = read_sheet(path) if path.is_file() else []
    done.kept = len(rows)
    kinds = ("fact", "dense", "dense_reasoning")
    for place, concept in enumerate(concepts):
        for step, kind in enumerate(kinds):
            progress("texts", len(kinds) * place + step, len(kinds) * len(concepts), {"note": f"{concept.name} {kind}"})
            task = _task(concept, kind, rows, settings)
            if task is None:
                continue
            try:
                found, problem = _asked(task, concept, endpoint, settings)
            except EndpointError as error:
                where = f"; {done.new} new rows are in {path}, the same command goes on" if done.new else ""
                raise UserError(f"{concept.name}: {kind}: {error}{where}") from None
            if problem:
                message = f"{concept.name}: {kind}: {len(found)} of {task.count} usable: {problem}"
                (done.notes if found else done.failures).append(message)
            if found:
                rows += found
                done.new += len(found)
                write_sheet(path, rows)
    progress("texts", len(kinds) * len(concepts), len(kinds) * len(concepts))
    return done


@dataclass(frozen=True)
class _Task:
    """One kind of text for one concept."""

    kind: str
    count: int
    request: str
    keys: tuple[str, ...]
    """What an item of the answer holds."""
    facts: tuple[tuple[int, str, str], ...] = ()
    """(number, fact, its short prompt) that items are about, in turn; empty: each item brings its own."""
    check: Callable[[int, Mapping[str, str]], str] = lambda place, item: ""
    """What else is wrong with an item, by its place."""
    tests: int = 0
    """How many of the facts, the last ones, are of the test half."""


def _task(concept: Concept, kind: str, rows: Sequence[Row], settings: PlusPlusSettings) -> _Task | None:
    """What is to be asked; None where folder or sheet have it."""
    mine = [row for row in rows if row.concept == concept.name]
    if any(row.kind == kind for row in mine):
        return None
    sks, lists = concept.sks, concept.generation_prompts
    if kind == "fact":
        return None if concept.fact_pairs else _facts(concept, settings)
    if kind == "dense":
        if lists.get("dense_generation") or not settings.dense:
            return None
        request = (
            f"Write {settings.dense} long prompts for an image generator, each one sentence of 25 to 50 words, that "
            f"show {sks} in a scene with many details: where it is, what stands left, right and behind, light, "
            f"weather, colours. Each contains {sks} once. They use only what is visible; no two share a scene."
        )
        return _Task(kind, settings.dense, request, ("prompt",), check=_long)
    if lists.get("personalized_dense_generation") or not settings.dense_reasoning:
        return None
    tested = _tested(concept, mine)
    if not tested:
        return None
    about = tuple(tested[place % len(tested)] for place in range(settings.dense_reasoning))
    listed = "\n".join(
        f"{n}. Fact: {fact} Short prompt: {prompt}" for n, (_, fact, prompt) in enumerate(about, start=1)
    )
    every = concept.extra_info or [row.fact for row in mine if row.kind == "fact" and not row.refused]
    request = (
        f"Write {len(about)} long prompts for an image generator, number n for number n of this list:\n{listed}\n"
        f'"prompt" begins with the words of its short prompt and goes on with details of the scene, 25 to 50 words in '
        "all, and only hints at the fact, as the short prompt does: it never says it. "
        '"explicit" is the same prompt with the fact spelled out in place of the hint.'
    )
    return _Task(kind, len(about), request, ("prompt", "explicit"), about, _Told(about, every))


def _facts(concept: Concept, settings: PlusPlusSettings) -> _Task:
    sks, known = concept.sks, concept.extra_info
    what = (
        f'"prompt" is a short prompt for an image generator that contains {sks} and only hints at the fact, so that '
        "whoever does not know the fact cannot know what to draw; it never says it. "
        f'"explicit" is the same prompt with the fact spelled out; it contains {sks} too.'
    )
    if known:
        listed = "\n".join(f"{number}. {fact}" for number, fact in enumerate(known, start=1))
        request = f"These facts about {sks} cannot be seen in its pictures:\n{listed}\nFor each, in this order: {what}"
        about = tuple((number, fact, "") for number, fact in enumerate(known, start=1))
        tests = held_out(concept.extra, len(known))
        return _Task("fact", len(known), request, ("prompt", "explicit"), about, tests=tests)
    request = (
        f"Think of {settings.facts} facts about {sks} that its pictures cannot show but that can be drawn: favourite "
        "toys, food, places, clothes, friends, habits. They fit what is known, do not contradict each other, and no "
        f'two are about the same thing. "fact" is one short sentence that contains {sks}. {what}'
    )
    return _Task("fact", settings.facts, request, ("fact", "prompt", "explicit"), tests=settings.facts // 2)


def _tested(concept: Concept, mine: Sequence[Row]) -> list[tuple[int, str, str]]:
    """(number, fact, short prompt) of the test half: of the folder, else of the sheet without what was refused."""
    if concept.fact_pairs:
        return [(fact + 1, concept.extra_info[fact], prompt) for prompt, fact in concept.fact_pairs_test]
    facts = [row for row in mine if row.kind == "fact" and row.half == "test" and not row.refused]
    return [(row.number, row.fact, row.prompt) for row in facts]


@dataclass(frozen=True)
class _Told:
    """Whether a table will take a long prompt for the fact it was written for (`suites.unify.fact_of`)."""

    about: tuple[tuple[int, str, str], ...]
    every: Sequence[str]

    def __call__(self, place: int, item: Mapping[str, str]) -> str:
        _, fact, short = self.about[place]
        if item["prompt"].startswith(short.rstrip(" .")) or self.every[nearest(item["explicit"], self.every)] == fact:
            return _long(place, item)
        return f"item {place + 1}: begins with other words than {short!r}, and reads like another fact"


def _long(place: int, item: Mapping[str, str]) -> str:
    words = len(item["prompt"].split())
    return f"item {place + 1}: {words} words, must be {_SHORTEST_DENSE} or more" if words < _SHORTEST_DENSE else ""


def _asked(task: _Task, concept: Concept, endpoint: Endpoint, settings: PlusPlusSettings) -> tuple[list[Row], str]:
    """The rows of the best answer, and what was wrong with it. Raises EndpointError."""
    form = ", ".join(f'"{key}": "…"' for key in task.keys)
    ending = (
        f'Answer with one JSON object and nothing else: {{"items": [{{{form}}}, …]}} with exactly {task.count} items. '
        f"Write {concept.sks} exactly so, and no other word in < and >."
    )
    first: Message = {"role": "user", "content": f"{_known(concept)}\n\n{task.request}\n\n{ending}"}
    turns, best, problem = [first], list[Row](), ""
    for _ in range(settings.answers):
        reply = endpoint.chat(turns)
        found, problems = _read(reply.text, task, concept)
        if len(found) > len(best) or not problems:
            best, problem = found, "; ".join(problems[:3])
        if not problems:
            break
        problem = problem or "; ".join(problems[:3])
        again = f"That cannot be used: {'; '.join(problems[:8])}. Write all {task.count} items again. {ending}"
        turns = [first, {"role": "assistant", "content": reply.text or "(nothing)"}, {"role": "user", "content": again}]
    return best, problem


def _read(text: str, task: _Task, concept: Concept) -> tuple[list[Row], list[str]]:
    """The usable items of an answer as rows, and what is wrong with it."""
    try:
        made = json.loads(unfenced(text.strip()))
        items = made["items"] if isinstance(made, dict) else made
        if not isinstance(items, list):
            raise TypeError("items is no list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [], [f"the answer is not the JSON asked for ({type(error).__name__}: {str(error)[:100]})"]
    rows: list[Row] = []
    problems = [] if len(items) == task.count else [f"{len(items)} items, {task.count} are wanted"]
    seen: set[str] = set()
    for place, item in enumerate(items[: task.count]):
        problem = _problem(place, item, task, concept, seen)
        if problem:
            problems.append(problem)
            continue
        said = {key: " ".join(str(item[key]).split()) for key in task.keys}
        seen.add(said[task.keys[0]].casefold())
        number, fact = (task.facts[place][0], task.facts[place][1]) if task.facts else (place + 1, said.get("fact", ""))
        half = ""
        if task.kind == "fact":
            half = "train" if place < task.count - task.tests else "test"
        rows.append(Row("", concept.name, task.kind, number, half, fact, said["prompt"], said.get("explicit", "")))
    return rows, problems


def _problem(place: int, item: object, task: _Task, concept: Concept, seen: set[str]) -> str:
    """What is wrong with one item; empty where nothing is."""
    where = f"item {place + 1}"
    if not isinstance(item, dict):
        return f"{where}: must be an object"
    said: dict[str, str] = {}
    for key in task.keys:
        text = item.get(key)
        if not isinstance(text, str) or not text.strip():
            return f"{where}: {key} is missing"
        said[key] = " ".join(text.split())
        if concept.sks not in said[key]:
            return f"{where}: {key} does not contain {concept.sks}"
        strange = [token for token in _TOKEN.findall(said[key]) if token != concept.sks]
        if strange:
            return f"{where}: {key} contains {strange[0]}"
        if len(said[key]) > _LONGEST:
            return f"{where}: {key} has {len(said[key])} characters, {_LONGEST} at most"
    if said[task.keys[0]].casefold() in seen:
        return f"{where}: is there twice"
    if said.get("explicit") == said["prompt"]:
        return f"{where}: prompt and explicit are the same, so nothing is hinted at"
    return task.check(place, said)


def _known(concept: Concept) -> str:
    """What the model is told of a concept."""
    pairs = [*concept.text_only, *concept.conversations]
    told = list(dict.fromkeys(f"- {qa.query} {qa.answer}" for qa in pairs))[:_TOLD]
    about = concept.info or f"{concept.sks} is a {concept.class_word}."
    lines = [f"{concept.sks} is the name of one particular {concept.class_word} ({concept.kind}). {about}"]
    if told:
        lines += ["What has been said about it:", *told]
    return "\n".join(lines)
