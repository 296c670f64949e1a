"""Training over captured steps: groups of free answers, whose prompts all have other lengths, share one capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyunictokens.rollout.cuda_graphs import slots as captured
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.train import read_metrics, train_grpo
from pyunictokens.utils.profiling import PhaseReport
from tests.train.world import World, grpo_config, world


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled")
@pytest.mark.parametrize("previews", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_capture_serves_twelve_groups_of_free_answers(
    previews: bool, here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU mode "auto" captures nothing; its rules are taken here over steps that the host runs."""
    loops: list[int] = []
    prompts: list[tuple[int, ...]] = []
    make = captured.DeviceLoop

    def by_itself(engine: RolloutEngine, prefixes: Any, *fixed: Any) -> captured.CapturedSlots:
        *rest, judged = fixed
        prompts.append(tuple(prefixes.lengths))
        return captured.CapturedSlots(
            engine.model,  # type: ignore[arg-type]
            prefixes,
            *rest,
            engine._captures,
            "auto",
            repeats=engine.repeats,
            keep_first=judged,
        )

    def counted(*args: Any, **more: Any) -> captured.DeviceLoop:
        loops.append(1)
        return make(*args, **more)

    config = grpo_config(steps=12, checkpoint_every=0, timesteps=5, max_new_tokens=8, lr=1e-4)
    arguments = here.fresh()
    if not previews:
        arguments["preview_scorer"] = None
    train_grpo(**arguments, config=config, out_dir=tmp_path / "host")
    monkeypatch.setattr(RolloutEngine, "_slots", by_itself)
    monkeypatch.setattr(captured, "DeviceLoop", counted)
    arguments = here.fresh()
    if not previews:
        arguments["preview_scorer"] = None
    train_grpo(**arguments, config=config, out_dir=tmp_path / "captured")
    assert len(set(prompts)) >= 10, "the groups' prompts have the same lengths: this test sees nothing"
    shares = PhaseReport.load(tmp_path / "captured" / "phases.json").shares
    assert shares["row-steps that ran captured"] == 1.0
    assert len(loops) <= 2, f"{len(loops)} captures for {len(prompts)} groups"
    for mine, theirs in zip(*(read_metrics(tmp_path / name) for name in ("captured", "host")), strict=True):
        assert (mine["answer"], mine["prompt"]) == (theirs["answer"], theirs["prompt"])
        for name in ("loss", "reward_mean", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
