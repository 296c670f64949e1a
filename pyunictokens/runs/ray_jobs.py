"""Jobs of sweep.py on a Ray cluster instead of the local pool: the same function, called on other machines.

Runs, data and this package must be where every machine finds them (a shared file system).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..utils.errors import UserError, require
from ..utils.signals import Stop, never
from .sweep import Job, Status, work


def run_on_ray(
    jobs: Sequence[Job], address: str, *, workers: int, cpus: float = 1.0, stop: Stop = never
) -> Iterator[Status]:
    """Do `jobs` on the cluster at `address` (``auto``, ``ray://HOST:PORT``; ``local`` begins one here), at most
    `workers` at a time, statuses as they end. Each takes `cpus` cores, and one GPU where the cluster has any. When
    `stop` says so, no new jobs begin and those running are let go of; their statuses say `running` until next time.

    Raises MissingExtra without ray, UserError when the cluster cannot be reached.
    """
    ray = require("ray", "cluster")
    if workers < 1:
        raise UserError(f"workers={workers}: must be ≥ 1")
    try:
        ray.init(address=None if address == "local" else address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster at {address!r} ({error}): start one, or give --ray local") from error
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(work)
    waiting = iter(jobs)
    pending: dict[object, Job] = {}
    try:
        while True:
            while not stop() and len(pending) < workers and (job := next(waiting, None)) is not None:
                pending[remote.remote(job)] = job
            if not pending:
                return
            ended, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
            for future in ended:
                yield _result(ray, future, pending.pop(future))
            if stop():
                for future in pending:
                    ray.cancel(future)
                return
    finally:
        ray.shutdown()


def _result(ray: object, future: object, job: Job) -> Status:
    """The status of a job that ended; one whose machine was lost is failed, and so written."""
    try:
        return ray.get(future)  # type: ignore[attr-defined]
    except Exception as error:  # ray's errors share no base that is public
        lines = str(error).strip().split("\n")
        status = Status.read(job.runs, job.name)
        status.state, status.message = "failed", f"{type(error).__name__}: {lines[-1][-300:]}"
        status.write(job.runs)
        return status
