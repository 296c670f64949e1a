"""Formats of image files: what a file is, told by its first bytes, and whether this installation can decode it."""

from __future__ import annotations

import functools
from pathlib import Path

from ..utils.errors import needs

with needs("data"):
    from PIL import features


_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_EXTRA = {
    "HEIF": "a HEIC image, which pillow-heif reads: pip install 'pyunictokens[heif]', or save it as JPEG or PNG",
    "AVIF": "an AVIF image, which this Pillow cannot read: pip install -U pillow (11.3 or later), or save it as PNG",
}
"""Formats that not every installation reads, and what to do then."""

ENDINGS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
}
"""Endings of images that are read. A file of another ending is an image when its content is one."""

_RAW = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"})


def image_format(path: Path) -> str:
    """What kind of image is in `path` ("PNG", "HEIF", "RAW" …); "" where it is none. By content, else by its ending."""
    if path.suffix.lower() in _RAW:  # most look like TIFF, of which a reader gets the thumbnail
        return "RAW"
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except (OSError, ValueError):
        head = b""
    return _by_content(head) or ENDINGS.get(path.suffix.lower(), "")


def _by_content(head: bytes) -> str:
    for start, name in (
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"GIF8", "GIF"),
        (b"II*\x00", "TIFF"),
        (b"MM\x00*", "TIFF"),
        (b"8BPS", "Photoshop"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
        (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    ):
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and head[14:18] in {bytes((size, 0, 0, 0)) for size in (12, 40, 52, 56, 64, 108, 124)}:
        return "BMP"
    if head[4:8] == b"ftyp":
        brands = {head[8:12], *(head[start : start + 4] for start in range(16, 32, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
            return "HEIF"
        return "RAW" if b"crx " in brands else ""
    return ""


@functools.cache
def can_read(kind: str) -> bool:
    """Whether images of a format (Pillow's name of it) can be decoded here."""
    if kind == "AVIF":
        return "avif" in features.modules and features.check("avif") is True
    if kind == "HEIF":
        try:
            import pillow_heif
        except ImportError:
            return False
        pillow_heif.register_heif_opener()
        return True
    return kind in _FORMATS


def missing_decoder(kind: str) -> str:
    """What to do about an image of a format that cannot be decoded here."""
    return _EXTRA.get(kind, f"{kind} images are not read: save it as JPEG or PNG")


def readable() -> list[str]:
    """Formats that are decoded here, by Pillow's names."""
    return [*_FORMATS, *filter(can_read, _EXTRA)]
