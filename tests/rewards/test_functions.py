"""Plain functions as reward models, and whatever else a user may hand over as rewards."""

from __future__ import annotations

import math
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyunictokens.rewards import Ensemble, EnsembleScore, RewardBatch, RewardFunction, RewardModel, Rewards, as_rewards
from pyunictokens.utils.errors import UserError


def batch(rows: int = 3, seed: int = 0, **more: Any) -> RewardBatch:
    pixels = torch.rand(rows, 3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return RewardBatch(pixels, [f"p{row}" for row in range(rows)], **more)


def red(prompts: list[str], images: Tensor) -> list[float]:
    return images[:, 0].mean(dim=(1, 2)).tolist()


def test_a_function_is_a_reward_model() -> None:
    given, model = batch(5), RewardFunction(red)
    assert isinstance(model, RewardModel)
    torch.testing.assert_close(model.score(given), given.images[:, 0].mean(dim=(1, 2)))
    ensemble = Ensemble({"red": red, "blue": lambda images, **_: images[:, 2].mean(dim=(1, 2))}, {"red": 1, "blue": 2})
    expected = given.images[:, 0].mean(dim=(1, 2)) + 2 * given.images[:, 2].mean(dim=(1, 2))
    torch.testing.assert_close(ensemble.score(given).total, expected)


def test_columns_and_answers_reach_it_by_name() -> None:
    seen: dict[str, Any] = {}

    def everything(prompts: list[str], images: Tensor, **columns: Any) -> list[float]:
        seen.update(columns)
        return [float(value) for value in columns["wanted"]]

    given = batch(answers=["a", "b", "c"], columns={"wanted": [1, 0.5, 2], "tag": ["x", None, "z"]})
    assert RewardFunction(everything).score(given).tolist() == [1.0, 0.5, 2.0]
    assert seen == {"answers": ["a", "b", "c"], "wanted": [1, 0.5, 2], "tag": ["x", None, "z"]}
    assert RewardFunction(lambda prompts, wanted: wanted).score(given.row(1)).tolist() == [0.5]
    with pytest.raises(UserError, match="'tag' has 2 values for 3 images"):
        batch(columns={"tag": [1, 2]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "red returned 2 numbers for 3 images"),
        (torch.zeros(3, 1), r"red returned \(3, 1\) for 3 images"),
        (1.0, "red returned a float: must be a list of 3 numbers"),
        (None, "red returned a NoneType"),
        ("abc", "red returned a str"),
        ([1, "2", 3], r"red gave '2' for image 1 \(prompt 'p1'\): must be a number"),
        ([1, 2, None], r"red gave None for image 2 \(prompt 'p2'\)"),
        ([[1], 2, 3], r"red gave \[1\] for image 0 \(prompt 'p0'\)"),
        ([torch.zeros(2), 2, 3], r"for image 0 \(prompt 'p0'\)"),
    ],
)
def test_what_is_no_number_names_the_prompt(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardFunction(lambda prompts, images: values, "red").score(batch())


def test_numbers_of_every_kind_are_taken_and_what_is_not_finite_is_noted() -> None:
    kinds = [np.float32(0.5), torch.tensor(2.0), True]
    assert RewardFunction(lambda images: kinds).score(batch()).tolist() == [0.5, 2.0, 1.0]
    assert RewardFunction(lambda images: np.array([1, 2, 3])).score(batch()).tolist() == [1, 2, 3]
    score = as_rewards(lambda images: [0.0, 10**400, math.nan]).score(batch())
    assert score.invalid[0].rows == (1, 2) and score.invalid[0].prompt == "p1"
    with pytest.raises(UserError, match="reward function takes prompts, images"):
        RewardFunction(lambda batch: [])
    with pytest.raises(UserError, match="must be callable"):
        RewardFunction(3)  # type: ignore[arg-type]


class Blue:
    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images[:, 2].mean(dim=(1, 2))


def test_whatever_a_user_hands_over_becomes_rewards() -> None:
    given = batch()
    reds, blues = given.images[:, 0].mean(dim=(1, 2)), given.images[:, 2].mean(dim=(1, 2))
    ensemble = Ensemble({"b": Blue()}, {"b": 1})
    assert as_rewards(ensemble) is ensemble and isinstance(ensemble, Rewards)
    for rewards, total in (
        (as_rewards(red), reds),
        (as_rewards(Blue()), blues),
        (as_rewards([red, Blue()]), reds + blues),
        (as_rewards([red, red, Blue()], [1, 2, 3]), 3 * reds + 3 * blues),
        (as_rewards({"r": red, "b": Blue()}, {"r": 0.5, "b": 1}), 0.5 * reds + blues),
        (as_rewards(SimpleNamespace(score=lambda batch: EnsembleScore(blues))), blues),
    ):
        assert isinstance(rewards, Rewards) and rewards.preview_scorer is None and rewards.face_embedding is None
        torch.testing.assert_close(rewards.score(given).total, total)
        torch.testing.assert_close(rewards.submit(given).result().total, total)
    assert list(as_rewards([red, red, Blue()]).score(given).parts) == ["red_1", "red_2", "blue"]
    with pytest.raises(UserError, match="2 for 1 reward models"):
        as_rewards([red], [1, 2])
    with pytest.raises(UserError, match="is a int"):
        as_rewards(3)


def test_rewards_that_can_only_be_submitted() -> None:
    class Later:
        def submit(self, batch: RewardBatch) -> Future[EnsembleScore]:
            future: Future[EnsembleScore] = Future()
            future.set_result(EnsembleScore(torch.full((len(batch),), 0.25)))
            return future

    assert as_rewards(Later()).score(batch()).total.tolist() == [0.25] * 3
