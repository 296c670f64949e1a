"""Prompt lists: what plain reinforcement draws (or writes to), with the columns that reward functions want.

    prompts.txt     one prompt a line; empty lines are passed over
    prompts.jsonl   one JSON object a line with "prompt"; its other keys are columns (or a JSON string alone)

A list of texts or dicts and a `datasets.Dataset` hold the same. A column that a prompt does not have is None for it.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..utils.errors import UserError
from ..utils.text import read_text

RESERVED = ("prompts", "images", "answers", "completions")
"""Names that reward functions get something else by."""


@runtime_checkable
class Table(Protocol):
    """What is asked of a `datasets.Dataset`: rows by number, each a dict."""

    @property
    def column_names(self) -> object: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


@dataclass(frozen=True)
class Prompt:
    """One prompt and what belongs to it."""

    text: str
    columns: Mapping[str, object] = field(default_factory=dict)
    """By name; every prompt of a list has the same names."""


PromptSource = str | os.PathLike[str] | Sequence[str] | Sequence[Mapping[str, object]] | Table
"""A .txt or .jsonl file, texts, dicts with the key "prompt", or a `datasets.Dataset` with that column."""


def read_prompts(source: PromptSource) -> list[Prompt]:
    """All prompts of `source` in their order. Raises UserError naming file and line (or place) of what cannot be used.

    A Dataset's rows are read once, now: their columns should be light (names of files rather than images).
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        rows, origin = _rows_of_file(path), str(path)
    elif isinstance(source, Table):
        rows, origin = ((f"row {place}", source[place]) for place in range(len(source))), "the data set"
    elif isinstance(source, Sequence):
        rows, origin = ((f"prompts[{place}]", each) for place, each in enumerate(source)), "prompts"
    else:
        raise UserError(
            f"prompts: is a {type(source).__name__}: must be a .txt or .jsonl file, a list of texts or of dicts with "
            "the key prompt, or a datasets.Dataset"
        )
    found = [_prompt(where, row) for where, row in rows]
    if not found:
        raise UserError(f"{origin}: holds no prompt: give at least one")
    names = dict.fromkeys(name for prompt in found for name in prompt.columns)
    return [Prompt(prompt.text, {name: prompt.columns.get(name) for name in names}) for prompt in found]


def _rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise UserError(f"{path}: must be a .txt file (a prompt a line) or .jsonl (an object a line, key prompt)")
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        if kind == ".txt":
            yield where, line
            continue
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: is not JSON ({error.msg} at column {error.colno})") from None


def _prompt(where: str, row: object) -> Prompt:
    columns: dict[str, object] = {}
    if isinstance(row, Mapping):
        columns = {str(name): value for name, value in row.items()}
        if "prompt" not in columns:
            near = difflib.get_close_matches("prompt", columns, n=1)
            meant = f"; is it {near[0]!r}?" if near else ""
            raise UserError(f"{where}: has no key prompt, only {', '.join(columns) or 'nothing'}{meant}")
        row = columns.pop("prompt")
    taken = [name for name in columns if name in RESERVED]
    if taken:
        raise UserError(
            f"{where}: the column {taken[0]} must have another name: reward functions get {taken[0]} anyway"
        )
    if not isinstance(row, str) or not row.strip():
        raise UserError(f"{where}: {row!r}: a prompt must be a text that is not empty")
    return Prompt(row.strip(), columns)
