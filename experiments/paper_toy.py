"""Brings a finished `evaluate paper --table 1 --toy` into the documents: its numbers as docs/paper_toy.json, its table
into docs/baselines.md.

    python experiments/paper_toy.py OUT          OUT: the folder that the command wrote
    python experiments/paper_toy.py              the table alone, from docs/paper_toy.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from pyunictokens.evaluate.report.beside import markdown
from pyunictokens.utils.files import read_json, write_json, write_text_atomic

DOCS = Path(__file__).parent.parent / "docs"
NUMBERS, PAGE = DOCS / "paper_toy.json", DOCS / "baselines.md"
BEGIN, END = "<!-- paper-toy:begin -->", "<!-- paper-toy:end -->"


def with_table(page: str) -> str:
    """The page with the table of the stored numbers between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown(read_json(NUMBERS))}\n{END}{rest.split(END)[1]}"


def main() -> None:
    if len(sys.argv) > 1:
        found = read_json(Path(sys.argv[1]) / "table1" / "paper.json")
        settings = {key: value for key, value in found["settings"].items() if key != "suite"}
        write_json(NUMBERS, {**found, "settings": settings})
    write_text_atomic(PAGE, with_table(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
