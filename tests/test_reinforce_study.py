"""The study of what makes reinforcement learn: runs at equal compute that are kept, and the page that they make."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from experiments import reinforce_study as study
from pyunictokens.config.settings import with_overrides
from pyunictokens.runs.prompt_demo import SETTINGS
from pyunictokens.utils.files import read_json

SMALL = ("groups=2", "group_size=2")


def test_arms_have_equal_compute() -> None:
    for words in study.ARMS.values():
        config = with_overrides(SETTINGS, study.settings(words, 28_800.0))
        assert config.steps * study.row_steps(config) == pytest.approx(28_800, rel=0.06), words
        assert config.steps // config.held_out.every >= study.POINTS
    shown = {name for names in study.GROUPS.values() for name in names}
    assert shown | {next(iter(study.ARMS))} == set(study.ARMS), "every arm has its panel"


@pytest.mark.slow
def test_runs_are_made_once_and_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = list(study.ARMS)[:2]
    monkeypatch.setattr(study, "ARMS", {first: SMALL, other: (*SMALL, "advantage=mean")})
    work, docs = tmp_path / "work", tmp_path / "docs"
    docs.mkdir()
    study.run(work, docs, [0], 160.0, only=[first], prompts=(8, 4))
    study.page(work, docs, 160.0)
    with monkeypatch.context() as patch:
        patch.setattr(study, "run_prompt_demo", lambda *_, **__: pytest.fail("a kept run is made again"))
        study.run(tmp_path / "empty", docs, [0], 160.0, only=[first])
    study.run(work, docs, [0], 160.0, prompts=(8, 4))
    study.page(work, docs, 160.0)
    runs = read_json(docs / study.KEPT)
    assert [(one["arm"], one["seed"], one["row_steps"]) for one in runs] == [(first, 0, 40.0), (other, 0, 40.0)]
    assert [point["step"] for point in runs[0]["curve"]] == [0, 1, 2, 3, 4]
    assert "advantage=mean" in runs[1]["words"] and runs[1]["seconds"] > 0
    text = (docs / "reinforce-study.md").read_text()
    start = runs[0]["curve"][0]["wholly_right"]
    assert f"| {first} | {start:.3f} | {study.gain(runs[0]):+.3f} |" in text and f"| {other} |" in text
    assert Image.open(docs / "images" / "reinforce_study.png").width > 500
    with pytest.raises(SystemExit, match="budget of 40"):
        study.page(work, docs, 40.0)


def _run(arm: str, seed: int, *shares: float) -> dict:
    curve = [{"step": 10 * k, "wholly_right": share} for k, share in enumerate(shares)]
    return {"arm": arm, "seed": seed, "budget": 1.0, "row_steps": 1.0, "seconds": 100.0 + seed, "curve": curve}


def test_a_gain_is_that_of_the_second_half() -> None:
    assert study.gain(_run("any", 0, 0.3, 0.9, 0.4, 0.4, 0.4)) == pytest.approx(0.1)
    assert study.gain(_run("any", 0, 0.3, 0.3, 0.3, 0.4, 0.5)) == pytest.approx(0.1, abs=1e-3)


def test_an_arm_is_called_better_or_worse_where_its_interval_leaves_zero_out() -> None:
    first, better, worse, alike = list(study.ARMS)[:4]
    ends = {first: (0.40, 0.42, 0.41), better: (0.50, 0.52, 0.51), worse: (0.30, 0.31, 0.32), alike: (0.41, 0.40, 0.42)}
    found = [_run(arm, seed, 0.3, end, end) for arm, each in ends.items() for seed, end in enumerate(each)]
    made = {arm.name: arm for arm in study.arms(found)}
    assert made[better].against == pytest.approx(0.1) and made[better].low > 0 > made[worse].high
    assert made[alike].low < 0 < made[alike].high
    text = study.markdown(found)
    assert f"gained: {better} (+0.100)." in text and f"Clearly less: {worse} (-0.100)." in text
