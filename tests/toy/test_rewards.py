"""The toy's networks behind the experts: wired as they should be, and in the shipped weights, of the right opinion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pyunictokens
from pyunictokens.data.images import from_pil
from pyunictokens.rewards import RewardBatch
from pyunictokens.toy.drawing import render
from pyunictokens.toy.networks import ToyNetworks
from pyunictokens.toy.rewards import ToyRewards, load_toy_rewards, toy_rewards
from pyunictokens.toy.scene import Attributes, random_moment, random_scene
from pyunictokens.utils.errors import UserError

WORDS = ["a", "photo", "of", "red", "blue", "cat", "person", "its", "favourite", "toy", "is", "ball", "hat"]
SHIPPED = Path(pyunictokens.__file__).parent / "assets" / "toy" / "experts.safetensors"


def draw(*scenes: Attributes) -> torch.Tensor:
    return torch.stack([from_pil(Image.fromarray(render(scene, 64))) for scene in scenes])


def untrained() -> ToyRewards:
    torch.manual_seed(0)
    return toy_rewards(ToyNetworks(WORDS).requires_grad_(False).eval())


def human_batch(seed: int = 0) -> RewardBatch:
    rng = np.random.default_rng(seed)
    subject = random_scene(rng, "human")
    drawings = [random_moment(subject, rng), random_scene(rng, "animal"), random_scene(rng, "human")]
    return RewardBatch(
        draw(*drawings),
        ["a photo of a person", "a red cat", "a blue hat"],
        ["its favourite toy is a ball", "a hat", ""],
        ["its favourite toy is a ball", "a red hat"],
        0,
        draw(*(random_moment(subject, rng) for _ in range(4))),
        "human",
    )


def test_every_expert_asks_its_own_network() -> None:
    toy, batch = untrained(), human_batch()
    nets = toy.nets
    nets.face.presence.bias.data.fill_(10.0)  # the untrained finder sees a face everywhere
    score = toy.ensemble.score(batch)
    with torch.no_grad():
        image = nets.image_text.encode_image(batch.images)
        expected = {
            "ber": (image * nets.image_text.encode_text(batch.prompts)).sum(1),
            "der": (nets.subject(batch.images) @ nets.subject(batch.references).T).mean(1),
            "fer": (nets.face(batch.images)[1] @ nets.face(batch.references)[1].T).mean(1).clamp(0, 1),
        }
        facts, answers = nets.sentence(batch.facts), nets.sentence(batch.answers)
        similarity = answers @ facts.T
        expected["tier"] = ((2 - (similarity - torch.tensor([1.0, 0.0])).norm(dim=1)) / 2).clamp(0, 1)
        expected["tier"][2] = 0  # the empty answer
    assert set(score.parts) == set(expected) and score.no_face == 0
    for name, value in expected.items():
        torch.testing.assert_close(score.parts[name], value, atol=1e-5, rtol=1e-4)
    weights = {"tier": 0.4, "ber": 0.2, "der": 0.2, "fer": 0.2}
    torch.testing.assert_close(score.total, sum(w * expected[n] for n, w in weights.items()), atol=1e-5, rtol=1e-4)


def test_no_face_is_found_where_the_finder_says_so() -> None:
    toy, batch = untrained(), human_batch()
    batch.references = batch.images
    logits = toy.nets.face(batch.images)[0]
    toy.nets.face.presence.bias.data -= (logits.min() + logits.max()) / 2
    found = toy.nets.face(batch.images)[0] > 0
    score = toy.ensemble.score(batch)
    assert 0 < score.no_face == int((~found).sum()) < 3
    assert (score.parts["fer"][~found] == 0).all()


def test_preview_scorer_is_ber() -> None:
    toy, batch = untrained(), human_batch()
    scores = toy.preview_scorer(batch.prompts)(batch.images, torch.arange(3))
    torch.testing.assert_close(scores, toy.ensemble.models["ber"].score(batch))


def test_weights_reach_the_ensemble() -> None:
    toy = toy_rewards(untrained().nets, weights={"ber": 1})
    score = toy.ensemble.score(human_batch())
    assert list(score.parts) == ["ber"] and torch.equal(score.total, score.parts["ber"])


def test_missing_assets_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"experts\.json: no such file"):
        load_toy_rewards(tmp_path)


@pytest.mark.parametrize("kind", ["animal", "object", "human"])
def test_shipped_experts_prefer_what_is_right(kind: str) -> None:
    """Over 24 scenes: the concept's own subject and the prompt's own item beat wrong ones, and faces are faces."""
    toy, rng = load_toy_rewards(), np.random.default_rng(11)
    subject = random_scene(rng, kind, held_out=True)
    other = random_scene(rng, kind, held_out=True)
    place, wrong = ("beach", "night")
    right = [random_moment(subject, rng).with_words(place=place) for _ in range(24)]
    swapped = [random_moment(other, rng).with_words(place=place) for _ in range(24)]
    elsewhere = [scene.with_words(place=wrong) for scene in right]
    photos = draw(*(random_moment(subject, rng) for _ in range(8)))

    def parts(scenes: list[Attributes]) -> dict[str, torch.Tensor]:
        prompts = [f"a photo of a {subject.noun} on the {place}"] * len(scenes)
        answers = ["its favourite toy is a red ball"] * len(scenes)
        facts = ["its favourite toy is a red ball", "it sleeps in the snow", "it loves to wear a blue hat"]
        return toy.ensemble.score(RewardBatch(draw(*scenes), prompts, answers, facts, 0, photos, kind)).parts

    good = parts(right)
    assert float((good["ber"] > parts(elsewhere)["ber"]).float().mean()) > 0.9
    assert float((good["der"] > parts(swapped)["der"].mean()).float().mean()) > 0.9
    wrong_fact = toy.ensemble.models["tier"].score(
        RewardBatch(
            photos[:1], ["x"], ["it sleeps in the snow"], ["its favourite toy is a red ball", "it sleeps in the snow"]
        )
    )
    assert float(good["tier"].min()) > float(wrong_fact.max()) + 0.1
    if kind == "human":
        assert float((good["fer"] > 0).float().mean()) > 0.9


def test_reading_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = untrained().nets.reader
    monkeypatch.setattr(reader, "read", lambda pixels: torch.tensor([[3, 1, 0, 0, 1, 2, 0, 0, 5]]))
    (seen,) = reader.attributes(torch.zeros(1, 3, 64, 64))
    assert seen["shape"] == "cat" and seen["colour"] == "orange" and seen["wear"] == "hat"
    assert seen["wear_colour"] == "orange" and seen["item"] == "none" and seen["place"] == "desert"
