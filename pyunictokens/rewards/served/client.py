"""Reward experts that run elsewhere: what training and evaluation ask of an ensemble, answered by servers (server.py).

    experts = RemoteRewards.open("tcp://10.0.0.2:7000,tcp://10.0.0.3:7000?timeout=120")
    scoring = experts.submit(batch)      # returns at once; draw the next group meanwhile
    scoring.result().total               # [R]

**The contract of `submit`.** An ensemble that has ``submit(batch) -> Future[EnsembleScore]`` may be asked that way, and
its caller may go on until it needs the result; ``score(batch)`` is ``submit(batch).result()``. One without it is asked
with `score`.

Scoring has no state, so a request whose connection is lost is simply asked again: of the other servers, and after a
wait once more of all. A server that is there but silent is not asked twice: what keeps it is most likely the request.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from torch import Tensor

from ...utils.errors import UserError
from ..base import EnsembleScore, FaceEmbedding, PreviewJudge, RewardBatch
from ..ensemble import noted
from .wire import LIMIT, decode, encode, pack_batch, read_key, shake_hands, tensor, texts

log = logging.getLogger(__name__)

SCHEME = "tcp://"
TIMEOUT = 300.0
_CONNECT = 10.0
"""Longest wait in seconds for a connection."""


_REST = 60.0
"""Seconds for which a server that was lost is asked only after the others."""


class _Lost(Exception):
    """A connection could not be had, or broke."""


def parse_addresses(text: str) -> tuple[list[tuple[str, int]], float]:
    """([(host, port), …], seconds) of ``tcp://HOST:PORT[,tcp://HOST:PORT…][?timeout=S]``. Raises UserError."""
    places, timeout = [], TIMEOUT
    for part in text.split(","):
        wrong = UserError(f"experts at {part.strip()!r}: must be tcp://HOST:PORT, or several with commas; ?timeout=S")
        try:
            found = urlsplit(part.strip())
            host, port, options = (
                found.hostname,
                found.port,
                dict(parse_qsl(found.query, strict_parsing=bool(found.query))),
            )
            timeout = float(options.pop("timeout", timeout))
        except ValueError:
            raise wrong from None
        if found.scheme != "tcp" or not host or not port or found.path or found.username is not None or options:
            raise wrong
        places.append((host, port))
    return places, timeout


