"""How facts and answers join a prompt."""

import pytest

from pyunictokens.data import wording


def test_wordings():
    facts = ["its favourite toy is a red ball.", "it sleeps in the snow"]
    question = wording.text_only_question(facts, "a photo of <bo> asleep.")
    assert question.startswith("Information: its favourite toy is a red ball. it sleeps in the snow. Request:")
    assert question.endswith("a photo of <bo> asleep. Which information fits?")
    assert wording.compound_prompt("A photo of <bo>.", "it is red.") == "A photo of <bo>. it is red."
    assert wording.compound_prompt("A photo of <bo>.", " ") == "A photo of <bo>."


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A red ball. It rolls.", "A red ball."),
        ("  3.5 metres tall! Yes.", "3.5 metres tall!"),
        ("no stop at all", "no stop at all"),
        ("one line\nanother. line", "one line"),
        ("What? No.", "What?"),
        ("", ""),
    ],
)
def test_first_sentence(text: str, first: str) -> None:
    assert wording.first_sentence(text) == first
