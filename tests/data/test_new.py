"""`new_concept`: a complete folder from ordinary photos, all or nothing, whatever goes wrong on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyunictokens.data import (
    check_folder,
    facts_template,
    install,
    load_concept,
    new,
    new_concept,
    text_only_items,
)
from pyunictokens.data.new import drawn_negatives
from pyunictokens.utils.errors import UserError

SHEET = """\
info: <bo> is a small brown dog.
facts:
  - {fact: "<bo>'s toy is a red ball.", prompt: "<bo> with its toy", explicit: "<bo> with a red ball"}
  - fact: <bo>'s bed is a blue basket.
    prompt: <sks> asleep
    question: Where does <bo> sleep?
    answer: In a basket.
  - {fact: "<bo> fears cats.", prompt: "<bo> hiding"}
questions:
  - question: What colour is <bo>?
    answer: Brown.
  - {question: "What is <bo>?", answer: A good dog.}
photos:
  IMG_2.jpg:
    - {question: "Is it wet?", answer: yes}
  IMG_12.jpg:
    - {question: "Is it dry?", answer: No}
text_only:
  - {question: "Is <bo> old?", answer: 007}
prompts:
  pure: [<bo> in a wood]
  reasoning_dense:
    - {prompt: "<bo> with its toy at home", explicit: "<bo> with a red ball at home"}
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in (1, 2, 3, 10, 11, 12):
        image = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
        image = image.resize((1200, 900)) if number == 2 else image
        image.save(folder / f"IMG_{number}.jpg", quality=60)
    return folder


def make(root: Path, photos, name="bo", **changes):
    options = {"kind": "animal", "class_word": "dog", **changes}
    return new_concept(root, name, photos, **options)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def test_photos_alone_make_a_folder_that_loads_and_checks(tmp_path, photos):
    root = tmp_path / "data"
    result = make(root, photos)
    problems = check_folder(root)
    assert [problem.severity for problem in problems] == ["warning"]  # no facts, so no text-only reasoning
    assert "holds no facts" in problems[0].message
    concept = result.concept
    assert (concept.kind, concept.class_word, concept.info) == ("animal", "dog", "<bo> is a dog.")
    assert [path.name for path in concept.train_images] == ["0.png", "1.png", "2.png", "3.png"]
    assert [path.name for path in concept.test_images] == ["0.png", "1.png"]
    assert {qa.image for qa in concept.conversations} == set(concept.train_images)
    assert {qa.image for qa in concept.vqa} == set(concept.test_images)
    assert concept.text_only and concept.test_text_only
    assert {qa.query for qa in concept.text_only}.isdisjoint(qa.query for qa in concept.test_text_only)
    yes = [item for item in concept.recognitions if item.positive]
    no = [item for item in concept.recognitions if not item.positive]
    assert {item.image for item in yes} == set(concept.train_images) and all(i.answer.startswith("Yes") for i in yes)
    assert {item.image.parent.name for item in no} == {"negative_example"} and all(
        i.answer.startswith("No") for i in no
    )
    assert result.negatives == "generated" and any("12 simple patterns" in note for note in result.notes)
    assert sorted(path.name for path in root.iterdir()) == [
        "black_512x512.png",
        "concept",
        "concepts_list.json",
        "random_images",
    ]


def test_pictures_are_re_encoded_small_and_in_natural_order(tmp_path, photos):
    concept = make(tmp_path / "data", photos).concept
    expected = Image.open(photos / "IMG_2.jpg").convert("RGB").resize((853, 640), Image.Resampling.BICUBIC)
    with Image.open(concept.train_images[1]) as image:
        assert (image.format, image.size) == ("PNG", (853, 640))
        difference = np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(difference).mean() < 1


