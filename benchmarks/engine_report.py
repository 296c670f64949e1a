"""What the engine's GPU command writes: one JSON a machine, and the table and goals that are made from it.

Knows neither torch nor how anything is measured. A number that was scaled up from fewer steps says so; a number that is
missing names its reason.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ops.schema import Machine, Rates

VERSION = 1


@dataclass(frozen=True)
class Number:
    """One side of one piece of work."""

    work: str
    """images, image (a batch of one), image 16×16, answers, grpo T=50: …"""
    side: str
    seconds: float
    """For the whole piece of work, medians of `rounds`; scaled where `note` says so."""
    rounds: int
    amount: float
    """How many of `unit` that makes."""
    unit: str
    flops: float = 0.0
    """Of the work, by the model of costs."""
    peak_bytes: int | None = None
    """Most memory held during it, weights and optimizer included."""
    note: str = ""

    @property
    def rate(self) -> float:
        """`unit` a second."""
        return self.amount / self.seconds


@dataclass
class EngineReport:
    """One run on one machine."""

    machine: Machine
    versions: dict[str, str]
    commit: str | None
    command: str
    date: str
    sizes: dict[str, Any]
    rates: Rates | None = None
    numbers: list[Number] = field(default_factory=list)
    absences: dict[str, str] = field(default_factory=dict)
    """Section → why it has no numbers."""
    checks: dict[str, float] = field(default_factory=dict)
    """Part of codes that a side draws like the eager step."""
    done: list[str] = field(default_factory=list)
    """Sections that were begun."""
    what: str = "engine"
    schema: int = VERSION

    def find(self, work: str, side: str) -> Number | None:
        """The number, or None where nothing was measured."""
        return next((one for one in self.numbers if (one.work, one.side) == (work, side)), None)

    def faster(self, work: str, ours: str, theirs: str) -> float | None:
        """How many times faster `ours` is than `theirs`."""
        mine, other = self.find(work, ours), self.find(work, theirs)
        return mine.rate / other.rate if mine and other else None

    def fraction(self, work: str, side: str) -> float | None:
        """Part of the measured matrix rate that the operations of the work amount to."""
        found = self.find(work, side)
        if found is None or self.rates is None or not found.flops:
            return None
        return found.flops / found.seconds / self.rates.matrix_flops_per_second

    def save(self, file: Path) -> None:
        """Write as JSON; an interrupted write leaves the old file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> EngineReport:
        """Read what :meth:`save` wrote. Raises ValueError for a file of another schema."""
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content.get("what") != "engine" or content.get("schema") != VERSION:
            raise ValueError(f"{file.name}: must be what='engine' of schema {VERSION}")
        rates = content.pop("rates")
        numbers = [Number(**one) for one in content.pop("numbers")]
        machine = Machine(**content.pop("machine"))
        return cls(machine=machine, rates=None if rates is None else Rates(**rates), numbers=numbers, **content)


@dataclass(frozen=True)
class Goal:
    """One number that the engine is held against. `kind`: faster, fraction, memory or flat."""

    text: str
    kind: str
    least: float
    work: str
    ours: str = "loop"
    theirs: str = ""

    def measured(self, report: EngineReport) -> float | None:
        """What the report says, or None."""
        if self.kind == "faster":
            return report.faster(self.work, self.ours, self.theirs)
        if self.kind == "fraction":
            return report.fraction(self.work, self.ours)
        peaks = [one.peak_bytes for one in report.numbers if one.work.startswith("grpo") and one.side == "whole step"]
        known = [peak for peak in peaks if peak is not None]
        if not known or (self.kind == "flat" and len(known) < 2):
            return None
        return max(known) / min(known) if self.kind == "flat" else max(known) / 1e9

    def holds(self, value: float) -> bool:
        """Whether `value` is as good as the goal asks."""
        return value <= self.least if self.kind in ("memory", "flat") else value >= self.least

    def show(self, value: float) -> str:
        """`value` with its unit."""
        units = {"faster": f"{value:.2f} ×", "fraction": f"{value:.0%}", "memory": f"{value:.1f} GB"}
        return units.get(self.kind, f"{value:.3f} ×")


GOALS = (
    Goal("images: 8 × the published loop (float32, one at a time)", "faster", 8.0, "images", theirs="published"),
    Goal(
        "images: 2.5 × the same batched in bfloat16, without cache", "faster", 2.5, "images", theirs="batched bfloat16"
    ),
    Goal("images: 65 % of the matrix rate", "fraction", 0.65, "images"),
    Goal("one image at a time: captured 1.6 × eager", "faster", 1.6, "image", theirs="eager"),
    Goal("answers: 40 × the published loop", "faster", 40.0, "answers", ours="engine", theirs="published"),
    Goal("a whole GRPO step in at most 80 GB", "memory", 80.0, "grpo"),
    Goal("its peak memory is flat in T: at most 1.05 × from fewest to most", "flat", 1.05, "grpo"),
    Goal("the update: 50 % of the matrix rate", "fraction", 0.5, "grpo T=50", ours="update"),
)


def load(folder: Path) -> list[EngineReport]:
    """The reports of a results folder, by file name. Raises ValueError for a smoke run among them."""
    reports = [EngineReport.load(file) for file in sorted(folder.glob("engine-*.json"))]
    for report in reports:
        if report.machine.smoke:
            raise ValueError(f"{report.machine.name}: a smoke run's numbers mean nothing; delete its file")
    return reports


def goals(report: EngineReport | None) -> str:
    """The goals as a table, with what was measured."""
    lines = ["| goal | measured | holds |", "|---|---|---|"]
    for goal in GOALS:
        value = goal.measured(report) if report else None
        cells = ("not measured", "") if value is None else (goal.show(value), "yes" if goal.holds(value) else "**no**")
        lines.append(f"| {goal.text} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def table(report: EngineReport) -> str:
    """Every number of one machine."""
    lines = ["| work | side | rate | of the matrix rate | peak memory | |", "|---|---|---|---|---|---|"]
    for one in report.numbers:
        part = report.fraction(one.work, one.side)
        peak = f"{one.peak_bytes / 1e9:.1f} GB" if one.peak_bytes is not None else ""
        share = f"{part:.0%}" if part is not None else ""
        lines.append(f"| {one.work} | {one.side} | {one.rate:.3g} {one.unit}/s | {share} | {peak} | {one.note} |")
    lines += [f"| {section} | | not measured | | | {reason} |" for section, reason in report.absences.items()]
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """For the README: the goals of each machine; without any, the sentence that says so and how to measure."""
    reports = load(folder)
    if not reports:
        return "The rollout engine on a GPU: not measured; `bash benchmarks/gpu.sh --first` measures it."
    parts = []
    for report in reports:
        sizes = ", ".join(f"{key} {value}" for key, value in report.sizes.items())
        parts.append(f"The rollout engine on {report.machine.name} ({sizes}):\n\n{goals(report)}")
    return "\n\n".join(parts)


def full(folder: Path) -> str:
    """For docs/benchmarks.md: goals and all numbers of each machine."""
    reports = load(folder)
    if not reports:
        return f"### The rollout engine on a GPU\n\nNot measured yet.\n\n{goals(None)}"
    parts = []
    for report in reports:
        rates = report.rates
        ceiling = "" if rates is None else f"; matrix rate {rates.matrix_flops_per_second / 1e12:.0f} TFLOP/s"
        head = f"### The rollout engine on {report.machine.name}\n\n{report.date[:10]}, {report.commit}{ceiling}."
        parts.append(f"{head}\n\n{goals(report)}\n\n{table(report)}")
    return "\n\n".join(parts)
