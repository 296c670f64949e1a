"""`python -m pyunictokens` and the console script: the command line, or what to install for it."""

from __future__ import annotations

import sys

from .utils.errors import MissingExtra, require


def main() -> None:
    """Entry point of the console script. Without the extra `cli` it says so in one line."""
    try:
        require("typer", "cli")
        require("rich", "cli")
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from .cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
