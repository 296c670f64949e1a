"""The image encoder of Show-o's CLIP-ViT variant: OpenAI's CLIP of 336 pixels, whose patch features answers look at.

The variant (`showlab/show-o-w-clip-vit`) answers from features in place of codes, after a system prompt as in LLaVA
1.5: the states of the last layer but one, without the class token. It still draws with codes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.errors import UserError, needs
from ..utils.loading import no_bars
from .checkpoint import read_config, resolve

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
"""The system prompt the variant was trained with; it stands before the image."""

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipVision:
    """Patch features [B, patches, E] of images."""

    def __init__(self, net: CLIPVisionModel):
        self.net = net
        side = net.config.image_size
        if not isinstance(side, int):
            raise UserError(f"an image encoder of {side} pixels: must look at squares")
        self.size = side
        """Pixels along one side of what it looks at."""

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> ClipVision:
        """A CLIP checkpoint of transformers: a folder or a hub id, such as openai/clip-vit-large-patch14-336."""
        with needs("rewards"):
            from transformers import CLIPVisionModel

        folder = resolve(path, only=("config.json", "model.safetensors", "pytorch_model.bin"))
        kind = read_config(folder).get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise UserError(f"{path}: is no CLIP checkpoint of transformers (model_type {kind!r} in its config.json)")
        try:
            with no_bars():
                made: Any = CLIPVisionModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{path}: cannot be read as CLIP's image encoder: {error}") from None
        net: CLIPVisionModel = made[0]
        missing = made[1]["missing_keys"]
        if missing:  # transformers would fill the gaps with random numbers
            raise UserError(f"{path}: lacks {len(missing)} weights of CLIP's image encoder")
        net = net.eval().requires_grad_(False)
        torch.nn.Module.to(net, device)
        return cls(net)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Features [B, patches, E] of square pixels [B, 3, H, H] in [-1, 1]."""
        pixels = pixels.to(self.net.device, torch.float32)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(each, device=pixels.device).view(3, 1, 1) for each in (_MEAN, _STD))
        shown = ((pixels.clamp(-1, 1) + 1) / 2 - mean) / std
        states = self.net(shown.to(self.net.dtype), output_hidden_states=True).hidden_states
        return states[-2][:, 1:]
