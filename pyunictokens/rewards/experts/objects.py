"""Object checks in the manner of GenEval (Ghosh et al., 2023): are the things there, as many, so coloured, so placed?

A prompt's column `objects` lists what must be seen:

    [{"class": "dog", "count": 2}, {"class": "ball", "colour": "red", "position": ["left of", 0]}]

`position` is relative to the object of that number in the list: left of, right of, above, below, on. A detector of
torchvision finds boxes; a colour is the nearest named one to the middle of a box. A detector of your own may tell
colours and patterns itself (`Found`). The score is the share of what was asked for (each class, count, colour and
position is one), or with `strict: true` whether all of it is right, which is GenEval's own measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ...models.checkpoint import load_tensors
from ...utils.errors import UserError, require
from ..base import Device, RewardBatch
from ..registry import register
from .plain import COLOURS

PLACES = ("left of", "right of", "above", "below", "on")


@dataclass(frozen=True)
class Found:
    """What a detector sees in one image."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """left, top, right, bottom in pixels."""
    colour: str = ""
    """Empty: taken from the pixels."""
    pattern: str = ""
    """Empty: this detector knows none."""


Detector = Callable[[Tensor], list[list[Found]]]
"""From pixels [B, 3, H, W] in [0, 1] to what is in each image."""

Wanted = TypedDict(
    "Wanted", {"class": str, "count": int, "colour": str, "pattern": str, "position": tuple[str, int]}, total=False
)
"""An object of the column `objects`; all but its class may be left out."""


@dataclass(frozen=True)
class ObjectsConfig:
    """A detector of torchvision, and when its boxes count."""

    path: str
    """The detector's weight file (its state dict)."""
    model: str = "maskrcnn_resnet50_fpn_v2"
    """torchvision's name of the detector."""
    classes: str = ""
    """A file with the detector's class names, one a line in the order of its labels, the background first; empty: the
    91 names of COCO."""
    score: float = 0.3
    """Boxes below this score do not count."""
    least: int = 256
    """Images are enlarged until the shorter side has as many pixels."""
    strict: bool = False
    """Whether all must be right (1 or 0), or the share of what is right counts."""


@register("objects", label="Objects: GenEval", settings=ObjectsConfig)
class Objects:
    """Scores what a detector finds against the prompt's column `objects`."""

    columns = ("objects",)

    def __init__(self, detector: Detector, strict: bool = False):
        self._detector, self.strict = detector, strict

    @classmethod
    def from_settings(cls, settings: ObjectsConfig, device: Device) -> Objects:
        if not Path(settings.path).expanduser().is_file():
            raise UserError(f"{settings.path}: no such file: give the weight file of {settings.model}")
        return cls(TorchvisionDetector(settings, device), settings.strict)

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [0, 1]. Raises UserError naming the prompt whose objects cannot be read."""
        wanted = batch.columns.get("objects")
        if wanted is None:
            raise UserError("the prompts have no column objects: what should be seen?")
        asked = [_objects(wanted[row], batch.prompts[row]) for row in range(len(batch))]
        pixels = ((batch.images.float() + 1) / 2).clamp(0, 1)
        seen = self._detector(pixels)
        scores = []
        for row, objects in enumerate(asked):
            checks = check(objects, seen[row], pixels[row])
            share = sum(checks) / len(checks)
            scores.append(float(share == 1) if self.strict else share)
        return torch.tensor(scores)


def check(wanted: Sequence[Wanted], seen: Sequence[Found], pixels: Tensor) -> list[bool]:
    """What of `wanted` is right in an image [3, H, W] in [0, 1]: for each object whether it is there, then its count,
    its colour and pattern, and its position, as far as they are asked for."""
    checks: list[bool] = []
    chosen: list[list[Found]] = []
    for each in wanted:
        boxes = sorted((f for f in seen if f.label == each["class"]), key=lambda f: -f.score)
        coloured = boxes
        if "colour" in each:
            coloured = [f for f in boxes if (f.colour or colour_of(f.box, pixels)) == each["colour"]]
        if "pattern" in each:
            coloured = [found for found in coloured if found.pattern == each["pattern"]]
        count = int(each.get("count", 1))
        checks.append(bool(boxes))
        if "count" in each:
            checks.append(len(boxes) == count)
        if "colour" in each or "pattern" in each:
            checks.append(len(coloured) >= count)
        chosen.append(coloured[:count] or boxes[:count])
    for number, each in enumerate(wanted):
        if "position" in each:
            where, other = each["position"]
            mine, theirs = chosen[number], chosen[int(other)]
            checks.append(bool(mine and theirs) and all(lies(a.box, where, b.box) for a in mine for b in theirs))
    return checks


def lies(a: Sequence[float], where: str, b: Sequence[float]) -> bool:
    """Whether the middle of box `a` lies `where` of the middle of box `b`, by more than a tenth of both boxes' size."""
    dx, dy = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    width, height = ((a[i + 2] - a[i] + b[i + 2] - b[i]) / 2 for i in (0, 1))
    return {
        "left of": dx < -0.1 * width,
        "right of": dx > 0.1 * width,
        "above": dy < -0.1 * height,
        "below": dy > 0.1 * height,
        "on": dy < -0.1 * height and abs(a[3] - b[1]) < 0.5 * height and abs(dx) < 0.5 * width,
    }[where]


