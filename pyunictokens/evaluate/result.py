"""What an evaluation leaves behind: means with intervals, a record for each item, the drawings; saved and read as JSON.

Every number in the tables is computed from the records, so two results of the same items can be compared item by item:
the same seeds draw the same noise, and the difference of two runs is measured on pairs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import read_json, write_json

FORMAT = 1
POOLED = ("attributes", "subject", "prompted", "clip_t", "clip_i")
"""Measures of drawings that are also given over all drawings of all splits, as ``drawings.<measure>``."""

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


@dataclass
class EvalResult:
    """One evaluation of one concept."""

    concept: str
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked for: samples, seed, steps, guidance scale, splits."""
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Per split one dict an item. Its ``scores`` are lists of numbers by metric, one a drawing or one in all;
    ``group``, where given, says which half of a balanced mean the item belongs to."""
    images: dict[str, list[Tensor]] = field(default_factory=dict)
    """Per split and item the drawings, uint8 [S, 3, H, W], for splits that draw; "photos" holds the concept's own."""
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why."""
    seconds: float = 0.0

    @property
    def metrics(self) -> dict[str, Metric]:
        """``{"split.metric": Metric}``, computed from the records."""
        return {key: balanced_bootstrap(list(groups.values())) for key, groups in _gather(self.records).items()}

    def compare(self, other: EvalResult) -> dict[str, Metric]:
        """Differences ``other − self`` of all metrics both have over the same items, measured on pairs.

        Splits whose prompts or questions differ, or that were drawn another number of times, are left out.
        """
        same = [split for split in self.records if _asked(self.records, split) == _asked(other.records, split)]
        mine, theirs = (_gather({split: result.records[split] for split in same}) for result in (self, other))
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
        files: dict[str, list[dict[str, Any]]] = {}
        for split, items in self.images.items():
            files[split] = []
            for index, drawings in enumerate(items):
                file = folder / f"{split}_{index:03d}.png"
                write_strip(drawings, file)
                files[split].append({"file": f"{folder.name}/{file.name}", "count": len(drawings)})
        write_json(
            path,
            {
                "format": FORMAT,
                "concept": self.concept,
                "settings": self.settings,
                "metrics": {key: asdict(metric) for key, metric in self.metrics.items()},
                "records": self.records,
                "images": files,
                "notes": self.notes,
                "seconds": self.seconds,
            },
        )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvalResult:
        """Read what :meth:`save` wrote. Raises UserError naming the file when it is not such a result."""
        path = Path(path)
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise UserError(f"{path}: not an evaluation result of format {FORMAT} (found {found!r})")
        try:
            images = {
                split: [read_strip(path.parent / item["file"], int(item["count"])) for item in items]
                for split, items in content["images"].items()
            }
            names = ("concept", "settings", "records", "notes", "seconds")
            result = cls(images=images, **{name: content[name] for name in names})
            _gather(result.records)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: not a whole evaluation result ({type(error).__name__}: {error})") from None
        return result


def _gather(records: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """``{"split.metric": {group: values}}``, items in order; and ``drawings.metric`` over all splits."""
    found: dict[str, dict[str, list[float]]] = {}
    for split, items in records.items():
        for item in items:
            for name, values in item["scores"].items():
                for key in (f"{split}.{name}", f"drawings.{name}") if name in POOLED else (f"{split}.{name}",):
                    groups = found.setdefault(key, {})
                    groups.setdefault(str(item.get("group", "")), []).extend(float(value) for value in values)
    return {key: {name: values for name, values in groups.items() if values} for key, groups in found.items()}


def _asked(records: Mapping[str, list[dict[str, Any]]], split: str) -> list[tuple[Any, ...]]:
    return [tuple(item.get(key) for key in ("prompt", "question", "image")) for item in records.get(split, [])]


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8."""
    return ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def write_strip(drawings: Tensor, file: Path) -> None:
    """Write uint8 [S, 3, H, W] side by side into one PNG, whole or not at all."""
    from PIL import Image

    from ..data.images import save_image

    save_image(Image.fromarray(torch.cat(list(drawings), dim=2).permute(1, 2, 0).contiguous().numpy()), file)


def read_strip(file: Path, count: int) -> Tensor:
    """The `count` drawings that :func:`write_strip` wrote, uint8 [count, 3, H, W]. Raises UserError naming the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    except FileNotFoundError:
        raise UserError(f"{file}: no such picture, though its result names it") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{file}: cannot be read as a picture: {error}") from None
    if count < 1 or pixels.shape[1] % count:
        raise UserError(f"{file}: is {pixels.shape[1]} pixels wide, which {count} drawings cannot share")
    return torch.stack(pixels.permute(2, 0, 1).chunk(count, dim=2)).contiguous()
