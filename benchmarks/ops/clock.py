"""How time is taken: host clock on a CPU, events on a GPU; medians of rounds in which the sides take turns.

Sides take turns so that whatever the machine does meanwhile falls on all of them. A side whose rounds took longer than
its share of time sits out after MIN_ROUNDS, a very slow one after FEWEST. Also measures the two ceilings of a machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .schema import Rates

MIN_ROUNDS, FEWEST = 5, 2


def take(device: str) -> None:
    """Make `device` the current one where it is one of several GPUs: events and graphs are of the current device."""
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    """One call. On a GPU between two events on the present stream; what the call returns is dropped after the clock."""
    if device == "cpu":
        start = time.perf_counter()
        result = call()
        taken = time.perf_counter() - start
    else:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        taken = begin.elapsed_time(end) / 1e3
    del result
    return taken


@dataclass
class Turn:
    """What is timed of one side in one phase: `prepare` runs before the clock, and `run` gets what it returned."""

    run: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None
    samples: list[float] = field(default_factory=list)
    spent: float = 0.0
    """Seconds, the preparation counted."""
    error: Exception | None = None
    """What ended it; it takes no further turn."""

    def take(self, device: str) -> None:
        start = time.perf_counter()
        ready = self.prepare()
        synchronize(device)
        self.samples.append(seconds(lambda: self.run(ready), device))
        self.spent += time.perf_counter() - start

    def summary(self) -> tuple[float, float, float]:
        """Median and quartiles."""
        if len(self.samples) < 2:
            return (self.samples[0],) * 3
        low, middle, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return middle, low, high


def rounds(turns: list[Turn], device: str, count: int, share: float) -> None:
    """`count` rounds of all turns, each one up to `share` seconds but MIN_ROUNDS times at least (or `count`).

    One that took four times its share after FEWEST rounds sits out already then, one that raises at once: its error is
    kept in it, and the others go on.
    """
    for done in range(count):
        for turn in turns if done % 2 == 0 else turns[::-1]:
            least = FEWEST if turn.spent > 4 * share else MIN_ROUNDS
            if turn.error is None and (done < least or turn.spent < share):
                try:
                    turn.take(device)
                except Exception as error:
                    turn.error = error


def _rate(call: Callable[[], object], amount: float, device: str, count: int) -> float:
    for _ in range(2):
        call()
    synchronize(device)
    return amount / statistics.median(seconds(call, device) for _ in range(count))


def ceilings(device: str, dtype: torch.dtype, smoke: bool = False) -> tuple[float, float]:
    """(bytes a second of a large copy, read plus written; operations a second of a large square product)."""
    size, side = (1 << 16, 64) if smoke else (1 << 28, 2048) if device == "cpu" else (1 << 32, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _rate(lambda: target.copy_(source), 2.0 * size, device, 9)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return copy, _rate(lambda: torch.mm(left, right, out=out), 2.0 * side**3, device, 9)


def rates(start: tuple[float, float], end: tuple[float, float], dtype: torch.dtype) -> Rates:
    """The better of both ends of a run, and how far they lie apart."""
    drift = max(abs(a - b) / max(a, b) for a, b in zip(start, end, strict=True))
    best = [max(pair) for pair in zip(start, end, strict=True)]
    return Rates(best[0], best[1], str(dtype).removeprefix("torch."), drift)
