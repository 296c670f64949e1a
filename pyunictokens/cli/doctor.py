"""`pyunictokens doctor`: what is installed, what works, and the command that adds what is missing."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .shell import UNEXPECTED, console


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is installed here, which backends can run, and the exact command that adds what is missing.

    The exit code is 0 when the essential parts work, else 1.

    Examples:

        pyunictokens doctor

        pyunictokens doctor --json > machine.json
    """
    from ..doctor import examine, render

    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        render(report, console())
    if not report["ok"]:
        raise typer.Exit(UNEXPECTED)
