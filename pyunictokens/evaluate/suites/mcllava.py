"""The single-concept part of the MC-LLaVA data set as subjects (the paper tests no more of it).

    ROOT/{two_concept,three_concept}/concept/train/NAME/{0.png …}      photos, masks beside them
    ROOT/{two_concept,three_concept}/concept/test/NAME/{0.png …}       test photos
                                                  …/vqa.json     {path: {Human, AI}}: questions about pictures
                                                  …/qa.json      [{question, answer}]: multiple choice, no picture

Recognition: the concept's test photos are positive, as many as `NEGATIVES` test photos of other concepts, evenly
spread, are negative. The answer of a multiple choice is a letter; it stands for the option of that letter.
"""

from __future__ import annotations

from pathlib import Path

from ...utils.errors import UserError
from ..tasks import Item, Subject
from .files import (
    LETTERS,
    by_image,
    entries_of,
    entry_of,
    folders,
    here,
    inline_options,
    optional_json,
    pictures,
    words,
)

NEGATIVES = 50
_HALVES = ("two_concept", "three_concept")


def names(root: Path) -> list[str]:
    """All characters of both halves. Raises UserError where the folder is no MC-LLaVA data set."""
    found = [name for half in _halves(root) for name in folders(half / "concept" / "train")]
    if not found:
        raise UserError(f"{root}: holds neither two_concept/concept/train nor three_concept/concept/train")
    return found


def read(root: Path, name: str) -> Subject:
    """Character `name`. Raises UserError naming file and entry for what cannot be used."""
    half = next((half for half in _halves(root) if (half / "concept" / "train" / name).is_dir()), None)
    if half is None:
        raise UserError(f"{root}: no concept {name!r} in {', '.join(_HALVES)}")
    test = half / "concept" / "test" / name
    subject = Subject(name, "person", "human", references=pictures(half / "concept" / "train" / name))
    subject.test_images = pictures(test)
    others = [
        path
        for folder in _halves(root)
        for other in folders(folder / "concept" / "test")
        if other != name
        for path in pictures(folder / "concept" / "test" / other)
    ]
    subject.add_recognition(_spread(others, NEGATIVES))
    subject.items += _visual(test / "vqa.json", subject)
    subject.items += _text(test / "qa.json", subject)
    return subject


def _halves(root: Path) -> list[Path]:
    return [root / half for half in _HALVES if (root / half / "concept" / "train").is_dir()]


def _spread(paths: list[Path], number: int) -> list[Path]:
    """`number` of the paths, evenly spread; all when there are no more."""
    if len(paths) <= number:
        return paths
    return [paths[index * len(paths) // number] for index in range(number)]


def _visual(file: Path, subject: Subject) -> list[Item]:
    items = []
    for key, entry in by_image(optional_json(file), str(file)):
        path = here(key, file.parent)
        if path is None:
            subject.notes.append(f"{file.name}: {key}: no such picture: left out")
            continue
        where = f"{file}: {key}"
        asked = entry_of(entry, where, "{Human, AI}")
        items.append(_item("vqa", asked.get("Human"), asked.get("AI"), where, subject, path))
    if not items:
        subject.notes.append(f"vqa: {file.name} asks nothing: not measured")
    return items


def _text(file: Path, subject: Subject) -> list[Item]:
    listed = entries_of(optional_json(file), str(file))
    if not listed:
        subject.notes.append(f"qa: {file.name} asks nothing: not measured")
    items = []
    for index, entry in enumerate(listed):
        asked = entry_of(entry, f"{file}[{index}]", "{question, answer}")
        items.append(_item("qa", asked.get("question"), asked.get("answer"), f"{file}[{index}]", subject, None))
    return items


def _item(task: str, question: object, answer: object, where: str, subject: Subject, image: Path | None) -> Item:
    text, right = words(question, where).replace("<sks>", subject.sks), words(answer, where)
    options = inline_options(text)
    letter = right.strip("(). ").upper()[:1]
    if options and len(right.strip("(). ")) == 1:
        if letter not in LETTERS[: len(options)]:
            raise UserError(f"{where}: answer {right!r}: must be one of {', '.join(LETTERS[: len(options)])}")
        right = options[LETTERS.index(letter)]
        text = f"{text} Answer with the letter of the right option."
    return Item(task, text, right, image, options=tuple(options))
