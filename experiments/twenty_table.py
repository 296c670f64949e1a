"""Write the table of twenty toy concepts in docs/training.md: ``python -m experiments.twenty_table [RUNS]``.

RUNS is the folder that experiments/recipes/twenty_toys.sh filled; its results.csv is kept as docs/twenty_toys.csv, from
which the table follows. With ``--check`` nothing is written and the exit code says whether the page is up to date.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from pyunictokens.evaluate.result import bootstrap
from pyunictokens.runs.demo import HEADLINES
from pyunictokens.utils.files import write_text_atomic

from .cost_tables import updated

DOCS = Path(__file__).parent.parent / "docs"
PAGE, KEPT = DOCS / "training.md", DOCS / "twenty_toys.csv"
SHOWN = {
    "reasoning_generation.reward": "reward",
    "reasoning_generation.attributes": "attributes right",
    "vqa.accuracy": "questions about pictures right",
}
"""Columns of the table, by measure; all are in the CSV."""


def table() -> str:
    """A line a concept, then means over all with intervals of the change."""
    with KEPT.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    titles = " | ".join(f"{title}, before → after" for title in SHOWN.values())
    lines = [
        f"| concept | kind | state | tries | seconds | {titles} |",
        "|---|---|---|---|---|" + "---|" * len(SHOWN),
    ]
    for row in rows:
        cells = [row["concept"], row["kind"], row["state"], row["tries"], f"{float(row['seconds']):.0f}"]
        cells += [f"{float(row[f'{key}.before']):.3f} → {float(row[f'{key}.after']):.3f}" for key in SHOWN]
        lines.append(f"| {' | '.join(cells)} |")
    tries, seconds = (sum(float(row[name]) for row in rows) for name in ("tries", "seconds"))
    changes = []
    for key in SHOWN:
        metric = bootstrap([float(row[f"{key}.after"]) - float(row[f"{key}.before"]) for row in rows])
        changes.append(f"{metric.mean:+.3f} [{metric.low:+.3f}, {metric.high:+.3f}]")
    done = sum(row["state"] == "done" for row in rows)
    lines.append(f"| all, mean change [95 %] | | {done} done | {tries:.0f} | {seconds:.0f} | {' | '.join(changes)} |")
    return "\n".join(lines)


def main() -> None:
    assert set(SHOWN) <= set(HEADLINES)
    given = [word for word in sys.argv[1:] if word != "--check"]
    if given:
        write_text_atomic(KEPT, (Path(given[0]) / "results.csv").read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    new = updated(text, {"twenty": table}, PAGE.name)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == text else f"{PAGE.name} is out of date: python -m experiments.twenty_table")
    write_text_atomic(PAGE, new)


if __name__ == "__main__":
    main()
