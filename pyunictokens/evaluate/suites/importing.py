"""Concepts of other layouts as concept folders of ours, which `train` and baselines read: `pyunictokens data import`.

Taken over are the photos of both halves, masks beside them, the class word and the prompts to draw. These data sets
have no facts, no long prompts and no questions to learn from, so none are written: what is learned from are the plain
questions that `data new` writes for every concept. Their own questions are about test photos and stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ...data.install import refuse_present
from ...data.new import HeldOut, NewConcept, new_concept
from ...utils.errors import UserError
from ..tasks import Subject
from . import LAYOUTS, Suite, open_suite
from .files import pictures
from .yollava import CLASSES, UNKNOWN

FOREIGN = tuple(layout for layout in LAYOUTS if layout != "unify")
"""Layouts that can be imported."""
NEGATIVES = 24
"""Photos of other concepts that serve as negative examples where the data set brings none."""


def import_suite(
    suite: Suite,
    root: Path,
    *,
    negatives: Sequence[Path] = (),
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[NewConcept]:
    """Write the concepts of `suite` into the data folder `root`, each whole or not at all.

    negatives: folders or files of images of other things. Without them the folder negative_example/ beside a concept's
    photos serves, and where there is none `NEGATIVES` training photos of the other concepts, evenly spread.
    force: replace concepts of these names.

    Raises UserError for a layout that is ours already, for what the data set's reader refuses, for a concept that is
    there already (before anything is written), and as `new_concept` does.
    """
    if suite.layout not in FOREIGN:
        raise UserError(f"layout {suite.layout!r}: must be one of {', '.join(FOREIGN)}")
    everything = open_suite(f"{suite.layout}:{suite.root}")
    subjects = {name: everything.subject(name) for name in everything.names}
    for name in suite.names:
        refuse_present(root, name, force)
        if not subjects[name].references:
            raise UserError(f"{suite.root}: concept {name!r} has no photos to learn from")
    made = []
    for name in suite.names:
        subject = subjects[name]
        done = new_concept(
            root,
            name,
            subject.references,
            kind=subject.kind,
            class_word=subject.class_word,
            negatives=list(negatives) or _negatives(subject, subjects.values()),
            held_out=HeldOut(subject.test_images, [item.text for item in subject.of("pure")]),
            force=force,
            progress=progress,
        )
        if subject.class_word == UNKNOWN:
            done.notes.append(
                f'no class word: put {{"NAME": "dog"}} into {CLASSES} of the data set and import with force'
            )
        if not subject.test_images:
            done.notes.append("no test photos in the data set: its photos are all learned from")
        made.append(done)
    return made


def _negatives(subject: Subject, subjects: Iterable[Subject]) -> list[Path] | None:
    """Images of other things that the data set has; None where it has none."""
    own = pictures(subject.references[0].parent / "negative_example") if subject.references else []
    others = [path for other in subjects if other is not subject for path in other.references]
    step = max(1, -(-len(others) // NEGATIVES))
    return own or others[::step] or None
