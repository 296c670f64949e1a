"""The composed world's shipped model, and the two spotters: the reader that measures, the one that rewards ask.

All were trained by experiments/build_composed.py, the reader apart from everything that a reward looks at.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ...rewards.experts.objects import Objects
from ...utils.errors import UserError
from ...utils.files import read_json
from .scene import PLACES, empty
from .spotter import Detector, Spotter

if TYPE_CHECKING:
    import torch

    from ...models.bundle import ModelBundle
    from ...rewards.base import RewardBatch

Folder = str | os.PathLike[str] | None


def composed_folder() -> Path:
    """Where the composed world's weights lie inside the package."""
    return Path(__file__).parents[2] / "assets" / "composed"


def load_composed(
    folder: Folder = None, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> ModelBundle:
    """The composed world's Show-o with its tokenizers, from `folder` or the package. Raises UserError without them."""
    import torch

    from ...models import registry

    home = Path(folder) if folder is not None else composed_folder()
    if not (home / "showo").is_dir():
        raise UserError(
            f"{home}: holds no model: a wheel leaves out the composed world's, clone the repository or name a folder"
        )
    parts = {"vq": home / "vq", "tokenizer": home / "tokenizer"}
    return registry.load(home / "showo", dtype or torch.float32, device, **parts)


def load_detector(name: str, folder: Folder = None) -> Detector:
    """The spotter `name` ("reader" or "spotter")."""
    from ...models.checkpoint import load_tensors

    home = Path(folder) if folder is not None else composed_folder()
    about = read_json(home / f"{name}.json")
    if not isinstance(about, dict) or not isinstance(about.get("width"), int):
        raise UserError(f"{home / name}.json: names no width of a spotter")
    net = Spotter(about["width"])
    weights = load_tensors(home / f"{name}.safetensors")
    net.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in weights.items()})
    return Detector(net.requires_grad_(False).eval())


class ComposedReward(Objects):
    """One part the share of what a prompt asks for that is seen, two parts whether all of it is. The share alone is
    learned at the price of the whole: more prompts are half right, fewer are right."""

    def score(self, batch: RewardBatch) -> torch.Tensor:
        share = super().score(batch)
        return (share + 2 * (share == 1).to(share.dtype)) / 3


class Places:
    """1 where an image shows the place that its prompt names (column `place`), or where that names none; else 0. What
    an image shows is the empty scene whose pixels lie nearest."""

    columns = ("place",)

    def __init__(self) -> None:
        import torch

        scenes = [torch.tensor(empty(place)).permute(2, 0, 1) for place in PLACES]
        self._empty = torch.stack(scenes).float() / 255

    def score(self, batch: RewardBatch) -> torch.Tensor:
        import torch

        named = batch.columns.get("place")
        if named is None:
            raise UserError("the prompts have no column place: write one, empty where a prompt names none")
        pixels = ((batch.images.float() + 1) / 2).clamp(0, 1).cpu()
        far = (pixels[:, None] - self._empty).abs().mean((2, 3, 4))
        shown = [PLACES[at] for at in far.argmin(1).tolist()]
        return torch.tensor([float(wanted in ("", seen)) for wanted, seen in zip(named, shown, strict=True)])


def composed_reward(folder: Folder = None) -> ComposedReward:
    """The reward, by the rewards' spotter: prompts need the column `objects`."""
    return ComposedReward(load_detector("spotter", folder))


def wholly_right(folder: Folder = None) -> Objects:
    """The metric: 1 where the reader sees everything that a prompt asks for, else 0. It must never be a reward."""
    return Objects(load_detector("reader", folder), strict=True)


def share_right(folder: Folder = None) -> Objects:
    """The metric: the share of what a prompt asks for that the reader sees. It must never be a reward."""
    return Objects(load_detector("reader", folder))
