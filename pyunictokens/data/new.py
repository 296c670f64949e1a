"""A concept folder in the published layout from ordinary image files and a sheet of facts: `pyunictokens data new`.

All or nothing: everything is built in a folder beside, checked as a stranger's folder would be, and only then moved
into place (install.py); a failure on the way leaves the data folder as it was. What it writes is described in
docs/data-format.md; the questions that come with every concept are in `wording.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..utils.errors import UserError, needs
from ..utils.files import write_json
from ..utils.spelling import loose, spelled
from . import wording
from .check import SMALLEST_SIDE, check_folder
from .concept import FACT_PROMPTS, KINDS, PURE_PROMPTS, Concept, concept_name
from .facts import REASONING_DENSE, FactSheet, read_facts
from .folder import load_concept
from .image_files import is_file, list_images, look_into, natural_key
from .images import read_image, save_image, shrink
from .install import Listings, building, install, refuse_present
from .parse import ERROR, parts_of

with needs("data"):
    from PIL import Image, ImageDraw, ImageFilter

SHORTER_SIDE = 640
"""Longest shorter side of a stored photo: models of 512×512 cut their square out of it and never enlarge."""

_GENERATED = 12
_BORROWED = 24
_BETTER = "photos of other things of the same class teach recognition far better"


@dataclass
class NewConcept:
    """What `new_concept` made. `negatives` says where the images of other things come from: given, random_images or
    generated. `notes` are for the user to read."""

    concept: Concept
    negatives: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HeldOut:
    """The test half as a data set has it, in the place of photos kept back and of templates."""

    photos: Sequence[Path] = ()
    prompts: Sequence[str] = ()
    """Short prompts that need no fact; no others are written."""


def new_concept(
    root: str | os.PathLike[str],
    name: str,
    photos: Photos,
    *,
    kind: str,
    class_word: str,
    info: str = "",
    spec_yaml: str | os.PathLike[str] | Mapping[str, object] | None = None,
    negatives: Photos | None = None,
    test_photos: int = 2,
    held_out: HeldOut | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> NewConcept:
    """Make concept `name` in the data folder `root` (made when absent) from image files.

    photos: a folder, or a list of folders and files; of five or more the last `test_photos` become the test half.
    kind: human, animal or object. class_word: what it is, one word or two. info: a sentence on how it looks.
    spec_yaml: the sheet of facts (docs/data-format.md).
    negatives: images of other things, best of the same class; without them some of the folder's random_images serve,
    and where there are none simple patterns are drawn, which `notes` says.
    held_out: what tests, where that is settled: all of `photos` train then (`test_photos` has no meaning), a mask
    beside a photo (`0_mask.png`) is kept, and no questions are written for the test half.
    force: replace a concept of this name.

    Raises one UserError that lists all that is wrong; nothing is written then.
    """
    name = concept_name(name)
    root = Path(root).expanduser()
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    if not isinstance(class_word, str) or not class_word.strip() or not class_word.isprintable():
        raise UserError(f"class_word={class_word!r}: must be the word for what it is, such as dog")
    if not 0 <= test_photos <= 100:
        raise UserError(f"test_photos={test_photos}: must be 0 to 100")
    refuse_present(root, name, force)
    Listings(root)  # that they can be read
    sheet = read_facts(spec_yaml, name)
    notes = list(sheet.notes)
    files = _image_files(photos, "photos", notes)
    asked = _photo_keys(sheet, files)
    info = info.strip() or sheet.info
    try:
        made_root = not root.exists()
        root.mkdir(parents=True, exist_ok=True)
        aside = building(root, name)
    except OSError as error:
        raise UserError(f"{root}: cannot be written: {error.strerror}") from None
    try:
        progress = progress or (lambda _: None)
        build = _Build(aside.path, name, kind, class_word.strip(), info, sheet, asked, notes, progress, held_out)
        build.photos(files, test_photos)
        origin = build.negatives(negatives, root)
        build.texts()
        errors = [problem for problem in check_folder(aside.path, name) if problem.severity == ERROR]
        if errors:
            raise UserError("the new concept has problems:\n" + "\n".join(f"  {problem}" for problem in errors))
        install(aside.path, root, name, force)
    except OSError as error:
        raise UserError(f"{root}: concept {name!r} could not be written, nothing was changed: {error}") from error
    finally:
        aside.close()
        if made_root and not any(root.iterdir()):
            root.rmdir()
    return NewConcept(load_concept(root, name), origin, notes)


class _Build:
    """Writes the new concept under `aside`, which is a data folder of its own."""

    def __init__(
        self,
        aside: Path,
        name: str,
        kind: str,
        class_word: str,
        info: str,
        sheet: FactSheet,
        asked: dict[Path, list[tuple[str, str]]],
        notes: list[str],
        progress: Callable[[str], None],
        held_out: HeldOut | None,
    ) -> None:
        self.held_out = held_out
        self.aside, self.name, self.sheet, self.notes, self.progress = aside, name, sheet, notes, progress
        self.asked = asked
        self.words = wording.Wording(f"<{name}>", kind, class_word, info)
        self.train, self.test = (aside / "concept" / half / name for half in ("train", "test"))
        self.train.mkdir(parents=True)
        self.test.mkdir(parents=True)
        self.sources: dict[str, list[tuple[str, Path]]] = {"train": [], "test": []}

    def photos(self, files: list[Path], test_photos: int) -> None:
        """Re-encode the photos as 0.png, 1.png … of both halves; the same file given twice is used once."""
        images, problems = self._read(files)
        if problems:
            raise UserError(f"{len(problems)} of {len(files)} photos cannot be used:\n  " + "\n  ".join(problems))
        if self.held_out is not None:
            train, (test, problems) = images, self._read(list(self.held_out.photos))
            if problems:
                raise UserError(f"{len(problems)} test photos cannot be used:\n  " + "\n  ".join(problems))
            self._masks([source for source, _ in train])
        else:
            tests = min(test_photos, len(images) - 1) if len(images) >= 5 else 0
            if len(images) < 5:
                self.notes.append(f"{len(images)} photos are too few to keep any for testing: ten or so work best")
            train, test = images[: len(images) - tests], images[len(images) - tests :]
        for half, part in (("train", train), ("test", test)):
            for index, (source, image) in enumerate(part):
                save_image(image, getattr(self, half) / f"{index}.png")
                self.sources[half].append((f"{index}.png", source))

    def _masks(self, photos: list[Path]) -> None:
        """Keep the mask that lies beside a photo, in the size of the photo."""
        for index, photo in enumerate(photos):
            mask = photo.with_name(f"{photo.stem}_mask.png")
            if is_file(mask):
                image = read_image(mask, at_least=SHORTER_SIDE)
                save_image(shrink(image, SHORTER_SIDE), self.train / f"{index}_mask.png")

    def negatives(self, given: Photos | None, root: Path) -> str:
        """Fill negative_example/, and random_images/ where the data folder has none. Returns where they come from."""
        folder = self.train / "negative_example"
        shared = list_images(root / "random_images")
        if given is not None:
            images, problems = self._read(_image_files(given, "negatives", self.notes))
            if problems:
                raise UserError(f"{len(problems)} negatives cannot be used:\n  " + "\n  ".join(problems))
            others, origin = [image for _, image in images], "given"
        elif shared:
            step = max(1, len(shared) // _BORROWED)
            images, _ = self._read(shared[::step][:_BORROWED])
            others, origin = [image for _, image in images], "random_images" if images else "generated"
        else:
            others, origin = [], "generated"
        if origin == "random_images":
            self.notes.append(f"{len(others)} of random_images/ serve as negative examples; {_BETTER}")
        if not others:
            others, origin = drawn_negatives(self.name, _GENERATED), "generated"
            self.notes.append(f"no negatives given: {_GENERATED} simple patterns serve as negative examples; {_BETTER}")
        self.negative_files = [f"{index}.png" for index in range(len(others))]
        for file, image in zip(self.negative_files, others, strict=True):
            save_image(image, folder / file)
        if not shared:
            for index, image in enumerate(drawn_negatives("random_images", _GENERATED)):
                save_image(image, self.aside / "random_images" / f"{index}.png")
        save_image(Image.new("RGB", (512, 512)), self.aside / "black_512x512.png")
        return origin

    def texts(self) -> None:
        """The JSON files of both halves, and the two listings of the folder beside."""
        sheet, words, base = self.sheet, self.words, f"concept/train/{self.name}"
        general = _merged(words.questions(), sheet.questions)
        own = {half: {file: self.asked.get(path, []) for file, path in self.sources[half]} for half in self.sources}
        files = [file for file, _ in self.sources["train"]]
        facts = [(fact.question, fact.answer) for fact in sheet.facts if fact.question]
        loose = _merged(words.text_only(), sheet.text_only, facts)
        write_json(
            self.train / "info.json",
            {
                "class": words.class_word,
                "info": words.info or words.sentence(),
                "extra_info": [fact.fact for fact in sheet.facts],
                "conversation_type": words.kind,
                "generation_type": "object" if words.kind == "object" else "live_subject",
                "num_testing_info": len(sheet.facts) // 2,
            },
        )
        conversations = {Path(file).stem: wording.as_json(_merged(general, own["train"][file])) for file in files}
        write_json(self.train / "conversations.json", {**conversations, "text_only": wording.as_json(loose)})
        positive = [
            {"image": f"{base}/{file}", "query": query, "answer": words.yes()}
            for index, file in enumerate(files)
            for query in words.recognition(index)
        ]
        negative = [
            {"image": f"{base}/negative_example/{file}", "query": query, "answer": words.no()}
            for index, file in enumerate(self.negative_files)
            for query in words.recognition(index)
        ]
        write_json(self.train / "positive_recognitions.json", positive)
        write_json(self.train / "random_recognitions.json", negative)
        if self.held_out is not None:
            prompts = list(self.held_out.prompts)
            write_json(self.test / "t2i_conditions.json", {PURE_PROMPTS: prompts} if prompts else {})
        else:
            self._test_texts(general, own["test"], loose)
        write_json(self.aside / "concepts_list.json", [self.name])
        write_json(self.aside / "concept" / "train" / "train_images.json", {self.name: files})
        if not sheet.facts:
            self.notes.append("no facts were given: text-only reasoning cannot be trained (see the sheet of facts)")
        elif len(sheet.facts) < 4:
            count = f"{len(sheet.facts)} fact{'' if len(sheet.facts) == 1 else 's'}"
            self.notes.append(f"only {count}: half are kept for testing, so four or more are better")

    def _test_texts(
        self,
        general: list[tuple[str, str]],
        own: dict[str, list[tuple[str, str]]],
        loose: list[tuple[str, str]],
    ) -> None:
        """The JSON files of the test half: questions about each photo, questions about none, prompts."""
        sheet, words = self.sheet, self.words
        tests = {Path(file).stem: wording.as_json(_merged(general, own[file])) for file, _ in self.sources["test"]}
        write_json(self.test / "vqa.json", tests)
        write_json(
            self.test / "text_only.json", wording.as_json([(words.reworded(query), answer) for query, answer in loose])
        )
        prompts = {
            FACT_PROMPTS: [fact.prompt for fact in sheet.facts],
            f"explicit_{FACT_PROMPTS}": [fact.explicit for fact in sheet.facts],
            PURE_PROMPTS: sheet.prompts.get(PURE_PROMPTS) or words.pure_prompts(),
            "dense_generation": sheet.prompts.get("dense_generation") or words.dense_prompts(),
        }
        reasoning = {key: value for key, value in sheet.prompts.items() if key.endswith(REASONING_DENSE)}
        write_json(self.test / "t2i_conditions.json", {**prompts, **reasoning})

    def _read(self, files: list[Path]) -> tuple[list[tuple[Path, Image.Image]], list[str]]:
        """The images, small enough to store, without repeated files; and what is wrong with the others."""
        images: list[tuple[Path, Image.Image]] = []
        problems: list[str] = []
        seen: dict[bytes, Path] = {}
        for path in files:
            self.progress(path.name)
            try:
                image = read_image(path, at_least=SHORTER_SIDE)
            except UserError as error:
                problems.append(str(error))
                continue
            if min(image.size) < SMALLEST_SIDE:
                problems.append(f"{path}: {image.width}×{image.height} pixels: the shorter side needs {SMALLEST_SIDE}")
                continue
            digest = hashlib.sha256(path.read_bytes()).digest()
            same = seen.setdefault(digest, path)
            if same != path:
                self.notes.append(f"{path.name} is the same file as {same.name}: used once")
                continue
            images.append((path, shrink(image, SHORTER_SIDE)))
        return images, problems


def drawn_negatives(seed: str, count: int, side: int = 128) -> list[Image.Image]:
    """Simple images of nothing in particular (stripes, checks, discs, soft noise); `seed` decides which."""
    rng = np.random.default_rng(list(hashlib.sha256(seed.encode("utf-8")).digest()))
    drawn = []
    for index in range(count):
        first, second = (tuple(int(value) for value in rng.integers(0, 256, 3)) for _ in range(2))
        style = index % 5
        weight: np.ndarray
        ramp = np.linspace(0.0, 1.0, side)[None, :, None]
        width = int(rng.integers(side // 16, side // 4))
        cells = np.arange(side) // width % 2
        if style == 0:
            weight = np.broadcast_to(ramp, (side, side, 1))
        elif style == 1:
            weight = np.broadcast_to(cells[None, :, None], (side, side, 1))
        else:
            weight = ((cells[:, None] + cells[None, :]) % 2)[:, :, None]
        if style == 4:
            weight = rng.random((side, side, 1))
        levels = weight * np.array(first) + (1 - weight) * np.array(second)
        image = Image.fromarray(levels.astype(np.uint8))
        if style == 3:
            image = Image.new("RGB", (side, side), first)
            draw = ImageDraw.Draw(image)
            for x, y, radius in rng.integers(side // 12, side, (9, 3)).tolist():
                draw.ellipse((x - radius // 4, y - radius // 4, x + radius // 4, y + radius // 4), fill=second)
        if style == 4:
            image = image.filter(ImageFilter.GaussianBlur(4))
        drawn.append(image.rotate(90 * int(rng.integers(0, 4))))
    return drawn


def _merged(*lists: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """All questions once; where one is asked again, the later answer holds."""
    return list({question: (question, answer) for each in lists for question, answer in each}.values())


Photos = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A folder, a file, or any number of both."""


