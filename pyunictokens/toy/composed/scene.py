"""Scenes of the composed world: one to four things at free places and sizes, some of them patterned, one on or beside
another; and how they look.

The figures are those of the toy world (toy/drawing.py): animals and objects are large and may be striped or dotted,
things (ball, kite, boat, …) are small and may come several times. All is drawn by lot from a numpy Generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...utils.errors import needs
from ..drawing import SUBJECTS, draw_item, draw_place
from ..pen import SIZE, ZOOM, Pen
from ..scene import ANIMALS, COLOURS, OBJECTS, SLOTS

with needs("data"):
    from PIL import Image

LARGE = ANIMALS + OBJECTS
SMALL = SLOTS["item"][1:]
NOUNS = (*LARGE, *SMALL)
PATTERNS = ("plain", "striped", "dotted")
PLACES = SLOTS["place"]
KINDS = ("single", "two", "counting", "colours", "position", "binding", "dense")
"""What a prompt is about; the first six are GenEval's."""
MOST = 4
"""Things in one scene."""

_REACH = {
    "cat": (-14, -22, 18, 21),
    "dog": (-15, -19, 17, 21),
    "bird": (-19, -19, 19, 19),
    "fish": (-18, -16, 20, 16),
    "rabbit": (-11, -27, 15, 21),
    "mug": (-15, -23, 18, 18),
    "star": (-20, -20, 20, 18),
    "house": (-18, -20, 18, 19),
    "robot": (-19, -26, 19, 20),
    "ball": (-9, -8, 9, 10),
    "kite": (-9, -15, 9, 15),
    "boat": (-9, -10, 9, 10),
    "block": (-8, -8, 9, 9),
    "apple": (-9, -10, 9, 9),
    "cake": (-9, -12, 9, 9),
}
"""How far a figure reaches from its origin at scale 1: left, top, right, bottom, in pixels of the 64-pixel picture."""


@dataclass(frozen=True)
class Entity:
    """One figure. `x`, `y` are its origin in pixels of the 64-pixel picture."""

    noun: str
    colour: str
    pattern: str = "plain"
    x: float = 32.0
    y: float = 32.0
    scale: float = 1.0

    @property
    def box(self) -> tuple[float, float, float, float]:
        """left, top, right, bottom."""
        left, top, right, bottom = (reach * self.scale for reach in _REACH[self.noun])
        return self.x + left, self.y + top, self.x + right, self.y + bottom


@dataclass(frozen=True)
class Group:
    """`count` figures alike."""

    noun: str
    colour: str
    pattern: str = "plain"
    count: int = 1


@dataclass(frozen=True)
class Composition:
    """A scene. With a `relation` ("left of" or "on"), the first group's figure has it to the second's."""

    groups: tuple[Group, ...]
    entities: tuple[Entity, ...]
    place: str
    relation: str = ""

    def to_json(self) -> dict[str, object]:
        return {
            "place": self.place,
            "relation": self.relation,
            "groups": [vars(group) for group in self.groups],
            "entities": [vars(entity) for entity in self.entities],
        }

    @classmethod
    def from_json(cls, value: dict[str, list[dict[str, str]]]) -> Composition:
        groups = tuple(Group(**group) for group in value["groups"])  # type: ignore[arg-type]
        entities = tuple(Entity(**entity) for entity in value["entities"])  # type: ignore[arg-type]
        return cls(groups, entities, str(value["place"]), str(value["relation"]))


def random_composition(rng: np.random.Generator, kind: str | None = None) -> Composition:
    """A scene by lot that a prompt of `kind` can be about; None: of any kind."""
    kind = kind or KINDS[rng.choice(len(KINDS), p=(0.08, 0.12, 0.16, 0.12, 0.2, 0.16, 0.16))]
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    while True:
        groups = _groups(rng, kind)
        relation = ("left of", "on")[rng.integers(2)] if kind == "position" else ""
        if kind == "dense" and groups[0].count == groups[1].count == 1 and rng.random() < 0.4:
            relation = "left of"
        entities = _placed(groups, relation, rng)
        if entities is not None:
            return Composition(groups, entities, PLACES[rng.integers(len(PLACES))], relation)


