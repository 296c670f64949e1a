"""Many concepts: one job a concept, each a `pyunictokens train` in a process of its own, planned for thousands.

    RUNS/NAME/            the concept's run, as `train` alone would leave it
    RUNS/.jobs/NAME.json  how its job stands: waiting, running, done, failed, stopped, elsewhere
    RUNS/.jobs/NAME.log   what the job said
    RUNS/.jobs/plan.yaml  what was asked for; asking for something else in the same folder is refused

There is no other state: every job writes its own files alone, so any number of processes or machines can share a
folder, and whatever is done is not done again. What `train` does is its own business, tables and the page are
sweep_results.py's, a Ray cluster is ray_jobs.py's.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import read_json, write_json
from ..utils.signals import ENDS_WITH_STDIN, Stop, never
from ..utils.text import read_text
from .run_dir import CONFIG, files_when_done

JOBS = ".jobs"  # no concept's name begins with a dot
PLAN = "plan.yaml"
USER_ERROR = 2
"""The exit code of `train` for something the user gave; trying again would not help."""
ASKED = (-signal.SIGTERM, -signal.SIGINT, 130)
"""Exit codes of a process that somebody has asked to end, which is no failure."""
LOCKED = "another process is working in this folder"


@dataclass(frozen=True)
class Job:
    """One concept to train. Plain text throughout, so that it can travel to another machine."""

    name: str
    runs: str
    """The folder of all runs."""
    arguments: tuple[str, ...]
    """What follows `pyunictokens train`, without --out and --resume."""
    retries: int = 1
    """How often a job that breaks down is taken up again."""
    files: tuple[str, ...] = ()
    """Files in the run's folder that exist when it is finished."""
    program: tuple[str, ...] = ("-m", "pyunictokens")
    """What Python is started with."""

    @property
    def out(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def log(self) -> Path:
        return Path(self.runs) / JOBS / f"{self.name}.log"


@dataclass
class Status:
    """How a job stands."""

    name: str
    state: str = "waiting"
    """waiting, running, done, failed, stopped (asked to end, goes on next time), elsewhere (another process has it)."""
    tries: int = 0
    seconds: float = 0.0
    message: str = ""
    """The last line it said, where it is not done."""

    @classmethod
    def read(cls, runs: str | os.PathLike[str], name: str) -> Status:
        """The status on disk; waiting where there is none or it cannot be read."""
        file = Path(runs) / JOBS / f"{name}.json"
        if not file.exists():
            return cls(name)
        try:
            found = cls(**read_json(file))
        except (UserError, TypeError):
            return cls(name)
        words = (found.name, found.state, found.message)
        numbers = isinstance(found.tries, int) and isinstance(found.seconds, (int, float))
        return found if found.name == name and numbers and all(isinstance(word, str) for word in words) else cls(name)

    def write(self, runs: str | os.PathLike[str]) -> None:
        write_json(Path(runs) / JOBS / f"{self.name}.json", asdict(self))


def choose(names: Sequence[str], wanted: str, shard: str | None = None) -> list[str]:
    """The concepts that `wanted` names: ``all``, ``a,b,c``, or a text file with one a line; of those the `shard`
    ``i/n`` (the i-th, i+n-th, … of n parts, i from 1). Raises UserError for unknown names and bad shards."""
    if wanted == "all":
        chosen = list(names)
    else:
        file = Path(wanted)
        words = read_text(file).split("\n") if file.is_file() else wanted.split(",")
        chosen = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    unknown = [name for name in chosen if name not in set(names)]
    if unknown or not chosen:
        there = ", ".join(list(names)[:10]) or "none"
        raise UserError(f"concepts {', '.join(unknown[:5]) or wanted!r}: not in the data folder; there are {there}")
    if shard is None:
        return chosen
    part, slash, parts = shard.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"shard {shard!r}: must be I/N with 1 ≤ I ≤ N, as in 3/40")
    return chosen[int(part) - 1 :: int(parts)]


def plan(
    runs: str | os.PathLike[str],
    names: Sequence[str],
    arguments: Sequence[str],
    *,
    grpo: bool,
    evaluate: bool,
    retries: int,
) -> list[Job]:
    """Jobs of `names`; `arguments` hold ``{name}`` where the concept's name belongs. Raises UserError when the folder
    was begun with other arguments."""
    from ..config.settings import load_yaml, save_yaml

    runs = Path(runs)
    file, wanted = runs / JOBS / PLAN, {"arguments": list(arguments)}
    if file.exists():
        found = load_yaml(file)
        if found != wanted:
            words = found.get("arguments")
            there = " ".join(map(str, words)) if isinstance(words, list) else f"… ({file} cannot be read)"
            raise UserError(
                f"{runs}: was begun with `train {there}`, this is `train {' '.join(arguments)}`: ask for the same, or "
                "choose another folder"
            )
    else:
        save_yaml(file, wanted)
    files = files_when_done(grpo, evaluate)
    return [
        Job(name, str(runs), tuple(word.replace("{name}", name) for word in arguments), retries, files)
        for name in names
    ]


