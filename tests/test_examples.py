"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
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

    monkeypatch.setattr("pyunictokens.toy.load_toy", tiny_toy)
    out = load("generate_with_the_toy").main(tmp_path / "toy.png", samples=2)
    assert Image.open(out).width > 2 * 160
    assert "the model says" in capsys.readouterr().out
