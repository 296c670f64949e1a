"""Rewards that are all alike teach nothing: it is said while the run goes on, and not only in its report."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyunictokens.rewards import Ensemble, RewardBatch
from pyunictokens.train import learner, train_grpo
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


class EverySecondGroup:
    """Scores one group by its red and finds the next all alike."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, batch: RewardBatch) -> torch.Tensor:
        self.asked += 1
        return batch.images[:, 0].mean((1, 2)) if self.asked % 2 else torch.full((len(batch.images),), 0.25)


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_group_without_spread_costs_no_pass_and_changes_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world(tmp_path / "data")
    passes: list[str] = []
    real = learner.streamed_backward
    monkeypatch.setattr(learner, "streamed_backward", lambda *a, **k: (passes.append(""), real(*a, **k))[1])

    def weights(name: str, **changes: Any) -> tuple[int, dict[str, torch.Tensor]]:
        passes.clear()
        fresh = {**here.fresh(), "rewards": Ensemble({"ber": EverySecondGroup()}, {"ber": 1.0})}
        config = grpo_config(steps=2, groups=2, checkpoint_every=0, trainable="full", **changes)
        train_grpo(**fresh, config=config, out_dir=tmp_path / name)
        return len(passes), fresh["model"].state_dict()

    count, left_out = weights("left out", beta=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(learner, "is_flat", lambda group: False)
        whole, taken = weights("taken", beta=0.0)
    assert (count, whole) == (2, 4)
    for name, value in taken.items():
        torch.testing.assert_close(left_out[name], value, rtol=0, atol=1e-6, msg=name)
    assert weights("reference", beta=0.04)[0] == 4, "its divergence from the reference counts in every group"
