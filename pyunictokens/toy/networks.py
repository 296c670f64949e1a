"""The networks of the toy world's reward models: they look at 64×64 images or read the toy's sentences.

Five networks, all trained by experiments/build_toy.py: AttributeReader (a metric, never a reward), ImageText (BER, CLIP
scores), SubjectFeatures (DER), FaceNet (FER) and TextEncoder (TIER).

Pixels are [B, 3, H, W] in [-1, 1]; other sizes than 64 are resized. Embeddings are L2-normalised rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.checkpoint import load_tensors
from ..utils.errors import UserError
from ..utils.files import read_json_table
from .scene import SLOTS, SUBJECT_SLOTS

_SIZE = 64
_WORD = re.compile(r"<[^<>\s]+>|\w+")


def _block(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU(inplace=True)
    )


class Backbone(nn.Module):
    """Four stages of convolutions; keeps a 4×4 grid, because where a thing is says what it is."""

    def __init__(self, width: int = 32, out: int = 256):
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
                nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width, 1)),
                nn.Sequential(_block(2 * width, 3 * width, 2), _block(3 * width, 3 * width, 1)),
                _block(3 * width, 2 * width, 2),
            ]
        )
        self.out = nn.Linear(2 * width * 16, out)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """The stages' feature maps, finest first."""
        if pixels.shape[-2:] != (_SIZE, _SIZE):
            pixels = F.interpolate(pixels, (_SIZE, _SIZE), mode="bilinear", antialias=True, align_corners=False)
        maps, x = [], pixels
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.features(pixels)[-1].flatten(1))


class AttributeReader(nn.Module):
    """Reads every slot of a scene. It measures; it must never be a reward, or the measure would be worth nothing."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.backbone = Backbone(width)
        self.heads = nn.ModuleDict({slot: nn.Linear(256, len(words)) for slot, words in SLOTS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits per slot, [B, number of words]."""
        hidden = F.relu(self.backbone(pixels))
        return {slot: head(hidden) for slot, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pixels: Tensor) -> Tensor:
        """The most likely codes, int64 [B, slots] in the order of SLOTS."""
        return torch.stack([logits.argmax(-1) for logits in self(pixels).values()], dim=1)

    @torch.no_grad()
    def attributes(self, pixels: Tensor) -> list[dict[str, str]]:
        """What is seen in each image, as words by slot."""
        codes = self.read(pixels).tolist()
        return [{slot: SLOTS[slot][code] for slot, code in zip(SLOTS, row, strict=True)} for row in codes]


class SubjectFeatures(nn.Module):
    """An embedding of the subject alone (shape, colour, pattern, hair), whatever it wears and wherever it is."""

    def __init__(self, width: int = 24, dim: int = 64):
        super().__init__()
        self.backbone = Backbone(width)
        self.project = nn.Linear(256, dim)
        self.heads = nn.ModuleDict({slot: nn.Linear(dim, len(SLOTS[slot])) for slot in SUBJECT_SLOTS})

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, dim], L2-normalised."""
        return F.normalize(self.project(F.relu(self.backbone(pixels))), dim=-1)

    encode_image = forward


class FaceNet(nn.Module):
    """Is there a human face, and whose: an identity embedding of hair style and hair colour."""

    def __init__(self, width: int = 16, dim: int = 32):
        super().__init__()
        self.backbone = Backbone(width)
        self.presence = nn.Linear(256, 1)
        self.project = nn.Linear(256, dim)
        self.heads = nn.ModuleDict({"shape": nn.Linear(dim, 3), "hair": nn.Linear(dim, len(SLOTS["hair"]))})

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(logit that a face is there [B], identity [B, dim] L2-normalised)."""
        hidden = F.relu(self.backbone(pixels))
        return self.presence(hidden).squeeze(-1), F.normalize(self.project(hidden), dim=-1)


class TextEncoder(nn.Module):
    """Sentences to embeddings: a two-layer transformer over words. Unknown words, names and <tokens> are left out."""

    def __init__(self, words: Sequence[str], width: int = 64, dim: int = 64, layers: int = 2, max_words: int = 64):
        super().__init__()
        self.words = list(words)
        self.index = {word: row + 1 for row, word in enumerate(self.words)}
        self.max_words = max_words
        self.embed = nn.Embedding(len(self.words) + 1, width, padding_idx=0)
        self.place = nn.Parameter(torch.randn(max_words, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.project = nn.Linear(width, dim)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Word rows, int64 [B, longest], 0 where a text is over. A text without any known word is one 0."""
        rows = []
        for text in texts:
            found = [self.index[w] for w in _WORD.findall(text.lower()) if w in self.index]
            rows.append(found[: self.max_words])
        longest = max([len(row) for row in rows] + [1])
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """[B, dim], L2-normalised."""
        if not texts:
            raise UserError("no texts to encode: pass at least one")
        ids = self.ids(texts).to(self.place.device)
        here = ids > 0
        x = self.embed(ids) + self.place[: ids.shape[1]]
        blind = ~here
        blind[:, 0] = False  # an empty text still needs something to look at
        x = self.layers(x, src_key_padding_mask=blind)
        weight = here.to(x.dtype).unsqueeze(-1)
        return F.normalize(self.project((x * weight).sum(1) / weight.sum(1).clamp(min=1)), dim=-1)

    encode = forward


class ImageText(nn.Module):
    """An image encoder and a text encoder with one space: the cosine says how well a caption fits a picture."""

    def __init__(self, words: Sequence[str], width: int = 32, dim: int = 96):
        super().__init__()
        self.backbone = Backbone(width)
        self.project = nn.Linear(256, dim)
        self.text = TextEncoder(words, width=96, dim=dim)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, dim], L2-normalised."""
        return F.normalize(self.project(F.relu(self.backbone(pixels))), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[B, dim], L2-normalised. Names and concept tokens in the texts are ignored."""
        return self.text(texts)


class ToyNetworks(nn.Module):
    """All five, as one set of weights."""

    def __init__(self, words: Sequence[str]):
        super().__init__()
        self.reader = AttributeReader()
        self.image_text = ImageText(words)
        self.subject = SubjectFeatures()
        self.face = FaceNet()
        self.sentence = TextEncoder(words)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str] | None = None) -> ToyNetworks:
        """Load `experts.safetensors` and `experts.json` from a folder; by default those shipped with the package."""
        folder = Path(folder) if folder else Path(__file__).parent.parent / "assets" / "toy"
        description = read_json_table(folder / "experts.json")
        model = cls(description["words"])
        weights = {
            key: value.float() if value.is_floating_point() else value
            for key, value in load_tensors(folder / "experts.safetensors").items()
        }
        model.load_state_dict(weights)
        return model.requires_grad_(False).eval()
