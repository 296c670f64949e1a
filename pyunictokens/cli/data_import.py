"""`pyunictokens data import`: the concepts of another benchmark's folder as concept folders of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.errors import UserError
from .shell import Bars, command, say


def import_(
    layout: Annotated[str, typer.Argument(help="yollava, mcllava or dreambench.")],
    folder: Annotated[Path, typer.Argument(help="The folder of the data set.")],
    root: Annotated[Path, typer.Argument(help="The data folder to write into; made when it is not there.")],
    name: Annotated[list[str] | None, typer.Option("--name", help="A concept; once for each. Default: all.")] = None,
    negatives: Annotated[
        list[Path] | None,
        typer.Option("--negatives", help="Folder of images of other things, for all concepts; may be given again."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace concepts of these names.")] = False,
) -> None:
    """Write concepts of Yo'LLaVA, MC-LLaVA or DreamBench as concept folders, which `train` and baselines read.

    Each concept is written whole or not at all, and the data set is not changed. Photos of both halves, class word and
    prompts are taken over. No facts, long prompts or test questions are written: `evaluate table LAYOUT:FOLDER` asks
    the data set's own.

    Examples:

        pyunictokens data import yollava yollava-data mydata

        pyunictokens data import dreambench dreambooth mydata --name dog6

        pyunictokens evaluate table dreambench:dreambooth --name dog6 -m ours:runs/{name}
    """
    from ..evaluate.suites import open_suite
    from ..evaluate.suites.importing import FOREIGN, import_suite

    if layout not in FOREIGN:
        raise UserError(f"layout {layout!r}: must be one of {', '.join(FOREIGN)}")
    suite = open_suite(f"{layout}:{folder}", name or [])
    with Bars() as bars:
        step = bars.each("reading photos")
        made = import_suite(suite, root, negatives=negatives or (), force=force, progress=step)
    for each in made:
        concept = each.concept
        photos = f"{len(concept.train_images)} photos to learn from, {len(concept.test_images)} to test with"
        say(f"{concept.name} ({concept.kind}, {concept.class_word}): {photos}")
    notes: dict[str, list[str]] = {}
    for each in made:
        for note in each.notes:
            notes.setdefault(note, []).append(each.concept.name)
    for note, names in notes.items():
        say(f"note: {', '.join(names) if len(names) < len(made) else 'all'}: {note}")
    say(f"next: {command('train', root, suite.names[0], '--out', f'runs/{suite.names[0]}')}")
