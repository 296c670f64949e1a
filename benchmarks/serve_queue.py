"""Images that arrive at random, without a model: which order of drawing, on how many workers, gives which latency.

    python -m benchmarks.serve_queue        # from the costs in benchmarks/results/serve-cpu.json; seconds

`measure` takes what a step costs with 1, 2, 4, … images under way, with one of torch's threads and with all, and by how
much a step takes longer while another worker is at one as well. `simulate` plays Poisson arrivals against such costs on
one worker: an *order* is told which images are there, the oldest first, and says which take the next step.
`simulate_workers` plays the same arrivals on several workers that share one queue, each with one image at a time.
`late_share` is a bound for every order there is: each image costs as little as it ever does, and one that cannot be
done in time any more is not drawn at all. Images of one size cost alike, so among them no choice leaves fewer late than
to take each in turn that can still be in time (Kise, Ibaraki and Mine, 1978), and "fewest steps left first" is the
order of arrival.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from benchmarks.machine import results
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.rollout.serving import AT_ONCE, ImageRequest, ServingEngine
from pyunictokens.rollout.serving.workers import Workers
from pyunictokens.utils.files import read_json

ROWS = (1, 2, 4, 8, 16, 64)
REQUESTS = 20_000
OVERLOADED = 200
"""Images that wait or run, from which on they are taken to become ever more."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one worker."""

    steps: int
    """Of an image."""
    step: dict[int, float]
    """Of one step, by the images under way; between the given numbers it is interpolated."""
    begin: float
    """Of an image's first step over that of others."""
    end: float
    """Of an image's last step over that of others: its codes are decoded."""

    def of_step(self, rows: int) -> float:
        """Of one step of so many images."""
        below, above = max(n for n in self.step if n <= rows), min(n for n in self.step if n >= rows)
        part = 0.0 if below == above else (rows - below) / (above - below)
        return self.step[below] + part * (self.step[above] - self.step[below])

    @property
    def alone(self) -> float:
        """Of an image that nobody shares the machine with."""
        return self.steps * self.step[1] + self.begin + self.end


