"""docs/experiments.md from the stored cells (docs/experiments.json): what was run, three figures, what was found.

Every number and every sentence of the findings comes from the JSON by the rules below; a cell that is not there is
called not measured. The numbers are stats.py's, the pictures figures.py's, all tables all_numbers.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arms import ARMS, CLAIMS, KEY_MEASURES, SCALES, Claim
from .figures import draw_gains, draw_methods, draw_parts
from .stats import Cell, Comparison, Finding, judge, spent, thread_seconds

GROUPS = {
    "agrees": "What agrees with the paper",
    "disagrees": "What does not",
    "open": "What is open",
}
_NOTHING = {
    "agrees": "Nothing is clear in the paper's direction.",
    "disagrees": "Nothing is clear against the paper's direction.",
    "open": "Nothing: each claim is clear one way or the other.",
}


def write_page(stored: Mapping[str, Any], docs: Path) -> str:
    """The page's text; figures go to `docs`/images."""
    known = [cell for cell in stored["cells"] if cell["arm"] in ARMS]  # those of an earlier version have more arms
    stored = {**stored, "cells": known}
    cells: Sequence[Cell] = known
    lines = ["# The paper's tables in miniature", ""]
    if not cells:
        return "\n".join([*lines, f"**Nothing was measured yet**: run `{stored['command']}`.", ""])
    lines += earlier_settings(stored) + what_was_run(stored) + _figures(cells, docs)
    found = {claim: judge(cells, claim.arm, claim.other, list(KEY_MEASURES)) for claim in CLAIMS}
    for verdict, title in GROUPS.items():
        of_group = {claim: finding for claim, finding in found.items() if finding.verdict == verdict}
        lines += [f"## {title}", ""]
        lines += [f"- {sentence(claim, finding)}" for claim, finding in of_group.items()] or [_NOTHING[verdict]]
        lines.append("")
    lines += _how_to_read(cells)
    return "\n".join(lines).rstrip() + "\n"


def earlier_settings(stored: Mapping[str, Any]) -> list[str]:
    """A sentence where the cells were not made with the settings that the scale has now."""
    if stored.get("words") == list(SCALES[stored["scale"]].words):
        return []
    when = f" ({stored['measured']})" if stored.get("measured") else ""
    return [f"**These numbers were measured with earlier settings{when}; `{stored['command']}` has others now.**", ""]


def what_was_run(stored: Mapping[str, Any]) -> list[str]:
    """Concepts, seeds, cost and settings, in three lines."""
    cells = stored["cells"]
    concepts = {(cell["kind"], cell["number"]) for cell in cells}
    kinds = Counter(sorted(kind for kind, _ in concepts))
    seeds = len({cell["seed"] for cell in cells})
    lines = [
        f"The method on the [toy world](toyworld.md): {_count(len(concepts), 'concept')} that pre-training never saw"
        f" ({', '.join(_count(n, kind) for kind, n in kinds.items())}), {_count(seeds, 'training seed')} each,",
        f"measured on the held-out half of each concept's folder: {_count(len(cells), 'model')},"
        f" {thread_seconds(cells) / 60:.0f} minutes of one thread on {stored['machine']}.",
        f"Written by `{stored['command']}` from [experiments.json](experiments.json), every sentence below by rule; all"
        " numbers and settings are in [experiments-tables.md](experiments-tables.md).",
        "",
    ]
    if stored.get("problems"):
        lines += [f"Not made: {'; '.join(stored['problems'])}.", ""]
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _figures(cells: Sequence[Cell], docs: Path) -> list[str]:
    captions = (
        (draw_methods, "Methods (the paper's table 1). Points are means over concepts, lines their 95 % intervals."),
        (draw_parts, "What each part is good for (table 2): to the right of the line UniCTokens-R1 is better with it."),
        (draw_gains, "What reinforcement gains (table 3): a line a concept, the mean of its seeds."),
    )
    lines = []
    for draw, caption in captions:
        picture = draw(cells, docs / "images")
        if picture is not None:
            lines += [f"![{caption}](images/{picture.name})", "", f"*{caption}*", ""]
    return lines


def sentence(claim: Claim, finding: Finding) -> str:
    """What was found of a claim, in words and numbers; where nothing is clear, of attributes and reward alone."""
    start = f"**{claim.says}**"
    if not finding.differences:
        return f"{start}: not measured."
    parts = [
        f"{word} in {_listed([_measure(finding, key) for key in keys])}"
        for word, keys in (("higher", finding.higher), ("lower", finding.lower))
        if keys
    ]
    if parts:
        same = [KEY_MEASURES[key] for key in finding.undecided]
        return f"{start}: {', '.join(parts)}" + (f"; no clear difference in {_listed(same)}." if same else ".")
    drawn = [key for key in list(KEY_MEASURES)[:2] if key in finding.differences] or list(finding.differences)
    return f"{start}: no clear difference; {_listed([_measure(finding, key) for key in drawn])}."


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _measure(finding: Finding, key: str) -> str:
    return f"{KEY_MEASURES[key]} {interval(finding.differences[key])}"


def interval(found: Comparison) -> str:
    d = found.difference
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def _how_to_read(cells: Sequence[Cell]) -> list[str]:
    lines = [
        "## How to read this",
        "",
        "*Attributes*: what the drawings show of what was asked, read exactly. *Reward*: that of prompts that never",
        "trained. *Right fact*: whether the answer means the fact asked for. *Recognition*: half for a right yes, half",
        "for a right no ([evaluation.md](evaluation.md)).",
        "",
        "Differences are those of the first named minus the other, with 95 % bootstrap intervals over concepts, whose",
        "seeds are averaged. One is clear where its interval leaves out 0 and the paired t-test holds at 5 % over the",
        "four measures (Holm). A claim agrees where a measure is clearly higher and none clearly lower, and does not",
        "where one is clearly lower; of twenty claims without any difference at most one is expected not to be open.",
        "",
    ]
    ours, equal = spent(cells, "ours"), spent(cells, "no_dsog_equal")
    if ours is not None and equal is not None:
        lines += [
            f"At equal compute: a run with DSOG took {ours[0]:.0f} row-steps (images × timesteps that went through the",
            "model) and one without, given as many more steps as previews should cost at the pass rate aimed at,",
            f"{equal[0]:.0f}; with what decodes and judges previews {ours[1]:.0f} s of a thread against"
            f" {equal[1]:.0f} s.",
            "",
        ]
    return lines
