"""The demo of prompt lists: prompts that do not overlap, a curve, pictures side by side, a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pyunictokens.data.prompts import read_prompts
from pyunictokens.rewards.experts.objects import Objects
from pyunictokens.runs.prompt_demo import SETTINGS, run_prompt_demo
from pyunictokens.toy.composed.model import load_composed, load_detector
from pyunictokens.train import load_policy
from pyunictokens.utils.devices import multiplies_bfloat16
from pyunictokens.utils.errors import UserError
from tests.curves import painted

SHORT = ["steps=2", "groups=2", "group_size=2", "held_out.every=1"]


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with painted():
        found = run_prompt_demo(out, words=SHORT, prompts=12, held_out=13, device="cpu")
    train, test = read_prompts(out / "train.jsonl"), read_prompts(out / "held_out.jsonl")
    assert len(train) == 12 and len(test) == 13 and not {p.text for p in train} & {p.text for p in test}
    assert all(each.columns["objects"] and each.columns["kind"] for each in (*train, *test))
    lines = [json.loads(line) for line in (out / "run" / "held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["means"].keys() >= {"reward", "wholly_right", "share_right", "place"}
    (line, *_) = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["reward_mean"] == pytest.approx(line["parts"]["objects"] + 0.3 * line["parts"]["place"], abs=1e-5)
    assert found.gain == pytest.approx(found.after - found.before)
    assert (
        f"{100 * found.before:.0f} % came out wholly right before" in found.sentence
        and "after 2 steps" in found.sentence
    )
    assert Image.open(found.curve).width > 300 and Image.open(found.pictures).width > 100
    assert (out / "run" / "headroom.json").is_file(), "drawings of the held-out prompts are their reference images"
    assert load_policy(load_composed().model, out / "run" / "best")
    again = run_prompt_demo(out, words=SHORT, prompts=12, held_out=13, device="cpu")
    assert again.after == found.after, "an earlier demo is made anew, the same"
    for wrong in ({"words": ["steps=many"]}, {"world": tmp_path / "nowhere"}):
        with pytest.raises(UserError):
            run_prompt_demo(out, device="cpu", **wrong)
        assert (out / "curve.png").is_file(), "what is refused leaves an earlier demo alone"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no earlier demo"):
        run_prompt_demo(tmp_path / "other", words=SHORT)


@pytest.mark.parametrize(
    ("told", "fast"), [({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False), (None, False)]
)
def test_bfloat16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, bool] | None, fast: bool
) -> None:
    if told is None:  # torch 2.9
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert multiplies_bfloat16() is fast


def test_no_reader_among_the_rewards() -> None:
    """What measures must not be what is rewarded; the settings learn from no guidance and few timesteps."""
    assert SETTINGS.guidance_scale == 0 and SETTINGS.held_out.by == "wholly_right"
    assert Objects.columns == ("objects",)
    assert load_detector("spotter").net.width != load_detector("reader").net.width
