"""What many runs come to: a table (CSV, JSON), and one page over all concepts with means and intervals.

Reads the status files and evaluations that are there (sweep.py says where), so it can be made at any time and by
anyone. It computes nothing but means; it starts nothing.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

from ..evaluate.report import environment
from ..evaluate.result import Metric, bootstrap, read_means
from ..utils.files import read_json_table, write_json, write_text_atomic
from ..utils.text import spreadsheet_cell
from .demo import HEADLINES
from .sweep import Status

PARTS = ("before", "after")


@dataclass
class Row:
    """One concept: its job, and means of the headline measures."""

    status: Status
    kind: str = ""
    means: dict[str, dict[str, float]] = field(default_factory=dict)
    """``{measure: {"before": …, "after": …}}``."""


def collect(runs: str | os.PathLike[str], names: Sequence[str]) -> list[Row]:
    """Rows of `names` as things stand. A file that cannot be read is a note in the row's message."""
    return [_row(Path(runs), name) for name in names]


def _row(runs: Path, name: str) -> Row:
    row = Row(Status.read(runs, name))
    try:
        about = runs / name / "about.json"
        row.kind = str(read_json_table(about).get("kind", "")) if about.exists() else ""
        for part in PARTS:
            file = runs / name / f"{part}.json"
            means = read_means(file) if file.exists() else {}
            for key in HEADLINES:
                if key in means:
                    mean = means[key]
                    if not math.isfinite(mean):
                        raise ValueError(f"{file}: {key} is {mean}")
                    row.means.setdefault(key, {})[part] = mean
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a UserError is a ValueError
        row.status.message = f"{row.status.message} (its results cannot be read: {error})".strip()
    return row


def summary(rows: Sequence[Row]) -> list[tuple[str, str, Metric, Metric, Metric]]:
    """(measure, title, before, after, change) over the concepts that have both; intervals over concepts."""
    found = []
    for key, title in HEADLINES.items():
        pairs = [row.means[key] for row in rows if set(row.means.get(key, {})) == set(PARTS)]
        if pairs:
            before, after = ([pair[part] for pair in pairs] for part in PARTS)
            change = [late - early for early, late in zip(before, after, strict=True)]
            found.append((key, title, bootstrap(before), bootstrap(after), bootstrap(change)))
    return found


def write_results(runs: str | os.PathLike[str], rows: Sequence[Row]) -> Path:
    """Write results.csv, results.json and report.html into `runs`; returns the page."""
    runs = Path(runs)
    keys = [key for key in HEADLINES if any(key in row.means for row in rows)]
    columns = ["concept", "kind", "state", "tries", "seconds", "message", *(f"{k}.{p}" for k in keys for p in PARTS)]
    flat = [_flat(row, keys) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: spreadsheet_cell(v) if isinstance(v, str) else v for k, v in row.items()} for row in flat)
    write_text_atomic(runs / "results.csv", text.getvalue())
    whole = {
        key: {"before": asdict(before), "after": asdict(after), "change": asdict(change)}
        for key, _, before, after, change in summary(rows)
    }
    write_json(runs / "results.json", {"concepts": flat, "summary": whole})
    page = runs / "report.html"
    write_text_atomic(page, _page(rows))
    return page


def _flat(row: Row, keys: Sequence[str]) -> dict[str, object]:
    numbers = {f"{key}.{part}": row.means.get(key, {}).get(part) for key in keys for part in PARTS}
    status = {name: getattr(row.status, name) for name in ("state", "tries", "seconds", "message")}
    return {"concept": row.status.name, "kind": row.kind, **status, **numbers}


def _page(rows: Sequence[Row]) -> str:
    keys = [key for key in HEADLINES if any(key in row.means for row in rows)]
    return (
        environment()
        .get_template("sweep.html")
        .render(
            rows=rows,
            keys=keys,
            titles=HEADLINES,
            summary=summary(rows),
            states=sorted(Counter(row.status.state for row in rows).items()),
            time=_duration(sum(row.status.seconds for row in rows)),
            link=lambda name: f"{quote(name)}/report.html",
        )
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
