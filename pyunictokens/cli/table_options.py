"""Options that the commands of tables share: how is asked and scored, which models, which judge."""

from __future__ import annotations

from typing import Annotated

import typer

MODELS_HELP = (
    "A row of the table; give it once a model: ours[:RUN], showo-tp, showo-ip, transformers:PATH[+ip], "
    "diffusers:PATH[,lora=…|,embedding=…], endpoint:URL,model=NAME[,draw=NAME][+ip], real, or METHOD:DIR of "
    "`baseline train`. {name} in RUN and DIR is the concept."
)

ProtocolOption = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        metavar="ours|sync-r1",
        help="How questions are asked and scored: ours, or as the authors' later public code (docs/evaluation.md).",
    ),
]
TableClipOption = Annotated[
    str | None,
    typer.Option(
        "--clip",
        help="CLIP of open_clip: a folder, a hub id, or ARCHITECTURE=FILE; `toy` is the toy's own encoder, and the "
        "default where the model is the toy.",
    ),
]
JudgeUrlOption = Annotated[
    str | None, typer.Option("--judge-url", help="OpenAI-compatible endpoint of the judge, up to /v1.")
]
JudgeModelOption = Annotated[
    str | None, typer.Option("--judge-model", help="The judge's name at the endpoint, as in gpt-4o.")
]
JudgeKeyOption = Annotated[
    str,
    typer.Option("--judge-key-env", help="Environment variable of the judge's key; `none` where it wants none."),
]
JUDGE_KEY = "OPENAI_API_KEY"
"""The default of :data:`JudgeKeyOption`."""


def key_variable(given: str) -> str | None:
    """The environment variable that :data:`JudgeKeyOption` names; None where the judge wants no key."""
    return None if given == "none" else given


RATE = 300.0
"""TFLOP/s of useful work that plans count with."""
RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate",
        min=0.001,
        help=f"Useful TFLOP/s of one device, for the plan's times. Default: {RATE:g}, or what a CPU is measured at.",
    ),
]
