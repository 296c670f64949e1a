"""Threads that each draw images of their own: on a CPU two small images are done sooner on a core each than on both.

A task is a function; what it gives, or raises, is read with `Task.result`. A worker does its tasks in order. Tasks must
share nothing that they write: the engine gives each worker slots of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

SMALL = 100_000_000
"""Parameters up to which a second thread hardly speeds up one image (benchmarks/serve_queue.py measures it)."""

MOST = 2
"""Workers, where it is not said how many."""

MOST_WORKERS = 64
"""Workers that can be asked for."""


def fitting(device: torch.device, parameters: int, threads: int) -> int:
    """How many workers draw the images of such a model best, of a process that computes with so many threads."""
    return min(MOST, threads) if device.type == "cpu" and parameters <= SMALL else 1


class Task(Generic[T]):
    """Work that was given to a worker."""

    def __init__(self, future: Future[T]):
        self._future = future

    @property
    def done(self) -> bool:
        return self._future.done()

    def settle(self) -> None:
        """Wait until it is done, well or not."""
        self._future.exception()

    def result(self) -> T:
        """What it gave; raises what it raised."""
        return self._future.result()


class Workers:
    """`count` threads, each computing with its part of the `threads` of the process."""

    def __init__(self, count: int, threads: int):
        each = max(1, threads // count)
        self._news = threading.Event()
        self._pools = [ThreadPoolExecutor(1, f"draws-{number}", _compute_with, (each,)) for number in range(count)]
        for pool in self._pools:
            pool.submit(int).result()  # it has begun, and set its number of threads
        torch.set_num_threads(threads)  # which torch also took for threads that come later

    def __len__(self) -> int:
        return len(self._pools)

    def submit(self, worker: int, function: Callable[[], T]) -> Task[T]:
        """Have a worker call `function`, without gradients."""

        def call() -> T:
            with torch.no_grad():
                return function()

        future = self._pools[worker].submit(call)
        future.add_done_callback(lambda _: self._news.set())
        return Task(future)

    def wake(self) -> None:
        """End a `wait` that is under way, or the next one. From any thread."""
        self._news.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until a task ends, somebody calls `wake`, or so many seconds have passed."""
        self._news.wait(seconds)
        self._news.clear()


def _compute_with(threads: int) -> None:
    """Set torch's threads of this thread: torch gives it a number at its first look, and would overwrite one that was
    set before."""
    torch.get_num_threads()
    torch.set_num_threads(threads)
