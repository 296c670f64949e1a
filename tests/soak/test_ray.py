"""`make soak`, a cluster: `train --concepts` over two Ray nodes on this machine, one job killed, then one node.

What the adapter does with Ray's answers is held in seconds, with a stand-in, by tests/runs/test_sweep.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyunictokens.toy.concept import write_toy_concept

pytestmark = pytest.mark.soak

RAY = Path(sys.executable).parent / "ray"
WORDS = ["stages.max_steps=10", "grpo.steps=2", "grpo.group_size=3", "grpo.timesteps=4", "grpo.sample_every=0"]
WORDS += ["evaluation.samples=1", "evaluation.timesteps=4"]


def processes(*words: str, parent: int | None = None) -> list[int]:
    """Ids of the processes, of all or of one parent, whose command line holds all words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            status = (folder / "status").read_text()
        except OSError:
            continue
        if all(word in line for word in words) and (parent is None or f"\nPPid:\t{parent}\n" in status):
            found.append(int(folder.name))
    return found


def wait_for(something: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not something():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)


@dataclass
class Cluster:
    """Two nodes with a core each, in processes of their own: another cluster of this machine is left alone."""

    address: str
    second: subprocess.Popen[bytes]

    def lose_the_second_node(self) -> None:
        (raylet,) = processes("raylet/raylet", parent=self.second.pid)
        os.kill(raylet, signal.SIGKILL)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    assert RAY.exists(), "this test needs Ray: pip install -e '.[cluster]' (make soak does)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    nodes: list[subprocess.Popen[bytes]] = []

    def node(*words: str) -> subprocess.Popen[bytes]:
        command = [RAY, "start", "--block", "--num-cpus", "1", *words]
        nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_for(lambda: processes("raylet/raylet", parent=nodes[-1].pid))
        return nodes[-1]

    try:
        node("--head", "--port", address.rpartition(":")[2], "--include-dashboard=false")
        yield Cluster(address, node("--address", address))
    finally:
        for each in reversed(nodes):  # each stops what it started
            each.terminate()
            each.wait(60)


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


def test_a_killed_job_and_a_lost_node(tmp_path: Path, cluster: Cluster) -> None:
    data, out, lost = tmp_path / "data", tmp_path / "out", tmp_path / "lost"
    names = ["a", "b", "c"]
    for seed, (name, kind) in enumerate(zip(names, ("animal", "human", "object"), strict=True)):
        write_toy_concept(data, seed=seed, kind=kind, name=name)

    run = start(data, out, cluster.address)
    wait_for(lambda: processes("-m pyunictokens train", f"{data} b "))
    time.sleep(5)  # it is somewhere in its stages
    for process in processes("-m pyunictokens train", f"{data} b "):
        os.kill(process, signal.SIGKILL)
    said, _ = run.communicate(timeout=400)
    assert run.returncode == 0, said
    assert {name: status["state"] for name, status in statuses(out).items()} == dict.fromkeys(names, "done")
    assert statuses(out)["b"]["tries"] == 2 and (out / "report.html").exists()

    run = start(data, lost, cluster.address)
    wait_for(lambda: len(processes("-m pyunictokens train", f"{data} ", "--out")) >= 3)  # the command and two jobs
    cluster.lose_the_second_node()
    said, _ = run.communicate(timeout=400)
    states = [status["state"] for status in statuses(lost).values()]
    assert run.returncode != 0 and "takes them up again" in said and states.count("failed") == 1, said
    again = start(data, lost, cluster.address)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert {status["state"] for status in statuses(lost).values()} == {"done"}
