"""The sheet on which a person reviews proposed UnifyBench++ texts, and the one way from it into a concept folder.

A CSV file, a row a text; a column `accept` decides. Nothing is written of a row without a yes there. Whoever proposes
the texts is not known here (`evaluate/plusplus.py` asks a language model); a row typed by hand is as good.

    accept      yes, no, or empty: not reviewed yet
    kind        fact               one item of extra_info with its reasoning prompt and the prompt spelled out
                dense              a long prompt that needs no fact
                dense_reasoning    a long prompt that hints at a fact, and the same spelled out
    number      of a fact, its number; of dense_reasoning, the number of the fact it hints at
    half        of a fact, which half of the benchmark it belongs to: train or test
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import AnyJson, folder_lock, read_json, write_bytes_atomic, write_json
from ..utils.text import plain_cell, read_text, spreadsheet_cell
from .concept import FACT_PROMPTS, PURE_PROMPTS, Concept, held_out
from .folder import load_concept, read_concept
from .image_files import is_file
from .install import WAIT
from .parse import ERROR

KINDS = ("fact", "dense", "dense_reasoning")
_DENSE = ("dense_generation", "dense_prompt_generation")
_DENSE_FACTS = ("personalized_dense_generation", "personalized_dense_prompt_generation")
_YES = frozenset({"yes", "y", "x", "1", "true", "ok"})
_NO = frozenset({"no", "n", "0", "false"})
_LARGEST = 16 << 20


@dataclass(frozen=True)
class Row:
    """One proposed text."""

    accept: str
    """As the person wrote it; :attr:`accepted` and :attr:`refused` say what it means."""
    concept: str
    kind: str
    number: int
    half: str = ""
    fact: str = ""
    prompt: str = ""
    explicit: str = ""
    note: str = ""
    """What the proposer wants the reviewer to know."""
    line: int = 0
    """Where it stands in the file; 0: it is new."""

    @property
    def accepted(self) -> bool:
        return self.accept.strip().casefold() in _YES

    @property
    def refused(self) -> bool:
        return self.accept.strip().casefold() in _NO


COLUMNS = tuple(each.name for each in fields(Row) if each.name != "line")


def write_sheet(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write the rows, whole or not at all. No spreadsheet takes a cell for a formula."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([spreadsheet_cell(" ".join(str(getattr(row, name)).split())) for name in COLUMNS])
    write_bytes_atomic(path, text.getvalue().encode("utf-8-sig"))


def read_sheet(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a sheet as a person saved it: any order of columns, separated by , ; or tabs, UTF-8 or UTF-16.

    Raises one UserError that lists every line that cannot be used.
    """
    text = read_text(path, _LARGEST)
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    try:
        lines = list(csv.reader(io.StringIO(text), delimiter=separator, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV file ({error}): save the sheet as CSV") from None
    titles = [title.strip().casefold() for title in lines[0]] if lines else []
    lacking = [name for name in COLUMNS if name not in titles and name != "note"]
    if lacking:
        raise UserError(f"{path}: has no column {', '.join(lacking)}: the first line names {', '.join(COLUMNS)}")
    rows: list[Row] = []
    problems: list[str] = []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        values = {title: plain_cell(cell).strip() for title, cell in zip(titles, cells, strict=False)}
        found = _row(values, number, problems)
        rows += [found] if found else []
    if problems:
        raise UserError("\n".join([f"{path} cannot be used:", *(f"  {problem}" for problem in problems)]))
    return rows


def _row(values: dict[str, str], line: int, problems: list[str]) -> Row | None:
    before = len(problems)
    accept, kind, half = (values.get(name, "").casefold() for name in ("accept", "kind", "half"))
    if accept and accept not in _YES | _NO:
        problems.append(f"line {line}: accept={accept!r}: must be yes, no or empty")
    if kind not in KINDS:
        problems.append(f"line {line}: kind={kind!r}: must be one of {', '.join(KINDS)}")
    if kind == "fact" and half not in ("train", "test"):
        problems.append(f"line {line}: half={half!r}: must be train or test")
    number = values.get("number", "")
    if not (number.isascii() and number.isdecimal() and 0 < int(number[:9]) < 10**6):
        problems.append(f"line {line}: number={number!r}: must be a whole number above 0")
    if len(problems) > before:
        return None
    texts = {name: " ".join(values.get(name, "").split()) for name in ("concept", "fact", "prompt", "explicit", "note")}
    return Row(values["accept"], kind=kind, number=int(number), half=half, line=line, **texts)


@dataclass
class Applied:
    """What came of a sheet for one concept."""

    concept: str
    written: dict[str, int] = field(default_factory=dict)
    """Texts that are new in the folder, by kind."""
    there: int = 0
    """Accepted texts that the folder had already."""
    open: int = 0
    """Rows nobody has reviewed."""
    notes: list[str] = field(default_factory=list)
    """Accepted rows that were not written, and why."""


def apply_sheet(root: str | os.PathLike[str], name: str, rows: Sequence[Row]) -> Applied:
    """Write the accepted rows of concept `name` into its folder: extra_info and num_testing_info of info.json, the
    lists of t2i_conditions.json. What is there stays; the same sheet twice changes nothing more.

    Raises one UserError that lists what is wrong with the accepted rows, and where the folder would not load
    afterwards; nothing is changed then.
    """
    path = Path(root)
    with folder_lock(path, "", WAIT):
        concept = load_concept(path, name)
        info_file = concept.train_folder / "info.json"
        prompts_file = concept.test_folder / "t2i_conditions.json"
        if not is_file(prompts_file) and is_file(concept.train_folder / prompts_file.name):
            prompts_file = concept.train_folder / prompts_file.name
        before = {file: file.read_bytes() if is_file(file) else None for file in (info_file, prompts_file)}
        made = _Change(concept, read_json(info_file), read_json(prompts_file) if is_file(prompts_file) else {})
        made.take(list(rows))
        if not made.done.written:
            return made.done
        try:
            write_json(info_file, made.info)
            write_json(prompts_file, made.prompts)
            errors = [problem for problem in read_concept(path, name)[1] if problem.severity == ERROR]
            if errors:
                lines = "\n".join(f"  {problem}" for problem in errors)
                raise UserError(f"concept {name!r} would no longer load, nothing was changed:\n{lines}")
        except BaseException:
            for file, content in before.items():
                if content is None:
                    file.unlink(missing_ok=True)
                else:
                    write_bytes_atomic(file, content)
            raise
    return made.done


class _Change:
    """The two JSON files of a concept with accepted rows put in."""

    def __init__(self, concept: Concept, info: AnyJson, prompts: AnyJson):
        self.concept, self.info = concept, dict(info)
        if isinstance(prompts, list):  # the older layout
            key = FACT_PROMPTS if prompts and len(prompts) == len(concept.extra_info) else PURE_PROMPTS
            prompts = {key: prompts}
        self.prompts: dict[str, AnyJson] = dict(prompts)
        self.done = Applied(concept.name)
        self._problems: list[str] = []

    def take(self, rows: list[Row]) -> None:
        rows = [row for row in rows if row.concept == self.concept.name]
        self.done.open = sum(1 for row in rows if not row.accepted and not row.refused)
        accepted = [row for row in rows if row.accepted]
        for row in accepted:
            self._check(row)
        facts = [row for row in accepted if row.kind == "fact"]
        twice = {row.number for row in facts if sum(other.number == row.number for other in facts) > 1}
        for number in sorted(twice):
            self._problems.append(f"fact {number} is accepted twice: leave one of them")
        tested = self._facts(facts)
        if not self._problems:
            self._dense([row for row in accepted if row.kind == "dense"])
            self._dense_reasoning([row for row in accepted if row.kind == "dense_reasoning"], tested)
        if self._problems:
            lines = "\n".join(f"  {problem}" for problem in self._problems)
            raise UserError(
                f"the sheet's rows of {self.concept.name!r} cannot be written, nothing was changed:\n{lines}"
            )

    def _check(self, row: Row) -> None:
        sks = self.concept.sks
        wanted = ("prompt",) if row.kind == "dense" else ("prompt", "explicit")
        for name in (*wanted, *(("fact",) if row.kind == "fact" else ())):
            text = getattr(row, name)
            if not text:
                self._problems.append(f"line {row.line}: {name} is empty: write it, or do not accept the row")
            elif name != "fact" and sks not in text:
                self._problems.append(f"line {row.line}: {name} does not contain {sks}: write it where it is meant")

    def _facts(self, rows: list[Row]) -> set[int]:
        """Put facts and their prompts in; returns the numbers of the facts that test."""
        concept, known = self.concept, self.concept.extra_info
        if concept.fact_pairs:
            for row in rows:
                pair = (row.prompt, known.index(row.fact)) if row.fact in known else None
                if pair in concept.fact_pairs:
                    self.done.there += 1
                else:
                    self._problems.append(
                        f"line {row.line}: the folder has {len(known)} facts with their prompts, and this is none of "
                        "them: facts are written once; change the folder's own files for more"
                    )
            order = self._order(rows, known)
            return {order.get(fact, fact + 1) for _, fact in concept.fact_pairs_test}
        if not rows:
            return set()
        if known:
            return self._prompts_of_known(rows, known)
        halves = {half: sorted((row for row in rows if row.half == half), key=_by_number) for half in ("train", "test")}
        for half, found in halves.items():
            if not found:
                self._problems.append(f"no accepted fact has half={half}: accept one, or change the half of another")
        ordered = [*halves["train"], *halves["test"]]
        self.info["extra_info"] = [row.fact for row in ordered]
        self.info["num_testing_info"] = len(halves["test"])
        self._pairs(ordered)
        return {row.number for row in halves["test"]}

    def _order(self, rows: list[Row], known: list[str]) -> dict[int, int]:
        """Place of a fact in the folder → its number on the sheet."""
        return {known.index(row.fact): row.number for row in rows if row.fact in known}

    def _prompts_of_known(self, rows: list[Row], known: list[str]) -> set[int]:
        """Prompts for the facts that a folder has without prompts: all of them, in its own order."""
        by_number = {row.number: row for row in rows}
        for number, fact in enumerate(known, start=1):
            row = by_number.get(number)
            if row is None:
                self._problems.append(
                    f"fact {number} of the folder ({fact!r:.60}) has no accepted prompt: each needs one"
                )
            elif row.fact != fact:
                self._problems.append(
                    f"line {row.line}: fact {number} of the folder is {fact!r:.60}: leave it as it is"
                )
        if self._problems:
            return set()
        ordered = [by_number[number] for number in range(1, len(known) + 1)]
        self._pairs(ordered)
        return set(range(len(known) - held_out(self.info, len(known)) + 1, len(known) + 1))

    def _pairs(self, rows: list[Row]) -> None:
        self.prompts[FACT_PROMPTS] = [row.prompt for row in rows]
        self.prompts[f"explicit_{FACT_PROMPTS}"] = [row.explicit for row in rows]
        self.done.written["fact"] = len(rows)

    def _dense(self, rows: list[Row]) -> None:
        self._append([_key(self.prompts, _DENSE)], [(row.prompt,) for row in rows], "dense")

    def _dense_reasoning(self, rows: list[Row], tested: set[int]) -> None:
        held_out = [row for row in rows if row.number in tested]
        for row in rows:
            if row.number not in tested:
                self.done.notes.append(
                    f"line {row.line}: not written: fact {row.number} is not among the accepted facts that test"
                )
        key = _key(self.prompts, _DENSE_FACTS)
        self._append([key, f"explicit_{key}"], [(row.prompt, row.explicit) for row in held_out], "dense_reasoning")

    def _append(self, keys: list[str], texts: list[tuple[str, ...]], kind: str) -> None:
        lists = [list(self.prompts.get(key) or []) for key in keys]
        if len({len(each) for each in lists}) > 1:
            self._problems.append(
                f"{' and '.join(keys)} of the folder have {' and '.join(str(len(each)) for each in lists)} items: "
                "bring them to one length first"
            )
            return
        for each in dict.fromkeys(texts):
            if each[0] in lists[0]:
                self.done.there += 1
                continue
            for one, text in zip(lists, each, strict=True):
                one.append(text)
            self.done.written[kind] = self.done.written.get(kind, 0) + 1
        if kind in self.done.written:
            self.prompts.update(zip(keys, lists, strict=True))


def _by_number(row: Row) -> int:
    return row.number


def _key(prompts: dict[str, AnyJson], names: tuple[str, str]) -> str:
    """The name that a folder has for a list: ours, or the authors'."""
    return names[1] if names[1] in prompts else names[0]
