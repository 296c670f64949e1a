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
from pyunictokens.toy.networks import AttributeReader, ToyNetworks
from pyunictokens.toy.prompts import WANTED, metrics, wearing
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
    monkeypatch.setattr("pyunictokens.toy.composed.model.shipped", lambda: False)


def test_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    found = run_prompt_demo(out, words=SHORT, prompts=12, held_out=13, device="cpu")
    train, test = read_prompts(out / "train.jsonl"), read_prompts(out / "held_out.jsonl")
    assert len(train) == 12 and len(test) == 13 and not {p.text for p in train} & {p.text for p in test}
    assert all(set(WANTED) <= set(each.columns) and each.columns["wear"] != "none" for each in (*train, *test))
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


def test_metrics_compare_what_the_reader_says_with_what_was_asked() -> None:
    rows = [row for row, _ in wearing(6, 0)]
    columns = {slot: [row[slot] for row in rows] for slot in WANTED}

    class Told(AttributeReader):
        def read(self, pixels: torch.Tensor) -> torch.Tensor:
            codes = torch.zeros(len(rows), len(SLOTS), dtype=torch.int64)
            for k, row in enumerate(rows):
                for number, slot in enumerate(SLOTS):
                    codes[k, number] = SLOTS[slot].index(row[slot]) if slot in WANTED else 0
            pattern = list(SLOTS).index("pattern")
            codes[0, pattern] = (codes[0, pattern] + 1) % 4
            return codes

    measured = metrics(Told())
    images = torch.zeros(6, 3, 64, 64)
    assert measured["share_right"](images, **columns).tolist() == pytest.approx([2 / 3, 1, 1, 1, 1, 1])
    assert measured["wholly_right"](images, **columns).tolist() == [0, 1, 1, 1, 1, 1]


def test_no_reader_among_the_rewards() -> None:
    """What measures must not be what is rewarded; the settings learn from no guidance and few timesteps."""
    assert SETTINGS.guidance_scale == 0 and SETTINGS.held_out.by == "wholly_right"
    assert Objects.columns == ("objects",)
