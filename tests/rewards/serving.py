"""Reward models served in a test, and what is asked of them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import torch
from torch import Tensor

from pyunictokens.rewards import Ensemble, RewardBatch
from pyunictokens.rewards.served.client import RemoteRewards
from pyunictokens.rewards.served.messages import (
    KEY,
    Exchange,
)
from pyunictokens.rewards.served.server import RewardServer

SECRET = b"a key of more than sixteen letters"


Score = Callable[[RewardBatch], Tensor]


class Does:
    """An expert that does what it was told to."""

    def __init__(self, score: Score):
        self.score = score


def brightness(batch: RewardBatch) -> Tensor:
    return batch.images.mean(dim=(1, 2, 3))


def batch(rows: int = 5, seed: int = 0, kind: str = "human", size: int = 64) -> RewardBatch:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows + 3, 3, size, size, generator=draw) * 2 - 1
    return RewardBatch(
        pixels[:rows],
        [f"a red circle, number {row}" for row in range(rows)],
        ["the toy is a ball", "", "ö“ \n", "a hat", "sand"][:rows],
        ["its toy is a red ball", "it lives on sand"],
        1,
        pixels[rows:],
        kind,
    )


@contextmanager
def running(server: RewardServer) -> Iterator[RewardServer]:
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(10)


def served(score: Score = brightness, port: int = 0, **more: Any) -> AbstractContextManager[RewardServer]:
    return running(RewardServer(Ensemble({"it": Does(score)}, {"it": 1.0}), SECRET, port=port, **more))


def ask(*servers: RewardServer, timeout: float = 20.0, key: bytes = SECRET) -> RemoteRewards:
    return RemoteRewards([server.address for server in servers], key, timeout, backoff=0.05)


def toy_server(port: int = 0, limit_files: int | None = None) -> tuple[subprocess.Popen[str], str]:
    """The command, and the address it says it listens at."""
    command = [sys.executable, "-m", "pyunictokens", "experts", "serve", "--device", "cpu", "--port", str(port)]
    if limit_files is not None:
        command = ["sh", "-c", f'ulimit -n {limit_files}; exec "$@"', "sh", *command]
    environment = {**os.environ, KEY: SECRET.decode(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("http://127.0.0.1:") and "ber, der, fer, tier on cpu" in said, said
    return process, said.partition(": ")[0]


def proven(server: RewardServer, path: str, body: bytes, method: str = "POST", key: bytes = SECRET) -> dict[str, str]:
    return Exchange.begin(key, method, path).headers(body)


def told(server: RewardServer, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    """(status, error) of a request that proves the key."""
    answer = httpx.post(server.address + path, content=body, headers={**proven(server, path, body), **headers})
    return answer.status_code, str(answer.json().get("error", "")) if answer.status_code != 200 else ""


def raw(server: RewardServer, data: bytes) -> bytes:
    """What comes back for these bytes, until the server hangs up."""
    with socket.create_connection((server.host, server.port), 10) as stranger:
        stranger.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := stranger.recv(4096):
                parts.append(part)
        return b"".join(parts)
