"""UnifyBench++ over a toy concept with engines that answer and draw by rule, so every score is known beforehand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens.data import load_batch, load_concept, wording
from pyunictokens.data.concept import Concept
from pyunictokens.evaluate import SPLITS, EvalResult, unifybench
from pyunictokens.rewards import Ensemble, RewardBatch
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.toy.scene import SLOTS, code
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import read_json


@pytest.fixture(scope="module")
def concept(tmp_path_factory: pytest.TempPathFactory) -> Concept:
    root = write_toy_concept(tmp_path_factory.mktemp("toy"), seed=3, kind="animal", name="bo")
    return load_concept(root, "bo")


@pytest.fixture(scope="module")
def truth(concept: Concept) -> dict[str, Any]:
    return read_json(concept.test_folder / "truth.json")


class Tokens:
    def expand(self, text: str) -> str:
        return text.replace("<bo>", "<token_0><token_1><bo>", 1)


class Vq:
    """Pictures become their mean colours; 8 pixels a code, like the toy's."""

    downsampling = 8

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))


class Rule:
    """An engine that knows everything, or nothing. Drawings carry their attributes as gray levels of a first row."""

    model = SimpleNamespace(grid=(8, 8), device="cpu")
    vq = Vq()
    features_side = None

    def __init__(self, concept: Concept, truth: dict[str, Any], knows: bool = True):
        self.concept, self.truth, self.knows = concept, truth, knows
        self.asked: list[str] = []
        self.drawn: list[tuple[str, dict[str, Any]]] = []
        facts = concept.extra_info
        black = (-1.0, -1.0, -1.0)
        self.answers = {(qa.query, black): qa.answer for qa in concept.test_text_only}
        for prompt, index in concept.fact_pairs_test:
            self.answers[wording.text_only_question(facts, prompt), black] = facts[index]
        # a long prompt hints at the fact of the short prompt that it begins with
        for long in concept.generation_prompts["personalized_dense_generation"]:
            (index,) = [index for prompt, index in concept.fact_pairs_test if long.startswith(prompt)]
            self.answers[wording.text_only_question(facts, long), black] = facts[index]
        for qa in concept.vqa:
            self.answers[qa.query, tuple(self.vq.encode(load_batch([qa.image], 64))[0].tolist())] = qa.answer

    def look(self, pixels: Tensor) -> Tensor:
        return self.vq.encode(pixels)

    def generate_text(self, images: Tensor, questions: list[str], **settings: Any) -> Any:
        assert len(images) == len(questions) and settings["temperature"] == 0
        self.asked += questions
        known = {question for question, _ in self.answers}
        texts = []
        for look, question in zip(images, questions, strict=True):
            plain = question.replace("<token_0><token_1>", "")
            # what is no known question is recognition: always yes, which is worth one half
            texts.append(self.answers[plain, tuple(look.tolist())] if plain in known else "yes")
        return SimpleNamespace(texts=texts if self.knows else ["nobody knows" if t != "yes" else t for t in texts])

    def generate_images(self, prompts: list[str], *, samples: int, **settings: Any) -> Any:
        (prompt,) = prompts
        self.drawn.append((prompt, settings))
        plain = prompt.replace("<token_0><token_1>", "")
        slots = {**self.truth["subject"], **self.truth["prompts"].get(plain, {})} if self.knows else {"shape": "mug"}
        pixels = torch.zeros(samples, 3, 8, 9)
        for row, slot in enumerate(SLOTS):
            pixels[:, :, 0, row] = code(slot, slots.get(slot, SLOTS[slot][0])) / 16
        return SimpleNamespace(pixels=pixels)


class Reader:
    def attributes(self, pixels: Tensor) -> list[dict[str, str]]:
        codes = (pixels[:, 0, 0] * 16).round().long().tolist()
        return [{slot: SLOTS[slot][code] for slot, code in zip(SLOTS, row, strict=True)} for row in codes]


