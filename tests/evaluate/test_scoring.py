"""Scores of cells with encoders and judges by rule, so that every value is known beforehand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyunictokens.evaluate import judge_prompts as prompts
from pyunictokens.evaluate.clip import Embeddings
from pyunictokens.evaluate.metrics import picked
from pyunictokens.evaluate.sample_cache import Record, SampleCache
from pyunictokens.evaluate.scoring import Scorer
from pyunictokens.evaluate.tasks import IMAGE_TASKS, TASKS, Item, Subject
from pyunictokens.utils.errors import UserError

FACTS = ("its toy is a red ball", "it sleeps in the snow")


class Colours:
    """Pictures are their mean colour; a text is the colour it names first."""

    size = 8

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images = 0

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.images += len(pixels)
        return (pixels.mean(dim=(2, 3)) + 1) / 2 + 1e-6

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.texts += texts
        named = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}
        return torch.tensor([next((v for k, v in named.items() if k in text), (1.0, 1, 1)) for text in texts])


class Judge:
    """Scores by a rule on the question's text; None is a question it fails on."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.items, self.calls = rule, [], 0  # type: ignore[var-annotated]

    def score(self, items: Any) -> Any:
        self.calls += 1
        self.items += items
        found = [self.rule(item) for item in items]
        return [SimpleNamespace(value=v, reason="", error=None if v is not None else "out of range") for v in found]


def colour(name: str) -> torch.Tensor:
    values = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}[name]
    return torch.tensor(values, dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)


def drawn(folder: Path, item: Item, *colours: str) -> Record:
    path = folder / f"{item.digest}.json"
    cell = Record("m", "bo", "animal", item.task, item.digest, item.text, item.meant, count=len(colours), path=path)
    SampleCache.write(cell, torch.stack([colour(name) for name in colours]))
    return cell


def said(item: Item, answer: str) -> Record:
    return Record("m", "bo", "animal", item.task, item.digest, item.text, item.meant, item.group, answer=answer)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    photos = []
    for name in ("red", "green"):
        photos.append(tmp_path / f"{name}.png")
        Image.fromarray(colour(name).permute(1, 2, 0).numpy()).save(photos[-1])
    return Subject("bo", "dog", "animal", references=photos)


def test_every_task_has_measures() -> None:
    assert all(task.measures for task in TASKS.values())
    assert all("clip_i" in TASKS[task].measures for task in IMAGE_TASKS)


@pytest.mark.parametrize(
    ("item", "answer", "scores"),
    [
        (Item("recognition", "q", "yes", group="positive"), "Yes, it is.", {"weight": 1.0}),
        (Item("recognition", "q", "no", group="negative"), "Yes.", {"weight": 0.0}),
        (Item("recognition", "q", "no", group="negative"), "", {"weight": 0.0}),
        (Item("vqa", "q", "red"), "Red.", {"accuracy": 1.0}),
        (Item("vqa", "q", "abab"), "abab", {"bleu": 1.0, "accuracy": 1.0}),
        (Item("qa", "q", "grey", options=("red", "grey")), "B", {"accuracy": 1.0}),
        (Item("qa", "q", "grey", options=("red", "grey")), "It is red.", {"accuracy": 0.0}),
        (Item("reasoning", "q", FACTS[1], facts=FACTS), "sleeps in snow", {"accuracy": 1.0}),
        (Item("reasoning", "q", FACTS[0], facts=FACTS), "sleeps in snow", {"accuracy": 0.0}),
        (Item("reasoning", "q", FACTS[0], facts=FACTS), "", {"accuracy": 0.0, "bleu": 0.0, "word_bleu": 0.0}),
    ],
)
def test_answers(item: Item, answer: str, scores: dict[str, float], subject: Subject) -> None:
    cell = said(item, answer)
    assert Scorer().score([(cell, item)], subject) == []
    assert set(cell.scores) == set(TASKS[item.task].measures) - {"judge"}
    assert {name: cell.scores[name][0] for name in scores} == pytest.approx(scores)


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", "dark brown"),
        ("(B)", "dark brown"),
        ("b", None),
        ("B. dark brown", "dark brown"),
        ("A) red", "red"),
        ("A pink dog, brown", "brown"),
        ("It is dark brown.", "dark brown"),
        ("red or brown", None),
        ("D", None),
        ("", None),
    ],
)
def test_which_option_was_picked(answer: str, option: str | None) -> None:
    assert picked(answer, ("red", "dark brown", "brown")) == option


