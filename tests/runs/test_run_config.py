"""Settings of a run that follow from each other."""

from __future__ import annotations

from typing import Any

import pytest

from pyunictokens.runs.baselines import TableConfig
from pyunictokens.runs.run_dir import Run, RunConfig

INFO = {"grpo": {"judged_as": "info"}}


@pytest.mark.parametrize(
    ("preset", "values", "words", "judged_as"),
    [
        ("paper", {}, [], "class"),
        ("toy", {}, [], "info"),
        ("paper", INFO, [], "info"),
        ("paper", {}, ["grpo.judged_as=info"], "info"),
        ("paper", {**INFO, "evaluation": {"samples": 2}}, [], "info"),
        ("paper", {**INFO, "evaluation": {"judged_as": "class"}}, [], "class"),
        ("paper", INFO, ["evaluation.judged_as=class"], "class"),
        ("toy", {"grpo": {"judged_as": "class"}}, [], "class"),
        ("toy", {}, ["grpo.judged_as=class", "evaluation.judged_as = info"], "info"),
    ],
)
def test_evaluation_is_judged_as_training_unless_it_is_said(
    preset: str, values: dict[str, Any], words: list[str], judged_as: str
) -> None:
    made = RunConfig.make(preset, values, words=words)
    assert made.evaluation.judged_as == judged_as
    run = Run(None)
    run.config = {**values, **({"evaluation": {"judged_as": judged_as}} if words else {})}
    assert TableConfig.of(run, preset == "toy").judged_as == judged_as
