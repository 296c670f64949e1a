"""Where reward models run and how fast: side by side on a GPU, or one after another with the others off the device.

`together` keeps every network on the device and gives each model a CUDA stream of its own, so that small networks fill
the gaps of large ones. `lean` brings a network to the device, asks it, and takes it off again: the peak is the largest
one instead of their sum. `auto` chooses by the memory that is free when a device is first used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from ..utils.errors import UserError
from .base import Device, Movable, Weighed

R = TypeVar("R")

MODES = ("auto", "together", "lean")
_ACTIVATIONS = 2 << 30
"""Bytes kept free for what the networks compute on the way, when `auto` chooses."""


def fits(weights: int, free: int) -> bool:
    """Whether networks of `weights` bytes can stay on a device with `free` bytes."""
    return weights + _ACTIVATIONS <= free


class Throughput:
    """Images and seconds by model. On a GPU times are taken by events and read when somebody asks, not before."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, name: str, rows: int, seconds: float) -> None:
        self._rows[name] = self._rows.get(name, 0) + rows
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def add_events(self, name: str, rows: int, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._rows[name] = self._rows.get(name, 0) + rows
        self._open.append((name, begin, end))
        if len(self._open) > 256:
            self._settle()

    def _settle(self) -> None:
        for name, begin, end in self._open:
            end.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        self._open.clear()

    def per_second(self) -> dict[str, float]:
        """Images a second by model, over everything asked so far. Side by side, models share the device's time."""
        self._settle()
        return {name: self._rows[name] / seconds for name, seconds in self._seconds.items() if seconds > 0}

    def clear(self) -> None:
        self._rows.clear()
        self._seconds.clear()
        self._open.clear()


class Placement:
    """Runs one job a model. A model that has `to(device)` can be moved, one that has `bytes` can be weighed.

    home: where networks rest in lean mode.
    """

    def __init__(self, memory: str = "auto", home: Device = "cpu"):
        if memory not in MODES:
            raise UserError(f"memory={memory!r}: must be {', '.join(MODES)}")
        self.memory = memory
        self.home = torch.device(home)
        self.throughput = Throughput()
        self._chosen: dict[torch.device, str] = {}
        self._streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}

    def mode(self, models: Mapping[str, object], device: torch.device) -> str:
        """together or lean, for these models on this device."""
        if self.memory != "auto":
            return self.memory
        if device.type != "cuda":
            return "together"
        if device not in self._chosen:
            for model in models.values():
                _move(model, self.home)  # weighed there: all of them might not fit together
            free, _ = torch.cuda.mem_get_info(device)
            weights = sum(model.bytes for model in models.values() if isinstance(model, Weighed))
            self._chosen[device] = "together" if fits(weights, free) else "lean"
        return self._chosen[device]

    def run(
        self, models: Mapping[str, object], ask: Callable[[str], R], rows: int, device: torch.device
    ) -> dict[str, R]:
        """``{name: ask(name)}``, with every model's network on `device` while it is asked."""
        if self.mode(models, device) == "lean":
            return {name: self._visit(name, model, ask, rows, device) for name, model in models.items()}
        for model in models.values():
            _move(model, device)
        if device.type != "cuda":
            return {name: self._timed(name, ask, rows) for name in models}
        return self._side_by_side(list(models), ask, rows, device)

    def _visit(self, name: str, model: object, ask: Callable[[str], R], rows: int, device: torch.device) -> R:
        _move(model, device)
        try:
            return self._timed(name, ask, rows, device)
        finally:
            _move(model, self.home)

    def _timed(self, name: str, ask: Callable[[str], R], rows: int, device: torch.device | None = None) -> R:
        begin = time.perf_counter()
        result = ask(name)
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.throughput.add(name, rows, time.perf_counter() - begin)
        return result

    def _side_by_side(self, names: list[str], ask: Callable[[str], R], rows: int, device: torch.device) -> dict[str, R]:
        current = torch.cuda.current_stream(device)
        results: dict[str, R] = {}
        used = []
        try:
            for name in names:
                stream = self._streams.setdefault((device, name), torch.cuda.Stream(device))
                stream.wait_stream(current)
                used.append(stream)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with torch.cuda.stream(stream):
                    begin.record(stream)
                    results[name] = ask(name)
                    end.record(stream)
                self.throughput.add_events(name, rows, begin, end)
        finally:
            for stream in used:
                current.wait_stream(stream)
        return results


def _move(model: object, device: torch.device) -> None:
    if isinstance(model, Movable):
        model.to(device)
