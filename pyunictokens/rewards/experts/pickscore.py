"""PickScore (Kirstain et al., 2023): which image people pick for a prompt, as a CLIP of transformers learned it.

The published score is ``logit_scale · cosine``, about 16 to 26; here it is divided by 26, so that the best is about 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.weight_files import PROCESSOR, TOKENIZER, WEIGHTS, WeightFiles
from ..base import Device, RewardBatch, WithNetwork
from ..cache import TextCache
from ..networks import ImageNetwork, NetworkConfig, from_transformers, read_tokenizer
from ..registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEST = 26.0


@dataclass(frozen=True)
class PickConfig(NetworkConfig):
    """PickScore's CLIP."""


FILES = WeightFiles(
    "PickScore v1", "yuvalkirstain/PickScore_v1", (("config.json",), WEIGHTS, TOKENIZER, PROCESSOR), "MIT"
)


class PickClip(ImageNetwork):
    """transformers' CLIPModel with its tokenizer and image processor."""

    files: ClassVar[WeightFiles] = FILES
    _tokenizer: PreTrainedTokenizerBase

    def __init__(self, config: NetworkConfig, device: Device = "cpu"):
        super().__init__(config, device)
        self.texts = TextCache(self._read)

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        net = from_transformers("CLIPModel", folder, self.dtype, kinds=("clip",))
        self._tokenizer = read_tokenizer(folder)
        self._read_processor(folder)
        return (net,)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, D], L2-normalised, float32."""

        def encode(part: Tensor) -> Tensor:
            net = self._net
            seen = net.vision_model(pixel_values=self.prepare(part).to(self.dtype)).pooler_output
            return F.normalize(net.visual_projection(seen).float(), dim=-1)

        return self.batched(encode, pixels)

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> Tensor:
        net = self._net
        limit = net.config.text_config.max_position_embeddings
        ids = self._tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        ids = {name: ids[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return F.normalize(net.text_projection(net.text_model(**ids).pooler_output).float(), dim=-1)

    def scale(self) -> float:
        """The factor of the cosine."""
        return float(self._net.logit_scale.exp())


@register("pickscore", label="PickScore: preference", settings=PickConfig, files=FILES, judges_previews=True)
class PickScore(WithNetwork[PickClip]):
    """``logit_scale · cosine / 26`` of image and prompt."""

    @classmethod
    def from_settings(cls, settings: PickConfig, device: Device) -> PickScore:
        return cls(PickClip.located(settings, device))

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R]."""
        images = self._encoder.encode_image(batch.images)
        cosine = (images * self._encoder.texts(batch.prompts).to(images.device)).sum(dim=-1)
        return cosine * self._encoder.scale() / BEST
