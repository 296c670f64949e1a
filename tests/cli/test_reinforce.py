"""`pyunictokens reinforce` on the toy: a list of prompts, a reward of one's own, every objective."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pyunictokens.cli.reinforce import _start
from pyunictokens.config.settings import from_mapping, load_yaml
from pyunictokens.config.training import OBJECTIVES, GrpoConfig
from pyunictokens.train import read_metrics
from tests.cli.calling import call, only_error
from tests.tiny import tiny_toy

SHORT = ("steps=1", "group_size=2", "timesteps=4", "timestep_fraction=0.5", "timestep_choice=largest_change")

ADAPTERS = ("trainable=lora", *SHORT)

REWARD = """
def red(prompts, images, **columns):
    return images[:, 0].mean(dim=(1, 2)).tolist()


class Flat:
    def score(self, batch):
        return -batch.images.std(dim=(1, 2, 3))
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with prompts and a module of rewards, in which the command is called on a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    Path("toy_rewards_here.py").write_text(REWARD)
    Path("prompts.txt").write_text("a red star\na blue dog on sand\n")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_by_one_word(objective: str) -> None:
    words = (f"grpo.objective={objective}", "inner_epochs=2", *ADAPTERS)
    said = call("reinforce", "prompts.txt", "--reward", "toy_rewards_here:red", "--out", "run", *words)
    assert "run: 1 steps, mean reward of the last" in " ".join(said.split())
    (line,) = read_metrics("run")
    assert line["parts"].keys() == {"red"} and line["grad_norm"] > 0 and line["skipped"] is None
    assert f"objective: {objective}" in Path("run/grpo.yaml").read_text()
    assert Path("run/final/adapter_model.safetensors").exists()


def test_several_rewards_and_going_on() -> None:
    given = ("--reward", "toy_rewards_here:red", "--reward", "toy_rewards_here:Flat", "--weight", 1, "--weight", 0.5)
    call("reinforce", "prompts.txt", *given, "--out", "run", *SHORT)
    (line,) = read_metrics("run")
    assert line["reward_mean"] == pytest.approx(line["parts"]["red"] + 0.5 * line["parts"]["flat"], abs=1e-6)
    assert "already holds a run" in only_error("reinforce", "prompts.txt", *given, "--out", "run", *SHORT)
    call("reinforce", "prompts.txt", *given, "--out", "run", "--resume", *SHORT)
    assert len(read_metrics("run")) == 1, "it was done"


def test_held_out_prompts_metrics_and_built_in_rewards() -> None:
    Path("test.txt").write_text("a green cat\na pink mug\n")
    given = ("--reward", "jpeg_size", "--held-out", "test.txt", "--metric", "toy_rewards_here:red")
    words = ("held_out.every=1", "held_out.by=red", "trainable=lora", "steps=2", *SHORT[1:])
    said = " ".join(call("reinforce", "prompts.txt", *given, "--out", "run", *words).split())
    lines = [json.loads(line) for line in Path("run/held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["means"].keys() == {"reward", "jpeg_size", "red"} and len(lines[0]["prompts"]["red"]) == 2
    assert f"held-out prompts, red: {lines[0]['means']['red']:.3f} before" in said
    assert Path("run/best/adapter_model.safetensors").exists()


def test_rewards_from_a_config() -> None:
    Path("run.yaml").write_text(
        "rewards:\n  weights: {colour: 1.0}\n  models: {colour: {colour: blue}}\ngrpo: {steps: 1}\n"
    )
    call("reinforce", "prompts.txt", "--config", "run.yaml", "--out", "run", *SHORT)
    (line,) = read_metrics("run")
    assert line["parts"].keys() == {"colour"} and 0 < line["reward_mean"] < 1


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), {"trainable": "full", "lr": 1e-4}),
        (("trainable=lora",), {"trainable": "lora", "lr": 1e-3}),
        (("trainable=lora", "lr=2e-4"), {"trainable": "lora", "lr": 2e-4}),
    ],
)
def test_adapters_learn_at_a_rate_of_their_own(words: tuple[str, ...], wanted: dict[str, object]) -> None:
    call("reinforce", "prompts.txt", "--reward", "toy_rewards_here:red", "--out", "run", *words, *SHORT)
    found = from_mapping(GrpoConfig, load_yaml(Path("run/grpo.yaml")))
    assert {key: getattr(found, key) for key in wanted} == wanted


def test_a_real_model_learns_by_adapters_unless_all_weights_are_asked_for() -> None:
    assert (_start(False, "lora").trainable, _start(False, "lora").lr) == ("lora", 1e-4)
    assert _start(False, "full").lr == GrpoConfig().lr == 1e-6


def test_what_cannot_be_used() -> None:
    red = ("--reward", "toy_rewards_here:red")
    for arguments, said in [
        (("prompts.txt",), "which reward? Give --reward NAME or MODULE:FUNCTION"),
        (("prompts.txt", "--reward", "toy_rewards_here"), "must be MODULE:FUNCTION of your own, NAME or NAME=WEIGHTS"),
        (("prompts.txt", "--reward", "hpsv2=none.pt"), "none.pt: no such file"),
        (("prompts.txt", *red, "--metric", "jpeg_size"), "metrics are measured on held-out prompts"),
        (("prompts.txt", "--reward", "toy_rewards_here:blue"), "blue"),
        (("prompts.txt", *red, "--weight", 1, "--weight", 2), "2 --weight for 1 --reward"),
        (("none.txt", *red), "none.txt: no such file"),
        (("prompts.txt", *red, "objective=gpso"), "objective='gpso': must be one of unictask"),
        (("prompts.txt", *red, "trainable=concept"), "no concept whose rows could learn"),
    ]:
        assert said in only_error("reinforce", *arguments, "--out", "run")
