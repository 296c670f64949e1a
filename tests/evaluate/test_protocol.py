"""The authors' protocol beside ours: a folder with exactly the published keys fills every column, asked and scored as
their public code does."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyunictokens.data import load_concept
from pyunictokens.evaluate.clip import Embeddings
from pyunictokens.evaluate.core import Asker
from pyunictokens.evaluate.metrics import character_bleu
from pyunictokens.evaluate.protocol import OURS, PROTOCOLS, SYNC_R1, clauses, protocol_named
from pyunictokens.evaluate.runner import TableSettings
from pyunictokens.evaluate.sample_cache import Record
from pyunictokens.evaluate.scoring import Scorer
from pyunictokens.evaluate.suites import open_suite
from pyunictokens.evaluate.tables import TABLE_1
from pyunictokens.evaluate.tasks import TASKS, Item, Subject
from pyunictokens.rewards.judge import parse_score
from pyunictokens.utils.errors import UserError
from tests.evaluate.test_table_command import call, toy  # noqa: F401  (a fixture)
from tests.judge_server import JudgeServer

FACTS = ["<bo>'s toy is a red ball.", "<bo> sleeps in a blue basket.", "<bo> fears the vacuum.", "<bo> loves snow."]
ELSEWHERE = "/mnt/someone/dataset/unictokens_data"


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (72, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def published(root: Path, kind: str = "live_subject") -> Path:
    """A folder as the authors publish it: their keys, their file names, paths of their machine, nothing of ours."""
    train, test = root / "concept" / "train" / "bo", root / "concept" / "test" / "bo"
    for number in range(4):
        picture(train / f"{number}.png", number)
        picture(train / "cropped" / f"{number}.png", number)
        picture(test / f"{number}.png", 10 + number)
        picture(root / "random_images" / f"{number}.png", 20 + number)
    picture(root / "black_512x512.png", 40)
    put(root / "concepts_list.json", ["bo"])
    info = {"class": "dog", "info": "<bo> is a small dog.", "extra_info": FACTS, "generation_type": kind}
    put(train / "info.json", {**info, "num_testing_info": 2})
    prompts = ["<bo> with its toy", "<bo> in its bed", "<bo> hiding", "<bo> out in winter"]
    explicit = ["<bo> with a red ball", "<bo> in a basket", "<bo> hiding from a vacuum", "<bo> out in the snow"]
    put(
        test / "t2i_conditions.json",
        {
            "personalized_driven_generation": prompts,
            "explicit_personalized_driven_generation": explicit,
            "dense_prompt_generation": ["<bo> on a hill, a tree behind it; rain"],
            "personalized_dense_prompt_generation": ["<bo> out in winter, a lamp (lit)"],
            "explicit_personalized_dense_prompt_generation": ["<bo> out in the snow, a lamp (lit)"],
        },
    )

    def asked(kind: str, image: str, question: str, answer: str) -> dict[str, Any]:
        turns = [{"value": f"<image>\n{question}"}, {"value": answer}]
        return {"type": kind, "image": f"{ELSEWHERE}/{image}", "conversations": turns}

    put(
        root / "test_data" / "bo.json",
        [
            asked("rec", "concept/test/bo/0.png", "Is <bo> in the image?", "Yes."),
            asked("rec", "random_images/1.png", "Is <bo> in the image?", "No."),
            asked("vqa", "concept/test/bo/1.png", "What colour is <bo>?", "Brown."),
            asked("text_only", "black_512x512.png", "What does <sks> love?", "Snow."),
        ],
    )
    return root


def test_the_published_keys_alone_are_a_concept_and_fill_every_task(tmp_path: Path) -> None:
    root = published(tmp_path / "data")
    concept = load_concept(root, "bo")
    assert concept.kind == "animal" and concept.num_test_facts == 2  # no conversation_type is published
    subject = open_suite(str(root), protocol=SYNC_R1).subject("bo")
    assert {item.task for item in subject.items} == set(TASKS)
    assert {(item.truth, item.group) for item in subject.of("recognition")} == {("yes", "positive"), ("no", "negative")}
    shown = {item.image for item in subject.items if item.image}
    wanted = [("concept/test/bo", "0.png"), ("random_images", "1.png"), ("concept/test/bo", "1.png")]
    assert shown == {root / folder / name for folder, name in wanted}
    (vqa,), (qa,) = subject.of("vqa"), subject.of("qa")
    assert (vqa.text, vqa.truth) == ("What colour is <bo>?", "Brown.")
    assert (qa.text, qa.truth, qa.image) == ("What does <bo> love?", "Snow.", None)
    assert [path.name for path in subject.references] == ["0.png"] and subject.references[
        0
    ].parent.parent.name == "test"
    assert subject.facts == FACTS[:1]  # a rival is told one fact


def test_pure_generation_has_25_templates_by_generation_type(tmp_path: Path) -> None:
    found = {}
    for kind in ("live_subject", "object"):
        root = published(tmp_path / kind, kind)
        subject = open_suite(str(root), protocol=SYNC_R1).subject("bo")
        found[kind] = [item.text for item in subject.of("pure")]
        assert len(found[kind]) == 25 and all("<bo>" in text for text in found[kind])
        assert any("own words" in note for note in subject.notes)
        assert load_concept(root, "bo").kind == ("animal" if kind == "live_subject" else "object")
    assert found["live_subject"] != found["object"]
    put(tmp_path / "object" / "prompts.json", {"object": ["a {} there"], "live_subject": ["a {} here"]})
    subject = open_suite(str(tmp_path / "object"), protocol=SYNC_R1).subject("bo")
    assert [item.text for item in subject.of("pure")] == ["a <bo> there"]
    assert not any("own words" in note for note in subject.notes)


def test_reasoning_is_asked_as_there_and_scored_against_the_explicit_prompt(tmp_path: Path) -> None:
    subject = open_suite(str(published(tmp_path / "data")), protocol=SYNC_R1).subject("bo")
    short, long = subject.of("reasoning"), subject.of("reasoning_dense")
    assert [item.prompt for item in short] == ["<bo> hiding", "<bo> out in winter"]  # the held-out half
    assert [item.truth for item in short] == ["<bo> hiding from a vacuum", "<bo> out in the snow"]
    assert all(fact.rstrip(".") in item.text for item in (*short, *long) for fact in FACTS)
    assert all("nothing else" in item.text and "ewrite" not in item.text for item in short)
    assert all("Rewrite" in item.text for item in long) and long[0].truth == "<bo> out in the snow, a lamp (lit)"
    record = Record.of("m", subject, short[1])
    record.answer = FACTS[3]
    Scorer(protocol=SYNC_R1).score([(record, short[1])], subject)
    assert record.scores["bleu"] == [pytest.approx(character_bleu("<bo> out in the snow", FACTS[3]))]
    assert record.scores["accuracy"] == [1.0]


def test_images_of_long_prompts_are_drawn_from_the_rewritten_prompt(tmp_path: Path) -> None:
    subject = open_suite(str(published(tmp_path / "data")), protocol=SYNC_R1).subject("bo")
    (long,), short = subject.of("dense_reasoning_generation"), subject.of("reasoning_generation")
    says = {long.asks: "<bo> out in the snow. A lamp.", short[0].asks: "It fears the vacuum. Really."}
    model = SimpleNamespace(answer=lambda images, question: says.get(question, "what?"))
    asker = Asker(lambda: model, lambda path: None)  # type: ignore[arg-type,return-value]
    assert asker.prompt(long)[0] == "<bo> out in the snow. A lamp."  # the whole answer, as the prompt
    assert asker.prompt(short[0])[0] == "<bo> hiding. It fears the vacuum."
    says[long.asks] = "out in the snow"  # an answer that forgets whom it is about joins the prompt
    asker = Asker(lambda: model, lambda path: None)  # type: ignore[arg-type,return-value]
    assert asker.prompt(long)[0] == f"{long.text}. out in the snow."


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a dog, a tree; rain", ["a dog", "a tree", "rain"]),
        ("a half-open door (lit) {wet}/[dry]", ["a half", "open door", "lit", "wet", "dry"]),
        ("<bo>\\x: is it? yes! no.", ["bo", "x", "is it", "yes", "no"]),
        ("plain", ["plain"]),
        ("...", ["..."]),
    ],
)
def test_clauses_are_split_at_the_authors_characters(prompt: str, parts: list[str]) -> None:
    assert clauses(prompt) == parts


class Net:
    """All images look like the first reference only; texts are remembered."""

    size = 8

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, :6] + 2

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.texts += texts
        return torch.ones(len(texts), 6)


class Judge:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, items: Any) -> Any:
        self.asked += [item.question for item in items]
        return [SimpleNamespace(value=0.5, reason="", error=None) for _ in items]


def test_the_same_images_are_scored_anew_under_another_protocol(tmp_path: Path) -> None:
    item = Item("dense", "a <bo>-like hill, a tree", "")
    picture(tmp_path / "0.png", 1)
    subject = Subject("bo", "dog", references=[tmp_path / "0.png"])
    texts, parts, by = {}, {}, {}
    for protocol in (OURS, SYNC_R1):
        net, asked = Net(), Judge()
        scorer = Scorer(Embeddings(net, "net"), asked, "j", protocol=protocol)
        record = Record.of("m", subject, item)
        record.pixels = torch.rand(2, 3, 8, 8) * 2 - 1
        scorer.score([(record, item)], subject)
        texts[protocol.name], parts[protocol.name], by[protocol.name] = net.texts, len(asked.asked), dict(record.by)
        assert scorer.lacking(record) == []
        other = SYNC_R1 if protocol is OURS else OURS
        again = Scorer(Embeddings(net, "net"), asked, "j", protocol=other)
        assert set(again.lacking(record)) == {"judge", "clip_t", "clip_i"}
    assert texts == {"ours": ["a dog-like hill", "a tree"], "sync-r1": ["a dog-like hill, a tree"]}
    assert parts == {"ours": 2 * 2, "sync-r1": 2 * 3}
    assert by["sync-r1"]["judge"] == "j, protocol sync-r1"


@pytest.mark.parametrize(
    ("answer", "truth", "ours", "theirs"),
    [("Yes, it is.", "yes", 1, 1), ("No, yes it is not", "yes", 0, 1), ("I do not know", "no", 0, 1), ("", "no", 0, 0)],
)
def test_yes_and_no_are_looked_for_anywhere(answer: str, truth: str, ours: int, theirs: int) -> None:
    assert (OURS.recognised(answer, truth), SYNC_R1.recognised(answer, truth)) == (bool(ours), bool(theirs))


def test_the_judge_gives_one_of_three_scores() -> None:
    assert [parse_score(f'{{"score": {value}}}', 0, 1, SYNC_R1.steps)[0] for value in (0, 0.5, 1)] == [0, 0.5, 1]
    with pytest.raises(UserError, match=r"is 0\.7: must be one of 0, 0\.5, 1"):
        parse_score('{"score": 0.7}', 0, 1, SYNC_R1.steps)


def test_numbers_of_images_and_seeds_are_the_protocols_unless_said_otherwise() -> None:
    theirs = TableSettings(samples=0, seeds=(), protocol="sync-r1")
    assert [theirs.images(task) for task in ("pure", "dense", "reasoning_generation", "vqa")] == [12, 10, 10, 0]
    assert theirs.images("dense_reasoning_generation") == 20 and theirs.seeds == (3407,)
    said = TableSettings(samples=3, seeds=(5,), protocol="sync-r1")
    assert said.images("pure") == 3 and said.seeds == (5,)
    assert TableSettings().images("pure") == 4 and TableSettings().seeds == (0,)
    with pytest.raises(UserError, match="protocol='theirs': must be one of ours, sync-r1"):
        TableSettings(protocol="theirs")


def test_every_column_of_every_protocol_says_how_it_was_measured() -> None:
    for protocol in PROTOCOLS.values():
        assert all(protocol.how(column.key) for column in TABLE_1), protocol.name
    assert protocol_named("sync-r1").how("pure.clip_i").endswith("12 images a prompt")


def test_another_layout_has_no_such_protocol(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of UnifyBench"):
        open_suite(f"dreambench:{tmp_path}", protocol=SYNC_R1)


def test_a_published_folder_fills_every_column_on_the_command_line(toy: None, tmp_path: Path) -> None:  # noqa: F811
    root = published(tmp_path / "data")
    words = ("samples=1", "limit=1", "timesteps=2", "max_new_tokens=4", "--device", "cpu", "--protocol", "sync-r1")
    out = tmp_path / "table"
    with JudgeServer('{"reason": "so", "score": 0.5}') as server:
        judged = ("--judge-url", server.url, "--judge-model", "toy", "--judge-key-env", "none")
        text = call("evaluate", "table", root, "-m", "ours:base", "-m", "real", *judged, "--out", out, *words)
        assert all((each["temperature"], each["max_tokens"]) == (1e-5, 64) for each in server.requests)
    assert "protocol sync-r1" in text
    content = json.loads((out / "results.json").read_text())
    (ours, _) = content["rows"]["all"]
    lacking = {column.key for column in TABLE_1} - set(ours["metrics"])
    assert not lacking, content["failures"]
    assert set(content["protocol"]) == {column.key for column in TABLE_1}
    assert all(how.startswith("sync-r1: ") for how in content["protocol"].values())
    page, tex = (out / "table.md").read_text(), (out / "table.tex").read_text()
    assert page.count("| sync-r1 |") == len(TABLE_1) and "% protocol sync-r1" in tex
    with open(out / "table.csv", newline="") as file:
        assert {line["protocol"] for line in csv.DictReader(file)} == {"sync-r1"}
    few = ("samples=1", "timesteps=2", "max_new_tokens=4", "tasks=[vqa, pure]", "--device", "cpu")
    single = call(
        "evaluate", "base", "--concept", root, "bo", "--out", tmp_path / "one.json", *few, "--protocol", "sync-r1"
    )
    assert "protocol sync-r1" in single
    kept = json.loads((tmp_path / "one.json").read_text())
    assert kept["settings"]["protocol"] == "sync-r1" and kept["settings"]["seed"] == 3407
    assert len(kept["records"]["pure"]) == 25


# --- older files ---------------------------------------------------------------------------------------------------


def test_a_plain_list_of_prompts_pairs_by_position_where_the_lengths_agree(tmp_path: Path) -> None:
    root = published(tmp_path / "data")
    file = root / "concept" / "test" / "bo" / "t2i_conditions.json"
    put(file, ["<bo> a", "<bo> b", "<bo> c", "<bo> d"])
    paired = load_concept(root, "bo")
    assert paired.fact_pairs == [("<bo> a", 0), ("<bo> b", 1), ("<bo> c", 2), ("<bo> d", 3)]
    put(file, ["<bo> a", "<bo> b"])
    loose = load_concept(root, "bo")
    assert loose.fact_pairs == [] and loose.generation_prompts == {"pure_generation": ["<bo> a", "<bo> b"]}


def test_without_test_data_the_test_half_is_asked(tmp_path: Path) -> None:
    root = published(tmp_path / "data")
    shutil.rmtree(root / "test_data")
    put(root / "concept" / "test" / "bo" / "vqa.json", {"0": [{"query": "What is <bo>?", "answer": "A dog."}]})
    subject = open_suite(str(root), protocol=SYNC_R1).subject("bo")
    assert [item.text for item in subject.of("vqa")] == ["What is <bo>?"] and subject.of("recognition")
    assert any("test_data" in note for note in subject.notes)


def test_foreign_roots_lead_to_the_files_here(tmp_path: Path) -> None:
    root = published(tmp_path / "data")
    picture(root / "more" / "7.png", 7)
    file = root / "test_data" / "bo.json"
    turns = [{"value": "<image>\nWho?"}, {"value": "<bo>."}]
    put(file, [{"type": "vqa", "image": "D:\\x\\unictokens_data\\more\\7.png", "conversations": turns}])
    subject = open_suite(str(root), protocol=SYNC_R1).subject("bo")
    assert [item.image for item in subject.of("vqa")] == [root / "more" / "7.png"]
