"""Reading concept folders: the published layout, what differs in the wild, and every way a folder can be wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.data import concept_name, list_concepts, load_concept, read_concept
from pyunictokens.data.concept import Concept
from pyunictokens.data.image_files import natural_key
from pyunictokens.data.parse import Problem
from pyunictokens.data.reader import images_for_key
from pyunictokens.utils.errors import UserError


def problems_of(folder, severity: str | None = None) -> list[Problem]:
    _, problems = read_concept(folder.root, "bo")
    return [problem for problem in problems if severity in (None, problem.severity)]


def only(folder, severity: str) -> Problem:
    (problem,) = problems_of(folder)
    assert problem.severity == severity
    return problem


def test_the_published_layout(folder):
    before = folder.snapshot()
    concept = load_concept(folder.root, "bo")
    assert (concept.name, concept.kind, concept.class_word, concept.sks) == ("bo", "animal", "dog", "<bo>")
    assert concept.info == "<bo> is a small dog."
    assert [path.name for path in concept.train_images] == ["0.png", "1.png", "2.png"]
    assert [path.name for path in concept.test_images] == ["0.png", "1.png"]
    assert [(qa.image, qa.query, qa.answer) for qa in concept.conversations] == [
        (folder.train / f"{index}.png", "What is <bo>?", "<bo> is a dog.") for index in range(3)
    ]
    assert [(qa.image, qa.answer) for qa in concept.text_only] == [(None, "A red ball.")]
    assert [(item.image, item.answer, item.positive) for item in concept.recognitions] == [
        (folder.train / "0.png", "Yes.", True),
        (folder.train / "negative_example" / "0.png", "No.", False),
    ]
    assert concept.fact_pairs_train == [("<bo> with its toy", 0), ("<bo> asleep in its bed", 1)]
    assert concept.fact_pairs_test == [("<bo> hiding from what it fears", 2)]
    assert [qa.image for qa in concept.vqa] == concept.test_images
    assert [qa.query for qa in concept.test_text_only] == ["What is <bo>'s favourite toy?"]
    assert len(concept.negatives) == 3
    assert problems_of(folder) == []
    assert folder.snapshot() == before


def test_without_train_images_json_the_files_on_disk_are_used_in_natural_order(folder):
    (folder.root / "concept" / "train" / "train_images.json").unlink()
    for name in ("10.jpg", "9.jpeg", "3.webp", "3_mask.png", ".hidden.png"):
        folder.image(folder.train / name)
    names = [path.name for path in load_concept(folder.root, "bo").train_images]
    assert names == ["0.png", "1.png", "2.png", "3.webp", "9.jpeg", "10.jpg"]


def test_a_listed_file_with_another_ending_is_found_with_a_warning(folder):
    (folder.train / "1.png").rename(folder.train / "1.jpg")
    assert [path.name for path in load_concept(folder.root, "bo").train_images] == ["0.png", "1.jpg", "2.png"]
    assert "1.jpg is used" in only(folder, "warning").message


@pytest.mark.parametrize(
    ("key", "names", "expected"),
    [
        ("0", ["10.png", "0.png"], ["0.png"]),
        ("0.png", ["0.png", "0.jpg"], ["0.png"]),
        ("1", ["bo_1.png", "bo_11.png"], ["bo_1.png"]),
        ("bo", ["bo1.png", "bo2.png", "cat.png"], ["bo1.png", "bo2.png"]),
        ("arden", ["Garden.png", "beach.png"], ["Garden.png"]),
        ("7", ["0.png"], []),
    ],
)
def test_conversation_keys_are_parts_of_file_names(key, names, expected):
    assert [path.name for path in images_for_key(key, [Path(name) for name in names])] == expected


def test_the_shapes_of_questions_found_in_the_wild(folder):
    chat = [
        {"from": "human", "value": "<image>\nWho is it?"},
        {"from": "gpt", "value": "It is <sks>."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    shapes = [
        {"question": "A < Bo > question?", "answer": "yes", "level": 3},
        {"conversations": chat, "id": 7},
        {"conversations": [{"role": "user", "content": "hm?"}, {"role": "assistant", "content": "aha"}]},
        {"image": "1.png", "query": "named?", "response": "picture one"},
    ]
    folder.json(folder.train / "conversations.json", {"0": shapes})
    found = load_concept(folder.root, "bo").conversations
    assert [(qa.image.name, qa.query, qa.answer) for qa in found] == [
        ("0.png", "A <bo> question?", "yes"),
        ("0.png", "Who is it?", "It is <bo>."),
        ("0.png", "Sure?", "Yes."),
        ("0.png", "hm?", "aha"),
        ("1.png", "named?", "picture one"),
    ]
    assert [qa.extra for qa in found[:2]] == [{"level": 3}, {"id": 7}]


def test_recognitions_as_chats_templates_and_foreign_paths(folder):
    chat = [{"from": "human", "value": "<image>\nIs it <bo>?"}, {"from": "gpt", "value": "No."}]
    negatives = [{"image": "/data/maker/unictokens_data/random_images/0.png", "conversations": chat}]
    folder.json(folder.train / "random_recognitions.json", negatives)
    templates = [{"query": "Is it <bo>?", "answer": "Yes."}, {"query": "<bo> here?", "answer": "Yes, it is."}]
    folder.json(folder.train / "positive_recognitions.json", templates)
    concept = load_concept(folder.root, "bo")
    assert [(item.image.name, item.query) for item in concept.recognitions if item.positive] == [
        ("0.png", "Is it <bo>?"),
        ("1.png", "<bo> here?"),
        ("2.png", "Is it <bo>?"),
    ]
    (negative,) = [item for item in concept.recognitions if not item.positive]
    assert negative.image == folder.root / "random_images" / "0.png"
    assert "absolute path" in only(folder, "warning").message


def test_prompt_names_of_unifybench(folder):
    folder.prompts(
        ["<bo> a", "<bo> b", "<bo> c"], dense_prompt_generation=["<sks> dense"], pure_generation=["⟨bo⟩ pure"]
    )
    prompts = load_concept(folder.root, "bo").generation_prompts
    assert prompts["dense_generation"] == ["<bo> dense"]
    assert prompts["pure_generation"] == ["<bo> pure"]
    assert prompts["personalized_driven_generation"] == ["<bo> a", "<bo> b", "<bo> c"]


def test_num_testing_info_says_how_many_pairs_test(folder):
    folder.info(num_testing_info=2, generation_type="live_subject")
    concept = load_concept(folder.root, "bo")
    assert [fact for _, fact in concept.fact_pairs_test] == [1, 2]
    assert concept.extra == {"num_testing_info": 2, "generation_type": "live_subject"}


def test_a_missing_test_half_is_a_warning_and_prompts_may_lie_in_the_train_half(folder):
    (folder.test / "t2i_conditions.json").rename(folder.train / "t2i_conditions.json")
    shutil.rmtree(folder.test)
    concept = load_concept(folder.root, "bo")
    assert len(concept.fact_pairs) == 3
    assert concept.test_images == []
    assert "no test half" in only(folder, "warning").message


def test_facts_named_by_their_answer(folder):
    folder.prompts([{"prompt": "<bo> asleep", "answer": "<bo>'s bed is a BLUE basket"}])
    assert load_concept(folder.root, "bo").fact_pairs == [("<bo> asleep", 1)]


def test_an_answer_that_matches_no_extra_info(folder):
    folder.prompts([{"prompt": "<bo> asleep", "answer": "<bo>'s bed is a green box."}])
    problem = only(folder, "error")
    assert problem.field == "personalized_driven_generation[0].answer"
    assert "green box" in problem.message and "none of the 3 items of extra_info" in problem.message
    with pytest.raises(UserError, match="matches none of the 3 items"):
        load_concept(folder.root, "bo")


def test_a_text_only_answer_that_no_fact_says_is_a_warning(folder):
    wrong = {"query": "Where does <bo> live?", "answer": "In Paris, France."}
    folder.json(folder.train / "conversations.json", {"0": [wrong], "text_only": [wrong]})
    problem = only(folder, "warning")
    assert problem.field == "text_only[0].answer" and "Paris" in problem.message


def test_all_problems_of_a_folder_at_once(folder):
    folder.info(**{"class": " ", "conversation_type": "robot"})
    folder.json(folder.train / "conversations.json", '{"0": [\n  {"query": "a" "answer": "b"}]}')
    folder.json(folder.root / "concept" / "train" / "train_images.json", {"bo": ["0.png", "9.png"]})
    with pytest.raises(UserError) as caught:
        load_concept(folder.root, "bo")
    text = str(caught.value)
    assert "4 problems" in text
    assert "concept/train/bo/info.json: class: is empty" in text
    assert "conversation_type: is 'robot': must be one of human, animal, object" in text
    assert "conversations.json: not valid JSON at line 2, column 17" in text
    assert "train_images.json: bo[1]: '9.png': no such image" in text


@pytest.mark.parametrize(
    ("change", "file", "field", "words"),
    [
        (lambda f: f.info(**{"class": ...}), "info.json", "class", "is missing"),
        (lambda f: f.info(**{"class": 3}), "info.json", "class", "must be text, is a number 3"),
        (lambda f: f.info(conversation_type=...), "info.json", "conversation_type", "is missing: must be one of"),
        (lambda f: f.info(extra_info={"a": 1}), "info.json", "extra_info", "must be a list of texts, is an object"),
        (lambda f: f.info(extra_info=["x", 2, "y"]), "info.json", "extra_info[1]", "must be text, is a number 2"),
        (lambda f: f.json(f.train / "info.json", [1]), "info.json", "", "must be an object, is a list"),
        (lambda f: f.json(f.train / "info.json", "null"), "info.json", "", "holds null"),
        (lambda f: (f.train / "info.json").unlink(), "info.json", "", "no such file"),
        (lambda f: (f.train / "info.json").write_bytes(b"\xff\xfe{"), "info.json", "", "not UTF-16"),
        (lambda f: f.json(f.train / "info.json", "[" * 100_000), "info.json", "", "nested too deeply"),
        (lambda f: f.json(f.train / "info.json", "9" * 5000), "info.json", "", "not usable JSON"),
        (lambda f: f.json(f.train / "info.json", '{"class": "\\ud800"}'), "info.json", "class", "lone surrogate"),
        (lambda f: f.json(f.train / "conversations.json", {"0": "hi"}), "conversations.json", "0", "must be a list"),
        (
            lambda f: f.json(f.train / "conversations.json", {"0": [{"query": "a"}]}),
            "conversations.json",
            "0[0]",
            "has no answer or response: it holds ['query']",
        ),
        (
            lambda f: f.json(f.train / "conversations.json", {"0": [{"query": "a", "answer": 4}]}),
            "conversations.json",
            "0[0].answer",
            "must be text, is a number 4",
        ),
        (
            lambda f: f.json(
                f.train / "conversations.json", {"0": [{"conversations": [{"from": "gpt", "value": "x"}]}]}
            ),
            "conversations.json",
            "0[0].conversations[0]",
            "must take turns",
        ),
        (
            lambda f: f.prompts(["<bo> a"]),
            "t2i_conditions.json",
            "personalized_driven_generation",
            "1 prompts for 3 items",
        ),
        (
            lambda f: f.prompts(["<bo> a", 2, "<bo> c"]),
            "t2i_conditions.json",
            "personalized_driven_generation[1]",
            "number",
        ),
    ],
)
def test_errors_name_file_and_field(folder, change, file, field, words):
    change(folder)
    errors = problems_of(folder, "error")
    assert any(
        problem.file.endswith(file) and problem.field == field and words in problem.message for problem in errors
    ), errors
    with pytest.raises(UserError):
        load_concept(folder.root, "bo")


@pytest.mark.parametrize(
    ("change", "file", "field", "words"),
    [
        (lambda f: f.info(info=...), "info.json", "info", "is missing"),
        (lambda f: (f.info(extra_info=[]), f.prompts([])), "info.json", "extra_info", "holds no facts"),
        (
            lambda f: f.json(f.train / "conversations.json", {"0": [{"query": "a", "answer": " "}]}),
            "conversations.json",
            "0[0].answer",
            "is empty: left out",
        ),
        (
            lambda f: f.json(f.train / "conversations.json", {"77": [{"query": "a", "answer": "b"}]}),
            "conversations.json",
            "77",
            "matches no image (0.png, 1.png, 2.png): its 1 questions are left out",
        ),
        (lambda f: (f.train / "conversations.json").unlink(), "conversations.json", "", "no such file"),
        (
            lambda f: (f.train / "positive_recognitions.json").unlink(),
            "positive_recognitions.json",
            "",
            "yes-questions",
        ),
        (lambda f: (f.train / "random_recognitions.json").unlink(), "random_recognitions.json", "", "no-questions"),
        (lambda f: (f.test / "t2i_conditions.json").unlink(), "t2i_conditions.json", "", "no text-only reasoning"),
        (lambda f: f.json(f.test / "t2i_conditions.json", ["<bo> x"]), "t2i_conditions.json", "", "is a plain list"),
        (
            lambda f: f.prompts(["<bo> a", "a dog", "<bo> c"]),
            "t2i_conditions.json",
            "personalized_driven_generation[1]",
            "'a dog' does not contain <bo>",
        ),
        (
            lambda f: f.info(extra_info=["A ball.", "a  BALL", "c"]),
            "info.json",
            "extra_info[1]",
            "repeats item 0",
        ),
        (
            lambda f: f.json(f.root / "concept" / "train" / "train_images.json", {}),
            "train_images.json",
            "bo",
            "is not listed: the images in its folder are used",
        ),
    ],
)
def test_warnings_name_file_and_field_and_the_folder_still_loads(folder, change, file, field, words):
    change(folder)
    warnings = problems_of(folder, "warning")
    assert any(
        problem.file.endswith(file) and problem.field == field and words in problem.message for problem in warnings
    ), warnings
    assert len(load_concept(folder.root, "bo").train_images) == 3


def test_no_negatives_anywhere_is_a_warning(folder):
    for gone in (folder.train / "negative_example", folder.root / "random_images"):
        shutil.rmtree(gone)
    folder.json(folder.train / "random_recognitions.json", [])
    assert "no negative examples" in only(folder, "warning").message


def test_no_training_images(folder):
    for path in folder.train.glob("*.png"):
        path.unlink()
    folder.json(folder.root / "concept" / "train" / "train_images.json", {"bo": []})
    folder.json(folder.train / "positive_recognitions.json", [])
    folder.json(folder.train / "conversations.json", {})
    problem = only(folder, "error")
    assert problem.file == "concept/train/bo"
    assert problem.message.startswith("no training images: put a few images")


@pytest.mark.parametrize(
    "name", ["../../secret.png", "..\\secret.png", "/etc/passwd", "C:\\secret.png", "a/../../b.png"]
)
def test_train_images_that_leave_the_folder(folder, name):
    folder.image(folder.root / "secret.png")
    folder.json(folder.root / "concept" / "train" / "train_images.json", {"bo": ["0.png", name]})
    (problem,) = problems_of(folder, "error")
    assert problem.field == "bo[1]"
    assert "leaves the data folder" in problem.message or "absolute path" in problem.message
    assert [path.name for path in read_concept(folder.root, "bo")[0].train_images] == ["0.png"]


def test_symlinks_that_leave_the_folder(folder, tmp_path):
    folder.image(tmp_path / "outside.png")
    (folder.train / "1.png").unlink()
    (folder.train / "1.png").symlink_to(tmp_path / "outside.png")
    (folder.test / "5.png").symlink_to(tmp_path / "outside.png")
    found = {(problem.file, problem.severity) for problem in problems_of(folder)}
    assert ("concept/train/train_images.json", "error") in found
    assert ("concept/test/bo/5.png", "error") in found
    concept, _ = read_concept(folder.root, "bo")
    assert [path.name for path in concept.train_images] == ["0.png", "2.png"]
    assert [path.name for path in concept.test_images] == ["0.png", "1.png"]


def test_a_concept_folder_that_is_itself_a_link_out(folder, tmp_path):
    folder.train.rename(tmp_path / "elsewhere")
    folder.train.symlink_to(tmp_path / "elsewhere")
    assert "leads out of the data folder" in only(folder, "error").message


def test_links_into_the_blobs_of_a_hub_cache_are_fine(tmp_path, folder):
    snapshot = tmp_path / "datasets--x" / "snapshots" / "abc"
    blobs = tmp_path / "datasets--x" / "blobs"
    shutil.copytree(folder.root, snapshot)
    blobs.mkdir()
    path = snapshot / "concept" / "train" / "bo" / "1.png"
    path.rename(blobs / "d1")
    path.symlink_to(blobs / "d1")
    assert len(load_concept(snapshot, "bo").train_images) == 3


@pytest.mark.parametrize(
    "name", ["../bo", "a/b", "", ".", "..", "-x", "a<b", "<bo>", "x" * 65, "a\0b", "sks", "token_3"]
)
def test_names_that_cannot_name_a_concept(folder, name):
    with pytest.raises(UserError, match="name"):
        load_concept(folder.root, name)
    with pytest.raises(UserError):
        concept_name(name)


def test_names_of_any_script_are_fine():
    assert [concept_name(name) for name in ("bo", "Mrs Möller", "小白")] == ["bo", "Mrs Möller", "小白"]


def test_where_the_data_folder_is_not(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder: give the data folder"):
        load_concept(tmp_path / "nowhere", "bo")
    with pytest.raises(UserError, match=f"give {folder.root} instead"):
        list_concepts(folder.train)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no concept/train/"):
        list_concepts(tmp_path / "empty")
    with pytest.raises(UserError, match="concepts there: bo"):
        load_concept(folder.root, "mimi")


def test_list_concepts_in_natural_order(folder):
    for name in ("dog10", "dog9", ".cache"):
        (folder.root / "concept" / "train" / name).mkdir()
    assert list_concepts(folder.root) == ["bo", "dog9", "dog10"]


@given(st.lists(st.text(max_size=8), max_size=6))
def test_natural_order_is_an_order(names):
    once = sorted(names, key=natural_key)
    assert sorted(once, key=natural_key) == once


def test_a_concept_in_words_for_readers_without_its_token():
    concept = Concept("bo", Path(), class_word="cat", info="<bo> is a striped  pink cat. It purrs.")
    assert concept.in_words() == concept.in_words("class") == "cat"
    assert concept.in_words("info") == "a striped pink cat"
    for info in ("", "A cat that <bo> is like.", "<bob> is a dog", "<bo> likes fish."):
        assert replace(concept, info=info).in_words("info") == "cat"
    with pytest.raises(UserError, match="judged_as='name': must be class or info"):
        concept.in_words("name")
