"""`pyunictokens data negatives`: pictures of other things in order of likeness to a concept, and a page of them.

The ranking itself is the business of `evaluate/retrieval.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shell import Bars, DeviceOption, SeedOption, say


def negatives(
    root: Annotated[Path, typer.Argument(help="The data folder, the one that holds concept/train/.")],
    name: Annotated[str, typer.Argument(help="The concept.")],
    pool: Annotated[
        list[Path], typer.Argument(help="Folders of pictures of other things (folders in them too), or pictures.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for ranked.json and index.html.")],
    clip: Annotated[
        str,
        typer.Option(
            "--clip",
            help="CLIP of open_clip: a folder, a hub id, or ARCHITECTURE=FILE; `toy` is the toy's own encoder.",
        ),
    ],
    positives: Annotated[int, typer.Option("--positives", min=0, help="Soft positives: the most alike.")] = 1000,
    bands: Annotated[
        int, typer.Option("--bands", min=1, help="Bands of soft positives; one fewer than generation tokens.")
    ] = 15,
    hard: Annotated[int, typer.Option("--hard", min=0, help="Hard negatives: the most alike pictures.")] = 100,
    easy: Annotated[int, typer.Option("--easy", min=0, help="Easy negatives: random ones of the rest.")] = 100,
    alike: Annotated[
        float, typer.Option("--alike", help="A cosine to one photo from which a picture is called doubtful.")
    ] = 0.95,
    own: Annotated[
        str,
        typer.Option("--own", help="Photos of the concept itself among the pictures: refuse, or leave-out."),
    ] = "refuse",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Rank pictures of other things by likeness to a concept: soft positives in bands, hard and easy negatives.

    Writes ranked.json, which `baseline train yochameleon` reads, and index.html, which shows the pictures in order.

    Examples:

        pyunictokens data negatives mydata bo other_dogs/ --clip local_clip --out ranked/bo

        pyunictokens data negatives toydata bo toydata/random_images --clip toy --out ranked/bo --bands 3
    """
    from ..data.folder import load_concept
    from ..evaluate.report.retrieval_page import write_page
    from ..evaluate.retrieval import RANKED, RetrievalSettings, rank
    from ..runs.baselines import embeddings_of
    from ..utils.files import refuse_unwritable

    settings = RetrievalSettings(positives, bands, hard, easy, alike, own, seed)
    concept = load_concept(root, name)
    refuse_unwritable(out / RANKED)
    with Bars() as bars:
        found = rank(
            embeddings_of(clip, device),
            concept.name,
            concept.train_images,
            pool,
            settings,
            concept.test_images,
            bars,
        )
        found.save(out / RANKED)
        write_page(found, out / "index.html", progress=bars)
    counts = {kind: len(found.negatives(kind)) for kind in ("hard", "easy")}
    soft = sum(1 for picture in found.pictures if picture.band)
    say(
        f"{len(found.pictures)} pictures ranked: {soft} soft positives in {bands} bands, {counts['hard']} hard and "
        f"{counts['easy']} easy negatives"
    )
    empty = sum(1 for number in range(1, bands + 1) if not found.band(number))
    if empty:
        say(f"warning: {empty} of {bands} bands are empty: give more pictures, or fewer --bands")
    if found.doubtful:
        first = found.doubtful[0]
        say(
            f"warning: {len(found.doubtful)} pictures have a cosine of {alike:g} or more to a photo of "
            f"<{concept.name}>, as {first.path} ({first.nearest:.3f}): look at them on the page, and take out what "
            "shows it"
        )
    for file, why in found.left_out[:5]:
        say(f"left out: {file}: {why}")
    if len(found.left_out) > 5:
        say(f"left out: {len(found.left_out) - 5} more, on the page")
    say(f"{out / RANKED}, {out / 'index.html'}")
