"""Disks that take no more and files that are not what was written: told with a name, and nothing is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pyunictokens.evaluate.result import EvalResult, read_means
from pyunictokens.models import ConceptTokens
from pyunictokens.train import read_metrics, train_grpo
from pyunictokens.train.metrics import MetricsLog
from pyunictokens.train.policy import load_policy
from pyunictokens.utils import files as io
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.signals import Stopped
from tests.soak import chaos
from tests.train.world import World, grpo_config, tiny_concept, tiny_model, world

pytestmark = pytest.mark.filterwarnings("ignore:.*rows are filled")


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("concept.safetensors", errno.ENOSPC),
        ("metrics.jsonl", errno.ENOSPC),
        pytest.param("step_0000_final.png", errno.EDQUOT, marks=pytest.mark.slow),
        pytest.param("after.json", errno.EROFS, marks=pytest.mark.slow),
        pytest.param("config.yaml", errno.ENOSPC, marks=pytest.mark.slow),
        pytest.param("stages.json", errno.EFBIG, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_takes_no_more_is_named_and_nothing_is_lost(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int
) -> None:
    """The writing of one file fails; the error names it, and the run goes on from there when there is room again."""
    config, out = chaos.settings(steps=2, sample_every=1), tmp_path / "run"
    chaos.run(here, config, tmp_path / "straight")
    write, add = io.write_bytes_atomic, MetricsLog.write

    class Full:
        def writelines(self, data: object) -> None:
            raise OSError(code, os.strerror(code))

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.descriptor)

        def __init__(self, descriptor: int):
            self.descriptor = descriptor

    def full(path: Any, *data: bytes) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if Path(path).name == place:
                patch.setattr(os, "fdopen", lambda descriptor, mode: Full(descriptor))
            write(path, *data)

    monkeypatch.setattr(io, "write_bytes_atomic", full)
    monkeypatch.setattr("pyunictokens.data.images.write_bytes_atomic", full)
    if place == "metrics.jsonl":

        def broken(self: MetricsLog, values: Any) -> None:
            if self.file.name == place:
                self._handle.close()
                self._handle = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
            add(self, values)

        monkeypatch.setattr(MetricsLog, "write", broken)
    with pytest.raises((UserError, OSError), match=place.replace(".", r"\.")) as caught:
        chaos.run(here, config, out)
    assert os.strerror(code) in str(caught.value)
    monkeypatch.undo()
    assert not list(out.rglob(f".{place}*.part"))
    chaos.run(here, config, out)
    assert chaos.contents(out) == chaos.contents(tmp_path / "straight")


def test_a_file_that_may_not_grow_is_named(here: World, tmp_path: Path) -> None:
    """`ulimit -f` at the file of the reference weights: an error with its name, not a traceback."""
    import resource

    limit, config = resource.getrlimit(resource.RLIMIT_FSIZE), grpo_config(steps=1, trainable="full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*reference\.safetensors'"):
            train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "run").glob(".*.part"))
    train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run", resume=True)


def flip(file: Path, place: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(bytes(data))


def test_one_flipped_bit_in_a_checkpoint_is_noticed_wherever_it_is(
    here: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = grpo_config(steps=3, checkpoint_every=1, keep_last=3), tmp_path / "run"
    train_grpo(**here.fresh(), config=config, out_dir=run)
    wanted = read_metrics(run)[2]["loss"]
    flip(run / "checkpoints" / "step_000003" / "tensors.safetensors", 0.9)
    state = run / "checkpoints" / "step_000002" / "state.json"
    text = state.read_text()
    state.write_text(text.replace('"skipped": 0', '"skipped": 1'))
    assert state.read_text() != text
    with caplog.at_level(logging.WARNING):
        result = train_grpo(**here.fresh(), config=config, out_dir=run, resume=True)
    assert "step 3 passed over" in caplog.text and "step 2 passed over" in caplog.text
    assert result.skipped == 0 and read_metrics(run)[2]["loss"] == wanted


def test_one_flipped_bit_in_learned_tokens_is_noticed(tmp_path: Path) -> None:
    concept = tiny_concept()
    concept.save(tmp_path)
    assert torch.equal(ConceptTokens.load(tmp_path).embed, concept.embed)
    flip(tmp_path / "concept.safetensors", 0.95)
    with pytest.raises(UserError, match=r"concept\.safetensors: is damaged"):
        ConceptTokens.load(tmp_path)


@pytest.mark.parametrize("what", ["full", "lora"])
def test_one_flipped_bit_in_what_was_learned_is_noticed(here: World, tmp_path: Path, what: str) -> None:
    train_grpo(**here.fresh(), config=grpo_config(steps=1, trainable=what), out_dir=tmp_path / "run")
    final = tmp_path / "run" / "final"
    load_policy(tiny_model(), final)
    weights = final / ("model/model.safetensors" if what == "full" else "adapter_model.safetensors")
    flip(weights, 0.9)
    with pytest.raises(UserError, match=rf"{weights.name}: is damaged"):
        load_policy(tiny_model(), final)


def test_one_flipped_bit_in_a_table_that_says_its_checksum_is_noticed(tmp_path: Path) -> None:
    records: Any = {"vqa": [{"question": "?", "scores": {"bleu": [0.5]}}]}
    file = EvalResult("bo", {"seed": 3, "parts": {2: 1, 10: 2}}, records).save(tmp_path / "after.json")
    assert EvalResult.load(file).metrics["vqa.bleu"].mean == 0.5 and read_means(file)["vqa.bleu"] == 0.5
    good = file.read_text()
    for damaged in (good.replace("0.5", "0.7"), good.replace('"vqa"', '"qa"'), good.replace("vqa.bleu", "vqa.bleV")):
        file.write_text(damaged)
        for read in (EvalResult.load, read_means):
            with pytest.raises(UserError, match=r"after\.json: is damaged"):
                read(file)
    content = json.loads(good)
    del content["sha256"]
    file.write_text(json.dumps(content))  # of an earlier version
    assert EvalResult.load(file).metrics["vqa.bleu"].mean == 0.5


def test_a_reference_that_was_damaged_is_written_anew(
    here: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = grpo_config(steps=2, trainable="full", checkpoint_every=1)
    straight = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "straight")
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train_grpo(**here.fresh(), config=config, out_dir=run, stop=lambda: True)
    flip(run / "reference.safetensors", 0.9)
    with caplog.at_level(logging.WARNING):
        resumed = train_grpo(**here.fresh(), config=config, out_dir=run, resume=True)
    assert "not the model this run begins with; written anew" in caplog.text
    assert torch.equal(resumed.concept.embed, straight.concept.embed)
    assert (run / "reference.safetensors").read_bytes() == (
        tmp_path / "straight" / "reference.safetensors"
    ).read_bytes()


def test_a_log_cut_in_the_middle_of_a_character_is_read(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0, "answer": "ein Bär\u2028 und\u0085 mehr"})
    assert read_metrics(tmp_path) == [{"step": 0, "answer": "ein Bär\u2028 und\u0085 mehr"}]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 1, "answer": "ein B\u00e4'.encode()[:-1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]
    with MetricsLog(tmp_path, from_step=1) as log:
        log.write({"step": 1})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_damaged_logs_and_markers_are_no_traceback(here: World, tmp_path: Path) -> None:
    """A flipped bit in a log of the stages, a line of thousands of digits, markers and descriptions of another kind."""
    config, out = chaos.settings(steps=2), tmp_path / "run"
    chaos.run(here, config, out)
    log = out / "stages" / "stages.jsonl"
    good = log.read_bytes()
    for wrong in (good.replace(b'"stage"', b'"staGe"', 1), good.replace(b'"step"', b'"steq"', 1), b"9" * 5000 + b"\n"):
        log.write_bytes(wrong)
        chaos.run(here, config, out)
    (out / "metrics.jsonl").write_bytes(b'{"step": ' + b"9" * 5000 + b"}\n" + (out / "metrics.jsonl").read_bytes())
    chaos.run(here, config, out, report=True)
    for content in ("[1]", "3", "null", "{", '{"after": [1]}', '{"after": {"settings": 3}}'):
        (out / "measured.json").write_text(content)
        chaos.run(here, config, out)
    for name, read in (
        ("about.json", lambda: chaos.run(here, config, out, report=True)),
        ("stages/stages.json", lambda: chaos.run(here, config, out)),
        ("before.json", lambda: chaos.run(here, config, out)),
        ("run.json", lambda: chaos.run(here, config, out)),
    ):
        file = out / name
        kept = file.read_bytes()
        for content in (
            "[1]",
            r'{"name": "\ud800", "notes": ["\ud800"]}',
            '{"format": 1}' if "before" in name else "7",
        ):
            file.write_text(content)
            with pytest.raises(UserError, match=file.name.replace(".", r"\.")):
                read()
        file.write_bytes(kept)
    chaos.run(here, config, out)
