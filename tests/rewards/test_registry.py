"""The registry: one file and one line bring a reward model's settings, weights, label and its use as a judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens.models.weight_files import WeightFiles
from pyunictokens.rewards import Ensemble, RewardBatch, load_rewards, register, registry
from pyunictokens.rewards.registry import labels, registered, weight_status
from pyunictokens.utils.errors import UserError


@dataclass(frozen=True)
class ContrastConfig:
    scale: float = 1.0
    path: str = "weights/contrast"


FILES = WeightFiles("none at all", "nobody/contrast", (("contrast.txt",),), "public domain")


@pytest.fixture(autouse=True)
def afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    registered()
    monkeypatch.setattr(registry, "_known", dict(registry._known))


def make(**more: Any) -> type:
    @register("contrast", label="Contrast: light and dark", settings=ContrastConfig, files=FILES, **more)
    class Contrast:
        def __init__(self, scale: float):
            self.scale = scale

        @classmethod
        def from_settings(cls, settings: ContrastConfig, device: object) -> Contrast:
            return cls(settings.scale)

        def score(self, batch: RewardBatch) -> Tensor:
            return batch.images.std(dim=(1, 2, 3)) * self.scale + len(batch.prompts[0])

    return Contrast


def pixels(rows: int) -> Tensor:
    return torch.rand(rows, 3, 4, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_one_registration_is_read_everywhere(tmp_path: Any) -> None:
    of_the_paper, of_prompts = ["tier", "ber", "der", "fer", "judge"], ["clip", "hpsv2", "aesthetic", "pickscore"]
    of_prompts += ["dino", "objects", "ocr", "jpeg_size", "colour", "maths", "preference"]
    assert list(registered()) == [*of_the_paper, *of_prompts] and labels()["ber"] == "BER: the prompt"
    make()
    assert labels()["contrast"] == "Contrast: light and dark"
    ensemble = load_rewards({"models": {"mine": {"use": "contrast", "scale": 3}}, "weights": {"mine": 1.0}})
    given = RewardBatch(pixels(3), ["a", "b", "c"])
    torch.testing.assert_close(ensemble.score(given).total, 3 * given.images.std(dim=(1, 2, 3)) + 1)
    with pytest.raises(UserError, match="did you mean 'scale'"):
        load_rewards({"models": {"contrast": {"scal": 3}}})
    (status,) = weight_status({"contrast": str(tmp_path)})
    assert status.missing == ["contrast.txt"] and not status.ok and "hf download nobody/contrast" in status.get
    (tmp_path / "contrast.txt").touch()
    assert weight_status({"contrast": str(tmp_path)})[0].ok
    assert "contrast" in [each.name for each in weight_status()]


def test_a_judge_of_previews_is_chosen_by_registration() -> None:
    """Without a scorer of its own, its score of preview and prompt judges; one that is not registered so does not."""
    assert Ensemble({"it": make()(1.0)}, {"it": 1}).preview_scorer is None
    kind = make(judges_previews=True)
    judge = Ensemble({"other": lambda images: [0.0], "it": kind(2.0)}, {"it": 1}).preview_scorer
    assert judge is not None
    previews = pixels(5) * 1.1  # a decoder overshoots
    index = torch.tensor([1, 0, 1, 2, 0])
    scores = judge(["a", "bb", "ccc"])(previews, index)
    inside = previews.clamp(-1, 1).std(dim=(1, 2, 3))
    torch.testing.assert_close(scores, 2 * inside + 2)  # the batch's first prompt is "bb"


def test_a_name_is_taken_once() -> None:
    make()
    make()  # the same class again: a module that was imported anew
    with pytest.raises(UserError, match="already registered"):

        @register("contrast")
        class Other:
            def score(self, batch: RewardBatch) -> Tensor:
                return torch.zeros(len(batch))


def test_settings_of_ones_own_class_need_trust() -> None:
    own = {"models": {"mine": {"use": "torch:ones"}}, "weights": {"mine": 1.0}}
    with pytest.raises(UserError, match=r"rewards\.models\.mine\.use='torch:ones': would be imported"):
        load_rewards(own)
    with pytest.raises(UserError, match="is no reward model"):
        load_rewards({"models": {"mine": {"use": "builtins:dict"}}}, trust=True)
    with pytest.raises(UserError, match="asks a server, and these settings are not trusted"):
        load_rewards({"models": {"judge": {"model": "m", "base_url": "http://stranger.example"}}})
