"""What a run leaves to read: metrics.jsonl (one line a step), and images with their prompts; trackers get both.

A resumed run first takes back the lines after its checkpoint, so the log reads as if the run had never stopped. What
they mean is told in docs/training.md; where else they are reported to is the business of trackers.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import AnyJson, named_errors, parse_json, read_json_lines, write_json, write_text_atomic
from .trackers import Trackers

if TYPE_CHECKING:
    from PIL.Image import Image

    from .collector import RolloutSummary


class MetricsLog:
    """Lines of ``metrics.jsonl`` in a run's folder; the same numbers go to the trackers that `report_to` names, which
    are told what the run is `called` and its `settings`."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        from_step: int = 0,
        name: str = "metrics.jsonl",
        report_to: Sequence[str] = (),
        called: str = "",
        settings: Mapping[str, object] | None = None,
    ):
        self.folder = Path(folder)
        self.file = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            kept = [line for line in _lines(self.file) if _before(line, from_step)]
            write_text_atomic(self.file, "".join(line + "\n" for line in kept))
        self._trackers = Trackers(report_to, self.folder, name=called, settings=settings, from_step=from_step)
        self._handle = self.file.open("ab", buffering=0)  # nothing waits in a buffer to fail once more on closing

    def write(self, values: Mapping[str, object]) -> None:
        """Add one line; `values` holds at least `step`. Numbers that are not finite become null."""
        try:
            line = (json.dumps(_plain(values)) + "\n").encode()  # ASCII: no character that a kill can cut in two
            while line:
                line = line[self._handle.write(line) :]
        except OSError as error:
            raise UserError(
                f"{self.file}: cannot be written ({error.strerror}): make room and go on with --resume"
            ) from error
        numbers = dict(_flat(values))
        self._trackers.log(numbers, int(numbers.pop("step")))

    def show(self, name: str, image: Image, step: int) -> None:
        """Report an image to the trackers."""
        self._trackers.show(name, image, step)

    def sync(self) -> None:
        """Have the lines on disk before a checkpoint counts on them."""
        with named_errors(self.file):
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        self._handle.close()
        self._trackers.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike[str], name: str = "metrics.jsonl") -> list[dict[str, AnyJson]]:
    """All lines of a run's log; a last line that was cut off by a kill is left out."""
    file = Path(folder) / name
    if not file.exists():
        raise UserError(f"{file}: no such file: is this the folder of a run?")
    return read_json_lines(file)


def save_samples(
    folder: str | os.PathLike[str], step: int, rollouts: RolloutSummary, images: Tensor, previews: Tensor | None
) -> dict[str, Image]:
    """Write samples/step_NNNN_final.png (and _preview.png) as grids and their texts as JSON; returns the grids by these
    names. Pixels [R, 3, H, W]."""
    from ..data.images import make_grid, save_image

    base, rewards = Path(folder) / "samples", rollouts.rewards.tolist()
    base.mkdir(parents=True, exist_ok=True)
    columns = math.ceil(math.sqrt(len(rewards)))
    captions = [f"{reward:.3f} {prompt}" for reward, prompt in zip(rewards, rollouts.prompts, strict=True)]
    grids = {"final": make_grid(images, columns, captions)}
    if previews is not None:
        grids["preview"] = make_grid(previews, columns)
    for name, grid in grids.items():
        save_image(grid, base / f"step_{step:04d}_{name}.png")
    save_texts(folder, step, rollouts)
    return grids


def save_texts(folder: str | os.PathLike[str], step: int, rollouts: RolloutSummary) -> None:
    """Write the texts of samples/ as step_NNNN.json."""
    base = Path(folder) / "samples"
    base.mkdir(parents=True, exist_ok=True)
    texts = {"prompts": rollouts.prompts, "answers": rollouts.texts, "rewards": rollouts.rewards.tolist()}
    write_json(base / f"step_{step:04d}.json", {"step": step, **texts})


def _lines(file: Path) -> list[str]:
    """Lines of a log; bytes that are no text, as damage leaves them, make a line that is no JSON."""
    return file.read_text(encoding="utf-8", errors="replace").split("\n")


def _before(line: str, step: int) -> bool:
    try:
        return bool(parse_json(line)["step"] < step)
    except (ValueError, KeyError, TypeError, RecursionError):  # cut off, damaged, or no line of ours
        return False


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + key, float(value)))
    return found
