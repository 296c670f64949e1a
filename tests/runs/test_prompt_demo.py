"""The demo of prompt lists, on tiny models: prompts that do not overlap, a curve, pictures side by side, a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pyunictokens.data.prompts import read_prompts
from pyunictokens.rewards.experts.objects import Objects
from pyunictokens.runs.prompt_demo import SETTINGS, run_prompt_demo
from pyunictokens.toy.composed.model import composed_folder, load_detector
from pyunictokens.toy.networks import AttributeReader, ToyNetworks
from pyunictokens.toy.prompts import dense_prompts, metrics, reward
from pyunictokens.toy.scene import SLOTS
from pyunictokens.toy.world import words
from pyunictokens.train import load_policy
from pyunictokens.utils.errors import UserError
from tests.tiny import tiny_toy

SHORT = ["steps=2", "groups=2", "group_size=2", "held_out.every=1"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyunictokens.toy.model.load_toy", tiny_toy)
    torch.manual_seed(3)
    nets = ToyNetworks(words()).requires_grad_(False).eval()
    monkeypatch.setattr(ToyNetworks, "from_pretrained", lambda folder=None: nets)


def test_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    found = run_prompt_demo(out, words=SHORT, prompts=12, held_out=13, device="cpu")
    train, test = read_prompts(out / "train.jsonl"), read_prompts(out / "held_out.jsonl")
    assert len(train) == 12 and len(test) == 13 and not {p.text for p in train} & {p.text for p in test}
    asked = [each.columns["asked"] for each in (*train, *test)]
    assert all(
        {"colour", "wear", "wear_colour", "place"} <= set(wanted) and wanted["wear"] != "none" for wanted in asked
    )
    lines = [json.loads(line) for line in (out / "run" / "held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["means"].keys() >= {"reward", "wholly_right", "share_right"}
    assert found.gain == pytest.approx(found.after - found.before)
    assert (
        f"{100 * found.before:.0f} % came out wholly right before" in found.sentence
        and "after 2 steps" in found.sentence
    )
    assert Image.open(found.curve).width > 300 and Image.open(found.pictures).width > 100
    assert (out / "run" / "headroom.json").is_file(), "drawings of the held-out prompts are their reference images"
    assert load_policy(tiny_toy().model, out / "run" / "best")
    again = run_prompt_demo(out, words=SHORT, prompts=12, held_out=13, device="cpu")
    assert again.after == found.after, "an earlier demo is made anew, the same"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no earlier demo"):
        run_prompt_demo(tmp_path / "other", words=SHORT)


def test_in_the_composed_world(tmp_path: Path) -> None:
    """With the shipped model: its prompts name what must be seen, and what measures is not what is rewarded."""
    words = [*SHORT, "steps=1"]
    run_prompt_demo(tmp_path, words=words, prompts=12, held_out=13, device="cpu", world=composed_folder())
    train, test = read_prompts(tmp_path / "train.jsonl"), read_prompts(tmp_path / "held_out.jsonl")
    assert not {p.text for p in train} & {p.text for p in test}
    assert all(each.columns["objects"] and each.columns["kind"] for each in (*train, *test))
    first, last = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert first["means"].keys() >= {"reward", "wholly_right", "share_right"} and last["step"] == 1
    assert load_detector("spotter").net.width != load_detector("reader").net.width


class Told(AttributeReader):
    """Sees what it is told, slot by slot, and is all but sure of it."""

    def __init__(self, seen: list[dict[str, str]]):
        super().__init__()
        self.seen = seen

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {slot: torch.zeros(len(self.seen), len(values)) for slot, values in SLOTS.items()}
        for row, shown in enumerate(self.seen):
            for slot, word in shown.items():
                found[slot][row, SLOTS[slot].index(word)] = 20.0
        return found


def test_reward_and_metrics_compare_what_is_seen_with_what_was_asked() -> None:
    asked = [dict(row["asked"]) for row, _ in dense_prompts(6, 0)]
    seen = [dict(wanted) for wanted in asked]
    seen[0]["pattern"] = next(word for word in SLOTS["pattern"] if word != asked[0]["pattern"])
    told, images = Told(seen), torch.zeros(6, 3, 64, 64)
    count = len(asked[0])
    assert metrics(told)["share_right"](images, asked).tolist() == pytest.approx([1 - 1 / count, 1, 1, 1, 1, 1])
    assert metrics(told)["wholly_right"](images, asked).tolist() == [0, 1, 1, 1, 1, 1]
    assert reward(told)(images, asked).tolist() == pytest.approx([0, 1, 1, 1, 1, 1], abs=1e-4)


def test_a_prompt_asks_only_for_what_it_says() -> None:
    for row, scene in dense_prompts(40, 3):
        asked, text = dict(row["asked"]), str(row["prompt"])
        assert ("hair" in asked) == (scene.kind == "human") and ("item" in asked) == (scene.item > 0)
        said = {slot: word for slot, word in asked.items() if slot != "shape" or scene.kind != "human"}
        assert all(word in text for word in said.values()), (text, asked)


def test_no_reader_among_the_rewards() -> None:
    """What measures must not be what is rewarded; the settings learn from no guidance and few timesteps."""
    assert SETTINGS.guidance_scale == 0 and SETTINGS.held_out.by == "wholly_right"
    assert Objects.columns == ("objects",)
