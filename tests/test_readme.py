"""The README as a newcomer follows it: its Python runs, its commands run in their order, its server and page answer."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyunictokens.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = ["stages.max_steps=1", "num_understanding=2", "num_generation=2", "grpo.steps=1", "grpo.group_size=2"]
SHORT += ["grpo.groups=1", "grpo.max_new_tokens=4", "evaluation.samples=1", "evaluation.timesteps=2"]
SHORT += ["evaluation.max_new_tokens=4", "evaluation.tasks=[pure]"]


def blocks(language: str) -> list[str]:
    every = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [body for kind, body in every if kind == language]


def commands() -> list[list[str]]:
    """The words of every command of this program, in their order."""
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("pyunictokens ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_first_screen_is_short_and_says_what_it_is() -> None:
    title, what, picture = README.split("\n\n")[:3]
    assert title == "# pyunictokens" and len(what) < 300 and picture.startswith("![")
    place = re.search(r"\((.*)\)$", picture)
    assert place is not None and (ROOT / place[1]).is_file()
    assert len(README.splitlines()) < 200
    tables = [rows.splitlines() for rows in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)]
    assert tables and max(map(len, tables)) <= 8, "long tables stand in docs/"


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_ten_lines_for_each_of_three_users(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with fewer steps where they train; the learned concept is one of the tests'."""
    monkeypatch.chdir(tmp_path)
    first, second, third = blocks("python")
    code = (first, second, third)[number]
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    shutil.copytree(ROOT / "tests" / "runs" / "old_run", tmp_path / "runs", dirs_exist_ok=True)
    if number == 2:
        monkeypatch.chdir(tmp_path / "runs")  # the paths in that run are relative to here
        code = code.replace('"runs/bo"', '"run"')
    scope: dict[str, Any] = {}
    exec(compile(code.replace("steps=20", "steps=1"), "README.md", "exec"), scope)
    if number == 0:
        assert scope["hidden"].grad.abs().sum() > 0 and scope["logp"].shape == scope["chosen"].shape
    elif number == 1:
        assert scope["result"].steps == 1 and (tmp_path / "runs" / "tinted" / "metrics.jsonl").is_file()
    else:
        assert len(scope["images"]) == 4 and (tmp_path / "runs" / "beach.png").is_file()


def served(words: list[str], folder: Path, path: str) -> str:
    """What a command that serves answers at `path`, on a free port, before it is asked to end."""
    line = [sys.executable, "-m", "pyunictokens", *words, "--port", "0"]
    child = subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert child.stdout is not None
        address = None
        while address is None:
            said = child.stdout.readline()
            assert said, f"{words}: ended with {child.wait()}"
            address = re.search(r"http://127\.0\.0\.1:\d+", said)
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(address[0] + path, timeout=60) as answer:
                    return str(answer.read().decode())
            except OSError:
                assert time.monotonic() < deadline and child.poll() is None, f"{words}: nobody answers"
                time.sleep(0.5)
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(60)
        finally:
            child.kill()


@pytest.mark.slow
def test_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the README, on the toy, with fewer steps; those of real weights up to their plan."""
    assert len(commands()) == 14
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for n in range(6):
        Image.new("RGB", (90, 80), (40 * n, 200 - 30 * n, 90)).save(tmp_path / "photos" / f"{n}.jpg")
    ran = []
    for words in commands():
        name = words[0]
        if name == "serve":
            assert '"bo"' in served(words, tmp_path, "/v1/models")
        elif name == "studio":
            assert "<html" in served(words, tmp_path, "/")
        elif name == "train" and "--model" in words and "--plan" not in words:
            continue  # the one command that fetches weights
        else:
            words = ["sheet" if word == ">" else word for word in words]
            sheet = words.index("sheet") if "sheet" in words else None
            short = SHORT if name in {"demo", "train"} and "--plan" not in words else []
            if name == "evaluate":
                short = ["samples=1", "timesteps=2", "max_new_tokens=4", "tasks=[pure]"]
            result = CliRunner().invoke(app, [*words[:sheet], *short], env={"COLUMNS": "200"})
            assert result.exit_code == 0, f"{words}: {result.output}"
            if sheet is not None:
                Path(words[sheet + 1]).write_text(re.sub(r"\[[A-Z ?]+\]", "blue", result.output))
        ran.append(name)
    wanted = ["demo", "data", "train", "generate", "generate", "understand", "evaluate", "compare", "serve", "studio"]
    assert ran == [*wanted, "data", "data", "train"]
    assert (tmp_path / "demo" / "report.html").is_file() and (tmp_path / "beach.png").is_file()
