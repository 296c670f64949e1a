"""Typed reading of JSON that strangers wrote: what is wrong is noted with file and field, and reading goes on.

Holds the :class:`Problem` record, the :class:`Ledger` that collects problems, the shapes in which a question with its
answer is found in published folders, and the one place that turns a file name found in data into a path.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import read_json
from ..utils.spelling import loose, spelled
from .image_files import is_file, list_images

ERROR, WARNING = "error", "warning"
_PUBLISHED_ROOT = "unictokens_data"

_QUESTION_KEYS = ("query", "question", "prompt")
_ANSWER_KEYS = ("answer", "response")
_ASKING, _ANSWERING = {"human", "user"}, {"gpt", "assistant"}
_FOREIGN_BRACKETS = (("&lt;", "&gt;"), ("[＜〈《]", "[＞〉》]"), (r"\{", r"\}"), (r"\\<", r"\\?>"))
_IMAGE_MARK = re.compile(r"<image>\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """One finding. `file` is relative to the data folder, `field` may be empty, `severity` is error or warning."""

    file: str
    field: str
    message: str
    severity: str = ERROR

    def __str__(self) -> str:
        return f"{self.file}: {self.field + ': ' if self.field else ''}{self.message}"


@dataclass
class RawQA:
    """A question and its answer as found, before its image has been looked for."""

    query: str
    answer: str
    image: str | None = None
    extra: dict[str, object] = field(default_factory=dict)


class Ledger:
    """Collects the problems of one data folder, naming files relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []
        self._seen: set[Problem] = set()

    def add(self, file: Path, where: str, message: str, severity: str = ERROR) -> None:
        try:
            shown = file.relative_to(self.root).as_posix()
        except ValueError:
            shown = str(file)
        problem = Problem(printable(shown), printable(where), printable(message), severity)
        if problem not in self._seen:
            self._seen.add(problem)
            self.problems.append(problem)

    def warn(self, file: Path, where: str, message: str) -> None:
        self.add(file, where, message, WARNING)

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == ERROR]

    def on_disk(self, path: Path) -> Path:
        """`path` as it is spelled on disk, with a warning where that differs."""
        found = spelled(path)
        if found != path:
            message = f"is spelled {found.name} on disk: rename it, not every system takes the two for one"
            self.warn(path, "", message)
        return found

    def entry(self, file: Path, table: dict[str, object], name: str) -> object:
        """`table[name]`, or what the table has under another spelling of the name, with a warning; None without."""
        fits = [key for key in table if loose(key) == loose(name)]
        if name in table or len(fits) != 1:
            return table.get(name)
        self.warn(file, fits[0], f"is spelled {name} as a folder: write it so")
        return table[fits[0]]

    def read(self, path: Path, missing: str | None = None, severity: str = ERROR) -> object:
        """The JSON in `path`; None after noting why not. `missing` says what an absent file costs (None: nothing)."""
        path = self.on_disk(path)
        if not is_file(path):
            if missing is not None:
                self.add(path, "", f"no such file: {missing}", severity)
            return None
        try:
            value = read_json(path, halves=True)
        except UserError as error:
            self.add(path, "", str(error).removeprefix(f"{path}: "))
            return None
        except (OSError, ValueError) as error:
            self.add(path, "", f"cannot be read: {error}")
            return None
        if value is None:
            self.add(path, "", "holds null: nothing can be read from it")
        return value