def _groups(rng: np.random.Generator, kind: str) -> tuple[Group, ...]:
    number = {"single": 1, "colours": 1, "counting": 1, "dense": int(rng.integers(2, 4))}.get(kind, 2)
    nouns = [NOUNS[k] for k in rng.choice(len(NOUNS), number, replace=False)]
    colours = [COLOURS[k] for k in rng.choice(len(COLOURS), number, replace=False)]
    if kind == "counting":
        nouns = [SMALL[rng.integers(len(SMALL))]]
    groups = [
        Group(noun, colour, PATTERNS[rng.choice(3, p=(0.4, 0.3, 0.3))] if noun in LARGE else "plain")
        for noun, colour in zip(nouns, colours, strict=True)
    ]
    if kind == "counting":
        groups[0] = replace(groups[0], count=int(rng.integers(2, MOST + 1)))
    if kind == "dense":
        room = MOST - number
        for place in rng.permutation(number):
            if groups[place].noun in SMALL and room > 0 and rng.random() < 0.6:
                more = int(rng.integers(1, room + 1))
                groups[place] = replace(groups[place], count=1 + more)
                room -= more
    return tuple(groups)


def _placed(groups: Sequence[Group], relation: str, rng: np.random.Generator) -> tuple[Entity, ...] | None:
    """The figures at places where none covers another; None where lots of tries found none."""
    total, large = sum(group.count for group in groups), sum(group.noun in LARGE for group in groups)
    if large > 2 or (relation == "on" and large > 1):
        return None
    narrow = 0.5 if relation == "on" or total > 3 else 0.56
    wide = 0.62 if relation == "on" or total > 3 else 0.8 if total == 1 else 0.7
    figures = []
    for group in groups:
        low, high = (narrow, wide) if group.noun in LARGE else (0.85, 1.1)
        scale = float(rng.uniform(low, high))
        figures += [Entity(group.noun, group.colour, group.pattern, scale=scale) for _ in range(group.count)]
    for _ in range(60):
        done: list[Entity] = []
        for place, figure in enumerate(figures):
            anchor = done[0] if relation and place == 1 else None
            found = _somewhere(figure, done, anchor, relation, rng)
            if found is None:
                break
            done.append(found)
        else:
            return tuple(done)
    return None


def _somewhere(
    figure: Entity, done: list[Entity], anchor: Entity | None, relation: str, rng: np.random.Generator
) -> Entity | None:
    left, top, right, bottom = figure.box
    left, top, right, bottom = left - 32, top - 32, right - 32, bottom - 32
    for _ in range(25):
        x = float(rng.uniform(1 - left, SIZE - 1 - right))
        y = float(rng.uniform(1 - top, SIZE - 1 - bottom))
        if anchor is not None:  # `anchor` has the relation to this one, so this one is right of it, or under it
            box = anchor.box
            if relation == "left of":
                x = float(rng.uniform(box[2] - left + 1, box[2] - left + 8))
                level = (box[1] + box[3]) / 2 - (top + bottom) / 2 + rng.uniform(-6, 6)
                y = float(np.clip(level, 1 - top, SIZE - 1 - bottom))
            else:
                x = (box[0] + box[2]) / 2 - (left + right) / 2 + float(rng.uniform(-2, 2))
                y = box[3] - top - float(rng.uniform(0.5, 1.5))
            if not (x + left >= 1 and x + right <= 63 and y + bottom <= 63):
                return None
        made = replace(figure, x=x, y=y)
        if all(other is anchor or not _touch(made.box, other.box) for other in done):
            return made
        if anchor is not None:
            return None
    return None


def _touch(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def render(scene: Composition, size: int = SIZE) -> np.ndarray:
    """Draw a scene: uint8 [size, size, 3]. The same scene gives the same picture, byte for byte."""
    image = Image.new("RGB", (SIZE * ZOOM, SIZE * ZOOM))
    draw_place(Pen(image), scene.place)
    for entity in scene.entities:
        pen = Pen(image, (entity.x, entity.y), entity.scale)
        if entity.noun in LARGE:
            SUBJECTS[entity.noun](pen, entity.colour, entity.pattern)
        else:
            draw_item(pen, entity.noun, entity.colour)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def empty(place: str, size: int = SIZE) -> np.ndarray:
    """The place alone, uint8 [size, size, 3]."""
    return render(Composition((), (), place), size)
