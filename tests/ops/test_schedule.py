"""The mask schedules: values, bounds, and the float32 rounding that decides how many codes stay masked."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyunictokens as uct
from pyunictokens.utils.errors import UserError

NAMES = ["cosine", "linear", "sigmoid", "pow2", "pow0.5", "pow3.25"]


def test_float32_decides_seven_and_not_eight() -> None:
    assert int(16 * uct.ops.mask_schedule("cosine", 1, 3)) == 7
    assert math.floor(16 * math.cos(2 / 3 * math.pi / 2) + 1e-12) == 8
    assert uct.ops.mask_len("cosine", 16, 16, 1, 3) == 7


def test_golden_trajectory_lengths(showo_cases: dict[str, torch.Tensor], showo_meta: dict) -> None:
    """After each recorded step as many codes are the mask id as mask_len says."""
    steps, side = showo_meta["generate"]["steps"], showo_meta["image_side"]
    inputs = showo_cases["gen.input_ids_per_step"][:, :, -(side * side + 1) : -1]
    unknown = (inputs == showo_meta["special_ids"]["mask"]).sum(-1)
    for step in range(steps - 1):
        wanted = uct.ops.mask_len("cosine", side * side, unknown[step], step, steps)
        assert torch.equal(wanted, unknown[step + 1])


@pytest.mark.parametrize("name", NAMES)
def test_values_against_float64(name: str) -> None:
    def exact(t: float) -> float:
        if name == "cosine":
            return math.cos(t * math.pi / 2)
        if name == "sigmoid":
            logistic = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
            return (logistic(3) - logistic(6 * t - 3)) / (logistic(3) - logistic(-3))
        return 1 - t ** (1 if name == "linear" else float(name.removeprefix("pow")))

    for steps in (1, 2, 5, 18, 50):
        values = [uct.ops.mask_schedule(name, step, steps) for step in range(steps)]
        for step, value in enumerate(values):
            assert value == pytest.approx(max(exact((step + 1) / steps), 1e-6 if name != "cosine" else -1), abs=3e-7)
        assert all(later < earlier for earlier, later in pairwise(values))


def test_training_rate_is_the_same_curve() -> None:
    assert uct.ops.mask_rate("cosine", 0.4) == uct.ops.mask_schedule("cosine", 1, 5)
    assert uct.ops.mask_rate("cosine", 0.0) == 1.0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(NAMES),
    positions=st.integers(1, 4096),
    unknown=st.integers(0, 4096),
    steps=st.integers(1, 100),
    data=st.data(),
)
def test_mask_len_bounds(name: str, positions: int, unknown: int, steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps - 1))
    length = uct.ops.mask_len(name, positions, unknown, step, steps)
    assert 1 <= length <= max(1, min(unknown - 1, positions))
    as_tensor = uct.ops.mask_len(name, positions, torch.tensor([unknown]), step, steps)
    assert as_tensor.tolist() == [length]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosinus", 0, 2), "schedule 'cosinus'"),
        (("pow", 0, 2), "schedule 'pow'"),
        (("pow-1", 0, 2), "schedule 'pow-1'"),
        (("pow0", 0, 2), "k > 0"),
        (("cosine", 0, 0), "steps=0"),
        (("cosine", 3, 3), "step=3: must be an integer in 0 … 2"),
        (("cosine", -1, 3), "step=-1"),
        (("cosine", 0.5, 3), "step=0.5"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        uct.ops.mask_schedule(*arguments)
    with pytest.raises(UserError):
        uct.ops.mask_len(arguments[0], 16, 16, *arguments[1:])


def test_bad_lengths() -> None:
    with pytest.raises(UserError, match="positions=0"):
        uct.ops.mask_len("cosine", 0, 3, 0, 2)
    with pytest.raises(UserError, match="unknown=-1"):
        uct.ops.mask_len("cosine", 4, -1, 0, 2)
    with pytest.raises(UserError, match=r"t=1\.5"):
        uct.ops.mask_rate("linear", 1.5)
