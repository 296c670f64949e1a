"""From cells to what can be said: means with intervals, paired tests, and how far the paper's ordering is found again.

A concept is the unit of chance: seeds of one concept are averaged first, then concepts are drawn again (bootstrap) and
compared in pairs (t-test and Wilcoxon's signed ranks, both two-sided).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyunictokens.evaluate.result import Metric, bootstrap

Cell = Mapping[str, Any]


def by_concept(cells: Sequence[Cell], arm: str, key: str) -> dict[str, float]:
    """Mean over the seeds of each concept of one measure of one arm."""
    earlier = key.replace("dense_reasoning_generation.", "dense_reasoning.")  # cells of an earlier version
    found: dict[str, list[float]] = {}
    for cell in cells:
        value = cell["metrics"].get(key, cell["metrics"].get(earlier)) if cell["arm"] == arm else None
        if value is not None:
            found.setdefault(f"{cell['kind']}-{cell['number']}", []).append(value)
    return {concept: math.fsum(values) / len(values) for concept, values in sorted(found.items())}


def mean(cells: Sequence[Cell], arm: str, key: str) -> Metric | None:
    """Mean over concepts with its interval; None where nothing was measured."""
    values = list(by_concept(cells, arm, key).values())
    return bootstrap(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """`difference` of two arms over the concepts both have; p-values are None where a test is not possible."""

    difference: Metric
    t_test: float | None
    wilcoxon: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval of the difference leaves out 0 and the t-test's p is below 0.05: with few concepts the
        bootstrap alone is too sure of itself."""
        outside = self.difference.low > 0 or self.difference.high < 0
        return outside and self.t_test is not None and self.t_test < 0.05


def compare(cells: Sequence[Cell], arm: str, other: str, key: str) -> Comparison | None:
    """`arm` − `other` in pairs of concepts; None where no concept has both."""
    from scipy import stats

    mine, theirs = by_concept(cells, arm, key), by_concept(cells, other, key)
    pairs = [(mine[concept], theirs[concept]) for concept in mine if concept in theirs]
    if not pairs:
        return None
    differences = [a - b for a, b in pairs]
    t_test = wilcoxon = None
    if len(pairs) > 2 and len(set(differences)) > 1:
        t_test = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
    if len(pairs) > 2 and any(differences):
        wilcoxon = float(stats.wilcoxon(differences).pvalue)
    return Comparison(bootstrap(differences), t_test, wilcoxon)


@dataclass(frozen=True)
class Agreement:
    """Whether two arms stand to each other as in the paper, by one measure."""

    key: str
    arm: str
    other: str
    paper: float
    here: Comparison

    @property
    def verdict(self) -> str:
        """agrees or disagrees where the difference is clear; else leans the same way or the other; no difference."""
        value = self.here.difference.mean
        if value == 0:
            return "no difference"
        same = (value > 0) == (self.paper > 0)
        if self.here.clear:
            return "agrees" if same else "disagrees"
        return "leans the same way" if same else "leans the other way"


def agreements(
    cells: Sequence[Cell], arms: Sequence[str], reference: str, paper: Mapping[str, Mapping[str, float]]
) -> list[Agreement]:
    """`reference` against each other arm by each measure of which the paper gives both values, and they differ."""
    found = []
    for other in arms:
        for key, value in paper.get(reference, {}).items():
            there = value - paper.get(other, {}).get(key, value)
            here = compare(cells, reference, other, key)
            if other != reference and abs(there) > 1e-9 and here is not None:
                found.append(Agreement(key, reference, other, there, here))
    return found


def common(cells: Sequence[Cell], arms: Sequence[str]) -> list[Cell]:
    """The cells of these arms, of the concepts and seeds that every one of them has."""
    found: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for cell in cells:
        if cell["arm"] in arms:
            found.setdefault((cell["kind"], cell["number"], cell["seed"]), {})[cell["arm"]] = cell
    return [cell for unit in found.values() if len(unit) == len(set(arms)) for cell in unit.values()]


def curve(cells: Sequence[Cell], arm: str, along: str, points: int = 60) -> tuple[list[float], list[Metric]] | None:
    """The reward of training steps along `along` ("seconds" or "row_steps", summed up), smoothed over three steps,
    on a grid that every run reaches; mean and interval over concepts, whose seeds are averaged."""
    import numpy as np

    runs = [cell for cell in cells if cell["arm"] == arm and len(cell["rows"]) > 1]
    if not runs:
        return None
    lines = []
    for cell in runs:
        x = np.cumsum([row[along] for row in cell["rows"]])
        y = np.array([row["reward"] if row["reward"] is not None else np.nan for row in cell["rows"]], dtype=float)
        y = np.array([np.nanmean(y[max(0, place - 1) : place + 2]) for place in range(len(y))])
        lines.append((f"{cell['kind']}-{cell['number']}", x, y))
    grid = np.linspace(max(x[0] for _, x, _ in lines), min(x[-1] for _, x, _ in lines), points)
    if grid[-1] <= grid[0]:
        return None
    of_concept: dict[str, list[Any]] = {}
    for concept, x, y in lines:
        of_concept.setdefault(concept, []).append(np.interp(grid, x, y))
    values = np.stack([np.mean(seeds, axis=0) for seeds in of_concept.values()], axis=1)
    return grid.tolist(), [bootstrap(column.tolist(), resamples=400) for column in values]


def at_equal_cost(cells: Sequence[Cell], arm: str, other: str, along: str) -> tuple[Metric, int] | None:
    """`arm` − `other` in mean training reward, over as much of `along` as both used, in pairs of concept and seed,
    whose seeds are averaged before the interval over concepts; and the number of pairs."""
    import numpy as np

    runs = {(c["arm"], c["kind"], c["number"], c["seed"]): c["rows"] for c in cells if c["rows"]}
    differences: dict[tuple[str, int], list[float]] = {}
    for (name, *where), rows in runs.items():
        against = runs.get((other, *where))
        if name != arm or against is None:
            continue
        sums = [np.cumsum([row[along] for row in each]) for each in (rows, against)]
        limit = min(total[-1] for total in sums)
        within = [
            [row["reward"] for row, spent in zip(each, total, strict=True) if spent <= limit * (1 + 1e-9)]
            for each, total in zip((rows, against), sums, strict=True)
        ]
        counted = [[reward for reward in rewards if reward is not None] for rewards in within]
        if all(counted):  # where one step of the one costs more than all of the other, there is nothing to compare
            pair = float(np.mean(counted[0]) - np.mean(counted[1]))
            differences.setdefault((where[0], where[1]), []).append(pair)
    if not differences:
        return None
    means = [math.fsum(pairs) / len(pairs) for pairs in differences.values()]
    return bootstrap(means), sum(len(pairs) for pairs in differences.values())
