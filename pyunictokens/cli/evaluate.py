"""`pyunictokens evaluate RUN`: the measures of UnifyBench++ for a run, on the held-out half of a concept folder.

`evaluate` is a group: `table` and `compare` (evaluate_table.py) are commands of it, and anything else in their place is
the RUN of the command that measures one run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..utils.errors import UserError
from . import evaluate_paper, evaluate_table
from .demo import show_results
from .generate import ConceptOption, NameOption, RunArgument
from .groups import MACHINE, MODELS, Machine, Models, spread
from .shell import Bars, ClipOption, ConfigOption, OverridesArgument, TrustOption, guarded, say
from .table_options import ProtocolOption

DEFAULT = "run"


class DefaultGroup(TyperGroup):
    """A group whose first word may be left out: what names no command is the argument of :data:`DEFAULT`."""

    default = DEFAULT

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer carries a click of its own
        known = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        own = args and args[0] == self.default and (len(args) == 1 or "=" in args[1] or args[1].startswith("--"))
        if args and (not known or (own and Path(args[0]).is_dir())):  # a run may be called as the command is
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@spread
def evaluate(
    run: RunArgument,
    overrides: OverridesArgument = None,
    concept: ConceptOption = None,
    protocol: ProtocolOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file of the result. Default: evaluation.json in the run.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="An earlier result to compare with. Default: before.json of the run."),
    ] = None,
    rewards: Annotated[
        str | None,
        typer.Option("--rewards", metavar="FILE.yaml", help="Reward models, http://HOST:PORT, or MODULE:FUNCTION."),
    ] = None,
    trust: TrustOption = False,
    clip: ClipOption = None,
    name: NameOption = None,
    models: Models = MODELS,
    config: ConfigOption = None,
    machine: Machine = MACHINE,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same images. Default: 1000.")] = None,
) -> None:
    """Measure a run: recognition, answers, reasoning, images. Writes JSON and prints before and after.

    Settings: samples, timesteps, guidance_scale, max_new_tokens, judged_as, tasks, seed. A protocol brings its own
    numbers of images and its seed, unless words say otherwise.

    Examples:

        pyunictokens evaluate runs/bo

        pyunictokens evaluate runs/bo --concept toydata bo samples=8

        pyunictokens evaluate base --concept toydata bo --out base.json "tasks=[pure, dense]"

        pyunictokens evaluate runs/bo --protocol sync-r1
    """
    from dataclasses import replace

    from ..config.settings import from_mapping, load_yaml, with_overrides
    from ..data.folder import load_concept
    from ..evaluate.protocol import protocol_named
    from ..evaluate.result import EvalResult
    from ..runs.bundle import choose_rewards, load_scorers, with_clip
    from ..runs.pipeline import measure
    from ..runs.run_dir import EvaluationConfig, Run, RunConfig
    from ..utils.files import refuse_unwritable

    place, flags = Run.find(run), models.sources
    root, concept_name = place.concept_folder(concept)
    data = load_concept(root, concept_name)
    preset = "toy" if place.sources(flags).is_toy else "paper"
    settings = RunConfig.make(preset, place.config, f"{run}/config.yaml").evaluation
    if config is not None:
        settings = from_mapping(EvaluationConfig, load_yaml(config), base=settings, origin=str(config))
    if protocol is not None and protocol != settings.protocol:
        own = protocol_named(protocol).seed
        settings = with_overrides(settings, [f"protocol={protocol}", "samples=0"])
        settings = replace(settings, seed=settings.seed if own is None else own)
    if seed is not None:
        settings = replace(settings, seed=seed)
    settings = with_overrides(settings, overrides or [])
    if out is None:
        out = place.path / "evaluation.json" if place.path is not None else Path("evaluation.json")
    refuse_unwritable(out)
    chosen, trusted = choose_rewards(rewards, place.origin.rewards, place.path or out, trust=trust)
    bench = place.open(flags, machine.device, machine.dtype, name)
    scorers = load_scorers(bench.sources, bench.device, chosen, trust=trusted)
    scorers = with_clip(scorers, clip or place.origin.clip, bench.device)
    with Bars() as bars:
        result = measure(bench, data, settings, scorers, bars, published=place.published)
    result.save(out)
    results = {"now": result}
    if against is None and place.path is not None and (place.path / "before.json").is_file():
        against = place.path / "before.json"
    if against is not None:
        if not against.is_file():
            raise UserError(f"--against {against}: no such file")
        results = {against.stem: EvalResult.load(against), **results}
    show_results(results)
    say(f"protocol {settings.protocol}")
    for note in result.notes:
        say(f"note: {note}")
    say(str(out))


app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Measure a run (`pyunictokens evaluate RUN`, short for `evaluate run RUN`), fill the paper's tables, compare.

Examples:

    pyunictokens evaluate runs/bo

    pyunictokens evaluate table runs/bo --model ours --model showo-tp --model real

    pyunictokens evaluate paper mydata --plan

    pyunictokens evaluate compare tables/before tables/after""",
)
app.command(DEFAULT)(guarded(evaluate))
app.command("table")(guarded(evaluate_table.table))
app.command("paper")(guarded(evaluate_paper.paper))
app.command("compare")(guarded(evaluate_table.compare))
