"""A network that finds the figures of a composed scene: where each is, what it is, its colour and pattern.

It is trained twice, apart, with other widths, seeds and pictures: one is the reader that measures and is never a reward
(`load_reader`), the other is asked by rewards (`load_spotter`), so that a gain on the reader is a real gain. A score is
given to every place of a 16×16 map, as in CenterNet (Zhou et al., 2019); a figure is a place that scores highest among
its neighbours.

Pixels are [B, 3, 64, 64] in [0, 1] or of another size, then resized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewards.experts.objects import Found
from ..scene import COLOURS
from .scene import NOUNS, PATTERNS

MAP = 16
"""Places along one side of the map."""
SURE = 0.35
"""A place that scores less is no figure."""
NEAR = 7.0
"""Of two figures nearer than this many pixels, the surer one counts."""


@dataclass(frozen=True)
class Heads:
    """What the network says of each place: logits [B, C, 16, 16], and reach [B, 4, 16, 16] in map units."""

    nouns: Tensor
    colours: Tensor
    patterns: Tensor
    reach: Tensor


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class Spotter(nn.Module):
    """Convolutions to a 16×16 map, blocks that see further and further, one head."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.width = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, 2, 2, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(width // 2, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(*(_Residual(width, dilation) for dilation in (1, 2, 3, 1)))
        self.sizes = (len(NOUNS), len(COLOURS), len(PATTERNS), 4)
        self.head = nn.Conv2d(width, sum(self.sizes), 1)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias[: len(NOUNS)], -4.0)  # figures are rare

    def forward(self, pixels: Tensor) -> Heads:
        if pixels.shape[-2:] != (4 * MAP, 4 * MAP):
            pixels = F.interpolate(pixels, (4 * MAP, 4 * MAP), mode="bilinear", antialias=True, align_corners=False)
        found = self.head(self.blocks(self.stem(pixels * 2 - 1))).float()
        return Heads(*found.split(self.sizes, dim=1))


class Detector:
    """A spotter as the detector of rewards/experts/objects.py."""

    def __init__(self, net: Spotter):
        self.net = net

    def to(self, device: str | torch.device) -> None:
        self.net.to(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> list[list[Found]]:
        """The figures in each image [B, 3, H, W] in [0, 1], the surest first; boxes in pixels of these images."""
        weight = self.net.head.weight
        heads, scale = self.net(pixels.to(weight.device, weight.dtype)), pixels.shape[-1] / MAP
        scores = heads.nouns.sigmoid()
        best, noun = scores.max(dim=1)
        peak = (best == F.max_pool2d(best[:, None], 3, 1, 1)[:, 0]) & (best > SURE)
        colours, patterns = heads.colours.argmax(1), heads.patterns.argmax(1)
        images = []
        for image in range(len(pixels)):
            places = peak[image].nonzero().tolist()
            places.sort(key=lambda at: -float(best[image, at[0], at[1]]))
            kept: list[Found] = []
            middles: list[tuple[float, float]] = []
            for y, x in places:
                cx, cy = (x + 0.5) * 4, (y + 0.5) * 4
                if any((cx - a) ** 2 + (cy - b) ** 2 < NEAR**2 for a, b in middles):
                    continue
                middles.append((cx, cy))
                left, top, right, bottom = heads.reach[image, :, y, x].tolist()
                edges = (x + 0.5 - left, y + 0.5 - top, x + 0.5 + right, y + 0.5 + bottom)
                box = (edges[0] * scale, edges[1] * scale, edges[2] * scale, edges[3] * scale)
                kept.append(
                    Found(
                        NOUNS[int(noun[image, y, x])],
                        float(best[image, y, x]),
                        box,
                        COLOURS[int(colours[image, y, x])],
                        PATTERNS[int(patterns[image, y, x])],
                    )
                )
            images.append(kept)
        return images
