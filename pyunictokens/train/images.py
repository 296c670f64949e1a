"""A concept's images as the model sees them: image codes, features where it takes those for questions, and prefixes of
images that never change.

Pixels are read once and kept; codes are taken anew where an image is cropped or mirrored at random. While only concept
rows learn, an image's prefix under understanding does not depend on them (it precedes all text), so it is computed
once and reused.

Shape suffixes: B images, N image codes.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import black_image, load_pixels
from ..models import ImageTokenizer, MaskedModel, Prefix, answering
from ..models.base import features_side, looked_at
from ..utils.errors import UserError


class ReferenceImages:
    """Training images by path; ``None`` is the black one that stands for "no image"."""

    def __init__(
        self, model: MaskedModel, vq: ImageTokenizer, *, crop: float = 1.0, flip: bool = False, cache_mb: int = 512
    ):
        if model.grid[0] != model.grid[1]:
            raise UserError(f"this model draws {model.grid[0]}×{model.grid[1]} codes: images are read as squares")
        if vq.codebook_size != model.codebook_size:
            raise UserError(
                f"the image tokenizer has {vq.codebook_size} codes, the model {model.codebook_size}: "
                "they do not belong together"
            )
        self.model, self.vq = model, vq
        self.size = model.grid[0] * vq.downsampling
        self.crop, self.flip = crop, flip
        self._pixels: dict[Path, Tensor] = {}
        self._codes: dict[Path | None, Tensor] = {}
        self._features: dict[Path | None, Tensor] = {}
        self._prefixes: OrderedDict[Path | None, Prefix] = OrderedDict()
        self._limit = cache_mb << 20

    def pixels(self, path: Path | None) -> Tensor:
        """[3, H, W] in [-1, 1], cut to the middle."""
        return black_image(self.size) if path is None else load_pixels(path, self.size)

    @torch.no_grad()
    def codes(self, path: Path | None) -> Tensor:
        """int64 [N] of the image as it is."""
        if path not in self._codes:
            self._codes[path] = self._encode(self.pixels(path)[None])[0]
        return self._codes[path]

    @torch.no_grad()
    def seen(self, path: Path | None) -> Tensor:
        """What questions about the image are asked about: its codes int64 [N], or features [patches, E] where the model
        takes those."""
        side = features_side(self.model)
        if side is None:
            return self.codes(path)
        if path not in self._features:
            pixels = black_image(side) if path is None else load_pixels(path, side)
            self._features[path] = looked_at(self.model, self.vq, pixels[None])[0]
        return self._features[path]

    @torch.no_grad()
    def augmented(self, paths: list[Path], generator: torch.Generator, rows: range | None = None) -> Tensor:
        """int64 [B, N] of the images, cropped and mirrored at random; of `rows` alone, where those of others draw from
        the generator all the same."""
        rows = range(len(paths)) if rows is None else rows
        nothing = torch.empty(0, self.model.grid[0] * self.model.grid[1], dtype=torch.int64)
        if self.crop == 1.0 and not self.flip:
            return torch.stack([self.codes(paths[row]) for row in rows]) if rows else nothing
        large = round(self.size * self.crop)
        images = []
        for row, path in enumerate(paths):
            top, left = torch.randint(0, large - self.size + 1, (2,), generator=generator).tolist()
            mirror = self.flip and bool(torch.rand((), generator=generator) < 0.5)
            if row not in rows:
                continue
            if path not in self._pixels:
                self._pixels[path] = load_pixels(path, large)
            image = self._pixels[path][:, top : top + self.size, left : left + self.size]
            images.append(image.flip(-1) if mirror else image)
        return self._encode(torch.stack(images)) if images else nothing

    def _encode(self, pixels: Tensor) -> Tensor:
        weight = next(self.vq.parameters())
        return self.vq.encode(pixels.to(weight.device, weight.dtype)).to(self.model.device)

    @torch.no_grad()
    def prefix(self, path: Path | None) -> Prefix:
        """What comes before any question about the image, computed without a graph and kept up to the cache's limit.

        Right only while the model's own weights are frozen.
        """
        if path in self._prefixes:
            self._prefixes.move_to_end(path)
            return self._prefixes[path]
        kept = answering(self.model).prefill_images(self.seen(path)[None])
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept.tensors())
        if size <= self._limit:
            self._prefixes[path] = kept
            while len(self._prefixes) * size > self._limit:
                self._prefixes.popitem(last=False)
        return kept
