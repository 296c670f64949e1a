"""Reward experts as a server of their own, so that trainers draw on while their last drawings are scored.

Every connection has a thread; what they ask is answered one after another, since all of it runs on one device. One may
ask for `hello` (who is here), `score` (a batch), `preview` (DSOG's judge), `faces` (a person's embeddings) and
`throughput`. An expert's UserError goes to whoever asked, word for word; nothing that a peer sends ends the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from ...utils.errors import UserError
from ..base import Rewards
from ..ensemble import Ensemble, as_rewards
from .wire import LIMIT, decode, encode, shake_hands, tensor, texts, unpack_batch

log = logging.getLogger(__name__)

Answer = tuple[dict[str, Any], dict[str, Tensor]]


class RewardServer:
    """Serves `rewards` on `device` to everyone who has `key`.

    host: where it listens; 127.0.0.1 is this machine alone. port: 0 takes a free one, see `port` afterwards.
    limit: longest message in bytes. Raises UserError where it cannot listen.
    """

    def __init__(
        self,
        rewards: object,
        key: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        device: str | torch.device = "cpu",
        limit: int = LIMIT,
    ):
        self.rewards: Rewards = as_rewards(rewards)
        self.device, self._key, self._limit = torch.device(device), key, limit
        self._turn, self._work = threading.Lock(), threading.Condition()
        self._busy, self._ending = 0, False
        self._open: set[Connection] = set()
        self._asked: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Answer]] = {
            "hello": self._hello,
            "score": self._score,
            "preview": self._preview,
            "faces": self._faces,
            "throughput": self._throughput,
        }
        try:
            self._listener = socket.create_server((host, port), backlog=64)
        except (OSError, OverflowError) as error:
            raise UserError(f"{host}:{port}: cannot listen there ({error}): choose another --port or --host") from None
        self.host, self.port = self._listener.getsockname()[:2]

    @property
    def address(self) -> str:
        """What clients call it."""
        return f"tcp://{self.host}:{self.port}"

    @property
    def names(self) -> list[str]:
        """The experts' names; none where an ensemble of your own does not say."""
        return sorted(self.rewards.models) if isinstance(self.rewards, Ensemble) else []

    def serve(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Answer until `stop` says so (asked five times a second) or :meth:`close` is called."""
        self._listener.settimeout(0.2)
        try:
            while not stop():
                try:
                    raw, peer = self._listener.accept()
                except TimeoutError:
                    continue
                except OSError:  # closed
                    break
                threading.Thread(target=self._attend, args=(raw, f"{peer[0]}:{peer[1]}"), daemon=True).start()
            self._ending = True
            with self._work:  # who has asked is answered
                self._work.wait_for(lambda: self._busy == 0)
        finally:
            self.close()

    def close(self) -> None:
        """Stop listening, and leave everyone."""
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
                same.shutdown(socket.SHUT_RDWR)

    def _attend(self, raw: socket.socket, peer: str) -> None:
        try:
            connection = shake_hands(raw, self._key, serving=True)
        except (AuthenticationError, OSError, EOFError) as error:
            log.warning("%s: turned away: %s", peer, str(error) or "it hung up")
            return
        self._open.add(connection)
        try:
            while not self._ending:
                data = connection.recv_bytes(self._limit)
                with self._at_work():
                    connection.send_bytes(self._answer(data))
        except EOFError:
            pass  # the peer has left
        except OSError as error:
            log.warning("%s: the connection is closed: %s", peer, error)
        finally:
            self._open.discard(connection)
            connection.close()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._work:
            self._busy += 1
        try:
            yield
        finally:
            with self._work:
                self._busy -= 1
                self._work.notify_all()

    def _answer(self, data: bytes) -> bytes:
        try:
            message, tensors = decode(data)
            ask = self._asked.get(str(message.get("do")))
            if ask is None:
                raise UserError(f"do={message.get('do')!r}: must be of {', '.join(self._asked)}")
            with self._turn, torch.no_grad():
                return encode(*ask(message, tensors))
        except UserError as error:
            return encode({"error": str(error)})
        except Exception as error:  # foreign code, and what a peer may have sent: told, and survived
            log.exception("a request failed")
            return encode({"error": f"{type(error).__name__}: {error}"})

    def _hello(self, message: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
        preview, faces = self.rewards.preview_scorer, self.rewards.face_embedding
        weights = self.rewards.weights if isinstance(self.rewards, Ensemble) else {}
        about = {"experts": self.names, "weights": weights}
        return {**about, "previews": preview is not None, "faces": faces is not None}, {}

    def _score(self, message: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
        found = self.rewards.score(unpack_batch(message, tensors, self.device))
        names = list(found.parts)
        parts = {f"part {place}": found.parts[name] for place, name in enumerate(names)}
        return {"parts": names, "no_face": found.no_face}, {"total": found.total, **parts}

    def _preview(self, message: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
        if self.rewards.preview_scorer is None:
            raise UserError("no expert here judges previews: serve BER among them")
        judge = self.rewards.preview_scorer(texts(message, "prompts"))
        pixels, index = tensor(tensors, "pixels"), tensor(tensors, "index", torch.int64)
        return {}, {"scores": judge(pixels.to(self.device), index.to(self.device))}

    def _faces(self, message: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
        if self.rewards.face_embedding is None:
            raise UserError("no expert here knows faces: serve FER among them")
        return {}, {"faces": self.rewards.face_embedding(tensor(tensors, "pixels").to(self.device))}

    def _throughput(self, message: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
        return {"throughput": self.rewards.throughput()}, {}
