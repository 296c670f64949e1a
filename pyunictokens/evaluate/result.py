"""What an evaluation leaves behind: means with intervals, a record for each item, the images; saved and read as JSON.

Every number in the tables is computed from the records, so two results of the same items can be compared item by item:
the same seeds draw the same noise, and the difference of two runs is measured on pairs. Names of earlier versions
(splits, "drawings", "photos") are read as what they are called now.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError, needs
from ..utils.files import read_json, sealed, unsealed, write_json
from ..utils.json import Json
from .tasks import ALL_SAMPLES, measure_named, task_named

Item = TypeVar("Item")

FORMAT = 1
POOLED = ("attributes", "subject", "prompted", "clip_t", "clip_i")
"""Measures of images that are also given over all images of all tasks, as ``samples.<measure>``."""
REFERENCES = "references"
"""Stands for the concept's own images among the images of a result."""

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Metric:
    """A mean with its 95 % bootstrap interval over `n` values."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = _RESAMPLES) -> Metric:
    """Mean of `values` and the interval that holds 95 % of the means of values drawn again with replacement."""
    return balanced_bootstrap([values], seed=seed, resamples=resamples)


def balanced_bootstrap(groups: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = _RESAMPLES) -> Metric:
    """Mean of the groups' means, each group counting the same, with its 95 % interval; every group is drawn again by
    itself. Raises UserError for an empty group or a value that is not finite."""
    if not groups or any(len(group) == 0 for group in groups):
        raise UserError(f"groups of {[len(group) for group in groups]} values: a mean needs at least one in each")
    generator = np.random.default_rng(seed)
    means, draws = [], np.zeros(resamples)
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"values {values[~np.isfinite(values)][:3].tolist()}: must be finite numbers")
        means.append(values.mean())
        draws += values[generator.integers(0, len(values), (resamples, len(values)))].mean(axis=1) / len(groups)
    low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Metric(float(np.mean(means)), float(low), float(high), sum(len(group) for group in groups))


class ItemRecord(TypedDict, total=False):
    """One item of a result: what was asked, what came of it."""

    question: str
    image: str
    group: str
    """Which half of a balanced mean the item belongs to."""
    prompt: str
    drawn: str
    """The prompt as the images were generated from it."""
    explicit: str
    """The prompt with what it hints at spelled out."""
    answer: str
    truth: str
    seen: list[dict[str, str]]
    """What the attribute reader saw in each image."""
    scores: dict[str, list[float]]
    """Numbers by measure, one an image or one in all."""


Records: TypeAlias = dict[str, list[ItemRecord]]
"""Records of items by task."""


@dataclass
class EvalResult:
    """One evaluation of one concept."""

    concept: str
    settings: dict[str, Json] = field(default_factory=dict)
    """What was asked for: samples, seed, steps, guidance scale, splits."""
    records: Records = field(default_factory=dict)
    images: dict[str, list[Tensor]] = field(default_factory=dict)
    """Per task and item the images, uint8 [S, 3, H, W], for tasks that generate some; "references" holds the
    concept's own."""
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why."""
    seconds: float = 0.0

    @classmethod
    def merged(cls, parts: Sequence[EvalResult]) -> EvalResult:
        """The whole of results of every len(parts)-th item, each from another first one (`unifybench`'s `share`)."""
        first = parts[0]
        whole = cls(first.concept, first.settings, notes=first.notes, seconds=max(part.seconds for part in parts))
        for task in dict.fromkeys(task for part in parts for task in part.records):
            whole.records[task] = _interleaved([part.records.get(task, []) for part in parts])
        for task in dict.fromkeys(task for part in parts for task in part.images):
            own = [part.images.get(task, []) for part in parts]
            whole.images[task] = own[0] if task == REFERENCES else _interleaved(own)
        return whole

    @property
    def metrics(self) -> dict[str, Metric]:
        """``{"task.measure": Metric}``, computed from the records."""
        return {key: balanced_bootstrap(list(groups.values())) for key, groups in _gather(self.records).items()}

    def compare(self, other: EvalResult) -> dict[str, Metric]:
        """Differences ``other − self`` of all metrics both have over the same items, measured on pairs.

        Tasks whose prompts or questions differ, or with another number of images, are left out.
        """
        same = [task for task in self.records if _asked(self.records, task) == _asked(other.records, task)]
        mine, theirs = (_gather({task: result.records[task] for task in same}) for result in (self, other))
        result = {}
        for key, groups in mine.items():
            second = theirs.get(key, {})
            if {name: len(values) for name, values in groups.items()} == {n: len(v) for n, v in second.items()}:
                pairs = [np.subtract(second[name], values).tolist() for name, values in groups.items()]
                result[key] = balanced_bootstrap(pairs)
        return result

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path` (JSON) and, beside it, a folder of PNG strips named ``<stem>_images``; returns `path`."""
        path = Path(path)
        folder = path.with_name(f"{path.stem}_images")
        files: dict[str, list[dict[str, Json]]] = {}
        for task, items in self.images.items():
            files[task] = []
            for index, images in enumerate(items):
                file = folder / f"{task}_{index:03d}.png"
                write_strip(images, file)
                files[task].append({"file": f"{folder.name}/{file.name}", "count": len(images)})
        content = {
            "format": FORMAT,
            "concept": self.concept,
            "settings": self.settings,
            "metrics": {key: asdict(metric) for key, metric in self.metrics.items()},
            "records": self.records,
            "images": files,
            "notes": self.notes,
            "seconds": self.seconds,
        }
        write_json(path, sealed(content))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvalResult:
        """Read what :meth:`save` wrote. Raises UserError naming the file when it is not such a result."""
        path = Path(path)
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise UserError(f"{path}: not an evaluation result of format {FORMAT} (found {found!r})")
        content = unsealed(content, path)
        try:
            images = {
                REFERENCES if task == "photos" else task_named(task): [
                    read_strip(path.parent / item["file"], int(item["count"])) for item in items
                ]
                for task, items in content["images"].items()
            }
            records = {task_named(task): items for task, items in content["records"].items()}
            settings, notes = dict(content["settings"]), list(content["notes"])
            if "splits" in settings:
                settings["splits"] = [task_named(task) for task in settings["splits"]]
            result = cls(str(content["concept"]), settings, records, images, notes, float(content["seconds"]))
            _gather(result.records)
        except UserError:
            raise
        except Exception as error:  # a file of anybody's: whatever is wrong with it
            raise UserError(f"{path}: not a whole evaluation result ({type(error).__name__}: {error})") from None
        return result


def read_means(path: str | os.PathLike[str]) -> dict[str, float]:
    """``{"task.measure": mean}`` of a saved result, without its records and images. Raises UserError as `load` does."""
    content = read_json(path)
    try:
        content = unsealed(content, path)
        return {measure_named(key): float(metric["mean"]) for key, metric in content["metrics"].items()}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a whole evaluation result ({type(error).__name__}: {error})") from None


def _interleaved(parts: Sequence[list[Item]]) -> list[Item]:
    """The first of each list, the second of each, and so on."""
    longest = max(map(len, parts))
    return [part[place] for place in range(longest) for part in parts if place < len(part)]


def _gather(records: Records) -> dict[str, dict[str, list[float]]]:
    """``{"task.measure": {group: values}}``, items in order; and ``samples.measure`` over all tasks."""
    found: dict[str, dict[str, list[float]]] = {}
    for task, items in records.items():
        for item in items:
            for name, values in item["scores"].items():
                for key in (f"{task}.{name}", f"{ALL_SAMPLES}.{name}") if name in POOLED else (f"{task}.{name}",):
                    groups = found.setdefault(key, {})
                    groups.setdefault(str(item.get("group", "")), []).extend(float(value) for value in values)
    return {key: {name: values for name, values in groups.items() if values} for key, groups in found.items()}


def _asked(records: Records, task: str) -> list[tuple[object, ...]]:
    return [(item.get("prompt"), item.get("question"), item.get("image")) for item in records.get(task, [])]


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8."""
    return ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def write_strip(images: Tensor, file: Path) -> None:
    """Write uint8 [S, 3, H, W] side by side into one PNG, whole or not at all."""
    with needs("evaluate"):
        from PIL import Image

    from ..data.images import save_image

    save_image(Image.fromarray(torch.cat(list(images), dim=2).permute(1, 2, 0).contiguous().numpy()), file)


def read_strip(file: Path, count: int) -> Tensor:
    """The `count` images that :func:`write_strip` wrote, uint8 [count, 3, H, W]. Raises UserError naming the file."""
    with needs("evaluate"):
        from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    except FileNotFoundError:
        raise UserError(f"{file}: no such image, though its result names it") from None
    except Exception as error:  # whatever a damaged image does to its reader
        raise UserError(f"{file}: cannot be read as an image: {type(error).__name__}: {error}") from None
    if count < 1 or pixels.shape[1] % count:
        raise UserError(f"{file}: is {pixels.shape[1]} pixels wide, which {count} images cannot share")
    return torch.stack(pixels.permute(2, 0, 1).chunk(count, dim=2)).contiguous()
