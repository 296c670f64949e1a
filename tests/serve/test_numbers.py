"""`python -m benchmarks.serve`: every piece in small, and the page that says what its results say."""

from __future__ import annotations

import copy
import functools
import operator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serve, serve_queue, serve_storm
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.toy.model import load_toy
from pyunictokens.utils.files import read_json


@pytest.mark.slow
def test_every_piece_in_small(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    serve.main(["--quick", "--out", str(out)])
    report = read_json(out)
    assert report["quick"] and all(report[piece]["wall_seconds"] > 0 for piece in serve.PIECES)
    assert report["throughput"]["rows"] == serve.CLIENTS and report["throughput"]["ratio"] > 0.3
    assert report["latency"]["requests"] == serve.QUICK["requests"]
    assert report["cold"]["resident"] == serve.QUICK["resident"] < report["cold"]["on_disk"]
    assert set(report["latency"]["side_by_side"]) == {"p50_ratio", "p95_ratio"}
    assert "| all side by side (`serve --batch-from 1`) |" in serve.table(report)
    storm = report["storm"]
    assert (
        storm["wrong"] == [] and storm["lost_or_mixed_up"] == storm["rows_held_in_the_end"] == storm["exit_code"] == 0
    )
    assert storm["answered"] + storm["refused"] + storm["left"] == storm["requests"] == serve.QUICK["storm"]
    assert storm["faulty"] == sum(storm["faults"].values()) > 5 and storm["refused"] and storm["left"]
    assert "| lost or mixed-up answers of 40 requests" in serve.table(report)


def test_the_clock_counts_work_and_jumps_to_the_next_arrival() -> None:
    engine = RolloutEngine.of(load_toy())
    requests = [serve._request("a red star", seed, steps=1) for seed in range(3)]
    seconds, took = serve.play(engine, [(1000.0 * place, request) for place, request in enumerate(requests)])
    assert 2000 < seconds < 2100 and len(took) == 3 and max(took) < 50


def test_orders_are_simulated_as_queueing_theory_has_them() -> None:
    linear = serve_queue.Costs(steps=20, step={1: 0.05, 64: 64 * 0.05}, begin=0.0, end=0.0)  # a batch saves nothing
    assert linear.alone == pytest.approx(1.0) and linear.of_step(3) == pytest.approx(0.15)
    orders = serve_queue.orders(linear, 1000, 64)

    def ratios(order: str) -> dict[str, float]:
        took = serve_queue.simulate(linear, 0.5, orders[order])
        return {f"p{part}": took[part * (len(took) - 1) // 100] for part in (50, 95)}

    one, mixed = ratios("one after another"), ratios("all side by side (`serve --batch-from 1`)")
    assert one["p95"] == pytest.approx(3.03, abs=0.15), "M/D/1 at half load"
    assert mixed["p95"] > 1.3 * one["p95"] and mixed["p50"] > one["p50"]
    took = serve_queue.simulate(linear, 0.5, lambda there, now: there[:1])
    assert sum(took) / len(took) == pytest.approx(1.5, abs=0.05), "Pollaczek-Khinchine"
    two = serve_queue.simulate(linear, 1.0, lambda there, now: there[:1], processes=2)
    assert 1.177 < sum(two) / len(two) < 1.25, "more than M/D/2, whose images may change the process"


def test_no_order_leaves_fewer_late_than_the_bound() -> None:
    linear = serve_queue.Costs(steps=20, step={1: 0.05, 64: 64 * 0.05}, begin=0.0, end=0.0)
    bound = serve_queue.late_share(1.0, 0.5, 2.0, 8000)
    assert bound == pytest.approx(0.096, abs=0.01), "M/D/1 whose customers wait for one service at most"
    for order in serve_queue.orders(linear, 16, 64).values():
        took = serve_queue.simulate(linear, 0.5, order, 8000)
        assert sum(each > 2.0 for each in took) / len(took) >= bound


def test_an_answer_with_another_seed_is_noticed() -> None:
    seen = serve_storm.Seen()

    class Mixed:
        async def send(self, data: bytes) -> None:
            assert data.endswith(serve_storm._body(3))

        async def answer(self) -> tuple[int, bytes]:
            return 200, b'{"seed": 4, "data": [{"b64_json": ""}]}'

    import asyncio

    asyncio.run(serve_storm._ask(Mixed(), 3, seen))  # type: ignore[arg-type]
    assert seen.answered == 0 and "seed 3: 200" in seen.wrong[0]


def test_the_page_says_what_the_results_say() -> None:
    report = read_json(serve.ROOT / "benchmarks" / "results" / serve.NAME)
    page = serve.PAGE.read_text(encoding="utf-8")
    assert serve.updated(page, report) == page, "run: python -m benchmarks.serve --table"
    assert not report["quick"] and report["settings"] | serve.LONG == report["settings"]


@pytest.mark.parametrize("goal", serve.GOALS, ids=lambda goal: goal.key)
def test_a_goal_that_is_missed_is_said(goal: serve.Goal) -> None:
    report: dict[str, Any] = copy.deepcopy(read_json(serve.ROOT / "benchmarks" / "results" / serve.NAME))
    *path, last = [goal.piece, *goal.key.split(".")]
    functools.reduce(operator.getitem, path, report)[last] = goal.bound + (0.01 if goal.way == "at most" else -0.01)
    report["storm"]["lost_or_mixed_up"] = 1
    assert not goal.met(report)
    assert serve.table(report).count("missed") >= 2
