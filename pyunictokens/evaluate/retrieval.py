"""Pictures of other things ranked by their likeness to a concept: soft positives in bands, hard and easy negatives.

Yo'Chameleon's recipe (Nguyen et al., 2025): retrieved pictures are sorted by CLIP similarity to the concept's photos
and cut into bands; a picture of band b is drawn with the first b of the concept's generation tokens, so that the least
alike ones teach one token and the photos themselves all of them. For recognition the most alike ones are the hard
negatives, and random ones of the rest the easy negatives. Likeness is the mean cosine to the photos, as in CLIP-I.

A photo of the concept among them would teach "no" about the concept itself: it is told by its pixels (any size,
mirrored too) and refused or left out; what CLIP finds nearly the same is kept and named as doubtful.

Letters: P pictures, M photos of the concept.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..config.limits import at_least
from ..data.image_files import folders_in, look_into
from ..utils.errors import UserError
from ..utils.files import AnyJson, read_json, write_json_rows
from ..utils.progress import Progress, silent
from .clip import Embeddings

RANKED = "ranked.json"
_BATCH = 32


@dataclass(frozen=True)
class RetrievalSettings:
    """How many pictures serve for what."""

    positives: int = 1000
    """Soft positives: the most alike pictures, cut into bands."""
    bands: int = 15
    """Bands of soft positives; one fewer than a concept's generation tokens: its photos alone have all of them."""
    hard: int = 100
    """Hard negatives: the most alike pictures, shown with the answer no."""
    easy: int = 100
    """Easy negatives: random ones of the pictures that serve for nothing else."""
    alike: float = 0.95
    """Pictures with this cosine to one of the photos, or a larger one, are named as doubtful."""
    own: str = "refuse"
    """What becomes of the concept's own photos among the pictures: refuse, or leave-out."""
    seed: int = 0
    """Chooses the easy negatives."""

    def __post_init__(self) -> None:
        at_least(0, positives=self.positives, hard=self.hard, easy=self.easy, seed=self.seed)
        at_least(1, bands=self.bands)
        if not 0 < self.alike <= 1:
            raise UserError(f"alike={self.alike}: must be a cosine above 0, at most 1")
        if self.own not in ("refuse", "leave-out"):
            raise UserError(f"own={self.own!r}: must be refuse or leave-out")


@dataclass(frozen=True)
class Picture:
    """One picture of the pool."""

    path: Path
    similarity: float
    """Mean cosine to the photos of the concept."""
    nearest: float
    """Largest cosine to one of them."""
    band: int = 0
    """Generation tokens it is drawn with as a soft positive; 0: it is none."""
    negative: str = ""
    """hard, easy or empty."""


