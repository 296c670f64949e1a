"""Putting a concept that was built aside into its data folder: whole or not at all, whoever else does the same.

    ROOT/.NAME.xxxx.part/             built here, locked by the process that builds
    ROOT/.NAME.xxxx.part/installing   from the first rename to the last: who is killed meanwhile leaves it behind

A data folder is locked (the folder itself, no file is left) while files are moved into it and while the lists that all
concepts share are read and written anew. What a killed process was moving is moved to its end by the next that works
here; until then the concept, whose halves may be of two ages, is refused by its readers.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import folder_lock, read_json, sync_folder, write_bytes_atomic, write_json, write_text_atomic
from .image_files import is_file, list_images

log = logging.getLogger(__name__)

WAIT = 120.0
"""Seconds to wait for another process that moves files into the same data folder."""
HALVES = ("test", "train")
_MARK = "installing"


class Listings:
    """The two files that all concepts of a data folder share. Raises UserError where one cannot be read."""

    def __init__(self, root: Path) -> None:
        self.concepts_path = root / "concepts_list.json"
        self.images_path = root / "concept" / "train" / "train_images.json"
        self.concepts = read_json(self.concepts_path) if is_file(self.concepts_path) else []
        self.images = read_json(self.images_path) if is_file(self.images_path) else {}
        if not (isinstance(self.concepts, list) and all(isinstance(item, str) for item in self.concepts)):
            raise UserError(f"{self.concepts_path}: must be a list of concept names: mend or remove it first")
        if not isinstance(self.images, dict):
            raise UserError(f"{self.images_path}: must be an object {{concept: [file, …]}}: mend or remove it first")

    def write(self, name: str, files: list[str]) -> None:
        """Both files with concept `name`, whose training images are `files`."""
        write_json(self.images_path, {**self.images, name: files})
        write_json(self.concepts_path, self.concepts if name in self.concepts else [*self.concepts, name])


def list_concept(root: Path, name: str, files: list[str]) -> None:
    """Add a concept to the lists of a data folder that others may be adding to as well."""
    with folder_lock(root, "", WAIT):
        Listings(root).write(name, files)


@dataclass
class Aside:
    """A folder in which a concept is being built; locked, so that nobody takes it for one left behind."""

    path: Path
    _held: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Remove the folder, whatever is still in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._held.close()


def building(root: Path, name: str) -> Aside:
    """A new folder to build in; what killed processes left in `root` is finished or removed first."""
    with folder_lock(root, "", WAIT):
        for left in sorted(root.glob(".*.part")):
            if not left.is_dir():
                continue
            try:
                with folder_lock(left, "") as alone:
                    if alone:
                        _finish(left, root)
                        shutil.rmtree(left, ignore_errors=True)
            except UserError as error:  # somebody builds there
                log.debug("%s: %s", left, error)
        aside = Aside(Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=root)))
        aside._held.enter_context(folder_lock(aside.path, ""))
        return aside


def interrupted(root: Path) -> list[str]:
    """Names of concepts that a process was putting into `root` when it was killed, or is putting there now."""
    names = []
    for mark in root.glob(f".*.part/{_MARK}"):
        with suppress(OSError):  # whoever was at it is done
            names.append(mark.read_text(encoding="utf-8", errors="replace").strip())
    return names


def _finish(left: Path, root: Path) -> None:
    """Move to its end what a killed process was moving."""
    if not (left / _MARK).is_file():
        return
    name = (left / _MARK).read_text(encoding="utf-8").strip()
    log.warning("%s: concept %r was being put into place when its process was killed: done now", root, name)
    for half in HALVES:
        place, new = root / "concept" / half / name, left / "concept" / half / name
        if new.is_dir():
            if place.exists():
                (left / "replaced").mkdir(exist_ok=True)
                os.rename(place, left / "replaced" / half)
            os.rename(new, place)
    _share(left, root, os.rename)
    Listings(root).write(name, [path.name for path in list_images(root / "concept" / "train" / name)])


def _share(aside: Path, root: Path, move: Callable[[Path, Path], object]) -> None:
    for shared in ("random_images", "black_512x512.png"):
        if (aside / shared).exists() and not (root / shared).exists():
            move(aside / shared, root / shared)


def install(aside: Path, root: Path, name: str, force: bool = False) -> None:
    """Move what was built into place; on any failure take every step back.

    Raises UserError where a concept of this name is there, unless `force`.
    """
    with folder_lock(root, "", WAIT):
        refuse_present(root, name, force)
        _install(aside, root, name)


def refuse_present(root: Path, name: str, force: bool) -> None:
    """Raise UserError where a concept of this name is there, unless it may be replaced."""
    homes = [root / "concept" / half / name for half in reversed(HALVES)]
    if not force and any(home.exists() for home in homes):
        raise UserError(f"{homes[0]}: concept {name!r} exists already: choose another name, or force to replace it")


def _install(aside: Path, root: Path, name: str) -> None:
    undo: list[Callable[[], object]] = []
    listings = Listings(root)

    def move(source: Path, target: Path) -> None:
        os.rename(source, target)
        undo.append(lambda: os.rename(target, source))

    def keep(path: Path) -> None:
        old = path.read_bytes() if is_file(path) else None
        undo.append(lambda: path.unlink(missing_ok=True) if old is None else write_bytes_atomic(path, old))

    def folder(path: Path) -> None:
        if not path.is_dir():
            path.mkdir()
            undo.append(path.rmdir)

    try:
        folder(root / "concept")
        for half in HALVES:
            folder(root / "concept" / half)
        write_text_atomic(aside / _MARK, name)
        undo.append((aside / _MARK).unlink)
        for half in HALVES:
            place = root / "concept" / half / name
            if place.exists():
                (aside / "replaced").mkdir(exist_ok=True)
                move(place, aside / "replaced" / half)
            move(aside / "concept" / half / name, place)
            sync_folder(place.parent)
        _share(aside, root, move)
        keep(listings.images_path)
        keep(listings.concepts_path)
        listings.write(name, [path.name for path in list_images(root / "concept" / "train" / name)])
        (aside / _MARK).unlink()
    except BaseException:
        for step in reversed(undo):
            step()
        raise
