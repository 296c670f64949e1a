"""Lines by room, counted in a repository made here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from experiments import rooms


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True)


def commit(root: Path, **files: int) -> None:
    """Files by path (`__` for /), each of so many lines, as a commit."""
    for name, count in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n" * count)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "files")


def test_lines_of_a_commit_by_room(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    commit(tmp_path, pyunictokens__train__loop=5, pyunictokens__train__deep__a=2, pyunictokens__main=3, kernels__k=4)
    commit(tmp_path, pyunictokens__train__loop=1, pyunictokens__serve__app=7, elsewhere__b=9)
    assert rooms.lines("HEAD~1", tmp_path) == {"train": 7, "loose": 3, "kernels": 4}
    assert rooms.lines("HEAD", tmp_path) == {"train": 3, "loose": 3, "kernels": 4, "serve": 7}
    assert rooms.moved("HEAD", tmp_path) == (4, 7), "of the package alone"


def test_the_table_has_every_room_and_the_whole() -> None:
    text = rooms.table({"old": 2, "train": 3}, {"train": 5, "serve": 7}, "aaa", "bbb")
    rows = text.splitlines()[2:]
    assert rows == ["| serve | – | 7 |", "| train | 3 | 5 |", "| old | 2 | – |", "| **all** | **5** | **12** |"]


def test_the_page_has_a_place_for_the_tables() -> None:
    page = rooms.FILE.read_text(encoding="utf-8")
    assert rooms.updated(page, "TABLES").count("TABLES") == 1
    with pytest.raises(ValueError):
        rooms.updated("no marks", "TABLES")
