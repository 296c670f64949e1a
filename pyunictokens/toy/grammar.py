"""What is said about toy scenes: captions, questions with answers, and facts from which one must be picked.

Everything is made from a closed list of words (words.py), so the tokenizer never meets an unknown one. Names ("mimi",
"bo") stand where a learned concept token will stand, and rows of attribute words before the noun stand where a
concept's helper tokens will stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .facts import FACTS, at_place, draw_facts, pick, thing
from .scene import SLOTS, Attributes

NAMES = ("bo", "mimi", "lulu", "toto", "kiki", "nino", "pip", "zaza", "coco", "tiki", "fifi", "momo")
FILLERS = ("nice", "happy", "sweet", "very", "new", "old", "good", "one")
_MENTION = np.cumsum([0.15, 0.1, 0.15, 0.42])
"""Shares of "the cat", "a cat", "mimi", "red striped cat" (the rest: "red striped mimi")."""
_CAPTION = np.cumsum([0.35, 0.27, 0.3])
"""Shares of plain, word-row and compound captions (the rest: answered ones)."""
RECOGNITIONS = (
    "is {x} in the picture?",
    "is {x} in the picture?",
    "is {x} in this picture?",
    "can you see {x} here?",
    "does this photo show {x}?",
    "is this {x}?",
)


# --- naming a subject ------------------------------------------------------------------------------------------------


def subject_words(scene: Attributes) -> list[str]:
    """The words that describe the subject, without the noun."""
    words = [scene.word("pattern"), scene.word("colour")]
    return words + ([scene.word("shape"), scene.word("hair")] if scene.kind == "human" else [])


def bag(scene: Attributes, rng: np.random.Generator, longest: int = 12, *, full: bool = False) -> str:
    """Attribute words in any order, some twice, some fillers and names between: where helper tokens will stand."""
    own = subject_words(scene)
    if not full and rng.random() < 0.3:
        own = own[: rng.integers(1, len(own) + 1)]
    extra = rng.integers(0, longest - len(own) + 1) if rng.random() < 0.6 else 0
    pool = [*own, *own, scene.noun, pick(rng, FILLERS + NAMES), pick(rng, FILLERS + NAMES)]
    words = own + [pick(rng, pool) for _ in range(extra)]
    return " ".join(words[k] for k in rng.permutation(len(words)))


def subject_phrase(scene: Attributes, rng: np.random.Generator, *, full: bool = False) -> str:
    """ "a striped red cat" or "a person with long brown hair in a dotted blue shirt"; parts may be left out unless
    full."""

    def keep(word: str, chance: float = 0.85) -> list[str]:
        return [word] if full or rng.random() < chance else []

    cloth = keep(scene.word("pattern"), 0.8) + keep(scene.word("colour"))
    if scene.kind != "human":
        return _with_article([*cloth, scene.noun])
    hair = keep(scene.word("shape")) + keep(scene.word("hair"))
    text = "a person"
    if hair:
        text += f" with {' '.join(hair)} hair"
    if cloth:
        text += f" in {_with_article([*cloth, 'shirt'])}"
    return text


def _with_article(words: list[str]) -> str:
    return f"{'an' if words[0] == 'orange' else 'a'} {' '.join(words)}"


def mention(scene: Attributes, rng: np.random.Generator) -> str:
    """Any way to point at the subject: "the cat", "a cat", "mimi", "striped red cat", "red nice striped mimi"."""
    kind = int(np.searchsorted(_MENTION, rng.random()))
    noun = scene.noun
    if kind == 0:
        return f"the {noun}"
    if kind == 1:
        return f"a {noun}"
    if kind == 2:
        return pick(rng, NAMES)
    return f"{bag(scene, rng)} {noun if kind == 3 else pick(rng, NAMES)}"


# --- captions --------------------------------------------------------------------------------------------------------


def _moment(scene: Attributes, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(slot, phrase) for what it wears, what is beside it and where it is, in any order."""
    phrases = [("place", at_place(scene.word("place")))]
    if scene.wear:
        worn = thing(scene.word("wear_colour"), scene.word("wear"))
        phrases.append(("wear", f"{pick(rng, ('wearing', 'wearing', 'with'))} {worn}"))
    if scene.item:
        item = thing(scene.word("item_colour"), scene.word("item"))
        phrases.append(("item", f"{pick(rng, ('with', 'beside', 'and'))} {item}"))
    return [phrases[k] for k in rng.permutation(len(phrases))]


