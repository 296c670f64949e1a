"""One run over several ranks: stages, measuring and reinforcement are all done by all of them, and what is measured is
what one process measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyunictokens.evaluate.result import EvalResult
from pyunictokens.models.bundle import ModelBundle
from pyunictokens.runs import pipeline
from pyunictokens.runs.bundle import Scorers
from pyunictokens.runs.context import Parts, RunContext
from pyunictokens.train import read_metrics
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.utils.signals import Stopped
from tests.soak.chaos import settings
from tests.train.ranks import together
from tests.train.world import World, experts, red_preview, tiny_model, world

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows are filled"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


IMAGES = "reasoning_generation"


def run(
    here: World, out: Path, ranks: Ranks | None, stop: Callable[[], bool] | None = None, resume: bool = False
) -> list[tuple[int, int]]:
    """Stages, reinforcement and three evaluations; how many questions and prompts this process measured in each."""
    config = settings(steps=2)
    config = replace(config, evaluation=replace(config.evaluation, tasks=("vqa", "recognition", IMAGES)))
    bundle = ModelBundle(tiny_model(), here.vq, here.tokenizer)
    shares: list[tuple[int, int]] = []
    real = pipeline.measure

    def measured(*arguments: Any) -> Any:
        found = real(*arguments)
        shares.append((len(found.records.get("vqa", [])), len(found.records.get(IMAGES, []))))
        return found

    more: dict[str, Any] = {name: value for name, value in (("ranks", ranks), ("stop", stop)) if value is not None}
    context = RunContext(bundle, here.data, config, out, Scorers(experts(), red_preview), **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "measure", measured)
        patch.setattr(pipeline._Run, "report", lambda self: self.out / "report.html")
        pipeline.run_concept(context, Parts(resume=resume))
    return shares


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_everything_is_done_by_all_ranks_and_measured_as_by_one(here: World, tmp_path: Path, count: int) -> None:
    alone = run(here, tmp_path / "alone", None)
    shares = together(count, lambda ranks: run(here, tmp_path / "ranks", ranks), tmp_path / "results")
    assert all(len(own) == len(alone) == 3 for own in shares) and min(alone[0]) > 0, shares
    for place, whole in enumerate(alone):
        for column in (0, 1):
            parts = [own[place][column] for own in shares]
            assert sum(parts) == whole[column] and max(parts) - min(parts) <= 1
    mine, theirs = (EvalResult.load(tmp_path / name / "base.json") for name in ("ranks", "alone"))
    assert mine.records.keys() == theirs.records.keys() and mine.notes == theirs.notes
    for task, records in theirs.records.items():
        for record, true in zip(mine.records[task], records, strict=True):
            scores, wanted = record.pop("scores"), true.pop("scores")
            assert record == true and scores.keys() == wanted.keys()
            assert all(scores[name] == pytest.approx(wanted[name], abs=1e-5) for name in wanted)
    for task, images in theirs.images.items():
        for one, other in zip(mine.images[task], images, strict=True):
            assert int((one.int() - other.int()).abs().max()) <= 1, task
    lengths = {task: len(records) for task, records in theirs.records.items()}
    for name in ("before", "after"):
        found = EvalResult.load(tmp_path / "ranks" / f"{name}.json").records
        assert {task: len(records) for task, records in found.items()} == lengths
    lines, wanted_lines = (read_metrics(tmp_path / name / "stages", "stages.jsonl") for name in ("ranks", "alone"))
    assert len(lines) == len(wanted_lines) > 0
    assert lines[0]["loss"] == pytest.approx(wanted_lines[0]["loss"], abs=1e-5)
    assert [line["step"] for line in read_metrics(tmp_path / "ranks")] == [0, 1]


def test_a_rank_that_is_asked_to_stop_while_measuring_stops_all(here: World, tmp_path: Path) -> None:
    def stopped(ranks: Ranks) -> Any:
        def stop() -> bool:
            return ranks.rank == 1

        with pytest.raises(Stopped, match="stopped while measuring"):
            run(here, tmp_path / "run", ranks, stop)
        return "stopped"

    assert together(2, stopped, tmp_path / "results") == ["stopped", "stopped"]
    assert not (tmp_path / "run" / "base.json").exists()
    together(2, lambda ranks: run(here, tmp_path / "run", ranks, resume=True), tmp_path / "results2")
    assert json.loads((tmp_path / "run" / "after.json").read_text())["metrics"]
