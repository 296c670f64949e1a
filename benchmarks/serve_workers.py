"""Two processes that draw for one server, a core each: what half load does to the time of an image.

Wall time, since two processes work at once; the machine must be idle. Requests go to `serve.workers` as the routes send
them, without HTTP. Full load is what one offline batch draws a second on both cores; and, harder, what the two
processes draw themselves when always some images wait, which is more.
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

PROCESSES, ROUNDS = 2, 5


def run(
    folder: Path,
    requests: int,
    clients: int,
    request: Callable[[random.Random], ImageRequest],
    offline: Callable[[RolloutEngine, int], object],
    batch_from: int = BATCH_FROM,
) -> dict[str, Any]:
    """Rounds of `requests` at half of either load and a quarter as many one after another, each behind `clients` images
    of both kinds for the rates; the ratios are medians over the rounds. request: draws one from a source of numbers;
    offline: draws so many images in one batch."""
    before = torch.get_num_threads()
    settings = EngineSettings(CatalogSettings(folder=folder, flags=Sources(), device="cpu"), 64, 1024, batch_from)
    own, *others = shared_out(settings, PROCESSES)
    serving = own.serving()
    catalog = own.catalog.open(serving)
    workers = Workers([OwnProcess(catalog, serving), *(Child(at, each) for at, each in enumerate(others, 1))])
    served, dice = catalog.open("base"), random.Random(0)

    async def one(due: float | None = None) -> float:
        start = time.perf_counter() if due is None else due
        wanted = request(dice)
        async for _ in workers.stream(served, wanted, user=str(wanted.seed), priority=0, deadline=None):
            pass
        return time.perf_counter() - start

    async def together(count: int) -> float:
        """Images a second where so many ask at once."""
        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(count)))
        return count / (time.perf_counter() - start)

    def in_one_batch() -> float:
        """The same of one offline batch on all cores."""
        torch.set_num_threads(own.threads * PROCESSES)
        start = time.perf_counter()
        offline(served.engine, clients)
        took = time.perf_counter() - start
        torch.set_num_threads(own.threads)
        return clients / took

    async def measured() -> tuple[list[list[float]], dict[str, list[tuple[list[float], list[float]]]]]:
        workers.start()
        while workers.ready < PROCESSES:
            await asyncio.sleep(0.05)
        await together(4 * PROCESSES)
        offline(served.engine, 2)
        rates: list[list[float]] = []
        found: dict[str, list[tuple[list[float], list[float]]]] = {"batch": [], "own": []}
        for _ in range(ROUNDS):
            rates.append([in_one_batch(), await together(clients)])  # in each round: a shared host changes its speed
            for name, full in zip(found, rates[-1], strict=True):
                idle = [await one() for _ in range(max(4, requests // 4))]
                under_way, due = [], time.perf_counter()
                for _ in range(
                    requests
                ):  # by the clock: a busy server must not slow down those who ask, nor hide a wait
                    due += dice.expovariate(full / 2)
                    await asyncio.sleep(due - time.perf_counter())
                    under_way.append(asyncio.create_task(one(due)))
                found[name].append((sorted(idle), sorted(await asyncio.gather(*under_way))))
        await workers.close(10.0)
        return rates, found

    torch.set_num_threads(own.threads)
    try:
        rates, found = asyncio.run(measured())
    finally:
        torch.set_num_threads(before)
    batch, both = (statistics.median(side) for side in zip(*rates, strict=True))
    return {
        "processes": PROCESSES,
        "threads": own.threads,
        "rounds": ROUNDS,
        "requests": requests,
        "images_per_second": round(both, 3),
        "offline_images_per_second": round(batch, 3),
        "throughput_ratio": round(statistics.median(mine / theirs for theirs, mine in rates), 3),
        "half_of": {name: _against_idle(rounds) for name, rounds in found.items()},
    }


def _against_idle(rounds: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """What rounds of (idle, busy) seconds, each sorted, say: medians over them, and p95 by round."""

    def at(part: float) -> list[list[float]]:
        """A quantile, by round: [idle, busy]."""
        return [[values[round(part * (len(values) - 1))] for values in each] for each in rounds]

    ratios = {part: [busy / idle for idle, busy in at(part)] for part in (0.5, 0.95)}
    seconds = {part: [statistics.median(side) for side in zip(*at(part), strict=True)] for part in (0.5, 0.95)}
    return {
        "p95_ratio": round(statistics.median(ratios[0.95]), 3),
        "p95_ratios": [round(each, 3) for each in ratios[0.95]],
        "p50_ratio": round(statistics.median(ratios[0.5]), 3),
        **{
            f"{side}_seconds": {"p50": round(seconds[0.5][place], 4), "p95": round(seconds[0.95][place], 4)}
            for place, side in enumerate(("idle", "busy"))
        },
    }
