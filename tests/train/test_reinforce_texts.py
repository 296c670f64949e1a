"""Reinforcement of texts: LLaDA, and MMaDA as a model of text, through the whole of `reinforce`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pyunictokens as uct
from pyunictokens import RolloutEngine
from pyunictokens.config.training import GrpoConfig
from pyunictokens.models import ModelBundle
from pyunictokens.train import load_policy, read_metrics, reinforce
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.utils.errors import UserError

from ..models.llama_tiny import write_checkpoint
from .ranks import together

PROMPTS = [
    {"prompt": "what is the colour of the dog ?", "answer": "1"},
    {"prompt": "big cat ?", "answer": "2"},
    {"prompt": "a red dog", "answer": "1"},
]
TEXT = {"max_new_tokens": 8, "block_length": 4, "text_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llada"), "llada")


def cats(prompts: list[str], completions: list[str]) -> list[float]:
    """How many of eight words are `cat`."""
    assert len(set(prompts)) == 1 and len(prompts) == len(completions)
    return [text.split().count("cat") / 8 for text in completions]


def letters(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """A reward that differs within every group."""
    return [len(text) / 40 for text in completions]


def config(**changes: Any) -> GrpoConfig:
    usual = {"trainable": "full", "steps": 2, "group_size": 4, "lr": 1e-2, "beta": 0.01, "sample_every": 1, **TEXT}
    return GrpoConfig(**{**usual, **changes})


def texts(bundle: ModelBundle) -> list[str]:
    return RolloutEngine.of(bundle).write([each["prompt"] for each in PROMPTS], max_new_tokens=8, seed=3).texts


@pytest.mark.parametrize(
    ("objective", "trainable"),
    [("unictask", "lora"), ("unigrpo", "full"), ("diffu_grpo", "lora"), ("coupled", "full"), ("gspo", "lora")],
)
def test_reinforcement_of_texts_runs(folder: Path, tmp_path: Path, objective: str, trainable: str) -> None:
    bundle = uct.models.load(folder)
    before = texts(bundle)
    settings = config(objective=objective, trainable=trainable, inner_epochs=2, advantage="std", lr=5e-2)
    held_out = [{"prompt": "a cat in the snow ?", "answer": "2"}]
    result = reinforce(bundle, PROMPTS, [cats, "maths"], settings, tmp_path / "run", held_out=held_out)
    assert result.steps == 2 and result.skipped == 0 and len(result.held_out) == 2
    for line in read_metrics(tmp_path / "run"):
        assert line["grad_norm"] > 0 and line["ratio_mean"] == pytest.approx(1, abs=1e-3)
        assert line["parts"].keys() == {"cats", "maths"} and line["loss_answer"] == 0
    told = json.loads((tmp_path / "run" / "samples" / "step_0000.json").read_text())
    assert len(told["answers"]) == 4 and len(set(told["prompts"])) == 1
    again = uct.models.load(folder)
    load_policy(again.model, tmp_path / "run" / "final")
    assert texts(again) == texts(bundle) != before


@pytest.mark.slow
def test_the_reward_rises(folder: Path, tmp_path: Path) -> None:
    bundle = uct.models.load(folder)
    settings = config(steps=30, groups=2, group_size=8, lr=2e-2, advantage="std", sample_every=0, warmup=0)
    reinforce(bundle, PROMPTS, cats, settings, tmp_path / "run")
    rewards = [line["reward_mean"] for line in read_metrics(tmp_path / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_resumed_and_on_two_ranks(folder: Path, tmp_path: Path) -> None:
    settings = config(steps=4, groups=1, group_size=3, checkpoint_every=1, objective="unigrpo", inner_epochs=2, lr=1e-3)
    straight = uct.models.load(folder)
    reinforce(straight, PROMPTS, letters, settings, tmp_path / "straight")

    def stop(what: str, done: int, wanted: int, now: Any = None, /) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reinforce(uct.models.load(folder), PROMPTS, letters, settings, tmp_path / "broken", progress=stop)
    resumed = uct.models.load(folder)
    reinforce(resumed, PROMPTS, letters, settings, tmp_path / "broken", resume=True)
    one, two = ([{**line, "seconds": 0} for line in read_metrics(tmp_path / name)] for name in ("straight", "broken"))
    assert one == two

    def work(ranks: Ranks) -> None:
        reinforce(uct.models.load(folder), PROMPTS, letters, settings, tmp_path / "two", ranks=ranks)

    assert together(2, work, tmp_path / "results") == [None, None]
    for mine, true in zip(read_metrics(tmp_path / "two"), one, strict=True):
        for key in ("loss", "reward_mean", "kl"):
            assert mine[key] == pytest.approx(true[key], abs=1e-5), key


def test_mmada_writes_and_draws_with_what_was_learned(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "mmada", "mmada")
    from pyunictokens.models import MagvitConfig, MagvitV2

    MagvitV2(MagvitConfig(8, (1, 1), (1, 1), (1, 1), (1, 1), 5, 4)).save_pretrained(place / "vq")
    for trainable in ("lora", "full"):
        bundle = uct.models.load(place, vq=place / "vq")
        reinforce(bundle.as_text(), PROMPTS, letters, config(trainable=trainable, lr=5e-2), tmp_path / trainable)
        again = uct.models.load(place, vq=place / "vq")
        before = RolloutEngine.of(again).generate_images(["a cat"], steps=3, seed=1).codes
        load_policy(again.model, tmp_path / trainable / "final")
        drawn = [RolloutEngine.of(each).generate_images(["a cat"], steps=3, seed=1).codes for each in (bundle, again)]
        assert torch.equal(*drawn) and not torch.equal(drawn[0], before)
        assert texts(again) == texts(bundle)


def test_questions_about_images_are_reinforced(tmp_path: Path) -> None:
    from pyunictokens.data.images import load_pixels, save_image
    from pyunictokens.models import MagvitConfig, MagvitV2
    from pyunictokens.models.mmada import Mmada
    from pyunictokens.train.tasks import Task
    from pyunictokens.train.text_collector import TextPrompts

    place = write_checkpoint(tmp_path / "mmada", "mmada")
    torch.manual_seed(0)
    MagvitV2(MagvitConfig(8, (1, 1), (1, 1), (1, 1), (1, 1), 5, 4)).save_pretrained(place / "vq")
    files = [tmp_path / f"{name}.png" for name in ("one", "two")]
    for file in files:
        save_image(torch.rand(3, 8, 8) * 2 - 1, file)
    bundle = uct.models.load(place, vq=place / "vq")
    assert isinstance(bundle.model, Mmada)
    engine = RolloutEngine.of(bundle.as_text())
    read = TextPrompts(engine, bundle.model.writer)
    asked = "what is the colour ?"
    for file in files:
        codes = bundle.vq.encode(load_pixels(file, 8)[None])[0]
        mine = read(Task("prompt", asked, columns={"image": str(file)}), asked)
        said = RolloutEngine.of(bundle).generate_text(codes[None], [asked], max_new_tokens=8, temperature=0.0)
        assert engine.write([mine], max_new_tokens=8).texts == said.texts
    assert read(Task("prompt", asked, columns={"image": None}), asked) == asked

    def seen(prompts: list[str], completions: list[str], image: list[str]) -> list[float]:
        assert set(image) <= {str(file) for file in files}
        return [len(text) / 40 for text in completions]

    prompts = [{"prompt": asked, "image": str(files[0])}, {"prompt": "a dog ?", "image": str(files[1])}]
    settings = config(objective="unigrpo", trainable="lora", advantage="std", lr=5e-2)
    reinforce(
        bundle.as_text(),
        prompts,
        seen,
        settings,
        tmp_path / "run",
        held_out=[{"prompt": "a cat ?", "image": str(files[0])}],
    )
    assert all(line["grad_norm"] > 0 for line in read_metrics(tmp_path / "run"))
    with pytest.raises(UserError, match=r"image=3: must be the name of an image file"):
        read(Task("prompt", asked, columns={"image": 3}), asked)


def test_what_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    bundle = uct.models.load(folder)
    with pytest.raises(UserError, match=r"max_new_tokens=10: must be a multiple of block_length=4"):
        reinforce(bundle, PROMPTS, cats, config(max_new_tokens=10), tmp_path / "a")
    with pytest.raises(UserError, match="the column image, and llada reads text alone"):
        reinforce(bundle, [{"prompt": "a", "image": "x.png"}], letters, config(), tmp_path / "i")
    with pytest.raises(UserError, match="the column reference_image, and llada draws nothing"):
        reinforce(bundle, [{"prompt": "a", "reference_image": "x.png"}], cats, config(), tmp_path / "b")
    with pytest.raises(UserError, match=r"reward model 'bright': bright asks for images"):

        def bright(prompts: list[str], images: torch.Tensor) -> list[float]:
            return [0.0 for _ in prompts]

        reinforce(bundle, PROMPTS, bright, config(), tmp_path / "c")
    with pytest.raises(UserError, match="second does not write text by blocks"):
        from ..models.second_model import Pixels, SecondModel, Words

        ModelBundle(SecondModel.random(), Pixels(), Words()).as_text()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objective", "choice"), [("final_sample", "random"), ("unictask", "largest_change"), ("unigrpo", "random")]
)
def test_a_part_of_the_steps(folder: Path, tmp_path: Path, objective: str, choice: str) -> None:
    """Also where the rollout recorded no log-probs of what counts."""
    settings = config(
        objective=objective, token_scope="masked", timestep_choice=choice, timestep_fraction=0.5, inner_epochs=2
    )
    result = reinforce(uct.models.load(folder), PROMPTS, letters, settings, tmp_path / "run")
    assert result.skipped == 0
    for line in read_metrics(tmp_path / "run"):
        assert line["grad_norm"] > 0 and line["ratio_mean"] == pytest.approx(1, abs=1e-3)
