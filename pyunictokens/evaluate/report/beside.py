"""A table beside the numbers that a paper prints: each value, the paper's, and the difference with its interval.

`beside` makes the comparison as plain data, from which the JSON, the Markdown and the page are written; a page in docs/
is written from the stored JSON alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

from ...utils.files import write_json, write_text_atomic
from ...utils.json import Json
from ..table_files import Table, grid, told
from . import environment


class Cell(TypedDict):
    """One measure of one row; what is not there is None."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    paper: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None


class Line(TypedDict):
    """One row."""

    model: str
    paper: str
    """The paper's row that it is compared with; "" where it has none."""
    trained: bool
    cells: dict[str, Cell]


class Beside(TypedDict):
    """A table beside a paper's."""

    title: str
    concepts: list[str]
    columns: list[tuple[str, str, str]]
    """(key, heading, label)."""
    rows: list[Line]
    absent: list[str]
    """Rows of the paper that nothing here is compared with."""
    left_out: list[str]
    """Rows that could not be made here, each with the reason."""
    notes: list[str]
    settings: dict[str, Json]


def beside(
    table: Table,
    title: str,
    rows_of: Mapping[str, str],
    trained: Mapping[str, bool],
    printed: Mapping[str, object],
    number: Callable[[str, str], float | None],
    left_out: list[str] | None = None,
    notes: list[str] | None = None,
) -> Beside:
    """The comparison of a table.

    Args:
        rows_of: the paper's row by model.
        trained: whether a model learned anything.
        printed: all rows that the paper has.
        number: what the paper prints, by row and key.
    """
    rows: list[Line] = []
    for row in table.rows["all"]:
        name = rows_of.get(row.model, "")
        cells = {}
        for column in table.columns:
            metric, theirs = row.metrics.get(column.key), number(name, column.key) if name else None
            mean, low, high = (None,) * 3 if metric is None else (metric.mean, metric.low, metric.high)
            cell = Cell(
                mean=mean,
                low=low,
                high=high,
                n=0 if metric is None else metric.n,
                paper=theirs,
                difference=_minus(mean, theirs),
                difference_low=_minus(low, theirs),
                difference_high=_minus(high, theirs),
            )
            cells[column.key] = cell
        rows.append(Line(model=row.model, paper=name, trained=trained.get(row.model, False), cells=cells))
    taken = {row["paper"] for row in rows}
    return Beside(
        title=title,
        concepts=list(dict.fromkeys(record.concept for record in table.records)),
        columns=[(column.key, column.heading, column.label) for column in table.columns],
        rows=rows,
        absent=[name for name in printed if name not in taken],
        left_out=left_out or [],
        notes=[*(notes or []), *dict.fromkeys(table.notes), *(f"not judged: {line}" for line in told(table.failures))],
        settings=table.settings,
    )


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def save(found: Beside, folder: str | os.PathLike[str]) -> Path:
    """Write paper.json, paper.md and paper.html into `folder`; returns the page."""
    folder = Path(folder)
    write_json(folder / "paper.json", found)
    write_text_atomic(folder / "paper.md", markdown(found))
    page = folder / "paper.html"
    text = environment().get_template("beside.html").render(**found, shown=shown, difference=difference)
    write_text_atomic(page, text)
    return page


def markdown(found: Beside) -> str:
    """Measures as lines, rows of the table as columns: ours, the paper's, the difference with its interval."""
    head = ["", *(row["model"] + (f" / {row['paper']}" if row["paper"] else "") for row in found["rows"])]
    lines = [
        [f"{heading} {label}", *(_words(row["cells"][key]) for row in found["rows"])]
        for key, heading, label in found["columns"]
        if any(row["cells"][key]["mean"] is not None for row in found["rows"])
    ]
    empty = [
        f"{heading} {label}"
        for key, heading, label in found["columns"]
        if all(row["cells"][key]["mean"] is None for row in found["rows"])
    ]
    text = grid(head, lines)
    if empty:
        text += f"\nNot measured: {', '.join(empty)}.\n"
    return text


def shown(value: float | None) -> str:
    """A value with three digits; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def difference(cell: Cell) -> str:
    """Ours minus the paper's with its 95 % interval; "" where one of the two is missing."""
    if cell["difference"] is None:
        return ""
    return f"{cell['difference']:+.3f} [{cell['difference_low']:+.3f}, {cell['difference_high']:+.3f}]"


def _words(cell: Cell) -> str:
    if cell["mean"] is None:
        return "–"
    own = f"{shown(cell['mean'])} [{shown(cell['low'])}, {shown(cell['high'])}]"
    return own if cell["paper"] is None else f"{own}; {shown(cell['paper'])}; {cell['difference']:+.3f}"
