"""What makes reinforcement learn: arms that differ in one choice, at equal compute, over seeds, on held-out prompts.

    python -m experiments.reinforce_study run --work study       # what docs/reinforce-study.json and study/ lack
    python -m experiments.reinforce_study page --work study      # adds study/ to that file; table and figure of it

Compute is counted in row-steps: images × timesteps of a rollout, twice with guidance, and three times as much again for
each optimizer step's forward and backward pass over the timesteps it looks at. Every arm gets the same number of them,
so an arm that is dearer a step gets fewer steps. All are measured on the same prompts with the same noise, in the same
place on the axis; what counts is the reader's `wholly_right`, which no reward sees.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pyunictokens.config.settings import with_overrides
from pyunictokens.config.training import GrpoConfig
from pyunictokens.runs.prompt_demo import SETTINGS, run_prompt_demo
from pyunictokens.utils.files import read_json, read_json_lines, write_json, write_text_atomic

ROOT = Path(__file__).resolve().parent.parent
COMMON = ("groups=6", "group_size=8", "rollouts_kept=1", "ema_decay=0.9")
"""What arms have where they say nothing else. `make reinforce` took groups of 24 afterwards, and its average of the
weights, over 33 steps, would still lag at the end of runs as short as these."""
POINTS = 4
"""Measurements of a run after the first."""
PROMPTS = (960, 192)
"""How many train and how many are held out."""
KEPT = "reinforce-study.json"
GROUPS: dict[str, tuple[str, ...]] = {
    "objective": ("unictask, newly unmasked codes", "unictask, masked codes", "mask_grpo"),
    "advantage, averaging, reference": ("advantage=mean", "weights not averaged", "beta 0.01"),
    "timesteps": ("all timesteps", "a quarter of the timesteps", "timestep_choice=largest_change", "8 timesteps"),
    "one batch": ("2 inner epochs", "4 inner epochs", "12 prompts × 4", "half of the rollouts"),
    "large groups": ("2 prompts × 24", "2 prompts × 24, largest_change", "2 prompts × 24, 8 of them"),
    "learning rate, what learns, guidance": ("lr 1e-4", "lr 4e-4", "LoRA, lr 1e-3", "guidance 3"),
}
"""The figure's panels: arms beside the first one."""

ARMS: dict[str, tuple[str, ...]] = {
    "6 prompts × 8": (),
    "advantage=mean": ("advantage=mean",),
    "unictask, newly unmasked codes": ("objective=unictask", "token_scope=newly_unmasked"),
    "unictask, masked codes": ("objective=unictask", "token_scope=masked"),
    "mask_grpo": ("objective=mask_grpo",),
    "all timesteps": ("timestep_fraction=1",),
    "timestep_choice=largest_change": ("timestep_choice=largest_change",),
    "2 inner epochs": ("inner_epochs=2",),
    "4 inner epochs": ("inner_epochs=4",),
    "2 prompts × 24": ("groups=2", "group_size=24"),
    "12 prompts × 4": ("groups=12", "group_size=4"),
    "lr 1e-4": ("lr=1e-4",),
    "lr 4e-4": ("lr=4e-4",),
    "weights not averaged": ("ema_decay=0",),
    "beta 0.01": ("beta=0.01",),
    "guidance 3": ("guidance_scale=3",),
    "8 timesteps": ("timesteps=8",),
    "LoRA, lr 1e-3": ("trainable=lora", "lr=1e-3"),
    "half of the rollouts": ("rollouts_kept=0.5",),
    "2 prompts × 24, 8 of them": ("groups=2", "group_size=24", "rollouts_kept=0.334"),
    "a quarter of the timesteps": ("timestep_fraction=0.25",),
    "2 prompts × 24, largest_change": ("groups=2", "group_size=24", "timestep_choice=largest_change"),
}
"""By name: what differs from the settings of the demo and COMMON."""


def row_steps(config: GrpoConfig) -> float:
    """Row-steps of one step of training."""
    passes = 3 * config.inner_epochs + (1 if config.beta > 0 else 0)
    images = config.groups * (config.group_size + passes * config.timestep_fraction * config.rollouts_taken)
    return images * config.timesteps * (2 if config.guidance_scale > 0 else 1)


def settings(words: tuple[str, ...], budget: float) -> list[str]:
    """The words of a run of `budget` row-steps."""
    steps = max(POINTS, round(budget / row_steps(with_overrides(SETTINGS, [*COMMON, *words]))))
    return [
        *COMMON,
        *words,
        f"steps={steps}",
        f"held_out.every={max(1, steps // POINTS)}",
        "checkpoint_every=0",
        "sample_every=0",
    ]


