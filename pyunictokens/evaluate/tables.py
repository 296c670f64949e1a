"""The paper's tables as columns, and rows of means with intervals computed from cells.

A column is one measure of one task. Its value is the mean over concepts of the mean over items (over both halves for
Rec.), an item's value being the mean over its drawings and seeds; the interval is a bootstrap over items, concept by
concept, because drawings of one prompt resemble each other more than drawings of two prompts do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..utils.errors import UserError
from .result import Metric, balanced_bootstrap
from .sample_cache import Cell


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    task: str
    metric: str
    group: str
    """What stands over it in the paper."""
    label: str

    @property
    def key(self) -> str:
        return f"{self.task}.{self.metric}"


TABLE_1 = (
    Column("rec", "weight", "Rec.", "Weight"),
    Column("rea", "bleu", "Rea.", "BLEU"),
    Column("dense_rea", "judge", "Dense Rea.", "Judge"),
    Column("vqa", "bleu", "VQA", "BLEU"),
    Column("vqa", "judge", "VQA", "Judge"),
    Column("qa", "bleu", "QA", "BLEU"),
    Column("qa", "judge", "QA", "Judge"),
    Column("pure", "clip_t", "Pure Gen.", "CLIP-T"),
    Column("pure", "clip_i", "Pure Gen.", "CLIP-I"),
    Column("dense", "judge", "Dense Gen.", "Judge"),
    Column("dense", "clip_i", "Dense Gen.", "CLIP-I"),
    Column("rea_gen", "clip_t", "Rea. Gen.", "CLIP-T"),
    Column("rea_gen", "clip_i", "Rea. Gen.", "CLIP-I"),
    Column("dense_rea_gen", "judge", "Dense Rea. Gen.", "Judge"),
    Column("dense_rea_gen", "clip_i", "Dense Rea. Gen.", "CLIP-I"),
)
"""Table 1 (UnifyBench++); Tables 2 and 3 have the same columns, their rows are other runs of the same model."""

_REC = Column("rec", "weight", "Rec.", "Weight")
TABLES: dict[str, tuple[Column, ...]] = {
    "unify": TABLE_1,
    "yollava": (
        _REC,
        Column("vqa", "accuracy", "VQA", "Acc."),
        Column("qa", "accuracy", "QA", "Acc."),
        Column("pure", "clip_i", "Gen.", "CLIP-I"),
    ),
    "mcllava": (_REC, Column("vqa", "bleu", "VQA", "BLEU"), Column("qa", "accuracy", "QA", "Acc.")),
    "dreambench": (Column("pure", "clip_i", "Gen.", "CLIP-I"), Column("pure", "clip_t", "Gen.", "CLIP-T")),
}
"""Columns by layout: Tables 1, 2, 3 for UnifyBench++, the parts of Table 5 for the other three."""


def item_values(cells: Iterable[Cell], key: str) -> dict[tuple[str, str, str], list[float]]:
    """``{(concept, group, item): one value a seed}`` of one ``task.metric``: the mean over the drawings of each."""
    task, _, metric = key.partition(".")
    found: dict[tuple[str, str, str], list[float]] = {}
    for cell in cells:
        values = cell.scores.get(metric)
        if cell.task == task and values:
            place = found.setdefault((cell.concept, cell.group, cell.item), [])
            place.append(sum(values) / len(values))
    return found


def metric_of(cells: Iterable[Cell], key: str) -> Metric | None:
    """The mean of one ``task.metric`` with its 95 % interval; None where nothing, or one half of Rec., was scored."""
    groups: dict[tuple[str, str], list[float]] = {}
    for (concept, group, _), values in item_values(cells, key).items():
        groups.setdefault((concept, group), []).append(sum(values) / len(values))
    if key.startswith("rec."):  # the weighted score is of both halves
        whole = {concept for concept, _ in groups if {(concept, "positive"), (concept, "negative")} <= set(groups)}
        groups = {place: values for place, values in groups.items() if place[0] in whole}
    return balanced_bootstrap(list(groups.values())) if groups else None


def keys_of(cells: Iterable[Cell]) -> list[str]:
    """Every ``task.metric`` that was scored, in the order of the cells."""
    return list(dict.fromkeys(f"{cell.task}.{name}" for cell in cells for name in cell.scores))


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    model: str
    part: str
    """Which concepts: "all", a concept's name, or a kind."""
    metrics: Mapping[str, Metric]


def rows(cells: Sequence[Cell], by: Callable[[Cell], str] | None = None) -> list[Row]:
    """Rows by model, and by `by` of the cell where given (its concept, its kind)."""
    parts: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        parts.setdefault((cell.model, by(cell) if by else "all"), []).append(cell)
    made = []
    for (model, part), mine in parts.items():
        found = {key: metric_of(mine, key) for key in keys_of(mine)}
        made.append(Row(model, part, {key: metric for key, metric in found.items() if metric is not None}))
    return made


def seed_means(cells: Sequence[Cell], key: str) -> dict[int, float]:
    """The column's mean under each seed alone; {} where there is only one."""
    seeds = sorted({cell.seed for cell in cells if cell.task == key.partition(".")[0]})
    if len(seeds) < 2:
        return {}
    means = {seed: metric_of([cell for cell in cells if cell.seed == seed], key) for seed in seeds}
    return {seed: metric.mean for seed, metric in means.items() if metric is not None}


def compare(first: Sequence[Cell], second: Sequence[Cell]) -> dict[str, Metric]:
    """``{task.metric: second − first}`` over the items both have, measured on pairs.

    Raises UserError when they share no scored item.
    """
    found = {}
    for key in keys_of(first):
        a, b = item_values(first, key), item_values(second, key)
        groups: dict[tuple[str, str], list[float]] = {}
        for place in (place for place in a if place in b):
            difference = sum(b[place]) / len(b[place]) - sum(a[place]) / len(a[place])
            groups.setdefault(place[:2], []).append(difference)
        if groups:
            found[key] = balanced_bootstrap(list(groups.values()))
    if not found:
        raise UserError("the two share no scored item: were they asked about the same concepts and tasks?")
    return found
