"""A server that strangers can reach: where it listens, how many connections it has, how long one may stay unproven.

uvicorn waits for ever for the head of a request, and takes as many connections as there are file descriptors. Here a
connection that has not proven the key in time is closed, and where there are too many, the oldest unproven one makes
room for the newest, so that silent ones cannot keep a client out that speaks at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from ...utils.errors import UserError, needs

if TYPE_CHECKING:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)


class _Open(Protocol):
    """One connection."""

    @property
    def transport(self) -> asyncio.Transport: ...


class Connections:
    """All connections of one server. patience: seconds until one must be proven; most: how many there may be."""

    def __init__(self, patience: float, most: int):
        self.patience, self.most = patience, most
        self.unproven: dict[object, _Open] = {}
        """By the client's address, the oldest first."""
        self.all: set[_Open] = set()
        self._timers: dict[_Open, asyncio.TimerHandle] = {}

    def proven(self, client: object) -> None:
        """The connection of this address has shown the key."""
        self.unproven.pop(client, None)

    def opened(self, client: object, connection: _Open) -> None:
        self.all.add(connection)
        self.unproven[client] = connection
        self._timers[connection] = asyncio.get_running_loop().call_later(self.patience, self._late, client, connection)
        if len(self.all) > self.most:
            oldest = next(iter(self.unproven))
            self._drop(oldest, self.unproven[oldest])

    def closed(self, client: object, connection: _Open) -> None:
        self.all.discard(connection)
        if timer := self._timers.pop(connection, None):
            timer.cancel()  # it would keep what the connection has read until then
        if self.unproven.get(client) is connection:
            del self.unproven[client]

    def abort_all(self) -> None:
        for connection in list(self.all):
            connection.transport.abort()

    def _late(self, client: object, connection: _Open) -> None:
        if self.unproven.get(client) is connection:
            self._drop(client, connection)

    def _drop(self, client: object, connection: _Open) -> None:
        self.closed(client, connection)
        connection.transport.abort()


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises UserError where it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port}: cannot listen there ({error}): choose another --port or --host") from None


def address_of(host: str, port: int) -> str:
    """What clients call a server there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def most_connections(least: int, most: int) -> int:
    """Half of the files that this process may have open, in these bounds."""
    return max(least, min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


def quiet_server(
    app: Callable[..., Awaitable[None]],
    connections: Connections,
    *,
    backlog: int,
    keep_alive: int,
    grace: int,
    longest_head: int,
    dated: bool,
) -> uvicorn.Server:
    """uvicorn over `app` under the rules of `connections`: it logs nothing, and leaves signals to whoever runs it.

    keep_alive: seconds that a connection may be idle. grace: seconds that requests are given at the end. longest_head:
    bytes. dated: whether answers say when they were made. Serve it in asyncio's loop.
    """
    with needs("serve"):
        import uvicorn

    class Quiet(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Quiet(
        uvicorn.Config(
            app,
            http=_guarded_protocol(connections),
            interface="asgi3",
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            date_header=dated,
            proxy_headers=False,  # a connection is known by its own address, not by what a proxy says of another
            backlog=backlog,
            timeout_keep_alive=keep_alive,
            timeout_graceful_shutdown=grace,
            h11_max_incomplete_event_size=longest_head,
        )
    )


def _guarded_protocol(connections: Connections) -> type[H11Protocol]:
    """uvicorn's HTTP protocol under the rules of `connections`."""
    with needs("serve"):
        from uvicorn.protocols.http.h11_impl import H11Protocol

    class Guarded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.opened(self.client, self)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.closed(self.client, self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            try:
                super().data_received(data)
            except Exception as error:  # bytes that no parser foresaw
                log.warning("%s: closed: %s: %s", self.client, type(error).__name__, error)
                self.transport.abort()

    return Guarded
