"""What the judge writes as a score: read where it says one, else an error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens.rewards.judge import parse_score
from pyunictokens.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7}', 7),
        ('{"reason": "a {brace}", "score": 7.5}', 7.5),
        ('```json\n{"score": 0}\n```', 0),
        ('```\n{"score": 10}\n```', 10),
        ("7", 7),
        (" 7.25 \n", 7.25),
        ("Good colours.\nScore: 3", 3),
        ("**Score:** 3/10", 3),
        ("- score = 3 / 10.", 3),
    ],
)
def test_scores_that_can_be_read(text: str, score: float) -> None:
    assert parse_score(text, 0, 10)[0] == score


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds 0 scores"),
        ("I would say 7 of 10", "holds 0 scores"),
        ("Score: 3\nScore: 4", "holds 2 scores"),
        ("Score: 3/5", "out of 5: the scale ends at 10"),
        ("Score: high", "holds 0 scores"),
        ("11", "is 11: must be from 0 to 10"),
        ("-1", "is -1: must be"),
        ('{"score": 10.01}', "must be from 0 to 10"),
        ('{"score": "7"}', "must be a number"),
        ('{"score": true}', "must be a number"),
        ('{"score": null}', "must be a number"),
        ('{"score": NaN}', "must be from 0 to 10"),
        ('{"score": Infinity}', "must be from 0 to 10"),
        ('{"rating": 7}', "score is None"),
        ('{"score": 7} and more', "no valid JSON"),
        ('{"score": 7', "no valid JSON"),
    ],
)
def test_scores_that_cannot(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_score(text, 0, 10)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_a_score_on_the_scale_or_an_error(text: str) -> None:
    try:
        score, _ = parse_score(text, 0, 10)
    except UserError:
        return
    assert 0 <= score <= 10


@settings(deadline=None)
@given(st.floats(0, 10), st.text(max_size=30))
def test_json_answers_come_back_exactly(score: float, reason: str) -> None:
    assert parse_score(json.dumps({"reason": reason, "score": score}), 0, 10) == (score, reason)