class Net:
    """Pictures and texts that all look alike; remembers the texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode_image(self, pixels: Tensor) -> Tensor:
        return torch.ones(len(pixels), 2)

    def encode_text(self, texts: list[str]) -> Tensor:
        self.texts += texts
        return torch.ones(len(texts), 2)


class Judge:
    def __init__(self) -> None:
        self.batches: list[RewardBatch] = []

    def score(self, batch: RewardBatch) -> Tensor:
        self.batches.append(batch)
        right = [float(answer == batch.facts[batch.correct]) for answer in batch.answers]
        return torch.tensor(right)


def run(engine: Any, concept: Concept, **more: Any) -> EvalResult:
    settings = {"samples": 2, "steps": 3, "guidance_scale": 2.0, "reader": Reader(), **more}
    return unifybench(engine, concept, settings.pop("tokens", Tokens()), **settings)


def test_one_who_knows_everything(concept: Concept, truth: dict[str, Any]) -> None:
    judge, net = Judge(), Net()
    result = run(Rule(concept, truth), concept, image_text=net, ensemble=Ensemble({"tier": judge}, weights={"tier": 1}))
    assert list(result.records) == list(SPLITS)
    means = {key: metric.mean for key, metric in result.metrics.items()}
    for key in ("vqa", "qa", "reasoning"):
        assert means[f"{key}.accuracy"] == means[f"{key}.bleu"] == 1
    assert means["recognition.weight"] == 0.5
    assert means["reasoning_generation.reward"] == means["reasoning_generation.tier"] == 1
    for split in ("pure", "reasoning_generation", "dense", "dense_reasoning_generation"):
        assert means[f"{split}.attributes"] == means[f"{split}.subject"] == means[f"{split}.prompted"] == 1
        assert means[f"{split}.clip_t"] == pytest.approx(1)
    assert means["samples.attributes"] == 1
    assert result.metrics["pure.attributes"].n == 2 * len(concept.generation_prompts["pure_generation"])


def test_one_who_knows_nothing(concept: Concept, truth: dict[str, Any]) -> None:
    judge = Judge()
    engine = Rule(concept, truth, knows=False)
    result = run(engine, concept, ensemble=Ensemble({"tier": judge}, weights={"tier": 1}))
    means = {key: metric.mean for key, metric in result.metrics.items()}
    assert means["vqa.accuracy"] == means["vqa.exact"] < 0.3 and 0 < means["vqa.bleu"] < 0.6
    assert means["reasoning_generation.reward"] == 0
    assert means["samples.prompted"] < 0.5 and means["samples.subject"] < 0.5
    record = result.records["reasoning_generation"][0]
    assert record["drawn"] == f"{record['prompt']}. nobody knows."  # its own wrong answer is what it draws
    assert record["truth"] == concept.extra_info[concept.fact_pairs_test[0][1]]


def test_only_held_out_facts_are_asked_for(concept: Concept, truth: dict[str, Any]) -> None:
    engine = Rule(concept, truth)
    result = run(engine, concept, splits=["reasoning", "reasoning_generation"])
    held_out = [prompt for prompt, _ in concept.fact_pairs_test]
    assert [record["question"] for record in result.records["reasoning"]] == held_out
    assert [record["prompt"] for record in result.records["reasoning_generation"]] == held_out
    trained = [prompt for prompt, _ in concept.fact_pairs_train]
    assert trained and not any(prompt in text for prompt in trained for text in engine.asked)
    assert len(engine.asked) == len(held_out)  # the answer is asked for once and used twice


@pytest.mark.parametrize("judged_as", ["class", "info"])
def test_rewards_are_judged_by_the_true_fact_in_plain_words(
    concept: Concept, truth: dict[str, Any], judged_as: str
) -> None:
    judge, net = Judge(), Net()
    ensemble, splits = Ensemble({"tier": judge}, weights={"tier": 1}), ["reasoning_generation"]
    run(Rule(concept, truth), concept, ensemble=ensemble, image_text=net, splits=splits, judged_as=judged_as)
    words = concept.class_word if judged_as == "class" else concept.info.removeprefix("<bo> is ").rstrip(".")
    assert concept.class_word in words and len(words.split()) == (1 if judged_as == "class" else 4)
    for batch, (prompt, index) in zip(judge.batches, concept.fact_pairs_test, strict=True):
        plain = prompt.replace("<bo>", words)
        assert batch.prompts == [f"{plain}. {concept.extra_info[index]}."] * 2
        assert batch.facts == concept.extra_info and batch.correct == index and batch.kind == "animal"
        assert batch.references.shape == (10, 3, 64, 64)
    assert not any("<" in text for text in net.texts)
    assert not any(words in text for text in net.texts if judged_as == "info")  # CLIP-T keeps the class word


def test_tokens_are_expanded_and_noise_follows_split_item_and_sample(concept: Concept, truth: dict[str, Any]) -> None:
    engine = Rule(concept, truth)
    run(engine, concept, splits=["pure", "dense"], seed=5)
    prompts, settings = zip(*engine.drawn, strict=True)
    assert all(prompt.count("<token_0><token_1><bo>") == 1 for prompt in prompts)
    ids = [number for one in settings for number in one["sample_ids"]]
    assert len(set(ids)) == len(ids) == 2 * len(prompts)
    assert {one["seed"] for one in settings} == {5}
    again = Rule(concept, truth)
    run(again, concept, splits=["dense"], seed=5)
    first = settings[prompts.index(again.drawn[0][0])]
    assert again.drawn[0][1]["sample_ids"] == first["sample_ids"]  # whatever else is measured


def test_the_same_call_gives_the_same_result(concept: Concept, truth: dict[str, Any], tmp_path: Path) -> None:
    first, second = (run(Rule(concept, truth), concept, image_text=Net()) for _ in range(2))
    assert first.records == second.records and first.metrics == second.metrics
    read = EvalResult.load(first.save(tmp_path / "after.json"))
    assert read.records == first.records and read.notes == first.notes
    assert torch.equal(read.images["dense"][1], first.images["dense"][1])
    assert len(read.images["references"][0]) == 8


def test_a_model_without_the_concept_reads_the_class_word(concept: Concept, truth: dict[str, Any]) -> None:
    engine = Rule(concept, truth)
    run(engine, concept, tokens=None, splits=["pure", "qa"])
    texts = [*engine.asked, *(prompt for prompt, _ in engine.drawn)]
    assert texts and not any("<bo>" in text for text in texts)
    assert any(concept.class_word in text for text in texts)


def test_batches_do_not_change_the_answers(concept: Concept, truth: dict[str, Any]) -> None:
    large, small = (run(Rule(concept, truth), concept, splits=["vqa"], batch=batch) for batch in (16, 3))
    assert large.records == small.records


def test_what_is_missing_is_noted(concept: Concept, truth: dict[str, Any]) -> None:
    result = run(Rule(concept, truth), concept, reader=None, splits=["pure"])
    notes = " ".join(result.notes)
    assert "no image–text encoder" in notes and "no reward models" in notes and "attribute accuracy" in notes
    assert set(result.metrics) == set()
    bare = Concept(**{**vars(concept), "generation_prompts": {}, "test_text_only": []})
    result = run(Rule(concept, truth), bare, splits=["qa", "pure", "vqa"])
    assert "qa: the folder has no questions: not measured" in result.notes
    assert "pure: the folder has no prompts: not measured" in result.notes
    assert set(result.records) == {"vqa"}


def test_progress_reaches_the_end_of_every_split(concept: Concept, truth: dict[str, Any]) -> None:
    told: dict[str, tuple[int, int]] = {}
    run(Rule(concept, truth), concept, progress=lambda split, done, wanted: told.update({split: (done, wanted)}))
    assert set(told) >= {"recognition", "vqa", "qa", "pure", "dense"}
    assert all(done == wanted for done, wanted in told.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples=0: must be an integer in 1"),
        ({"samples": 2.5}, r"samples=2\.5"),
        ({"splits": ["vqa", "vqq"]}, "must be some of recognition, vqa"),
        ({"splits": "vqa"}, "splits='vqa'"),
        ({"splits": []}, "has nothing to measure"),
    ],
)
def test_bad_settings(concept: Concept, truth: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(Rule(concept, truth), concept, **settings)


def test_with_a_real_engine(tmp_path: Path) -> None:
    """A random model through the real rollout engine: batches change nothing, seeds change drawings."""
    from pyunictokens.rollout.engine import RolloutEngine
    from tests.train.world import experts, world

    made = world(tmp_path)
    made.model.attach(made.concept)
    tokenizer = made.tokenizer.with_concept(made.concept.tokens)
    engine = RolloutEngine(made.model, made.vq, tokenizer)

    def measured(**more: Any) -> EvalResult:
        settings = {"samples": 2, "steps": 3, "guidance_scale": 1.0, "max_new_tokens": 4, **more}
        return unifybench(engine, made.data, made.concept, ensemble=experts(), **settings)

    first = measured()
    assert {"vqa", "reasoning", "reasoning_generation"} <= set(first.records)
    assert measured(batch=1).records == first.records
    record = first.records["reasoning_generation"][0]
    assert len(record["scores"]["reward"]) == 2 and record["drawn"].startswith(record["prompt"].rstrip("."))
    other = measured(seed=1, splits=["pure", "reasoning_generation"])
    drawn, again = (each.images["reasoning_generation"][0] for each in (first, other))
    assert not torch.equal(drawn, again) and not torch.equal(drawn[0], drawn[1])
    alone = measured(splits=["reasoning_generation"], samples=1).images["reasoning_generation"][0]
    assert (alone[0].int() - drawn[0].int()).abs().max() <= 1  # the same noise, whatever else is drawn
