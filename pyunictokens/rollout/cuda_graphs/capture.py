"""Steps without the host: a step captured once as a CUDA graph, and a run of steps as one launch.

    loop      one launch of a graph whose WHILE node runs the captured step until the device says stop (CUDA ≥ 12.4)
    replay    one launch a step, and a look at `keep_going` after each
    eager     the step called as it is; what a CPU does

The best that can run is chosen and the reason kept (`mode`, `why`). The loop is built in csrc/cuda/graph_loop.cu.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ...ops.backends import cpu as _native
from ...utils.errors import UserError

Mode = Literal["auto", "loop", "replay", "eager"]
MODES = ("auto", "loop", "replay", "eager")


def best_mode(device: torch.device) -> tuple[str, str]:
    """The best mode on `device`, and why it is not a better one (or that it is the best)."""
    if device.type != "cuda":
        return "eager", f"the tensors are on {device.type}: there is nothing to capture"
    core = _native.core()
    if core is None or not hasattr(core, "graph_loop_objection"):
        return "replay", "the compiled core has no CUDA part; build it with nvcc: PYUNICTOKENS_CUDA=on pip install -e ."
    objection = core.graph_loop_objection()
    if objection:
        return "replay", objection
    return "loop", "one launch a run"


class GraphPool:
    """Device memory that several captures share. Their runs never overlap, so what is scratch to one may be to all.

    Runs on different streams are put one after the other.
    """

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.handle = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(device)
            self._keeper = torch.cuda.CUDAGraph()  # a pool without any graph could be freed between two captures
            with torch.cuda.graph(
                self._keeper, pool=self.handle, stream=self.stream, capture_error_mode="thread_local"
            ):
                torch.zeros(1, device=device)
        self._last: torch.cuda.Event | None = None

    def enter(self) -> None:
        """The current stream waits for the last run of the pool."""
        if self._last is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last)

    def leave(self) -> None:
        """What was enqueued on the current stream is the last run of the pool."""
        self._last = torch.cuda.Event()
        self._last.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """The host waits for the last run of the pool."""
        if self._last is not None:
            self._last.synchronize()


class CapturedSteps:
    """Runs `step` again and again until `keep_going` (int32, one number, on the step's device) is 0.

    Args:
        step: works on tensors that stay where they are and draws nothing from torch's generators. **While `keep_going`
            is 0 it must change nothing that matters**: warm-up and capture call it so.
        keep_going: looked at before every step; the step sets it, the caller sets it back.
        mode: "auto" takes the best that works; a mode by name raises where it does not.
        pool: memory shared with other captures.
        warmup: calls before the capture, for what is built at the first call; at least 2. The last one may not wait for
            the device.

    Raises:
        UserError: an unknown mode, a mode that cannot run here, or `keep_going` of another type or size.
    """

    def __init__(
        self,
        step: Callable[[], None],
        keep_going: Tensor,
        *,
        mode: Mode = "auto",
        pool: GraphPool | None = None,
        warmup: int = 2,
    ):
        if mode not in MODES:
            raise UserError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
        if keep_going.dtype != torch.int32 or keep_going.numel() != 1:
            raise UserError(
                f"keep_going of shape {tuple(keep_going.shape)} and dtype {keep_going.dtype}: must be one int32"
            )
        if warmup < 2:
            raise UserError(
                f"warmup={warmup}: must be ≥ 2: one builds what is built once, one shows that nothing waits"
            )
        self.step, self.keep_going, self.pool = step, keep_going, pool
        best, reason = best_mode(keep_going.device)
        if mode != "auto" and MODES.index(mode) < MODES.index(best):
            raise UserError(f"mode={mode!r}: cannot run here ({reason}); use mode='{best}' or 'auto'")
        self.mode: str = best if mode == "auto" else mode
        self.why: str = reason if mode == "auto" else "asked for"
        self.capture_seconds = 0.0
        """Warm-up, capture and instantiation: what has to be earned back."""
        self.runs = self.steps = 0
        self._pending = 0
        self._taken: int | None = None
        """Steps of the run under way, where the host counted them; a loop counts on the device, in `_left`."""
        self._ended: torch.cuda.Event | None = None
        """Behind the run under way, where there is no pool that knows it."""
        self._left = torch.zeros(1, dtype=torch.int32, device=keep_going.device)
        self._graph: Any = None
        self._loop = 0
        self._destroy: Callable[[], object] | None = None
        if self.mode != "eager":
            self._prepare(mode, warmup)

    # --- running ---------------------------------------------------------------------------------------------------

    def run(self, max_steps: int) -> int:
        """At most `max_steps` steps, fewer when `keep_going` turns 0. Waits, and returns how many there were."""
        self.launch(max_steps)
        return self.wait()

    def launch(self, max_steps: int) -> None:
        """Begin a run on the current stream; :meth:`wait` ends it. As a loop this does not wait for the device."""
        if self._pending:
            raise UserError("a run of these steps is under way: wait() for it first")
        if max_steps < 0:
            raise UserError(f"max_steps={max_steps}: must be ≥ 0")
        self._pending, self._taken = max_steps, None
        try:
            self._enqueue()
        except BaseException:  # Ctrl-C included: the next run must not think that this one is under way
            self._pending = 0
            raise

    def _enqueue(self) -> None:
        if self.mode == "eager":
            self._one_by_one(self.step)
            self._ended = _event(self.keep_going.device)
            return
        core = _native.core()
        assert self.pool is not None and core is not None
        with torch.cuda.device(self.keep_going.device):
            self.pool.enter()
            if self.mode == "loop":
                self._left.fill_(self._pending)
                core.graph_loop_launch(self._loop, torch.cuda.current_stream(self.keep_going.device).cuda_stream)
            else:
                self._one_by_one(self._graph.replay)
            self.pool.leave()

    def _one_by_one(self, step: Callable[[], None]) -> None:
        taken = 0
        with torch.no_grad():
            while taken < self._pending and int(self.keep_going):
                step()
                taken += 1
        self._taken = taken

    def wait(self) -> int:
        """Wait for the run that :meth:`launch` began; returns how many steps it took."""
        if self.pool is not None:
            self.pool.wait()
        if self._ended is not None:
            self._ended.synchronize()
            self._ended = None
        taken = self._taken
        if taken is None:
            taken = self._pending - int(self._left) if self._pending else 0
        self._pending, self._taken = 0, None
        self.runs, self.steps = self.runs + 1, self.steps + taken
        return taken

    @property
    def capture_seconds_per_step(self) -> float:
        """The time of the capture spread over all steps so far."""
        return self.capture_seconds / max(1, self.steps)

    def report(self) -> str:
        """One line: how the steps ran, why so, and what the capture cost."""
        line = f"{self.mode} ({self.why}), {self.steps} steps in {self.runs} runs"
        if self.mode == "eager":
            return line
        return (
            f"{line}, captured in {self.capture_seconds:.2f} s = {1000 * self.capture_seconds_per_step:.2f} ms a step"
        )

    # --- making ----------------------------------------------------------------------------------------------------

    def _prepare(self, asked: str, warmup: int) -> None:
        started = time.perf_counter()
        device = self.keep_going.device
        if self.pool is None:
            self.pool = GraphPool(device)
        current = torch.cuda.current_stream(device)
        going = self.keep_going.clone()
        self.keep_going.zero_()
        try:
            with torch.cuda.device(device), torch.no_grad():
                self._capture(warmup)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch.cuda.graph does not when the end of the capture fails too
            torch.cuda.synchronize(device)
            reason = f"the step cannot be captured: {str(error).splitlines()[0]}"
            if asked != "auto":
                raise UserError(f"mode={asked!r}: {reason}") from error
            self._graph, self.mode, self.why = None, "eager", reason
        finally:
            self.keep_going.copy_(going)
        if self.mode == "loop":
            self._build_loop(asked)
        if self.mode == "replay":
            self._graph.instantiate()
        self.capture_seconds = time.perf_counter() - started

    def _capture(self, warmup: int) -> None:
        pool = self.pool
        assert pool is not None
        pool.wait()
        current = torch.cuda.current_stream(pool.device)
        pool.stream.wait_stream(current)
        with torch.cuda.stream(pool.stream):
            for _ in range(warmup - 1):
                self.step()
            with _no_waiting():  # a capture that fails midway leaves torch's allocator in doubt: find out before
                self.step()
        current.wait_stream(pool.stream)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"):
            self.step()
        self._graph = graph

    def _build_loop(self, asked: str) -> None:
        core, device = _native.core(), self.keep_going.device
        assert core is not None
        index = torch.cuda.current_device() if device.index is None else device.index
        try:
            self._loop = core.graph_loop_build(
                self._graph.raw_cuda_graph(), self.keep_going.data_ptr(), self._left.data_ptr(), index
            )
        except RuntimeError as error:
            if asked != "auto":
                raise UserError(f"mode={asked!r}: {error}") from error
            self.mode, self.why = "replay", str(error)
            return
        self._destroy = weakref.finalize(self, core.graph_loop_destroy, self._loop)

    def close(self) -> None:
        """Give the graphs back, once nothing of them runs. The object cannot run again."""
        if self.pool is not None:
            self.pool.wait()
        if self._destroy is not None:
            self._destroy()
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._loop, self.step = None, 0, _closed


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event behind what was enqueued on the current stream; None where nothing is enqueued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _closed() -> None:
    raise UserError("these captured steps were closed")


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, an operation that would wait for the device raises RuntimeError, in whichever thread it runs.

    torch has one such switch for all: no other thread may use the device meanwhile (`CapturedSlots.may_capture`).
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- buckets ---------------------------------------------------------------------------------------------------------


def bucket(rows: int) -> int:
    """How many rows a capture for `rows` has: every number to 16, then multiples of 4 to 32, of 8 beyond."""
    if rows < 1:
        raise UserError(f"rows={rows}: must be ≥ 1")
    grain = 1 if rows <= 16 else 4 if rows <= 32 else 8
    return -(-rows // grain) * grain


def signature(tensors: Iterable[Tensor]) -> tuple[Hashable, ...]:
    """Where tensors lie and how. It changes when one is put elsewhere, not when it is written in place."""
    return tuple((t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) for t in tensors)


class Closable(Protocol):
    """Something that gives its memory back."""

    def close(self) -> None: ...


Captured = TypeVar("Captured", bound=Closable)


class CaptureCache(Generic[Captured]):
    """Captures by key (a bucket of rows and what else the graph has fixed), over one shared pool.

    The least recently used leaves when there are more than `limit`; one whose weights moved to other storage is closed
    and made anew. Weights written in place stay valid: a graph reads them when it runs.
    """

    def __init__(self, limit: int = 8):
        if limit < 1:
            raise UserError(f"limit={limit}: must be ≥ 1 capture")
        self.limit = limit
        self.made = self.reused = self.moved = 0
        self._entries: OrderedDict[Hashable, tuple[tuple[Hashable, ...], Captured]] = OrderedDict()
        self._pools: dict[torch.device, GraphPool] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self,
        key: Hashable,
        reads: Iterable[Tensor],
        device: torch.device,
        make: Callable[[GraphPool | None], Captured],
    ) -> Captured:
        """The capture of `key`; `make(pool)` makes one where there is none, or where a tensor that it `reads` moved."""
        now = signature(reads)
        found = self._entries.pop(key, None)
        if found is not None and found[0] != now:
            found[1].close()
            found, self.moved = None, self.moved + 1
        if found is not None:
            self.reused += 1
            self._entries[key] = found
            return found[1]
        while len(self._entries) >= self.limit:
            self._entries.popitem(last=False)[1][1].close()
        made = make(self.pool(device))
        self._entries[key] = (now, made)
        self.made += 1
        return made

    def pool(self, device: torch.device) -> GraphPool | None:
        """The memory that all captures on `device` share; None where nothing is captured."""
        if device.type != "cuda":
            return None
        if device not in self._pools:
            self._pools[device] = GraphPool(device)
        return self._pools[device]

    def close(self) -> None:
        """Close every capture."""
        while self._entries:
            self._entries.popitem(last=False)[1][1].close()
