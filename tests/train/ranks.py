"""Ranks for tests: processes forked from one that has everything loaded, meeting on this machine through gloo."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyunictokens.train.distributed.ranks import Ranks


def together(
    world: int, work: Callable[[Ranks], Any], where: Path, seconds: float = 100.0, lost: int | None = None
) -> list[Any]:
    """`work(ranks)` on each of `world` ranks; what each returned or raised, in rank order, or its exit code.

    The rank `lost` may hang: it is killed when the others are done.
    """
    where.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {_fork(rank, world, port, work, where / f"rank{rank}"): rank for rank in range(world)}
    results: list[Any] = [None] * world
    end = time.monotonic() + seconds
    while set(children.values()) - {lost} and time.monotonic() < end:
        for child, rank in list(children.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del children[child]
                file = where / f"rank{rank}"
                results[rank] = pickle.loads(file.read_bytes()) if file.exists() else os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert set(children.values()) <= {lost}, f"ranks {set(children.values())} were not done after {seconds} s"
    return results


def _fork(rank: int, world: int, port: int, work: Callable[[Ranks], Any], file: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        try:
            with Ranks.open("cpu") as ranks:
                result: Any = work(ranks)
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            result = error
        file.write_bytes(pickle.dumps(result))
    finally:
        os._exit(0)
    return 0