def moment_phrases(scene: Attributes, rng: np.random.Generator, *, full: bool = False) -> list[str]:
    """What it wears, what is beside it and where it is, in any order; parts may be left out unless full."""
    keep = {"place": 0.7, "wear": 0.85, "item": 0.85}
    return [phrase for slot, phrase in _moment(scene, rng) if full or rng.random() < keep[slot]]


def caption(scene: Attributes, rng: np.random.Generator, *, full: bool = False) -> str:
    """A plain caption: "a photo of a striped red cat wearing a blue hat on the beach." """
    start = pick(rng, ("a photo of ", "a photo of ", "a picture of ", ""))
    parts = [subject_phrase(scene, rng, full=full), *moment_phrases(scene, rng, full=full)]
    return f"{start}{' '.join(parts)}."


def bag_caption(scene: Attributes, rng: np.random.Generator) -> str:
    """A caption whose subject is a row of words before the noun: "a photo of striped nice red cat on the beach." """
    words = bag(scene, rng, longest=24 if rng.random() < 0.3 else 12)
    parts = [f"a photo of {words} {scene.noun}"]
    if rng.random() < 0.65:
        parts += moment_phrases(scene, rng)
    return f"{' '.join(parts)}."


def compound_caption(scene: Attributes, rng: np.random.Generator) -> str:
    """A prompt that hints, and the fact it hints at, as the method feeds it: "… with its favourite toy. its favourite
    … ." """
    facts = [fact for fact in FACTS if scene.word(fact.slot) in fact.values]
    fact = facts[rng.integers(len(facts))]
    prompt = pick(rng, fact.prompts).format(x=mention(scene, rng))
    if rng.random() < 0.25:
        more = [part for slot, part in _moment(scene, rng) if slot != fact.slot]
        prompt = " ".join([prompt, *more[: int(rng.integers(1, 3))]])
    sentence = fact.sentence(scene.words())
    if rng.random() < 0.15:
        sentence = fact.short(scene.words())
    return f"{prompt}. {sentence}." if rng.random() < 0.88 else f"{prompt}."


def answered_caption(scene: Attributes, rng: np.random.Generator) -> str:
    """The base prompt with the answer to a question about the picture: "a photo of mimi. a blue hat." """
    pairs = [pair for pair in questions(scene, rng) if pair[1] not in ("yes", "no", "nothing")]
    answer = pairs[rng.integers(len(pairs))][1].rstrip(".")
    return f"a photo of {mention(scene, rng)}. {answer}."


def any_caption(scene: Attributes, rng: np.random.Generator) -> str:
    """A caption of any shape, in the proportions of pre-training."""
    makers: tuple[Callable[[Attributes, np.random.Generator], str], ...]
    makers = (caption, bag_caption, compound_caption, answered_caption)
    return makers[int(np.searchsorted(_CAPTION, rng.random()))](scene, rng)


# --- questions -------------------------------------------------------------------------------------------------------


def another(slot: str, scene: Attributes, rng: np.random.Generator) -> str:
    """A word of the slot that is not the scene's and not "none"."""
    return pick(rng, [word for word in SLOTS[slot] if word not in ("none", scene.word(slot))])


