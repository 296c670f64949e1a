"""CLIP as the image–text encoder of CLIP-T and CLIP-I: any model of open_clip_torch, from a folder or the hub, and the
keeper of embeddings that makes each text and each reference image cost one pass.

Pixels come as tensors and stay on the device; they are brought to the encoder's size and colours with the settings of
the checkpoint's own preprocessing (shorter side, bicubic, centre cut out). Any other encoder with the two methods of
:class:`ImageTextEncoder` can take its place.

Letters: S samples (generated images), M references, T texts, D width of an embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import from_pil, load_pixels, to_pil
from ..models.checkpoint import local_or_hub
from ..rewards.base import ImageTextEncoder
from ..utils.errors import UserError, require
from ..utils.files import unreadable


@runtime_checkable
class HasSize(Protocol):
    """An encoder that looks at squares of one size."""

    @property
    def size(self) -> int:
        """Pixels along one side."""
        ...


@dataclass
class _Loaded:
    """A checkpoint of open_clip: its model (encode_image, encode_text), its tokenizer, its preprocessing."""

    model: ImageTextEncoder
    tokenizer: Callable[[list[str]], Tensor]
    size: int
    mean: Tensor
    std: Tensor


class OpenClip:
    """A model of open_clip_torch behind :class:`ImageTextEncoder`; nothing is loaded before it is first used.

    Args:
        source: a folder with open_clip_config.json and weights, a hub id ``owner/name`` of such a folder, or
            ``ARCHITECTURE=FILE``, as in ``ViT-B-32=weights/vit_b_32.safetensors`` (an OpenAI or LAION weight file).
        device, dtype: where and how it runs; embeddings come back in fp32.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        if not source.strip():
            raise UserError("the CLIP model is empty: give a folder, a hub id, or ARCHITECTURE=FILE")
        self.source, self.device, self.dtype = source, torch.device(device), dtype

    @property
    def size(self) -> int:
        """Pixels along one side of what the encoder looks at."""
        return self._loaded.size

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings fp32 [B, D] of pixels [B, 3, H, W] in [-1, 1], any size."""
        clip = self._loaded
        pixels = resized(pixels.to(self.device, torch.float32), clip.size)
        normal = ((pixels.clamp(-1, 1) + 1) / 2 - clip.mean) / clip.std
        return clip.model.encode_image(normal.to(self.dtype)).float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings fp32 [B, D]; texts longer than the model reads are cut, as open_clip does."""
        tokens: Sequence[str] | Tensor = self._loaded.tokenizer(list(texts)).to(self.device)
        return self._loaded.model.encode_text(tokens).float()  # type: ignore[arg-type]  # open_clip takes ids

    @cached_property
    def _loaded(self) -> _Loaded:
        return _load(self.source, self.device, self.dtype)


