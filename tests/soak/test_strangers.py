"""`make soak`: strangers at a server of reward models, by the thousand, while an honest client goes on working.

SILENT connections that say nothing, MALFORMED requests of every kind that once was tried; the server stays, its memory
stays within five percent, and an honest client's requests take at most twice as long. Give both numbers by the
environment to make it shorter.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyunictokens.rewards.served.client import RemoteRewards
from pyunictokens.rewards.served.messages import Exchange, encode, pack_batch
from tests.rewards.serving import SECRET, batch, toy_server

pytestmark = pytest.mark.soak

SILENT, MALFORMED = int(os.environ.get("SILENT", "2000")), int(os.environ.get("MALFORMED", "10000"))
HONEST = int(os.environ.get("HONEST", "60"))
"""Requests of the honest client, before and during."""


@pytest.fixture
def files() -> Iterator[None]:
    """As many open files as this process may have."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def slow_end(remote: RemoteRewards, count: int) -> float:
    """The time in seconds that 95 of 100 requests stay within."""
    times = []
    for number in range(count):
        begun = time.monotonic()
        assert remote.score(batch(seed=number, kind="animal")).total.isfinite().all()
        times.append(time.monotonic() - begun)
    return statistics.quantiles(times, n=20)[-1]


def malformed(rng: random.Random) -> bytes:
    """A request that no client of ours would send; some prove the key and lie afterwards."""
    body = encode(*pack_batch(batch(size=4)))
    good = Exchange.begin(SECRET, "POST", "/v1/score")
    proven = "".join(f"{name}: {value}\r\n" for name, value in good.headers(body).items())
    cut = rng.randrange(len(body))
    kinds = [
        rng.randbytes(rng.randrange(1, 400)),
        b"GET " + b"/" * rng.randrange(1, 70_000) + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * rng.randrange(1, 40) + b"\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n" + rng.randbytes(50),
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * rng.randrange(1, 4000) + b"\r\n",
        f"POST /v1/{rng.choice(['score', 'faces', 'x', '../about'])} HTTP/1.1\r\nHost: x\r\n{proven}\r\n".encode()
        + body[:cut],
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\n{proven}\r\n".encode() + body[:cut] + rng.randbytes(len(body) - cut),
        f"GET /v1/about HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {rng.randbytes(20).hex()}\r\n\r\n".encode(),
        b"\x16\x03\x01" + rng.randbytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(50),
    ]
    return rng.choice(kinds)


def test_thousands_of_strangers_change_nothing_for_an_honest_client(files: None) -> None:
    process, address = toy_server(limit_files=1024)
    host, port = address.removeprefix("http://").split(":")
    silent: list[socket.socket] = []
    ended = threading.Event()
    sent = [0]

    def attack(seed: int, count: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            if ended.is_set():
                return
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as one:
                one.settimeout(0.05)
                one.sendall(malformed(rng))
                one.recv(100)
            sent[0] += 1

    try:
        remote = RemoteRewards([address], SECRET, 60.0, backoff=1.0)
        slow_end(remote, 20)  # warm
        before = slow_end(remote, HONEST)
        start = memory(process.pid)
        for _ in range(SILENT):
            with contextlib.suppress(OSError):
                silent.append(socket.create_connection((host, int(port)), 5))
        beside_silent = slow_end(remote, HONEST)
        threads = [threading.Thread(target=attack, args=(seed, MALFORMED // 4)) for seed in range(4)]
        for thread in threads:
            thread.start()
        beside_malformed = slow_end(remote, HONEST)
        for thread in threads:
            thread.join()
        end = memory(process.pid)
        print(
            f"{len(silent)} silent connections, {sent[0]} malformed requests: p95 {1e3 * before:.1f} ms before, "
            f"{1e3 * beside_silent:.1f} beside the silent, {1e3 * beside_malformed:.1f} beside the malformed; RSS "
            f"{start >> 20} MiB before, {end >> 20} after ({100 * (end / start - 1):+.1f} %)"
        )
        assert process.poll() is None and remote.score(batch(kind="animal")).total.isfinite().all()
        assert sent[0] == MALFORMED // 4 * 4 and end <= 1.05 * start
        assert beside_silent <= 2 * before and beside_malformed <= 2 * before
    finally:
        ended.set()
        process.kill()
        process.wait(10)
        for one in silent:
            one.close()
