"""Pictures of the results: for each machine and operation, times as multiples of ours, and a roofline.

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
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.5), max(high, 2.0))  # a logarithmic axis has no floor: bars alike shall look alike
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


OPERATIONS_EACH = {"grpo_loss": 30.0, "maskgit_step": 8.0, "qk_norm_rotary": 60.0}
"""Roughly, of a token, of a logit, and of an entry of q and k, where a case counts no matrix products: only for the
place on a roofline."""


def roofline(report: Report, operation: str, file: Path) -> bool:
    """One picture: operations a second over operations a byte, below the two ceilings. False without anything to draw.

    A point is one shape: filled is ours, hollow the others. Its place sideways follows from its least work and least
    bytes of the case, so all sides of a shape stand above each other, and the distance to the roof is what is lost.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if report.rates is None:
        return False
    phase = "forward" if operation == "maskgit_step" else "both"
    copy, matrix = report.rates.copy_bytes_per_second, report.rates.matrix_flops_per_second
    points: dict[str, list[tuple[float, float]]] = {}
    for info in report.cases:
        if info.operation != operation or phase not in info.bytes:
            continue
        each = info.sizes["K"] if operation == "maskgit_step" else info.sizes.get("H", 1.0) * info.sizes.get("E", 1.0)
        tokens = 1.0
        for key in "BRTN":
            tokens *= info.sizes.get(key, 1.0)
        work = info.flops.get(phase) or OPERATIONS_EACH[operation] * tokens * each
        for peer, title in report.peers.items():
            seconds = report.seconds(operation, info.shape, peer, phase)
            if seconds is not None:
                points.setdefault(title, []).append((work / info.bytes[phase], work / seconds))
    if not points:
        return False
    across = [x for found in points.values() for x, _ in found]
    low, high = min(*across, matrix / copy) / 4, max(*across, matrix / copy) * 4
    figure, axis = pyplot.subplots(figsize=(7.0, 4.0))
    edges = [low, matrix / copy, high]
    axis.plot(edges, [low * copy, matrix, matrix], color="black", linewidth=1.2)
    axis.annotate(f"copy {copy / 1e9:.3g} GB/s", (low * 1.2, low * 1.2 * copy), fontsize=7, va="bottom", ha="left")
    axis.annotate(f"matrix product {matrix / 1e9:.4g} GFLOP/s", (high, matrix), fontsize=7, va="bottom", ha="right")
    for marker, (title, found) in zip("osD^vPX*<>hd", points.items(), strict=False):
        ours = title.startswith("ours")
        style = {} if ours else {"facecolors": "none"}
        colours = {} if ours else {"edgecolors": f"C{list(points).index(title)}"}
        axis.scatter(*zip(*found, strict=True), marker=marker, label=title, s=26, **style, **colours)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(min(matrix / 100, *(y / 2 for found in points.values() for _, y in found)), 2 * matrix)
    axis.set_xlabel("operations a byte (least work, least bytes)", fontsize=8)
    axis.set_ylabel("operations a second", fontsize=8)
    axis.set_title(
        f"{operation}, {'forward' if phase == 'forward' else 'forward + backward'}: {report.machine.name}", fontsize=10
    )
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
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
            roof = options.out / f"{file.stem}-{operation}-roofline.png"
            if roofline(report, operation, roof):
                print(roof)


if __name__ == "__main__":
    main()
