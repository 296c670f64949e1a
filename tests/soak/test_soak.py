"""`make soak`: the long form of tests/train/test_survival.py, a hundred kills and a disk that is really full.

Kills at every moment at which files become whole, kills by the clock, kills while a killed run is taken up again; then
the finished run must equal the undisturbed one, value for value. Not in the normal tests: it takes minutes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyunictokens.utils.errors import UserError
from tests.soak import chaos
from tests.train.world import World, world

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:.*rows are filled"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

KILLS = int(os.environ.get("KILLS", "60"))
"""Kills of each kind and of each trainable."""


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


@pytest.mark.parametrize("trainable", ["concept", "full"])
def test_kills_at_random_moments(here: World, tmp_path: Path, trainable: str) -> None:
    """Half of the kills fall by the clock, half on a call that makes a file whole; runs are begun anew when done."""
    config = chaos.settings(trainable=trainable, steps=8)
    calls = chaos.count_calls(here, config, tmp_path / "straight")
    wanted, rng, kills, runs = chaos.contents(tmp_path / "straight"), random.Random(1), 0, 0
    while kills < KILLS:
        out, lives = tmp_path / f"run{runs}", 0
        runs += 1
        while True:
            lives += 1
            if lives > 12:  # enough of this run
                code = chaos.live(here, config, out)
            elif rng.random() < 0.5:
                code = chaos.live(here, config, out, after=rng.uniform(0.01, 1.5))
            else:
                code = chaos.live(here, config, out, at_call=rng.randrange(1, calls // 3))
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break
        assert chaos.contents(out) == wanted and not chaos.leftovers(out), f"run {runs} after {lives} lives"
    print(f"{kills} kills in {runs} runs")


def test_a_kill_at_every_moment_at_which_a_file_becomes_whole(here: World, tmp_path: Path) -> None:
    config = chaos.settings(steps=4, sample_every=0)
    calls = chaos.count_calls(here, config, tmp_path / "straight")
    wanted = chaos.contents(tmp_path / "straight")
    for call in range(1, calls + 1):
        out = tmp_path / f"run{call}"
        assert chaos.live(here, config, out, at_call=call) == -signal.SIGKILL
        assert chaos.live(here, config, out) == 0
        assert chaos.contents(out) == wanted, f"killed at call {call} of {calls}"
    print(f"{calls} kills")


# --- real disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_and_is_made_larger(here: World, tmp_path: Path, small_disk: Path) -> None:
    config, out = chaos.settings(steps=8, trainable="full"), small_disk / "run"
    chaos.run(here, config, tmp_path / "straight")
    sizes, ends = [400, 500, 600, 700, 800, 1000, 1400, 2000, 4000, 100_000], []
    for size in sizes:
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
        try:
            chaos.run(here, config, out)
            break
        except (UserError, OSError) as error:
            assert "No space left" in str(error) and str(small_disk) in str(error)
            ends.append(str(error))
    assert len(ends) >= 2, "the disk never was full"
    assert chaos.contents(out) == chaos.contents(tmp_path / "straight")


def test_a_disk_that_may_only_be_read(here: World, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=f"Read-only file system: '{small_disk}"):
        chaos.run(here, chaos.settings(), small_disk / "run")
