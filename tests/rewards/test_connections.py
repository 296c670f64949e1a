"""What a server keeps of a connection that is gone: nothing, however long it might have waited for the key."""

from __future__ import annotations

import asyncio
import gc
import weakref
from types import SimpleNamespace
from typing import Any

from pyunictokens.rewards.served.connections import Connections


class Client:
    """A connection that has read something."""

    def __init__(self) -> None:
        self.transport: Any = SimpleNamespace(abort=lambda: None)


def test_a_closed_connection_is_forgotten_at_once() -> None:
    async def work() -> list[object]:
        connections, kept = Connections(patience=3600.0, most=4), []
        for number in range(6):  # two more than there may be: the oldest make room
            client = Client()
            kept.append(weakref.ref(client))
            connections.opened(number, client)
            if number == 5:
                connections.proven(number)
        for number in range(6):
            if (client := kept[number]()) is not None:
                connections.closed(number, client)
        del client
        gc.collect()
        return [one() for one in kept]

    assert asyncio.run(work()) == [None] * 6


def test_an_unproven_connection_is_closed_in_time() -> None:
    async def work() -> tuple[list[str], int]:
        said: list[str] = []
        connections = Connections(patience=0.05, most=4)
        for name in ("silent", "proven"):
            client = Client()
            client.transport = SimpleNamespace(abort=lambda name=name: said.append(name))
            connections.opened(name, client)
        connections.proven("proven")
        await asyncio.sleep(0.3)
        return said, len(connections.all)

    assert asyncio.run(work()) == (["silent"], 1)
