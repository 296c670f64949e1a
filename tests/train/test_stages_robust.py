"""Concept stages whose steps are dealt over ranks, and steps whose numbers are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyunictokens.models import ConceptTokens
from pyunictokens.train import read_metrics, train_concept_tokens
from pyunictokens.train.concept_tokens import stages
from pyunictokens.train.concept_tokens.checkpoint import StageCheckpoint
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.utils.errors import UserError
from tests.train.ranks import together
from tests.train.world import World, stage_config, world


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


def test_a_step_that_is_not_finite_is_left_out_and_too_many_end_the_run(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in reinforcement: nothing is learned from it, it is counted, the noise moves on, and a run that ended of them
    goes on behind them with other draws."""
    real, calls, bad = stages.understanding_loss, [], {1, 3, 4}

    def broken(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        loss = real(*arguments)
        return loss * float("nan") if len(calls) - 1 in bad else loss

    monkeypatch.setattr(stages, "understanding_loss", broken)
    config = stage_config(stages=("understanding",), max_steps=6, max_bad_steps=2, epochs=9)

    def run(**more: Any) -> Any:
        arguments = (here.model, here.vq, here.tokenizer, here.data, config, tmp_path / "run")
        return train_concept_tokens(*arguments, **more)

    said = r"2 steps in a row, the last of them step 4 of stage understanding, are not finite: loss nan.*--resume"
    with pytest.raises(UserError, match=said):
        run()
    lines = read_metrics(tmp_path / "run", "stages.jsonl")
    assert [line.get("skipped") for line in lines] == [None, "loss nan", None, "loss nan", "loss nan"]
    left = {name: value.clone() for name, value in StageCheckpoint.load(tmp_path / "run").concept.state_dict().items()}
    assert all(value.isfinite().all() for value in left.values())
    bad.clear()
    found = run(resume=True)
    lines = read_metrics(tmp_path / "run", "stages.jsonl")
    assert [line["step"] for line in lines] == list(range(6)) and lines[5].get("skipped") is None
    assert not torch.equal(found.embed, left["embed"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("count", [2, 4])
def test_stages_over_ranks_are_those_of_one_process(here: World, tmp_path: Path, count: int) -> None:
    """Questions, images of a step and the model's own images are dealt; two ranks share one question and one image."""
    config = stage_config(stages=("understanding", "generation", "deepening"), max_steps=3, generated_images=3)

    def work(ranks: Ranks | None, out: Path) -> dict[str, torch.Tensor]:
        fresh = here.fresh()
        parts = fresh["model"], fresh["vq"], fresh["tokenizer"], fresh["concept_data"]
        found = train_concept_tokens(*parts, config, out, ranks=ranks)
        return {name: value.detach() for name, value in found.named_parameters()}

    alone = work(None, tmp_path / "alone")
    first, *others = together(count, lambda ranks: work(ranks, tmp_path / "ranks"), tmp_path / "results")
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    mine, theirs = (read_metrics(tmp_path / name, "stages.jsonl") for name in ("ranks", "alone"))
    assert len(mine) == len(theirs) == 9
    for line, true in zip(mine, theirs, strict=True):
        assert line["stage"] == true["stage"]
        for name in ("loss", "loss_understanding", "grad_norm"):
            assert line[name] == pytest.approx(true[name], rel=1e-3), name
    # AdamW divides a gradient by its own size: where that is rounding alone, a step may go either way
    off = torch.cat([(first[name] - value).flatten().abs() for name, value in alone.items()])
    assert off.max() <= 2 * 9 * config.lr and off.square().mean().sqrt() < 0.05 * config.lr
    assert ConceptTokens.load(tmp_path / "ranks" / "concept").embed.equal(first["embed"])
