"""The tables of docs/toyworld.md on the composed world, and docs/reinforce.json with its images.

    python -m experiments.reinforce_page "make reinforce"=reinforce "… --seed 1"=reinforce1

Each run is a folder as `pyunictokens demo --prompts` leaves it. The curves and pictures of the first two are shown, and
the policy of the first is measured once more beside the shipped model, in four and in twelve timesteps. How well the
shipped model draws comes from assets/composed/report.json (experiments/build_composed.py). Runs of other commands that
docs/reinforce.json holds already stay in it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from pyunictokens.data.prompts import read_prompts
from pyunictokens.rewards.ensemble import Ensemble
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.runs.prompt_demo import CURVE, HELD_OUT, PICTURES, RUN, SETTINGS
from pyunictokens.toy.composed.model import Places, load_composed, wholly_right
from pyunictokens.toy.composed.prompts import place_in
from pyunictokens.train import load_policy
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.train.held_out import HeldOut, Measurement, difference
from pyunictokens.train.tasks import PromptTasks
from pyunictokens.utils.devices import multiplies_bfloat16
from pyunictokens.utils.files import read_json, read_json_lines, write_text_atomic

DOCS = Path(__file__).resolve().parent.parent / "docs"
REPORT = DOCS.parent / "pyunictokens" / "assets" / "composed" / "report.json"
BY = "wholly_right"
TIMESTEPS, WHEN = (4, 12), ("before", "after")


def measured(command: str, folder: Path) -> dict[str, object]:
    """What docs/reinforce.json says of a run."""
    found = [Measurement.read(line) for line in read_json_lines(folder / RUN / "held_out.jsonl")]
    seconds = sum(line["seconds"] for line in read_json_lines(folder / RUN / "metrics.jsonl"))
    gain, error = difference(found[-1], found[0], BY)
    curve = [{"step": each.step, **{key: round(value, 4) for key, value in each.means().items()}} for each in found]
    low, high = round(gain - 1.96 * error, 4), round(gain + 1.96 * error, 4)
    prompts = len(found[0].values[BY])
    numbers = {"prompts": prompts, "seconds": round(seconds), "gain": round(gain, 4), "low": low, "high": high}
    of_kind: dict[str, list[int]] = {}
    for place, line in enumerate(read_json_lines(folder / HELD_OUT)):
        of_kind.setdefault(str(line["kind"]), []).append(place)
    kinds = {
        kind: [round(sum(each.values[BY][at] for at in places) / len(places), 4) for each in (found[0], found[-1])]
        for kind, places in sorted(of_kind.items())
    }
    return {"command": command, **numbers, "kinds": kinds, "curve": curve}


def by_timesteps(folder: Path) -> dict[str, dict[str, float]]:
    """How the model before and after a run draws its held-out prompts in four and in twelve timesteps, with the noise
    of the run's own measurements."""
    reader = Ensemble({BY: wholly_right()}, {BY: 1.0})
    bundle = load_composed(dtype=torch.bfloat16 if multiplies_bfloat16() else None)
    tasks = PromptTasks(read_prompts(folder / HELD_OUT), seed=0)

    def draw(timesteps: int) -> Measurement:
        engine, config = RolloutEngine.of(bundle), replace(SETTINGS, timesteps=timesteps)
        return HeldOut(tasks).measure(0, engine, reader, config, Ranks())

    before = {steps: draw(steps) for steps in TIMESTEPS}
    load_policy(bundle.model, folder / RUN / "final")
    after = {steps: draw(steps) for steps in TIMESTEPS}
    few, many = TIMESTEPS
    gain, error = difference(after[few], before[many], BY)
    low, high = round(gain - 1.96 * error, 4), round(gain + 1.96 * error, 4)
    return {
        "before": {str(steps): round(each.mean(BY), 4) for steps, each in before.items()},
        "after": {str(steps): round(each.mean(BY), 4) for steps, each in after.items()},
        "few after against many before": {"gain": round(gain, 4), "low": low, "high": high},
    }


def named_places(folder: Path) -> list[float]:
    """The share of held-out images that show the place their prompt names, before and after a run, with the noise of
    its own measurements."""
    bundle, prompts = load_composed(), read_prompts(folder / HELD_OUT)
    tasks = PromptTasks([replace(each, columns={"place": place_in(each.text)}) for each in prompts], seed=0)
    named = [number for number, each in enumerate(prompts) if place_in(each.text)]

    def share() -> float:
        engine, reader = RolloutEngine.of(bundle), Ensemble({"place": Places()}, {"place": 1.0})
        found = HeldOut(tasks).measure(0, engine, reader, SETTINGS, Ranks()).values["place"]
        return round(sum(found[number] for number in named) / len(named), 4)

    before = share()
    load_policy(bundle.model, folder / RUN / "final")
    return [before, share()]


