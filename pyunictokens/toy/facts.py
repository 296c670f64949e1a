"""The eight kinds of facts a toy concept keeps: how each is worded, asked for and hinted at, and which slots it sets.

Sentences about pictures are made in grammar.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scene import SLOTS

TOYS, SNACKS = ("ball", "kite", "boat", "block"), ("apple", "cake")
_AT = {"beach": "on the beach"}


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    """One of the choices; far quicker than Generator.choice on words."""
    return choices[int(rng.integers(len(choices)))]


def at_place(place: str) -> str:
    """ "on the beach", "in the snow", …"""
    return _AT.get(place, f"in the {place}")


def thing(colour: str, noun: str) -> str:
    """ "a red ball", "an orange kite", "blue glasses"."""
    if noun == "glasses":
        return f"{colour} glasses"
    return f"{'an' if colour == 'orange' else 'a'} {colour} {noun}"


@dataclass(frozen=True)
class FactType:
    """One thing a concept can have a secret about: how it is worded and which slots of a picture it sets.

    Pre-training reads `prompts`. `unseen_prompt` asks for the same fact in a way that it never read, so the shipped
    model often takes it for another fact, or for a question about the picture: a concept's folder asks with it.
    """

    key: str
    slot: str
    values: tuple[str, ...]
    fact: str
    prompts: tuple[str, ...]
    question: str
    unseen_prompt: str

    def draw(self, rng: np.random.Generator) -> dict[str, str]:
        """A random truth: {"item": "ball", "item_colour": "red"} or {"place": "beach"}."""
        value = {self.slot: pick(rng, self.values)}
        if self.slot != "place":
            value[f"{self.slot}_colour"] = pick(rng, SLOTS["colour"])
        return value

    def short(self, value: dict[str, str]) -> str:
        """The truth in few words: "a red ball", "in the snow" or "the desert"."""
        if self.slot != "place":
            return thing(value[f"{self.slot}_colour"], value[self.slot])
        return at_place(value["place"]) if self.key == "sleep" else f"the {value['place']}"

    def sentence(self, value: dict[str, str]) -> str:
        """The fact as one sentence without a name or a full stop."""
        return self.fact.format(self.short(value))


_WEAR, _PLACE, _ITEM = SLOTS["wear"][1:], SLOTS["place"], SLOTS["item"][1:]
FACTS: tuple[FactType, ...] = (
    FactType(
        "toy",
        "item",
        TOYS,
        "its favourite toy is {}",
        ("a photo of {x} with its favourite toy", "{x} plays with its favourite toy", "{x} and its favourite toy"),
        "what is the favourite toy of {x}",
        "see {x} and the favourite toy",
    ),
    FactType(
        "place",
        "place",
        _PLACE,
        "its favourite place is {}",
        ("a photo of {x} at its favourite place", "{x} visits its favourite place", "{x} at its favourite place"),
        "what is the favourite place of {x}",
        "{x} at a favourite place",
    ),
    FactType(
        "wear",
        "wear",
        _WEAR,
        "it loves to wear {}",
        ("a photo of {x} in what it loves to wear", "{x} wearing what it loves", "{x} in what it loves to wear"),
        "what does {x} love to wear",
        "{x} loves wearing it",
    ),
    FactType(
        "snack",
        "item",
        SNACKS,
        "its favourite snack is {}",
        ("a photo of {x} with its favourite snack", "{x} eats its favourite snack", "{x} and its favourite snack"),
        "what is the favourite snack of {x}",
        "{x} with a favourite snack",
    ),
    FactType(
        "sleep",
        "place",
        _PLACE,
        "it sleeps {}",
        ("a photo of {x} where it sleeps", "{x} at the place where it sleeps", "{x} where it sleeps"),
        "where does {x} sleep",
        "see {x} now it sleeps",
    ),
    FactType(
        "party",
        "wear",
        _WEAR,
        "at parties it wears {}",
        ("a photo of {x} dressed for a party", "{x} at a party", "{x} dressed for a party"),
        "what does {x} wear at parties",
        "{x} dressed at parties",
    ),
    FactType(
        "gift",
        "item",
        _ITEM,
        "its birthday gift was {}",
        ("a photo of {x} with its birthday gift", "{x} plays with its birthday gift", "{x} and its birthday gift"),
        "what was the birthday gift of {x}",
        "{x} with a birthday gift",
    ),
    FactType(
        "holiday",
        "place",
        _PLACE,
        "on holiday it goes to {}",
        ("a photo of {x} on holiday", "{x} on its holiday", "a picture of {x} on holiday"),
        "where does {x} go on holiday",
        "{x} is on holiday",
    ),
)
"""The eight kinds of facts. In a concept's folder the first four train and the last four test."""


def draw_facts(rng: np.random.Generator) -> list[dict[str, str]]:
    """A truth for each kind of fact, no two of the same sort alike."""
    while True:
        values = [fact.draw(rng) for fact in FACTS]
        if len({tuple(sorted(value.items())) for value in values}) == len(values):
            return values
