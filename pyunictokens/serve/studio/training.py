"""Training from the studio: `pyunictokens train` in a process of its own, a run at a time.

A run is a job as those of a sweep (runs/sweep.py): a process group of its own, what it says in RUNS/.jobs/NAME.log, how
it stands in RUNS/.jobs/NAME.json. It does not depend on any page that is open, and ends in good order with the studio.
What is shown of it is read from the files that `train` writes.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...config.settings import load_yaml
from ...data.concept import concept_name
from ...runs.run_dir import CONFIG, PARTS, STAGES, Origin, files_when_done
from ...runs.sweep import Job, Status, read_log, work
from ...utils.errors import UserError
from ...utils.files import read_json_lines, safe_name

PLAN_LIMIT = 600.0
"""Seconds that a plan may take; the toy's is measured by drawing."""

_WORD = re.compile(r"[a-z_][a-z0-9_.]*=.*", re.DOTALL)
_TAIL = 12


@dataclass(frozen=True)
class TrainForm:
    """What somebody filled in."""

    concept: str
    run: str = ""
    """The run's name; empty: the concept's."""
    steps: int | None = None
    """Of reinforcement; None: the preset's. 0: none."""
    evaluate: bool = True
    """Whether to measure before and after, and to report."""
    seed: int = 0
    words: str = ""
    """Further settings, KEY=VALUE as `train` takes them."""


@dataclass(frozen=True)
class View:
    """How a run stands."""

    state: str = "waiting"
    """waiting, running, stopping, done, failed or stopped."""
    said: str = ""
    """The last lines of its log."""
    stages: list[tuple[int, str, float]] = field(default_factory=list)
    """(step, stage, loss)."""
    rewards: list[tuple[int, str, float]] = field(default_factory=list)
    """(step, what, mean reward): the whole, and each reward model's."""
    samples: list[Path] = field(default_factory=list)
    """Grids of images, the newest first."""