def colour_of(box: Sequence[float], pixels: Tensor) -> str:
    """The named colour nearest to the median of the middle half of a box; pixels [3, H, W] in [0, 1]."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    x0, x1 = round(left + width / 4), round(right - width / 4)
    y0, y1 = round(top + height / 4), round(bottom - height / 4)
    part = pixels[:, max(0, y0) : max(y1, y0 + 1), max(0, x0) : max(x1, x0 + 1)]
    if part.numel() == 0:
        return ""
    middle = part.flatten(1).median(dim=1).values.cpu() * 255
    names = list(COLOURS)
    gaps = (torch.tensor([COLOURS[name] for name in names], dtype=torch.float32) - middle).pow(2).sum(1)
    return names[int(gaps.argmin())]


def _objects(given: object, prompt: str) -> list[Wanted]:
    """The column's value, checked. Raises UserError naming the prompt."""
    where = f"prompt {prompt!r}: objects"
    if not isinstance(given, (list, tuple)) or not given:
        raise UserError(f"{where}={given!r}: must be a list of objects, as in [{{'class': 'dog', 'count': 2}}]")
    for each in given:
        if not isinstance(each, Mapping) or not isinstance(each.get("class"), str):
            raise UserError(f"{where}: {each!r}: must be a table with the key class")
        strange = sorted(set(each) - {"class", "count", "colour", "pattern", "position"})
        if strange:
            raise UserError(f"{where}: {strange[0]}: must be class, count, colour, pattern or position")
        count, colour, position = each.get("count", 1), each.get("colour", "red"), each.get("position")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{where}: count={count!r}: must be a whole number ≥ 1")
        if colour not in COLOURS:
            raise UserError(f"{where}: colour={colour!r}: must be one of {', '.join(COLOURS)}")
        if position is not None:
            pair = isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in PLACES
            if not pair or not isinstance(position[1], int) or not 0 <= position[1] < len(given):
                raise UserError(
                    f"{where}: position={position!r}: must be one of {', '.join(PLACES)} and a number of the list"
                )
    return list(given)


class TorchvisionDetector:
    """A detector of torchvision with weights from a file; read when it is first asked."""

    def __init__(self, settings: ObjectsConfig, device: Device = "cpu"):
        self.settings, self.device = settings, torch.device(device)
        self._net: Any = None
        self._names: list[str] = []

    def to(self, device: Device) -> None:
        self.device = torch.device(device)
        if self._net is not None:
            self._net.to(self.device)

    def _load(self) -> Any:
        if self._net is None:
            models = require("torchvision.models", "rewards")
            detection = require("torchvision.models.detection", "rewards")
            settings = self.settings
            if settings.model not in models.list_models(module=detection):
                raise UserError(
                    f"model={settings.model!r}: torchvision has no such detector; it has "
                    f"{', '.join(models.list_models(module=detection))}"
                )
            if settings.classes:
                self._names = Path(settings.classes).read_text(encoding="utf-8").split("\n")
                self._names = [name.strip() for name in self._names if name.strip()]
            else:
                self._names = list(models.get_model_weights(settings.model).DEFAULT.meta["categories"])
            net = models.get_model(settings.model, weights=None, weights_backbone=None, num_classes=len(self._names))
            try:
                net.load_state_dict(load_tensors(Path(settings.path).expanduser()))
            except RuntimeError as error:
                raise UserError(f"{settings.path}: no checkpoint of {settings.model}: {error}") from error
            self._net = net.requires_grad_(False).eval().to(self.device)
        return self._net

    def __call__(self, pixels: Tensor) -> list[list[Found]]:
        net = self._load()
        scale = max(1.0, self.settings.least / min(pixels.shape[-2:]))
        if scale > 1:
            size = [round(side * scale) for side in pixels.shape[-2:]]
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        found = []
        for one in net(list(pixels.to(self.device))):
            rows = zip(one["labels"].tolist(), one["scores"].tolist(), (one["boxes"] / scale).tolist(), strict=True)
            kept = [
                Found(self._names[label], score, tuple(box))
                for label, score, box in rows
                if score >= self.settings.score
            ]
            found.append(kept)
        return found
