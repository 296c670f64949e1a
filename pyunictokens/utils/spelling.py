"""Names of files as systems compare them: some tell upper from lower case and ways to compose accents, some do not."""

from __future__ import annotations

import os
import unicodedata
import warnings
from pathlib import Path


def spelled(path: Path) -> Path:
    """`path` with its names as they are spelled on disk, where it is there under one other spelling alone.

    Upper and lower case and the way accents are composed do not count: systems differ in that, and folders travel.
    `path` itself where it exists, and where nothing or more than one thing fits.
    """
    if os.path.lexists(path) or path.parent == path:
        return path
    folder = spelled(path.parent)
    try:
        fits = [name for name in os.listdir(folder) if loose(name) == loose(path.name)]
    except (OSError, ValueError):
        return path
    return folder / fits[0] if len(fits) == 1 else path


def on_disk(path: Path) -> Path:
    """:func:`spelled`, with a warning where the spelling differs."""
    found = spelled(path)
    if found != path:
        warnings.warn(f"{path} is spelled {found.name} on disk: it is read", stacklevel=3)
    return found


def loose(name: str) -> str:
    """`name` as names are compared where case and the way accents are composed do not count."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
