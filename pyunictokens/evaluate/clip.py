"""CLIP as the image–text encoder of CLIP-T and CLIP-I: any model of open_clip_torch, from a folder or the hub, and the
keeper of embeddings that makes each text and each photo cost one pass.

Pixels come as tensors and stay on the device; they are brought to the encoder's size and colours with the settings of
the checkpoint's own preprocessing (shorter side, bicubic, centre cut out).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import load_pixels, to_pil
from ..utils.errors import UserError, require


class Encoder(Protocol):
    """What CLIP scores ask of a network."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D] of pixels [B, 3, H, W] in [-1, 1]."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, D]."""
        ...


class OpenClip:
    """A model of open_clip_torch behind :class:`Encoder`; nothing is loaded before it is first used.

    Args:
        source: a folder with open_clip_config.json and weights, a hub id ``owner/name`` of such a folder, or
            ``ARCHITECTURE=FILE``, as in ``ViT-B-32=weights/vit_b_32.safetensors`` (an OpenAI or LAION weight file).
        device, dtype: where and how it runs; embeddings come back in fp32.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        if not source.strip():
            raise UserError("the CLIP model is empty: give a folder, a hub id, or ARCHITECTURE=FILE")
        self.source, self.device, self.dtype = source, torch.device(device), dtype
        self._parts: tuple[Any, Any, int, Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        """Pixels along one side of what the encoder looks at."""
        return self._loaded()[2]

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings fp32 [B, D] of pixels [B, 3, H, W] in [-1, 1], any size."""
        model, _, size, mean, std = self._loaded()
        pixels = resized(pixels.to(self.device, torch.float32), size)
        normal = ((pixels.clamp(-1, 1) + 1) / 2 - mean) / std
        return model.encode_image(normal.to(self.dtype)).float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings fp32 [B, D]; texts longer than the model reads are cut, as open_clip does."""
        model, tokenizer, *_ = self._loaded()
        return model.encode_text(tokenizer(list(texts)).to(self.device)).float()

    def _loaded(self) -> tuple[Any, Any, int, Tensor, Tensor]:
        if self._parts is None:
            model, tokenizer = _load(self.source, self.device)
            model = model.to(self.dtype).eval().requires_grad_(False)
            visual = model.visual
            size = visual.image_size
            side = int(size[0] if isinstance(size, (tuple, list)) else size)
            mean, std = (
                torch.tensor(getattr(visual, name, None) or default, device=self.device).view(3, 1, 1)
                for name, default in (
                    ("image_mean", (0.48145466, 0.4578275, 0.40821073)),
                    ("image_std", (0.26862954, 0.26130258, 0.27577711)),
                )
            )
            self._parts = model, tokenizer, side, mean, std
        return self._parts


def _load(source: str, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer). Raises UserError saying which files are wanted and where."""
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
    elif source.count("/") == 1 and not source.startswith((".", "~", "/")):
        wanted, weights = f"hf-hub:{source}", None
    else:
        raise UserError(f"CLIP model {source}: no such folder, no hub id owner/name, and not ARCHITECTURE=FILE")
    open_clip = require("open_clip", "rewards")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        model = open_clip.create_model(wanted, pretrained=weights, device=device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(wanted)
    except Exception as error:  # the hub's client and torch raise many kinds; all mean that the weights cannot be used
        raise UserError(
            f"CLIP model {source}: its weights cannot be read ({type(error).__name__}: {error}): wanted are "
            "open_clip_config.json and open_clip_model.safetensors (or open_clip_pytorch_model.bin)"
        ) from error
    return model, tokenizer


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
    """Normalised embeddings by an encoder; a text, and a photo by its path, is encoded once however often it is asked.

    Args:
        encoder: an :class:`Encoder`, or a function that makes one when it is first needed.
        name: what the encoder is called where scores are kept.
        size: side in pixels to which photos are brought before encoding; None: the encoder's own, else 224.
    """

    def __init__(self, encoder: Encoder | Callable[[], Encoder], name: str, size: int | None = None):
        self._make = encoder
        self.name = name
        self._size = size
        self._encoder: Encoder | None = None
        self._texts: dict[str, Tensor] = {}
        self._photos: dict[Path, tuple[Tensor, Tensor]] = {}

    @property
    def encoder(self) -> Encoder:
        """The encoder, made on first use."""
        if self._encoder is None:
            made: Any = self._make
            self._encoder = made if hasattr(made, "encode_image") else made()
        return cast(Encoder, self._encoder)

    @property
    def size(self) -> int:
        return self._size or int(getattr(self.encoder, "size", 224))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[T, D]; only texts not seen before are encoded."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            self._texts.update(zip(new, self._normal(self.encoder.encode_text(new)), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def photos(self, paths: Sequence[Path]) -> Tensor:
        """[M, D]; only photos not seen before are read and encoded. Raises UserError naming one that cannot be read."""
        new = [path for path in dict.fromkeys(paths) if path not in self._photos]
        if new:
            pixels = torch.stack([load_pixels(path, self.size) for path in new])
            rows = self._normal(self.encoder.encode_image(pixels))
            self._photos.update(
                {path: (row, small) for path, row, small in zip(new, rows, resized(pixels, _LOOK), strict=True)}
            )
        return torch.stack([self._photos[path][0] for path in paths])

    def drawings(self, pixels: Tensor) -> Tensor:
        """[S, D] of pixels [S, 3, H, W] in [-1, 1]."""
        return self._normal(self.encoder.encode_image(pixels))

    def same_picture(self, pixels: Tensor, paths: Sequence[Path]) -> Tensor:
        """bool [S, M]: drawing s shows photo m itself (a real image in place of a drawing), told by the pixels."""
        self.photos(paths)
        looks_S = torch.stack([_small(one, self.size) for one in pixels]).flatten(1)
        looks_M = torch.stack([self._photos[path][1] for path in paths]).flatten(1)
        return torch.cdist(looks_S, looks_M, p=1) / looks_S.shape[1] < _SAME

    @staticmethod
    def _normal(rows: Tensor) -> Tensor:
        return F.normalize(rows.detach().float().cpu(), dim=-1)


_LOOK, _SAME = 8, 0.01
"""Two pictures are the same when their 8×8 looks differ by less than this on average, in [-1, 1]. Sizes and crops of
one photo differ by at most 0.004; a photo through an image tokenizer, the best copy a drawing can be, by 0.018."""


def _small(pixels: Tensor, size: int) -> Tensor:
    """A picture's small look, by the same steps as a photo's."""
    from ..data.images import from_pil

    image = to_pil(pixels)
    shorter = min(image.size)
    scaled = image.resize((round(image.width * size / shorter), round(image.height * size / shorter)))
    return resized(resized(from_pil(scaled)[None], size), _LOOK)[0]
