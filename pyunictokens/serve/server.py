"""The server: catalog, engine and routes behind uvicorn, from the first request to an end in good order.

It listens on this machine alone unless it is told otherwise, and then only with keys. When it is asked to end, it takes
nothing more, finishes what waits and runs, and closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from ..rewards.served.connections import Connections, address_of, listen, most_connections, quiet_server
from ..rollout.serving import BATCH_FROM, AsyncEngine, ServingEngine
from ..utils.errors import UserError
from .answering import Answering
from .app import make_app
from .catalog import Catalog
from .drawing import Drawing
from .gate import Gate, GateLimits, this_machine
from .keys import KEY, KEY_FILE, Keys
from .metrics import Metrics
from .pictures import Pictures

_BACKLOG = 256


@dataclass(frozen=True)
class ServerSettings:
    """How the server listens and what it allows."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    max_rows: int = 64
    """Images and answers under way at once."""
    max_waiting: int = 256
    """Images and answers that may wait; more are told to come back."""
    batch_from: int = BATCH_FROM
    """On a CPU: images, running and waiting, from which they are drawn side by side."""
    most_pixels: int = 40_000_000
    """Of a picture that is sent."""
    patience: float = 10.0
    """Seconds in which a connection must have shown a key."""
    grace: float = 60.0
    """Seconds that what runs is given when the server ends."""
    log_prompts: bool = False
    gate: GateLimits = field(default_factory=GateLimits)


class Server:
    """Serves the models of a catalog.

    make_catalog: gives the catalog, of the engine that runs its models. Raises UserError where it cannot listen, or is
    to listen for other machines without a key.
    """

    def __init__(self, make_catalog: Callable[[ServingEngine], Catalog], keys: Keys, settings: ServerSettings):
        if not keys and not this_machine(settings.host):
            raise UserError(
                f"--host {settings.host} can be reached by other machines: set {KEY} or {KEY_FILE} first, or listen "
                "on 127.0.0.1"
            )
        self.settings, self._keys = settings, keys
        self._serving = ServingEngine(settings.max_rows, settings.max_waiting, batch_from=settings.batch_from)
        self.catalog = make_catalog(self._serving)
        self._socket = listen(settings.host, settings.port, _BACKLOG)
        self.port = int(self._socket.getsockname()[1])

    @property
    def address(self) -> str:
        """What clients call it."""
        return address_of(self.settings.host, self.port)

    def serve(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Answer until `stop` says so (asked ten times a second); what waits and runs by then is finished."""
        try:
            asyncio.run(self._serve(stop))
        finally:
            self._socket.close()

    async def _serve(self, stop: Callable[[], bool]) -> None:
        settings, engine = self.settings, AsyncEngine(self._serving)
        pictures = Pictures(settings.most_pixels)
        metrics = Metrics(
            lambda: self._serving.running, lambda: self._serving.queue.waiting, lambda: self.catalog.resident
        )
        parts = (self.catalog, engine, pictures, metrics, settings.log_prompts)
        app = make_app(self.catalog, Drawing(*parts), Answering(*parts), pictures, metrics)
        connections = Connections(settings.patience, most_connections(16, 4096))
        gate = Gate(app, self._keys, metrics, connections, settings.gate)
        server = quiet_server(
            gate,
            connections,
            backlog=_BACKLOG,
            keep_alive=75,
            grace=max(1, round(settings.grace)),
            longest_head=1 << 16,
            dated=True,
        )
        engine.start()
        running = asyncio.create_task(server.serve(sockets=[self._socket]))
        try:
            while not (stop() or running.done()):
                await asyncio.sleep(0.1)
            gate.ending = True
            server.should_exit = True
            await running
        finally:
            await engine.close(1.0)
