"""What every request passes before the application sees it: the key, limits, and clients that are slow or gone.

It is an ASGI application around another. No body is read before its sender is known and its length is allowed; a body
that does not come in time, or an answer that is not taken, ends its request. Each request has an id, is counted, and
leaves one line in the log; prompts are in it only where that was asked for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..rewards.served.connections import Connections
from ..rollout.serving import DeadlinePassed
from .errors import Refused, told, too_many
from .keys import Client, Keys
from .metrics import Metrics, log_request

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]  # as ASGI and Starlette have it
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODIES = 8
"""Bodies that are read at once; others wait."""
OPEN = frozenset({"/health"})
"""Paths that need no key: they say nothing about anybody. Asking for them proves nothing, and no body is read."""
ROUTES = frozenset(
    {
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/chat/completions",
    }
)


@dataclass
class About:
    """What is known of a request, for its handler and for the log."""

    request_id: str
    client: Client
    notes: dict[str, object] = field(default_factory=dict)
    """Filled by the handler: model, number of images and the like."""
    begun: float = field(default_factory=time.monotonic)

    def left(self, deadline: float | None) -> float | None:
        """Seconds until a deadline, which counts from when the request came. Raises DeadlinePassed."""
        if deadline is None:
            return None
        left = self.begun + deadline - time.monotonic()
        if left <= 0:
            raise DeadlinePassed
        return left

    def failed(self, error: BaseException) -> None:
        """Note what went wrong: by its kind, since messages may quote a prompt; in full where nobody foresaw it."""
        self.notes["error"] = type(error).__name__
        if told(error).status == 500:
            log.error("request %s failed", self.request_id, exc_info=error)


@dataclass(frozen=True)
class GateLimits:
    """What a client may send, and how long it may take."""

    body: int = 25 << 20
    """Longest body in bytes."""
    slow: float = 60.0
    """Seconds in which a body must have come, and each part of an answer been taken."""
    bodies: int = 512 << 20
    """Bytes of all bodies of requests under way; more are told to come back."""


class SlowReader(Exception):
    """A client does not take its answer."""


class _Call:
    """One request on its way through: its handler is cancelled when the client goes away."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: GateLimits, request_id: str):
        self._scope, self._receive, self._send, self._limits = scope, receive, send, limits
        self._request_id = request_id
        self._body: bytes | None = b""
        self.length = 0
        """Of the body."""
        self._left = asyncio.Event()
        self._complete = False
        self.status = 0
        """Of the answer, once it has begun."""
        self.gone = False
        """Whether the client went away before it had all of its answer."""

    async def read(self) -> None:
        """Take the body. Raises Refused where it is too long or does not come in time."""
        try:
            self._body = await asyncio.wait_for(self._whole_body(), self._limits.slow)
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not come within {self._limits.slow:g} s") from None

    async def _whole_body(self) -> bytes:
        parts, more = [], True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client went away while it sent its body")
            part, more = bytes(message.get("body", b"")), bool(message.get("more_body"))
            parts.append(part)
            self.length += len(part)
            if self.length > self._limits.body:
                raise Refused(413, f"a body of over {self._limits.body} bytes: that is the limit")
        return b"".join(parts)

    async def run(self, inner: Application) -> None:
        """Have the request handled."""
        handler = asyncio.ensure_future(inner(self._scope, self.receive, self.send))
        watch = asyncio.ensure_future(self._wait_until_left())
        try:
            await asyncio.wait((handler, watch), return_when=asyncio.FIRST_COMPLETED)
            if not handler.done():
                if self._complete:  # what follows an answer is not the client's business
                    await asyncio.wait((handler,))
                else:
                    self.gone = True
                    return
            handler.result()
        finally:
            for task in (handler, watch):
                task.cancel()
            await asyncio.gather(handler, watch, return_exceptions=True)

    async def receive(self) -> Message:
        """The body; after it, that the client has gone."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """A part of the answer, which must be taken in time."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self._request_id.encode())]}
        elif not message.get("more_body", False):
            self._complete = True
        try:
            await asyncio.wait_for(self._send(message), self._limits.slow)
        except asyncio.TimeoutError:
            raise SlowReader from None

    async def _wait_until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set()


class Gate:
    """The ASGI application that is served."""

    def __init__(self, inner: Application, keys: Keys, metrics: Metrics, connections: Connections, limits: GateLimits):
        self._inner, self._keys, self._metrics = inner, keys, metrics
        self._connections, self._limits = connections, limits
        self._room = asyncio.Semaphore(_BODIES)
        self._held = 0
        """Bytes of bodies."""
        self.ending = False
        """Whether nothing more is taken."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._inner(scope, receive, send)
        path = str(scope["path"])
        about = About(secrets.token_hex(8), self._keys.nobody)
        call = _Call(scope, receive, send, self._limits, about.request_id)
        try:
            with ExitStack() as held:
                try:
                    self._admit(scope, path, about, held)
                    if path not in OPEN:
                        async with self._room:
                            await call.read()
                        held.enter_context(self._holding(call.length))
                    scope["state"] = {**scope.get("state", {}), "about": about}
                    await call.run(self._inner)
                except Refused as refused:
                    await self._tell(refused, call.send)
        except (SlowReader, ConnectionError):
            call.gone = True
        except Exception as error:  # nothing a client sends may reach further
            if not call.status:
                about.failed(error)
        finally:
            took, status = time.monotonic() - about.begun, call.status or (499 if call.gone else 500)
            if call.gone:
                self._metrics.aborted.inc()
                about.notes["gone"] = True
            route = path if path in ROUTES else "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(took)
            line = {"request": about.request_id, "key": about.client.settings.name, "method": scope["method"]}
            log_request(**line, route=route, status=status, seconds=round(took, 4), **about.notes)

    def _admit(self, scope: Scope, path: str, about: About, held: ExitStack) -> None:
        """Who it is, and whether they may ask now. Nothing of the body has been read.

        Without keys a page of another site is kept out by the name it asks for: one whose name was made to lead to
        this machine is of the same origin to a browser (DNS rebinding), but still sends that name.
        """
        headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
        if path not in OPEN:
            given = headers.get(b"authorization")
            about.client = self._keys.client(None if given is None else given.decode("latin-1"))
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if not self._keys and not this_machine(re.sub(r":\d*$", "", host).strip("[]")):
                raise Refused(403, f"host {host!r}: without a key, only names of this machine (127.0.0.1, localhost)")
            self._connections.proven(scope.get("client"))
        if self.ending:
            raise Refused(503, "this server is ending and takes nothing more", headers={"retry-after": "5"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._limits.body:
            raise Refused(
                413, f"a body of {length.decode('latin-1')[:20]} bytes: must have at most {self._limits.body}"
            )
        if scope["method"] == "POST":
            held.enter_context(about.client.asking())

    @contextmanager
    def _holding(self, length: int) -> Iterator[None]:
        """Around a request with a body of so many bytes. Raises Refused (429) where there are too many in all."""
        if self._held + length > self._limits.bodies:
            raise too_many(f"bodies of {self._held} bytes are under way: the limit is {self._limits.bodies}", 1.0)
        self._held += length
        try:
            yield
        finally:
            self._held -= length

    async def _tell(self, refused: Refused, tell: Send) -> None:
        error = told(refused)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(error.body))]
        headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
        headers.append((b"connection", b"close"))  # what is left of its body is not read
        await tell({"type": "http.response.start", "status": error.status, "headers": headers})
        await tell({"type": "http.response.body", "body": error.body})


def this_machine(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
