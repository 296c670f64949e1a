"""A reward from choices between two images: what it learns, how well it says it knows, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pyunictokens.data.images import load_pixels
from pyunictokens.rewards import RewardBatch
from pyunictokens.rewards.experts.preference import Preference, fit, read_choices, told_right
from pyunictokens.rewards.load import load_rewards
from pyunictokens.rewards.names import named
from pyunictokens.toy.drawing import render
from pyunictokens.toy.rewards import offer_features
from pyunictokens.toy.scene import code, random_scene
from pyunictokens.utils.errors import UserError
from tests.cli.calling import call, only_error
from tests.tiny import tiny_toy

from .checkpoints import save_dinov2

COLOURS = ("red", "green", "yellow", "pink")


def drawn(folder: Path, colour: str, seed: int, name: str) -> str:
    """A picture of the toy's world with a subject of this colour."""
    scene = replace(random_scene(np.random.default_rng(seed), "object"), colour=code("colour", colour))
    Image.fromarray(render(scene)).save(folder / name)
    return name


def choices(folder: Path, number: int, better: str = "blue") -> Path:
    """A file of choices in which the `better` colour wins, its picture now first and now second."""
    folder.mkdir(exist_ok=True)
    lines = []
    for row in range(number):
        files = [
            drawn(folder, better, 2 * row, f"{row}-0.png"),
            drawn(folder, COLOURS[row % 4], 2 * row + 1, f"{row}-1.png"),
        ]
        lines.append({"prompt": "a toy", "chosen": files[0], "rejected": files[1]})
    (folder / "preferences.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "preferences.jsonl"


def scored(model: Preference, folder: Path, colour: str) -> Tensor:
    """Scores of pictures that were in no choice."""
    files = [drawn(folder, colour, seed, f"new-{colour}-{seed}.png") for seed in range(500, 516)]
    pixels = torch.stack([load_pixels(folder / file, 64) for file in files])
    return model.score(RewardBatch(pixels, ["a toy"] * len(files)))


@pytest.fixture(autouse=True)
def toys_features() -> None:
    offer_features()


@pytest.mark.parametrize("better", ["blue", "orange"])
def test_who_likes_a_colour_rewards_it(better: str, tmp_path: Path) -> None:
    file = choices(tmp_path / "choices", 32, better)
    model = named(f"preference={file}", settings={"preference": {"features": "toy"}})
    assert isinstance(model, Preference) and model.number == 32 and model.accuracy >= 0.75
    assert f"{model.accuracy:.0%} of unseen" in str(model)
    best, others = scored(model, tmp_path, better), [scored(model, tmp_path, colour) for colour in COLOURS]
    assert min(each.min() for each in [best, *others]) >= 0 and best.max() <= 1
    assert all(best.mean() > each.mean() for each in others) and best.mean() > torch.stack(others).mean() + 0.2
    assert best.std() > 0.01  # inside a group there is something to choose


def test_choices_at_random_are_told_at_random() -> None:
    generator = torch.Generator().manual_seed(0)
    differences = torch.randn(400, 6, generator=generator)
    assert abs(told_right(differences, range(400), 0.3) - 0.5) < 0.1  # the signs mean nothing
    signed = differences * differences[:, :1].sign()
    assert told_right(signed, range(400), 0.3) > 0.9
    twice = torch.cat([differences, -differences])  # each pair chosen both ways: nothing can be known
    assert told_right(twice, [*range(400), *range(400)], 0.3) == pytest.approx(0.5)


def test_the_fit_is_the_most_likely_one() -> None:
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    w = fit(d, 0.3).requires_grad_()
    loss = -torch.log(1 / (1 + torch.exp(-(d * w).sum(1)))).sum() + 0.15 * (w * w).sum()
    (slope,) = torch.autograd.grad(loss, w)
    assert slope.abs().max() < 1e-8 and w.abs().max() > 0.05
    # choices that a line tells apart, hardly held back: no overflow, no endless steps
    assert torch.isfinite(fit(100 * d * d[:, :1].sign(), 1e-6)).all()


def test_dinov2_may_look(tmp_path: Path) -> None:
    file, weights = choices(tmp_path / "choices", 12), save_dinov2(tmp_path / "dino")
    wanted = {"models": {"preference": {"path": str(file.parent), "features": "dino", "weights": str(weights)}}}
    rewards = load_rewards({**wanted, "weights": {"preference": 1.0}})
    scores = rewards.score(RewardBatch(torch.zeros(2, 3, 40, 40), ["a", "b"])).total
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()
    assert rewards.preview_scorer is not None


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    file = choices(tmp_path / "choices", 9)
    settings = {"preference": {"features": "toy"}}

    def refused(text: str, **changes: object) -> None:
        with pytest.raises(UserError, match=text):
            named(f"preference={file}", settings={"preference": {**settings["preference"], **changes}})

    refused("9 choices between different images: a preference needs 10 or more")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, *lines, *lines]))  # the same pairs again teach nothing new
    refused("9 choices between different images")
    refused("features='eyes': must be one of clip, dino, toy", features="eyes")
    refused("l2=0", l2=0.0)
    for line, text in (
        ("{", "line 10: is not JSON"),
        ('["a"]', "line 10: must be an object with chosen and rejected"),
        ('{"chosen": "gone.png", "rejected": "0-1.png"}', "line 10: no such image: .*gone.png"),
        ('{"chosen": "../x.png", "rejected": "0-1.png"}', "line 10: chosen '../x.png': must be"),
    ):
        file.write_text("\n".join([*lines, line]))
        refused(text)
    with pytest.raises(UserError, match="no such file"):
        read_choices(tmp_path / "nowhere.jsonl")
    same = tmp_path / "same"
    same.mkdir()
    for number in range(20):
        image = Image.new("RGB", (64, 64), "gray")
        image.putpixel((0, 0), (number, 0, 0))
        image.save(same / f"{number}.png")
    rows = [{"chosen": f"{number}.png", "rejected": f"{number + 10}.png"} for number in range(10)]
    (same / "preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))

    class Blind:
        def encode_image(self, pixels: Tensor) -> Tensor:
            return torch.ones(len(pixels), 4)

    with pytest.raises(UserError, match="look the same to this network"):
        Preference(Blind(), read_choices(same))


def test_reinforce_takes_a_file_of_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    Path("prompts.txt").write_text("a blue dog on sand\n")
    choices(Path("choices"), 12)
    words = ("steps=1", "group_size=2", "timesteps=4", "timestep_fraction=0.5", "timestep_choice=largest_change")
    said = call("reinforce", "prompts.txt", "--reward", "preference=choices/preferences.jsonl", "--out", "run", *words)
    assert "preference of 12 choices" in said and "run: 1 steps" in " ".join(said.split())
    choices(Path("few"), 3)
    assert "needs 10 or more" in only_error("reinforce", "prompts.txt", "--reward", "preference=few", "--out", "r2")
