"""Experts on a GPU: the CPU's values, side by side or one at a time, with the memory that each way promises."""

from __future__ import annotations

import pytest
import torch

from pyunictokens.rewards import RewardBatch
from pyunictokens.rewards.load import load_rewards

from ..rewards.checkpoints import SENTENCES, Folders, save_blip2, save_dinov2, save_ernie, save_facenet


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    for library in ("facenet_pytorch", "torchvision"):
        pytest.importorskip(library, reason="the paper's networks need the extra `rewards`; `dev` brings it too")
    root = tmp_path_factory.mktemp("weights")
    return Folders(save_ernie(root / "e"), save_blip2(root / "b"), save_dinov2(root / "d"), save_facenet(root / "f"))


def scored(saved: Folders, device: str, memory: str) -> dict[str, torch.Tensor]:
    pixels = torch.rand(5, 3, 96, 80, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1
    facts, answers = SENTENCES[:3], [SENTENCES[n % 4] for n in range(5)]
    batch = RewardBatch(pixels, [SENTENCES[n % 3] for n in range(5)], answers, facts, 1, pixels[:2], "animal")
    ensemble = load_rewards({"experts": saved.settings(), "memory": memory}, device)
    for _ in range(3):  # the first asks every network, the others find photos and texts kept
        score = ensemble.score(batch)
    assert set(ensemble.throughput()) == set(score.parts)
    return {**score.parts, "total": score.total}


@pytest.mark.parametrize("memory", ["together", "lean", "auto"])
def test_scores_are_those_of_the_cpu(saved: Folders, device: str, memory: str) -> None:
    there, here = scored(saved, device, memory), scored(saved, "cpu", "together")
    for name, values in here.items():
        assert there[name].device.type == device
        torch.testing.assert_close(there[name].cpu(), values, atol=2e-2, rtol=0, msg=name)  # 8-bit resizing rounds


def test_lean_leaves_nothing_on_the_device(saved: Folders, device: str) -> None:
    settings = {"experts": saved.settings("der"), "memory": "lean", "weights": {"der": 1}}
    ensemble = load_rewards(settings, device)
    pixels = torch.zeros(2, 3, 64, 64, device=device)
    ensemble.score(RewardBatch(pixels, ["p"] * 2, references=pixels))
    net = ensemble.experts["der"]._encoder  # type: ignore[attr-defined]
    assert all(not weight.is_cuda for module in net.load() for weight in module.parameters())


def test_faces_are_found_on_the_device(saved: Folders, device: str) -> None:
    skimage_data = pytest.importorskip("skimage.data")
    from pyunictokens.rewards.experts.facenet import FerConfig, MtcnnFaceNet

    from ..rewards.checkpoints import pixels_of

    photo = pixels_of(skimage_data.astronaut()[:256, 64:384])
    results = {}
    for place in {"cpu", device}:
        found, faces = MtcnnFaceNet(FerConfig(str(saved.facenet)), place).encode_faces(photo.to(place))
        results[place] = faces.cpu()
        assert found.tolist() == [True]
    assert torch.nn.functional.cosine_similarity(results["cpu"], results[device]).item() > 0.99
