"""Filling a table with models that answer and draw by rule: nothing is done twice, and nothing stops what can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyunictokens.data.wording import text_only_question
from pyunictokens.evaluate.clip import Embeddings
from pyunictokens.evaluate.core import AnswersOnly, Baseline, GeneratesOnly, Unsupported
from pyunictokens.evaluate.runner import TableSettings, fill, noise_seed
from pyunictokens.evaluate.sample_cache import Record, SampleCache
from pyunictokens.evaluate.scoring import Scorer
from pyunictokens.evaluate.tasks import Item, Subject
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.fingerprint import of_files

FACTS = ("its toy is a ball", "it sleeps in the snow")


class Rule:
    """Answers its question's length, draws its prompt's length; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.drawn: list[tuple[str, int, int]] = []

    def answer(self, images: Sequence[Any], question: str) -> str:
        self.asked.append((len(images), question))
        if "Which information fits" in question:
            return FACTS[1]
        return "yes"

    def generate(self, prompt: str, n: int, seed: int) -> torch.Tensor:
        self.drawn.append((prompt, n, seed))
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1


class Net:
    size = 8

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, :5] + 3

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[len(text), 1.0, 2, 3, 4] for text in texts])


class Judge:
    def __init__(self, value: float | None = 0.5) -> None:
        self.value, self.asked = value, 0

    def score(self, items: Sequence[Any]) -> list[Any]:
        self.asked += len(items)
        return [SimpleNamespace(value=self.value, reason="", error="out of range") for _ in items]


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((9, 9, 3), 40 * number, dtype=np.uint8)).save(path)
    question = text_only_question(FACTS, "<bo> at night")
    items = [
        Item("recognition", "is it <bo>?", "yes", paths[0], "positive"),
        Item("recognition", "is it <bo>?", "no", paths[1], "negative"),
        Item("reasoning", question, FACTS[1], facts=FACTS),
        Item("vqa", "what is it?", "a dog", paths[0]),
        Item("vqa", "who is it?", "a dog", paths[1]),
        Item("qa", "what?", "a dog"),
        Item("pure", "<bo>"),
        Item("pure", "<bo> in a mug"),
        Item("reasoning_generation", "<bo> at night", "<bo> at night in the snow", facts=FACTS),
    ]
    return Subject("bo", "dog", "animal", references=[paths[0]], items=items)


def row(model: Any, name: str = "rule", identity: str = "1", reasons: bool = True) -> Baseline:
    return Baseline(name, identity, lambda _: model, reasons)


def test_everything_is_asked_once_and_kept(subject: Subject, tmp_path: Path) -> None:
    model, judge = Rule(), Judge()
    scorer = Scorer(Embeddings(Net(), "net"), judge)
    settings = TableSettings(samples=3, seeds=(0, 7))
    first = fill([row(model)], [subject], scorer, tmp_path / "out", settings)
    assert first.failures == [] and first.made == len(first.records) == 6 + 3 * 2
    reasoning = text_only_question(FACTS, "<bo> at night")
    assert sum(question == reasoning for _, question in model.asked) == 1  # for Rea. itself and all images of it
    assert {prompt for prompt, *_ in model.drawn} == {"<bo>", "<bo> in a mug", f"<bo> at night. {FACTS[1]}."}
    assert len({seed for *_, seed in model.drawn}) == 6 and all(n == 3 for _, n, _ in model.drawn)
    assert {cell.task: sorted(cell.scores) for cell in first.records}["pure"] == ["clip_i", "clip_t"]
    assert all(len(cell.scores["clip_i"]) == 3 for cell in first.records if cell.count)

    def never(_: Subject) -> Any:
        raise AssertionError("a model whose records are all there is not loaded")

    asked = judge.asked
    again = fill([Baseline("rule", "1", never, True)], [subject], scorer, tmp_path / "out", settings)
    assert again.made == 0 and judge.asked == asked
    assert [cell.scores for cell in again.records] == [cell.scores for cell in first.records]


