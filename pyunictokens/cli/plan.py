"""What `train --plan` prints: files, memory, hours and cost of a run, before anything is fetched or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .shell import console, plain_table, say

if TYPE_CHECKING:
    from ..data.concept import Concept
    from ..models.bundle import Sources
    from ..runs.plan import RunPlan
    from ..runs.run_dir import RunConfig


def show_plan(
    concept: Concept,
    settings: RunConfig,
    sources: Sources,
    rewards: str | Mapping[str, object] | None,
    device: str,
    *,
    price: float | None,
    rate: float | None,
    stages: bool,
    grpo: bool,
    evaluate: bool,
) -> None:
    """Print the plan of one run."""
    from ..runs.bundle import open_bundle
    from ..runs.plan import plan_run

    toy = open_bundle(sources, device, settings.grpo.dtype) if sources.is_toy else None
    useful = None if rate is None else rate * 1e12
    parts = {"stages": stages, "grpo": grpo, "evaluate": evaluate}
    plan = plan_run(sources, concept, settings, rewards, **parts, rate=useful, toy=toy)
    if isinstance(rewards, str):
        say(f"reward models: {rewards}, not looked at")
    _show_parts(plan)
    for line in [*_memory(plan), *_fits(plan), *_hours(plan, price)]:
        say(line)
    say("nothing was fetched or started: the same command without --plan does it")


def _show_parts(plan: RunPlan) -> None:
    from rich.markup import escape

    if not plan.parts:
        say("download: nothing; the toy's files come with the package")
        return
    table = plain_table("part", "network", "GB", "licence", "where", right=("GB",))
    for part in plan.parts:
        where = f"here: {part.found}" if part.ok else f"to fetch: {part.source}"
        size = "?" if part.gigabytes is None else f"{part.gigabytes:.3g}"
        table.add_row(part.name, *map(escape, (part.network, size, part.licence, where)))
    console().print(table)
    unknown = [part.name for part in plan.parts if not part.ok and part.gigabytes is None]
    more = f", and {', '.join(unknown)} of unknown size" if unknown else ""
    say(f"download: {plan.download:.3g} GB{more}")


def _memory(plan: RunPlan) -> list[str]:
    if plan.memory is None:
        return ["memory: no GPU is needed"]
    need, gb = plan.memory, 1e9
    return [
        f"GPU memory, {plan.dtype}: about {need.peak / gb:.0f} GB ({need.state / gb:.0f} weights, gradients and "
        f"moments, {need.update / gb:.0f} update, {need.others / gb:.0f} image tokenizer and reward models)",
        f"  at least {need.least / gb:.0f} GB, with grpo.micro_rows=1 grpo.checkpoint_layers=true",
    ]


def _fits(plan: RunPlan) -> list[str]:
    """What fits usual cards, a line for each choice of what learns."""
    from ..runs.plan import CARDS, USABLE

    if not plan.fits:
        return []
    wide = max(map(len, plan.fits))
    heads = "".join(f"{f'{card} GB':>8}" for card in CARDS)
    lines = [f"  {f'fits {USABLE:.0%} of a card':{wide}}{heads}"]
    lines += [f"  {words:{wide}}{''.join(f'{each:>8}' for each in row)}" for words, row in plan.fits.items()]
    return [*lines, "  (least: with grpo.micro_rows=1 grpo.checkpoint_layers=true)"]


def _hours(plan: RunPlan, price: float | None) -> list[str]:
    total = sum(plan.hours.values())
    parts = ", ".join(f"{_time(hours)} {name}" for name, hours in plan.hours.items())
    how = "measured here by drawing one group" if plan.measured else "of useful work: --rate says yours"
    found = [f"time: about {_time(total)} on one device ({parts})", f"  at {plan.rate / 1e12:.3g} TFLOP/s {how}"]
    if price is None:
        found.append("cost: give the price of an hour, as in --price 2.5")
    else:
        found.append(f"cost: about {total * price:.2f} at {price:g} an hour")
    return found


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
