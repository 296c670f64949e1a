"""The review sheet: what a person accepted goes into the folder, and nothing else does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.data.folder import load_concept
from pyunictokens.data.review_sheet import Row, apply_sheet, read_sheet, write_sheet
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.text import plain_cell, spreadsheet_cell
from tests.data.conftest import FACTS, Folder

SCENE = "on a beach at dusk with two palms left, a boat far behind and a red towel in front of it"


def rows(accept: str = "yes") -> list[Row]:
    """Four facts, two of each half, a dense prompt, a dense reasoning prompt for fact 3 and one for fact 4."""
    made = [
        Row(
            accept,
            "bo",
            "fact",
            n,
            "train" if n < 3 else "test",
            f"<bo> likes thing {n}.",
            f"<bo> with what it likes ({n}).",
            f"<bo> with thing {n}.",
        )
        for n in (1, 2, 3, 4)
    ]
    made.append(Row(accept, "bo", "dense", 1, prompt=f"<bo> {SCENE}."))
    for n in (3, 4):
        prompt = f"<bo> with what it likes ({n}), {SCENE}."
        made.append(Row(accept, "bo", "dense_reasoning", n, "", "", prompt, f"<bo> with thing {n}, {SCENE}."))
    return made


@pytest.fixture
def plain(folder: Folder) -> Folder:
    """A UnifyBench folder: no facts, prompts as a plain list."""
    folder.info(extra_info=...)
    folder.json(folder.test / "t2i_conditions.json", ["<bo> in the snow", "<bo> on a table"])
    return folder


def loaded(folder: Folder):  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_concept(folder.root, "bo")


def test_accepted_rows_make_the_folder_a_unifybench_plus_plus_one(plain: Folder, tmp_path: Path) -> None:
    write_sheet(tmp_path / "s.csv", rows())
    done = apply_sheet(plain.root, "bo", read_sheet(tmp_path / "s.csv"))
    assert done.written == {"fact": 4, "dense": 1, "dense_reasoning": 2} and done.open == 0 and not done.notes
    concept = loaded(plain)
    assert concept.extra_info == [f"<bo> likes thing {n}." for n in (1, 2, 3, 4)]
    assert [fact for _, fact in concept.fact_pairs_test] == [2, 3]
    lists = concept.generation_prompts
    assert lists["pure_generation"] == ["<bo> in the snow", "<bo> on a table"]
    assert lists["dense_generation"] == [f"<bo> {SCENE}."]
    assert len(lists["personalized_dense_generation"]) == len(lists["explicit_personalized_dense_generation"]) == 2
    before = plain.snapshot()
    again = apply_sheet(plain.root, "bo", read_sheet(tmp_path / "s.csv"))
    assert not again.written and again.there == 7 and plain.snapshot() == before


@pytest.mark.parametrize("accept", ["", "no"])
def test_nothing_is_written_without_a_yes(plain: Folder, accept: str) -> None:
    before = plain.snapshot()
    done = apply_sheet(plain.root, "bo", rows(accept))
    assert not done.written and done.open == (7 if accept == "" else 0) and plain.snapshot() == before


def test_what_was_refused_stays_out_and_takes_its_long_prompt_along(plain: Folder) -> None:
    made = rows()
    made[2] = Row("no", *[getattr(made[2], n) for n in ("concept", "kind", "number", "half", "fact", "prompt")])
    made[1] = Row("yes", "bo", "fact", 2, "test", "<bo> changed.", "<bo> with it.", "<bo> with it, changed.")
    done = apply_sheet(plain.root, "bo", made)
    concept = loaded(plain)
    assert concept.extra_info == ["<bo> likes thing 1.", "<bo> changed.", "<bo> likes thing 4."]
    assert [fact for _, fact in concept.fact_pairs_test] == [1, 2]
    assert done.written["dense_reasoning"] == 1 and "fact 3 is not among the accepted facts that test" in done.notes[0]


def test_a_folder_with_facts_gets_prompts_for_all_of_them(folder: Folder) -> None:
    (folder.test / "t2i_conditions.json").unlink()
    made = [Row("yes", "bo", "fact", n, "test", fact, f"<bo>, {n}", f"<bo>, {fact}") for n, fact in enumerate(FACTS, 1)]
    before = folder.snapshot()
    with pytest.raises(UserError, match=r"fact 2 of the folder .* has no accepted prompt"):
        apply_sheet(folder.root, "bo", [made[0], made[2]])
    with pytest.raises(UserError, match="leave it as it is"):
        apply_sheet(
            folder.root, "bo", [made[0], made[2], Row("yes", "bo", "fact", 2, "test", "<bo> x", "<bo>", "<bo>y")]
        )
    assert folder.snapshot() == before
    assert apply_sheet(folder.root, "bo", made).written == {"fact": 3}
    assert loaded(folder).fact_pairs == [(f"<bo>, {n}", n - 1) for n in (1, 2, 3)]
    with pytest.raises(UserError, match="facts are written once"):
        apply_sheet(folder.root, "bo", [Row("yes", "bo", "fact", 9, "train", "<bo> new", "<bo> p", "<bo> e")])


def test_the_authors_names_of_lists_are_kept(plain: Folder) -> None:
    plain.json(plain.test / "t2i_conditions.json", {"dense_prompt_generation": ["<bo> one"], "mine": ["<bo> kept"]})
    apply_sheet(plain.root, "bo", rows())
    lists = json.loads((plain.test / "t2i_conditions.json").read_text())
    assert lists["dense_prompt_generation"] == ["<bo> one", f"<bo> {SCENE}."] and "dense_generation" not in lists
    assert lists["mine"] == ["<bo> kept"]


def test_every_problem_is_told_at_once_and_nothing_is_changed(plain: Folder, tmp_path: Path) -> None:
    before, made = plain.snapshot(), rows()
    made[4] = Row("yes", "bo", "dense", 1, prompt="nobody on a beach")
    made[0] = Row("yes", "bo", "fact", 1, "train", "<bo> f", "", "<bo> e")
    with pytest.raises(UserError) as error:
        apply_sheet(plain.root, "bo", made)
    assert "prompt is empty" in str(error.value) and "prompt does not contain <bo>" in str(error.value)
    with pytest.raises(UserError, match="no accepted fact has half=test"):
        apply_sheet(plain.root, "bo", made[1:2])
    with pytest.raises(UserError, match="fact 2 is accepted twice"):
        apply_sheet(plain.root, "bo", [*rows(), rows()[1]])
    assert plain.snapshot() == before
    bad = "accept,concept,kind,number,half,fact,prompt,explicit\nperhaps,bo,fact,0,left,a,b,c\nyes,bo,song,1,,,,\n"
    (tmp_path / "bad.csv").write_text(bad)
    with pytest.raises(UserError) as error:
        read_sheet(tmp_path / "bad.csv")
    for said in ("line 2: accept='perhaps'", "line 2: half='left'", "line 2: number='0'", "line 3: kind='song'"):
        assert said in str(error.value)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column accept"):
        read_sheet(tmp_path / "bad.csv")


def test_a_failure_while_writing_leaves_both_files_as_they_were(plain: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyunictokens.data import review_sheet

    before, written = plain.snapshot(), review_sheet.write_json

    def fails(path: Path, value: object) -> None:
        if path.name.startswith("t2i"):
            raise OSError(28, "No space left on device")
        written(path, value)

    monkeypatch.setattr(review_sheet, "write_json", fails)
    with pytest.raises(OSError, match="No space"):
        apply_sheet(plain.root, "bo", rows())
    assert plain.snapshot() == before


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Z")), max_size=30)


@given(_TEXT, _TEXT, _TEXT)
def test_a_sheet_comes_back_as_it_went(tmp_path_factory: pytest.TempPathFactory, a: str, b: str, c: str) -> None:
    path = tmp_path_factory.mktemp("s") / "s.csv"
    row = Row("yes", "bo", "fact", 7, "test", f"={a}", f'{b}"; , {b}'.strip(), f"@{c}")
    write_sheet(path, [row])
    (found,) = read_sheet(path)
    assert (found.fact, found.prompt, found.explicit) == (row.fact, " ".join(row.prompt.split()), row.explicit)
    assert not any(cell.startswith(("=", "@", "+")) for cell in path.read_text("utf-8-sig").splitlines()[1].split(","))
    assert plain_cell(spreadsheet_cell(a)) == a or a.startswith("'")


def test_other_programs_separators_and_encodings(tmp_path: Path) -> None:
    head = "explicit;prompt;fact;half;number;kind;concept;accept;extra"
    (tmp_path / "s.csv").write_bytes(f"{head}\r\n;<bo> ü, x;;;1;dense;bo;YES;z\r\n;;;;;;;;\r\n".encode("utf-16"))
    (row,) = read_sheet(tmp_path / "s.csv")
    assert row.prompt == "<bo> ü, x" and row.accepted and row.line == 2
