"""`pyunictokens reinforce`: plain text-to-image reinforcement on a list of prompts, without a concept."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

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
    quiet,
    say,
)

if TYPE_CHECKING:
    from ..config.training import GrpoConfig


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
            metavar="NAME|MODULE:FUNCTION",
            help="A built-in reward (NAME, or NAME=WEIGHTS), or your own f(prompts, images, **columns) -> list of "
            "numbers. Again for several.",
        ),
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Weight of each --reward, in their order. Default: 1 each.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Prompts that do not train: measured every held_out.every steps, same noise."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME|MODULE:FUNCTION", help="Measured on --held-out and never rewarded."),
    ] = None,
    concept: Annotated[
        Path | None,
        typer.Option("--concept", help="Concept tokens (RUN/final/concept) that prompts name as `<name>`."),
    ] = None,
    judge_previews: Annotated[
        bool, typer.Option("--judge-previews", help="Let the reward judge DSOG's previews; it should lie in [0, 1].")
    ] = False,
    texts: Annotated[
        bool, typer.Option("--texts", help="Reinforce what the model writes; llada always does, mmada may.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")] = Path("runs/reinforce"),
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="GPUSxGB", help="Say which grpo.shard fits so many GPUs, as 8x80; do nothing."),
    ] = None,
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

    Built-in rewards: jpeg_size and colour need nothing; clip, blip2, hpsv2, pickscore, aesthetic, dino and objects
    want weights (NAME=WEIGHTS), ocr a package; preference=FILE learns from the studio's file of choices; maths verifies
    answers of models that write (docs/rewards.md). A reward
    of your own is imported from MODULE, in the current folder or installed: only name code that you trust. A --config
    file may hold `rewards:` in place of --reward. Settings are those of the section grpo (docs/training.md): `groups`
    prompts a step, `group_size` images of each. By default adapters learn (trainable=lora) at lr=1e-4; of the toy, as
    in its preset, all weights.

    Examples:

        pyunictokens reinforce prompts.txt --reward jpeg_size --out runs/small steps=20

        pyunictokens reinforce prompts.txt --held-out test.txt --reward hpsv2=weights/HPS_v2.1_compressed.pt

        pyunictokens reinforce prompts.jsonl --reward my_rewards:red --reward my_rewards:sharp --weight 1 --weight 0.5

        pyunictokens reinforce prompts.txt --reward preference=choices/preferences.jsonl --out runs/mine

        pyunictokens reinforce prompts.txt --reward my_rewards:red --out runs/red --resume

        pyunictokens reinforce prompts.txt --reward jpeg_size --out runs/small steps=20 report_to=trackio

        pyunictokens reinforce gsm8k.jsonl --reward maths --model llada-8b objective=diffu_grpo max_new_tokens=256

        pyunictokens reinforce prompts.txt --reward my_rewards:red steps=20 groups=6 group_size=8 trainable=full
    """
    from ..config.settings import from_mapping, load_yaml, with_overrides
    from ..config.training import GrpoConfig
    from ..models import ConceptTokens
    from ..models.base import owning_rows
    from ..models.bundle import Sources
    from ..rewards.ensemble import as_model
    from ..rewards.experts.preference import Preference
    from ..rewards.load import RewardConfig, load_rewards
    from ..rewards.names import named, short_name
    from ..runs.bundle import check_objective, open_bundle, resolved_dtype
    from ..train import reinforce as run
    from ..train.distributed.plan import Devices, Sizes
    from ..train.distributed.plan import plan as plan_lines
    from ..train.distributed.ranks import Ranks
    from ..train.trackers import check_trackers
    from ..utils.signals import Stopped, stop_on_signals
    from ..utils.yaml_text import settled

    devices = None if plan is None else Devices.read(plan)
    values = load_yaml(config) if config is not None else {}
    if not reward and "rewards" not in values:
        raise UserError("which reward? Give --reward NAME or MODULE:FUNCTION, as in --reward my_rewards:red")
    if weight and len(weight) != len(reward or ()):
        raise UserError(f"{len(weight)} --weight for {len(reward or ())} --reward: give one for each, or none")
    sys.path.insert(0, os.getcwd())
    sources = Sources.choose(Sources(model, vq, tokenizer))
    section: object = {}
    if config is not None:
        section = values.get("grpo", {key: value for key, value in values.items() if key != "rewards"})
        if not isinstance(section, Mapping):
            raise UserError(f"{config}: grpo: must be a table of settings")
    words = [*([f"seed={seed}"] if seed is not None else []), *(overrides or [])]

    def asked(trainable: str) -> GrpoConfig:
        base = from_mapping(GrpoConfig, section, base=_start(sources.is_toy, trainable), origin=str(config))
        return with_overrides(base, [word.removeprefix("grpo.") for word in words])

    settings = asked(asked("full" if sources.is_toy else "lora").trainable)
    check_objective(settings.objective, words, out, trust=trust)
    check_trackers(settings.report_to)
    with Ranks.open(device) as ranks:
        if not ranks.first:
            quiet()
        settings = with_overrides(settings, [f"dtype={resolved_dtype(sources, ranks.device, settings.dtype)}"])
        bundle = open_bundle(sources, str(ranks.device), settings.dtype)
        if texts:
            bundle = bundle.as_text()
        if devices is not None:
            sizes = Sizes.of(bundle.model, settings, bundle.model.dtype)
            say("\n".join(plan_lines(sizes, devices)))
            return
        if concept is not None:
            owning_rows(bundle.model).attach(ConceptTokens.load(concept).to(bundle.device))
        looks: dict[str, dict[str, object]] = {}
        if sources.is_toy:
            from ..toy.rewards import offer_features

            offer_features()
            looks = {"preference": {"features": "toy"}}
        judges: object = [named(word, ranks.device, "--reward", looks) for word in reward or ()]
        for judge in judges if isinstance(judges, list) and ranks.first else ():
            if isinstance(judge, Preference):
                say(str(judge))
        if not reward:
            own = values["rewards"]
            chosen = RewardConfig.from_mapping(cast("Mapping[str, object]", settled(own)), f"{config}: rewards")
            judges = load_rewards(chosen, ranks.device, trust=True)
        measured = {short_name(word): as_model(named(word, ranks.device, "--metric", looks)) for word in metric or ()}
        try:
            with Bars(quiet=not ranks.first) as bars, stop_on_signals(bars.say, patient=ranks.world > 1) as stop:
                result = run(
                    bundle,
                    prompts,
                    judges,
                    settings,
                    out,
                    weights=weight or None,
                    held_out=held_out,
                    metrics=measured or None,
                    preview_scorer="reward" if judge_previews else None,
                    resume=resume or (ranks.attempt > 0 and (out / "run.json").is_file()),
                    progress=bars,
                    stop=stop,
                    ranks=ranks,
                )
        except Stopped as stopped:  # asked for, and saved: a good end
            if ranks.first:
                say(f"{stopped}; go on with the same command and --resume")
            return
    if ranks.first:
        ended = f"{result.steps} steps, mean reward of the last {result.last['reward_mean']:.3f}" if result.last else ""
        say(f"{result.folder}: {ended}")
        if result.best is not None:
            by = settings.held_out.by
            first, last, best = (each.mean(by) for each in (result.held_out[0], result.held_out[-1], result.best))
            say(
                f"held-out prompts, {by}: {first:.3f} before, {last:.3f} at the end, best {best:.3f} after "
                f"{result.best.step} steps ({result.folder / 'best'})"
            )


def _start(toy: bool, trainable: str) -> GrpoConfig:
    """The settings that --config and KEY=VALUE change. Adapters begin with a higher rate: at that of the weights (1e-6)
    they would not move in a day."""
    from ..config.training import PRESETS, GrpoConfig

    base = PRESETS["toy"].grpo if toy else GrpoConfig()
    return replace(base, trainable="lora", lr=1e-3 if toy else 1e-4) if trainable == "lora" else base
