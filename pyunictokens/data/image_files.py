"""Which files of a folder are images, whatever their names end in, and what in it is no part of the data.

Systems and tools leave folders and files of their own behind (`__MACOSX`, `@eaDir`, `.ipynb_checkpoints`); masks lie
beside the images they belong to. Nothing is decoded here: the first bytes of a file say what it is.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .formats import can_read, image_format, missing_decoder

_SYSTEM = frozenset(
    {"__macosx", "@eadir", "@tmp", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
    | {"network trash folder", "temporary items", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"}
)
_MASK = re.compile(r"(?:^|[^a-z])masks?(?=$|[^a-z])")


def is_system(name: str) -> bool:
    """Whether a system or a tool made the file or folder `name`; hidden ones count."""
    return name.startswith((".", "~$")) or name.casefold() in _SYSTEM


@dataclass
class ImageFolder:
    """The images directly in a folder in natural order, and every image there that is not used, with the reason."""

    images: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Reason → names, in natural order."""

    def notes(self) -> Iterator[str]:
        """One line a reason, for the user."""
        for reason, names in self.left_out.items():
            yield f"{', '.join(names)}: {reason}"


def look_into(folder: Path, known: Container[str] = ()) -> ImageFolder:
    """The images of `folder`; sub-folders that hold images and are not `known` by name are among what is left out."""
    found = _images(folder)
    for name in folders_in(folder)[0] if is_folder(folder) else ():
        inside = [] if name.casefold() in known else _images(folder / name).images
        if inside:
            number = f"{len(inside)} image{'' if len(inside) == 1 else 's'}"
            reason = f"a folder of {number}, which is not looked into: name it, or move them up"
            found.left_out.setdefault(reason, []).append(f"{name}/")
    return found


def list_images(folder: Path) -> list[Path]:
    """The images directly in `folder` that are used, in natural order; none where it cannot be read."""
    return _images(folder).images


def _images(folder: Path) -> ImageFolder:
    found = ImageFolder()
    try:
        entries = sorted(folder.iterdir(), key=lambda path: (natural_key(path.name), path.name))
    except (OSError, ValueError):
        return found
    kinds = {path: image_format(path) for path in entries if not is_system(path.name) and is_file(path)}
    images = [path for path, kind in kinds.items() if kind]
    stems = {path.stem.casefold() for path in images}

    def leave(path: Path, reason: str) -> None:
        found.left_out.setdefault(reason, []).append(path.name)

    for path in images:
        if _is_mask(path.stem.casefold(), stems):
            leave(path, "masks of other images here: left out")
        elif not can_read(kinds[path]):
            leave(path, f"left out: {missing_decoder(kinds[path])}")
        else:
            found.images.append(path)
    return found


def folders_in(root: Path) -> tuple[list[str], list[str]]:
    """(names of the sub-folders in natural order, names of those that a system or a tool made)."""
    names = sorted(
        (path.name for path in root.iterdir() if is_folder(path)), key=lambda name: (natural_key(name), name)
    )
    return [name for name in names if not is_system(name)], [name for name in names if is_system(name)]


def _is_mask(stem: str, stems: set[str]) -> bool:
    """Whether `stem` is that of another image and the word mask (`0_mask`, `mask-0`)."""
    bare = _MASK.sub("", stem, count=1)
    return bare != stem and (bare.strip(" _-.()") in stems or bare in stems)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts 10.png after 9.png."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(1, int(part[:300]), "") if part.isdecimal() and part.isascii() else (0, 0, part) for part in parts]


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file; names that no file system takes are not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; names that no file system takes are not."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
