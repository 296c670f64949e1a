"""`pyunictokens serve`: runs for others to use, behind OpenAI's interface. The server is `pyunictokens.serve`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .groups import MACHINE, MODELS, Machine, Models, spread
from .shell import RunsArgument, say


@spread
def serve(
    runs: RunsArgument = None,
    folder: Annotated[
        Path | None, typer.Option("--runs", metavar="FOLDER", help="Every run in this folder, later ones too.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; 127.0.0.1 is this machine alone. Others need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE.yaml", help="API keys, with limits of each (docs/serving.md)."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option("--workers", min=1, help="Processes that draw: one a GPU, or each with a share of the cores."),
    ] = 1,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Images and answers under way at once, in each worker.")
    ] = 64,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Images and answers that may wait, in each; more get 429.")
    ] = 256,
    batch_from: Annotated[
        int,
        typer.Option("--batch-from", min=1, help="On a CPU, fewer images than this are drawn two at a time; 1: never."),
    ] = 16,
    concepts: Annotated[
        int, typer.Option("--concepts", min=1, help="Concepts at hand at once; others are read when asked for.")
    ] = 200,
    open_models: Annotated[
        int, typer.Option("--models", min=1, help="Runs with weights of their own that are open at once.")
    ] = 2,
    grace: Annotated[float, typer.Option("--grace", min=0, help="Seconds to finish what runs, at the end.")] = 60.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Put prompts and questions into the log.")] = False,
    models: Models = MODELS,
    machine: Machine = MACHINE,
) -> None:
    """Serve runs to OpenAI's clients until Ctrl-C or SIGTERM: draw, paint into pictures, ask about them.

    A model is called like the folder of its run. One API key stands in PYUNICTOKENS_SERVE_KEY, many in a file that
    --keys or PYUNICTOKENS_SERVE_KEY_FILE names. One line of JSON a request goes to stderr.

    Examples:

        pyunictokens serve runs/bo runs/mug

        pyunictokens serve --runs runs --host 0.0.0.0 --keys keys.yaml --device cuda --dtype bfloat16

        pyunictokens serve --runs runs --workers 8
    """
    import logging

    from ..serve.catalog import CatalogSettings, Limits
    from ..serve.keys import Keys
    from ..serve.server import Server, ServerSettings
    from ..utils.signals import stop_on_signals

    settings = ServerSettings(
        host, port, workers, max_rows, max_waiting, batch_from, grace=grace, log_prompts=log_prompts
    )
    served = CatalogSettings(
        tuple(runs or ()), folder, models.sources, machine.device, machine.dtype, Limits(concepts, open_models)
    )
    server = Server(served, Keys.from_environment(keys), settings)
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("pyunictokens.serve")
    requests.addHandler(lines)
    requests.setLevel(logging.INFO)
    requests.propagate = False
    names = [listed.name for listed in server.catalog.list()]
    with stop_on_signals(lambda text: say("ending when what runs is done; once more ends at once")) as stop:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        say(f"{server.address}/v1: {', '.join(names[:10])}{more}; Ctrl-C ends")
        server.serve(stop)
