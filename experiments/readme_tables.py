"""Write the tables of README.md, docs/numbers.md and docs/benchmarks.md from committed results, between their markers.

    python experiments/readme_tables.py            # rewrite all
    python experiments/readme_tables.py --check    # exit 1 when one of them is not what the results say

Results are benchmarks/results/*.json, docs/demo.json and docs/install.json; what a GPU needs comes from the arithmetic
of `train --plan` and says that it is predicted. One table for each machine. Ratios are quoted, with the ratios of
single rounds as their spread; absolute times are left out where no GPU was measured, because they say more about the
machine than about the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
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


def between(text: str, new: str, name: str, first: str = BEGIN, last: str = END) -> str:
    """`text` with what stands between the markers replaced by `new`."""
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"{name}: the markers {first} and {last} are missing")
    return f"{before}{first}\n\n{new}\n\n{last}{after}"


def rewritten_numbers(text: str, folder: Path) -> str:
    """The text of docs/numbers.md with its tables replaced."""
    parts = (numbers(folder), tables.summary(folder), engine_report.summary(folder))
    return between(text, "\n\n".join(parts), "docs/numbers.md")


# --- the README's own -------------------------------------------------------------------------------------------------


def headline(folder: Path) -> str:
    """The figures that the README shows: workloads against the published loop, and the update's memory."""
    parts = []
    for file in sorted(folder.glob("cpu-*.json")):
        parts.append(table(json.loads(file.read_text(encoding="utf-8"))["results"]))
    for file in sorted(folder.glob("update-memory-*.json")):
        points = json.loads(file.read_text(encoding="utf-8"))["points"]
        most = max(point["timesteps"] for point in points)
        held = {p["side"]: p["bytes"] / 2**20 for p in points if p["timesteps"] == most}
        parts.append(
            f"Peak memory of one update over T = {most} timesteps: **{held['streamed']:.0f} MiB** here, "
            f"{held['plain']:.0f} MiB where every graph is kept alive; here it does not grow with T."
        )
    return "\n\n".join(parts) or "Nothing was measured yet."


def install(sizes: dict[str, Any]) -> str:
    """What an installation takes (experiments/install_sizes.py), as a sentence."""
    gpu = sizes["gpu_libraries_bytes"] / 1e9
    text = (
        f"The wheel has {sizes['wheel_bytes'] / 1e6:.0f} MB, a shallow clone {sizes['clone_bytes'] / 1e6:.0f} MB. With "
        f"all that `cli` needs, torch {sizes['torch'].partition('+')[0]} included, "
        f"{sizes['packages_bytes'] / 1e9:.1f} GB are installed, {gpu:.1f} GB of them torch's libraries for a GPU."
    )
    if "minutes" not in sizes:
        return text
    pip, clone = (sizes["minutes"][line]["core_seconds"] / 60 for line in ("pip", "clone"))
    return text + (
        f" Once the packages are fetched, `pip install` takes {pip:.1f} minutes of one core's work, and `git clone` "
        f"with `make install`, which compiles the core and brings what the tests need, {clone:.1f}."
    )


def hardware(demo: dict[str, Any]) -> str:
    """What the toy took (docs/demo.json), and what the real Show-o is predicted to need."""
    from pyunictokens.data.folder import load_concept
    from pyunictokens.models.bundle import Sources
    from pyunictokens.runs.bundle import paper_rewards
    from pyunictokens.runs.plan import GPU_RATE, plan_run, published_gigabytes
    from pyunictokens.runs.run_dir import RunConfig
    from pyunictokens.toy.concept import write_toy_concept

    minutes = sorted(run["seconds"] / 60 for run in demo["runs"])
    peak = max(run["peak_gib"] for run in demo["runs"])
    threads = max(run["threads"] for run in demo["runs"])
    lines = [
        "| to | machine | time | download |",
        "|---|---|---|---|",
        f"| teach the toy one concept (`pyunictokens demo`) | {threads} CPU core, {peak:.1f} GiB of memory | "
        f"{minutes[0]:.0f} to {minutes[-1]:.0f} min, measured over {len(minutes)} concepts | none |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_toy_concept(Path(folder), seed=0, kind="animal", name="bo")
        concept = load_concept(folder, "bo")
        sources = Sources("showlab/show-o-512x512", "showlab/magvitv2", "microsoft/phi-1_5")
        for learns, what in (("full", "all weights, as the paper"), ("lora", "LoRA"), ("concept", "its tokens alone")):
            words = ["grpo.dtype=bfloat16", f"grpo.trainable={learns}"]
            plan = plan_run(sources, concept, RunConfig.make("paper", words=words), paper_rewards("animal"))
            assert plan.memory is not None
            lines.append(
                f"| teach the real Show-o one concept: {what} | one GPU, {plan.memory.least / 1e9:.0f} GB at least, "
                f"{plan.memory.peak / 1e9:.0f} with the preset's microbatches | {sum(plan.hours.values()):.1f} h | "
                f"{sum(map(published_gigabytes, plan.parts)):.1f} GB |"
            )
    rate = f"{GPU_RATE / 1e12:.0f} TFLOP/s of useful work in bfloat16"
    return "\n".join(lines) + f"\n\nThe GPU's numbers are predicted, at {rate}; `train --plan` says yours."


def rewritten(text: str, folder: Path, docs: Path = ROOT / "docs") -> str:
    """The README's text with its tables replaced."""
    text = between(text, headline(folder), "README.md")
    for name, make in (("install", install), ("hardware", hardware)):
        file = docs / ("demo.json" if name == "hardware" else "install.json")
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        text = between(text, make(json.loads(file.read_text(encoding="utf-8"))), "README.md", begin, end)
    return text


def rewritten_page(text: str, folder: Path) -> str:
    """The text of docs/benchmarks.md with its tables replaced."""
    parts = (tables.full(folder, ROOT / "docs" / "images"), engine_report.full(folder))
    return between(text, "\n\n".join(parts), "docs/benchmarks.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is out of date")
    options = parser.parse_args()
    stale = []
    pages = (
        (ROOT / "README.md", rewritten),
        (ROOT / "docs" / "numbers.md", rewritten_numbers),
        (ROOT / "docs" / "benchmarks.md", rewritten_page),
    )
    for file, make in pages:
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
