"""Which files a published network wants, under which licence they stand, how large they are, and how to get them.

A family of models says it beside its words (`Family.files`), a reward model where it registers. Loaders ask here what
is missing, and so do `pyunictokens doctor --weights` and `train --plan`. It looks at folders and at the hub's local
cache; it opens no file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..utils.errors import UserError
from .checkpoint import WEIGHT_FILES, resolve

WEIGHTS = (*WEIGHT_FILES, *(f"{name}.index.json" for name in WEIGHT_FILES))
TOKENIZER = ("tokenizer.json", "vocab.txt")
AUTO = "auto"
"""As a path: the folder that the examples keep such files in (`WeightFiles.home`), or the hub where there is none."""
PROCESSOR = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class WeightFiles:
    """The files of one network."""

    network: str
    source: str
    """The hub id, or where else the weights come from."""
    files: tuple[tuple[str, ...], ...]
    """What a folder must hold; of each tuple one name is enough."""
    licence: str
    folder: str = ""
    """The folder the project's examples keep them in; by default `weights/` and the name at the hub."""
    get: str = ""
    """A command that puts them into `{folder}`; by default the hub's own."""
    also: tuple[str, ...] = ()
    """Patterns of files that are downloaded besides the usual ones."""
    gigabytes: float | None = None
    """Size of the published files, in 10⁹ bytes; a test compares it with the network's parameters. None: not known."""

    @property
    def home(self) -> str:
        return self.folder or f"weights/{self.source.partition('/')[2]}"

    def missing(self, folder: Path) -> list[str]:
        """What `folder` lacks, each as its alternatives joined by " or "."""
        return [_either(names) for names in self.files if not any((folder / name).is_file() for name in names)]

    def command(self, folder: str | os.PathLike[str] | None = None) -> str:
        """The command that gets the files into `folder`."""
        get = self.get or f"hf download {self.source} --local-dir {{folder}}"
        return get.replace("{folder}", str(folder or self.home))

    def place(self) -> str:
        """What AUTO stands for: the examples' folder where it is there, else the hub id, or of files that are on no hub
        that folder's name."""
        on_hub = self.source.count("/") == 1 and " " not in self.source
        return self.home if Path(self.home).is_dir() or not on_hub else f"hub:{self.source}"

    def find(self, path: str | os.PathLike[str], *, offline: bool) -> Path:
        """The folder of the network, whole. Raises UserError naming what is missing and where it comes from."""
        path = self.place() if str(path) == AUTO else path
        try:
            folder = resolve(path, offline=offline, also=self.also)
        except UserError as error:
            raise UserError(f"{error}; wanted is {self.network}: {self.command()}") from error
        missing = self.missing(folder)
        if missing:
            target = None if str(path).startswith("hub:") else path
            raise UserError(f"{folder}: {', '.join(missing)} missing; get them with: {self.command(target)}")
        return folder


def _either(names: tuple[str, ...]) -> str:
    """A few of the names, of which one is enough."""
    return " or ".join(names[:2]) + (" or …" if len(names) > 2 else "")


@dataclass(frozen=True)
class WeightStatus:
    """What was found of one network's weights."""

    name: str
    network: str
    source: str
    looked_in: list[str]
    found: str | None
    """The folder or file; None where there is none."""
    missing: list[str]
    ok: bool
    licence: str
    get: str
    gigabytes: float | None = None
    """Of the files that are here; else of the published ones, where that is known."""


def status_of(name: str, wanted: WeightFiles, given: str | None) -> WeightStatus:
    """The weights of the network `name`, looked for in `given`, else in the examples' folder and the hub's cache."""
    places = [given] if given and given != AUTO else [wanted.home, wanted.source]
    found = next((path for place in places if (path := local_place(place)) is not None), None)
    lacking = [_either(names) for names in wanted.files] if found is None else wanted.missing(found)
    missing = [] if found is not None and found.is_file() else lacking
    return WeightStatus(
        name,
        wanted.network,
        wanted.source,
        places,
        None if found is None else str(found),
        missing,
        not missing,
        wanted.licence,
        wanted.command(found),
        wanted.gigabytes if missing or found is None else size_of(found) / 1e9,
    )


def size_of(place: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = [place] if place.is_file() else [each for each in place.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def local_place(place: str) -> Path | None:
    """The folder (or file) of that name, or of a hub id that was downloaded before; None where there is none."""
    path = Path(place).expanduser()
    if path.exists():
        return path
    try:
        return resolve(place, offline=True)
    except UserError:
        return None