def _load(source: str, device: torch.device, dtype: torch.dtype) -> _Loaded:
    """Raises UserError saying which files are wanted and where."""
    name, equals, file = source.partition("=")
    folder = Path(source).expanduser()
    if equals:
        if not Path(file).expanduser().is_file():
            raise UserError(f"CLIP weights {file}: no such file: give ARCHITECTURE=FILE with a file that is there")
        wanted, weights = name, str(Path(file).expanduser())
        if name not in require("open_clip", "rewards").list_models():
            raise UserError(f"CLIP architecture {name!r}: open_clip knows none of that name, as in ViT-B-32")
    elif folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"{folder}: no open_clip_config.json: give the folder of an open_clip checkpoint")
        wanted, weights = f"local-dir:{folder}", None
    else:
        try:
            wanted, weights = f"hf-hub:{local_or_hub(source)}", None
        except UserError as error:
            raise UserError(f"CLIP model {error}, and not ARCHITECTURE=FILE") from None
    open_clip = require("open_clip", "rewards")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        model = open_clip.create_model(wanted, pretrained=weights, device=device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(wanted)
    except Exception as error:  # the hub's client and torch raise many kinds; all mean that the weights cannot be used
        raise UserError(
            f"CLIP model {source}: its weights cannot be read ({unreadable(weights or folder, error)}): wanted are "
            "open_clip_config.json and open_clip_model.safetensors (or open_clip_pytorch_model.bin)"
        ) from error
    side, visual = model.visual.image_size, model.visual
    mean, std = (
        torch.tensor(getattr(visual, name, None) or default, device=device).view(3, 1, 1)
        for name, default in (
            ("image_mean", open_clip.OPENAI_DATASET_MEAN),
            ("image_std", open_clip.OPENAI_DATASET_STD),
        )
    )
    model = model.to(dtype).eval().requires_grad_(False)
    return _Loaded(model, tokenizer, int(side[0] if isinstance(side, (tuple, list)) else side), mean, std)


def resized(pixels: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, H, W] with the shorter side brought to `size` (bicubic, antialiased) and the centre cut out."""
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    shorter = min(height, width)
    shape = (round(height * size / shorter), round(width * size / shorter))
    pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return pixels[..., top : top + size, left : left + size]


class Embeddings:
    """Normalised embeddings by an encoder, on the CPU; a text, and a reference by its path, is encoded once however
    often it is asked.

    Args:
        encoder: an :class:`ImageTextEncoder`, or a function that makes one when it is first needed.
        name: what the encoder is called where scores are kept.
        size: side in pixels to which references are brought before encoding; None: the encoder's own, else 224.
        device: where the encoder wants its pixels.
    """

    def __init__(
        self,
        encoder: ImageTextEncoder | Callable[[], ImageTextEncoder],
        name: str,
        size: int | None = None,
        device: str | torch.device = "cpu",
    ):
        self.name, self.device = name, torch.device(device)
        self._make, self._size = encoder, size
        self._texts: dict[str, Tensor] = {}
        self._references: dict[Path, tuple[Tensor, Tensor]] = {}

    @cached_property
    def encoder(self) -> ImageTextEncoder:
        """The encoder, made on first use."""
        return self._make if isinstance(self._make, ImageTextEncoder) else self._make()

    @property
    def size(self) -> int:
        return self._size or (self.encoder.size if isinstance(self.encoder, HasSize) else 224)

    def clip_t(self, samples_SD: Tensor, texts: Sequence[str]) -> list[float]:
        """CLIP-T of each sample: its mean cosine similarity to the texts. Put names into plain words first."""
        return (samples_SD @ self.texts(texts).T).mean(dim=1).tolist()

    def clip_i(self, samples_SD: Tensor, pixels: Tensor, paths: Sequence[Path]) -> list[float]:
        """CLIP-I of each sample: its mean cosine similarity to the references, itself left out where its pixels show
        one of them (a real image in place of a sample). Raises UserError where there is no reference."""
        if not paths:
            raise UserError("CLIP-I: the concept has no references to compare with")
        similar_SM = samples_SD @ self.references(paths).T
        other_SM = ~self.same_image(pixels, paths)
        other_SM[~other_SM.any(dim=1)] = True
        return ((similar_SM * other_SM).sum(dim=1) / other_SM.sum(dim=1)).tolist()

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[T, D]; only texts not seen before are encoded."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            self._texts.update(zip(new, _normal(self.encoder.encode_text(new)), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def references(self, paths: Sequence[Path]) -> Tensor:
        """[M, D]; only files not seen before are read and encoded. Raises UserError naming one that cannot be read."""
        new = [path for path in dict.fromkeys(paths) if path not in self._references]
        if new:
            pixels = torch.stack([load_pixels(path, self.size) for path in new])
            rows = self.samples(pixels)
            self._references.update(
                {path: (row, small) for path, row, small in zip(new, rows, resized(pixels, _LOOK), strict=True)}
            )
        return torch.stack([self._references[path][0] for path in paths])

    def samples(self, pixels: Tensor) -> Tensor:
        """[S, D] of pixels [S, 3, H, W] in [-1, 1]."""
        return _normal(self.encoder.encode_image(pixels.to(self.device)))

    def same_image(self, pixels: Tensor, paths: Sequence[Path]) -> Tensor:
        """bool [S, M]: sample s shows reference m itself, told by the pixels."""
        self.references(paths)
        looks_S = torch.stack([_small(one, self.size) for one in pixels]).flatten(1)
        return _alike(looks_S, self._looks(paths).flatten(1))

    def same_files(self, paths: Sequence[Path], others: Sequence[Path], mirrored: bool = True) -> Tensor:
        """bool [A, B]: file a shows the same as file b, told by the pixels; with `mirrored` also left to right."""
        self.references([*paths, *others])
        looks_A, looks_B = self._looks(paths), self._looks(others).flatten(1)
        same_AB = _alike(looks_A.flatten(1), looks_B)
        return same_AB | _alike(looks_A.flip(-1).flatten(1), looks_B) if mirrored else same_AB

    def _looks(self, paths: Sequence[Path]) -> Tensor:
        """[M, 3, 8, 8] of files that were read."""
        return torch.stack([self._references[path][1] for path in paths])


def _alike(looks_A: Tensor, looks_B: Tensor) -> Tensor:
    """bool [A, B] of flat looks."""
    return torch.cdist(looks_A, looks_B, p=1) / looks_A.shape[1] < _SAME


def _normal(rows: Tensor) -> Tensor:
    return F.normalize(rows.detach().float().cpu(), dim=-1)


_LOOK, _SAME = 8, 0.01
"""Two images are the same when their 8×8 looks differ by less than this on average, in [-1, 1]. Sizes and crops of
one photo differ by at most 0.004; a photo through an image tokenizer, the best copy a sample can be, by 0.018."""


def _small(pixels: Tensor, size: int) -> Tensor:
    """An image's small look, by the same steps as a reference's."""
    image = to_pil(pixels)
    shorter = min(image.size)
    scaled = image.resize((round(image.width * size / shorter), round(image.height * size / shorter)))
    return resized(resized(from_pil(scaled)[None], size), _LOOK)[0]
