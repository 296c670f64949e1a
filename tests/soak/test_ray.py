"""`make soak`, a cluster: `train --concepts` over two Ray nodes on this machine, one job killed, then one node.

What the adapter does with Ray's answers is held in seconds, with a stand-in, by tests/test_many.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyunictokens.data.toyconcept import write_toy_concept

pytestmark = pytest.mark.soak

RAY = Path(sys.executable).parent / "ray"
PORT = 6399
WORDS = ["stages.max_steps=10", "grpo.steps=2", "grpo.group_size=3", "grpo.timesteps=4", "grpo.sample_every=0"]
WORDS += ["evaluation.samples=1", "evaluation.timesteps=4"]


def processes(*words: str) -> list[int]:
    """Ids of the processes whose command line holds all words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(folder.name))
    return sorted(found)


def wait_for(something: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not something():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)


@pytest.fixture
def address() -> Iterator[str]:
    """A cluster of two nodes with a core each."""
    assert RAY.exists(), "this test needs Ray: pip install -e '.[cluster]' (make soak does)"

    def ray(*words: str) -> None:
        subprocess.run([RAY, *words], check=True, capture_output=True)

    ray("start", "--head", "--port", str(PORT), "--num-cpus", "1", "--include-dashboard=false")
    try:
        ray("start", "--address", f"127.0.0.1:{PORT}", "--num-cpus", "1")
        yield f"127.0.0.1:{PORT}"
    finally:
        ray("stop", "--force")


def start(data: Path, out: Path, address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pyunictokens", "train", "--concepts", "all", "--workers", "2", "--ray", address]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(data), "--out", str(out), "--device", "cpu", *WORDS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def statuses(out: Path) -> dict[str, dict[str, object]]:
    return {path.stem: json.loads(path.read_text()) for path in (out / ".jobs").glob("*.json")}


def test_a_killed_job_and_a_lost_node(tmp_path: Path, address: str) -> None:
    data, out, lost = tmp_path / "data", tmp_path / "out", tmp_path / "lost"
    names = ["a", "b", "c"]
    for seed, (name, kind) in enumerate(zip(names, ("animal", "human", "object"), strict=True)):
        write_toy_concept(data, seed=seed, kind=kind, name=name)

    run = start(data, out, address)
    wait_for(lambda: (out / "b" / "grpo.yaml").exists() or (out / "b" / "run.json").exists())
    for process in processes("-m pyunictokens train", f"{data} b "):
        os.kill(process, signal.SIGKILL)
    said, _ = run.communicate(timeout=400)
    assert run.returncode == 0, said
    assert {name: status["state"] for name, status in statuses(out).items()} == dict.fromkeys(names, "done")
    assert statuses(out)["b"]["tries"] == 2 and (out / "report.html").exists()

    run = start(data, lost, address)
    wait_for(lambda: len(processes("-m pyunictokens train", f"{data} ", "--out")) >= 3)  # the command and two jobs
    os.kill(processes("raylet/raylet")[-1], signal.SIGKILL)
    said, _ = run.communicate(timeout=400)
    states = [status["state"] for status in statuses(lost).values()]
    assert run.returncode != 0 and "takes them up again" in said and states.count("failed") == 1, said
    again = start(data, lost, address)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert {status["state"] for status in statuses(lost).values()} == {"done"}
