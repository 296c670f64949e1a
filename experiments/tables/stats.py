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

from .arms import ARMS

Cell = Mapping[str, Any]


def by_concept(cells: Sequence[Cell], arm: str, key: str) -> dict[str, float]:
    """Mean over the seeds of each concept of one measure of one arm."""
    earlier = key.replace("dense_reasoning_generation.", "dense_reasoning.").replace("samples.", "drawings.")
    found: dict[str, list[float]] = {}
    for cell in cells:
        if cell["arm"] != arm:
            continue
        value = cell["metrics"].get(key, cell["metrics"].get(earlier))  # or its name in an earlier version
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
class Finding:
    """`arm` − `other` by several measures, and which of the differences are clear."""

    differences: Mapping[str, Comparison]
    """By measure, in the order asked for."""
    clear: frozenset[str]

    @property
    def higher(self) -> list[str]:
        return [key for key, each in self.differences.items() if key in self.clear and each.difference.mean > 0]

    @property
    def lower(self) -> list[str]:
        return [key for key, each in self.differences.items() if key in self.clear and each.difference.mean < 0]

    @property
    def undecided(self) -> list[str]:
        return [key for key in self.differences if key not in self.clear]

    @property
    def verdict(self) -> str:
        """Of the claim that `arm` is above `other`: "agrees" where some measure is clearly higher and none lower,
        "disagrees" where one is clearly lower, else "open"."""
        if self.lower:
            return "disagrees"
        return "agrees" if self.higher else "open"


def judge(cells: Sequence[Cell], arm: str, other: str, keys: Sequence[str]) -> Finding:
    """By those of `keys` that were measured. Clear is what Comparison.clear says with Holm's levels: of m measures the
    smallest p must be below 0.05/m, the next below 0.05/(m − 1), and so on up to the first that is not; so a pair that
    differs in nothing is called different by chance once in twenty pairs, not once in twenty measures."""
    found = {key: compare(cells, arm, other, key) for key in keys}
    differences = {key: each for key, each in found.items() if each is not None}
    tested = sorted((each.t_test, key) for key, each in differences.items() if each.t_test is not None)
    clear = set()
    for place, (p, key) in enumerate(tested):
        if p >= 0.05 / (len(tested) - place) or not differences[key].clear:
            break
        clear.add(key)
    return Finding(differences, frozenset(clear))


def spent(cells: Sequence[Cell], arm: str) -> tuple[float, float] | None:
    """Row-steps and seconds of reinforcement that a cell of an arm took, on average; None where there is none."""
    runs = [cell["rows"] for cell in cells if cell["arm"] == arm and cell["rows"]]
    if not runs:
        return None
    row_steps, seconds = (sum(row[key] for rows in runs for row in rows) for key in ("row_steps", "seconds"))
    return row_steps / len(runs), seconds / len(runs)


def thread_seconds(cells: Sequence[Cell]) -> float:
    """What all cells took, the stages that several of a unit share counted once."""
    shared: dict[tuple[Any, ...], float] = {}
    own = 0.0
    for cell in cells:
        parts = dict(cell["seconds"])
        stages, start = parts.pop("stages", 0.0), ARMS[cell["arm"]].start
        begun = "staged" if start == "unic" else start  # the three stages go on from the two, whose seconds they hold
        place = (cell["kind"], cell["number"], cell["seed"], begun)
        shared[place] = max(stages, shared.get(place, 0.0))
        own += sum(parts.values())
    return own + sum(shared.values())


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
