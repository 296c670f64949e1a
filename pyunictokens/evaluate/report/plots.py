"""The curves of a run as PNG: reward and its parts, the policy's drift, DSOG. One function a figure, light or dark.

Reads lines of metrics.jsonl as plain tables and returns bytes. Needs matplotlib.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...rewards.registry import labels
from ...utils.errors import needs
from ...utils.json import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Json]]

_MODES = {"text_only": "text-only step", "visual": "visual step"}


@dataclass(frozen=True)
class Theme:
    """Colours of one look of the page."""

    name: str
    ink: str
    faint: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme("light", "#1f2430", "#667085", "#e4e7ec", ("#2457c5", "#c2410c", "#0f766e", "#7c3aed"))
DARK = Theme("dark", "#e6e9ef", "#98a2b3", "#333a48", ("#7aa5ff", "#fb923c", "#2dd4bf", "#b79bff"))


def numbers(rows: Rows, *path: str) -> list[float]:
    """One value a row, NaN where it is missing or null; `path` leads into nested tables."""
    found = []
    for row in rows:
        value: Json = row
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(float(value))
        else:
            found.append(math.nan)
    return found


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average that skips NaN and is not pulled towards the first value."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight if weight else math.nan)
    return result


def stages(rows: Rows, theme: Theme) -> bytes:
    """Losses of the stages in which the concept's tokens are learned, a panel a stage."""
    names = list(dict.fromkeys(str(row.get("stage")) for row in rows))
    figure, axes = _figure(len(names), theme, height=2.6)
    losses = {"loss_understanding": "answering", "loss_generation": "generating"}
    for axis, name in zip(axes, names, strict=True):
        own = [row for row in rows if str(row.get("stage")) == name]
        steps = numbers(own, "step")
        for colour, (key, label) in zip(theme.lines, losses.items(), strict=False):
            values = numbers(own, key)
            if any(map(math.isfinite, values)):
                axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
                axis.plot(steps, smooth(values, max(3, len(values) // 12)), color=colour, linewidth=2, label=label)
        _title(axis, theme, f"Stage: {name}")
        axis.set_ylim(bottom=0)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="upper right", frameon=False, labelcolor=theme.ink, fontsize=8)
    return _png(figure)


def reward(rows: Rows, theme: Theme) -> bytes:
    """Mean reward of each step's group with the spread inside the group, and its moving average."""
    figure, (axis,) = _figure(1, theme, height=3.1)
    steps, mean, spread = numbers(rows, "step"), numbers(rows, "reward_mean"), numbers(rows, "within_group_std")
    _band(axis, steps, mean, spread, theme.lines[0])
    for colour, (mode, label) in zip((theme.lines[1], theme.lines[2]), _MODES.items(), strict=True):
        chosen = [index for index, row in enumerate(rows) if row.get("mode") == mode]
        if chosen:
            points = [steps[index] for index in chosen], [mean[index] for index in chosen]
            axis.scatter(*points, s=14, color=colour, label=label, zorder=3, linewidths=0)
    _average(axis, steps, mean, theme.lines[0])
    _title(axis, theme, "Reward of each group: mean ± spread inside the group")
    axis.legend(loc="lower right", ncols=4, frameon=False, labelcolor=theme.ink, fontsize=8)
    return _png(figure)


def rewards(rows: Rows, theme: Theme) -> bytes:
    """Each reward model's mean with the spread inside the group."""
    known = labels()
    names = [name for name in known if any(map(math.isfinite, numbers(rows, "parts", name)))]
    names += sorted({name for row in rows for name in _parts(row)} - set(known))
    figure, axes = _figure(max(1, len(names)), theme, height=2.6)
    steps = numbers(rows, "step")
    for axis, name, colour in zip(axes, names, (theme.lines * len(names)), strict=False):
        mean = numbers(rows, "parts", name)
        _band(axis, steps, mean, numbers(rows, "parts_std", name), colour)
        axis.plot(steps, mean, color=colour, linewidth=0.8, alpha=0.6)
        _average(axis, steps, mean, colour)
        _title(axis, theme, known.get(name, name))
    return _png(figure)


def held_out(rows: Rows, training: Rows, theme: Theme) -> bytes:
    """What was measured on held-out prompts, a line a value with its 95 % interval over prompts; behind it the reward
    of training.

    rows: of held_out.jsonl. training: of metrics.jsonl.
    """
    means = [row["means"] for row in rows if isinstance(row.get("means"), Mapping)]
    reward = numbers(rows, "means", "reward")
    names = [name for name in (means[0] if means and isinstance(means[0], Mapping) else {}) if name != "reward"]
    panels = ["reward", *(name for name in names if numbers(rows, "means", name) != reward)]  # one reward is one panel
    figure, axes = _figure(len(panels), theme, height=2.8)
    steps = numbers(rows, "step")
    for axis, name, colour in zip(axes, panels, theme.lines * len(panels), strict=False):
        if name == "reward":
            behind = numbers(training, "reward_mean")
            axis.plot(numbers(training, "step"), behind, color=theme.faint, linewidth=0.8, alpha=0.5, label="training")
        values = numbers(rows, "means", name)
        axis.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=3.5, label="held-out prompts")
        errors = [1.96 * _error(row, name) for row in rows]
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        _title(axis, theme, name.replace("_", " "))
        axis.legend(loc="lower right", frameon=False, labelcolor=theme.ink, fontsize=8)
    return _png(figure)


def _error(row: Mapping[str, Json], name: str) -> float:
    """Standard error of a mean over held-out prompts; 0 where the prompts' values are not there."""
    each = row.get("prompts")
    values = each.get(name) if isinstance(each, Mapping) else None
    finite = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)] if isinstance(values, list) else []
    return statistics.stdev(finite) / len(finite) ** 0.5 if len(finite) > 1 else 0.0


