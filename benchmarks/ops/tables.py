"""Reports as Markdown: a summary for docs/numbers.md, everything for docs/benchmarks.md. Reads JSON only, never torch.

What was not measured says so; a missing number names its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .goals import GOALS, default_side
from .schema import CaseInfo, Machine, Report

NO_OFFER = "offers no such operation"
DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}


def load(folder: Path) -> list[Report]:
    """The reports of a results folder, by file name; smoke runs lie elsewhere and are refused."""
    reports = [Report.load(file) for file in sorted(folder.glob("ops-*.json"))]
    for report in reports:
        if report.machine.smoke:
            raise ValueError(f"{report.machine.name}: a smoke run's numbers mean nothing; delete its file")
    return reports


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(head), "|" + "---|" * len(head), *(_row(row) for row in rows)])


def where(machine: Machine) -> str:
    """The machine in words."""
    if machine.device == "cuda":
        return machine.name
    return f"{machine.name}, {machine.cores} cores, {machine.threads} threads"


def _phase(info: CaseInfo) -> str:
    return "forward" if info.operation == "maskgit_step" else "both"


def _times(report: Report, info: CaseInfo, peer: str) -> str:
    """How many times ours the peer takes, or why that is not known."""
    side = default_side(report, info.operation, info.shape)
    theirs = report.seconds(info.operation, info.shape, peer, _phase(info))
    if theirs is None:
        return report.reason(info.operation, info.shape, peer) or "not measured"
    ours = report.seconds(info.operation, info.shape, side, _phase(info)) if side else None
    return "measured alone" if ours is None else f"{theirs / ours:.2f}"


def _mib(report: Report, info: CaseInfo, peer: str | None) -> str:
    held = report.extra(info.operation, info.shape, peer) if peer else None
    if held is None:
        return (report.reason(info.operation, info.shape, peer, "memory") if peer else None) or "not measured"
    return f"{held.extra_bytes / 2**20:.{1 if held.extra_bytes < 100 << 20 else 0}f}"


def _absolute(info: CaseInfo, phase: str, seconds: float) -> str:
    """A time in ms and, where the case has a floor, the rate that it makes."""
    text = f"{seconds * 1e3:.3g} ms"
    if info.bound == "matrix" and info.flops.get(phase):
        rate = info.flops[phase] / seconds
        return text + (f", {rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f", {rate / 1e9:.3g} GFLOP/s")
    if info.bound == "copy" and info.bytes.get(phase):
        return text + f", {info.bytes[phase] / seconds / 1e9:.3g} GB/s"
    return text


def _share(report: Report, info: CaseInfo, peer: str | None, phase: str) -> str:
    found = report.measurement(info.operation, info.shape, peer, phase) if peer else None
    return "" if found is None or found.fraction is None else f"{found.fraction:.0%}"


def _ours(report: Report, info: CaseInfo, side: str | None) -> str:
    """Our own time and rate, and the share of the ceiling."""
    seconds = report.seconds(info.operation, info.shape, side, _phase(info)) if side else None
    if seconds is None:
        return "not measured"
    share = _share(report, info, side, _phase(info))
    return _absolute(info, _phase(info), seconds) + (f" ({share})" if share else "")


def _cases(report: Report, operation: str) -> list[CaseInfo]:
    return [info for info in report.cases if info.operation == operation]


def _operations(report: Report) -> list[str]:
    return list(dict.fromkeys(info.operation for info in report.cases))


def summary_of(report: Report) -> str:
    """One table for each operation: how many times ours each peer takes."""
    parts = []
    for operation in _operations(report):
        infos = _cases(report, operation)
        others = [
            name
            for name in report.peers
            if not name.startswith("ours-") and any(_times(report, info, name) != NO_OFFER for info in infos)
        ]
        rows = []
        for info in infos:
            side = default_side(report, operation, info.shape)
            memory = (
                f"{_mib(report, info, side)} / {_mib(report, info, 'eager')}" if operation != "maskgit_step" else ""
            )
            rows.append(
                [info.shape, *(_times(report, info, name) for name in others)]
                + ([memory] if operation != "maskgit_step" else [])
                + [_ours(report, info, side)]
            )
        head = ["shape", *(report.peers[name] for name in others)]
        head += ["extra MiB, ours / plain"] if operation != "maskgit_step" else []
        head.append("ours (of the matrix rate)" if infos[0].bound == "matrix" else "ours (of copy bandwidth)")
        parts.append(f"`{operation}` ({infos[0].dtype}):\n\n{_table(head, rows)}")
    return "\n\n".join(parts)


def summary(folder: Path) -> str:
    """The part of docs/numbers.md: every report, and a sentence for each kind of device that has none."""
    reports = load(folder)
    parts = []
    for report in reports:
        parts.append(
            f"The operations on {where(report.machine)} (torch {report.versions['torch']}, {report.date[:10]}): how "
            "many times as long as this library an alternative takes, forward and backward (`maskgit_step`: forward). "
            "Below 1 the alternative is faster. Every phase, quartiles and versions: "
            "[benchmarks.md](benchmarks.md)."
        )
        parts.append(summary_of(report))
    for device, name in DEVICES.items():
        if not any(report.machine.device == device for report in reports):
            command = "`bash benchmarks/gpu.sh --first`" if device == "cuda" else "`pyunictokens bench ops`"
            parts.append(f"The operations on {name}: not measured; {command} measures them.")
    return "\n\n".join(parts)


def goals(reports: list[Report]) -> str:
    """Every goal with what was measured, one column of the first report of its kind of device."""
    rows = []
    for goal in GOALS:
        report = next((r for r in reports if r.machine.device == goal.device), None)
        answer = goal.answer(report) if report is not None else None
        measured, held = ("not measured", "") if answer is None else (answer[0], "yes" if answer[1] else "**no**")
        rows.append([DEVICES[goal.device], goal.text, measured, held])
    return _table(["on", "goal", "measured", "holds"], rows)


def _side_rows(report: Report, info: CaseInfo) -> list[list[str]]:
    side = default_side(report, info.operation, info.shape)
    rows = []
    for peer, title in report.peers.items():
        reason = report.reason(info.operation, info.shape, peer)
        if reason == NO_OFFER:
            continue
        cells = []
        for phase in ("forward",) if info.operation == "maskgit_step" else ("forward", "backward", "both"):
            found = report.measurement(info.operation, info.shape, peer, phase)
            ours = report.seconds(info.operation, info.shape, side, phase) if side else None
            if found is None or ours is None:
                cells.append(reason or "not measured")
                continue
            text = f"{found.seconds / ours:.2f} ({found.low / ours:.2f} to {found.high / ours:.2f})"
            text += f", {_absolute(info, phase, found.seconds)}"
            cells.append(text + (f", {found.fraction:.0%}" if found.fraction is not None else ""))
        if reason:
            cells = [reason, *[""] * (len(cells) - 1)]
        if report.machine.device == "cuda":
            graph = report.measurement(info.operation, info.shape, peer, "forward", "graph")
            cells.append("" if graph is None else f"{graph.seconds * 1e3:.3g} ms, {graph.fraction or 0:.0%}")
        held = report.extra(info.operation, info.shape, peer)
        resident = "" if held is None or held.resident_bytes is None else f" ({held.resident_bytes / 2**20:.1f})"
        cells.append("" if reason else _mib(report, info, peer) + resident)
        rows.append([f"**{title}**" if peer == side else title, *cells])
    return rows


def full_of(report: Report) -> str:
    """Everything about one machine."""
    rates = report.rates
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts = [
        f"### {where(report.machine)}",
        f"Taken {report.date} at {report.commit or 'an unknown commit'} by `{report.command}`. {versions}.",
    ]
    if rates is not None:
        parts.append(
            f"Ceilings in the same run: copy {rates.copy_bytes_per_second / 1e9:.3g} GB/s (read plus written), matrix "
            f"product {rates.matrix_flops_per_second / 1e12:.3g} TFLOP/s in {rates.dtype}; start and end of the run "
            f"lie {rates.drift:.0%} apart. Per cents are of the ceiling that bounds the case."
        )
    parts.append(
        "Times are multiples of the side in bold, which runs when no backend is named: median (quartiles). Extra "
        "memory in MiB is the peak of forward and backward beyond inputs, result and gradients"
        + ("." if report.machine.device == "cuda" else ": torch's allocator (growth of the resident set).")
    )
    for operation in _operations(report):
        parts.append(f"#### {operation} on {'the GPU' if report.machine.device == 'cuda' else 'the CPU'}")
        for info in _cases(report, operation):
            phases = ["forward"] if operation == "maskgit_step" else ["forward", "backward", "both"]
            graph = ["forward as a graph"] if report.machine.device == "cuda" else []
            sizes = ", ".join(f"{key} {size:g}" for key, size in info.sizes.items())
            parts.append(f"{info.shape} ({info.dtype}; {sizes}):")
            parts.append(_table(["side", *phases, *graph, "extra MiB"], _side_rows(report, info)))
    worst: dict[tuple[str, str], float] = {}
    for one in report.checks:
        key = one.operation, one.peer
        worst[key] = max(worst.get(key, 0.0), one.value, one.gradient or 0.0)
    if worst:
        parts.append("Checked against float64 before timing, worst relative distance of values and gradients:")
        rows = [[operation, report.peers.get(peer, peer), f"{far:.1e}"] for (operation, peer), far in worst.items()]
        parts.append(_table(["operation", "side", "distance"], rows))
    return "\n\n".join(parts)


def full(folder: Path, pictures: Path | None = None) -> str:
    """The part of docs/benchmarks.md that is written from results: goals, every machine, its pictures."""
    reports = load(folder)
    parts = ["### Goals", goals(reports)]
    for file, report in zip(sorted(folder.glob("ops-*.json")), reports, strict=True):
        parts.append(full_of(report))
        for picture in sorted((pictures or folder).glob(f"{file.stem}-*.png")):
            operation = picture.stem.removeprefix(f"{file.stem}-")
            shown = "time of each side"
            if operation.endswith("-roofline"):
                operation, shown = operation.removesuffix("-roofline"), "roofline"
            parts.append(f"![{operation} on {report.machine.name}: {shown}](images/{picture.name})")
    for device, name in DEVICES.items():
        if not any(report.machine.device == device for report in reports):
            parts.append(f"On {name} nothing was measured.")
    return "\n\n".join(parts)
