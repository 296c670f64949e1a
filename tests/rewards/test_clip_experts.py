"""The examples over open_clip: a tiny random CLIP, its own preprocessing, scores worked out with open_clip alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pyunictokens.rewards import RewardBatch
from pyunictokens.rewards.load import load_rewards
from pyunictokens.rewards.networks import resized_and_cropped
from pyunictokens.utils.errors import UserError

from .checkpoints import pil

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch comes with the extra `rewards`")

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of open_clip small enough for a test, its checkpoint as HPSv2 is published, and a linear head."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-for-tests.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "tiny-for-tests.json")
    torch.manual_seed(0)
    net = open_clip.create_model("tiny-for-tests")
    torch.save({"state_dict": net.state_dict()}, folder / "hps.pt")
    head = torch.nn.Linear(16, 1)
    torch.save(head.state_dict(), folder / "head.pth")
    return {"model": "tiny-for-tests", "path": str(folder / "hps.pt"), "head": str(folder / "head.pth")}


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")


def batch(rows: int = 4) -> RewardBatch:
    coarse = torch.rand(rows, 3, 6, 5, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
    pixels = F.interpolate(coarse, (37, 53), mode="bilinear")
    return RewardBatch(pixels, ["a red dog", "snow", "a red dog", "the beach"][:rows])


@pytest.mark.parametrize("size", [(28, 28), (37, 53), (61, 30), (512, 400)], ids=str)
def test_pixels_are_prepared_as_open_clip_does_it(size: tuple[int, int]) -> None:
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    coarse = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.7
    pixels = F.interpolate(coarse, size, mode="bilinear")
    own = open_clip.image_transform(28, is_train=False, mean=mean, std=std)
    want = torch.stack([own(image) for image in pil(pixels)])
    gap = (resized_and_cropped(pixels, 28, mean, std) - want).abs()
    assert gap.mean() <= 2e-3 and gap.max() <= 2.01 / 255 / min(std)  # Pillow rounds twice, on the way too


def test_scores_are_those_of_open_clip(tiny: dict[str, str]) -> None:
    settings = {
        "hps": {"use": "clip_experts:HpsV2", "path": tiny["path"], "model": tiny["model"]},
        "beauty": {"use": "clip_experts:Aesthetic", **tiny},
    }
    group = batch()
    score = load_rewards({"experts": settings, "weights": {"hps": 0.75, "beauty": 0.25}}, trust=True).score(group)

    net: Any = open_clip.create_model(tiny["model"]).eval()
    net.load_state_dict(torch.load(tiny["path"], weights_only=True)["state_dict"])
    ready = resized_and_cropped(group.images, 28, net.visual.image_mean, net.visual.image_std)
    with torch.no_grad():
        pictures = F.normalize(net.encode_image(ready), dim=-1)
        texts = F.normalize(net.encode_text(open_clip.get_tokenizer(tiny["model"])(list(group.prompts))), dim=-1)
        head = torch.nn.Linear(16, 1)
        head.load_state_dict(torch.load(tiny["head"], weights_only=True))
        torch.testing.assert_close(score.parts["hps"], (pictures * texts).sum(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(score.parts["beauty"], head(pictures)[:, 0] / 10, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score.total, 0.75 * score.parts["hps"] + 0.25 * score.parts["beauty"])
    assert score.parts["hps"].std() > 1e-3


def test_prompts_are_read_once(tiny: dict[str, str]) -> None:
    from clip_experts import HpsV2

    expert = HpsV2(tiny["path"], tiny["model"])
    seen: list[int] = []
    expert.clip.net.transformer.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    for _ in range(3):
        expert.score(batch())
    assert seen == [3]


def test_a_checkpoint_of_another_model_is_refused(tiny: dict[str, str], tmp_path: Path) -> None:
    from clip_experts import HpsV2

    torch.save({"state_dict": {"visual.proj": torch.zeros(3, 3)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: no checkpoint of tiny-for-tests"):
        HpsV2(str(tmp_path / "other.pt"), tiny["model"])
