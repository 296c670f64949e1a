"""Where a run's numbers and images are reported to while it runs: TensorBoard, Weights & Biases, Trackio, MLflow.

metrics.jsonl and samples/ are always written; what is told here comes besides and is never read again. Each library
keeps its own variables (`WANDB_MODE`, `TRACKIO_DIR`, `MLFLOW_TRACKING_URI`, …), and is imported only where it is named.
A run that goes on reports to where it began: what the libraries call it stands in trackers.json. A tracker that fails
in the middle of a run is left with a warning; the run goes on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..utils.errors import MissingExtra, UserError, needs
from ..utils.files import read_table_or_warn, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

PROJECT = "pyunictokens"
"""What the project (in MLflow the experiment) is called where no variable of the library names another."""

FILE = "trackers.json"
"""What each library calls this run, in the run's folder."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of the run it begins."""

    folder: Path
    name: str
    settings: Mapping[str, object]
    """Dotted names of settings with their values."""
    from_step: int
    known: str | None
    """What the library called this run before it was cut off."""


class Tracker(Protocol):
    """One library. `key` is what it calls the run, "" where it needs nothing to go on."""

    key: str

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def show(self, name: str, image: Image, step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Events in tensorboard/ of the run's folder."""

    key = ""

    def __init__(self, about: About):
        with needs("train"):
            from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(about.folder / "tensorboard"), purge_step=about.from_step or None)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def show(self, name: str, image: Image, step: int) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of its own, whatever other runs the process has open. The steps are ours: a run that goes on repeats those
    after its last checkpoint, which wandb's own count would refuse."""

    def __init__(self, about: About):
        with needs("wandb"):
            import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.name,
            id=about.known,
            resume="allow",
            config=dict(about.settings),
            reinit="create_new",
        )
        self.key = self._run.id
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def show(self, name: str, image: Image, step: int) -> None:
        self._run.log({name: self._image(image), "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, about: About):
        with needs("trackio"):
            import trackio

        self._image = trackio.Image
        self._run = trackio.init(
            project=PROJECT,
            name=about.known or about.name,
            config=dict(about.settings),
            resume="allow" if about.known else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.key = self._run.name

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def show(self, name: str, image: Image, step: int) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of its own, whatever run `mlflow` has active."""

    def __init__(self, about: About):
        with needs("mlflow"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        if about.known is not None:
            self.key = about.known
            self._client.update_run(self.key, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        self.key = self._client.create_run(experiment, run_name=about.name).info.run_id
        settings = [Param(key, str(value)) for key, value in about.settings.items()]
        for start in range(0, len(settings), 100):  # of one call MLflow takes no more
            self._client.log_batch(self.key, params=settings[start : start + 100])

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        now = round(time.time() * 1000)
        self._client.log_batch(self.key, [self._metric(name, value, now, step) for name, value in numbers.items()])

    def show(self, name: str, image: Image, step: int) -> None:
        self._client.log_image(self.key, image, key=name, step=step)

    def close(self) -> None:
        self._client.set_terminated(self.key)


@dataclass(frozen=True)
class _Kind:
    open: Callable[[About], Tracker]
    module: str
    extra: str


KINDS: Mapping[str, _Kind] = {
    "tensorboard": _Kind(_TensorBoard, "tensorboard", "train"),
    "wandb": _Kind(_Wandb, "wandb", "wandb"),
    "trackio": _Kind(_Trackio, "trackio", "trackio"),
    "mlflow": _Kind(_Mlflow, "mlflow", "mlflow"),
}


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises MissingExtra with the line for pip where a tracker of `report_to` is not installed. Imports nothing."""
    for name in report_to:
        kind = KINDS.get(name)
        spec = find_spec(kind.module) if kind is not None else None
        if kind is not None and (spec is None or spec.origin is None):  # a mere folder of that name has no origin
            raise MissingExtra(
                f"report_to={name}: {kind.module} is not installed: pip install 'pyunictokens[{kind.extra}]', or leave "
                "it out (report_to=none reports to nobody)"
            )


class Trackers:
    """The trackers that `report_to` names, as one."""

    def __init__(
        self,
        report_to: Sequence[str],
        folder: Path,
        *,
        name: str = "",
        settings: Mapping[str, object] | None = None,
        from_step: int = 0,
    ):
        """name: what the run is called; by default as its folder. settings: nested tables are told with dotted names.

        Raises MissingExtra where a library is not installed, UserError where it cannot begin.
        """
        check_trackers(report_to)
        self._open: dict[str, Tracker] = {}
        found = read_table_or_warn(folder / FILE, "trackers begin a new run")
        known = {kind: key for kind, key in found.items() if isinstance(key, str)}
        flat = _dotted(settings or {})
        for kind in [each for each in report_to if each in KINDS]:
            about = About(folder, name or folder.resolve().name, flat, from_step, known.get(kind))
            try:
                self._open[kind] = KINDS[kind].open(about)
            except MissingExtra:
                raise
            except Exception as error:  # of a library, whatever its kind: nothing has been trained yet
                self.close()
                raise UserError(
                    f"report_to={kind}: cannot begin there ({error}): set it up (docs/training.md), or leave it out"
                ) from error
        keys = {kind: tracker.key for kind, tracker in self._open.items() if tracker.key}
        if keys and keys.items() - known.items():
            write_json(folder / FILE, {**known, **keys})

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        self._tell(lambda tracker: tracker.log(numbers, step))

    def show(self, name: str, image: Image, step: int) -> None:
        """An image of a step."""
        self._tell(lambda tracker: tracker.show(name, image, step))

    def close(self) -> None:
        """Have everything written or sent."""
        self._tell(lambda tracker: tracker.close())
        self._open.clear()

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self._open.items()):
            try:
                what(tracker)
            except Exception as error:  # a full disk, a server that is gone: a run does not end for them
                log.warning("%s takes nothing more (%s); metrics.jsonl and samples/ go on", kind, error)
                del self._open[kind]


def _dotted(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
