"""Commands that need no model: help, exit codes, warnings, data folders, the benchmark suite."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from pyunictokens.cli.shell import guarded
from tests.cli.calling import call, only_error

# --- edges ---------------------------------------------------------------------------------------------------------


def test_help_needs_no_torch_and_is_quick() -> None:
    check = "import sys, pyunictokens.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "pyunictokens", "--help"], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0 and "understand" in done.stdout
    # processor time: a busy machine must not make this fail
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (ValueError("a bug"), 1, "Traceback"),
        (OSError(28, "No space left on device", "/x/file"), 2, "error: /x/file: No space left on device"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (OSError(5, "a bug"), 1, "Traceback"),
        (BrokenPipeError(32, "of a socket"), 1, "Traceback"),
        (SystemExit(0), 1, "error: something that was called ended this program (sys.exit(0))"),
        (MemoryError(), 2, "error: out of memory (MemoryError): ask for less at once"),
        (RuntimeError("x: DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "error: out of memory (x: Default"),
        (ValueError("a\x1b]0;b\x07" + "c" * 50_000), 1, "a\\x1b]0;b\\x07"),
    ],
)
def test_exit_codes(error: BaseException, code: int, says: str) -> None:
    import typer

    def command() -> None:
        raise error

    small = typer.Typer()
    small.command()(guarded(command))
    result = CliRunner().invoke(small, [])
    assert result.exit_code == code
    assert says in result.output
    assert ("Traceback" in result.output) == (code == 1 and not isinstance(error, SystemExit))


def test_a_missing_extra_is_one_line() -> None:
    import typer

    from pyunictokens.utils.errors import require

    small = typer.Typer()
    small.command()(guarded(lambda: require("no_such_module_at_all", "rewards")))
    result = CliRunner().invoke(small, [])
    assert result.exit_code == 2
    assert "pip install 'pyunictokens[rewards]'" in result.output and "Traceback" not in result.output


def test_warnings_are_one_line_and_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyunictokens.cli.shell import show_warnings_briefly

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    show_warnings_briefly()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for number in (1, 2):
            warnings.warn(f"{number} rows were filled", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert capsys.readouterr().err == "warning: 1 rows were filled\nwarning: something else\n"


# --- data ----------------------------------------------------------------------------------------------------------


def test_data_toy_list_check(tmp_path: Path) -> None:
    call("data", "toy", tmp_path / "d", "ann", "--kind", "human", "--seed", 2)
    listing = call("data", "list", tmp_path / "d")
    assert "ann" in listing and "human" in listing
    assert "no problems" in " ".join(call("data", "check", tmp_path / "d").split())
    (tmp_path / "d" / "concept" / "train" / "ann" / "info.json").write_text("{")
    table = call("data", "check", tmp_path / "d", code=2)
    assert "concept/train/ann/info.json" in table and "line 1" in " ".join(table.split())
    rows = json.loads(call("data", "check", tmp_path / "d", "--json", code=2))
    assert any(row["severity"] == "error" and "info.json" in row["file"] for row in rows)
    assert "is there already" in only_error("data", "toy", tmp_path / "d", "ann")
    assert "--kind plant" in only_error("data", "toy", tmp_path / "d", "x", "--kind", "plant")
    assert "'../x'" in only_error("data", "toy", tmp_path / "d", "../x")


def test_data_new_from_photos(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(6):
        colour = (40 * index, 200 - 30 * index, 90)
        Image.new("RGB", (80 + index, 70), colour).save(photos / f"p{index}.jpg")
    sheet = tmp_path / "mug.yaml"
    template = call("data", "new", tmp_path / "d", "mug", "--class", "mug", "--template")
    sheet.write_text(re.sub(r"\[[A-Z ?]+\]", "blue", template))
    text = call("data", "new", tmp_path / "d", "mug", photos, "--kind", "object", "--class", "mug", "--facts", sheet)
    assert "4 photos to learn from, 2 to test with" in text
    assert "mug" in call("data", "list", tmp_path / "d")
    call("data", "check", tmp_path / "d", "mug")  # exit code 0: no errors
    assert "no photos" in only_error("data", "new", tmp_path / "d", "x", "--class", "mug")
    assert "--class is missing" in only_error("data", "new", tmp_path / "d", "x", photos)
    (photos / "p0.jpg").write_bytes(b"not a picture")
    assert "p0.jpg" in only_error("data", "new", tmp_path / "d", "y", photos, "--class", "mug")


def test_bench_runs_the_suite_of_the_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyunictokens.cli import bench

    called: list[Any] = []

    def fake(command: list[str], env: dict[str, str], **_: Any) -> Any:
        called.append(command)
        assert env["PYTHONIOENCODING"] == "cp1252:backslashreplace"
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(bench.subprocess, "run", fake)
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    call("bench", "rollout", "--only", "text", "--rounds", 1, code=3)
    assert called[0][1:] == ["-m", "benchmarks.run_cpu", "--only", "text", "--rounds", "1"]
    call("bench", "memory", "--timesteps", 5, 50, code=3)
    assert called[1][1:] == ["-m", "benchmarks.update_memory", "--timesteps", "5", "50"]
    call("bench", "ops", "--help", code=3)  # the suite's own
    assert called[2][1:] == ["-m", "benchmarks.ops", "--help"]
    for option in ("--help", "-h"):
        assert "bench SUITE --help" in call("bench", option)
    assert len(called) == 3
    assert "rollout or memory" in only_error("bench", "speed")
    assert "rollout or memory" in only_error("bench", "--rounds", 1)
    assert (bench.source_tree() / "benchmarks" / "run_cpu.py").is_file()
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert "source tree" in only_error("bench")


@pytest.mark.slow
def test_bench_writes_where_the_caller_says(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    before = {file: file.stat().st_mtime_ns for file in results.iterdir()}
    words = "--smoke --operations grpo_loss --peers ours-reference --rounds 1 --no-memory --out x.json"
    command = [sys.executable, "-m", "pyunictokens", "bench", "ops", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert {file: file.stat().st_mtime_ns for file in results.iterdir()} == before
