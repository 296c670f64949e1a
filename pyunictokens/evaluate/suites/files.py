"""What readers of foreign layouts share: images of a folder, JSON that is there or not, multiple choice as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data.folder import concept_folders
from ...data.image_files import is_file, list_images
from ...data.parse import kind_of, show
from ...utils.errors import UserError
from ...utils.files import read_json
from ...utils.spelling import on_disk, spelled

LETTERS = "ABCDEFGH"


def folders(root: Path) -> list[str]:
    """Names of the sub-folders that can name a concept, in natural order; not those that begin with `_`."""
    return [name for name in concept_folders(root) if not name.startswith("_")]


pictures = list_images


def optional_json(path: Path) -> object:
    """The content of `path`, None where there is no such file."""
    path = on_disk(path)
    return read_json(path) if is_file(path) else None


def entry_of(value: object, where: str, shape: str) -> Mapping[str, object]:
    """`value` as an object with the fields of `shape`, or UserError naming `where`."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: must be an object {shape}, is {kind_of(value)} {show(value)}")
    return value


def entries_of(value: object, where: str) -> list[object]:
    """`value` as a list: nothing is an empty one, a single object a list of one. Else UserError naming `where`."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        raise UserError(f"{where}: must be a list of questions, is {kind_of(value)} {show(value)}")
    return value


def by_image(value: object, where: str) -> list[tuple[str, object]]:
    """(image, question) pairs of ``{image: question or questions}`` or ``[{"image": …, …}, …]``."""
    if isinstance(value, Mapping):
        return [(str(key), each) for key, items in value.items() for each in entries_of(items, f"{where}: {key}")]
    pairs = []
    for index, item in enumerate(entries_of(value, where)):
        at = f"{where}[{index}]"
        image = entry_of(item, at, "{image, question}").get("image")
        pairs.append((words(image, f"{at}: image"), item))
    return pairs


def words(value: object, where: str) -> str:
    """`value` as a text that says something, or UserError naming `where`."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: must be a text, is {value!r}")
    return " ".join(value.split())


def with_options(question: str, options: Sequence[str]) -> str:
    """A question followed by its possible answers, lettered."""
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question} {listed} Answer with the letter of the right option."


def lettered(entry: Mapping[str, object], where: str) -> tuple[list[str], str]:
    """(options, the right one) of ``{"options": {"A": …}, "correct_answer": "A"}``."""
    options, right = entry.get("options"), str(entry.get("correct_answer", "")).strip().upper()
    if not isinstance(options, Mapping) or not options:
        raise UserError(f"{where}: options must be an object of letters, is {options!r}")
    listed = {str(letter).strip().upper(): words(text, where) for letter, text in sorted(options.items())}
    if right not in listed:
        raise UserError(f"{where}: correct_answer is {right!r}: must be one of {', '.join(listed)}")
    return list(listed.values()), listed[right]


_INLINE = re.compile(r"(?:^|\s)\(?([A-H])[.):]\s*(.*?)(?=\s+\(?[A-H][.):]\s|$)", re.DOTALL)


def inline_options(question: str) -> list[str]:
    """Options written inside a question as ``A. … B. …`` (or ``A)``, ``(A)``), in order; [] where there are none."""
    found = _INLINE.findall(question)
    if len(found) < 2 or [letter for letter, _ in found] != list(LETTERS[: len(found)]):
        return []
    return [" ".join(text.split()) for _, text in found]


def here(name: str, folder: Path) -> Path | None:
    """The image in `folder` that a path made on another machine means, by its file name."""
    path = spelled(folder / Path(name.replace("\\", "/")).name)
    return path if is_file(path) else None
