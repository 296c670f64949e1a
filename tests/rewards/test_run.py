"""A run on the paper's networks (small and random), named in a settings file: checked, trained, kept in the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.toy.concept import write_toy_concept
from tests.tiny import tiny_toy

from .checkpoints import Folders

SHORT = ["grpo.steps=2", "grpo.group_size=2", "grpo.timesteps=2", "grpo.max_new_tokens=3", "grpo.trainable=full"]
SHORT += ["stages.max_steps=1", "stages.num_understanding=2", "stages.num_generation=2"]


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_train_with_rewards_from_a_file(saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    write_toy_concept(tmp_path / "data", seed=5, kind="animal", name="bo")
    settings = {"rewards": {"experts": saved.settings("tier", "ber", "der"), "memory": "lean", "offline": True}}
    file = tmp_path / "rewards.yaml"
    file.write_text(yaml.safe_dump(settings))
    out = tmp_path / "run"
    call("train", tmp_path / "data", "bo", "--out", out, "--rewards", file, "--no-evaluate", *SHORT)

    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["skipped"] is None for step in steps)
    assert set(json.loads((out / "experts.json").read_text())["images_per_second"]) == {"tier", "ber", "der"}
    kept = yaml.safe_load((out / "config.yaml").read_text())["rewards"]
    assert kept == settings["rewards"]  # --config of the run does the same again
    found = call("doctor", "--weights", "--json", "--config", out / "config.yaml")
    assert [finding["ok"] for finding in json.loads(found)] == [True] * 3

    (saved.dinov2 / "model.safetensors").rename(saved.dinov2 / "away")  # another day, a file is gone
    try:
        text = call("train", "--config", out / "config.yaml", "--out", tmp_path / "again", code=2)
    finally:
        (saved.dinov2 / "away").rename(saved.dinov2 / "model.safetensors")
    assert "error: " in text and "model.safetensors" in text and "hf download facebook/dinov2-base" in text
    assert not (tmp_path / "again").exists()
