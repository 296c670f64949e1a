"""Several processes that draw and answer for one server: one a GPU, or each with a share of the cores.

Each has models, queue and engine of its own, and a request goes to the one that has the fewest images and answers, so
two rarely wait behind one another while a device is idle. The same seed draws the same image in all of them. One of
them is the server's own process; the others are children, told and heard through a pipe, which end with it. A child
that dies is started again; what it was drawing is refused with a 503, so that clients ask once more.

Messages are pickled: a pipe joins this program's own processes and has no name by which others could reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import pickle
import queue
import signal
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Protocol

import torch

from ..rollout.serving import AsyncEngine, Ended, Event, Request, ServingEngine
from ..rollout.serving.asynchronous import Closing, Mailbox
from ..utils.devices import pick_device, usable_cores
from ..utils.errors import UserError
from .catalog import Catalog, CatalogSettings, Served
from .errors import Refused, Told, told

log = logging.getLogger(__name__)

_LOOK = 0.2
"""Seconds between two looks of a child at what it has to report."""


@dataclass(frozen=True)
class EngineSettings:
    """What each process runs."""

    catalog: CatalogSettings
    max_rows: int
    max_waiting: int
    batch_from: int
    threads: int = 0
    """Of torch's operations on a CPU; 0 leaves torch's choice."""

    def serving(self) -> ServingEngine:
        return ServingEngine(self.max_rows, self.max_waiting, batch_from=self.batch_from)


@dataclass(frozen=True)
class _Ask:
    """Server to child: draw, or answer."""

    number: int
    model: str
    request: Request
    user: str
    priority: int
    deadline: float | None


@dataclass(frozen=True)
class _Leave:
    """Server to child: nobody waits for it any more."""

    number: int


@dataclass(frozen=True)
class _End:
    """Server to child: finish what runs, so many seconds long."""

    patience: float


@dataclass(frozen=True)
class _Heard:
    """Child to server: an event of a request."""

    number: int
    event: Event


@dataclass(frozen=True)
class _Failed:
    """Child to server: a request ended with an error, as its client is told of it."""

    number: int
    told: Told


@dataclass(frozen=True)
class _State:
    """Child to server: how much it has to do."""

    running: int = 0
    waiting: int = 0
    resident: int = 0


class Worker(Protocol):
    """A process that draws and answers."""

    rows: int
    """Images and answers that it was given and has not finished."""

    @property
    def ready(self) -> bool: ...

    @property
    def state(self) -> _State: ...

    def start(self) -> None: ...

    def stream(
        self, served: Served, request: Request, *, user: str, priority: int, deadline: float | None
    ) -> AsyncGenerator[Event, None]: ...

    async def close(self, patience: float) -> None: ...


class OwnProcess:
    """This process."""

    ready = True

    def __init__(self, catalog: Catalog, serving: ServingEngine):
        self._catalog, self._serving, self._engine = catalog, serving, AsyncEngine(serving)
        self.rows = 0

    @property
    def state(self) -> _State:
        return _State(self._serving.running, self._serving.queue.waiting, self._catalog.resident)

    def start(self) -> None:
        self._engine.start()

    def stream(
        self, served: Served, request: Request, *, user: str, priority: int, deadline: float | None
    ) -> AsyncGenerator[Event, None]:
        return self._engine.stream(
            lambda: self._catalog.seat(served), request, user=user, priority=priority, deadline=deadline
        )

    async def close(self, patience: float) -> None:
        await self._engine.close(patience)


class Child:
    """A child process."""

    def __init__(self, number: int, settings: EngineSettings):
        self._number, self._settings = number, settings
        self.rows = 0
        self.ready, self.state = False, _State()
        self._tickets = itertools.count()
        self._boxes: dict[int, Mailbox] = {}
        self._closing = False

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begin()

    def _begin(self) -> None:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_child, args=(theirs, self._settings), name=f"worker {self._number}", daemon=True
        )
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # they reach the whole group; the server ends children
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=_send, args=(ours, self._outbox), daemon=True).start()
        threading.Thread(target=self._receive, args=(ours, self._process), daemon=True).start()

    def _receive(self, connection: Connection, process: SpawnProcess) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            with contextlib.suppress(EOFError, OSError):
                while True:
                    message = pickle.loads(connection.recv_bytes())
                    self._loop.call_soon_threadsafe(self._take, message)
            process.join()
            self._loop.call_soon_threadsafe(self._gone, process)

    def _take(self, message: object) -> None:
        if isinstance(message, _State):
            self.ready, self.state = True, message
        elif isinstance(message, _Heard) and message.number in self._boxes:
            self._boxes[message.number].put(message.event)
        elif isinstance(message, _Failed) and message.number in self._boxes:
            self._boxes[message.number].put(Ended(message.number, _refusal(message.told)))

    def _gone(self, process: SpawnProcess) -> None:
        """The child ended, and not because it was to."""
        self._outbox.put(None)
        was_ready, self.ready, self.state = self.ready, False, _State()
        ended = Refused(
            503, "the process that had this request ended; ask again", code="worker_ended", headers={"retry-after": "1"}
        )
        for number, box in self._boxes.items():
            box.put(Ended(number, ended))
        if self._closing:
            return
        log.error(
            "%s ended (exit code %s) with %d requests%s",
            process.name,
            process.exitcode,
            len(self._boxes),
            ": it is started again" if was_ready else " before it was ready: the others go on without it",
        )
        if was_ready:
            self._begin()

    async def stream(
        self, served: Served, request: Request, *, user: str, priority: int, deadline: float | None
    ) -> AsyncGenerator[Event, None]:
        """As `AsyncEngine.stream`; errors come as Refused, as a client is told of them."""
        if self._closing:
            raise Closing("this server is ending and takes nothing more")
        number, box = next(self._tickets), Mailbox(asyncio.get_running_loop())
        outbox = self._outbox
        self._boxes[number] = box
        outbox.put(_Ask(number, served.name, request, user, priority, deadline))
        try:
            async for event in box.events():
                yield event
        finally:
            del self._boxes[number]
            outbox.put(_Leave(number))

    async def close(self, patience: float) -> None:
        self._closing = True
        self._outbox.put(_End(patience))
        await asyncio.to_thread(self._process.join, patience + 5)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)


class Workers:
    """Gives each request to the process that has least to do.

    workers: this process first."""

    def __init__(self, workers: Sequence[Worker]):
        self._workers = workers

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    async def close(self, patience: float) -> None:
        """Finish what waits and runs, at most `patience` seconds long, and end."""
        await asyncio.gather(*(worker.close(patience) for worker in self._workers))

    async def stream(
        self, served: Served, request: Request, *, user: str, priority: int, deadline: float | None
    ) -> AsyncGenerator[Event, None]:
        """The events of a request (`AsyncEngine.stream`) to the model `served`."""
        ready = [each for each in reversed(self._workers) if each.ready]  # of equal ones a child: HTTP is spoken here
        worker = min(ready, key=lambda each: each.rows)
        worker.rows += request.samples
        try:
            stream = worker.stream(served, request, user=user, priority=priority, deadline=deadline)
            async with aclosing(stream) as events:
                async for event in events:
                    yield event
        finally:
            worker.rows -= request.samples

    @property
    def ready(self) -> int:
        """Processes that take requests."""
        return sum(worker.ready for worker in self._workers)

    @property
    def running(self) -> int:
        """Images and answers under way."""
        return sum(worker.state.running for worker in self._workers)

    @property
    def waiting(self) -> int:
        """Images and answers that wait."""
        return sum(worker.state.waiting for worker in self._workers)

    @property
    def resident(self) -> int:
        """Concepts at hand, one that two processes hold counted twice."""
        return sum(worker.state.resident for worker in self._workers)


def shared_out(settings: EngineSettings, workers: int) -> list[EngineSettings]:
    """What each of so many processes runs: on a GPU of its own, or with its share of the cores.

    Raises UserError where there are fewer GPUs, or one of them was named."""
    if workers == 1:
        return [settings]
    name = settings.catalog.device
    device = pick_device(name)
    if device.type == "cpu":
        return [replace(settings, threads=max(1, usable_cores() // workers))] * workers
    found = torch.cuda.device_count()
    if device.index is not None:
        raise UserError(f"--workers {workers} with --device {name}: leave out the number; each worker has a GPU")
    if workers > found:
        raise UserError(f"--workers {workers}: torch sees {found} GPUs here, and each worker needs one")
    return [replace(settings, catalog=replace(settings.catalog, device=f"cuda:{number}")) for number in range(workers)]


def _refusal(told: Told) -> Refused:
    return Refused(told.status, told.message, param=told.param, code=told.code, headers=told.headers)


def _send(connection: Connection, outbox: queue.SimpleQueue[object]) -> None:
    """A thread of its own, because a pipe that nobody reads blocks."""
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            connection.send_bytes(pickle.dumps(message))


# --- the child -------------------------------------------------------------------------------------------------------


def _child(connection: Connection, settings: EngineSettings) -> None:
    logging.basicConfig(format="%(processName)s: %(message)s")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    serving = settings.serving()
    asyncio.run(_Asked(connection, settings.catalog.open(serving), serving).serve())


class _Asked:
    """What a child was asked and does."""

    def __init__(self, connection: Connection, catalog: Catalog, serving: ServingEngine):
        self._connection, self._engine = connection, OwnProcess(catalog, serving)
        self._catalog = catalog
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Until the server says that it is enough, or is gone."""
        loop = asyncio.get_running_loop()
        self._ending: asyncio.Future[float] = loop.create_future()
        threading.Thread(target=self._receive, args=(loop,), daemon=True).start()
        self._engine.start()
        said = None
        while not self._ending.done():
            if self._engine.state != said:
                said = self._engine.state
                self._tell(said)
            await asyncio.wait([self._ending], timeout=_LOOK)
        patience = self._ending.result()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=patience)
        await self._engine.close(0.0)

    def _receive(self, loop: asyncio.AbstractEventLoop) -> None:
        message: object = None
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            while not isinstance(message, _End):
                try:
                    message = pickle.loads(self._connection.recv_bytes())
                except (EOFError, OSError):  # the server is gone
                    message = _End(0.0)
                loop.call_soon_threadsafe(self._take, message)

    def _take(self, message: object) -> None:
        if isinstance(message, _Ask):
            task = self._tasks[message.number] = asyncio.create_task(self._answer(message))
            task.add_done_callback(lambda _: self._tasks.pop(message.number))
        elif isinstance(message, _Leave) and message.number in self._tasks:
            self._tasks[message.number].cancel()
        elif isinstance(message, _End):
            self._ending.set_result(message.patience)

    async def _answer(self, ask: _Ask) -> None:
        try:
            served = await self._catalog.opened(ask.model)
            stream = self._engine.stream(
                served, ask.request, user=ask.user, priority=ask.priority, deadline=ask.deadline
            )
            async with aclosing(stream) as events:
                async for event in events:
                    self._tell(_Heard(ask.number, event))
        except Exception as error:
            said = told(error)
            if said.status == 500:
                log.error("a request failed", exc_info=error)
            self._tell(_Failed(ask.number, said))

    def _tell(self, message: object) -> None:
        with contextlib.suppress(OSError):  # the server is gone: the other thread ends this
            self._connection.send_bytes(pickle.dumps(message))
