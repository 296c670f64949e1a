"""Measures against numbers worked out by hand, and character BLEU against numbers of NLTK."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens.data.images import save_image
from pyunictokens.evaluate import metrics as m
from pyunictokens.evaluate.clip import Embeddings
from pyunictokens.utils.errors import UserError

# nltk.translate.bleu_score.sentence_bleu([list(r)], list(c), weights=(0.7, 0.3), smoothing_function=method1)
NLTK = [
    ("a red ball", "a red ball", 1.0),
    ("a red ball", "a blue ball", 0.6499487496125421),
    ("its favourite toy is a red ball", "a red ball", 0.1224564282529819),
    ("a red ball", "its favourite toy is a red ball", 0.31563357236862033),
    ("abc", "xyz", 0.0),
    ("abc", "a", 0.06782831621752129),
    ("a", "a", 0.5011872336272724),
    ("abc", "", 0.0),
    ("", "abc", 0.0),
    ("ab", "ba", 0.5011872336272724),
    ("no", "nope, it is not", 0.11056526341132199),
    ("a red ball", "A Red Ball", 0.6108208775103529),
]


@pytest.mark.parametrize(("reference", "candidate", "value"), NLTK)
def test_character_bleu_is_the_published_one(reference: str, candidate: str, value: float) -> None:
    assert m.character_bleu(reference, candidate) == pytest.approx(value, abs=1e-12)


def test_character_bleu_by_hand() -> None:
    # candidate "aab": characters a, a, b of which "ab" holds a once and b; pairs aa, ab of which one is in "ab"
    assert m.character_bleu("ab", "aab") == pytest.approx((2 / 3) ** 0.7 * (1 / 2) ** 0.3)
    # shorter candidate: brevity exp(1 − 4/2), both precisions 1
    assert m.character_bleu("abcd", "ab") == pytest.approx(math.exp(-1))
    assert m.character_bleu("abc", "abd", weights=(1.0,)) == pytest.approx(2 / 3)


@settings(deadline=None)
@given(st.text(min_size=2, max_size=30), st.text(max_size=30))
def test_character_bleu_stays_within_its_range(reference: str, candidate: str) -> None:
    assert 0 <= m.character_bleu(reference, candidate) <= 1 + 1e-12
    assert m.character_bleu(reference, reference) == pytest.approx(1)


def test_word_bleu_by_hand() -> None:
    # 7 words, 6 right; pairs 4 of 6; triples 3 of 5; quadruples 2 of 4: the fourth root of their product
    found = m.word_bleu("its favourite toy is a red ball", "its favourite toy is a blue ball")
    assert found == pytest.approx(((6 / 7) * (4 / 6) * (3 / 5) * (2 / 4)) ** 0.25)
    # 2 words, 1 right; no pair right, which smoothing counts as one half; brevity exp(1 − 3/2)
    assert m.word_bleu("a red ball", "a cat") == pytest.approx(math.exp(-0.5) * (1 / 2 * 1 / 2) ** 0.5)
    assert m.word_bleu("a red ball", "a red ball") == pytest.approx(1)
    assert m.word_bleu("a red ball", "") == 0


@pytest.mark.parametrize(
    ("reference", "candidate", "exact", "same"),
    [
        ("a red ball", "a red ball", 1, 1),
        ("a red ball", "Red  ball.", 0, 1),
        ("a red ball", "the red-ball!", 0, 1),
        ("a red ball", "ball red", 0, 0),
        ("This is <bo>.", "this is <bo>", 0, 1),
        ("<bo>", "bo", 0, 0),
        ("ﬁsh", "fish", 0, 1),
        ("", "...", 0, 1),
    ],
)
def test_equality_of_answers(reference: str, candidate: str, exact: int, same: int) -> None:
    assert (m.exact(reference, candidate), m.same_answer(reference, candidate)) == (exact, same)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("yes", True),
        ("Yes, this is <bo>.", True),
        ("No, <bo> is not here", False),
        ("no. yes", False),
        ("nothing to yell about", None),  # "no" and "ye" inside words do not count
        ("", None),
    ],
)
def test_yes_and_no(answer: str, yes: bool | None) -> None:
    assert m.says_yes(answer) is yes


def test_nearest_fact() -> None:
    facts = ["its favourite toy is a red ball", "it sleeps in the snow", "it loves to wear a blue hat"]
    assert m.nearest("It sleeps in snow", facts) == 1
    assert m.nearest("blue hat", facts) == 2
    assert m.nearest("", facts) == 0
    with pytest.raises(UserError, match="no facts"):
        m.nearest("x", [])


def test_cleaning_and_segments() -> None:
    assert m.clean("<token_0><token_12> <bo>  is\nred ") == "<bo> is red"
    assert m.segments("a cat, with a hat; in 3.5 cm snow. Yes!") == ["a cat", "with a hat", "in 3.5 cm snow", "Yes"]
    assert m.segments("...") == ["..."]


class Colours:
    """Pictures to mean colours, texts to the colours they name."""

    NAMED = {"red": [1.0, 0, 0], "green": [0, 2.0, 0], "both": [1.0, 1.0, 0]}  # noqa: RUF012

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([self.NAMED[text] for text in texts])


def flat(*colours: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, 3, 4, 4)


def test_clip_scores_by_hand(tmp_path: Path) -> None:
    clip, root = Embeddings(Colours(), "colours", 8), math.sqrt(0.5)
    samples = flat((0.3, 0, 0), (0.2, 0.2, 0))
    rows = clip.samples(samples)
    assert clip.clip_t(rows, ["red"]) == pytest.approx([1, root])
    assert clip.clip_t(rows, ["red", "green"]) == pytest.approx([0.5, root])
    paths = [tmp_path / "red.png", tmp_path / "green.png"]
    for path, pixels in zip(paths, flat((0.9, 0, 0), (0, 0.8, 0)), strict=True):
        save_image(pixels, path)
    assert clip.clip_i(rows, samples, paths) == pytest.approx([0.5, root], abs=0.01)  # 0 is no level of 8 bits
    with pytest.raises(UserError, match="no references"):
        clip.clip_i(rows, samples, [])


def test_attribute_accuracy() -> None:
    seen = {"shape": "cat", "colour": "red", "hair": "none", "item": "ball", "item_colour": "blue"}
    assert m.attribute_accuracy(seen, {"shape": "cat", "colour": "blue"}) == 0.5
    # "none" is right in every image without the thing, so it is not asked for
    assert m.attribute_accuracy(seen, {"shape": "dog", "colour": "blue", "hair": "none"}) == 0.0
    assert m.attribute_accuracy(seen, {"item": "ball", "item_colour": "red", "shape": "cat"}) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="no attribute is wanted"):
        m.attribute_accuracy(seen, {"hair": "none"})
