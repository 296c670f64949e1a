"""What the reward models' networks share: read at first use, frozen, on one device in one dtype, fed in batches.

The images' preprocessing is the library's own processor as the checkpoint configures it, run on tensors where they
are: pixels are brought to the 8 bits every one of these networks was trained with, then resized and normalised on their
device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..models.weight_files import WeightFiles
from ..utils.errors import UserError, require
from ..utils.files import unreadable
from ..utils.loading import no_bars
from .base import Device, check_pixels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

K = TypeVar("K", bound="Network")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class NetworkConfig:
    """Where a network is and how it runs."""

    path: str
    """Folder or hub id."""
    dtype: str = "float32"
    """float32, bfloat16 or float16. Scores are float32 in any case."""
    batch: int = 32
    """Most images or texts in one pass."""
    offline: bool = False
    """Never ask the hub: take what is on disk."""

    def __post_init__(self) -> None:
        if not str(self.path).strip():
            raise UserError("path is empty: give the network's folder or hub id")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r}: must be {', '.join(DTYPES)}")
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise UserError(f"batch={self.batch!r}: must be a whole number ≥ 1")

    def choose(self, name: str, *choices: str) -> None:
        """Raise UserError unless the field `name` is one of `choices`."""
        if getattr(self, name) not in choices:
            raise UserError(f"{name}={getattr(self, name)!r}: must be {' or '.join(choices)}")


class Network:
    """A frozen network that is read from disk when it is first asked. Subclasses say how: `_build`."""

    files: ClassVar[WeightFiles]
    """What must be in its folder."""

    def __init__(self, config: NetworkConfig, device: Device = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self._modules: tuple[nn.Module, ...] | None = None

    @classmethod
    def located(cls: type[K], config: NetworkConfig, device: Device) -> K:
        """A network whose files are looked for now and read when it is first asked. Raises UserError naming what is
        missing."""
        network = cls(config, device)
        network.locate()
        return network

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    @property
    def loaded(self) -> bool:
        return self._modules is not None

    @property
    def bytes(self) -> int:
        """Memory of the weights and buffers; reads them from disk where that has not happened yet."""
        tensors = [t for module in self.load() for t in (*module.parameters(), *module.buffers())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def load(self) -> tuple[nn.Module, ...]:
        """The modules, read from disk once. Raises UserError naming what is missing or does not fit."""
        if self._modules is None:
            built = self._build(self.locate())
            self._modules = tuple(module.requires_grad_(False).eval().to(self.device) for module in built)
        return self._modules

    @property
    def _net(self) -> Any:
        """The first module; what is in it the libraries have no types for."""
        return self.load()[0]

    def to(self, device: Device) -> None:
        """Move to `device`; what is not read from disk yet will be put there."""
        device = torch.device(device)
        if device != self.device:
            self.device = device
            for module in self._modules or ():
                module.to(device)

    def locate(self) -> Path:
        """The folder (or file) of the network. Raises UserError naming what is missing; a hub id is downloaded."""
        return self.files.find(self.config.path, offline=self.config.offline)

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def batched(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`function` of `rows` [B, …], at most `config.batch` at once, on the network's device."""
        return torch.cat([function(part.to(self.device)) for part in rows.split(self.config.batch)])


class ImageNetwork(Network):
    """A network with the image processor its checkpoint configures."""

    _processor: Any = None

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] as the network wants them, on their device, float32."""
        if self._processor is None:
            self.load()
        values = self._processor(images=list(to_bytes(pixels)), return_tensors="pt", input_data_format="channels_first")
        return values["pixel_values"].to(pixels.device)

    def _read_processor(self, folder: Path) -> None:
        require("torchvision", "rewards")  # resizing on the device is torchvision's
        transformers = require("transformers", "rewards")
        named = importlib.util.find_spec("transformers.image_processing_backends") is not None  # else an older one
        on_tensors: dict[str, object] = {"backend": "torchvision"} if named else {"use_fast": True}
        try:
            self._processor = transformers.AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, **on_tensors
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: its image processor cannot be read: {unreadable(folder, error)}") from error


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] as uint8 on their device: what a saved image would hold."""
    check_pixels(pixels, "pixels")
    return ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def resized_and_cropped(pixels: Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] as CLIP's relatives want them, [B, 3, side, side], float32, on their device.

    Brought to 8 bits, resized (bicubic, antialiased) until the shorter side has `side` pixels, cut to the middle, and
    normalised: open_clip's own preprocessing, without a trip through images on the CPU.
    """
    edit = require("torchvision.transforms.v2.functional", "rewards")
    values = edit.resize(to_bytes(pixels), [side], interpolation=edit.InterpolationMode.BICUBIC, antialias=True)
    return edit.normalize(edit.center_crop(values, [side, side]).float() / 255.0, list(mean), list(std))


def from_transformers(
    name: str, folder: Path, dtype: torch.dtype, kinds: Iterable[str] = (), unused: Iterable[str] = ()
) -> nn.Module:
    """The checkpoint in `folder` as transformers' class `name`, whole or not at all.

    kinds: model types that are accepted; none named means any. unused: beginnings of keys that may be missing, because
    they are not used. transformers fills gaps with random numbers; here a gap raises UserError.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers = require("transformers", "rewards")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: config.json cannot be used: {unreadable(folder, error)}") from error
    kinds = tuple(kinds)
    if kinds and config.model_type not in kinds:
        raise UserError(f"{folder}: holds a {config.model_type} model: must be {' or '.join(kinds)}")
    try:
        with no_bars():
            model, report = getattr(transformers, name).from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # transformers raises many kinds for files that are cut short or of other shapes
        raise UserError(f"{folder}: weights cannot be read as {name}: {unreadable(folder, error)}") from error
    gaps = [key for key in sorted(report["missing_keys"]) if not key.startswith(tuple(unused))]
    if gaps:
        shown = ", ".join(gaps[:3]) + (", …" if len(gaps) > 3 else "")
        raise UserError(f"{folder}: no checkpoint of {name}: {len(gaps)} weights missing ({shown})")
    return model


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Raises UserError where there is none that can be read."""
    transformers = require("transformers", "rewards")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be read: {unreadable(folder, error)}") from error
