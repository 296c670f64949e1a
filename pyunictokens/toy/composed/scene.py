"""Scenes of the composed world: one to four figures at places of a grid, some of them patterned, one on or
beside another; and how they look.

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
CELL = 16
"""Pixels between two places; the image tokenizer covers it with two codes."""
LOW, HIGH = 2 * CELL, 40
"""Heights in pixels of animals and objects; the greater one only where there is no other figure."""

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
    """The figures at places where none covers another; None where lots of tries found none.

    Figures stand in cells of a grid, so that they meet the image tokenizer's squares in the same way wherever they are:
    at free places hardly two drawings share a code.
    """
    large = sum(group.noun in LARGE for group in groups)
    if large > 2 or (relation == "on" and large > 1):
        return None
    heights = []
    for group in groups:
        large_height = (LOW, HIGH)[rng.integers(2)] if len(groups) == 1 else LOW
        thing_height = CELL * 3 // 2 if group.noun == "kite" else CELL  # kites are thin
        heights += [large_height if group.noun in LARGE else thing_height] * group.count
    figures = [Entity(each.noun, each.colour, each.pattern) for each in groups for _ in range(each.count)]
    for _ in range(60):
        done: list[Entity] = []
        for place, (figure, height) in enumerate(zip(figures, heights, strict=True)):
            found = _somewhere(figure, height, done, relation if place == 1 else "", rng)
            if found is None:
                break
            done.append(found)
        else:
            return tuple(done)
    return None


def _somewhere(
    figure: Entity, height: int, done: list[Entity], relation: str, rng: np.random.Generator
) -> Entity | None:
    """`figure`, `height` pixels high, where it covers nothing; with a relation, the first figure has it to this one."""
    left, top, right, bottom = _REACH[figure.noun]
    scale = (height - 1) / (bottom - top)
    tall = -(-height // CELL) * CELL
    half = CELL // 2 if figure.noun in SMALL else tall // 2
    middles = list(range(half, SIZE - half + 1, CELL))
    if relation == "on":
        middles = [round((done[0].box[0] + done[0].box[2]) / 2)]
    options = [(line, middle) for line in range(tall, SIZE + 1, CELL) for middle in middles]
    for option in rng.permutation(len(options)):
        line, middle = options[option]
        x, y = middle - scale * (left + right) / 2, line - 0.5 - scale * bottom
        made = replace(figure, x=x, y=y, scale=scale)
        box = made.box
        if box[0] < 0 or box[2] > SIZE or any(_touch(box, other.box) for other in done):
            continue
        if relation:
            first = done[0].box
            beside = first[2] <= box[0] <= first[2] + CELL and first[3] == box[3]
            under = 0 < box[1] - first[3] < CELL / 2 + 2
            if not (under if relation == "on" else beside):
                continue
        return made
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
