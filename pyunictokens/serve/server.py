"""The server: catalog, engine and routes behind uvicorn, from the first request to an end in good order.

It listens on this machine alone unless it is told otherwise, and then only with keys. When it is asked to end, it takes
nothing more, finishes what waits and runs, and closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..rewards.served.connections import Connections, address_of, listen, most_connections, quiet_server
from ..rollout.serving import BATCH_FROM
from ..utils.errors import UserError
from .answering import Answering
from .app import make_app
from .catalog import CatalogSettings
from .drawing import Drawing
from .gate import Gate, GateLimits, this_machine
from .keys import KEY, KEY_FILE, Keys
from .metrics import Metrics
from .pictures import Pictures
from .workers import Child, EngineSettings, OwnProcess, Workers, shared_out

_BACKLOG = 256


@dataclass(frozen=True)
class ServerSettings:
    """How the server listens and what it allows."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    workers: int = 1
    """Processes that draw and answer: one a GPU, or each with a share of the cores."""
    max_rows: int = 64
    """Images and answers under way at once, in each of them."""
    max_waiting: int = 256
    """Images and answers that may wait, in each; more are told to come back."""
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

    Raises UserError where it cannot listen, is to listen for other machines without a key, or has fewer GPUs than
    workers.
    """

    def __init__(self, models: CatalogSettings, keys: Keys, settings: ServerSettings):
        if not keys and not this_machine(settings.host):
            raise UserError(
                f"--host {settings.host} can be reached by other machines: set {KEY} or {KEY_FILE} first, or listen "
                "on 127.0.0.1"
            )
        self.settings, self._keys = settings, keys
        each = EngineSettings(models, settings.max_rows, settings.max_waiting, settings.batch_from)
        own, *others = shared_out(each, settings.workers)
        serving = own.serving()
        self.catalog = own.catalog.open(serving)
        self.workers = Workers([OwnProcess(self.catalog, serving), *(Child(at, it) for at, it in enumerate(others, 1))])
        self._threads = own.threads
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
        settings, workers = self.settings, self.workers
        pictures, metrics = Pictures(settings.most_pixels), Metrics(workers)
        parts = (self.catalog, workers, pictures, metrics, settings.log_prompts)
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
        if self._threads:
            torch.set_num_threads(self._threads)
        workers.start()
        running = asyncio.create_task(server.serve(sockets=[self._socket]))
        try:
            while not (stop() or running.done()):
                await asyncio.sleep(0.1)
            gate.ending = True
            server.should_exit = True
            await running
        finally:
            await workers.close(1.0)
