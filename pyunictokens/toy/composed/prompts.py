"""What is said about composed scenes: a caption, and the objects that a checker looks for, as GenEval lists them.

    "a red ball left of a striped cat."
    [{"class": "ball", "count": 1, "colour": "red", "position": ["left of", 1]},
     {"class": "cat", "count": 1, "pattern": "striped"}]

The list goes into the column `objects` of a prompt list; rewards/experts/objects.py reads it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from ...data.images import from_pil, save_image
from ...utils.errors import needs
from ...utils.files import write_text_atomic
from ..facts import at_place
from ..scene import COLOURS
from .scene import KINDS, NOUNS, PATTERNS, PLACES, SMALL, Composition, Group, random_composition, render

with needs("data"):
    from PIL import Image

NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
Objects = list[dict[str, object]]


def words() -> list[str]:
    """Every word and mark that captions can hold, in a fixed order."""
    found = {*NOUNS, *(f"{noun}s" for noun in SMALL), *COLOURS, *PATTERNS, *NUMBERS.values()}
    for place in PLACES:
        found.update(at_place(place).split())
    return sorted(found | {".", ",", *["a", "an", "of", "left", "on", "and", "photo", "picture", "drawing"]})


def caption(
    scene: Composition, rng: np.random.Generator, *, colours: bool | None = None, place: bool | None = None
) -> tuple[str, Objects]:
    """A caption of the scene and its objects. colours: whether colours and patterns are said; place: whether the place
    is; None: by lot, each by itself."""
    told, objects, phrases = [], [], []
    for group in scene.groups:
        colour = rng.random() < 0.8 if colours is None else colours
        pattern = (rng.random() < 0.8 if colours is None else colours) and group.noun not in SMALL
        phrases.append(_phrase(group, colour, pattern))
        told.append((colour, pattern))
    for group, (colour, pattern) in zip(scene.groups, told, strict=True):
        one: dict[str, object] = {"class": group.noun, "count": group.count}
        one |= {"colour": group.colour} if colour else {}
        one |= {"pattern": group.pattern} if pattern else {}
        objects.append(one)
    if scene.relation:
        objects[0]["position"] = [scene.relation, 1]
        first = f"{phrases[0]} {scene.relation} {phrases[1]}"
        phrases = [first, *phrases[2:]]
    else:
        order = rng.permutation(len(phrases))
        phrases, objects = [phrases[k] for k in order], [objects[k] for k in order]
    text = f"{', '.join(phrases[:-1])} and {phrases[-1]}" if len(phrases) > 1 else phrases[0]
    if rng.random() < 0.5 if place is None else place:
        text += f" {at_place(scene.place)}"
    start = ("", "a photo of ", "a picture of ", "a drawing of ")[rng.integers(4)]
    return f"{start}{text}.", objects


def _phrase(group: Group, colour: bool, pattern: bool) -> str:
    noun = group.noun if group.count == 1 else f"{group.noun}s"
    described = [*([group.pattern] if pattern else []), *([group.colour] if colour else []), noun]
    number = NUMBERS[group.count]
    if number == "a" and described[0][0] in "aeiou":
        number = "an"
    return " ".join([number, *described])


def prompt(kind: str, rng: np.random.Generator) -> tuple[str, Objects, Composition]:
    """A prompt of a kind, its objects, and a scene that fits it."""
    scene = random_composition(rng, kind)
    coloured = {"single": False, "two": False, "counting": False, "colours": True, "binding": True, "dense": True}
    text, objects = caption(
        scene, rng, colours=coloured.get(kind, bool(rng.random() < 0.5)), place=True if kind == "dense" else None
    )
    return text, objects, scene


def place_in(text: str) -> str:
    """The place that a prompt names, "" where it names none."""
    return next((place for place in PLACES if f" {at_place(place)}" in text), "")


def prompt_list(
    count: int, seed: int, *, kinds: tuple[str, ...] = KINDS, without: frozenset[str] = frozenset()
) -> list[dict[str, object]]:
    """`count` different prompts, the kinds in turn: {"prompt", "kind", "objects", "place", "scene"}; none of
    `without`."""
    rng, seen = np.random.default_rng([seed, 77]), set(without)
    rows: list[dict[str, object]] = []
    for _ in range(100 * count):
        if len(rows) == count:
            break
        kind = kinds[len(rows) % len(kinds)]
        text, objects, scene = prompt(kind, rng)
        if text not in seen:
            seen.add(text)
            rows.append({"prompt": text, "kind": kind, "objects": objects, "place": place_in(text), "scene": scene})
    if len(rows) < count:
        raise ValueError(f"count={count}: only {len(rows)} prompts were found that differ; ask for fewer")
    return rows


def write_prompts(folder: str | os.PathLike[str], *, train: int = 600, held_out: int = 120, seed: int = 0) -> None:
    """train.jsonl and held_out.jsonl with drawings of the held-out prompts, as `pyunictokens reinforce` takes them."""
    folder = Path(folder)
    (folder / "drawings").mkdir(parents=True, exist_ok=True)
    test = prompt_list(held_out, 1)  # the same for every seed
    texts = frozenset(str(row["prompt"]) for row in test)
    for name, rows in (("held_out", test), ("train", prompt_list(train, 2 + seed, without=texts))):
        lines = []
        for number, row in enumerate(rows):
            scene = row.pop("scene")
            assert isinstance(scene, Composition)
            if name == "held_out":
                file = folder / "drawings" / f"{number}.png"
                save_image(from_pil(Image.fromarray(render(scene))), file)
                row["reference_image"] = str(file)
            lines.append(json.dumps(row))
        write_text_atomic(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
