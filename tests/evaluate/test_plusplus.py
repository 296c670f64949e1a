"""Proposing UnifyBench++ texts: a real HTTP server plays the language model, a sheet is all that comes of it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.data.folder import load_concept
from pyunictokens.data.review_sheet import read_sheet, write_sheet
from pyunictokens.evaluate.suites.unify import read as subject_of
from tests.data.conftest import FACTS, Folder
from tests.judge_server import JudgeServer, question_of

SCENE = "on a beach at dusk with two palms left, a boat far behind and a red towel in front of it"


def writer(request: dict[str, Any]) -> str:
    """A model that does as it is told."""
    asked = question_of(request)
    count = int(re.search(r"exactly (\d+) items", asked)[1])  # type: ignore[index]
    if '"fact":' in asked:
        items = [
            {"fact": f"<bo> loves thing {n}.", "prompt": f"<bo> with love {n}.", "explicit": f"<bo> with thing {n}."}
            for n in range(1, count + 1)
        ]
    elif "number n of this list" in asked:
        shorts = re.findall(r"Short prompt: (.*)", asked)
        items = [
            {"prompt": f"{s.rstrip('.')}, {SCENE}, {n}.", "explicit": f"<bo> with the thing, {SCENE}, {n}."}
            for n, s in enumerate(shorts)
        ]
    elif "For each, in this order" in asked:
        items = [{"prompt": f"<bo> and its secret {n}", "explicit": f"<bo>: {n}"} for n in range(count)]
    else:
        items = [{"prompt": f"<bo> {SCENE}, {n}."} for n in range(count)]
    return "```json\n" + json.dumps({"items": items}) + "\n```"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-" + "verysecret")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(writer) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")


@pytest.fixture
def plain(folder: Folder) -> Folder:
    folder.info(extra_info=...)
    folder.json(folder.test / "t2i_conditions.json", {"pure_generation": ["<bo> in the snow"]})
    return folder


def call(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def asking(root: Path, sheet: Path, server: JudgeServer, *more: object) -> list[object]:
    fewer = ("--facts", "4", "--dense", "3", "--dense-reasoning", "3")
    return ["data", "propose", root, "--sheet", sheet, "--url", server.url, "--model", "m", *fewer, *more]


def test_from_a_unifybench_folder_to_the_plus_plus_fields(plain: Folder, server: JudgeServer, tmp_path: Path) -> None:
    sheet, before = tmp_path / "review.csv", plain.snapshot()
    said = call(*asking(plain.root, sheet, server))
    assert "10 new rows, 0 were there; asked 3 times, 300 + 60 tokens" in said
    assert plain.snapshot() == before and sheet.read_bytes()[:3] == b"\xef\xbb\xbf"
    rows = read_sheet(sheet)
    assert [row.kind for row in rows] == ["fact"] * 4 + ["dense"] * 3 + ["dense_reasoning"] * 3
    assert [row.half for row in rows[:4]] == ["train", "train", "test", "test"]
    assert [(row.number, row.fact) for row in rows[7:]] == [(n, f"<bo> loves thing {n}.") for n in (3, 4, 3)]
    assert not any(row.accept for row in rows)
    assert "nothing was accepted" in call("data", "accept", plain.root, sheet)
    assert plain.snapshot() == before
    # a person accepts
    sheet.write_text(re.sub(r"(?m)^,bo", "yes,bo", sheet.read_text("utf-8-sig")), "utf-8")
    said = call("data", "accept", plain.root, sheet)
    assert "4 fact, 3 dense, 3 dense_reasoning written" in said
    call("data", "check", plain.root, "bo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = subject_of(plain.root, "bo")
    for task in ("reasoning", "reasoning_dense", "reasoning_generation", "dense", "dense_reasoning_generation"):
        assert subject.of(task), (task, subject.notes)
    assert {item.correct for item in subject.of("dense_reasoning_generation")} == {2, 3}
    # the folder has everything now: nothing is asked
    server.requests.clear()
    assert "0 new rows" in call(*asking(plain.root, tmp_path / "other.csv", server)) and not server.requests


def test_it_goes_on_where_it_stopped_and_keeps_what_was_reviewed(
    plain: Folder, server: JudgeServer, tmp_path: Path
) -> None:
    sheet = tmp_path / "review.csv"
    server.script("ok", *["401"] * 9)
    said = call(*asking(plain.root, sheet, server), code=2)
    assert "bo: dense:" in said and "4 new rows are in" in said and "verysecret" not in said
    sheet.write_text(sheet.read_text("utf-8-sig").replace(",bo,fact,3", "no,bo,fact,3").replace("thing 4.", "owls."))
    reviewed = read_sheet(sheet)[:4]
    server._script.clear()
    server.requests.clear()
    assert "6 new rows, 4 were there; asked 2 times" in call(*asking(plain.root, sheet, server))
    rows = read_sheet(sheet)
    assert [(r.accept, r.fact, r.prompt) for r in rows[:4]] == [(r.accept, r.fact, r.prompt) for r in reviewed]
    assert {(row.number, row.fact) for row in rows[7:]} == {(4, "<bo> loves owls.")}


def test_an_answer_that_cannot_be_used_is_told_and_asked_for_again(
    plain: Folder, server: JudgeServer, tmp_path: Path
) -> None:
    answers = iter(
        [
            "Sure! Here are your facts.",
            json.dumps({"items": [{"fact": "<bo> x.", "prompt": "the dog", "explicit": "<bo> y"}] * 4}),
        ]
    )
    server.answer = lambda request: next(answers, None) or writer(request)
    call(*asking(plain.root, tmp_path / "s.csv", server))
    turns = [request["messages"] for request in server.requests[:3]]
    assert [len(each) for each in turns] == [1, 3, 3]
    assert "not the JSON asked for" in turns[1][2]["content"]
    assert "item 1: prompt does not contain <bo>" in turns[2][2]["content"]
    assert [row.fact for row in read_sheet(tmp_path / "s.csv")[:4]] == [f"<bo> loves thing {n}." for n in (1, 2, 3, 4)]


def test_what_stays_unusable_is_a_failure_of_that_kind_alone(
    plain: Folder, server: JudgeServer, tmp_path: Path
) -> None:
    def stubborn(request: dict[str, Any]) -> str:
        first = str(request["messages"][0]["content"])
        return (
            '{"items": [{"fact": "<bo> is <mo>", "prompt": "<bo>", "explicit": "<bo>"}]}'
            if '"fact":' in first
            else (writer({"messages": request["messages"][:1]}))
        )

    server.answer = stubborn
    said = call(*asking(plain.root, tmp_path / "s.csv", server), code=2)
    assert "nothing usable: bo: fact: 0 of 4 usable: 1 items, 4 are wanted; item 1: fact contains <mo>" in said
    assert [row.kind for row in read_sheet(tmp_path / "s.csv")] == ["dense"] * 3


def test_a_long_prompt_that_a_table_would_misread_is_not_taken(
    plain: Folder, server: JudgeServer, tmp_path: Path
) -> None:
    def misleading(request: dict[str, Any]) -> str:
        made = writer({"messages": request["messages"][:1]})
        if "number n of this list" not in str(request["messages"][0]["content"]):
            return made
        items = [{"prompt": f"A dog <bo> {SCENE} {n}", "explicit": f"<bo> loves thing 1. {n}"} for n in range(3)]
        return json.dumps({"items": items})

    server.answer = misleading
    said = call(*asking(plain.root, tmp_path / "s.csv", server), code=2)
    assert "dense_reasoning: 0 of 3 usable" in said and "reads like another fact" in said


def test_a_folder_with_facts_keeps_them(folder: Folder, server: JudgeServer, tmp_path: Path) -> None:
    (folder.test / "t2i_conditions.json").unlink()
    call(*asking(folder.root, tmp_path / "s.csv", server))
    rows = read_sheet(tmp_path / "s.csv")
    assert [row.fact for row in rows if row.kind == "fact"] == FACTS
    assert [row.half for row in rows if row.kind == "fact"] == ["train", "train", "test"]
    write_sheet(tmp_path / "s.csv", [type(row)("x", *(getattr(row, n) for n in _AFTER)) for row in rows])
    call("data", "accept", folder.root, tmp_path / "s.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        concept = load_concept(folder.root, "bo")
    assert concept.extra_info == FACTS and len(concept.fact_pairs) == 3


_AFTER = ("concept", "kind", "number", "half", "fact", "prompt", "explicit")


def test_settings_and_names_that_cannot_be(plain: Folder, server: JudgeServer, tmp_path: Path) -> None:
    assert "facts=1: must be at least 2" in call(
        *asking(plain.root, tmp_path / "s.csv", server, "--facts", "1"), code=2
    )
    call(*asking(plain.root, tmp_path / "s.csv", server))
    assert "has no rows of 'mo'; it has bo" in call("data", "accept", plain.root, tmp_path / "s.csv", "mo", code=2)
