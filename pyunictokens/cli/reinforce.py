"""`pyunictokens reinforce`: plain text-to-image reinforcement on a list of prompts, without a concept."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..utils.errors import UserError
from .shell import (
    Bars,
    ConfigOption,
    DeviceOption,
    ModelOption,
    TokenizerOption,
    TrustOption,
    VqOption,
    console,
    quiet,
)


def reinforce(
    prompts: Annotated[Path, typer.Argument(help="Prompts: a .txt file (one a line) or .jsonl (key prompt).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of grpo; they win over --config.", show_default=False),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            metavar="MODULE:FUNCTION",
            help="f(prompts, images, **columns) -> list of numbers, or a reward model. Again for several.",
        ),
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Weight of each --reward, in their order. Default: 1 each.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")] = Path("runs/reinforce"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")] = False,
    model: ModelOption = None,
    vq: VqOption = None,
    tokenizer: TokenizerOption = None,
    config: ConfigOption = None,
    trust: TrustOption = False,
    device: DeviceOption = "auto",
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same result. Default: 0.")] = None,
) -> None:
    """Improve a model's images of a list of prompts by a reward of your own. Nothing is needed but the prompts.

    The reward is imported from MODULE, in the current folder or installed: only name code that you trust. Settings are
    those of the section grpo (docs/training.md); by default adapters learn (trainable=lora).

    Examples:

        pyunictokens reinforce prompts.txt --reward my_rewards:red --out runs/red

        pyunictokens reinforce prompts.jsonl --reward my_rewards:red --reward my_rewards:sharp --weight 1 --weight 0.5

        pyunictokens reinforce prompts.txt --reward my_rewards:red --out runs/red --resume

        pyunictokens reinforce prompts.txt --reward my_rewards:red steps=20 group_size=8 objective=gspo trainable=full
    """
    from ..config.settings import from_mapping, load_yaml, with_overrides
    from ..config.training import PRESETS, GrpoConfig
    from ..models.bundle import Sources
    from ..rewards.load import imported
    from ..runs.bundle import check_objective, open_bundle
    from ..train import reinforce as run
    from ..train.distributed.ranks import Ranks
    from ..utils.signals import Stopped, stop_on_signals

    if not reward:
        raise UserError("which reward? Give --reward MODULE:FUNCTION, as in --reward my_rewards:red")
    if weight and len(weight) != len(reward):
        raise UserError(f"{len(weight)} --weight for {len(reward)} --reward: give one for each, or none")
    sys.path.insert(0, os.getcwd())
    found = [imported(name, "--reward", trust=True) for name in reward]
    functions = [each() if isinstance(each, type) else each for each in found]
    sources = Sources.choose(Sources(model, vq, tokenizer))
    settings = replace(PRESETS["toy" if sources.is_toy else "paper"].grpo, trainable="lora")
    if config is not None:
        values = load_yaml(config)
        section = values.get("grpo", values)
        if not isinstance(section, Mapping):
            raise UserError(f"{config}: grpo: must be a table of settings")
        settings = from_mapping(GrpoConfig, section, base=settings, origin=str(config))
    words = [*([f"seed={seed}"] if seed is not None else []), *(overrides or [])]
    settings = with_overrides(settings, [word.removeprefix("grpo.") for word in words])
    check_objective(settings.objective, words, out, trust=trust)
    with Ranks.open(device) as ranks:
        if not ranks.first:
            quiet()
        bundle = open_bundle(sources, str(ranks.device), settings.dtype)
        try:
            with Bars(quiet=not ranks.first) as bars, stop_on_signals(bars.say, patient=ranks.world > 1) as stop:
                result = run(
                    bundle,
                    prompts,
                    functions,
                    settings,
                    out,
                    weights=weight or None,
                    resume=resume or (ranks.attempt > 0 and (out / "run.json").is_file()),
                    progress=bars,
                    stop=stop,
                    ranks=ranks,
                )
        except Stopped as stopped:  # asked for, and saved: a good end
            if ranks.first:
                console().print(f"{stopped}; go on with the same command and --resume", markup=False, soft_wrap=True)
            return
    if ranks.first:
        ended = f"{result.steps} steps, mean reward of the last {result.last['reward_mean']:.3f}" if result.last else ""
        console().print(f"{result.folder}: {ended}", markup=False, soft_wrap=True)
