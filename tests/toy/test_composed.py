"""The composed world: scenes hold what their prompts say, figures do not cover each other, words are known."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyunictokens.data.images import from_pil
from pyunictokens.data.prompts import read_prompts
from pyunictokens.rewards.base import RewardBatch
from pyunictokens.rewards.experts.objects import Found, check, lies
from pyunictokens.toy.composed.model import ComposedReward, Places, load_composed
from pyunictokens.toy.composed.prompts import caption, prompt, prompt_list, words, write_prompts
from pyunictokens.toy.composed.scene import KINDS, LARGE, NOUNS, PLACES, Composition, empty, random_composition, render
from pyunictokens.toy.composed.spotter import MAP, Detector, Heads, Spotter
from pyunictokens.toy.facts import at_place
from pyunictokens.toy.scene import COLOURS
from pyunictokens.toy.words import build_tokenizer
from pyunictokens.utils.errors import UserError


def truth(scene: Composition) -> list[Found]:
    """What a perfect detector sees."""
    return [Found(e.noun, 1.0, e.box, e.colour, e.pattern) for e in scene.entities]


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_show_what_their_prompts_ask_for(kind: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        text, objects, scene = prompt(kind, rng)
        assert all(check(objects, truth(scene), torch.zeros(3, 64, 64))), text
        assert 1 <= len(scene.entities) <= 4 and sum(e.noun in LARGE for e in scene.entities) <= 2
        for entity in scene.entities:
            left, top, right, bottom = entity.box
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
        boxes = [entity.box for entity in scene.entities]
        for k, a in enumerate(boxes):
            for b in boxes[k + 1 :]:
                apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
                assert apart or scene.relation == "on"
        if scene.relation:
            assert lies(boxes[0], scene.relation, boxes[1])


def test_a_wrong_scene_does_not_pass() -> None:
    rng, wrong = np.random.default_rng(4), 0
    rows = [prompt("binding", rng) for _ in range(40)]
    for (_, objects, scene), (_, _, other) in pairwise(rows):
        swapped = [
            Found(e.noun, 1.0, e.box, o.colour, e.pattern)
            for e, o in zip(scene.entities, scene.entities[::-1], strict=True)
        ]
        assert not all(check(objects, swapped, torch.zeros(3, 64, 64))), "colours of the two are told apart"
        wrong += not all(check(objects, truth(other), torch.zeros(3, 64, 64)))
    assert wrong == 39


def test_the_reward_counts_the_whole_more_than_its_parts() -> None:
    """A right image is worth 1; one that is half right a sixth, so parts are not gained at the price of the whole."""
    cat, ball = Found("cat", 1.0, (0, 0, 20, 20), "red"), Found("ball", 1.0, (30, 0, 40, 9), "blue")
    asked = [{"class": "cat"}, {"class": "ball"}]
    batch = RewardBatch(torch.zeros(3, 3, 64, 64), prompts=["a cat and a ball"] * 3, columns={"objects": [asked] * 3})
    reward = ComposedReward(lambda pixels: [[cat, ball], [cat], []])
    assert reward.score(batch).tolist() == pytest.approx([1.0, 0.5 / 3, 0.0])


def test_the_place_is_read_behind_the_figures_and_through_the_tokenizer() -> None:
    """Every scene shows its own place and no other, drawn and as the image tokenizer gives it back; a prompt that names
    none is right anywhere."""
    rng = np.random.default_rng(6)
    scenes = [random_composition(rng, "dense") for _ in range(36)]
    drawn = torch.stack([from_pil(Image.fromarray(render(scene))) for scene in scenes])
    vq = load_composed().vq
    with torch.no_grad():
        back = vq.decode(vq.encode(drawn)).clamp(-1, 1)
    own, none = [scene.place for scene in scenes], [""] * len(scenes)
    others = [PLACES[(PLACES.index(place) + 1) % len(PLACES)] for place in own]
    for images in (drawn, back):
        for named, right in ((own, 1.0), (others, 0.0), (none, 1.0)):
            batch = RewardBatch(images, prompts=["a cat"] * len(scenes), columns={"place": named})
            assert Places().score(batch).tolist() == [right] * len(scenes)
    with pytest.raises(UserError, match="the prompts have no column place"):
        Places().score(RewardBatch(drawn, prompts=["a cat"] * len(scenes)))


def test_positions_and_sizes_vary() -> None:
    rng = np.random.default_rng(5)
    scenes = [random_composition(rng, "single") for _ in range(60)]
    middles = np.array([[(e.box[0] + e.box[2]) / 2, (e.box[1] + e.box[3]) / 2] for s in scenes for e in s.entities])
    assert middles.std(0).min() > 5
    assert len({round(s.entities[0].scale, 2) for s in scenes}) > 10


def test_the_same_seed_gives_the_same_drawing_and_json_keeps_it() -> None:
    one, other = (random_composition(np.random.default_rng(9)) for _ in range(2))
    again = Composition.from_json(json.loads(json.dumps(one.to_json())))
    assert one == other == again and np.array_equal(render(one), render(again))
    picture = render(one)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    covered = (picture != empty(one.place)).any(-1)
    for entity in one.entities:
        left, top, right, bottom = map(round, entity.box)
        assert covered[max(0, top) : bottom, max(0, left) : right].mean() > 0.25
        covered[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = False  # outlines do not shrink
    assert covered.sum() == 0, "nothing is drawn outside of the boxes"


def test_captions_know_their_words() -> None:
    tokenizer = build_tokenizer(words())
    unknown, rng = tokenizer.token_to_id("<|unk|>"), np.random.default_rng(1)
    texts = [caption(random_composition(rng), rng)[0] for _ in range(400)]
    assert all(unknown not in tokenizer.encode(text).ids for text in texts)
    assert max(len(tokenizer.encode(text).ids) for text in texts) <= 44
    assert len(set(texts)) > 350


def test_prompt_lists(tmp_path: Path) -> None:
    rows = prompt_list(70, 1)
    assert len({row["prompt"] for row in rows}) == 70 and {row["kind"] for row in rows} == set(KINDS)
    write_prompts(tmp_path, train=35, held_out=14)
    train, test = read_prompts(tmp_path / "train.jsonl"), read_prompts(tmp_path / "held_out.jsonl")
    assert len(train) == 35 and len(test) == 14 and not {p.text for p in train} & {p.text for p in test}
    for each in test:
        assert Path(str(each.columns["reference_image"])).is_file() and each.columns["objects"]
    for each in (*train, *test):
        place = str(each.columns["place"])
        assert place in ("", *PLACES) and any(at_place(name) in each.text for name in PLACES) == bool(place)
        assert not place or each.text.endswith(f" {at_place(place)}.")


def test_a_detector_reads_the_map() -> None:
    """From a network that says exactly what is where."""
    scene = random_composition(np.random.default_rng(11), "two")
    heat = torch.full((2, len(NOUNS), MAP, MAP), -6.0)
    colours, patterns, reach = (
        torch.zeros(2, len(COLOURS), MAP, MAP),
        torch.zeros(2, 3, MAP, MAP),
        torch.zeros(2, 4, MAP, MAP),
    )
    for number, entity in enumerate(scene.entities):
        left, top, right, bottom = (edge / 4 for edge in entity.box)
        x, y = int((left + right) / 2), int((top + bottom) / 2)
        heat[0, NOUNS.index(entity.noun), y, x] = 3.0 + number
        heat[0, (NOUNS.index(entity.noun) + 1) % len(NOUNS), y, max(0, x - 1)] = 1.0  # a weaker one beside it
        colours[0, COLOURS.index(entity.colour), y, x] = 1.0
        reach[0, :, y, x] = torch.tensor([x + 0.5 - left, y + 0.5 - top, right - x - 0.5, bottom - y - 0.5])

    class Told(Spotter):
        def forward(self, pixels: torch.Tensor) -> Heads:
            return Heads(heat, colours, patterns, reach)

    seen = Detector(Told(8))(torch.zeros(2, 3, 128, 128))
    assert [f.label for f in seen[0]] == [e.noun for e in scene.entities[::-1]] and seen[1] == []
    for mine, entity in zip(seen[0], scene.entities[::-1], strict=True):
        assert mine.colour == entity.colour and mine.pattern == "plain"
        assert mine.box == pytest.approx([2 * edge for edge in entity.box], abs=1e-3)


def test_a_spotter_learns_in_a_few_steps() -> None:
    torch.manual_seed(0)
    net = Spotter(16)
    heads = net(torch.rand(3, 3, 32, 32))
    assert heads.nouns.shape == (3, len(NOUNS), MAP, MAP) and heads.reach.shape == (3, 4, MAP, MAP)
    assert heads.nouns.detach().sigmoid().mean() < 0.1
