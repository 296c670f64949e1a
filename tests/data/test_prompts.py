"""Prompt lists from files, lists and tables: every prompt with its columns, and errors that say where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.data.prompts import Prompt, read_prompts
from pyunictokens.utils.errors import UserError


class Rows:
    """As a datasets.Dataset: columns by name, rows by number."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows, self.column_names = rows, list(rows[0]) if rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def test_the_same_prompts_in_every_form(tmp_path: Path) -> None:
    rows = [{"prompt": "a red ball", "label": 3}, {"prompt": "zwei Hunde ", "label": 0}]
    wanted = [Prompt("a red ball", {"label": 3}), Prompt("zwei Hunde", {"label": 0})]
    lines = tmp_path / "p.jsonl"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    assert read_prompts(lines) == read_prompts(str(lines)) == read_prompts(rows) == read_prompts(Rows(rows)) == wanted
    text = tmp_path / "p.TXT"
    text.write_bytes("\ufeffa red ball\r\n\r\n  zwei Hunde \r\n".encode())
    assert read_prompts(text) == read_prompts(["a red ball", "zwei Hunde"]) == [Prompt(p.text) for p in wanted]


def test_columns_are_the_same_for_all() -> None:
    found = read_prompts([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}])
    assert [dict(each.columns) for each in found] == [{"x": 1, "y": None}, {"x": None, "y": 2}]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"))))
def test_every_line_of_a_file_is_a_prompt(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    file = tmp_path_factory.mktemp("p") / "p.jsonl"
    kept = [line.strip() for line in lines if line.strip()]
    file.write_text("\n".join(json.dumps(line) for line in lines if line.strip()), encoding="utf-8")
    if kept:
        assert [prompt.text for prompt in read_prompts(file)] == kept
    else:
        with pytest.raises(UserError, match="holds no prompt"):
            read_prompts(file)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "\n \n", "holds no prompt: give at least one"),
        ("p.csv", "a", "must be a .txt file (a prompt a line) or .jsonl"),
        ("p.jsonl", '"a"\n{"prompt": "b"', "p.jsonl: line 2: is not JSON"),
        ("p.jsonl", '{"promt": "a", "x": 1}', "line 1: has no key prompt, only promt, x; is it 'promt'?"),
        ("p.jsonl", '{"prompt": 3}', "line 1: 3: a prompt must be a text that is not empty"),
        ("p.jsonl", '{"prompt": " "}', "line 1: ' ': a prompt must be a text"),
        ("p.jsonl", "[1]", "line 1: [1]: a prompt must be a text"),
        ("p.jsonl", '{"prompt": "a", "images": 1}', "line 1: the column images must have another name"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        read_prompts(tmp_path / name)


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    for source, said in [
        ([], "prompts: holds no prompt"),
        (["a", ""], "prompts[1]: '': a prompt must be a text"),
        (7, "is a int: must be a .txt or .jsonl file"),
        (Rows([]), "the data set: holds no prompt"),
        (tmp_path / "none.txt", "none.txt"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            read_prompts(source)  # type: ignore[arg-type]