@dataclass
class _Server:
    """One server as a client sees it: a connection that is opened when needed, one request at a time."""

    host: str
    port: int
    key: bytes
    timeout: float
    pending: int = 0
    lost: float = -math.inf
    """When its connection was last lost, on the monotonic clock."""
    turn: threading.Lock = field(default_factory=threading.Lock)
    connection: Connection | None = None

    @property
    def address(self) -> str:
        return f"{SCHEME}{self.host}:{self.port}"

    def ask(self, request: bytes) -> bytes:
        """The answer's bytes. Raises _Lost where the connection is, UserError for a wrong key or a time-out."""
        with self.turn:
            try:
                if self.connection is None:
                    self.connection = self._connect()
                self.connection.send_bytes(request)
                return self.connection.recv_bytes(LIMIT)
            except BlockingIOError:  # the system's time-out of a read or write
                self._drop()
                raise UserError(
                    f"experts at {self.address} gave no answer in {self.timeout:g} s: look there, or give more time: "
                    f"{self.address}?timeout={2 * self.timeout:g}"
                ) from None
            except (OSError, EOFError) as error:
                self._drop()
                self.lost = time.monotonic()
                raise _Lost(str(error) or "the other side hung up") from error
            except BaseException:
                self._drop()
                raise

    def _connect(self) -> Connection:
        raw = socket.create_connection((self.host, self.port), min(_CONNECT, self.timeout))
        try:
            return shake_hands(raw, self.key, serving=False, silence=self.timeout)
        except BlockingIOError:
            raise OSError("it says nothing: are experts served there?") from None
        except AuthenticationError:
            raise UserError(
                f"experts at {self.address} have another key: set PYUNICTOKENS_EXPERTS_KEY alike on both sides"
            ) from None
        finally:
            raw.close()

    def _drop(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def close(self) -> None:
        with self.turn:
            self._drop()


class RemoteRewards:
    """An ensemble whose experts are at `addresses`, all with the same experts and weights.

    addresses: (host, port) of each server; requests go to the one with the fewest waiting, in turn where equal.
    timeout: seconds one answer may take, its wait behind other requests included. backoff: seconds before a lost
    connection is tried again.

    Raises UserError naming the address when a server cannot be reached, has another key, or serves other experts.
    """

    def __init__(
        self, addresses: Sequence[tuple[str, int]], authkey: bytes, timeout: float = TIMEOUT, backoff: float = 2.0
    ):
        if not addresses:
            raise UserError("no addresses of experts: give at least one, tcp://HOST:PORT")
        if not 0 < timeout < 1e6:
            raise UserError(f"timeout={timeout}: must be seconds above 0 and below 1e6")
        self.backoff = backoff
        self._servers = [_Server(host, port, authkey, timeout) for host, port in addresses]
        self._lock, self._first = threading.Lock(), 0
        self._pool = ThreadPoolExecutor(len(self._servers), thread_name_prefix="experts")
        about = [self._hello(server) for server in self._servers]
        for server, found in zip(self._servers, about, strict=True):
            if found != about[0]:
                raise UserError(
                    f"experts at {server.address} are {found}, at {self._servers[0].address} {about[0]}: "
                    "serve the same everywhere"
                )
        self.experts: tuple[str, ...] = tuple(texts(about[0], "experts"))
        self.preview_scorer: PreviewJudge | None = self._preview_scorer if about[0].get("previews") else None
        """As of an expert of previews (DSOG), ``preview_scorer(prompts)(pixels, prompt_index)``; None without BER."""
        self.face_embedding: FaceEmbedding | None = self._face_embedding if about[0].get("faces") else None
        """From photos [B, 3, H, W] of a person to embeddings of the faces [B, D]; None without FER."""

    @classmethod
    def open(cls, text: str) -> RemoteRewards:
        """The experts at ``tcp://HOST:PORT,…``, with the key from the environment."""
        places, timeout = parse_addresses(text)
        return cls(places, read_key(), timeout)

    def score(self, batch: RewardBatch) -> EnsembleScore:
        """Total and parts, [R] each, on the device of the images. Raises UserError as the ensemble itself does."""
        message, tensors = pack_batch(batch)
        return self._scored(encode({"do": "score", **message}, tensors), list(batch.prompts), batch.images.device)

    def submit(self, batch: RewardBatch) -> Future[EnsembleScore]:
        """:meth:`score` in the background; as many at once as there are servers, the others wait."""
        message, tensors = pack_batch(batch)
        request = encode({"do": "score", **message}, tensors)  # now: the caller may reuse its tensors
        return self._pool.submit(self._scored, request, list(batch.prompts), batch.images.device)

    def throughput(self) -> dict[str, float]:
        """Rows a second by expert, over all servers and everyone they have served. A server that is gone counts 0."""
        total: dict[str, float] = {}
        for server in self._servers:
            try:
                found = _read(server, server.ask(encode({"do": "throughput"})))[0].get("throughput")
            except (UserError, _Lost) as error:
                log.warning("experts at %s do not say how fast they are: %s", server.address, error)
                continue
            for name, rate in found.items() if isinstance(found, dict) else ():
                total[name] = total.get(name, 0.0) + float(rate)
        return total

    def close(self) -> None:
        """Leave the servers. Requests under way are finished first."""
        self._pool.shutdown()
        for server in self._servers:
            server.close()

    def _hello(self, server: _Server) -> Mapping[str, Any]:
        try:
            return _read(server, server.ask(encode({"do": "hello"})))[0]
        except _Lost as error:
            raise UserError(
                f"experts at {server.address} cannot be reached ({error}): start them there with "
                f"`pyunictokens experts serve --host HOST --port {server.port}`, or correct the address"
            ) from None

    def _scored(self, request: bytes, prompts: list[str], device: torch.device) -> EnsembleScore:
        message, tensors = self._ask(request)
        names, absent = texts(message, "parts"), message.get("no_face")
        total = _rows(tensors, "total", len(prompts)).to(device)
        parts = {name: _rows(tensors, f"part {place}", len(prompts)).to(device) for place, name in enumerate(names)}
        return noted(EnsembleScore(total, parts, absent if isinstance(absent, int) else 0), prompts)

    def _preview_scorer(self, prompts: Sequence[str], /) -> Callable[[Tensor, Tensor], Tensor]:
        prompts = list(prompts)

        def scorer(pixels: Tensor, prompt_index: Tensor) -> Tensor:
            given = {"pixels": pixels, "index": prompt_index.to(torch.int64)}
            _, tensors = self._ask(encode({"do": "preview", "prompts": prompts}, given))
            return _rows(tensors, "scores", len(pixels)).to(pixels.device)

        return scorer

    def _face_embedding(self, pixels: Tensor) -> Tensor:
        _, tensors = self._ask(encode({"do": "faces"}, {"pixels": pixels}))
        return tensor(tensors, "faces").to(pixels.device)

    def _ask(self, request: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The answer of the first server that has one."""
        why = ""
        for attempt in range(2):
            if attempt:
                time.sleep(self.backoff)
            for server in self._in_turn():
                with self._lock:
                    server.pending += 1
                try:
                    return _read(server, server.ask(request))
                except _Lost as error:
                    why = f"{server.address} ({error})"
                    log.warning("experts at %s: the connection is lost", why)
                finally:
                    with self._lock:
                        server.pending -= 1
        raise UserError(
            f"experts at {why} are lost, and no other answers: start them again and go on with --resume; tried twice, "
            f"{self.backoff:g} s apart"
        )

    def _in_turn(self) -> list[_Server]:
        with self._lock:
            self._first = (self._first + 1) % len(self._servers)
            order = self._servers[self._first :] + self._servers[: self._first]
            now = time.monotonic()
            return sorted(order, key=lambda server: (now - server.lost < _REST, server.pending))


def _read(server: _Server, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        message, tensors = decode(data)
    except UserError as error:
        raise UserError(f"experts at {server.address} sent {error}") from None
    if "error" in message:
        raise UserError(str(message["error"]))  # word for word what they would have said here
    return message, tensors


def _rows(tensors: Mapping[str, Tensor], name: str, rows: int) -> Tensor:
    found = tensor(tensors, name)
    if found.shape != (rows,):
        raise UserError(f"the experts' {name} is {tuple(found.shape)} for {rows} rows: must be [{rows}]")
    return found