def questions(scene: Attributes, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about the picture with their answers, one for each thing there is to ask."""
    x = mention(scene, rng)
    shirt = f"the shirt of {x}" if scene.kind == "human" else x
    colour, pattern, place = scene.word("colour"), scene.word("pattern"), scene.word("place")
    pairs = subject_questions(scene, x)
    truth = bool(rng.random() < 0.5)
    pairs.append((f"is {shirt} {pattern if truth else another('pattern', scene, rng)}?", _yes(truth)))
    truth = bool(rng.random() < 0.5)
    pairs.append((f"is {shirt} {colour if truth else another('colour', scene, rng)}?", _yes(truth)))
    worn = thing(scene.word("wear_colour"), scene.word("wear")) if scene.wear else "nothing"
    item = thing(scene.word("item_colour"), scene.word("item")) if scene.item else "nothing"
    pairs += [(f"what is {x} wearing?", worn), (f"what is beside {x}?", item), (f"where is {x}?", at_place(place))]
    truth = bool(rng.random() < 0.5)
    pairs.append((f"is {x} {at_place(place if truth else another('place', scene, rng))}?", _yes(truth)))
    if scene.wear:
        pairs.append((f"what colour {_is(scene.word('wear'))} the {scene.word('wear')}?", scene.word("wear_colour")))
    if scene.item:
        pairs.append((f"what colour is the {scene.word('item')}?", scene.word("item_colour")))
    pairs.append(("what is in the picture?", f"a {scene.noun}"))
    pairs.append(("describe the picture.", _description(scene, rng)))
    pairs.append(recognition(scene, rng))
    return pairs


def subject_questions(scene: Attributes, x: str) -> list[tuple[str, str]]:
    """Questions about the subject alone, which need no picture for one who knows it."""
    shirt = f"the shirt of {x}" if scene.kind == "human" else x
    pairs = [
        (f"what colour is {shirt}?", scene.word("colour")),
        (f"what pattern does {shirt} have?", scene.word("pattern")),
        (f"what is {x}?", f"a {scene.noun}"),
    ]
    if scene.kind == "human":
        pairs.append((f"what hair does {x} have?", f"{scene.word('shape')} {scene.word('hair')} hair"))
        pairs.append((f"what colour is the hair of {x}?", scene.word("hair")))
    return pairs


def recognition(scene: Attributes, rng: np.random.Generator) -> tuple[str, str]:
    """ "is striped red cat in the picture?": yes for the subject's own words, no when one of them is wrong."""
    truth = bool(rng.random() < 0.5)
    other = scene if truth else change_subject(scene, rng)
    x = f"{bag(other, rng, full=True)} {other.noun}" + (f" {pick(rng, NAMES)}" if rng.random() < 0.2 else "")
    return pick(rng, RECOGNITIONS).format(x=x), _yes(truth)


def change_subject(scene: Attributes, rng: np.random.Generator) -> Attributes:
    """The scene with one to all of its subject's slots changed, kind kept."""
    low, high = {"human": (0, 3), "animal": (3, 8), "object": (8, 12)}[scene.kind]
    while True:
        new = scene
        if rng.random() < 0.5:
            new = replace(new, shape=int(rng.integers(low, high)))
        if rng.random() < 0.5:
            new = replace(new, colour=int(rng.integers(8)))
        if rng.random() < 0.5:
            new = replace(new, pattern=int(rng.integers(4)))
        if scene.kind == "human" and rng.random() < 0.5:
            new = replace(new, hair=int(rng.integers(1, 5)))
        if new != scene:
            return new


def _description(scene: Attributes, rng: np.random.Generator) -> str:
    return " ".join([subject_phrase(scene, rng, full=True), *moment_phrases(scene, rng, full=True)])


def _is(noun: str) -> str:
    return "are" if noun == "glasses" else "is"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def text_only(rng: np.random.Generator, mention_text: str) -> tuple[list[str], str, str]:
    """(facts, prompt, the fact that fits): what the model must do before drawing, without any picture."""
    values = draw_facts(rng)
    order = rng.permutation(len(FACTS))
    if rng.random() < 0.35:
        order = order[: rng.integers(3, len(FACTS))]
    facts = [FACTS[k].sentence(values[k]) for k in order]
    wanted = int(rng.integers(len(order)))
    fact = FACTS[order[wanted]]
    return facts, pick(rng, fact.prompts).format(x=mention_text), facts[wanted]