def run(
    work: Path,
    into: Path,
    seeds: Iterable[int],
    budget: float,
    world: Path | None = None,
    only: Collection[str] = (),
    prompts: tuple[int, int] = PROMPTS,
) -> None:
    """WORK/NAME/SEED.json of every arm and seed that neither INTO/reinforce-study.json nor WORK holds; all arms with
    one seed before any with the next. prompts: how many train, how many are held out."""
    there = {(one["arm"], one["seed"]) for one in kept(work, into) if one["budget"] == budget}
    for seed in seeds:
        for name, words in ARMS.items():
            if (name, seed) in there or (only and name not in only):
                continue
            chosen = settings(words, budget)
            train, held_out = prompts
            out = work / _file_name(name) / f"run{seed}"
            found = run_prompt_demo(
                out, seed=seed, words=chosen, world=world, prompts=train, held_out=held_out, places=False
            )
            config, folder = with_overrides(SETTINGS, chosen), found.result.folder
            lines = read_json_lines(folder / "held_out.jsonl")
            seconds = sum(line["seconds"] for line in read_json_lines(folder / "metrics.jsonl"))
            write_json(
                work / _file_name(name) / f"{seed}.json",
                {
                    "arm": name,
                    "seed": seed,
                    "budget": budget,
                    "words": chosen,
                    "row_steps": row_steps(config),
                    "seconds": round(seconds, 1),
                    "curve": [{"step": line["step"], "wholly_right": line["means"]["wholly_right"]} for line in lines],
                },
            )
            print(f"{name} seed {seed}: {found.sentence}", flush=True)


def kept(work: Path, into: Path) -> list[dict]:
    """The runs of INTO/reinforce-study.json and of WORK, the latter where both have one."""
    file = into / KEPT
    runs = [*(read_json(file) if file.exists() else []), *map(read_json, sorted(work.glob("*/[0-9]*.json")))]
    found = {(one["arm"], one["seed"], one["budget"]): one for one in runs if one["arm"] in ARMS}
    return sorted(found.values(), key=lambda one: (list(ARMS).index(one["arm"]), one["seed"], one["budget"]))


def _file_name(arm: str) -> str:
    return "".join(sign if sign.isalnum() else "_" for sign in arm)


def page(work: Path, into: Path, budget: float) -> None:
    """INTO/reinforce-study.json with what WORK holds as well; the table and the figure of the runs with `budget`."""
    everything = kept(work, into)
    write_json(into / KEPT, everything)
    found = [one for one in everything if one["budget"] == budget]
    if not found:
        raise SystemExit(f"no run has a budget of {budget:g} row-steps: make some with `run`")
    write_text_atomic((into / KEPT).with_suffix(".md"), markdown(found))
    figure(found, into / "images" / "reinforce_study.png")


def gain(run: dict) -> float:
    """How far the held-out share lies above its beginning, on average over the second half of the compute: the last
    measurement alone goes up and down by as much as arms differ."""
    steps = [point["step"] for point in run["curve"]]
    shares = [point["wholly_right"] for point in run["curve"]]
    second_half = np.linspace(steps[-1] / 2, steps[-1], 101)
    return float(np.interp(second_half, steps, shares).mean()) - shares[0]


@dataclass(frozen=True)
class Arm:
    """What the runs of one arm come to."""

    name: str
    start: float
    gains: tuple[float, ...]
    """One a seed."""
    seconds: float
    """Of the fastest run."""
    against: float = 0.0
    """Mean gain minus that of the first arm, `low` to `high` its 95 % interval."""
    low: float = 0.0
    high: float = 0.0

    @property
    def gain(self) -> float:
        return statistics.mean(self.gains)


def arms(found: list[dict]) -> list[Arm]:
    """The arms that have runs, the first one first; intervals are Dunnett's: every arm against the first, with a spread
    over seeds that is common to all, and 5 % for all comparisons together. Of the first arm they are 0."""
    from scipy import stats

    made = []
    for name in ARMS:
        runs = [one for one in found if one["arm"] == name]
        if runs:
            start = statistics.mean(one["curve"][0]["wholly_right"] for one in runs)
            made.append(Arm(name, start, tuple(map(gain, runs)), min(one["seconds"] for one in runs)))
    first, *others = made
    if not others or all(len(arm.gains) < 2 for arm in made):
        return made
    tested = stats.dunnett(*(arm.gains for arm in others), control=first.gains, rng=np.random.default_rng(0))
    limits = tested.confidence_interval()
    return [
        first,
        *(
            replace(arm, against=arm.gain - first.gain, low=float(low), high=float(high))
            for arm, low, high in zip(others, limits.low, limits.high, strict=True)
        ),
    ]


def sentences(made: list[Arm]) -> list[str]:
    """What the intervals say, arm by arm where they leave out zero."""
    first, *others = made
    groups = {
        f"Clearly more than “{first.name}” gained": [arm for arm in others if arm.low > 0],
        "Clearly less": [arm for arm in others if arm.high < 0],
    }
    lines = [
        f"- {start}: " + (", ".join(f"{arm.name} ({arm.against:+.3f})" for arm in those) or "none") + "."
        for start, those in groups.items()
    ]
    return [*lines, "- The others could not be told apart from it."]