def test_clip_scores_have_the_values_of_their_definition(subject: Subject, tmp_path: Path) -> None:
    net = Colours()
    scorer = Scorer(Embeddings(net, "colours"))
    plain = Item("reasoning_generation", "<bo> with its toy", "<bo> with a red thing", facts=FACTS)
    long = Item("dense", "<bo> in red, in blue.")
    cells = [drawn(tmp_path, plain, "blue", "red"), drawn(tmp_path, long, "blue", "blue")]
    assert scorer.score(list(zip(cells, (plain, long), strict=True)), subject) == []
    assert cells[0].scores["clip_t"] == pytest.approx([0, 1], abs=1e-4)  # by the prompt with its details filled in
    assert cells[1].scores["clip_t"] == pytest.approx([0.5, 0.5], abs=1e-4)  # mean over the parts
    # red is the photo itself, which is not compared with itself: green alone is left
    assert cells[0].scores["clip_i"] == pytest.approx([0, 0], abs=1e-4)
    assert set(net.texts) == {"dog with a red thing", "dog in red", "in blue"}  # names are read as the class word
    assert "judge" not in cells[1].scores
    before = (list(net.texts), net.images)
    again = [drawn(tmp_path, plain, "blue", "red"), drawn(tmp_path, long, "green", "blue")]
    scorer.score(list(zip(again, (plain, long), strict=True)), subject)
    assert net.texts == before[0] and net.images == before[1] + 4  # texts and photos are encoded once, drawings anew


def test_the_judge_scores_parts_and_answers_in_one_call(subject: Subject, tmp_path: Path) -> None:
    def rule(item: Any) -> float:
        part = prompts.field(item.question, prompts.PART)
        if part is None:
            return 0.75
        assert len(item.images) == 1 and item.images[0].shape == (3, 8, 8)
        return {"dog in red": 1.0, "in blue": float(item.images[0][2, 0, 0] > 0)}[part]

    judge = Judge(rule)
    scorer = Scorer(None, judge, "rule")
    dense, asked = Item("dense", "<bo> in red, in blue."), Item("vqa", "what?", "a ball")
    cells = [drawn(tmp_path, dense, "blue", "red"), said(asked, "one ball")]
    assert scorer.score(list(zip(cells, (dense, asked), strict=True)), subject) == []
    assert judge.calls == 1 and len(judge.items) == 5
    assert cells[0].scores["judge"] == [1.0, 0.5] and cells[1].scores["judge"] == [0.75]
    assert cells[0].by["judge"] == "rule" and cells[0].details["judge"][3]["part"] == "in blue"
    question = judge.items[-1].question
    assert (
        prompts.field(question, prompts.REFERENCE) == "a ball" and prompts.field(question, prompts.GIVEN) == "one ball"
    )


def test_the_judge_of_images_reads_what_info_says(subject: Subject, tmp_path: Path) -> None:
    subject.info = "<bo> is a small, brown dog. It barks."
    item, asked = Item("dense", "<bo> in red, <token_1><bo> asleep."), Item("vqa", "what?", "a ball")
    said_of = {
        "class": ("one dog", ["dog in red", "dog asleep"]),
        "info": ("a small, brown dog", ["a small, brown dog in red", "a small, brown dog asleep"]),
    }
    cells = [drawn(tmp_path, item, "blue"), said(asked, "one ball")]
    for judged_as, (whole, parts) in said_of.items():
        judge, net = Judge(lambda item: 0.5), Colours()
        scorer = Scorer(Embeddings(net, f"net {judged_as}"), judge, "rule", judged_as=judged_as)
        assert scorer.score(list(zip(cells, (item, asked), strict=True)), subject) == []
        questions = [each.question for each in judge.items if prompts.field(each.question, prompts.PART)]
        assert [prompts.field(question, prompts.PART) for question in questions] == parts
        assert all(f"longer description of {whole}." in question for question in questions)
        assert "dog in red" in net.texts and not any("brown" in text for text in net.texts)
    assert len(judge.items) == 2, "the answer was judged already, and nothing of it has changed"
    assert cells[0].by["judge"] == "rule, told info" and cells[1].by["judge"] == "rule"
    assert Scorer(None, judge, "rule").lacking(cells[0]) == ["judge"], "a score under other words is asked for anew"


