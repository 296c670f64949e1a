"""Pictures of the results: for each machine and operation, the time of every side as a multiple of ours.

python -m benchmarks.ops.plot                # benchmarks/results/ops-*.json → docs/images/ops-*.png
python -m benchmarks.ops.plot FILE.json --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .goals import default_side
from .schema import CaseInfo, Report

ROOT = Path(__file__).parents[2]
TICKS = [*(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9), *(1, 1.2, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100, 200)]
"""Of the logarithmic axis: closer around 1, where sides are told apart."""


def draw(report: Report, operation: str, file: Path) -> bool:
    """One picture: a group of bars for each shape, logarithmic, ours at 1. False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    infos = [info for info in report.cases if info.operation == operation]
    phase = "forward" if operation == "maskgit_step" else "both"

    def ratio(info: CaseInfo, peer: str) -> float | None:
        side = default_side(report, operation, info.shape)
        ours = report.seconds(operation, info.shape, side, phase) if side else None
        theirs = report.seconds(operation, info.shape, peer, phase)
        return None if ours is None or theirs is None else theirs / ours

    values = {peer: [ratio(info, peer) for info in infos] for peer in report.peers}
    drawn = {peer: found for peer, found in values.items() if any(value is not None for value in found)}
    if not drawn:
        return False
    figure, axis = pyplot.subplots(figsize=(max(7.0, 1.5 * len(infos) + 3), 3.6))
    width = 0.85 / len(drawn)
    for place, (peer, found) in enumerate(drawn.items()):
        at = [number + place * width for number, value in enumerate(found) if value is not None]
        axis.bar(at, [value for value in found if value is not None], width, label=report.peers[peer])
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylabel(f"time, {'forward' if phase == 'forward' else 'forward + backward'}; 1 = ours")
    axis.set_xticks([number + 0.42 for number in range(len(infos))])
    axis.set_xticklabels([info.shape.replace(" ", "\n", 1) for info in infos], fontsize=7)
    axis.set_title(f"{operation}: {report.machine.name}", fontsize=10)
    axis.yaxis.set_major_locator(FixedLocator(TICKS))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="reports (default benchmarks/results/ops-*.json)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder (default docs/images)")
    options = parser.parse_args()
    for file in options.files or sorted((ROOT / "benchmarks" / "results").glob("ops-*.json")):
        report = Report.load(file)
        for operation in dict.fromkeys(info.operation for info in report.cases):
            picture = options.out / f"{file.stem}-{operation}.png"
            if draw(report, operation, picture):
                print(picture)


if __name__ == "__main__":
    main()
