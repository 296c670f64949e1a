"""`make soak`, ranks: jobs of torchrun whose ranks are killed, and a SIGTERM. Real processes, a few minutes.

What of this can be held in seconds, with forked ranks and shorter times, is in tests/train/test_distributed.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyunictokens.toy.concept import write_toy_concept
from pyunictokens.train import read_metrics

pytestmark = pytest.mark.soak

STEPS = 8
WORDS = (
    f"stages.max_steps=1 grpo.steps={STEPS} grpo.group_size=3 grpo.timesteps=3 grpo.max_new_tokens=4 "
    "grpo.checkpoint_every=1 grpo.sample_every=0"
).split()


class Job:
    """One torchrun of two ranks on the embedded toy."""

    def __init__(self, data: Path, out: Path, *torchrun: str, train: tuple[str, ...] = ()):
        self.out, self.log = out, out.with_suffix(".log")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *torchrun]
        run = ["-m", "pyunictokens", "train", str(data), "bo", "--out", str(out), "--device", "cpu", "--no-evaluate"]
        words = ["--stages", "joint", *train, *WORDS] if "--resume" not in train else [*train]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*launch, *run, *words], stdout=log, stderr=log, env=environment)

    def step(self, number: int) -> None:
        """Wait for the checkpoint of a step."""
        end = time.monotonic() + 200
        while not (self.out / "checkpoints" / f"step_{number:06d}").exists():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"\nPPid:\t{self.process.pid}\n" not in (folder / "status").read_text():
                    continue
                words = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found.update({int(word[5:]): int(folder.name) for word in words if word.startswith(b"RANK=")})
        return found

    def end(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)

    def errors(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("error")]


def same(out: Path, straight: Path, steps: int = STEPS) -> None:
    """The same log, but for the rounding of an expert that finds its tensors elsewhere in memory."""
    lines, wanted = read_metrics(out), read_metrics(straight)[:steps]
    assert len(lines) == len(wanted) == steps
    for line, true in zip(lines, wanted, strict=True):
        for key in true.keys() - {"seconds"}:
            number = isinstance(true[key], (float, dict))
            assert line[key] == (pytest.approx(true[key], rel=1e-4, abs=1e-6) if number else true[key]), key


def test_ranks_that_are_killed_and_a_job_that_is_asked_to_stop(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_toy_concept(data, seed=0, kind="animal", name="bo")
    straight = Job(data, tmp_path / "straight")
    assert straight.end() == 0, straight.log.read_text()

    for rank in (0, 1):
        job = Job(data, tmp_path / f"killed{rank}")
        job.step(2)
        os.kill(job.ranks()[rank], signal.SIGKILL)
        killed = time.monotonic()
        assert job.end() != 0 and time.monotonic() - killed < 60
        (line,) = job.errors()
        assert f"rank {rank} (" in line and "is gone" in line and "--resume" in line
        resumed = Job(data, job.out, train=("--resume",))
        assert resumed.end() == 0
        same(job.out, straight.out)

    again = Job(data, tmp_path / "again", "--max-restarts", "3")
    for step, rank in ((2, 1), (4, 0)):
        again.step(step)
        os.kill(again.ranks()[rank], signal.SIGKILL)
    assert again.end() == 0, again.log.read_text()
    same(again.out, straight.out)

    asked = Job(data, tmp_path / "asked")
    asked.step(2)
    for process in asked.ranks().values():
        os.kill(process, signal.SIGTERM)
    assert asked.end() == 0, "each rank saves and ends with 0"
    steps = len(read_metrics(asked.out))
    assert "go on with: pyunictokens train" in asked.log.read_text() and 2 < steps < STEPS
    same(asked.out, straight.out, steps)
