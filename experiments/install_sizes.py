"""Measure what an installation takes and write docs/install.json.

    python -m experiments.install_sizes              # sizes; wants the wheels of `make wheels`
    python -m experiments.install_sizes --minutes    # how long both lines of the README take; the sizes stay

The wheel is the one in dist/ (`make wheels`); `packages` are the installed files of the extra `cli` with all that it
needs, torch included, as they lie in this environment; `clone` is a shallow clone: its packed objects and its files.

`minutes` first fetches all packages into a folder, which is not counted: it depends on the network. Then it counts
`pip install 'pyunictokens[cli]'` into a new environment, and `git clone` with `make install`, which compiles the core
without CUDA and brings what tests and pages need as well. Both are given as seconds of the clock and of one core's work
(`core_seconds`), which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from pyunictokens.utils.files import read_json, write_json

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "install.json"


def needed(extra: str) -> set[str]:
    """Distributions that `pyunictokens[extra]` brings here, torch and everything below it included."""
    found: set[str] = set()
    waiting = [("pyunictokens", frozenset({extra}))]
    while waiting:
        name, extras = waiting.pop()
        for line in importlib.metadata.requires(name) or []:
            want = Requirement(line)
            wanted = want.marker is None or any(want.marker.evaluate({"extra": each}) for each in {"", *extras})
            key = want.name.lower().replace("_", "-")
            if not wanted or (key in found and not want.extras):
                continue
            try:
                importlib.metadata.distribution(want.name)
            except importlib.metadata.PackageNotFoundError:
                continue
            if key not in found or key == "pyunictokens":
                waiting.append((want.name, frozenset(want.extras)))
            found.add(key)
    return found - {"pyunictokens"}


def size_of(distribution: str) -> int:
    """Bytes of a distribution's installed files."""
    files = importlib.metadata.files(distribution) or []
    places = [Path(str(file.locate())) for file in files]
    return sum(place.stat().st_size for place in places if place.is_file())


def clone_bytes() -> int:
    """Bytes of a shallow clone of this repository."""
    with tempfile.TemporaryDirectory() as folder:
        url = ROOT.resolve().as_uri()
        subprocess.run(["git", "clone", "-q", "--depth", "1", url, f"{folder}/clone"], check=True)
        return sum(each.stat().st_size for each in Path(folder).rglob("*") if each.is_file() and not each.is_symlink())


class Stopwatch:
    """Seconds of commands that are run, and of the work of all cores in them."""

    def __init__(self) -> None:
        self.seconds = self.core_seconds = 0.0

    def run(self, *command: str, cwd: Path | None = None) -> None:
        """Run a command to its end; raises CalledProcessError where it fails."""
        begun, before = time.perf_counter(), _children()
        subprocess.run(command, check=True, cwd=cwd, env=PLAIN, stdout=sys.stderr)
        self.seconds += time.perf_counter() - begun
        self.core_seconds += _children() - before

    @property
    def found(self) -> dict[str, float]:
        return {"seconds": round(self.seconds, 1), "core_seconds": round(self.core_seconds, 1)}


PLAIN = {**os.environ, "PYUNICTOKENS_CUDA": "off", "PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def minutes(room: Path) -> dict[str, dict[str, float]]:
    """Seconds that the README's two lines take, {"pip": …, "clone": …}, once their packages are at hand."""
    python, constraints, packages = sys.executable, str(ROOT / "constraints.txt"), str(room / "packages")
    fetched, cloned, piped = Stopwatch(), Stopwatch(), Stopwatch()
    at_hand = ("--no-index", "--find-links", packages)
    cloned.run("git", "clone", "-q", "--depth", "1", ROOT.resolve().as_uri(), str(room / "clone"))
    fetched.run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(room / "own"), str(room / "clone"))
    build = [*_build_requirements(room / "clone"), "pip", "wheel"]
    fetched.run(
        python, "-m", "pip", "download", "-q", "-d", packages, "-c", constraints, f"{room / 'clone'}[dev]", *build
    )
    (wheel,) = (room / "own").glob("*.whl")
    piped.run(python, "-m", "venv", str(room / "environment"))
    there = str(room / "environment" / "bin" / "python")
    piped.run(there, "-m", "pip", "install", "-q", *at_hand, "-c", constraints, f"{wheel}[cli]")
    cloned.run("make", "-s", "install", f"PYTHON={python}", f"PIP_FLAGS=-q {' '.join(at_hand)}", cwd=room / "clone")
    return {"pip": piped.found, "clone": cloned.found}


def _build_requirements(folder: Path) -> list[str]:
    """What building the package wants (pyproject.toml)."""
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("requires = "))
    found = json.loads(line.partition("=")[2])
    assert isinstance(found, list)
    return [str(each) for each in found]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", action="store_true", help="measure how long it takes; 15 GB of room in TMPDIR")
    if parser.parse_args(arguments).minutes:
        with tempfile.TemporaryDirectory() as room:
            measured = {**read_json(FILE), "minutes": minutes(Path(room))}
        write_json(FILE, measured)
        print(json.dumps(measured, indent=1))
        return
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        sys.exit("dist/ holds no wheel: make wheels")
    sizes = {name: size_of(name) for name in sorted(needed("cli"))}
    measured = {
        "wheel_bytes": max(wheel.stat().st_size for wheel in wheels),
        "wheels": [wheel.name for wheel in wheels],
        "clone_bytes": clone_bytes(),
        "packages_bytes": sum(sizes.values()),
        "gpu_libraries_bytes": sum(
            size for name, size in sizes.items() if name.startswith(("nvidia", "triton", "cuda"))
        ),
        "torch": importlib.metadata.version("torch"),
    }
    if FILE.is_file() and "minutes" in (before := read_json(FILE)):
        measured["minutes"] = before["minutes"]
    write_json(FILE, measured)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
