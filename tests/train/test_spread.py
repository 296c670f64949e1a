"""Rewards that are all alike teach nothing: it is said while the run goes on, and not only in its report."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyunictokens.rewards import Ensemble, RewardBatch
from pyunictokens.train import train_grpo
from pyunictokens.train.spread import FLAT_GROUPS, SpreadWatch

from .world import Brevity, experts, grpo_config, world


def group(*rewards: float, **parts: list[float]) -> Any:
    kept = {name: torch.tensor(values) for name, values in parts.items()}
    return SimpleNamespace(summary=SimpleNamespace(rewards=torch.tensor(rewards), parts=kept))


FLAT = group(0.5, 0.5, 0.5, ber=[0.25, 0.75, 0.5], fer=[0.0, 0.0, 0.0])


def test_it_is_said_after_a_number_of_groups_in_a_row_and_then_more_rarely() -> None:
    watch = SpreadWatch()
    said = [bool(watch.see([FLAT])) for _ in range(4 * FLAT_GROUPS + 1)]
    assert [place + 1 for place, each in enumerate(said) if each] == [FLAT_GROUPS, 2 * FLAT_GROUPS, 4 * FLAT_GROUPS]
    assert not watch.see([group(0.5, 0.6)]) and watch.flat == 0
    assert not any(watch.see([FLAT]) for _ in range(FLAT_GROUPS - 1))
    assert not watch.see([group(float("nan"), 0.5)]), "what is not finite is said elsewhere and counts as neither"
    words = watch.see([group(0.5, 0.5 + 1e-8), FLAT])
    assert f"in {FLAT_GROUPS} groups in a row" in words or f"in {FLAT_GROUPS + 1} groups in a row" in words
    watch = SpreadWatch()
    words = watch.see([FLAT] * FLAT_GROUPS)
    assert "all 3 rollouts had one reward (the last: 0.5; ber 0.25 to 0.75, fer 0)" in words and "samples/" in words


class Constant:
    def score(self, batch: RewardBatch) -> torch.Tensor:
        return torch.full((len(batch.images),), 0.25)


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_run_on_a_constant_reward_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = world(tmp_path / "data")
    config = grpo_config(steps=3, groups=2, checkpoint_every=0)
    for name, rewards, wanted in (
        ("constant", Ensemble({"ber": Constant()}, {"ber": 1.0}), 1),
        ("mixed", experts(), 0),
        ("one of two", Ensemble({"ber": Constant(), "tier": Brevity()}, {"ber": 0.5, "tier": 0.5}), 0),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train_grpo(**{**here.fresh(), "rewards": rewards}, config=config, out_dir=tmp_path / name)
        said = [line for line in caplog.messages if "nothing is learned from them" in line]
        assert len(said) == wanted, name
        assert all(
            "step 2: in 5 groups in a row all 3 rollouts had one" in line and "; ber 0.25)" in line for line in said
        )
