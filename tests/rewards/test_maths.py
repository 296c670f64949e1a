"""The verifier of answers: where an answer stands, and when two are one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.rewards.base import RewardBatch
from pyunictokens.rewards.ensemble import as_rewards
from pyunictokens.rewards.experts.maths import Maths, answer_of, same
from pyunictokens.rewards.served.messages import pack_batch, unpack_batch
from pyunictokens.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 12 · 4 is 48", "48"),
        ("It is 1,000.50.", "1,000.50"),
        ("3 then #### 42\nand 7", "42"),
        (r"first \\boxed{3}, then \\boxed{\\frac{1}{2}} of 9", r"\\frac{1}{2}"),
        (r"an open \\boxed{3", "3"),
        ("<answer> x + 1 </answer> 5", "x + 1"),
        ("-3 and then -7/8", "-7/8"),
        ("none", None),
        ("", None),
    ],
)
def test_where_an_answer_stands(text: str, answer: str | None) -> None:
    text, wanted = text.replace("\\\\", "\\"), answer and answer.replace("\\\\", "\\")
    assert answer_of(text) == wanted


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1,000", "1000.0", True),
        ("0.5", "1/2", True),
        ("50%", "0.5", True),
        ("\\frac{1}{2}", "0.50", True),
        ("$12", "12", True),
        ("48.", "48", True),
        ("4 8", "48", True),
        ("x + 1", "X+1", True),
        ("x+1", "1+x", False),
        ("12", "13", False),
        ("1/0", "1", False),
        ("9" * 5000, "9", False),
    ],
)
def test_when_two_are_one(one: str, other: str, equal: bool) -> None:
    assert same(one, other) is equal and same(None, other) is False


@given(st.text(max_size=80))
def test_any_text_has_a_verdict(text: str) -> None:
    found = answer_of(text)
    assert found is None or same(found, found)


def test_scores_of_a_batch() -> None:
    batch = RewardBatch.of_texts(
        ["it is 48", "it is 47", "no idea"], ["a", "b", "c"], {"answer": ["48", "so it is #### 48", 48]}
    )
    assert Maths().score(batch).tolist() == [1.0, 0.0, 0.0] and len(batch) == 3
    assert as_rewards("maths").score(batch).total.tolist() == [1.0, 0.0, 0.0]
    sent = unpack_batch(*pack_batch(batch), torch.device("cpu"))
    assert list(sent.completions) == list(batch.completions) and sent.images.shape == (3, 3, 0, 0)
    with pytest.raises(UserError, match="maths needs the column answer"):
        Maths().score(RewardBatch.of_texts(["1"], ["a"], {}))
    with pytest.raises(UserError, match="maths reads texts"):
        Maths().score(RewardBatch(torch.zeros(1, 3, 2, 2), ["a"], columns={"answer": ["1"]}))


def test_functions_of_texts() -> None:
    def longer(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(text) - len(prompt)) for prompt, text in zip(prompts, completions, strict=True)]

    def drawn(prompts: list[str], images: torch.Tensor) -> list[float]:
        return [0.0 for _ in prompts]

    texts = RewardBatch.of_texts(["abc", "d"], ["a", "b"], {})
    assert as_rewards(longer).score(texts).total.tolist() == [2.0, 0.0]
    with pytest.raises(UserError, match=r"drawn asks for images, and this model gives completions"):
        as_rewards(drawn).score(texts)
    with pytest.raises(UserError, match=r"longer asks for completions, and this model gives images"):
        as_rewards(longer).score(RewardBatch(torch.zeros(1, 3, 2, 2), ["a"]))
    with pytest.raises(UserError, match="completions: 1 texts for 2 images"):
        RewardBatch(torch.zeros(2, 3, 2, 2), ["a", "b"], completions=["x"])
