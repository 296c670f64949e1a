"""What folders look like that people really have: files of systems and tools, any ending, any case, any way to write a
name. Nothing is lost without a word."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from pyunictokens.data import check_folder, facts_template, list_concepts, load_concept, new_concept, read_facts
from pyunictokens.data import image_files as listing
from pyunictokens.data.formats import image_format
from pyunictokens.data.image_files import list_images, look_into
from pyunictokens.data.reader import images_for_key
from pyunictokens.evaluate.suites.files import folders, pictures
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.spelling import spelled

ENCODERS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
if features.check("avif"):
    ENCODERS["AVIF"] = "avif"


def image(path: Path, kind: str = "PNG", size: tuple[int, int] = (80, 64), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).save(path, format=kind)
    return path


def said(folder) -> str:
    return "\n".join(f"{problem.severity}: {problem}" for problem in check_folder(folder.root))


# --- what is no part of the data ------------------------------------------------------------------------------------

SYSTEM = ["__MACOSX", "@eaDir", ".ipynb_checkpoints", "System Volume Information", "$RECYCLE.BIN", "__pycache__"]


def test_folders_of_systems_are_no_concepts_and_get_one_note(folder):
    for name in SYSTEM:
        image(folder.root / "concept" / "train" / name / "0.png")
        image(folder.train / name / "0.png")
    assert list_concepts(folder.root) == ["bo"]
    (problem,) = check_folder(folder.root)
    assert problem.severity == "warning" and all(name in problem.message for name in SYSTEM)
    assert "no concepts: left out" in problem.message


def test_folders_of_systems_are_no_concepts_of_other_benchmarks(tmp_path):
    for name in ["bo", *SYSTEM]:
        image(tmp_path / name / "0.png")
    assert folders(tmp_path) == ["bo"]


def test_a_folder_that_cannot_be_a_concept_does_not_stop_the_others(tmp_path):
    for name in ("bo", "sks", "token_3"):
        image(tmp_path / name / "0.png")
    with pytest.warns(UserWarning, match="(sks|token_3).*left out"):
        assert folders(tmp_path) == ["bo"]


@pytest.mark.parametrize("name", ["maskot_0.png", "unmasked.png", "damask.png", "bo_with_mask.png", "mask.png"])
def test_words_that_hold_mask_are_no_masks(folder, name):
    (folder.root / "concept" / "train" / "train_images.json").unlink()
    image(folder.train / name, seed=9)
    assert name in [path.name for path in load_concept(folder.root, "bo").train_images]


@pytest.mark.parametrize("name", ["0_mask.png", "mask_0.png", "0-Mask.png", "0 mask.PNG", "0.mask.png", "0_masks.jpg"])
def test_masks_of_other_images_are_left_out_and_named(folder, name):
    (folder.root / "concept" / "train" / "train_images.json").unlink()
    image(folder.train / name, seed=9)
    assert [path.name for path in load_concept(folder.root, "bo").train_images] == ["0.png", "1.png", "2.png"]
    assert f"{name}: masks of other images here: left out" in said(folder)


def test_sub_folders_of_images_are_named(folder):
    image(folder.train / "more" / "7.png", seed=9)
    image(folder.test / "more" / "8.png", seed=8)
    text = said(folder)
    assert text.count("more/: a folder of 1 image, which is not looked into") == 2
    assert "negative_example" not in text


# --- content, not endings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("ending", ["", ".jfif", ".jpe", ".JPG", ".png", ".dat"])
def test_an_image_is_what_its_content_is(folder, kind, ending):
    (folder.root / "concept" / "train" / "train_images.json").unlink()
    image(folder.train / f"9{ending}", kind, seed=9)
    assert image_format(folder.train / f"9{ending}") == kind
    assert [path.name for path in load_concept(folder.root, "bo").train_images][3:] == [f"9{ending}"]
    assert not [problem for problem in check_folder(folder.root) if problem.severity == "error"]
    assert [path.name for path in pictures(folder.train)][3:] == [f"9{ending}"]


def test_other_files_are_no_images(folder):
    for name, data in (("notes.txt", b"BMW is red"), ("clip.mov", b"\0\0\0\x14ftypqt  \0\0\0\0qt  "), ("empty", b"")):
        (folder.train / name).write_bytes(data)
    assert len(list_images(folder.train)) == 3 and check_folder(folder.root) == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"pip install 'pyunictokens\[heif\]', or save it as JPEG"),
        (b"8BPS\0\1", "Photoshop images are not read: save it as JPEG or PNG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL images are not read"),
    ],
)
def test_images_that_cannot_be_read_here_are_named(folder, tmp_path, monkeypatch, data, reason):
    monkeypatch.setattr(listing, "can_read", lambda kind: kind in ENCODERS)
    (folder.root / "concept" / "train" / "train_images.json").unlink()
    (folder.train / "IMG_7.jpg").write_bytes(data)
    assert len(load_concept(folder.root, "bo").train_images) == 3
    assert re.search(rf"warning: .*IMG_7\.jpg: left out: .*{reason}", said(folder))
    notes: list[str] = []
    new_concept(tmp_path / "new", "bo", folder.train, kind="animal", class_word="dog").notes.extend(notes)
    made = new_concept(tmp_path / "new", "ann", folder.train, kind="animal", class_word="dog")
    assert any(re.search(rf"IMG_7\.jpg: left out: .*{reason}", note) for note in made.notes)


def test_raw_files_of_cameras_are_named_and_never_taken_for_their_thumbnail(tmp_path):
    image(tmp_path / "0.png")
    image(tmp_path / "DSC_1.NEF", "TIFF")
    found = look_into(tmp_path)
    assert [path.name for path in found.images] == ["0.png"]
    assert list(found.notes()) == ["DSC_1.NEF: left out: RAW images are not read: save it as JPEG or PNG"]


def test_a_git_lfs_pointer_is_no_damaged_image(folder):
    (folder.train / "1.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "1.png: a Git LFS pointer, not the file itself: run `git lfs pull`" in said(folder)


# --- names ----------------------------------------------------------------------------------------------------------


def test_case_and_composition_of_names_matter_nowhere(folder):
    decomposed, composed = unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")
    (folder.train / "0.png").rename(folder.train / "IMG_0.PNG")
    (folder.train / "1.png").rename(folder.train / decomposed)
    folder.json(folder.root / "concept" / "train" / "train_images.json", {"BO": ["img_0.png", composed, "2.png"]})
    (folder.train / "info.json").rename(folder.train / "Info.JSON")
    (folder.test / "t2i_conditions.json").rename(folder.test / "T2I_conditions.json")
    folder.json(folder.root / "concepts_list.json", ["Bo"])
    concept = load_concept(folder.root, "Bo")
    assert concept.name == "bo" and concept.class_word == "dog" and concept.generation_prompts
    assert [path.name for path in concept.train_images] == ["IMG_0.PNG", decomposed, "2.png"]
    text = said(folder)
    assert not re.search("^error", text, re.MULTILINE)
    for words in ("'img_0.png' does not exist: IMG_0.PNG is used", "is spelled Info.JSON", "BO: is spelled bo",
                  "is spelled T2I_conditions.json", "Bo: is spelled bo as a folder"):  # fmt: skip
        assert words in text


def test_two_files_that_differ_in_case_alone_are_not_guessed(tmp_path):
    for name in ("a.png", "A.png"):
        image(tmp_path / name)
    assert spelled(tmp_path / "a.png").name == "a.png"
    assert spelled(tmp_path / "a.PNG").name == "a.PNG" and not spelled(tmp_path / "a.PNG").exists()


@pytest.mark.parametrize(
    ("key", "names", "expected"),
    [
        ("0", [f"{number:02d}.jpg" for number in range(12)], ["00.jpg"]),
        ("11", [f"{number:02d}.jpg" for number in range(12)], ["11.jpg"]),
        ("007", ["7.png", "17.png"], ["7.png"]),
        ("3", ["IMG_0003.jpg", "IMG_0013.jpg"], ["IMG_0003.jpg"]),
        ("1", ["10.png", "21.png"], []),
        ("./data/train/bo/0.png", ["0.png", "10.png"], ["0.png"]),
        ("C:\\data\\bo\\3.png", ["3.png", "0.png"], ["3.png"]),
        ("data/bo/0/", ["0.png", "10.png"], ["0.png"]),
    ],
)
def test_keys_are_file_names_and_numbers(key, names, expected):
    assert [path.name for path in images_for_key(key, [Path(name) for name in names])] == expected


def test_a_key_that_fits_several_images_is_told_of(folder):
    answers = [{"query": "What is <bo>?", "answer": "A dog."}]
    folder.json(folder.train / "conversations.json", {"png": answers})
    assert len(load_concept(folder.root, "bo").conversations) == 3
    assert "png: fits 3 images (0.png, 1.png, 2.png): its questions go to each of them" in said(folder)


def test_paths_of_the_makers_machine_count_by_their_last_parts(folder):
    image(folder.train / "negative_example" / "0.png", seed=3)
    ask = {"query": "Is <bo> here?"}
    paths = ["./data/train/bo/1.png", "./data/test/bo/1.png", "../x"]
    folder.json(folder.train / "positive_recognitions.json", [{**ask, "answer": "Yes.", "image": p} for p in paths[:2]])
    no = [{**ask, "answer": "No.", "image": "./unictokens/negative_example/0.png"}]
    folder.json(folder.train / "random_recognitions.json", no)
    found = [item.image for item in load_concept(folder.root, "bo").recognitions]
    assert found == [folder.train / "1.png", folder.test / "1.png", folder.train / "negative_example" / "0.png"]
    folder.json(
        folder.train / "random_recognitions.json", [{**ask, "answer": "No.", "image": "./data/train/cat/0.png"}]
    )
    with pytest.raises(UserError, match="no such image"):  # another concept's image is not this one's
        load_concept(folder.root, "bo")


# --- data new -------------------------------------------------------------------------------------------------------


def make(root: Path, photos, **changes):
    return new_concept(root, "mug", photos, **{"kind": "object", "class_word": "mug", **changes})


def test_any_number_of_folders_and_files_with_any_ending(tmp_path):
    for index, name in enumerate(["a/1.jpg", "a/x.jfif", "a/y.jpe", "a/z", "b/1.bmp", "b/deep/9.png", "loose.gif"]):
        image(tmp_path / name, ["JPEG", "BMP", "PNG", "GIF"][(index > 3) + (index > 4) + (index > 5)], seed=index)
    made = make(tmp_path / "D", [tmp_path / "a", tmp_path / "b", tmp_path / "loose.gif"])
    assert len(made.concept.train_images) + len(made.concept.test_images) == 6
    assert any("deep/: a folder of 1 image, which is not looked into" in note for note in made.notes)
    with pytest.raises(UserError, match=r"no such file or folder: .*nowhere"):
        make(tmp_path / "E", [tmp_path / "a", tmp_path / "nowhere"])


def test_questions_about_photos_of_one_name_in_two_folders(tmp_path):
    for index, name in enumerate(["a/1.png", "b/1.png"]):
        image(tmp_path / name, seed=index)
    sheet = {"photos": {"B/1.PNG": [{"question": "Is <mug> full?", "answer": "Yes."}]}}
    made = make(tmp_path / "D", [tmp_path / "a", tmp_path / "b"], spec_yaml=sheet)
    assert [qa.image.name for qa in made.concept.conversations if "full" in qa.query and qa.image] == ["1.png"]
    with pytest.raises(UserError, match=r"2 photos have that name: write the folder before it, as in a/1\.png"):
        make(
            tmp_path / "E",
            [tmp_path / "a", tmp_path / "b"],
            spec_yaml={"photos": {"1.png": sheet["photos"]["B/1.PNG"]}},
        )


@pytest.mark.parametrize(
    ("size", "stored"), [((2016, 1512), (853, 640)), ((720, 1280), (640, 1138)), ((300, 200), None)]
)
def test_photos_are_stored_large_enough_for_the_model(tmp_path, size, stored):
    image(tmp_path / "photos" / "1.jpg", "JPEG", size)
    with Image.open(make(tmp_path / "D", tmp_path / "photos").concept.train_images[0]) as kept:
        assert kept.size == (stored or size)


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{bo}", "＜bo＞", "&lt;bo&gt;", "{ Bo }", "\\<bo\\>", "〈bo〉"])
def test_the_token_as_other_tools_leave_it_is_read_with_a_warning(folder, form):
    folder.json(folder.train / "conversations.json", {"0": [{"query": f"What is {form}?", "answer": "A dog."}]})
    assert load_concept(folder.root, "bo").conversations[0].query == "What is <bo>?"
    assert "conversations.json: 0[0].query:" in said(folder) and "is read as <bo>" in said(folder)
    sheet = read_facts({"questions": [{"question": f"What is {form}?", "answer": "A dog."}]}, "bo")
    assert sheet.questions == [("What is <bo>?", "A dog.")] and "is read as <bo>" in sheet.notes[0]


def test_questions_that_never_name_the_concept_are_told_of_once_a_file(folder):
    plain = [{"query": "Is it wet?", "answer": "Yes."}, {"query": "Is it old?", "answer": "No."}]
    folder.json(folder.train / "conversations.json", {"0": plain, "1": [{"query": "Who is this?", "answer": "<bo>."}]})
    (problem,) = [problem for problem in check_folder(folder.root) if problem.file.endswith("conversations.json")]
    assert "'Is it wet?' and 1 more: <bo> is neither in the question nor in its answer" in problem.message


def test_an_unedited_template_is_refused(tmp_path):
    (tmp_path / "sheet.yaml").write_text(facts_template("mug", "object", "mug"), encoding="utf-8")
    with pytest.raises(UserError, match=r"facts\[0\]\.fact: still holds \[WHICH PLACE\?\]"):
        read_facts(tmp_path / "sheet.yaml", "mug")
