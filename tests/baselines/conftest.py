"""A toy concept on disk, and a tiny random model in the toy's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.toy.concept import write_toy_concept
from tests.tiny import tiny_experts, tiny_toy

Call = Callable[..., str]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the concept `bo`."""
    return write_toy_concept(tmp_path_factory.mktemp("data"), seed=1, kind="animal", name="bo")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model and random encoders in the toy's place."""
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    monkeypatch.setattr("pyunictokens.toy.rewards.load_toy_rewards", tiny_experts)


@pytest.fixture
def call() -> Call:
    """The command line in this process: `call(*words, code=0)` gives what it printed."""

    def called(*words: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    return called
