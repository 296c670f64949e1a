"""Image files to tensors and back: what a camera, a phone or a scanner wrote becomes float [3, H, W] in [-1, 1].

Orientation tags, transparency (over white), gray, palette, CMYK and 16-bit are handled; the shorter side is brought to
the wanted size (bicubic) and the centre cut out, as the published transform does without its random flip. Whatever
cannot be read becomes a UserError that names the file.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..utils.errors import UserError, needs
from ..utils.files import refuse_lfs_pointer, write_bytes_atomic
from ..utils.spelling import on_disk
from .formats import can_read, image_format, missing_decoder, readable

with needs("data"):
    from PIL import Image, ImageDraw, ImageFont, ImageOps

PIXEL_LIMIT = 120_000_000
"""Largest image that is decoded, in pixels; a file of a few kilobytes can claim a thousand times that."""

_SAVE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read_image(path: str | os.PathLike[str], at_least: int | None = None) -> Image.Image:
    """The image in `path` as an upright 8-bit RGB image.

    With `at_least`, a large JPEG is decoded at a reduced scale whose sides are still four times that. Raises UserError
    naming the file: missing, not an image, cut off, too large.
    """
    path = on_disk(Path(path))
    return _rgb(_loaded(path, path, at_least, PIXEL_LIMIT))


def read_image_bytes(data: bytes, name: str, limit: int = PIXEL_LIMIT) -> Image.Image:
    """The image that `data` holds, upright, as 8-bit RGB, or RGBA where it has transparency. Raises UserError naming it
    by `name`; `limit` is the most pixels that are decoded."""
    image = _loaded(io.BytesIO(data), name, None, limit)
    return image.convert("RGBA") if _transparent(image) else _rgb(image)


def _loaded(source: Path | io.BytesIO, name: object, at_least: int | None, limit: int) -> Image.Image:
    """The decoded, upright image of a file or its bytes, in the mode it has."""
    try:
        with warnings.catch_warnings():
            # An image beyond Pillow's warning size is judged by the limit; broken metadata is no reason to complain.
            warnings.simplefilter("ignore")
            with Image.open(source, formats=readable()) as image:
                width, height = image.size
                if width * height > limit:
                    megapixels = width * height / 1e6
                    raise UserError(
                        f"{name}: {width}×{height} is {megapixels:.0f} megapixels: the limit is {limit / 1e6:.0f}"
                    )
                if at_least is not None:
                    image.draft("RGB", (4 * at_least, 4 * at_least))
                image.load()
                return _upright(image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: no such image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: claims far more than the limit of {limit / 1e6:.0f} megapixels") from None
    except Image.UnidentifiedImageError:
        if isinstance(source, Path):
            refuse_lfs_pointer(source)
            kind = image_format(source)
            if kind and not can_read(kind):
                raise UserError(f"{name}: {missing_decoder(kind)}") from None
        raise UserError(
            f"{name}: not an image that can be read (PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF, HEIC)"
        ) from None
    except PermissionError as error:
        raise UserError(f"{name}: may not be read: {error.strerror}") from None
    except Exception as error:  # a decoder fed with garbage raises whatever it stumbles over
        raise UserError(f"{name}: the image is damaged or cut off ({type(error).__name__}: {error})") from error


def load_pixels(path: str | os.PathLike[str], size: int) -> torch.Tensor:
    """The image as float32 [3, size, size] in [-1, 1]: shorter side to `size` (bicubic), then the centre cut out."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 8192:
        raise UserError(f"size={size!r}: must be a whole number from 1 to 8192")
    return from_pil(square(read_image(path, at_least=size), size))


def load_batch(paths: Sequence[str | os.PathLike[str]], size: int) -> torch.Tensor:
    """:func:`load_pixels` of several files, [B, 3, size, size]."""
    if not paths:
        raise UserError("no images to load: the list of files is empty")
    return torch.stack([load_pixels(path, size) for path in paths])


def black_image(size: int) -> torch.Tensor:
    """The image for questions about no image: black, [3, size, size], all −1."""
    return torch.full((3, size, size), -1.0)


