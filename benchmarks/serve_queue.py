"""Images that arrive at random before one core, without a model: which order of drawing gives which latency.

    python -m benchmarks.serve_queue        # from the costs in benchmarks/results/serve-cpu.json; seconds

`measure` takes what a step costs with 1, 2, 4, … images under way. `simulate` plays Poisson arrivals against such
costs: an *order* is told which images are there, the oldest first, and says which take the next step. `late_share` is a
bound for every order there is: each image costs as little as in a full batch, and one that cannot be done in time any
more is not drawn at all. Images of one size cost alike, so among them no choice leaves fewer late than to take each in
turn that can still be in time (Kise, Ibaraki and Mine, 1978), and "fewest steps left first" is the order of arrival.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.machine import results
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.rollout.serving import AT_ONCE, ImageRequest, ServingEngine
from pyunictokens.utils.files import read_json

ROWS = (1, 2, 4, 8, 16, 32, 64)
REQUESTS = 20_000
PROCESSES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Costs:
    """Seconds of one core."""

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
        """Of an image that nobody shares the core with."""
        return self.steps * self.step[1] + self.begin + self.end


def measure(engine: RolloutEngine, steps: int, repeats: int, guidance: float) -> Costs:
    """What steps cost in processor time."""
    dice = random.Random(0)

    def once(rows: int) -> list[float]:
        serving, took = ServingEngine(rows, rows, batch_from=1), []
        for number in range(rows):
            prompt = f"A photo of a red star on sand, number {number}."
            request = ImageRequest(prompt, steps=steps, guidance_scale=guidance, seed=dice.getrandbits(30))
            serving.add_request(engine, request, user=str(number))
        while serving.busy:
            start = time.thread_time()
            serving.step()
            took.append(time.thread_time() - start)
        return took

    once(2)
    runs = {rows: [once(rows) for _ in range(max(1, repeats // rows))] for rows in ROWS}
    step = {rows: statistics.median(each for run in its for each in run[1:-1]) for rows, its in runs.items()}
    first, last = (statistics.median(run[place] for run in runs[1]) for place in (0, -1))
    return Costs(steps, step, first - step[1], last - step[1])


@dataclass(eq=False)
class Image:
    """One image in the queue."""

    came: float
    left: int
    """Steps to go."""
    begun: bool = False


Order: TypeAlias = Callable[[Sequence[Image], float], Sequence[Image]]
"""(images that are there, the oldest first; now) → those that take the next step."""


def simulate(
    costs: Costs, rate: float, order: Order, requests: int = REQUESTS, seed: int = 0, processes: int = 1
) -> list[float]:
    """Seconds from arrival to end of each of `requests` images that arrive at `rate` a second, sorted.

    processes: so many, a core each; an image goes to the one that has the fewest (`serve --workers`)."""
    arrivals = deque(_arrivals(rate, requests, seed))
    there: list[list[Image]] = [[] for _ in range(processes)]
    active: list[list[Image]] = [[] for _ in range(processes)]
    ends = [math.inf] * processes
    took: list[float] = []

    def begin(process: int, now: float) -> None:
        active[process] = its = list(order(there[process], now)) if there[process] else []
        step = costs.of_step(len(its)) + costs.begin * sum(not image.begun for image in its) if its else math.inf
        ends[process] = now + step + costs.end * sum(image.left == 1 for image in its)

    while arrivals or any(there):
        process = min(range(processes), key=ends.__getitem__)
        now = ends[process]
        if arrivals and arrivals[0] < now:
            now = arrivals.popleft()
            process = min(range(processes), key=lambda each: len(there[each]))
            there[process].append(Image(now, costs.steps))
            if ends[process] == math.inf:
                begin(process, now)
            continue
        for image in active[process]:
            image.begun, image.left = True, image.left - 1
            if not image.left:
                took.append(now - image.came)
                there[process].remove(image)
        begin(process, now)
    return sorted(took)


def _arrivals(rate: float, requests: int, seed: int) -> itertools.accumulate[float]:
    dice = random.Random(seed)
    return itertools.accumulate(dice.expovariate(rate) for _ in range(requests))


def late_share(service: float, rate: float, within: float, requests: int = REQUESTS, seed: int = 0) -> float:
    """The share of images that no order can end within so many seconds, if each costs `service` seconds."""
    free, late = 0.0, 0
    for at in _arrivals(rate, requests, seed):
        end = max(at, free) + service
        if end <= at + within:
            free = end
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
        f"{AT_ONCE} at a time, from {batch_from} on side by side (`serve`)": as_the_engine,
        "all side by side (`serve --batch-from 1`)": lambda there, now: there[:most],
        "one after another": lambda there, now: there[:1],
        "the four oldest": lambda there, now: there[:4],
        "one after another, those last that are late already": in_time,
    }


def report(
    costs: Costs, rate: float, cheapest: float, batch_from: int, most: int, requests: int = REQUESTS
) -> dict[str, Any]:
    """Latencies against an idle server's at `rate` images a second, by order; and the bound, `cheapest` being the
    seconds of an image in a full batch."""

    def ratios(order: Order, processes: int = 1) -> dict[str, float]:
        took = simulate(costs, processes * rate, order, requests, processes=processes)
        return {f"p{part}": round(took[part * (len(took) - 1) // 100] / costs.alone, 2) for part in (50, 95, 99)}

    found = orders(costs, batch_from, most)
    return {
        "orders": {name: ratios(order) for name, order in found.items()},
        "processes": {str(number): ratios(next(iter(found.values())), number) for number in PROCESSES},
        "late_share": round(late_share(cheapest, rate, 2 * costs.alone, requests), 3),
    }


def table(found: dict[str, Any]) -> str:
    """The orders as a table."""
    lines = ["| order of drawing, simulated at half load | p50 | p95 | p99 |", "|---|---|---|---|"]
    lines += [f"| {name} | {its['p50']:g} | {its['p95']:g} | {its['p99']:g} |" for name, its in found["orders"].items()]
    lines += ["", "| processes, a core each (`serve --workers`), simulated at half load | p50 | p95 | p99 |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {name} | {its['p50']:g} | {its['p95']:g} | {its['p99']:g} |" for name, its in found["processes"].items()
    ]
    return "\n".join(lines) + "\n"


def costs_of(held: dict[str, Any]) -> Costs:
    """The costs in a result file."""
    return Costs(**{**held["costs"], "step": {int(rows): each for rows, each in held["costs"]["step"].items()}})


def bound(held: dict[str, Any], alone: float) -> str:
    """What no order can do, in words."""
    late = held["late_share"]
    verdict = (
        "so p95 cannot be 2 ×" if late > 0.05 else "so this bound leaves 2 × open; no order that was tried reaches it"
    )
    return (
        f"An image alone takes {alone:.3f} s, one of a full batch {held['cheapest']:.3f} s, and {held['rate']:.2f} "
        f"arrive a second. If each cost no more than in a full batch and late ones were not drawn at all, {late:.1%} "
        f"would still end later than twice an idle server's time, whatever the order: {verdict}."
    )


def main() -> None:
    held = read_json(results() / "serve-cpu.json")["queue"]
    costs = costs_of(held)
    found = report(costs, held["rate"], held["cheapest"], held["batch_from"], held["most"])
    print(table(found))
    print(bound({**held, **found}, costs.alone))


if __name__ == "__main__":
    main()
