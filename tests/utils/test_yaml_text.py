"""YAML as text: what a word means by itself, and every way in which a file is refused with name and line."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.utils.errors import UserError
from pyunictokens.utils.yaml_text import DEEPEST, Plain, dump_yaml, meant, parse_yaml, read_yaml, settled


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-6", 1e-6), ("4e0", 4.0), ("-3", -3), ("+3", 3), (".5", 0.5), ("1.", 1.0), ("0", 0), ("true", True),
        ("False", False), ("no", "no"), ("on", "on"), ("007", "007"), ("1:30", "1:30"), ("0x1f", "0x1f"),
        ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("1e", "1e"), (".inf", math.inf), ("-.inf", -math.inf),
        ("inf", "inf"), ("e5", "e5"), ("-", "-"), (".", "."),
    ],
)  # fmt: skip
def test_what_a_word_means(word: str, value: object) -> None:
    found = meant(Plain(word))
    assert found == value and type(found) is type(value)


def test_quotes_make_text_and_nothing_is_none() -> None:
    tree = parse_yaml("a: '1'\nb: 1\nc:\nd: ~\ne: ''\nf: !!str 5\ng: [x, \"true\", true]\n", "f")
    assert isinstance(tree, dict)
    assert type(tree["a"]) is str and type(tree["b"]) is Plain and type(tree["f"]) is str
    assert settled(tree) == {
        "a": "1", "b": 1, "c": None, "d": None, "e": "", "f": "5", "g": ["x", "true", True],
    }  # fmt: skip
    assert parse_yaml("", "f") is None and parse_yaml("# only a word\n", "f") is None
    assert settled(parse_yaml("'5'", "f")) == "5"


def test_aliases_and_merges() -> None:
    tree = settled(parse_yaml("base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}\nsame: *b\nboth: {<<: [{x: 5}, *b]}\n", "f"))
    assert tree == {
        "base": {"x": 1, "y": 2}, "mine": {"x": 1, "y": 3}, "same": {"x": 1, "y": 2}, "both": {"x": 5, "y": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "f: line 3: 'a' is given twice, first in line 1"),
        ("grpo:\n  lr: 1\n  'lr': 2\n", "f: line 3: 'lr' is given twice, first in line 2"),
        ("a: [1\n", r"f: not valid YAML at line 2, column 1"),
        ("a: !!python/object:os.system x", "the tag tag:yaml.org,2002:python/object:os.system is not understood"),
        ("a: !mine x", "the tag !mine is not understood"),
        ("[1, 2]: x", "a key must be a word"),
        ("{a: 1}: x", "a key must be a word"),
        ("a: 1\n---\nb: 2", "a second document begins"),
        ("a: *nothing", r"\*nothing stands for nothing before it"),
        ("a: &x [*x]", r"\*x stands for nothing before it"),
        ("<<: 3", "<< merges tables alone"),
        ("[" * 100_000, f"nested more than {DEEPEST} deep"),
        ("a: " * 3, "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_yaml(text, "f")


def test_five_hundred_bytes_do_not_eat_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    assert file.stat().st_size < 600
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 100000 values"):
        read_yaml(file)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_nothing_but_texts() -> None:
    text = "a: null\nb: ~\nc:\nd: yes\ne: 0123\nf: [no, 1.0, '']\n"
    wanted = {"a": "null", "b": "~", "c": "", "d": "yes", "e": "0123", "f": ["no", "1.0", ""]}
    assert parse_yaml(text, "f", nulls=False) == wanted and parse_yaml("", "f", nulls=False) is None


def test_what_powershell_writes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_bytes("name: zoë\r\nn: 1\r\n".encode(encoding))
        assert read_yaml(file) == {"name": "zoë", "n": "1"}


def test_written_as_it_stood() -> None:
    text = "a: 4e0\nb: no\nc: '4e0'\nd: 007\ne: null\nf: 1.50\ng: [on, 'on']\n"
    tree = parse_yaml(text, "f")
    again = dump_yaml(tree)
    assert "a: 4e0\n" in again and "f: 1.50\n" in again
    assert parse_yaml(again, "f") == tree and settled(parse_yaml(again, "f")) == settled(tree)


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=12)
trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words.filter(lambda w: w != "<<"), inner, max_size=3),
    max_leaves=8,
)


@given(trees)
def test_what_is_dumped_comes_back(tree: object) -> None:
    """With the library's own writing of values too: a value of any type is read as it was written."""
    assert settled(parse_yaml(dump_yaml(tree), "f")) == tree
    assert settled(parse_yaml(yaml.safe_dump(tree, allow_unicode=True), "f")) == tree


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        parse_yaml(text, "f")
    except UserError as error:
        assert str(error).startswith("f: ")
