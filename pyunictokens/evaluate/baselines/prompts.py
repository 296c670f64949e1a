"""How a model that never learned a concept is told of it: in words (text prompt, TP), by references (image prompt, IP).

The wordings are this project's own; the paper names the two ways without giving its prompts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...data.images import fit_within, read_image
from ...rewards.base import plain_text
from ...utils.errors import UserError
from ..tasks import Subject

if TYPE_CHECKING:
    from PIL.Image import Image

_PHRASE = re.compile(r"^(?:is|are)\s+((?:an?|the|my|our)\s.+?)[.!]?$", re.IGNORECASE | re.DOTALL)


def introduction(subject: Subject, facts: bool = True) -> str:
    """The text prompt before a question: what `<name>` is, and what is known of it."""
    about = subject.info.strip() or f"{subject.sks} is a {subject.class_word}."
    known = [about, *(subject.facts if facts else [])]
    return " ".join(sentence.strip().rstrip(".") + "." for sentence in known if sentence.strip())


def told(subject: Subject, question: str) -> str:
    """A question after the text prompt. Facts are left out where the question brings them."""
    brings = bool(subject.facts) and all(fact.rstrip(". ") in question for fact in subject.facts)
    return f"{introduction(subject, facts=not brings)} {question}"


def described(subject: Subject, prompt: str) -> str:
    """A prompt with the concept's name replaced by what it looks like.

    ``<bo> is a pink dog`` makes "a photo of <bo> on the beach" into "a photo of a pink dog on the beach". An `info` of
    another form keeps the class word in the prompt and follows it.
    """
    info = " ".join(subject.info.split())
    rest = info.removeprefix(subject.sks).strip()
    phrase = _PHRASE.match(rest) if rest != info else None
    if phrase and "<" not in phrase[1]:
        return plain_text(prompt, phrase[1])
    plain = plain_text(prompt, subject.class_word)
    return f"{plain.rstrip('. ')}. {plain_text(info, subject.class_word)}" if info else plain


def references(subject: Subject, number: int, side: int = 1024) -> list[Image]:
    """The first `number` references, upright RGB, no longer than `side`. Raises UserError where there is none."""
    if number and not subject.references:
        raise UserError(f"{subject.name}: no references, so there is no image prompt")
    return [fit_within(read_image(path), side) for path in subject.references[:number]]


def pointed(subject: Subject, shown: int, asked_about: bool, question: str, last: str = "the last picture") -> str:
    """A question after `shown` references: words that say what they show, and which image is asked about."""
    first = "The first picture shows" if shown == 1 else f"The first {shown} pictures show"
    return f"{first} {subject.sks}.{f' The question is about {last}.' if asked_about else ''} {question}"
