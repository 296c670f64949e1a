"""What readers of foreign layouts share: pictures of a folder, JSON that is there or not, multiple choice as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.concept import concept_name
from ...utils.errors import UserError
from ...utils.files import read_json

_ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}
_DIGITS = re.compile(r"(\d+)")
LETTERS = "ABCDEFGH"


def pictures(folder: Path) -> list[Path]:
    """Picture files of `folder` in natural order (9 before 10), masks left out; [] where there is no folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and "mask" not in path.stem.lower()]
    return sorted((path for path in found if path.is_file() and not path.name.startswith(".")), key=natural)


def natural(path: Path) -> list[tuple[int, int | str]]:
    """A sorting key that reads numbers as numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in _DIGITS.split(path.name.casefold())]


def folders(root: Path) -> list[str]:
    """Names of the sub-folders that can name a concept, in natural order."""
    found = sorted((path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._-"), key=natural)
    return [concept_name(path.name) for path in found]


def optional_json(path: Path) -> Any:
    """The content of `path`, None where there is no such file."""
    return read_json(path) if path.is_file() else None


def words(value: Any, where: str) -> str:
    """`value` as a text that says something, or UserError naming `where`."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: must be a text, is {value!r}")
    return " ".join(value.split())


def with_options(question: str, options: Sequence[str]) -> str:
    """A question followed by its possible answers, lettered."""
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question} {listed} Answer with the letter of the right option."


def lettered(entry: Mapping[str, Any], where: str) -> tuple[list[str], str]:
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
    """The picture in `folder` that a path made on another machine means, by its file name."""
    path = folder / Path(name.replace("\\", "/")).name
    return path if path.is_file() else None
