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
    assert f"| {first} | {study.gain(runs[0]):+.3f} |" in text and f"| {other} |" in text
    assert Image.open(docs / "images" / "reinforce_study.png").width > 500
    with pytest.raises(SystemExit, match="budget of 40"):
        study.page(work, docs, 40.0)
