"""DreamBooth's prompts by class: the same new places for all, dressing up for live subjects, surfaces and new looks for
objects. The idea is that of the DreamBooth evaluation (25 prompts, a set for live subjects and one for objects); the
prompts are this project's own words. `{}` is the subject.
"""

from __future__ import annotations

_WORDS = (
    "animal bear bird boy bunny cat chicken cow dog duck fish fox girl goat hamster horse human kitten lion man "
    "monkey mouse owl panda parrot penguin person pig puppy rabbit sheep tiger turtle wolf woman"
)
LIVE_CLASSES = frozenset(_WORDS.split())
"""Class words of live subjects; everything else is an object."""
_PEOPLE = frozenset(("boy", "girl", "human", "man", "person", "woman"))

_PLACES = (
    "{} in a rain forest",
    "{} in deep snow",
    "{} on a sandy beach",
    "{} on an old stone bridge",
    "{} on a busy market square",
    "{} in front of a lighthouse",
    "{} in front of snowy mountains",
    "{} in front of a green wooden door",
    "{} in a field of tulips",
    "{} under a tree with autumn leaves",
)
_LIVE = (
    "{} wearing a blue cap",
    "{} wearing a straw hat",
    "{} wearing a striped scarf",
    "{} wearing round sunglasses",
    "{} wearing a yellow raincoat",
    "{} wearing a bow tie",
    "{} dressed as a cook",
    "{} dressed as an astronaut",
    "{} dressed as a sailor",
    "{} dressed as a magician",
    "{} asleep on a sofa",
    "{} running through a puddle",
    "{} looking out of a window",
    "an orange {}",
    "a soaking wet {}",
)
_OBJECT = (
    "{} on a marble table",
    "{} on a red velvet cushion",
    "{} on a pile of books",
    "{} on a mossy rock",
    "{} on a wooden pier",
    "{} on a checked picnic blanket",
    "{} floating on a lake",
    "{} floating in a bowl of soup",
    "{} standing on a mirror",
    "{} among sunflowers",
    "a green {}",
    "an orange {}",
    "a transparent {}",
    "a soaking wet {}",
    "a {} shaped like a ball",
)


def is_live(class_word: str) -> bool:
    """Whether the class (its last word counts: "shiba dog") is that of a live subject."""
    last = class_word.casefold().split()[-1:] or [""]
    return last[0] in LIVE_CLASSES and "stuffed" not in class_word.casefold()


def kind_of(class_word: str) -> str:
    """human, animal or object, by the class word."""
    if not is_live(class_word):
        return "object"
    return "human" if class_word.casefold().split()[-1] in _PEOPLE else "animal"


def templates(class_word: str, live: bool | None = None) -> list[str]:
    """The 25 prompts for a class, `{}` where the subject goes; `live` where the class word alone does not say it."""
    return [*_PLACES, *(_LIVE if (is_live(class_word) if live is None else live) else _OBJECT)]