def test_a_stopped_evaluation_goes_on_where_it_was(subject: Subject, tmp_path: Path) -> None:
    class Stops(Rule):
        def generate(self, prompt: str, n: int, seed: int) -> torch.Tensor:
            if len(self.drawn) == 1:
                raise KeyboardInterrupt
            return super().generate(prompt, n, seed)

    scorer, settings = Scorer(Embeddings(Net(), "net"), Judge()), TableSettings(samples=2)
    with pytest.raises(KeyboardInterrupt):
        fill([row(Stops())], [subject], scorer, tmp_path / "a", settings)
    model = Rule()
    went_on = fill([row(model)], [subject], scorer, tmp_path / "a", settings)
    whole = fill([row(Rule())], [subject], scorer, tmp_path / "b", settings)
    assert [prompt for prompt, *_ in model.drawn] == ["<bo> in a mug", f"<bo> at night. {FACTS[1]}."]
    assert [cell.scores for cell in went_on.records] == [cell.scores for cell in whole.records]
    assert all(
        torch.equal(a.images(), b.images()) for a, b in zip(went_on.records, whole.records, strict=True) if a.count
    )


def test_half_a_cell_is_no_cell(subject: Subject, tmp_path: Path) -> None:
    scorer, settings = Scorer(Embeddings(Net(), "net")), TableSettings(samples=1, tasks=("pure",))
    cells = fill([row(Rule())], [subject], scorer, tmp_path, settings).records
    cells[0].path.write_text('{"format": 1, "model"')
    cells[1].path.with_suffix(".png").unlink()
    assert fill([row(Rule())], [subject], scorer, tmp_path, settings).made == 2
    cells[0].path.write_text('{"format": 99}')
    assert fill([row(Rule())], [subject], scorer, tmp_path, settings).made == 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("change", [{"identity": "2"}, {"samples": 2}, {"seeds": (1,)}, {"text": "<bo> now"}])
def test_what_decides_an_output_makes_another_cell(subject: Subject, tmp_path: Path, change: dict[str, Any]) -> None:
    scorer, settings = Scorer(Embeddings(Net(), "net")), TableSettings(samples=1, tasks=("pure",))
    fill([row(Rule())], [subject], scorer, tmp_path, settings)
    if "text" in change:
        subject.items = [Item("pure", change["text"])]
    more = {key: change[key] for key in ("samples", "seeds") if key in change}
    settings = TableSettings(**{"samples": 1, "tasks": ("pure",), **more})
    made = fill([row(Rule(), identity=change.get("identity", "1"))], [subject], scorer, tmp_path, settings).made
    assert made == len(subject.of("pure"))


def test_noise_is_that_of_seed_concept_task_and_prompt(subject: Subject) -> None:
    item = Item("pure", "<bo>")
    seeds = {
        noise_seed(0, subject, item),
        noise_seed(1, subject, item),
        noise_seed(0, Subject("mam", "dog"), item),
        noise_seed(0, subject, Item("dense", "<bo>")),
        noise_seed(0, subject, Item("pure", "<bo>.")),
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**31 for seed in seeds)
    assert noise_seed(0, subject, item) == noise_seed(0, subject, item)


def test_only_models_that_reason_answer_first(subject: Subject, tmp_path: Path) -> None:
    model = Rule()
    fill([row(model, reasons=False)], [subject], Scorer(), tmp_path, TableSettings(1, tasks=("reasoning_generation",)))
    assert model.asked == [] and model.drawn[0][0] == "<bo> at night"


def test_a_model_that_does_half_of_it_leaves_columns_empty(subject: Subject, tmp_path: Path) -> None:
    class Draws(GeneratesOnly):
        generate = Rule.generate

        def __init__(self) -> None:
            self.drawn: list[Any] = []

    filled = fill([row(Draws(), reasons=False)], [subject], Scorer(), tmp_path, TableSettings(1))
    assert filled.failures == [] and {cell.task for cell in filled.records} == {"pure", "reasoning_generation"}
    assert {task for _, task in filled.unsupported} == {"recognition", "reasoning", "vqa", "qa"}
    with pytest.raises(Unsupported, match="Draws does not answer"):
        Draws().answer([], "?")


def test_what_cannot_be_done_is_listed_and_the_rest_goes_on(subject: Subject, tmp_path: Path) -> None:
    class Refuses(Rule):
        def generate(self, prompt: str, n: int, seed: int) -> torch.Tensor:
            if "mug" in prompt:
                raise UserError("no mugs here")
            return super().generate(prompt, n, seed) * (float("nan") if "night" in prompt else 1)

    picture = subject.items[4].image
    assert picture is not None
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    picture.write_bytes(picture.read_bytes()[:5000])  # cut off; shown in one question of rec and one of vqa
    whole = subject.references[0]
    subject.references.append(picture)
    filled = fill([row(Refuses())], [subject], Scorer(Embeddings(Net(), "net")), tmp_path / "out", TableSettings(1))
    told = {(failure.task, failure.what): failure.why for failure in filled.failures}
    assert set(told) == {
        ("recognition", "an answer"),
        ("vqa", "an answer"),
        ("pure", "an image"),
        ("reasoning_generation", "an image"),
    }
    assert "1.png" in told["vqa", "an answer"] and told["pure", "an image"] == "no mugs here"
    assert "not finite" in told["reasoning_generation", "an image"]
    assert {cell.task for cell in filled.records} == {"recognition", "reasoning", "vqa", "qa", "pure"}
    assert subject.references == [whole] and any("reference image is left out" in note for note in filled.notes)