def from_pil(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 [3, H, W] in [-1, 1]."""
    pixels_HWC = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).copy())
    return pixels_HWC.permute(2, 0, 1).contiguous() / 127.5 - 1.0


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] (what lies outside is cut) as an 8-bit RGB image. NaN raises UserError."""
    if pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise UserError(f"pixels of shape {list(pixels.shape)}: must be [3, height, width]")
    pixels = pixels.detach().to("cpu", torch.float32)
    if torch.isnan(pixels).any():
        raise UserError("pixels hold NaN: there is no image to draw")
    levels = ((pixels.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def save_image(pixels: torch.Tensor | Image.Image, path: str | os.PathLike[str]) -> None:
    """Write pixels [3, H, W] in [-1, 1], or an image, as .png, .jpg or .webp: whole or not at all."""
    path = Path(path)
    kind = _SAVE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: the name must end in {', '.join(_SAVE_FORMATS)}")
    image = pixels if isinstance(pixels, Image.Image) else to_pil(pixels)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=kind)
    write_bytes_atomic(path, buffer.getvalue())


def shrink(image: Image.Image, shorter: int) -> Image.Image:
    """`image`, shrunk (never enlarged) so that its shorter side is at most `shorter`."""
    return fit_within(image, round(shorter * max(image.size) / min(image.size)))


def fit_within(image: Image.Image, longest: int) -> Image.Image:
    """`image`, shrunk (never enlarged) so that its longer side is at most `longest`."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def make_grid(
    pixels: torch.Tensor | Sequence[torch.Tensor],
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    gap: int = 6,
    tile: int | None = None,
) -> Image.Image:
    """Images ([B, 3, H, W] or a list of [3, H, W], in [-1, 1]) side by side on white, each over its caption.

    Every image is scaled to a square of `tile` pixels (default: its own size, with captions at least 160 so that they
    can be read); captions are broken into as many lines as they need.
    """
    images = [to_pil(image) for image in pixels]
    if not images:
        raise UserError("no images for a grid: the list is empty")
    if columns < 1:
        raise UserError(f"columns={columns}: must be 1 or more")
    if captions is not None and len(captions) != len(images):
        raise UserError(f"{len(captions)} captions for {len(images)} images: give one for each")
    columns = min(columns, len(images))
    side = tile or max(max(image.size) for image in images)
    side = max(side, 160) if captions is not None and tile is None else side
    font = ImageFont.load_default(max(11, side // 14))
    line = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 14
    lines = [_wrap(caption, font, side) for caption in captions] if captions is not None else [[]] * len(images)
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [side + max(len(lines[index]) for index in row) * line for row in rows]
    size = (columns * side + (columns + 1) * gap, sum(heights) + (len(rows) + 1) * gap)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = gap + column * (side + gap)
            image = images[index]
            # Enlarging keeps the pixels visible as they are; only shrinking smooths.
            how = Image.Resampling.NEAREST if side >= max(image.size) else Image.Resampling.BICUBIC
            grid.paste(image.resize((side, side), how), (left, top))
            for number, text in enumerate(lines[index]):
                draw.text((left, top + side + number * line), text, fill="black", font=font)
        top += height + gap
    return grid


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in lines no wider than `width`; a word that is wider by itself is cut."""
    lines: list[str] = []
    current = ""
    for word in text.split():
        if font.getlength(f"{current} {word}".strip()) <= width:
            current = f"{current} {word}".strip()
            continue
        if current:
            lines.append(current)
        while font.getlength(word) > width and len(word) > 1:
            cut = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
            lines.append(word[:cut])
            word = word[cut:]
        current = word
    return [*lines, current] if current else lines


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # orientation is a hint: a broken tag leaves the image as it lies in the file
        return image


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; what is transparent becomes white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if _transparent(image):
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, (255, 255, 255, 255)), colour)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float gray as 8-bit gray: by the mode's range, for float by the values (0…1 or 0…255)."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if image.mode == "F":
        scale = 255.0 if top <= 1.0 else 1.0
    elif image.mode == "I":  # 32 bits hold what was written with 8 or 16
        scale = 1.0 if top <= 255 else 255.0 / max(65535.0, top)
    else:
        scale = 255.0 / 65535.0
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def square(image: Image.Image, size: int) -> Image.Image:
    """An image as a square: shorter side to `size`, bicubic, then the centre, rounded as torchvision does."""
    width, height = image.size
    shorter, longer = min(width, height), max(width, height)
    length = max(size, int(size * longer / shorter))
    target = (size, length) if width <= height else (length, size)
    if length > 64 * size:  # a strip so long that the scaled copy would be huge: cut out the centre first
        keep = shorter
        left, top = (width - keep) // 2, (height - keep) // 2
        return image.crop((left, top, left + keep, top + keep)).resize((size, size), Image.Resampling.BICUBIC)
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))
