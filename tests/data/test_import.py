"""`data import`: what each foreign layout has becomes concept folders, nothing is made up, and all of it or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyunictokens.data import check_folder, load_concept
from pyunictokens.evaluate.suites import open_suite
from pyunictokens.evaluate.suites.importing import import_suite
from pyunictokens.utils.errors import UserError
from tests.cli.calling import call
from tests.evaluate.test_suites import pictures, write_dreambench, write_mcllava, write_yollava

WRITERS: dict[str, Callable[[Path], Path]] = {
    "yollava": write_yollava,
    "mcllava": write_mcllava,
    "dreambench": write_dreambench,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_becomes_folders_without_errors(layout: str, tmp_path: Path) -> None:
    folder, root = WRITERS[layout](tmp_path / "set"), tmp_path / "data"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = call("data", "import", layout, folder, root)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [problem for problem in check_folder(root) if problem.severity == "error"] == []
    suite = open_suite(f"{layout}:{folder}")
    for name in suite.names:
        subject, concept = suite.subject(name), load_concept(root, name)
        assert (concept.kind, concept.class_word) == (subject.kind, subject.class_word)
        assert len(concept.train_images) == 2 and len(concept.test_images) == len(subject.test_images)
        assert concept.generation_prompts == (
            {"pure_generation": [item.text for item in subject.of("pure")]} if subject.of("pure") else {}
        )
        assert not concept.extra_info and not concept.vqa and not concept.test_text_only
        assert {item.positive for item in concept.recognitions} == {True, False}
        assert f"{name} ({concept.kind}" in said
    assert "no facts were given" in said and ("no test photos" in said) == (layout == "dreambench")


def test_what_serves_as_negatives_and_masks(tmp_path: Path) -> None:
    colours = {"bo": (200, 0, 0), "mam": (0, 200, 0), "own": (0, 0, 200)}
    folder = write_yollava(tmp_path / "set")
    for name in ("bo", "mam"):
        for number in (0, 1):
            pixels = np.full((20, 24, 3), colours[name], dtype=np.uint8)
            pixels[0, 0] = number
            Image.fromarray(pixels).save(folder / "train" / name / f"{number}.png")
    Image.new("RGB", (24, 20), colours["own"]).save(folder / "train" / "bo" / "negative_example" / "n.png")
    Image.new("RGB", (24, 20), "white").save(folder / "train" / "bo" / "1_mask.png")
    import_suite(open_suite(f"yollava:{folder}"), tmp_path / "data")

    def seen(name: str) -> set[object]:
        concept = load_concept(tmp_path / "data", name)
        images = [path for path in concept.negatives if path.parent.name == "negative_example"]
        return {Image.open(path).getpixel((12, 12)) for path in images}

    assert seen("bo") == {colours["own"]} and seen("mam") == {colours["bo"]}
    train = tmp_path / "data" / "concept" / "train" / "bo"
    assert Image.open(train / "1_mask.png").getpixel((3, 3)) == (255, 255, 255) and not (train / "0_mask.png").exists()
    pictures(tmp_path / "others", "a.png")
    suite = open_suite(f"yollava:{folder}", ["bo"])
    import_suite(suite, tmp_path / "data", negatives=[tmp_path / "others"], force=True)
    assert seen("bo") == {(0, 0, 0)}


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path) -> None:
    folder, root = write_yollava(tmp_path / "set"), tmp_path / "data"
    assert "must be one of yollava, mcllava, dreambench" in call("data", "import", "unify", folder, root, code=2)
    with pytest.raises(UserError, match="'unify': must be one of"):
        import_suite(open_suite(f"yollava:{folder}").__class__("unify", folder, ("bo",)), root)
    assert "holds neither" in call("data", "import", "mcllava", folder, root, code=2)
    assert "no concept 'x'" in call("data", "import", "yollava", folder, root, "--name", "x", code=2)
    assert not root.exists()
    call("data", "import", "yollava", folder, root, "--name", "mam")
    assert "'mam' exists already" in call("data", "import", "yollava", folder, root, code=2)
    assert json.loads((root / "concepts_list.json").read_text()) == ["mam"]
    (folder / "test" / "bo" / "9.png").write_bytes((folder / "test" / "bo" / "9.png").read_bytes()[:60])
    assert "1 test photos cannot be used" in call("data", "import", "yollava", folder, root, "--name", "bo", code=2)
    for path in (folder / "train" / "bo").glob("*.png"):
        path.unlink()
    assert "'bo' has no photos to learn from" in call("data", "import", "yollava", folder, root, "--name", "bo", code=2)
    assert json.loads((root / "concepts_list.json").read_text()) == ["mam"]
    assert sorted(path.name for path in (root / "concept" / "train").iterdir()) == ["mam", "train_images.json"]


def test_a_class_word_that_is_not_known_is_said(tmp_path: Path) -> None:
    folder = write_yollava(tmp_path / "set")
    said = call("data", "import", "yollava", folder, tmp_path / "data")
    assert "bo (animal, dog)" in said and "mam (object, subject)" in said and "note: mam: no class word" in said
