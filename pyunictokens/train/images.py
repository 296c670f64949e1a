"""A concept's pictures as the model sees them: image codes, and keys and values of pictures that never change.

Pixels are read once and kept; codes are taken anew where an image is cropped or mirrored at random. While only concept
rows learn, a picture's keys and values under understanding do not depend on them (it precedes all text), so they are
computed once and reused.

Shape suffixes: B images, N image codes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import black_image, load_pixels
from ..models import MagvitV2, PromptKV, Showo
from ..models.showo.attention import FullAttention, Recorded
from ..models.showo.prompting import SpecialIds
from ..utils.errors import UserError


class Pictures:
    """Training pictures by path; ``None`` is the black one that stands for "no picture"."""

    def __init__(self, model: Showo, vq: MagvitV2, *, crop: float = 1.0, flip: bool = False, cache_mb: int = 512):
        side = math.isqrt(model.config.num_vq_tokens)
        if side * side != model.config.num_vq_tokens:
            raise UserError(f"num_vq_tokens={model.config.num_vq_tokens}: must be a square number")
        if vq.codebook_size != model.config.codebook_size:
            raise UserError(
                f"the image tokenizer has {vq.codebook_size} codes, the model {model.config.codebook_size}: "
                "they do not belong together"
            )
        self.model, self.vq = model, vq
        self.size = side * vq.downsampling
        self.crop, self.flip = crop, flip
        self._pixels: dict[Path, Tensor] = {}
        self._codes: dict[Path | None, Tensor] = {}
        self._prefixes: OrderedDict[Path | None, PromptKV] = OrderedDict()
        self._limit = cache_mb << 20

    def pixels(self, path: Path | None) -> Tensor:
        """[3, H, W] in [-1, 1], cut to the middle."""
        return black_image(self.size) if path is None else load_pixels(path, self.size)

    @torch.no_grad()
    def codes(self, path: Path | None) -> Tensor:
        """int64 [N] of the picture as it is."""
        if path not in self._codes:
            self._codes[path] = self._encode(self.pixels(path)[None])[0]
        return self._codes[path]

    @torch.no_grad()
    def augmented(self, paths: list[Path], generator: torch.Generator) -> Tensor:
        """int64 [B, N] of the pictures, cropped and mirrored at random."""
        if self.crop == 1.0 and not self.flip:
            return torch.stack([self.codes(path) for path in paths])
        large = round(self.size * self.crop)
        images = []
        for path in paths:
            if path not in self._pixels:
                self._pixels[path] = load_pixels(path, large)
            top, left = torch.randint(0, large - self.size + 1, (2,), generator=generator).tolist()
            image = self._pixels[path][:, top : top + self.size, left : left + self.size]
            mirror = self.flip and bool(torch.rand((), generator=generator) < 0.5)
            images.append(image.flip(-1) if mirror else image)
        return self._encode(torch.stack(images))

    def _encode(self, pixels: Tensor) -> Tensor:
        weight = next(self.vq.parameters())
        return self.vq.encode(pixels.to(weight.device, weight.dtype)).to(self.model.device)

    @torch.no_grad()
    def prefix(self, path: Path | None) -> PromptKV:
        """Keys and values of [mmu][soi] codes [eoi], computed without a graph and kept up to the cache's limit.

        Right only while the model's own weights are frozen.
        """
        if path in self._prefixes:
            self._prefixes.move_to_end(path)
            return self._prefixes[path]
        ids, codes = SpecialIds.of(self.model), self.codes(path)
        ends = self.model.embed(torch.tensor([ids.mmu, ids.soi, ids.eoi], device=codes.device))
        x = torch.cat([ends[:2], self.model.embed_codes(codes), ends[2:]])[None]
        attend = Recorded(FullAttention(None))
        self.model.encode(x, torch.arange(x.shape[1], device=x.device), attend)
        kept = attend.prompts(x.shape[1])
        size = sum(tensor.numel() * tensor.element_size() for tensor in attend.keys + attend.values)
        if size <= self._limit:
            self._prefixes[path] = kept
            while len(self._prefixes) * size > self._limit:
                self._prefixes.popitem(last=False)
        return kept
