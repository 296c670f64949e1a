"""`pyunictokens doctor`: what is installed, what works, and the command that adds what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shell import UNEXPECTED, ConfigOption, console

if TYPE_CHECKING:
    from ..models.bundle import Sources


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Look for the files of real models instead: where, size, licence, how to get."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="With --weights: the model whose files are looked for. Default: show-o-512."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Say what is installed here, which backends can run, and the exact command that adds what is missing.

    The exit code is 0 when the essential parts work, else 1. With --weights it is 0 when all seven parts of the real
    model are there: the model, its two tokenizers and the paper's four reward models. --config names a run's settings,
    or a file with reward models, whose parts --weights then looks for.

    Examples:

        pyunictokens doctor

        pyunictokens doctor --json > machine.json

        pyunictokens doctor --weights

        pyunictokens doctor --weights --model show-o-256

        pyunictokens doctor --weights --config runs/bo/config.yaml
    """
    from ..runs.doctor import examine, render

    if weights:
        from ..models.bundle import Sources

        return _weights(Sources(model), config, as_json)
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        render(report, console())
    if not report["ok"]:
        raise typer.Exit(UNEXPECTED)


def _weights(sources: Sources, config: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from ..config.settings import load_yaml
    from ..models.bundle import Sources
    from ..rewards.registry import weight_status
    from ..runs.bundle import paper_rewards, read_rewards
    from ..runs.doctor import render_weights
    from ..runs.plan import parts_of
    from ..runs.run_dir import Origin

    further = []
    if config is None:
        chosen = sources if not sources.is_toy else Sources("show-o-512")
        findings = parts_of(Sources.choose(chosen), paper_rewards())
        further = [each for each in weight_status() if each.source not in {part.source for part in findings}]
    else:
        values = load_yaml(config)
        named = Origin.of({key: values[key] for key in ("model", "vq", "tokenizer", "vision") if key in values}, "")
        parts = sources if not sources.is_toy else Sources(named.model, named.vq, named.tokenizer, named.vision)
        rewards = read_rewards(str(config)) if {"rewards", "models", "experts"} & set(values) else None
        findings = parts_of(parts if parts.is_toy else Sources.choose(parts), rewards)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        render_weights(findings, console(), further)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(UNEXPECTED)