def test_models_are_shown_upright_colour_pictures_of_bounded_size(tmp_path: Path) -> None:
    """Whatever a camera or a scanner wrote: gray, transparent, 16-bit, turned by EXIF, huge."""
    seen: list[tuple[str, tuple[int, int]]] = []

    class Looks(AnswersOnly):
        def answer(self, images: Sequence[Any], question: str) -> str:
            seen.extend((image.mode, image.size) for image in images)
            return "yes"

    plain = Image.fromarray(np.full((40, 60, 3), (250, 5, 5), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [tmp_path / name for name in ("gray.png", "clear.png", "deep.png", "turned.jpg", "huge.png")]
    plain.convert("L").save(paths[0])
    plain.convert("RGBA").save(paths[1])
    Image.fromarray(np.full((40, 60), 40000, dtype=np.uint16)).save(paths[2])
    plain.save(paths[3], exif=exif)
    Image.new("RGB", (5000, 1000)).save(paths[4])
    subject = Subject("bo", "dog", items=[Item("vqa", "what?", "yes", path) for path in paths])
    filled = fill([row(Looks())], [subject], Scorer(), tmp_path / "out", TableSettings(1, tasks=("vqa",)))
    assert filled.failures == [] and {mode for mode, _ in seen} == {"RGB"}
    assert [size for _, size in seen] == [(60, 40), (60, 40), (60, 40), (40, 60), (2048, 410)]


def test_a_score_that_failed_is_tried_again_without_drawing_again(subject: Subject, tmp_path: Path) -> None:
    settings = TableSettings(1, tasks=("vqa",))
    filled = fill([row(Rule())], [subject], Scorer(None, Judge(None)), tmp_path, settings)
    assert len(filled.failures) == 2 and all(failure.what == "judge" for failure in filled.failures)
    model = Rule()
    filled = fill([row(model)], [subject], Scorer(None, Judge(0.25)), tmp_path, settings)
    assert model.asked == [] and filled.failures == []
    assert [cell.scores["judge"] for cell in filled.records] == [[0.25], [0.25]]


def test_a_model_that_cannot_be_loaded_is_one_failure(subject: Subject, tmp_path: Path) -> None:
    def broken(_: Subject) -> Any:
        raise UserError("no such weights")

    filled = fill([Baseline("a", "a", broken), row(Rule(), "b")], [subject], Scorer(), tmp_path, TableSettings(1))
    assert [(f.model, f.what, f.why) for f in filled.failures] == [("a", "the model", "no such weights")]
    assert {cell.model for cell in filled.records} == {"b"}


def test_a_drawing_of_another_shape_is_refused(subject: Subject, tmp_path: Path) -> None:
    class Flat(Rule):
        def generate(self, prompt: str, n: int, seed: int) -> Any:
            return torch.zeros(n, 1, 8, 8)

    filled = fill([row(Flat())], [subject], Scorer(), tmp_path, TableSettings(2, tasks=("pure",)))
    assert "generated (2, 1, 8, 8): must be [2, 3, H, W]" in filled.failures[0].why


def test_one_model_is_held_at_a_time(subject: Subject, tmp_path: Path) -> None:
    told: list[str] = []

    def baseline(name: str) -> Baseline:
        def load(_: Subject) -> Any:
            told.append(f"load {name}")
            return Rule()

        return Baseline(name, name, load, release=lambda: told.append(f"free {name}"))

    other = Subject("mam", "dog", items=[Item("pure", "<mam>")])
    settings = TableSettings(1, tasks=("pure",))
    fill([baseline("a"), baseline("b")], [subject, other], Scorer(), tmp_path, settings)
    assert told == ["load a", "load a", "free a", "load b", "load b", "free b"]


def test_limit_takes_the_first_of_each_half(subject: Subject, tmp_path: Path) -> None:
    subject.items += [Item("recognition", f"question {n}", "yes", subject.items[0].image, "positive") for n in range(3)]
    filled = fill(
        [row(Rule())], [subject], Scorer(), tmp_path, TableSettings(1, tasks=("recognition", "pure"), limit=1)
    )
    assert [cell.group for cell in filled.records if cell.task == "recognition"] == ["positive", "negative"]
    assert len([cell for cell in filled.records if cell.task == "pure"]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"seeds": ()}, r"seeds=\[\]"),
        ({"seeds": (1, 1)}, r"seeds=\[1, 1\]"),
        ({"tasks": ("draw",)}, "must be some of recognition, vqa"),
        ({"limit": -1}, "limit=-1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TableSettings(**settings)


def test_models_need_names_of_their_own(subject: Subject, tmp_path: Path) -> None:
    for candidates in ([], [row(Rule()), row(Rule())]):
        with pytest.raises(UserError, match="each with a name of its own"):
            fill(candidates, [subject], Scorer(), tmp_path)


def test_names_from_data_stay_inside_the_folder(tmp_path: Path) -> None:
    cache, item = SampleCache(tmp_path / "out"), Item("pure", "x")
    place = cache.place("../../evil: ü/model", "1", Subject("bo", "dog"), item, 0, 1)
    assert place.resolve().is_relative_to(tmp_path / "out") and ".." not in place.as_posix()
    with pytest.raises(UserError, match="concept name"):
        cache.place("m", "1", Subject("../bo", "dog"), item, 0, 1)
    assert cache.place("ü", "1", Subject("bo", "dog"), item, 0, 1) != cache.place(
        "ä", "2", Subject("bo", "dog"), item, 0, 1
    )


def test_weights_trained_anew_are_another_model(tmp_path: Path) -> None:
    assert of_files("") == of_files(tmp_path / "none") == of_files("owner/name") == ""
    (tmp_path / "w.safetensors").write_bytes(b"1234")
    first = of_files(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert of_files(tmp_path) == first
    (tmp_path / "w.safetensors").write_bytes(b"12345")
    assert of_files(tmp_path) not in ("", first)
    when = (tmp_path / "w.safetensors").stat().st_mtime_ns
    second = of_files(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"12346")
    os.utime(tmp_path / "w.safetensors", ns=(when, when))
    assert of_files(tmp_path) not in (first, second), "the old time and the old size are no proof"
    (tmp_path / "w.safetensors").write_bytes(b"12345")
    os.utime(tmp_path / "w.safetensors", ns=(7, 7))
    assert of_files(tmp_path) == second, "another time is no other model"
    (tmp_path / "config.json").write_text("{}")
    assert of_files(tmp_path) != second


def test_other_pictures_under_the_same_names_are_asked_about_anew(subject: Subject, tmp_path: Path) -> None:
    scorer, settings = Scorer(Embeddings(Net(), "net")), TableSettings(samples=1)

    def made() -> int:
        return fill([row(Rule())], [subject], scorer, tmp_path / "out", settings).made

    assert (made(), made()) == (9, 0)
    times = [path.stat().st_mtime_ns for path in (tmp_path / "0.png", tmp_path / "1.png")]
    for number, value, expected in ((1, 200, 2), (0, 100, 9)):  # two questions show 1.png; 0.png is the reference
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((9, 9, 3), value, dtype=np.uint8)).save(path)
        os.utime(path, ns=(times[number], times[number]))
        assert (made(), made()) == (expected, 0), path
    subject.info = "<bo> is a small brown dog."
    assert made() == 9


def test_a_damaged_record_is_made_again_and_one_of_an_earlier_version_taken(subject: Subject, tmp_path: Path) -> None:
    scorer, settings = Scorer(Embeddings(Net(), "net")), TableSettings(samples=1, tasks=("vqa",))
    first, second = fill([row(Rule())], [subject], scorer, tmp_path, settings).records
    text = first.path.read_text()
    first.path.write_text(text.replace("bleu", "bleV"))
    content = json.loads(second.path.read_text())
    del content["sha256"], content["contents"]
    second.path.write_text(json.dumps(content))
    again = fill([row(Rule())], [subject], scorer, tmp_path, settings)
    assert again.made == 1 and again.records[0].scores == first.scores


def test_records_read_back_as_they_were_written(tmp_path: Path) -> None:
    cell = Record(
        "m", "bo", "animal", "pure", "d", "t", "t", scores={"clip_t": [0.25]}, count=2, path=tmp_path / "c.json"
    )
    pixels = torch.randint(0, 256, (2, 3, 6, 4), dtype=torch.uint8)
    SampleCache.write(cell, pixels)
    read = SampleCache.read(cell.path)
    assert read == cell and read is not None and torch.equal(read.images(), pixels)
