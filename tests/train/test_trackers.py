"""`report_to`: the real libraries, each without a network, get every number and every image of a run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from pyunictokens.config.training import GrpoConfig
from pyunictokens.train import read_metrics, trackers, train_grpo
from pyunictokens.train.metrics import MetricsLog
from pyunictokens.train.trackers import KINDS, Trackers, check_trackers
from pyunictokens.utils.errors import MissingExtra, UserError
from tests.cli.calling import only_error
from tests.train.world import World, grpo_config, world

LINES = [{"step": step, "loss": 0.5 - step, "parts": {"ber": 0.25 * step}, "mode": "visual"} for step in range(3)]
NUMBERS = [{"loss": 0.5 - step, "parts/ber": 0.25 * step} for step in range(3)]

RUN = """
import sys
from PIL import Image
from pyunictokens.train.metrics import MetricsLog

kind, lines = sys.argv[1], {lines}
settings = {{"lr": 0.5, "dsog": {{"mu": 0.12}}}}
with MetricsLog("run", report_to=(kind,), settings=settings) as metrics:
    for line in lines[:2]:
        metrics.show("samples/final", Image.new("RGB", (6, 4), (255, 0, line["step"])), line["step"])
        metrics.write(line)
with MetricsLog("run", from_step=2, report_to=(kind,), settings=settings) as metrics:
    metrics.write(lines[2])