def test_the_sheet_goes_where_it_belongs(tmp_path, photos):
    (tmp_path / "bo.yaml").write_text(SHEET, encoding="utf-8")
    concept = make(tmp_path / "data", photos, spec_yaml=tmp_path / "bo.yaml").concept
    problems = check_folder(tmp_path / "data")
    assert {problem.severity for problem in problems} == {"warning"}
    assert all(
        "no fact contains the answer '007'" in problem.message or "<bo> is neither in the question" in problem.message
        for problem in problems
    )
    assert concept.info == "<bo> is a small brown dog."
    assert concept.extra_info == ["<bo>'s toy is a red ball.", "<bo>'s bed is a blue basket.", "<bo> fears cats."]
    assert [(item.prompt, item.answer) for item in text_only_items(concept)] == [
        ("<bo> with its toy", "<bo>'s toy is a red ball."),
        ("<bo> asleep", "<bo>'s bed is a blue basket."),
    ]
    assert [item.prompt for item in text_only_items(concept, "test")] == ["<bo> hiding"]
    asked = {(qa.image.name, qa.query): qa.answer for qa in concept.conversations}
    assert asked["1.png", "Is it wet?"] == "yes"
    assert ("0.png", "Is it wet?") not in asked
    assert {answer for (_, query), answer in asked.items() if query == "What colour is <bo>?"} == {"Brown."}
    assert asked["0.png", "What is <bo>?"] == "A good dog."  # the user's answer takes the place of the template's
    tested = {(qa.image.name, qa.query): qa.answer for qa in concept.vqa}
    assert tested["1.png", "Is it dry?"] == "No"  # the last photo tests
    loose = {qa.query: qa.answer for qa in concept.text_only}
    assert loose["Is <bo> old?"] == "007"
    assert loose["Where does <bo> sleep?"] == "In a basket."
    prompts = concept.generation_prompts
    assert prompts["explicit_personalized_driven_generation"] == [
        "<bo> with a red ball",
        "<bo> asleep <bo>'s bed is a blue basket.",
        "<bo> hiding <bo> fears cats.",
    ]
    assert prompts["pure_generation"] == ["<bo> in a wood"]
    assert prompts["personalized_dense_generation"] == ["<bo> with its toy at home"]
    assert prompts["explicit_personalized_dense_generation"] == ["<bo> with a red ball at home"]


