"""Where the time of a run goes: named phases with seconds and operations, ranges for Nsight, a trace, a table.

    with Recorder(device) as recorder:      # phases inside are timed; outside of one they are almost free
        ...
    recorder.save("phases.json", recorder.report(dtype))

A phase is ``with phase("decode"):`` or a decorated function. Time goes to the innermost phase; on a GPU it is taken by
events, so nothing waits for the device before the end. NVTX ranges are pushed where there is a GPU. What a
phase costs in operations is told to it (`count`), by models/costs.py's arithmetic.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar, Token
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .errors import UserError
from .files import read_json, write_json

PHASES = (
    "prefill",
    "rollout steps",
    "previews",
    "decode",
    "answers",
    "rewards",
    "reference",
    "update",
    "optimizer",
)
"""In the order of a training step; a phase by another name comes after them."""

TRACED_STEPS = 2
"""Training steps that a trace holds: more make files that no viewer opens."""

_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)
_trace: ContextVar[_Trace | None] = ContextVar("trace", default=None)


Mark = float | torch.cuda.Event
"""A moment: of the clock, or on a GPU."""


@functools.cache
def _has_nvtx() -> bool:
    """Whether named ranges can be pushed: torch brings NVTX with its CUDA builds, and a driver must be there."""
    return torch.cuda.is_available()


@dataclass
class PhaseTotal:
    """One phase over a run."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0


@dataclass
class PhaseReport:
    """All phases of a run beside what the machine can do."""

    device: str
    dtype: str
    matrix_flops_per_second: float
    """Of a large square product in `dtype`, measured after the run."""
    seconds: float
    """Wall clock, phases or not."""
    phases: list[PhaseTotal] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    """Parts of a whole that were counted, such as row-steps that ran captured, in 0…1."""
    paths: dict[str, str] = field(default_factory=dict)
    """Which of several ways was taken, by what could be done in several ways."""

    def fraction(self, phase: PhaseTotal) -> float | None:
        """Part of the matrix rate that `phase` reached; None where no operations were counted."""
        if not (phase.flops and phase.seconds and self.matrix_flops_per_second):
            return None
        return phase.flops / phase.seconds / self.matrix_flops_per_second

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> PhaseReport:
        """Read what :meth:`Recorder.save` wrote."""
        content = read_json(Path(file))
        try:
            return cls(**{**content, "phases": [PhaseTotal(**each) for each in content["phases"]]})
        except (TypeError, KeyError) as error:
            raise UserError(f"{file}: not a report of phases ({error})") from None


class Recorder:
    """Adds up the phases of a run on one device. Use it as a context."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._totals: dict[str, PhaseTotal] = {}
        self._shares: dict[str, list[float]] = {}
        self._paths: dict[str, dict[str, None]] = {}
        self._open: list[str] = []
        self._mark: Mark = 0.0
        self._intervals: list[tuple[str, Mark, Mark]] = []
        self._started = 0.0
        self._token: Token[Recorder | None] | None = None

    def __enter__(self) -> Recorder:
        self._started = time.perf_counter()
        self._token = _recorder.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _recorder.reset(self._token)
        self.settle()

    def _now(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def enter(self, name: str) -> None:
        """The phase `name` begins; the one around it stands still."""
        now = self._now()
        self._close_interval(now)
        self._open.append(name)
        self._total(name).calls += 1
        self._mark = now

    def leave(self) -> None:
        """The innermost phase ends."""
        now = self._now()
        self._close_interval(now)
        self._open.pop()
        self._mark = now

    def count(self, name: str, flops: float) -> None:
        """Add operations to the phase `name`."""
        self._total(name).flops += flops

    def share(self, name: str, part: float, whole: float) -> None:
        """Add `part` of `whole` to the share `name`."""
        counted = self._shares.setdefault(name, [0.0, 0.0])
        counted[0] += part
        counted[1] += whole

    def taken(self, name: str, path: str) -> None:
        """`path` was taken where `name` can be done in several ways."""
        self._paths.setdefault(name, {})[path] = None

    def inside(self, name: str) -> bool:
        """Whether the innermost phase is `name`."""
        return bool(self._open) and self._open[-1] == name

    def _total(self, name: str) -> PhaseTotal:
        return self._totals.setdefault(name, PhaseTotal(name))

    def _close_interval(self, now: Mark) -> None:
        if self._open:
            self._intervals.append((self._open[-1], self._mark, now))
            if self.device.type != "cuda":
                self.settle()

    def settle(self) -> None:
        """Turn what was marked into seconds. On a GPU this waits for it, so it is called where one waits anyway."""
        if self._intervals and isinstance(last := self._intervals[-1][2], torch.cuda.Event):
            last.synchronize()
        for name, start, end in self._intervals:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                self._total(name).seconds += start.elapsed_time(end) / 1e3
            elif isinstance(start, float) and isinstance(end, float):
                self._total(name).seconds += end - start
        self._intervals.clear()

    def report(self, dtype: torch.dtype) -> PhaseReport:
        """The phases so far, and the machine's matrix rate in `dtype` (measured now, a fraction of a second)."""
        self.settle()
        order = {name: place for place, name in enumerate(PHASES)}
        phases = sorted(self._totals.values(), key=lambda phase: order.get(phase.name, len(order)))
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        seconds = time.perf_counter() - self._started
        shares = {name: part / whole for name, (part, whole) in self._shares.items() if whole}
        paths = {name: ", ".join(taken) for name, taken in self._paths.items()}
        rate = matrix_rate(self.device, dtype)
        return PhaseReport(name, str(dtype).removeprefix("torch."), rate, seconds, phases, shares, paths)

    @staticmethod
    def save(file: str | os.PathLike[str], report: PhaseReport) -> None:
        """Write a report as JSON, whole or not at all."""
        write_json(Path(file), asdict(report))


