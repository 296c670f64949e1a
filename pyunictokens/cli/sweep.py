"""`pyunictokens train --concepts …`: a job a concept, on this machine or on a Ray cluster, then a table and a page.

It turns the options of `train` into the arguments of its jobs; how jobs run is the business of runs/sweep.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import UserError
from ..utils.signals import stop_on_signals
from .shell import Bars, console, plain_table, say

if TYPE_CHECKING:
    from ..runs.sweep import Job
    from ..runs.sweep_results import Row


def train_sweep(
    root: Path | None,
    concepts: str,
    out: Path | None,
    arguments: list[str],
    words: Iterable[str],
    *,
    workers: int,
    retries: int,
    shard: str | None,
    ray: str | None,
    grpo: bool,
    evaluate: bool,
    device: str,
) -> None:
    """Plan the jobs, run those that are not done, write results.csv, results.json and report.html."""
    from ..data.folder import list_concepts
    from ..runs.sweep import JOBS, choose, finished, plan, run_local
    from ..runs.sweep_results import collect, write_results
    from ..utils.files import safe_name

    if root is None or out is None:
        raise UserError("--concepts needs the data folder and --out, the folder of all runs")
    present = list_concepts(root)
    names = [safe_name(name) for name in choose(present, concepts, shard)]
    told = [str(root.absolute()), "{name}", *words, *arguments]
    jobs = plan(out, names, told, grpo=grpo, evaluate=evaluate, retries=retries)
    open_jobs = [job for job in jobs if not (finished(job) and _done(job))]
    with Bars() as bars, stop_on_signals(bars.say) as stop:
        bars("concepts", len(jobs) - len(open_jobs), len(jobs))
        if ray is not None:
            from ..runs.ray_jobs import run_on_ray

            statuses = run_on_ray(open_jobs, ray, workers=workers, stop=stop)
        else:
            statuses = run_local(open_jobs, workers, gpus=_gpus(device), stop=stop)
        for number, status in enumerate(statuses, start=len(jobs) - len(open_jobs) + 1):
            bars("concepts", number, len(jobs), {"note": f"{status.name} {status.state}"})
            if status.state != "done":
                bars.say(f"{status.name}: {status.state}: {status.message}")
    everyone = sorted({*names, *(path.stem for path in (out / JOBS).glob("*.json"))} & set(present), key=present.index)
    rows = collect(out, everyone)
    page = write_results(out, rows)
    _show(rows)
    say(f"{page}; the numbers: {out / 'results.csv'}, {out / 'results.json'}")
    failed = [row.status.name for row in rows if row.status.state == "failed" and row.status.name in names]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} jobs failed ({', '.join(failed[:5])}): see {out / JOBS}/NAME.log; the "
            "same command takes them up again"
        )


def _done(job: Job) -> bool:
    from ..runs.sweep import Status

    return Status.read(job.runs, job.name).state == "done"


def _gpus(device: str) -> int:
    """How many GPUs jobs can take in turn; none where a device is named."""
    if device != "auto":
        return 0
    import torch

    return torch.cuda.device_count()


def _show(rows: list[Row]) -> None:
    from collections import Counter

    from ..runs.sweep_results import summary

    numbers = ("before", "after", "change [95 %]")
    table = plain_table("", *numbers, right=numbers)
    for _, title, before, after, change in summary(rows):
        span = f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        table.add_row(title, f"{before.mean:.3f}", f"{after.mean:.3f}", span)
    counts = Counter(row.status.state for row in rows)
    say(", ".join(f"{number} {state}" for state, number in sorted(counts.items())))
    console().print(table)
