"""Two reports of the same machine side by side: what of ours became slower or larger.

    pyunictokens bench compare OLD.json NEW.json                     # prints every number that both have
    pyunictokens bench compare OLD.json NEW.json --fail-above 5%     # exit 1 where one of ours is more than 5 % worse

Reads reports of the operations and of the rollout engine. A time counts as worse where its median is, and where the
quartiles of both runs lie apart as well: a machine that did something else meanwhile fails nobody. Numbers of smoke
runs are refused. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine_report import EngineReport
from benchmarks.ops.schema import Report


@dataclass(frozen=True)
class Value:
    """One number: what it is, how large, and the range that it may as well have had."""

    name: str
    unit: str
    amount: float
    low: float
    high: float


def values(file: Path) -> tuple[str, list[Value]]:
    """(the machine, every number of ours) of a report.

    Raises:
        ValueError: neither kind of report, or a smoke run.
    """
    what = json.loads(file.read_text(encoding="utf-8")).get("what")
    found: list[Value] = []
    if what == "ops":
        report = Report.load(file)
        machine = report.machine
        for one in report.measurements:
            if one.peer.startswith("ours-"):
                name = f"{one.operation} {one.shape}, {one.peer.removeprefix('ours-')}, {one.phase} ({one.launch})"
                found.append(Value(name, "ms", 1e3 * one.seconds, 1e3 * one.low, 1e3 * one.high))
        for held in report.memory:
            if held.peer.startswith("ours-"):
                mib = held.extra_bytes / 2**20
                found.append(
                    Value(
                        f"{held.operation} {held.shape}, {held.peer.removeprefix('ours-')}, memory",
                        "MiB",
                        mib,
                        mib,
                        mib,
                    )
                )
    elif what == "engine":
        rolled = EngineReport.load(file)
        machine = rolled.machine
        for number in rolled.numbers:
            if "published" in number.side or "batched" in number.side:
                continue
            ms = 1e3 * number.seconds
            found.append(Value(f"{number.work}, {number.side}", "ms", ms, ms, ms))
    else:
        raise ValueError(f"{file}: what={what!r}: must be a report of bench ops or of the engine")
    if machine.smoke:
        raise ValueError(f"{file}: a smoke run: its times say nothing")
    return machine.name, found


def percent(text: str) -> float:
    """``5%`` or ``0.05`` as a share. Raises ValueError for anything else, or below 0."""
    share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if share < 0:
        raise ValueError(f"{text}: must be ≥ 0")
    return share


def compare(old: Path, new: Path, limit: float | None) -> tuple[list[str], list[str]]:
    """(lines to print, names of what is worse than `limit` allows)."""
    (where, before), (here, after) = values(old), values(new)
    lines = [] if where == here else [f"!!! two machines: {where} and {here}"]
    known, worse = {value.name: value for value in before}, []
    for value in after:
        was = known.pop(value.name, None)
        if was is None:
            continue
        change = value.amount / was.amount - 1 if was.amount else float(value.amount > 0)
        apart = value.low > was.high or value.high < was.low or value.unit == "MiB"
        sign = "" if apart else "  (within the spread of both runs)"
        if limit is not None and change > limit and apart:
            worse.append(value.name)
            sign = "  WORSE"
        lines.append(f"{change:+7.1%}  {was.amount:10.4g} → {value.amount:.4g} {value.unit}  {value.name}{sign}")
    lines += [f"    gone  {name}" for name in known]
    return lines, worse


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="pyunictokens bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--fail-above", type=percent, metavar="SHARE", help="5%% or 0.05")
    options = parser.parse_args()
    try:
        lines, worse = compare(options.old, options.new, options.fail_above)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(lines))
    if worse:
        print(f"{len(worse)} of ours are more than {options.fail_above:.0%} worse")
        sys.exit(1)


if __name__ == "__main__":
    main()
