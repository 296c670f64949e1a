"""Settings: presets, files, overrides, and the sentence each bad value gets."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.config.settings import from_mapping, leaves, with_overrides
from pyunictokens.config.training import PRESETS
from pyunictokens.train import GrpoConfig, StageConfig, TrainConfig
from pyunictokens.train.optimizer import learning_rate
from pyunictokens.utils.errors import UserError


def test_the_defaults_are_the_papers() -> None:
    paper = TrainConfig.preset("paper").grpo
    assert (paper.group_size, paper.beta, paper.clip_low, paper.clip_high) == (9, 0.01, 0.2, 0.2)
    assert (paper.lr, paper.steps, paper.guidance_scale, paper.timesteps) == (1e-6, 100, 5.0, 50)
    assert (paper.max_grad_norm, paper.visual_ratio) == (1.0, 0.5)
    assert (paper.alpha_answer, paper.alpha_image, paper.token_scope) == (0.4, 0.6, "all")
    assert (paper.dsog.target_pass_rate, paper.dsog.mu, paper.dsog.eta, paper.dsog.epsilon0) == (0.25, 0.12, 0.8, 2.0)
    stages = TrainConfig.preset("paper").stages
    assert (stages.num_understanding, stages.num_generation, stages.lr, stages.batch_understanding) == (16, 8, 1e-3, 4)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_file_gives_back_what_was_written(name: str, tmp_path: Path) -> None:
    config = TrainConfig.preset(name)
    config.to_yaml(tmp_path / "train.yaml")
    assert TrainConfig.from_yaml(tmp_path / "train.yaml") == config


def test_a_file_starts_from_a_preset_and_words_come_last(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: toy\ngrpo:\n  lr: 3e-6\n  steps: 7\n  lora: {targets: [q_proj, fc1]}\n")
    config = TrainConfig.from_yaml(file, ["grpo.steps=9", "group_size=4", "dsog.mu=0.3", "stages.crop=1.2"])
    assert (config.grpo.lr, config.grpo.steps, config.grpo.group_size) == (3e-6, 9, 4)
    assert config.grpo.lora.targets == ("q_proj", "fc1") and config.grpo.dsog.mu == 0.3
    assert config.stages.crop == 1.2
    assert config.grpo.timesteps == TrainConfig.preset("toy").grpo.timesteps


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("group_size=1", "group_size=1: must be ≥ 2: an advantage needs a group"),
        ("grpo.steps=0", "steps=0: must be ≥ 1"),
        ("guidance_scale=-1", r"guidance_scale=-1.0: must be ≥ 0 \(0 turns guidance off\)"),
        ("grpo.lr=0", "lr=0.0: must be > 0"),
        ("grpo.lr=nan", "lr=nan: must be > 0"),
        ("grpo.lr=.inf", "lr=inf: must be > 0"),
        ("timesteps=0", "timesteps=0: must be ≥ 1"),
        ("timesteps=ten", "timesteps='ten': must be a whole number"),
        ("timesteps=2.5", "timesteps=2.5: must be a whole number"),
        ("visual_ratio=1.5", "visual_ratio=1.5: must be between 0 and 1"),
        ("token_scope=most", "token_scope='most': must be one of all, masked, newly_unmasked"),
        ("trainable=head", "trainable='head': must be one of concept, lora, full"),
        ("train_concept=3", "train_concept=3: must be true or false"),
        ("dsog.eta=1", "eta=1.0: must be between 0 and 1"),
        ("dsog.preview_step=99", "preview_step=99: must be ≤ timesteps=50"),
        ("stages.stages=[joint,joint]", "each stage runs once"),
        ("stages.stages=[]", "name at least one"),
        ("stages.epochs=0", "epochs=0: must be ≥ 1"),
        ("max_grad_norm=0", "max_grad_norm=0.0: must be > 0"),
        ("grop.steps=3", "did you mean 'grpo.steps'"),
        ("grpo.group_siez=3", "did you mean 'grpo.group_size'"),
        ("max_grad_nrm=3", "did you mean 'grpo.max_grad_norm'"),
        ("lr=1", "several sections: write one of stages.lr, grpo.lr"),
        ("steps", "must have the form key=value"),
        ("grpo.steps=[1", "not valid YAML"),
        ("grpo.seed=-1", "seed=-1: must be between 0 and"),
        ("stages.seed=-1", "seed=-1: must be between 0 and"),
        ("grpo.seed=4294967296", "seed=4294967296: must be between 0 and"),
        ("grpo.group_size=1000000000", "group_size=1000000000: must be between 1 and 65536"),
        ("grpo.groups=1000000000", "groups=1000000000: must be between 1 and 65536"),
        ("generated_images=1000000000", "generated_images=1000000000: must be between"),
        ("grpo.dtype=" + "x" * 5000, r"dtype='x{149}… \(5002 characters\): must be one of"),
    ],
)
def test_bad_words(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig.preset("paper").override([word])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grpo: [1, 2]", "must be a table of settings"),
        ("grpo: {stepz: 3}", "train.yaml: grpo: unknown setting 'stepz'; did you mean 'steps'"),
        ("grpo:\n  steps: 3\n lr: 2", r"not valid YAML at line \d+, column \d+"),
        ("- 1", "must hold a table"),
        ("preset: papr", "preset 'papr': must be one of paper, unictokens, fast, quality, toy"),
        ("grpo: {max_grad_norm: true}", "must be a number"),
    ],
)
def test_bad_files(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        TrainConfig.from_yaml(file)
    with pytest.raises(UserError, match="no such file"):
        TrainConfig.from_yaml(tmp_path / "absent.yaml")


@given(st.integers(2, 64), st.floats(1e-9, 1), st.booleans(), st.sampled_from(["concept", "lora", "full"]))
def test_words_set_what_they_say(group: int, lr: float, flag: bool, kind: str) -> None:
    words = [f"group_size={group}", f"grpo.lr={lr!r}", f"checkpoint_layers={str(flag).lower()}", f"trainable={kind}"]
    config = TrainConfig().override(words).grpo
    assert (config.group_size, config.lr, config.checkpoint_layers, config.trainable) == (group, lr, flag, kind)


def test_every_field_says_what_it_is() -> None:
    """A docstring stands under each field; `leaves` names them all, so documentation can be held against it."""
    for cls in (StageConfig, GrpoConfig):
        body = inspect.getsource(cls)
        for each in fields(cls):
            line = body.index(f"    {each.name}: ")
            assert body[line:].split("\n")[1].strip().startswith('"""'), each.name
    assert "grpo.dsog.mu" in leaves(TrainConfig) and not any(is_dataclass(name) for name in leaves(TrainConfig))


