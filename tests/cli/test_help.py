"""Help pages: nothing that looks like a tag or an extra is swallowed by markup, and every page has an example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from pyunictokens.cli import app


def pages(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, groups too."""
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from pages(inner, (*words, name))


PAGES = dict(pages(typer.main.get_command(app)))


@pytest.mark.parametrize("words", list(PAGES), ids=lambda words: " ".join(words) or "pyunictokens")
def test_a_page_shows_all_that_was_written(words: tuple[str, ...]) -> None:
    command = PAGES[words]
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    said = [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]
    raw = "\n".join(map(inspect.cleandoc, said))
    for mark in set(re.findall(r"<[a-zA-Z_]\w*>|pyunictokens\[[\w,]+\]", raw)):
        assert result.output.count(mark) >= raw.count(mark), (
            f"{' '.join(words)}: {mark} is not shown as often as written"
        )
    if not hasattr(command, "commands"):
        assert "pyunictokens " in (command.help or "").partition("Example")[2], f"{' '.join(words)}: no example"
        assert "Example" in result.output
        assert command.hidden or f"pyunictokens {' '.join(words)}" in result.output
