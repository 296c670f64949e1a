"""The Yo'LLaVA data set as subjects: recognition, multiple choice with and without pictures, likeness of drawings.

    ROOT/train/NAME/{0.png …}           photos to learn from
    ROOT/test/NAME/{0.png …}            photos of the concept never trained on
    ROOT/yollava-visual-qa.json         {NAME: {path: {question, options: {A, B}, correct_answer}}} or flat {path: …}
    ROOT/yollava-text-qa.json           {NAME: [{question, options, correct_answer}, …]}, not published, read if there
    ROOT/classes.json                   {NAME: class word}, not published, read if there

Recognition: the concept's test photos are positive, every other concept's are negative. Paths in the JSON are those of
the machine it was made on: only the file name counts. `<sks>` in questions is the concept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...utils.errors import UserError
from ..tasks import Item, Subject
from .files import folders, here, lettered, optional_json, pictures, with_options, words

VISUAL, TEXT, CLASSES = "yollava-visual-qa.json", "yollava-text-qa.json", "classes.json"


def names(root: Path) -> list[str]:
    """Concepts with photos to train on. Raises UserError where the folder is no Yo'LLaVA data set."""
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise UserError(f"{root}: holds no train/ and test/: give the folder yollava-data")
    return folders(root / "train")


def read(root: Path, name: str) -> Subject:
    """Concept `name`. Raises UserError naming file and field for an entry that cannot be used."""
    classes = optional_json(root / CLASSES) or {}
    subject = Subject(name, str(classes.get(name, "subject")), references=pictures(root / "train" / name))
    subject.test_images = pictures(root / "test" / name)
    others = [path for other in folders(root / "test") if other != name for path in pictures(root / "test" / other)]
    question = f"Can you see {subject.sks} in this picture? Answer with yes or no."
    if subject.test_images and others:
        subject.items += [Item("recognition", question, "yes", path, "positive") for path in subject.test_images]
        subject.items += [Item("recognition", question, "no", path, "negative") for path in others]
    else:
        subject.notes.append("recognition: needs test photos of this concept and of others: not measured")
    for where, image, entry in _visual(root, name):
        path = here(image, root / "test" / name)
        if path is None:
            subject.notes.append(f"{where}: no such picture in test/{name}: left out")
            continue
        subject.items.append(_choice("vqa", entry, where, subject, path))
    listed = (optional_json(root / TEXT) or {}).get(name, [])
    subject.items += [_choice("qa", entry, f"{TEXT}: {name}[{i}]", subject, None) for i, entry in enumerate(listed)]
    if not listed:
        subject.notes.append(f"qa: {TEXT} has no questions about {name}: not measured")
    subject.items.append(Item("pure", f"A photo of {subject.sks}."))
    return subject


def _visual(root: Path, name: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(where, picture, entry) of this concept, from either shape of the file."""
    content = optional_json(root / VISUAL) or {}
    if not isinstance(content, Mapping):
        raise UserError(f"{root / VISUAL}: must be an object, is {type(content).__name__}")
    flat = {key: value for key, value in content.items() if isinstance(value, Mapping) and "question" in value}
    mine = {key: value for key, value in flat.items() if Path(key.replace("\\", "/")).parent.name == name}
    for key, entry in {**mine, **content.get(name, {})}.items():
        yield f"{VISUAL}: {key}", key, entry


def _choice(task: str, entry: Mapping[str, Any], where: str, subject: Subject, image: Path | None) -> Item:
    options, right = lettered(entry, where)
    question = words(entry.get("question"), where).replace("<sks>", subject.sks)
    return Item(task, with_options(question, options), right, image, options=tuple(options))
