"""Reward models that run elsewhere: what training and evaluation ask of an ensemble, answered by servers (server.py).

    rewards = RemoteRewards.open("http://10.0.0.2:7000,http://10.0.0.3:7000?timeout=120")
    scoring = rewards.submit(batch)      # returns at once; generate the next group meanwhile
    scoring.result().total               # [R]

Scoring has no state, so a request whose connection is lost is simply asked again: of the other servers, and after a
wait once more of all. A server that is there but silent is not asked twice: what keeps it is most likely the request.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

import torch
from torch import Tensor

from ...utils.errors import UserError, require
from ..background import Background
from ..base import EnsembleScore, FaceEmbedding, PreviewJudge, PreviewScorer, RewardBatch
from ..ensemble import noted
from .messages import (
    DIGEST,
    KEY,
    LIMIT,
    Exchange,
    Tensors,
    Words,
    checked_key,
    decode,
    encode,
    pack_batch,
    read_key,
    texts,
)
from .messages import tensor as tensor_of

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

TIMEOUT = 300.0
_CONNECT = 10.0
"""Longest wait in seconds for a connection."""
_REST = 60.0
"""Seconds for which a server that was lost is asked only after the others."""
_LARGEST = 1e6
"""A score beyond this is no score: the answer is damaged, or not from a server of ours."""


class _Lost(Exception):
    """A connection could not be had, or broke."""


def parse_addresses(text: str) -> tuple[list[str], float]:
    """([http://HOST:PORT, …], seconds) of ``http://HOST:PORT[,http://HOST:PORT…][?timeout=S]``. Raises UserError."""
    places, timeout = [], TIMEOUT
    for part in (each.strip() for each in text.split(",")):
        wrong = UserError(f"reward models at {part!r}: must be http://HOST:PORT, or several with commas; ?timeout=S")
        try:
            found = urlsplit(part)
            options = dict(parse_qsl(found.query, strict_parsing=bool(found.query)))
            host, port = found.hostname, found.port
            timeout = float(options.pop("timeout", timeout))
        except ValueError:
            raise wrong from None
        known = found.scheme in {"http", "https", "tcp"} and host and found.path in {"", "/"}
        if not known or not port or found.username is not None or options or found.fragment:
            raise wrong
        if found.scheme == "tcp":
            warnings.warn(f"{part}: reward models are served over HTTP now: write http://{found.netloc}", stacklevel=2)
        places.append(f"{'https' if found.scheme == 'https' else 'http'}://{found.netloc}")
    return places, timeout


@dataclass
class _Server:
    """One server as a client sees it: one request at a time, so that waiting here costs no patience there."""

    address: str
    pending: int = 0
    lost: float = -math.inf
    """When its connection was last lost, on the monotonic clock."""
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))


