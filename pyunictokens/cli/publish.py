"""`pyunictokens publish`: what a run learned, with a model card, in a folder or on the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from .shell import say


def publish(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run of `train` or `reinforce`.")],
    to: Annotated[str, typer.Argument(metavar="TO", help="A hub id (owner/name) or an empty folder (./there).")],
    base: Annotated[
        str | None, typer.Option("--base", help="Hub id of the base model, where the run was made with a folder.")
    ] = None,
    with_facts: Annotated[
        bool, typer.Option("--with-facts", help="The concept's facts too, for `generate --reason`.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="The concept's name, of published tokens.")] = None,
) -> None:
    """Publish what a run learned: adapters in PEFT's format, concept tokens or weights, and a model card.

    The card is written from the run's folder: data, settings, measures with their intervals, the base's licence. Photos
    and facts of a concept stay here. `uct.pipeline("owner/name")` opens it; `PeftModel.from_pretrained` loads adapters.

    Examples:

        pyunictokens publish runs/bo ./published/bo

        pyunictokens publish runs/red owner/red-adapters --base amused/amused-256
    """
    from ..runs.pipe import Pipeline

    pipe = Pipeline.from_pretrained(run, device="cpu", name=name)
    place = pipe.push_to_hub(to, base_model=base, with_facts=with_facts, private=not public)
    say(place)
