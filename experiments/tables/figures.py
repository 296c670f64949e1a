"""The figures of docs/experiments.md, one a question: reward along seconds and along model row-steps, and at the end.

Takes cells and gives PNG files; it computes nothing but what stats.py does.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from pyunictokens.utils.files import write_bytes_atomic

from .arms import Curve
from .stats import Cell, common, compare, curve

COLOURS = ("#2457c5", "#d9480f", "#2b8a3e", "#862e9c")
END = "reasoning_generation.reward"


def draw(question: Curve, cells: Sequence[Cell], folder: Path) -> Path | None:
    """Write `folder`/NAME.png for the arms that were measured; None where fewer than two were."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    there = [(arm, label) for arm, label in question.arms if curve(cells, arm, "seconds") is not None]
    cells = common(cells, [arm for arm, _ in there])
    if len(there) < 2 or not cells:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained", width_ratios=(3, 3, 1.6))
    for place, (along, title) in enumerate((("seconds", "seconds of training"), ("row_steps", "model row-steps"))):
        axis = axes[place]
        for number, (arm, label) in enumerate(there):
            line = curve(cells, arm, along)
            if line is None:
                continue
            x, points = line
            axis.plot(x, [point.mean for point in points], color=COLOURS[number], label=label, linewidth=1.8)
            low, high = [point.low for point in points], [point.high for point in points]
            axis.fill_between(x, low, high, color=COLOURS[number], alpha=0.13, linewidth=0)
        axis.set_xlabel(title)
        axis.set_ylabel("reward of the training group" if place == 0 else "")
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=9)
    first = there[0][0]
    for number, (arm, _) in enumerate(there[1:], start=1):
        pair = compare(cells, arm, first, END)
        if pair is not None:
            value = pair.difference
            span = [[value.mean - value.low], [value.high - value.mean]]
            axes[2].errorbar([number], [value.mean], yerr=span, fmt="o", color=COLOURS[number], capsize=4)
    axes[2].axhline(0, color=COLOURS[0], linewidth=1.2)
    labels = [label for _, label in there]
    axes[2].set_xticks(
        range(len(there)), [label.replace(" ", "\n", 1) if len(label) > 8 else label for label in labels], fontsize=8
    )
    axes[2].set_xlim(-0.6, len(there) - 0.4)
    axes[2].set_title("held-out reward at the end,\nminus the first", fontsize=9)
    axes[2].grid(alpha=0.25, axis="y")
    figure.suptitle(question.title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    plt.close(figure)
    path = folder / f"experiments_{question.name}.png"
    write_bytes_atomic(path, buffer.getvalue())
    return path
