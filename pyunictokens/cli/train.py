"""`pyunictokens train`: the concept stages and UniCTask-GRPO on one concept folder, in one run folder; or on many."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    as_words,
    command,
    quiet,
    say,
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


@dataclass(frozen=True)
class RunOptions:
    """What one run is told, by the options of the same names."""

    stages: Annotated[
        Stages | None,
        typer.Option(
            "--stages", help="staged: one stage after another; joint: one for both tasks; none: start from --start."
        ),
    ] = None
    grpo: Annotated[
        bool | None,
        typer.Option("--grpo/--no-grpo", help="Whether to reinforce after the stages. Default: what --config says."),
    ] = None
    start: Annotated[
        str | None,
        typer.Option(
            "--start-from",
            "--start",
            help="A run or folder of concept tokens to begin with. Under torchrun, which has a --start-method of its "
            "own, the long form alone.",
            metavar="RUN",
        ),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")] = False
    evaluate: Annotated[
        bool | None,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Whether to measure before and after, and to report. Default: what --config says.",
        ),
    ] = None
    rewards: Annotated[
        str | None,
        typer.Option(
            "--rewards",
            metavar="FILE.yaml",
            help="Reward models (docs/rewards.md), http://HOST:PORT of served ones, or MODULE:FUNCTION that takes a "
            "device and returns them. Default: the toy's, or paper, the four of the paper.",
        ),
    ] = None
    trust: TrustOption = False
    clip: ClipOption = None
    preset: Annotated[
        Preset | None,
        typer.Option(
            "--preset",
            help="Settings to start from (docs/training.md). Default: toy for the embedded model, else paper.",
        ),
    ] = None
    config: ConfigOption = None
    device: DeviceOption = "auto"
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="auto, float32 or bfloat16 (gradients do not fit float16). Default: what grpo.dtype says, "
            "which is auto: bfloat16 on a GPU (the toy keeps float32), else float32.",
        ),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same result. Default: 0.")] = None
    profile: ProfileOption = None


RUN_OPTIONS = RunOptions()


@spread
def train(
    root: Annotated[Path | None, typer.Argument(help="The data folder; default: the one in --config.")] = None,
    name: Annotated[str | None, typer.Argument(help="The concept; default: the one in --config.")] = None,
    overrides: OverridesArgument = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder. Default: runs/NAME.")] = None,
    options: RunOptions = RUN_OPTIONS,
    models: Models = MODELS,
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

    root, name, words = _separate(root, name, list(overrides or []))
    if concepts is None:
        if shard is not None or ray is not None:
            raise UserError("--shard and --ray are for many concepts: give --concepts as well")
        with Ranks.open(options.device) as ranks:
            if not ranks.first:
                quiet()
            return _train_one(ranks, root, name, words, out, options, models.sources, (price, rate) if plan else None)
    if plan:
        raise UserError("--plan is of one concept: name it in place of --concepts (`evaluate paper --plan` plans many)")
    if name is not None or options.start is not None or options.resume:
        raise UserError("--concepts goes without NAME, --start and --resume: what is done is never done again")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--concepts starts its own processes: run it without torchrun (--workers, --ray)")
    from ..config.settings import load_yaml
    from ..runs.run_dir import PARTS, Origin
    from .sweep import train_sweep

    config, stages, preset = options.config, options.stages, options.preset
    wanted = Origin.of(load_yaml(config) if config is not None else {}, str(config)).parts or PARTS
    parts = {
        "grpo": "grpo" in wanted if options.grpo is None else options.grpo,
        "evaluate": "evaluation" in wanted if options.evaluate is None else options.evaluate,
    }
    given = {
        "--stages": stages and stages.value,
        "--rewards": options.rewards,
        "--clip": options.clip,
        "--preset": preset and preset.value,
        **models.given,
        "--config": config and config.absolute(),
        "--device": options.device,
        "--dtype": options.dtype,
        "--seed": options.seed,
    }
    arguments = as_words(given) + (["--trust"] if options.trust else [])
    arguments += [f"--no-{part}" for part, is_wanted in parts.items() if not is_wanted]
    train_sweep(
        root,
        concepts,
        out,
        arguments,
        words,
        workers=workers,
        retries=retries,
        shard=shard,
        ray=ray,
        device=options.device,
        **parts,
    )


def _train_one(
    ranks: Ranks,
    root: Path | None,
    name: str | None,
    words: list[str],
    out: Path | None,
    options: RunOptions,
    sources: Sources,
    plan: tuple[float | None, float | None] | None,
) -> None:
    """One concept, by this process among its ranks."""
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

    config, start, resume, rewards = options.config, options.start, options.resume, options.rewards
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
    base = options.preset.value if options.preset else origin.preset or ("toy" if sources.is_toy else "paper")
    settings = RunConfig.make(base, values, str(config), words, options.seed)
    if options.stages is Stages.joint:
        settings = replace(settings, stages=replace(settings.stages, stages=("joint",)))
    kept = options.dtype or settings.grpo.dtype
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
    learn = "stages" in wanted if options.stages is None else options.stages is not Stages.none
    section = values.get("grpo")
    if not resume or config is None or (isinstance(section, Mapping) and "question_form" in section):
        settings = settings.asked_as(before is not None and before.published, learn)  # else: of an earlier version
    grpo = "grpo" in wanted if options.grpo is None else options.grpo
    evaluate = "evaluation" in wanted if options.evaluate is None else options.evaluate
    check_objective(settings.grpo.objective, words, out, trust=options.trust)
    if grpo and rewards is None and origin.rewards is None and not sources.is_toy:
        rewards = PAPER_REWARDS
    chosen, trusted = choose_rewards(rewards, origin.rewards, out, trust=options.trust, kind=concept.kind)
    if sources.is_toy and of_photographs(concept):
        warnings.warn(toy_on_photographs(root, name), stacklevel=1)
    if plan is not None:
        price, rate = plan
        given = {"stages": learn, "grpo": grpo, "evaluate": evaluate}
        return show_plan(concept, settings, sources, chosen, str(ranks.device), price=price, rate=rate, **given)
    clip = options.clip or origin.clip
    scorers = with_clip(load_scorers(sources, ranks.device, chosen, trust=trusted), clip, ranks.device)
    parts = Parts(begin, learn, grpo, evaluate, resume=resume, start_from=start)
    if ranks.first:
        parts.check(out, scorers)
    bundle = open_bundle(sources, str(ranks.device), settings.grpo.dtype, origin.max_text)
    try:
        with (
            Bars(quiet=not ranks.first) as bars,
            stop_on_signals(bars.say, patient=ranks.world > 1) as stop,
            trace(options.profile if ranks.first else None),
        ):
            context = RunContext(bundle, concept, settings, out, scorers, chosen, clip, ranks, bars, stop)
            outcome = run_concept(context, parts)
    except Stopped as stopped:  # asked for, and saved: a good end
        if not ranks.first:
            return
        said = f"{stopped}; go on with: {command('train', '--out', out, '--resume')}"
        say(said)
        return
    if not ranks.first:
        return
    if outcome.results:
        show_results(outcome.results)
    if grpo and (out / PHASES).is_file():
        show_phases(PhaseReport.load(out / PHASES))
    say(f"{out}" + (f"; the report: {outcome.report}" if outcome.report else ""))


def _separate(root: Path | None, name: str | None, words: list[str]) -> tuple[Path | None, str | None, list[str]]:
    """ROOT and NAME may be left out with --config; then the first KEY=VALUE words stand in their places."""
    named = root is not None and name is not None and (root / "concept" / "train" / name).is_dir()
    if name is not None and "=" in name and not named:
        words, name = [name, *words], None
    if root is not None and "=" in str(root) and not root.exists():
        words, root = [str(root), *words], None
    return root, name, words
