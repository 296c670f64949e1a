"""What many runs come to: a table (CSV, JSON), and one page over all concepts with means and intervals.

Reads the status files and evaluations that are there (sweep.py says where), so it can be made at any time and by
anyone. It computes nothing but means; it starts nothing.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..evaluate.result import Metric, bootstrap, read_means
from ..utils.errors import needs
from ..utils.files import read_json_table, write_json, write_text_atomic
from ..utils.text import spreadsheet_cell
from .demo import HEADLINES
from .sweep import Status

if TYPE_CHECKING:
    from jinja2 import Template

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
    write_json(runs / "results.json", {"concepts": flat, "summary": {k: _plain(m) for k, *m in _numbers(rows)}})
    page = runs / "report.html"
    write_text_atomic(page, _page(rows))
    return page


def _flat(row: Row, keys: Sequence[str]) -> dict[str, object]:
    status = row.status
    numbers = {f"{key}.{part}": row.means.get(key, {}).get(part) for key in keys for part in PARTS}
    return {
        "concept": status.name,
        "kind": row.kind,
        "state": status.state,
        "tries": status.tries,
        "seconds": status.seconds,
        "message": status.message,
        **numbers,
    }


def _numbers(rows: Sequence[Row]) -> list[tuple[str, Metric, Metric, Metric]]:
    return [(key, before, after, change) for key, _, before, after, change in summary(rows)]


def _plain(metrics: Sequence[Metric]) -> dict[str, object]:
    names = ("before", "after", "change")
    return {
        name: {"mean": m.mean, "low": m.low, "high": m.high, "n": m.n} for name, m in zip(names, metrics, strict=True)
    }


def _page(rows: Sequence[Row]) -> str:
    keys = [key for key in HEADLINES if any(key in row.means for row in rows)]
    return _template().render(
        rows=rows,
        keys=keys,
        titles=HEADLINES,
        summary=summary(rows),
        states=sorted(Counter(row.status.state for row in rows).items()),
        time=_duration(sum(row.status.seconds for row in rows)),
        link=lambda name: f"{quote(name)}/report.html",
    )


@functools.cache
def _template() -> Template:
    with needs("evaluate"):
        from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ rows | length }} concepts</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #8884; vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
.many th { vertical-align: bottom; line-height: 1.25; }
.title { white-space: normal; min-width: 4.5rem; max-width: 6.5rem; font-size: 12px; }
.scroll { overflow-x: auto; }
.failed { color: #b42318; }
</style>
</head>
<body>
<h1>{{ rows | length }} concepts</h1>
<p>{% for state, number in states %}{{ number }} {{ state }}{{ ", " if not loop.last }}{% endfor %};
{{ time }} of work. Measured on the held-out half of each concept's folder.</p>
{% if summary %}
<h2>Over the concepts measured before and after</h2>
<div class="scroll"><table>
<tr><th>measure</th><th class="number">before</th><th class="number">after</th>
<th class="number">change [95 %, over concepts]</th><th class="number">concepts</th></tr>
{% for key, title, before, after, change in summary %}
<tr><td>{{ title }}</td><td class="number">{{ "%.3f" | format(before.mean) }}</td>
<td class="number">{{ "%.3f" | format(after.mean) }}</td>
<td class="number">{{ "%+.3f [%+.3f, %+.3f]" | format(change.mean, change.low, change.high) }}</td>
<td class="number">{{ change.n }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
<h2>One by one</h2>
<p>Above before, below after.</p>
<div class="scroll"><table class="many">
<tr><th>concept</th><th>kind</th><th>state</th><th class="number">tries</th><th class="number">minutes</th>
{% for key in keys %}<th class="number title">{{ titles[key] }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{% if row.status.state == "done" %}<a href="{{ link(row.status.name) }}">{{ row.status.name }}</a>
{%- else %}{{ row.status.name }}{% endif %}</td><td>{{ row.kind }}</td>
<td class="{{ row.status.state }}">{{ row.status.state }}</td>
<td class="number">{{ row.status.tries }}</td>
<td class="number">{{ "%.1f" | format(row.status.seconds / 60) }}</td>
{% for key in keys %}{% set pair = row.means.get(key, {}) %}<td class="number">
{%- if "before" in pair and "after" in pair %}{{ "%.3f" | format(pair.before) }}
<br>{{ "%.3f" | format(pair.after) }}{% endif %}</td>
{% endfor %}</tr>
{% if row.status.message %}
<tr><td></td><td colspan="{{ 4 + keys | length }}">{{ row.status.message }}</td></tr>
{% endif %}
{% endfor %}
</table></div>
</body>
</html>
"""