def measure(engine: RolloutEngine, steps: int, repeats: int, guidance: float, threads: int) -> Costs:
    """What steps take at least, computed with so many of torch's threads: what other programs take comes on top."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _steps(engine, 2, steps, guidance)
        runs = {rows: [_steps(engine, rows, steps, guidance) for _ in range(max(1, repeats // rows))] for rows in ROWS}
    finally:
        torch.set_num_threads(before)
    step = {rows: min(each for run in its for each in run[1:-1]) for rows, its in runs.items()}
    first, last = (min(run[place] for run in runs[1]) for place in (0, -1))
    return Costs(steps, step, max(0.0, first - step[1]), max(0.0, last - step[1]))


def most_a_second(costs: Costs, workers: int, crowd: float) -> float:
    """Images that so many workers draw a second at most, by the number that each has under way."""
    return max(
        workers * rows / (crowd * costs.steps * step + rows * (costs.begin + costs.end))
        for rows, step in costs.step.items()
    )


def measure_crowd(engine: RolloutEngine, steps: int, repeats: int, guidance: float, workers: int) -> float:
    """By how much a step takes longer while the other workers are at one as well, against one that is alone."""
    pool, alone, crowded = Workers(workers, torch.get_num_threads()), list[float](), list[float]()
    for _ in range(repeats):
        tasks = [pool.submit(worker, lambda: _steps(engine, 1, steps, guidance)) for worker in range(workers)]
        together = [task.result() for task in tasks]
        crowded += [each for its in together for each in its[1 : steps * 3 // 4]]  # the others have not ended yet
        alone += pool.submit(0, lambda: _steps(engine, 1, steps, guidance)).result()[1:-1]
    return statistics.median(crowded) / statistics.median(alone)


def _steps(engine: RolloutEngine, rows: int, steps: int, guidance: float) -> list[float]:
    """Seconds of each step of so many images side by side."""
    serving, took = ServingEngine(rows, rows, batch_from=1), []
    for number in range(rows):
        prompt = f"A photo of a red star on sand, number {number}."
        request = ImageRequest(prompt, steps=steps, guidance_scale=guidance, seed=number)
        serving.add_request(engine, request, user=str(number))
    while serving.busy:
        start = time.perf_counter()
        serving.step()
        took.append(time.perf_counter() - start)
    return took


@dataclass(eq=False)
class Image:
    """One image in the queue."""

    came: float
    left: int
    """Steps to go."""
    begun: bool = False


Order: TypeAlias = Callable[[Sequence[Image], float], Sequence[Image]]
"""(images that are there, the oldest first; now) → those that take the next step."""


def simulate(costs: Costs, rate: float, order: Order, requests: int = REQUESTS, seed: int = 0) -> list[float]:
    """Seconds from arrival to end of each of `requests` images that arrive at `rate` a second, sorted; none where more
    come than can be drawn."""
    arrivals = list(_arrivals(rate, requests, seed))
    now, come, there, took = 0.0, 0, [], []
    while come < requests or there:
        now = now if there else max(now, arrivals[come])
        while come < requests and arrivals[come] <= now:
            there.append(Image(arrivals[come], costs.steps))
            come += 1
        if len(there) > OVERLOADED:
            return []
        active = list(order(there, now))
        now += costs.of_step(len(active)) + costs.begin * sum(not image.begun for image in active)
        for image in active:
            image.begun, image.left = True, image.left - 1
            if not image.left:
                now += costs.end
                took.append(now - image.came)
                there.remove(image)
    return sorted(took)


def simulate_workers(
    costs: Costs, rate: float, workers: int, crowd: float = 1.0, requests: int = REQUESTS, seed: int = 0
) -> list[float]:
    """The same on `workers` that share one queue: whoever is free takes the oldest image. A step takes `crowd` times as
    long if it begins while another worker is at one."""
    arrivals, come = list(_arrivals(rate, requests, seed)), 0
    waiting: deque[float] = deque()
    free, at_work = list(range(workers)), list[tuple[float, int, float, int]]()  # (end of its step, …, came, left)
    took: list[float] = []

    def begin(now: float, worker: int, came: float, left: int) -> None:
        cost = costs.step[1] + costs.begin * (left == costs.steps) + costs.end * (left == 1)
        heapq.heappush(at_work, (now + cost * (crowd if at_work else 1.0), worker, came, left - 1))

    while come < requests or at_work:
        if come < requests and (not at_work or arrivals[come] <= at_work[0][0]):
            now = arrivals[come]
            waiting.append(now)
            come += 1
        else:
            now, worker, came, left = heapq.heappop(at_work)
            if left:
                begin(now, worker, came, left)
            else:
                took.append(now - came)
                free.append(worker)
        while waiting and free:
            begin(now, free.pop(), waiting.popleft(), costs.steps)
    return sorted(took)


def _arrivals(rate: float, requests: int, seed: int) -> itertools.accumulate[float]:
    dice = random.Random(seed)
    return itertools.accumulate(dice.expovariate(rate) for _ in range(requests))


def late_share(
    service: float, rate: float, within: float, workers: int = 1, requests: int = REQUESTS, seed: int = 0
) -> float:
    """The share of images that no order can end within so many seconds, if each costs a worker `service` seconds."""
    free, late = [0.0] * workers, 0
    for at in _arrivals(rate, requests, seed):
        end = max(at, free[0]) + service
        if end <= at + within:
            heapq.heapreplace(free, end)
        else:
            late += 1
    return late / requests


def orders(costs: Costs, batch_from: int, most: int) -> dict[str, Order]:
    """The orders that are compared, by what the table calls them."""

    def as_the_engine(there: Sequence[Image], now: float) -> Sequence[Image]:
        begun = [image for image in there if image.begun]
        few = begun if len(begun) >= AT_ONCE else there[:AT_ONCE]
        return there[:most] if len(there) >= batch_from else few

    def in_time(there: Sequence[Image], now: float) -> Sequence[Image]:
        def ends(image: Image) -> float:
            return now + image.left * costs.step[1] + costs.end

        return ([image for image in there if ends(image) <= image.came + 2 * costs.alone] or there)[:1]

    return {
        f"{AT_ONCE} at a time, from {batch_from} on side by side": as_the_engine,
        "all side by side": lambda there, now: there[:most],
        "one after another": lambda there, now: there[:1],
        "the four oldest": lambda there, now: there[:4],
        "one after another, those last that are late already": in_time,
    }


def report(held: dict[str, Any], requests: int = REQUESTS) -> dict[str, Any]:
    """Latencies at `rate` images a second, by order and workers: seconds, and parts of what an idle server of the same
    kind takes; and the bound, `cheapest` being the seconds in which the machine draws an image of a full batch."""
    together, apart, rate = costs_of(held["costs"]), costs_of(held["costs_apart"]), held["rate"]
    workers, crowd = held["workers"], held["crowd"]

    def numbers(took: list[float], alone: float) -> dict[str, float | None]:
        if not took:
            return {**dict.fromkeys(("p50", "p95", "p99", "seconds_p95")), "idle_seconds": round(alone, 3)}
        quantiles = {f"p{part}": took[part * (len(took) - 1) // 100] for part in (50, 95, 99)}
        ratios = {name: round(its / alone, 2) for name, its in quantiles.items()}
        return {**ratios, "seconds_p95": round(quantiles["p95"], 3), "idle_seconds": round(alone, 3)}

    kept = orders(together, held["batch_from"], held["most"])
    found = {
        f"one worker, {name}": numbers(simulate(together, rate, order, requests), together.alone)
        for name, order in kept.items()
    }
    if workers > 1:
        for name, factor in (("", crowd), (", if they did not slow each other down", 1.0)):
            took = simulate_workers(apart, rate, workers, factor, requests)
            found[f"{workers} workers, each one after another{name}"] = numbers(took, apart.alone)
    alone = apart.alone if workers > 1 else together.alone
    service = min(alone, held["cheapest"] * workers)
    return {
        "orders": found,
        "late_share": round(late_share(service, rate, 2 * alone, workers, requests), 3),
        "speed_up": round(apart.alone / together.alone, 2),
    }


def table(found: dict[str, Any]) -> str:
    """The orders as a table."""
    lines = ["| simulated at half load | p50 | p95 | p99 | p95, s | idle, s |", "|---|---|---|---|---|---|"]
    for name, its in found["orders"].items():
        keys = ("p50", "p95", "p99", "seconds_p95", "idle_seconds")
        numbers = ("ever longer" if its[key] is None else f"{its[key]:g}" for key in keys)
        lines.append(f"| {' | '.join([name, *numbers])} |")
    return "\n".join(lines) + "\n"


def costs_of(held: dict[str, Any]) -> Costs:
    """The costs in a result file."""
    return Costs(**{**held, "step": {int(rows): each for rows, each in held["step"].items()}})


def bound(held: dict[str, Any]) -> str:
    """What no order can do, in words."""
    late, workers = held["late_share"], held["workers"]
    alone = costs_of(held["costs_apart"] if workers > 1 else held["costs"]).alone
    verdict = (
        "so p95 cannot be 2 ×"
        if late > 0.05
        else "so 2 × is not ruled out by this bound; an order that reaches it by leaving late images for last lets "
        "those wait without end"
    )
    speed = (
        f"All of torch's threads draw one image {held['speed_up']:g} × as fast as a worker's part of them; a worker's "
        f"step takes {held['crowd']:.2f} × as long while the others are at one. "
        if workers > 1
        else ""
    )
    return (
        f"p50, p95 and p99 are parts of what an idle server of the same kind takes. {speed}"
        f"{held['rate']:.2f} images arrive a second; an image alone takes {alone:.3f} s, and of a full batch the "
        f"machine draws one in {held['cheapest']:.3f} s. If each cost no more than the least of both and late ones "
        f"were not drawn at all, {late:.1%} would still end later than twice an idle server's time, whatever the "
        f"order: {verdict}."
    )


def main() -> None:
    held = read_json(results() / "serve-cpu.json")["queue"]
    found = report(held)
    print(table(found))
    print(bound({**held, **found}))


if __name__ == "__main__":
    main()
