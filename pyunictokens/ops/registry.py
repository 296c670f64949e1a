"""Which implementation of an operation runs: a table operation → backend → entry, filled by the modules that implement.

A new backend is a file in ops/backends/ that enters what it implements with :func:`offer` (or says with
:func:`mark_unavailable` why it cannot run here, or how to find out), and a line in `BACKENDS`. Whether there is a GPU
is asked when somebody wants to use one, never while the package is imported: the question starts CUDA in this process,
after which no forked child can use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..utils.errors import UserError

BACKENDS: dict[str, tuple[str, ...]] = {
    "reference": (),
    "cpu": ("cpu",),
    "triton": ("cuda",),
    "cuda": ("cuda",),
}
"""Backends by the device types that they are for when none is asked for; of two, the later is taken. The name is that
of the file in ops/backends/, which is imported with the operations. `reference` is the definition; it takes everything.
"""


@dataclass(frozen=True)
class Entry:
    """One implementation of one operation."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    """For operations whose gradient is a second call."""
    devices: tuple[str, ...] = ()
    """Device types it takes; empty: all."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    """Dtypes of its main input that it takes."""


_table: dict[str, dict[str, Entry]] = {}
_unavailable: dict[str, Callable[[], str]] = {}


def offer(operation: str, backend: str, entry: Entry) -> None:
    """Enter one implementation into the table."""
    _table.setdefault(operation, {})[backend] = entry


def mark_unavailable(backend: str, reason: str | Callable[[], str]) -> None:
    """Say why nothing of `backend` can run here, or how to find out: a function that returns the reason or nothing."""
    _unavailable[backend] = reason if callable(reason) else lambda: reason


def unavailable(backend: str) -> str:
    """Why nothing of `backend` can run here; empty where it can."""
    return _unavailable[backend]() if backend in _unavailable else ""


def entry(operation: str, backend: str) -> Entry:
    """The implementation chosen before by :func:`choose`."""
    return _table[operation][backend]


def choose(operation: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend to run: the best that takes this device and dtype, or the one asked for if it does.

    Raises:
        UserError: the backend asked for is unknown, cannot run here, is not offered for the operation, or does not take
            the device or dtype.
    """
    offered = _table[operation]
    if backend is None:
        for name in reversed(BACKENDS):
            if (
                device.type in BACKENDS[name]
                and name in offered
                and not _objection(offered[name], device, dtype)
                and not unavailable(name)
            ):
                return name
        return "reference"
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r}: must be None (the best that can run) or one of {', '.join(BACKENDS)}")
    if reason := unavailable(backend):
        raise UserError(f"backend {backend!r} cannot run here: {reason}; use backend='reference'")
    if backend not in offered:
        raise UserError(f"backend {backend!r} is not offered for {operation}; use backend='reference'")
    objection = _objection(offered[backend], device, dtype)
    if objection:
        raise UserError(f"backend {backend!r} of {operation} {objection}; use backend='reference'")
    return backend


def _objection(candidate: Entry, device: torch.device, dtype: torch.dtype) -> str:
    if candidate.devices and device.type not in candidate.devices:
        return f"does not take tensors on {device.type}, only on {' and '.join(candidate.devices)}"
    if dtype not in candidate.dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in candidate.dtypes)
        return f"does not take {str(dtype).removeprefix('torch.')}, only {names}"
    return ""


def capabilities() -> dict[str, dict[str, Any]]:
    """Which backends can run here, and why the others cannot.

    Returns {backend: {"available": bool, "ops": [names], "reason": str}} for each of
    `BACKENDS`. `reason` is empty for an available backend.
    """
    report = {}
    for backend in BACKENDS:
        operations = sorted(operation for operation, offered in _table.items() if backend in offered)
        reason = unavailable(backend)
        if not reason and not operations:
            reason = f"this version has no {backend} implementation of any operation"
        report[backend] = {"available": not reason, "ops": [] if reason else operations, "reason": reason}
    return report
