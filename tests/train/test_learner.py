"""Which rollouts of a group the update takes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens.train import GrpoConfig, read_metrics, reinforce
from pyunictokens.train.learner import widest
from pyunictokens.train.objective import objective_of
from pyunictokens.train.statistics import UpdateStats
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import streamed_backward
from pyunictokens.utils.errors import UserError
from tests.train.test_reinforce import config, parts


@pytest.mark.parametrize(("group", "count"), [(8, 4), (9, 3), (6, 2), (7, 6), (5, 5)])
def test_the_widest_have_the_largest_variance_of_all_choices(group: int, count: int) -> None:
    generator = torch.Generator().manual_seed(group)
    for number in range(20):
        rewards = torch.randn(group, generator=generator)
        if number % 2:  # many equal ones, as rewards of right and wrong have them
            rewards = (rewards > 0.8).float()

        def variance(rows: Any, rewards: Tensor = rewards) -> float:
            return float(rewards[list(rows)].double().var(correction=0))

        rows = widest(rewards, count)
        assert len(set(rows)) == count and rows == sorted(rows)
        assert variance(rows) == pytest.approx(max(map(variance, itertools.combinations(range(group), count))))


def test_the_update_takes_rollouts_of_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rewards 0, 5, 9, 4 in a group of four the first and the third are taken, with advantages of their own and a
    loss that is their mean; the log still speaks of all four."""
    seen: list[tuple[Tensor, int, int]] = []

    def noted(model: Any, advantages: Tensor, settings: Any, images: ImageTrajectories, *rest: Any) -> UpdateStats:
        seen.append((advantages, len(images), rest[-1]))
        return streamed_backward(model, advantages, settings, images, *rest)

    given = [0.0, 5.0, 9.0, 4.0]
    monkeypatch.setattr("pyunictokens.train.learner.streamed_backward", noted)
    chosen = config(steps=1, objective="final_sample", inner_epochs=2, beta=0.01, rollouts_kept=0.5)
    result = reinforce(parts(), ["a toy"], lambda prompts, images: given[: len(images)], chosen, tmp_path / "run")
    assert len(seen) == 2
    for advantages, images, of in seen:
        assert advantages.tolist() == [-4.5, 4.5] and (images, of) == (2, 2)
    assert result.steps == 1 and '"reward_mean": 4.5' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_kept_rollouts_have_the_gradient_of_a_group_of_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the two that are kept is what the update says of their trajectories by themselves."""
    norms: list[float] = []
    taken: list[ImageTrajectories] = []

    def noted(model: Any, advantages: Tensor, settings: Any, images: ImageTrajectories, *rest: Any) -> UpdateStats:
        taken.append(images)
        found = streamed_backward(model, advantages, settings, images, *rest)
        norms.append(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
        return found

    monkeypatch.setattr("pyunictokens.train.learner.streamed_backward", noted)
    given = [3.0, 0.0, 1.0, 2.0]
    for name, changes in {"all": {}, "kept": {"rollouts_kept": 0.5}}.items():
        reinforce(parts(), ["a toy"], lambda prompts, images: given[: len(images)], _plain(**changes), tmp_path / name)
    whole, kept = taken
    assert torch.equal(kept.chosen_RTN, whole.chosen_RTN[:2]) and torch.equal(kept.inputs_RTN, whole.inputs_RTN[:2])
    assert torch.equal(kept.old_logp_RTN, whole.old_logp_RTN[:2]) and kept.prompt_of_row == whole.prompt_of_row[:2]
    # the same rewards at both ends and their mean between them: the middle pair adds nothing, the loss divides by four
    given[:] = [3.0, 0.0, 1.5, 1.5]
    reinforce(parts(), ["a toy"], lambda prompts, images: given[: len(images)], _plain(), tmp_path / "flat middle")
    assert norms[1] == pytest.approx(4 * norms[2], rel=1e-5) and norms[1] > 0


def test_masks_of_its_own_take_no_part_of_the_timesteps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for objective, passes in {"unigrpo": 1, "coupled": 3, "final_sample": 2}.items():
        chosen = config(steps=1, objective=objective, timesteps=4, timestep_fraction=0.5)
        assert objective_of(chosen).looks_at(chosen) == passes
        caplog.clear()
        reinforce(parts(), ["a toy"], colours, chosen, tmp_path / objective)
        said = f"timestep_fraction=0.5 does nothing: grpo.objective={objective}" in caplog.text
        assert said == (objective != "final_sample")


def test_an_inner_epoch_that_is_not_finite_says_that_the_first_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def noted(*given: Any) -> UpdateStats:
        nonlocal calls
        calls += 1
        found = streamed_backward(*given)
        return replace(found, loss=math.nan) if calls == 2 else found

    monkeypatch.setattr("pyunictokens.train.learner.streamed_backward", noted)
    model = parts()
    before = {name: value.detach().clone() for name, value in model.model.named_parameters()}
    reinforce(model, ["a toy"], colours, config(steps=1, inner_epochs=2, lr=1e-3), tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    assert line["skipped"] == "loss nan in inner epoch 2 of 2; those before it stand"
    assert any(not torch.equal(value, before[name]) for name, value in model.model.named_parameters())


def colours(prompts: list[str], images: Tensor) -> list[float]:
    return [float(image[0].mean()) for image in images]


def _plain(**changes: Any) -> GrpoConfig:
    return config(steps=1, beta=0.0, objective="unictask", **changes)


def test_a_part_of_the_rollouts_that_cannot_be_taken_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollouts_kept=0\.0: must be > 0"):
        config(rollouts_kept=0.0)
    with pytest.raises(UserError, match=r"rollouts_kept=1\.5: must be between 0 and 1"):
        config(rollouts_kept=1.5)
    with pytest.raises(UserError, match=r"rollouts_kept=0\.5 with shard=full: all ranks must take as many passes"):
        config(rollouts_kept=0.5, shard="full")
    assert config(group_size=8, rollouts_kept=0.1).rollouts_taken == 2
    assert config(group_size=9, rollouts_kept=0.5).rollouts_taken == 4
