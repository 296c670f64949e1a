"""The commands on other families: LLaDA prints texts, MMaDA answers, each model has its own numbers by default."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.models import MagvitConfig, MagvitV2
from pyunictokens.models.amused import Amused
from pyunictokens.models.showo.model import Showo
from pyunictokens.runs.asking import sampling

from ..models.llama_tiny import write_checkpoint


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def mmada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_checkpoint(tmp_path_factory.mktemp("mmada"), "mmada")
    torch.manual_seed(0)
    MagvitV2(MagvitConfig(8, (1, 1), (1, 1), (1, 1), (1, 1), 5, 4)).save_pretrained(place / "vq")
    return place


def test_a_model_of_text_through_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = write_checkpoint(tmp_path / "llada", "llada")
    (tmp_path / "tasks.jsonl").write_text(
        '{"prompt": "a dog ?", "answer": "1"}\n{"prompt": "a cat ?", "answer": "2"}\n'
    )
    said = call("generate", "base", "big cat ?", "--model", folder, "-n", "2", "max_new_tokens=8")
    assert len(said.splitlines()) == 2 and not (tmp_path / "out.png").exists()
    numbers = ("steps=1", "group_size=2", "max_new_tokens=8", "objective=diffu_grpo")
    told = call("reinforce", "tasks.jsonl", "--reward", "maths", "--model", folder, "--out", "run", *numbers)
    assert "run: 1 steps, mean reward of the last" in told
    assert call("generate", "run", "big cat ?", "max_new_tokens=8").strip()  # the run remembers its model


def test_mmada_through_the_commands(mmada: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyunictokens.data.images import save_image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    parts = ("--model", mmada, "--vq", mmada / "vq")
    call("generate", "base", "a red dog", *parts, "timesteps=2", "--out", "dog.png")
    assert (tmp_path / "dog.png").is_file()
    save_image(torch.zeros(3, 20, 20), tmp_path / "image.png")
    answers = call("understand", "base", "image.png", "what is the colour ?", *parts, "-n", "2", "max_new_tokens=8")
    assert len(answers.splitlines()) == 2
    (tmp_path / "prompts.txt").write_text("a dog ?\na cat ?\n")
    (tmp_path / "lengths_here.py").write_text(
        "def long(prompts, completions):\n    return [len(t) for t in completions]\n"
    )
    words = ("--texts", "--reward", "lengths_here:long", "--out", "run", "steps=1", "group_size=2", "max_new_tokens=8")
    assert "run: 1 steps" in call("reinforce", "prompts.txt", *parts, *words)


def test_each_model_has_its_own_numbers() -> None:
    amused, showo, toy = sampling(False, rule=Amused.rule), sampling(False, rule=Showo.rule), sampling(True)
    assert (amused.timesteps, amused.guidance_scale, amused.temperature) == (12, 10.0, 2.0)
    assert showo == sampling(False) and (showo.timesteps, showo.guidance_scale) == (50, 5.0)
    assert toy.timesteps == 12 and sampling(False, None, ["timesteps=7"], Amused.rule).timesteps == 7
