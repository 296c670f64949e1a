"""Concept folders in the published layout: read, check, make; images to tensors; what training draws; the toy world.

Knows models at most and never training. Names are imported when first asked for, so that reading a folder needs no more
than it must.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_NAMES = {
    "Concept": "concept",
    "QA": "concept",
    "Recognition": "concept",
    "concept_name": "concept",
    "Problem": "parse",
    "list_concepts": "folder",
    "load_concept": "folder",
    "read_concept": "folder",
    "check_folder": "check",
    "render_problems": "check",
    "black_image": "images",
    "load_batch": "images",
    "load_pixels": "images",
    "make_grid": "images",
    "read_image": "images",
    "save_image": "images",
    "NewConcept": "new",
    "new_concept": "new",
    "facts_template": "facts",
    "read_facts": "facts",
    "EpochSampler": "batches",
    "GenerationItem": "batches",
    "TextOnlyItem": "batches",
    "UnderstandingItem": "batches",
    "generation_items": "batches",
    "text_only_items": "batches",
    "understanding_items": "batches",
    "visual_items": "batches",
}

if TYPE_CHECKING:
    from .batches import (
        EpochSampler,
        GenerationItem,
        TextOnlyItem,
        UnderstandingItem,
        generation_items,
        text_only_items,
        understanding_items,
        visual_items,
    )
    from .check import check_folder, render_problems
    from .concept import QA, Concept, Recognition, concept_name
    from .facts import facts_template, read_facts
    from .folder import list_concepts, load_concept, read_concept
    from .images import black_image, load_batch, load_pixels, make_grid, read_image, save_image
    from .new import NewConcept, new_concept
    from .parse import Problem

__all__ = [
    "QA",
    "Concept",
    "EpochSampler",
    "GenerationItem",
    "NewConcept",
    "Problem",
    "Recognition",
    "TextOnlyItem",
    "UnderstandingItem",
    "black_image",
    "check_folder",
    "concept_name",
    "facts_template",
    "generation_items",
    "list_concepts",
    "load_batch",
    "load_concept",
    "load_pixels",
    "make_grid",
    "new_concept",
    "read_concept",
    "read_facts",
    "read_image",
    "render_problems",
    "save_image",
    "text_only_items",
    "understanding_items",
    "visual_items",
]


def __getattr__(name: str) -> object:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