def _image_files(given: Photos, what: str, notes: list[str]) -> list[Path]:
    """The images of folders in natural order, and files as given. Raises UserError when there are none.

    Every image that is not used is named in `notes`.
    """
    places = [Path(given)] if isinstance(given, (str, os.PathLike)) else [Path(each) for each in given]
    if not places:
        raise UserError(f"{what}: the list is empty: give a folder of images or at least one file")
    named, places = places, [spelled(place.expanduser()) for place in places]
    for name, place in zip(named, places, strict=True):
        notes += [f"{what}: {name} is spelled {place} on disk"] if place != name.expanduser() else []
    absent = [str(path) for path in places if not path.is_dir() and not is_file(path)]
    if absent:
        raise UserError(f"{what}: no such file or folder: {', '.join(absent[:5])}")
    files: list[Path] = []
    for place in places:
        if not place.is_dir():
            files.append(place)
            continue
        inside = look_into(place, {each.name.casefold() for each in places if each.parent == place})
        told = [f"{what} in {place}: {note}" for note in inside.notes()]
        if not inside.images:
            raise UserError("\n".join([f"{what}: {place} holds no images that can be read", *told]))
        notes += told
        files += inside.images
    return list(dict.fromkeys(files))


def _photo_keys(sheet: FactSheet, files: list[Path]) -> dict[Path, list[tuple[str, str]]]:
    """The sheet's questions about single photos, by photo. A key is a file name, after its folder where needed."""
    asked: dict[Path, list[tuple[str, str]]] = {}
    strange: list[str] = []
    for key, questions in sheet.photos.items():
        wanted = [loose(part) for part in parts_of(key)]
        meant = [path for path in files if [loose(part) for part in path.parts[-len(wanted) :]] == wanted]
        if not meant:
            strange.append(key)
        if len(meant) > 1:
            raise UserError(
                f"the sheet of facts asks about {key}, and {len(meant)} photos have that name: write the folder before "
                f"it, as in {meant[0].parent.name}/{meant[0].name}"
            )
        for path in meant:
            asked.setdefault(path, []).extend(questions)
    if strange:
        there = ", ".join(sorted({path.name for path in files}, key=natural_key)[:10])
        raise UserError(
            f"the sheet of facts asks about photos that were not given: {', '.join(strange)}; given: {there}"
        )
    return asked
