"""Measure what an installation takes and write docs/install.json: ``python -m experiments.install_sizes``.

The wheel is the one in dist/ (`make wheels`); `packages` are the installed files of the extra `cli` with all that it
needs, torch included, as they lie in this environment; `clone` is a shallow clone: its packed objects and its files.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from pyunictokens.utils.files import write_json

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


def main() -> None:
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
    write_json(FILE, measured)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
