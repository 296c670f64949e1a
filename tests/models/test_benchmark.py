"""The benchmark of models end to end on tiny shapes. No test looks at a speed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import models as bench
from pyunictokens.utils.files import read_json


def test_a_smoke_run_measures_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models.json"
    monkeypatch.setattr(sys, "argv", ["models", "--smoke", "--rounds", "1", "--out", str(out)])
    bench.main()
    report = read_json(out)
    assert report["smoke"] is True and [each["name"] for each in report["results"]] == ["images", "texts"]
    assert all(each["ours_seconds"] > 0 and each["peer_seconds"] > 0 for each in report["results"])
    assert "×" not in capsys.readouterr().out, "tiny shapes say nothing of speed"


def test_texts_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = bench.TextSizes(group=2, prompt=3, new_tokens=8, block=4, steps=4, vocabulary=40, width=24, layers=1)
    monkeypatch.setattr(bench, "published_loop", lambda *_: torch.full((1, 8), 39))
    with pytest.raises(RuntimeError, match="the same greedy text"):
        bench.texts_case(sizes, tmp_path)
