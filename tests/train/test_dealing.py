"""Rows over ranks: nobody does more than can be helped, nobody stands idle, and results stay what they are."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.train import read_metrics, train_grpo
from pyunictokens.train.collector import Collector
from pyunictokens.train.distributed.dealing import deal, questions_a_step
from pyunictokens.train.distributed.ranks import Ranks
from tests.train.ranks import together
from tests.train.world import grpo_config, world


def least_largest(costs: list[float], world: int) -> float:
    """By trying all cuts."""
    found = sum(costs)
    for cuts in combinations_with_replacement(range(len(costs) + 1), world - 1):
        ends = [0, *cuts, len(costs)]
        found = min(found, max(sum(costs[a:b]) for a, b in pairwise(ends)))
    return found


@given(
    costs=st.lists(st.one_of(st.integers(1, 4).map(float), st.floats(0.1, 9.0)), min_size=1, max_size=8),
    world=st.integers(1, 4),
)
def test_the_rank_with_most_to_do_has_as_little_as_can_be(costs: list[float], world: int) -> None:
    dealt = deal(costs, world)
    assert [row for rows in dealt for row in rows] == list(range(len(costs))) and len(dealt) == world
    most = max(sum(costs[row] for row in rows) for rows in dealt)
    assert most == pytest.approx(least_largest(costs, world))


@given(rows=st.integers(1, 80), world=st.integers(1, 16))
def test_equal_rows_are_dealt_evenly(rows: int, world: int) -> None:
    sizes = [len(each) for each in deal([1.5] * rows, world)]
    assert sum(sizes) == rows and max(sizes) == -(-rows // world)
    assert max(sizes) - min(sizes) <= 1 or rows < world


@pytest.mark.parametrize(
    ("size", "world", "groups"),
    [(9, 1, 1), (9, 2, 1), (9, 3, 1), (9, 4, 2), (9, 8, 4), (8, 8, 1), (2, 64, 28), (3, 2, 2)],
)
def test_as_many_questions_that_no_rank_stands_idle(size: int, world: int, groups: int) -> None:
    found = questions_a_step(size, world)
    assert found == groups
    sizes = [len(each) for each in deal([1.0] * size * found, world)]
    assert 1 - sum(sizes) / (world * max(sizes)) <= 1 / 8


@pytest.mark.filterwarnings("ignore:.*rows are filled", "ignore:.*fork:DeprecationWarning")
def test_a_run_takes_more_questions_on_ranks_and_keeps_their_number(tmp_path: Path) -> None:
    """Three rows on two ranks leave a quarter idle, six none. One process that resumes goes on with two questions, and
    draws what the ranks drew."""
    here = world(tmp_path / "data")
    config = grpo_config(steps=2, lr=1e-4, groups=0)
    dealt: list[int] = []

    def work(ranks: Ranks) -> Any:
        real = Collector._sample

        def counted(self: Collector, task: Any, number: int, rows: range, with_codes: bool) -> Any:
            dealt.append(len(rows))
            return real(self, task, number, rows, with_codes)

        Collector._sample = counted  # type: ignore[method-assign]
        train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "ranks", ranks=ranks)
        return sum(dealt)

    assert together(2, work, tmp_path / "results") == [6, 6]
    train_grpo(**here.fresh(), config=grpo_config(steps=2, lr=1e-4, groups=2), out_dir=tmp_path / "alone")
    for mine, theirs in zip(*(read_metrics(tmp_path / name) for name in ("ranks", "alone")), strict=True):
        assert (mine["answer"], mine["candidates"]) == (theirs["answer"], theirs["candidates"])
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "ranks", resume=True)  # not refused: two, as it began
    assert "groups: 2" in (tmp_path / "ranks" / "grpo.yaml").read_text()