@pytest.mark.parametrize("kind", ["human", "animal", "object"])
def test_the_template_is_no_fact_until_it_is_filled_in(tmp_path, photos, kind):
    text = facts_template("bo", kind, "thing")
    (tmp_path / "sheet.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"facts\[0\]\.fact: still holds \[WHICH .*\?\] of the template") as caught:
        make(tmp_path / "data", photos, kind=kind, class_word="thing", spec_yaml=tmp_path / "sheet.yaml")
    assert "info: still holds" in str(caught.value) and not (tmp_path / "data").exists()
    (tmp_path / "sheet.yaml").write_text(re.sub(r"\[[^]?]*\?\]", "green", text), encoding="utf-8")
    result = make(tmp_path / "data", photos, kind=kind, class_word="thing", spec_yaml=tmp_path / "sheet.yaml")
    assert check_folder(tmp_path / "data") == []
    assert len(result.concept.extra_info) == 1 and result.concept.kind == kind


def test_a_second_concept_joins_the_first(tmp_path, photos):
    root = tmp_path / "data"
    make(root, photos)
    before = tree(root)
    result = make(root, photos, "mimi", kind="human", class_word="woman", negatives=[photos / "IMG_1.jpg"])
    assert result.negatives == "given"
    assert json.loads((root / "concepts_list.json").read_text()) == ["bo", "mimi"]
    listed = json.loads((root / "concept" / "train" / "train_images.json").read_text())
    assert listed == {name: ["0.png", "1.png", "2.png", "3.png"] for name in ("bo", "mimi")}
    after = tree(root)
    changed = {file for file in before if after[file] != before[file]}
    assert changed == {"concepts_list.json", "concept/train/train_images.json"}
    assert not [problem for problem in check_folder(root) if problem.severity == "error"]
    assert len(load_concept(root, "mimi").negatives) == 1 + 12


def test_random_images_that_are_there_serve_as_negatives(tmp_path, photos):
    root = tmp_path / "data"
    (root / "random_images").mkdir(parents=True)
    Image.new("RGB", (80, 80), (1, 2, 3)).save(root / "random_images" / "5.png")
    result = make(root, photos)
    assert result.negatives == "random_images"
    with Image.open(root / "concept" / "train" / "bo" / "negative_example" / "0.png") as image:
        assert image.getpixel((4, 4)) == (1, 2, 3)
    assert [path.name for path in (root / "random_images").iterdir()] == ["5.png"]


def test_an_existing_concept_is_replaced_only_by_force(tmp_path, photos):
    root = tmp_path / "data"
    make(root, photos)
    before = tree(root)
    with pytest.raises(UserError, match="exists already: choose another name, or force"):
        make(root, photos, class_word="wolf")
    assert tree(root) == before
    make(root, [photos / "IMG_3.jpg"], class_word="wolf", force=True)
    concept = load_concept(root, "bo")
    assert (concept.class_word, len(concept.train_images), concept.test_images) == ("wolf", 1, [])
    assert json.loads((root / "concepts_list.json").read_text()) == ["bo"]
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_few_photos_and_the_same_photo_twice(tmp_path, photos):
    shutil.copy(photos / "IMG_1.jpg", photos / "IMG_1_copy.jpg")
    for number in (10, 11, 12):
        (photos / f"IMG_{number}.jpg").unlink()
    result = make(tmp_path / "data", photos)
    assert len(result.concept.train_images) == 3 and result.concept.test_images == []
    assert any("same file as IMG_1.jpg: used once" in note for note in result.notes)
    assert any("3 photos are too few" in note for note in result.notes)


def test_phone_formats_that_cannot_be_read_are_named(tmp_path, photos):
    (photos / "IMG_9.HEIC").write_bytes(b"x")
    notes = make(tmp_path / "data", photos).notes
    assert any(
        re.search(r"IMG_9\.HEIC: left out: .*pip install 'pyunictokens\[heif\]', or save it as", note) for note in notes
    )


def failing(real, at: int, error: BaseException):
    """`real`, except that the call number `at` raises."""
    calls = 0

    def call(*arguments):
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(*arguments)

    return call


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("what", "at", "error"),
    [
        ("save_image", 3, FULL),
        ("write_json", 2, FULL),
        ("check_folder", 1, UserError("made up")),
        ("os.rename", 1, FULL),
        ("os.rename", 2, FULL),
        ("install.write_json", 1, FULL),  # the first of the two shared listings
        ("install.write_json", 2, FULL),  # the second
        ("install.write_json", 2, KeyboardInterrupt()),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_on_the_way_leaves_everything_as_it_was(tmp_path, photos, monkeypatch, what, at, error, force):
    root = tmp_path / "data"
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    if force:
        make(root, photos)
    before = tree(root)
    place = what if what.startswith("install.") else f"new.{what}"
    real = os.rename if what == "os.rename" else getattr(install if place == what else new, what.rpartition(".")[2])
    monkeypatch.setattr(f"pyunictokens.data.{place}", failing(real, at, error))
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        make(root, photos, force=force, class_word="wolf")
    assert tree(root) == before


def test_many_at_once_lose_none(tmp_path, photos, monkeypatch):
    """All have read what is there before any has written: each is in both lists in the end."""
    names, ready, check = ["bo", "mug", "ann", "cat"], threading.Barrier(4), new.check_folder

    def together(*arguments):
        ready.wait(60)
        return check(*arguments)

    monkeypatch.setattr("pyunictokens.data.new.check_folder", together)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: make(tmp_path / "data", photos, name), names))
    listings = install.Listings(tmp_path / "data")
    assert sorted(listings.concepts) == sorted(listings.images) == sorted(names)
    assert not list((tmp_path / "data").glob(".*"))
    with pytest.raises(UserError, match="exists already"):  # whoever else made it meanwhile
        install.install(tmp_path, tmp_path / "data", "bo")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_that_is_killed_while_it_replaces_a_concept_leaves_no_mixture(tmp_path, photos):
    root, refused = tmp_path / "data", 0
    for at in range(1, 6):
        shutil.rmtree(root, ignore_errors=True)
        make(root, photos, class_word="dog")
        child = os.fork()
        if child == 0:
            real, calls = os.rename, []

            def rename(*arguments, real=real, calls=calls, at=at):
                calls.append(1)
                if len(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            os.rename = rename
            make(root, photos, class_word="wolf", force=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (-signal.SIGKILL if at < 5 else 0), "four renames replace a concept"
        if status:
            with pytest.raises(UserError, match="its halves may be of two ages"):
                load_concept(root, "bo")
            refused += 1
        else:
            assert load_concept(root, "bo").class_word == "wolf"
        make(root, photos, "mug")  # whoever comes next finishes it
        concept = load_concept(root, "bo")
        vqa = json.loads((root / "concept" / "test" / "bo" / "vqa.json").read_text())
        assert concept.class_word == "wolf" and "wolf" in json.dumps(vqa) and "dog" not in json.dumps(vqa)
        assert not list(root.glob(".*")) and sorted(install.Listings(root).concepts) == ["bo", "mug"]
    assert refused == 4


def test_a_root_that_did_not_exist_is_gone_after_a_failure(tmp_path, photos):
    (photos / "IMG_2.jpg").write_bytes(b"no image")
    (photos / "IMG_3.jpg").write_bytes((photos / "IMG_1.jpg").read_bytes()[:4000])
    with pytest.raises(UserError) as caught:
        make(tmp_path / "data", photos)
    assert "2 of 6 photos cannot be used" in str(caught.value)
    assert "IMG_2.jpg: not an image" in str(caught.value) and "IMG_3.jpg: the image is damaged" in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "<bo>", ".bo", "token_1"])