def markdown(found: list[dict]) -> str:
    """The page: what the arms gained, and against the first one."""
    made = arms(found)
    seeds = sorted({one["seed"] for one in found})
    budget = found[0]["budget"]
    lines = [
        "# What makes reinforcement learn",
        "",
        f"Arms differ from the settings of `pyunictokens demo --prompts {' '.join(COMMON)}` in what",
        f"their name says. All have the same number of row-steps ({budget:,.0f}: as many as",
        f"{round(budget / row_steps(with_overrides(SETTINGS, COMMON)))} steps of it), and the objects alone as their",
        "reward, without the place ([toyworld.md](toyworld.md) says what that changes). What is shown is the share of",
        f"{PROMPTS[1]} held-out prompts, two images each, that the reader finds wholly right; no reward asks it.",
        "Held-out prompts and the noise that draws them are always the same; seeds change the training prompts and all",
        "other noise.",
        "",
        "![Held-out prompts drawn wholly right, along the row-steps](images/reinforce_study.png)",
        "",
        *sentences(made),
        "",
        "`mask_grpo` with one inner epoch is “unictask, newly unmasked codes” by another way: the ratio is 1, so both",
        "have gradients of one direction, and Adam takes no notice of their length.",
        "",
        "`make reinforce` has taken 2 prompts × 24, 8 of them, since: the arms with groups of 24 are the first three,",
        "and of these it takes the most steps with the same compute.",
        "",
        "Gain: the held-out share over the second half of the compute, above the start. Intervals are Dunnett's, every",
        "arm against the first, 5 % for all together. Seconds: of the fastest run, one thread. Empty: not run.",
        "",
        "| arm | start | gain | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | against the first arm | seconds |",
        "|---|---|---|" + "---|" * len(seeds) + "---|---|",
    ]
    for arm in sorted(made, key=lambda arm: -arm.gain):
        by_seed = {one["seed"]: gain(one) for one in found if one["arm"] == arm.name}
        each = " | ".join(f"{by_seed[seed]:+.3f}" if seed in by_seed else "" for seed in seeds)
        against = f"{arm.against:+.3f}&nbsp;[{arm.low:+.3f},&nbsp;{arm.high:+.3f}]" if arm is not made[0] else ""
        lines.append(f"| {arm.name} | {arm.start:.3f} | {arm.gain:+.3f} | {each} | {against} | {arm.seconds:.0f} |")
    lines += [
        "",
        "Written by `python -m experiments.reinforce_study page` from [reinforce-study.json](reinforce-study.json).",
    ]
    return "\n".join(lines) + "\n"


def figure(found: list[dict], file: Path) -> None:
    """Curves, mean over seeds, along the share of the compute; the first arm in every panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    base, colours = next(iter(ARMS)), ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    chart, panels = plt.subplots(2, 3, figsize=(10, 6.4), sharex=True, sharey=True, constrained_layout=True)
    for panel, (title, names) in zip(panels.flat, GROUPS.items(), strict=True):
        for name, colour in zip((base, *names), ("#222222", *colours), strict=False):
            runs = [one for one in found if one["arm"] == name]
            if not runs:
                continue
            values = [[point["wholly_right"] for point in one["curve"]] for one in runs]
            shortest = min(map(len, values))
            means = [statistics.mean(each[k] for each in values) for k in range(shortest)]
            shares = [100 * point["step"] / runs[0]["curve"][-1]["step"] for point in runs[0]["curve"][:shortest]]
            panel.plot(shares, means, color=colour, label=name.replace("`", ""), lw=2.4 if name == base else 1.6)
        panel.set_title(title, fontsize=11)
        panel.legend(fontsize=8, frameon=False, loc="upper left")
        panel.grid(alpha=0.25)
    highest = max(point["wholly_right"] for one in found for point in one["curve"])
    panels[0, 0].set_ylim(top=highest + 0.06)  # the legends stand above the curves
    for panel in panels[:, 0]:
        panel.set_ylabel("wholly right, held out")
    for panel in panels[1]:
        panel.set_xlabel("compute spent, %")
    file.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(file, dpi=110)
    plt.close(chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=28_800, help="row-steps of a run")
    parser.add_argument("--world", type=Path, help="a folder of the composed world's weights")
    parser.add_argument("--only", action="append", default=[], help="an arm by its name; again for several")
    parser.add_argument("--into", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if args.what == "run":
        run(args.work, args.into, args.seeds, args.budget, args.world, args.only)
    else:
        page(args.work, args.into, args.budget)


if __name__ == "__main__":
    main()
