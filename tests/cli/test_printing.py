"""What is printed: on any terminal, with every sign that a user must type, and quoted where it is a command."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pyunictokens.cli import app
from pyunictokens.cli.shell import command as as_command
from pyunictokens.cli.train import _separate
from pyunictokens.models.concept_tokens import ConceptTokens
from pyunictokens.runs.asking import check_prompt


def run(
    encoding: str, *words: object, start: tuple[str, ...] = ("-m", "pyunictokens")
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *start, *map(str, words)],
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"},
        capture_output=True,
        encoding=encoding,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One concept with a name that few encodings have, and a folder with a problem that is told with signs."""
    root = tmp_path_factory.mktemp("data")
    photos = root / "photos"
    photos.mkdir()
    Image.effect_noise((90, 70), 50).save(photos / "0.png")
    Image.effect_noise((40, 90), 50).save(photos / "1.png")
    made = CliRunner().invoke(app, ["data", "new", str(root / "D"), "日本 ä", str(photos), "--class", "mug"])
    assert made.exit_code == 0, made.output
    return root / "D"


COMMANDS = """
import json, sys
from pyunictokens.__main__ import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["pyunictokens", *words]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {code}", file=stream, flush=True)
"""
"""Several commands in one process, as an interpreter takes a while to start. A line behind each holds its exit code."""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_printing_never_ends_a_command(data: Path, encoding: str) -> None:
    wanted = [("list", data), ("check", data), ("check", "--json", data), ("check", data, "→−≥")]
    lines = json.dumps([["data", *map(str, words)] for words in wanted])
    done = run(encoding, COMMANDS, lines, start=("-c",))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said, errors = (re.split(r"^=== (\d)\n", text, flags=re.MULTILINE)[:-1] for text in (done.stdout, done.stderr))
    assert said[1::2] == errors[1::2] == ["0", "0", "0", "2"], done.stderr
    listed, checked, told, _ = said[::2]
    assert ("日本 ä" if encoding == "utf-8" else "\\u65e5\\u672c") in listed
    assert ("is 40×90 pixels" if encoding != "ascii" else "is 40x90 pixels") in checked
    assert any("日本 ä" in problem["file"] and "40×90" in problem["message"] for problem in json.loads(told))
    assert errors[6].startswith("error: ")


@pytest.mark.slow
def test_foreign_words_do_not_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[31m\x1b]0;mine\x07\x9b2J\r ok [red]x[/red]"
    done = run("utf-8", "data", "check", tmp_path / evil.replace("/", "|"))
    assert done.returncode == 2 and not set("\x1b\x07\x9b\r") & set(done.stderr) and "\\x1b]0;mine\\x07" in done.stderr
    from rich.table import Table

    from pyunictokens.cli.shell import Bars, _say, console

    table = Table("a")
    table.add_row(evil)
    console().print(evil, markup=False)
    console().print(table)
    with Bars() as bars:
        bars.say(evil)
        bars(evil, 0, 1, {"note": evil})
    _say("x" * 50_000)
    out, err = capsys.readouterr()
    assert not set("\x1b\x07\x9b\r") & set(out + err), repr(out + err)
    assert out.count("mine") == 2 and "[red]x[/red]" in err and "40000 characters left out" in err
    assert len(err) < 20_000


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_error(data: Path) -> None:
    for words in (["data", "list", data], ["--help"], ["data", "check", "--json", data]):  # a table, help, plain lines
        with subprocess.Popen(
            [sys.executable, "-m", "pyunictokens", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            said = process.stderr.read().decode()
            assert process.wait(60) == 0 and "Traceback" not in said and "Broken" not in said, said


@pytest.mark.slow
def test_a_name_that_is_no_text_is_printed(tmp_path: Path) -> None:
    (tmp_path / "concept" / "train").mkdir(parents=True)
    try:
        os.mkdir(os.fsencode(tmp_path / "concept" / "train") + b"/b\xff")
    except OSError:
        pytest.skip("this file system takes text alone")
    done = run("utf-8", "data", "check", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_next_commands_can_be_copied_into_a_shell(tmp_path: Path) -> None:
    root, photo = tmp_path / "my data", tmp_path / "1.png"
    Image.effect_noise((90, 70), 50).save(photo)
    for words in (["data", "new", root, "my cat", photo, "--class", "cat"], ["data", "toy", root, "a $b"]):
        text = CliRunner().invoke(app, [str(word) for word in words]).output
        command = text.rpartition("next: ")[2].partition("\n")[0]
        real = ["--model", "show-o-512"] if words[1] == "new" else []
        wanted = ["pyunictokens", "train", str(root), words[3], "--out", f"runs/{words[3]}", *real]
        assert shlex.split(command) == wanted
    assert as_command("train", Path("D"), "bo") == "pyunictokens train D bo"


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("A photo of bo", True),
        ("Bo, asleep.", True),
        ("A photo of {bo}", True),
        ("A photo of ＜bo＞", True),
        ("A photo of &lt;bo&gt;", True),
        ("A photo of <bo> and bo", False),
        ("A photo of a bowl", False),
        ("A photo of elbow", False),
    ],
)
def test_a_prompt_that_names_the_concept_without_its_token(prompt: str, asked: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_prompt(prompt, ConceptTokens("bo", 8, 1, 1))
    assert ["did you mean <bo>?" in str(warning.message) for warning in caught] == [True] * asked


def test_a_concept_named_like_a_setting_can_be_trained(tmp_path: Path) -> None:
    (tmp_path / "concept" / "train" / "a=b").mkdir(parents=True)
    assert _separate(tmp_path, "a=b", ["grpo.steps=2"]) == (tmp_path, "a=b", ["grpo.steps=2"])
    assert _separate(tmp_path, "grpo.steps=2", []) == (tmp_path, None, ["grpo.steps=2"])


def test_what_looks_like_markup_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    from pyunictokens.cli.shell import Bars

    with Bars() as bars:
        bars.say("a file [red].png[/] and [/nothing]")
        bars._last_line = -1e9
        bars("part [bold]", 1, 2, {"note": "[/oops]"})
    said = capsys.readouterr().err
    assert "a file [red].png[/] and [/nothing]" in said and "part [bold] 1/2 [/oops]" in said
