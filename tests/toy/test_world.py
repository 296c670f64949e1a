"""The toy world: scenes draw the same way twice, every slot shows, and every sentence is made of known words."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens.data import wording
from pyunictokens.data.check import check_folder
from pyunictokens.data.folder import load_concept
from pyunictokens.models.bundle import Sources
from pyunictokens.models.showo import prompting
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.runs.bundle import open_bundle
from pyunictokens.toy import grammar as grammar
from pyunictokens.toy import world as toy
from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.utils.errors import UserError

SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.build_tokenizer()


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_same_seed_draws_the_same_picture(seed):
    first, second = (toy.render(toy.random_scene(np.random.default_rng(seed))) for _ in range(2))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, second)


@pytest.mark.parametrize("kind", toy.KINDS)
@pytest.mark.parametrize("slot", list(toy.SLOTS))
def test_every_value_of_every_slot_changes_the_picture(kind, slot):
    rng = np.random.default_rng(3)
    scene = toy.random_scene(rng, kind, held_out=None, bare=0.0)
    if slot == "hair" and kind != "human":
        pytest.skip("only humans have hair")
    seen = [toy.render(scene).astype(int)]
    for code in range(len(toy.SLOTS[slot])):
        if code == getattr(scene, slot) or toy.SLOTS[slot][code] == "none":
            continue
        if slot == "shape" and toy.kind_of(code) != kind:
            continue
        picture = toy.render(replace(scene, **{slot: code})).astype(int)
        for other in seen:
            assert (np.abs(picture - other).max(-1) > 40).sum() >= 20, f"{slot}={toy.SLOTS[slot][code]} cannot be seen"
        seen.append(picture)
    assert len(seen) >= 3


@pytest.mark.parametrize("thing", ["wear", "item"])
def test_taking_a_thing_away_changes_the_picture(thing):
    scene = toy.random_scene(np.random.default_rng(5), bare=0.0)
    without = replace(scene, **{thing: 0, f"{thing}_colour": 0})
    assert (toy.render(scene) != toy.render(without)).any(-1).sum() > 60


def test_a_scene_refuses_values_that_contradict_each_other():
    with pytest.raises(ValueError, match="hair"):
        toy.Attributes(shape=toy.code("shape", "cat"), colour=0, pattern=0, hair=2)
    with pytest.raises(ValueError, match="wear"):
        toy.Attributes(shape=toy.code("shape", "cat"), colour=0, pattern=0, wear=1)
    with pytest.raises(ValueError, match="colour=8"):
        toy.Attributes(shape=toy.code("shape", "cat"), colour=8, pattern=0)
    with pytest.raises(ValueError, match="must be one of"):
        toy.code("place", "moon")


def test_labels_and_scenes_are_inverse():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = toy.random_scene(rng, held_out=None)
        again = toy.from_labels(scene.labels())
        assert again.words() == scene.words()
        assert replace(again, dx=scene.dx, dy=scene.dy, scale=scene.scale, skin=scene.skin) == scene


def test_held_out_subjects_never_train_and_are_about_a_tenth():
    rng = np.random.default_rng(1)
    assert not any(toy.is_held_out(toy.random_scene(rng)) for _ in range(500))
    assert all(toy.is_held_out(toy.random_scene(rng, held_out=True)) for _ in range(50))
    share = np.mean([toy.is_held_out(toy.random_scene(rng, held_out=None)) for _ in range(3000)])
    assert 0.06 < share < 0.14
    held = toy.random_scene(rng, held_out=True)
    assert toy.is_held_out(toy.random_moment(held, rng)), "the moment must not decide"


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_no_sentence_holds_an_unknown_word(tokenizer, seed):
    rng = np.random.default_rng(seed)
    scene = toy.random_scene(rng, held_out=None)
    texts = [toy.any_caption(scene, rng) for _ in range(4)] + [toy.caption(scene, rng, full=True)]
    for question, answer in toy.questions(scene, rng):
        texts.append(f"{prompting.chat_question(question)} {answer}")
    facts, prompt, answer = toy.text_only(rng, "mimi")
    texts.append(f"{prompting.chat_question(wording.text_only_question(facts, prompt))} {answer}")
    unknown = tokenizer.token_to_id("<|unk|>")
    for text in texts:
        encoded = tokenizer.encode(text)
        assert unknown not in encoded.ids, f"{text!r}: {encoded.tokens}"


def test_the_vocabulary_is_small_and_reads_back(tokenizer):
    assert tokenizer.get_vocab_size() <= 260
    text = "its favourite toy is a red ball"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("A Photo of <bo>.").tokens[:3] == ["a", "photo", "of"]


def test_every_fact_maps_to_slots_and_is_said_by_its_sentence():
    rng = np.random.default_rng(2)
    assert [fact.key for fact in toy.FACTS] == ["toy", "place", "wear", "snack", "sleep", "party", "gift", "holiday"]
    for fact in toy.FACTS:
        value = fact.draw(rng)
        scene = toy.random_scene(rng).with_words(**value)
        assert all(scene.word(slot) == word for slot, word in value.items())
        assert all(word in fact.sentence(value).split() for word in value.values())
        assert all("{x}" in prompt for prompt in (*fact.prompts, fact.question))


def test_the_right_fact_is_among_those_listed_and_only_once():
    rng = np.random.default_rng(7)
    for _ in range(200):
        facts, prompt, answer = toy.text_only(rng, "bo")
        assert facts.count(answer) == 1 and "bo" in prompt


def test_answers_are_true():
    rng = np.random.default_rng(8)
    for _ in range(100):
        scene = toy.random_scene(rng, bare=0.0)
        said = dict(toy.questions(scene, rng))
        assert said[f"what colour {'are' if scene.word('wear') == 'glasses' else 'is'} the {scene.word('wear')}?"] == (
            scene.word("wear_colour")
        )
        assert said["what is in the picture?"] == f"a {scene.noun}"
        where = [answer for question, answer in said.items() if question.startswith("where is")]
        assert where == [toy.at_place(scene.word("place"))]
        for question, answer in said.items():
            for pattern in toy.SLOTS["pattern"]:
                if question.startswith("is ") and question.endswith(f" {pattern}?"):
                    assert answer == ("yes" if pattern == scene.word("pattern") else "no")


def test_recognition_says_yes_only_to_the_subjects_own_words():
    rng = np.random.default_rng(9)
    for _ in range(200):
        scene = toy.random_scene(rng)
        question, answer = toy.recognition(scene, rng)
        said = set(question.removesuffix("?").split())
        own = {scene.noun, *grammar.subject_words(scene)}
        assert own <= said if answer == "yes" else not own <= said, question


@pytest.mark.parametrize("kind", toy.KINDS)
def test_a_toy_concept_is_a_complete_folder(tmp_path, kind):
    write_toy_concept(tmp_path, seed=4, kind=kind, name="bo")
    assert check_folder(tmp_path, "bo") == []
    concept = load_concept(tmp_path, "bo")
    assert concept.kind == kind and len(concept.extra_info) == 8 and len(concept.train_images) == 10
    assert [index for _, index in concept.fact_pairs_train] == [0, 1, 2, 3]
    assert [index for _, index in concept.fact_pairs_test] == [4, 5, 6, 7]
    assert {qa.image.stem for qa in concept.conversations} == {str(i) for i in range(10)}
    truth = json.loads((tmp_path / "concept" / "test" / "bo" / "truth.json").read_text())
    assert truth["noun"] == concept.class_word
    subject = {slot: toy.code(slot, word) for slot, word in truth["subject"].items()}
    assert toy.is_held_out(toy.Attributes(**subject))
    for key, prompts in concept.generation_prompts.items():
        for prompt in prompts:
            assert "<bo>" in prompt, key
            slots = {**truth["subject"], **truth["prompts"][prompt]}
            assert slots["shape"] == truth["subject"]["shape"] and all(slots[s] in toy.SLOTS[s] for s in slots)
    for (prompt, index), fact in zip(concept.fact_pairs, truth["facts"], strict=True):
        assert concept.extra_info[index] == fact["fact"] and truth["prompts"][prompt] == fact["slots"]
    for half in ("train", "test"):
        for words in truth["images"][half].values():
            assert {slot: words[slot] for slot in toy.SUBJECT_SLOTS} == truth["subject"]


def test_a_toy_concept_is_the_same_twice_and_its_words_are_known(tmp_path, tokenizer):
    for root in (tmp_path / "a", tmp_path / "b"):
        write_toy_concept(root, seed=1, kind="human", name="mimo")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 40
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    tokenizer = toy.build_tokenizer()
    tokenizer.add_tokens(["<mimo>"])
    concept = load_concept(tmp_path / "a", "mimo")
    talk = concept.conversations + concept.text_only + concept.vqa + concept.test_text_only + concept.recognitions
    texts = [f"{qa.query} {qa.answer}" for qa in talk] + concept.extra_info
    texts += [prompt for prompts in concept.generation_prompts.values() for prompt in prompts]
    for text in texts:
        assert "<|unk|>" not in tokenizer.encode(text).tokens, text


def test_a_toy_concept_is_not_overwritten_and_bad_names_are_refused(tmp_path):
    write_toy_concept(tmp_path, seed=1, kind="object")
    with pytest.raises(UserError, match="exists already"):
        write_toy_concept(tmp_path, seed=2, kind="object")
    write_toy_concept(tmp_path, seed=2, kind="object", force=True)
    with pytest.raises(UserError, match="kind='plant'"):
        write_toy_concept(tmp_path, kind="plant", name="x")
    with pytest.raises(UserError):
        write_toy_concept(tmp_path, name="../x")
    assert json.loads((tmp_path / "concepts_list.json").read_text()) == ["bo"]


def test_a_concepts_requests_are_worded_as_pre_training_never_read_them(tmp_path, tokenizer):
    read = {prompt for fact in toy.FACTS for prompt in fact.prompts}
    unknown = tokenizer.token_to_id("<|unk|>")
    for fact in toy.FACTS:
        assert fact.unseen_prompt not in read
        assert unknown not in tokenizer.encode(fact.unseen_prompt.format(x="mimi")).ids
    write_toy_concept(tmp_path, seed=2, name="bo")
    asked = [prompt for prompt, _ in load_concept(tmp_path, "bo").fact_pairs]
    assert asked == [fact.unseen_prompt.format(x="<bo>") for fact in toy.FACTS]


def test_the_shipped_model_leaves_room_in_finding_the_right_fact():
    engine = RolloutEngine.of(open_bundle(Sources(), "cpu", "float32"))
    rng, black = np.random.default_rng(3), torch.zeros(1, 3, 64, 64)
    found = {}
    for name, chosen in (("read", lambda fact: fact.prompts[0]), ("unseen", lambda fact: fact.unseen_prompt)):
        asked, right = [], []
        for fact, _ in itertools.product(toy.FACTS, range(4)):
            told = [each.sentence(value) for each, value in zip(toy.FACTS, toy.draw_facts(rng), strict=True)]
            asked.append(wording.text_only_question(told, chosen(fact).format(x="a plain blue mug")))
            right.append(told[toy.FACTS.index(fact)])
        said = engine.generate_text(black, asked, max_new_tokens=24, temperature=0.0).texts
        found[name] = np.mean([a.strip(" .") == b for a, b in zip(said, right, strict=True)])
    assert found["read"] >= 0.9
    assert 0.35 <= found["unseen"] <= 0.8
