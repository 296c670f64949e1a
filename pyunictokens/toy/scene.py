"""The facts of the toy world: which attributes a scene has, which values they take, and how a scene is drawn by lot.

A scene is a subject (human, animal or object with colour and pattern), something it wears, an item beside it and a
place. Every attribute is an integer code into a closed list of words, so truth is known exactly.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields, replace

import numpy as np

HAIR_STYLES = ("long", "short", "curly")
ANIMALS = ("cat", "dog", "bird", "fish", "rabbit")
OBJECTS = ("mug", "star", "house", "robot")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
KINDS = ("human", "animal", "object")

SLOTS: dict[str, tuple[str, ...]] = {
    "shape": HAIR_STYLES + ANIMALS + OBJECTS,
    "colour": COLOURS,
    "pattern": ("plain", "striped", "dotted", "checked"),
    "hair": ("none", "black", "brown", "blond", "ginger"),
    "wear": ("none", "hat", "scarf", "glasses", "bow"),
    "wear_colour": ("none", *COLOURS),
    "item": ("none", "ball", "kite", "boat", "block", "apple", "cake"),
    "item_colour": ("none", *COLOURS),
    "place": ("beach", "meadow", "night", "snow", "room", "desert"),
}
"""Every slot's words; a code is an index here. For a human, `shape` is the hair style and `colour` the shirt's."""

SUBJECT_SLOTS = ("shape", "colour", "pattern", "hair")
"""The slots that make a subject what it is; the others belong to the moment."""

_HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Attributes:
    """One scene. The slots are codes into :data:`SLOTS`; the rest is pose and skin, which nobody names."""

    shape: int
    colour: int
    pattern: int
    hair: int = 0
    wear: int = 0
    wear_colour: int = 0
    item: int = 0
    item_colour: int = 0
    place: int = 0
    dx: float = 0.0
    """Sideways shift of the subject in pixels of the 64-pixel picture."""
    dy: float = 0.0
    scale: float = 1.0
    skin: float = 0.5
    """0 is the lightest skin tone, 1 the darkest."""

    def __post_init__(self) -> None:
        for slot, words in SLOTS.items():
            code = getattr(self, slot)
            if not 0 <= code < len(words):
                raise ValueError(f"{slot}={code}: must be in 0..{len(words) - 1}")
        if (self.kind == "human") != (self.hair > 0):
            raise ValueError(f"hair={self.word('hair')}: humans have a hair colour and nobody else does")
        for thing in ("wear", "item"):
            if (getattr(self, thing) > 0) != (getattr(self, f"{thing}_colour") > 0):
                raise ValueError(f"{thing}: give a thing and its colour together, or neither")

    @property
    def kind(self) -> str:
        """human, animal or object."""
        return kind_of(self.shape)

    @property
    def noun(self) -> str:
        """The class word: person, cat, mug, …"""
        return "person" if self.kind == "human" else self.word("shape")

    def word(self, slot: str) -> str:
        """The word of a slot's value."""
        return SLOTS[slot][getattr(self, slot)]

    def labels(self) -> np.ndarray:
        """All slot codes, int64 [9], in the order of :data:`SLOTS`."""
        return np.array([getattr(self, slot) for slot in SLOTS], dtype=np.int64)

    def words(self) -> dict[str, str]:
        """All slots as words, for people and for JSON."""
        return {slot: self.word(slot) for slot in SLOTS}

    def with_words(self, **words: str) -> Attributes:
        """A copy with some slots set by word, e.g. ``wear="hat", wear_colour="blue"``."""
        return replace(self, **{slot: code(slot, word) for slot, word in words.items()})


Scene = Attributes


def code(slot: str, word: str) -> int:
    """The code of a word in a slot; ValueError naming the choices when there is none."""
    try:
        return SLOTS[slot].index(word)
    except ValueError:
        raise ValueError(f"{slot}={word!r}: must be one of {', '.join(SLOTS[slot])}") from None


def kind_of(shape: int) -> str:
    """The kind of a shape code."""
    return KINDS[(shape >= len(HAIR_STYLES)) + (shape >= len(HAIR_STYLES) + len(ANIMALS))]


def from_labels(labels: np.ndarray) -> Attributes:
    """The scene with these slot codes and a middle pose; the inverse of :meth:`Attributes.labels`."""
    return Attributes(*(int(value) for value in labels))


def is_held_out(scene: Attributes) -> bool:
    """True for about a tenth of all subjects: pre-training never draws them, toy concepts are chosen among them.

    The rule is a checksum of the subject's codes, so it is the same on every machine and needs no list.
    """
    key = bytes(getattr(scene, slot) for slot in SUBJECT_SLOTS)
    return zlib.crc32(b"toy" + key) % _HELD_OUT_EVERY == 0


def random_scene(
    rng: np.random.Generator, kind: str | None = None, *, held_out: bool | None = False, bare: float = 0.3
) -> Attributes:
    """Draw a scene by lot.

    kind: human, animal or object, or None for any. held_out: False for subjects of pre-training, True for concepts'
    subjects, None for both. bare: probability that there is no wear, and likewise no item.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    while True:
        chosen = kind or KINDS[rng.choice(3, p=[0.3, 0.4, 0.3])]
        names = {"human": HAIR_STYLES, "animal": ANIMALS, "object": OBJECTS}[chosen]
        scene = Attributes(
            shape=code("shape", names[rng.integers(len(names))]),
            colour=int(rng.integers(8)),
            pattern=int(rng.integers(4)),
            hair=int(rng.integers(1, 5)) if chosen == "human" else 0,
        )
        if held_out is None or is_held_out(scene) == held_out:
            return random_moment(scene, rng, bare=bare)


def random_moment(scene: Attributes, rng: np.random.Generator, *, bare: float = 0.3) -> Attributes:
    """The same subject at another moment: new wear, item, place and pose."""
    wear = 0 if rng.random() < bare else int(rng.integers(1, len(SLOTS["wear"])))
    item = 0 if rng.random() < bare else int(rng.integers(1, len(SLOTS["item"])))
    return replace(
        scene,
        wear=wear,
        wear_colour=int(rng.integers(1, 9)) if wear else 0,
        item=item,
        item_colour=int(rng.integers(1, 9)) if item else 0,
        place=int(rng.integers(len(SLOTS["place"]))),
        dx=float(rng.uniform(-0.4, 0.4)),
        dy=float(rng.uniform(-0.4, 0.4)),
        scale=float(rng.uniform(0.99, 1.01)),
        skin=float(rng.uniform(0, 1)),
    )


def same_subject(scene: Attributes, other: Attributes) -> bool:
    """Whether two scenes show the same subject."""
    return all(getattr(scene, slot) == getattr(other, slot) for slot in SUBJECT_SLOTS)


assert {field.name for field in fields(Attributes)} >= set(SLOTS)
