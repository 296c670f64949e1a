"""Concept folders in the published layout: read, check, make; images to tensors; what training draws; the toy world.

Knows models at most and never training. Names are imported when first asked for, so that reading a folder needs no more
than it must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy

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

__getattr__, __dir__ = lazy(
    __name__,
    {
        "concept": ("Concept", "QA", "Recognition", "concept_name"),
        "parse": ("Problem",),
        "folder": ("list_concepts", "load_concept", "read_concept"),
        "check": ("check_folder", "render_problems"),
        "images": ("black_image", "load_batch", "load_pixels", "make_grid", "read_image", "save_image"),
        "new": ("NewConcept", "new_concept"),
        "facts": ("facts_template", "read_facts"),
        "batches": (
            "EpochSampler",
            "GenerationItem",
            "TextOnlyItem",
            "UnderstandingItem",
            "generation_items",
            "text_only_items",
            "understanding_items",
            "visual_items",
        ),
    },
)
