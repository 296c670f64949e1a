"""Which files each expert's network wants, under which licence they stand, and the command that gets them.

One table, read by the loaders (to say what is missing) and by `pyunictokens doctor --weights`. It looks at folders and
at the hub's local cache; it downloads nothing and opens no file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.checkpoint import WEIGHT_FILES, resolve
from ..utils.errors import UserError

_WEIGHTS = (*WEIGHT_FILES, *(f"{name}.index.json" for name in WEIGHT_FILES))
_TOKENIZER = ("tokenizer.json", "vocab.txt")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
FACENET_FILES = ("20180402-114759-vggface2.pt", "20180408-102900-casia-webface.pt")
"""Published InceptionResnetV1 weights, by the names they are published under."""
_FACENET_AT = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/" + FACENET_FILES[0]


@dataclass(frozen=True)
class Wanted:
    """The files of one expert's network."""

    expert: str
    network: str
    source: str
    """The hub id, or where else the weights come from."""
    folder: str
    """The folder the project's examples keep them in."""
    files: tuple[tuple[str, ...], ...]
    """What a folder must hold; of each tuple one name is enough."""
    licence: str
    get: str
    """A command that puts them into `{folder}`."""

    def missing(self, folder: Path) -> list[str]:
        """What `folder` lacks, each as its alternatives joined by " or "."""
        return [_either(names) for names in self.files if not any((folder / name).is_file() for name in names)]

    def command(self, folder: str | os.PathLike[str] | None = None) -> str:
        """The command that gets the files into `folder`."""
        return self.get.format(folder=folder or self.folder)


def _either(names: tuple[str, ...]) -> str:
    """A few of the names, of which one is enough."""
    return " or ".join(names[:2]) + (" or …" if len(names) > 2 else "")


def _hub(expert: str, network: str, source: str, files: tuple[tuple[str, ...], ...], licence: str) -> Wanted:
    folder = f"weights/{source.partition('/')[2]}"
    return Wanted(expert, network, source, folder, files, licence, f"hf download {source} --local-dir {{folder}}")


WANTED: dict[str, Wanted] = {
    wanted.expert: wanted
    for wanted in (
        _hub(
            "tier",
            "ERNIE 3.0 (any sentence encoder of transformers)",
            "nghuyong/ernie-3.0-base-zh",
            (("config.json",), _WEIGHTS, _TOKENIZER),
            "none stated on its card; ERNIE 3.0 itself is Apache-2.0",
        ),
        _hub(
            "ber",
            "BLIP-2 with its retrieval heads",
            "Salesforce/blip2-itm-vit-g",
            (("config.json",), _WEIGHTS, _TOKENIZER, _PROCESSOR),
            "MIT",
        ),
        _hub("der", "DINOv2", "facebook/dinov2-base", (("config.json",), _WEIGHTS, _PROCESSOR), "Apache-2.0"),
        Wanted(
            "fer",
            "FaceNet (InceptionResnetV1); MTCNN comes with facenet-pytorch",
            "the releases of facenet-pytorch",
            "weights/facenet",
            (FACENET_FILES,),
            "MIT (code and weights; trained on VGGFace2, whose pictures are for research)",
            f"curl -L --create-dirs -o {{folder}}/{FACENET_FILES[0]} {_FACENET_AT}",
        ),
    )
}
"""The networks of the paper by expert."""


def find(expert: str, path: str | os.PathLike[str], *, offline: bool) -> Path:
    """The folder of an expert's network, whole. Raises UserError naming what is missing and where it comes from."""
    wanted = WANTED[expert]
    try:
        folder = resolve(path, offline=offline, also=("*.pt",) if expert == "fer" else ())
    except UserError as error:
        raise UserError(f"{error}; {expert} wants {wanted.network}: {wanted.command()}") from error
    missing = wanted.missing(folder)
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} missing; get them with: {wanted.command(path)}")
    return folder


def status(paths: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """One finding an expert: where its network is looked for, whether it is whole, its licence, and how to get it.

    paths: folder or hub id of every expert to look for; None looks for all of them, in the folders that the examples
    use and in the hub's local cache.
    """
    chosen = [wanted for wanted in WANTED.values() if paths is None or wanted.expert in paths]
    return [_status(wanted, paths[wanted.expert] if paths is not None else None) for wanted in chosen]


def _status(wanted: Wanted, given: str | None) -> dict[str, Any]:
    places = [given] if given else [wanted.folder, wanted.source]
    found = next((path for place in places if (path := _local(place)) is not None), None)
    whole_file = found is not None and found.is_file()
    lacking = [_either(names) for names in wanted.files] if found is None else wanted.missing(found)
    missing = [] if whole_file else lacking
    return {
        "expert": wanted.expert,
        "network": wanted.network,
        "source": wanted.source,
        "looked_in": places,
        "found": None if found is None else str(found),
        "missing": missing,
        "ok": not missing,
        "licence": wanted.licence,
        "get": wanted.command(None if found is None else found),
    }


def _local(place: str) -> Path | None:
    """The folder (or file) of that name, or of a hub id that was downloaded before; None where there is none."""
    path = Path(place).expanduser()
    if path.exists():
        return path
    try:
        return resolve(place, offline=True)
    except UserError:
        return None
