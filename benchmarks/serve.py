"""What serving costs beside drawing alone, on the embedded toy: ratios, both sides in turn in one run.

    python -m benchmarks.serve                        # minutes; writes benchmarks/results/serve-cpu.json
    python -m benchmarks.serve --quick                # seconds: every piece in small
    python -m benchmarks.serve --only throughput,latency
    python -m benchmarks.serve --table                # the table in docs/serving.md, from the results

throughput  64 clients, each of whom begins at a random moment and asks again when answered, against one offline batch
            (`generate_images`) of as many rows. Each request has a seed of its own, as clients have.
latency     Poisson arrivals at half of that throughput against requests one after another: p95 of each; also with all
            images side by side (`--batch-from 1`), the same arrivals.
workers     the same with two processes, a core each (`serve --workers 2`), by the clock: the machine must be idle. Half
            of what one offline batch draws on both cores, and half of what the processes draw
            (benchmarks/serve_workers.py).
queue       what steps cost by the images under way, and other orders of drawing simulated over it, with a bound for all
            (benchmarks/serve_queue.py).
cold        the first image of a concept that is on disk against one that is at hand: open, seat and draw.
storm       requests over HTTP to `pyunictokens serve`, a share of which is malformed, aborted or disconnected
            (benchmarks/serve_storm.py): the server's memory, lost and mixed-up answers.

All but workers and storm drive engine and catalog in this thread, and their clock is the processor time of this thread,
which jumps over stretches without work to the next arrival: other programs on the machine take time, and not this one.
What they do to caches remains, so the sides take turns. `cold` reads files the system has in memory.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch

from benchmarks import serve_queue, serve_storm, serve_workers
from benchmarks.machine import ROOT, results
from benchmarks.run_cpu import machine
from pyunictokens.models import ConceptTokens, Sources
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.rollout.serving import BATCH_FROM, Drawn, Ended, ImageRequest, ServingEngine
from pyunictokens.serve.catalog import Catalog, Limits
from pyunictokens.toy.model import load_toy
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import read_json, write_json, write_text_atomic

PIECES = ("throughput", "latency", "workers", "queue", "cold", "storm")
LOADED = 2
"""Load average above which something else must have run: the benchmark itself keeps one core busy, and its clients."""
CLIENTS = 64
NAME, PAGE = "serve-cpu.json", ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- numbers: begin -->\n", "<!-- numbers: end -->"
STEPS, GUIDANCE = 12, 3.0
"""As `pyunictokens serve` draws with the toy where nothing else is asked."""

LONG = {"asks": 1, "rounds": 2, "requests": 40, "clients": 64, "half_load": 160}
LONG |= {"resident": 200, "on_disk": 1000, "pairs": 30, "storm": 10_000}
QUICK = {"asks": 1, "rounds": 1, "requests": 6, "clients": 4, "half_load": 6}
QUICK |= {"resident": 3, "on_disk": 8, "pairs": 2, "storm": 40}


class Clock:
    """Processor seconds of this thread, and what was jumped over."""

    def __init__(self) -> None:
        self._jumped = 0.0

    def __call__(self) -> float:
        return time.thread_time() + self._jumped

    def wait_until(self, moment: float) -> None:
        self._jumped += max(0.0, moment - self())


def _prompts(count: int, dice: random.Random) -> list[str]:
    words = ("red", "blue", "green", "purple"), ("star", "dog", "mug", "cat"), ("sand", "grass", "snow", "wood")
    return ["A photo of a {} {} on {}.".format(*map(dice.choice, words)) for _ in range(count)]


def _request(prompt: str, seed: int, steps: int, concept: str | None = None) -> ImageRequest:
    return ImageRequest(prompt, concept, steps=steps, guidance_scale=GUIDANCE, seed=seed)


def play(
    engine: RolloutEngine,
    arrivals: Sequence[tuple[float, ImageRequest]],
    then: Callable[[int], ImageRequest | None] = lambda number: None,
    batch_from: int = BATCH_FROM,
) -> tuple[float, list[float]]:
    """Requests that arrive at given seconds, and what a client asks next when his n-th request is answered (`then`).

    Returns (seconds from the first arrival to the last answer, the seconds each request took, in order of arrival).
    """
    clock = Clock()
    serving = ServingEngine(CLIENTS, 4 * CLIENTS + len(arrivals), clock, batch_from)
    due = sorted(enumerate(arrivals), key=lambda each: -each[1][0])
    begin = clock() - min(at for at, _ in arrivals)
    under_way: dict[int, tuple[int, float]] = {}
    took: list[float] = []
    drawn = 0
    while due or serving.busy:
        if not serving.busy:
            clock.wait_until(begin + due[-1][1][0])
        while due and begin + due[-1][1][0] <= clock():
            place, (at, request) = due.pop()
            under_way[serving.add_request(engine, request, user=str(place))] = place, begin + at
        for event in serving.step():
            drawn += isinstance(event, Drawn)
            if not isinstance(event, Ended):
                continue
            if event.error is not None:
                raise event.error
            place, at = under_way.pop(event.ticket)
            took.append(clock() - at)
            following = then(place)
            if following is not None:
                under_way[serving.add_request(engine, following, user=str(place))] = place, clock()
    if drawn != len(took):
        raise UserError(f"{len(took)} requests were answered with {drawn} images")
    return clock() - begin - min(at for at, _ in arrivals), took


def throughput(engine: RolloutEngine, sizes: dict[str, int], steps: int) -> dict[str, Any]:
    """64 clients against one offline batch."""
    dice = random.Random(0)
    rows = CLIENTS * sizes["asks"]

    def offline() -> float:
        start = time.thread_time()
        engine.generate_images(_prompts(rows, dice), steps=steps, guidance_scale=GUIDANCE, seed=1, record=False)
        return time.thread_time() - start

    def served(batch: float) -> float:
        asked = dict.fromkeys(range(CLIENTS), 1)

        def then(client: int) -> ImageRequest | None:
            asked[client] += 1
            again = asked[client] <= sizes["asks"]
            return _request(_prompts(1, dice)[0], dice.getrandbits(30), steps) if again else None

        begins = [(dice.uniform(0, batch / 4), prompt) for prompt in _prompts(CLIENTS, dice)]
        return play(engine, [(at, _request(text, dice.getrandbits(30), steps)) for at, text in begins], then)[0]

    engine.max_rows = CLIENTS
    engine.generate_images(_prompts(2, dice), steps=steps, guidance_scale=GUIDANCE, seed=1, record=False)
    sides = []
    for _ in range(sizes["rounds"]):
        batch = offline()
        sides.append((batch, served(batch)))
    batch, online = (statistics.median(side) for side in zip(*sides, strict=True))
    each = sorted(batch / online for batch, online in sides)
    return {
        "clients": CLIENTS,
        "rows": rows,
        "rounds": len(sides),
        "ratio": round(statistics.median(each), 3),
        "ratio_min": round(each[0], 3),
        "ratio_max": round(each[-1], 3),
        "offline_seconds": round(batch, 3),
        "served_seconds": round(online, 3),
    }


def latency(engine: RolloutEngine, sizes: dict[str, int], steps: int, rows_per_second: float) -> dict[str, Any]:
    """Half load against an idle server."""
    dice = random.Random(1)
    busy: list[float] = []
    mixed: list[float] = []
    idle: list[float] = []
    for _ in range(sizes["rounds"]):
        at, arrivals = 0.0, []
        for prompt in _prompts(sizes["requests"], dice):
            at += dice.expovariate(rows_per_second / 2)
            arrivals.append((at, _request(prompt, dice.getrandbits(30), steps)))
        busy += play(engine, arrivals)[1]
        mixed += play(engine, arrivals, batch_from=1)[1]
        for prompt in _prompts(max(4, sizes["requests"] // 4), dice):
            idle += play(engine, [(0.0, _request(prompt, dice.getrandbits(30), steps))])[1]
    p50, p95 = ([_quantile(side, part) for side in (busy, mixed, idle)] for part in (0.5, 0.95))
    return {
        "requests": len(busy),
        "load": 0.5,
        "p95_ratio": round(p95[0] / p95[2], 3),
        "p50_ratio": round(p50[0] / p50[2], 3),
        "side_by_side": {"p95_ratio": round(p95[1] / p95[2], 3), "p50_ratio": round(p50[1] / p50[2], 3)},
        "half_load_seconds": {"p50": round(p50[0], 4), "p95": round(p95[0], 4)},
        "idle_seconds": {"p50": round(p50[2], 4), "p95": round(p95[2], 4)},
    }


def workers(folder: Path, sizes: dict[str, int], steps: int) -> dict[str, Any]:
    """Half load against idle, over two processes."""

    def request(dice: random.Random) -> ImageRequest:
        return _request(_prompts(1, dice)[0], dice.getrandbits(30), steps)

    def offline(engine: RolloutEngine, count: int) -> object:
        engine.max_rows = count
        prompts = _prompts(count, random.Random(0))
        return engine.generate_images(prompts, steps=steps, guidance_scale=GUIDANCE, seed=1, record=False)

    return serve_workers.run(folder, sizes["half_load"], sizes["clients"], request, offline)


def queue(engine: RolloutEngine, sizes: dict[str, int], steps: int, known: dict[str, Any]) -> dict[str, Any]:
    """Orders of drawing, simulated over what steps cost now; `known`: what `throughput` found."""
    costs = serve_queue.measure(engine, max(3, steps), 8, GUIDANCE)  # neither the first nor the last
    rate, cheapest = known["rows"] / known["served_seconds"] / 2, known["offline_seconds"] / known["rows"]
    found = serve_queue.report(costs, rate, cheapest, BATCH_FROM, CLIENTS)
    numbers = {"rate": rate, "cheapest": cheapest, "batch_from": BATCH_FROM, "most": CLIENTS}
    return {"costs": asdict(costs), **numbers, **found}


def _quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, round(part * (len(values) - 1)))]


def write_runs(folder: Path, count: int) -> None:
    """Runs that learned concept tokens, called c0, c1, …"""
    width = load_toy().model.width
    for number in range(count):
        name = f"c{number}"
        ConceptTokens(name, width, 8, 4, seed=number).save(folder / name / "concept")
        write_json(folder / name / "about.json", {"name": name, "extra_info": []})


def cold(folder: Path, sizes: dict[str, int], steps: int) -> dict[str, Any]:
    """A concept from disk against one at hand."""
    resident, on_disk = sizes["resident"], sizes["on_disk"]
    serving = ServingEngine(CLIENTS)
    limits = Limits(concepts=resident)
    catalog = Catalog(folder=folder, flags=Sources(), device="cpu", limits=limits, in_use=serving.concepts_in_use)

    def first_image(name: str) -> float:
        start = time.thread_time()
        engine = catalog.seat(catalog.open(name))
        serving.add_request(engine, _request(f"A photo of <{name}> on sand.", 7, steps, name))
        while serving.busy:
            for event in serving.step():
                if isinstance(event, Ended) and event.error is not None:
                    raise event.error
        return time.thread_time() - start

    for number in range(resident):
        catalog.seat(catalog.open(f"c{number}"))
    first_image(f"c{resident - 1}")
    pairs = []
    for turn in range(sizes["pairs"]):
        new = f"c{resident + turn % (on_disk - resident)}"
        pairs.append((first_image(new), first_image(new)))  # the second time it is at hand
    if catalog.resident != resident:
        raise UserError(f"{catalog.resident} concepts are at hand, and {resident} are the limit")
    fresh, warm = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "resident": resident,
        "on_disk": on_disk,
        "pairs": len(pairs),
        "ratio": round(statistics.median(first / second for first, second in pairs), 3),
        "cold_seconds": round(fresh, 4),
        "warm_seconds": round(warm, 4),
    }


@dataclass(frozen=True)
class Goal:
    """A line of the table."""

    piece: str
    words: str
    key: str
    """Of the number in the piece's report, parts separated by dots."""
    way: str
    bound: float

    def value(self, report: dict[str, Any]) -> float:
        """What was measured."""
        return reduce(getitem, self.key.split("."), report[self.piece])

    def met(self, report: dict[str, Any]) -> bool:
        """Whether it was reached."""
        value = self.value(report)
        whole = self.piece != "storm" or report[self.piece]["lost_or_mixed_up"] == 0
        return (value >= self.bound if self.way == "at least" else value <= self.bound) and whole


