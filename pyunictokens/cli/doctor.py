"""`pyunictokens doctor`: what is installed, what works, and the command that adds what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .shell import UNEXPECTED, ConfigOption, console


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Look for the reward models' files instead: where, licence, how to get.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Say what is installed here, which backends can run, and the exact command that adds what is missing.

    The exit code is 0 when the essential parts work (with --weights: when every file is there), else 1. --config names
    a file with rewards settings, whose folders --weights then looks into.

    Examples:

        pyunictokens doctor

        pyunictokens doctor --json > machine.json

        pyunictokens doctor --weights

        pyunictokens doctor --weights --config runs/bo/config.yaml
    """
    from ..runs.doctor import examine, render

    if weights:
        return _weights(config, as_json)
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        render(report, console())
    if not report["ok"]:
        raise typer.Exit(UNEXPECTED)


def _weights(config: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from ..rewards.load import RewardConfig
    from ..rewards.registry import weight_status
    from ..runs.bundle import read_rewards
    from ..runs.doctor import render_weights

    chosen = read_rewards(str(config)) if config is not None else None
    findings = weight_status(RewardConfig.from_mapping(chosen).paths() if isinstance(chosen, Mapping) else None)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        render_weights(findings, console())
    if not all(finding.ok for finding in findings):
        raise typer.Exit(UNEXPECTED)
