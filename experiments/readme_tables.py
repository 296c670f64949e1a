"""Write the tables of README.md and docs/benchmarks.md from benchmarks/results/*.json, between their markers.

    python experiments/readme_tables.py            # rewrite both
    python experiments/readme_tables.py --check    # exit 1 when one of them is not what the results say

One table for each machine. Ratios are quoted, with the ratios of single rounds as their spread; absolute times are left
out where no GPU was measured, because they say more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for benchmarks/, which is no part of the installed package

from benchmarks import engine_report  # noqa: E402
from benchmarks.ops import tables  # noqa: E402

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"

WHAT = {
    "images": "a group of {group} images, {codes} codes, guidance on, {steps} timesteps",
    "text": "{group} answers of {tokens} tokens after a context of {context}",
}
"""What each workload is, in words; its settings fill the gaps. A workload that is not here is named as it is."""


def table(results: list[dict[str, Any]]) -> str:
    """One machine's results as a Markdown table under a line that names the machine."""
    machine = results[0].get("machine", {})
    lines = [
        f"{machine.get('cpu', 'CPU')}, {machine.get('cores', '?')} cores, {machine.get('dtype', '')}, "
        f"torch {machine.get('torch', '?')}:",
        "",
        "| work | against | times faster (single rounds) |",
        "|---|---|---|",
    ]
    for result in results:
        what = WHAT.get(result["name"], result["name"]).format_map(_Gaps(result["settings"]))
        vocabulary = result["settings"].get("text_vocabulary")
        what += f", a vocabulary of {f'{vocabulary:,}'.replace(',', ' ')} text ids" if vocabulary else ""
        spread = f"{result['ratio_min']:g} to {result['ratio_max']:g}"
        lines.append(f"| {what} | {result['peer']} | **{result['ratio']:g}** ({spread}, n = {result['rounds']}) |")
    return "\n".join(lines)


def memory(result: dict[str, Any]) -> str:
    """The update's memory over the number of timesteps (benchmarks/update_memory.py), as a table."""
    points = {(point["side"], point["timesteps"]): point["bytes"] for point in result["points"]}
    steps = sorted({timesteps for _, timesteps in points})
    names = {"streamed": "this library, streamed", "plain": "published, every graph alive"}
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    lines = [
        f"Peak memory of one update in MiB, weights not counted ({result['device']}, torch {result['torch']}; "
        f"{settings}):",
        "",
        "| | " + " | ".join(f"T = {timesteps}" for timesteps in steps) + " |",
        "|---|" + "---|" * len(steps),
    ]
    for side, name in names.items():
        cells = [f"{points[side, timesteps] / 2**20:.0f}" if (side, timesteps) in points else "" for timesteps in steps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def dsog(work: dict[str, Any]) -> str:
    """What DSOG costs for an accepted image (benchmarks/rollout_cases.py), as a sentence."""
    settings = work["settings"]
    return (
        f"DSOG in groups of {settings['group']}, {settings['steps']} timesteps, preview at {settings['preview']}, one "
        f"preview in {1 / settings['pass_rate']:g} passing: **{work['row_steps_per_image']:g}** model row-steps for an "
        f"accepted image over {work['images']} images; {work['least']:g} is the least possible."
    )


def ranks(result: dict[str, Any]) -> str:
    """What a second process brings to reinforcement (benchmarks/ranks.py), as a sentence."""
    settings, rounds = result["settings"], sum(run["ranks"] == 1 for run in result["runs"])
    return (
        f"Reinforcement of the toy on two ranks, a core each, against one on one core ({settings['groups']} groups of "
        f"{settings['group_size']} a step, gloo): **{result['ratio']:.2f}** times the samples a second "
        f"({result['ratio_min']:.2f} to {result['ratio_max']:.2f}, n = {rounds}), "
        f"{100 * result['synchronisation_share']:.0f} % of the time in synchronisation."
    )


class _Gaps(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def numbers(folder: Path) -> str:
    """All tables of workloads. Without any result, the sentence that says so."""
    parts = []
    for file in sorted(folder.glob("*.json")):
        if file.name.startswith(("ops-", "engine-", "rewards-", "models-")):  # shown elsewhere
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name.startswith("ranks-"):
            parts.append(ranks(content))
        elif "points" in content:
            parts.append(memory(content))
        elif content.get("results"):
            parts.append(table(content["results"]))
        elif "dsog" not in content:
            print(f"{file.name}: neither results nor points in it, left out", file=sys.stderr)
        if "dsog" in content:
            parts.append(dsog(content["dsog"]))
    return "\n\n".join(parts) or "Nothing was measured yet."


def between(text: str, new: str, name: str) -> str:
    """`text` with what stands between the markers replaced by `new`."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{name}: the markers {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def rewritten(text: str, folder: Path) -> str:
    """The README's text with its tables replaced."""
    parts = (numbers(folder), tables.summary(folder), engine_report.summary(folder))
    return between(text, "\n\n".join(parts), "README.md")


def rewritten_page(text: str, folder: Path) -> str:
    """The text of docs/benchmarks.md with its tables replaced."""
    parts = (tables.full(folder, ROOT / "docs" / "images"), engine_report.full(folder))
    return between(text, "\n\n".join(parts), "docs/benchmarks.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is out of date")
    options = parser.parse_args()
    stale = []
    for file, make in ((ROOT / "README.md", rewritten), (ROOT / "docs" / "benchmarks.md", rewritten_page)):
        text = file.read_text(encoding="utf-8")
        new = make(text, ROOT / "benchmarks" / "results")
        if new != text:
            stale.append(file.name)
            if not options.check:
                file.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"{' and '.join(stale)}: run python experiments/readme_tables.py")


if __name__ == "__main__":
    main()
