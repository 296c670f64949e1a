"""Two more reward experts over open_clip: human preference as HPSv2 scores it, beauty as LAION's aesthetic head.

Each is a small class with `score(batch)`. A run takes them up with a line of its settings each:

    rewards:
      weights: {tier: 0.4, ber: 0.2, der: 0.2, hps: 0.1, beauty: 0.1}
      experts:
        hps: {use: "clip_experts:HpsV2", path: weights/HPS_v2.1_compressed.pt}
        beauty: {use: "clip_experts:Aesthetic", path: weights/ViT-L-14.pt, head: weights/sa_0_4_vit_l_14_linear.pth}

with this folder on PYTHONPATH. `model` names one of open_clip's architectures; `path` is a checkpoint of it on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyunictokens.rewards import RewardBatch
from pyunictokens.rewards.cache import TextCache
from pyunictokens.rewards.networks import resized_and_cropped
from pyunictokens.utils.errors import UserError, require


class OpenClip:
    """A frozen CLIP of open_clip: unit vectors of pictures and texts. Prompts are embedded once."""

    def __init__(self, model: str, path: str, device: str = "cpu"):
        open_clip = require("open_clip", "rewards")
        net = open_clip.create_model(model, load_weights=False, device=device, output_dict=True)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        try:
            net.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
        except RuntimeError as error:
            raise UserError(f"{path}: no checkpoint of {model}: {error}") from error
        self.net: Any = net.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.device = torch.device(device)
        self.texts = TextCache(self._read)

    def to(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.net.to(device)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """[B, D] of pixels [B, 3, H, W] in [-1, 1]."""
        eye = self.net.visual
        side = eye.image_size[0] if isinstance(eye.image_size, (tuple, list)) else eye.image_size
        ready = resized_and_cropped(pixels.to(self.device), side, eye.image_mean, eye.image_std)
        return F.normalize(self.net.encode_image(ready).float(), dim=-1)

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(self.net.encode_text(self.tokenizer(list(texts)).to(self.device)).float(), dim=-1)


class HpsV2:
    """HPSv2: the cosine of drawing and prompt in a CLIP that was trained to agree with people's preferences."""

    def __init__(self, path: str, model: str = "ViT-H-14", device: str = "cpu"):
        self.clip = OpenClip(model, path, device)
        self.to = self.clip.to

    def score(self, batch: RewardBatch) -> Tensor:
        return (self.clip.images(batch.images) * self.clip.texts(batch.prompts)).sum(dim=-1)


class Aesthetic:
    """LAION's aesthetic predictor: a linear head on CLIP's picture vector gives 1 to 10; here a tenth of it."""

    def __init__(self, path: str, head: str, model: str = "ViT-L-14-quickgelu", device: str = "cpu"):
        self.clip = OpenClip(model, path, device)
        weights = torch.load(head, map_location="cpu", weights_only=True)
        self.weight, self.bias = weights["weight"].float(), weights["bias"].float()

    def to(self, device: str | torch.device) -> None:
        self.clip.to(device)

    def score(self, batch: RewardBatch) -> Tensor:
        pictures = self.clip.images(batch.images)
        return F.linear(pictures, self.weight.to(pictures), self.bias.to(pictures)).squeeze(-1) / 10
