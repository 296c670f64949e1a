"""What makes reinforcement learn: arms that differ in one choice, at equal compute, over seeds, on held-out prompts.

    python -m experiments.reinforce_study run --work study --seeds 3 --budget 60000      # goes on where it stopped
    python -m experiments.reinforce_study page --work study                              # the table

Compute is counted in row-steps: images × timesteps of a rollout, twice with guidance, and three times as much again for
each optimizer step's forward and backward pass over the timesteps it looks at. Every arm gets the same number of them,
so an arm that is dearer a step gets fewer steps. All are measured on the same prompts with the same noise, in the same
place on the axis; what counts is the reader's `wholly_right`, which no reward sees.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from pyunictokens.config.settings import with_overrides
from pyunictokens.config.training import GrpoConfig
from pyunictokens.runs.prompt_demo import SETTINGS, run_prompt_demo
from pyunictokens.utils.files import read_json, read_json_lines, write_json, write_text_atomic

ROOT = Path(__file__).resolve().parent.parent
POINTS = 8
"""Measurements of a run."""

ARMS: dict[str, tuple[str, ...]] = {
    "as in `make reinforce`": (),
    "advantage without its spread": ("advantage=mean",),
    "advantage=leave_one_out": ("advantage=leave_one_out",),
    "objective=unictask, newly unmasked codes": ("objective=unictask", "token_scope=newly_unmasked"),
    "objective=unictask, masked codes": ("objective=unictask", "token_scope=masked"),
    "objective=unictask, all codes": ("objective=unictask", "token_scope=all"),
    "objective=mask_grpo": ("objective=mask_grpo",),
    "objective=gspo": ("objective=gspo", "clip_low=3e-4", "clip_high=4e-4"),
    "timestep_choice=largest_change, half": ("timestep_choice=largest_change", "timestep_fraction=0.5"),
    "random timesteps, half": ("timestep_fraction=0.5",),
    "2 epochs": ("inner_epochs=2",),
    "4 epochs": ("inner_epochs=4",),
    "2 prompts × 24": ("groups=2", "group_size=24"),
    "12 prompts × 4": ("groups=12", "group_size=4"),
    "lr 5e-5": ("lr=5e-5",),
    "lr 1e-4": ("lr=1e-4",),
    "lr 2e-4": ("lr=2e-4",),
    "lr 6e-4": ("lr=6e-4",),
    "beta 0.01": ("beta=0.01",),
    "guidance 3": ("guidance_scale=3",),
    "8 timesteps": ("timesteps=8",),
    "12 timesteps": ("timesteps=12",),
    "adapters, lr 1e-3": ("trainable=lora", "lr=1e-3"),
}
"""By name: what differs from the settings of the demo."""


def row_steps(config: GrpoConfig) -> float:
    """Row-steps of one step of training."""
    rows = config.groups * config.group_size * config.timesteps * (2 if config.guidance_scale > 0 else 1)
    looked = config.timestep_fraction * (3 * config.inner_epochs + (1 if config.beta > 0 else 0))
    return rows * (1 + looked)


def settings(words: tuple[str, ...], budget: float) -> list[str]:
    """The words of a run of `budget` row-steps."""
    steps = max(POINTS, round(budget / row_steps(with_overrides(SETTINGS, words))))
    return [
        *words,
        f"steps={steps}",
        f"held_out.every={max(1, steps // POINTS)}",
        "checkpoint_every=0",
        "sample_every=0",
    ]


def run(work: Path, seeds: int, budget: float, world: Path | None, only: list[str]) -> None:
    """WORK/NAME/SEED.json of every arm and seed that is not there yet."""
    for seed in range(seeds):
        for name, words in ARMS.items():
            file = work / _file_name(name) / f"{seed}.json"
            if file.exists() or (only and name not in only):
                continue
            chosen = settings(words, budget)
            found = run_prompt_demo(work / _file_name(name) / f"run{seed}", seed=seed, words=chosen, world=world)
            config, folder = with_overrides(SETTINGS, chosen), found.result.folder
            lines = read_json_lines(folder / "held_out.jsonl")
            seconds = sum(line["seconds"] for line in read_json_lines(folder / "metrics.jsonl"))
            write_json(
                file,
                {
                    "arm": name,
                    "seed": seed,
                    "words": chosen,
                    "row_steps": row_steps(config),
                    "seconds": seconds,
                    "curve": [{"step": line["step"], **line["means"]} for line in lines],
                },
            )
            print(f"{name} seed {seed}: {found.sentence}", flush=True)


def _file_name(arm: str) -> str:
    return "".join(sign if sign.isalnum() else "_" for sign in arm)


def page(work: Path, into: Path) -> None:
    """INTO/reinforce-study.json and the table beside it, from what WORK holds."""
    found = [read_json(file) for file in sorted(work.glob("*/*.json"))]
    write_json(into / "reinforce-study.json", found)
    write_text_atomic((into / "reinforce-study").with_suffix(".md"), markdown(found))


def markdown(found: list[dict]) -> str:
    """The table: gain of `wholly_right` over the beginning, mean and interval over seeds."""
    rows = []
    for name in dict.fromkeys(ARMS):
        runs = [one for one in found if one["arm"] == name]
        if runs:
            gains = [one["curve"][-1]["wholly_right"] - one["curve"][0]["wholly_right"] for one in runs]
            best = [max(point["wholly_right"] for point in one["curve"]) for one in runs]
            first = statistics.mean(one["curve"][0]["wholly_right"] for one in runs)
            seconds = statistics.mean(one["seconds"] for one in runs)
            spread = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            rows.append((statistics.mean(gains), spread, first, statistics.mean(best), len(runs), seconds, name))
    lines = [
        "# What makes reinforcement learn",
        "",
        "Arms differ from the settings of `make reinforce` in what their name says and have the same number of",
        "row-steps.",
        "Share of held-out prompts that the reader finds wholly right; the interval is over seeds.",
        "Written by `python -m experiments.reinforce_study page` from reinforce-study.json.",
        "",
        "| arm | gain | ± | before | best on the way | seeds | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for gain, spread, first, top, seeds, seconds, name in sorted(rows, reverse=True):
        lines.append(f"| {name} | {gain:+.3f} | {spread:.3f} | {first:.3f} | {top:.3f} | {seeds} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60_000, help="row-steps of a run")
    parser.add_argument("--world", type=Path, help="a folder of the composed world's weights")
    parser.add_argument("--only", action="append", default=[], help="an arm by its name; again for several")
    parser.add_argument("--into", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if args.what == "run":
        run(args.work, args.seeds, args.budget, args.world, args.only)
    else:
        page(args.work, args.into)


if __name__ == "__main__":
    main()
