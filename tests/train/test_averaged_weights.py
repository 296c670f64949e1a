"""The average of the weights: its definition, who sees it and who does not, resumed and spread over ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyunictokens.train import load_policy, reinforce
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.train.optimizer import Optimizer
from pyunictokens.utils.errors import UserError
from tests.train.ranks import together
from tests.train.test_held_out import HELD_OUT, channel, lines, settings
from tests.train.test_reinforce import PROMPTS, parts, weights
from tests.train.world import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_average_that_it_is_said_to_be(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    named = {"a": nn.Parameter(torch.randn(5, 3).to(dtype)), "b": nn.Parameter(torch.randn(7).to(dtype))}
    optimizer = Optimizer(named, lr=0.1, ema_decay=0.5)
    begun = {name: value.detach().double() for name, value in named.items()}
    history: list[dict[str, Tensor]] = []
    for _ in range(9):
        for value in named.values():
            (value.float() * torch.randn(value.shape)).sum().backward()
        optimizer.step(0.1)
        optimizer.zero_grad()
        state = optimizer.state_dict()
        history.append({n: state.get(f"master.{n}", named[n]).detach().double().clone() for n in named})
    for name, average in begun.items():
        for step, then in enumerate(history, 1):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * then[name]
        torch.testing.assert_close(optimizer.state_dict()[f"average.{name}"].double(), average, rtol=1e-5, atol=1e-6)
        before = named[name].detach().clone()
        with optimizer.averaged():
            torch.testing.assert_close(named[name].detach(), average.to(dtype))
        assert torch.equal(named[name], before), "the weights are put back to the last bit"
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert torch.equal(named["b"], before), "also where something failed"
    optimizer.settle()
    torch.testing.assert_close(named["b"].detach(), average.to(dtype))


def test_what_was_measured_is_what_is_exported_and_rollouts_take_the_weights(tmp_path: Path) -> None:
    """Measured on the average; training is that of a run without one."""
    averaged, plain = parts(), parts()
    wanted: dict[str, Any] = {"steps": 4, "lr": 1e-2, "held": {"every": 2}}
    result = reinforce(
        averaged, PROMPTS, channel, settings(ema_decay=0.9, **wanted), tmp_path / "averaged", held_out=HELD_OUT
    )
    other = reinforce(plain, PROMPTS, channel, settings(**wanted), tmp_path / "plain", held_out=HELD_OUT)
    assert result.last["reward_mean"] == other.last["reward_mean"], "rollouts came from the weights of the last step"
    mine, last = weights(averaged.model), weights(plain.model)
    assert any(not torch.equal(value, last[name]) for name, value in mine.items())
    final = weights(load_policy(tiny_model(), tmp_path / "averaged" / "final"))
    assert all(torch.equal(value, mine[name]) for name, value in final.items()), "the model is left as it was exported"
    again = reinforce(averaged, PROMPTS, channel, settings(steps=1, lr=1e-9), tmp_path / "again", held_out=HELD_OUT)
    assert again.held_out[0].values["reward"] == pytest.approx(result.held_out[-1].values["reward"], abs=1e-6)
    assert result.held_out[-1].values["reward"] != pytest.approx(other.held_out[-1].values["reward"], abs=1e-6)
    assert result.held_out[0].values == other.held_out[0].values


@pytest.mark.parametrize("trainable", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_average_of_the_run_that_never_stopped(tmp_path: Path, trainable: str) -> None:
    chosen = settings(steps=5, checkpoint_every=2, ema_decay=0.8, lr=1e-3, trainable=trainable)
    reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "straight", held_out=HELD_OUT)

    def stop(what: str, done: int, wanted: int, now: Any = None, /) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "broken", held_out=HELD_OUT, progress=stop)
    reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "broken", held_out=HELD_OUT, resume=True)
    assert lines(tmp_path / "broken") == lines(tmp_path / "straight")
    one, other = (weights(load_policy(tiny_model(), tmp_path / name / "final")) for name in ("broken", "straight"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(UserError, match=r"ema_decay: the run has 0\.8, this is 0\.0"):
        reinforce(
            parts(), PROMPTS, channel, settings(steps=5, checkpoint_every=2, lr=1e-3, trainable=trainable),
            tmp_path / "broken", held_out=HELD_OUT, resume=True,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_same_on_two_ranks_and_is_resumed_by_any_number(tmp_path: Path, dtype: str) -> None:
    """The average lies spread over the ranks beside the optimizer's moments."""
    chosen = settings(
        steps=4, checkpoint_every=2, group_size=4, lr=1e-3, ema_decay=0.8, shard="optimizer", dtype=dtype, keep_last=9
    )

    def run(where: str, ranks: Ranks | None = None, **more: Any) -> None:
        made = parts()
        made.model.to(getattr(torch, dtype))
        reinforce(made, PROMPTS, channel, chosen, tmp_path / where, held_out=HELD_OUT, ranks=ranks, **more)

    run("alone")
    assert together(2, lambda ranks: run("two", ranks), tmp_path / "results") == [None, None]
    shards = tmp_path / "two" / "checkpoints" / "step_000002" / "shards"
    assert len(list(shards.glob("*.safetensors"))) == 2

    def final(where: str) -> Tensor:
        learned = weights(load_policy(tiny_model(), tmp_path / where / "final"))
        return torch.cat([value.flatten().float() for value in learned.values()])

    begun = torch.cat([value.flatten() for value in weights(tiny_model()).values()])
    alone = final("alone")

    def same(where: str) -> None:  # single numbers whose gradient is nothing but rounding go either way in AdamW
        assert float((final(where) - alone).abs().mean()) < 0.05 * float((alone - begun).abs().mean())

    same("two")

    def back_to_two() -> None:
        for step in (3, 4):
            shutil.rmtree(tmp_path / "two" / "checkpoints" / f"step_{step:06d}", ignore_errors=True)

    back_to_two()
    run("two", resume=True)
    same("two")
    back_to_two()
    again = together(2, lambda ranks: run("two", ranks, resume=True), tmp_path / "again")
    assert again == [None, None]
    same("two")


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_that_cannot_be(decay: float) -> None:
    with pytest.raises(UserError, match=r"ema_decay=.*: must be ≥ 0 and < 1"):
        settings(ema_decay=decay)
