"""The three figures of docs/experiments.md: methods, what each part is good for, and what reinforcement gains.

Takes cells and gives PNG files, wide enough for a telephone held upright and for half a printed page; what is clear is
judged by stats.py. Colours are of Okabe and Ito's palette, and no figure needs them to be read: shapes differ as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyunictokens.utils.files import write_bytes_atomic

from .arms import KEY_MEASURES
from .stats import Cell, by_concept, judge, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
REWARD = "reasoning_generation.reward"
WIDTH = 4.7
"""Inches. On 390 pixels a point is a good pixel wide, so no label is smaller than 9 points."""

METHODS = {"ours": "UniCTokens-R1", "unic": "UniCTokens", "joint": "joint stage", "text": "looks in words"}
PARTS = {
    "no_reasoning": "reasoning",
    "no_visual": "image questions",
    "no_text_only": "text questions",
    "no_dsog": "DSOG",
    "no_dsog_equal": "DSOG, equal\ncompute",
}
STARTS = {"joint stage": ("joint", "joint_grpo"), "two stages": ("staged", "ours")}
KINDS = {"animal": (BLUE, "o"), "human": (ORANGE, "s"), "object": (GREEN, "^")}


def draw_methods(cells: Sequence[Cell], folder: Path) -> Path | None:
    """Table 1: a panel a key measure, a point with its interval a method."""
    there = [arm for arm in METHODS if any(mean(cells, arm, key) for key in KEY_MEASURES)]
    if not there:
        return None
    figure, panels = _panels(0.9 + 0.62 * len(there), [METHODS[arm] for arm in there])
    for axis, (key, title) in zip(panels, KEY_MEASURES.items(), strict=True):
        for place, arm in enumerate(there):
            value = mean(cells, arm, key)
            if value is not None:
                colour = BLUE if arm == "ours" else GREY
                _point(axis, place, value.mean, value.low, value.high, colour, filled=arm == "ours")
        axis.set_title(title, fontsize=10)
        left, right = axis.get_xlim()
        axis.set_xlim(left, min(right, 1.015))
    return _save(figure, folder / "experiments_methods.png")


def draw_parts(cells: Sequence[Cell], folder: Path) -> Path | None:
    """Table 2: UniCTokens-R1 minus each run without a part, by each key measure; clear differences are filled."""
    found = {arm: judge(cells, "ours", arm, list(KEY_MEASURES)) for arm in PARTS}
    there = [arm for arm, finding in found.items() if finding.differences]
    if not there:
        return None
    figure, panels = _panels(1.1 + 0.62 * len(there), [PARTS[arm] for arm in there])
    for axis, (key, title) in zip(panels, KEY_MEASURES.items(), strict=True):
        axis.axvline(0, color="black", linewidth=1)
        for place, arm in enumerate(there):
            pair, clear = found[arm].differences.get(key), key in found[arm].clear
            if pair is not None:
                d, colour = pair.difference, GREY
                if clear:
                    colour = BLUE if d.mean > 0 else ORANGE
                _point(axis, place, d.mean, d.low, d.high, colour, filled=clear)
        widest = max(0.012, *(abs(end) for end in axis.get_xlim()))
        tick = max(tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if tick <= 0.9 * widest)
        axis.set_xlim(-widest, widest)
        axis.set_xticks([-tick, 0, tick], [f"−{tick:g}", "0", f"+{tick:g}"])
        axis.set_title(title, fontsize=10)
    figure.supxlabel("with the part minus without (filled: clear)", fontsize=9.5)
    return _save(figure, folder / "experiments_parts.png")


def draw_gains(cells: Sequence[Cell], folder: Path) -> Path | None:
    """Table 3: held-out reward of each concept before and after reinforcement, from both starts."""
    from matplotlib.figure import Figure

    values = {
        start: (by_concept(cells, before, REWARD), by_concept(cells, after, REWARD))
        for start, (before, after) in STARTS.items()
    }
    if not any(set(before) & set(after) for before, after in values.values()):
        return None
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, (start, (before, after)) in zip(panels, values.items(), strict=True):
        both = [concept for concept in before if concept in after]
        for concept in both:
            kind = concept.split("-")[0]
            colour, marker = KINDS[kind]
            axis.plot([0, 1], [before[concept], after[concept]], color=colour, marker=marker, linewidth=1.6, label=kind)
        if both:
            middle = [sum(each[concept] for concept in both) / len(both) for each in (before, after)]
            axis.plot([0, 1], middle, color="black", linewidth=3.2, linestyle=(0, (2, 1)), label="mean")
        axis.set_xticks([0, 1], ["before", "after"])
        axis.set_xlim(-0.2, 1.2)
        axis.set_title(start, fontsize=10)
        _plain(axis, "y")
    panels[0].set_ylabel("reward of held-out prompts", fontsize=9.5)
    handles = dict(zip(*panels[1].get_legend_handles_labels()[::-1], strict=True))
    handles = handles or dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _save(figure, folder / "experiments_gains.png")


def _panels(height: float, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Two by two panels with the names of rows at the left, the first at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    for axis in panels.flat:
        _plain(axis, "x")
        axis.locator_params(axis="x", nbins=4)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.5, -0.5)
    return figure, list(panels.flat)


def _plain(axis: Axes, along: str) -> None:
    axis.grid(axis="x" if along == "x" else "y", alpha=0.3)
    axis.tick_params(labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _point(axis: Axes, place: int, value: float, low: float, high: float, colour: str, *, filled: bool) -> None:
    axis.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    face = colour if filled else "white"
    axis.plot(value, place, "o", markersize=6.5, markeredgecolor=colour, markeredgewidth=1.6, markerfacecolor=face)


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, metadata={"Software": None})
    write_bytes_atomic(path, buffer.getvalue())
    return path
