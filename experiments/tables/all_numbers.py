"""docs/experiments-tables.md from the stored cells: the settings, all tables with their differences, the paper's order.

The page for who wants to check docs/experiments.md (page.py); the numbers are stats.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .arms import ARMS, COLUMNS, PAPER, SCALES, TABLES, Table
from .page import earlier_settings, interval
from .stats import Agreement, Cell, agreements, compare, mean

NOT_MEASURED = "not measured"


def write_all_numbers(stored: Mapping[str, Any]) -> str:
    """The page's text."""
    cells: Sequence[Cell] = stored["cells"]
    lines = _opening(stored)
    for table in TABLES:
        lines += _table(table, cells)
    return "\n".join(lines).rstrip() + "\n"


def _opening(stored: Mapping[str, Any]) -> list[str]:
    cells, scale, words = stored["cells"], SCALES[stored["scale"]], stored.get("words", [])
    expected = {f"{kind}-{number}-{seed}" for kind, number in scale.concepts for seed in scale.seeds}
    lines = [
        "# The paper's tables in miniature: all numbers",
        "",
        f"What they come to is in [experiments.md](experiments.md); both pages are written by `{stored['command']}`",
        "from [experiments.json](experiments.json).",
        "",
        *earlier_settings(stored),
        *([f"Settings are those of the `toy` preset with `{' '.join(words)}`.", ""] if words else []),
        "Brackets are 95 % bootstrap intervals over concepts, whose seeds are averaged; p-values are two-sided, of a",
        "paired t-test and of Wilcoxon's signed ranks. Bold: the interval leaves out 0 and the t-test's p is below",
        "0.05; of twenty differences that are none one is bold. *Attributes* are read exactly from the drawing. What",
        "the paper scored with GPT-4o is not measured here.",
        "",
        "A row again, on your machine: `python -m experiments.tables --arms ours --work again --no-docs` makes the",
        "cells of one arm, with `--unit animal-31-seed0` of one concept and seed; they are JSON files in `again/`.",
        "",
    ]
    missing = _missing(cells, expected)
    return [*lines, f"Not measured: {'; '.join(missing)}.", ""] if missing else lines


def _missing(cells: Sequence[Cell], expected: set[str]) -> list[str]:
    """Arms of tables with fewer cells than the scale asks for."""
    found = []
    for name in dict.fromkeys(arm for table in TABLES for arm in table.arms):
        there = {f"{c['kind']}-{c['number']}-{c['seed']}" for c in cells if c["arm"] == name} & expected
        if len(there) < len(expected):
            found.append(f"{ARMS[name].title} ({len(there)} of {len(expected)} cells)")
    return found


def _table(table: Table, cells: Sequence[Cell]) -> list[str]:
    keys = [key for key in COLUMNS if any(mean(cells, arm, key) for arm in table.arms)]
    lines = [f"## {table.title}", ""]
    if not keys:
        return [*lines, f"{NOT_MEASURED.capitalize()}.", ""]
    lines.append("| | " + " | ".join(ARMS[arm].title for arm in table.arms) + " |")
    lines.append("|---|" + "---|" * len(table.arms))
    for key in keys:
        lines.append(f"| {COLUMNS[key]} | " + " | ".join(_cell(cells, arm, key) for arm in table.arms) + " |")
    lines += ["", f"{ARMS[table.reference].title} minus each, with its interval; t / W: the two p-values.", ""]
    others = [arm for arm in table.arms if arm != table.reference]
    lines.append("| | " + " | ".join(ARMS[arm].title for arm in others) + " |")
    lines.append("|---|" + "---|" * len(others))
    for key in keys:
        row = [_difference(cells, table.reference, arm, key) for arm in others]
        lines.append(f"| {COLUMNS[key]} | " + " | ".join(row) + " |")
    return [*lines, "", *_ordering(agreements(cells, table.arms, table.reference, PAPER)), ""]


def _cell(cells: Sequence[Cell], arm: str, key: str) -> str:
    value = mean(cells, arm, key)
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]" if value else NOT_MEASURED


def _difference(cells: Sequence[Cell], arm: str, other: str, key: str) -> str:
    found = compare(cells, arm, other, key)
    if found is None:
        return NOT_MEASURED
    text = interval(found)
    if found.t_test is not None and found.wilcoxon is not None:
        text += f", {_p(found.t_test)} / {_p(found.wilcoxon)}"
    return f"**{text}**" if found.clear else text


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _ordering(found: Sequence[Agreement]) -> list[str]:
    """Where the miniature stands as the paper does, and where it does not, by name."""
    if not found:
        return [f"The paper's ordering: {NOT_MEASURED}."]
    counts = Counter(each.verdict for each in found)
    order = ("agrees", "leans the same way", "no difference", "leans the other way", "disagrees")
    lines = [
        f"Of {len(found)} comparisons that the paper reports too: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])
        + " (*agrees* and *disagrees* only where the interval leaves out 0 and the t-test's p is below 0.05; of twenty"
        " comparisons without any difference one would).",
    ]
    for verdict in ("agrees", "disagrees"):
        names = [f"{ARMS[each.other].title}: {COLUMNS[each.key]}" for each in found if each.verdict == verdict]
        if names:
            lines.append(f"It {verdict} with the paper in: {'; '.join(names)}.")
    leaning = [each for each in found if each.verdict == "leans the other way"]
    if leaning:
        names = [f"{ARMS[each.other].title}: {COLUMNS[each.key]}" for each in leaning]
        lines.append(f"It leans the other way, within noise, in: {'; '.join(names)}.")
    return lines
