"""Means with intervals, comparison on pairs, and results that survive the disk unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pyunictokens.evaluate import EvalResult, bootstrap
from pyunictokens.evaluate.result import balanced_bootstrap
from pyunictokens.utils.errors import UserError


def scored(*values: float, **more: object) -> dict:
    return {"prompt": "p", "scores": {"x": list(values)}, **more}


def test_bootstrap_interval_covers_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = bootstrap(values.tolist())
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found.n == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.04)
    assert found.high == pytest.approx(values.mean() + half, abs=0.04)
    assert bootstrap(values.tolist()) == found  # same seed, same interval


def test_bootstrap_of_equal_values_has_no_width() -> None:
    found = bootstrap([0.25] * 5)
    assert (found.mean, found.low, found.high, found.n) == (0.25, 0.25, 0.25, 5)


def test_balanced_mean_is_the_recognition_weight() -> None:
    """Half the share right on images of the concept, half that on others: saying yes always is worth 0.5."""
    positives, negatives = [1.0, 1, 0, 1], [0.0, 1]
    found = balanced_bootstrap([positives, negatives])
    assert found.mean == pytest.approx(0.5 * 0.75 + 0.5 * 0.5) and found.n == 6
    assert found.low < found.mean < found.high
    assert balanced_bootstrap([[1.0] * 10, [0.0] * 3]).mean == 0.5


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_no_mean_of_nothing_or_of_what_is_no_number(values: list[float]) -> None:
    with pytest.raises(UserError):
        bootstrap(values)


def test_metrics_come_from_the_records() -> None:
    result = EvalResult("bo", records={"vqa": [scored(1, 0), scored(1)], "recognition": [scored(1, group="a")]})
    result.records["recognition"] += [scored(0, group="b"), scored(0, group="b")]
    assert result.metrics["vqa.x"].mean == pytest.approx(2 / 3) and result.metrics["vqa.x"].n == 3
    assert result.metrics["recognition.x"].mean == 0.5  # groups count the same, however large


def test_measures_of_images_are_pooled_over_tasks() -> None:
    result = EvalResult("bo")
    result.records = {split: [{"scores": {"clip_t": values}}] for split, values in (("pure", [1, 1]), ("dense", [0]))}
    assert result.metrics["samples.clip_t"].mean == pytest.approx(2 / 3)
    assert result.metrics["dense.clip_t"].mean == 0


def test_comparison_is_on_pairs() -> None:
    rng = np.random.default_rng(2)
    level = rng.normal(0, 1, 40)
    first = EvalResult("bo", records={"pure": [scored(*level)]})
    second = EvalResult("bo", records={"pure": [scored(*(level + 0.1 + rng.normal(0, 0.05, 40)))]})
    change = first.compare(second)["pure.x"]
    assert 0.05 < change.low < change.mean < change.high < 0.15  # levels spread by 1, their differences by 0.05
    assert second.compare(first)["pure.x"].mean == pytest.approx(-change.mean)


def test_only_the_same_items_are_compared() -> None:
    first = EvalResult("bo", records={"pure": [scored(1)], "vqa": [scored(1)], "qa": [scored(1)]})
    second = EvalResult(
        "bo", records={"pure": [scored(1, 1)], "vqa": [{**scored(1), "prompt": "q"}], "qa": [scored(0)]}
    )
    assert set(first.compare(second)) == {"qa.x"}


def make() -> EvalResult:
    generator = torch.Generator().manual_seed(4)
    strips = [torch.randint(0, 256, (count, 3, 5, 7), generator=generator, dtype=torch.uint8) for count in (1, 3)]
    return EvalResult(
        "bo",
        settings={"samples": 3, "splits": ["pure"]},
        records={"pure": [scored(0.1, 0.2, answer="ein Bär"), scored(0.3)]},
        images={"pure": strips},
        notes=["a note"],
        seconds=1.5,
    )


def test_round_trip(tmp_path: Path) -> None:
    made = make()
    path = made.save(tmp_path / "before.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["before.json", "before_images"]
    read = EvalResult.load(path)
    for name in ("concept", "settings", "records", "notes", "seconds", "metrics"):
        assert getattr(read, name) == getattr(made, name)
    for mine, theirs in zip(made.images["pure"], read.images["pure"], strict=True):
        assert torch.equal(mine, theirs)
    assert json.loads(path.read_text())["metrics"]["pure.x"]["mean"] == pytest.approx(0.2)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = make().save(tmp_path / "after.json")
    whole = json.loads(path.read_text())
    whole.pop("sha256")  # results of earlier versions have none
    for content, message in [
        ("{", "line 1"),
        ("[]", "not an evaluation result"),
        (json.dumps({**whole, "format": 99}), "found 99"),
        (json.dumps({key: value for key, value in whole.items() if key != "records"}), "not a whole evaluation"),
        (json.dumps({**whole, "records": {"pure": [{}]}}), "not a whole evaluation"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            EvalResult.load(path)
        assert "after.json" in str(caught.value)


def test_missing_or_broken_pictures_are_named(tmp_path: Path) -> None:
    path = make().save(tmp_path / "after.json")
    picture = tmp_path / "after_images" / "pure_001.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:40])
    with pytest.raises(UserError, match=r"pure_001\.png: cannot be read"):
        EvalResult.load(path)
    picture.unlink()
    with pytest.raises(UserError, match=r"pure_001\.png: no such image"):
        EvalResult.load(path)
    (tmp_path / "after_images" / "pure_000.png").replace(picture)
    changed = {**json.loads(path.read_text().replace("pure_000", "pure_001")), "sha256": None}
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="is damaged"):
        EvalResult.load(path)
    changed.pop("sha256")
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="7 pixels wide, which 3 images cannot share"):
        EvalResult.load(path)