def finished(job: Job) -> bool:
    """Whether the run's folder holds everything it should."""
    return all((job.out / file).is_file() for file in job.files)


def work(
    job: Job,
    environment: dict[str, str] | None = None,
    started: Callable[[subprocess.Popen[bytes]], None] | None = None,
    stop: Stop = never,
) -> Status:
    """Do one job to its end, with retries; returns and writes its status. `started` is told of each process.

    Once `stop` says so, or somebody else has asked the job to end, it is not taken up again.
    """
    status = Status.read(job.runs, job.name)
    if status.state == "done" and finished(job):
        return status
    begun = time.monotonic()
    before = status.seconds
    for _ in range(job.retries + 1):
        if stop():
            break
        status.state, status.message, status.tries = "running", "", status.tries + 1
        status.write(job.runs)
        code = _once(job, environment, started)
        status.seconds = round(before + time.monotonic() - begun, 1)
        status.state, status.message = _judge(job, code, stop())
        if status.state != "failed" or code == USER_ERROR:
            break
    status.write(job.runs)
    return status


def _once(
    job: Job, environment: dict[str, str] | None, started: Callable[[subprocess.Popen[bytes]], None] | None
) -> int:
    """Start the job's process and wait for it. It has a session of its own, so that a Ctrl-C or a scheduler's signal to
    our group reaches it through us alone, and its stdin ends with us: nothing is left behind, however we end."""
    command = [sys.executable, *job.program, "train", *job.arguments, "--out", str(job.out)]
    if (job.out / CONFIG).is_file():
        command.append("--resume")
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, ENDS_WITH_STDIN: "1", **(environment or {})},
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        if started is not None:
            started(process)
        return process.wait()
    finally:
        process.stdin.close()


def _judge(job: Job, code: int, asked: bool) -> tuple[str, str]:
    """(state, message) of a process that ended with `code`. `asked`: we have told it to end."""
    if code == 0 and finished(job):
        return "done", ""
    said = read_log(job.log).strip().split("\n")[-1][-500:]
    if code == 0 or code in ASKED or (asked and code != USER_ERROR):
        return "stopped", said
    if LOCKED in said:
        return "elsewhere", said
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return "failed", f"{ended}: {said}" if said else ended


def read_log(file: Path) -> str:
    """What a job said, whatever bytes it left."""
    return file.read_text(encoding="utf-8", errors="replace")


def run_local(jobs: Sequence[Job], workers: int, *, gpus: int = 0, stop: Stop = never) -> Iterator[Status]:
    """Do `jobs` with `workers` processes at a time, statuses as they end. Each worker gets its share of the cores, and
    of `gpus` one in turn.

    When `stop` says so, running jobs are asked to end (their checkpoints are written) and no new ones begin. When the
    caller leaves early, as by a second Ctrl-C, they are killed.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: must be ≥ 1")
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(workers):
        slots.put(slot)
    running: dict[int, subprocess.Popen[bytes]] = {}
    asked, killed = threading.Event(), threading.Event()
    threads = str(max(1, (os.cpu_count() or 1) // workers))

    def do(job: Job) -> Status:
        slot = slots.get()
        environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)

        def started(process: subprocess.Popen[bytes]) -> None:
            running[slot] = process  # first: whoever asks from now on finds it
            if killed.is_set():
                _kill(process)
            elif asked.is_set():
                process.terminate()

        try:
            return work(job, environment, started, asked.is_set)
        finally:
            running.pop(slot, None)
            slots.put(slot)

    waiting = iter(jobs)
    with ThreadPoolExecutor(workers) as pool:
        pending: set[Future[Status]] = set()
        try:
            while True:
                if stop() and not asked.is_set():
                    asked.set()
                    for process in list(running.values()):
                        process.terminate()
                while not asked.is_set() and len(pending) < workers and (job := next(waiting, None)) is not None:
                    pending.add(pool.submit(do, job))
                if not pending:
                    return
                ended, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
        except BaseException:  # the caller is leaving: the pool waits for its threads, and they for their processes
            asked.set()
            killed.set()
            for process in list(running.values()):
                _kill(process)
            raise


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and those it has started, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # no groups here, or it has ended already
        process.kill()
