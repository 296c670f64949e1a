"""What training draws, counted and compared with the folder it came from, and the sampler's resume."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.data import (
    EpochSampler,
    Recognition,
    UnderstandingItem,
    generation_items,
    load_concept,
    text_only_items,
    understanding_items,
    visual_items,
)
from pyunictokens.utils.errors import UserError


@pytest.fixture
def concept(folder):
    concept = load_concept(folder.root, "bo")
    image = concept.negatives[0]
    concept.recognitions = [Recognition(concept.train_images[0], f"yes {i}?", "Yes.") for i in range(4)]
    concept.recognitions += [Recognition(image, f"no {i}?", "No.", positive=False) for i in range(10)]
    return concept


def sources(items) -> Counter[str]:
    return Counter(item.source for item in items)


def test_understanding_items_are_all_the_folder_has(concept):
    items = understanding_items(concept)
    assert sources(items) == {"conversation": 3, "text_only": 1, "positive": 4, "negative": 10}
    assert items[0] == UnderstandingItem(concept.train_images[0], "What is <bo>?", "<bo> is a dog.", "conversation")
    assert [item.image for item in items if item.source == "text_only"] == [None]
    assert items[-1] == UnderstandingItem(concept.negatives[0], "no 9?", "No.", "negative")
    assert sources(understanding_items(concept, text_only=False, recognitions=False)) == {"conversation": 3}
    assert visual_items(concept) == items[:3]


@pytest.mark.parametrize(("ratio", "kept"), [(0, 0), (0.5, 2), (1, 4), (2.5, 10), (100, 10)])
def test_negatives_per_positive(concept, ratio, kept):
    items = understanding_items(concept, negatives_per_positive=ratio, seed=3)
    assert sources(items)["negative"] == kept
    assert sources(items)["positive"] == 4
    assert items == understanding_items(concept, negatives_per_positive=ratio, seed=3)
    questions = [item.question for item in items if item.source == "negative"]
    assert len(set(questions)) == kept


def test_the_seed_chooses_the_negatives(concept):
    drawn = {
        tuple(item.question for item in understanding_items(concept, negatives_per_positive=1, seed=s))
        for s in range(8)
    }
    assert len(drawn) > 1
    with pytest.raises(UserError, match="negatives_per_positive=-1"):
        understanding_items(concept, negatives_per_positive=-1)


def test_nothing_to_learn_from(concept):
    concept.conversations, concept.text_only, concept.recognitions = [], [], []
    with pytest.raises(UserError, match="no questions with answers"):
        understanding_items(concept)


def test_generation_items(concept):
    items = generation_items(concept)
    assert [item.image for item in items] == concept.train_images
    assert {item.prompt for item in items} == {"A photo of <bo>."}
    assert generation_items(concept, "<bo>, close up")[0].prompt == "<bo>, close up"
    with pytest.raises(UserError, match="must contain <sks> or <bo>"):
        generation_items(concept, "a dog")
    concept.train_images = []
    with pytest.raises(UserError, match="no training images"):
        generation_items(concept)


def test_text_only_items_of_both_halves(concept):
    train, test = text_only_items(concept), text_only_items(concept, "test")
    assert [(item.prompt, item.correct) for item in train] == [("<bo> with its toy", 0), ("<bo> asleep in its bed", 1)]
    assert [(item.prompt, item.answer) for item in test] == [
        ("<bo> hiding from what it fears", "<bo> is afraid of the vacuum cleaner.")
    ]
    for item in train + test:
        assert item.facts == tuple(concept.extra_info) and item.facts[item.correct] == item.answer
    with pytest.raises(UserError, match="split='val'"):
        text_only_items(concept, "val")


def test_a_pair_that_asks_for_no_fact(concept):
    concept.fact_pairs = [("<bo> x", 3)]
    concept.num_test_facts = 0
    with pytest.raises(UserError, match="asks for item 3 of extra_info, which has 3"):
        text_only_items(concept)


@given(st.integers(1, 23), st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_every_item_once_an_epoch(count, batch_size, drop_last, seed):
    if drop_last and batch_size > count:
        with pytest.raises(UserError, match="drops them all"):
            EpochSampler(range(count), batch_size, drop_last=True)
        return
    sampler = EpochSampler(range(count), batch_size, seed=seed, drop_last=drop_last)
    for _ in range(3):
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        items = [item for batch in batches for item in batch]
        assert len(items) == len(set(items)) == (count // batch_size * batch_size if drop_last else count)


def test_order_depends_on_seed_and_epoch_alone():
    def orders(seed):
        sampler = EpochSampler(range(20), 20, seed=seed)
        return [sampler.next() for _ in range(3)]

    assert orders(1) == orders(1)
    assert len({tuple(order) for order in orders(1) + orders(2)}) == 6
    assert EpochSampler("abc", 2, shuffle=False).next() == ["a", "b"]


@given(st.integers(0, 40), st.integers(1, 5))
def test_resume_goes_on_with_the_next_batch(steps, batch_size):
    first = EpochSampler(range(11), batch_size, seed=7)
    for _ in range(steps):
        first.next()
    state = json.loads(json.dumps(first.state_dict()))
    second = EpochSampler(range(11), batch_size, seed=0)
    second.load_state_dict(state)
    assert [second.next() for _ in range(12)] == [first.next() for _ in range(12)]


def test_states_that_do_not_fit():
    sampler = EpochSampler(range(5), 2)
    state = sampler.state_dict()
    with pytest.raises(UserError, match="state is of 6 items, there are 5"):
        sampler.load_state_dict({**state, "items": 6})
    with pytest.raises(UserError, match="an epoch has 3"):
        sampler.load_state_dict({**state, "position": 4})
    with pytest.raises(UserError, match="must hold epoch"):
        sampler.load_state_dict({"seed": 0})


def test_samplers_that_make_no_sense():
    with pytest.raises(UserError, match="list is empty"):
        EpochSampler([])
    with pytest.raises(UserError, match="batch_size=0"):
        EpochSampler([1], 0)
    with pytest.raises(UserError, match="seed=-1"):
        EpochSampler([1], seed=-1)