GOALS = (
    Goal(
        "throughput", "64 clients with random arrivals, throughput against one offline batch", "ratio", "at least", 0.9
    ),
    Goal("workers", "the same with `--workers 2`, two cores and a batch on both", "throughput_ratio", "at least", 0.9),
    Goal("latency", "p95 latency at half of that throughput, against an idle server's", "p95_ratio", "at most", 2.0),
    Goal(
        "workers",
        "the same with `--workers 2`, at half of what a batch on both cores draws",
        "half_of.batch.p95_ratio",
        "at most",
        2.0,
    ),
    Goal("workers", "the same at half of what the two processes draw", "half_of.own.p95_ratio", "at most", 2.0),
    Goal("cold", "first image of a concept on disk, against one at hand", "ratio", "at most", 1.2),
    Goal("storm", "memory after all requests, against after the first tenth", "memory_ratio", "at most", 1.05),
)


def table(report: dict[str, Any]) -> str:
    """The table of docs/serving.md."""
    lines = ["| on the toy, one core where no other number is said | measured | goal | |", "|---|---|---|---|"]
    for goal in GOALS:
        measured, verdict = "not measured", ""
        if goal.piece in report:
            measured, verdict = f"{goal.value(report):g} ×", "met" if goal.met(report) else "missed"
        lines.append(f"| {goal.words} | {measured} | {goal.way} {goal.bound:g} × | {verdict} |")
    said = []
    if "storm" in report:
        storm = report["storm"]
        lost, faulty = storm["lost_or_mixed_up"], f"{storm['faulty']:,} of them malformed, aborted or disconnected"
        verdict = "missed" if lost else "met"
        lines.append(
            f"| lost or mixed-up answers of {storm['requests']:,} requests, {faulty} | {lost} | 0 | {verdict} |"
        )
    if "cold" in report:
        said.append(f"{report['cold']['resident']} concepts at hand, {report['cold']['on_disk']:,} on disk.")
    if "latency" in report:
        side = report["latency"]["side_by_side"]
        said.append(
            f"The median at half load is {report['latency']['p50_ratio']:g} × an idle server's; with all images side "
            f"by side (`--batch-from 1`) it is {side['p50_ratio']:g} ×, and p95 {side['p95_ratio']:g} ×."
        )
    if "workers" in report:
        two = report["workers"]
        said.append(
            f"Two processes draw {two['images_per_second']:.1f} images a second, one offline batch on two threads "
            f"{two['offline_images_per_second']:.1f}, by the clock."
        )
        for name, whose in (("batch", "the batch draws"), ("own", "the processes draw")):
            its = two["half_of"][name]
            idle, busy = its["idle_seconds"], its["busy_seconds"]
            by_round = ", ".join(f"{each:g}" for each in its["p95_ratios"])
            said.append(
                f"At half of what {whose} the median is {busy['p50']:.2f} s and p95 {busy['p95']:.2f} s, against "
                f"{idle['p50']:.2f} and {idle['p95']:.2f} s idle: medians of {two['rounds']} rounds of "
                f"{two['requests']} requests, whose p95 was {by_round} × that of the idle ones."
            )
    said.append(
        "But for the two processes, ratios are of processor time, both sides in turn; memory and answers are those of "
        "a server over HTTP."
    )
    loaded = [
        piece for piece in PIECES if piece in report and report[piece]["load_average"] > LOADED + (piece == "workers")
    ]
    if loaded:
        most = max(report[piece]["load_average"] for piece in loaded)
        said.append(f"Other programs ran beside these parts: {', '.join(loaded)} (load average up to {most:g}).")
    said.append("`python -m benchmarks.serve` measures it again.")
    text = "\n".join(lines) + "\n\n" + "\n".join(said) + "\n"
    if "queue" in report:
        held = report["queue"]
        text += f"\n{serve_queue.table(held)}\n{serve_queue.bound(held, serve_queue.costs_of(held).alone)}\n"
    return text


