"""What the evaluation measured before it had one core, it measures still: stored/ was written by that version.

stored/numbers.json holds every prompt, seed, sample id, image (as the sum of its levels), answer and score of
`unifybench` and of a table of four models, over the toy and a concept that it never saw; stored/run and stored/table
are files of that version, which must be read, and gone on with.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyunictokens import RolloutEngine
from pyunictokens.data.folder import load_concept
from pyunictokens.evaluate import EvalResult, Table, unifybench
from pyunictokens.evaluate.result import read_means
from pyunictokens.evaluate.tasks import measure_named, task_named
from pyunictokens.models.bundle import Sources
from pyunictokens.runs.bundle import load_scorers, open_bundle
from pyunictokens.toy import concept

STORED = Path(__file__).parent / "stored"


@pytest.fixture(scope="module")
def stored() -> Any:
    return json.loads((STORED / "numbers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept whose requests are worded as in that version, which had no hints of their own."""
    read = tuple(replace(fact, unseen_prompt=fact.prompts[0]) for fact in concept.FACTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concept, "FACTS", read)
        return concept.write_toy_concept(tmp_path_factory.mktemp("data"), seed=1, kind="animal", name="bo")


def close(found: dict[str, list[float]], wanted: dict[str, list[float]], where: object) -> None:
    """All scores that were measured before; new ones may stand beside them."""
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, abs=2e-5), (where, name)


class Heard:
    """An engine that remembers what it was asked to generate."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.model, self.vq = engine, engine.model, engine.vq
        self.look, self.features_side = engine.look, engine.features_side
        self.generate_text = engine.generate_text
        self.calls: list[list[Any]] = []

    def generate_images(self, prompts: list[str], **settings: Any) -> Any:
        self.calls.append([prompts[0], settings["seed"], settings["sample_ids"]])
        return self.engine.generate_images(prompts, **settings)


@pytest.mark.slow
def test_unifybench_gives_the_same_samples_and_scores(stored: Any, data: Path) -> None:
    bench = open_bundle(Sources(), "cpu", "float32")
    experts = load_scorers(bench.sources, bench.device)
    assert experts is not None
    engine = Heard(RolloutEngine.of(bench))
    result = unifybench(
        engine,
        load_concept(data, "bo"),
        None,
        image_text=experts.image_text,
        ensemble=experts.ensemble,
        reader=experts.reader,
        samples=2,
        seed=7,
        steps=2,
        guidance_scale=2.0,
        max_new_tokens=12,
    )
    assert engine.calls == stored["calls"]
    for task, sums in stored["sums"].items():
        images = result.images[task_named(task)]
        for each, wanted in zip(images, sums, strict=True):
            assert [int(one.long().sum()) for one in each] == pytest.approx(wanted, rel=1e-4)
    for task, records in stored["records"].items():
        for record, wanted in zip(result.records[task_named(task)], records, strict=True):
            scores = wanted.pop("scores")
            close(record["scores"], scores, wanted)
            assert {key: value for key, value in record.items() if key not in ("scores", "seen")} == wanted
    metrics = result.metrics
    for key, wanted in stored["metrics"].items():
        metric = metrics[measure_named(key)]
        assert [metric.mean, metric.low, metric.high, metric.n] == pytest.approx(wanted, abs=1e-4), key


def call(*words: object) -> str:
    from pyunictokens.cli import app

    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


@pytest.mark.slow
def test_a_table_gives_the_same_samples_and_scores(stored: Any, data: Path, tmp_path: Path) -> None:
    models = ("-m", "ours:base", "-m", "showo-tp", "-m", "showo-ip", "-m", "real")
    sizes = ("samples=2", "limit=1", "seeds=[3]", "timesteps=2", "guidance_scale=3", "max_new_tokens=12")
    call("evaluate", "table", data, *models, "--out", tmp_path, *sizes, "--device", "cpu", "--no-pages")
    found = {(r.model, r.item, r.seed): r for r in Table.load(tmp_path).records}
    assert len(found) == len(stored["table"])
    for model, task, item, text, group, seed, answer, drawn, sums, scores in stored["table"]:
        record = found[model, item, seed]
        assert (record.task, record.text, record.group) == (task_named(task), text, group)
        assert (record.answer, record.drawn) == (answer, drawn)
        images = record.images() if sums else []
        assert [int(one.long().sum()) for one in images] == pytest.approx(sums, rel=1e-4)
        close(record.scores, scores, (model, task, text))


def test_a_result_of_that_version_is_read(stored: Any) -> None:
    read = EvalResult.load(STORED / "run" / "after.json")
    assert list(read.records) == ["recognition", "dense_reasoning_generation"]
    assert "dense_reasoning_generation" in read.settings["splits"]  # type: ignore[operator]
    assert {task: [tuple(one.shape) for one in images] for task, images in read.images.items()} == {
        "references": [(2, 3, 64, 64)],
        "dense_reasoning_generation": [(2, 3, 64, 64)],
    }
    means = read_means(STORED / "run" / "after.json")
    assert {"samples.clip_i", "dense_reasoning_generation.clip_i"} <= set(means)
    assert means == pytest.approx({key: metric.mean for key, metric in read.metrics.items()})


def test_a_table_of_that_version_is_read_and_gone_on_with(data: Path, tmp_path: Path) -> None:
    shutil.copytree(STORED / "table", tmp_path / "table")
    read = Table.load(tmp_path / "table")
    assert [record.task for record in read.records] == ["pure", "dense_reasoning_generation"]
    assert all(record.images().shape == (1, 3, 16, 16) for record in read.records)
    words = ("samples=1", "limit=1", "seeds=[3]", "--device", "cpu", "--no-pages", "--out", tmp_path / "table")
    with pytest.warns(FutureWarning, match="'dense_rea_gen' is now 'dense_reasoning_generation'"):
        said = call("evaluate", "table", data, "-m", "real", *words, "tasks=[pure, dense_rea_gen]")
    assert "0 of 2 records were new" in said
    assert [record.scores for record in Table.load(tmp_path / "table").records] == [r.scores for r in read.records]
    assert "1 of 2 records were new" in call("evaluate", "table", data, "-m", "real", *words, "tasks=[pure, dense]")
