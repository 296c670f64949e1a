"""Two processes that draw for one server, a core each: what half load does to the time of an image.

Wall time, since two processes work at once; the machine must be idle. Requests go to `serve.workers` as the routes send
them, without HTTP. Load is a part of what the same two processes draw when always some images wait.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyunictokens.models import Sources
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.rollout.serving import BATCH_FROM, ImageRequest
from pyunictokens.serve.catalog import CatalogSettings
from pyunictokens.serve.workers import Child, EngineSettings, OwnProcess, Workers, shared_out

PROCESSES, ROUNDS = 2, 3


def run(
    folder: Path,
    requests: int,
    clients: int,
    request: Callable[[random.Random], ImageRequest],
    offline: Callable[[RolloutEngine, int], object],
    batch_from: int = BATCH_FROM,
) -> dict[str, Any]:
    """Rounds of `requests` at half load and a quarter as many one after another, behind `clients` at once for the rate;
    the ratios are medians over the rounds. request: draws one from a source of numbers; offline: draws so many images
    in one batch."""
    before = torch.get_num_threads()
    settings = EngineSettings(CatalogSettings(folder=folder, flags=Sources(), device="cpu"), 64, 1024, batch_from)
    own, *others = shared_out(settings, PROCESSES)
    serving = own.serving()
    catalog = own.catalog.open(serving)
    workers = Workers([OwnProcess(catalog, serving), *(Child(at, each) for at, each in enumerate(others, 1))])
    served = catalog.open("base")

    async def one(dice: random.Random) -> float:
        start = time.perf_counter()
        wanted = request(dice)
        async for _ in workers.stream(served, wanted, user=str(wanted.seed), priority=0, deadline=None):
            pass
        return time.perf_counter() - start

    async def measured() -> tuple[float, list[tuple[list[float], list[float]]]]:
        dice = random.Random(0)
        workers.start()
        while workers.ready < PROCESSES:
            await asyncio.sleep(0.05)
        await asyncio.gather(*(one(dice) for _ in range(4 * PROCESSES)))
        start = time.perf_counter()
        await asyncio.gather(*(one(dice) for _ in range(clients)))
        rate = clients / (time.perf_counter() - start)
        rounds = []
        for _ in range(ROUNDS):
            idle = [await one(dice) for _ in range(max(4, requests // 4))]
            under_way = []
            for _ in range(requests):
                await asyncio.sleep(dice.expovariate(rate / 2))
                under_way.append(asyncio.create_task(one(dice)))
            rounds.append((sorted(idle), sorted(await asyncio.gather(*under_way))))
        await workers.close(10.0)
        return rate, rounds

    torch.set_num_threads(own.threads)
    try:
        rate, rounds = asyncio.run(measured())
        torch.set_num_threads(own.threads * PROCESSES)
        offline(served.engine, 2)
        start = time.perf_counter()
        offline(served.engine, clients)
        batch = clients / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)

    def at(part: float, side: int) -> list[float]:
        """A quantile of idle (0) or half load (1), by round."""
        return [each[side][round(part * (len(each[side]) - 1))] for each in rounds]

    p95, p50 = ([busy / idle for idle, busy in zip(at(q, 0), at(q, 1), strict=True)] for q in (0.95, 0.5))
    idle, half = (
        {name: round(statistics.median(at(part, side)), 4) for name, part in (("p50", 0.5), ("p95", 0.95))}
        for side in (0, 1)
    )
    return {
        "processes": PROCESSES,
        "threads": own.threads,
        "rounds": ROUNDS,
        "requests": requests,
        "load": 0.5,
        "p95_ratio": round(statistics.median(p95), 3),
        "p95_ratios": [round(each, 3) for each in p95],
        "p50_ratio": round(statistics.median(p50), 3),
        "half_load_seconds": half,
        "idle_seconds": idle,
        "images_per_second": round(rate, 3),
        "throughput_ratio": round(rate / batch, 3),
    }