def updated(text: str, report: dict[str, Any]) -> str:
    """The page with the table of a report."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(report) + END + rest.partition(END)[2]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every piece in small; says nothing of the goals")
    parser.add_argument("--only", help=f"some of {','.join(PIECES)}; what else the result file holds stays")
    parser.add_argument("--requests", type=int, help="requests of the storm (10000)")
    parser.add_argument("--out", type=Path, help=f"result file; benchmarks/results/{NAME} by default")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table into docs/serving.md")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None and not options.table:
        options.out = Path(tempfile.gettempdir()) / "serve-quick.json"
    out = options.out or results() / NAME
    if options.table:
        write_text_atomic(PAGE, updated(PAGE.read_text(encoding="utf-8"), read_json(out)))
        return
    pieces = options.only.split(",") if options.only else list(PIECES)
    if strange := set(pieces) - set(PIECES):
        parser.error(f"--only {','.join(sorted(strange))}: must be some of {', '.join(PIECES)}")
    sizes = dict(QUICK if options.quick else LONG)
    sizes["storm"] = options.requests or sizes["storm"]
    steps = 2 if options.quick else STEPS
    torch.set_num_threads(1)
    report: dict[str, Any] = read_json(out) if options.only and out.is_file() else {}
    own: dict[str, Any] = {}
    engine = RolloutEngine.of(load_toy())
    with tempfile.TemporaryDirectory() as room:
        runs = Path(room) / "runs"
        write_runs(runs, sizes["on_disk"] if "cold" in pieces else 4)

        def known() -> dict[str, Any]:
            if "throughput" not in report:
                report["throughput"] = throughput(engine, {**sizes, "rounds": 1}, steps)
            return report["throughput"]

        measure: dict[str, Callable[[], dict[str, Any]]] = {
            "throughput": lambda: throughput(engine, sizes, steps),
            "latency": lambda: latency(engine, sizes, steps, known()["rows"] / known()["served_seconds"]),
            "workers": lambda: workers(runs, sizes, steps),
            "queue": lambda: queue(engine, sizes, steps, known()),
            "cold": lambda: cold(runs, sizes, steps),
            "storm": lambda: serve_storm.run(runs, sizes["storm"], 0.4 if options.quick else serve_storm.FAULTS),
        }
        for piece in [piece for piece in PIECES if piece in pieces]:
            begun = time.perf_counter(), os.getloadavg()[0]
            report[piece] = measure[piece]()
            load = round(max(begun[1], os.getloadavg()[0]), 1)
            report[piece] |= {"wall_seconds": round(time.perf_counter() - begun[0], 1), "load_average": load}
            own[piece] = report[piece]
            print(piece, report[piece], flush=True)
    report = {**(read_json(out) if options.only and out.is_file() else {}), **own}  # another may have written meanwhile
    report["command"] = " ".join(["python -m benchmarks.serve", *(sys.argv[1:] if arguments is None else arguments)])
    report["machine"] = machine()
    report["quick"] = options.quick
    report["settings"] = {**sizes, "steps": steps, "guidance_scale": GUIDANCE}
    write_json(out, report)
    print(out)


if __name__ == "__main__":
    main()