def _parts(row: Mapping[str, Json]) -> list[str]:
    parts = row.get("parts")
    return list(parts) if isinstance(parts, Mapping) else []


def policy(rows: Rows, theme: Theme) -> bytes:
    """How far the policy moved: divergence from the reference, share of clipped tokens, length of the gradient."""
    panels = {"kl": "KL to the reference", "clip_fraction": "Clipped tokens (share)", "grad_norm": "Gradient norm"}
    figure, axes = _figure(3, theme, height=2.6)
    steps = numbers(rows, "step")
    for axis, (key, title), colour in zip(axes, panels.items(), theme.lines, strict=False):
        _curve(axis, steps, numbers(rows, key), colour, theme, noisy=key != "kl")
        _title(axis, theme, title)
        axis.set_ylim(bottom=0)
    return _png(figure)


def dsog(rows: Rows, theme: Theme, target: float | None = None) -> bytes:
    """The moving threshold, the share of previews that passed, candidates for each accepted one."""
    figure, axes = _figure(3, theme, height=2.6)
    steps, passed = numbers(rows, "step"), numbers(rows, "pass_rate")
    per_accepted = [1 / rate if rate > 0 else math.nan for rate in passed]
    panels = {
        "Threshold of previews": numbers(rows, "threshold"),
        "Pass rate of previews": passed,
        "Candidates for each accepted": per_accepted,
    }
    for axis, (title, values), colour in zip(axes, panels.items(), theme.lines, strict=False):
        _curve(axis, steps, values, colour, theme, noisy=axis is not axes[0])
        _title(axis, theme, title)
    if target is not None:
        axes[1].axhline(target, color=theme.faint, linewidth=1, linestyle="--")
        _title(axes[1], theme, "Pass rate of previews (dashed: target)")
    axes[1].set_ylim(0, 1.02)
    axes[2].set_ylim(bottom=0)
    return _png(figure)


def _figure(panels: int, theme: Theme, height: float) -> tuple[Figure, list[Axes]]:
    with needs("evaluate"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.patch.set_alpha(0)
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=theme.faint, labelsize=8, length=0)
        axis.grid(axis="y", color=theme.grid, linewidth=0.8)
        axis.set_axisbelow(True)
        for side, spine in axis.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(theme.grid)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.02)
    axes[0].set_xlabel("step", color=theme.faint, fontsize=8)
    return figure, axes


def _title(axis: Axes, theme: Theme, text: str) -> None:
    axis.set_title(text, loc="left", color=theme.ink, fontsize=9.5, fontweight="bold", pad=8)


def _band(axis: Axes, steps: Sequence[float], mean: Sequence[float], spread: Sequence[float], colour: str) -> None:
    low = [m - s for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    axis.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0, label="spread in the group")


def _average(axis: Axes, steps: Sequence[float], values: Sequence[float], colour: str) -> None:
    span = max(3, len(values) // 6)
    axis.plot(steps, smooth(values, span), color=colour, linewidth=2.2, label=f"average (span {span})", zorder=4)


def _curve(
    axis: Axes, steps: Sequence[float], values: Sequence[float], colour: str, theme: Theme, *, noisy: bool
) -> None:
    """Values as a line, or where they are noisy as dots with their moving average; a note where there are none."""
    if not any(map(math.isfinite, values)):
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color=theme.faint, fontsize=9)
    elif noisy:
        axis.plot(steps, values, color=colour, linewidth=0.9, alpha=0.45, marker="o", markersize=2.2)
        _average(axis, steps, values, colour)
    else:
        axis.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=2.2)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