"""
"""A run that is cut off after two steps and goes on."""


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


def report(kind: str, folder: Path, then: str = "", **variables: str) -> None:
    """Two steps and one more, in a process of their own: these libraries read their variables when imported. It runs
    the code `then` at last, as the libraries take seconds to import."""
    if find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    command = [sys.executable, "-c", RUN.format(lines=LINES) + then, kind]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(folder / "run")) == 3


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path) -> None:
    report("wandb", tmp_path, WANDB_MODE="offline")
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    key = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert first.name == second.name == f"run-{key}.wandb", "it goes on as the same run"
    begun, gone_on = first.read_bytes(), second.read_bytes()
    for word in (b"loss", b"parts/ber", b"dsog.mu", b"-0.5", b"0.25"):
        assert word in begun
    assert b"-1.5" in gone_on and b"-1.5" not in begun
    images = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/samples/final_*.png"))
    assert [Image.open(file).getpixel((0, 0)) for file in images] == [(255, 0, 0), (255, 0, 1)]


@pytest.mark.slow
def test_trackio_in_a_local_folder(tmp_path: Path) -> None:
    read = "import json; from trackio.sqlite_storage import SQLiteStorage as S;"
    read += "found = [S.get_runs('pyunictokens'), S.get_logs('pyunictokens', 'run')];"
    read += "open('found.json', 'w').write(json.dumps(found))"
    report("trackio", tmp_path, read, TRACKIO_DIR=str(tmp_path / "trackio"))
    runs, logs = json.loads((tmp_path / "found.json").read_text())
    assert runs == ["run"], "it goes on as the same run"
    assert [(log["step"], {name: log[name] for name in ("loss", "parts/ber")}) for log in logs if "loss" in log] == [
        *enumerate(NUMBERS)
    ]
    shown = [log["samples/final"]["file_path"] for log in logs if "samples/final" in log]
    pictures = [Image.open(tmp_path / "trackio" / "media" / path) for path in shown]
    assert [picture.convert("RGB").getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (255, 0, 1)]


@pytest.mark.slow
def test_mlflow_in_a_local_store(tmp_path: Path) -> None:
    store = (tmp_path / "mlruns").as_uri()
    report("mlflow", tmp_path, MLFLOW_TRACKING_URI=store, MLFLOW_ALLOW_FILE_STORE="true")
    (run,) = [folder.parent for folder in (tmp_path / "mlruns").glob("[1-9]*/*/metrics")]
    for name in ("loss", "parts/ber"):
        history = [line.split() for line in (run / "metrics" / name).read_text().splitlines()]
        assert [(int(step), float(value)) for _, value, step in history] == [
            (step, numbers[name]) for step, numbers in enumerate(NUMBERS)
        ]
    assert (run / "params" / "dsog.mu").read_text() == "0.12"
    images = sorted((run / "artifacts" / "images").glob("*.png"), key=lambda file: file.name.partition("step")[2])
    assert [Image.open(file).getpixel((0, 0)) for file in images] == [(255, 0, 0), (255, 0, 1)]


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_run_reports_what_metrics_jsonl_holds_and_its_images(here: World, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train_grpo(**here.fresh(), config=grpo_config(sample_every=2), out_dir=run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = read_metrics(run)
    wanted = {
        (f"{key}/{name}" if name else key, line["step"]): each
        for line in lines
        for key, value in line.items()
        for name, each in (value if isinstance(value, dict) else {"": value}).items()
        if isinstance(each, (int, float)) and not isinstance(each, bool) and key != "step"
    }
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert found == pytest.approx(wanted, rel=1e-6)
    assert [event.step for event in events.Images("samples/final")] == [0, 2, 3]
    image = events.Images("samples/preview")[-1]
    with Image.open(run / "samples" / "step_0003_preview.png") as written:
        assert (image.width, image.height) == written.size
    assert not (run / "trackers.json").exists()


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_none_reports_to_nobody_and_may_be_chosen_later(here: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_grpo(**here.fresh(), config=grpo_config(report_to=("none",)), out_dir=run)
    assert not (run / "tensorboard").exists() and len(read_metrics(run)) == 4
    train_grpo(**here.fresh(), config=grpo_config(report_to=("tensorboard",)), out_dir=run, resume=True)


def test_an_absent_library_is_named_with_its_line_for_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: World
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red star\n")
    for name, kind in KINDS.items():
        monkeypatch.setitem(sys.modules, kind.module, None)
        line = f"pip install 'pyunictokens[{kind.extra}]'"
        with pytest.raises(
            MissingExtra, match=rf"report_to={name}: {kind.module} is not installed: {line}".replace("[", r"\[")
        ):
            check_trackers(("none", name))
    with pytest.raises(MissingExtra):
        train_grpo(**here.fresh(), config=grpo_config(report_to=("wandb",)), out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was begun"
    said = only_error("reinforce", "prompts.txt", "--reward", "jpeg_size", "report_to=wandb,mlflow")
    assert "report_to=wandb: wandb is not installed: pip install 'pyunictokens[wandb]'" in " ".join(said.split())


def test_a_folder_called_like_a_library_is_not_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline wandb leaves a folder wandb/ where it runs; Python would import it."""
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.KINDS, "mine", trackers._Kind(trackers._Wandb, "a_tracker", "mine"))
    with pytest.raises(MissingExtra, match="a_tracker is not installed"):
        check_trackers(("mine",))


def test_what_cannot_begin_or_goes_on_failing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers._TensorBoard, "log", full)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path, report_to=("tensorboard",)) as metrics:
        metrics.write(LINES[0])
        metrics.write(LINES[1])
    assert caplog.text.count("tensorboard takes nothing more ([Errno 28] No space left on device)") == 1
    assert len(read_metrics(tmp_path)) == 2
    monkeypatch.setattr(trackers._TensorBoard, "__init__", full)
    with pytest.raises(UserError, match=r"report_to=tensorboard: cannot begin there .*No space left"):
        Trackers(("tensorboard",), tmp_path)


def test_damaged_names_of_runs_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ("{", "[1]", '{"wandb": 3}'):
        (tmp_path / "trackers.json").write_text(content)
        Trackers((), tmp_path).close()
    assert caplog.text.count("trackers begin a new run") == 2


@pytest.mark.parametrize("words", [("wandb", "wandb"), ("none", "mlflow")])
def test_a_tracker_is_named_once_and_none_alone(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="name each tracker once, and none alone"):
        GrpoConfig(report_to=words)  # type: ignore[arg-type]
