"""The Yo'LLaVA data set as subjects: recognition, multiple choice with and without images, likeness of samples.

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

from ...utils.errors import UserError
from ..tasks import Item, Subject
from .dreambooth import kind_of
from .files import by_image, entries_of, entry_of, folders, here, lettered, optional_json, pictures, with_options, words

VISUAL, TEXT, CLASSES = "yollava-visual-qa.json", "yollava-text-qa.json", "classes.json"
UNKNOWN = "subject"
"""The class word of a concept that classes.json does not name."""


def names(root: Path) -> list[str]:
    """Concepts with photos to train on. Raises UserError where the folder is no Yo'LLaVA data set."""
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise UserError(f"{root}: holds no train/ and test/: give the folder yollava-data")
    return folders(root / "train")


def read(root: Path, name: str) -> Subject:
    """Concept `name`. Raises UserError naming file and field for an entry that cannot be used."""
    classes = _object(root / CLASSES)
    word = classes.get(name)
    word = word if isinstance(word, str) and word.strip() else UNKNOWN
    subject = Subject(name, word, kind_of(word), references=pictures(root / "train" / name))
    subject.test_images = pictures(root / "test" / name)
    others = [path for other in folders(root / "test") if other != name for path in pictures(root / "test" / other)]
    subject.add_recognition(others)
    for where, image, entry in _visual(root, name):
        path = here(image, root / "test" / name)
        if path is None:
            subject.notes.append(f"{where}: no such picture in test/{name}: left out")
            continue
        subject.items.append(_choice("vqa", entry, where, subject, path))
    listed = entries_of(_object(root / TEXT).get(name), f"{TEXT}: {name}")
    subject.items += [_choice("qa", entry, f"{TEXT}: {name}[{i}]", subject, None) for i, entry in enumerate(listed)]
    if not listed:
        subject.notes.append(f"qa: {TEXT} has no questions about {name}: not measured")
    subject.items.append(Item("pure", f"A photo of {subject.sks}."))
    return subject


def _object(file: Path) -> Mapping[str, object]:
    """The object in `file`; an empty one where there is no such file, or null in it."""
    content = optional_json(file)
    return {} if content is None else entry_of(content, str(file), "{concept: questions}")


def _visual(root: Path, name: str) -> Iterator[tuple[str, str, object]]:
    """(where, image, entry) of this concept, from either shape of the file."""
    content = _object(root / VISUAL)
    flat = {key: value for key, value in content.items() if isinstance(value, Mapping) and "question" in value}
    mine = {key: value for key, value in flat.items() if Path(key.replace("\\", "/")).parent.name == name}
    for key, entry in [*mine.items(), *by_image(content.get(name), f"{VISUAL}: {name}")]:
        yield f"{VISUAL}: {key}", key, entry


def _choice(task: str, entry: object, where: str, subject: Subject, image: Path | None) -> Item:
    asked = entry_of(entry, where, "{question, options, correct_answer}")
    options, right = lettered(asked, where)
    question = words(asked.get("question"), where).replace("<sks>", subject.sks)
    return Item(task, with_options(question, options), right, image, options=tuple(options))