class RemoteRewards:
    """An ensemble whose reward models are at `addresses`, all with the same models and weights.

    addresses: ``http://HOST:PORT`` of each server; requests go to the one with the fewest waiting, in turn where equal.
    timeout: seconds one answer may take from the moment it is asked for. backoff: seconds before a lost connection is
    tried again.

    Raises UserError naming the address when a server cannot be reached, has another key, or serves other models.
    """

    def __init__(self, addresses: Sequence[str], key: bytes, timeout: float = TIMEOUT, backoff: float = 2.0):
        self._httpx = require("httpx", "serve")
        if not addresses:
            raise UserError("no addresses of reward models: give at least one, http://HOST:PORT")
        if not 0 < timeout < 1e6:
            raise UserError(f"timeout={timeout}: must be seconds above 0 and below 1e6")
        self._key, self.timeout, self.backoff = checked_key(key), timeout, backoff
        self._background = Background("rewards")
        self._first = 0
        self._servers = [_Server(address) for address in addresses]
        self._client: httpx.AsyncClient = self._background.run(self._connect())
        about = [self._background.run(self._about(server)) for server in self._servers]
        for server, found in zip(self._servers, about, strict=True):
            if found != about[0]:
                raise UserError(
                    f"reward models at {server.address} are {found}, at {self._servers[0].address} {about[0]}: "
                    "serve the same everywhere"
                )
        self.models: tuple[str, ...] = tuple(texts(about[0], "models"))
        self._weights = _weights(about[0].get("weights"))
        self.preview_scorer: PreviewJudge | None = self._judge if about[0].get("previews") else None
        """As of an ensemble, ``preview_scorer(prompts)(pixels, prompt_index)``; None where none judges previews."""
        self.face_embedding: FaceEmbedding | None = self._faces if about[0].get("faces") else None
        """From reference images [B, 3, H, W] of a person to embeddings of the faces [F, D]; None without FER."""

    @classmethod
    def open(cls, text: str) -> RemoteRewards:
        """The reward models at ``http://HOST:PORT,…``, with the key from the environment."""
        places, timeout = parse_addresses(text)
        return cls(places, read_key(), timeout)

    def score(self, batch: RewardBatch) -> EnsembleScore:
        """Total and parts, [R] each, on the device of the images. Raises UserError as the ensemble itself does."""
        return self.submit(batch).result()

    def submit(self, batch: RewardBatch) -> Future[EnsembleScore]:
        """:meth:`score` in the background; each server is asked for one at a time, the others wait here."""
        words, tensors = pack_batch(batch)
        body = encode(words, tensors)  # now: the caller may reuse its tensors
        return self._background.start(self._scored(body, list(batch.prompts), batch.kind, batch.images.device))

    def throughput(self) -> dict[str, float]:
        """Images a second by reward model, over all servers and whoever asked them. One that is gone counts 0."""
        total: dict[str, float] = {}
        for server in self._servers:
            try:
                found = self._background.run(self._call(server, "GET", "/v1/throughput"))[0].get("throughput")
            except (UserError, _Lost) as error:
                log.warning("reward models at %s do not say how fast they are: %s", server.address, error)
                continue
            for name, rate in found.items() if isinstance(found, dict) else ():
                total[name] = total.get(name, 0.0) + float(rate)
        return total

    def close(self) -> None:
        """Leave the servers."""
        self._background.run(self._client.aclose())
        self._background.close()

    # --- one request, in the background ----------------------------------------------------------------------------

    async def _connect(self) -> httpx.AsyncClient:
        timeout = self._httpx.Timeout(None, connect=min(_CONNECT, self.timeout))  # the whole has a limit of its own
        return self._httpx.AsyncClient(timeout=timeout, trust_env=False, follow_redirects=False)

    async def _about(self, server: _Server) -> Words:
        try:
            return (await self._call(server, "GET", "/v1/about"))[0]
        except _Lost as error:
            raise UserError(
                f"reward models at {server.address} cannot be reached ({error}): start them there with `pyunictokens "
                f"rewards serve --host HOST --port {urlsplit(server.address).port}`, or correct the address"
            ) from None

    async def _scored(self, body: bytes, prompts: list[str], kind: str, device: torch.device) -> EnsembleScore:
        server, (words, tensors) = await self._ask("/v1/score", body)
        names, absent = texts(words, "parts"), words.get("no_face")
        total = _scores(server, tensors, "total", len(prompts))
        parts = {name: _scores(server, tensors, f"part {n}", len(prompts)) for n, name in enumerate(names)}
        if kind in self._weights and parts:
            summed = sum((self._weights[kind].get(name, 0.0) * part for name, part in parts.items()), torch.zeros(()))
            if not torch.allclose(total.nan_to_num(), summed.nan_to_num(), rtol=1e-3, atol=1e-3):
                raise UserError(f"reward models at {server.address}: the total is not the sum of its parts")
        total, parts = total.to(device), {name: part.to(device) for name, part in parts.items()}
        return noted(EnsembleScore(total, parts, absent if isinstance(absent, int) else 0), prompts)

    def _judge(self, prompts: Sequence[str], /) -> PreviewScorer:
        words = {"prompts": list(prompts)}

        def scorer(pixels: Tensor, prompt_index: Tensor) -> Tensor:
            body = encode(words, {"pixels": pixels, "index": prompt_index.to(torch.int64)})
            server, (_, tensors) = self._background.run(self._ask("/v1/preview", body))
            return _scores(server, tensors, "scores", len(pixels)).to(pixels.device)

        return scorer

    def _faces(self, pixels: Tensor) -> Tensor:
        server, (_, tensors) = self._background.run(self._ask("/v1/faces", encode({}, {"pixels": pixels})))
        faces = tensor_of(tensors, "faces")
        if faces.ndim != 2 or len(faces) > len(pixels):
            raise UserError(f"reward models at {server.address}: faces are {tuple(faces.shape)}: must be [F, D]")
        return faces.to(pixels.device)

    async def _ask(self, path: str, body: bytes) -> tuple[_Server, tuple[Words, Tensors]]:
        """The answer of the first server that has one."""
        why = ""
        for attempt in range(2):
            if attempt:
                await asyncio.sleep(self.backoff)
            for server in self._in_turn():
                server.pending += 1
                try:
                    return server, await self._call(server, "POST", path, body)
                except _Lost as error:
                    why = f"{server.address} ({error})"
                    log.warning("reward models at %s: the connection is lost", why)
                finally:
                    server.pending -= 1
        raise UserError(
            f"reward models at {why} are lost, and no other answers: start them again and go on with --resume; tried "
            f"twice, {self.backoff:g} s apart"
        )

    def _in_turn(self) -> list[_Server]:
        self._first = (self._first + 1) % len(self._servers)
        order = self._servers[self._first :] + self._servers[: self._first]
        now = time.monotonic()
        return sorted(order, key=lambda server: (now - server.lost < _REST, server.pending))

    async def _call(self, server: _Server, method: str, path: str, body: bytes = b"") -> tuple[Words, Tensors]:
        """The words and tensors of the answer. Raises _Lost where the connection is, UserError for all else."""
        async with server.turn:
            exchange = Exchange.begin(self._key, method, path)
            try:
                status, digest, data = await asyncio.wait_for(self._send(server, exchange, body), self.timeout)
            except asyncio.TimeoutError:
                raise UserError(
                    f"reward models at {server.address} gave no answer in {self.timeout:g} s: look there, or give more "
                    f"time: {server.address}?timeout={2 * self.timeout:g}"
                ) from None
            except self._httpx.HTTPError as error:
                server.lost = time.monotonic()
                raise _Lost(str(error) or f"the other side hung up ({type(error).__name__})") from error
        if status == 401:
            raise UserError(f"reward models at {server.address} have another key: set {KEY} alike on both sides")
        if status in {502, 503, 504}:
            server.lost = time.monotonic()
            raise _Lost(f"HTTP {status}")
        if not hmac.compare_digest(digest.encode(), exchange.answer_digest(status, data).encode()):
            raise UserError(
                f"reward models at {server.address} sent an answer (HTTP {status}) that does not prove the key: it is "
                "another server, or the answer was changed on its way"
            )
        if status != 200:
            raise UserError(str(json.loads(data)["error"]))  # proven ours; word for word what would be said here
        try:
            return decode(data)
        except UserError as error:
            raise UserError(f"reward models at {server.address} sent {error}") from None

    async def _send(self, server: _Server, exchange: Exchange, body: bytes) -> tuple[int, str, bytes]:
        """(status, digest, body) of the answer."""
        url, headers = server.address + exchange.path, exchange.headers(body)
        async with self._client.stream(exchange.method, url, content=body, headers=headers) as response:
            parts, size = [], 0
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > LIMIT:
                    raise UserError(f"reward models at {server.address} sent more than {LIMIT} bytes")
            return response.status_code, response.headers.get(DIGEST, ""), b"".join(parts)


def _scores(server: _Server, tensors: Mapping[str, Tensor], name: str, rows: int) -> Tensor:
    """Scores [rows], float32: each within ±1e6, or not finite where a reward model said so."""
    found = tensor_of(tensors, name)
    if found.shape != (rows,):
        raise UserError(
            f"reward models at {server.address}: {name} is {tuple(found.shape)} for {rows} images: must be [{rows}]"
        )
    found = found.float()
    if bool((found.nan_to_num(0.0, 0.0, 0.0).abs() > _LARGEST).any()):
        raise UserError(f"reward models at {server.address}: {name} has values beyond ±{_LARGEST:g}: no scores")
    return found


def _weights(given: object) -> dict[str, dict[str, float]]:
    """The weights that a server says it has, by kind; empty where it says none that can be read."""
    if not isinstance(given, dict):
        return {}
    tables = {kind: table for kind, table in given.items() if isinstance(table, dict)}
    return {kind: {str(name): float(weight) for name, weight in table.items()} for kind, table in tables.items()}
