"""Reward models as an HTTP server, so that trainers generate on while their last images are scored.

    GET  /v1/about       which reward models, with which weights
    GET  /v1/throughput  images a second by reward model
    POST /v1/score       a batch
    POST /v1/preview     DSOG's judge
    POST /v1/faces       embeddings of a person's faces

uvicorn speaks HTTP; the application is here. Requests are worked on one after another, since all of it runs on one
device. A reward model's error goes to whoever asked, word for word. Nothing that a stranger sends ends the server or
holds it: a connection that has not proven the key in time is closed, the oldest such one goes when there are too many,
and no body is read before its sender is known and its length is allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ...utils.errors import UserError, require
from ..base import Device, Rewards
from ..ensemble import Ensemble, as_rewards
from .connections import Connections, address_of, listen, most_connections, quiet_server
from .messages import DIGEST, LIMIT, MEDIA, Exchange, checked_key, decode, encode, tensor, texts, unpack_batch

log = logging.getLogger(__name__)

Message = Mapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Answer = tuple[dict[str, object], dict[str, Tensor]]
Handler = Callable[[Mapping[str, object], Mapping[str, Tensor]], Answer]

_BODIES = 8
"""Requests whose bodies may be in memory at once; others wait to be read."""
_BACKLOG = 64


class _Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class RewardServer:
    """Serves `rewards` on `device` to everyone who has `key`.

    rewards: an `Ensemble`, or whatever `as_rewards` takes. host: where it listens; 127.0.0.1 is this machine alone.
    port: 0 takes a free one, see `port` afterwards. limit: longest body in bytes. patience: seconds in which a
    connection must have proven the key. slow: seconds in which a body must have come, and an answer been taken. Raises
    UserError where it cannot listen.
    """

    def __init__(
        self,
        rewards: object,
        key: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        device: Device = "cpu",
        limit: int = LIMIT,
        patience: float = 10.0,
        slow: float = 120.0,
    ):
        require("uvicorn", "serve")
        self.rewards: Rewards = as_rewards(rewards)
        self.device, self._key, self._limit, self._slow = torch.device(device), checked_key(key), limit, slow
        self.connections = Connections(patience, most_connections(8, 1024))
        self._busy, self._ending = 0, False
        self._closed, self._left = threading.Event(), threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/about": ("GET", self._about),
            "/v1/throughput": ("GET", self._throughput),
            "/v1/score": ("POST", self._score),
            "/v1/preview": ("POST", self._preview),
            "/v1/faces": ("POST", self._faces),
        }
        self._socket = listen(host, port, _BACKLOG)
        self.host, self.port = self._socket.getsockname()[:2]

    @property
    def address(self) -> str:
        """What clients call it."""
        return address_of(self.host, self.port)

    @property
    def names(self) -> list[str]:
        """The reward models' names; none where an ensemble of your own does not say."""
        return sorted(self.rewards.models) if isinstance(self.rewards, Ensemble) else []

    def serve(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Answer until `stop` says so (asked ten times a second) or :meth:`close` is called.

        Who has asked by then is answered; a client that does not take its answer is left after two seconds.
        """
        try:
            asyncio.run(self._serve(stop))
        finally:
            self._left.set()
            self._socket.close()

    def close(self) -> None:
        """Stop listening, and leave everyone at once. May be called from any thread."""
        self._closed.set()
        if self._loop is None:
            return self._socket.close()
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._wake.set)
            self._left.wait(5)

    async def _serve(self, stop: Callable[[], bool]) -> None:
        self._room, self._wake = asyncio.Semaphore(_BODIES), asyncio.Event()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        server = quiet_server(
            self._application,
            self.connections,
            backlog=_BACKLOG,
            keep_alive=3600,
            grace=2,
            longest_head=1 << 14,
            dated=False,
        )
        running = asyncio.create_task(server.serve(sockets=[self._socket]))
        self._loop = asyncio.get_running_loop()
        while not (stop() or self._closed.is_set() or running.done()):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 0.1)
        self._ending = True
        while self._busy and not self._closed.is_set():
            await asyncio.sleep(0.02)
        if self._closed.is_set():
            server.force_exit = True
            for listener in server.servers if server.started else ():
                listener.close()
            self.connections.abort_all()
            self._left.set()
        server.should_exit = True
        await running
        self._device.shutdown(wait=False, cancel_futures=True)

    # --- one request -------------------------------------------------------------------------------------------------

    async def _application(self, scope: Message, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        exchange: Exchange | None = None
        self._busy += 1
        try:
            try:
                exchange = self._admit(scope)
                status, body = await self._answer(exchange, scope, receive)
            except _Refused as refused:
                status, body = refused.status, _told(str(refused))
                if status == 401:
                    log.warning("%s: turned away: %s", scope.get("client"), refused)
            except Exception as error:  # nothing a peer sends may end the server
                log.exception("a request failed")
                status, body = 500, _told(f"{type(error).__name__}: {error}")
            headers = [(b"content-type", MEDIA.encode() if status == 200 else b"application/json")]
            headers.append((b"content-length", b"%d" % len(body)))
            if exchange is not None:
                headers.append((DIGEST.encode(), exchange.answer_digest(status, body).encode()))
            if status != 200:
                headers.append((b"connection", b"close"))  # what is left of its body is not read
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                start = {"type": "http.response.start", "status": status, "headers": headers}
                await asyncio.wait_for(send(start), self._slow)
                await asyncio.wait_for(send({"type": "http.response.body", "body": body}), self._slow)
        finally:
            self._busy -= 1

    def _admit(self, scope: Message) -> Exchange:
        """The exchange that a request's head begins. Raises _Refused before anything of its body is read."""
        method, path = str(scope["method"]), str(scope["path"])
        given = scope["headers"]
        assert isinstance(given, list)
        headers: dict[bytes, bytes] = dict(given)
        length = headers.get(b"content-length", b"0" if method == "GET" else b"")
        if not length.isdigit() or len(length) > 18 or b"transfer-encoding" in headers:
            raise _Refused(411, "a request must have a Content-Length")
        exchange = Exchange.of(self._key, method, path, headers, int(length))
        if exchange is None:
            raise _Refused(401, "Authorization does not prove the key: set it alike on both sides")
        self.connections.proven(scope.get("client"))
        if self._ending:
            raise _Refused(503, "this server is ending")
        if path not in self._routes:
            raise _Refused(404, f"{path}: must be of {', '.join(self._routes)}")
        if method != self._routes[path][0]:
            raise _Refused(405, f"{path}: must be asked with {self._routes[path][0]}")
        if int(length) > self._limit:
            raise _Refused(413, f"a message of {int(length)} bytes: must have at most {self._limit}")
        return exchange

    async def _answer(self, exchange: Exchange, scope: Message, receive: Receive) -> tuple[int, bytes]:
        async with self._room:
            try:
                body = await asyncio.wait_for(_body(receive), self._slow)
            except asyncio.TimeoutError:
                raise _Refused(408, f"the body did not come within {self._slow:g} s") from None
            headers = dict(scope["headers"])  # type: ignore[call-overload]
            if exchange.method == "POST" and not _same(headers.get(DIGEST.encode()), exchange.request_digest(body)):
                raise _Refused(400, "the message was changed on its way: its digest does not fit")
            gone = asyncio.ensure_future(_left(receive))
            try:
                work = lambda: None if gone.done() else self._work(exchange.path, body)  # noqa: E731
                done = await asyncio.get_running_loop().run_in_executor(self._device, work)
            finally:
                gone.cancel()
        return done or (499, b"")

    def _work(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer; in the thread of the device."""
        method, handler = self._routes[path]
        try:
            words, tensors = decode(body) if method == "POST" else ({}, {})
        except UserError as error:
            return 400, _told(str(error))
        try:
            with torch.no_grad():
                return 200, encode(*handler(words, tensors))
        except UserError as error:
            return 422, _told(str(error))
        except BaseException as error:  # foreign code; SystemExit would end the event loop
            log.exception("a request failed")
            return 422, _told(f"{type(error).__name__}: {error}")

    # --- what may be asked -------------------------------------------------------------------------------------------

    def _about(self, words: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Answer:
        weights = self.rewards.weights if isinstance(self.rewards, Ensemble) else {}
        previews, faces = self.rewards.preview_scorer is not None, self.rewards.face_embedding is not None
        return {"models": self.names, "weights": weights, "previews": previews, "faces": faces}, {}

    def _throughput(self, words: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Answer:
        return {"throughput": self.rewards.throughput()}, {}

    def _score(self, words: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Answer:
        found = self.rewards.score(unpack_batch(words, tensors, self.device))
        names = list(found.parts)
        parts = {f"part {place}": found.parts[name] for place, name in enumerate(names)}
        return {"parts": names, "no_face": found.no_face}, {"total": found.total, **parts}

    def _preview(self, words: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Answer:
        if self.rewards.preview_scorer is None:
            raise UserError("no reward model here judges previews: serve BER among them")
        scorer = self.rewards.preview_scorer(texts(words, "prompts"))
        pixels, index = tensor(tensors, "pixels"), tensor(tensors, "index", torch.int64)
        return {}, {"scores": scorer(pixels.to(self.device), index.to(self.device))}

    def _faces(self, words: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Answer:
        if self.rewards.face_embedding is None:
            raise UserError("no reward model here knows faces: serve FER among them")
        return {}, {"faces": self.rewards.face_embedding(tensor(tensors, "pixels").to(self.device))}


def _told(why: str) -> bytes:
    return json.dumps({"error": why}).encode()


def _same(given: bytes | None, wanted: str) -> bool:
    return hmac.compare_digest(given or b"", wanted.encode())


async def _body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refused(400, "the connection was closed before the whole body had come")
        parts.append(bytes(message.get("body", b"")))  # type: ignore[call-overload]
        more = bool(message.get("more_body"))
    return b"".join(parts)


async def _left(receive: Receive) -> None:
    """Returns when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