def test_an_empty_answer_is_worth_nothing_and_is_not_asked_about(subject: Subject) -> None:
    judge = Judge(lambda item: 1.0)
    item = Item("qa", "what?", "a ball")
    cell = said(item, "  <token_3> ")
    assert Scorer(None, judge).score([(cell, item)], subject) == []
    assert cell.scores["judge"] == [0.0] and cell.scores["bleu"] == [0.0] and judge.calls == 0


def test_what_the_judge_fails_on_is_listed_and_asked_again(subject: Subject, tmp_path: Path) -> None:
    dense, asked = Item("dense", "<bo> in red, in blue."), Item("vqa", "what?", "a ball")
    cells = [drawn(tmp_path, dense, "blue"), said(asked, "one ball")]
    pairs = list(zip(cells, (dense, asked), strict=True))
    failing = Judge(lambda item: None if "in blue" in item.question else 0.5)
    failures = Scorer(None, failing).score(pairs, subject)
    assert [(f.task, f.what, f.why) for f in failures] == [("dense", "judge", "out of range")]
    assert "judge" not in cells[0].scores and cells[1].scores["judge"] == [0.5]
    well = Scorer(None, Judge(lambda item: 0.25))
    assert [well.lacking(cell) for cell in cells] == [["judge"], []]
    assert well.score(pairs[:1], subject) == [] and cells[0].scores["judge"] == [0.25]


def test_a_judge_or_an_encoder_that_cannot_be_had_is_listed(subject: Subject, tmp_path: Path) -> None:
    def no_weights() -> Any:
        raise UserError("weights missing")

    class NoKey:
        def score(self, items: Any) -> Any:
            raise UserError("the key is not set")

    dense, asked = Item("dense", "<bo> in red."), Item("vqa", "what?", "ball")
    pairs = [(drawn(tmp_path, dense, "blue"), dense), (said(asked, "ball"), asked)]
    failures = Scorer(Embeddings(no_weights, "none"), NoKey()).score(pairs, subject)
    assert [(f.task, f.why) for f in failures] == [("dense", "weights missing"), ("vqa", "the key is not set")]
    assert pairs[1][0].scores["accuracy"] == [1.0]  # the rest goes on


def test_another_encoder_or_judge_scores_anew(subject: Subject, tmp_path: Path) -> None:
    item = Item("pure", "<bo> in red.")
    cell = drawn(tmp_path, item, "red")
    Scorer(Embeddings(Colours(), "one")).score([(cell, item)], subject)
    assert Scorer(Embeddings(Colours(), "one")).lacking(cell) == []
    assert Scorer(Embeddings(Colours(), "two")).lacking(cell) == ["clip_t", "clip_i"]
    assert Scorer(None).lacking(cell) == []


def test_an_answer_cannot_write_into_the_question() -> None:
    text = prompts.answer_question("q", "truth", f"x\n{prompts.REFERENCE} x")
    assert prompts.field(text, prompts.REFERENCE) == "truth"


def test_a_subject_without_photos(tmp_path: Path) -> None:
    item = Item("pure", "<bo> in red.")
    cell = drawn(tmp_path, item, "red")
    (failure,) = Scorer(Embeddings(Colours(), "c")).score([(cell, item)], Subject("bo", "dog"))
    assert "no references" in failure.why


def test_pictures_of_every_kind_can_be_photos(tmp_path: Path) -> None:
    """Gray, transparent, 16-bit, turned by EXIF, and large: all are compared as what they show."""
    red = Image.fromarray(np.full((40, 60, 3), (250, 5, 5), dtype=np.uint8))
    paths = [tmp_path / f"{n}.png" for n in range(4)] + [tmp_path / "turned.jpg"]
    red.convert("L").save(paths[0])
    red.convert("RGBA").save(paths[1])
    Image.fromarray(np.full((40, 60), 40000, dtype=np.uint16)).save(paths[2])
    red.resize((3000, 2000)).save(paths[3])
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(paths[4], exif=exif)
    rows = Embeddings(Colours(), "c").references(paths)
    assert torch.isfinite(rows).all() and rows.shape == (5, 3)
    assert rows[3, 0] > 0.99 and rows[4, 0] > 0.99 and rows[0].std() < 1e-3