def table(runs: list[dict[str, object]]) -> list[str]:
    """The lines of the page's table."""
    lines = [
        "| run | steps | minutes of training | wholly right before | after | gain, 95 % interval over prompts "
        "| place as named |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        curve = run["curve"]
        assert isinstance(curve, list)
        first, last = curve[0], curve[-1]
        places = run.get("places")
        place = f"{places[0]:.2f} → {places[1]:.2f}" if isinstance(places, list) else ""
        lines.append(
            f"| `{run['command']}` | {last['step']} | {float(str(run['seconds'])) / 60:.1f} | {first[BY]:.3f} "
            f"| {last[BY]:.3f} | {run['gain']:+.2f} [{run['low']:+.2f}, {run['high']:+.2f}] "
            f"| {place} |"
        )
    return lines


def by_kind(runs: list[dict[str, object]]) -> list[str]:
    """The lines of the page's table of kinds of prompts: before, and after each run that says it."""
    told = [(run["command"], run["kinds"]) for run in runs if isinstance(run.get("kinds"), dict)]
    first = told[0][1]
    assert isinstance(first, dict)
    rows = [("before", {kind: values[0] for kind, values in first.items()})]
    for command, kinds in told:
        assert isinstance(kinds, dict)
        rows.append((f"`{command}`", {kind: values[1] for kind, values in kinds.items()}))
    lines = [f"| wholly right | {' | '.join(first)} |", "|---|" + "---|" * len(first)]
    return lines + [f"| {name} | {' | '.join(f'{values[kind]:.2f}' for kind in first)} |" for name, values in rows]


def timesteps_table(found: dict[str, dict[str, float]]) -> list[str]:
    """The lines of the page's table of timesteps."""
    few, many = TIMESTEPS
    told = found["few after against many before"]
    return [
        f"| wholly right | in {few} timesteps | in {many} |",
        "|---|---|---|",
        *(f"| {when} reinforcement | {found[when][str(few)]:.3f} | {found[when][str(many)]:.3f} |" for when in WHEN),
        "",
        f"{few} timesteps after against {many} before: {told['gain']:+.2f} [{told['low']:+.2f}, {told['high']:+.2f}].",
    ]


def drawn(report: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """The lines of the table of what the shipped model draws."""
    ways = [name for name in report if name != "spotters"]
    lines = [
        "| prompts | " + " | ".join(f"{way}: at once | one of nine" for way in ways) + " |",
        "|---|" + "---|---|" * len(ways),
    ]
    for kind in report[ways[0]]:
        cells = [f"{report[way][kind][key]:.2f}" for way in ways for key in ("once", "one of 9")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    true = report["spotters"]["reader"]
    said = f"The reader finds {true['drawn']:.2f} of true drawings wholly right"
    return [*lines, "", f"{said}, {true['reconstructed']:.2f} of the same after the image tokenizer."]


def put(text: str, name: str, lines: list[str]) -> str:
    """`text` with `lines` between its marks of `name`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="COMMAND=FOLDER")
    pairs = [word.rpartition("=")[::2] for word in parser.parse_args().runs]
    runs = [{**measured(command, Path(folder)), "places": named_places(Path(folder))} for command, folder in pairs]
    file = DOCS / "reinforce.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))
    runs += [each for each in earlier if each["command"] not in {run["command"] for run in runs}]
    runs[0]["timesteps"] = found = by_timesteps(Path(pairs[0][1]))
    write_text_atomic(file, "[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    for (_, folder), shown in zip(pairs, ("reinforce", "reinforce_long"), strict=False):
        shutil.copyfile(Path(folder) / CURVE, DOCS / "images" / f"{shown}_curve.png")
        shutil.copyfile(Path(folder) / PICTURES, DOCS / "images" / f"{shown}_before_after.png")
    page = DOCS / "toyworld.md"
    text = page.read_text(encoding="utf-8")
    for name, lines in (
        ("reinforce", table(runs)),
        ("composed", drawn(read_json(REPORT))),
        ("timesteps", timesteps_table(found)),
        ("kinds", by_kind(runs[:3])),
    ):
        text = put(text, name, lines)
    write_text_atomic(page, text)


if __name__ == "__main__":
    main()
