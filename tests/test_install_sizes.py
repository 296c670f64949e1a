"""What an installation takes: the stopwatch, and the sentence in the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.install_sizes import ROOT, Stopwatch, _build_requirements
from experiments.readme_tables import install

SIZES = {
    "wheel_bytes": 16e6,
    "clone_bytes": 59e6,
    "packages_bytes": 5.5e9,
    "gpu_libraries_bytes": 3.5e9,
    "torch": "2.11.0",
}


def test_work_and_waiting_are_told_apart() -> None:
    watch = Stopwatch()
    watch.run(sys.executable, "-c", "import time; time.sleep(0.5)")
    slept = watch.found
    assert slept["seconds"] >= 0.5 and slept["core_seconds"] < 0.4
    watch.run(sys.executable, "-c", "sum(range(20_000_000))")
    assert watch.found["core_seconds"] > slept["core_seconds"] + 0.05, "it goes on counting"
    with pytest.raises(subprocess.CalledProcessError):
        watch.run(sys.executable, "-c", "raise SystemExit(3)")


def test_what_building_wants_is_read_from_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[build-system]\nrequires = ["a>=1", "b"]\n')
    assert _build_requirements(tmp_path) == ["a>=1", "b"]
    assert any(each.startswith("setuptools") for each in _build_requirements(ROOT))


def test_minutes_are_said_where_they_were_measured() -> None:
    assert install(SIZES).endswith("libraries for a GPU.")
    found = {"pip": {"seconds": 900.0, "core_seconds": 90.0}, "clone": {"seconds": 999.0, "core_seconds": 240.0}}
    assert "takes 1.5 minutes of one core's work" in install({**SIZES, "minutes": found})
    assert install({**SIZES, "minutes": found}).endswith("what the tests need, 4.0.")