def test_bad_names(tmp_path, photos, name):
    with pytest.raises(UserError, match="concept name"):
        make(tmp_path / "data", photos, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "plant"}, "kind='plant': must be one of human, animal, object"),
        ({"class_word": " "}, "class_word=' '"),
        ({"test_photos": -1}, "test_photos=-1"),
        ({"negatives": "/nowhere"}, "negatives: no such file or folder: /nowhere"),
        ({"negatives": []}, "negatives: the list is empty"),
        ({"spec_yaml": "/nowhere.yaml"}, "/nowhere.yaml: no such file"),
        ({"spec_yaml": {"photos": {"IMG_99.jpg": []}}}, "photos that were not given: IMG_99.jpg"),
    ],
)
def test_bad_arguments(tmp_path, photos, changes, words):
    with pytest.raises(UserError, match=words):
        make(tmp_path / "data", photos, **changes)
    assert not (tmp_path / "data").exists()


def test_no_photos(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        make(tmp_path / "data", tmp_path / "empty")
    with pytest.raises(UserError, match="no such file or folder"):
        make(tmp_path / "data", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "content"), [("concepts_list.json", '{"a": 1}'), ("concept/train/train_images.json", "[1]")]
)
def test_broken_listings_are_not_overwritten(tmp_path, photos, file, content):
    path = tmp_path / "data" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match="mend or remove it first"):
        make(tmp_path / "data", photos)
    assert {name: value for name, value in tree(tmp_path / "data").items() if value} == {file: content.encode()}


def test_drawn_negatives_differ_from_each_other_and_come_back_the_same():
    first, again, other = drawn_negatives("bo", 12), drawn_negatives("bo", 12), drawn_negatives("mimi", 12)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert len({image.tobytes() for image in first + other}) == 24
