"""docs/experiments.md from the stored cells (docs/experiments.json): tables, tests, figures, and what was not measured.

Every number on the page comes from the JSON; a cell that is not there is called not measured. The numbers are
stats.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arms import ARMS, COLUMNS, CURVES, PAPER, SCALES, TABLES, Curve, Table
from .figures import END, draw
from .stats import Agreement, Cell, agreements, at_equal_cost, common, compare, mean

NOT_MEASURED = "not measured"


def write_page(stored: Mapping[str, Any], docs: Path) -> str:
    """The page's text; figures go to `docs`/images."""
    cells: Sequence[Cell] = stored["cells"]
    lines = _opening(stored)
    for table in TABLES:
        lines += _table(table, cells)
    lines += ["## Curves", "", *_CURVES_INTRO]
    for curve in CURVES:
        lines += _curve(curve, cells, docs)
    return "\n".join(lines).rstrip() + "\n"


_CURVES_INTRO = (
    "Left and middle: the reward of the training groups along the seconds of training (of one thread), and along",
    "image rows that went through the model (guidance's second row counted, a backward pass as two), a mean over three",
    "steps, with the 95 % interval over concepts. With DSOG the group is selected, which lifts this curve by itself;",
    "so the right panel counts: the held-out reward of plain drawings at the end, in pairs of concepts, minus that of",
    "the first arm. The waves are the questions of the steps, which all arms share.",
    "",
)


def _opening(stored: Mapping[str, Any]) -> list[str]:
    cells, scale, words = stored["cells"], SCALES[stored["scale"]], stored.get("words", [])
    expected = {f"{kind}-{number}-{seed}" for kind, number in scale.concepts for seed in scale.seeds}
    lines = [
        "# The paper's tables in miniature",
        "",
        "The method on the toy world, where a table takes minutes and every drawing can be read exactly. Written by",
        f"`{stored['command']}` (`make tables{' QUICK=1' if scale.name == 'quick' else ''}`) from"
        " [experiments.json](experiments.json).",
        "",
    ]
    if not cells:
        return [*lines, "**Nothing was measured yet**: run the command above.", ""]
    kinds = Counter(kind for kind, _ in scale.concepts)
    lines += [
        f"Scale `{scale.name}`: {len(scale.concepts)} concepts ({', '.join(f'{n} {k}' for k, n in kinds.items())})"
        f" that pre-training never saw, {len(scale.seeds)} training seed{'s' if len(scale.seeds) > 1 else ''} each.",
        "Settings are those of the `toy` preset" + (" with" if words else "."),
        *([f"`{' '.join(words)}`."] if words else []),
        f"{len(cells)} cells, {stored['thread_seconds'] / 60:.0f} minutes of one thread's work on {stored['machine']}.",
        "",
        "The seeds of a concept are averaged, concepts are the unit of chance: brackets are 95 % bootstrap intervals",
        "over concepts, p-values are two-sided, of a paired t-test and of Wilcoxon's signed ranks over concepts.",
        "Measures are those of [evaluation.md](evaluation.md), on the held-out half of each concept's folder;",
        "*attributes* are read exactly from the drawing. Bold: the interval leaves out 0 and the t-test's p is below",
        "0.05. What the paper scored with GPT-4o is not measured here.",
        "",
        "A row again, on your machine: `python -m experiments.tables --arms ours --work again --no-docs` makes the",
        "cells of one arm, with `--unit animal-31-seed0` of one concept and seed; they are JSON files in `again/`.",
        "",
    ]
    missing = _missing(cells, expected)
    if missing:
        lines += [f"Not measured: {'; '.join(missing)}.", ""]
    if stored.get("problems"):
        lines += ["What could not be made:", "", *(f"- {text}" for text in stored["problems"]), ""]
    return lines


def _missing(cells: Sequence[Cell], expected: set[str]) -> list[str]:
    """Arms of tables with fewer cells than the scale asks for."""
    found = []
    for name in dict.fromkeys(arm for table in TABLES for arm in table.arms):
        there = {f"{c['kind']}-{c['number']}-{c['seed']}" for c in cells if c["arm"] == name} & expected
        if len(there) < len(expected):
            found.append(f"{ARMS[name].title} ({len(there)} of {len(expected)} cells)")
    return found


# --- tables --------------------------------------------------------------------------------------------------------


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
    d = found.difference
    text = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
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


# --- curves --------------------------------------------------------------------------------------------------------


def _curve(curve: Curve, cells: Sequence[Cell], docs: Path) -> list[str]:
    lines = [f"### {curve.title}", "", *([curve.note, ""] if curve.note else [])]
    absent = [label for arm, label in curve.arms if not any(c["arm"] == arm and c["rows"] for c in cells)]
    picture = draw(curve, cells, docs / "images")
    if picture is not None:
        lines += [f"![{curve.title}](images/{picture.name})", ""]
    if absent:
        lines += [f"{NOT_MEASURED.capitalize()}: {', '.join(absent)}.", ""]
    (first, label), *others = curve.arms
    for arm, other in others:
        parts = []
        for along, words in (("seconds", "seconds"), ("row_steps", "row-steps")):
            found = at_equal_cost(cells, first, arm, along)
            if found is not None:
                value, pairs = found
                parts.append(
                    f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}] at equal {words} ({pairs} pairs)"
                )
        both = common(cells, [first, arm])
        end = compare(both, first, arm, END)
        if end is not None:
            d, p = end.difference, "" if end.t_test is None else f", p = {_p(end.t_test)}"
            parts.append(
                f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{p} in held-out reward at the end ({len(both) // 2} pairs)"
            )
        if parts:
            lines += [f"- {label} minus {other}: {'; '.join(parts)}."]
    return [*lines, ""]
