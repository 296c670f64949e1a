"""Runs, checkpoints, evaluations, tables and sweeps that an earlier version wrote are opened by this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyunictokens import RolloutEngine
from pyunictokens.cli import app
from pyunictokens.evaluate.report.page import write_report
from pyunictokens.evaluate.result import EvalResult
from pyunictokens.evaluate.table_files import Table
from pyunictokens.models import ConceptTokens
from pyunictokens.models.bundle import Sources
from pyunictokens.runs.run_dir import Run
from pyunictokens.runs.sweep import Status, finished, plan
from pyunictokens.train.metrics import read_metrics
from pyunictokens.utils.profiling import PhaseReport
from tests.curves import painted

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of everything, and the present folder: paths in the runs are relative to it."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", ["run", "lora", "full"])
def test_a_run_draws_and_answers_as_it_did(old: Path, name: str) -> None:
    bundle = Run.find(name).open(Sources(), "cpu", "float32")
    expected = json.loads((old / "expected.json").read_text())[name]
    concept = bundle.concept
    assert concept is not None and concept.name == "bo"
    torch.testing.assert_close(concept.embed.sum(1), torch.tensor(expected["rows"]), atol=1e-4, rtol=0)
    engine = RolloutEngine.of(bundle)
    images = engine.generate_images(
        [concept.expand("A photo of <bo> in the snow.")], samples=2, steps=4, guidance_scale=2.0, seed=3
    )
    assert images.codes.tolist() == expected["codes"]
    pixels = images.pixels
    assert pixels is not None
    question = concept.expand("What colour is <bo>?")
    text = engine.generate_text(pixels[:1], [question], max_new_tokens=6, temperature=0.0, seed=3)
    assert text.texts == [expected["text"]]


def test_generate_takes_an_old_run(old: Path) -> None:
    call("generate", "run", "A photo of <bo>.", "timesteps=2", "--out", "image.png", "--reason", "max_new_tokens=3")
    assert (old / "image.png").is_file()


def test_an_evaluation_loads(old: Path) -> None:
    before, after = EvalResult.load(old / "run" / "before.json"), EvalResult.load(old / "run" / "after.json")
    assert "reasoning.accuracy" in before.compare(after)
    assert after.metrics["vqa.bleu"].n == 40 and len(after.images["pure"]) == 7


def test_a_report_is_made_of_an_old_run(old: Path) -> None:
    with painted():
        text = write_report(old / "run").read_text(encoding="utf-8")
    assert "fact chosen rightly" in text or "reasoning" in text
    assert len(read_metrics(old / "run")) == 4
    assert PhaseReport.load(old / "run" / "phases.json").phases


def test_a_stopped_run_goes_on_to_where_it_would_have_come(old: Path) -> None:
    wanted = ConceptTokens.load(old / "run" / "final" / "concept")
    for path in ("final", "concept", "after.json", "checkpoints/step_000004"):
        place = old / "run" / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    lines = (old / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (old / "run" / "metrics.jsonl").write_text("".join(lines[:3]))  # a line past the checkpoint, as a kill leaves it
    call("train", "--out", "run", "--resume", "--trust")
    found = ConceptTokens.load(old / "run" / "final" / "concept")
    for (name, value), (_, other) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        torch.testing.assert_close(other, value, atol=1e-5, rtol=0, msg=name)
    then = [json.loads(line) for line in lines]
    now = read_metrics(old / "run")
    assert [line["step"] for line in now] == [0, 1, 2, 3]
    for key in ("reward_mean", "loss"):
        assert [line[key] for line in now] == pytest.approx([line[key] for line in then], abs=1e-4)
    after = EvalResult.load(old / "run" / "after.json")
    known = EvalResult.load(OLD / "run" / "after.json")
    for key, metric in known.metrics.items():
        assert after.metrics[key].mean == pytest.approx(metric.mean, abs=1e-4), key


def test_a_finished_part_is_not_done_again(old: Path) -> None:
    """Fingerprints in measured.json still fit, so an evaluation that is there is taken as it is."""
    before = (old / "run" / "before.json").stat().st_mtime_ns
    call("train", "--out", "run", "--resume", "--trust")
    assert (old / "run" / "before.json").stat().st_mtime_ns == before


def test_adapters_go_on(old: Path) -> None:
    """A finished run of adapters is taken up from its checkpoint: nothing is left to do, and the result is written."""
    shutil.rmtree(old / "lora" / "final")
    call("train", "--out", "lora", "--resume", "--trust", "--no-evaluate", "--stages", "none", "--start", "run")
    expected = json.loads((old / "expected.json").read_text())["lora"]
    bundle = Run.find("lora").open(Sources(), "cpu", "float32")
    concept = bundle.concept
    assert concept is not None
    torch.testing.assert_close(concept.embed.sum(1), torch.tensor(expected["rows"]), atol=1e-4, rtol=0)
    images = RolloutEngine.of(bundle).generate_images(
        [concept.expand("A photo of <bo> in the snow.")], samples=2, steps=4, guidance_scale=2.0, seed=3
    )
    assert images.codes.tolist() == expected["codes"]


def test_a_table_loads(old: Path) -> None:
    table = Table.load(old / "table")
    assert table.models == ["ours", "Real images"]
    content: Any = json.loads((old / "table" / "results.json").read_text())
    assert len(table.records) == len(content["cells"]) == 28
    assert "0.039" in call("evaluate", "compare", "table", "table", "--model-a", "ours", "--model-b", "ours")


def test_a_sweep_is_taken_up(old: Path) -> None:
    arguments = ["data", "{name}", "grpo.steps=1", "--rewards", "tests.tiny:tiny_experts", "--preset", "toy"]
    arguments += ["--model", "models/showo", "--vq", "models/vq", "--tokenizer", "models/tokenizer"]
    arguments += ["--config", "small.yaml", "--device", "auto", "--no-evaluate"]
    (job,) = plan("sweep", ["bo"], arguments, grpo=True, evaluate=False, retries=1)
    assert finished(job) and Status.read("sweep", "bo").state == "done"
