"""Rewards over one CLIP of open_clip: CLIP score, human preference (HPSv2), beauty (LAION's aesthetic head).

    clip        cosine of image and prompt, in [-1, 1] (Radford et al., 2021); the score of CLIP-T
    hpsv2       the same in a CLIP that was trained to agree with people's preferences (Wu et al., 2023)
    aesthetic   a linear head on CLIP's normalised image vector gives 1 to 10; here a tenth of it (LAION)

`path` is a weight file of the architecture `model`: what open_clip saves, an OpenAI or LAION file, HPSv2's checkpoint.
Pixels are prepared as open_clip does it, on their device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.checkpoint import load_tensors
from ...models.weight_files import WeightFiles
from ...utils.errors import UserError, require
from ..base import Device, RewardBatch, WithNetwork
from ..cache import TextCache
from ..networks import Network, NetworkConfig, resized_and_cropped
from ..registry import register


@dataclass(frozen=True)
class ClipConfig(NetworkConfig):
    """A CLIP of open_clip; `path` is its weight file."""

    model: str = "ViT-L-14-quickgelu"
    """open_clip's name of the architecture."""


@dataclass(frozen=True)
class HpsConfig(ClipConfig):
    """HPSv2's CLIP."""

    model: str = "ViT-H-14"
    """open_clip's name of the architecture."""


@dataclass(frozen=True)
class AestheticConfig(ClipConfig):
    """CLIP with an aesthetic head."""

    head: str = "weights/sa_0_4_vit_l_14_linear.pth"
    """The head's file: weight [1, D] and bias [1]."""


_CLIP = WeightFiles(
    "CLIP ViT-L/14",
    "timm/vit_large_patch14_clip_quickgelu_224.openai",
    (("open_clip_model.safetensors",),),
    "MIT",
    folder="weights/clip-vit-l-14",
)
_HPS = WeightFiles("HPSv2.1", "xswu/HPSv2", (("HPS_v2.1_compressed.pt",),), "Apache-2.0", folder="weights/HPSv2")


class OpenClip(Network):
    """A frozen CLIP of open_clip: unit vectors of images and texts. Read when it is first asked."""

    files: ClassVar[WeightFiles] = _CLIP
    config: ClipConfig
    _tokenizer: Callable[[list[str]], Tensor]

    def __init__(self, config: ClipConfig, device: Device = "cpu"):
        super().__init__(config, device)
        self.texts = TextCache(self._read)

    def locate(self) -> Path:
        """The weight file; in a folder, the one that is there. Raises UserError where there is none."""
        path = Path(self.config.path).expanduser()
        if path.is_dir():
            found = sorted(each for each in path.iterdir() if each.suffix in {".safetensors", ".bin", ".pt", ".pth"})
            if len(found) != 1:
                raise UserError(f"{path}: holds {len(found)} weight files: name one of open_clip's as path")
            return found[0]
        if not path.is_file():
            raise UserError(f"{path}: no such file: give the weights of {self.config.model}; {self.files.command()}")
        return path

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        open_clip = require("open_clip", "rewards")
        if self.config.model not in open_clip.list_models():
            raise UserError(f"model={self.config.model!r}: open_clip knows no such architecture, as in ViT-B-32")
        net = open_clip.create_model(self.config.model, load_weights=False, device="cpu", output_dict=True)
        weights = load_tensors(folder)
        try:
            net.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
        except RuntimeError as error:
            raise UserError(f"{folder}: no checkpoint of {self.config.model}: {error}") from error
        self._tokenizer = open_clip.get_tokenizer(self.config.model)
        return (net.to(self.dtype),)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, D] of pixels [B, 3, H, W] in [-1, 1], L2-normalised, float32."""

        def encode(part: Tensor) -> Tensor:
            net = self._net
            eye = net.visual
            side = eye.image_size[0] if isinstance(eye.image_size, (tuple, list)) else eye.image_size
            ready = resized_and_cropped(part, side, eye.image_mean, eye.image_std)
            return F.normalize(net.encode_image(ready.to(self.dtype)).float(), dim=-1)

        return self.batched(encode, pixels)

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(self._net.encode_text(self._tokenizer(list(texts)).to(self.device)).float(), dim=-1)

    def similarity(self, batch: RewardBatch) -> Tensor:
        """Cosines [R] of images and their prompts."""
        images = self.encode_image(batch.images)
        return (images * self.texts(batch.prompts).to(images.device)).sum(dim=-1)


@register("clip", label="CLIP score", settings=ClipConfig, files=_CLIP, judges_previews=True)
class ClipScore(WithNetwork[OpenClip]):
    """The cosine of image and prompt."""

    @classmethod
    def from_settings(cls, settings: ClipConfig, device: Device) -> ClipScore:
        return cls(OpenClip.located(settings, device))

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [-1, 1]."""
        return self._encoder.similarity(batch)


@register("hpsv2", label="HPSv2: preference", settings=HpsConfig, files=_HPS, judges_previews=True)
class HpsV2(ClipScore):
    """The cosine of image and prompt in HPSv2's CLIP."""


@register("aesthetic", label="Aesthetic: beauty", settings=AestheticConfig, files=_CLIP)
class Aesthetic(WithNetwork[OpenClip]):
    """A tenth of what LAION's linear head says of an image, about 0.1 to 1."""

    def __init__(self, encoder: OpenClip, head: Path):
        super().__init__(encoder)
        weights = load_tensors(head)
        if set(weights) != {"weight", "bias"} or weights["weight"].ndim != 2 or len(weights["weight"]) != 1:
            raise UserError(f"{head}: no linear head: wanted are weight [1, D] and bias [1]")
        self._weight, self._bias = weights["weight"].float(), weights["bias"].float()

    @classmethod
    def from_settings(cls, settings: AestheticConfig, device: Device) -> Aesthetic:
        network, head = OpenClip.located(settings, device), Path(settings.head).expanduser()
        if not head.is_file():
            raise UserError(f"{head}: no such file: give head=FILE, LAION's linear head for {settings.model}")
        return cls(network, head)

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R]."""
        images = self._encoder.encode_image(batch.images)
        if images.shape[1] != self._weight.shape[1]:
            raise UserError(f"the head is {self._weight.shape[1]} wide, the CLIP {images.shape[1]}: of another model")
        return F.linear(images, self._weight.to(images), self._bias.to(images)).squeeze(-1) / 10
