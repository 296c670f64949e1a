"""TIER, BER, DER and FER against numbers worked out by hand, their order, their caches and their bad inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens.rewards import Ber, Der, Fer, RewardBatch, RewardModel, Tier
from pyunictokens.rewards.experts.tier import tier_score
from pyunictokens.utils.errors import UserError

from .fakes import ColourFace, HandText, MeanColour, flat

RED, GREEN = (0.8, 0.0, 0.0), (0.0, 0.8, 0.0)
HALF = (0.5, 0.5, 0.0)


def text_batch(answers: list[str], facts: list[str], correct: int = 0) -> RewardBatch:
    return RewardBatch(flat(*[RED] * len(answers)), ["x"] * len(answers), answers, facts, correct)


# --- TIER ----------------------------------------------------------------------------------------------------------


def test_tier_by_hand() -> None:
    # similarities of the answers: (1, 0), (0.6, 0.8), (0, 1); truth is (1, 0)
    tier = Tier(HandText({"a": [2.0, 0.0], "b": [0.0, 3.0], "mixed": [3.0, 4.0]}))
    scores = tier.score(text_batch(["a", "mixed", "b"], ["a", "b"], correct=0))
    d_mixed = math.hypot(0.6 - 1, 0.8)
    torch.testing.assert_close(scores, torch.tensor([1.0, (2 - d_mixed) / 2, (2 - math.sqrt(2)) / 2]))


def test_tier_of_one_fact_is_one_minus_half_the_gap() -> None:
    tier = Tier(HandText({"truth": [1.0, 0.0], "near": [4.0, 3.0], "opposite": [-1.0, 0.0]}))
    scores = tier.score(text_batch(["truth", "near", "opposite"], ["truth"]))
    torch.testing.assert_close(scores, torch.tensor([1.0, 1 - abs(1 - 0.8) / 2, 0.0]))  # d = 0, 0.2, 2


def test_tier_is_clamped_where_the_distance_passes_two() -> None:
    similarity = torch.full((1, 7), 0.9)
    assert float((similarity - torch.eye(7)[:1]).norm()) > 2
    assert tier_score(similarity, 0).tolist() == [0.0]


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.floats(-1, 0.98))
def test_tier_rises_with_the_similarity_to_the_true_fact(wrong: list[float], low: float) -> None:
    scores = tier_score(torch.tensor([[low, *wrong], [low + 0.02, *wrong]], dtype=torch.float64), 0)
    assert 0 <= scores[0] <= scores[1] <= 1
    assert scores[0] < scores[1] or scores[0] == 0


def test_tier_scores_an_empty_answer_zero() -> None:
    tier = Tier(HandText({"a": [1.0, 0.0], "": [1.0, 0.0], " \n": [1.0, 0.0]}))
    assert tier.score(text_batch(["a", "", " \n"], ["a"])).tolist() == [1.0, 0.0, 0.0]


def test_tier_needs_answers_and_facts() -> None:
    tier = Tier(HandText({"a": [1.0]}))
    with pytest.raises(UserError, match=r"0 answers and 1 facts"):
        tier.score(RewardBatch(flat(RED), ["x"], facts=["a"]))
    with pytest.raises(UserError, match=r"1 answers and 0 facts"):
        tier.score(RewardBatch(flat(RED), ["x"], answers=["a"]))


# --- BER -----------------------------------------------------------------------------------------------------------


def test_ber_is_the_cosine_similarity_of_image_and_prompt() -> None:
    ber = Ber(MeanColour({"red": [1.0, 0.0, 0.0], "grass": [0.0, 5.0, 0.0], "not red": [-1.0, 0.0, 0.0]}))
    batch = RewardBatch(flat(RED, RED, HALF, RED), ["red", "grass", "red", "not red"])
    torch.testing.assert_close(ber.score(batch), torch.tensor([1.0, 0.0, math.sqrt(0.5), -1.0]))


def test_ber_keeps_the_order_of_distances() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(17, 3, 4, 6, generator=generator) * 2 - 1
    ber = Ber(MeanColour({"p": [0.3, -0.7, 0.2]}))
    scores = ber.score(RewardBatch(images, ["p"] * 17))
    colours, prompt = images.double().mean(dim=(2, 3)), torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64)
    distances = 1 - colours @ prompt / (colours.norm(dim=1) * prompt.norm())
    assert scores.argsort(descending=True).tolist() == distances.argsort().tolist()


def test_preview_scorer_takes_the_prompt_of_each_row() -> None:
    ber = Ber(MeanColour({"red": [1.0, 0.0, 0.0], "grass": [0.0, 1.0, 0.0]}))
    scorer = ber.preview_scorer(["red", "grass"])
    previews = flat(RED, RED, GREEN)
    torch.testing.assert_close(scorer(previews, torch.tensor([0, 1, 1])), torch.tensor([1.0, 0.0, 1.0]))
    overshoot = flat((1.2, -1.1, 0.0))
    torch.testing.assert_close(scorer(overshoot, torch.tensor([0])), torch.tensor([math.sqrt(0.5)]))  # as (1, −1, 0)
    with pytest.raises(UserError, match=r"indices into the 2 prompts"):
        scorer(previews, torch.tensor([0, 1, 2]))
    with pytest.raises(UserError, match="finite"):
        scorer(previews * torch.nan, torch.tensor([0, 0, 0]))


# --- DER -----------------------------------------------------------------------------------------------------------


def test_der_is_the_mean_similarity_to_the_photos() -> None:
    der = Der(MeanColour())
    batch = RewardBatch(flat(RED, HALF, (-0.5, 0, 0)), ["x"] * 3, references=flat(RED, GREEN, size=9))
    torch.testing.assert_close(der.score(batch), torch.tensor([0.5, math.sqrt(0.5), -0.5]))


def test_der_needs_photos() -> None:
    with pytest.raises(UserError, match="no reference images"):
        Der(MeanColour()).score(RewardBatch(flat(RED), ["x"]))


def test_der_refuses_an_encoder_that_returns_patches() -> None:
    class Patches:
        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(2)

    with pytest.raises(UserError, match=r"encode_image returned \(1, 3, 25\) for 1 inputs"):
        Der(Patches()).score(RewardBatch(flat(RED), ["x"], references=flat(RED)))


# --- FER -----------------------------------------------------------------------------------------------------------


def test_fer_by_hand_and_the_rows_without_a_face() -> None:
    no_face = (-0.8, 0.1, 0.0)
    batch = RewardBatch(flat(RED, no_face, HALF), ["x"] * 3, references=flat(RED, no_face), kind="human")
    scores, absent = Fer(ColourFace()).score_and_absent(batch)
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.0, math.sqrt(0.5)]))  # the faceless photo does not count
    assert absent.tolist() == [False, True, False]


def test_fer_of_a_wrong_face_is_not_worth_less_than_none() -> None:
    batch = RewardBatch(flat((0.1, -0.9, 0.0)), ["x"], references=flat((0.1, 0.9, 0.0)), kind="human")
    scores, absent = Fer(ColourFace()).score_and_absent(batch)
    assert scores.tolist() == [0.0] and absent.tolist() == [False]


def test_fer_says_when_no_photo_has_a_face() -> None:
    batch = RewardBatch(flat(RED), ["x"], references=flat((-1.0, 0, 0), (-0.2, 0, 0)), kind="human")
    with pytest.raises(UserError, match="no face found in any of the 2 reference images"):
        Fer(ColourFace()).score(batch)


def test_fer_refuses_a_finder_that_returns_numbers() -> None:
    class Logits:
        def encode_faces(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            colour = pixels.mean(dim=(2, 3))
            return colour[:, 0], colour

    with pytest.raises(UserError, match=r"must be bool \[1\]"):
        Fer(Logits()).score(RewardBatch(flat(RED), ["x"], references=flat(RED), kind="human"))


# --- caches --------------------------------------------------------------------------------------------------------


def test_photos_are_encoded_once_and_again_when_they_change() -> None:
    encoder = MeanColour()
    der = Der(encoder)
    photos = flat(RED, GREEN)
    for _ in range(3):
        der.score(RewardBatch(flat(HALF), ["x"], references=photos.clone()))
    assert encoder.image_rows == 3 * 1 + 2
    photos[1] = 0.7  # the same tensor with another photo in it
    score = der.score(RewardBatch(flat(RED), ["x"], references=photos))
    assert encoder.image_rows == 3 * 1 + 2 + 1 + 2
    torch.testing.assert_close(score, torch.tensor([(1 + 1 / math.sqrt(3)) / 2]))


def test_faces_in_photos_are_searched_once() -> None:
    encoder = ColourFace()
    fer = Fer(encoder)
    batch = RewardBatch(flat(RED), ["x"], references=flat(RED, GREEN, HALF), kind="human")
    fer.score(batch)
    fer.score(batch)
    assert encoder.image_rows == 3 + 2 * 1


def test_texts_are_encoded_once() -> None:
    encoder = HandText({"a": [1.0, 0.0], "b": [0.0, 1.0], "new": [1.0, 1.0]})
    tier = Tier(encoder)
    tier.score(text_batch(["a", "a", "b"], ["a", "b"]))
    tier.score(text_batch(["a", "new", "new"], ["a", "b"]))
    assert sorted(encoder.seen) == ["a", "b", "new"]


def test_text_cache_stays_within_its_limit_and_right() -> None:
    from pyunictokens.rewards.cache import TextCache

    encoder = HandText({str(n): [float(n)] for n in range(9)})
    cache = TextCache(encoder.encode_text, limit=3)
    for texts in (["0", "1", "2"], ["0"], ["3"], ["0", "2", "3"], ["1"]):
        assert cache(texts).flatten().tolist() == [float(text) for text in texts]
    assert encoder.seen == ["0", "1", "2", "3", "1"]  # only 1 had been dropped: 0 was used after it
    assert cache([str(n) for n in range(9)]).flatten().tolist() == list(range(9))  # more at once than the limit


def test_experts_have_the_interface() -> None:
    for expert in (Tier(HandText({})), Ber(MeanColour()), Der(MeanColour()), Fer(ColourFace())):
        assert isinstance(expert, RewardModel)
    assert not isinstance(HandText({}), RewardModel)


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, 3, 5, 5), "prompts": [], "answers": []}, "images: 0 rows"),
        ({"images": torch.zeros(2, 5, 5, 3)}, r"images: \(2, 5, 5, 3\): must be a tensor \[B, 3, H, W\]"),
        ({"images": torch.zeros(2, 3, 5, 5, dtype=torch.uint8)}, "images: torch.uint8: must be float"),
        ({"images": flat(RED, RED) * 255}, "images: values from 0 to 204"),
        ({"images": flat(RED, RED) * torch.nan}, "images: .*must be finite"),
        ({"references": flat(RED) * torch.inf}, "references: .*must be finite"),
        ({"prompts": ["one"]}, "prompts: 1 texts for 2 images"),
        ({"prompts": "ab"}, "must be a list of 2 texts"),
        ({"answers": ["a", "b", "c"]}, "answers: 3 texts for 2 images"),
        ({"facts": "a fact"}, "facts='a fact': must be a list"),
        ({"facts": ["f"], "correct": 1}, "correct=1: must be an index into the 1 facts"),
        ({"facts": ["f"], "correct": -1}, "correct=-1"),
        ({"kind": "plant"}, "kind='plant': must be one of human, animal, object"),
    ],
)
def test_bad_batches_say_what_is_wrong(change: dict, message: str) -> None:
    good = {"images": flat(RED, GREEN), "prompts": ["p", "q"], "answers": ["a", "b"], "references": flat(RED)}
    RewardBatch(**good)
    with pytest.raises(UserError, match=message):
        RewardBatch(**{**good, **change})


def test_a_row_keeps_what_all_rows_share() -> None:
    batch = RewardBatch(flat(RED, GREEN), ["p", "q"], ["a", "b"], ["f", "g"], 1, flat(HALF), "animal")
    row = batch.row(1)
    assert (row.prompts, row.answers, row.facts, row.correct, row.kind) == (["q"], ["b"], ["f", "g"], 1, "animal")
    assert torch.equal(row.images, flat(GREEN)) and torch.equal(row.references, batch.references)
