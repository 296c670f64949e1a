"""Who of a run's processes is still there: heartbeats, last words, and the end of those that are left.

Every rank counts up a number every two seconds, in a small store that rank 0 serves, and looks at the others'. One that
stands still for `SILENCE` seconds is gone, and so is one whose connection broke and that does not beat any more; a rank
that fails leaves its last words there. Whoever is left then ends, within a minute, with one line that names the rank:
the main thread where it can (:meth:`Watch.verdict`), the watch itself where the main thread hangs in a call to nobody.

The store listens at the address where the ranks meet, and nowhere else. Its names begin with a secret of this job, and
last words carry a keyed digest: who merely reaches the port can neither speak for a rank nor end the job by a write.
(torch's own stores, of torchrun and of its process groups, know no key: keep them in a network of your own.)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ...utils.errors import RankLost

log = logging.getLogger(__name__)

BEAT = 2.0
"""Seconds between two signs of life."""

SILENCE = 30.0
"""Seconds without one after which a rank is gone. Where a connection broke, three beats are enough."""

GRACE = 10.0
"""Seconds that the main thread has to end by itself; then the process is ended."""

WAY_OUT = (
    "what was finished is on disk up to the last checkpoint: start again with --resume, or let torchrun do it "
    "(--max-restarts N)"
)


@dataclass(frozen=True)
class _Answer:
    """What the store said last."""

    at: float
    beats: list[bytes]
    """Of the other ranks, in order."""
    words: str | None
    """The last words of whoever failed first."""


class Watch:
    """The watch of one rank. `share` hands rank 0's value to all (a broadcast), `meet` is a barrier."""

    def __init__(
        self, rank: int, world: int, address: str, share: Callable[[object], object], meet: Callable[[], object]
    ):
        self.rank, self.world = rank, world
        limit = timedelta(seconds=SILENCE)
        self._server = _serve(address, limit) if rank == 0 else None
        told = share((self._server.port, secrets.token_hex(16)) if self._server is not None else None)
        assert isinstance(told, tuple)
        port, self._secret = told
        store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        self._store = dist.PrefixStore(self._secret, store)
        self._store.set(f"host/{rank}", socket.gethostname())
        self._store.add(f"beat/{rank}", 1)
        meet()
        names = self._store.multi_get([f"host/{each}" for each in range(world)])
        self.hosts = [name.decode() for name in names]
        self._lost: RankLost | None = None
        self._found, self._taken, self._done = threading.Event(), threading.Event(), threading.Event()
        self._broken = False
        self._others = [each for each in range(world) if each != rank]
        self._answer = _Answer(time.monotonic(), [b""] * len(self._others), None)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    # --- for the main thread ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise RankLost where a rank is known to be gone."""
        if self._lost is not None:
            raise self._lost

    def verdict(self) -> RankLost | None:
        """After a connection broke: who is gone. Waits until that is known; None where all ranks are there."""
        self._broken = True
        self._found.wait(5 * BEAT + GRACE)
        return self._lost

    def heard(self) -> None:
        """The main thread is about to end with what was found, and will say so."""
        self._taken.set()

    def last_words(self, text: str) -> bool:
        """Say why this rank ends, and give the others the time to read it. False where another was first."""
        own = json.dumps([self.rank, text, self._proof(self.rank, text)])
        try:
            first = self._store.compare_set("words", "", own).decode() == own
            end = time.monotonic() + GRACE
            while first and self._store.add("read", 0) < self.world - 1 and time.monotonic() < end:
                time.sleep(0.1)
        except (RuntimeError, ValueError):  # rank 0 is gone with its store
            return True
        self._done.set()
        return first

    def _proof(self, rank: int, text: str) -> str:
        """What only a rank of this job can put under its last words."""
        words = json.dumps([rank, text]).encode()
        return hmac.new(self._secret.encode(), words, hashlib.sha256).hexdigest()

    def _read(self, words: str) -> tuple[int, str] | None:
        """(rank, its last words); None where they are not from a rank of this job."""
        try:
            rank, text, proof = json.loads(words)
            known = rank in range(self.world) and isinstance(text, str) and isinstance(proof, str)
            return (rank, text) if known and hmac.compare_digest(proof, self._proof(rank, text)) else None
        except (ValueError, TypeError, RecursionError):
            return None

    def stop(self) -> None:
        """The run is over for this rank; none is looked for any more."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    # --- the threads -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Count up and look at the others; in a thread of its own, since a store that is frozen never answers."""
        while not self._done.wait(BEAT):
            try:
                self._store.add(f"beat/{self.rank}", 1)
                beats = self._store.multi_get([f"beat/{rank}" for rank in self._others])
                words = self._store.get("words").decode("utf-8", "replace") if self._store.check(["words"]) else None
                if words is not None and self._read(words) is None:
                    words = None
                if words is not None:
                    self._store.add("read", 1)
            except (RuntimeError, ValueError):
                self._answer = _Answer(-math.inf, [], None)
                return
            self._answer = _Answer(time.monotonic(), beats, words)
            if words is not None:
                return

    def _watch(self) -> None:
        counts, moved = [b""] * len(self._others), [time.monotonic()] * len(self._others)
        while not self._done.wait(BEAT):
            answer, now = self._answer, time.monotonic()
            limit = 3 * BEAT if self._broken else SILENCE
            said = self._read(answer.words) if answer.words is not None else None
            if said is not None:
                rank, text = said
                if rank != self.rank:
                    self._end([rank], text)
                return
            if now - answer.at > limit:
                self._end([0])
                return
            for place, beat in enumerate(answer.beats):
                if beat != counts[place]:
                    counts[place], moved[place] = beat, now
            gone = [rank for rank, last in zip(self._others, moved, strict=True) if now - last > limit]
            if gone:
                self._end(gone)
                return

    def _end(self, gone: list[int], words: str = "") -> None:
        """Let the main thread know; where it does not hear, end the process. The first rank left speaks for all."""
        if self._done.is_set():
            return
        names = " and ".join(f"rank {rank} ({self.hosts[rank]})" for rank in gone)
        loud = not words and self.rank == min(rank for rank in range(self.world) if rank not in gone)
        said = f"ended: {words}" if words else f"gone without a word (killed, or its machine is lost); {WAY_OUT}"
        self._lost = RankLost(f"{names} {'is' if len(gone) == 1 else 'are'} {said}" if not words else f"{names} {said}")
        self._lost.quiet = not loud
        self._found.set()
        if not self._taken.wait(GRACE) and not self._done.is_set():
            if loud:
                print(f"error: {self._lost}", file=sys.stderr, flush=True)
            os._exit(1)
        if not self._done.wait(GRACE):  # it heard, and hangs on its way out
            os._exit(1)


def _serve(address: str, limit: timedelta) -> dist.TCPStore:
    """A store that listens at `address` alone; on every interface, with a warning, where there is none here."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.bind(place)
    except OSError as error:
        log.warning("%s cannot be listened at (%s): the ranks' store listens on every interface", address, error)
        return dist.TCPStore(address, 0, is_master=True, timeout=limit, wait_for_workers=False)
    port = listening.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listening.detach()
    )
