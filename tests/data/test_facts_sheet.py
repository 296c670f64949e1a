"""Sheets of facts beside photos: what is wrong with them is told at once, and nothing else gets past."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyunictokens.data import (
    read_facts,
)
from pyunictokens.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("facts:\n  - fact: a\n   prompt: b", "not valid YAML at line 3, column"),
        ("facts: yes", r"facts: must be a list, is text 'yes'"),
        ("fact:\n  - x", r"fact: is not known here: one of info, facts"),
        ("facts:\n  - {fact: a}", r"facts\[0\].prompt: is missing"),
        ("facts:\n  - {fact: a, prompt: the dog}", r"'the dog' does not contain <bo>"),
        (
            "facts:\n  - {fact: a, prompt: <bo> b}\n  - {fact: a, prompt: <bo> c}",
            r"facts\[1\].fact: 'a' is there twice",
        ),
        ("facts:\n  - {fact: '', prompt: <bo> b}", r"facts\[0\].fact: is empty"),
        ("facts:\n  - {fact: a, prompt: <bo> b, answer: c}", r"facts\[0\].answer: has no question"),
        ("questions:\n  - {question: a}", r"questions\[0\].answer: is missing"),
        ("questions:\n  - {question: a, answer: [b]}", r"questions\[0\].answer: must be text, is a list"),
        ("prompts:\n  wide: [<bo>]", r"prompts.wide: is not known here: one of pure, dense, reasoning_dense"),
        ("prompts:\n  reasoning_dense:\n    - {prompt: <bo> a}", r"reasoning_dense\[0\].explicit: is missing"),
        ("- a", "must hold info, facts"),
        ("a: *x", "not valid YAML at line 1"),
        ("\x07", "not valid YAML"),
        ("info: <bo> is red.\ninfo: <bo> is blue.", "line 2: 'info' is given twice, first in line 1"),
        ("facts: !!python/object:os.system [x]", "the tag .* is not understood"),
    ],
)
def test_bad_sheets(tmp_path, text, words):
    (tmp_path / "sheet.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_facts(tmp_path / "sheet.yaml", "bo")


def test_the_sheet_in_the_documentation_is_valid():
    text = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    sheet = read_facts(yaml.load(block, Loader=yaml.BaseLoader), "bo")
    assert [len(sheet.facts), len(sheet.questions), list(sheet.photos), len(sheet.prompts)] == [4, 1, ["beach.jpg"], 4]
    assert sheet.facts[0].explicit == "A photo of <bo> with a red ball."
    assert sheet.facts[1].answer == sheet.facts[1].fact and sheet.facts[1].question == ""


def test_all_problems_of_a_sheet_at_once(tmp_path):
    (tmp_path / "sheet.yaml").write_text("extra: 1\nfacts: [x]\ntext_only:\n  - {question: a}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_facts(tmp_path / "sheet.yaml", "bo")
    assert len(str(caught.value).splitlines()) == 4


def test_an_empty_sheet_says_nothing(tmp_path):
    (tmp_path / "sheet.yaml").write_text("# nothing yet\n", encoding="utf-8")
    assert read_facts(tmp_path / "sheet.yaml", "bo") == read_facts(None, "bo")


def test_answers_stay_the_text_they_are(tmp_path):
    said = ("yes", "no", "0123", "1.0", "null", "~", "1e3", "2024-01-01")
    text = "\n".join(f"  - {{question: q{place}, answer: {answer}}}" for place, answer in enumerate(said))
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "sheet.yaml").write_bytes(f"text_only:\n{text}\n".encode(encoding))
        sheet = read_facts(tmp_path / "sheet.yaml", "bo")
        assert [answer for _, answer in sheet.text_only] == list(said)
        assert all(type(answer) is str for _, answer in sheet.text_only)


def test_sheets_too_large_or_too_deep(tmp_path):
    (tmp_path / "big.yaml").write_text("#" * 1_000_001, encoding="utf-8")
    with pytest.raises(UserError, match="must be at most 1000000"):
        read_facts(tmp_path / "big.yaml", "bo")
    (tmp_path / "deep.yaml").write_text("[" * 5000, encoding="utf-8")
    with pytest.raises(UserError, match=r"deep\.yaml"):
        read_facts(tmp_path / "deep.yaml", "bo")
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(["a0: &a0 [x, x, x]", *lines]), encoding="utf-8")
    with pytest.raises(UserError, match=r"bomb\.yaml.*more than 100000 values"):
        read_facts(tmp_path / "bomb.yaml", "bo")


VALUES = st.recursive(
    st.text(max_size=10) | st.sampled_from(["<bo> a", "yes"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "info",
                    "facts",
                    "fact",
                    "prompt",
                    "question",
                    "answer",
                    "prompts",
                    "pure",
                    "photos",
                    "text_only",
                    "explicit",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_no_sheet_gets_past_as_anything_but_a_user_error(value):
    try:
        sheet = read_facts(value if isinstance(value, dict) else {"facts": value}, "bo")
    except UserError:
        return
    assert all(fact.fact and "<bo>" in fact.prompt and fact.answer for fact in sheet.facts)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(alphabet="[]{}:-&*!|> \nab<bo>'\"%@#", max_size=40).map(str.encode))
def test_no_bytes_of_a_sheet_get_past_as_anything_but_a_user_error(tmp_path, content):
    (tmp_path / "sheet.yaml").write_bytes(content)
    try:
        read_facts(tmp_path / "sheet.yaml", "bo")
    except UserError as error:
        assert "sheet.yaml" in str(error)
