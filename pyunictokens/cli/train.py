"""`pyunictokens train`: the concept stages and UniCTask-GRPO on one concept folder, in one run folder; or on many."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from .demo import show_results
from .groups import MODELS, Models, spread
from .plan import show_plan
from .shell import (
    Bars,
    ClipOption,
    ConfigOption,
    DeviceOption,
    OverridesArgument,
    ProfileOption,
    TrustOption,
    command,
    console,
    quiet,
    show_phases,
)

if TYPE_CHECKING:
    from ..models.bundle import Sources
    from ..train.distributed.ranks import Ranks


class Stages(str, Enum):
    """Which concept stages run."""

    staged = "staged"
    joint = "joint"
    none = "none"


class Preset(str, Enum):
    """Where settings start from."""

    toy = "toy"
    paper = "paper"
    unictokens = "unictokens"
    fast = "fast"
    quality = "quality"


@spread
def train(
    root: Annotated[Path | None, typer.Argument(help="The data folder; default: the one in --config.")] = None,
    name: Annotated[str | None, typer.Argument(help="The concept; default: the one in --config.")] = None,
    overrides: OverridesArgument = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder. Default: runs/NAME.")] = None,
    stages: Annotated[
        Stages | None,
        typer.Option(
            "--stages", help="staged: one stage after another; joint: one for both tasks; none: start from --start."
        ),
    ] = None,
    grpo: Annotated[
        bool | None,
        typer.Option("--grpo/--no-grpo", help="Whether to reinforce after the stages. Default: what --config says."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start-from",
            "--start",
            help="A run or folder of concept tokens to begin with. Under torchrun, which has a --start-method of its "
            "own, the long form alone.",
            metavar="RUN",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")] = False,
    evaluate: Annotated[
        bool | None,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Whether to measure before and after, and to report. Default: what --config says.",
        ),
    ] = None,
    rewards: Annotated[
        str | None,
        typer.Option(
            "--rewards",
            metavar="FILE.yaml",
            help="Reward models (docs/rewards.md), http://HOST:PORT of served ones, or MODULE:FUNCTION that takes a "
            "device and returns them. Default: the toy's, or paper, the four of the paper.",
        ),
    ] = None,
    trust: TrustOption = False,
    clip: ClipOption = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            "--preset",
            help="Settings to start from (docs/training.md). Default: toy for the embedded model, else paper.",
        ),
    ] = None,
    models: Models = MODELS,
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="auto, float32 or bfloat16 (gradients do not fit float16). Default: what grpo.dtype says, "
            "which is auto: bfloat16 on a GPU (the toy keeps float32), else float32.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same result. Default: 0.")] = None,
    concepts: Annotated[
        str | None,
        typer.Option(
            "--concepts", metavar="all|A,B|FILE", help="Many concepts, a job each; --out holds all their runs."
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Jobs at a time, with --concepts.")] = 1,
    retries: Annotated[int, typer.Option("--retries", min=0, help="How often a broken job is taken up again.")] = 1,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="The I-th of N parts of --concepts, for job arrays.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Jobs on a Ray cluster: auto, local, ray://HOST:PORT."),
    ] = None,
    profile: ProfileOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be fetched, with memory, hours and cost; do nothing.")
    ] = False,
    price: Annotated[
        float | None, typer.Option("--price", min=0.0, help="Of one hour of the machine, for the cost in the plan.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=0.001, help="Useful TFLOP/s of the machine, for the hours in the plan."),
    ] = None,
) -> None:
    """Learn a concept's tokens from its folder, then improve answers and images by reinforcement.

    Settings have three sections: stages, grpo, evaluation (docs/training.md lists them). A run's config.yaml is a valid
    --config.

    Examples:

        pyunictokens train toydata bo --out runs/bo

        pyunictokens train toydata bo --out runs/bo --resume

        pyunictokens train toydata bo --out runs/short grpo.steps=5 grpo.group_size=4

        pyunictokens train toydata bo --out runs/bo report_to=wandb,tensorboard

        pyunictokens train toydata bo --out runs/tokens --stages joint --no-grpo

        pyunictokens train --config runs/bo/config.yaml --out runs/again --seed 1

        pyunictokens train mydata mug --model show-o-512 --plan --price 2.5

        pyunictokens train --concepts all --workers 2 toydata --out runs/all

        torchrun --nproc-per-node 8 -m pyunictokens train toydata bo --out runs/bo

        torchrun --nproc-per-node 8 -m pyunictokens train toydata bo --stages none --start-from published/bo
    """
    from ..train.distributed.ranks import Ranks

    words = list(overrides or [])
    root, name, words = _separate(root, name, words)
    if plan and concepts is not None:
        raise UserError("--plan is of one concept: name it in place of --concepts (`evaluate paper --plan` plans many)")
    if concepts is not None:
        if name is not None or start is not None or resume:
            raise UserError("--concepts goes without NAME, --start and --resume: what is done is never done again")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("--concepts starts its own processes: run it without torchrun (--workers, --ray)")
        from ..config.settings import load_yaml
        from ..runs.run_dir import PARTS, Origin
        from .sweep import train_sweep

        given = {
            "--stages": stages and stages.value,
            "--rewards": rewards,
            "--clip": clip,
            "--preset": preset and preset.value,
            **models.given,
            "--config": config and str(config.absolute()),
            "--device": device,
            "--dtype": dtype,
            "--seed": seed,
        }
        arguments = [text for key, value in given.items() if value is not None for text in (key, str(value))]
        arguments += ["--trust"] if trust else []
        wanted = Origin.of(load_yaml(config) if config is not None else {}, str(config)).parts or PARTS
        grpo, evaluate = (
            ("grpo" in wanted if grpo is None else grpo),
            ("evaluation" in wanted if evaluate is None else evaluate),
        )
        arguments += [] if grpo else ["--no-grpo"]
        arguments += [] if evaluate else ["--no-evaluate"]
        return train_sweep(
            root,
            concepts,
            out,
            arguments,
            words,
            workers=workers,
            retries=retries,
            shard=shard,
            ray=ray,
            grpo=grpo,
            evaluate=evaluate,
            device=device,
        )
    if shard is not None or ray is not None:
        raise UserError("--shard and --ray are for many concepts: give --concepts as well")
    with Ranks.open(device) as ranks:
        if not ranks.first:
            quiet()
        _train_one(
            ranks,
            root,
            name,
            words,
            out,
            stages,
            grpo,
            start,
            resume,
            evaluate,
            rewards,
            trust,
            clip,
            preset,
            models.sources,
            config,
            dtype,
            seed,
            profile,
            (price, rate) if plan else None,
        )


def _train_one(
    ranks: Ranks,
    root: Path | None,
    name: str | None,
    words: list[str],
    out: Path | None,
    stages: Stages | None,
    grpo: bool | None,
    start: str | None,
    resume: bool,
    evaluate: bool | None,
    rewards: str | None,
    trust: bool,
    clip: str | None,
    preset: Preset | None,
    sources: Sources,
    config: Path | None,
    dtype: str | None,
    seed: int | None,
    profile: Path | None,
    plan: tuple[float | None, float | None] | None,
) -> None:
    """One concept, by this process among its ranks."""
    from dataclasses import replace

    from ..config.settings import load_yaml, with_overrides
    from ..data.folder import load_concept
    from ..data.photographs import of_photographs, toy_on_photographs
    from ..models.bundle import Sources
    from ..runs.bundle import (
        PAPER_REWARDS,
        check_objective,
        choose_rewards,
        load_scorers,
        open_bundle,
        resolved_dtype,
        with_clip,
    )
    from ..runs.context import Parts, RunContext
    from ..runs.pipeline import run_concept
    from ..runs.run_dir import CONFIG, PARTS, Origin, Run, RunConfig
    from ..train.grpo import PHASES
    from ..train.trackers import check_trackers
    from ..utils.devices import check_training_dtype, pick_dtype
    from ..utils.profiling import PhaseReport, trace
    from ..utils.signals import Stopped, stop_on_signals

    if resume and config is None and out is not None and (out / CONFIG).is_file():
        config = out / CONFIG  # what the run was started with
    values = load_yaml(config) if config is not None else {}
    origin = Origin.of(values, str(config))
    if resume and root is None and name is None and origin.root is not None and origin.name is not None:
        where = ("--out", out) if out is not None else ()
        root, name = origin.folder(command("train", "ROOT", origin.name, *where, "--resume"))
    root, name = root or origin.root, name or origin.name
    if root is None or name is None:
        raise UserError("which concept? Give ROOT and NAME, or a --config that holds root and name")
    concept = load_concept(root, name)
    sources = Sources.choose(sources, origin)
    base = preset.value if preset else origin.preset or ("toy" if sources.is_toy else "paper")
    settings = RunConfig.make(base, values, str(config), words, seed)
    if stages is Stages.joint:
        settings = replace(settings, stages=replace(settings.stages, stages=("joint",)))
    kept = dtype or settings.grpo.dtype
    if plan is not None and kept == "auto" and not sources.is_toy:
        kept = "bfloat16"  # a plan made on a laptop is of the GPU that will run it
    kept = resolved_dtype(sources, ranks.device, kept)
    settings = replace(settings, grpo=with_overrides(settings.grpo, [f"dtype={kept}"]))
    out = out or Path("runs") / concept.name
    if ranks.attempt and (out / CONFIG).is_file():
        resume = True  # torchrun starts anew what it has started before
    if start is None and origin.name == concept.name:
        start = origin.start
    check_training_dtype(pick_dtype(settings.grpo.dtype), resume)
    check_trackers(settings.grpo.report_to)
    before = Run.find(start) if start is not None else None
    begin = before.concept_tokens(concept.name) if before is not None else None
    wanted = origin.parts or PARTS
    learn = "stages" in wanted if stages is None else stages is not Stages.none
    section = values.get("grpo")
    if not resume or config is None or (isinstance(section, Mapping) and "question_form" in section):
        settings = settings.asked_as(before is not None and before.published, learn)  # else: of an earlier version
    grpo = "grpo" in wanted if grpo is None else grpo
    evaluate = "evaluation" in wanted if evaluate is None else evaluate
    check_objective(settings.grpo.objective, words, out, trust=trust)
    if grpo and rewards is None and origin.rewards is None and not sources.is_toy:
        rewards = PAPER_REWARDS
    chosen, trusted = choose_rewards(rewards, origin.rewards, out, trust=trust, kind=concept.kind)
    if sources.is_toy and of_photographs(concept):
        warnings.warn(toy_on_photographs(root, name), stacklevel=1)
    if plan is not None:
        price, rate = plan
        given = {"stages": learn, "grpo": grpo, "evaluate": evaluate}
        return show_plan(concept, settings, sources, chosen, str(ranks.device), price=price, rate=rate, **given)
    clip = clip or origin.clip
    scorers = with_clip(load_scorers(sources, ranks.device, chosen, trust=trusted), clip, ranks.device)
    parts = Parts(begin, learn, grpo, evaluate, resume=resume, start_from=start)
    if ranks.first:
        parts.check(out, scorers)
    bundle = open_bundle(sources, str(ranks.device), settings.grpo.dtype, origin.max_text)
    try:
        with (
            Bars(quiet=not ranks.first) as bars,
            stop_on_signals(bars.say, patient=ranks.world > 1) as stop,
            trace(profile if ranks.first else None),
        ):
            context = RunContext(bundle, concept, settings, out, scorers, chosen, clip, ranks, bars, stop)
            outcome = run_concept(context, parts)
    except Stopped as stopped:  # asked for, and saved: a good end
        if not ranks.first:
            return
        said = f"{stopped}; go on with: {command('train', '--out', out, '--resume')}"
        console().print(said, markup=False)
        return
    if not ranks.first:
        return
    if outcome.results:
        show_results(outcome.results)
    if grpo and (out / PHASES).is_file():
        show_phases(PhaseReport.load(out / PHASES))
    console().print(f"{out}" + (f"; the report: {outcome.report}" if outcome.report else ""), markup=False)


def _separate(root: Path | None, name: str | None, words: list[str]) -> tuple[Path | None, str | None, list[str]]:
    """ROOT and NAME may be left out with --config; then the first KEY=VALUE words stand in their places."""
    named = root is not None and name is not None and (root / "concept" / "train" / name).is_dir()
    if name is not None and "=" in name and not named:
        words, name = [name, *words], None
    if root is not None and "=" in str(root) and not root.exists():
        words, root = [str(root), *words], None
    return root, name, words
