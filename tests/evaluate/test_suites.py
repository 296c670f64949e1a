"""Readers of benchmark folders: what each layout asks, on tiny folders of the published shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pyunictokens.data import load_concept
from pyunictokens.data.wording import text_only_question
from pyunictokens.evaluate.suites import open_suite
from pyunictokens.evaluate.suites.dreambooth import is_live, templates
from pyunictokens.evaluate.suites.files import inline_options
from pyunictokens.evaluate.tasks import TASKS, Item, Subject
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.utils.errors import UserError


def pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.full((20, 24, 3), 10 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# --- UnifyBench++ --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_concept(tmp_path_factory.mktemp("toy"), seed=3, kind="animal", name="bo")


def test_unifybench_asks_every_task_of_the_held_out_half(toy: Path) -> None:
    concept = load_concept(toy, "bo")
    suite = open_suite(str(toy))
    assert (suite.layout, suite.names) == ("unify", ("bo",))
    subject = suite.subject("bo")
    assert {item.task for item in subject.items} == set(TASKS)
    facts = tuple(concept.extra_info)
    held_out = dict(concept.fact_pairs_test)
    rea = {item.text: item.truth for item in subject.of("reasoning")}
    assert rea == {text_only_question(facts, p): facts[r] for p, r in held_out.items()}
    drawn = subject.of("reasoning_generation")
    assert [item.text for item in drawn] == list(held_out) and all(item.facts == facts for item in drawn)
    for item in drawn + subject.of("dense_reasoning_generation"):
        assert item.truth != item.text and any(fact in item.meant for fact in facts)
    trained = {prompt for prompt, _ in concept.fact_pairs_train}
    assert not trained & {item.text for item in subject.items}
    assert not any(prompt in item.text for prompt in trained for item in subject.of("reasoning"))
    dense = subject.of("reasoning_dense")
    assert len(dense) == len(subject.of("dense_reasoning_generation")) and all(item.truth in facts for item in dense)
    assert {item.group for item in subject.of("recognition")} == {"positive", "negative"}
    assert all(not item.facts and item.meant == item.text for item in subject.of("pure"))
    assert len(subject.of("vqa")) == len({(qa.image, qa.query) for qa in concept.vqa})


def test_plain_unifybench_leaves_notes_for_the_new_fields(toy: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(toy, tmp_path / "old")
    file = tmp_path / "old" / "concept" / "test" / "bo" / "t2i_conditions.json"
    lists = json.loads(file.read_text())
    put(file, {key: value for key, value in lists.items() if key == "pure_generation"})
    subject = open_suite(str(tmp_path / "old")).subject("bo")
    assert {item.task for item in subject.items} == {"recognition", "vqa", "qa", "pure"}
    missing = {note.partition(":")[0] for note in subject.notes}
    assert missing == {"reasoning", "reasoning_dense", "dense", "reasoning_generation", "dense_reasoning_generation"}


# --- Yo'LLaVA ------------------------------------------------------------------------------------------------------


def entry(question: str, right: str = "B") -> dict[str, Any]:
    return {"question": question, "options": {"A": "Cat", "B": "Grey dog"}, "correct_answer": right}


def write_yollava(root: Path) -> Path:
    """Two concepts and a question about an image of one."""
    for name in ("bo", "mam"):
        pictures(root / "train" / name, "0.png", "1.png")
        pictures(root / "test" / name, "10.png", "9.png")
    pictures(root / "train" / "bo" / "negative_example", "n.png")
    put(root / "classes.json", {"bo": "dog"})
    visual = {"bo": {"./yollava-data/test/bo/9.png": entry("What is <sks>?")}, "mam": {}}
    put(root / "yollava-visual-qa.json", visual)
    return root


@pytest.fixture
def yollava(tmp_path: Path) -> Path:
    return write_yollava(tmp_path / "yollava-data")


def test_yollava(yollava: Path) -> None:
    put(yollava / "yollava-text-qa.json", {"bo": [entry("Is <sks> a cat?", "A")]})
    suite = open_suite(f"yollava:{yollava}")
    assert suite.names == ("bo", "mam")
    subject = suite.subject("bo")
    assert subject.class_word == "dog" and [path.name for path in subject.references] == ["0.png", "1.png"]
    rec = [
        (item.image.name, item.image.parent.name, item.truth, item.group)
        for item in subject.of("recognition")
        if item.image
    ]
    assert rec == [
        ("9.png", "bo", "yes", "positive"),
        ("10.png", "bo", "yes", "positive"),
        ("9.png", "mam", "no", "negative"),
        ("10.png", "mam", "no", "negative"),
    ]
    (vqa,) = subject.of("vqa")
    assert vqa.text == "What is <bo>? A. Cat B. Grey dog Answer with the letter of the right option."
    assert (vqa.truth, vqa.options, vqa.image) == ("Grey dog", ("Cat", "Grey dog"), yollava / "test" / "bo" / "9.png")
    (qa,) = subject.of("qa")
    assert qa.image is None and qa.truth == "Cat"
    assert [item.text for item in subject.of("pure")] == ["A photo of <bo>."]


def test_yollava_in_the_flat_shape_and_with_pictures_missing(yollava: Path) -> None:
    flat = {"./yollava-data/test/bo/9.png": entry("What?"), "./yollava-data/test/mam/9.png": entry("Who?")}
    put(yollava / "yollava-visual-qa.json", {**flat, "x/bo/77.png": entry("Gone?")})
    subject = open_suite(f"yollava:{yollava}").subject("bo")
    assert [item.text.split(" A.")[0] for item in subject.of("vqa")] == ["What?"]
    notes = " ".join(subject.notes)
    assert "77.png: no such picture" in notes and "qa: yollava-text-qa.json has no questions" in notes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"question": "x", "options": {"A": "y"}, "correct_answer": "C"}, "correct_answer is 'C': must be one of A"),
        ({"question": "x", "correct_answer": "A"}, "options must be an object"),
        ({"question": "", "options": {"A": "y"}, "correct_answer": "A"}, "must be a text, is ''"),
    ],
)
def test_yollava_names_a_bad_entry(yollava: Path, wrong: dict[str, Any], message: str) -> None:
    put(yollava / "yollava-visual-qa.json", {"bo": {"test/bo/9.png": wrong}})
    with pytest.raises(UserError, match=message):
        open_suite(f"yollava:{yollava}").subject("bo")


# --- MC-LLaVA ------------------------------------------------------------------------------------------------------


def write_mcllava(root: Path) -> Path:
    """Three persons, and questions about one."""
    for half, names in (("two_concept", ("Anna", "Ben")), ("three_concept", ("Cleo",))):
        for name in names:
            pictures(root / half / "concept" / "train" / name, "0.png", "0_mask.png", "1.png")
            pictures(root / half / "concept" / "test" / name, "0.png", "1.png")
    test = root / "two_concept" / "concept" / "test" / "Anna"
    put(test / "vqa.json", {"/data/x/Anna/0.png": {"Human": "What does <sks> wear?", "AI": "A red coat."}})
    put(test / "qa.json", [{"question": "What hair has <Anna>? A. red B. dark brown C. grey", "answer": "B"}])
    put(test / "choice.json", {})
    return root


@pytest.fixture
def mcllava(tmp_path: Path) -> Path:
    return write_mcllava(tmp_path / "mc")


def test_mcllava(mcllava: Path) -> None:
    suite = open_suite(f"mcllava:{mcllava}", ["Anna"])
    subject = suite.subject("Anna")
    assert subject.kind == "human" and [path.name for path in subject.references] == ["0.png", "1.png"]
    negatives = [item.image for item in subject.of("recognition") if item.group == "negative"]
    assert sorted({path.parent.name for path in negatives if path}) == ["Ben", "Cleo"]
    (vqa,) = subject.of("vqa")
    assert (vqa.text, vqa.truth, vqa.options) == ("What does <Anna> wear?", "A red coat.", ())
    (qa,) = subject.of("qa")
    assert qa.options == ("red", "dark brown", "grey") and qa.truth == "dark brown" and qa.image is None
    assert any("vqa: vqa.json asks nothing" in note for note in suite.subject("Ben").notes)


def test_mcllava_names_a_letter_without_an_option(mcllava: Path) -> None:
    file = mcllava / "two_concept" / "concept" / "test" / "Anna" / "qa.json"
    put(file, [{"question": "What? A. red B. brown", "answer": "D"}])
    with pytest.raises(UserError, match=r"qa.json\[0\]: answer 'D': must be one of A, B"):
        open_suite(f"mcllava:{mcllava}").subject("Anna")


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Who? A. red B. dark brown C. grey", ["red", "dark brown", "grey"]),
        ("Who?\nA) red\nB) blue", ["red", "blue"]),
        ("Who? (A) red (B) blue", ["red", "blue"]),
        ("Is vitamin B. good?", []),
        ("Plan A. is it?", []),
    ],
)
def test_options_inside_a_question(question: str, options: list[str]) -> None:
    assert inline_options(question) == options


# --- DreamBench ----------------------------------------------------------------------------------------------------


def write_dreambench(root: Path) -> Path:
    """Three subjects and their class words."""
    for name in ("dog6", "berry_bowl", "grey_plushie"):
        pictures(root / "dataset" / name, "00.jpg", "01.jpg")
    lines = "Classes\n\nsubject_name,class\nberry_bowl,bowl\ngrey_plushie,stuffed animal\n\nPrompts\n\nnot,this\n"
    (root / "dataset" / "prompts_and_classes.txt").write_text(lines)
    return root


def test_dreambench(tmp_path: Path) -> None:
    write_dreambench(tmp_path)
    suite = open_suite(f"dreambench:{tmp_path}")
    dog, bowl, toy = (suite.subject(name) for name in ("dog6", "berry_bowl", "grey_plushie"))
    assert (dog.class_word, bowl.class_word, toy.class_word) == ("dog", "bowl", "stuffed animal")
    assert (dog.kind, bowl.kind, toy.kind) == ("animal", "object", "object")
    for subject in (dog, bowl, toy):
        assert len(subject.of("pure")) == 25 and all(subject.sks in item.text for item in subject.items)
        assert len(subject.references) == 2
    assert {item.text for item in dog.items} != {item.text.replace("berry_bowl", "dog6") for item in bowl.items}
    put(tmp_path / "dataset" / "prompts.json", {"object": ["a {} in space"], "live": ["{} asleep"]})
    assert [item.text for item in suite.subject("dog6").items] == ["<dog6> asleep"]
    put(tmp_path / "dataset" / "prompts.json", {"object": []})
    with pytest.raises(UserError, match="needs the lists object and live"):
        suite.subject("dog6")


def test_templates_by_class() -> None:
    for word in ("dog", "shiba dog", "backpack"):
        assert len(set(templates(word))) == 25 and all(text.count("{}") == 1 for text in templates(word))
    assert is_live("Dog") and is_live("shiba dog") and not is_live("dog bowl") and not is_live("stuffed animal")
    assert set(templates("dog")) & set(templates("mug"))


# --- the door ------------------------------------------------------------------------------------------------------


def test_what_is_no_suite(tmp_path: Path, toy: Path) -> None:
    for given, names, message in (
        (f"yolava:{tmp_path}", (), "unknown layout 'yolava': must be one of unify"),
        (str(tmp_path / "none"), (), "no such folder"),
        (str(toy), ("mimi",), "no concept 'mimi'; there are bo"),
        (f"yollava:{tmp_path}", (), "holds no train/ and test/"),
        (f"mcllava:{tmp_path}", (), "holds neither"),
        (f"dreambench:{tmp_path}", (), "no folder of photos"),
    ):
        with pytest.raises(UserError, match=message):
            open_suite(given, names)


def test_items_are_told_apart_by_what_they_ask() -> None:
    first = Item("vqa", "q", "a", Path("here/bo/0.png"))
    assert first.digest == Item("vqa", "q", "a", Path("there/bo/0.png")).digest
    others = [Item("qa", "q", "a"), Item("vqa", "q", "b", Path("0.png")), Item("vqa", "q", "a", Path("here/mam/0.png"))]
    assert len({item.digest for item in [first, *others]}) == 4
    subject = Subject("bo", "dog", items=[first, others[0], others[1]])
    assert subject.of("vqa") == [first, others[1]]
    with pytest.raises(UserError, match="task='draw'"):
        Item("draw", "x")


# --- shapes that people have ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        ([{"image": "x/0.png", "Human": "Is it red?", "AI": "Yes."}], 1),
        ({"x/0.png": None}, 0),
        (None, 0),
        ([], 0),
    ],
)
def test_mcllava_questions_as_a_list_or_none(mcllava: Path, content: Any, asked: int) -> None:
    put(mcllava / "two_concept/concept/test/Anna/vqa.json", content)
    assert len(open_suite(f"mcllava:{mcllava}").subject("Anna").of("vqa")) == asked


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vqa.json", ["0.png"], r"vqa\.json\[0\]: must be an object \{image, question\}, is text '0\.png'"),
        ("vqa.json", {"0.png": ["Is it red?"]}, r"0\.png: must be an object \{Human, AI\}, is text 'Is it red\?'"),
        ("vqa.json", {"0.png": 3}, r"vqa\.json: 0\.png: must be a list of questions, is a number 3"),
        ("qa.json", ["Who?"], r"qa\.json\[0\]: must be an object \{question, answer\}, is text 'Who\?'"),
        ("qa.json", "Who?", r"qa\.json: must be a list of questions, is text 'Who\?'"),
    ],
)
def test_mcllava_names_what_is_no_question(mcllava: Path, file: str, content: Any, message: str) -> None:
    put(mcllava / "two_concept/concept/test/Anna" / file, content)
    with pytest.raises(UserError, match=message):
        open_suite(f"mcllava:{mcllava}").subject("Anna")


def test_the_case_of_a_listing_does_not_matter(yollava: Path) -> None:
    (yollava / "yollava-visual-qa.json").rename(yollava / "Yollava-Visual-QA.JSON")
    with pytest.warns(UserWarning, match=r"yollava-visual-qa\.json is spelled Yollava-Visual-QA\.JSON on disk"):
        assert len(open_suite(f"yollava:{yollava}").subject("bo").of("vqa")) == 1


def test_yollava_entries_as_a_list_or_none(yollava: Path) -> None:
    question = {"question": "Is <sks> red?", "options": {"A": "yes", "B": "no"}, "correct_answer": "A"}
    put(yollava / "yollava-visual-qa.json", {"bo": [{"image": "x/9.png", **question}], "mug": None})
    put(yollava / "yollava-text-qa.json", {"bo": None})
    put(yollava / "classes.json", {"bo": None})
    subject = open_suite(f"yollava:{yollava}").subject("bo")
    assert [item.truth for item in subject.of("vqa")] == ["yes"] and not subject.of("qa")
    assert subject.class_word == "subject"
    for content in ({"bo": ["x"]}, {"bo": {"9.png": "x"}}, {"bo": 3}, ["x"]):
        put(yollava / "yollava-visual-qa.json", content)
        with pytest.raises(UserError, match=r"yollava-visual-qa\.json.* must be an? "):
            open_suite(f"yollava:{yollava}").subject("bo")


@pytest.mark.parametrize("layout", ["yollava", "unify"])
def test_one_folder_that_cannot_be_a_concept_does_not_stop_a_suite(
    request: pytest.FixtureRequest, toy: Path, layout: str, tmp_path: Path
) -> None:
    root = request.getfixturevalue("yollava") if layout == "yollava" else write_toy_concept(tmp_path, seed=3)
    home = root / "train" if layout == "yollava" else root / "concept" / "train"
    before = open_suite(f"{layout}:{root}").names
    pictures(home / "sks", "0.png")
    pictures(home / "@eaDir", "0.png")
    with pytest.warns(UserWarning, match="'sks'.*left out"):
        assert open_suite(f"{layout}:{root}").names == before
