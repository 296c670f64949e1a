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

PROCESSES = 2


def run(
    folder: Path,
    requests: int,
    clients: int,
    request: Callable[[random.Random], ImageRequest],
    offline: Callable[[RolloutEngine, int], object],
    batch_from: int = BATCH_FROM,
) -> dict[str, Any]:
    """`requests` at half load, a quarter as many one after another, `clients` at once for the rate. request: draws one
    from a source of numbers; offline: draws so many images in one batch."""
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

    async def measured() -> dict[str, Any]:
        dice = random.Random(0)
        workers.start()
        while workers.ready < PROCESSES:
            await asyncio.sleep(0.05)
        await asyncio.gather(*(one(dice) for _ in range(4 * PROCESSES)))
        start = time.perf_counter()
        await asyncio.gather(*(one(dice) for _ in range(clients)))
        rate = clients / (time.perf_counter() - start)
        idle = [await one(dice) for _ in range(max(4, requests // 4))]
        under_way = []
        for _ in range(requests):
            await asyncio.sleep(dice.expovariate(rate / 2))
            under_way.append(asyncio.create_task(one(dice)))
        busy = await asyncio.gather(*under_way)
        await workers.close(10.0)
        return {"rate": rate, "idle": sorted(idle), "busy": sorted(busy)}

    torch.set_num_threads(own.threads)
    try:
        found = asyncio.run(measured())
        torch.set_num_threads(own.threads * PROCESSES)
        offline(served.engine, 2)
        start = time.perf_counter()
        offline(served.engine, clients)
        batch = clients / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)

    def quantile(side: str, part: float) -> float:
        return float(found[side][min(len(found[side]) - 1, round(part * (len(found[side]) - 1)))])

    return {
        "processes": PROCESSES,
        "threads": own.threads,
        "requests": requests,
        "load": 0.5,
        "p95_ratio": round(quantile("busy", 0.95) / quantile("idle", 0.95), 3),
        "p50_ratio": round(statistics.median(found["busy"]) / statistics.median(found["idle"]), 3),
        "half_load_seconds": {"p50": round(quantile("busy", 0.5), 4), "p95": round(quantile("busy", 0.95), 4)},
        "idle_seconds": {"p50": round(quantile("idle", 0.5), 4), "p95": round(quantile("idle", 0.95), 4)},
        "images_per_second": round(found["rate"], 3),
        "throughput_ratio": round(found["rate"] / batch, 3),
    }
