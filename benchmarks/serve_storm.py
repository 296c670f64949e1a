"""Thousands of requests to `pyunictokens serve` over HTTP, a twentieth of which is malformed, aborted or disconnected.

Images are the smallest (one code, one timestep), because what is looked at is the server around them: its memory, and
that every answer comes once and is the one that was asked for. An answer names its seed; every request has another. In
the end the server must hold no row, and a request from before must draw the same image.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyunictokens.utils.errors import UserError

CONNECTIONS = 16
FAULTS = 0.05
"""The share of requests that is faulty."""
KINDS = ("no JSON", "unknown field", "unknown model", "bad size", "aborted", "half a body", "half a head")
"""What a faulty request is; the first four are answered with an error, the others leave."""


@dataclass
class Seen:
    """What clients saw."""

    answered: int = 0
    refused: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    """Lost or mixed-up answers, in words."""
    kinds: Counter[str] = field(default_factory=Counter)
    images: dict[int, str] = field(default_factory=dict)
    """Some, by seed."""


def _head(length: int) -> bytes:
    return (
        "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def _body(seed: int, **other: object) -> bytes:
    asked = {"model": f"c{seed % 4}", "prompt": "a dog", "size": "8x8", "steps": 1, "guidance_scale": 0, "seed": seed}
    return json.dumps({**asked, **other}).encode()


class _Client:
    """One connection, taken up again where it was left."""

    def __init__(self, port: int):
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, data: bytes) -> None:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        assert self._reader is not None
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 120)
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        body = await self._reader.readexactly(int(length[1]) if length else 0)
        if b"connection: close" in head.lower():
            await self.leave()
        return int(head.split(b" ", 2)[1]), body

    async def leave(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        self._reader = self._writer = None


async def _ask(client: _Client, seed: int, seen: Seen) -> None:
    body = _body(seed)
    await client.send(_head(len(body)) + body)
    status, answer = await client.answer()
    found = json.loads(answer)
    if status != 200 or found.get("seed") != seed or len(found["data"]) != 1:
        seen.wrong.append(f"seed {seed}: {status} {answer[:200]!r}")
        return
    seen.answered += 1
    if seed % 50 == 0:
        seen.images[seed] = found["data"][0]["b64_json"]


async def _fault(client: _Client, kind: str, seed: int, seen: Seen, dice: random.Random) -> None:
    seen.kinds[kind] += 1
    bodies = {
        "no JSON": (_body(seed)[:-1], 400),
        "unknown field": (_body(seed, colour="red"), 400),
        "unknown model": (_body(seed, model="nobody"), 404),
        "bad size": (_body(seed, size="7x7"), 400),
    }
    if kind in bodies:
        body, wanted = bodies[kind]
        await client.send(_head(len(body)) + body)
        status, answer = await client.answer()
        if status != wanted or "message" not in json.loads(answer)["error"]:
            seen.wrong.append(f"{kind}: {status} {answer[:200]!r}")
        else:
            seen.refused += 1
        return
    body = _body(seed, steps=50, n=4)
    whole = _head(len(body)) + body
    at = {"aborted": len(whole), "half a body": len(whole) - 9, "half a head": 40}[kind]
    await client.send(whole[:at])
    await asyncio.sleep(dice.uniform(0, 0.05))
    await client.leave()
    seen.left += 1


async def _storm(port: int, seeds: list[int], seen: Seen, faults: float) -> None:
    waiting = iter(seeds)

    async def worker(number: int) -> None:
        client, dice = _Client(port), random.Random(number)
        for seed in waiting:
            try:
                if dice.random() < faults:
                    await _fault(client, dice.choice(KINDS), seed, seen, dice)
                else:
                    await _ask(client, seed, seen)
            except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
                seen.wrong.append(f"seed {seed}: no answer ({type(error).__name__}: {error})")
                await client.leave()
        await client.leave()

    await asyncio.gather(*map(worker, range(CONNECTIONS)))


async def _metrics(port: int) -> dict[str, float]:
    client = _Client(port)
    await client.send(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
    status, text = await client.answer()
    await client.leave()
    if status != 200:
        raise RuntimeError(f"/metrics answers {status}: {text.decode(errors='replace')[:200]}")
    pairs = [line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def resident_bytes(process: int) -> int:
    """Memory of a process that is not swapped out."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def _measure(port: int, process: int, requests: int, seen: Seen, faults: float) -> dict[str, Any]:
    first = max(1, requests // 10)
    started = time.perf_counter()
    await _storm(port, list(range(first)), seen, faults)
    early = resident_bytes(process)
    await _storm(port, list(range(first, requests)), seen, faults)
    late, seconds = resident_bytes(process), time.perf_counter() - started
    lost = requests - seen.answered - seen.refused - seen.left - len(seen.wrong)
    again = Seen()
    client = _Client(port)
    for seed in sorted(seen.images)[:20]:
        again.images.clear()
        await _ask(client, seed, again)
        if again.images.get(seed) != seen.images[seed]:
            seen.wrong.append(f"seed {seed} drew another image the second time")
    await client.leave()
    for _ in range(100):  # those that left are noticed before the next step
        held = await _metrics(port)
        rows = held["pyunictokens_rows_running"] + held["pyunictokens_rows_waiting"]
        if not rows:
            break
        await asyncio.sleep(0.1)
    return {
        "requests": requests,
        "faulty": seen.kinds.total(),
        "faults": dict(sorted(seen.kinds.items())),
        "answered": seen.answered,
        "refused": seen.refused,
        "left": seen.left,
        "lost_or_mixed_up": len(seen.wrong) + lost,
        "wrong": seen.wrong[:10],
        "rows_held_in_the_end": int(rows),
        "memory_mb": [round(early / 2**20, 1), round(late / 2**20, 1)],
        "memory_ratio": round(late / early, 3),
        "seconds": round(seconds, 1),
    }


def run(runs: Path, requests: int, faults: float = FAULTS) -> dict[str, Any]:
    """A storm on a server of the runs c0 to c3 in `runs`."""
    command = [sys.executable, "-m", "pyunictokens", "serve", *(str(runs / f"c{each}") for each in range(4))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    log = runs.parent / "server.log"
    with log.open("wb") as errors:
        server = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, stderr=errors, env=environment)
        try:
            assert server.stdout is not None
            line = server.stdout.readline().decode()
            address = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if address is None:
                raise UserError(f"the server did not begin: {line}{log.read_text(errors='replace')[-2000:]}")
            found = asyncio.run(_measure(int(address[1]), server.pid, requests, Seen(), faults))
        finally:
            server.terminate()
            server.wait(120)
    found["exit_code"] = server.returncode
    found["lines_in_the_log"] = len(log.read_bytes().splitlines())
    return found
