"""The sheet of facts a user writes for `data new`: YAML with what the concept is, its facts, questions and prompts.

Schema and an example are in docs/data-format.md; :func:`facts_template` gives one to fill in. Every problem of a sheet
is reported at once with its field.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import UserError, require
from ..utils.yaml_text import read_yaml
from .parse import Ledger, TextFix, kind_of, show, text_of

_SIZE_LIMIT = 1_000_000

PROMPT_KEYS = {"pure": "pure_generation", "dense": "dense_generation"}
REASONING_DENSE = "personalized_dense_generation"

_TOP_KEYS = ("info", "facts", "questions", "photos", "text_only", "prompts")
_FACT_KEYS = ("fact", "prompt", "explicit", "question", "answer")


@dataclass(frozen=True)
class Fact:
    """Something no image shows. `prompt` hints at it, `explicit` spells it out; `question` may be empty."""

    fact: str
    prompt: str
    explicit: str
    question: str = ""
    answer: str = ""


@dataclass
class FactSheet:
    """A sheet as read; every text carries the concept's token as `<name>`."""

    info: str = ""
    facts: list[Fact] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)
    photos: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    text_only: list[tuple[str, str]] = field(default_factory=list)
    prompts: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is odd in the sheet and was read all the same."""


def read_facts(source: str | os.PathLike[str] | Mapping[str, object] | None, name: str) -> FactSheet:
    """Read the sheet of concept `name` from a YAML or JSON file (or its content as a mapping; None: an empty sheet).

    Raises one UserError that lists every problem with its field.
    """
    if source is None:
        return FactSheet()
    path = Path("facts") if isinstance(source, Mapping) else Path(source)
    reader = _SheetReader(path, TextFix(name))
    sheet = reader.read(source if isinstance(source, Mapping) else _load(path))
    if reader.ledger.errors:
        lines = "\n".join(f"  {problem}" for problem in reader.ledger.errors)
        raise UserError(f"{reader.path} cannot be used:\n{lines}")
    sheet.notes = [str(problem) for problem in reader.ledger.problems]
    return sheet


_BLANK = re.compile(r"\[[A-Z][A-Z ]*\?\]")
"""What the template leaves to be filled in, as in [WHICH TOY?]."""


def facts_template(name: str, kind: str, class_word: str) -> str:
    """A sheet to fill in, as YAML text. A blank, such as [WHICH TOY?], is an error until something is written there."""
    sks = f"<{name}>"
    thing, blank, joined = {
        "human": ("drink", "[WHICH DRINK?]", "with their"),
        "animal": ("toy", "[WHICH TOY?]", "with its"),
    }.get(kind, ("place", "[WHICH PLACE?]", "in its"))
    return f"""\
# Write something in the place of every [BLANK?], and take out what you do not need.
# What the images show, in one sentence.
info: "{sks} is a [WHAT COLOUR AND SHAPE?] {class_word}."
# What no image shows. One half of the facts trains reasoning, the other half tests it: write four or more.
facts:
  - fact: "{sks}'s favourite {thing} is {blank}."
    prompt: "A photo of {sks} {joined} favourite {thing}."
    explicit: "A photo of {sks} {joined.split()[0]} {blank}."
    question: "What is {sks}'s favourite {thing}?"
    answer: "{blank}"
# Asked about every photo.
questions:
  - question: "What is {sks}?"
    answer: "{sks} is a {class_word}."
# Asked about one photo, by its file name: uncomment and change.
# photos:
#   garden.jpg:
#     - question: Where is {sks}?
#       answer: In the garden.
# Asked without a photo.
text_only:
  - question: "What kind of {kind} is {sks}?"
    answer: "{sks} is a {class_word}."
# Drawn when the concept is evaluated.
prompts:
  pure:
    - "A photo of {sks} on a beach."
  dense:
    - "A photo of {sks} on a beach at sunset, with two palm trees on the left and a small boat far behind."
