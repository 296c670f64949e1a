"""A table as files: results.json (everything), table.csv (every measure, whole, by concept and by kind), table.md and
table.tex (the paper's columns).

Each is written whole or not at all, and results.json is enough to write the others again or to compare two tables.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import read_json, write_json, write_text_atomic
from ..utils.json import Json
from ..utils.text import spreadsheet_cell
from .protocol import OURS, BenchProtocol, protocol_named
from .result import Metric
from .sample_cache import Record
from .scoring import Failure
from .tables import TABLES, Column, Row, rows, seed_means
from .tasks import task_named

FORMAT = 1
RESULTS = "results.json"
_KEPT = ("model", "concept", "kind", "task", "item", "text", "meant", "group", "image", "seed", "answer", "drawn")


@dataclass
class Table:
    """One evaluation of some models on some concepts."""

    layout: str
    records: list[Record]
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Json] = field(default_factory=dict)
    """What was asked for, in words: samples, seeds, the CLIP model, the judge."""

    @property
    def columns(self) -> tuple[Column, ...]:
        return TABLES[self.layout]

    @property
    def protocol(self) -> BenchProtocol:
        """How it was asked and scored; tables of earlier versions are of this project's protocol."""
        return protocol_named(str(self.settings.get("protocol") or OURS.name))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(record.model for record in self.records))

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Rows over all concepts, by concept, and by kind where there are several kinds."""
        found = {"all": rows(self.records), "by_concept": rows(self.records, lambda record: record.concept)}
        if len({record.kind for record in self.records}) > 1:
            found["by_kind"] = rows(self.records, lambda record: record.kind)
        return found

    def of(self, model: str) -> list[Record]:
        """Records of one model. Raises UserError where there is none of that name."""
        found = [record for record in self.records if record.model == model]
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
            records = [
                Record(**{**record, "path": path.parent / record["path"]} if record.get("path") else record)
                for record in content["records" if "records" in content else "cells"]
            ]
            failures = [Failure(**{**f, "task": task_named(f["task"])}) for f in content["failures"]]
            return cls(content["layout"], records, failures, content["notes"], content["settings"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a whole table ({type(error).__name__}: {error})") from None

    # --- forms -----------------------------------------------------------------------------------------------------

    def _json(self, folder: Path) -> dict[str, Json]:
        return {
            "format": FORMAT,
            "layout": self.layout,
            "settings": self.settings,
            "protocol": {column.key: f"{self.protocol.name}: {self._how(column)}" for column in self.columns},
            "rows": {name: [asdict(row) for row in found] for name, found in self.rows.items()},
            "seeds": {
                model: {
                    c.key: {str(seed): mean for seed, mean in means.items()}
                    for c in self.columns
                    if (means := seed_means(self.of(model), c.key))
                }
                for model in self.models
            },
            "failures": [asdict(failure) for failure in self.failures],
            "notes": self.notes,
            "records": [_plain(record, folder) for record in self.records],
        }

    def csv(self) -> str:
        """Every measure: model, part, measure, mean, low, high, n, protocol."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("model", "part", "measure", "mean", "low", "high", "n", "protocol"))
        for row in (row for part in self.rows.values() for row in part):
            for key, metric in row.metrics.items():
                numbers = (f"{value:.6f}" for value in (metric.mean, metric.low, metric.high))
                words = (spreadsheet_cell(word) for word in (row.model, row.part, key))
                writer.writerow((*words, *numbers, metric.n, self.protocol.name))
        return out.getvalue()

    def markdown(self) -> str:
        """The paper's columns; below the same with intervals, by concept and by kind, what failed, what is missing."""
        lines = self.rows["all"]
        intervals = [
            [f"{column.heading} {column.label}", *(_interval(row.metrics.get(column.key)) for row in lines)]
            for column in self.columns
        ]
        parts = {"": self._means(lines), "With 95 % intervals": grid(["", *(row.model for row in lines)], intervals)}
        if len({record.concept for record in self.records}) > 1:
            parts["By concept"] = self._means(self.rows["by_concept"])
        if "by_kind" in self.rows:
            parts["By kind"] = self._means(self.rows["by_kind"])
        how = [[f"{column.heading} {column.label}", self.protocol.name, self._how(column)] for column in self.columns]
        parts["How each column was measured"] = grid(["", "Protocol", "How"], how) if self.layout == "unify" else ""
        parts["What could not be judged"] = "".join(f"- {line}\n" for line in told(self.failures))
        parts["Notes"] = "".join(f"- {note}\n" for note in dict.fromkeys(self.notes))
        return "\n".join(f"## {title}\n\n{text}" if title else text for title, text in parts.items() if text)

    def _how(self, column: Column) -> str:
        return self.protocol.how(column.key)

    def _means(self, lines: Sequence[Row]) -> str:
        parted = any(row.part != "all" for row in lines)
        head = ["Model", *(["Of"] if parted else []), *(f"{c.heading} {c.label}" for c in self.columns)]
        body = [
            [row.model, *([row.part] if parted else []), *(_mean(row.metrics.get(c.key)) for c in self.columns)]
            for row in lines
        ]
        return grid(head, body)

    def latex(self) -> str:
        """A booktabs table of the paper's columns; the best of each column in bold."""
        lines = self.rows["all"]
        best = {
            column.key: max((row.metrics[column.key].mean for row in lines if column.key in row.metrics), default=None)
            for column in self.columns
        }

        def shown(row: Row, column: Column) -> str:
            metric = row.metrics.get(column.key)
            text = _mean(metric, "-")
            return rf"\textbf{{{text}}}" if metric and metric.mean == best[column.key] else text

        spans = [(heading, len(list(found))) for heading, found in groupby(self.columns, lambda c: c.heading)]
        head = ["", *(rf"\multicolumn{{{n}}}{{c}}{{{_tex(heading)}}}" for heading, n in spans)]
        labels = ["Method", *(_tex(column.label) for column in self.columns)]
        body = [[_tex(row.model), *(shown(row, column) for column in self.columns)] for row in lines]
        columns = "c" * len(self.columns)
        rules = [r"\usepackage{booktabs}", rf"\begin{{tabular}}{{l{columns}}}", r"\toprule"]
        lines_of = [" & ".join(line) + r" \\" for line in (head, labels, *body)]
        return "\n".join(
            [
                f"% {rules[0]}",
                f"% protocol {self.protocol.name}: {self.protocol.about}",
                *rules[1:],
                *lines_of[:2],
                r"\midrule",
                *lines_of[2:],
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


def _plain(record: Record, folder: Path) -> dict[str, Json]:
    kept: dict[str, Json] = {name: value for name, value in asdict(record).items() if name in _KEPT}
    if record.count and record.path.is_relative_to(folder):
        kept |= {"count": record.count, "path": record.path.relative_to(folder).as_posix()}
    return kept | {"scores": record.scores, "by": record.by}


def _mean(metric: Metric | None, none: str = "–") -> str:
    return none if metric is None else f"{metric.mean:.3f}"


def _interval(metric: Metric | None) -> str:
    return "–" if metric is None else f"{metric} ({metric.n})"


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [[text.replace("|", r"\|") for text in line] for line in (head, *body)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (lines[0], ["---"] * len(head), *lines[1:]))


def _tex(text: str) -> str:
    escaped = text.replace("\\", r"\textbackslash ")
    for character in "&%$#_{}":
        escaped = escaped.replace(character, "\\" + character)
    return escaped.replace("<", r"\textless ").replace(">", r"\textgreater ").replace("~", r"\textasciitilde ")
