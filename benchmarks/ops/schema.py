"""The one schema of the operations' results: dataclasses that become benchmarks/results/ops-<machine>.json and back.

Knows neither torch nor how anything is measured. A reader (tables, plots) needs this file alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
PHASES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Machine:
    """What the numbers were taken on."""

    name: str
    """Of the GPU where there is one, else of the processor."""
    device: str
    """cpu or cuda."""
    cores: int
    threads: int
    smoke: bool
    """True: tiny shapes, one round; proves that everything runs and says nothing about speed."""


@dataclass(frozen=True)
class Rates:
    """What this machine reaches in the same run, at its start and end: the ceilings that fractions refer to."""

    copy_bytes_per_second: float
    """A large copy, bytes read plus bytes written."""
    matrix_flops_per_second: float
    """A large square matrix product in the dtype of the cases."""
    dtype: str
    drift: float
    """Largest relative difference between the start and the end of the run."""


@dataclass(frozen=True)
class CaseInfo:
    """One workload: what it is and what it must cost at least."""

    operation: str
    shape: str
    sizes: dict[str, float]
    dtype: str
    bound: str
    """matrix or copy: which ceiling the fraction refers to."""
    flops: dict[str, float]
    """By phase: of the matrix products that cannot be avoided."""
    bytes: dict[str, float]
    """By phase: that must move, each input read once, each output written once."""


@dataclass(frozen=True)
class Measurement:
    """One side of one case in one phase."""

    operation: str
    shape: str
    peer: str
    phase: str
    """forward (no gradient wanted), backward (alone, after a forward that is not timed), both."""
    launch: str
    """call (from Python) or graph (replay of a captured CUDA graph)."""
    seconds: float
    """Median."""
    low: float
    high: float
    """Quartiles."""
    rounds: int
    fraction: float | None = None
    """Of the ceiling that bounds the case; None where the case has no floor for the phase."""


@dataclass(frozen=True)
class Memory:
    """Peak of one forward and backward beyond inputs, outputs and the gradients of the inputs."""

    operation: str
    shape: str
    peer: str
    extra_bytes: int
    """As the allocator of torch saw it."""
    resident_bytes: int | None = None
    """On a CPU: growth of the resident set's high-water mark in a process of its own, everything counted."""


@dataclass(frozen=True)
class Check:
    """How far a side is from float64 on a small shape, before it is timed: ‖found − wanted‖ / ‖wanted‖."""

    operation: str
    peer: str
    dtype: str
    value: float
    gradient: float | None


@dataclass(frozen=True)
class Absence:
    """A number that is not there, and why. `shape` "*": at no shape. `what`: time, memory, or graph."""

    operation: str
    shape: str
    peer: str
    reason: str
    what: str = "time"


@dataclass
class Report:
    """One run on one machine."""

    machine: Machine
    versions: dict[str, str]
    commit: str | None
    command: str
    date: str
    rates: Rates | None = None
    peers: dict[str, str] = field(default_factory=dict)
    """Name → title."""
    cases: list[CaseInfo] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)
    what: str = "ops"
    schema: int = VERSION

    def seconds(self, operation: str, shape: str, peer: str, phase: str = "both", launch: str = "call") -> float | None:
        """The median, or None where nothing was measured."""
        found = self.measurement(operation, shape, peer, phase, launch)
        return None if found is None else found.seconds

    def measurement(
        self, operation: str, shape: str, peer: str, phase: str = "both", launch: str = "call"
    ) -> Measurement | None:
        """The measurement, or None where nothing was measured."""
        for one in self.measurements:
            if (one.operation, one.shape, one.peer, one.phase, one.launch) == (operation, shape, peer, phase, launch):
                return one
        return None

    def extra(self, operation: str, shape: str, peer: str) -> Memory | None:
        """The memory, or None where it was not measured."""
        for one in self.memory:
            if (one.operation, one.shape, one.peer) == (operation, shape, peer):
                return one
        return None

    def reason(self, operation: str, shape: str, peer: str, what: str = "time") -> str | None:
        """Why a number is missing, or None where nothing is said about it."""
        for one in self.absences:
            if (one.operation, one.peer, one.what) == (operation, peer, what) and one.shape in ("*", shape):
                return one.reason
        return None

    def save(self, file: Path) -> None:
        """Write as JSON; an interrupted write leaves the old file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Report:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is of another schema.
        """
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content.get("what") != "ops" or content.get("schema") != VERSION:
            found = f"what={content.get('what')!r}, schema={content.get('schema')!r}"
            raise ValueError(f"{file.name}: {found}: must be 'ops' and {VERSION}")
        rates = content.pop("rates")
        lists = {"cases": CaseInfo, "checks": Check, "measurements": Measurement, "memory": Memory, "absences": Absence}
        made: dict[str, Any] = {name: [kind(**each) for each in content.pop(name)] for name, kind in lists.items()}
        machine = Machine(**content.pop("machine"))
        return cls(machine=machine, rates=None if rates is None else Rates(**rates), **made, **content)
