"""The command line: `pyunictokens COMMAND`. One file a group of commands; this one only lists them.

Nothing heavy is imported before a command runs, so `--help` answers at once. Exit codes: 0 done, 2 something the user
gave cannot be used (one clear line, no traceback), 1 unexpected, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import os
import sys

import typer

from ..utils.signals import ENDS_WITH_STDIN, end_with_parent
from . import (
    baseline,
    bench,
    data,
    demo,
    doctor,
    evaluate,
    evaluate_table,
    generate,
    publish,
    reinforce,
    serve,
    studio,
    train,
)
from . import rewards_server as rewards
from .shell import guarded, nobody_reads, print_anything, show_warnings_briefly

app = typer.Typer(
    name="pyunictokens",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach a unified masked-generative model one person's dog, mug or friend, and improve it by reinforcement "
    "learning. Without --model, every command works on the small toy model that comes with the package.",
)
app.command("demo")(guarded(demo.demo))
app.command("train")(guarded(train.train))
app.command("reinforce")(guarded(reinforce.reinforce))
app.command("generate")(guarded(generate.generate))
app.command("understand")(guarded(generate.understand))
app.command("publish")(guarded(publish.publish))
app.command("serve")(guarded(serve.serve))
app.command("studio")(guarded(studio.studio))
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(baseline.app, name="baseline")
app.command("compare")(guarded(evaluate_table.compare))
app.command("bench", context_settings=bench.CONTEXT)(guarded(bench.bench))
app.add_typer(data.app, name="data")
app.add_typer(rewards.app, name="rewards")
app.add_typer(rewards.app, name="experts", hidden=True)  # what it was called before
app.command("doctor")(guarded(doctor.doctor))


def _version(value: bool) -> None:
    if value:
        from pyunictokens import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options that stand before the command."""


def main() -> None:
    """Entry point of the console script."""
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a lost rank is told in one line, not by stacks of C++ frames
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ.pop(ENDS_WITH_STDIN, ""):  # a job of a sweep
        end_with_parent()
    print_anything()
    show_warnings_briefly()
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            nobody_reads()
