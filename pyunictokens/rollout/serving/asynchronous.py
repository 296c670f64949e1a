"""The serving engine in a thread of its own, for asyncio: many coroutines ask, one thread owns models and device.

    async with AsyncEngine(ServingEngine()) as serving:
        async for event in serving.stream(open_model, ImageRequest("A photo of a dog.")):
            ...

A coroutine that is cancelled, or leaves its loop over events early, gives its rows back before the next step. Events
wait in memory until they are read: a request has few, and of previews that were not read in time only the newest is
kept, so a slow reader holds nobody up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import TypeVar

from ...utils.errors import UserError
from ..engine import RolloutEngine
from .engine import ServingEngine
from .requests import Ended, Event, Preview, Request, Taken, Written

log = logging.getLogger(__name__)

T = TypeVar("T")


class Closing(UserError):
    """The engine takes nothing more."""


class Mailbox:
    """The events of one request on their way to one coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._events: deque[Event] = deque()
        self._came = asyncio.Event()

    def put(self, event: Event) -> None:
        """In the loop's thread."""
        if isinstance(event, (Preview, Written)):  # a later one says all that an earlier one of its sample says
            same = [old for old in self._events if type(old) is type(event) and old.sample == event.sample]
            for old in same:
                self._events.remove(old)
        self._events.append(event)
        self._came.set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Each as it comes, to `Ended`; raises the error that it tells of."""
        while True:
            while not self._events:
                self._came.clear()
                await self._came.wait()
            event = self._events.popleft()
            if isinstance(event, Ended) and event.error is not None:
                raise event.error
            yield event
            if isinstance(event, Ended):
                return


class AsyncEngine:
    """Steps `serving` in a thread. Use it as an async context manager, or `start` and `close` it."""

    def __init__(self, serving: ServingEngine):
        self.serving = serving
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._boxes: dict[int, Mailbox] = {}
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)
        self._closing = False
        self._end = False

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    async def close(self, patience: float = 60.0) -> None:
        """Take nothing more, finish what waits and runs, at most `patience` seconds long, and end the thread."""
        self._closing = True

        def ask() -> None:
            self._end = True

        self._calls.put(ask)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._thread.join, patience), patience + 1)
        if self._thread.is_alive():
            ended = Closing("this server was ended before it was done")
            self._calls.put(lambda: self._abort_all(ended))
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close(60.0 if kind is None else 0.0)

    async def call(self, function: Callable[[], T]) -> T:
        """What `function()` gives, called between two steps in the engine's thread, which owns models and device."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # T where there is no error

        def run() -> None:
            result, error = None, None
            try:
                result = function()
            except Exception as raised:  # told to whoever asked
                error = raised
            with contextlib.suppress(RuntimeError):  # its loop has been closed
                loop.call_soon_threadsafe(settle, result, error)

        if self._closing:
            raise Closing("this server is ending and takes nothing more")
        self._calls.put(run)
        return await future

    async def stream(
        self,
        model: RolloutEngine | Callable[[], RolloutEngine],
        request: Request,
        *,
        user: str = "",
        priority: int = 0,
        deadline: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """The events of a request as they come; the first is `Taken`, the last `Ended` without an error.

        model: an open model, or a function that gives it, called in the engine's thread. Raises what `add_request`
        raises before the first event, and the error that a request ended with. Leaving it early aborts the request.
        """
        box = Mailbox(asyncio.get_running_loop())
        added: list[int] = []
        gone = False

        def add() -> int:
            if gone:
                raise Closing("nobody waits for it any more")
            engine = model if isinstance(model, RolloutEngine) else model()
            number = self.serving.add_request(engine, request, user=user, priority=priority, deadline=deadline)
            added.append(number)
            self._boxes[number] = box
            return number

        def forget() -> None:
            for number in added:
                self._boxes.pop(number, None)
                self.serving.abort(number)

        try:
            yield Taken(await self.call(add))
            async for event in box.events():
                yield event
        finally:
            gone = True
            self._calls.put(forget)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                while True:
                    if self.serving.busy:
                        call = self._calls.get_nowait()
                    elif self._end:
                        break
                    else:
                        call = self._calls.get()
                    call()
            except queue.Empty:
                pass
            if self._end and not self.serving.busy:
                return
            try:
                events = self.serving.step()
            except Exception as error:  # a thread that ends would leave everybody waiting
                log.exception("a step failed")
                self._abort_all(error)
            else:
                self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            box = self._boxes.get(event.ticket)
            if isinstance(event, Ended):
                self._boxes.pop(event.ticket, None)
            if box is not None:
                with contextlib.suppress(RuntimeError):  # its loop has been closed
                    box.loop.call_soon_threadsafe(box.put, event)

    def _abort_all(self, error: Exception) -> None:
        for number in list(self._boxes):
            self.serving.abort(number)
            self._tell([Ended(number, error)])