class Training:
    """Runs in the folder `runs` on the concepts of `data`; options: what every `train` is told of model and device;
    program: what Python is started with."""

    def __init__(
        self, runs: Path, data: Path, options: Sequence[str] = (), program: tuple[str, ...] = ("-m", "pyunictokens")
    ):
        self.runs, self.data, self._options, self._program = runs, data, tuple(options), program
        self._lock = threading.Lock()
        self._name: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._asked = threading.Event()

    @property
    def running(self) -> str | None:
        """The run that is being trained."""
        return self._name if self._thread is not None and self._thread.is_alive() else None

    def names(self) -> list[str]:
        """Runs that are there or were started, the one that runs first."""
        there = sorted(
            file.parent.name for file in self.runs.glob(f"*/{CONFIG}") if not file.parent.name.startswith(".")
        )
        running = self.running
        return list(dict.fromkeys([*([running] if running else []), *there]))

    def arguments(self, form: TrainForm) -> list[str]:
        """What follows `pyunictokens train`. Raises UserError for what is no setting."""
        try:
            words = shlex.split(form.words)
        except ValueError as error:
            raise UserError(f"{form.words!r}: {error}: close every quotation mark") from None
        for word in words:
            if not _WORD.fullmatch(word):
                raise UserError(f"{word!r}: settings are KEY=VALUE, as in grpo.group_size=4 (docs/training.md)")
            if word.partition("=")[0].endswith("objective") and ":" in word:
                raise UserError(f"{word!r}: code of your own is named on the command line alone")
        if form.steps is not None and form.steps < 0:
            raise UserError(f"steps={form.steps}: must be ≥ 0 (0: no reinforcement), or stay empty")
        if form.steps:
            words.append(f"grpo.steps={form.steps}")
        flags = ["--no-grpo"] if form.steps == 0 else []
        flags += [] if form.evaluate else ["--no-evaluate"]
        where = [str(self.data), concept_name(form.concept)]
        return [*where, *words, *flags, "--seed", str(form.seed), *self._options]

    def plan(self, form: TrainForm) -> str:
        """What `train --plan` says. Raises UserError with its error."""
        out = self.runs / self._run_name(form)
        command = [sys.executable, *self._program, "train", *self.arguments(form), "--out", str(out), "--plan"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PLAN_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"the plan took longer than {PLAN_LIMIT:g} s") from None
        if done.returncode:
            raise UserError(done.stderr.strip().removeprefix("error: ")[-1000:] or "the plan could not be made")
        # what the command says of its own flags is of no use on a page
        lines = [line for line in done.stdout.strip().splitlines() if "--price" not in line]
        return "\n".join(line.partition(": the same command")[0] for line in lines)

    def start(self, form: TrainForm) -> str:
        """Begin a run; returns its name. Raises UserError where its folder holds one, or another one runs."""
        name = self._run_name(form)
        if (self.runs / name / CONFIG).exists():
            raise UserError(f"{name}: there is such a run already: resume it, or choose another name")
        files = files_when_done(form.steps != 0, form.evaluate)
        return self._begin(Job(name, str(self.runs), tuple(self.arguments(form)), 0, files, self._program))

    def resume(self, name: str) -> str:
        """Go on with a run where it stopped."""
        config = self.runs / safe_name(name, "run") / CONFIG
        if not config.is_file():
            raise UserError(f"{name}: was not begun here; start it")
        parts = Origin.of(load_yaml(config), str(config)).parts or PARTS
        files = files_when_done("grpo" in parts, "evaluation" in parts)
        job = Job(name, str(self.runs), self._options, 0, files, self._program)
        if Status.read(job.runs, name).state == "done":
            raise UserError(f"{name}: is done")
        return self._begin(job)

    def stop(self) -> str:
        """Ask the run to end: it finishes its step and saves. Asked again, it ends at once. Returns what happens."""
        name, process = self.running, self._process
        if name is None or process is None:
            raise UserError("nothing is being trained")
        again = self._asked.is_set()
        self._asked.set()
        process.terminate()
        return f"{name} ends at once" if again else f"{name} finishes its step and saves; Stop again ends it at once"

    def look(self, name: str) -> View:
        """How a run stands, from its files."""
        out, job = self.runs / safe_name(name, "run"), Job(name, str(self.runs), ())
        state = Status.read(job.runs, name).state
        if name == self.running:
            state = "stopping" if self._asked.is_set() else "running"
        elif state == "running":  # of a studio that was killed
            state = "stopped"
        elif state == "waiting" and (out / "final").is_dir():  # trained by the command
            state = "done"
        lines = read_log(job.log).strip().split("\n")[-_TAIL:] if job.log.is_file() else []
        learned, rewards = _rows(out / STAGES / "stages.jsonl"), _rows(out / "metrics.jsonl")
        losses = [(step, str(row.get("stage")), _number(row.get("loss"))) for step, row in enumerate(learned, 1)]
        means = [(step, "all", _number(row.get("reward_mean"))) for step, row in enumerate(rewards, 1)]
        for step, row in enumerate(rewards, 1):
            parts = row.get("parts")
            means += (
                [(step, str(name), _number(value)) for name, value in parts.items()] if isinstance(parts, dict) else []
            )
        samples = sorted((out / "samples").glob("step_*_final.png"), reverse=True)
        return View(state, "\n".join(lines), _known(losses), _known(means), samples)

    def close(self, grace: float) -> None:
        """Ask the run to end and wait for `grace` seconds; one that takes longer ends by itself."""
        if self.running is not None:
            if not self._asked.is_set():
                self.stop()
            assert self._thread is not None
            self._thread.join(grace)

    def _run_name(self, form: TrainForm) -> str:
        return safe_name(form.run.strip() or form.concept, "run")

    def _begin(self, job: Job) -> str:
        with self._lock:
            if self.running is not None:
                raise UserError(f"{self.running} is being trained: stop it first, or wait for it")
            self._asked.clear()
            begun = threading.Event()

            def started(process: subprocess.Popen[bytes]) -> None:
                self._process = process
                begun.set()

            def run() -> None:
                try:
                    work(job, None, started, self._asked.is_set)
                finally:
                    begun.set()

            self._name, self._thread = job.name, threading.Thread(target=run, name=f"train {job.name}", daemon=True)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("", encoding="utf-8")
            self._thread.start()
        begun.wait()
        return job.name


def _rows(file: Path) -> list[dict[str, object]]:
    return list(read_json_lines(file)) if file.is_file() else []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _known(points: list[tuple[int, str, float | None]]) -> list[tuple[int, str, float]]:
    """Without the points of steps that were left out."""
    return [(step, name, value) for step, name, value in points if value is not None]