def test_learning_rate() -> None:
    cosine = [learning_rate(step, lr=2.0, steps=4, schedule="cosine") for step in range(4)]
    assert cosine == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])
    warm = [learning_rate(step, lr=2.0, steps=6, warmup=3) for step in range(6)]
    assert warm == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="constant or cosine"):
        learning_rate(0, lr=1, steps=1, schedule="linear")


def test_the_table_in_the_docs_is_up_to_date() -> None:
    from experiments import settings_table

    text = settings_table.FILE.read_text(encoding="utf-8")
    assert settings_table.updated(text) == text, "run: python -m experiments.settings_table"
    assert "| `grpo.group_size` | 9 |" in text and "G: rollouts of one question." in text


def test_max_text_of_older_files_is_left_out_with_a_word_and_handed_to_the_model(tmp_path: Path) -> None:
    from pyunictokens.runs.run_dir import Origin

    with pytest.warns(UserWarning, match="max_text is left out: it belongs to the model"):
        assert from_mapping(GrpoConfig, {"max_text": 24, "steps": 3}).steps == 3
    with pytest.warns(UserWarning, match="max_text is left out"):
        assert with_overrides(TrainConfig(), ["stages.max_text=48", "grpo.steps=2"]).grpo.steps == 2
    found = [Origin.of(each, "") for each in ({"max_text": 24}, {"grpo": {"max_text": 48}}, {"grpo": {}}, {})]
    assert [origin.max_text for origin in found] == [24, 48, None, None]
    with pytest.raises(UserError, match="max_text"):
        Origin.of({"max_text": "many"}, "config.yaml")
