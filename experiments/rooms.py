"""Write the tables of lines by folder in docs/architecture.md from git's history: ``python -m experiments.rooms``.

Counted are all lines of the package's Python files, empty ones and comments too, at two commits: FIRST, and HEAD or
``--now REV``. It wants the whole history; a shallow clone has no FIRST.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pyunictokens.utils.files import write_text_atomic

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: begin -->\n", "<!-- rooms: end -->"
FIRST = "b534215"
"""The commit that the package is compared with."""
LIBRARIES = {
    "600bc1c": "served reward models: a protocol of our own → HTTP by uvicorn and httpx",
    "1c75f6a": "the judge's retries → the openai client, its replies rebuilt before they are read",
    "5fa1cb7": "adapters: a format of our own → PEFT's files",
    "95c125a": "layers spread over ranks → FSDP2",
}
"""Commits that moved something to a library."""


def git(*words: str, root: Path = ROOT) -> str:
    """What git says."""
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout


def lines(revision: str, root: Path = ROOT) -> Counter[str]:
    """Lines of Python by folder at a commit; modules beside the folders count as "loose"."""
    found: Counter[str] = Counter()
    for line in git("grep", "-c", "", revision, "--", "pyunictokens/*.py", "kernels/*.py", root=root).splitlines():
        _, path, count = line.rsplit(":", 2)
        parts = path.split("/")
        room = "kernels" if parts[0] == "kernels" else parts[1] if len(parts) > 2 else "loose"
        found[room] += int(count)
    return found


def moved(commit: str, root: Path = ROOT) -> tuple[int, int]:
    """Lines of the package that a commit took out and put in."""
    stat = git("show", "--numstat", "--format=", commit, "--", "pyunictokens/*.py", root=root).splitlines()
    put, took = (sum(int(line.split("\t")[place]) for line in stat if line) for place in (0, 1))
    return took, put


def table(before: Mapping[str, int], after: Mapping[str, int], first: str, now: str) -> str:
    """Folders by size now, then those that are no more, then the whole."""
    rooms = sorted({*before, *after}, key=lambda room: (-after.get(room, 0), room))
    rows = [f"| {room} | {before.get(room, 0) or '–'} | {after.get(room, 0) or '–'} |" for room in rooms]
    whole = f"| **all** | **{sum(before.values())}** | **{sum(after.values())}** |"
    return "\n".join([f"| folder | lines at {first} | lines at {now} |", "|---|---|---|", *rows, whole]) + "\n"


def libraries() -> str:
    """What each move to a library took out of the package and put in."""
    rows = [f"| {what} | {moved(commit)[0]} | {moved(commit)[1]} |" for commit, what in LIBRARIES.items()]
    return "\n".join(["| moved to a library | lines taken out | lines put in |", "|---|---|---|", *rows]) + "\n"


def updated(text: str, tables: str) -> str:
    """`text` with the tables between its marks renewed."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{tables}\n{text[end:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--now", default="HEAD", help="the commit that is counted beside the first")
    now = git("rev-parse", "--short=7", parser.parse_args().now).strip()
    tables = table(lines(FIRST), lines(now), FIRST, now) + "\n" + libraries()
    write_text_atomic(FILE, updated(FILE.read_text(encoding="utf-8"), tables))


if __name__ == "__main__":
    main()