@dataclass
class Ranking:
    """A pool in order of likeness, the most alike picture first."""

    concept: str
    clip: str
    """The encoder that likeness was measured with."""
    references: list[Path]
    pictures: list[Picture]
    bands: int
    alike: float
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(file, reason) of what was not ranked."""

    def band(self, number: int) -> list[Picture]:
        """Soft positives that are drawn with `number` tokens, the most alike first."""
        return [picture for picture in self.pictures if picture.band == number]

    def negatives(self, kind: str) -> list[Picture]:
        """Hard or easy negatives, the most alike first."""
        return [picture for picture in self.pictures if picture.negative == kind]

    @property
    def doubtful(self) -> list[Picture]:
        """Pictures that are used and may show the concept itself."""
        used = (picture for picture in self.pictures if picture.band or picture.negative)
        return [picture for picture in used if picture.nearest >= self.alike]

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the ranking as JSON, a line a picture; files are named as seen from the JSON's own folder."""
        home = Path(file).absolute().parent
        rows = [
            {
                "file": _seen_from(home, picture.path),
                "similarity": round(picture.similarity, 6),
                "nearest": round(picture.nearest, 6),
                "band": picture.band,
                "negative": picture.negative,
            }
            for picture in self.pictures
        ]
        content = {
            "concept": self.concept,
            "clip": self.clip,
            "bands": self.bands,
            "alike": self.alike,
            "references": [_seen_from(home, path) for path in self.references],
            "pictures": rows,
            "left_out": [list(pair) for pair in self.left_out],
        }
        write_json_rows(file, content)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Ranking:
        """A ranking that :meth:`save` wrote (or the folder it is in). Raises UserError naming what is wrong, and the
        first picture that is no longer there."""
        path = Path(file) / RANKED if Path(file).is_dir() else Path(file)
        content = read_json(path)
        try:
            home = path.absolute().parent
            found = cls(
                str(content["concept"]),
                str(content["clip"]),
                [home / str(each) for each in content["references"]],
                [_picture(home, row) for row in content["pictures"]],
                int(content["bands"]),
                float(content["alike"]),
                [(str(name), str(why)) for name, why in content["left_out"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: is no ranking of `data negatives` ({type(error).__name__}: {error}): make it again"
            ) from None
        used = [picture.path for picture in found.pictures if picture.band or picture.negative]
        absent = [each for each in used if not each.is_file()]
        if absent:
            raise UserError(
                f"{path}: names {len(absent)} pictures that are not there, as {absent[0]}: bring them back, or run "
                "`data negatives` again"
            )
        return found


def pictures_in(pool: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Files of folders (and folders within them) and files as given; (file, reason) of what is left out.

    Raises UserError where there is no such folder, or no picture at all.
    """
    files: list[Path] = []
    left_out: list[tuple[str, str]] = []
    for place in map(Path, pool):
        if not place.is_dir():
            if not place.is_file():
                raise UserError(f"{place}: no such file or folder: give folders of pictures, or pictures")
            files.append(place)
            continue
        for folder in [place, *_folders_below(place)]:
            inside = look_into(folder, _Anything())
            files += inside.images
            left_out += [(str(folder / name), why) for why, names in inside.left_out.items() for name in names]
    if not files:
        raise UserError(f"{', '.join(map(str, pool))}: hold no picture that can be read")
    return list(dict.fromkeys(files)), left_out


def _folders_below(place: Path) -> Iterator[Path]:
    """All folders in `place`, theirs too, without those that a system or a tool made."""
    for name in folders_in(place)[0]:
        yield place / name
        yield from _folders_below(place / name)


class _Anything:
    """Every name: sub-folders are looked into anyway."""

    def __contains__(self, name: object) -> bool:
        return True


def rank(
    embeddings: Embeddings,
    concept: str,
    references: Sequence[Path],
    pool: Sequence[str | os.PathLike[str]],
    settings: RetrievalSettings | None = None,
    own: Sequence[Path] = (),
    progress: Progress = silent,
) -> Ranking:
    """Rank the pictures of `pool` by likeness to `references`, the photos of `concept`.

    own: further photos of the concept (its test half), which must not be among the pictures either. A picture that
    cannot be read, or shows the same as one before it, is left out with the reason. Raises UserError where the
    concept's own photos are among them (unless `own=leave-out`), naming each, and where nothing is left.
    """
    settings = settings or RetrievalSettings()
    if not references:
        raise UserError(f"{concept}: has no photos to compare with")
    files, left_out = pictures_in(pool)
    photos = list(dict.fromkeys([*references, *own]))
    embeddings.references(photos)
    kept: list[Path] = []
    same: list[tuple[Path, Path]] = []
    for start in range(0, len(files), _BATCH):
        readable = _read(embeddings, files[start : start + _BATCH], left_out)
        if readable:
            shows_PM = embeddings.same_files(readable, photos)
            for path, shows_M in zip(readable, shows_PM, strict=True):
                if bool(shows_M.any()):
                    same.append((path, photos[int(shows_M.nonzero()[0])]))
                else:
                    kept.append(path)
        progress("pictures", min(start + _BATCH, len(files)), len(files))
    if same and settings.own == "refuse":
        shown = "\n".join(f"  {path} shows {photo.name}" for path, photo in same[:20])
        more = f"\n  and {len(same) - 20} more" if len(same) > 20 else ""
        raise UserError(
            f"{len(same)} of the pictures are photos of <{concept}> itself; as negatives they would teach that it is "
            f"not there:\n{shown}{more}\nmove them elsewhere, or leave them out with --own leave-out"
        )
    left_out += [(str(path), f"is the photo {photo.name} of <{concept}> itself") for path, photo in same]
    kept = _once(embeddings, kept, left_out)
    if not kept:
        raise UserError(f"none of the {len(files)} pictures can be used: {left_out[0][0]}: {left_out[0][1]}")
    cosine_PM = embeddings.references(kept) @ embeddings.references(list(references)).T
    mean_P, nearest_P = cosine_PM.mean(dim=1), cosine_PM.max(dim=1).values
    order = torch.argsort(mean_P, descending=True, stable=True).tolist()
    ranked = [Picture(kept[place], float(mean_P[place]), float(nearest_P[place])) for place in order]
    return Ranking(
        concept, embeddings.name, list(references), dealt(ranked, settings), settings.bands, settings.alike, left_out
    )


def dealt(ranked: Sequence[Picture], settings: RetrievalSettings) -> list[Picture]:
    """`ranked` (the most alike first) with what each picture serves for.

    The soft positives, from the least alike on, are cut into equal bands; where the number does not divide, the first
    (least alike) bands have one more, as in the published recipe.
    """
    soft = list(range(min(settings.positives, len(ranked))))
    band: dict[int, int] = {}
    size, rest = divmod(len(soft), settings.bands)
    start, rising = 0, soft[::-1]
    for number in range(1, settings.bands + 1):
        end = start + size + (number <= rest)
        band |= dict.fromkeys(rising[start:end], number)
        start = end
    hard = set(range(min(settings.hard, len(ranked))))
    free = [place for place in range(len(ranked)) if place not in hard and place not in band]
    free = free or [place for place in range(len(ranked)) if place not in hard]
    easy = set(random.Random(settings.seed).sample(free, min(settings.easy, len(free))))
    return [
        Picture(
            each.path,
            each.similarity,
            each.nearest,
            band.get(place, 0),
            "hard" if place in hard else "easy" if place in easy else "",
        )
        for place, each in enumerate(ranked)
    ]


def _read(embeddings: Embeddings, files: list[Path], left_out: list[tuple[str, str]]) -> list[Path]:
    """Those of `files` that can be read; they are embedded together, and one by one where one cannot be."""
    try:
        embeddings.references(files)
        return files
    except UserError:
        readable = []
    for path in files:
        try:
            embeddings.references([path])
            readable.append(path)
        except UserError as error:
            left_out.append((str(path), str(error).removeprefix(f"{path}: ")))
    return readable


def _once(embeddings: Embeddings, files: list[Path], left_out: list[tuple[str, str]]) -> list[Path]:
    """`files` without those that show the same as an earlier one."""
    kept: list[Path] = []
    places: list[int] = []
    for start in range(0, len(files), _BATCH):
        shows = embeddings.same_files(files[start : start + _BATCH], files, mirrored=False)
        for place, row in enumerate(shows, start=start):
            before = [other for other in places if bool(row[other])]
            if before:
                left_out.append((str(files[place]), f"shows the same as {files[before[0]].name}"))
            else:
                kept.append(files[place])
                places.append(place)
    return kept


def _picture(home: Path, row: AnyJson) -> Picture:
    negative = str(row["negative"])
    if negative not in ("", "hard", "easy"):
        raise ValueError(f"negative={negative!r}")
    return Picture(home / str(row["file"]), float(row["similarity"]), float(row["nearest"]), int(row["band"]), negative)


def _seen_from(home: Path, path: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), home)).as_posix()
    except ValueError:  # another drive of Windows
        return str(path.absolute())
