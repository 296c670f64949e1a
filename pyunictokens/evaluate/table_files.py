"""A table as files: results.json (everything), table.csv (every measure, whole, by concept and by kind), table.md and
table.tex (the paper's columns).

Each is written whole or not at all, and results.json is enough to write the others again or to compare two tables. Asks
no model.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.files import read_json, write_json, write_text_atomic
from .result import Metric
from .sample_cache import Cell
from .scoring import Failure
from .tables import TABLES, Column, Row, rows, seed_means

FORMAT = 1
RESULTS = "results.json"
_KEPT = ("model", "concept", "kind", "task", "item", "text", "meant", "group", "image", "seed", "answer", "drawn")


@dataclass
class Table:
    """One evaluation of some models on some concepts."""

    layout: str
    cells: list[Cell]
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked for, in words: samples, seeds, the CLIP model, the judge."""

    @property
    def columns(self) -> tuple[Column, ...]:
        return TABLES[self.layout]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(cell.model for cell in self.cells))

    def of(self, model: str) -> list[Cell]:
        """Cells of one model. Raises UserError where there is none of that name."""
        found = [cell for cell in self.cells if cell.model == model]
        if not found:
            raise UserError(f"no model {model!r} in the table; there are {', '.join(self.models)}")
        return found

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the four files into `folder`; returns their paths."""
        folder = Path(folder)
        write_json(folder / RESULTS, self._json(folder))
        files = {"table.csv": self.csv(), "table.md": self.markdown(), "table.tex": self.latex()}
        for name, text in files.items():
            write_text_atomic(folder / name, text)
        return [folder / RESULTS, *(folder / name for name in files)]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Table:
        """Read results.json, or the one in a folder. Raises UserError naming the file when it is not such a table."""
        path = Path(path)
        path = path / RESULTS if path.is_dir() else path
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("layout") not in TABLES:
            raise UserError(f"{path}: not a table of this program (format {FORMAT})")
        try:
            cells = [
                Cell(**{**record, "path": path.parent / record["path"]} if record.get("path") else record)
                for record in content["cells"]
            ]
            failures = [Failure(**failure) for failure in content["failures"]]
            return cls(content["layout"], cells, failures, content["notes"], content["settings"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a whole table ({type(error).__name__}: {error})") from None

    # --- forms -----------------------------------------------------------------------------------------------------

    def _json(self, folder: Path) -> dict[str, Any]:
        kinds = {cell.kind for cell in self.cells}
        parts = {"all": rows(self.cells), "by_concept": rows(self.cells, lambda cell: cell.concept)}
        if len(kinds) > 1:
            parts["by_kind"] = rows(self.cells, lambda cell: cell.kind)
        return {
            "format": FORMAT,
            "layout": self.layout,
            "settings": self.settings,
            "rows": {name: [_row(row) for row in found] for name, found in parts.items()},
            "seeds": {
                model: {c.key: means for c in self.columns if (means := seed_means(self.of(model), c.key))}
                for model in self.models
            },
            "failures": [asdict(failure) for failure in self.failures],
            "notes": self.notes,
            "cells": [_record(cell, folder) for cell in self.cells],
        }

    def csv(self) -> str:
        """Every measure: model, part, measure, mean, low, high, n."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("model", "part", "measure", "mean", "low", "high", "n"))
        parts = rows(self.cells) + rows(self.cells, lambda cell: cell.concept)
        if len({cell.kind for cell in self.cells}) > 1:
            parts += rows(self.cells, lambda cell: cell.kind)
        for row in parts:
            for key, metric in row.metrics.items():
                numbers = (f"{value:.6f}" for value in (metric.mean, metric.low, metric.high))
                writer.writerow((row.model, row.part, key, *numbers, metric.n))
        return out.getvalue()

    def markdown(self) -> str:
        """The paper's columns; below the same with intervals, by concept and by kind, what failed, what is missing."""
        text = self._markdown_table(rows(self.cells))
        text += "\n## With 95 % intervals\n\n" + self._intervals()
        concepts = {cell.concept for cell in self.cells}
        if len(concepts) > 1:
            text += "\n## By concept\n\n" + self._markdown_table(rows(self.cells, lambda cell: cell.concept))
        if len({cell.kind for cell in self.cells}) > 1:
            text += "\n## By kind\n\n" + self._markdown_table(rows(self.cells, lambda cell: cell.kind))
        if self.failures:
            text += "\n## What could not be judged\n\n" + "".join(f"- {line}\n" for line in told(self.failures))
        if self.notes:
            text += "\n## Notes\n\n" + "".join(f"- {note}\n" for note in dict.fromkeys(self.notes))
        return text

    def _markdown_table(self, lines: Sequence[Row]) -> str:
        parted = any(row.part != "all" for row in lines)
        head = ["Model", *(["Of"] if parted else []), *(f"{c.group} {c.label}" for c in self.columns)]
        body = [
            [
                _bar(row.model),
                *([_bar(row.part)] if parted else []),
                *(_mean(row.metrics.get(column.key)) for column in self.columns),
            ]
            for row in lines
        ]
        rule = ["---"] * len(head)
        return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *body))

    def _intervals(self) -> str:
        """Columns as lines, models as columns: mean, interval, number of items."""
        lines = rows(self.cells)
        body = [
            [f"{column.group} {column.label}", *(_interval(row.metrics.get(column.key)) for row in lines)]
            for column in self.columns
        ]
        head = ["", *(_bar(row.model) for row in lines)]
        return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *body))

    def latex(self) -> str:
        """A booktabs table of the paper's columns; the best of each column in bold."""
        lines = rows(self.cells)
        best = {
            column.key: max((row.metrics[column.key].mean for row in lines if column.key in row.metrics), default=None)
            for column in self.columns
        }
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        head = " & ".join(["", *(rf"\multicolumn{{{n}}}{{c}}{{{_tex(group)}}}" for group, n in spans)])
        labels = " & ".join(["Method", *(_tex(column.label) for column in self.columns)])
        body = []
        for row in lines:
            numbers = []
            for column in self.columns:
                metric = row.metrics.get(column.key)
                shown = "-" if metric is None else f"{metric.mean:.3f}"
                numbers.append(rf"\textbf{{{shown}}}" if metric and metric.mean == best[column.key] else shown)
            body.append(" & ".join([_tex(row.model), *numbers]))
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                rf"\begin{{tabular}}{{l{'c' * len(self.columns)}}}",
                r"\toprule",
                rf"{head} \\",
                rf"{labels} \\",
                r"\midrule",
                *(rf"{line} \\" for line in body),
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )


def told(failures: Sequence[Failure], limit: int = 20) -> list[str]:
    """Failures as lines, those with the same reason together."""
    by: dict[tuple[str, str, str, str], list[Failure]] = {}
    for failure in failures:
        by.setdefault((failure.model, failure.task, failure.what, failure.why), []).append(failure)
    lines = [
        str(found[0]) if len(found) == 1 else f"{model}, {task}: {what} of {len(found)} items: {why}"
        for (model, task, what, why), found in by.items()
    ]
    return lines[:limit] + ([f"and {len(lines) - limit} more, in {RESULTS}"] if len(lines) > limit else [])


def _row(row: Row) -> dict[str, Any]:
    return {"model": row.model, "part": row.part, "metrics": {key: asdict(m) for key, m in row.metrics.items()}}


def _record(cell: Cell, folder: Path) -> dict[str, Any]:
    record = {name: getattr(cell, name) for name in _KEPT}
    if cell.count and cell.path.is_relative_to(folder):
        record |= {"count": cell.count, "path": cell.path.relative_to(folder).as_posix()}
    return record | {"scores": cell.scores, "by": cell.by}


def _mean(metric: Metric | None) -> str:
    return "–" if metric is None else f"{metric.mean:.3f}"


def _interval(metric: Metric | None) -> str:
    return "–" if metric is None else f"{metric.mean:.3f} [{metric.low:.3f}, {metric.high:.3f}] ({metric.n})"


def _bar(text: str) -> str:
    return text.replace("|", r"\|")


def _tex(text: str) -> str:
    escaped = text.replace("\\", r"\textbackslash ")
    for character in "&%$#_{}":
        escaped = escaped.replace(character, "\\" + character)
    return escaped.replace("<", r"\textless ").replace(">", r"\textgreater ").replace("~", r"\textasciitilde ")