def printable(text: str) -> str:
    """`text` with whatever cannot be printed (lone surrogates, control characters) escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def show(value: object) -> str:
    """`value` for a message: on one line, always printable, at most 60 characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = printable(text)
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, str):
        return "text"
    names = {int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


class TextFix:
    """Brings the ways to write a concept's token to the one form `<bo>`.

    `<sks>`, `< Bo >` and `⟨bo⟩` are the token without a word. What other tools make of it (`&lt;bo&gt;`, `＜bo＞`,
    `{bo}`) is read as the token too, and :meth:`strange` tells of it.
    """

    def __init__(self, name: str) -> None:
        self.token = f"<{name}>"
        spellings = {re.escape(unicodedata.normalize(form, name)) for form in ("NFC", "NFD")} | {re.escape(name), "sks"}
        inner = rf"\s*(?:{'|'.join(sorted(spellings))})\s*"
        self._forms = re.compile(rf"[<⟨]{inner}[>⟩]", re.IGNORECASE)
        foreign = (rf"{left}{inner}{right}" for left, right in _FOREIGN_BRACKETS)
        self._foreign = re.compile("|".join(foreign), re.IGNORECASE)

    def __call__(self, text: str) -> str:
        text = self._foreign.sub(lambda _: self.token, _IMAGE_MARK.sub("", text))
        return self._forms.sub(lambda _: self.token, text).strip()

    def strange(self, text: str) -> str:
        """The first form in `text` that is read as the token though no published folder writes it so; "" without."""
        found = self._foreign.search(text)
        return found[0] if found else ""


def text_of(ledger: Ledger, file: Path, where: str, value: object, fix: TextFix) -> str | None:
    """`value` as tidy text; None after noting that it is not text (a problem) or empty (a warning: it is left out)."""
    if not isinstance(value, str):
        ledger.add(file, where, f"must be text, is {kind_of(value)} {show(value)}")
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        ledger.add(file, where, f"{show(value)} holds half a character (a lone surrogate): type the text anew")
        return None
    strange = fix.strange(value)
    if strange:
        ledger.warn(file, where, f"{show(strange)} is read as {fix.token}: write that where the concept is meant")
    tidy = fix(value)
    if not tidy:
        ledger.warn(file, where, "is empty: left out")
        return None
    return tidy


def texts_of(ledger: Ledger, file: Path, where: str, value: object, fix: TextFix) -> list[str]:
    """A list of texts; one bare text counts as a list of one."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        ledger.add(file, where, f"must be a list of texts, is {kind_of(value)}")
        return []
    found = (text_of(ledger, file, f"{where}[{index}]", item, fix) for index, item in enumerate(value))
    return [text for text in found if text is not None]


def questions_of(ledger: Ledger, file: Path, where: str, value: object, fix: TextFix) -> list[RawQA]:
    """Every question with its answer in a list of {query|question, answer} and {conversations: [turn, …]} objects."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        ledger.add(file, where, f"must be a list of {{query, answer}}, is {kind_of(value)}")
        return []
    found: list[RawQA] = []
    for index, item in enumerate(value):
        found.extend(_one_item(ledger, file, f"{where}[{index}]", item, fix))
    return found


def _one_item(ledger: Ledger, file: Path, where: str, item: object, fix: TextFix) -> Iterator[RawQA]:
    if not isinstance(item, dict):
        ledger.add(file, where, f"must be an object with query and answer, is {kind_of(item)}")
        return
    image = item.get("image")
    if image is not None and not isinstance(image, str):
        ledger.add(file, f"{where}.image", f"must be a file name, is {kind_of(image)}")
        return
    if "conversations" in item:
        rest = {key: value for key, value in item.items() if key not in ("image", "conversations")}
        for qa in _turns(ledger, file, f"{where}.conversations", item["conversations"], fix):
            yield RawQA(qa.query, qa.answer, image, {**rest, **qa.extra})
        return
    keys = [next((key for key in names if key in item), None) for names in (_QUESTION_KEYS, _ANSWER_KEYS)]
    for key, names in zip(keys, (_QUESTION_KEYS, _ANSWER_KEYS), strict=True):
        if key is None:
            ledger.add(file, where, f"has no {' or '.join(names[:2])}: it holds {show(sorted(item))}")
    if None in keys:
        return
    query, answer = (text_of(ledger, file, f"{where}.{key}", item[key], fix) for key in keys)
    if query is not None and answer is not None:
        extra = {key: value for key, value in item.items() if key not in ("image", *keys)}
        yield RawQA(query, answer, image, extra)


def _turns(ledger: Ledger, file: Path, where: str, turns: object, fix: TextFix) -> list[RawQA]:
    """A chat as question/answer pairs: [{from: human, value}, {from: gpt, value}, …], or a list of {query, answer}."""
    if not isinstance(turns, list):
        ledger.add(file, where, f"must be a list of turns, is {kind_of(turns)}")
        return []
    if turns and all(isinstance(turn, dict) and any(key in turn for key in _QUESTION_KEYS) for turn in turns):
        return questions_of(ledger, file, where, turns, fix)
    found: list[RawQA] = []
    asked: str | None = None
    for index, turn in enumerate(turns):
        at = f"{where}[{index}]"
        if not isinstance(turn, dict):
            ledger.add(file, at, f"must be an object with from and value, is {kind_of(turn)}")
            return found
        speaker = turn.get("from", turn.get("role"))
        who = speaker.casefold() if isinstance(speaker, str) else speaker
        if not isinstance(who, str) or who not in _ASKING | _ANSWERING:
            ledger.add(file, f"{at}.from", f"must be human or gpt, is {show(speaker)}")
            return found
        if who not in (_ANSWERING if index % 2 else _ASKING):
            ledger.add(file, at, f"is said by {show(speaker)}: human and gpt must take turns, human first")
            return found
        text = text_of(ledger, file, f"{at}.value", turn.get("value", turn.get("content")), fix)
        if who in _ASKING:
            asked = text
        elif asked is not None and text is not None:
            found.append(RawQA(asked, text))
    if len(turns) % 2:
        ledger.add(file, where, f"has {len(turns)} turns: the last question has no answer")
    return found


class ImageFinder:
    """Turns a file name found in data into a path inside the data folder, or notes why not."""

    def __init__(self, ledger: Ledger, root: Path) -> None:
        self.ledger = ledger
        self.root = root
        self.homes = [root.resolve()]
        for parent in (self.homes[0], *self.homes[0].parents):
            if parent.parent.name == "snapshots":  # a Hugging Face cache keeps the files of a snapshot in ../../blobs
                self.homes.append(parent.parent.parent / "blobs")

    def inside(self, file: Path, where: str, path: Path) -> bool:
        """Whether `path`, links followed, stays in the data folder; noted against `file` when not."""
        try:
            real = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            self.ledger.add(file, where, f"cannot be followed: {error}")
            return False
        if not any(real.is_relative_to(home) for home in self.homes):
            self.ledger.add(file, where, f"leads out of the data folder (to {real}): copy the file into the folder")
            return False
        return True

    def find(self, file: Path, where: str, text: str, bases: list[Path], strict: bool = False) -> Path | None:
        """The image called `text` in one of `bases`, or None after noting why not.

        Names with `..` are refused; an absolute name, the path of its maker's machine, stands for the same file in this
        folder where there is one (never when `strict`).
        """
        parts = parts_of(text)
        absolute = text.strip().startswith(("/", "\\")) or re.match(r"\s*[A-Za-z]:", text) is not None
        if ".." in parts:
            self.ledger.add(file, where, f"{show(text)} leaves the data folder: name a file inside it, without '..'")
            return None
        here = [] if absolute or not parts else [base.joinpath(*parts) for base in bases]
        path = next((path for path in here if is_file(path)), None)
        if path is None and parts and not strict:
            path = self._moved(parts, bases)
            if path is not None and absolute:
                self.ledger.warn(file, where, f"{show(text)} is an absolute path: the {path.name} here is used")
        if path is None:
            path = next((other for each in here for other in [spelled(each)] if is_file(other)), None) or next(
                (other for each in here[:1] for other in list_images(each.parent) if other.stem == each.stem), None
            )
            if path is not None:
                self.ledger.warn(file, where, f"{show(text)} does not exist: {path.name} is used")
        if path is not None:
            return path if self.inside(file, where, path) else None
        if absolute:
            self.ledger.add(file, where, f"{show(text)} is an absolute path: name a file inside the data folder")
        else:
            self.ledger.add(file, where, f"{show(text)}: no such image: add the file or take the entry out")
        return None

    def _moved(self, parts: list[str], bases: list[Path]) -> Path | None:
        """The file here that `parts`, a path on the machine of the folder's maker, stands for.

        What follows unictokens_data/, or begins with concept/ or random_images/, is the same here; else the base whose
        last folders are those of the path has a file of that name.
        """
        if _PUBLISHED_ROOT in parts:
            path = spelled(self.root.joinpath(*parts[parts.index(_PUBLISHED_ROOT) + 1 :]))
            if is_file(path):
                return path
        for mark in ("concept", "random_images"):
            if mark in parts:
                path = spelled(self.root.joinpath(*parts[parts.index(mark) :]))
                if is_file(path):
                    return path

        def shared(base: Path) -> int:
            pairs = zip(reversed(parts[:-1]), reversed(base.parts), strict=False)
            return next((number for number, (a, b) in enumerate(pairs) if loose(a) != loose(b)), len(parts) - 1)

        for base in sorted((base for base in bases if shared(base)), key=shared, reverse=True):
            path = spelled(base / parts[-1])
            if is_file(path):
                return path
        return None


def parts_of(text: str) -> list[str]:
    """The parts of a path as any system writes it, without empty ones and `.`."""
    return [part for part in text.strip().replace("\\", "/").split("/") if part not in ("", ".")]
