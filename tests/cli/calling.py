"""Calling the command line in a test."""

from __future__ import annotations

from typer.testing import CliRunner

from pyunictokens.cli import app


def call(*words: object, code: int = 0) -> str:
    """Run a command, hold its exit code against `code`, return what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def only_error(*words: object) -> str:
    """The one message of a command that ends with exit code 2."""
    text = call(*words, code=2)
    assert "Traceback" not in text
    assert text.startswith("error: "), text
    return text
