"""The paper's tables as columns, and rows of means with intervals computed from records.

A column is one measure of one task. Its value is the mean over concepts of the mean over items (over both halves for
Rec.), an item's value being the mean over its images and seeds; the interval is a bootstrap over items, concept by
concept, because images of one prompt resemble each other more than images of two prompts do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..utils.errors import UserError
from .result import Metric, balanced_bootstrap
from .sample_cache import Record
from .tasks import TASKS


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    task: str
    metric: str
    label: str
    group: str = ""
    """What stands over it in the paper, where that is not the task's own heading."""

    @property
    def key(self) -> str:
        return f"{self.task}.{self.metric}"

    @property
    def heading(self) -> str:
        return self.group or TASKS[self.task].paper


_REC = Column("recognition", "weight", "Weight")
TABLE_1 = (
    _REC,
    Column("reasoning", "bleu", "BLEU"),
    Column("reasoning_dense", "judge", "Judge"),
    *(
        Column(task, metric, label)
        for task in ("vqa", "qa")
        for metric, label in (("bleu", "BLEU"), ("judge", "Judge"))
    ),
    Column("pure", "clip_t", "CLIP-T"),
    Column("pure", "clip_i", "CLIP-I"),
    Column("dense", "judge", "Judge"),
    Column("dense", "clip_i", "CLIP-I"),
    Column("reasoning_generation", "clip_t", "CLIP-T"),
    Column("reasoning_generation", "clip_i", "CLIP-I"),
    Column("dense_reasoning_generation", "judge", "Judge"),
    Column("dense_reasoning_generation", "clip_i", "CLIP-I"),
)
"""Table 1 (UnifyBench++); Tables 2 and 3 have the same columns, their rows are other runs of the same model."""

TABLES: dict[str, tuple[Column, ...]] = {
    "unify": TABLE_1,
    "yollava": (
        _REC,
        Column("vqa", "accuracy", "Acc."),
        Column("qa", "accuracy", "Acc."),
        Column("pure", "clip_i", "CLIP-I", "Gen."),
    ),
    "mcllava": (_REC, Column("vqa", "bleu", "BLEU"), Column("qa", "accuracy", "Acc.")),
    "dreambench": (Column("pure", "clip_i", "CLIP-I", "Gen."), Column("pure", "clip_t", "CLIP-T", "Gen.")),
}
"""Columns by layout: Tables 1, 2, 3 for UnifyBench++, the parts of Table 5 for the other three."""


def item_values(records: Iterable[Record], key: str) -> dict[tuple[str, str, str], list[float]]:
    """``{(concept, group, item): one value a seed}`` of one ``task.metric``: the mean over the images of each."""
    task, _, metric = key.partition(".")
    found: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        values = record.scores.get(metric)
        if record.task == task and values:
            place = found.setdefault((record.concept, record.group, record.item), [])
            place.append(sum(values) / len(values))
    return found


def metric_of(records: Iterable[Record], key: str) -> Metric | None:
    """The mean of one ``task.metric`` with its 95 % interval; None where nothing, or one half of Rec., was scored."""
    groups: dict[tuple[str, str], list[float]] = {}
    for (concept, group, _), values in item_values(records, key).items():
        groups.setdefault((concept, group), []).append(sum(values) / len(values))
    if key.startswith("recognition."):  # the weighted score is of both halves
        whole = {concept for concept, _ in groups if {(concept, "positive"), (concept, "negative")} <= set(groups)}
        groups = {place: values for place, values in groups.items() if place[0] in whole}
    return balanced_bootstrap(list(groups.values())) if groups else None


def keys_of(records: Iterable[Record]) -> list[str]:
    """Every ``task.metric`` that was scored, in the order of the records."""
    return list(dict.fromkeys(f"{record.task}.{name}" for record in records for name in record.scores))


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    model: str
    part: str
    """Which concepts: "all", a concept's name, or a kind."""
    metrics: Mapping[str, Metric]


def rows(records: Sequence[Record], by: Callable[[Record], str] | None = None) -> list[Row]:
    """Rows by model, and by `by` of the record where given (its concept, its kind)."""
    parts: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        parts.setdefault((record.model, by(record) if by else "all"), []).append(record)
    made = []
    for (model, part), mine in parts.items():
        found = {key: metric_of(mine, key) for key in keys_of(mine)}
        made.append(Row(model, part, {key: metric for key, metric in found.items() if metric is not None}))
    return made


def seed_means(records: Sequence[Record], key: str) -> dict[int, float]:
    """The column's mean under each seed alone; {} where there is only one."""
    seeds = sorted({record.seed for record in records if record.task == key.partition(".")[0]})
    if len(seeds) < 2:
        return {}
    means = {seed: metric_of([record for record in records if record.seed == seed], key) for seed in seeds}
    return {seed: metric.mean for seed, metric in means.items() if metric is not None}


def compare(first: Sequence[Record], second: Sequence[Record]) -> dict[str, Metric]:
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