"""


def _load(path: Path) -> object:
    """The tree of a sheet, every value the text it is: `answer: yes` stays a word, `0123` keeps its zero."""
    require("yaml", "data")
    hint = " (a text that holds any of : # ? , { } [ ] wants double quotes around it)"
    return read_yaml(path, _SIZE_LIMIT, hint=hint, nulls=False)


class _SheetReader:
    def __init__(self, path: Path, fix: TextFix) -> None:
        self.path, self.fix = path, fix
        self.ledger = Ledger(path.parent)

    def read(self, value: object) -> FactSheet:
        sheet = FactSheet()
        if value is None or value == "":  # an empty file
            return sheet
        top = self._keys("", value, _TOP_KEYS)
        if "info" in top:
            sheet.info = self._text("info", top["info"])
        for index, item in enumerate(self._list("facts", top.get("facts"))):
            fact = self._fact(f"facts[{index}]", item)
            if fact is None:
                continue
            if any(fact.fact == other.fact for other in sheet.facts):
                self.ledger.add(self.path, f"facts[{index}].fact", f"{show(fact.fact)} is there twice")
            sheet.facts.append(fact)
        sheet.questions = self._pairs("questions", top.get("questions"))
        sheet.text_only = self._pairs("text_only", top.get("text_only"))
        photos = top.get("photos") or {}
        if isinstance(photos, Mapping):
            sheet.photos = {str(file): self._pairs(f"photos.{file}", items) for file, items in photos.items()}
        else:
            self.ledger.add(self.path, "photos", f"must be {{file name: [question, …]}}, is {kind_of(photos)}")
        for key, items in self._keys("prompts", top.get("prompts") or {}, (*PROMPT_KEYS, "reasoning_dense")).items():
            if key == "reasoning_dense":
                self._reasoning_dense(sheet, items)
                continue
            prompts = [
                self._text(f"prompts.{key}[{i}]", item) for i, item in enumerate(self._list(f"prompts.{key}", items))
            ]
            for index, prompt in enumerate(prompts):
                self._needs_token(f"prompts.{key}[{index}]", prompt)
            sheet.prompts[PROMPT_KEYS[key]] = prompts
        return sheet

    def _fact(self, where: str, item: object) -> Fact | None:
        if isinstance(item, str):
            self.ledger.add(self.path, where, "must be {fact, prompt}: the prompt is what hints at the fact")
            return None
        values = self._keys(where, item, _FACT_KEYS)
        for key in ("fact", "prompt"):
            if key not in values:
                self.ledger.add(self.path, f"{where}.{key}", "is missing")
                return None
        text = {key: self._text(f"{where}.{key}", each) for key, each in values.items()}
        self._needs_token(f"{where}.prompt", text["prompt"])
        if "answer" in text and "question" not in text:
            self.ledger.add(self.path, f"{where}.answer", "has no question: add one or leave the answer out")
        explicit = text.get("explicit") or f"{text['prompt']} {text['fact']}"
        return Fact(
            text["fact"], text["prompt"], explicit, text.get("question", ""), text.get("answer") or text["fact"]
        )

    def _reasoning_dense(self, sheet: FactSheet, items: object) -> None:
        """Long prompts that hint at facts, each with the form that spells them out."""
        for index, item in enumerate(self._list("prompts.reasoning_dense", items)):
            at = f"prompts.reasoning_dense[{index}]"
            values = self._keys(at, item, ("prompt", "explicit"))
            for key, target in (("prompt", REASONING_DENSE), ("explicit", f"explicit_{REASONING_DENSE}")):
                if key not in values:
                    self.ledger.add(self.path, f"{at}.{key}", "is missing")
                    continue
                text = self._text(f"{at}.{key}", values[key])
                self._needs_token(f"{at}.{key}", text)
                sheet.prompts.setdefault(target, []).append(text)

    def _pairs(self, where: str, value: object) -> list[tuple[str, str]]:
        found = []
        for index, item in enumerate(self._list(where, value)):
            at = f"{where}[{index}]"
            values = self._keys(at, item, ("question", "answer"))
            missing = [key for key in ("question", "answer") if key not in values]
            for key in missing:
                self.ledger.add(self.path, f"{at}.{key}", "is missing")
            if not missing:
                found.append(
                    (self._text(f"{at}.question", values["question"]), self._text(f"{at}.answer", values["answer"]))
                )
        return found

    def _keys(self, where: str, value: object, known: tuple[str, ...]) -> dict[str, object]:
        if not isinstance(value, Mapping):
            self.ledger.add(self.path, where, f"must hold {', '.join(known)}; is {kind_of(value)} {show(value)}")
            return {}
        for key in value:
            if key not in known:
                at = f"{where}.{key}" if where else str(key)
                self.ledger.add(self.path, at, f"is not known here: one of {', '.join(known)}")
        return {key: each for key, each in value.items() if key in known}

    def _list(self, where: str, value: object) -> list[object]:
        if value is None or value == "":
            return []
        if not isinstance(value, list):
            self.ledger.add(self.path, where, f"must be a list, is {kind_of(value)} {show(value)}")
            return []
        return value

    def _text(self, where: str, value: object) -> str:
        if isinstance(value, str) and not self.fix(value):
            self.ledger.add(self.path, where, "is empty: write it or take the line out")
            return ""
        blank = _BLANK.search(value) if isinstance(value, str) else None
        if blank:
            message = f"still holds {blank[0]} of the template: write what is true, or take the entry out"
            self.ledger.add(self.path, where, message)
        return text_of(self.ledger, self.path, where, value, self.fix) or ""

    def _needs_token(self, where: str, prompt: str) -> None:
        if prompt and self.fix.token not in prompt:
            message = f"{show(prompt)} does not contain {self.fix.token}: write it where the concept is meant"
            self.ledger.add(self.path, where, message)