class phase(ContextDecorator):
    """A named part of a run, as a context or a decorator. `unless`: inside that phase this one is a part of it."""

    def __init__(self, name: str, *, unless: str = ""):
        self.name, self.unless = name, unless
        self._undo: list[Callable[[], object]] = []

    def _recreate_cm(self) -> phase:
        return phase(self.name, unless=self.unless)  # each call of a decorated function has its own

    def __enter__(self) -> phase:
        recorder = _recorder.get()
        if recorder is not None and not (self.unless and recorder.inside(self.unless)):
            recorder.enter(self.name)
            self._undo.append(recorder.leave)
        if _has_nvtx():
            torch.cuda.nvtx.range_push(self.name)
            self._undo.append(torch.cuda.nvtx.range_pop)
        if _trace.get() is not None:
            named = torch.profiler.record_function(self.name)
            named.__enter__()
            self._undo.append(functools.partial(named.__exit__, None, None, None))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()


def count(name: str, flops: Callable[[], float]) -> None:
    """Add the operations `flops()` to a phase; they are not even computed where nothing is recorded."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.count(name, flops())


def share(name: str, part: float, whole: float) -> None:
    """Add `part` of `whole` to a share of the report (:class:`PhaseReport`)."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.share(name, part, whole)


def taken(name: str, path: str) -> None:
    """Write down which way was taken where there are several."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.taken(name, path)


# --- the machine -----------------------------------------------------------------------------------------------------


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product, the median of five after two to warm up."""
    side = 8192 if device.type == "cuda" else 768
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out, taken = torch.empty_like(left), []
    for turn in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn > 1:
            taken.append(time.perf_counter() - start)
    return 2.0 * side**3 / statistics.median(taken)


# --- traces ----------------------------------------------------------------------------------------------------------


class _Trace:
    """One torch.profiler run that ends after TRACED_STEPS steps, or when its context does."""

    def __init__(self, file: Path):
        self.file, self._steps = file, 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it looks for GPUs, and prints an error for finding none
        self._profile: torch.profiler.profile | None = torch.profiler.profile(activities=activities, acc_events=True)
        self._profile.start()

    def step(self) -> None:
        self._steps += 1
        if self._steps == TRACED_STEPS:
            self.stop()

    def stop(self) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        profile.export_chrome_trace(str(part))
        part.replace(self.file)


@contextmanager
def trace(file: str | os.PathLike[str] | None) -> Iterator[None]:
    """Inside, a torch.profiler trace is taken and written to `file` (chrome://tracing, Perfetto). None: nothing.

    Of training, it holds the first TRACED_STEPS steps.
    """
    if file is None:
        yield
        return
    running = _Trace(Path(file))
    token = _trace.set(running)
    try:
        yield
    finally:
        _trace.reset(token)
        running.stop()


def step_done() -> None:
    """A training step is over: seconds are taken, and a trace may have seen enough."""
    recorder, running = _recorder.get(), _trace.get()
    if recorder is not None:
        recorder.settle()
    if running is not None:
        running.step()
