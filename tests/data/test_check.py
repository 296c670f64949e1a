"""`check_folder`: the images are decoded, the files all concepts share are looked at, everything is found at once."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyunictokens.data import Problem, check_folder, render_problems
from pyunictokens.utils.errors import UserError


def found(folder, name="bo") -> list[tuple[str, str]]:
    return [(problem.file, problem.severity) for problem in check_folder(folder.root, name)]


def test_a_correct_folder_has_no_problems_and_is_left_alone(folder):
    before = folder.snapshot()
    assert check_folder(folder.root) == []
    assert check_folder(folder.root, "bo") == []
    assert folder.snapshot() == before


@pytest.mark.parametrize(
    "place",
    [
        "concept/train/bo/1.png",
        "concept/test/bo/0.png",
        "concept/train/bo/negative_example/1.png",
        "random_images/0.png",
        "black_512x512.png",
    ],
)
def test_a_corrupt_picture_is_found_wherever_it_lies(folder, place):
    path = folder.root / place
    path.write_bytes(path.read_bytes()[:200])
    (problem,) = check_folder(folder.root)
    assert (problem.file, problem.severity) == (place, "error")
    assert "damaged or cut off" in problem.message and str(folder.root) not in problem.message


def test_missing_pictures(folder):
    (folder.train / "1.png").unlink()
    problems = check_folder(folder.root)
    assert [(problem.file, problem.field, problem.severity) for problem in problems] == [
        ("concept/train/train_images.json", "bo[1]", "error"),
        ("concept/train/bo/conversations.json", "1", "warning"),
    ]


def test_tiny_and_small_pictures(folder):
    folder.image(folder.train / "0.png", size=(200, 15))
    folder.image(folder.train / "1.png", size=(63, 200))
    problems = check_folder(folder.root)
    assert [(problem.file, problem.severity) for problem in problems] == [
        ("concept/train/bo/0.png", "error"),
        ("concept/train/bo/1.png", "warning"),
    ]
    assert "200×15 pixels: the shorter side must have 16" in problems[0].message


def test_a_test_picture_that_was_trained_on(folder):
    shutil.copy(folder.train / "2.png", folder.test / "7.png")
    (problem,) = check_folder(folder.root)
    assert (problem.file, problem.severity) == ("concept/test/bo/7.png", "warning")
    assert "same file as the training image 2.png" in problem.message


def test_everything_at_once_errors_first(folder):
    folder.info(**{"conversation_type": "plant", "info": ...})
    (folder.train / "0.png").write_bytes(b"no image")
    folder.json(folder.test / "vqa.json", "{,}")
    problems = check_folder(folder.root)
    assert [problem.severity for problem in problems] == ["error"] * 3 + ["warning"]
    assert {problem.file.rpartition("/")[2] for problem in problems} == {"info.json", "0.png", "vqa.json"}
    vqa = next(problem for problem in problems if problem.file.endswith("vqa.json"))
    assert "line 1, column 2" in vqa.message


def test_all_concepts_are_checked_and_named_to_progress(folder):
    shutil.copytree(folder.train, folder.root / "concept" / "train" / "mimi")
    (folder.root / "concept" / "train" / "-bad").mkdir()
    seen: list[str] = []
    problems = check_folder(folder.root, progress=seen.append)
    assert seen == ["-bad", "bo", "mimi"]
    texts = {(problem.file, problem.message[:12]) for problem in problems}
    assert ("concept/train/-bad", "concept name") in texts
    assert ("concept/test/mimi", "no test half") in texts
    assert ("concepts_list.json", "does not lis") in texts


def test_the_shared_files(folder):
    folder.json(folder.root / "concepts_list.json", ["bo", "gone", "../up"])
    folder.json(
        folder.root / "concept" / "train" / "train_images.json", {"bo": ["0.png", "1.png", "2.png"], "lost": []}
    )
    (folder.root / "black_512x512.png").unlink()
    shown = {(problem.file, problem.severity): problem.message for problem in check_folder(folder.root)}
    assert "'../up'" in shown["concepts_list.json", "error"]
    assert "lists gone" in shown["concepts_list.json", "warning"]
    assert "lists lost" in shown["concept/train/train_images.json", "warning"]
    assert ("black_512x512.png", "warning") in shown
    folder.json(folder.root / "concepts_list.json", 7)
    assert ("concepts_list.json", "error") in found(folder, None)


def test_missing_shared_files_are_warnings(folder):
    (folder.root / "concepts_list.json").unlink()
    (folder.root / "concept" / "train" / "train_images.json").unlink()
    assert found(folder, None) == [("concepts_list.json", "warning"), ("concept/train/train_images.json", "warning")]


def test_a_symlink_to_the_outside_is_not_followed(folder, tmp_path):
    folder.image(tmp_path / "outside.png")
    for place in (folder.root / "random_images" / "9.png", folder.train / "negative_example" / "9.png"):
        place.symlink_to(tmp_path / "outside.png")
    problems = [(problem.file, problem.severity) for problem in check_folder(folder.root)]
    assert sorted(problems) == [
        ("concept/train/bo/negative_example/9.png", "error"),
        ("random_images/9.png", "error"),
    ]


def test_what_is_not_there_is_a_user_error(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        check_folder(tmp_path / "none")
    with pytest.raises(UserError, match="concepts there: bo"):
        check_folder(folder.root, "mimi")
    with pytest.raises(UserError, match="concept name"):
        check_folder(folder.root, "../bo")
    shutil.rmtree(folder.train)
    (folder.root / "concept" / "train" / "train_images.json").unlink()
    assert "holds no concept" in "".join(problem.message for problem in check_folder(folder.root))


def test_rendering():
    assert render_problems([], "data") == "data: no problems found"
    problems = [Problem("a.json", "class", "is empty"), Problem("b.png", "", "is small", "warning")]
    assert render_problems(problems).splitlines() == [
        "error    a.json: class: is empty",
        "warning  b.png: is small",
        "1 error(s), 1 warning(s)",
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        st.none() | st.integers() | st.text(max_size=9), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_shared_listing_breaks_the_check(folder, value):
    for path in (folder.root / "concepts_list.json", folder.root / "concept" / "train" / "train_images.json"):
        kept = path.read_bytes()
        path.write_text(json.dumps(value), encoding="utf-8")
        try:
            render_problems(check_folder(folder.root)).encode("utf-8")
        finally:
            path.write_bytes(kept)
