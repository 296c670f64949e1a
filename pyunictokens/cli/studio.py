"""`pyunictokens studio`: trained runs on a page in the browser. The pages are `pyunictokens.serve.studio`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .groups import MACHINE, MODELS, Machine, Models, spread
from .shell import RunsArgument, as_words, say


@spread
def studio(
    runs: RunsArgument = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--runs",
            metavar="FOLDER",
            help="Every run in this folder, later ones too; training writes here. Default: runs.",
        ),
    ] = None,
    data: Annotated[
        Path, typer.Option("--data", metavar="FOLDER", help="The data folder that concepts are written into.")
    ] = Path("data"),
    choices: Annotated[
        Path, typer.Option("--choices", metavar="FOLDER", help="Where choices between pictures are saved.")
    ] = Path("choices"),
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; other addresses than this machine's need a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one from 7860 on.")] = 7860,
    models: Models = MODELS,
    machine: Machine = MACHINE,
) -> None:
    """Make concepts from photos, train, draw, ask, compare and choose in the browser, until Ctrl-C or SIGTERM.

    A training goes on when the page is closed, and ends with the studio: it saves, and can be resumed. Choices are
    lines of `preferences.jsonl` with two pictures each. The page loads nothing from other places. With
    PYUNICTOKENS_STUDIO_PASSWORD set, one signs in as `studio`.

    Examples:

        pyunictokens studio

        pyunictokens studio runs/bo

        pyunictokens studio --runs runs --data mydata --port 8080
    """
    from ..rollout.serving import ServingEngine
    from ..serve.catalog import Catalog
    from ..serve.studio.backend import Studio
    from ..serve.studio.concepts import Concepts
    from ..serve.studio.page import serve_studio
    from ..serve.studio.training import Training
    from ..utils.signals import stop_on_signals

    if folder is None and not runs:
        folder = Path("runs")
        folder.mkdir(exist_ok=True)
    options = as_words({**models.given, "--device": machine.device})
    training = Training(folder or Path("runs"), data, options)
    serving = ServingEngine()
    catalog = Catalog(
        runs or (),
        folder,
        flags=models.sources,
        device=machine.device,
        dtype=machine.dtype,
        in_use=serving.concepts_in_use,
    )
    with stop_on_signals(lambda text: say("ending")) as stop:
        shown = lambda address: say(f"{address} shows {len(catalog.list())} models; Ctrl-C ends")  # noqa: E731
        serve_studio(Studio(catalog, serving, choices), Concepts(data), training, host, port, shown, stop)
