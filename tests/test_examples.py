"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_of_ones_own_learns(capsys: pytest.CaptureFixture[str]) -> None:
    first, last = load("ops_in_your_loop").main(rounds=20)
    assert 0.4 < first < 0.75 and last > first + 0.15
    assert "round 20" in capsys.readouterr().out


def test_the_toy_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny import tiny_toy

    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    out = load("generate_with_the_toy").main(tmp_path / "toy.png", samples=2)
    assert Image.open(out).width > 2 * 160
    assert "the model says" in capsys.readouterr().out


@pytest.mark.parametrize(("level", "precision"), [("token", "no"), ("token", "bf16"), ("sequence", "no")])
def test_the_accelerate_loop_learns(level: str, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, unless it is forgotten
    first, last = load("accelerate_loop").main(rounds=12, level=level, mixed_precision=precision)
    assert 0.4 < first < 0.75 and last > first + 0.1
    assert f"{level} ratios, precision {precision}" in capsys.readouterr().out


@pytest.fixture
def trl_example() -> Any:
    pytest.importorskip("trl", reason="examples/trl_trainer.py needs trl, which is not installed")
    return load("trl_trainer")


def test_the_trl_trainer_learns(trl_example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = trl_example.main(steps=12)
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1
    assert "share of red words" in capsys.readouterr().out


def test_the_trl_trainer_has_the_loss_and_the_gradients_of_trl(trl_example: Any, tmp_path: Path) -> None:
    from trl import GRPOTrainer

    R, prompt, length = 4, 3, 5
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 15, (R, prompt + length), generator=generator)
    keep = (torch.arange(length) < torch.tensor([5, 3, 4, 1])[:, None]).int()
    inputs = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": torch.ones(R, prompt, dtype=torch.int64),
        "completion_ids": ids[:, prompt:],
        "completion_mask": keep,
        "advantages": torch.randn(R, generator=generator),
        "old_per_token_logps": -2.7 + 0.3 * torch.randn(R, length, generator=generator),
        "ref_per_token_logps": -2.7 + 0.3 * torch.randn(R, length, generator=generator),
    }
    found = []
    for number, kind in enumerate((trl_example.FusedGRPOTrainer, GRPOTrainer)):
        trainer = trl_example.build(str(tmp_path / str(number)), kind, beta=0.1)
        trainer.current_gradient_accumulation_steps = 2
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters()}))
    (loss, gradients), (wanted, wanted_gradients) = found
    torch.testing.assert_close(loss, wanted)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
