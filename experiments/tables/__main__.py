"""Run the paper's tables in miniature and write docs/experiments.md and docs/experiments-tables.md.

    python -m experiments.tables --quick                 # six concepts, one seed
    python -m experiments.tables                         # six concepts, three seeds
    python -m experiments.tables --quick --unit animal-31-seed0 --arms staged ours --no-docs     # some cells
    python -m experiments.tables --quick --page          # the pages alone, from what is there
    python -m experiments.tables --stored docs/experiments.json     # the same from stored cells

Cells are kept in the work folder one by one, beginning with those of docs/experiments.json; stopping and starting
again loses at most the cells in hand, and a changed setting makes its cells anew. Several processes may work in one
work folder, each on units of its own (--unit, --no-docs); two never make the same unit. --page gathers all that is
there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyunictokens.utils.files import read_json, write_json_rows, write_text_atomic

from .all_numbers import write_all_numbers
from .arms import ARMS, SCALES
from .page import write_page
from .runner import choose, gather, restore, run

ROOT = Path(__file__).parent.parent.parent


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--quick", action="store_const", const="quick", dest="scale", help="--scale quick")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "tables", help="where cells are kept")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes, one thread each")
    parser.add_argument("--unit", nargs="+", help="only these, as animal-31-seed0")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these arms")
    parser.add_argument("--page", action="store_true", help="run nothing, write the pages from what is there")
    parser.add_argument("--stored", type=Path, help="run nothing, write the pages from this experiments.json")
    parser.add_argument("--into", type=Path, default=ROOT / "docs", help="where the pages go")
    parser.add_argument("--no-docs", action="store_true", help="write no pages")
    options = parser.parse_args(words)
    if options.stored is not None:
        write_pages(read_json(options.stored), options.into)
        return
    chosen = choose(options.scale, options.unit, options.arms)
    stored = options.into / "experiments.json"
    if stored.exists():
        restore(read_json(stored), options.work)
    began = time.monotonic()
    problems = [] if options.page else run(chosen, options.scale, options.work, options.workers)
    for problem in problems:
        print(problem)
    print(f"{time.monotonic() - began:.0f} s; cells in {options.work / options.scale / 'cells'}")
    if not options.no_docs:
        stored = gather(options.scale, options.work, problems)
        write_json_rows(options.into / "experiments.json", stored)
        write_pages(stored, options.into)


def write_pages(stored: Mapping[str, Any], into: Path) -> None:
    write_text_atomic(into / "experiments.md", write_page(stored, into))
    write_text_atomic(into / "experiments-tables.md", write_all_numbers(stored))


if __name__ == "__main__":
    main()
