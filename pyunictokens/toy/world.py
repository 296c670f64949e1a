"""The toy world in one place: scenes, their pictures and the sentences about them.

It re-exports scene.py (attributes), drawing.py (pictures) and grammar.py (sentences).
Everything is drawn by lot from a numpy Generator that the caller seeds, so the same seed gives the same world.
"""

from __future__ import annotations

from .drawing import render
from .facts import FACTS, FactType, at_place, draw_facts, thing
from .grammar import (
    NAMES,
    any_caption,
    bag_caption,
    caption,
    compound_caption,
    questions,
    recognition,
    subject_phrase,
    subject_questions,
    text_only,
)
from .pen import SIZE
from .scene import (
    KINDS,
    SLOTS,
    SUBJECT_SLOTS,
    Attributes,
    Scene,
    code,
    from_labels,
    is_held_out,
    kind_of,
    random_moment,
    random_scene,
    same_subject,
)
from .words import build_tokenizer, words

__all__ = [
    "FACTS",
    "KINDS",
    "NAMES",
    "SIZE",
    "SLOTS",
    "SUBJECT_SLOTS",
    "Attributes",
    "FactType",
    "Scene",
    "any_caption",
    "at_place",
    "bag_caption",
    "build_tokenizer",
    "caption",
    "code",
    "compound_caption",
    "draw_facts",
    "from_labels",
    "is_held_out",
    "kind_of",
    "questions",
    "random_moment",
    "random_scene",
    "recognition",
    "render",
    "same_subject",
    "subject_phrase",
    "subject_questions",
    "text_only",
    "thing",
    "words",
]
